"""Gradient flows of models, against descent in small steps, scipy, known solutions, and the other framework."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from scipy.integrate import solve_ivp
from test_frameworks_agree import RungeKutta4, TorchRNN, copied
from torch import Tensor, nn
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn._learning.objective import Objective
from kpflow_dyn.models import MLPField
from kpflow_dyn.models.jax import MLPField as JaxMLPField
from kpflow_dyn.solvers._multirate import Stretch

pytestmark = pytest.mark.usefixtures("x64")

GRID = np.linspace(0.0, 1.5, 7)


class Readout(nn.Module):
    """The squared error of a readout that learns."""

    def __init__(self, units: int, targets: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(units, targets.shape[-1]).double()
        self.register_buffer("targets", targets)

    def forward(self, state: Tensor) -> Tensor:
        return ((self.linear(state) - self.targets) ** 2).mean()


def integration(cell: type[nn.Module], units: int = 6, gain: float = 1.0) -> tuple[kp.DiscreteProblem, Readout]:
    """Add up the inputs."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, 1).double()
    model = cell(1, units).double()
    with torch.no_grad():
        model.weight_hh.mul_(gain)
    return kp.DiscreteProblem(model, x), Readout(units, x.cumsum(1))


def field() -> tuple[kp.ODEProblem, Callable[[Tensor], Tensor]]:
    """Shrink."""
    torch.manual_seed(0)
    model, start = MLPField(2, 8).double(), torch.randn(4, 2).double()
    shrunk = start[:, None] * torch.exp(-torch.from_numpy(GRID)[:, None])
    return kp.ODEProblem(model, start, GRID), lambda state: ((state - shrunk) ** 2).mean()


# The loss and its derivatives


@pytest.mark.parametrize("module", [nn.RNN, nn.GRU, nn.LSTM])
def test_derivatives_of_whole_modules(module: type[nn.RNNBase]) -> None:
    """Against the module's own run over the sequence, and differences of its gradient."""
    torch.manual_seed(0)
    model, x = module(2, 3, num_layers=2, batch_first=True).double(), torch.randn(3, 5, 2).double()
    last = slice(3, 6)  # the second layer's h
    objective = Objective(kp.solve(kp.DiscreteProblem(model, x)), lambda s: (s[..., last] ** 3).sum(), None)
    theta, names = objective.start, [name for name, _ in model.named_parameters()]

    def own(theta: Tensor) -> Tensor:
        return (torch.func.functional_call(model, objective.values(theta), (x,))[0] ** 3).sum()

    point, direction = objective(theta), torch.randn(2, len(theta), dtype=torch.float64)
    plus, minus = (torch.stack([gradient_of(own, theta + h * row) for row in direction]) for h in (1e-5, -1e-5))
    assert list(objective.values(theta)) == names
    assert point.loss == pytest.approx(float(own(theta)), rel=1e-12)
    torch.testing.assert_close(point.gradient, gradient_of(own, theta), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(point.gradient_at(theta + 1e-5 * direction[0]), plus[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(point.hessian(direction), (plus - minus) / 2e-5, rtol=1e-6, atol=1e-8)


def gradient_of(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    theta = theta.detach().requires_grad_()
    return torch.autograd.grad(function(theta), theta)[0]


def test_a_loss_that_is_linear_in_the_parameters_has_no_curvature() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    flow = kp.gradient_flow(kp.StaticProblem(net, torch.ones(1, 1).double()), lambda s: 10 + s.sum(), 2.0)
    torch.testing.assert_close(flow.parameters["weight"][-1], net.weight.detach() - 2)


def test_where_the_loss_of_an_optimiser_rises_it_says_so_and_intervals_are_wider() -> None:
    problem, loss = integration(nn.RNNCell)
    flow = kp.gradient_flow(problem, loss, 4, optimizer="adam", lr=1e-3)
    losses = np.interp(np.arange(101), [0, 50, 60, 100], [1.0, 0.6, 0.8, 0.2])
    steps = {"time": np.array([0.0, 100]), "loss": losses[[0, -1]], "late": np.array([0.0, 2]), "own": 30}
    rises = replace(flow, **steps, pieces=[Stretch(losses)])
    assert rises.time_to(0.5) == pytest.approx(80) and rises.time_to(0.9) == pytest.approx(12.5)
    off = 0.04 * 80 + 2 * 0.8
    assert rises.interval_to(0.5) == pytest.approx((80 - off - 28, 80 + off + 28))
    assert rises.interval_to(0.9) == pytest.approx((12.5 * 0.96 - 0.25, 12.5 * 1.04 + 0.25))
    assert "the loss rises by more than 5% at step 52: later times are rough" in str(rises)
    falls = replace(rises, pieces=[Stretch(np.minimum.accumulate(losses))])
    assert "rises" not in str(falls) and "rises" not in str(replace(rises, own=91))


# Against descent


def own_loss(problem: Any, loss: Any) -> Callable[[], Tensor]:
    """The loss through torch and torchdiffeq alone."""
    if isinstance(problem, kp.ODEProblem):
        times = torch.from_numpy(GRID)
        return lambda: loss(
            odeint(problem.f, problem.z0, times, method="rk4", options={"step_size": 0.05}).swapaxes(0, 1)
        )

    def unrolled() -> Tensor:
        z, states = torch.zeros(len(problem.x), problem.cell.hidden_size).double(), []
        for x_t in problem.x.unbind(1):
            z = problem.cell(x_t, z)
            states.append(z)
        return loss(torch.stack(states, 1))

    return unrolled


def descend(problem: Any, loss: Any, rate: float, below: float) -> tuple[np.ndarray, int]:
    """Plain descent of copies: the times to these parts of the first loss, and how many steps it took."""
    problem, loss = copy.deepcopy((problem, loss))
    model = problem.f if isinstance(problem, kp.ODEProblem) else problem.cell
    parameters = [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else [])]
    value, losses = own_loss(problem, loss), []
    while not losses or losses[-1] > below * losses[0]:
        now = value()
        losses.append(float(now.detach()))
        with torch.no_grad():
            for parameter, slope in zip(parameters, torch.autograd.grad(now, parameters), strict=True):
                parameter.sub_(rate * slope)
    steps = np.arange(len(losses))
    return np.interp(-np.log([0.5, 0.2, below]), -np.log(np.array(losses) / losses[0]), steps) * rate, len(losses)


DESCENTS = {
    "rnn": (lambda: integration(nn.RNNCell), 0.002),
    "gru": (lambda: integration(nn.GRUCell), 0.01),
    "stiff": (lambda: integration(nn.RNNCell, 12, 4.0), 0.0002),
    "ode": (field, 0.005),
}


def stable_steps(flow: kp.GradientFlow, tau: float) -> float:
    """How many steps of descent at the largest rate 2 / l_1 that is stable all the way."""
    return tau * max(piece.ritz.max() for piece in flow.pieces) / 2


@pytest.mark.parametrize("name", cases(DESCENTS, {"rnn"}))
def test_times_of_descent(name: str) -> None:
    make, rate = DESCENTS[name]
    problem, loss = make()
    times, steps = descend(problem, loss, rate, 0.1)
    flow = kp.gradient_flow(problem, loss, 2 * steps * rate, stop_below=0.09)
    np.testing.assert_allclose([flow.time_to(part) for part in (0.5, 0.2, 0.1)], times, rtol=0.05)
    assert flow.reached
    assert flow.cost < steps
    if name == "stiff":
        alg = kp.solvers.ExponentialRosenbrock()
        flow = kp.gradient_flow(problem, loss, 2 * steps * rate, stop_below=0.09, alg=alg)
        assert 10 * flow.linearisations < stable_steps(flow, flow.time_to(0.1)) < steps


ALGORITHMS = [(kp.solvers.ExponentialRosenbrock(), 1e-3), (kp.solvers.RungeKuttaChebyshev(), 4e-4)]


@pytest.mark.parametrize(("alg", "rtol"), ALGORITHMS, ids=["exponential", "explicit"])
def test_the_gradient_flow_by_scipy(alg: Any, rtol: float) -> None:
    """Parameters at the steps, the loss there and in between."""
    problem, loss = integration(nn.RNNCell, units=4)
    objective = Objective(kp.solve(problem), loss, None)

    def rate(_tau: float, theta: np.ndarray) -> np.ndarray:
        return -objective(torch.from_numpy(theta)).gradient.numpy()

    flow = kp.gradient_flow(problem, loss, 0.8, rtol=rtol, alg=alg)
    start, middle = objective.start.numpy(), (flow.time[1:] + flow.time[:-1]) / 2
    exact = solve_ivp(rate, (0, 0.8), start, method="DOP853", rtol=1e-7, atol=1e-8, dense_output=True).sol
    ours = torch.cat([values.flatten(1) for values in flow.parameters.values()], 1).numpy()
    off = np.linalg.norm(exact(flow.time).T - ours, axis=1)
    assert (off <= 1e-3 * np.linalg.norm(ours - start, axis=1) + 1e-7).all()
    times = np.concatenate([flow.time, middle])
    losses = [objective(torch.from_numpy(theta)).loss for theta in np.ascontiguousarray(exact(times).T)]
    np.testing.assert_allclose(flow(times), losses, rtol=1e-3)


def test_the_estimated_error_covers_the_error() -> None:
    problem, loss = integration(nn.RNNCell, units=4, gain=2.0)
    exact, *flows = (kp.gradient_flow(problem, loss, 0.5, rtol=rtol) for rtol in (1e-3, 1e-1, 1e-2))
    for flow, rtol in zip(flows, (1e-1, 1e-2), strict=True):
        off = np.abs(flow.loss / exact(flow.time) - 1)
        assert (off <= 3 * flow.error + 1e-12).all()
        assert 0 < flow.error[-1] < 10 * rtol


# Every cell


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("module", [nn.GRU, nn.LSTM])
def test_a_readout_of_the_last_h(module: type[nn.RNNBase], layers: int) -> None:
    """Loss, readout and forecast read what the module itself gives out."""
    torch.manual_seed(0)
    model, x = module(2, 5, num_layers=layers, batch_first=True).double(), torch.randn(3, 6, 2).double()
    readout, target = nn.Linear(5, 2).double(), torch.randn(3, 6, 2).double()
    problem, weights = kp.DiscreteProblem(model, x), [*model.parameters(), *readout.parameters()]
    loss = ((readout(model(x)[0]) - target) ** 2).mean()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights)])
    flow = kp.gradient_flow(problem, kp.squared_error(target, readout), 1e-3)
    assert flow.loss[0] == pytest.approx(loss.item(), rel=1e-12)
    assert flow.gradient_norm[0] == pytest.approx(float(gradient.norm()), rel=1e-12)
    y = kp.linearize(kp.solve(problem)).output(readout, learn=True)
    torch.testing.assert_close(y.values, readout(model(x)[0]).detach())
    slope = 2 * (y.values - target) / target.numel()
    torch.testing.assert_close((slope * y.ntk.mv(slope)).sum(), gradient @ gradient)
    found = kp.forecast(y, target, lr=1e-3, steps=3)
    assert found.loss[0] == pytest.approx(loss.item(), rel=1e-12) and np.isfinite(found.flow_loss).all()


def test_an_ode_on_a_span() -> None:
    """Its own nodes and weights make the loss an integral over time, which any fine grid gives as well."""
    problem, _ = field()
    span = problem.remake(t=(0.0, 1.5))
    sol = kp.solve(span)
    weights = torch.from_numpy(sol.weights)
    flow = kp.gradient_flow(sol, lambda s: (weights[:, None] * s**2).sum() / 1.5, 1.0)
    times = np.linspace(0, 1.5, 31)
    trapezoid = torch.full((31,), 1.5 / 30).double()
    trapezoid[[0, -1]] /= 2
    same = kp.gradient_flow(problem.remake(t=times), lambda s: (trapezoid[:, None] * s**2).sum() / 1.5, 1.0)
    np.testing.assert_allclose([flow.loss[0], flow.loss[-1]], [same.loss[0], same.loss[-1]], rtol=5e-3)
    found = kp.forecast(kp.linearize(sol), torch.zeros_like(sol.state), lr=1e-2, steps=100)
    assert not np.isnan(found.holds_until) and found.flow_loss[0] == pytest.approx(found.loss[0], rel=1e-6)


def test_a_gradient_without_a_derivative() -> None:
    """Products with the Hessian are then differences of gradients, whatever the tolerance."""

    class Tanh(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, a: Tensor) -> Tensor:
            ctx.save_for_backward(a)
            return a.tanh()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * (1 - ctx.saved_tensors[0].tanh() ** 2)

    class Net(nn.Module):
        def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers, self.act = nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 2)]), act

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[1](self.act(self.layers[0](x)))

    torch.manual_seed(0)
    x, y = torch.randn(8, 3).double(), torch.randn(8, 2).double()
    alg = kp.solvers.ExponentialRosenbrock()
    flow, exact = (
        kp.gradient_flow(kp.StaticProblem(Net(act).double(), x, state=""), kp.squared_error(y), 3.0, rtol=1e-4, alg=alg)
        for act in (Tanh.apply, torch.tanh)
    )
    assert flow.differences == flow.applications > exact.differences == 1  # that compares the two
    assert flow.loss[-1] == pytest.approx(exact.loss[-1], rel=1e-5)


RELUS = {
    "rnn": lambda: nn.RNN(1, 8, nonlinearity="relu", batch_first=True),
    "mlp": lambda: nn.Sequential(nn.Linear(1, 16), nn.LeakyReLU(0.1), nn.Linear(16, 8), nn.Tanh()),
}


RELU_RTOL = {"rnn": 0.05, "mlp": 0.02}


@pytest.mark.parametrize("name", RELUS)
def test_kinks_are_crossed(name: str) -> None:
    """Against descent whose loss never rises."""
    torch.manual_seed(1)
    model, readout, x = RELUS[name]().double(), nn.Linear(8, 1).double(), torch.randn(4, 8, 1).double()
    target = x.cumsum(1) / 2
    problem = kp.DiscreteProblem(model, x) if name == "rnn" else kp.StaticProblem(model, x, state="")
    flow = kp.gradient_flow(problem, kp.squared_error(target, readout), 100.0, stop_below=0.8, rtol=RELU_RTOL[name])
    weights, losses, rate = [*model.parameters(), *readout.parameters()], [], flow.time_to(0.8) / 800
    while not losses or losses[-1] > 0.8 * losses[0]:
        states = model(x)[0] if name == "rnn" else model(x)
        loss = ((readout(states) - target) ** 2).mean()
        losses.append(loss.item())
        with torch.no_grad():
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.sub_(rate * slope)
    assert (np.diff(losses) < 0).all()
    low, high = flow.interval_to(0.8)
    assert low < rate * len(losses) < high and flow.cost < 300
    assert flow.time_to(0.8) == pytest.approx(rate * len(losses), rel=0.03)


# Solutions that are known


def test_least_squares_is_solved_exactly() -> None:
    """theta(tau) = theta* + e^{-tau H} (theta(0) - theta*), by steps of any length, such as 10^6 / l_1."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(5, 1, bias=False).double(), torch.randn(9, 5).double(), torch.randn(9, 1).double()
    x = x * torch.logspace(0, 2, 5)
    problem, alg = kp.StaticProblem(net, x), kp.solvers.ExponentialRosenbrock()
    flow = kp.gradient_flow(problem, lambda s: ((s - y) ** 2).sum() / 2, 20.0, rtol=1e-9, alg=alg)
    H, best = x.T @ x, torch.linalg.lstsq(x, y).solution
    values, V = torch.linalg.eigh(H)
    for tau, weight in zip(flow.time.tolist(), flow.parameters["weight"], strict=True):
        exact = best + (V * torch.exp(-tau * values)) @ V.T @ (net.weight.detach().T - best)
        torch.testing.assert_close(weight.T, exact, rtol=1e-7, atol=1e-9)
    assert flow.linearisations <= 7 and np.diff(flow.time).max() * float(values[-1]) > 1e6


def test_exponential_steps_take_over_where_they_come_further() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(5, 1, bias=False).double(), torch.randn(9, 5).double() * torch.logspace(0, 1.5, 5)
    problem, explicit = kp.StaticProblem(net, x), kp.solvers.RungeKuttaChebyshev()
    flow, other = (kp.gradient_flow(problem, lambda s: (s**2).sum() / 2, 1.0, alg=alg) for alg in (None, explicit))
    assert 0 < flow.linearisations < 10 and other.linearisations == other.applications == 0
    assert flow.cost < other.cost == other.gradients
    assert flow.cost == flow.gradients + flow.differences
    assert flow(0.01) == pytest.approx(other(0.01), rel=0.05)


class Deep(nn.Module):
    """The product of two numbers, from near the saddle at zero."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor([w], dtype=torch.float64)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.a * self.b


def test_the_escape_from_a_saddle() -> None:
    """u = ab with a = b follows u' = 2 u (1 - u)."""
    problem = kp.StaticProblem(Deep(1e-3), torch.ones(1, 1).double(), state="")
    fine, flow = (kp.gradient_flow(problem, lambda s: ((s - 1) ** 2).sum() / 2, 12.0, rtol=r) for r in (1e-2, 0.05))
    for part in (0.5, 0.2, 0.1):
        u = 1 - part**0.5 * (1 - 1e-6)
        exact = (np.log(u / (1 - u)) - np.log(1e-6 / (1 - 1e-6))) / 2
        assert fine.time_to(part) == pytest.approx(exact, rel=0.005)
        assert flow.interval_to(part)[0] < exact < flow.interval_to(part)[1]
    assert flow.cost < fine.cost < 200


# The other framework


def twins(name: str) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    if name == "rnn":
        problem, _ = integration(nn.RNNCell)
        targets = problem.x.cumsum(1)
        cell = TorchRNN(**{n: jnp.asarray(p.detach().numpy()) for n, p in problem.cell.named_parameters()})
        twin, y = kp.DiscreteProblem(cell, jnp.asarray(problem.x.numpy()), jnp.zeros(6)), targets.numpy()
        return (problem, lambda s: ((s - targets) ** 2).mean()), (twin, lambda s: ((s - y) ** 2).mean())
    problem, _ = field()
    model = copied(problem.f, JaxMLPField(2, 8, key=jax.random.key(0)))
    twin = kp.ODEProblem(model, jnp.asarray(problem.z0.numpy()), GRID)
    solved = kp.solve(problem, "rk4", steps=0.125), kp.solve(twin, RungeKutta4(), steps=0.125)
    return (solved[0], lambda s: (s**2).mean()), (solved[1], lambda s: (s**2).mean())


@pytest.mark.parametrize("name", cases(["rnn", "ode"], {"rnn"}))
def test_torch_and_jax(name: str) -> None:
    ours, theirs = (kp.gradient_flow(problem, loss, 1.0) for problem, loss in twins(name))
    for what in ("time", "loss", "gradient_norm"):
        np.testing.assert_allclose(getattr(theirs, what), getattr(ours, what), rtol=1e-8)
    assert theirs.applications == ours.applications
    flat = [
        np.concatenate([np.ravel(np.asarray(v[-1])) for _, v in sorted(f.parameters.items())]) for f in (ours, theirs)
    ]
    np.testing.assert_allclose(np.sort(flat[1]), np.sort(flat[0]), rtol=1e-8, atol=1e-10)


@pytest.mark.slow
def test_an_adaptive_solver_of_diffrax() -> None:
    """Lengths of its steps change with the parameters."""
    torch_problem, _ = field()
    model = copied(torch_problem.f, JaxMLPField(2, 8, key=jax.random.key(0)))
    problem = kp.ODEProblem(model, jnp.asarray(torch_problem.z0.numpy()), GRID)
    ours, theirs = (kp.gradient_flow(p, lambda s: (s**2).mean(), 1.0) for p in (torch_problem, problem))
    np.testing.assert_allclose(theirs(ours.time), ours.loss, rtol=1e-4)


# What is made of the arguments


def test_parameters_are_copied_and_chosen() -> None:
    problem, loss = integration(nn.RNNCell)
    before = copy.deepcopy((problem.cell.state_dict(), loss.state_dict()))
    flow = kp.gradient_flow(problem, loss, 0.5, params=["weight_hh", "loss.linear.weight"])
    torch.testing.assert_close((problem.cell.state_dict(), loss.state_dict()), before, rtol=0, atol=0)
    assert {name: tuple(v.shape) for name, v in flow.parameters.items()} == {
        "weight_hh": (len(flow.time), 6, 6),
        "loss.linear.weight": (len(flow.time), 1, 6),
    }
    with torch.no_grad():
        problem.cell.weight_hh.copy_(flow.parameters["weight_hh"][-1])
        loss.linear.weight.copy_(flow.parameters["loss.linear.weight"][-1])
        assert float(loss(kp.solve(problem).state)) == pytest.approx(flow.loss[-1], rel=1e-12)


def test_arrays_of_numpy_in_a_jax_loss_are_constants() -> None:
    problem = kp.StaticProblem(eqx.nn.Linear(2, 3, use_bias=False, key=jax.random.key(0)), jnp.ones((4, 2)))
    loss = jax.tree_util.Partial(lambda w, y, s: ((w * s - y) ** 2).mean(), jnp.ones(1), np.ones(1))
    flow = kp.gradient_flow(problem, loss, 0.2)
    assert set(flow.parameters) == {"weight", "loss.[0]"}


def test_it_stops_below_a_part_of_the_loss() -> None:
    problem, loss = integration(nn.RNNCell)
    flow = kp.gradient_flow(problem, loss, 1e3, stop_below=0.5)
    assert flow.reached and flow.time[-1] < 1e3
    assert flow.loss[-1] < 0.5 * flow.loss[0] <= flow.loss[-2]
    assert flow(flow.time_to(0.5)) == pytest.approx(0.5 * flow.loss[0], rel=1e-9)
    assert np.isnan(flow.time_to(1e-3))
    with pytest.raises(ValueError, match="outside of the times"):
        flow(2e3)
    with pytest.raises(ValueError, match="0 < fraction < 1"):
        flow.time_to(2.0)


def test_too_many_steps_are_returned_flagged() -> None:
    problem, loss = integration(nn.RNNCell)
    with pytest.warns(UserWarning, match="after 3 steps"):
        flow = kp.gradient_flow(problem, loss, 1e3, alg=kp.solvers.ExponentialRosenbrock(max_linearisations=3))
    assert not flow.reached and len(flow.time) == 4


def test_single_precision() -> None:
    problem, loss = integration(nn.RNNCell)
    exact = kp.gradient_flow(problem, loss, 3.0, stop_below=0.5)
    single = kp.DiscreteProblem(copy.deepcopy(problem.cell).float(), problem.x.float())
    flow = kp.gradient_flow(single, loss.float(), 3.0, stop_below=0.5)
    assert flow.time_to(0.5) == pytest.approx(exact.time_to(0.5), rel=1e-3)


def test_it_plots_itself() -> None:
    problem, loss = integration(nn.RNNCell)
    flow = kp.gradient_flow(problem, loss, 0.5)
    above, below = flow.plot().axes
    np.testing.assert_array_equal(above.lines[1].get_ydata(), flow.loss[1:])
    np.testing.assert_array_equal(below.lines[0].get_ydata(), flow.gradient_norm[1:])


def test_a_kink_is_where_the_flow_rests() -> None:
    """|w - 2| falls at rate 1 until it is zero."""
    torch.manual_seed(0)
    net = nn.Linear(1, 1, bias=False).double()
    flow = kp.gradient_flow(kp.StaticProblem(net, torch.ones(1, 1).double()), lambda s: (s - 2).abs().sum(), 9.0)
    assert flow.reached and flow.loss[-1] < 1e-9
    for part in (0.5, 0.1):
        assert flow.time_to(part) == pytest.approx((1 - part) * flow.loss[0], rel=1e-6)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "span": ({"span": -1.0}, ValueError, "span is -1.0"),
    "span of two": ({"span": (0, 1)}, ValueError, "positive number"),
    "rtol": ({"rtol": 0}, ValueError, "rtol is 0"),
    "stop_below": ({"stop_below": 2}, ValueError, "stop_below is 2"),
    "alg": ({"alg": "krylov"}, TypeError, "ExponentialRosenbrock"),
    "stages": ({"alg": 3}, TypeError, "RungeKuttaChebyshev"),
    "params": ({"params": ["nothing"]}, ValueError, "unknown parameters"),
    "loss of states": ({"loss": lambda s: s}, ValueError, "expected one number"),
    "loss of numbers": ({"loss": lambda s: 1.0}, ValueError, "float"),
    "no loss": ({"loss": 3}, TypeError, "loss is int"),
    "infinite loss": ({"loss": lambda s: s.sum() / 0}, ValueError, "at the start"),
    "infinite gradient": ({"loss": lambda s: (0 * s).sum().sqrt()}, ValueError, "gradient"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    problem, loss = integration(nn.RNNCell)
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message):
        kp.gradient_flow(problem, **{"loss": loss, "span": 1.0} | changed)


def test_problems_that_cannot_be_differentiated_twice() -> None:
    problem, loss = field()
    with pytest.raises(ValueError, match="explicit Runge-Kutta"):
        kp.gradient_flow(kp.solve(problem, "explicit_adams", steps=0.05), loss, 1.0)
    fixed = kp.FixedPointProblem(nn.RNNCell(3, 4), torch.randn(2, 3))
    with pytest.raises(TypeError, match="FixedPointProblem"):
        kp.gradient_flow(fixed, lambda z: z.sum(), 1.0)


def test_a_shared_parameter_is_refused() -> None:
    problem, loss = integration(nn.RNNCell)
    loss.linear.weight = problem.cell.bias_hh
    with pytest.raises(ValueError, match="belong to the model and to the loss"):
        kp.gradient_flow(problem, loss, 1.0)
