"""The solution of a hybrid model, and what is checked before it is solved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, eps_of, like_numpy, to_numpy
from kpflow_dyn._problems.forms import called_as
from kpflow_dyn._problems.hybrid import HybridSolution, HybridSteps
from kpflow_dyn._problems.inputs import inputs_at, take_trials
from kpflow_dyn._problems.measure import gauss_points, trapezoid
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._shown import type_name
from kpflow_dyn.ode._hybrid import Method, groups_of, solve_hybrid
from kpflow_dyn.ode._hybrid_calls import read_between, taken_anew
from kpflow_dyn.ode._options import snapped


@dataclass(frozen=True)
class Between:
    """z(t) [trial, n, unit] at times [n], by the dense output of each step; at a jump the state behind it."""

    problem: ODEProblem
    steps: HybridSteps

    def __call__(self, times: np.ndarray) -> Array:
        groups = groups_of(self.problem)
        with self.problem.backend.solving.without_gradients():
            parts = [self._of(trials, times) for trials in groups]
        return like_numpy(np.concatenate(parts), self.problem.z0)

    def _of(self, trials: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Of trials that have their times in common."""
        steps, first = self.steps, trials[0]
        begin, end = steps.t[first], steps.end[first]
        given = np.unique(end[(steps.event[first] >= 0) & ~steps.located[first]])
        times = snapped(times, given) if len(given) else times  # one of these has the state behind it
        found = to_numpy(steps.after)[trials][:, np.maximum(np.searchsorted(end, times, side="right") - 1, 0)]
        inside = ~np.isin(times, end)
        if inside.any():
            places = np.searchsorted(end, times[inside])
            which, back = np.unique(places, return_inverse=True)
            problem = self.problem if len(trials) == len(steps.t) else take_trials(self.problem, trials)
            length, before = (end - begin)[which], to_numpy(steps.before)[trials][:, which]
            anew = taken_anew(problem, steps.tableau, begin[None, which], length[None], before, True)[:, back]
            parts = (times[inside] - begin[places]) / (end - begin)[places]
            found[:, inside] = read_between(steps.tableau, anew, parts)
        return found


def hybrid_solution(problem: ODEProblem, method: Method, given: dict[str, Any]) -> HybridSolution:
    """Solve; `Failed` where trials do not reach the end."""
    nodes, weights = problem.t, trapezoid(problem.t)
    if problem.is_span:
        nodes, weights = gauss_points(_edges(solve_hybrid(problem, method, nodes)[0]))
    steps, stats = solve_hybrid(problem, method, nodes)
    rows = np.arange(len(problem.z0))[:, None]
    state = like_numpy(to_numpy(steps.after)[rows, steps.nodes], problem.z0)
    return HybridSolution(
        problem=problem,
        state=state,
        t=problem.form.time(nodes),
        alg=method.alg,
        stats=stats,
        start=problem.backend.models.snapshot(problem.z0),
        weights=weights,
        steps=steps,
        options=given,
        dense_output=Between(problem, steps),
    )


def _edges(steps: HybridSteps) -> np.ndarray:
    """Between which times the states of all trials are smooth: the steps of one that took the most, and all events."""
    most = (steps.end > steps.t).sum(1).argmax()
    times = np.unique([*steps.t[most], *steps.end[most], *steps.end[steps.event >= 0]])
    apart = np.diff(times) > 16 * eps_of(steps.before) * np.abs(times).max()
    return times[np.append(True, apart)]


def check_events(problem: ODEProblem) -> None:
    """Raise unless conditions give a number and resets a state."""
    z, t = problem.z0[0], like_numpy(np.asarray(problem.t[0]), problem.z0)
    x = inputs_at(problem, np.full((len(problem.z0), 1), problem.t[0]))
    given = (t, z) if x is None else (t, z, x[0, 0])
    how, sampling = _how_called(problem), getattr(problem.f, "sampling", None)
    for number, event in enumerate(problem.f.events):
        for name, function, shape in (("condition", event.condition, ()), ("reset", event.reset, tuple(z.shape))):
            if number == 0 and name == "reset" and sampling is not None:
                told = sampling.how_called(None if x is None else x.shape[-1])
                _check_called("the policy", function, given, told, shape, problem)
            elif function is not None:
                _check_called(f"the {name} of event {number}", function, given, how, shape, problem)


def _how_called(problem: ODEProblem) -> str:
    layout, sampling = problem.form.layout, getattr(problem.f, "sampling", None)
    named = called_as(problem.called_with, problem.args is not None, "")
    form = "in torch with z [trial, unit], in JAX with z [unit]" if layout.is_plain else f"with z {layout}"
    inputs = ", as the problem has inputs" * (problem.x is not None)
    plant = "" if sampling is None else f", the {sampling.state} entries of the plant's state"
    return f"It is called as {named}{inputs}; {form}{plant}"


def _check_called(what: str, function: Any, given: tuple[Any, ...], how: str, shape: Any, problem: ODEProblem) -> None:
    one = problem.backend.tracing.on_one_trial(function)
    try:
        found = one(*given)
    except Exception as error:
        raise ValueError(f"{what} failed: {str(error).rstrip('.')}. {how}") from error
    if tuple(getattr(found, "shape", (None,))) != shape or found.dtype != problem.z0.dtype:
        got = f"{tuple(found.shape)} of {found.dtype}" if hasattr(found, "shape") else type_name(found)
        raise ValueError(
            f"{what} gave {got} for one trial, expected {shape} of {problem.z0.dtype}: a condition is a number for "
            "each trial, a reset the whole state"
        )
