"""What steers the solve of an ODE, checked: tolerances, and the times between which the solver must step."""

import dataclasses
from typing import Any

import numpy as np

from kpflow_dyn._arrays import eps_of, to_numpy
from kpflow_dyn._problems.checks import check_times
from kpflow_dyn._problems.inputs import stops_of
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.translations import advice_on
from kpflow_dyn.ode._libraries import Library, Options

MAX_STEPS = 4096  # beside one for each time at which a step should end


def options_of(problem: ODEProblem, given: dict[str, Any]) -> Options:
    """The options, checked, with defaults for the dtype of the problem."""
    if given.keys() & {"event", "event_fn", "events"}:
        raise TypeError(
            "events are part of the model: pose kp.ODEProblem(kp.models.Hybrid(f, kp.models.Event(condition, reset)), "
            "z0, t), and read solution.events; a reset that changes nothing is lambda t, z: z"
        )
    known, own = [field.name for field in dataclasses.fields(Options)], given.keys() & {"controller"}
    given = problem.backend.solving.understood(given)
    if unknown := own | set(given) - set(known):
        listed = ", ".join(name for name in known if name != "controller")
        raise TypeError(
            f"solve got the unknown options {sorted(unknown)}, expected some of {listed}{advice_on(unknown)}"
        )
    double = str(problem.z0.dtype).endswith("float64")
    defaults: dict[str, Any] = {"rtol": 1e-6 if double else 1e-4, "atol": 1e-8 if double else 1e-6, "steps": None}
    defaults["max_steps"] = MAX_STEPS + len(stops_of(problem))
    options = Options(**{**defaults, **given})
    for name in ("rtol", "atol"):
        value = getattr(options, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value!r}, expected a positive number; the default is {defaults[name]}")
    if not isinstance(options.max_steps, int) or isinstance(options.max_steps, bool) or options.max_steps < 1:
        raise ValueError(
            f"max_steps is {options.max_steps!r}, expected a positive integer; the default is {defaults['max_steps']}"
        )
    return options


def with_steps(problem: ODEProblem, library: Library, alg: Any, options: Options) -> Options:
    """The options as a library takes them: the steps as times."""
    name, adaptive = alg if isinstance(alg, str) else type(alg).__name__, library.chooses_steps(alg)
    steps = _forward(options.steps) if problem.form.backward else options.steps
    return dataclasses.replace(options, steps=_step_times(problem, steps, adaptive, options.max_steps, name))


def _forward(steps: Any) -> Any:
    """Steps as they are where time runs backward, as those of -t; a length may have either sign."""
    if steps is None or isinstance(steps, bool):
        return steps
    if isinstance(steps, int | float | np.number):
        return abs(steps)
    try:
        return -np.asarray(to_numpy(steps), np.float64)
    except (TypeError, ValueError):
        return steps


def _step_times(problem: ODEProblem, steps: Any, adaptive: bool, max_steps: int, method: str) -> np.ndarray | None:
    """The times between which the solver must step, from t0 to the end, checked; None where it chooses itself."""
    t0, end = problem.t[0], problem.t[-1]
    if steps is None and not adaptive and problem.is_span:
        raise ValueError(
            f"{method} does not choose its steps; on a span pass steps= (a length, or the times to step to), or give a "
            "grid t"
        )
    if steps is None and adaptive:
        return None
    if steps is None:
        times = problem.t
    elif isinstance(steps, int | float | np.number) and not isinstance(steps, bool):
        times = snapped(_constant_steps(t0, end, float(steps), max_steps), problem.t)
    else:
        times = snapped(_given_steps(t0, end, steps), problem.t)
    if steps is None or callable(problem.x):  # who gives the steps decides how finely samples are seen
        times = _with_stops(times, problem)
    _check_count(len(times) - 1, max_steps)
    return times


def _with_stops(times: np.ndarray, problem: ODEProblem) -> np.ndarray:
    """The times and the stops; where both are the same but for the round-off of the state's dtype, the stop alone."""
    stops = stops_of(problem)
    if not len(stops):
        return times
    same = 4 * eps_of(problem.z0) * np.abs(times).max()
    return np.union1d(times[np.abs(times - _nearest(times, stops)) > same], stops)


def _check_count(count: float, max_steps: int) -> None:
    if count > max_steps:
        raise ValueError(f"steps asks for {count:.0f} steps, more than max_steps = {max_steps}; raise max_steps")


def _constant_steps(t0: float, end: float, length: float, max_steps: int) -> np.ndarray:
    if not (np.isfinite(length) and length > 0):
        raise ValueError(f"steps = {length}, expected a positive length")
    count = max(np.ceil((end - t0) / length - 1e-9), 1.0)
    _check_count(count, max_steps)
    return np.append(t0 + length * np.arange(int(count)), end)


def snapped(times: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The times, those of them that are times of the grid but for round-off being exactly these."""
    nearest = _nearest(times, grid)
    return np.where(np.abs(times - nearest) <= _round_off(grid), nearest, times)


def _nearest(times: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The time of an increasing grid that is nearest to each of the times."""
    right = np.searchsorted(grid, times)
    left, right = np.maximum(right - 1, 0), np.minimum(right, len(grid) - 1)
    return np.where(times - grid[left] < grid[right] - times, grid[left], grid[right])


def _round_off(grid: np.ndarray) -> float:
    return 1e-13 * float(np.abs(grid).max())


def _given_steps(t0: float, end: float, steps: Any) -> np.ndarray:
    try:
        times = check_times(steps)
    except (TypeError, ValueError) as error:
        raise type(error)(f"steps must be None, a length or increasing times: {error}") from error
    if np.abs(times[[0, -1]] - [t0, end]).max() > _round_off(np.array([t0, end])):
        raise ValueError(
            f"steps reach from {times[0]} to {times[-1]}, expected from t0 = {t0} to the last time {end}; add them"
        )
    return times
