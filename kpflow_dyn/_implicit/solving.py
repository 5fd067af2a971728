"""Solve networks, fixed points and free-form constraints F(S, theta; x) = 0."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Rows, array_namespace, eps_of
from kpflow_dyn._implicit.constraint import Constraint, Form, TracedConstraint, check_alike, direct, every, residual
from kpflow_dyn._implicit.inverse import StateDerivative
from kpflow_dyn._implicit.solutions import ConstraintSolution, FixedPointSolution, ImplicitSolution, NetworkSolution
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem

ITERATIONS, NEWTON_STEPS = 1000, 30
STATES = {"z", "h", "s", "y", "state", "hidden"}  # what the first parameter of f(z, x) may be called


def solve_implicit(prob: StaticProblem | FixedPointProblem | ImplicitProblem) -> ConstraintSolution:
    """The solution of a problem that is no recurrence."""
    if isinstance(prob, StaticProblem):
        return _solve_network(prob)
    if isinstance(prob, FixedPointProblem):
        return _solve_fixed_point(prob)
    return _solve_free(prob)


def _solve_network(prob: StaticProblem) -> ConstraintSolution:
    traced = prob.backend.tracing.network(prob)
    row = every(traced)
    state = direct(traced, row)(row.theta)
    _check_finite(state, "the state of the network")
    return NetworkSolution(problem=prob, state=state, traced=traced)


def _solve_fixed_point(prob: FixedPointProblem) -> ConstraintSolution:
    traced = prob.backend.tracing.fixed_point(prob, _takes_state_first(prob.f))
    state, iterations, off = _iterate(traced)
    row = every(traced)
    if traced.model is not None:
        check_alike(state - residual(traced, row)(state), traced.model(state))
    derivative = _derivative(traced, row, state)
    radius = derivative.spectral_radius()
    if not (radius < 1 and off <= 100 * eps_of(state)):
        raise ValueError(
            f"f does not contract: the spectral radius of D_z f is {radius:.4g}, and after {iterations} iterations f "
            f"and z differ by {off:.1e}. There is no state of rest; scale the recurrent weights down, or pose an "
            "ImplicitProblem"
        )
    inverse = derivative.inverse()
    stats = {"iterations": iterations, "spectral_radius": radius, "condition": inverse.condition}
    return FixedPointSolution(problem=prob, state=state, stats=stats, traced=traced, inverse=inverse)


def _solve_free(prob: ImplicitProblem) -> ConstraintSolution:
    traced = prob.backend.tracing.free_form(prob)
    row, state = every(traced), prob.state
    equations, off = residual(traced, row), np.inf
    for steps in range(NEWTON_STEPS):
        rest, inverse = equations(state), _derivative(traced, row, state).inverse()
        if (off := _relative(rest, state)) <= 1e3 * eps_of(state):
            stats = {"iterations": steps, "condition": inverse.condition}
            return ImplicitSolution(problem=prob, state=state, stats=stats, traced=traced, inverse=inverse)
        state = state - inverse.solve(rest[None, None])[0, 0]
        _check_finite(state, "Newton's iterate")
    raise ValueError(f"Newton's method left F = {off:.1e} of the state's size; start it nearer to a solution")


# Functions on all rows


def states_of_network(traced: TracedConstraint, learnable: list[str]) -> Callable[[dict[str, Array]], Array]:
    """The states of a network as a function of these of its parameters, by name."""
    row = Constraint(traced, learnable)
    states, names = direct(traced, row), [traced.graph.parameters[node] for node in row.parameters]
    no_values, concat = traced.rows[0].reshape(-1)[:0], array_namespace(traced.rows[0]).concat
    return lambda values: states(concat([no_values, *(values[name].reshape(-1) for name in names)], axis=0))


def _derivative(traced: TracedConstraint, row: Constraint, state: Array) -> StateDerivative:
    """D_S F at a state; that of a free form has one row."""
    push, pull = traced.transforms.linearised(residual(traced, row), state)
    if traced.form is not Form.FREE:
        return StateDerivative(push, pull, state)

    def with_row(apply: Rows) -> Rows:
        return lambda q: apply(q[:, 0])[:, None]

    return StateDerivative(with_row(push), with_row(pull), state[None])


# Fixed points


def _takes_state_first(f: Any) -> bool:
    """Whether f is f(z, x), by the names of its parameters."""
    call = f.forward if hasattr(f, "forward") else f
    names = [p.name for p in inspect.signature(call).parameters.values() if p.name != "self"]
    return len(names) > 1 and names[0] in STATES and names[1] not in STATES


def _iterate(traced: TracedConstraint) -> tuple[Array, int, float]:
    """z <- f(x, z), then Newton's method where that is slow: z, how often, and how far off it is at last."""
    row, start = every(traced), traced.start
    equations, state, n, off = residual(traced, row), start, 0, np.inf
    for n in range(ITERATIONS + NEWTON_STEPS):
        rest = equations(state)
        off = _relative(rest, state)
        if not off > 100 * eps_of(state):  # or no number
            break
        if n >= ITERATIONS:
            rest = _derivative(traced, row, state).inverse().solve(rest[None])[0]
        state = state - rest
    return (state, n, off) if np.isfinite(off) else (start, n, off)


def _check_finite(state: Array, what: str) -> None:
    if not bool(array_namespace(state).isfinite(state).all()):
        raise ValueError(f"{what} holds NaN or inf; look at the inputs and the weights")


def _relative(rest: Array, state: Array) -> float:
    return float(abs(rest).max()) / max(1.0, float(abs(state).max()))
