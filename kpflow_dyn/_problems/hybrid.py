"""The steps of a hybrid model from jump to jump, and its solutions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._problems.solutions import ContinuousSolution
from kpflow_dyn._problems.steps import Tableau
from kpflow_dyn._shown import Shown


@dataclass(frozen=True, eq=False, repr=False)
class HybridSteps(Shown):
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


@dataclass(frozen=True, kw_only=True, repr=False)
class HybridSolution(ContinuousSolution):
    """A `ContinuousSolution` of a field that has jumps: its start is before any of them, a state at one behind it.

    Attributes:
        steps: the steps from jump to jump.

    Example as `kpflow_dyn.models.Hybrid`.
    """

    steps: HybridSteps = field(repr=False)

    @property
    def events(self) -> list[list[tuple[float, int]]]:
        """What happened in each trial: the times and numbers of its events, in the order of the solve."""
        steps, ends = self.steps, self.problem.form.time(self.steps.end)
        places = [np.flatnonzero(row >= 0) for row in steps.event]
        return [
            list(zip(ends[b, at].tolist(), steps.event[b, at].tolist(), strict=True)) for b, at in enumerate(places)
        ]

    def leading_to(self, places: np.ndarray) -> np.ndarray:
        """Which steps lead to these times of the grid, up to the last one of each trial [trial, step]."""
        return self.steps.leading_to(places)
