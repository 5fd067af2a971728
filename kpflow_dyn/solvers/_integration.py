"""A gradient flow step by step, by whichever method comes further for a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kpflow_dyn._arrays import Array
from kpflow_dyn.solvers._chebyshev import ChebyshevSteps, RungeKuttaChebyshev
from kpflow_dyn.solvers._counted import Asymmetric
from kpflow_dyn.solvers._descent import DescentSteps
from kpflow_dyn.solvers._landscape import TINY, Costs, Landscape, Piece, Tried, inner
from kpflow_dyn.solvers._rosenbrock import ExponentialRosenbrock, ExponentialSteps

Algorithm = ExponentialRosenbrock | RungeKuttaChebyshev

SAFETY = 0.9  # a factor that keeps steps short
PATIENCE = 150.0  # gradients after which the other method is given a step; twice as many before the next time
LONGER = 4.0  # the exponential step that is tried, in steps of the explicit method
GIVE_UP = 5  # attempts after which a step of a method that is on trial is given up
LATE = 2.0  # the largest error over the tolerance of a step that earlier ones left room for
STUBBORN = 0.5  # an error that falls less than this over a shorter step is one of a kink
KINK = 8.0  # by how much a step is shortened before it may be accepted for the loss alone
ROUNDING = 1e-12  # part of the span that is no step
SHORTEST, REST = 1e-12, 1e-6  # parts of the first attempt's length, and of the first loss
RECENT = 0.3  # weight of the latest step in the pace of a method


@dataclass(eq=False)
class _Way:
    """A method in use: the next step, the last error over the tolerance, and the time it gains for a gradient."""

    steps: ChebyshevSteps | ExponentialSteps | DescentSteps
    h: float = 0.0
    before: float = 1.0
    pace: float = 0.0
    trials: int = 0

    def propose(self, tried: Tried, cost: float) -> None:
        """The next step, after one that was accepted for so many gradients."""
        gained = tried.h / cost
        self.pace = gained if not self.pace else self.pace + RECENT * (gained - self.pace)
        order = self.steps.order
        growth = SAFETY * max(tried.ratio, 1e-9) ** (-0.8 / order) * self.before ** (0.2 / order)
        self.h = tried.h * min(max(growth, self.steps.slowest), self.steps.fastest)
        self.before = max(tried.ratio, 1e-3)


class GivenUp(Exception):
    """A step that would take too many attempts."""


class Integration:
    """A run from one point on, step by step.

    A step is accepted when its estimated error is at most rtol of the distance that it moves the parameters, and of the
    loss that it takes off, which makes an error of at most rtol h in time; or where earlier steps stayed so far below
    that all of them together are still within rtol. At a kink of the loss the error does not fall with h as it should:
    there a short step is accepted if the loss falls, with the error that it has. `late` is the sum of the errors in
    time; `costs` counts gradients, products with Hessians and the points where these were taken.

    With alg None the explicit method goes first, and the exponential one has a step now and then; the one that comes
    further in time for a gradient goes on. With a `rate` plain steps of descent go before both; `own` counts them.
    """

    def __init__(
        self,
        landscape: Landscape,
        theta: Array,
        span: float,
        alg: Algorithm | None = None,
        rtol: float = 0.05,
        rate: float | None = None,
    ) -> None:
        self.point, self.time, self.late, self.span = landscape(theta), 0.0, 0.0, span
        if not math.isfinite(self.slope):
            raise ValueError("the gradient of the loss holds NaN or inf at the start, such as that of sqrt at zero")
        self.costs, self.steps, self._rtol = Costs(), 0, rtol
        self.costs.gradients = 1
        self._ways = [_Way(steps) for steps in _methods(landscape, alg, rtol, self.costs)]
        self._last_resort, self._most = self._ways[0], _most_steps(alg)
        self._own = None if rate is None else DescentSteps(landscape, rate, self.costs)
        self._ways = ([_Way(self._own)] if self._own else []) + self._ways
        self._first_loss, self._spent, self._next_try = abs(self.point.loss), 0.0, PATIENCE

    @property
    def finished(self) -> bool:
        """Whether the span is over."""
        return self.time >= self.span

    @property
    def exhausted(self) -> bool:
        """Whether there were as many steps as there may be."""
        return self.steps >= self._most

    @property
    def own(self) -> int:
        """Steps of plain descent."""
        return 0 if self._own is None else self._own.taken

    @property
    def slope(self) -> float:
        """dL/dtau = -|grad L|^2."""
        return -inner(self.point.gradient, self.point.gradient)

    @property
    def error(self) -> float:
        """The relative error of the loss that the errors in time make."""
        return self.late * -self.slope / max(abs(self.point.loss), TINY)

    def advance(self) -> Piece:
        """Take a step, as long as the tolerance allows: the loss along it. A RuntimeError if none is short enough."""
        if self.slope == 0:
            return self._stay()
        self._sort()
        used, *others = self._ways
        if others and self.costs.total >= self._next_try:
            self._next_try *= 2
            other = min(others, key=lambda way: way.trials)
            other.h, other.trials = other.h or LONGER * used.h, other.trials + 1
            if not self._overshoots(look=True) and (piece := self._on_trial(other)) is not None:
                return piece
            self._sort()
        first = self._ways[0]
        piece = None if first is self._last_resort else self._on_trial(first)
        return piece or self._step(self._last_resort)

    def _on_trial(self, way: _Way) -> Piece | None:
        """A step, or None where this method does badly: not within a few attempts, or with no symmetric Hessian."""
        try:
            return self._step(way, GIVE_UP)
        except (Asymmetric, GivenUp):
            way.pace = 0.0
            self._sort()
            return None

    def _sort(self) -> None:
        """The method that comes further for a gradient first; descent that overshoots before all."""
        overshoots = self._overshoots()
        self._ways = sorted(self._ways, key=lambda way: -math.inf if way.steps is overshoots else -way.pace)

    def _overshoots(self, look: bool = False) -> DescentSteps | None:
        """Steps of descent that go beyond the lowest point along a direction: they have no limit of small steps.

        The curvature is what the explicit method knows of it; with `look` also that along the gradient.
        """
        explicit = self._last_resort.steps
        if self._own is None or not isinstance(explicit, ChebyshevSteps):
            return None
        if look:
            explicit.time_scale(self.point)
        return self._own if self._own.rate * explicit.curvature > 1 else None

    def _step(self, way: _Way, most: float = math.inf) -> Piece:
        """A step by this method, accepted after at most so many attempts; a `GivenUp` where that did not do."""
        began, left = self.costs.total, self.span - self.time
        way.h = longest = min(way.h or way.steps.time_scale(self.point), left)
        shortest = SHORTEST * max(longest, self.time)
        if longest < shortest:
            return self._rest(way.steps.attempt(self.point, REST * self.time, self._first_loss))
        tried, count, before = way.steps.attempt(self.point, way.h, self._first_loss), 1, math.inf
        while not self._accepts(tried, before, longest):
            if count >= most:
                raise GivenUp
            before = tried.ratio
            way.h = tried.h * max(way.steps.slowest, SAFETY * tried.ratio ** (-1 / way.steps.order))
            if way.h < shortest:
                return self._rest(tried)
            tried, count = way.steps.attempt(self.point, way.h, self._first_loss), count + 1
        way.propose(tried, self.costs.total - began)
        return self._accept(tried, tried.h == left)

    def _accepts(self, tried: Tried, before: float, longest: float) -> bool:
        """Whether a step will do, after one with this ratio, and after a first attempt of this length."""
        if tried.end is None or tried.ratio <= 1:
            return tried.ratio <= 1
        if not tried.end.loss < self.point.loss:
            return False
        left_room = tried.ratio <= LATE and self._spent + tried.ratio * tried.h <= self.time + tried.h
        at_a_kink = tried.h <= longest / KINK and tried.ratio > STUBBORN * before
        return left_room or at_a_kink

    def _accept(self, tried: Tried, last: bool) -> Piece:
        assert tried.end is not None and tried.piece is not None
        time = self.time + tried.h
        self.point, self.time = tried.end, self.span if last or time >= self.span * (1 - ROUNDING) else time
        self.late += tried.loss_error / max(-self.slope, TINY)
        self._spent += tried.ratio * tried.h
        self.steps += 1
        return tried.piece

    def _rest(self, tried: Tried) -> Piece:
        """Stay for the rest of the span, in a kink where no step however short lowers the loss; raise elsewhere."""
        risen = math.inf if tried.end is None else tried.end.loss - self.point.loss
        if not risen <= REST * self._first_loss:
            raise RuntimeError(_too_short(self.time, tried.h))
        return self._stay()

    def _stay(self) -> Piece:
        loss, self.time, self.steps = self.point.loss, self.span, self.steps + 1
        return lambda s: loss


def _methods(
    landscape: Landscape, alg: Algorithm | None, rtol: float, costs: Costs
) -> list[ChebyshevSteps | ExponentialSteps]:
    if isinstance(alg, ExponentialRosenbrock):
        return [ExponentialSteps(landscape, alg, rtol, costs)]
    explicit = ChebyshevSteps(landscape, alg or RungeKuttaChebyshev(), rtol, costs)
    return [explicit] if alg else [explicit, ExponentialSteps(landscape, ExponentialRosenbrock(), rtol, costs)]


def _most_steps(alg: Algorithm | None) -> int:
    """How many steps there may be."""
    return (
        alg.max_linearisations if isinstance(alg, ExponentialRosenbrock) else (alg or RungeKuttaChebyshev()).max_steps
    )


def _too_short(time: float, h: float) -> str:
    return (
        f"at time {time:.6g} no step is short enough, down to {h:.1e}: the loss jumps there, is NaN, or its gradient "
        "is not that of the loss (as of surrogate gradients); or float32 is too coarse for this rtol"
    )
