"""Optimisers as functions of their state, and their own steps on plain landscapes, many for one gradient."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from kpflow_dyn._jax.training import Rule as JaxRule
from kpflow_dyn._torch.training import Rule as TorchRule
from kpflow_dyn.solvers import Multirate
from kpflow_dyn.solvers._landscape import Point
from kpflow_dyn.solvers._multirate import OwnSteps, SecantModel, is_linear, saturates

pytestmark = pytest.mark.usefixtures("x64")

SHAPES = {"a": (3, 4), "b": (4,)}
MAKERS = {
    "adam": torch.optim.Adam,
    "adamw": partial(torch.optim.AdamW, weight_decay=0.3),
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}


def of_torch(seed=0):
    rng = np.random.default_rng(seed)
    return {name: torch.tensor(rng.standard_normal(shape)) for name, shape in SHAPES.items()}


def flat(values):
    return torch.cat([value.detach().reshape(-1) for value in values])


def slopes(count=6):
    """Gradients [n], which do not hang on the parameters."""
    return [torch.tensor(np.sin(np.arange(16) * (k + 1.0))) for k in range(count)]


def own_training(optimizer, parameters, gradients, clip=None):
    """What torch itself comes to."""
    for gradient in gradients:
        for parameter, part in zip(parameters, gradient.split([12, 4]), strict=True):
            parameter.grad = part.reshape(parameter.shape).clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return flat(parameters)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_rule_is_the_optimiser_of_torch(make, clip):
    like = of_torch()
    parameters = [torch.nn.Parameter(value.clone()) for value in like.values()]
    wanted = own_training(make(parameters, lr=0.01), parameters, slopes(), clip)
    rule, theta = TorchRule(make, 0.01, clip, like), flat(like.values())
    state = rule.begin(theta)
    for gradient in slopes():
        rule.step(state, theta, 3 * gradient)  # a step that is thrown away changes nothing
        state, theta = rule.step(state, theta, gradient)
    torch.testing.assert_close(theta, wanted, rtol=0, atol=0)


def test_an_optimiser_goes_on_from_where_it_is_and_stays_there():
    parameters = [torch.nn.Parameter(value) for value in of_torch().values()]
    optimizer = torch.optim.Adam(parameters, lr=0.02, betas=(0.8, 0.9))
    own_training(optimizer, parameters, slopes(3))
    before = flat(parameters)
    like = dict(zip("ba", reversed(parameters), strict=True))  # in another order than the optimiser's
    rule = TorchRule(optimizer, None, None, like)
    theta, state = flat(like.values()), rule.begin(before)
    gradient = slopes()[0]
    _state, theta = rule.step(state, theta, torch.cat([gradient[12:], gradient[:12]]))
    torch.testing.assert_close(flat(parameters), before, rtol=0, atol=0)
    wanted = own_training(optimizer, parameters, [gradient])
    torch.testing.assert_close(torch.cat([theta[4:], theta[:4]]), wanted, rtol=0, atol=0)


def test_an_optimiser_of_a_copied_readout_is_known_by_its_values():
    parameters = [torch.nn.Parameter(value) for value in of_torch().values()]
    copies = {name: value.detach().clone() for name, value in zip(SHAPES, parameters, strict=True)}
    TorchRule(torch.optim.Adam(parameters), None, None, copies)
    with pytest.raises(ValueError, match="2 parameters, of which 1 are among the 1 that learn here"):
        TorchRule(torch.optim.Adam(parameters), None, None, {"a": copies["a"]})
    with pytest.raises(ValueError, match=r"without \['b'\]"):
        TorchRule(torch.optim.Adam(parameters[:1]), None, None, copies)


class Counting(torch.optim.SGD):
    """Descent whose rate falls with a counter that the group keeps."""

    def step(self, closure=None):
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            group["lr"] = 0.1 / group["count"]
        return super().step(closure)


def test_what_a_group_counts_belongs_to_the_state():
    like = of_torch()
    parameters = [torch.nn.Parameter(value.clone()) for value in like.values()]
    wanted = own_training(Counting(parameters, lr=0.1), parameters, slopes())
    rule, theta = TorchRule(Counting, 0.1, None, like), flat(like.values())
    state = rule.begin(theta)
    for gradient in slopes():
        rule.step(state, theta, gradient)
        state, theta = rule.step(state, theta, gradient)
    torch.testing.assert_close(theta, wanted, rtol=0, atol=0)


def test_groups_of_parameters_with_equal_values_are_not_mixed_up():
    own, copied = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(4))
    groups = [{"params": [copied], "lr": 1.0}, {"params": [own], "lr": 0.1}]
    rule = TorchRule(torch.optim.SGD(groups), None, None, {"own": own, "copied": torch.zeros(4)})
    theta = torch.zeros(8)
    torch.testing.assert_close(
        rule.step(rule.begin(theta), theta, torch.ones(8))[1][[0, 4]], torch.tensor([-0.1, -1.0])
    )
    with pytest.raises(ValueError, match="have the same values"):
        TorchRule(torch.optim.SGD(groups), None, None, {"a": torch.zeros(4), "b": torch.zeros(4)})


def test_lbfgs_is_refused():
    with pytest.raises(TypeError, match="LBFGS evaluates the loss itself"):
        TorchRule(torch.optim.LBFGS, 0.1, None, of_torch())


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (optax.adam, torch.optim.Adam),
        (optax.adamw(0.01, weight_decay=0.3), MAKERS["adamw"]),
        (partial(optax.sgd, momentum=0.9), partial(torch.optim.SGD, momentum=0.9)),
    ],
)
def test_rules_of_both_frameworks_agree(mine, theirs):
    like = of_torch()
    ours = JaxRule(mine, 0.01, None, {name: jnp.asarray(value.numpy()) for name, value in like.items()})
    other, theta = TorchRule(theirs, 0.01, None, like), flat(like.values())
    moved = jnp.asarray(theta.numpy())
    states = ours.begin(moved), other.begin(theta)
    for gradient in slopes():
        first, moved = ours.step(states[0], moved, jnp.asarray(gradient.numpy()))
        second, theta = other.step(states[1], theta, gradient)
        states = first, second
    np.testing.assert_allclose(moved, theta, rtol=1e-8)


def test_gradients_of_several_steps_together():
    """An object of optax that is no pair of functions steps once for every two gradients."""
    every, like = optax.MultiSteps(optax.adam(0.1), every_k_schedule=2), of_torch()
    values = {name: jnp.asarray(value.numpy()) for name, value in like.items()}
    rule, theta = JaxRule(every, None, None, values), jnp.concatenate([value.ravel() for value in values.values()])
    state, own = rule.begin(theta), every.init(values)
    for slope in slopes(4):
        gradient = jnp.asarray(slope.numpy())
        state, theta = rule.step(state, theta, gradient)
        named = dict(zip(SHAPES, (gradient[:12].reshape(3, 4), gradient[12:]), strict=True))
        updates, own = every.update(named, own, values)
        values = optax.apply_updates(values, updates)
    np.testing.assert_allclose(theta, jnp.concatenate([value.ravel() for value in values.values()]), rtol=1e-12)


CLIPPED = optax.clip_by_global_norm(0.1)


@pytest.mark.parametrize(
    ("make", "binds"),
    [
        (optax.chain(CLIPPED, optax.sgd(0.3, momentum=0.9)), True),
        (optax.chain(optax.clip_by_global_norm(10.0), optax.sgd(0.3)), False),
        (optax.sgd(0.3, momentum=0.9, nesterov=True), False),
        (optax.chain(CLIPPED, optax.adam(1e-3)), False),
        (optax.chain(CLIPPED, optax.rmsprop(1e-3)), False),
    ],
)
def test_a_clip_within_an_optimiser_is_known(make, binds):
    rule, gradient = JaxRule(make, None, None, {"w": jnp.ones(3)}), jnp.asarray([1.0, -2.0, 0.5])
    fresh = rule.begin(jnp.ones(3))
    assert (is_linear(rule, fresh, gradient) and saturates(rule, fresh, gradient)) is binds


# Steps


class Descent:
    """Plain descent on numpy."""

    def __init__(self, lr, momentum=0.0):
        self.lr, self.momentum = lr, momentum

    def begin(self, theta):
        return 0 * theta

    def step(self, state, theta, gradient):
        state = self.momentum * state + gradient
        return state, theta - self.lr * state


def bowl(curvatures):
    """L = sum l theta^2 / 2, and how often its gradient was asked for."""

    def landscape(theta):
        return Point(theta, float(curvatures @ theta**2) / 2, curvatures * theta, None, lambda other: (0.0, other))

    return landscape


def run(curvatures, rule, steps, alg=None, tolerance=0.05):
    found = OwnSteps(bowl(curvatures), np.ones(len(curvatures)), steps, rule, alg or Multirate(), tolerance)
    losses = [found.point.loss]
    while not found.finished:
        losses.extend(found.advance().losses[1:])
    return found, np.array(losses)


def exactly(curvatures, lr, steps, momentum=0.0):
    theta, velocity, losses = np.ones(len(curvatures)), 0.0, []
    for _ in range(steps + 1):
        losses.append(curvatures @ theta**2 / 2)
        velocity = momentum * velocity + curvatures * theta
        theta = theta - lr * velocity
    return np.array(losses)


def test_steps_one_by_one_are_exact():
    curvatures = np.geomspace(0.1, 10, 30)
    found, losses = run(curvatures, Descent(0.05, 0.9), 40, Multirate(longest=1))
    np.testing.assert_allclose(losses, exactly(curvatures, 0.05, 40, 0.9), rtol=1e-12)
    assert found.own == 40 and found.late == 0 and found.costs.gradients == 41


def test_many_steps_for_a_gradient_are_right_to_their_estimate():
    curvatures = np.geomspace(0.1, 10, 30)
    found, losses = run(curvatures, Descent(2e-3), 3000)
    true = exactly(curvatures, 2e-3, 3000)
    assert found.costs.gradients < 300
    for part in (0.5, 0.2, 0.1, 0.05):
        times = [np.argmax(one < part * true[0]) for one in (losses, true)]
        assert abs(times[0] - times[1]) <= max(1, 0.02 * times[1])


def test_where_the_loss_rises_steps_are_the_optimisers_own():
    curvatures = np.array([1.0, 40.0])  # the second oscillates, and falls slowly
    _found, losses = run(curvatures, Descent(0.05 - 1e-4), 50)
    true = exactly(curvatures, 0.05 - 1e-4, 50)
    np.testing.assert_allclose(losses, true, rtol=1e-6)
    rising, losses = run(curvatures, Descent(0.0505), 50)
    assert rising.own == 50
    np.testing.assert_allclose(losses, exactly(curvatures, 0.0505, 50), rtol=1e-10)


def test_the_more_often_the_loss_has_risen_the_longer_it_must_fall():
    rule, curvatures = Descent(0.01, 0.98), np.array([1.0])  # the loss swings for hundreds of steps
    found, losses = run(curvatures, rule, 400, Multirate(calm=3))
    true = exactly(curvatures, 0.01, 400, 0.98)
    rises = np.flatnonzero(np.diff(true) > 0)
    third = int(rises[2])
    assert found.own > 350
    np.testing.assert_allclose(losses[third:] / true[third:], 1, atol=0.1)


def test_no_run_takes_many_more_gradients_than_steps():
    rng = np.random.default_rng(0)

    def rough(theta):  # no model knows the next gradient
        return Point(theta, float(np.exp(-theta[0])), rng.standard_normal(20) - 3 * np.eye(20)[0], None, lambda o: None)

    found = OwnSteps(rough, np.zeros(20), 100, Descent(1e-3), Multirate(), 0.05)
    while not found.finished:
        found.advance()
    assert found.costs.gradients <= found.most == 112


def test_the_secant_model_knows_a_linear_gradient_on_the_span_of_its_history():
    rng = np.random.default_rng(0)
    H, thetas = rng.standard_normal((9, 9)), rng.standard_normal((4, 9))
    model = SecantModel([Point(theta, 0.0, H @ theta, None, lambda o: None) for theta in [*thetas, thetas[-1]]])
    inside = thetas[-1] + np.array([0.3, -2.0, 0.7]) @ np.diff(thetas, axis=0)
    np.testing.assert_allclose(model(inside), H @ inside, atol=1e-10)
