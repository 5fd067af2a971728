"""Steps taken once more: their stages, compared with what the solver found, and all that is read from these.

`RungeKuttaStep` is the one place where stages are computed. Here it is mapped over steps from the states that they are
known to begin at, or repeated from the first of these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy, side_by_side, take_at, taken, to_numpy
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.inputs import input_width
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.solutions import ODESolution
from kpflow_dyn._problems.starts import start_map
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau
from kpflow_dyn.ode._discretise import Nodes, RungeKuttaStep, read_off
from kpflow_dyn.ode._jumps import rows_of, rows_with_rates

Scheme = tuple[Array, Array, Array]


def increments(problem: ODEProblem, steps: AcceptedSteps) -> Array:
    """h k [trial, step, stage, unit] of all steps."""
    found = [_increments(problem, steps, places)[:, : places.shape[1]] for places in _all_places(steps)]
    return array_namespace(steps.after).concat(found, axis=1)


def check_replay(problem: ODEProblem, steps: AcceptedSteps) -> None:
    """Raise unless each step of an explicit method gives once more the state that the solver found."""
    if steps.stages is None:
        for places in _all_places(steps):
            _compared(problem, steps.take(_filled(problem, places)), places.shape[1])


def _all_places(steps: AcceptedSteps) -> Iterator[np.ndarray]:
    """Of all steps, part by part [trial, n]."""
    for part in _in_parts(np.arange(steps.dt.shape[1]), steps):
        yield np.tile(part, (len(steps.dt), 1))


def read_states(problem: ODEProblem, steps: AcceptedSteps, times: np.ndarray) -> Array:
    """The dense output at times [n], [trial, n, unit]; the steps in which these lie are checked."""
    parts = [_read(problem, steps, part) for part in _in_parts(times, steps)]
    return array_namespace(steps.after).concat(parts, axis=1)


def divided(problem: ODEProblem, steps: AcceptedSteps, parts: int) -> tuple[np.ndarray, np.ndarray, Array]:
    """When equal parts of all steps begin and how long they are [trial, step * part], and the states there [..., unit].

    The states are those of the dense output.
    """
    theta, shape = np.arange(parts) / parts, (len(steps.dt), -1)
    begin, dt = steps.t[..., None] + theta * steps.dt[..., None], np.repeat(steps.dt / parts, parts, axis=1)
    hk = increments(problem, steps)
    states = steps.after[:, :, None] + like_numpy(steps.tableau.interpolation(theta), hk) @ hk
    return begin.reshape(shape), dt, states.reshape((*dt.shape, -1))


def _read(problem: ODEProblem, steps: AcceptedSteps, times: np.ndarray) -> Array:
    index, theta = steps.locate(times)
    after, inside = taken(steps.after, index), (theta < 1).any(0)
    if not inside.any():
        return after
    # A time at the end of a step has weights of zero, so that any step will do for it.
    places, which = np.unique(np.where(inside, index, index[:, inside][:, :1]), axis=1, return_inverse=True)
    found = _increments(problem, steps, places)
    weights = like_numpy(steps.tableau.interpolation(theta), found)  # [trial, n, stage]
    read = problem.backend.transforms.compiled(_between)
    return read(after, found, np.tile(which.reshape(-1), (len(index), 1)), weights)


def _between(after: Array, found: Array, which: np.ndarray, weights: Array) -> Array:
    """y_1 + sum_i w_i h k_i [trial, n, unit], of h k [trial, m, stage, unit] at the places which [trial, n]."""
    here = take_at(found.reshape((1, *found.shape[:2], -1)), which)[0]  # [trial, n, stage * unit]
    return after + (weights[..., None] * here.reshape((*weights.shape, -1))).sum(-2)


def _in_parts(values: np.ndarray, steps: AcceptedSteps) -> Iterator[np.ndarray]:
    """Values of steps or times, in parts for which the stages make a block."""
    trials, _, units = steps.after.shape
    length = max(32, rows_at_once(trials * units * len(steps.tableau.b), steps.after))
    yield from np.split(values, range(length, len(values), length))


def _increments(problem: ODEProblem, steps: AcceptedSteps, places: np.ndarray) -> Array:
    """h k of the steps at places [trial, n], which are checked; the last one is repeated where there is room."""
    taken = steps.take(_filled(problem, places))
    if taken.stages is not None:
        return like_numpy(taken.dt[..., None, None], taken.stages) * taken.stages
    found = _compared(problem, taken, places.shape[1])[..., 2:]
    return found.reshape((*taken.dt.shape, -1, problem.z0.shape[1]))


def _filled(problem: ODEProblem, places: np.ndarray) -> np.ndarray:
    """Places [trial, n], the last one repeated."""
    count = places.shape[1]
    return places[:, np.minimum(np.arange(problem.backend.solving.rounded(count)), count - 1)]


def _compared(problem: ODEProblem, taken: AcceptedSteps, count: int) -> Array:
    """`_Compared` of these steps, of which this number count and are checked."""
    step = _step(problem, taken.tableau, with_stages=True)
    rows = step.rows(problem, taken.dt, taken.stage_times, taken.before)
    states = side_by_side([taken.before, taken.after], axes=2)
    found = problem.backend.solving.each_step(_Compared(step), problem.f, rows, states, count)
    error, size = np.moveaxis(to_numpy(found)[..., :2], -1, 0)
    check_same(error, size, taken.t, taken.rounding)
    return found


def _step(problem: ODEProblem, tableau: Tableau, with_stages: bool) -> RungeKuttaStep:
    return RungeKuttaStep(tableau, problem.z0.shape[1], input_width(problem), with_stages)


@dataclass(frozen=True)
class _Compared:
    """A step on states before and after it: [error, the largest number in the sum, h k_1, ..., h k_s]."""

    step: RungeKuttaStep

    def __call__(self, field: Callable[..., Array], row: Array, states: Array) -> Array:
        xp, units = array_namespace(states), self.step.units
        values = self.step(field, row, states[..., :units])
        errors = xp.abs(values[..., :units] - states[..., units:])
        sizes = xp.abs(xp.concat([states, values[..., units:]], axis=-1))
        largest = [xp.max(numbers, axis=-1)[..., None] for numbers in (errors, sizes)]
        return xp.concat([*largest, values[..., units:]], axis=-1)


def rounding_of(steps: AcceptedSteps, atol: float) -> np.ndarray:
    """By how much the steps of a trial may differ from round-off alone [trial].

    Near rest a step is a small state and larger terms that cancel, in f too, where they are not seen. So what counts is
    the largest state of the trial, and a tenth of the tolerance at most, but never more than half the digits.
    """
    largest = np.abs(to_numpy(steps.after)).max((1, 2))
    eps = float(np.finfo(largest.dtype).eps)
    return 1e3 * eps * largest + np.minimum(atol / 10, eps**0.5 * largest)


def check_same(error: np.ndarray, size: np.ndarray, times: np.ndarray, rounding: np.ndarray | None = None) -> None:
    """Raise where states differ from those of the solve by more than round-off, at which of the times [trial, n].

    Args:
        error: by how much they differ [trial, n].
        size: of the numbers that they are sums of [trial, n].
        rounding: how much of the error may be round-off, besides that of the size [trial].
    """
    allowed = 1e3 * float(np.finfo(error.dtype).eps) * size
    if rounding is not None:
        allowed = np.maximum(allowed, rounding[:, None])
    excess = np.where(np.isnan(error), np.inf, error) / np.where(allowed > 0, allowed, 1)
    worst = np.unravel_index(np.argmax(excess), error.shape)
    if not excess[worst] <= 1:
        relative = error[worst] / size[worst] if size[worst] > 0 else error[worst]
        raise ValueError(
            f"the step from t = {np.broadcast_to(times, error.shape)[worst]:.6g} gives another result when it is "
            f"replayed, off by {relative:.1e} of the state; f must depend on (t, z, x) alone, with no noise, "
            "counters or memory of earlier calls, and its parameters must be those of the solve; where they changed, "
            "solve again"
        )


def scheme(solution: ODESolution | HybridSolution) -> Any:
    """What `replay` repeats: the rows of the steps that were taken, and how the nodes are read off them."""
    if isinstance(solution, HybridSolution):
        model = solution.problem.backend.tracing.Model(solution.problem.model, lambda _name: True)
        return rows_with_rates(solution, model)[1], solution.steps.nodes
    return _scheme(solution)


def _scheme(solution: ODESolution) -> Scheme:
    steps, problem = solution.steps, solution.problem
    assert steps is not None
    trials, count = steps.dt.shape
    room = problem.backend.solving.rounded(count)
    taken = steps.take(np.tile(np.minimum(np.arange(room), count - 1), (trials, 1)))
    dt = np.where(np.arange(room) < count, taken.dt, 0.0)  # those that fill it up have length zero
    rows = _step(problem, steps.tableau, True).rows(problem, dt, taken.stage_times, taken.before)
    nodes = Nodes(steps, solution.nodes, solution.state)
    index = array_namespace(rows).asarray(nodes.index, device=device(rows))
    return rows, index, nodes.weights


def replay(solution: ODESolution | HybridSolution) -> Callable[[Any, Any], Array]:
    """(model, scheme) -> the states, by the steps of the scheme, differentiable in the parameters of the model."""
    if isinstance(solution, HybridSolution):
        return _replay_jumps(solution)
    assert solution.steps is not None
    problem, tableau = solution.problem, solution.steps.tableau
    start = start_map(problem)

    def states(model: Any, scheme: Scheme) -> Array:
        rows, index, weights = scheme
        step = _step(problem, tableau, with_stages=weights.shape[-1] > 1)
        z0 = problem.z0 if start is None else start(model)
        after = problem.backend.solving.run(step, model, rows, step.widen(z0))
        return read_off(after[None], index, weights)[0]

    return states


def _replay_jumps(solution: HybridSolution) -> Callable[[Any, tuple[Array, np.ndarray]], Array]:
    """The same of a hybrid model; events move with the parameters, to second order."""
    problem, (step, _) = solution.problem, rows_of(solution.problem, solution.steps)
    parts_of, start, units = problem.backend.models.parts_of, start_map(problem), problem.z0.shape[1]
    step, begin = replace(step, again=step.moving), like_numpy(problem.t[:1], problem.z0)

    def states(model: Any, scheme: tuple[Array, np.ndarray]) -> Array:
        (rows, nodes), z0 = scheme, problem.z0 if start is None else start(model)
        if step.moving:
            xp = array_namespace(z0)
            z0 = xp.concat([z0, xp.broadcast_to(begin, (len(z0), 1))], axis=-1)
        return take_at(problem.backend.solving.run(step, parts_of(model)[0], rows, z0)[None], nodes)[0][..., :units]

    return states
