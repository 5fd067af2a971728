"""What stands in the way of an error: the factors against dense matrices of the user's own model under autograd."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, TIMES, UNITS, OUTPUTS = 3, 5, 4, 2


class JaxCell:
    """tanh(W z + U x + b)."""

    def __init__(self, W: jax.Array, U: jax.Array, b: jax.Array) -> None:
        self.W, self.U, self.b = W, U, b

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ z + self.U @ x + self.b)


jax.tree_util.register_pytree_node(
    JaxCell, lambda cell: ((cell.W, cell.U, cell.b), None), lambda _, leaves: JaxCell(*leaves)
)


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"W": (UNITS, UNITS), "U": (UNITS, 2), "b": (UNITS,), "C": (OUTPUTS, UNITS), "x": (TRIALS, TIMES, 2)}
    shapes["e"] = (2, TRIALS, TIMES, OUTPUTS)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def torch_output(given: dict[str, np.ndarray], learn: bool = False, mask: np.ndarray | None = None) -> kp.Output:
    cell = torch.nn.RNNCell(2, UNITS).double()
    with torch.no_grad():
        for name, value in zip(("weight_hh", "weight_ih", "bias_hh"), ("W", "U", "b"), strict=True):
            cell.get_parameter(name).copy_(torch.from_numpy(given[value]))
        cell.bias_ih.zero_()
    flow = kp.linearize(
        kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(given["x"]))), params=lambda n: n != "bias_ih"
    )
    return (flow if mask is None else flow.where(mask)).output(torch.from_numpy(given["C"]), learn=learn)


def jax_output(given: dict[str, np.ndarray], learn: bool = False) -> kp.Output:
    cell = JaxCell(*(jnp.asarray(given[name]) for name in ("W", "U", "b")))
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, jnp.asarray(given["x"]), jnp.zeros((TRIALS, UNITS))))).output(
        given["C"], learn=learn
    )


def outputs_by_hand(values: torch.Tensor, given: dict[str, np.ndarray]) -> torch.Tensor:
    """y [trial, time, out] of the parameters [W, U, b, C] in a row."""
    sizes = [given[name].size for name in ("W", "U", "b", "C")]
    named = zip(("W", "U", "b", "C"), values.split(sizes), strict=True)
    W, U, b, C = (value.reshape(given[name].shape) for name, value in named)
    z, states = torch.zeros(TRIALS, UNITS, dtype=torch.float64), []
    for x in torch.from_numpy(given["x"]).unbind(1):
        z = torch.tanh(z @ W.T + x @ U.T + b)
        states.append(z)
    return torch.stack(states, 1) @ C.T


def jacobian(given: dict[str, np.ndarray]) -> np.ndarray:
    values = torch.cat([torch.from_numpy(given[name]).flatten() for name in ("W", "U", "b", "C")])
    found = torch.autograd.functional.jacobian(lambda theta: outputs_by_hand(theta, given), values)
    return found.reshape(TRIALS * TIMES * OUTPUTS, -1).numpy()


def dense(op: kp.Operator) -> np.ndarray:
    return to_numpy(op.dense())


@pytest.mark.parametrize("make", [torch_output, jax_output])
@pytest.mark.parametrize("learn", [False, True])
def test_the_product_is_the_kernel_of_the_users_own_model(make, learn: bool) -> None:
    given = arrays()
    found = kp.obstacles(make(given, learn=learn), {"a": given["e"][0], "b": given["e"][1]})
    J = jacobian(given)
    own = J[:, -given["C"].size :]
    e = given["e"].reshape(2, -1)
    rate = ((e @ J[:, : -given["C"].size]) ** 2).sum(1) / (e**2).sum(1)
    of_readout = ((e @ own) ** 2).sum(1) / (e**2).sum(1) if learn else np.zeros(2)
    np.testing.assert_allclose(found.factors.prod(1), rate, rtol=1e-10)
    np.testing.assert_allclose(found.own, of_readout, rtol=1e-10)
    np.testing.assert_allclose(found.rate, rate + of_readout, rtol=1e-10)


def test_both_frameworks_agree() -> None:
    given = arrays(3)
    ours, theirs = (kp.obstacles(make(given, learn=True), given["e"]) for make in (torch_output, jax_output))
    for name in ("rate", "own", "factors", "kept", "typical", "largest"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-8)


def test_factors_and_references_are_those_of_dense_matrices() -> None:
    given = arrays()
    output = torch_output(given)
    found = kp.obstacles(output, given["e"])
    C, P, K = dense(output.C), dense(output.flow.P), dense(output.flow.K)
    later = np.triu(np.ones((TIMES, TIMES)))  # sums over all later times
    for i, e in enumerate(given["e"].reshape(2, -1)):
        read, kicks = C.T @ e, P.T @ C.T @ e
        sums = np.einsum("ts,bsn->btn", later, read.reshape(TRIALS, TIMES, UNITS))
        expected = read @ read / (e @ e), kicks @ kicks / (read @ read), kicks @ K @ kicks / (kicks @ kicks)
        np.testing.assert_allclose(found.factors[i], expected, rtol=1e-10)
        np.testing.assert_allclose(found.kept[i], (sums**2).sum() / (read @ read), rtol=1e-10)
    n = TRIALS * TIMES * UNITS
    np.testing.assert_allclose(
        found.typical, [np.trace(C @ C.T) / len(C), np.trace(P @ P.T) / n, np.trace(K) / n], rtol=1e-10
    )
    largest = [np.linalg.norm(C, 2) ** 2, np.linalg.norm(P, 2) ** 2, np.linalg.norm(K, 2)]
    np.testing.assert_allclose(found.largest, largest, rtol=1e-6)
    cheap = kp.obstacles(output, given["e"], largest=False)
    assert np.isnan(cheap.largest).all() and "largest" not in str(cheap) and "largest" in str(found)
    np.testing.assert_array_equal(cheap.factors, found.factors)


def test_masked_trials_and_metrics_keep_the_identity() -> None:
    given = arrays(1)
    mask = np.arange(TIMES)[None] < np.array([[5], [3], [2]])
    output = torch_output(given, learn=True, mask=mask)
    e = given["e"] * mask[..., None]
    found = kp.obstacles(output, e)
    np.testing.assert_allclose(found.factors.prod(1) + found.own, found.rate, rtol=1e-10)
    J = jacobian(given)
    expected = ((e.reshape(2, -1) @ J) ** 2).sum(1) / (e**2).sum((1, 2, 3))
    np.testing.assert_allclose(found.rate, expected, rtol=1e-10)


def linear_cell(W: np.ndarray, U: np.ndarray) -> torch.nn.RNNCell:
    """z = W z + U x for states above zero, without biases."""
    cell = torch.nn.RNNCell(U.shape[1], len(W), bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        cell.weight_hh.copy_(torch.from_numpy(W))
        cell.weight_ih.copy_(torch.from_numpy(U))
    return cell


def output_of(W: np.ndarray, x: np.ndarray) -> kp.Output:
    units = len(W)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(linear_cell(W, np.ones((units, x.shape[2]))), torch.from_numpy(x))))
    return flow.output(torch.ones(1, units).double() / units)


def test_K_stands_in_the_way_where_the_weights_see_nothing() -> None:
    x = np.ones((2, 12, 1))
    x[1] = 0  # nothing enters the second trial, so that no weight writes there
    error = np.zeros((2, 12, 1))
    error[1] = 1
    found = kp.obstacles(output_of(0.9 * np.eye(3), x), {"silent": error, "driven": error[::-1].copy()})
    assert found.factors[0, 2] == 0 and found.words[0].startswith("K: little is written")
    assert found.words[1] == ""


def test_P_forgets_where_leaks_are_fast() -> None:
    x = np.ones((2, 40, 1))
    error = np.zeros((2, 40, 1))
    error[:, -10:] = 1
    fast, slow = (kp.obstacles(output_of(a * np.eye(3), x), {"late": error}) for a in (0.1, 0.99))
    assert (
        fast.words[0] == f"P: what is written is forgotten ({fast.relative[0, 1]:.2g} of what lasting kicks would do)"
    )
    assert slow.words[0] == ""
    assert fast.kept == pytest.approx(slow.kept)


def test_P_explodes_where_weights_amplify() -> None:
    error = np.zeros((2, 20, 1))
    error[:, -1] = 1
    found = kp.obstacles(output_of(1.4 * np.eye(3), np.ones((2, 20, 1))), {"end": error})
    assert re.match(r"P: what is written explodes \(\d+ times", found.words[0]), found.words[0]
    assert found.factors[0, 1] == pytest.approx((1.4 ** (2 * np.arange(20))).sum())


def test_the_readout_stands_in_the_way_of_what_it_does_not_read() -> None:
    given = arrays() | {"C": np.array([[1.0, 1, 1, 1], [0.1, 0, 0, 0]])}
    errors = {"read": np.ones((TRIALS, TIMES, 2)) * [1, 0], "unread": np.ones((TRIALS, TIMES, 2)) * [0, 1]}
    found = kp.obstacles(torch_output(given), errors)
    assert "C: the readout hardly reads it" in found.words[1] and "C:" not in found.words[0]


def test_of_an_ode_the_product_tends_to_the_rate() -> None:
    torch.manual_seed(0)
    field, z0 = torch.nn.Linear(3, 3).double(), torch.randn(2, 3).double()

    def relative_error(points: int) -> float:
        problem = kp.ODEProblem(Field(field), z0, np.linspace(0, 1, points))
        output = kp.linearize(kp.solve(problem)).output(torch.ones(1, 3).double())
        error = torch.sin(3 * torch.linspace(0, 1, points).double())[None, :, None].expand(2, -1, -1)
        found = kp.obstacles(output, {"wave": error})
        return abs(float(found.factors.prod() / found.rate[0]) - 1)

    coarse, fine = relative_error(21), relative_error(81)
    assert fine < 2e-3 and fine < coarse / 6


class Field(torch.nn.Module):
    """tanh of a layer."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(z))


def test_of_a_network_without_steps() -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)).double()
    output = kp.linearize(kp.solve(kp.StaticProblem(net, torch.randn(5, 3).double(), state=["2"]))).output(
        torch.randn(2, 4).double()
    )
    found = kp.obstacles(output, {"e": torch.randn(5, 2).double()})
    np.testing.assert_allclose(found.factors.prod(1), found.rate, rtol=1e-10)
    assert np.isnan(found.kept).all()


def test_results_have_labels_and_text() -> None:
    found = kp.obstacles(torch_output(arrays()), {"a": arrays()["e"][0]})
    labelled = found.to_xarray()
    assert float(labelled.factors.sel(error="a", factor="written")) == found.factors[0, 2]
    assert str(found).splitlines()[1].startswith("a ") and "typical" in str(found)


def test_bad_input() -> None:
    output = torch_output(arrays())
    with pytest.raises(TypeError, match="expected a readout of a flow"):
        kp.obstacles(output.flow, arrays()["e"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no errors given"):
        kp.obstacles(output, {})
    with pytest.raises(ValueError, match="error 'none' is zero everywhere"):
        kp.obstacles(output, {"none": 0 * arrays()["e"][0]})
    with pytest.raises(ValueError, match="error 'wide' has shape"):
        kp.obstacles(output, {"wide": np.ones((TRIALS, TIMES, 5))})
