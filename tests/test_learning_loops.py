"""What a learnt controller can still learn: margins, the cost as a loss, and the analysis of a loop over training."""

from __future__ import annotations

import copy
from typing import Any

import control as oracle
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.linalg import expm
from scipy.signal import cont2discrete
from torch import nn
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn.control import LTI
from kpflow_dyn.models import ClosedLoop, DoubleIntegrator, Pendulum

TIMES = np.linspace(0.0, 1.5, 16)
START = np.array([[0.4, 0.1], [-0.2, 0.5], [0.3, -0.3]])
Q, R = np.diag([1.0, 0.2]), np.array([[0.3]])
COST = control.QuadraticCost(Q, R, target=[0.1, 0.0], u_target=[0.2])
FREE = control.QuadraticCost(Q, R, target=[0.1, 0.0])
END = control.QuadraticCost(np.eye(2))


def assert_close(found: object, expected: object, rtol: float = 1e-9) -> None:
    scale = float(np.abs(np.asarray(expected)).max()) or 1.0
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=rtol * scale)


# Margins


pytestmark = pytest.mark.usefixtures("x64")


def loops(dt: float | None) -> list[LTI]:
    rng, found = np.random.default_rng(0), []
    for n in (1, 2, 5):
        A = rng.normal(size=(n, n))
        A = A - 0.5 * np.eye(n) if dt is None else 0.9 * A / np.abs(np.linalg.eigvals(A)).max()
        D = rng.normal(size=(1, 1)) if n == 1 else np.zeros((1, 1))
        found.append(LTI(A, rng.normal(size=(n, 1)), 3 * rng.normal(size=(1, n)), D, dt))
    return found


@pytest.mark.parametrize("system", [*loops(None), *loops(0.1)])
def test_margins_of_one_loop(system: LTI) -> None:
    found = control.stability_margins(system)
    omega = np.geomspace(1e-3, 1e3, 4001) if system.dt is None else np.linspace(0, np.pi / system.dt, 4001)
    L = control.frequency_response(system, omega).response.values[0, 0]
    crossing = np.flatnonzero((L.imag[1:] * L.imag[:-1] < 0) & (L.real[1:] < 0))
    ends = L[[0] if system.dt is None else [0, -1]].real
    if system.dt is None:
        ends = np.append(ends, system.D[0, 0])  # at infinity
    gains = np.append(-1 / L.real[crossing], -1 / ends[ends < 0])
    expected = gains[np.abs(np.log(gains)).argmin()] if len(gains) else np.inf
    assert found.gain == pytest.approx(expected, rel=2e-2)
    far = np.inf if system.dt else abs(1 + system.D.item())
    assert found.distance == pytest.approx(min(abs(1 + L).min(), far), rel=1e-3)
    theirs = oracle.stability_margins(system.to_control(), method="poly")
    assert found.phase == pytest.approx(theirs[1], abs=1e-6)
    if found.phase_crossover < np.pi / (system.dt or 0.1) * 0.999:  # theirs does not look at the highest frequency
        assert found.gain == pytest.approx(theirs[0], rel=1e-6)
    for skew in (0.0, 1.0, -0.5):
        exact = control.disk_margins(system, skew=skew)
        dense = oracle.disk_margins(system.to_control(), omega, skew=skew)
        same = control.disk_margins(system, omega, skew)
        assert_close(same.margin, dense[0], 1e-8)
        assert exact.margin == pytest.approx(dense[0], rel=2e-3)
        for ours, other in zip(same[1:], dense[1:], strict=True):
            assert ours == pytest.approx(float(other), rel=1e-6)


@pytest.mark.parametrize("channels", [2, 3])
def test_disk_margins_of_several_channels_are_the_least_rotation_that_destabilises(channels: int) -> None:
    M = np.random.default_rng(0).normal(size=(2, channels, channels, 2)) @ np.array([1, 1j])
    phases = np.exp(1j * np.linspace(0, 2 * np.pi, 121))
    free = np.stack(np.meshgrid(*[phases] * (channels - 1)), -1).reshape(-1, channels - 1)
    turns = np.concatenate([np.ones((len(free), 1)), free], 1)
    found = control._margins._mu(M)
    for one, bound in zip(M, found, strict=True):
        assert bound == pytest.approx(np.abs(np.linalg.eigvals(turns[:, :, None] * one)).max(), rel=1e-2)


def test_a_pole_may_be_lost_at_infinity() -> None:
    found = control.stability_margins(LTI([[-1.0]], [[1.0]], [[0.1]], [[-0.5]]))  # its pole is -1 - 0.1 k / (1 - k / 2)
    assert (found.gain, found.phase_crossover) == (2.0, np.inf)
    with pytest.raises(ValueError, match="1 \\+ D is singular"):
        control.disk_margins(LTI([[-1.0]], [[1.0]], [[2.0]], [[-1.0]]))


def test_the_spinning_satellite() -> None:
    """Each loop by itself has margins without end, both at once have none to speak of (Seiler et al., 2020)."""
    satellite = LTI([[0.0, 10.0], [-10.0, 0.0]], np.eye(2), [[1.0, 10.0], [-10.0, 1.0]])
    assert control.disk_margins(satellite).margin == pytest.approx(0.0997, abs=2e-4)
    spread = control.disk_margins(satellite, np.array([0.0, 1.0, 10.0]), returnall=True)
    assert spread.margin.shape == spread.gain.shape == spread.phase.shape == (3,)
    one = LTI(satellite.A - np.outer([0, 1], satellite.C[1]), [1.0, 0.0], satellite.C[0])
    assert control.stability_margins(one).phase == pytest.approx(90.0, abs=1e-6)


@pytest.mark.parametrize("inputs", [1, 2])
def test_optimal_regulators_have_their_guaranteed_margins(inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    A, B = rng.normal(size=(4, 4)), rng.normal(size=(4, inputs))
    K = control.lqr(A, B, np.eye(4), np.eye(inputs)).K
    assert control.disk_margins((A, B, K, 0), skew=1.0).margin >= 1 - 1e-6
    if inputs == 1:
        found = control.stability_margins((A, B, K, 0))
        assert found.phase >= 60 and not 0.5 < found.gain < np.inf


def observed(integrators: int, dt: float | None, seed: int) -> LTI:
    """The loop of a regulator and its filter about an unstable plant behind integrators, in coordinates by chance."""
    rng, n = np.random.default_rng(seed), integrators + 2
    A, B = np.diag(np.r_[np.ones(integrators), 0.0], 1), np.eye(n)[:, -1:]
    A[integrators:, integrators:] = [[0.0, 1.0], [2.0, -0.5]]
    if dt is not None:
        A, B = cont2discrete((A, B, np.eye(n), 0 * B), dt)[:2]
    T = rng.normal(size=(n, n))
    C = T[:1]  # the first coordinate is measured
    A, B = np.linalg.solve(T, A @ T), np.linalg.solve(T, B)
    regulate, observe = (control.lqr, control.lqe) if dt is None else (control.dlqr, control.dlqe)
    K, F = regulate(A, B, np.eye(n), [[1.0]])[0], observe(A, np.eye(n), C, np.eye(n), [[0.1]])[0]
    filtered = (np.eye(n) - F @ C) @ (A - B @ K)
    inner = (A - B @ K - F @ C, K, 0 * K @ F) if dt is None else (filtered, K @ filtered, K @ F)
    whole = np.block([[inner[0], F @ C], [np.zeros((n, n)), A]])
    return LTI(whole, np.r_[0 * B, B], np.c_[inner[1], inner[2] @ C], None, dt)


@pytest.mark.parametrize("dt", [None, 0.1])
@pytest.mark.parametrize("integrators", [0, 1, 2, 3])
def test_gain_margins_beside_poles_on_the_boundary(integrators: int, dt: float | None) -> None:
    """L has no bound near a pole at rest, where it is real; the poles of the closed loop say where it is lost."""
    for seed in range(3):
        loop = observed(integrators, dt, seed)
        gains = np.geomspace(1e-2, 1e2, 2001)
        poles = np.linalg.eigvals(loop.A - gains[:, None, None] * (loop.B @ loop.C))
        unstable = (poles.real.max(1) if dt is None else np.abs(poles).max(1) - 1) > 1e-7
        assert not unstable[1000]
        expected = gains[np.flatnonzero(unstable[1:] != unstable[:-1]) + 1]
        found = control.stability_margins(loop).gain
        assert found == pytest.approx(expected[np.abs(np.log(expected)).argmin()], rel=5e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: control.stability_margins((-np.eye(2), np.eye(2))), "take disk_margins"),
        (lambda: control.disk_margins((-np.eye(2), np.eye(2)[:, :1])), "expected as many of each"),
        (lambda: control.disk_margins((-np.eye(2), np.eye(2)), returnall=True), "needs the frequencies"),
        (lambda: control.QuadraticCost(np.eye(2), u_target=[1.0]), "u_target is for a cost of the input"),
        (lambda: control.QuadraticCost(np.eye(2), [[1.0]], u_target=[1.0, 2.0]), "u_target has shape"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The cost as a loss


def torch_policy(inputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def problem_of(policy: nn.Module, x: Any = None, plant: Any = None) -> kp.ODEProblem:
    loop = ClosedLoop(plant or DoubleIntegrator(), policy)
    return kp.ODEProblem(loop, torch.from_numpy(START), TIMES, x)


def own_cost(policy: nn.Module, plant: Any, cost: Any, terminal: Any) -> torch.Tensor:
    """The same number by torchdiffeq and autograd alone."""

    def field(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        u = policy(s[:, :2])
        return torch.cat([plant(s[:, :2], u), u], -1)

    start = torch.cat([torch.from_numpy(START), torch.zeros(3, 1).double()], -1)
    s = odeint(field, start, torch.from_numpy(TIMES), method="rk4")
    h = torch.from_numpy(np.diff(TIMES))[:, None]
    u, z = (s[1:, :, 2:] - s[:-1, :, 2:]) / h[..., None], s[..., :2]
    return (((cost(z[:-1], u) + cost(z[1:], u)) * h / 2).sum(0) + terminal(z[-1])).mean()


def integrated_cost(policy: nn.Module, plant: Any, cost: Any, terminal: Any) -> torch.Tensor:
    """The integral of the cost by the solver itself."""

    def field(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        z, u = s[:, :2], policy(s[:, :2])
        return torch.cat([plant(z, u), cost(z, u)[:, None]], -1)

    start = torch.cat([torch.from_numpy(START), torch.zeros(3, 1).double()], -1)
    end = odeint(field, start, torch.from_numpy(TIMES), method="rk4")[-1]
    return (end[:, 2] + terminal(end[:, :2])).mean()


def entropy(z: Any, u: Any) -> Any:
    """A cost that is not quadratic."""
    return (z[0] ** 4 + z[1] ** 2) * 0.5 + u[0] ** 2 * (1 + z[0] ** 2)


@pytest.mark.parametrize("cost", [COST, entropy])
def test_the_training_cost_and_its_gradient_are_those_of_autograd(cost: Any) -> None:
    policy = torch_policy()
    problem, loss = control.training_cost(problem_of(policy), cost, END)
    sol = kp.solve(problem, "rk4")
    flow = kp.linearize(sol)
    batched = cost if cost is COST else lambda z, u: torch.func.vmap(torch.func.vmap(cost))(z, u)
    expected = own_cost(policy, DoubleIntegrator(), batched, END)
    assert_close(loss(sol.state).detach(), expected.detach(), 1e-12)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(expected, list(policy.parameters()))])
    state = sol.state.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(state), state)
    assert_close(flow.J.T.mv(slope / torch.from_numpy(np.asarray(sol.weights))[:, None]), gradient)
    assert list(flow.parameters) == [f"policy.{name}" for name, _ in policy.named_parameters()]
    # It is the integral of the cost, to second order in the grid.
    exact = control.adjoint(kp.solve(problem_of(policy), "rk4"), cost, END).cost.mean()
    assert float(expected.detach()) == pytest.approx(float(exact), rel=3e-3)


def test_forecasts_of_the_training_cost_are_what_descent_does() -> None:
    policy, lr = torch_policy(), 2e-3
    problem, loss = control.training_cost(problem_of(policy, plant=Pendulum(damping=0.2)), COST, END)
    sol = kp.solve(problem, "rk4")
    found = kp.gradient_flow(sol, loss, span=40 * lr, rtol=1e-2)
    forecast = kp.forecast(kp.linearize(sol), loss=loss, lr=lr / 20, steps=20, check=False)
    trained, recorded = copy.deepcopy(policy), []
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr)
    for _ in range(41):
        value = own_cost(trained, Pendulum(damping=0.2), COST, END)
        recorded.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    fallen = recorded[0] - recorded[-1]
    assert fallen > 0.01 * recorded[0]
    assert abs(float(found(40 * lr)) - recorded[-1]) < 0.03 * fallen
    assert forecast.loss[-1] == pytest.approx(float(found(lr)), rel=2e-2)  # so soon the kernel is as it was


def test_the_training_cost_in_jax_is_that_of_torch() -> None:
    policy = torch_policy()
    net = eqx.nn.MLP(2, 1, 6, 1, activation=jnp.tanh, key=jax.random.key(0))
    weights = [jnp.asarray(p.detach().numpy()) for p in policy.parameters()]
    where = lambda m: [m.layers[0].weight, m.layers[0].bias, m.layers[1].weight, m.layers[1].bias]  # noqa: E731
    net = eqx.tree_at(where, net, weights)
    values = []
    names = ["learnable", "disk_margin_along", "gain_distance", "control_gap", "sensitivity", "cost_ratio"]
    for module, start, alg in ((policy, torch.from_numpy(START), "rk4"), (net, jnp.asarray(START), None)):
        posed = kp.ODEProblem(ClosedLoop(DoubleIntegrator(), module), start, TIMES)
        problem, loss = control.training_cost(posed, FREE, END)
        state = kp.solve(problem, alg).state
        found = control.analyze(kp.solve(posed, alg), FREE, END)
        values.append(
            [float(loss(state.detach() if module is policy else state))] + [found[name].sum().item() for name in names]
        )
    np.testing.assert_allclose(values[0], values[1], rtol=1e-3, atol=1e-9)  # rk4 on the grid, and an adaptive method


def test_costs_of_states_alone_need_no_control() -> None:
    field = kp.models.CTRNNField(2).double()
    posed = kp.ODEProblem(field, torch.from_numpy(START), TIMES)
    problem, loss = control.training_cost(posed, END)
    assert problem is posed
    sol = kp.solve(problem, "rk4")
    weights = torch.from_numpy(np.asarray(sol.weights))
    assert_close(loss(sol.state).detach(), ((sol.state**2).sum(-1) * weights).sum(1).mean().detach(), 1e-12)
    cell = kp.DiscreteProblem(nn.RNNCell(3, 2).double(), torch.randn(2, 5, 3).double())
    steps = kp.solve(cell).state
    assert_close(control.training_cost(cell, END).loss(steps).detach(), (steps**2).sum((1, 2)).mean().detach(), 1e-12)
    with pytest.raises(ValueError, match="needs a running cost"):
        control.training_cost(posed, None)
    with pytest.raises(ValueError, match="give it a grid of times"):
        control.training_cost(posed.remake(t=(0.0, 1.0)), END)
    with pytest.raises(ValueError, match="times decrease"):
        control.training_cost(posed.remake(t=TIMES[::-1].copy()), END)
    with pytest.raises(TypeError, match="got StaticProblem"):
        control.training_cost(kp.StaticProblem(nn.Linear(2, 2).double(), torch.randn(3, 2).double()), END)


def test_costs_of_sampled_loops_are_those_of_plant_and_held_control() -> None:
    policy, every = torch_policy(), 0.25
    loop = ClosedLoop(DoubleIntegrator(), policy, every=every)
    posed = kp.ODEProblem(loop, loop.start(torch.from_numpy(START)), np.linspace(0.0, 1.0, 5))
    problem, loss = control.training_cost(posed, FREE, END)
    sol = kp.solve(problem, "rk4")
    assert problem is posed
    # The same by hand: a double integrator under a held control.
    z, states = torch.from_numpy(START), []
    for _ in range(5):
        u = policy(z)
        states.append(torch.cat([z, u], -1))
        z = torch.stack([z[:, 0] + every * z[:, 1] + every**2 / 2 * u[:, 0], z[:, 1] + every * u[:, 0]], -1)
    by_hand = torch.stack(states, 1)
    assert_close(sol.state.detach(), by_hand.detach(), 1e-12)
    z, u = by_hand[..., :2], by_hand[:, :-1, 2:]
    expected = ((FREE(z[:, :-1], u) + FREE(z[:, 1:], u)).sum(1) * every / 2 + END(z[:, -1])).mean()
    assert_close(loss(by_hand).detach(), expected.detach(), 1e-12)
    assert float(expected.detach()) == pytest.approx(float(control.adjoint(sol, FREE, END).cost.mean()), rel=2e-2)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(by_hand), list(policy.parameters()))])
    state = sol.state.detach().requires_grad_()
    flow = kp.linearize(sol)
    (slope,) = torch.autograd.grad(loss(state), state)
    measure = flow.J.codomain.measure
    assert_close(flow.J.T.mv(slope if measure is None else slope / measure), gradient)


# The analysis


def test_what_can_be_learnt_and_what_the_cost_hangs_on() -> None:
    policy = torch_policy()
    sol = kp.solve(problem_of(policy), "rk4")
    found = control.analyze(sol, COST, END)
    flow = kp.linearize(sol)
    J = flow.J.dense().detach().numpy().reshape(*sol.state.shape, -1)
    G = np.einsum("btup,btvp->btuv", J, J)
    vectors = found["learnable_direction"].values
    assert_close(vectors * found["learnable"].values[..., None, :] @ np.swapaxes(vectors, -1, -2), G)
    reach = control.gram(sol, "c", loop="open").directions.values[..., :1]
    part = np.einsum("btuk,btuv,btvk->bt", reach, G, reach)[:, 1:] / np.trace(G, axis1=2, axis2=3)[:, 1:]
    assert_close(found["learnable_reachable"].values[:, 1:], part)
    assert np.isnan(found["learnable_reachable"].values[:, 0]).all()
    costates = control.adjoint(sol, COST, END)
    assert_close(found["cost_to_go"], costates.cost_to_go)
    assert_close(found["cost_to_go"].values[:, 0], costates.cost)
    # At each time by autograd through the policy alone.
    state = sol.state.detach()
    for k in (0, 7, 15):
        u = policy(state[:, k])
        grads = torch.autograd.grad(u, list(policy.parameters()), torch.from_numpy(costates.gradient.values[:, k]) / 3)
        assert_close(found["sensitivity"].values[:, k], [float(g.norm()) for g in grads])
    exact = torch.autograd.grad(integrated_cost(policy, DoubleIntegrator(), COST, END), list(policy.parameters()))
    assert_close(found["gradient_norm"], [float(g.norm()) for g in exact])
    at_end = integrated_cost(policy, DoubleIntegrator(), lambda z, u: 0 * u[:, 0], END)
    exact = torch.autograd.grad(at_end, list(policy.parameters()))
    assert_close(control.analyze(sol, None, END)["gradient_norm"], [float(g.norm()) for g in exact])  # type: ignore
    only = control.analyze(sol, COST, END, params=lambda name: "bias" in name, rank=2)
    assert only["parameter"].values.tolist() == ["policy.0.bias", "policy.2.bias"]
    assert_close(only["learnable_reachable"].values[:, 1:], np.ones((3, 15)))


def linear(K: np.ndarray, target: Any = (0.1, 0.0), held: float = 0.0) -> nn.Module:
    law = nn.Linear(2, 1).double()
    with torch.no_grad():
        law.weight.copy_(torch.from_numpy(-K))
        law.bias.copy_(torch.from_numpy(held + K @ np.array(target)))
    return law


PLANT = ([[0.0, 1.0], [0.0, 0.0]], [[0.0], [1.0]])


def test_the_regulator_is_its_own_yardstick() -> None:
    K = control.lqr(*PLANT, Q, R).K
    found = control.analyze(kp.solve(problem_of(linear(K)), "rk4"), FREE)
    assert_close(found["cost_ratio"], np.ones(3))
    assert_close(found["policy_gain"], K)
    assert float(found["gain_distance"]) < 1e-12 and float(abs(found["control_gap"]).max()) < 1e-12
    assert float(abs(found["excess"]).max()) < 1e-12
    assert_close(found["rest"], [0.1, 0.0])
    assert found["gain_margin_low"].values == 0 and np.isinf(found["gain_margin_high"].values)
    loop = oracle.ss(*PLANT, K, 0)
    assert float(found["phase_margin"][0]) == pytest.approx(oracle.margin(loop)[1], rel=1e-8)
    assert_close(found["disk_margin_along"].dropna("time"), np.full((3, 9), float(found["disk_margin"])), 1e-6)
    assert "phase margins" in str(found) and not str(found["note"].values)
    assert found.to_xarray() is found.data


def test_modes_carry_what_the_policy_costs_more() -> None:
    K = np.array([[0.8, 0.7]])
    times = np.linspace(0.0, 30.0, 61)
    problem = problem_of(linear(K)).remake(t=times)
    found = control.analyze(kp.solve(problem, "rk4"), FREE)
    A, B = (np.array(M) for M in PLANT)
    best = control.lqr(A, B, Q, R)
    off = START - np.array([0.1, 0.0])
    best_cost = np.einsum("bi,ij,bj->b", off, best.X, off)
    closed, h = A - B @ K, 0.001
    weight, Phi, W = Q + K.T @ R @ K, expm(h * closed), np.zeros((2, 2))
    step = np.eye(2)
    for _ in range(30000):
        W, step = W + h * (step.T @ weight @ step + (Phi @ step).T @ weight @ (Phi @ step)) / 2, Phi @ step
    excess = np.einsum("bi,ij,bj->b", off, W, off) - best_cost
    assert float(found["excess_cost"]) == pytest.approx(excess.mean(), rel=1e-4)
    assert float(found["excess"].sum()) == pytest.approx(excess.mean(), rel=1e-4)
    assert_close(np.sort_complex(found["excess_pole"].values), np.sort_complex(np.linalg.eigvals(closed)))
    # On a linear plant the same follows from the trajectories: the gap is all that a policy costs more.
    gap = np.trapezoid(found["control_gap"].values, times, axis=1)
    assert_close(found["cost"].values - found["regulator_cost"].values, gap, 5e-2)


def test_over_training_there_is_an_axis_of_steps(tmp_path: Any) -> None:
    policy = torch_policy()
    sol = kp.solve(problem_of(policy), "rk4")
    before = {name: value.clone() for name, value in sol.problem.f.state_dict().items()}
    record = kp.Recorder(tmp_path / "run")
    values = {}
    for step, factor in ((0, 1.0), (10, 0.0)):
        values[step] = {name: factor * value for name, value in before.items()}
    record(0, sol.problem.f, loss=1.0)
    found = control.analyze(sol, FREE, END, checkpoints=values)
    again = control.analyze(sol, FREE, END, checkpoints=kp.Recorder.read(tmp_path / "run"))
    assert found["step"].values.tolist() == [0, 10]
    assert_close(found["cost"].sel(step=0), control.adjoint(sol, FREE, END).cost)
    assert again["step"].values.tolist() == [0]
    assert_close(again["cost_to_go"].sel(step=0), found["cost_to_go"].sel(step=0))
    assert all(torch.equal(value, before[name]) for name, value in sol.problem.f.state_dict().items())
    still = found.data.sel(step=10)  # no control at all: the plant drifts, and rests anywhere
    assert float(still.disk_margin) == 0 and float(still.gain_distance) == pytest.approx(1.0)
    drawn = [found.plot(), control.LoopAnalysis(found.data.isel(step=0)).plot(dark=True)]
    assert all(len(figure.axes) == 6 for figure in drawn)
    assert str(found).startswith("step 0\n")


def test_what_is_not_known_is_said() -> None:
    sol = kp.solve(problem_of(torch_policy(), plant=Pendulum()), "rk4")
    found = control.analyze(sol, entropy)
    assert "needs a QuadraticCost" in str(found["note"].values)
    assert np.isnan(found["cost_ratio"]).all()
    tilted = control.QuadraticCost(Q, R, target=[0.5, 0.0])  # the pendulum falls from there without a torque
    assert "no equilibrium" in str(control.analyze(sol, tilted)["note"].values)
    assert len(control.analyze(kp.solve(problem_of(torch_policy()).remake(t=(0.0, 1.0))), COST)["time"]) > 2
    with pytest.raises(TypeError, match="takes the solution of an ODEProblem"):
        control.analyze(sol.problem, COST)
    with pytest.raises(ValueError, match="needs a plant and a policy"):
        control.analyze(kp.solve(kp.ODEProblem(kp.models.CTRNNField(2).double(), torch.from_numpy(START), TIMES)), END)
    with pytest.raises(TypeError, match="expected a dict of parameters by name"):
        control.analyze(sol, COST, checkpoints="folder")


def test_references_are_inputs_of_the_policy() -> None:
    reference = 0.2 * torch.ones(3, len(TIMES), 1).double()
    sol = kp.solve(problem_of(torch_policy(3), reference), "rk4")
    found = control.analyze(sol, FREE)
    assert found["control"].shape == (3, 16, 1) and np.isfinite(found["control_gap"]).all()
    row = torch.cat([sol.state.detach()[:, 3], reference[:, 3]], -1)
    assert_close(found["control"].values[:, 3], sol.problem.f.policy(row).detach())


def test_costs_refuse_starts_of_an_encoder() -> None:
    loop = ClosedLoop(DoubleIntegrator(), nn.Linear(2, 1).double())
    posed = kp.ODEProblem(loop, torch.ones(3, 2).double(), TIMES, encoder=nn.Linear(2, 2).double())
    with pytest.raises(ValueError, match="encoder"):
        control.training_cost(posed, COST)


def loop_told(gain: list[float]) -> tuple[control.LoopAnalysis, str]:
    policy = nn.Linear(2, 1, bias=False).double()
    policy.weight.data = torch.tensor([gain], dtype=torch.float64)
    start = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, -1.0]], dtype=torch.float64)
    sol = kp.solve(kp.ODEProblem(ClosedLoop(DoubleIntegrator(), policy), start, np.linspace(0, 3, 16)), "rk4")
    found = control.analyze(sol, control.QuadraticCost(np.eye(2), [[1.0]]))
    return found, str(found)


def test_a_told_loop_compares_means_of_costs_not_the_mean_of_their_ratios() -> None:
    found, told = loop_told([-1.0, -0.3])
    whole = float(found["cost"].mean()) / float(found["regulator_cost"].mean())
    worst = float((found["cost"] / found["regulator_cost"]).max())
    assert abs(whole / float(found["cost_ratio"].mean()) - 1) > 0.01
    assert f"{whole:.4g} times the regulator's" in told and f"worst {worst:.4g}" in told
    assert "where it rests" in told and "linearised about the cost's target" in told and "unstable" not in told


def test_a_told_loop_says_where_it_is_unstable() -> None:
    told = loop_told([-1.0, 0.3])[1]
    assert "unstable at rest: pole 0.15" in told and "it has no margins" in told
    assert "phase margin" not in told and "disk margin" not in told
