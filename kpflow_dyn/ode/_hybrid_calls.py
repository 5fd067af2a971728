"""What a hybrid model is asked for along a solve: its conditions and resets, and single steps of a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, eps_of, like_numpy, to_numpy
from kpflow_dyn._problems.inputs import input_width, jumps_within, time_rows
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.steps import Tableau
from kpflow_dyn.ode._discretise import RungeKuttaStep
from kpflow_dyn.ode._libraries import Failed

Steps = dict[str, np.ndarray]  # of a library, [step, trial, ...] each


class Calls:
    """A hybrid model on some trials, in numpy; `tableau` is that of the method, once it has taken a step."""

    def __init__(self, problem: ODEProblem) -> None:
        self.problem = problem
        self.tableau: Tableau | None = None
        self.jumps = jumps_within(problem)
        self.behind = False  # on which side conditions are taken at a time at which the inputs jump
        self.numbers = tuple(n for n, event in enumerate(problem.f.events) if event.condition is not None)

    @property
    def method(self) -> Tableau:
        """The tableau."""
        assert self.tableau is not None, "a library has solved something before"
        return self.tableau

    def stage_times(self, now: float, length: float) -> np.ndarray:
        """Those of a step from now [trial, stage]; of no stage where the method is not known yet."""
        every = np.ones(len(self.problem.z0))
        if self.tableau is None:
            return np.zeros((len(every), 0))
        return _stage_times(self.problem, self.tableau, now * every, length * every)

    def dense(self, steps: Steps, parts: np.ndarray) -> np.ndarray:
        """The states in each step at parts of its length [n], by the dense output: [step, n, unit], of one trial."""
        begin, length = steps["t"][:, 0], (steps["end"] - steps["t"])[:, 0]
        found = taken_anew(self.problem, self.method, begin[None], length[None], steps["before"][:, 0][None], True)
        return read_between(self.method, found[0][:, None], parts)

    def step_to(self, steps: Steps, place: int, lengths: np.ndarray) -> np.ndarray:
        """The states at these lengths [n] from the beginning of a step, each by a step of its own [trial, n, unit]."""
        begin, before = steps["t"][place], steps["before"][place]
        return taken_anew(self.problem, self.method, begin[:, None], lengths[None], before[:, None])

    def after_jump(self, event: int, time: float, y: np.ndarray) -> np.ndarray:
        """The state behind a jump [trial, unit]."""
        after = self.called(_Reset(self._inputs, event), np.array([time]), y[:, None])[:, 0]
        if not np.isfinite(after).all():
            bad = np.flatnonzero(~np.isfinite(after).all(1)).tolist()
            raise Failed({n: (f"has no finite state behind the reset of event {event}", time) for n in bad}, apart=True)
        return after

    def conditions(self, times: np.ndarray, states: np.ndarray) -> np.ndarray:
        """The conditions of all events that have one, at times [n] of states [1, n, unit]: [n, event]."""
        if len(self.jumps):
            times = beside_jumps(self.problem, self.jumps, times, np.inf if self.behind else -np.inf)
        return self.called(_Conditions(self._inputs, self.numbers), times, states)[0]

    def called(self, step: Callable[..., Array], times: np.ndarray, states: np.ndarray) -> np.ndarray:
        """A step map on rows [t, x] and states [trial, n, unit], padded so that JAX compiles it seldom."""
        solving, count = self.problem.backend.solving, len(times)
        room = np.minimum(np.arange(solving.rounded(count)), count - 1)
        every = np.tile(times[room], (len(states), 1))
        rows = time_rows(self.problem, every)
        found = solving.each_step(step, self.problem.f, rows, like_numpy(states[:, room], self.problem.z0), count)
        return to_numpy(found)[:, :count]

    @property
    def _inputs(self) -> bool:
        return self.problem.x is not None


@dataclass(frozen=True)
class _Reset:
    """A reset as a step map on rows [t, x]."""

    inputs: bool
    event: int

    def __call__(self, model: Any, row: Array, z: Array) -> Array:
        first = row if row.ndim == 1 else row[0]
        reset = model.events[self.event].reset
        return reset(first[0], z, row[..., 1:]) if self.inputs else reset(first[0], z)


@dataclass(frozen=True)
class _Conditions:
    """The conditions as a step map on rows [t, x]."""

    inputs: bool
    numbers: tuple[int, ...]

    def __call__(self, model: Any, row: Array, z: Array) -> Array:
        first = row if row.ndim == 1 else row[0]
        given = (first[0], z, row[..., 1:]) if self.inputs else (first[0], z)
        return array_namespace(z).stack([model.events[n].condition(*given) for n in self.numbers], axis=-1)


def beside_of(problem: ODEProblem, times: Any, towards: Any) -> np.ndarray:
    """The times next to these that the dtype of the state can tell from them."""
    dtype = np.float32 if eps_of(problem.z0) > 1e-10 else np.float64
    return np.nextafter(np.asarray(times, dtype), np.asarray(towards, dtype)).astype(np.float64)


def beside_jumps(problem: ODEProblem, jumps: np.ndarray, times: np.ndarray, towards: Any) -> np.ndarray:
    """Times, those of them at which x jumps moved to one side, as x is to be taken from there."""
    nearest = jumps[np.abs(jumps - times[..., None]).argmin(-1)]
    same = np.abs(times - nearest) <= 4 * eps_of(problem.z0) * np.abs(nearest)
    return np.where(same, beside_of(problem, nearest, towards), times)


def _stage_times(problem: ODEProblem, tableau: Tableau, begin: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Those of steps [..., stage], inside of a step that begins or ends where x jumps."""
    times, jumps = begin[..., None] + tableau.c * lengths[..., None], jumps_within(problem)
    return beside_jumps(problem, jumps, times, np.where(tableau.c > 0, -np.inf, np.inf)) if len(jumps) else times


def taken_anew(
    problem: ODEProblem,
    tableau: Tableau,
    begin: np.ndarray,
    lengths: np.ndarray,
    before: np.ndarray,
    with_stages: bool = False,
) -> np.ndarray:
    """The states after single steps of these lengths [trial, n] from times [trial, n] and states [trial, n, unit].

    With h k of their stages next to them, if these are wanted [trial, n, unit (1 + stage)].
    """
    solving, count = problem.backend.solving, lengths.shape[1]
    room = np.minimum(np.arange(solving.rounded(count)), count - 1)
    trials, units = before.shape[0], before.shape[2]
    begin, lengths = (np.broadcast_to(a, (trials, count))[:, room] for a in (begin, lengths))
    before = like_numpy(np.broadcast_to(before, (trials, count, units))[:, room], problem.z0)
    step = RungeKuttaStep(tableau, units, input_width(problem), with_stages)
    rows = step.rows(problem, lengths, _stage_times(problem, tableau, begin, lengths), before)
    return to_numpy(solving.each_step(step, problem.f, rows, step.widen(before), count))[:, :count]


def read_between(tableau: Tableau, found: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """The dense output at parts [n] of steps, of the states behind these and h k of their stages [..., n, width]."""
    weights = tableau.interpolation(parts)  # [n, stage]
    stages = len(tableau.b)
    ends, hk = np.split(found, [found.shape[-1] // (1 + stages)], axis=-1)
    return ends + (weights[..., None] * hk.reshape((*hk.shape[:-1], stages, -1))).sum(-2)
