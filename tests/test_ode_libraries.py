"""Libraries that solve ODEs, added from outside of the package: steps alone are enough for everything that follows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kpflow_dyn as kp
from kpflow_dyn import ode
from kpflow_dyn._arrays import array_namespace, to_numpy

pytestmark = pytest.mark.usefixtures("x64")

GRID, SPAN = np.linspace(0.0, 1.0, 5), (0.0, 1.0)
B = np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6, 0.0])  # and f at the end of the step, for the slope there
A = np.zeros((5, 5))
A[1, 0] = A[2, 1] = 1 / 2
A[3, 2], A[4] = 1.0, B
CLASSIC = ode.Tableau(A, B, A.sum(1), ode.hermite(B))


@dataclass(frozen=True)
class MyRK4:
    """The classic method, by steps of one length."""

    steps: int = 8


class MyLibrary:
    """Plain loops in the array library of the state, with nothing of the package but its right-hand side."""

    def __init__(self, framework: str) -> None:
        self.name, self.framework, self.solved = f"mine in {framework}", framework, 0

    def accepts(self, alg: Any) -> bool:
        return isinstance(alg, MyRK4)

    def chooses_steps(self, alg: MyRK4) -> bool:
        return True

    def solve(self, problem: kp.ODEProblem, alg: MyRK4, times: np.ndarray, options: ode.Options) -> ode.Solved:
        self.solved += 1
        chosen = np.linspace(problem.t[0], problem.t[-1], alg.steps + 1)
        edges = chosen if options.steps is None else options.steps
        xp, f, states = array_namespace(problem.z0), ode.rate_of(problem), [problem.z0]
        for t, h in zip(edges, np.diff(edges), strict=False):
            y, at = states[-1], lambda t: xp.asarray(t, dtype=problem.z0.dtype)
            k1 = f(at(t), y)
            k2 = f(at(t + h / 2), y + h / 2 * k1)
            k3 = f(at(t + h / 2), y + h / 2 * k2)
            states.append(y + h * (k1 + 2 * k2 + 2 * k3 + f(at(t + h), y + h * k3)) / 6)
            self._check(states[-1], t + h)
        return ode.Solved(
            ode.AcceptedSteps.between(CLASSIC, edges, xp.stack(states, 1)), stats={"steps": len(edges) - 1}
        )

    def _check(self, state: Any, t: float) -> None:
        if not np.isfinite(to_numpy(state)).all():
            raise ode.Failed(dict.fromkeys(range(len(state)), ("left the finite numbers", t)), apart=False)


@pytest.fixture(params=["torch", "jax"])
def library(request: pytest.FixtureRequest) -> Iterator[MyLibrary]:
    library = MyLibrary(request.param)
    ode.add_library(library)
    yield library
    ode.remove_library(library.name)


def problem(framework: str, t: Any, x: Any = None) -> kp.ODEProblem:
    rng = np.random.default_rng(0)
    start, W, U = rng.standard_normal((2, 3)), rng.standard_normal((3, 3)), rng.standard_normal((2, 3))
    if framework == "jax":
        f = jax.tree_util.Partial(
            lambda p, t, z, *x: jnp.tanh(z @ p["W"] + sum(v @ p["U"] for v in x)), {"W": W, "U": U}
        )
        return kp.ODEProblem(jax.tree.map(jnp.asarray, f), jnp.asarray(start), t, x)
    return kp.ODEProblem(TorchField(W, U), torch.tensor(start), t, x)


def jax_field(parameters: dict[str, jax.Array], t: jax.Array, z: jax.Array, *x: jax.Array) -> jax.Array:
    return jnp.tanh(z @ parameters["W"] + sum(v @ parameters["U"] for v in x))


class TorchField(torch.nn.Module):
    def __init__(self, W: np.ndarray, U: np.ndarray) -> None:
        super().__init__()
        self.W, self.U = torch.nn.Parameter(torch.tensor(W)), torch.nn.Parameter(torch.tensor(U))

    def forward(self, t: torch.Tensor, z: torch.Tensor, *x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z @ self.W + sum(v @ self.U for v in x))


def samples(framework: str) -> Any:
    x = np.random.default_rng(1).standard_normal((2, len(GRID), 2))
    return GRID, jnp.asarray(x) if framework == "jax" else torch.tensor(x)


def far(a: Any, b: Any) -> float:
    return float(np.abs(to_numpy(a) - to_numpy(b)).max())


@pytest.mark.parametrize("t", [GRID, pytest.param(SPAN, marks=pytest.mark.slow)], ids=["grid", "span"])
def test_a_library_of_ones_own_solves_and_linearizes(library: MyLibrary, t: Any) -> None:
    posed = problem(library.framework, t, samples(library.framework))
    solution, exact = kp.solve(posed, MyRK4(), steps=1 / 32), kp.solve(posed, rtol=1e-10, atol=1e-12)
    assert library.solved == 1 and solution.alg == MyRK4() and solution.stats == {"steps": 32}
    assert far(solution.state, exact(solution.t)) < 1e-5
    assert far(solution(solution.t), solution.state) < 1e-12
    assert far(solution(0.3), exact(0.3)) < 1e-5
    flow, reference = kp.linearize(solution), kp.linearize(exact)
    assert max(kp.check_adjoint(op) for op in (flow.J, flow.P, flow.ntk)) < 1e-12
    J, weights = to_numpy(flow.J.dense()), np.tile(np.repeat(solution.weights, 3), 2)
    assert far(flow.ntk.dense(), J @ J.T * weights) < 1e-12
    top, expected = (float(kp.eigs(f.ntk, k=1).values[0]) for f in (flow, reference))
    assert top == pytest.approx(expected, rel=1e-5)
    interpolating = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(1e-9, 1e-11))
    assert far(interpolating.J.dense(), J) < 1e-5


def test_steps_that_the_algorithm_chooses(library: MyLibrary) -> None:
    assert kp.solve(problem(library.framework, SPAN), MyRK4(steps=5)).state.shape == (2, 15, 3)


def test_a_gradient_flow_on_the_steps_of_ones_own_library(library: MyLibrary) -> None:
    solution = kp.solve(problem(library.framework, GRID), MyRK4())
    flow = kp.gradient_flow(solution, lambda state: (state**2).mean(), span=0.5)
    assert flow.loss[-1] < flow.loss[0]


def test_the_trials_that_fail_are_found(library: MyLibrary) -> None:
    start = np.array([[0.1], [4.0], [0.2]])
    if library.framework == "jax":
        posed = kp.ODEProblem(jax.tree_util.Partial(lambda a, t, z: a * z**4, jnp.ones(1)), jnp.asarray(start), SPAN)
    else:
        field = TorchField(np.eye(1), np.eye(1))
        field.forward = lambda t, z: field.W[0] * z**4  # type: ignore[method-assign]
        posed = kp.ODEProblem(field, torch.tensor(start), SPAN)
    with pytest.raises(kp.SolveError, match="trial 1 left the finite numbers") as caught:
        kp.solve(posed, MyRK4())
    assert caught.value.trials == [1] and caught.value.solution.state.shape == (2, 24, 1)


def test_a_solver_with_memory_of_its_own_is_checked(library: MyLibrary) -> None:
    """A tableau that is not the one that took the steps is found out."""
    library.solve = lambda *args: _with_another_tableau(MyLibrary.solve(library, *args))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="gives another result when it is replayed"):
        kp.solve(problem(library.framework, GRID), MyRK4())


def _with_another_tableau(solved: ode.Solved) -> ode.Solved:
    assert solved.steps is not None
    ends, euler = solved.steps.t + solved.steps.dt, np.array([1.0, 0.0])
    tableau = ode.Tableau(np.array([[0, 0], [1.0, 0]]), euler, np.array([0.0, 1.0]), ode.hermite(euler))
    return ode.Solved(ode.AcceptedSteps.between(tableau, ends, solved.steps.after))


class Backwards(MyLibrary):
    """Euler backwards, by iterating its equation."""

    tableau = ode.Tableau(np.ones((1, 1)), np.ones(1), np.ones(1), lambda theta: theta[..., None] - 1)

    def solve(self, problem: kp.ODEProblem, alg: MyRK4, times: np.ndarray, options: ode.Options) -> ode.Solved:
        edges, f, states, k = options.steps, ode.rate_of(problem), [problem.z0], [0 * problem.z0]
        for t, h in zip(torch.tensor(edges)[1:], np.diff(edges), strict=True):
            z = states[-1]
            for _ in range(60):
                z = states[-1] + h * f(t, z)
            states, k = [*states, z], [*k, f(t, z)]
        stages = torch.stack(k, 1)[:, :, None]
        return ode.Solved(ode.AcceptedSteps.between(self.tableau, edges, torch.stack(states, 1), stages))


def test_an_implicit_method_in_torch() -> None:
    ode.add_library(Backwards("torch"))
    try:
        posed = problem("torch", GRID)
        flow = kp.linearize(kp.solve(posed, MyRK4(), steps=GRID))
        change = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        found = flow.J.mv(torch.cat([change.reshape(-1), torch.zeros(6).double()])[None])[0]
        moved = []
        for size in (1e-6, -1e-6):
            with torch.no_grad():
                posed.f.W += size * change
                moved.append(kp.solve(posed, MyRK4(), steps=GRID).state)
                posed.f.W -= size * change
    finally:
        ode.remove_library("mine in torch")
    assert kp.check_adjoint(flow.J) < 1e-12
    assert far((moved[0] - moved[1]) / 2e-6, found) < 1e-8


def test_what_is_no_library() -> None:
    with pytest.raises(TypeError, match=r"expected an object with the members of kpflow_dyn.ode.Library"):
        ode.add_library(object())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the framework of mine in numpy is 'numpy', expected one of"):
        ode.add_library(MyLibrary("numpy"))
    with pytest.raises(TypeError, match=r"alg is MyRK4\(steps=8\); z0 is a torch tensor, so torchdiffeq solves"):
        kp.solve(problem("torch", GRID), MyRK4())
    with pytest.raises(TypeError, match=r"alg is MyRK4\(steps=8\); z0 is a jax array, so diffrax solves"):
        kp.solve(problem("jax", GRID), MyRK4())
