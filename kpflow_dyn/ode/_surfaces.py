"""Where the state of a trial crosses the surfaces on which conditions of events are zero.

Steps are first looked at by their dense output (`_looks`). In a step where something may happen, the conditions are
taken at the ends of steps of the method itself, shorter ones from the same beginning, and the length at which one of
them vanishes is the event: value and derivative then belong to one map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar

from kpflow_dyn._problems.events import LOOKS
from kpflow_dyn.ode._libraries import Failed
from kpflow_dyn.ode._looks import Looks, Steps, Trial, check_finite, parts_of

FLAT, SHARP = 1e-3, 1e-6  # of a step: a condition that is continuous has about the same slope over both
HALVINGS = 30  # of the first look, where a trial begins on a surface
ROUND_OFF = 1e3  # of a condition, in units of the dtype's, and of the largest value that it had
GRAZING = 1e-6  # slope of a condition over a step that is not too short, in units of its largest value there
SHORT = 1e-3  # part of a trial: shorter steps, as to a time of the grid, do not say how fast it is
NEARER = 0.5  # how much nearer to zero a parabola through looks comes, where its bottom is looked for
REST = 100  # slope behind a jump, in units of what rounding makes of it
AT_ONCE = 64  # events at one time

Values = Callable[[np.ndarray], np.ndarray]  # lengths [n] -> the conditions there [n, event]


@dataclass(frozen=True)
class Crossing:
    """An event, and the step and its length at which it happens."""

    event: int
    step: int
    length: float


class Surfaces:
    """On which side of each surface a trial is: 1, -1, or 0 where it is on it and has not left it yet."""

    def __init__(self, events: Any, trial: Trial, round_off: float, span: float, looks: int) -> None:
        self.numbers = tuple(n for n, event in enumerate(events) if event.condition is not None)
        self.directions = np.array([events[n].direction for n in self.numbers])
        self.trial, self.round_off, self.span, self.looks = trial, ROUND_OFF * round_off, span, Looks(trial, looks)
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
            c = self.at(now, y)
            self.started_on = abs(c) <= self.round_off * np.abs(y).max()
            self.sides = np.where(self.started_on, 0, np.sign(c))

    def first_crossing(self, steps: Steps) -> Crossing | None:
        """The first event in these steps, or None; sides are those at its time, or at their end."""
        for place, c in enumerate(self.looks.at(steps)):
            self.largest = np.maximum(self.largest, np.abs(c).max(0))  # not of what lies behind an event
            small = self.round_off * self.largest
            c = self.looks.resolved(steps, place, c, small)
            if _may_happen(self.sides, c, small) and (found := self._inside(steps, place, c)) is not None:
                return found
        return None

    def thrown(self, now: float, y: np.ndarray) -> list[int]:
        """The events that happen as the inputs jump across their surfaces, not the state."""
        c = self.at(now, y)
        on = abs(c) <= self.round_off * self.largest
        found = [n for n in range(len(self.numbers)) if not on[n] and self.sides[n] * c[n] < 0]
        happens = [self.numbers[n] for n in found if self._fires(n)]
        self.sides[found] = np.sign(c[found])
        return happens

    def crossed(self, number: int, located: bool, now: float, before: np.ndarray, after: np.ndarray) -> list[int]:
        """The events that the jump of one makes happen, as it takes the state across their surfaces."""
        if self.none:
            return []
        c, old = self.at(now, after), self.at(now, before)
        on = abs(c) <= self.round_off * np.maximum(self.largest, abs(old))
        happens = []
        for n, other in enumerate(self.numbers):
            if other == number:
                near = on[n] or (located and abs(c[n]) <= 2 * abs(old[n]))  # as near as times can tell
                self.sides[n] = 0 if near else np.sign(c[n])
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

    def is_on(self, number: int) -> bool:
        """Whether the trial is on the surface of an event."""
        return self.sides[self.numbers.index(number)] == 0

    def at(self, now: float, y: np.ndarray) -> np.ndarray:
        """The conditions at a time."""
        c = self.trial.conditions(np.array([now]), y[:, None])
        check_finite(c, np.array([now]))
        return c[0]

    def _fires(self, n: int) -> bool:
        """Whether the event happens where its surface is left behind from this side."""
        return self.directions[n] != self.sides[n]

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
            for at, side, fires in _changes(self.directions[n], g[:, n], sides[n], first, small[n]):
                if fires:
                    sides[n] = side
                    found.append(_Bracket(0.0 if at == 0 else float(lengths[at - 1]), float(lengths[at]), n, side))
                    break
        if not found:
            self.sides = np.array([_side_after(g[:, n], small[n], self.sides[n]) for n in range(len(self.numbers))])
            return None
        root, n = _first_root(value, found)
        alone, part = (lambda h: value(h)[:, n]), LOOKS / (len(looks) // 2)
        slope = _slope(alone, root, length, FLAT * part)
        if not slope / length * max(length, SHORT * self.span) > GRAZING * self.largest[n]:
            raise _failed(f"meets the surface of event {self.numbers[n]} with hardly any speed", begin + root)
        if _slope(alone, root, length, SHARP * part) > 0.1 * FLAT / SHARP * slope:
            raise _failed(f"has a condition of event {self.numbers[n]} that jumps across zero", begin + root)
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
        """The side that a trial takes from a surface, by values g [length], and from where on.

        Raise where it rests; but one where all is zero stays there.

        The slope says the same. Where it does not, the trial has come back already, between two looks.
        """
        if not g.any():  # by its equations, as a clock that has run down
            return 0.0, len(g)
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

    def _check_start(self, n: int, side: float, begin: float) -> None:
        self.started_on[n] = False
        if self.directions[n] in (0, side):
            raise _failed(
                f"begins on the surface of event {self.numbers[n]} and leaves it in the direction of the event", begin
            )


def arriving(surfaces: Surfaces, now: float, y: np.ndarray) -> int | None:
    """An event whose surface the trial has just come to, but for round-off."""
    on = np.abs(surfaces.at(now, y)) <= surfaces.round_off * surfaces.largest
    found = np.flatnonzero(on & (surfaces.sides != 0) & (surfaces.directions != surfaces.sides))
    return surfaces.numbers[found[0]] if len(found) else None


def _may_happen(sides: np.ndarray, c: np.ndarray, small: np.ndarray) -> bool:
    """Whether, of c [look, event], a trial leaves a surface, or crosses it, or may between two looks, or ends on it."""
    every, leaves = sides * c, (sides == 0) & c.any(0)
    happens = leaves.any() or (every[1:] <= 0).any() or (every[-1] <= small).any()
    return bool(happens or _dips(c).any())


def _dips(c: np.ndarray) -> np.ndarray:
    """Beside which looks of c [look, event], but the first and the last, |c| has a bottom that may be zero.

    It is that of the parabola through a look and its neighbours.
    """
    side, apart = np.sign(c[1:-1]), np.diff(parts_of(len(c) // 2))[:, None]
    slopes = np.diff(c, axis=0) / apart
    slope, bend = side * slopes[:-1], side * np.diff(slopes, axis=0) / (apart[1:] + apart[:-1])
    ahead = apart[:-1] / 2 - slope / (2 * np.where(bend > 0, bend, np.inf))  # from the look before
    bottom = side * c[:-2] + ahead * (slope + bend * (ahead - apart[:-1]))
    begin, end = apart[:-1] / 2, apart[:-1] + apart[1:] / 2  # what is nearer to other looks is theirs
    begin[0], end[-1] = 0, apart[-2] + apart[-1]
    nearest = np.min([side * c[:-2], side * c[1:-1], side * c[2:]], axis=0)
    return (nearest > 0) & (bend > 0) & (ahead >= begin) & (ahead <= end) & (bottom <= NEARER * nearest)


def _changes(direction: int, g: np.ndarray, side: float, first: int, small: float) -> Iterator[tuple[int, float, bool]]:
    """Where values g [length] change their side: (place, the side before, whether that is the event).

    What is zero at the end of a step, but for round-off, has changed it, so that an event comes before a time of the
    grid with which it falls together.
    """
    for at in range(first, len(g)):
        if g[at] * side <= (small if at == len(g) - 1 else 0):
            yield at, side, direction != side
            side = -side


def _side_after(g: np.ndarray, small: float, side: float) -> float:
    """The side behind values g [length]: that of the last one that is not zero."""
    away = g[abs(g) > small]
    return np.sign(away[-1]) if len(away) else side


def _slope(value: Callable[[np.ndarray], np.ndarray], root: float, length: float, part: float) -> float:
    """How much a condition changes over a step, by its slope where it is zero; not of what comes behind the step."""
    ends = np.array([max(root - part * length, 0.0), max(min(root + part * length, length), root)])
    before, after = value(ends)
    return abs(after - before) / (ends[1] - ends[0]) * length


def _lengths(sides: np.ndarray, length: float, looks: np.ndarray, value: Values) -> np.ndarray:
    """At which a step is looked at: evenly, at the bottom of dips, and near its beginning on a surface."""
    count = len(looks) // 2
    even = length * np.arange(1, count + 1) / count
    parts = [length * parts_of(count)[1:]]
    if ((sides == 0) & looks.any(0)).any():
        parts.append(even[0] * 0.5 ** np.arange(1, HALVINGS + 1))
    for before, n in np.argwhere(_dips(looks)).tolist():
        low, high = length * parts_of(count)[[before, before + 2]]
        parts.append(_bottom(value, float(np.sign(looks[before + 1, n])), n, low, high))
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
        check_finite(c, begin + lengths[:, None])
        return c

    return values


class _Bracket(NamedTuple):
    """Between which lengths the condition of an event leaves a side."""

    low: float
    high: float
    n: int
    side: float


def _first_root(value: Values, brackets: list[_Bracket]) -> tuple[float, int]:
    """The smallest length at which one of the conditions leaves its side, and which; not all of them are solved for."""
    first, *others = sorted(brackets)
    root, n = _root_in(value, first), first.n
    for other in others:
        if other.low <= root and other.side * value(np.array([root]))[0, other.n] <= 0:
            root, n = min((root, n), (_root_in(value, other._replace(high=min(other.high, root))), other.n))
    return root, n


def _root_in(value: Values, bracket: _Bracket) -> float:
    return _root(lambda h: value(h)[:, bracket.n], bracket.side, bracket.low, bracket.high)


def _root(value: Values, side: float, low: float, high: float) -> float:
    """The length between two at which the values leave a side."""

    def g(h: float) -> float:
        return side * float(value(np.array([h]))[0])

    if g(low) <= 0:
        return low
    if g(high) >= 0:
        return high
    root: Any = brentq(g, low, high, xtol=1e-300, rtol=4 * np.finfo(float).eps, maxiter=200)
    return root


def _failed(reason: str, time: float) -> Failed:
    return Failed({0: (reason, time)}, apart=True)
