"""Functions of a symmetric operator that solve linear equations, acting on vectors: sums of phi_k(-h A) b for any h."""

import math

import numpy as np

from kpflow_dyn._arrays import Array, Random, like_numpy, to_numpy
from kpflow_dyn._arrays.dots import gram
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._orthogonalise import combine, no_rows

ORDERS = 4
"""Sums reach from phi_1 to phi_4."""

SERIES = 18  # terms of the power series of phi_k, enough for |z| <= 1


def phi(z: np.ndarray, last: int) -> np.ndarray:
    """phi_0(z) = e^z, phi_k(z) = (phi_{k-1}(z) - 1 / (k-1)!) / z, up to phi_last: [k, ...].

    Near zero by the power series of phi_last and the recurrence downwards; upwards it would lose all digits.
    """
    small = np.abs(z) < 1
    near, far = np.where(small, z, 0.0), np.where(small, 1.0, z)
    up, down = [np.exp(far)], [np.polynomial.Polynomial([1 / math.factorial(j + last) for j in range(SERIES)])(near)]
    for k in range(1, last + 1):
        up.append((up[-1] - 1 / math.factorial(k - 1)) / far)
        down.append(near * down[-1] + 1 / math.factorial(last - k))
    return np.where(small, np.stack(down[::-1]), np.stack(up))


class PhiProducts:
    """Sums over k and rows b of w[b, k] phi_k(-h A) S_b, k = 1, ..., 4, from one Krylov basis that serves every h.

    The basis Q grows from the start rows S by full orthogonalisation; with A Q^T = Q^T H + P^T C for the next rows P,
    a sum is Q^T f(H) Q S, and its error to first order h |C w phi_{k+1}(-h H) Q S|.

    Source: Saad, SIAM J. Numer. Anal. 29, 209 (1992).
    """

    def __init__(self, operator: Counted, start: Array, columns: int) -> None:
        self._krylov = Krylov(operator, no_rows(start.shape[1], start), Random(0), "LM")
        self._krylov.begin(start, start.shape[0])
        self._start = to_numpy(gram(start, self._krylov.pending))
        self._columns, self._zeros = columns, 0.0 * start[0]

    def reach(self, h: float, weights: np.ndarray, tolerance: float, relative: bool = False) -> float:
        """Grow the basis until the sum is off by at most the tolerance: h, or less where the basis is full before.

        The tolerance is that of the error's Euclidean norm; relative to that of the sum where `relative`.
        """
        while not (self._spent or (self._krylov.size and self._error(h, weights, relative) <= tolerance)):
            if self._krylov.size + self._krylov.active > self._columns:
                h = h / 2
            else:
                self._krylov.expand()
        return h

    def sum(self, h: float, weights: np.ndarray) -> tuple[Array, Array]:
        """The sum [n], and A times it."""
        if not self._krylov.size:
            return self._zeros, self._zeros
        krylov, y = self._krylov, self._coefficients(h, weights, 0)
        H, C = to_numpy(krylov.projected), to_numpy(krylov.coupling)
        rows = [*krylov.basis, krylov.pending]
        both = np.stack([np.append(y, np.zeros(len(C))), np.append(H @ y, C @ y)])
        found = combine(like_numpy(both, krylov.projected), rows)
        return found[0], found[1]

    def time_scale(self) -> float:
        """1 / |A|, or what a few rows of the basis know of it."""
        while not self._spent and self._krylov.size < 3:
            self._krylov.expand()
        return 1 / self._krylov.norm if self._krylov.norm else math.inf

    @property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """The Ritz values, and the squares of the first start row's coordinates along their vectors."""
        return to_numpy(self._krylov.values), self._coordinates()[:, 0] ** 2

    @property
    def _spent(self) -> bool:
        """Whether the basis holds all that A makes of the start rows."""
        return not self._krylov.active

    def _error(self, h: float, weights: np.ndarray, relative: bool) -> float:
        lacks = h * np.linalg.norm(to_numpy(self._krylov.coupling) @ self._coefficients(h, weights, 1))
        return float(lacks / (np.linalg.norm(self._coefficients(h, weights, 0)) if relative else 1.0))

    def _coefficients(self, h: float, weights: np.ndarray, raised: int) -> np.ndarray:
        """Of the sum in the basis; `raised` takes phi_{k+1} for phi_k."""
        values = phi(-h * to_numpy(self._krylov.values), ORDERS + 1)[1 + raised : 1 + raised + ORDERS]
        return to_numpy(self._krylov.rotation) @ np.einsum("bk,km,mb->m", weights, values, self._coordinates())

    def _coordinates(self) -> np.ndarray:
        """Of the start rows along the Ritz vectors [ritz, b]."""
        return to_numpy(self._krylov.rotation)[: self._start.shape[1]].T @ self._start.T
