"""Steps taken once more: their stages, compared with what the solver found, and all that is read from these.

`RungeKuttaStep` is the one place where stages are computed. Here it is mapped over steps from the states that they are
known to begin at, or repeated from the first of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy, take_at, to_numpy
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._problems.inputs import input_width
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.solutions import ODESolution
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau
from kpflow_dyn.ode._discretise import Nodes, RungeKuttaStep, read_off

Scheme = tuple[Array, Array, Array]


def increments(problem: ODEProblem, steps: AcceptedSteps) -> Array:
    """h k [trial, step, stage, unit] of all steps."""
    return array_namespace(steps.after).concat(list(_of_all(problem, steps)), axis=1)


def check_replay(problem: ODEProblem, steps: AcceptedSteps) -> None:
    """Raise unless each step of an explicit method gives once more the state that the solver found."""
    if steps.stages is None:
        for _ in _of_all(problem, steps):
            pass


def _of_all(problem: ODEProblem, steps: AcceptedSteps) -> Iterator[Array]:
    """h k of all steps, part by part."""
    for part in _in_parts(np.arange(steps.dt.shape[1]), steps):
        places = np.tile(part, (len(steps.dt), 1))
        yield _increments(problem, steps, places)[:, : len(part)]


def read_states(problem: ODEProblem, steps: AcceptedSteps, times: np.ndarray) -> Array:
    """The dense output at times [n], [trial, n, unit]; the steps in which these lie are checked."""
    parts = [_read(problem, steps, part) for part in _in_parts(times, steps)]
    return array_namespace(steps.after).concat(parts, axis=1)


def _read(problem: ODEProblem, steps: AcceptedSteps, times: np.ndarray) -> Array:
    index, theta = steps.locate(times)
    after, inside = take_at(steps.after[None], index)[0], (theta < 1).any(0)
    if not inside.any():
        return after
    # A time at the end of a step has weights of zero, so that any step will do for it.
    places, which = np.unique(np.where(inside, index, index[:, inside][:, :1]), axis=1, return_inverse=True)
    found = _increments(problem, steps, places)
    weights = like_numpy(steps.tableau.interpolation(theta), found)  # [trial, n, stage]
    each = np.tile(which.reshape(-1), (len(index), 1))
    here = take_at(found.reshape((1, *found.shape[:2], -1)), each)[0]  # [trial, n, stage * unit]
    return after + (weights[..., None] * here.reshape((*index.shape, *found.shape[2:]))).sum(-2)


def _in_parts(values: np.ndarray, steps: AcceptedSteps) -> Iterator[np.ndarray]:
    """Values of steps or times, in parts for which the stages make a block."""
    trials, _, units = steps.after.shape
    length = max(32, rows_at_once(trials * units * len(steps.tableau.b), steps.after))
    yield from np.split(values, range(length, len(values), length))


def _increments(problem: ODEProblem, steps: AcceptedSteps, places: np.ndarray) -> Array:
    """h k of the steps at places [trial, n], which are checked; the last one is repeated where there is room."""
    count = places.shape[1]
    filled = np.minimum(np.arange(problem.backend.solving.rounded(count)), count - 1)
    taken = steps.take(places[:, filled])
    if taken.stages is not None:
        return like_numpy(taken.dt[..., None, None], taken.stages) * taken.stages
    step = _step(problem, steps.tableau, with_stages=True)
    rows = step.rows(problem, taken.dt, taken.stage_times, taken.before)
    values = problem.backend.solving.each_step(step, problem.f, rows, taken.before)
    found = values[..., step.units :].reshape((*taken.dt.shape, -1, step.units))
    _check(taken, values[..., : step.units], found)
    return found


def _step(problem: ODEProblem, tableau: Tableau, with_stages: bool) -> RungeKuttaStep:
    return RungeKuttaStep(tableau, problem.z0.shape[1], input_width(problem), with_stages)


def _check(steps: AcceptedSteps, replayed: Array, found: Array) -> None:
    """Raise where a replayed step differs from the one taken by more than round-off of the largest number in it."""
    xp = array_namespace(found)
    sizes = xp.stack([xp.abs(steps.before), xp.abs(steps.after), xp.max(xp.abs(found), axis=-2)])
    check_same(replayed, steps.after, xp.max(sizes, axis=0), steps.t)


def check_same(found: Array, expected: Array, size: Array, times: np.ndarray) -> None:
    """Raise where states [trial, n, unit] are not those of the solve, up to round-off of numbers of this size.

    Args:
        found: the states that another evaluation gives.
        expected: the states of the solve.
        size: of the numbers that they are sums of, like the states.
        times: [trial, n], where the error says that it happened.
    """
    xp = array_namespace(found)
    error, scale = (to_numpy(xp.max(values, axis=-1)) for values in (xp.abs(found - expected), size))
    error = error / np.where(scale > 0, scale, 1)  # [trial, n]
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    if not error[worst] <= 1e3 * float(xp.finfo(expected.dtype).eps):
        raise ValueError(
            f"the step from t = {np.broadcast_to(times, error.shape)[worst]:.6g} gives another result when it is "
            f"replayed, off by {error[worst]:.1e} of the state; f must depend on (t, z, x) alone, with no noise, "
            "counters or memory of earlier calls, and its parameters must be those of the solve; where they changed, "
            "solve again"
        )


def scheme(solution: ODESolution) -> Scheme:
    """What `replay` repeats: the rows of the steps that were taken, and how the nodes are read off them."""
    steps, problem = solution.steps, solution.problem
    assert steps is not None
    trials, count = steps.dt.shape
    room = problem.backend.solving.rounded(count)
    taken = steps.take(np.tile(np.minimum(np.arange(room), count - 1), (trials, 1)))
    dt = np.where(np.arange(room) < count, taken.dt, 0.0)  # those that fill it up have length zero
    rows = _step(problem, steps.tableau, True).rows(problem, dt, taken.stage_times, taken.before)
    nodes = Nodes(steps, solution.t, solution.state)
    index = array_namespace(rows).asarray(nodes.index, device=device(rows))
    return rows, index, nodes.weights


def replay(problem: ODEProblem, tableau: Tableau) -> Callable[[Any, Scheme], Array]:
    """(field, scheme) -> the states, by the steps of the scheme, differentiable in the parameters of the field."""

    def states(field: Any, scheme: Scheme) -> Array:
        rows, index, weights = scheme
        step = _step(problem, tableau, with_stages=weights.shape[-1] > 1)
        after = problem.backend.solving.run(step, field, rows, step.widen(problem.z0))
        return read_off(after[None], index, weights)[0]

    return states
