"""Gradient flow theta' = -grad L(theta) by explicit steps of many stages, stable far beyond those of plain descent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn.solvers._landscape import TINY, Costs, Landscape, Point, Tried, inner, norm, rounding

DAMPING = 2 / 13
MARGIN = 1.1  # by how much a step is made more stable than the curvature that is known needs
KEPT = 0.99  # how much of a curvature seen before is still believed a step later
STIFFER = 1.2  # by how much the error's own curvature must exceed the known one to be what limits a step
FIRST = 0.5  # the first step, in units of 1 / curvature along the gradient
WANDER = 2.0  # how many times rtol a step may be off in the parameters, relative to how far it goes
STIFF = 3.0  # a failed step whose cause is a stiff direction is tried again with this ratio at most
FAR = 10.0  # an error this many times as long as the step tells nothing
PROBES = 6  # one in so many attempts looks for the curvature along its error
SMALL = 1e-3  # a part of the parameters' norm by which the first curvature is found


@dataclass(frozen=True)
class RungeKuttaChebyshev:
    """Options of an explicit stabilised integrator of the gradient flow: gradients alone, no Hessian.

        Y_j = (1 - mu - nu) Y_0 + mu Y_{j-1} + nu Y_{j-2} - h (f g_{j-1} + f_0 g_0),    g_j = grad L(Y_j)

    A step of s gradients is stable up to 2/3 (s^2 - 1) / l_1, with l_1 the largest curvature, where as many steps of
    descent come to 2 s / l_1 at most. It is of second order; the curvature is that of the differences of its gradients.

    Args:
        stages: most gradients of a step; one that needs more is taken shorter.
        max_steps: how many steps there may be.

    Raises:
        ValueError: options out of range.
    Source: RKC of Sommeijer, Shampine, Verwer, J. Comput. Appl. Math. 88, 315 (1998).

    >>> RungeKuttaChebyshev(stages=30).stages
    30
    """

    stages: int = 60
    max_steps: int = 2_000

    def __post_init__(self) -> None:
        if self.stages < 2 or self.max_steps < 1:
            raise ValueError(f"expected stages >= 2 and max_steps >= 1, got {self}")


@dataclass(frozen=True)
class Stages:
    """Y_0 = y, Y_1 = y + h first F_0, Y_j = (1 - mu - nu) y + mu Y_{j-1} + nu Y_{j-2} + h (f F_{j-1} + f0 F_0).

    `rows` has mu, nu, f, f0 for j = 2, ..., s; Y_j is the solution at the time h `times[j]`.
    """

    first: float
    rows: tuple[tuple[float, float, float, float], ...]
    times: np.ndarray


@lru_cache
def stages_of(s: int) -> Stages:
    """The coefficients of s stages, from the polynomials of Chebyshev about w0 = 1 + damping / s^2."""
    w0 = 1 + DAMPING / s**2
    T, first, second = ([np.polynomial.Chebyshev.basis(j).deriv(k)(w0) for j in range(s + 1)] for k in range(3))
    w1 = first[s] / second[s]
    b = [second[max(j, 2)] / first[max(j, 2)] ** 2 for j in range(s + 1)]
    a = [1 - b_j * T_j for b_j, T_j in zip(b, T, strict=True)]
    rows = []
    for j in range(2, s + 1):
        mu, nu, f = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], 2 * b[j] * w1 / b[j - 1]
        rows.append((mu, nu, f, -a[j - 1] * f))
    times = [0.0, b[1] * w1, *(w1 * second[j] / first[j] for j in range(2, s + 1))]
    return Stages(float(b[1] * w1), tuple(rows), np.array(times))


def reach(s: int) -> float:
    """Up to which h l_1 a step of s stages is stable."""
    return 2 / 3 * (s**2 - 1) * (1 - 2 / 15 * DAMPING)


def stages_for(z: float) -> int:
    """The fewest stages that are stable for h l_1 = z."""
    return max(2, math.ceil((1.5 * z / (1 - 2 / 15 * DAMPING) + 1) ** 0.5))


@dataclass(frozen=True, eq=False)
class Curve:
    """The loss along a step: cubic between its stages, with the slopes -|grad L|^2 there."""

    times: np.ndarray
    losses: np.ndarray
    slopes: np.ndarray

    def __call__(self, s: float) -> float:
        """L at a time s after the step began."""
        i = min(max(int(np.searchsorted(self.times, s, side="right")) - 1, 0), len(self.times) - 2)
        h = self.times[i + 1] - self.times[i]
        u, (a, b), (p, q) = (s - self.times[i]) / h, self.losses[i : i + 2], h * self.slopes[i : i + 2]
        return float(a + u * (p + u * (3 * (b - a) - 2 * p - q + u * (2 * (a - b) + p + q))))


class ChebyshevSteps:
    """Attempts of steps; the largest curvature is learnt on the way.

    It is what the gradients of the stages differ by. That misses stiff directions along which nothing happens yet: they
    show in the error of a step, so that one further gradient along the error of a failed step finds them.
    """

    order = 2  # the error of a step over its length falls as this power of the length
    slowest, fastest = 0.3, 3.0  # by how much a step may shrink and grow

    def __init__(self, landscape: Landscape, alg: RungeKuttaChebyshev, rtol: float, costs: Costs) -> None:
        self._landscape, self._alg, self._rtol, self._costs = landscape, alg, rtol, costs
        self.curvature, self._attempts = 0.0, 0

    def time_scale(self, point: Point) -> float:
        """A first step: half of 1 / curvature along the gradient."""
        length = norm(point.gradient)
        moved = -SMALL * (norm(point.theta) or 1.0) / max(length, TINY) * point.gradient
        self.curvature = max(self.curvature, self._along(point, moved))
        return FIRST / max(self.curvature, TINY)

    def attempt(self, point: Point, h: float, first_loss: float) -> Tried:
        """A step of this length, or a shorter one where it would need too many stages."""
        h = min(h, reach(self._alg.stages) / max(MARGIN * self.curvature, TINY))
        s = stages_for(MARGIN * h * self.curvature)
        self.curvature *= KEPT
        theta, last, along = self._run(point, h, stages_of(s))
        end = self._landscape(theta)
        self._costs.gradients += 1
        if not math.isfinite(end.loss) or not math.isfinite(norm(end.gradient)):
            return Tried(h)
        self._see(end.gradient - last[1], theta - last[0], h, s)
        error = -0.8 * (theta - point.theta) - 0.4 * h * (point.gradient + end.gradient)
        found = Tried(h, 0.0, end, abs(inner(end.gradient, error)), _curve(along, stages_of(s), h, end))
        return self._judged(point, found, error, first_loss)

    def _run(
        self, point: Point, h: float, stages: Stages
    ) -> tuple[Array, tuple[Array, Array], list[tuple[float, float]]]:
        """Where the step ends; the last stage before with its gradient; losses and slopes at all stages before."""
        along = [(point.loss, -inner(point.gradient, point.gradient))]
        before, now, known = point.theta, point.theta - stages.first * h * point.gradient, point.gradient
        for mu, nu, f, f0 in stages.rows:
            loss, gradient = point.around(now)
            self._costs.gradients += 1
            self._see(gradient - known, now - before, h, len(stages.times))
            along.append((loss, -inner(gradient, gradient)))
            linear = (1 - mu - nu) * point.theta + mu * now + nu * before
            before, now, known = now, linear - h * (f * gradient + f0 * point.gradient), gradient
        return now, (before, known), along

    def _judged(self, point: Point, found: Tried, error: Array, first_loss: float) -> Tried:
        """The step with its error, as a ratio to what is allowed."""
        assert found.end is not None
        lost, moved = max(point.loss - found.end.loss, TINY), norm(found.end.theta - point.theta)
        allowed = self._rtol + rounding(point, first_loss) / lost
        ratio = max(norm(error) / max(moved, TINY) / WANDER, found.loss_error / lost) / allowed
        self._attempts += 1
        if (ratio > 1 or self._attempts % PROBES == 0) and 0 < norm(error) < FAR * moved:
            stiff = self._along(point, error)
            ratio = min(ratio, STIFF) if stiff > STIFFER * self.curvature else ratio
            self.curvature = max(stiff, self.curvature)
        return replace(found, ratio=ratio)

    def _see(self, change: Array, moved: Array, h: float, s: int) -> None:
        """Learn from two gradients; at a kink their difference tells no curvature, and is not believed beyond h."""
        seen = norm(change) / max(norm(moved), TINY)
        if math.isfinite(seen):
            self.curvature = max(self.curvature, min(seen, reach(2 * s) / h))

    def _along(self, point: Point, moved: Array) -> float:
        """|grad L(theta + moved) - grad L(theta)| / |moved|."""
        self._costs.gradients += 1
        found = norm(point.gradient_at(point.theta + moved) - point.gradient) / max(norm(moved), TINY)
        return found if math.isfinite(found) else 0.0


def _curve(along: list[tuple[float, float]], stages: Stages, h: float, end: Point) -> Curve:
    """Through the stages of second order."""
    chosen = [0, *range(3, len(along))]
    losses, slopes = np.array([*(along[i] for i in chosen), (end.loss, -inner(end.gradient, end.gradient))]).T
    return Curve(h * stages.times[[*chosen, -1]], losses, slopes)
