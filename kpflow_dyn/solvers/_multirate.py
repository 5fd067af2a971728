"""An optimiser's own steps, many for one gradient where the gradient changes smoothly, and one by one elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._arrays.dots import gram, row_norms
from kpflow_dyn.solvers._landscape import TINY, Costs, Landscape, Piece, Point, check_finite, inner, norm
from kpflow_dyn.solvers._orthogonalise import combine

NEW = 1e-3  # a difference that is new by less than this part of its length tells nothing
FASTEST, SLOWEST, SAFETY = 2.0, 0.2, 0.9  # by how much a stretch may grow and shrink, and a factor that keeps it short
SMOOTH = 0.5  # a gradient known within this part of the square root of the tolerance may do for two steps
WASTED, ALLOWED = 0.1, 0.6  # rejected stretches: at most this part of the steps, and this many more
BLIND = 4  # steps at the start, one by one: bias corrections change faster than any history tells
SHARE = 0.02  # of the steps so far, which the next ones are taken together
SPARSE, FEWEST = 0.2, 4  # steps on mini-batches between two looks at the loss of all trials: a part of those so far
DRAWS = 0.25  # a part of the time by which other draws may be off
SMALL = 1e-4  # a part of the gradient that no clipping reaches
FORWARD = 0.35  # gradients that a loss costs

Slope = Callable[[Array], tuple[float, Array]]  # theta -> a loss and its gradient there


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
    """Options of `gradient_flow` with an optimiser: its own steps, several of them for one gradient.

        grad L(theta) ~ g_k + Y S^+ (theta - theta_k),    S, Y: differences of the last places and of their gradients

    Between two gradients the optimiser itself takes r steps by this model of the gradient, so that momentum, second
    moments, bias corrections, weight decay and clipping are its own. The gradient at the end corrects them, and the
    distance of the two is the error, which chooses r. Where the loss rises, as at the edge of stability, r is 1: such
    steps are the optimiser's own, without error. All that never takes many more gradients than the training.

    Args:
        history: how many differences the model of the gradient has.
        longest: most steps for one gradient.
        calm: for so many steps, and as many more for each time that it has risen, the loss must have fallen before r is
            more than 1; at the start it counts as calm.

    Raises:
        ValueError: options below one.
    Source: secants as of Fang, Saad, Numer. Linear Algebra Appl. 16, 197 (2009); leaps over many fine steps as of Gear,
    Kevrekidis, SIAM J. Sci. Comput. 24, 1091 (2003).

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
    """The loss at each of some steps."""

    losses: np.ndarray

    def __call__(self, s: float) -> float:
        """L s steps after the first, linear in between."""
        return float(np.interp(s, np.arange(len(self.losses)), self.losses))


class OwnSteps:
    """A run of an optimiser from one point on, stretch after stretch, with the times of `Integration` in its steps.

    Args:
        goal: the part of the first loss at which it is finished, once any of its steps was there; None for no such.

    Attributes:
        own: how many steps were taken one by one, by the gradient itself.
        state: the optimiser's.
    """

    def __init__(
        self,
        landscape: Landscape,
        theta: Array,
        span: float,
        rule: Rule,
        alg: Multirate,
        tolerance: float,
        goal: float | None = None,
    ) -> None:
        self._landscape, self._rule, self._alg, self._tolerance = landscape, rule, alg, tolerance
        self.point, self._fresh = landscape(theta), rule.begin(theta)
        self.state, self._lowest = self._fresh, self.point.loss
        self._linear = is_linear(rule, self._fresh, self.point.gradient)
        self._goal = -math.inf if goal is None else goal * self.point.loss
        if not math.isfinite(self.slope):
            raise ValueError("the gradient of the loss holds NaN or inf at the start, such as that of sqrt at zero")
        self.time, self.span, self.steps, self.own, self.costs = 0, span, 0, 0, Costs()
        self.costs.gradients = 1
        self._known, self._r, self._calm, self._rejected = [self.point], 1, alg.calm, 0
        self._off, self._estimated, self._risen, self._rises = 0.0, 0.0, 0, 0

    @property
    def most(self) -> int:
        """How many gradients this may take: one a step, those at both ends, and those of rejected stretches."""
        return math.ceil((1 + WASTED) * self.span + ALLOWED + 1)

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or the goal was reached."""
        return self.time >= self.span or self._lowest < self._goal

    @property
    def exhausted(self) -> bool:
        """Never: there are as many steps as were asked for."""
        return False

    @property
    def slope(self) -> float:
        """-|grad L|^2."""
        return -inner(self.point.gradient, self.point.gradient)

    @property
    def late(self) -> float:
        """By how many steps this may be off: as estimated, and by as many as the loss rose, where estimates fail."""
        return self._estimated + self._risen

    @property
    def error(self) -> float:
        """The estimated relative error of the loss."""
        return self._off / max(abs(self.point.loss), TINY)

    def advance(self) -> Piece:
        """Go on for one in fifty of the steps so far, or to the next place where the gradient is computed."""
        goal, losses = min(self.time + SHARE * self.time, self.span), [np.array([self.point.loss])]
        while self.time < goal or len(losses) == 1:
            if (found := self._attempt(self._how_many())) is None:
                self._rejected += 1
            else:
                losses.append(found[1:])
        self.steps += 1
        return Stretch(np.concatenate(losses))

    def _how_many(self) -> int:
        """Steps by the model of the gradient; one where that is not to be had."""
        may_fail = self._rejected + 1 <= WASTED * self.time + ALLOWED
        calm = self._calm >= self._alg.calm * (1 + self._rises) and self.time >= BLIND
        r = min(self._r, self._alg.longest, int(self.span - self.time)) if calm and may_fail else 1
        return 1 if r > 1 and self._linear and saturates(self._rule, self._fresh, self.point.gradient) else r

    def _attempt(self, r: int) -> np.ndarray | None:
        """The losses from here on for this many steps; None where their error is too large."""
        states, thetas, _ = self._stepped(r, self._known)
        end = self._at(thetas[-1])
        if r == 1:
            check_finite(end.loss, self.time + 1)
            self._r = 2 if self._foreseen(end) else 1
            self.own += 1
            return self._accept(end, states[-1], np.array([self.point.loss, end.loss]), end)
        states, thetas, changes = self._stepped(r, [*self._known, end])
        late = inner(end.gradient, thetas[-1] - end.theta)
        error = self._error_of(end, thetas[-1], late)
        rises = not end.loss <= self.point.loss
        growth = SAFETY * (self._tolerance / max(error, 1e-6)) ** 0.5
        if error > self._tolerance or rises:
            self._r, self._calm = max(1, int(r * max(SLOWEST, growth))), 0 if rises else self._calm
            return None
        self._r = max(1, round(r * min(FASTEST, growth)))
        losses = _through(self.point.loss, end.loss + late, changes)
        self._off += abs(late)
        self._estimated += error * r
        return self._accept(replace(end, theta=thetas[-1], loss=float(losses[-1])), states[-1], losses, end)

    def _stepped(self, r: int, known: list[Point]) -> tuple[list[Any], list[Array], list[float]]:
        """States and places after each of r steps, and how much each changes the loss, by the gradient's model."""
        model, exact = self._model(known), known[-1] is self.point
        state, theta, states, thetas, changes = self.state, self.point.theta, [], [], []
        gradient = self.point.gradient if exact else model(theta)
        for _ in range(r):
            before = theta, gradient
            state, theta = self._rule.step(state, theta, gradient)
            states.append(state)
            thetas.append(theta)
            if r > 1:
                gradient = model(theta)
                changes.append(inner(gradient + before[1], theta - before[0]) / 2)
        return states, thetas, changes

    def _at(self, theta: Array) -> Point:
        self.costs.gradients += 1
        return self._landscape(theta)

    def _model(self, known: list[Point]) -> SecantModel:
        return SecantModel(known[-1 - self._alg.history :])

    def _foreseen(self, end: Point) -> bool:
        """Whether the model of the gradient knew a new one so well that it may do without the next."""
        if self._calm < self._alg.calm or not math.isfinite(end.loss):
            return False
        missed = inner(end.gradient - self._model(self._known)(end.theta), end.gradient)
        return abs(missed) < SMOOTH * self._tolerance**0.5 * inner(end.gradient, end.gradient)

    def _error_of(self, end: Point, corrected: Array, late: float) -> float:
        """How far the model's end is from the corrected one, in the loss and in the parameters, as parts of the way."""
        if not math.isfinite(end.loss):
            return math.inf
        apart, moved = corrected - end.theta, corrected - self.point.theta
        in_loss = abs(late) / max(abs(end.loss - self.point.loss), TINY)
        return max(in_loss, (inner(apart, apart) / max(inner(moved, moved), TINY)) ** 0.5)

    def _accept(self, point: Point, state: Any, losses: np.ndarray, known: Point) -> np.ndarray:
        r, rises = len(losses) - 1, not point.loss <= self.point.loss
        self._lowest = min(self._lowest, *losses)
        self._calm = 0 if rises else self._calm + r
        self._risen += rises and self.own < self.time
        self._rises += rises
        self._known = [*self._known, known][-1 - self._alg.history :]
        self.point, self.state, self.time = point, state, self.time + r
        return losses


def is_linear(rule: Rule, fresh: Any, gradient: Array) -> bool:
    """Whether a first step is linear in gradients that no clip reaches: that of descent is, that of Adam is not."""
    once, twice = (_first_step(rule, fresh, scale * gradient) for scale in (SMALL, 2 * SMALL))
    return norm(twice - 2 * once) < 1e-3 * norm(twice)


def saturates(rule: Rule, fresh: Any, gradient: Array) -> bool:
    """Whether a first step that is linear in small gradients is shorter at this one, as where its norm is clipped.

    Such steps keep their length at the edge of stability, where the loss may fall on while they bounce from side to
    side. How soon they begin to depends on the last digit of the gradient.
    """
    small, whole = (_first_step(rule, fresh, scale * gradient) for scale in (SMALL, 1.0))
    return SMALL * norm(whole) < 0.99 * norm(small)


def _first_step(rule: Rule, fresh: Any, gradient: Array) -> Array:
    """By how much it differs from one without a gradient, at theta = 0, where no digits are lost."""
    start = 0 * gradient
    return rule.step(fresh, start, gradient)[1] - rule.step(fresh, start, start)[1]


class DrawnSteps:
    """A run of an optimiser on mini-batches: each step is its own, and the loss of all trials is computed at some.

    Args:
        loss: of all trials.
        draws: for each step the function theta -> loss and gradient of its trials.
        share: the part of all trials that a batch is.
    """

    exhausted, error = False, 0.0

    def __init__(
        self,
        loss: Callable[[Array], float],
        draws: Iterator[Slope],
        share: float,
        theta: Array,
        span: float,
        rule: Rule,
    ) -> None:
        self._loss, self._draws, self._share, self._rule = loss, draws, share, rule
        self.point = Point(theta, loss(theta), 0 * theta, lambda rows: rows, lambda _other: (math.nan, theta))
        self._state = rule.begin(theta)
        self.time, self.span, self.steps, self.costs, self._risen = 0, span, 0, Costs(), 0
        self.costs.gradients = FORWARD

    @property
    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.time >= self.span

    @property
    def own(self) -> int:
        """All."""
        return self.time

    @property
    def slope(self) -> float:
        """-|g|^2 of the last batch."""
        return -inner(self.point.gradient, self.point.gradient)

    @property
    def late(self) -> float:
        """By how many steps another seed may be off: more where the loss of all trials rises in between."""
        return DRAWS * self.time + self._risen

    def advance(self) -> Piece:
        """Some steps, and the loss after them."""
        before, r = self.point, min(max(FEWEST, int(SPARSE * self.time)), int(self.span) - self.time)
        theta, gradient = before.theta, before.gradient
        for _ in range(r):
            of_batch, gradient = next(self._draws)(theta)
            check_finite(of_batch, self.time)
            self._state, theta = self._rule.step(self._state, theta, gradient)
        self.point = replace(before, theta=theta, loss=self._loss(theta), gradient=gradient)
        check_finite(self.point.loss, self.time + r)
        self.costs.gradients += r * self._share + FORWARD
        self.time, self.steps = self.time + r, self.steps + 1
        self._risen += r * (self.point.loss > before.loss)
        both = before.loss, self.point.loss
        return Stretch(np.geomspace(*both, r + 1) if min(both) > 0 else np.linspace(*both, r + 1))


class SecantModel:
    """g(theta) = g_k + Y S^+ (theta - theta_k) from known places, the last being k."""

    def __init__(self, known: list[Point]) -> None:
        theta, xp = known[-1].theta, array_namespace(known[-1].theta)
        self._last, self._moved, self._changed = known[-1], theta[None][:0], theta[None][:0]
        if len(known) > 1:
            thetas, gradients = xp.stack([p.theta for p in known]), xp.stack([p.gradient for p in known])
            self._moved, self._changed = thetas[1:] - thetas[:-1], gradients[1:] - gradients[:-1]
        lengths = to_numpy(row_norms(self._moved))
        lengths = lengths + (lengths == 0)
        values, vectors = np.linalg.eigh(to_numpy(gram(self._moved, self._moved)) / np.outer(lengths, lengths))
        kept = values > NEW**2 * max(values, default=0.0)
        unit = vectors[:, kept] / lengths[:, None]
        self._inverse = unit / values[kept] @ unit.T

    def __call__(self, theta: Array) -> Array:
        """The gradient there."""
        along = to_numpy(gram((theta - self._last.theta)[None], self._moved)) @ self._inverse
        return self._last.gradient + combine(along, [self._changed])[0]


def _through(first: float, last: float, changes: list[float]) -> np.ndarray:
    """The loss after each step: the changes, and a part of what they miss at the end."""
    within = first + np.concatenate([[0.0], np.cumsum(changes)])
    return within + (last - within[-1]) * np.linspace(0, 1, len(within))
