"""Steps of plain descent, where these are what is asked for."""

import math

import numpy as np

from kpflow_dyn.solvers._landscape import Costs, Landscape, Point, Tried, check_finite

SHARE = 0.02  # of the steps of descent so far, which the next ones are taken together


class DescentSteps:
    """Steps of descent at a rate, without error.

    Attributes:
        rate: of descent.
        taken: how many.
    """

    order, slowest, fastest = 1, 1.0, math.inf

    def __init__(self, landscape: Landscape, rate: float, costs: Costs) -> None:
        self._landscape, self.rate, self._costs, self.taken = landscape, rate, costs, 0

    def time_scale(self, _point: Point) -> float:
        """The rate."""
        return self.rate

    def attempt(self, point: Point, h: float, _first_loss: float) -> Tried:
        """Some steps; a shorter one where less than the rate is left."""
        lengths = self._lengths(h)
        losses = [point.loss]
        for length in lengths:
            point = self._landscape(point.theta - length * point.gradient)
            losses.append(point.loss)
            check_finite(point.loss, self.taken + len(losses) - 1)
        self._costs.gradients += len(lengths)
        self.taken += len(lengths)
        ends = np.cumsum([0.0, *lengths])
        return Tried(float(ends[-1]), 0.0, point, 0.0, lambda s: float(np.interp(s, ends, losses)))

    def _lengths(self, left: float) -> list[float]:
        """Of the next steps, one in fifty of those before."""
        whole = min(max(1, int(SHARE * self.taken)), int(left / self.rate * (1 + 1e-9)))
        return [self.rate] * whole or [left]
