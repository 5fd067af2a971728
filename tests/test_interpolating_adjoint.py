"""Variational and adjoint equations against frozen steps, matrix exponentials and automatic differentiation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from scipy.integrate import solve_ivp
from scipy.linalg import expm, expm_frechet
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._jax.diffrax_library import tableau_of
from kpflow_dyn._problems.steps import Tableau
from kpflow_dyn._torch.torchdiffeq_library import method_named
from kpflow_dyn.ode._variational import Variational, polynomial
from kpflow_dyn.solvers import BlockLanczos

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, UNITS, INPUTS, END = 2, 3, 2, 1.5
GRID = np.array([0.0, 0.2, 0.5, 1.1, END])
RNG = np.random.default_rng(0)
W, U, B, START, SAMPLES = (
    RNG.standard_normal(shape)
    for shape in ((UNITS, UNITS), (UNITS, INPUTS), (UNITS,), (TRIALS, UNITS), (TRIALS, len(GRID), INPUTS))
)


class TorchField(torch.nn.Module):
    """z' = -z + tanh(W z + U x + b sin 2t)."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U, self.b = (torch.nn.Parameter(torch.from_numpy(value.copy())) for value in (W, U, B))

    def forward(self, t: torch.Tensor, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -z + torch.tanh(z @ self.W.T + x @ self.U.T + self.b * torch.sin(2 * t))


class JaxField(eqx.Module):
    """The same."""

    W: jax.Array
    U: jax.Array
    b: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
        return -z + jnp.tanh(self.W @ z + self.U @ x + self.b * jnp.sin(2 * t))


def torch_wave(t: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.sin(3 * t), torch.cos(t)])


def jax_wave(t: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sin(3 * t), jnp.cos(t)])


@dataclass(frozen=True)
class Case:
    """A framework, and whether the times are a span with inputs by a callable, or a grid with samples on it."""

    framework: str
    span: bool

    def array(self, values: Any) -> Any:
        return jnp.asarray(values) if self.framework == "jax" else torch.as_tensor(np.asarray(values))

    def problem(self, **changes: Any) -> kp.ODEProblem:
        if self.framework == "jax":
            f, wave = JaxField(*(jnp.asarray(value) for value in (W, U, B))), jax_wave
        else:
            f, wave = TorchField(), torch_wave
        t, x = ((0.0, END), wave) if self.span else (GRID, self.array(SAMPLES))
        return kp.ODEProblem(f, self.array(START), t, x).remake(**changes)


CASES = [Case(framework, span) for framework in ("torch", "jax") for span in (False, True)]
GRIDS = [case for case in CASES if not case.span]


SLOW_IN_JAX = {"torch": [], "jax": [pytest.mark.slow]}  # to compile


def name(case: Case) -> str:
    return f"{case.framework}-{'span' if case.span else 'grid'}"


def flow_of(solution: kp.Solution, rtol: float = 1e-6, **options: Any) -> kp.Flow:
    return kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(rtol, rtol / 100), **options)


def dense(op: kp.Operator) -> np.ndarray:
    return to_numpy(op.dense())


def relative(a: Any, b: Any) -> float:
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape
    return float(abs(a - b).max() / abs(b).max())


def weights_of(flow: kp.Flow) -> np.ndarray:
    """The measure of the state space, flat."""
    space = flow.J.codomain
    return np.broadcast_to(to_numpy(space.measure), space.shape).reshape(-1)


def euclidean_defect(flow: kp.Flow) -> float:
    """How far the matrices of J and its adjoint are from each other, in coordinates where transposes are plain."""
    root = np.sqrt(weights_of(flow))
    forward, backward = root[:, None] * dense(flow.J), (dense(flow.J.T) / root).T
    return float(np.linalg.norm(forward - backward) / np.linalg.norm(forward))


class Reference:
    """J and P of the equation, by scipy, with nothing of the package."""

    def __init__(self, flow: kp.Flow, span: bool) -> None:
        nodes = flow.solution.t
        self.w, shape = weights_of(flow), (TRIALS, len(nodes), UNITS)
        found = [[_unpack(y) for y in _integrate(trial, span, nodes)] for trial in range(TRIALS)]
        parts = {"W": slice(0, 9), "U": slice(9, 15), "b": slice(15, 18)}
        columns = np.concatenate([np.arange(18)[parts[key]] for key in flow.parameters])
        self.J = np.stack([[d[:, columns] for _, d, _ in row] for row in found]).reshape(np.prod(shape), -1)
        kernel = np.zeros((*shape, *shape))
        for b, row in enumerate(found):
            for i, (_, _, after) in enumerate(row):
                for j, (_, _, before) in enumerate(row[: i + 1]):
                    kernel[b, i, :, b, j] = after @ np.linalg.inv(before) - (i == j) * np.eye(UNITS) / 2
        self.P = kernel.reshape(np.prod(shape), -1) * self.w

    def adjoint(self, matrix: np.ndarray) -> np.ndarray:
        """Of J in the measure of the state space alone, of P in both."""
        into = self.w[:, None] if matrix is self.P else 1.0
        return matrix.T * self.w / into


def _integrate(trial: int, span: bool, nodes: np.ndarray) -> list[np.ndarray]:
    """[z, dz/dtheta, the fundamental matrix] at the nodes; samples have kinks, at which it begins anew."""
    edges = np.unique(np.concatenate([[0.0], nodes]))
    y, found = np.concatenate([START[trial], np.zeros(54), np.eye(UNITS).ravel()]), []
    for start, end in zip(edges, [*edges[1:], None], strict=True):
        found += [y] if start in nodes else []
        if end is not None:
            y = solve_ivp(_rate, (start, end), y, "DOP853", args=(trial, span), rtol=1e-12, atol=1e-13).y[:, -1]
    return found


def _unpack(y: np.ndarray) -> list[np.ndarray]:
    return [part.reshape(UNITS, -1) for part in np.split(y, [3, 57])]


def _rate(t: float, y: np.ndarray, trial: int, span: bool) -> np.ndarray:
    z, d, after = _unpack(y)
    z = z[:, 0]
    x = np.array([np.interp(t, GRID, SAMPLES[trial, :, i]) for i in range(INPUTS)])
    x = np.array([np.sin(3 * t), np.cos(t)]) if span else x
    inside = np.tanh(W @ z + U @ x + B * np.sin(2 * t))
    slope = np.diag(1 - inside**2)
    A, eye = slope @ W - np.eye(UNITS), np.eye(UNITS)
    F = slope @ np.concatenate([np.kron(eye, z), np.kron(eye, x), eye * np.sin(2 * t)], 1)
    return np.concatenate([-z + inside, (A @ d + F).ravel(), (A @ after).ravel()])


@pytest.fixture(
    scope="module", params=[GRIDS[0], *(pytest.param(case, marks=pytest.mark.slow) for case in GRIDS[1:])], ids=name
)
def solution(request: pytest.FixtureRequest) -> kp.Solution:
    return kp.solve(request.param.problem(), rtol=1e-10, atol=1e-12)


def test_on_a_grid_errors_and_the_adjointness_defect_fall_with_the_tolerance(solution: kp.Solution) -> None:
    for rtol in (1e-3, 1e-6, 1e-9):
        flow = flow_of(solution, rtol)
        reference = Reference(flow, span=False)
        for op, expected in ((flow.J, reference.J), (flow.P, reference.P)):
            assert relative(dense(op), expected) < 5 * rtol
            assert relative(dense(op.T), reference.adjoint(expected)) < 5 * rtol
        true, reported = euclidean_defect(flow), kp.check_adjoint(flow.J)
        assert true < 5 * rtol
        assert 1e-3 * true < reported < 10 * true


@pytest.mark.slow
def test_fine_frozen_steps_have_the_same_sensitivities(solution: kp.Solution) -> None:
    expected, found = kp.linearize(solution), flow_of(solution, 1e-9)
    assert list(found.parameters) == list(expected.parameters)
    assert relative(dense(found.J), dense(expected.J)) < 1e-7
    for operator in ("K", "B", "core"):
        assert relative(dense(getattr(found, operator)), dense(getattr(expected, operator))) < 1e-14


def test_trials_of_a_jax_grid_have_steps_of_their_own(solution: kp.Solution) -> None:
    assert solution.steps is not None
    own = not np.array_equal(*solution.steps.t[:, :9])
    assert own == (not isinstance(solution.state, torch.Tensor))


@pytest.mark.parametrize("case", [pytest.param(c, marks=SLOW_IN_JAX[c.framework]) for c in CASES if c.span], ids=name)
def test_on_a_span_with_inputs_from_a_callable(case: Case) -> None:
    flow = kp.linearize(kp.solve(case.problem()), sensealg=kp.InterpolatingAdjoint())
    assert flow.solution.t[0] > 0 and flow.solution.t[-1] < END
    reference = Reference(flow, span=True)
    for forward, matrix in ((flow.J, reference.J), (flow.P, reference.P)):
        for op, expected in ((forward, matrix), (forward.T, reference.adjoint(matrix))):
            v = np.random.default_rng(1).standard_normal((2, op.domain.size))
            image = op.mv(case.array(v).reshape((2, *op.domain.shape)))
            assert relative(to_numpy(image).reshape(2, -1), v @ expected.T) < 2e-5
    assert kp.check_adjoint(flow.J) < 1e-6
    assert kp.check_adjoint(flow.P) < 1e-6


# A linear field, whose sensitivities are matrix exponentials


class TorchLinear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A = torch.nn.Parameter(torch.from_numpy(W.copy()))

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return z @ self.A.T


class JaxLinear(eqx.Module):
    A: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return self.A @ z


@pytest.mark.parametrize("case", [pytest.param(c, marks=SLOW_IN_JAX[c.framework]) for c in GRIDS], ids=name)
def test_a_linear_field_against_matrix_exponentials(case: Case) -> None:
    f = JaxLinear(jnp.asarray(W)) if case.framework == "jax" else TorchLinear()
    solution = kp.solve(kp.ODEProblem(f, case.array(START), GRID), rtol=1e-11, atol=1e-13)
    flow = flow_of(solution, 1e-9)
    q = np.random.default_rng(2).standard_normal((1, TRIALS, len(GRID), UNITS))
    weighted = np.asarray(solution.weights)[:, None] * q
    kicked = sum(
        np.einsum("nuv,bv->bnu", [(t >= s) * (1 - (t == s) / 2) * expm((t - s) * W) for t in GRID], weighted[0, :, j])
        for j, s in enumerate(GRID)
    )
    assert relative(flow.P.mv(case.array(q)), kicked[None]) < 1e-8
    change = np.random.default_rng(3).standard_normal((UNITS, UNITS))
    moved = np.stack([START @ expm_frechet(t * W, t * change, compute_expm=False).T for t in GRID], 1)
    assert relative(flow.J.mv(case.array(change.reshape(1, -1))), moved[None]) < 1e-8


def test_the_gradient_agrees_with_backpropagation_through_fine_steps() -> None:
    case = Case("torch", False)
    problem = case.problem()
    flow = flow_of(kp.solve(problem, rtol=1e-10, atol=1e-12), 1e-9)
    q = torch.from_numpy(np.random.default_rng(4).standard_normal((TRIALS, len(GRID), UNITS)))
    samples = case.array(SAMPLES)

    def field(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        left = int(np.clip(np.searchsorted(GRID, float(t), side="right") - 1, 0, len(GRID) - 2))
        along = (float(t) - GRID[left]) / (GRID[left + 1] - GRID[left])
        return problem.f(t, z, samples[:, left] + along * (samples[:, left + 1] - samples[:, left]))

    states = odeint(field, problem.z0, torch.from_numpy(GRID), method="rk4", options={"step_size": 0.01})
    loss = (states.transpose(0, 1) * q * torch.from_numpy(solution_weights(flow))).sum()
    found = flow.as_parameters(flow.J.T.mv(q))
    for key, gradient in zip(found, torch.autograd.grad(loss, list(problem.f.parameters())), strict=True):
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-7)


def solution_weights(flow: kp.Flow) -> np.ndarray:
    weights = flow.solution.weights
    assert weights is not None
    return weights[:, None]


# The dense solution as polynomials


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4", "bosh3", "dopri5", "dopri8", "adaptive_heun"])
def test_the_dense_output_of_torchdiffeq_is_a_polynomial(method: str) -> None:
    tableau = method_named(method).tableau
    assert tableau is not None
    _check_polynomial(tableau)


@pytest.mark.parametrize(
    "solver", ["Euler", "Ralston", "Bosh3", "Tsit5", "Dopri5", "Dopri8", "ImplicitEuler", "Kvaerno5"]
)
def test_the_dense_output_of_diffrax_is_a_polynomial(solver: str) -> None:
    tableau = tableau_of(getattr(diffrax, solver)())
    assert tableau is not None
    _check_polynomial(tableau)


def _check_polynomial(tableau: Tableau) -> None:
    weights, theta = polynomial(tableau), np.random.default_rng(5).random(20)
    assert weights is not None and len(weights) <= 7
    expected = tableau.interpolation(theta)
    assert abs(np.vander(theta, len(weights), increasing=True) @ weights - expected).max() < 1e-11


@pytest.mark.parametrize(
    "alg", ["dopri5", "rk4", diffrax.Tsit5(), pytest.param(diffrax.Kvaerno3(), marks=pytest.mark.slow)], ids=str
)
def test_the_path_is_the_dense_output(alg: Any) -> None:
    case = Case("torch" if isinstance(alg, str) else "jax", False)
    solution = kp.solve(case.problem(), alg, rtol=1e-4, atol=1e-6)
    model = solution.problem.backend.tracing.Model(solution.problem.f, None)
    path = Variational(solution, model, kp.InterpolatingAdjoint()).path
    for t in (0.0, 0.01, 0.5, 1.234, END):
        assert relative(path(case.array(t)), solution(t)) < 1e-12


# What InterpolatingAdjoint allows beyond frozen steps


@pytest.mark.slow
@pytest.mark.parametrize("framework, alg", [("torch", "adaptive_heun"), ("jax", diffrax.LeapfrogMidpoint())])
def test_steps_that_cannot_be_replayed_are_solved_once_more(framework: str, alg: Any) -> None:
    case = Case(framework, False)
    solution = kp.solve(case.problem(), alg, steps=None if framework == "torch" else 0.01)
    assert solution.steps is None
    flow = flow_of(solution, 1e-8)
    theta = np.random.default_rng(6).standard_normal((1, flow.J.domain.size))
    image = to_numpy(flow.J.mv(case.array(theta)))
    assert relative(image.reshape(1, -1), theta @ Reference(flow, span=False).J.T) < 1e-6
    with pytest.raises(ValueError, match=r"no nodal identity.*DiscreteAdjoint"):
        flow.nodal  # noqa: B018


@pytest.mark.parametrize("case", GRIDS, ids=name)
def test_only_the_chosen_parameters_learn_in_the_order_of_the_model(case: Case) -> None:
    flow = flow_of(kp.solve(case.problem(), rtol=1e-9, atol=1e-11), params=["b", "W"])
    assert list(flow.parameters) == ["W", "b"]
    reference = Reference(flow, span=False)
    assert relative(dense(flow.J), reference.J) < 1e-5
    assert relative(dense(flow.J.T), reference.adjoint(reference.J)) < 1e-5


@pytest.mark.parametrize("case", cases(GRIDS, GRIDS[:1]), ids=name)
def test_small_vectors_are_as_accurate_as_large_ones(case: Case) -> None:
    flow = flow_of(kp.solve(case.problem()))
    theta = case.array(np.random.default_rng(7).standard_normal((1, flow.J.domain.size)))
    assert relative(flow.J.mv(1e-12 * theta), 1e-12 * flow.J.mv(theta)) < 1e-12
    assert not to_numpy(flow.J.mv(0 * theta)).any()


def test_a_torch_model_is_copied_and_must_be_the_one_that_was_solved() -> None:
    problem = Case("torch", False).problem()
    solution = kp.solve(problem)
    flow = flow_of(solution, params="W")
    theta = torch.ones(flow.J.domain.size, dtype=torch.float64)
    before = flow.J.mv(theta)
    with torch.no_grad():
        for parameter in problem.f.parameters():
            parameter.add_(0.1)
        problem.x.add_(1.0)
    assert torch.equal(flow.J.mv(theta), before)
    with pytest.raises(ValueError, match="solve again"):
        flow_of(solution)


@pytest.mark.parametrize("case", [pytest.param(c, marks=SLOW_IN_JAX[c.framework]) for c in GRIDS], ids=name)
def test_float32(case: Case) -> None:
    single = case.problem(
        z0=case.array(START.astype("float32")), x=case.array(SAMPLES.astype("float32")), f=_single(case)
    )
    flow = kp.linearize(kp.solve(single), sensealg=kp.InterpolatingAdjoint(1e-5, 1e-6))
    assert str(flow.J.domain.dtype).endswith("float32")
    assert kp.check_adjoint(flow.J) < 1e-4
    assert relative(dense(flow.J), Reference(flow, span=False).J) < 1e-2


def _single(case: Case) -> Any:
    f = case.problem().f
    return f.float() if case.framework == "torch" else jax.tree.map(lambda value: value.astype("float32"), f)


@pytest.mark.slow
@pytest.mark.parametrize("dense_up_to", [0, 256])
def test_spectra_converge_or_say_why_not(dense_up_to: int) -> None:
    solution = kp.solve(Case("jax", False).problem(), rtol=1e-9, atol=1e-11)
    solver, expected = BlockLanczos(block=4, dense=dense_up_to), kp.eigs(kp.linearize(solution).ntk, 5).values
    with pytest.warns(
        UserWarning, match=r"symmetric only to .* of \|A q\|.* lower rtol and atol of InterpolatingAdjoint"
    ):
        loose = kp.eigs(flow_of(solution, 1e-3).ntk, 5, solver)
    assert not loose.converged.all()
    assert relative(loose.values, expected) < 1e-2
    tight = kp.eigs(flow_of(solution, 1e-9).ntk, 5, solver)
    assert tight.converged.all()
    assert relative(tight.values, expected) < 1e-6


# Through the solver itself


class HeunEuler(diffrax.AbstractAdaptiveSolver):
    """Heun's method with Euler's as its error estimate, written out, without a tableau."""

    term_structure = diffrax.AbstractTerm
    interpolation_cls = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        return 2

    def init(self, *args: Any) -> None:
        return None

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return terms.vf(t0, y0, args)

    def step(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: None, made_jump: Any) -> tuple:
        h = terms.contr(t0, t1)
        first = terms.vf_prod(t0, y0, args, h)
        second = terms.vf_prod(t1, y0 + first, args, h)
        y1 = y0 + (first + second) / 2
        return y1, (second - first) / 2, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful


def _solved(solver: Any, times: np.ndarray) -> Callable[[JaxField], jax.Array]:
    """The first trial's states by diffrax, stepping between the given times."""

    def states(f: JaxField) -> jax.Array:
        def rate(t: jax.Array, z: jax.Array, f: JaxField) -> jax.Array:
            return f(t, z, jnp.stack([jnp.interp(t, GRID, SAMPLES[0, :, i]) for i in range(INPUTS)]))

        found = diffrax.diffeqsolve(
            diffrax.ODETerm(rate),
            solver,
            0.0,
            END,
            None,
            jnp.asarray(START[0]),
            f,
            saveat=diffrax.SaveAt(ts=jnp.asarray(GRID)),
            stepsize_controller=diffrax.StepTo(jnp.asarray(times)),
        )
        return found.ys

    return states


STEPS = np.unique(np.concatenate([GRID, np.linspace(0, END, 21)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [diffrax.ReversibleHeun(), diffrax.LeapfrogMidpoint(), HeunEuler()],
    ids=str,
)
def test_steps_that_cannot_be_replayed_are_differentiated(solver: Any) -> None:
    solution = kp.solve(Case("jax", False).problem(), solver, steps=STEPS)
    assert solution.steps is None
    flow = kp.linearize(solution)
    assert kp.check_adjoint(flow.J) < 1e-13
    assert kp.check_adjoint(flow.ntk) < 1e-13
    assert kp.check_adjoint(flow.P) < 1e-9
    jacobian = jax.jit(jax.jacrev(_solved(solver, STEPS)))(solution.problem.f)
    expected = jnp.concatenate([getattr(jacobian, key).reshape(len(GRID) * UNITS, -1) for key in flow.parameters], 1)
    assert relative(flow.J.dense()[: len(expected)], expected) < 1e-12
    with pytest.raises(ValueError, match="no nodal identity"):
        flow.nodal  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("span", [False, True])
def test_the_choice_of_steps_is_not_differentiated(span: bool) -> None:
    """Exact transposes on adaptive steps as well, and the derivative of a method on the steps that it took."""
    solution = kp.solve(Case("jax", span).problem(), HeunEuler(), rtol=1e-3, atol=1e-4)
    flow = kp.linearize(solution)
    assert kp.check_adjoint(flow.J) < 1e-13
    reference = Reference(flow, span)
    theta = np.random.default_rng(8).standard_normal((2, flow.J.domain.size))
    assert relative(to_numpy(flow.J.mv(jnp.asarray(theta))).reshape(2, -1), theta @ reference.J.T) < 1e-2
    q = np.random.default_rng(9).standard_normal((2, *flow.P.domain.shape))
    assert relative(to_numpy(flow.P.mv(jnp.asarray(q))).reshape(2, -1), q.reshape(2, -1) @ reference.P.T) < 1e-7


# Errors


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"rtol of InterpolatingAdjoint is 0, expected a positive number"):
        kp.InterpolatingAdjoint(rtol=0)
    with pytest.raises(ValueError, match=r"atol of InterpolatingAdjoint is nan"):
        kp.InterpolatingAdjoint(atol=float("nan"))
    discrete = kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(2, 3), torch.zeros(1, 2, 2)))
    with pytest.raises(ValueError, match=r"DiscreteProblem has none; take DiscreteAdjoint\(\)"):
        kp.linearize(discrete, sensealg=kp.InterpolatingAdjoint())
    with pytest.raises(TypeError, match=r"expected DiscreteAdjoint\(\) or, for an ODE, InterpolatingAdjoint\(\)"):
        kp.linearize(discrete, sensealg="adjoint")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"Runge-Kutta method.*sensealg=InterpolatingAdjoint\(\)"):
        kp.linearize(kp.solve(Case("torch", False).problem(), "explicit_adams", steps=0.1))


@pytest.mark.parametrize("case", GRIDS, ids=name)
def test_a_solve_that_takes_too_many_steps_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"kpflow_dyn._{case.framework}.variational.MAX_STEPS", 2)
    flow = flow_of(kp.solve(case.problem()), 1e-9)
    with pytest.raises(RuntimeError, match=r"was not solved.*Loosen rtol and atol.*DiscreteAdjoint\(\)"):
        flow.J.T.mv(case.array(np.ones((5, *flow.J.codomain.shape))))


def test_a_parameter_that_is_a_number() -> None:
    class Decay(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = torch.nn.Parameter(torch.tensor(0.7).double())

        def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return -self.rate * z

    solution = kp.solve(kp.ODEProblem(Decay(), torch.ones(1, 1).double(), [0.0, 0.5, 1.0]), rtol=1e-10, atol=1e-12)
    J = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(1e-10, 1e-12)).J.dense().reshape(-1)
    t = torch.tensor([0.0, 0.5, 1.0]).double()
    assert torch.allclose(J, -t * torch.exp(-0.7 * t), atol=1e-8)
