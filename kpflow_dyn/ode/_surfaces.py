"""Where the state of a trial crosses the surfaces on which conditions of events are zero.

Steps are first looked at by their dense output. In a step where something may happen, the conditions are taken at the
ends of steps of the method itself, shorter ones from the same beginning, and the length at which one of them vanishes
is the event: value and derivative then belong to one map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from kpflow_dyn.ode._libraries import Failed

LOOKS = 8  # of each step at its dense output
HALVINGS = 30  # of the first look, where a trial begins on a surface
ROUND_OFF = 1e3  # of a condition, in units of the dtype's, and of the largest value that it had
GRAZING = 1e-6  # slope of a condition over a step, in units of its largest value there
SHORT = 1e-3  # part of a trial: shorter steps, as to a time of the grid, do not say how fast it is
REST = 100  # slope behind a jump, in units of what rounding makes of it
AT_ONCE = 64  # events at one time

Steps = dict[str, np.ndarray]
Values = Callable[[np.ndarray], np.ndarray]  # lengths [n] -> the conditions there [n, event]


class Trial(Protocol):
    """What is asked of a model on one trial.

    dense       the states in a step at parts of its length [n]: [n, unit].
    step_to     the states [1, n, unit] at lengths [n] from the beginning of a step.
    conditions  of all events that have one, at times [n] of states [1, n, unit]: [n, event].
    """

    def dense(self, steps: Steps, parts: np.ndarray) -> np.ndarray: ...
    def step_to(self, steps: Steps, place: int, lengths: np.ndarray) -> np.ndarray: ...
    def conditions(self, times: np.ndarray, states: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Crossing:
    """An event, and the step and its length at which it happens."""

    event: int
    step: int
    length: float


class Surfaces:
    """On which side of each surface a trial is: 1, -1, or 0 where it is on it and has not left it yet."""

    def __init__(self, events: Any, trial: Trial, round_off: float, span: float) -> None:
        self.numbers = tuple(n for n, event in enumerate(events) if event.condition is not None)
        self.directions = np.array([events[n].direction for n in self.numbers])
        self.trial, self.round_off, self.span = trial, ROUND_OFF * round_off, span
        self.sides, self.largest = np.zeros(len(self.numbers)), np.zeros(len(self.numbers))
        self.last = np.full(len(self.numbers), -np.inf)
        self.started_on = np.zeros(len(self.numbers), bool)

    @property
    def none(self) -> bool:
        """Whether no event has a condition."""
        return not self.numbers

    def start(self, now: float, y: np.ndarray) -> None:
        """The sides where the trial begins."""
        if not self.none:
            c = self._at(now, y)
            self.started_on = abs(c) <= self.round_off * np.abs(y).max()
            self.sides = np.where(self.started_on, 0, np.sign(c))

    def first_crossing(self, steps: Steps) -> Crossing | None:
        """The first event in these steps, or None; sides are those at its time, or at their end."""
        parts = np.arange(LOOKS + 1) / LOOKS
        states = self.trial.dense(steps, parts)  # [step, look, unit]
        times = steps["t"][:, :1] + parts * (steps["end"] - steps["t"])[:, :1]
        flat = states.reshape(1, -1, states.shape[-1])
        c = self.trial.conditions(times.ravel(), flat).reshape(*times.shape, -1)
        _check_finite(c, times)
        for place in range(len(times)):
            self.largest = np.maximum(self.largest, np.abs(c[place]).max(0))  # not of what lies behind an event
            if self._may_happen(c[place]) and (found := self._inside(steps, place, c[place])) is not None:
                return found
        return None

    def crossed(self, number: int, located: bool, now: float, before: np.ndarray, after: np.ndarray) -> list[int]:
        """The events that the jump of one makes happen, as it takes the state across their surfaces."""
        if self.none:
            return []
        c, old = self._at(now, after), self._at(now, before)
        on = abs(c) <= self.round_off * np.maximum(self.largest, abs(old))
        happens = []
        for n, other in enumerate(self.numbers):
            if other == number:
                self.sides[n] = 0 if on[n] else np.sign(c[n])
            elif not on[n]:
                through = self.sides[n] * np.sign(c[n]) < 0
                if through and located and abs(old[n]) <= self.round_off * self.largest[n]:
                    raise _failed(f"has the events {number} and {other} at one time, of which one moves the other", now)
                happens += [other] if through and self._fires(n) else []
                self.sides[n] = np.sign(c[n])
        return happens

    def check_goes_on(self, number: int, now: float) -> None:
        """Raise where an event follows itself as fast as times can be told apart."""
        n = self.numbers.index(number)
        if now - self.last[n] <= AT_ONCE * self.round_off / ROUND_OFF * abs(now):
            raise _failed(f"has event {number} again and again, faster than times can be told apart", now)
        self.last[n] = now

    def _at(self, now: float, y: np.ndarray) -> np.ndarray:
        """The conditions at a time."""
        c = self.trial.conditions(np.array([now]), y[:, None])
        _check_finite(c, np.array([now]))
        return c[0]

    def _fires(self, n: int) -> bool:
        """Whether the event happens where its surface is left behind from this side."""
        return self.directions[n] != self.sides[n]

    def _may_happen(self, c: np.ndarray) -> bool:
        """Whether, of c [look, event], a trial leaves a surface, or crosses it, or may between two looks."""
        u = self.sides * c
        inner, bend = u[1:-1], u[:-2] - 2 * u[1:-1] + u[2:]
        lowest = inner - (u[2:] - u[:-2]) ** 2 / (8 * np.where(bend > 0, bend, np.inf))  # of the parabola
        dips = (inner <= u[:-2]) & (inner <= u[2:]) & (lowest <= 0.1 * inner)
        return bool((self.sides == 0).any() or (u[1:] <= 0).any() or dips.any())

    def _inside(self, steps: Steps, place: int, looks: np.ndarray) -> Crossing | None:
        """The first event in one step."""
        begin, length = float(steps["t"][place, 0]), float((steps["end"] - steps["t"])[place, 0])
        value = _values(self.trial, steps, place)
        lengths = _lengths(self.sides, length, looks, value)
        g = value(lengths)  # [length, event]
        self.largest = np.maximum(self.largest, np.abs(g).max(0))
        small, sides, found = self.round_off * self.largest, self.sides.copy(), []
        for n in range(len(self.numbers)):
            first = 0
            if sides[n] == 0:
                sides[n], first = self._side_taken(n, g[:, n], small[n], value, length, begin)
            for at, side, fires in self._changes(n, g[:, n], sides, first):
                if fires:
                    low = 0.0 if at == 0 else float(lengths[at - 1])
                    found.append((_root(lambda h, n=n: value(h)[:, n], side, low, float(lengths[at])), n))
                    break
        if not found:
            self.sides = np.array([_side_after(g[:, n], small[n], self.sides[n]) for n in range(len(self.numbers))])
            return None
        root, n = min(found)
        if not _slope(lambda h: value(h)[:, n], root, length) > GRAZING * self.largest[n]:
            raise _failed(f"meets the surface of event {self.numbers[n]} with hardly any speed", begin + root)
        before = lengths < root
        self.sides = np.array(
            [
                _side_after(g[before, m], small[m], self.sides[m]) if m != n else sides[n]
                for m in range(len(self.numbers))
            ]
        )
        return Crossing(self.numbers[n], place, root)

    def _side_taken(
        self, n: int, g: np.ndarray, small: float, value: Values, length: float, begin: float
    ) -> tuple[float, int]:
        """The side that a trial takes from a surface, by values g [length], and from where on; raise where it rests.

        The slope says the same. Where it does not, the trial has come back already, between two looks.
        """
        away = np.flatnonzero(abs(g) > small)
        if not len(away):
            raise _failed(f"stays on the surface of event {self.numbers[n]}, where its condition is zero", begin)
        side = float(np.sign(g[away[0]]))
        if self.started_on[n]:
            self._check_start(n, side, begin)
            return side, away[0] + 1
        near = (self.round_off / ROUND_OFF) ** (1 / 3)  # as central differences are most exact
        shift = near * max(length, SHORT * self.span)
        before, after = value(np.array([-shift, shift]))[:, n]
        if not (after - before) / near * side > REST * near**2 * self.largest[n]:
            raise _failed(f"comes to rest on the surface of event {self.numbers[n]}", begin)
        return side, away[0] + 1

    def _changes(self, n: int, g: np.ndarray, sides: np.ndarray, first: int) -> Any:
        """Where values g [length] change their side: (place, the side before, whether that is the event)."""
        for at in range(first, len(g)):
            if g[at] * sides[n] <= 0:
                fires = self.directions[n] != sides[n]
                yield at, sides[n], fires
                sides[n] = -sides[n]

    def _check_start(self, n: int, side: float, begin: float) -> None:
        self.started_on[n] = False
        if self.directions[n] in (0, side):
            raise _failed(
                f"begins on the surface of event {self.numbers[n]} and leaves it in the direction of the event", begin
            )


def _side_after(g: np.ndarray, small: float, side: float) -> float:
    """The side behind values g [length]: that of the last one that is not zero."""
    away = g[abs(g) > small]
    return np.sign(away[-1]) if len(away) else side


def _slope(value: Callable[[np.ndarray], np.ndarray], root: float, length: float) -> float:
    """How much a condition changes over a step, by its slope where it is zero."""
    apart = 1e-3 * length
    before, after = value(np.array([root - min(apart, root), root + apart]))
    return abs(after - before) / (min(apart, root) + apart) * length


def _lengths(sides: np.ndarray, length: float, looks: np.ndarray, value: Values) -> np.ndarray:
    """At which a step is looked at: evenly, at the bottom of dips, and near its beginning on a surface."""
    even = length * np.arange(1, LOOKS + 1) / LOOKS
    parts = [even]
    if (sides == 0).any():
        parts.append(even[0] * 0.5 ** np.arange(1, HALVINGS + 1))
    for n, dip in enumerate(np.argmin(sides * looks, axis=0)):
        if 0 < dip < LOOKS and sides[n] * looks[dip, n] > 0:
            parts.append(_bottom(value, sides[n], n, length * (dip - 1) / LOOKS, length * (dip + 1) / LOOKS))
    return np.unique(np.concatenate(parts))


def _bottom(value: Values, side: float, n: int, low: float, high: float) -> np.ndarray:
    """Where a condition is nearest to zero between two lengths."""
    close = {"xatol": 1e-9 * (high - low), "maxiter": 60}
    found: Any = minimize_scalar(
        lambda h: side * value(np.array([h]))[0, n], bounds=(low, high), method="bounded", options=close
    )
    return np.array([found.x])


def _values(trial: Trial, steps: Steps, place: int) -> Values:
    """Lengths [n] -> the conditions at the ends of steps of these lengths [n, event]."""
    begin = float(steps["t"][place, 0])

    def values(lengths: np.ndarray) -> np.ndarray:
        states = trial.step_to(steps, place, lengths)
        c = trial.conditions(begin + lengths, states)
        _check_finite(c, begin + lengths[:, None])
        return c

    return values


def _root(value: Values, side: float, low: float, high: float) -> float:
    """The length between two at which the values leave a side."""

    def g(h: float) -> float:
        return side * float(value(np.array([h]))[0])

    if g(low) <= 0:
        return low
    if g(high) == 0:
        return high
    root: Any = brentq(g, low, high, xtol=1e-300, rtol=4 * np.finfo(float).eps, maxiter=200)
    return root


def _failed(reason: str, time: float) -> Failed:
    return Failed({0: (reason, time)}, apart=True)


def _check_finite(c: np.ndarray, times: np.ndarray) -> None:
    bad = ~np.isfinite(c).reshape(times.size, -1).all(1)
    if bad.any():
        raise Failed({0: ("has a condition that is not finite", float(times.ravel()[bad.argmax()]))}, apart=True)
