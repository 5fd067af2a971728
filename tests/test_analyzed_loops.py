"""`control.analyze` and `control.adjoint` of sampled loops, loops in discrete time and hybrid models, against autograd
through plain loops, python-control and scipy."""

from __future__ import annotations

from typing import Any

import control as oracle
import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import xarray as xr
from conftest import cases
from scipy.integrate import quad_vec
from scipy.linalg import expm, solve_discrete_lyapunov
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn._arrays import array_namespace
from kpflow_dyn.control._analysis import _learnable
from kpflow_dyn.models import ClosedLoop, DoubleIntegrator, Event, Hybrid, Pendulum

pytestmark = pytest.mark.usefixtures("x64")
EVERY, SAMPLES = 0.2, 4
START = torch.tensor([[0.4, 0.1], [-0.2, 0.5]], dtype=torch.float64)
Q, R = np.diag([1.0, 0.2]), np.array([[0.3]])
WEIGHTS = torch.tensor([1.0, 0.2], dtype=torch.float64)
COST, END = control.QuadraticCost(Q, R), control.QuadraticCost(np.eye(2))


def assert_close(found: object, expected: object, rtol: float = 1e-9) -> None:
    scale = float(np.abs(np.asarray(expected)).max()) or 1.0
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=rtol * scale)


class Slider:
    """A mass on a spring in discrete time, in both frameworks, whose policy may see its place alone."""

    dt, state_size, control_size, state_names = 0.1, 2, 1, ("position", "velocity")

    def step(self, z: Any, u: Any) -> Any:
        place, velocity = z[..., :1], z[..., 1:]
        velocity = velocity + self.dt * (u - place - place**3)
        return array_namespace(z).concat([place + self.dt * velocity, velocity], axis=-1)


class Blind(Slider):
    def observe(self, z: Any, x_t: Any) -> Any:
        return z[..., :1]


def seeded(make: Any) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def static() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)))


def linear(K: np.ndarray) -> nn.Module:
    law = nn.Linear(2, 1, bias=False).double()
    law.weight.data.copy_(torch.from_numpy(-K))
    return law


def sampled(policy: nn.Module, plant: Any = None, samples: int = SAMPLES, **options: Any) -> Any:
    loop = ClosedLoop(plant or Pendulum(damping=0.2), policy, every=EVERY, **options)
    return kp.solve(kp.ODEProblem(loop, START, EVERY * np.arange(samples + 1)), "rk4")


def stepped(policy: nn.Module, readout: Any = None, memory: int = 0, plant: Any = None) -> Any:
    z0 = torch.cat([START, torch.zeros(2, memory).double()], -1)
    x = torch.zeros(2, 7, 0).double()
    return kp.solve(kp.DiscreteProblem(ClosedLoop(plant or Slider(), policy, readout=readout), x, z0))


def over_samples(policy: Any, readout: Any, delay: int, kicks: Any) -> tuple[Tensor, Tensor, Tensor]:
    """States at the samples, cost and controls of a pendulum that is written by hand: the 3/8 rule for [z, int L]."""
    plant = Pendulum(damping=0.2)
    s, memory = torch.cat([START, torch.zeros(2, 1).double()], -1), torch.zeros(2, 3).double()
    waiting, states, controls = [torch.zeros(2, 1).double()] * delay, [], []
    for k in range(SAMPLES + 1):
        if readout is None:
            u = policy(s[:, :2])
        else:
            memory = policy(s[:, :2], memory)
            u = readout(memory)
        states.append(s[:, :2])
        controls.append(u + kicks[k])
        waiting = [*waiting, controls[-1]]
        held = waiting.pop(0)

        def f(s: Tensor, u: Tensor = held) -> Tensor:
            rate = (WEIGHTS * s[:, :2] ** 2).sum(-1, keepdim=True) + 0.3 * u**2
            return torch.cat([plant(s[:, :2], u), rate], -1)

        if k < SAMPLES:
            a = f(s)
            b = f(s + EVERY / 3 * a)
            c = f(s + EVERY * (b - a / 3))
            s = s + EVERY / 8 * (a + 3 * b + 3 * c + f(s + EVERY * (a - b + c)))
    cost = s[:, 2] + (s[:, :2] ** 2).sum(-1)
    return torch.stack(states, 1), cost, torch.stack(controls, 1)


def over_steps(loop: Any, kicks: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same of a loop in discrete time."""
    z, memory, states, controls, cost = START, torch.zeros(2, 3).double(), [], [], 0.0
    for k in range(7):
        seen = loop.plant.observe(z, None) if hasattr(loop.plant, "observe") else z
        if loop.readout is None:
            u = loop.policy(seen)
        else:
            memory = loop.policy(seen, memory)
            u = loop.readout(memory)
        controls.append(u + kicks[k])
        z = loop.plant.step(z, controls[-1])
        states.append(z)
        cost = cost + (WEIGHTS * z**2).sum(-1) + 0.3 * controls[-1][:, 0] ** 2
    return torch.stack(states, 1), cost + (z**2).sum(-1), torch.stack(controls, 1)


def check_by_autograd(sol: Any, by_hand: Any) -> control.LoopAnalysis:
    """Costs, controls, gradients and what is learnable are those of autograd through the loop written by hand."""
    found, parameters = control.analyze(sol, COST, END), list(sol.problem.model.named_parameters())
    kicks = torch.zeros(len(found["time"]), 2, 1).double().requires_grad_()
    states, cost, controls = by_hand(kicks)
    values = [value for _, value in parameters]
    of_kicks, *gradients = torch.autograd.grad(cost.mean(), [kicks, *values], retain_graph=True)
    assert_close(found["cost"], cost.detach(), 1e-10)
    assert_close(found["cost_to_go"].values[:, 0], cost.detach(), 1e-10)
    assert_close(found["control"], controls.detach(), 1e-10)
    assert_close(found["control_gradient"], 2 * of_kicks.transpose(0, 1))
    assert found["parameter"].values.tolist() == [name for name, _ in parameters]
    assert_close(found["gradient_norm"], [float(g.norm()) for g in gradients])
    J = np.stack([
        np.concatenate([
            np.zeros(v.numel()) if g is None else g.reshape(-1).numpy()
            for g, v in zip(torch.autograd.grad(one, values, retain_graph=True, allow_unused=True), values, strict=True)
        ])
        for one in (states if states.requires_grad else states + 0 * cost.sum()).reshape(-1)
    ]).reshape(*states.shape, -1)  # fmt: skip
    G, vectors = np.einsum("btup,btvp->btuv", J, J), found["learnable_direction"].values
    assert_close(vectors * found["learnable"].values[..., None, :] @ np.swapaxes(vectors, -1, -2), G, 1e-8)
    return found


@pytest.mark.parametrize(("memory", "delay"), [(0, 0), (3, 1)])
def test_a_sampled_loop_costs_and_learns_as_by_autograd(memory: int, delay: int) -> None:
    policy = seeded(lambda: nn.GRUCell(2, 3)) if memory else static()
    readout = seeded(lambda: nn.Linear(3, 1)) if memory else None
    sol = sampled(policy, readout=readout, delay=delay * EVERY)
    found = check_by_autograd(sol, lambda kicks: over_samples(policy, readout, delay, kicks))
    assert found["costate"].shape == (2, SAMPLES + 1, 2) and found["unit"].values.tolist()[0] == "angle"
    assert ("no static gain" in str(found["note"].values)) == bool(memory)
    assert np.isnan(found["excess_pole"].values).all() == bool(memory or delay)
    assert ("unstable or defective" in str(found["note"].values)) == (not memory and not delay)
    assert np.isfinite(found["cost_ratio"]).all() and np.isfinite(found["control_gap"]).all()


@pytest.mark.parametrize(("plant", "memory"), [(Slider(), 0), (Slider(), 3), (Blind(), 3)])
def test_a_loop_in_discrete_time_costs_and_learns_as_by_autograd(plant: Any, memory: int) -> None:
    seen = 1 if isinstance(plant, Blind) else 2
    policy = seeded(lambda: nn.GRUCell(seen, 3)) if memory else static()
    sol = stepped(policy, seeded(lambda: nn.Linear(3, 1)) if memory else None, memory, plant)
    found = check_by_autograd(sol, lambda kicks: over_steps(sol.problem.cell, kicks))
    ltv = control.linearize_ltv(sol, loop="open")
    W = np.zeros((2, 2))
    for t in range(7):
        A, B = ltv.A.values[0, t], ltv.B.values[0, t]
        assert_close(A, [[1 - 0.01 * (1 + 3 * float(sol.before[0, t, 0]) ** 2), 0.1], [A[1, 0], 1]])
        W = A @ W @ A.T + B @ B.T
        assert_close(found["reachable"].values[0, t], np.linalg.eigvalsh(W)[::-1])


class Checked(Slider):
    def check_derivative(self, z: Any, u: Any) -> None:
        raise ValueError(f"looked at {len(z)} states and {tuple(u.shape)} controls")


def test_plants_look_at_their_derivative_before_a_number_is_given() -> None:
    sol = stepped(seeded(lambda: nn.GRUCell(2, 3)), seeded(lambda: nn.Linear(3, 1)), 3, Checked())
    for ask in (control.analyze, control.adjoint):
        with pytest.raises(ValueError, match=r"looked at 14 states and \(14, 1\) controls"):
            ask(sol, COST)


def test_the_training_cost_in_discrete_time_has_the_control() -> None:
    sol = stepped(static())
    problem, loss = control.training_cost(sol.problem, COST, END)
    solved = kp.solve(problem)
    assert_close(loss(solved.state).detach(), control.adjoint(sol, COST, END).cost.mean())
    states, cost, controls = over_steps(sol.problem.cell, torch.zeros(7, 2, 1))
    assert_close(solved.state.detach(), torch.cat([states, controls], -1).detach())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(cost.mean(), list(sol.problem.cell.parameters()))])
    state = solved.state.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss(state), state)
    assert_close(kp.linearize(solved).J.T.mv(slope), gradient)


def discretised() -> tuple[np.ndarray, ...]:
    """A double integrator under a held control, and the integral of its cost, by quadrature."""
    A, B = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0], [1.0]])
    M = np.zeros((3, 3))
    M[:2, :2], M[:2, 2:] = A, B
    whole = np.diag([1.0, 0.2, 0.3])
    weights = quad_vec(lambda s: expm(M * s).T @ whole @ expm(M * s), 0, EVERY)[0]
    step = expm(M * EVERY)
    return step[:2, :2], step[:2, 2:], weights[:2, :2], weights[2:, 2:], weights[:2, 2:]


def test_the_regulator_of_a_sampled_plant_is_its_own_yardstick() -> None:
    A, B, Qd, Rd, Nd = discretised()
    K = oracle.dlqr(A, B, Qd, Rd, Nd)[0]
    found = control.analyze(sampled(linear(K), DoubleIntegrator()), COST)
    assert_close(found["regulator_gain"], K)
    assert_close(found["cost_ratio"], np.ones(2), 1e-10)
    assert float(found["gain_distance"]) < 1e-8 and float(abs(found["control_gap"]).max()) < 1e-12
    assert float(abs(found["excess"]).max()) < 1e-12
    assert_close(found["rest"], np.zeros(2), 1e-7)
    assert_close(np.sort_complex(found["rest_pole"].values), np.sort_complex(np.linalg.eigvals(A - B @ K)))
    loop = oracle.ss(A, B, K, 0, EVERY)
    assert float(found["phase_margin"][0]) == pytest.approx(oracle.margin(loop)[1], rel=1e-6)
    omega = np.linspace(1e-3, np.pi / EVERY, 20001)
    assert float(found["disk_margin"]) == pytest.approx(oracle.disk_margins(loop, omega)[0], rel=1e-4)
    W, step = np.zeros((2, 2)), A
    assert_close(found["reachable"].values[0, 0], np.zeros(2))
    for k in range(1, SAMPLES + 1):
        W = step @ W @ step.T + B @ B.T
        assert_close(found["reachable"].values[0, k], np.linalg.eigvalsh(W)[::-1], 1e-8)


def test_excess_of_a_sampled_loop_is_what_it_costs_more() -> None:
    A, B, Qd, Rd, Nd = discretised()
    best, K = oracle.dlqr(A, B, Qd, Rd, Nd), np.array([[0.8, 1.2]])
    found = control.analyze(sampled(linear(K), DoubleIntegrator(), samples=40, rate_limit=50.0), COST)
    closed = A - B @ K
    total = solve_discrete_lyapunov(closed.T, Qd + K.T @ Rd @ K - Nd @ K - K.T @ Nd.T)
    z = START.numpy()
    excess = np.einsum("bi,ij,bj->b", z, total - best[1], z)
    assert float(found["excess_cost"]) == pytest.approx(excess.mean(), rel=1e-8)
    assert_close(found["cost"].values - found["regulator_cost"].values, excess, 5e-3)  # as far as the trial goes
    assert_close(found["control_gap"].values.sum(1), excess, 5e-3)
    assert float(found["gain_distance"]) == pytest.approx(np.linalg.norm(K - best[0]) / np.linalg.norm(best[0]))


def sprung(z: Tensor, u: Tensor) -> Tensor:
    return torch.stack([z[:, 1], u[:, 0] - 2 * torch.sin(z[:, 0]) - z[:, 1]], -1)


def test_a_delayed_loop_with_a_memory_is_opened_at_the_plants_input() -> None:
    """Its poles are those of the product of its steps' Jacobians, and its margins those of S = 1 / (1 + L)."""
    cell, readout = seeded(lambda: nn.GRUCell(2, 3)), seeded(lambda: nn.Linear(3, 1))
    options = {"readout": readout, "delay": 0.3, "rate_limit": 40.0, "saturation": (-5.0, 5.0)}
    options |= {"state_size": 2, "control_size": 1}
    found = control.analyze(sampled(cell, sprung, **options), COST)
    held = float(readout(still := settled(cell, found["rest"].values))[0, 0].detach())
    loop = ClosedLoop(sprung, cell, every=EVERY, **options)
    begin = loop.start(torch.from_numpy(found["rest"].values)[None], still.detach(), torch.full((1, 1), held).double())
    sol = kp.solve(kp.ODEProblem(loop, begin, EVERY * np.arange(3)), "rk4", steps=EVERY / 40)
    assert_close(sol.state[:, -1].detach(), begin, 1e-6)
    A = kp.dynamics.step_jacobians(sol)[0, -1].detach().numpy()
    poles = np.linalg.eigvals(A)
    largest = poles[np.argsort(-abs(poles))][:5]
    assert_close(np.sort_complex(found["rest_pole"].values[:5]), np.sort_complex(largest), 1e-6)
    B, seen = np.eye(len(A))[:, -1:], A[-1:]
    opened = control.LTI(A - B @ seen, B, -seen, dt=EVERY)
    assert abs(largest[0]) < 1 and float(found["disk_margin"]) == pytest.approx(
        float(control.disk_margins(opened).margin), rel=1e-5
    )


def settled(cell: nn.Module, z: np.ndarray) -> Tensor:
    memory = torch.zeros(1, 3).double()
    for _ in range(500):
        memory = cell(torch.from_numpy(z)[None], memory)
    return memory


def in_jax() -> Any:
    torch_net = static()
    net = eqx.nn.MLP(2, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0))
    weights = [jnp.asarray(p.detach().numpy()) for p in torch_net.parameters()]
    where = lambda m: [m.layers[0].weight, m.layers[0].bias, m.layers[1].weight, m.layers[1].bias]  # noqa: E731
    return eqx.tree_at(where, net, weights)


@pytest.mark.parametrize("kind", [pytest.param("sampled", marks=pytest.mark.slow), "stepped"])
def test_loops_in_jax_are_those_in_torch(kind: str) -> None:
    start = jnp.asarray(START.numpy())
    if kind == "stepped":
        twin = kp.solve(kp.DiscreteProblem(ClosedLoop(Slider(), in_jax()), jnp.zeros((2, 7, 0)), start))
        sol = stepped(static())
    else:
        loop, sol = ClosedLoop(Pendulum(damping=0.2), in_jax(), every=EVERY, delay=0.3), sampled(static(), delay=0.3)
        twin = kp.solve(kp.ODEProblem(loop, start, sol.t), diffrax.Midpoint(), steps=EVERY / 2)
        sol = kp.solve(sol.problem, "midpoint", steps=EVERY / 2)
    found, expected = control.analyze(twin, COST, END), control.analyze(sol, COST, END)
    for name in set(expected.data) - {"note", "sensitivity", "gradient_norm"}:
        if not name.endswith("direction") and np.isfinite(expected[name].values).all():
            assert_close(found[name], expected[name], 1e-8)
    norms = [np.sort(one["gradient_norm"].values) for one in (found, expected)]  # in their own order
    assert_close(*norms, 1e-8)
    assert "policy.layers[0].weight" in found["parameter"]


@pytest.mark.parametrize("pose", [sampled, stepped])
def test_parameters_may_be_chosen(pose: Any) -> None:
    sol = pose(linear(np.array([[0.5, 1.0]])))
    found, names = control.analyze(sol, COST, END), [name for name, _ in sol.problem.model.named_parameters()]
    only = control.analyze(sol, COST, END, params=names[:1])
    assert only["parameter"].values.tolist() == names[:1]
    assert_close(only["gradient_norm"], found["gradient_norm"][:1])
    assert_close(only["regulator_cost"], found["regulator_cost"])


def test_a_rate_limit_does_not_bind_where_the_plant_stands_for_long() -> None:
    policy = nn.Linear(2, 1).double()
    found = [control.analyze(sampled(policy, rate_limit=limit), COST, END) for limit in (1e-3, None)]
    assert_close(found[0]["policy_gain"], found[1]["policy_gain"])
    assert float(np.abs(found[1]["policy_gain"]).max()) > 0.1


def test_over_training_and_in_words() -> None:
    sol = sampled(static())
    values = {name: value.detach() for name, value in sol.problem.f.named_parameters()}
    record = {0: values, 5: {name: 0.5 * value for name, value in values.items()}}
    found = control.analyze(sol, COST, checkpoints=record)
    assert found["step"].values.tolist() == [0, 5] and "step 5" in str(found)
    assert_close(found["cost"].sel(step=0), control.adjoint(sol, COST).cost)
    assert len(found.plot().axes) == 6
    assert "% of it in the 1 of 2 most reachable directions" in str(found)
    assert found["excess_share"].unit.values.tolist() == found["rest"].unit.values.tolist() and "unit 0" not in str(
        found
    )
    assert found["phase_margin"].attrs["units"] == "degree" and "long_name" in found["sensitivity"].attrs
    coarse = kp.solve(sol.problem.remake(t=EVERY * np.array([0.0, 2.5, 4.0])), "rk4", steps=EVERY / 4)
    assert_close(control.analyze(coarse, COST)["time"], EVERY * np.arange(5))
    with pytest.raises(ValueError, match=r"as the problem's f or cell; got torch\.nn\.RNNCell"):
        control.analyze(kp.solve(kp.DiscreteProblem(nn.RNNCell(1, 2), torch.zeros(1, 3, 1))), COST)
    two = control.QuadraticCost(Q, np.eye(2))
    with pytest.raises((ValueError, RuntimeError)):
        control.analyze(sol, two)


def test_reachable_directions_that_are_nearly_equal_at_the_cut_are_told() -> None:
    def data(second: float) -> xr.Dataset:
        found = xr.Dataset(
            {"learnable": (("trial", "mode"), [[2.0, 1.0]]), "reachable": (("trial", "mode"), [[1.0, second]])}
        )
        return found.assign(learnable_reachable=("trial", [0.25], {"rank": 1}))

    assert _learnable(data(0.5)) == "learnable at the end: 3, 25 % of it in the 1 of 2 most reachable directions"
    assert "In 1 of 1 trials the reachable eigenvalues 1 and 2 are nearly equal" in _learnable(data(0.97))


# Costates along jumps


class Bounce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.restitution = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([z[:, 0], -self.restitution * z[:, 1]], -1)


def falling(z: Tensor, u: Tensor) -> Tensor:
    return torch.stack([z[:, 1], u[:, 0] - 9.81], -1)


def bouncing() -> tuple[nn.Module, nn.Module]:
    policy = static()
    floor = Event(lambda t, z: z[:, 0] - 0.02 * t, Bounce(), direction=-1)
    return Hybrid(ClosedLoop(falling, policy), floor), policy


HIGH = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)
GRID = np.array([0.0, 0.3, 0.8, 1.1])


def total(model: nn.Module, z0: Tensor, begin: int, cost: Any) -> np.ndarray:
    """The cost from a time of the grid on, by a solve that starts there with the integral as a state."""

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loop = model.flow

        def forward(self, t: Tensor, s: Tensor) -> Tensor:
            u = self.loop.policy(s[:, :2])
            rate = torch.stack([cost(z, v) for z, v in zip(s[:, :2], u, strict=True)])
            return torch.cat([self.loop(t, s[:, :2]), rate[:, None]], -1)

    event = model.events[0]
    reset = lambda t, s: torch.cat([event.reset(t, s[:, :2]), s[:, 2:]], -1)  # noqa: E731
    whole = Hybrid(Beside(), Event(lambda t, s: event.condition(t, s[:, :2]), reset, direction=-1))
    start = torch.cat([z0, torch.zeros(len(z0), 1).double()], -1)
    times = np.unique(np.append(GRID[begin:], (GRID[begin] + GRID[-1]) / 2))
    state = kp.solve(kp.ODEProblem(whole, start, times), "rk4", steps=0.05).state[:, -1].detach()
    return (state[:, 2] + (state[:, :2] ** 2).sum(-1)).numpy()


@pytest.mark.parametrize("kind", cases(["quadratic", "own"], {"own"}))
def test_costates_through_events_are_finite_differences(kind: str) -> None:
    model, _ = bouncing()
    cost = COST if kind == "quadratic" else lambda z, u: z[0] ** 4 + u[0] ** 2 * (1 + z[1] ** 2)
    sol = kp.solve(kp.ODEProblem(model, HIGH, GRID), "rk4", steps=0.05)
    assert all(sol.events)
    found, eps = control.adjoint(sol, cost, END), 1e-5
    assert_close(found.cost, total(model, HIGH, 0, cost), 1e-8)
    for place in (0, 1, 2):
        z = sol.state[:, place].detach()
        for unit in range(2):
            kick = eps * torch.eye(2, dtype=torch.float64)[unit]
            up, down = (total(model, z + sign * kick, place, cost) for sign in (1, -1))
            np.testing.assert_allclose(found.costate.values[:, place, unit], (up - down) / 2 / eps, rtol=1e-6)
    assert_close(found.cost_to_go.values[:, 1], total(model, sol.state[:, 1].detach(), 1, cost), 1e-8)
    # The control is added to that of the policy: B^T l + grad_u L, with B = (0, 1).
    u = model.flow.policy(sol.state[:, 1]).detach()
    slope = 0.6 * u if kind == "quadratic" else 2 * u * (1 + sol.state[:, 1, 1:].detach() ** 2)
    assert_close(found.gradient.values[:, 1], found.costate.values[:, 1, 1:] + slope.numpy())


class JaxBounce(eqx.Module):
    restitution: jax.Array

    def __call__(self, t: Any, z: jax.Array) -> jax.Array:
        return jnp.stack([z[0], -self.restitution * z[1]])


@pytest.mark.slow
def test_costates_through_events_in_jax_are_those_in_torch() -> None:
    floor = Event(lambda t, z: z[0], JaxBounce(jnp.array(0.8)), direction=-1)
    twin = Hybrid(lambda t, z: jnp.stack([z[1], -9.81 - z[1]]), floor)
    ball = Hybrid(lambda t, z: torch.stack([z[:, 1], -9.81 - z[:, 1]], -1), Event(lambda t, z: z[:, 0], Bounce()))
    sols = [
        kp.solve(kp.ODEProblem(twin, jnp.asarray(HIGH.numpy()), GRID), diffrax.Midpoint(), steps=0.05),
        kp.solve(kp.ODEProblem(ball, HIGH, GRID), "midpoint", steps=0.05),
    ]
    own = [control.adjoint(sol, lambda z: z[0] * z[1] ** 2, END) for sol in sols]
    for name in ("cost", "cost_to_go", "costate"):
        assert_close(getattr(own[0], name), getattr(own[1], name), 1e-8)


def test_sums_over_samples_are_those_of_autograd() -> None:
    policy = static()
    found = control.adjoint(sampled(policy), COST, END, sampled=True)
    kicks = torch.zeros(SAMPLES + 1, 2, 1).double().requires_grad_()
    states, _, controls = over_samples(policy, None, 0, kicks)
    each = (WEIGHTS * states**2).sum(-1) + 0.3 * controls[..., 0] ** 2
    cost = each.sum(1) + (states[:, -1] ** 2).sum(-1)
    (gradient,) = torch.autograd.grad(cost.sum(), kicks)
    assert_close(found.cost, cost.detach())
    assert_close(found.cost_to_go.values[:, -1], (each[:, -1] + (states[:, -1] ** 2).sum(-1)).detach())
    assert_close(found.gradient, gradient.transpose(0, 1))


def test_what_costates_along_jumps_do_not_know_is_said() -> None:
    sol = sampled(static())
    with pytest.raises(ValueError, match="inputs='kicks' to the state"):
        control.adjoint(sol, COST, inputs="x")
    with pytest.raises(ValueError, match="at the times of the grid"):
        control.adjoint(sol, COST, t=[0.0, 0.1])
    with pytest.raises(ValueError, match="sampled=True is of hybrid models"):
        control.adjoint(stepped(static()), COST, sampled=True)
    of_all = control.adjoint(sol, lambda z: (z**2).sum(), inputs="kicks")
    assert_close(of_all.gradient, of_all.costate)


# Complex matrices

TURN = np.array([[0.9, 0.1], [-0.1, 0.9]])
COMPLEX = TURN + 0.1j * np.eye(2)
ONE = np.eye(2)[:, :1]


@pytest.mark.parametrize(
    "call",
    [
        lambda: control.LTI(COMPLEX, ONE),
        lambda: control.LTI(TURN, 1j * ONE),
        lambda: control.LTI(TURN, 1j * ONE[:, 0]),
        lambda: control.LTI(TURN, ONE, [1j, 0.0]),
        lambda: control.LTI(TURN, ONE, None, [[1j], [0.0]]),
        lambda: control.LTI(TURN, ONE, ONE.T, 1j),
        lambda: control.lqr(COMPLEX, ONE, np.eye(2), 1.0),
        lambda: control.lqr(TURN, ONE, 1j * np.eye(2), 1.0),
        lambda: control.lqr(TURN, ONE, np.eye(2), 1.0 + 1j),
        lambda: control.lqr(TURN, ONE, np.eye(2), 1.0, 1j * ONE),
        lambda: control.dlqr(COMPLEX, ONE, np.eye(2), 1.0),
        lambda: control.lqr(TURN, ONE, np.eye(2), 1.0, integral_action=[[1j, 0.0]]),
        lambda: control.lqe(TURN, ONE, 1j * ONE.T, 1.0, 1.0),
        lambda: control.dlqe(TURN, ONE, ONE.T, 1j, 1.0),
        lambda: control.gram((COMPLEX, ONE), "c"),
        lambda: control.hsvd((COMPLEX, ONE)),
        lambda: control.ctrb(COMPLEX, ONE),
        lambda: control.obsv(TURN, 1j * ONE.T),
        lambda: control.minreal((COMPLEX, ONE)),
        lambda: control.balred((COMPLEX, ONE), 1),
        lambda: control.stability_margins((COMPLEX, ONE, ONE.T, 0)),
        lambda: control.disk_margins((TURN, ONE, 1j * ONE.T, 0)),
        lambda: control.frequency_response((COMPLEX, ONE)),
        lambda: control.frequency_response((TURN, ONE), [1j]),
        lambda: control.tvlqr(control.LTI(TURN, ONE).along([0.0, 0.5, 1.0]), np.eye(2), [[1j]]),
        lambda: control.QuadraticCost(1j * np.eye(2)),
        lambda: control.QuadraticCost(np.eye(2), [[1j]]),
        lambda: control.QuadraticCost(np.eye(2), target=[1j, 0.0]),
        lambda: control.LTI(oracle.tf([1.0], [1.0, 2.0 + 1j])) if False else control.LTI(_Transfer()),
        lambda: control.linearize_lti(Pendulum(), torch.zeros(2).double(), torch.zeros(1).double(), C=[[1j, 0.0]]),
    ],
)
def test_complex_matrices_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match="is complex"):
        call()


class _Transfer:
    """A transfer function with complex poles that are no pair."""

    num, den, dt = np.array([1.0]), np.array([1.0, 2.0 + 1j]), None


def test_complex_numbers_without_imaginary_parts_are_real() -> None:
    assert_close(control.LTI(TURN + 0j, ONE).A, TURN)
