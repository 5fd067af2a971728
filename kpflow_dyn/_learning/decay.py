"""How errors of outputs decay under a frozen kernel A, from one Krylov basis that begins with them.

With a loss L(y) of Hessian h and e = grad L, to second order about y, and one step of gradient descent at the rate eta

    f <- (1 - eta H) f        L = L_min + |f|^2 / 2        f = h^{-1/2} e        H = h^{1/2} A h^{1/2}

in coordinates where the inner product is plain. For L = <d, m d> / Z of d = y - target, Z = <1, m>, this is exact, with
h = 2 m / Z and f = h^{1/2} d.

A basis of finite length gives the loss from below (Gauss), and with one more node at the rate zero from above
(Gauss-Radau): what it has not resolved may be fast, or may not move at all. A number is certain where both agree.

Source: Golub, Meurant, "Matrices, moments and quadrature" (1994), for norms of functions of H times f.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, eps_of, to_numpy
from kpflow_dyn._arrays.dots import gram, row_dots
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn._spaces.scaling import at_unit_size
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._landscape import TINY
from kpflow_dyn.solvers._orthogonalise import combine, no_rows

COLUMNS = 400  # of the basis at most
TOLERANCE = 1e-3  # of a number between its two bounds, where the basis stops to grow
ROUND = 0.1  # rates are known to this part of themselves, or better, where they are above eps / ROUND of the largest
CERTAIN = 1e-2  # bounds that agree by this are one number

Spectrum = tuple[np.ndarray, np.ndarray]
"""Rates [k], and the parts of the loss at them: energies [error, k]."""

Numbers = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""What is asked of rates [k] and energies [error, k]."""


class Decay:
    """Errors [error, *shape], and a Krylov basis of H that begins with them.

    Args:
        op: A, the kernel of the outputs.
        f: a block of vectors of its space.
        root: h^{1/2}, symmetric, on rows [b, n].

    Attributes:
        start: |f|^2 / 2 of each error.
        applications: of A to one vector.
    """

    def __init__(self, op: Operator, f: Array, root: Rows) -> None:
        space = op.domain
        op, self._size = at_unit_size(op)
        apply = on_rows(op)
        self._operator = Counted(lambda rows: root(apply(root(rows))))
        self.rows = space.to_euclidean(f).reshape((len(f), -1))
        self.start = to_numpy(row_dots(self.rows, self.rows)) / 2
        self._krylov = Krylov(self._operator, no_rows(self.rows.shape[1], self.rows), Random(0), "LM")
        self._space = space

    def settle(self, numbers: Numbers, beside: int = 1) -> None:
        """Grow the basis until numbers(rates, energies) are certain, or as far as it may.

        The basis begins with `beside` random vectors as well, so that it finds the largest rate for any errors.
        """
        if not self.start.any():
            return
        self._krylov.begin(self.rows, len(self.rows))
        self._krylov.inject(beside)
        due = 4 * (beside + len(self.rows))
        while self._krylov.active and self._krylov.size < COLUMNS:
            self._krylov.expand()
            if self._krylov.size >= due:
                due = math.ceil(1.1 * self._krylov.size)
                if agree(numbers, self.lower, self.upper, TOLERANCE).all():
                    return

    @property
    def lower(self) -> Spectrum:
        """The Ritz values of H, none below zero."""
        if not self._krylov.size:
            return np.zeros(1), self.start[:, None]
        return self._scaled(to_numpy(self._krylov.values)), self._coordinates() ** 2 / 2

    @property
    def upper(self) -> Spectrum:
        """Those of H and one more block of rows, whose own entries are the smallest that leave H positive."""
        krylov = self._krylov
        if not krylov.size:
            return self.lower
        H, C, values = (to_numpy(array).astype(float) for array in (krylov.projected, krylov.coupling, krylov.values))
        turned = C @ to_numpy(krylov.rotation)
        known = values > 1e-13 * np.abs(values).max()
        corner = turned[:, known] / values[known] @ turned[:, known].T
        rates, vectors = np.linalg.eigh(np.block([[H, C.T], [C, corner]]))
        return self._scaled(rates), (self._in_basis() @ vectors[: len(H)]) ** 2 / 2

    @property
    def resolved(self) -> float:
        """Up to which time the rates that matter stand above the round-off of A; what is later is not known."""
        return ROUND / (eps_of(self.rows) * max(float(self.lower[0].max()), TINY))

    @property
    def applications(self) -> int:
        """Of A to one vector."""
        return self._operator.applications

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """The Ritz vectors [k, *shape], and the coordinates [k] of the first error along them, whose squares are L."""
        krylov = self._krylov
        found = combine(krylov.rotation.T, krylov.basis)
        return to_numpy(found).reshape((-1, *self._space.shape)), self._coordinates()[0] / 2**0.5

    def _scaled(self, rates: np.ndarray) -> np.ndarray:
        return self._size.times(np.maximum(rates, 0.0))

    def _in_basis(self) -> np.ndarray:
        """Of the errors in the basis [error, size]."""
        return np.concatenate([to_numpy(gram(self.rows, rows)) for rows in self._krylov.basis], 1)

    def _coordinates(self) -> np.ndarray:
        """Of the errors along the Ritz vectors [error, k]."""
        return self._in_basis() @ to_numpy(self._krylov.rotation)


def squares(op: Operator, errors: Array, mask: Array | None = None) -> Decay:
    """The decay of L = <d, m d> / <1, m> of errors d [error, *shape]; m >= 0 broadcasts to them, ones when None."""
    space, xp = op.domain, array_namespace(errors)
    ones = xp.ones_like(errors[:1])
    weights = ones if mask is None else mask * ones
    root = (2 * weights / float(space.inner(weights, ones)[0])) ** 0.5
    flat = root.reshape((1, -1))
    return Decay(op, root * errors, lambda rows: flat * rows)


def agree(numbers: Numbers, lower: Spectrum, upper: Spectrum, tolerance: float) -> np.ndarray:
    """Which numbers are the same by both bounds."""
    return np.isclose(numbers(*upper), numbers(*lower), rtol=tolerance, atol=1e-12)


def certain(numbers: Numbers, lower: Spectrum, upper: Spectrum) -> np.ndarray:
    """The numbers, NaN where the bounds differ."""
    return np.where(agree(numbers, lower, upper, CERTAIN), numbers(*lower), math.nan)
