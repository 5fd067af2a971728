"""The times between which to step, and the states that steps along them give."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._problems.checks import check_finite, check_times
from kpflow_dyn._problems.delayed import DDEProblem
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.measure import trapezoid
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.starts import OfStates
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._problems.stochastic import SDEProblem
from kpflow_dyn._problems.translations import advice_on

Stepped = SDEProblem | DDEProblem | ODEProblem
MOST_STEPS = 10**6
ROUND_OFF = 1e-12  # of the longest time: times closer than that are one
ADAPTIVE = ("rtol", "atol", "reltol", "abstol", "adaptive", "stepsize_controller", "controller", "options", "max_steps")


def given_steps(problem: Stepped, options: Mapping[str, Any]) -> Any:
    """The option `steps`; a TypeError for others, which says what to give instead."""
    kind = type(problem).__name__
    if of_tolerances := [name for name in ADAPTIVE if name in options]:
        raise TypeError(
            f"{', '.join(of_tolerances)}: that is for adaptive steps, and this {kind} is solved by given ones; pass "
            "steps=, a length, or increasing times"
        )
    if unknown := set(options) - {"steps"}:
        raise TypeError(f"here solve of this {kind} takes steps= alone, got {sorted(unknown)}{advice_on(unknown)}")
    return options.get("steps")


def step_times(problem: Stepped, steps: Any) -> np.ndarray:
    """The times between which to step, [step + 1]: those of the problem, and those that `steps` asks for."""
    t, span = problem.t, problem.t[-1] - problem.t[0]
    if steps is None:
        if problem.is_span:
            raise ValueError("on a span (t0, t1) pass steps=, a length or the times to step to; or give a grid t")
        return t
    if isinstance(steps, int | float | np.number) and not isinstance(steps, bool):
        if not 0 < steps < np.inf or span / steps > MOST_STEPS:
            raise ValueError(
                f"steps = {steps}, expected a positive length, of which {MOST_STEPS} at most fit into {span}"
            )
        return merged(t, t[0] + float(steps) * np.arange(int(np.ceil(span / steps))))
    times = check_times(steps, "steps")
    if times[0] < t[0] - ROUND_OFF * abs(t).max() or times[-1] > t[-1] + ROUND_OFF * abs(t).max():
        raise ValueError(f"steps reach from {times[0]} to {times[-1]}, outside of t from {t[0]} to {t[-1]}")
    return merged(t, times)


def inputs_at_start(problem: Stepped) -> tuple[Array, ...]:
    """x(t_0) [trial, input], where there are inputs."""
    x = inputs_at(problem, np.full((len(problem.z0), 1), problem.t[0]))
    return () if x is None else (x[:, 0],)


def merged(first: np.ndarray, others: np.ndarray) -> np.ndarray:
    """All of these times in order; of those that are one but for round-off, the one of `first`."""
    same = ROUND_OFF * max(abs(first).max(), first[-1] - first[0])
    right = np.minimum(np.searchsorted(first, others), len(first) - 1)
    near = np.minimum(abs(others - first[right]), abs(others - first[np.maximum(right - 1, 0)]))
    return np.union1d(first, others[near > same])


def run_steps(
    problem: Stepped,
    alg: str,
    step: Callable[..., Array],
    rows: Array,
    start: Array,
    ends: np.ndarray,
    options: dict[str, Any],
    between: Callable[[np.ndarray], np.ndarray],
) -> SteppedSolution:
    """The solution by these steps, the first of which has length zero."""
    backend, units = problem.backend, problem.z0.shape[1]
    step = step if problem.encoder is None else OfStates(step)
    found = backend.solving.run(step, problem.model, rows, start)
    finite_until(found[..., :units], ends)
    t = ends if problem.is_span else problem.t
    places = np.searchsorted(ends, t)
    state = found[..., :units]
    return SteppedSolution(
        problem=problem,
        state=state if len(places) == len(ends) else state[:, places],
        t=t,
        alg=alg,
        stats={"steps": len(ends) - 1, "longest": float(np.diff(ends).max())},
        weights=trapezoid(t),
        start=start,
        step=step,
        model=problem.model,
        rows=rows,
        steps_state=found,
        ends=ends,
        places=places,
        options=options,
        between=between,
    )


def finite_until(state: Array, ends: np.ndarray) -> None:
    """Raise where the state does not stay finite, with the time."""
    try:
        check_finite(state, "the state")
    except ValueError as error:
        raise ValueError(
            f"{str(error).partition(';')[0]}, of the steps that begin at t = {ends[0]:.6g} and end at {ends[-1]:.6g}; "
            "take shorter steps=, or look at f there"
        ) from error


def linear_between(ends: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Times [n] -> weights [n, step] of a line between the ends of steps."""

    def weights(times: np.ndarray) -> np.ndarray:
        right = np.clip(np.searchsorted(ends, times), 1, len(ends) - 1)
        along = (times - ends[right - 1]) / (ends[right] - ends[right - 1])
        found, rows = np.zeros((len(times), len(ends))), np.arange(len(times))
        found[rows, right - 1], found[rows, right] = 1 - along, along
        return found

    return weights
