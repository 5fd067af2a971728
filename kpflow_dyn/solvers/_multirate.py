"""An optimiser's own steps, many for one gradient where the gradient changes smoothly, and one by one elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._arrays.dots import row_dots

SPAN = 1e-3  # a direction of the history that is new by less than this part of its length is none
FASTEST, SLOWEST, SAFETY = 2.0, 0.2, 0.9  # by how much a stretch may grow and shrink, and a factor that keeps it short
WASTED = 0.1  # gradients of rejected stretches, at most this part of the steps
ALLOWED = 2  # and this many more
BLIND = 4  # steps at the start, one by one: bias corrections change faster than any history tells

Slope = Callable[[Array], tuple[float, Array]]  # theta -> the loss and its gradient there


class Rule(Protocol):
    """An optimiser as a function of its state."""

    def begin(self, theta: Array) -> Any:
        """The state before the first step."""
        ...

    def step(self, state: Any, theta: Array, gradient: Array) -> tuple[Any, Array]:
        """The state and the parameters after one more step."""
        ...


@dataclass(frozen=True)
class Multirate:
    """Options of `gradient_flow` with an optimiser: its own steps, with one gradient for several of them.

        g(theta) ~ g_k + Y S^+ (theta - theta_k),    S, Y: differences of the last places and of their gradients

    Between two gradients the optimiser itself takes r steps with this model of the gradient, so that momentum, second
    moments, bias corrections, weight decay and clipping are exactly its own. The gradient at the end corrects them, and
    the distance of both is the error, which chooses r. Where the loss rises, as at the edge of stability, r is 1: these
    steps are the optimiser's own, without error. An answer never takes many more gradients than the training itself.

    Args:
        history: how many differences the model of the gradient has.
        longest: most steps for one gradient.
        calm: so many steps in a row the loss must have fallen before r is more than 1; the start counts as calm.

    Raises:
        ValueError: options below one.
    Source: secant models as of Fang, Saad, Numer. Linear Algebra Appl. 16, 197 (2009); steps over many fine ones as of
    Gear, Kevrekidis, SIAM J. Sci. Comput. 24, 1091 (2003).

    >>> Multirate(history=3).longest
    64
    """

    history: int = 6
    longest: int = 64
    calm: int = 20

    def __post_init__(self) -> None:
        if min(self.history, self.longest, self.calm) < 1:
            raise ValueError(f"expected options of at least one, got {self}")


@dataclass(frozen=True, eq=False)
class Stretch:
    """The loss at each of some steps, from one where the gradient is known to the next."""

    losses: np.ndarray

    def __call__(self, s: float) -> float:
        """The loss s steps after the first."""
        return float(np.interp(s, np.arange(len(self.losses)), self.losses))


@dataclass(frozen=True, eq=False)
class _Known:
    """A place, with the loss and its gradient there."""

    theta: Array
    loss: float
    gradient: Array


class Descent:
    """A run of an optimiser from one point on, stretch after stretch.

    `time` counts its steps, `gradients` those that were computed, `own` the steps that were taken one by one, and
    `off` sums the errors of the loss that the others may have made. `state` is the optimiser's.
    """

    def __init__(self, slope: Slope, theta: Array, rule: Rule, steps: int, alg: Multirate, tolerance: float) -> None:
        self._slope, self._rule, self._alg, self._tolerance = slope, rule, alg, tolerance
        self.state, self.span = rule.begin(theta), steps
        self.time, self.gradients, self.own, self.off = 0, 1, 0, 0.0
        self.point = _Known(theta, *slope(theta))
        if not math.isfinite(squared(self.point.gradient)):
            raise ValueError("the gradient of the loss holds NaN or inf at the start, such as that of sqrt at zero")
        self._past, self._r, self._calm, self._rejected = [self.point], 1, alg.calm, 0

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.time >= self.span

    def advance(self) -> Stretch:
        """Go on to the next place where the gradient is computed."""
        while (found := self._tried(self._steps())) is None:
            self._rejected += 1
        return found

    def _steps(self) -> int:
        """How many steps to take with the model of the gradient."""
        free = self._rejected + 1 <= WASTED * self.time + ALLOWED
        calm = self._calm >= self._alg.calm and self.time >= BLIND
        return min(self._r, self._alg.longest, self.span - self.time) if calm and free else 1

    def _tried(self, r: int) -> Stretch | None:
        """r steps; None where their error is too large."""
        states, thetas, _ = self._run(r, self._past)
        end = self._known(thetas[-1])
        if r == 1:
            self._r = 2 if self._surprise(end) < self._tolerance**0.5 / 2 else 1
            self.own += 1
            return self._accepted(end, states[-1], np.array([self.point.loss, end.loss]), [end])
        states, corrected, slopes = self._run(r, [*self._past, end])
        late = _inner(end.gradient, corrected[-1] - end.theta)
        error = self._error(end, corrected[-1], late)
        if error > self._tolerance or end.loss > self.point.loss:
            self._r = max(1, int(r * max(SLOWEST, SAFETY * (self._tolerance / error) ** 0.5)))
            self._calm = 0 if end.loss > self.point.loss else self._calm
            return None
        self._r = max(1, int(min(FASTEST * r, r * SAFETY * (self._tolerance / max(error, 1e-6)) ** 0.5 + 0.5)))
        self.off += abs(late)
        losses = _losses(self.point.loss, end.loss + late, slopes)
        return self._accepted(replace(end, theta=corrected[-1], loss=losses[-1]), states[-1], losses, [end])

    def _run(self, r: int, known: list[_Known]) -> tuple[list[Any], list[Array], list[float]]:
        """States and places after each of r steps, with the gradient's model about the last known place.

        Third, how much each step changes the loss by this model.
        """
        model = SecantModel(known[-1 - self._alg.history :])
        state, theta, states, thetas, changes = self.state, self.point.theta, [], [], []
        gradient = model(theta) if known[-1] is not self.point else self.point.gradient
        for _ in range(r):
            before = theta, gradient
            state, theta = self._rule.step(state, theta, gradient)
            states.append(state)
            thetas.append(theta)
            if r > 1:
                gradient = model(theta)
                changes.append(_inner(gradient + before[1], theta - before[0]) / 2)
        return states, thetas, changes

    def _known(self, theta: Array) -> _Known:
        self.gradients += 1
        return _Known(theta, *self._slope(theta))

    def _surprise(self, end: _Known) -> float:
        """The part of a new gradient along itself that its model did not know."""
        missed = end.gradient - SecantModel(self._past[-1 - self._alg.history :])(end.theta)
        return abs(_inner(missed, end.gradient)) / max(squared(end.gradient), 1e-300)

    def _error(self, end: _Known, corrected: Array, late: float) -> float:
        """How far model and correction are apart, in the loss and in the parameters, relative to what they moved."""
        if not math.isfinite(end.loss):
            return math.inf
        moved = squared(corrected - self.point.theta) or 1e-300
        lost = abs(end.loss - self.point.loss) + 1e-12 * abs(self.point.loss)
        return max(abs(late) / max(lost, 1e-300), (squared(corrected - end.theta) / moved) ** 0.5)

    def _accepted(self, point: _Known, state: Any, losses: np.ndarray, known: list[_Known]) -> Stretch:
        r = len(losses) - 1
        self._calm = 0 if point.loss > self.point.loss else self._calm + r
        self._past = (self._past + known)[-1 - self._alg.history :]
        self.point, self.state, self.time = point, state, self.time + r
        return Stretch(losses)


class SecantModel:
    """g(theta) = g_k + Y S^+ (theta - theta_k) from known places, the last being k."""

    def __init__(self, known: list[_Known]) -> None:
        self._last, self._pairs = known[-1], []
        for later, earlier in zip(known[:0:-1], known[-2::-1], strict=True):  # the newest first
            self._add(later.theta - earlier.theta, later.gradient - earlier.gradient)

    def __call__(self, theta: Array) -> Array:
        """The gradient there."""
        away, gradient = theta - self._last.theta, self._last.gradient
        for direction, change in self._pairs:
            gradient = gradient + _inner(direction, away) * change
        return gradient

    def _add(self, moved: Array, changed: Array) -> None:
        """Make the difference orthonormal to those that are here, in the same combinations of changes."""
        before = squared(moved) ** 0.5
        for direction, change in self._pairs:
            along = _inner(direction, moved)
            moved, changed = moved - along * direction, changed - along * change
        length = squared(moved) ** 0.5
        if length > SPAN * before:
            self._pairs.append((moved / length, changed / length))


def squared(a: Array) -> float:
    """|a|^2."""
    return _inner(a, a)


def _losses(first: float, last: float, changes: list[float]) -> np.ndarray:
    """The loss after each step, changed so that it ends at the last one."""
    within = first + np.concatenate([[0.0], np.cumsum(changes)])
    return within + (last - within[-1]) * np.linspace(0, 1, len(within))


def _inner(a: Array, b: Array) -> float:
    return float(row_dots(a[None], b[None])[0])
