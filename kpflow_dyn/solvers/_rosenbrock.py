"""Gradient flow theta' = -grad L(theta) by exponential Rosenbrock steps: the Hessian at each step is taken exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kpflow_dyn._arrays import Array, Rows, array_namespace, eps_of
from kpflow_dyn._arrays.dots import row_dots
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._exponential import PhiProducts, phi

FIRST = np.array([[-1.0, 0.0, 0.0, 0.0]])  # the step of the linear equation: -h phi_1(-h H) g
KRYLOV = 0.1  # the error that a Krylov basis may add to a step, as a part of the error of the method itself
NOISE = 100  # changes of the loss below this many units of its round-off are taken for noise
FASTEST, SLOWEST, SAFETY = 50.0, 0.1, 0.9  # by how much a step may grow and shrink, and a factor that keeps it short
TINY = float(np.finfo(float).tiny)
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
class Point:
    """The loss about a point."""

    theta: Array  # the point [n]
    loss: float  # L there
    gradient: Array  # grad L there [n]
    hessian: Rows  # products with its Hessian there, on rows [b, n]
    gradient_at: Callable[[Array], Array]  # grad L elsewhere, of the same discretisation of the model


Landscape = Callable[[Array], Point]


@dataclass(frozen=True, eq=False)
class Piece:
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

    def ending(self, h: float, loss: float, slope: float) -> Piece:
        """The same, where it ends at h with this loss and slope."""
        height = loss - self(h)
        tilt = slope + float(self.squares @ np.exp(-2 * h * self.ritz))
        return replace(self, cubic=((3 * height / h - tilt) / h, (tilt - 2 * height / h) / h**2))


@dataclass(frozen=True, eq=False)
class _Tried:
    """A step: its length, its error over the tolerance, and where it ends, unless it was given up before."""

    h: float
    ratio: float = math.inf
    end: Point | None = None
    loss_error: float = 0.0
    piece: Piece | None = None


class Integration:
    """A run from one point on, step by step.

    A step is accepted when its estimated error is at most rtol of the distance that it moves the parameters, and of the
    decrease of the quadratic model, which makes an error of at most rtol h in time. `late` is the sum of these errors;
    `linearisations`, `gradients` and `applications` count steps, gradients and products with Hessians.
    """

    def __init__(
        self, landscape: Landscape, theta: Array, span: float, alg: ExponentialRosenbrock, rtol: float
    ) -> None:
        self._landscape, self._alg, self._rtol = landscape, alg, rtol
        self._method, self.span = METHODS[alg.order], span
        self._krylov = KRYLOV * rtol ** (alg.order / (alg.order - 1))  # the step is one order better than its estimate
        self.point, self.time, self.late = landscape(theta), 0.0, 0.0
        self.linearisations, self.gradients, self.applications = 0, 1, 0
        if not math.isfinite(self.slope):
            raise ValueError("the gradient of the loss holds NaN or inf at the start, such as that of sqrt at zero")
        self._first_loss, self._h, self._before = abs(self.point.loss), 0.0, 1.0

    @property
    def finished(self) -> bool:
        """Whether the span is over."""
        return self.time >= self.span

    @property
    def exhausted(self) -> bool:
        """Whether there were as many steps as there may be."""
        return self.linearisations >= self._alg.max_linearisations

    @property
    def slope(self) -> float:
        """dL/dtau = -|grad L|^2."""
        return -_inner(self.point.gradient, self.point.gradient)

    @property
    def error(self) -> float:
        """The relative error of the loss that the errors in time make."""
        return self.late * -self.slope / max(abs(self.point.loss), TINY)

    def advance(self) -> Piece:
        """Take a step, as long as the tolerance allows: the loss along it. A RuntimeError if none is short enough."""
        operator = Counted(self.point.hessian)
        basis = PhiProducts(operator, self.point.gradient[None], self._alg.columns)
        left, order = self.span - self.time, self._alg.order - 1
        tried = self._try(basis, operator, min(self._h or basis.time_scale(), left))
        while not tried.ratio <= 1:
            h = tried.h * max(SLOWEST, SAFETY * tried.ratio ** (-1 / order))
            if h < 1e-12 * min(left, basis.time_scale()):
                raise RuntimeError(_too_short(self.time, h))
            tried = self._try(basis, operator, h)
        growth = SAFETY * max(tried.ratio, 1e-9) ** (-0.8 / order) * self._before ** (0.2 / order)
        self._h, self._before = tried.h * min(max(growth, SLOWEST), FASTEST), max(tried.ratio, 1e-3)
        self.linearisations += 1
        self.applications += operator.applications
        return self._accept(tried, tried.h == left)

    def _accept(self, tried: _Tried, last: bool) -> Piece:
        assert tried.end is not None and tried.piece is not None
        self.point, self.time = tried.end, self.span if last else self.time + tried.h
        self.late += tried.loss_error / max(-self.slope, TINY)
        return tried.piece.ending(tried.h, self.point.loss, self.slope)

    def _try(self, basis: PhiProducts, operator: Counted, h: float) -> _Tried:
        h = basis.reach(h, FIRST, self._krylov, relative=True)
        piece = Piece(self.point.loss, *basis.spectrum)
        h = min(h, UNSTABLE / max(-piece.ritz.min(initial=0.0), UNSTABLE / h))
        lost = max(self.point.loss - piece(h), TINY)
        linear, defects = self._stages(basis, h)
        if not math.isfinite(norm(defects)):
            return _Tried(h)
        corrections = PhiProducts(operator, defects, self._alg.columns)
        left_out = self._krylov + KRYLOV * self._noise / lost
        if corrections.reach(h, self._method.weights, left_out * norm(linear) / h) < h:
            return _Tried(h)
        return self._judged(corrections, linear, h, piece, lost)

    def _judged(self, corrections: PhiProducts, linear: Array, h: float, piece: Piece, lost: float) -> _Tried:
        """The step with its corrections; the loss at its end is computed if the parameters are within the tolerance."""
        method, allowed = self._method, self._rtol + self._noise / lost
        error, curved = (h * a for a in corrections.sum(h, method.weights - method.embedded))
        ratio = norm(error) / max(norm(linear), TINY) / allowed
        if not ratio <= 1:
            return _Tried(h, ratio)
        end = self._landscape(self.point.theta + linear + h * corrections.sum(h, method.weights)[0])
        self.gradients += 1
        if not end.loss <= self.point.loss + self._rtol * abs(self.point.loss):
            return _Tried(h)
        loss_error = abs(_inner(end.gradient, error)) + abs(_inner(error, curved)) / 2
        return _Tried(h, max(loss_error / lost / allowed, ratio), end, loss_error, piece)

    def _stages(self, basis: PhiProducts, h: float) -> tuple[Array, Array]:
        """The step of the linear equation, and D of all stages [stage, n]."""
        point, defects = self.point, []
        moved = 0 * point.theta
        for c in self._method.nodes:
            moved, image = (c * h * a for a in basis.sum(c * h, FIRST))
            defects.append(point.gradient - point.gradient_at(point.theta + moved) + image)
            self.gradients += 1
        return moved, array_namespace(moved).stack(defects)

    @property
    def _noise(self) -> float:
        """The rounding error of the loss: that of a sum of squares with terms as large as at the start."""
        return NOISE * eps_of(self.point.theta) * (abs(self.point.loss) * self._first_loss) ** 0.5


def norm(a: Array) -> float:
    """Of all entries."""
    return _inner(a.reshape(-1), a.reshape(-1)) ** 0.5


def _inner(a: Array, b: Array) -> float:
    return float(row_dots(a[None], b[None])[0])


def _too_short(time: float, h: float) -> str:
    return (
        f"at time {time:.6g} no step is short enough, down to {h:.1e}: the loss is not smooth there (kinks as of relu, "
        "jumps, NaN), or float32 is too coarse for this rtol"
    )
