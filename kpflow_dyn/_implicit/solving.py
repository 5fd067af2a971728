"""Solve networks, fixed points and free-form constraints F(S, theta; x) = 0."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Rows, eps_of, is_finite, like_numpy
from kpflow_dyn._flows.referee import in_words
from kpflow_dyn._implicit.constraint import TracedConstraint, states
from kpflow_dyn._implicit.equations import Equations
from kpflow_dyn._implicit.form import Form, axes_of
from kpflow_dyn._implicit.inverse import StateDerivative
from kpflow_dyn._implicit.linearised import pair_of, whole_of
from kpflow_dyn._implicit.roads import uses_of_weights
from kpflow_dyn._implicit.solutions import ConstraintSolution, FixedPointSolution, ImplicitSolution, NetworkSolution
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn._problems.signatures import STATES

ITERATIONS, NEWTON_STEPS = 1000, 30
OF_MAPS = STATES | {"s", "y"}  # what the first parameter of f(z, x) may be called


def solve_implicit(prob: StaticProblem | FixedPointProblem | ImplicitProblem) -> ConstraintSolution:
    """The solution of a problem that is no recurrence, by the model as its user calls it."""
    if isinstance(prob, StaticProblem):
        return _solve_network(prob)
    if isinstance(prob, FixedPointProblem):
        return _solve_fixed_point(prob)
    return _solve_free(prob)


def _solve_network(prob: StaticProblem) -> NetworkSolution:
    equations = prob.backend.tracing.Network(prob)
    _check_finite(equations.start, "the state of the network")
    traced, untraced = _trace(equations)
    sol = NetworkSolution(problem=prob, state=equations.start, equations=equations, traced=traced, untraced=untraced)
    sol = replace(sol, t=_times(sol.axes, sol.state))
    return _with_uses(sol) if prob.state is None else sol


def _with_uses(sol: NetworkSolution) -> NetworkSolution:
    """The same with the outputs of all uses of weights as the state; where no trace gives them, of its output."""
    model, reason = sol.equations.model(lambda _name: True), sol.untraced
    if sol.traced is not None:
        try:
            found = replace(sol, state=states(sol.traced, model.parameters))
            return replace(found, checked=uses_of_weights(found, model))
        except Exception as error:  # whatever stops the trace, autograd answers
            reason = in_words(error, model.causes(whole_of(sol.equations, model, sol.state)))
    reason = f"{reason.rstrip('.')}. The state is the output alone; name modules in `state` for values on the way"
    return replace(sol, traced=None, untraced=reason)


def _solve_fixed_point(prob: FixedPointProblem) -> FixedPointSolution:
    equations = prob.backend.tracing.FixedPoint(prob, _takes_state_first(prob.f))
    derivatives = _derivatives(equations)
    state, iterations, off = _iterate(equations, derivatives)
    equations.check(state)
    derivative = derivatives(state)
    radius = derivative.spectral_radius()
    if not (radius < 1 and off <= 100 * eps_of(state)):
        raise ValueError(
            f"f does not contract: the spectral radius of D_z f is {radius:.4g}, and after {iterations} iterations f "
            f"and z differ by {off:.1e}. There is no state of rest; scale the recurrent weights down, or pose an "
            "ImplicitProblem"
        )
    inverse, (traced, untraced) = derivative.inverse(), _trace(equations)
    stats = {"iterations": iterations, "spectral_radius": radius, "condition": inverse.condition}
    return FixedPointSolution(
        problem=prob, state=state, stats=stats, equations=equations, traced=traced, untraced=untraced, inverse=inverse
    )


def _solve_free(prob: ImplicitProblem) -> ImplicitSolution:
    equations, off = prob.backend.tracing.FreeForm(prob), np.inf
    state = equations.start
    derivatives = _derivatives(equations)
    for steps in range(NEWTON_STEPS):
        rest, inverse = equations.at(state), derivatives(state).inverse()
        if (off := _relative(rest, state)) <= 1e3 * eps_of(state):
            equations.check(state)
            stats, (traced, untraced) = {"iterations": steps, "condition": inverse.condition}, _trace(equations)
            return ImplicitSolution(
                problem=prob,
                state=state,
                t=_times(axes_of(Form.FREE, state, None), state),
                stats=stats,
                equations=equations,
                traced=traced,
                untraced=untraced,
                inverse=inverse,
            )
        state = state - inverse.solve(rest[None, None])[0, 0]
        _check_finite(state, "Newton's iterate")
    raise ValueError(f"Newton's method left F = {off:.1e} of the state's size; start it nearer to a solution")


def _times(axes: Sequence[str], state: Array) -> Array | None:
    """The numbers of the times 1, 2, ... [time] of a state; None where it has none."""
    return like_numpy(np.arange(1, state.shape[axes.index("time")] + 1), state) if "time" in axes else None


def _trace(equations: Equations) -> tuple[TracedConstraint | None, str]:
    """The trace, or why there is none."""
    try:
        return equations.traced(), ""
    except Exception as error:  # whatever stops a trace, autograd answers
        return None, in_words(error, [])


def _derivatives(equations: Equations) -> Callable[[Array], StateDerivative]:
    """D_S F at any state, by autograd through the model; that of a free form has one row."""
    known = equations.model(lambda _name: True).derivative(equations.residual, equations.start)

    def with_row(apply: Rows) -> Rows:
        return lambda q: apply(q[:, 0])[:, None]

    def at(state: Array) -> StateDerivative:
        found = pair_of(known.at(state)).argument
        if equations.form is not Form.FREE:
            return StateDerivative(found.push, found.pull, state)
        return StateDerivative(with_row(found.push), with_row(found.pull), state[None])

    return at


# Fixed points


def _takes_state_first(f: Any) -> bool:
    """Whether f is f(z, x), by the names of its parameters."""
    call = f.forward if hasattr(f, "forward") else f
    names = [p.name for p in inspect.signature(call).parameters.values() if p.name != "self"]
    return len(names) > 1 and names[0] in OF_MAPS and names[1] not in OF_MAPS


def _iterate(equations: Equations, derivatives: Callable[[Array], StateDerivative]) -> tuple[Array, int, float]:
    """z <- f(x, z), then Newton's method where that is slow: z, how often, and how far off it is at last."""
    start = state = equations.start
    n, off = 0, np.inf
    for n in range(ITERATIONS + NEWTON_STEPS):
        rest = equations.at(state)
        off = _relative(rest, state)
        if not off > 100 * eps_of(state):  # or no number
            break
        if n >= ITERATIONS:
            rest = derivatives(state).inverse().solve(rest[None])[0]
        state = state - rest
    return (state, n, off) if np.isfinite(off) else (start, n, off)


def _check_finite(state: Array, what: str) -> None:
    if not is_finite(state):
        raise ValueError(f"{what} holds NaN or inf; look at the inputs and the weights")


def _relative(rest: Array, state: Array) -> float:
    return float(abs(rest).max()) / max(1.0, float(abs(state).max()))
