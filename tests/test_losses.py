"""Losses of outputs against those of torch and optax: numbers, gradients, Hessians; and what is refused."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._learning.losses import output_loss
from kpflow_dyn._learning.objective import Objective

pytestmark = pytest.mark.usefixtures("x64")

RNG = np.random.default_rng(0)
Y = 3 * RNG.standard_normal((3, 4, 5))
CLASSES = RNG.integers(0, 5, (3, 4))
PARTS = RNG.dirichlet(np.ones(5), (3, 4))
MASK = RNG.random((3, 4))
MASK[0, 1] = 0


def of_torch(y: torch.Tensor, target: np.ndarray, mask: np.ndarray) -> torch.Tensor:
    each = F.cross_entropy(y.reshape(-1, 5), torch.from_numpy(target.reshape(12, *target.shape[2:])), reduction="none")
    return (torch.from_numpy(mask.reshape(-1)) * each).sum() / mask.sum()


def of_optax(y: jax.Array, target: np.ndarray, mask: np.ndarray) -> jax.Array:
    one_hot = jax.nn.one_hot(target, 5) if target.ndim == 2 else target
    return (mask * optax.softmax_cross_entropy(y, one_hot)).sum() / mask.sum()


@pytest.mark.parametrize("target", [CLASSES, PARTS], ids=["classes", "probabilities"])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_cross_entropy_with_gradient_and_hessian(target: np.ndarray, scale: float) -> None:
    theirs, v = torch.from_numpy(scale * Y).requires_grad_(), torch.randn(3, 4, 5, dtype=torch.float64)
    expected = of_torch(theirs, target, MASK)
    (gradient,) = torch.autograd.grad(expected, theirs, create_graph=True)
    (product,) = torch.autograd.grad(gradient, theirs, v)
    y = torch.from_numpy(scale * Y).requires_grad_()
    found = output_loss("cross_entropy", torch.from_numpy(target), MASK, y.detach())
    (ours,) = torch.autograd.grad(found(y), y, create_graph=True)
    assert found(y).item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(ours, gradient, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(ours, y, v)[0], product, rtol=1e-10, atol=1e-12)

    y = jnp.asarray(scale * Y)
    found = output_loss("cross_entropy", target, MASK, y)
    numbers = [jax.value_and_grad(loss)(y) for loss in (found, lambda y: of_optax(y, target, MASK))]
    products = [jax.jvp(jax.grad(loss), (y,), (v.numpy(),))[1] for loss in (found, lambda y: of_optax(y, target, MASK))]
    np.testing.assert_allclose(numbers[0][0], numbers[1][0], rtol=1e-12)
    np.testing.assert_allclose(numbers[0][1], numbers[1][1], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(*products, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(numbers[0][1], ours.detach(), rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(products[0], product, rtol=1e-8, atol=1e-12)


def test_of_states_through_a_readout_that_learns() -> None:
    """Gradient and Hessian of the loss of states, in all that learns, against autograd through the user's own line."""
    torch.manual_seed(0)
    cell, readout = nn.GRUCell(2, 6).double(), nn.Linear(6, 5).double()
    x, target = torch.randn(3, 4, 2, dtype=torch.float64), torch.from_numpy(CLASSES)
    loss, solution = kp.cross_entropy(target, readout, MASK), kp.solve(kp.DiscreteProblem(cell, x))
    objective = Objective(solution, loss, None)
    point, v = objective(objective.start), torch.randn_like(objective.start)

    def own(theta: torch.Tensor) -> torch.Tensor:
        values, z, states = objective.values(theta), torch.zeros(3, 6, dtype=torch.float64), []
        of_cell = {name: value for name, value in values.items() if not name.startswith("loss.")}
        for x_t in x.unbind(1):
            z = torch.func.functional_call(cell, of_cell, (x_t, z))
            states.append(z)
        return of_torch(F.linear(torch.stack(states, 1), values["loss.weight"], values["loss.bias"]), CLASSES, MASK)

    gradient = torch.func.grad(own)(objective.start)
    product = torch.func.jvp(torch.func.grad(own), (objective.start,), (v,))[1]
    assert point.loss == pytest.approx(own(objective.start).item(), rel=1e-12)
    torch.testing.assert_close(point.gradient, gradient, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(point.hessian(v[None])[0], product, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_does_not_count_may_be_anything(name: str) -> None:
    as_array = torch.from_numpy if name == "torch" else jnp.asarray
    y, off = as_array(Y), MASK == 0
    expected = float(output_loss("cross_entropy", CLASSES, MASK, y)(y))
    for target in (np.where(off, -100, CLASSES), np.where(off, 77, CLASSES), CLASSES[..., None]):
        assert float(output_loss("cross_entropy", as_array(target), MASK, y)(y)) == expected
    holes = np.where(off[..., None], np.nan, np.eye(5)[CLASSES])
    assert float(output_loss("cross_entropy", as_array(holes), MASK, y)(y)) == pytest.approx(expected, rel=1e-14)
    one_hot = np.eye(5, dtype=int)[CLASSES]
    assert float(output_loss("cross_entropy", as_array(one_hot), MASK, y)(y)) == pytest.approx(expected, rel=1e-14)
    some = np.where(off, -1, CLASSES)
    alone = float(output_loss("cross_entropy", as_array(some), None, y)(y))
    assert alone == pytest.approx(float(output_loss("cross_entropy", CLASSES, ~off, y)(y)), rel=1e-14)
    assert kp.accuracy(y, some) == pytest.approx((Y.argmax(-1) == CLASSES)[~off].mean())
    assert kp.accuracy(y, np.eye(5)[CLASSES], MASK) == pytest.approx(np.average(Y.argmax(-1) == CLASSES, weights=MASK))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_class_that_cannot_be(name: str) -> None:
    """A logit of -inf: torch's own cross-entropy is finite, with a finite gradient."""
    logits, target = np.where(np.arange(5) == 4, -np.inf, Y), CLASSES % 4
    theirs = torch.from_numpy(logits).requires_grad_()
    expected = of_torch(theirs, target, np.ones((3, 4)))
    (gradient,) = torch.autograd.grad(expected, theirs)
    if name == "torch":
        y = torch.from_numpy(logits).requires_grad_()
        loss = output_loss("cross_entropy", target, None, y.detach())(y)
        (found,), loss = torch.autograd.grad(loss, y), loss.detach()
    else:
        loss, found = jax.value_and_grad(output_loss("cross_entropy", target, None, jnp.asarray(logits)))(logits)
    assert float(loss) == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(np.asarray(found.tolist()), gradient, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("name", BACKENDS)
def test_losses_of_states_in_float32_stay_float32(name: str) -> None:
    if name == "torch":
        state, readout, target = torch.from_numpy(Y).float(), nn.Linear(5, 5), torch.from_numpy(CLASSES)
    else:
        state, target = jnp.asarray(Y, "float32"), jnp.asarray(CLASSES)
        readout = eqx.nn.Linear(5, 5, key=jax.random.key(0), dtype=jnp.float32)
    for loss in (kp.cross_entropy(target, readout, MASK), kp.cross_entropy(target)):
        assert loss(state).dtype == state.dtype and tuple(loss(state).shape) == ()
    assert float(kp.cross_entropy(target, None, MASK)(state)) == pytest.approx(
        of_torch(torch.from_numpy(Y), CLASSES, MASK).item(), rel=1e-6
    )


def test_a_function_of_ones_own() -> None:
    y = torch.from_numpy(Y)
    huber = output_loss(F.huber_loss, torch.zeros(3, 4, 5).double(), None, y)
    assert huber(y).item() == F.huber_loss(y, torch.zeros_like(y)).item()
    assert output_loss(lambda y: (y**2).mean(), None, None, y)(y).item() == pytest.approx((Y**2).mean())
    assert output_loss(F.mse_loss, np.zeros((3, 4, 5)), None, y)(y).item() == pytest.approx((Y**2).mean())


@pytest.mark.parametrize(
    ("loss", "target", "mask", "message"),
    [
        ("hinge", Y, None, "loss is 'hinge', expected one of squared_error, cross_entropy, or a function"),
        ("cross_entropy", None, None, "needs a target"),
        ("cross_entropy", CLASSES + 1, None, "a target is class 5, expected 0 to 4"),
        ("cross_entropy", CLASSES.astype(float), None, "Class indices are integers"),
        ("cross_entropy", 2 * PARTS, None, "sum to one at each place that counts.*off by 1"),
        ("cross_entropy", PARTS - 0.3, None, "must be >= 0"),
        ("cross_entropy", np.where(MASK[..., None] == 0, np.nan, PARTS), None, "off by nan"),
        ("cross_entropy", PARTS[..., :4] / PARTS[..., :4].sum(-1, keepdims=True), None, "the target has shape"),
        ("cross_entropy", CLASSES[:2], None, r"shape \(2, 4\) beside outputs \(3, 4, 5\)"),
        ("cross_entropy", CLASSES, MASK[:, :3], "the mask has shape"),
        ("cross_entropy", CLASSES, np.ones((3, 4, 5)), "the mask has shape"),
        ("cross_entropy", 0 * CLASSES - 100, None, "no target counts"),
        ("squared_error", Y[..., :3], None, "the readout gives"),
        (F.mse_loss, torch.from_numpy(Y), MASK, "a mask does not reach into a loss of your own"),
        (lambda y: y, None, None, r"the loss gave shape \(3, 4, 5\), expected one number"),
        (lambda y: 1.0, None, None, "the loss gave float, expected one number"),
        (lambda y: y.sum() * torch.nan, None, None, "the loss is nan at the start"),
    ],
)
def test_bad_losses_are_explained(loss, target, mask, message) -> None:
    with pytest.raises(ValueError, match=message):
        output_loss(loss, target, mask, torch.from_numpy(Y))


def test_class_indices_beyond_a_readout_are_explained() -> None:
    loss = kp.cross_entropy(torch.from_numpy(CLASSES), nn.Linear(6, 3).double())
    with pytest.raises(ValueError, match="a target is class 4, expected 0 to 2"):
        loss(torch.zeros(3, 4, 6).double())


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("kind", ["int64", "uint8", "bool"])
def test_one_hot_integers_are_probabilities(framework: str, kind: str) -> None:
    """Also where they could be class indices of states with one axis more: the outputs decide."""
    make = torch.from_numpy if framework == "torch" else jnp.asarray
    one_hot = np.eye(5)[CLASSES].astype(kind)
    expected = of_torch(torch.from_numpy(Y), CLASSES, MASK).item()
    assert float(kp.cross_entropy(make(one_hot), mask=MASK)(make(Y))) == pytest.approx(expected, rel=1e-12)
    some = F.cross_entropy(torch.from_numpy(Y[:2].reshape(-1, 5)), torch.from_numpy(CLASSES[:2].reshape(-1)))
    assert float(kp.cross_entropy(make(one_hot))(make(Y[:2]), np.array([0, 1]))) == pytest.approx(some.item())
    once = np.eye(4)[[1, 0, 3]].astype(kind)  # one 1 in each row: classes 0 and 1 of [trial, time], or one-hot
    y = Y[..., :2]
    as_classes = F.cross_entropy(torch.from_numpy(y.reshape(-1, 2)), torch.from_numpy(once.astype(int).reshape(-1)))
    as_one_hot = F.cross_entropy(torch.from_numpy(y[..., 0]), torch.tensor([1, 0, 3]))
    loss = kp.cross_entropy(make(once))
    assert float(loss(make(y))) == pytest.approx(as_classes.item())
    assert float(loss(make(y[..., 0]))) == pytest.approx(as_one_hot.item())
    with pytest.raises(ValueError, match=r"expected class indices, integers \[3, 4\], or probabilities \[3, 4, 5\]"):
        kp.cross_entropy(make(2 * one_hot.astype(int)))(make(Y))


def test_states_of_several_values_are_no_logits() -> None:
    """A network's hidden units beside its outputs, and the h and c of an LSTM."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4)).double(), torch.randn(7, 2).double()
    right = torch.randint(0, 4, (7,))
    loss = kp.cross_entropy(right)
    with pytest.raises(ValueError, match=r'all 10 units would be taken for logits of classes; pose .*state=""'):
        kp.gradient_flow(kp.StaticProblem(net, x), loss, 1.0)
    with pytest.raises(ValueError, match="all 10 units would be taken for logits"):
        flow = kp.linearize(kp.solve(kp.StaticProblem(net, x)))
        kp.forecast(flow, right, lr=0.1, steps=5, loss="cross_entropy")
    found = kp.gradient_flow(kp.StaticProblem(net, x, state=""), loss, 1.0)
    assert found.loss[0] == pytest.approx(F.cross_entropy(net(x), right).item())
    with pytest.raises(ValueError, match="h of each layer, and c"):
        lstm = kp.DiscreteProblem(nn.LSTM(2, 3, batch_first=True).double(), x[:, None])
        kp.gradient_flow(lstm, kp.cross_entropy(right[:, None]), 1.0)
    with pytest.raises(ValueError, match="the readout takes 4 units, expected one of 10 units"):
        kp.gradient_flow(kp.StaticProblem(net, x), kp.cross_entropy(right, nn.Linear(4, 4).double()), 1.0)
