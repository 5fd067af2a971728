"""Linear systems along trajectories and at equilibria of models, in torch and JAX, and what follows from them."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import solve_continuous_lyapunov, subspace_angles
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.models import CartPole, ClosedLoop, DoubleIntegrator, Pendulum

pytestmark = pytest.mark.usefixtures("x64")

START = np.array([[0.3, -0.2], [-0.5, 0.4], [1.0, 0.1]])
GRID = np.linspace(0.0, 1.0, 6)


def assert_close(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    scale = float(np.abs(np.asarray(expected)).max()) or 1.0
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=0, atol=rtol * scale)


def torch_policy(*widths: int) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:])).double()


def jax_policy(policy: nn.Sequential) -> eqx.nn.MLP:
    """The same weights in equinox."""
    first, last = policy[0], policy[2]
    made = eqx.nn.MLP(first.in_features, last.out_features, first.out_features, 1, jnp.tanh, key=jax.random.key(0))
    weights = [jnp.asarray(to_numpy(p)) for p in (first.weight, first.bias, last.weight, last.bias)]
    return eqx.tree_at(
        lambda m: [m.layers[0].weight, m.layers[0].bias, m.layers[1].weight, m.layers[1].bias], made, weights
    )


def linear_policy(K: np.ndarray) -> nn.Linear:
    policy = nn.Linear(K.shape[1], K.shape[0], bias=False).double()
    with torch.no_grad():
        policy.weight.copy_(torch.from_numpy(-K))
    return policy


@pytest.fixture(scope="module")
def steered() -> kp.Solution:
    """A pendulum under a policy that sees a reference, in torch."""
    times = torch.linspace(0, 1, 6, dtype=torch.float64)
    x = torch.stack([torch.sin((i + 1) * times) for i in range(3)])[..., None]
    field = ClosedLoop(Pendulum(damping=0.2), torch_policy(3, 8, 1))
    return kp.solve(kp.ODEProblem(field, torch.from_numpy(START), GRID, x), rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def recurrent() -> kp.Solution:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(2, 5).double(), torch.randn(3, 7, 2, dtype=torch.float64)
    return kp.solve(kp.DiscreteProblem(cell, x, torch.randn(5, dtype=torch.float64)))


# At equilibria


def test_plants_at_rest_have_the_textbooks_matrices() -> None:
    plant, zeros = CartPole(), torch.zeros(4, dtype=torch.float64)
    found = control.linearize_lti(plant, zeros, torch.zeros(1, dtype=torch.float64), C=[[1.0, 0.0, 0.0, 0.0]])
    M, m, half, g = plant.cart_mass, plant.pole_mass, plant.half_length, plant.gravity
    mass = np.array([[M + m, m * half], [m * half, 4 / 3 * m * half**2]])
    pull = np.linalg.solve(mass, [[0, 0], [0, m * g * half]])
    assert_close(found.A, np.block([[np.zeros((2, 2)), np.eye(2)], [pull, np.zeros((2, 2))]]))
    assert_close(found.B[2:, 0], np.linalg.solve(mass, [1, 0]))
    assert found.names == plant.state_names and found.C.shape == (1, 4) and found.dt is None


def test_loops_at_rest_are_closed_or_open_in_both_frameworks() -> None:
    K = np.array([[15.0, 4.0]])
    layer = eqx.nn.Linear(2, 1, use_bias=False, key=jax.random.key(0))
    for policy, z in (
        (linear_policy(K), torch.zeros(2, dtype=torch.float64)),
        (eqx.tree_at(lambda m: m.weight, layer, jnp.asarray(-K)), jnp.zeros(2)),
    ):
        model = ClosedLoop(Pendulum(), policy)
        closed, open_ = (control.linearize_lti(model, z, loop=loop) for loop in ("closed", "open"))
        assert_close(open_.A, [[0, 1], [9.81, 0]])
        assert_close(open_.B, [[0], [1]])
        assert_close(closed.A, open_.A - open_.B @ K)
        assert_close(closed.B, open_.B)
        assert_close(control.linearize_lti(model, z, inputs="kicks").B, np.eye(2))
        assert closed.is_stable and not open_.is_stable


def test_a_cell_at_its_fixed_point_is_a_discrete_system() -> None:
    torch.manual_seed(0)
    cell, u, z = nn.RNNCell(2, 4).double(), torch.ones(2).double(), torch.zeros(4).double()
    for _ in range(400):
        z = cell(u, z).detach()
    found = control.linearize_lti(cell, z, u, dt=1.0)
    A = torch.autograd.functional.jacobian(lambda z: cell(u, z), z)
    B = torch.autograd.functional.jacobian(lambda u: cell(u, z), u)
    assert_close(found.A, A)
    assert_close(found.B, B)
    assert found.dt == 1.0 and found.is_stable


def test_a_field_with_an_input_at_rest() -> None:
    field = kp.models.MLPField(2, hidden=6, inputs=1).double()
    nn.init.zeros_(field.layers[1].bias)
    nn.init.zeros_(field.layers[0].bias)
    found = control.linearize_lti(field, torch.zeros(2).double(), torch.zeros(1).double())
    W = (field.layers[1].weight @ field.layers[0].weight).detach()
    assert_close(np.concatenate([found.A, found.B], 1), W)


# Along trajectories


def test_matrices_along_a_loop_are_those_of_reverse_mode(steered: kp.Solution) -> None:
    plant, policy = Pendulum(damping=0.2), steered.problem.f.policy
    closed, open_, of_x = (
        control.linearize_ltv(steered, **o) for o in ({}, {"loop": "open"}, {"inputs": "x", "C": [[1.0, 1.0]]})
    )
    jacobian = torch.autograd.functional.jacobian
    for trial, n in ((0, 0), (1, 3), (2, 5)):
        z, x = steered.state[trial, n], steered.problem.x[trial, n]
        u = policy(torch.cat([z, x])).detach()
        at = {"trial": trial, "time": n}
        assert_close(open_.A[at], jacobian(lambda z, u=u: plant(z, u), z))
        assert_close(open_.B[at], jacobian(lambda u, z=z: plant(z, u), u))
        assert_close(closed.A[at], jacobian(lambda z, x=x: plant(z, policy(torch.cat([z, x]))), z))
        assert_close(of_x.B[at], jacobian(lambda x, z=z: plant(z, policy(torch.cat([z, x]))), x))
    assert closed.names == ("angle", "angular_velocity") and of_x.C.sizes["output"] == 1
    assert_close(closed.time, GRID)


def test_matrices_along_a_recurrent_model_are_those_of_its_steps(recurrent: kp.Solution) -> None:
    found = control.linearize_ltv(recurrent)
    problem, jacobian = recurrent.problem, torch.autograd.functional.jacobian
    before = torch.cat([recurrent.start[:, None], recurrent.state[:, :-1]], 1)
    for trial, n in ((0, 0), (2, 6)):
        x, z = problem.x[trial, n], before[trial, n]
        assert_close(found.A[trial, n], jacobian(lambda z, x=x: problem.cell(x, z), z))
        assert_close(found.B[trial, n], jacobian(lambda x, z=z: problem.cell(x, z), x))
    assert found.dt == 1.0 and (control.linearize_ltv(recurrent, inputs="kicks").B[0, 0].values == np.eye(5)).all()


class TanhCell(eqx.Module):
    """A recurrent cell in JAX."""

    W: jax.Array

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ jnp.concatenate([x, z]))


def test_matrices_along_a_recurrent_model_in_jax() -> None:
    W = np.random.default_rng(0).normal(size=(3, 5))
    sol = kp.solve(kp.DiscreteProblem(TanhCell(jnp.asarray(W)), jnp.ones((2, 4, 2)), jnp.zeros(3)))
    found = control.linearize_ltv(sol)
    D = 1 - to_numpy(sol.state)[1, 3] ** 2
    assert_close(found.A[1, 3], D[:, None] * W[:, 2:])
    assert_close(found.B[1, 3], D[:, None] * W[:, :2])


def reference(sol: kp.Solution, trial: int, C: np.ndarray, Q: np.ndarray, R: float, end: np.ndarray) -> dict[str, Any]:
    """By scipy from equations written out: z with Phi, Wc, int Phi^T C^T C Phi, the cost and int Phi^T grad L."""
    policy, B = sol.problem.f.policy, np.array([[0.0], [1.0]])
    W1, b1, W2, b2 = (p.detach().numpy() for p in policy.parameters())
    samples, found = sol.problem.x[trial, :, 0].numpy(), {}

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        z, phi, W = y[:2], y[2:6].reshape(2, 2), y[6:10].reshape(2, 2)
        h = np.tanh(W1 @ [*z, np.interp(t, GRID, samples)] + b1)
        u, K = W2 @ h + b2, (W2 * (1 - h**2)) @ W1[:, :2]
        A = np.array([[0, 1], [9.81 * np.cos(z[0]), -0.2]]) + B @ K
        parts = [
            [z[1], 9.81 * np.sin(z[0]) - 0.2 * z[1] + u[0]],
            A @ phi,
            A @ W + W @ A.T + B @ B.T,
            phi.T @ C.T @ C @ phi,
            [z @ Q @ z + R * u @ u],
            phi.T @ (2 * Q @ z + 2 * R * K.T @ u),
        ]
        return np.concatenate([np.ravel(part) for part in parts])

    y = np.concatenate([START[trial], np.eye(2).ravel(), np.zeros(11)])
    for a, b in pairwise(GRID):
        y = solve_ivp(slope, (a, b), y, rtol=1e-10, atol=1e-12).y[:, -1]
        found[round(b, 3)] = y[6:10].reshape(2, 2)
    z, phi = y[:2], y[2:6].reshape(2, 2)
    costate = y[15:] + phi.T @ (2 * end @ z)
    return {"Wc": found, "Wo": y[10:14].reshape(2, 2), "cost": y[14] + z @ end @ z, "costate": costate}


def test_gramians_and_costates_along_a_loop_solve_their_equations(steered: kp.Solution) -> None:
    C, Q, end = np.array([[1.0, 0.5]]), np.diag([2.0, 1.0]), np.eye(2)
    system = control.linearize_ltv(steered, C=C)
    reach, tell = control.gram(system, "c"), control.gram(system, "o")
    costates = control.adjoint(steered, control.QuadraticCost(Q, [[0.5]]), control.QuadraticCost(end))
    by_call = control.adjoint(steered, lambda z, u: 2 * z[0] ** 2 + z[1] ** 2 + 0.5 * u[0] ** 2, lambda z: (z**2).sum())
    for trial in range(2):
        exact = reference(steered, trial, C, Q, 0.5, end)
        for n, t in enumerate(GRID[1:], 1):
            assert_close(reach.W[trial, n], exact["Wc"][round(t, 3)], 1e-7)
        assert_close(tell.W[trial, 0], exact["Wo"], 1e-7)
        assert_close(costates.cost[trial], exact["cost"], 1e-7)
        assert_close(costates.costate[trial, 0], exact["costate"], 5e-7)
    assert_close(costates.costate[:, -1], 2 * steered.state[:, -1])
    for name in ("cost", "costate", "gradient"):
        assert_close(getattr(by_call, name), getattr(costates, name))
    assert not reach.W[:, 0].values.any() and not tell.W[:, -1].values.any()
    assert_close(control.gram(steered, "c", rank=2).W, reach.W)
    assert list(reach.W.unit.values) == ["angle", "angular_velocity"]


def test_both_frameworks_agree() -> None:
    policy, plant = torch_policy(2, 8, 1), Pendulum(damping=0.2)
    pairs = ((ClosedLoop(plant, policy), torch.from_numpy(START)), (ClosedLoop(plant, jax_policy(policy)), START))
    sols = [kp.solve(kp.ODEProblem(field, z0, GRID), rtol=1e-9, atol=1e-11) for field, z0 in pairs]
    cost = control.QuadraticCost(np.eye(2), [[0.5]])
    ours, theirs = (control.gram(sol, "c").W for sol in sols)
    assert_close(theirs, ours, 1e-7)
    ours, theirs = (control.adjoint(sol, cost) for sol in sols)
    for name in ("cost", "costate", "gradient"):
        assert_close(getattr(theirs, name), getattr(ours, name), 1e-7)


def test_a_span_has_the_times_of_the_solvers_steps() -> None:
    field = ClosedLoop(Pendulum(), torch_policy(2, 8, 1))
    z0 = torch.from_numpy(START)
    on_span, on_grid = (
        kp.solve(kp.ODEProblem(field, z0, t), rtol=1e-8, atol=1e-10) for t in ((0.0, 1.0), [0.0, 0.3, 1.0])
    )
    found = control.gram(on_span, "c")
    assert found.W.time.values[[0, -1]].tolist() == [0.0, 1.0] and found.W.sizes["time"] > 4
    assert_close(found.W[:, -1], control.gram(on_grid, "c").W[:, -1], 1e-7)
    halves = control.hankel(on_span, 0.3), control.hankel(on_grid, 0.3)
    assert_close(halves[0].values, halves[1].values, 1e-7)


# As blocks of operators


def test_gramians_are_diagonal_blocks_of_operators(recurrent: kp.Solution) -> None:
    flow, system = kp.linearize(recurrent), control.linearize_ltv(recurrent, C=np.eye(5)[:2])
    P, C = flow.P.dense().numpy().reshape(3, 7, 5, 3, 7, 5), system.C.values[0, 0]
    reach, tell = control.gram(system, "c").W, control.gram(system, "o").W
    for trial in range(3):
        PB = np.einsum("tnsk,ski->tnsi", P[trial, :, :, trial], system.B.values[trial]).reshape(7, 5, -1)
        CP = np.einsum("om,tmsn->tosn", C, P[trial, :, :, trial]).reshape(-1, 7, 5)
        for t in range(7):
            assert_close(reach[trial, t], PB[t] @ PB[t].T)
            assert_close(tell[trial, t], CP[:, t].T @ CP[:, t])


def test_gramians_without_matrices(recurrent: kp.Solution) -> None:
    flow, outputs = kp.linearize(recurrent), np.eye(5)[:2]
    for kind, options in (("c", {}), ("c", {"inputs": "kicks"}), ("o", {"C": outputs})):
        dense = control.gram(control.linearize_ltv(recurrent, **options), kind).W[:, 3]
        op = control.gram_operator(flow, kind, 4, **options).dense().numpy().reshape(3, 5, 3, 5)
        for trial in range(3):
            assert_close(op[trial, :, trial], dense[trial])
            assert not op[trial, :, (trial + 1) % 3].any()
        assert kp.check_adjoint(control.gram_operator(flow, kind, 4, **options)) < 1e-12


# Costates


def test_costates_of_steps_are_gradients(recurrent: kp.Solution) -> None:
    problem = recurrent.problem
    found = control.adjoint(recurrent, lambda z: (z**3).sum(), terminal=lambda z: (2 * z).sum())
    x = problem.x.clone().requires_grad_()
    kicks = torch.zeros_like(recurrent.state, requires_grad=True)
    z, cost = recurrent.start, 0
    for n in range(7):
        z = problem.cell(x[:, n], z) + kicks[:, n]
        cost = cost + (z**3).sum(-1)
    cost = cost + 2 * z.sum(-1)
    of_kicks, of_x = torch.autograd.grad(cost.sum(), (kicks, x))
    assert_close(found.cost, cost.detach())
    assert_close(found.costate, of_kicks)
    assert_close(found.gradient, of_x)


def test_blocks_and_sweeps_of_P_tend_to_gramians_and_costates_as_the_mesh_is_refined() -> None:
    """The kernel's block at t has a half squared where it jumps, a quarter of the weight in place of a half."""
    field, BB, errors = ClosedLoop(Pendulum(), torch_policy(2, 8, 1)), np.diag([0.0, 1.0]), []
    for count in (41, 81):
        times = np.linspace(0, 1, count)
        sol = kp.solve(kp.ODEProblem(field, torch.from_numpy(START[:1]), times), "rk4", steps=times)
        flow, middle = kp.linearize(sol), count // 2
        P = flow.P.mv(torch.eye(2 * count, dtype=torch.float64).reshape(-1, 1, count, 2))[:, 0, middle].numpy()
        kernel = (P / np.repeat(sol.weights, 2)[:, None]).reshape(count, 2, 2)  # Phi(t, s)^T
        block = np.einsum("s,smi,mn,snj->ij", sol.weights, kernel, BB, kernel) + times[1] / 4 * BB
        W, costates = control.gram(sol, "c").W[0, middle], control.adjoint(sol, lambda z, u: (z**2).sum()).costate
        swept = flow.P.T.mv(2 * sol.state).numpy()
        errors.append([np.abs(block - W).max() / W.max(), np.abs(swept - costates)[:, 1:-1].max() / costates.max()])
    assert max(errors[1]) < 2e-3
    np.testing.assert_allclose(np.divide(*errors), 4, rtol=0.05)


Q, R = np.diag([2.0, 1.0]), np.array([[0.5]])


@pytest.fixture(scope="module")
def optimal() -> tuple[kp.Solution, control.Regulator]:
    """A mass under its Riccati gain, until it is all but at rest."""
    system = control.linearize_lti(DoubleIntegrator(), torch.zeros(2).double(), torch.zeros(1).double())
    found = control.lqr(system.A, system.B, Q, R)
    loop = ClosedLoop(DoubleIntegrator(), linear_policy(found.K))
    return kp.solve(kp.ODEProblem(loop, torch.from_numpy(START), (0.0, 9.0)), rtol=1e-9, atol=1e-11), found


def test_the_costate_of_a_riccati_gain_is_twice_X_z(optimal: tuple[kp.Solution, control.Regulator]) -> None:
    sol, (_, X, _) = optimal
    times = np.linspace(0, 9, 10)
    found = control.adjoint(sol, control.QuadraticCost(Q, R), control.QuadraticCost(X), t=times)
    states = sol(times).numpy()
    assert_close(found.costate, 2 * states @ X, 1e-7)
    assert_close(found.cost, np.einsum("bi,ij,bj->b", START, X, START), 1e-7)
    assert np.abs(found.gradient.values).max() < 1e-6


def gradient_in_the_gain(sol: kp.Solution, K: np.ndarray) -> np.ndarray:
    """dJ/dK of the cost of all trials: through the states by J*, and directly."""
    flow, Z, M = kp.linearize(sol), sol.state.numpy(), Q + K.T @ R @ K
    through = -flow.J.T.mv(torch.from_numpy(2 * Z @ M)).numpy().reshape(K.shape)  # the weight is -K
    return through + np.einsum("btm,btn,t->mn", 2 * Z @ K.T @ R, Z, sol.weights)


def by_lyapunov(K: np.ndarray) -> np.ndarray:
    """dJ/dK = 2 (R K - B^T X) int z z^T dt, with z0^T X z0 the cost under K."""
    A, B = np.array([[0.0, 1.0], [0.0, 0.0]]), np.array([[0.0], [1.0]])
    X = solve_continuous_lyapunov((A - B @ K).T, -Q - K.T @ R @ K)
    return 2 * (R @ K - B.T @ X) @ solve_continuous_lyapunov(A - B @ K, -START.T @ START)


def moved_to(sol: kp.Solution, K: np.ndarray) -> kp.Solution:
    return kp.solve(sol.problem.remake(f=ClosedLoop(DoubleIntegrator(), linear_policy(K))), rtol=1e-9, atol=1e-11)


def test_the_gradient_in_the_gain_vanishes_at_the_riccati_gain(optimal: tuple[kp.Solution, control.Regulator]) -> None:
    sol, (K, _, _) = optimal
    assert np.abs(gradient_in_the_gain(sol, K)).max() < 1e-6
    moved = moved_to(sol, K + 0.3)
    found = control.adjoint(moved, control.QuadraticCost(Q, R), t=moved.t)
    by_input = -np.einsum("btm,btn,t->mn", found.gradient.values, moved.state.numpy(), moved.weights)
    assert np.abs(by_input).max() > 0.05
    assert_close(by_input, by_lyapunov(K + 0.3), 1e-6)


@pytest.mark.slow
def test_the_gradient_in_another_gain_is_that_of_lyapunov(optimal: tuple[kp.Solution, control.Regulator]) -> None:
    sol, (K, _, _) = optimal
    assert_close(gradient_in_the_gain(moved_to(sol, K + 0.3), K + 0.3), by_lyapunov(K + 0.3), 1e-6)


def test_gains_along_a_loop_make_the_open_plant_optimal(steered: kp.Solution) -> None:
    """At the upright pendulum, held there, they are those of lqr far from the end."""
    loop = ClosedLoop(Pendulum(), linear_policy(np.array([[15.0, 4.0]])))
    sol = kp.solve(kp.ODEProblem(loop, torch.zeros(1, 2).double(), np.linspace(0, 12, 5)))
    found = control.tvlqr(control.linearize_ltv(sol, loop="open"), Q, R)
    K, X, _ = control.lqr([[0, 1], [9.81, 0]], [[0], [1]], Q, R)
    assert_close(found.K[0, 0], K, 1e-8)
    assert_close(found.X[0, 0], X, 1e-8)
    assert control.tvlqr(control.linearize_ltv(steered, loop="open"), Q, R).K.shape == (3, 6, 1, 2)


# Learning and reaching


def test_angles_between_learning_modes_and_what_is_reached(steered: kp.Solution, recurrent: kp.Solution) -> None:
    modes = kp.modes(kp.linearize(recurrent).ntk, axis="unit", k=2)
    reach = control.gram(recurrent, "c")
    found = control.reachable_angles(modes, reach, rank=3)
    span = np.linalg.eigh(reach.W.values[1, 4])[1][:, -3:]
    patterns = modes.vectors.numpy().T
    assert_close(found.angles[1, 4], subspace_angles(patterns, span)[::-1])
    assert_close(found.share[1, 4], ((span.T @ patterns) ** 2).sum(0))
    whole = control.reachable_angles(modes, reach, rank=5)
    assert_close(whole.share, np.ones((3, 7, 2)))
    assert control.reachable_angles(modes, control.gram(recurrent, "c", rank=2)).angles.shape == (3, 7, 2)
    with pytest.raises(ValueError, match="5 units, and the Gramian 2"):
        control.reachable_angles(modes, control.gram(steered, "c"))
    with pytest.raises(ValueError, match="rank is 9"):
        control.reachable_angles(modes, reach, rank=9)
    assert all(axes.has_data() for axes in found.plot().axes)


def test_figures(steered: kp.Solution) -> None:
    for found in (control.linearize_ltv(steered), control.adjoint(steered, lambda z, u: u[0] ** 2)):
        assert found.plot(dark=True).axes[0].has_data()


# Bad input


def test_what_does_not_fit_is_refused(steered: kp.Solution, recurrent: kp.Solution) -> None:
    loop, zeros = ClosedLoop(Pendulum(), nn.Linear(2, 3).double()), torch.zeros(2, dtype=torch.float64)
    torque, flow = torch.zeros(1, dtype=torch.float64), kp.linearize(recurrent)
    of_equation = dataclasses.replace(flow, solution=steered)
    net = kp.solve(kp.StaticProblem(nn.Linear(2, 2), torch.ones(1, 2)))
    multistep = dataclasses.replace(steered, steps=None)
    refused = [
        (lambda: control.linearize_lti(loop, zeros), "the policy returned"),
        (lambda: control.linearize_lti(Pendulum(), zeros + 0.1, torque), "no equilibrium: its velocity is 9.79e-01"),
        (lambda: control.linearize_lti(nn.RNNCell(1, 2).double(), zeros + 5, torque, dt=1.0), "its step is"),
        (lambda: control.linearize_lti(Pendulum(), zeros[None], torque), r"z has shape \(1, 2\)"),
        (lambda: control.linearize_lti(Pendulum(), zeros, torque, loop="open"), "needs a plant and a policy"),
        (lambda: control.linearize_lti(Pendulum(), zeros, torque, inputs="control"), "needs a kp.models.ClosedLoop"),
        (lambda: control.linearize_ltv(steered, loop="half"), "loop is 'half'"),
        (lambda: control.linearize_ltv(steered, inputs="x_t"), "inputs is 'x_t'"),
        (lambda: control.linearize_ltv(steered, t=[0.5, 2.0]), "t = 2.0 lies outside"),
        (lambda: control.linearize_ltv(recurrent, t=[1.0]), "leave t=None"),
        (lambda: control.linearize_ltv(net), "has no trajectory"),
        (lambda: control.linearize_ltv(multistep), "are not known"),
        (lambda: control.hankel(steered, 1.5), "split is 1.5, expected a time inside of the trial"),
        (lambda: control.hankel(recurrent, 7), "split is 7"),
        (lambda: control.hankel(recurrent, 2.5), "split is 2.5"),
        (lambda: control.adjoint(steered, None), "needs a running cost"),
        (lambda: control.adjoint(steered, lambda z, u: z), "expected one number"),
        (lambda: control.adjoint(steered, control.QuadraticCost(np.eye(3))), r"Q of the cost has shape \(3, 3\)"),
        (
            lambda: control.gram_operator(of_equation, "c", 1),
            "takes the flow of a DiscreteProblem",
        ),
        (lambda: control.gram_operator(flow, "c", 8), "step is 8"),
        (lambda: control.gram_operator(flow, "x", 1), "kind is 'x'"),
    ]
    for make, message in refused:
        with pytest.raises(ValueError, match=message):
            make()
    free = kp.solve(kp.ODEProblem(kp.models.MLPField(2, hidden=4).double(), torch.from_numpy(START), GRID))
    with pytest.raises(ValueError, match="no input x; take inputs='kicks'"):
        control.gram(free, "c")
    assert control.gram(free, "c", inputs="kicks").W.shape == (3, 6, 2, 2)


def test_an_unstable_trajectory_that_overflows_is_an_error() -> None:
    class Growth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.ones(1, dtype=torch.float64))

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.rate * z

    sol = kp.solve(kp.ODEProblem(Growth(), torch.zeros(1, 1).double(), [0.0, 200.0, 800.0]))
    with pytest.raises(ValueError, match="overflows at t = 800"):
        control.gram(sol, "c", inputs="kicks")
