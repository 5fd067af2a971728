"""What an integrator of a gradient flow knows of the loss, and what it says of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kpflow_dyn._arrays import Array, Rows, eps_of
from kpflow_dyn._arrays.dots import row_dots

NOISE = 100  # changes of the loss below this many units of its round-off are taken for noise
TINY = float(np.finfo(float).tiny)
EXACT = 2.5  # gradients that a product with the Hessian by automatic differentiation costs


@dataclass(frozen=True, eq=False)
class Point:
    """The loss about a point."""

    theta: Array  # the point [n]
    loss: float  # L there
    gradient: Array  # grad L there [n]
    hessian: Rows  # products with its Hessian there, on rows [b, n]; a NoSecondDerivative where it has none
    around: Callable[[Array], tuple[float, Array]]  # L and grad L elsewhere, of the same discretisation of the model

    def gradient_at(self, theta: Array) -> Array:
        """grad L elsewhere [n]."""
        return self.around(theta)[1]


def check_finite(loss: float, steps: int) -> None:
    """Raise where training has left the finite numbers after so many steps."""
    if not math.isfinite(loss):
        raise RuntimeError(f"the loss is {loss} after {steps} steps: training diverges; take a smaller lr, or clip")


class NoSecondDerivative(ValueError):
    """A loss whose gradient cannot be differentiated."""


Landscape = Callable[[Array], Point]


class Piece(Protocol):
    """The loss along a step."""

    def __call__(self, s: float) -> float:
        """L at a time s after the step began."""
        ...


@dataclass(frozen=True, eq=False)
class Tried:
    """A step: its length, its error over the tolerance, and where it ends, unless it was given up before."""

    h: float
    ratio: float = float("inf")
    end: Point | None = None
    loss_error: float = 0.0
    piece: Piece | None = None


class Costs:
    """What was computed so far; a gradient costs one, a product with a Hessian by automatic differentiation `EXACT`."""

    def __init__(self) -> None:
        self.gradients: float = 0
        self.exact = self.differences = self.linearisations = 0

    @property
    def applications(self) -> int:
        """Products of a Hessian with a vector."""
        return self.exact + self.differences

    @property
    def total(self) -> float:
        """In gradients."""
        return self.gradients + self.differences + EXACT * self.exact


def rounding(point: Point, first: float) -> float:
    """The rounding error of the loss: that of a sum of squares with terms as large as at the start."""
    return NOISE * eps_of(point.theta) * (abs(point.loss) * first) ** 0.5


def norm(a: Array) -> float:
    """Of all entries."""
    return inner(a.reshape(-1), a.reshape(-1)) ** 0.5


def inner(a: Array, b: Array) -> float:
    """Of two vectors, in float64."""
    return float(row_dots(a[None], b[None])[0])
