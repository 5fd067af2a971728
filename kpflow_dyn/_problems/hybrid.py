"""Hybrid models, whose state flows and jumps: what they have, the steps along them, and their solutions.

A hybrid model is a field f(t, z) or f(t, z, x) with `events`, each with these members:

    condition  (t, z[, x]) -> a number for each trial; the event is where it crosses zero. None at given times.
    reset      (t, z[, x]) -> z after the jump, in the form of z.
    direction  of the crossing: -1 from above, 1 from below, 0 both.
    times      (t0, end) -> the given times of the event between these.

and with `max_events`, how many may happen in a trial.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.solutions import Solution, times_within
from kpflow_dyn._problems.steps import Tableau


def is_hybrid(model: Any) -> bool:
    """Whether a model has jumps between which it flows."""
    return hasattr(model, "events") and hasattr(model, "max_events")


def is_moving(model: Any) -> bool:
    """Whether a hybrid model has events whose time a condition says."""
    return any(event.condition is not None for event in model.events)


def refuse_hybrid(model: Any, what: str, advice: str) -> None:
    """Raise where a model has jumps that this does not know of."""
    if is_hybrid(model):
        raise ValueError(f"{what} a hybrid model, whose state jumps at events; {advice}")


@dataclass(frozen=True, eq=False)
class HybridSteps:
    """The steps of a solve from jump to jump [trial, step], those of length zero at t0 first.

    Attributes:
        tableau: the method.
        t, end: where each step begins and ends, float64 numpy.
        before: the state where it begins [trial, step, unit].
        reached: the state where it ends, before the jump if there is one.
        after: the state behind that.
        stage_times: when each stage is evaluated [trial, step, stage].
        event: the number of the event that happens at its end, -1 for none.
        located: whether the condition of this event says when the step ends.
        stays: whether it is a jump right after another one, at a time that the latter has.
        nodes: the step that ends at each time of the grid [trial, time].
    """

    tableau: Tableau
    t: np.ndarray
    end: np.ndarray
    before: Array
    reached: Array
    after: Array
    stage_times: np.ndarray
    event: np.ndarray
    located: np.ndarray
    stays: np.ndarray
    nodes: np.ndarray

    def leading_to(self, places: np.ndarray) -> np.ndarray:
        """Which steps lead to the times of the grid up to the last of these [trial, time]: [trial, step]."""
        counts = places.shape[1] - np.argmax(places[:, ::-1], axis=1) - 1
        last = np.where(places.any(1), self.nodes[np.arange(len(places)), counts], -1)
        return np.arange(self.t.shape[1]) <= last[:, None]


@dataclass(frozen=True, kw_only=True)
class HybridSolution(Solution):
    """The states of an `ODEProblem` whose f has jumps, on its grid; at the time of a jump that behind it.

    Attributes:
        start: the state at the first time [trial, unit], before any jump.
        steps: the steps from jump to jump.
        options: the options that the solve used.
        dense_output: times [n] -> the state there [trial, n, unit].

    Example as `kpflow_dyn.models.Hybrid`.
    """

    problem: ODEProblem
    start: Array = field(repr=False)
    steps: HybridSteps = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    dense_output: Callable[[np.ndarray], Array] = field(repr=False)

    @property
    def events(self) -> list[list[tuple[float, int]]]:
        """What happened in each trial: the times and numbers of its events, in their order."""
        steps = self.steps
        places = [np.flatnonzero(row >= 0) for row in steps.event]
        return [
            list(zip(steps.end[b, at].tolist(), steps.event[b, at].tolist(), strict=True))
            for b, at in enumerate(places)
        ]

    def leading_to(self, places: np.ndarray) -> np.ndarray:
        """Which steps lead to these times of the grid, up to the last one of each trial [trial, step]."""
        return self.steps.leading_to(places)

    def __call__(self, t: Any) -> Array:
        times = times_within(t, self.problem.t[0], self.problem.t[-1])
        state = self.dense_output(np.atleast_1d(times))
        return state if times.ndim else state[:, 0]
