"""Gradient flow theta' = -grad L(theta) by exponential Rosenbrock steps: the Hessian at each step is taken exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from kpflow_dyn._arrays import Array, Rows, array_namespace, eps_of
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._exponential import PhiProducts, phi
from kpflow_dyn.solvers._landscape import (
    TINY,
    Costs,
    Landscape,
    NoSecondDerivative,
    Point,
    Tried,
    inner,
    norm,
    rounding,
)

FIRST = np.array([[-1.0, 0.0, 0.0, 0.0]])  # the step of the linear equation: -h phi_1(-h H) g
KRYLOV = 0.1  # the error that a Krylov basis may add to a step, as a part of the error of the method itself
UNLIKE = 1e-2  # by how much a product and a difference of gradients may differ where both are right
COARSE = 1e2  # differences of gradients serve where the tolerance of the Krylov basis is this many times their error
UNSTABLE = 10.0  # a step ends before anything has grown by more than e to this power


@dataclass(frozen=True)
class Scheme:
    """u_1 = u + h phi_1(hJ) F(u) + h sum_ik w_ik phi_k(hJ) D_i, D_i = F(U_i) - F(u) - J (U_i - u).

    Here F = -grad L, J = -H, and the stages U_i = u + c_i h phi_1(c_i hJ) F(u) lie on the linear equation's solution.
    """

    nodes: tuple[float, ...]  # c [stage]
    weights: np.ndarray  # w [stage, 4]
    embedded: np.ndarray  # those of a solution of one order less; the distance to it estimates the error


METHODS = {
    3: Scheme((1.0,), np.array([[0.0, 0, 2, 0]]), np.zeros((1, 4))),
    4: Scheme((0.5, 1.0), np.array([[0.0, 0, 16, -48], [0, 0, -2, 12]]), np.array([[0.0, 0, 16, 0], [0, 0, -2, 0]])),
}


@dataclass(frozen=True)
class ExponentialRosenbrock:
    """Options of an exponential Rosenbrock integrator of the gradient flow, with the full Hessian H in the exponent.

        theta_1 = theta - h phi_1(-h H) g + corrections,        phi_1(z) = (e^z - 1) / z,    g = grad L(theta)

    A step solves the flow of the loss's quadratic model exactly, however stiff it is, and corrects it by the gradients
    at one or two further points. Functions of the Hessian act by a Lanczos basis that begins with the gradient, and by
    one that begins with the corrections; a rejected step uses the first again.

    Args:
        order: 3 for exprb32, one further gradient a step; 4 for pexprb43, two.
        columns: most rows of a Krylov basis; a step that needs more is taken shorter.
        max_linearisations: how many steps there may be.

    Raises:
        ValueError: options out of range.
    Source: exprb32 of Hochbruck, Ostermann, Schweitzer, SIAM J. Numer. Anal. 47, 786 (2009); pexprb43 of Luan,
    Ostermann, J. Comput. Appl. Math. 291, 465 (2016).

    >>> ExponentialRosenbrock(order=3).order
    3
    """

    order: int = 4
    columns: int = 200
    max_linearisations: int = 1000

    def __post_init__(self) -> None:
        if self.order not in METHODS or self.columns < 2 or self.max_linearisations < 1:
            raise ValueError(f"expected order 3 or 4, columns >= 2 and max_linearisations >= 1, got {self}")


@dataclass(frozen=True, eq=False)
class ModelPiece:
    """The loss along a step: that of the quadratic model, plus a cubic that fits loss and slope at the end.

    L(s) = L - s sum_j c_j phi_1(-2 l_j s) + a s^2 + b s^3 with Ritz values l, and squared coordinates c of the
    gradient along their vectors.
    """

    loss: float
    ritz: np.ndarray
    squares: np.ndarray
    cubic: tuple[float, float] = (0.0, 0.0)

    def __call__(self, s: float) -> float:
        """L at a time s after the step began."""
        a, b = self.cubic
        lost = s * float(self.squares @ phi(-2 * s * self.ritz, 1)[1])
        return self.loss - lost + s**2 * (a + b * s)

    def ending(self, h: float, loss: float, slope: float) -> ModelPiece:
        """The same, where it ends at h with this loss and slope."""
        height = loss - self(h)
        tilt = slope + float(self.squares @ np.exp(-2 * h * self.ritz))
        return replace(self, cubic=((3 * height / h - tilt) / h, (tilt - 2 * height / h) / h**2))


class ExponentialSteps:
    """Attempts of steps; those from one point share a Krylov basis.

    A product with the Hessian is a difference of two gradients where that is exact enough for the tolerance, as it
    costs less than half; and where second derivatives do not exist.
    """

    slowest, fastest = 0.1, 50.0  # by how much a step may shrink and grow

    def __init__(self, landscape: Landscape, alg: ExponentialRosenbrock, rtol: float, costs: Costs) -> None:
        self._landscape, self._alg, self._rtol, self._costs = landscape, alg, rtol, costs
        self._method, self.order = METHODS[alg.order], alg.order - 1
        self._krylov = KRYLOV * rtol ** (alg.order / self.order)  # the step is one order better than its estimate
        self._point: Point | None = None
        self._smooth: bool | None = None  # whether gradients have the derivative that automatic differentiation says

    def time_scale(self, point: Point) -> float:
        """1 / l_1, or what a few products tell of it."""
        self._begin(point)
        return self._basis.time_scale()

    def attempt(self, point: Point, h: float, first_loss: float) -> Tried:
        """A step of this length, or a shorter one where the basis is full or something grows too much."""
        self._begin(point)
        noise = rounding(point, first_loss)
        h = self._basis.reach(h, FIRST, self._krylov, relative=True)
        piece = ModelPiece(point.loss, *self._basis.spectrum)
        h = min(h, UNSTABLE / max(-piece.ritz.min(initial=0.0), UNSTABLE / h))
        lost = max(point.loss - piece(h), TINY)
        linear, defects = self._stages(point, h)
        if not math.isfinite(norm(defects)):
            return Tried(h)
        corrections = PhiProducts(self._operator, defects, self._alg.columns)
        left_out = self._krylov + KRYLOV * noise / lost
        if corrections.reach(h, self._method.weights, left_out * norm(linear) / h) < h:
            return Tried(h)
        return self._judged(corrections, linear, Tried(h, piece=piece), lost, self._rtol + noise / lost)

    def _begin(self, point: Point) -> None:
        if point is self._point:
            return
        self._point, self._operator = point, Counted(self._products(point))
        self._basis = PhiProducts(self._operator, point.gradient[None], self._alg.columns)
        self._costs.linearisations += 1

    def _products(self, point: Point) -> Rows:
        """By differences where these are exact enough, or where the gradient has no derivative."""
        exact, differences, limit = point.hessian, _differences(point, self._costs), COARSE * eps_of(point.theta) ** 0.5
        if self._krylov >= limit:
            return differences
        self._costs.gradients += 1  # once more, with a graph

        def products(rows: Array) -> Array:
            if self._smooth is None:
                self._smooth = _has_derivative(exact, differences, rows[:1])
                self._krylov = self._krylov if self._smooth else limit
            if not self._smooth:
                return differences(rows)
            self._costs.exact += rows.shape[0]
            return exact(rows)

        return products

    def _judged(self, corrections: PhiProducts, linear: Array, tried: Tried, lost: float, allowed: float) -> Tried:
        """The step with its corrections; the loss at its end is computed if the parameters are within the tolerance."""
        assert self._point is not None and isinstance(tried.piece, ModelPiece)
        method, point, h = self._method, self._point, tried.h
        error, curved = (h * a for a in corrections.sum(h, method.weights - method.embedded))
        ratio = norm(error) / max(norm(linear), TINY) / allowed
        if not ratio <= 1:
            return Tried(h, ratio)
        end = self._landscape(point.theta + linear + h * corrections.sum(h, method.weights)[0])
        self._costs.gradients += 1
        if not end.loss <= point.loss + self._rtol * abs(point.loss):
            return Tried(h)
        loss_error = abs(inner(end.gradient, error)) + abs(inner(error, curved)) / 2
        ending = tried.piece.ending(h, end.loss, -inner(end.gradient, end.gradient))
        return Tried(h, max(loss_error / lost / allowed, ratio), end, loss_error, ending)

    def _stages(self, point: Point, h: float) -> tuple[Array, Array]:
        """The step of the linear equation, and D of all stages [stage, n]."""
        moved, defects = 0 * point.theta, []
        for c in self._method.nodes:
            moved, image = (c * h * a for a in self._basis.sum(c * h, FIRST))
            defects.append(point.gradient - point.gradient_at(point.theta + moved) + image)
            self._costs.gradients += 1
        return moved, array_namespace(moved).stack(defects)


def _has_derivative(exact: Rows, differences: Rows, row: Array) -> bool:
    """Whether both agree; a backward pass without a derivative is an error, or is taken for a constant."""
    try:
        found, other = exact(row)[0], differences(row)[0]
    except NoSecondDerivative:
        return False
    return norm(found - other) <= UNLIKE * max(norm(other), TINY) + eps_of(row) ** 0.5


def _differences(point: Point, costs: Costs) -> Rows:
    """H v = (grad L(theta + d v) - grad L(theta)) / d for rows v of length one."""
    d = eps_of(point.theta) ** 0.5 * max(1.0, norm(point.theta))

    def products(rows: Array) -> Array:
        costs.differences += rows.shape[0]
        found = [(point.gradient_at(point.theta + d * row) - point.gradient) / d for row in rows]
        return array_namespace(rows).stack(found)

    return products
