"""A step that may end in a jump, whose derivative is that of a Runge-Kutta step and of the time of the event.

With h* the length at which the condition c vanishes at the end of the step, z_1(h) that end, and r = 1 / (dc/dh) and
v = dz_1/dh there as data, a step of the fixed length h* is corrected by one step of Newton's method,

    z = z_1 - r c v        t = t_end - r c        z+ = reset(t, z)

where c = 0: the value stays, and the derivative is that of the moving end. As the next step begins at t, time is part
of the state: [z, t].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, side_by_side, taken, to_numpy
from kpflow_dyn._problems.events import is_moving
from kpflow_dyn._problems.hybrid import HybridSolution, HybridSteps
from kpflow_dyn._problems.inputs import input_slopes, input_width, time_rows
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.starts import OfStates
from kpflow_dyn._problems.steps import call_field
from kpflow_dyn.ode._discretise import RungeKuttaStep


@dataclass(frozen=True)
class JumpingStep:
    """The step map of one row: z = [y, t] -> [y_1, t_1], or y alone where the times of all jumps are given.

    A row has the parts of `widths`, one after the other:

        step     of the Runge-Kutta step
        end      when the step ends, and x there
        jumps    for each of `events` whether it happens, then a state at which it does
        moving   where the times of events move: when the step begins, whether it stays, r, r v, and the slopes of x at
                 the stages and at the end
        cut      where steps are cut: whether the state before counts, and the state that does otherwise
    """

    step: RungeKuttaStep
    of_step: int  # the width of its rows
    events: tuple[int, ...]  # those that happen
    conditions: tuple[int, ...]  # those of them whose time a condition says
    moving: bool  # whether time is part of the state, and each trial has times of its own
    cut: bool = False
    again: bool = False  # whether steps are taken again up to a moved end, which is then right to second order

    @property
    def width(self) -> int:
        """Of the state."""
        return self.step.units + self.moving

    @cached_property
    def widths(self) -> dict[str, int]:
        """How many numbers each part of a row has."""
        units, x, stages = self.step.units, self.step.inputs or 0, len(self.step.tableau.b)
        return {
            "step": self.of_step,
            "end": 1 + x,
            "jumps": len(self.events) * (1 + units),
            "moving": self.moving * (3 + units + x * (stages + 1)),
            "cut": self.cut * (1 + self.width),
        }

    def __call__(self, model: Any, row: Array, z: Array) -> Array:
        """The step of the model on this row."""
        if self.moving and row.ndim > 1 and row.shape[0] > 1:  # a field of torch has one time for all trials
            each = [self(model, row[n : n + 1], z[n : n + 1]) for n in range(row.shape[0])]
            return array_namespace(z).concat(each, axis=0)
        parts = self._parts(row)
        if self.cut:
            counts, other = parts["cut"][..., :1], parts["cut"][..., 1:]
            z = counts * z + (1 - counts) * other
        return self._moving(model, parts, z) if self.moving else self._given(model, parts, z)

    def _parts(self, row: Array) -> dict[str, Array]:
        found, start = {}, 0
        for name, width in self.widths.items():
            found[name] = row[..., start : start + width]
            start += width
        return found

    def _given(self, model: Any, parts: dict[str, Array], z: Array) -> Array:
        end = parts["end"]
        x = None if self.step.inputs is None else end[..., 1:]
        return self._jumped(model, parts["jumps"], _time(end), self.step(model, parts["step"], z), x)

    def _moving(self, model: Any, parts: dict[str, Array], z: Array) -> Array:
        units, x = self.step.units, self._end_inputs(parts)
        rate, slide = parts["moving"][..., 2:3], parts["moving"][..., 3 : 3 + units]
        y, end, moved, off = self._ended(model, parts, z, 0.0)
        if self.again:
            y, end, moved, off = self._ended(model, parts, z, _time(rate * off))
        late = rate * off
        x = _moved_by(x, self._end_slope(parts), moved - _time(late))
        y = self._jumped(model, parts["jumps"], end - _time(late), y - slide * off, x)
        return array_namespace(y).concat([y, end - late], axis=-1)

    def _ended(self, model: Any, parts: dict[str, Array], z: Array, shorter: Any) -> tuple[Array, Array, Array, Array]:
        """As `_stepped`, and the condition there."""
        y, end, moved = self._stepped(model, parts, z, shorter)
        x = _moved_by(self._end_inputs(parts), self._end_slope(parts), moved)
        return y, end, moved, self._off(model, parts["jumps"], end, y, x)

    def _stepped(self, model: Any, parts: dict[str, Array], z: Array, shorter: Any) -> tuple[Array, Array, Array]:
        """The end of a Runge-Kutta step that is shorter by this, when that is, and by how much that moved."""
        units, begin = self.step.units, _time(z[..., self.step.units :])
        late = begin - _time(parts["moving"])
        stay = _time(parts["moving"][..., 1:])
        moved = stay * late - shorter
        end = _time(parts["end"]) + moved
        _, times, y, inputs, rest = self.step.read(parts["step"], z[..., :units])
        shifts = [(1 - c) * late + c * moved for c in self.step.tableau.c.tolist()]
        times = [t + shift for t, shift in zip(times, shifts, strict=True)]
        inputs = [_moved_by(x, s, by) for x, s, by in zip(inputs, self._slopes(parts), shifts, strict=True)]
        return self.step.taken(model, end - begin, times, y, inputs, rest), end, moved

    def lengthened(self, model: Any, row: Array, h: Array) -> Array:
        """[y_1, c] at the end of a step of length h, of rows [row, before]; their slopes in h are v and dc/dh."""
        if row.ndim > 1 and row.shape[0] > 1:
            each = [self.lengthened(model, row[n : n + 1], h[n : n + 1]) for n in range(row.shape[0])]
            return array_namespace(h).concat(each, axis=0)
        parts, z = self._parts(row), row[..., -self.step.units :]
        old, times, y, inputs, rest = self.step.read(parts["step"], z)
        more = _time(h) - old
        shifts = [c * more for c in self.step.tableau.c.tolist()]
        times = [t + shift for t, shift in zip(times, shifts, strict=True)]
        inputs = [_moved_by(x, s, by) for x, s, by in zip(inputs, self._slopes(parts), shifts, strict=True)]
        y = self.step.taken(model, _time(h), times, y, inputs, rest)
        x = _moved_by(self._end_inputs(parts), self._end_slope(parts), more)
        return array_namespace(y).concat(
            [y, self._off(model, parts["jumps"], _time(parts["end"]) + more, y, x)], axis=-1
        )

    def _off(self, model: Any, jumps: Array, t: Array, y: Array, x: Array | None) -> Array:
        """The condition of the event that happens [..., 1]; 0 where none does."""
        found = 0 * y[..., :1]
        for n, event in enumerate(self.events):
            if event in self.conditions:
                c = call_field(model.events[event].condition, t, y, x)
                found = found + jumps[..., n : n + 1] * c[..., None]
        return found

    def _jumped(self, model: Any, jumps: Array, t: Array, y: Array, x: Array | None) -> Array:
        """The state behind the jump; where an event does not happen, its reset is called on a state where it does."""
        where, count, units = array_namespace(y).where, len(self.events), self.step.units
        for n, event in enumerate(self.events):
            happens, other = jumps[..., n : n + 1] > 0, jumps[..., count + n * units : count + (n + 1) * units]
            y = where(happens, call_field(model.events[event].reset, t, where(happens, y, other), x), y)
        return y

    def _end_inputs(self, parts: dict[str, Array]) -> Array | None:
        return None if self.step.inputs is None else parts["end"][..., 1:]

    def _slopes(self, parts: dict[str, Array]) -> list[Array]:
        """Of x at the stages."""
        x, first = self.step.inputs or 0, 3 + self.step.units
        stages = range(len(self.step.tableau.b))
        return [parts["moving"][..., first + n * x : first + (n + 1) * x] for n in stages]

    def _end_slope(self, parts: dict[str, Array]) -> Array:
        return parts["moving"][..., parts["moving"].shape[-1] - (self.step.inputs or 0) :]


def rows_of(problem: ODEProblem, steps: HybridSteps) -> tuple[JumpingStep, Array]:
    """The step map and its rows [trial, step, ...], the rates of conditions being zeros."""
    happened = sorted(set(steps.event[steps.event >= 0].tolist()))
    located = sorted(set(steps.event[steps.located].tolist()))
    moving, units = is_moving(problem.f), problem.z0.shape[1]
    inner = RungeKuttaStep(steps.tableau, units, input_width(problem), with_stages=False)
    rows = inner.rows(problem, steps.end - steps.t, steps.stage_times, steps.before)
    step = JumpingStep(inner, rows.shape[-1], tuple(happened), tuple(located), moving)
    flags = (steps.event[..., None] == np.array(happened, int)).astype(np.float64)
    reached = to_numpy(steps.reached)
    where = [np.argwhere(steps.event == event)[0] for event in happened]
    others = [np.broadcast_to(reached[trial, n], reached.shape) for trial, n in where]
    parts = [rows, time_rows(problem, steps.end), like_numpy(np.concatenate([flags, *others], -1), rows)]
    if moving:
        begins = np.stack([steps.t, steps.stays], -1)
        parts.append(like_numpy(np.concatenate([begins, np.zeros((*begins.shape[:2], 1 + units))], -1), rows))
        if step.step.inputs is not None:
            parts += [input_slopes(problem, times) for times in (*np.moveaxis(steps.stage_times, 2, 0), steps.end)]
    return step, side_by_side(parts, axes=2)


def rows_with_rates(sol: HybridSolution, model: Any) -> tuple[JumpingStep, Array]:
    """The step map and its rows, with 1 / (dc/dh) and (dz_1/dh) / (dc/dh) where a condition says the length h."""
    steps, (step, rows) = sol.steps, rows_of(sol.problem, sol.steps)
    places = [np.flatnonzero(row) for row in steps.located]
    most = max(map(len, places))
    if not most:
        return step, rows
    index = np.stack([np.append(row, np.zeros(most - len(row), int)) for row in places])
    lengths = np.take_along_axis(steps.end - steps.t, index, 1)
    given = side_by_side([taken(rows, index), taken(steps.before, index)], axes=2)
    each_step = sol.problem.backend.solving.each_step
    slopes = model.derivative(
        lambda call, h: each_step(of_states(sol, step.lengthened), call, given, h),
        like_numpy(lengths[..., None], rows),
    )
    ones = like_numpy(np.ones((1, *lengths.shape, 1)), rows)
    found = to_numpy(slopes.push(None, ones))[0]  # [trial, n, unit + 1]
    values, start = to_numpy(rows).copy(), sum(step.widths[name] for name in ("step", "end", "jumps")) + 2
    for trial, at in enumerate(places):
        rate = 1 / found[trial, : len(at), -1:]
        values[trial, at, start : start + found.shape[-1]] = np.concatenate(
            [rate, rate * found[trial, : len(at), :-1]], -1
        )
    return step, like_numpy(values, rows)


def before_of(steps: HybridSteps, step: JumpingStep) -> Array:
    """The states of the recurrence before each step."""
    if not step.moving:
        return steps.before
    return side_by_side([steps.before, like_numpy(steps.t[..., None].copy(), steps.before)], axes=2)


def of_states(sol: HybridSolution, step: Callable[..., Array]) -> Callable[..., Array]:
    """The step of what may have a start that learns beside it."""
    return step if sol.problem.encoder is None else OfStates(step)


def _time(row: Array) -> Array:
    """The first number of a row, which in torch has a trial axis of length one, or one time for all trials."""
    return row[0] if row.ndim == 1 else row[0, 0]


def _moved_by(x: Array | None, slope: Array, shift: Array) -> Array | None:
    """The input some time later."""
    return None if x is None else x + slope * shift
