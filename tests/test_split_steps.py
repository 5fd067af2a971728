"""Symplectic Euler and the leapfrog, against diffrax, own loops under autograd, and the energy that they keep."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from synthetic import assert_close
from test_starts_that_learn import dense
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

pytestmark = pytest.mark.usefixtures("x64")

H, GRID = 0.1, np.array([0.0, 0.2, 0.5])
RNG = np.random.default_rng(0)
Q, V, W = RNG.normal(size=(2, 2)), RNG.normal(size=(2, 2)), RNG.normal(size=(2, 2))
X = RNG.normal(size=(2, 3, 2))


class Force(nn.Module):
    """Of second order, with inputs where there are any."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.tensor(W))

    def forward(self, t: Tensor, q: Tensor, v: Tensor, *x: Tensor) -> Tensor:
        return torch.tanh(q @ self.W.T) * (1 + t) + sum(x)


def force(W: jax.Array, t: jax.Array, q: jax.Array, v: jax.Array, *x: jax.Array) -> jax.Array:
    return jnp.tanh(W @ q) * (1 + t) + sum(x)


def posed(framework: str, x: Any = None, **more: Any) -> kp.ODEProblem:
    array = torch.tensor if framework == "torch" else jnp.asarray
    f = Force() if framework == "torch" else jax.tree_util.Partial(force, array(W))
    given = None if x is None else array(x)
    return kp.ODEProblem(f, (array(Q), array(V)), GRID, given, order=2, **more)


def loop(method: str, W: Tensor, x: np.ndarray | None = None) -> Tensor:
    q, v, found = torch.tensor(Q), torch.tensor(V), []

    def a(t: float, q: Tensor) -> Tensor:
        at = 0 if x is None else torch.tensor(np.stack([[np.interp(t, GRID, c) for c in trial.T] for trial in x]))
        return torch.tanh(q @ W.T) * (1 + t) + at

    for n in range(6):
        found.append(torch.cat([q, v], 1))
        t = n * H
        if method == "leapfrog":
            w = v + H / 2 * a(t, q)
            q = q + H * w
            v = w + H / 2 * a(t + H, q)
        else:
            q = q + H * v
            v = v + H * a(t, q)
    return torch.stack(found, 1)[:, [0, 2, 5]]


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("method", "driven"), [("symplectic_euler", False), ("leapfrog", True)])
def test_states_and_operators_are_those_of_a_loop(framework: str, method: str, driven: bool) -> None:
    x = X if driven else None
    solution = kp.solve(posed(framework, x), method, steps=H)
    values = torch.tensor(W)
    assert_close(to_numpy(solution.state), loop(method, values, x))
    J = to_numpy(dense(lambda W: loop(method, W, x), values))
    flow = kp.linearize(solution, measure=kp.Measure(time=np.ones(3)))
    assert not flow.untraced
    assert_close(to_numpy(flow.J.dense()), J)
    assert_close(to_numpy(flow.ntk.dense()), J @ J.T)
    assert_close(to_numpy((flow.P @ flow.K @ flow.P.T).dense()), J @ J.T)
    for operator in (flow.J, flow.P, flow.K.factor):
        assert kp.check_adjoint(operator) < 1e-12
    assert to_numpy(kp.dynamics.lyapunov_spectrum(solution).exponents).sum(1).max() < 1e-12  # volume is kept
    problem = posed(framework)
    learnt = problem.remake(z0=tuple(part[:1] + 0 * part for part in problem.unflatten(problem.z0)))
    assert "z0" in kp.linearize(kp.solve(learnt.learn_start(), method, steps=H)).parameters


def test_semi_implicit_euler_of_diffrax() -> None:
    solver, problem = diffrax.SemiImplicitEuler(), posed("jax")
    terms = (
        diffrax.ODETerm(lambda t, v, args: v),
        diffrax.ODETerm(lambda t, q, W: force(W, t, q, q)),
    )
    found = kp.solve(problem, solver, stepsize_controller=diffrax.ConstantStepSize(), dt0=H)
    for trial in range(2):
        start = jnp.asarray(Q[trial]), jnp.asarray(V[trial])
        own = diffrax.diffeqsolve(
            terms, solver, 0.0, 0.5, H, start, jnp.asarray(W), saveat=diffrax.SaveAt(ts=jnp.asarray(GRID))
        )
        assert own.ys is not None
        assert_close(to_numpy(found.state[trial]), np.concatenate([to_numpy(part) for part in own.ys], -1))


@pytest.mark.parametrize(("method", "order"), [("SymplecticEuler", 1), ("VelocityVerlet", 2)])
def test_orders_and_the_energy_of_a_pair(method: str, order: int) -> None:
    class Spring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, t: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            q, v = z
            return v, -self.k * q

    one = torch.ones(1, 1, dtype=torch.float64)
    lengths, errors = [0.1, 0.05, 0.025], []
    for h in lengths:
        state = kp.solve(kp.ODEProblem(Spring(), (one, 0 * one), [0.0, 0.5, 1.0]), method, steps=h).state
        errors.append(abs(float(state[0, -1, 0]) - np.cos(np.sqrt(2.0))))
    assert abs(np.polyfit(np.log(lengths), np.log(errors), 1)[0] - order) < 0.3
    long = kp.solve(kp.ODEProblem(Spring(), (one, 0 * one), (0.0, 100.0)), method, steps=0.1).state[0]
    energy = 2 * long[:, 0] ** 2 + long[:, 1] ** 2
    assert float(energy.max() - energy.min()) < (0.6 if order == 1 else 0.03)


def test_refused_in_words() -> None:
    problem = posed("torch")
    for change, options, said in (
        ({"t": GRID[::-1].copy()}, {"steps": H}, "steps forward"),
        ({}, {"rtol": 1e-3}, "adaptive steps"),
        ({"z0": {"q": problem.z0[:, :2], "v": problem.z0[:, 2:]}, "order": 1}, {}, "the parts of a pair"),
    ):
        with pytest.raises((TypeError, ValueError), match=said):
            kp.solve(problem.remake(**change), "leapfrog", **options)
