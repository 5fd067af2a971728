"""How errors of outputs decay under a frozen kernel A, from one Krylov basis that begins with them.

With the loss L = <e, m e> / Z, Z = <1, m>, for a mask m, one step of gradient descent at the rate eta gives

    e <- (1 - 2 eta / Z A m) e,    f <- (1 - eta H) f,    L = |f|^2,    f = (m / Z)^{1/2} e
    H = (2 / Z) m^{1/2} A m^{1/2}

in coordinates where the inner product is plain.

Source: Golub, Meurant, "Matrices, moments and quadrature" (1994), for norms of functions of H times f.
"""

from collections.abc import Callable

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, to_numpy
from kpflow_dyn._arrays.dots import gram, row_dots
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn._spaces.scaling import at_unit_size
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._orthogonalise import combine, no_rows

COLUMNS = 400  # of the basis at most
TOLERANCE = 1e-3  # of a loss, relative to it or to a thousandth of its first value


class Decay:
    """Errors e [error, *shape], and a Krylov basis of H that begins with them.

    Args:
        op: A, the kernel of the outputs.
        errors: e, a block of vectors of its space.
        mask: m >= 0, broadcastable to the shape of e; ones when None.

    Attributes:
        start: L of each error.
        applications: of A to one vector.
    """

    def __init__(self, op: Operator, errors: Array, mask: Array | None = None) -> None:
        space, xp = op.domain, array_namespace(errors)
        ones = xp.ones_like(errors[:1])
        weights = ones if mask is None else mask * ones
        Z = float(space.inner(weights, ones)[0])
        op, self._size = at_unit_size(op)
        root, apply = ((weights / Z) ** 0.5).reshape((1, -1)), on_rows(op)
        self._operator = Counted(lambda rows: 2 * root * apply(root * rows))
        self.rows = root * space.to_euclidean(errors).reshape((len(errors), -1))
        self.start = to_numpy(row_dots(self.rows, self.rows))
        self._krylov = Krylov(self._operator, no_rows(self.rows.shape[1], self.rows), Random(0), "LM")
        self._space = space

    def settle(self, curves: Callable[[np.ndarray, np.ndarray], np.ndarray], beside: int = 1) -> None:
        """Grow the basis until curves(rates [k], energies [error, k]) no longer change.

        The basis begins with `beside` random vectors as well, so that it finds the largest rate for any errors.
        """
        if not self.start.any():
            return
        self._krylov.begin(self.rows, len(self.rows))
        self._krylov.inject(beside)
        before = None
        while self._krylov.active and self._krylov.size < COLUMNS:
            self._krylov.expand()
            if self._krylov.size >= 8 * (beside + len(self.rows)) or not self._krylov.active:
                now = curves(self.rates, self.energies)
                if before is not None and np.allclose(now, before, rtol=TOLERANCE, atol=1e-12):
                    return
                before = now

    @property
    def rates(self) -> np.ndarray:
        """The Ritz values of H [k], none below zero."""
        return self._size.times(np.maximum(to_numpy(self._krylov.values), 0.0) if self._krylov.size else np.zeros(1))

    @property
    def energies(self) -> np.ndarray:
        """The part of L of each error along each Ritz vector [error, k]."""
        return self._coordinates() ** 2 if self._krylov.size else self.start[:, None]

    @property
    def applications(self) -> int:
        """Of A to one vector."""
        return self._operator.applications

    def vectors(self) -> tuple[np.ndarray, np.ndarray]:
        """The Ritz vectors [k, *shape], and the coordinates [k] of the first error along them."""
        krylov = self._krylov
        found = combine(krylov.rotation.T, krylov.basis)
        return to_numpy(found).reshape((-1, *self._space.shape)), self._coordinates()[0]

    def _coordinates(self) -> np.ndarray:
        """Of the errors along the Ritz vectors [error, k]."""
        basis = self._krylov.basis
        in_basis = np.concatenate([to_numpy(gram(self.rows, rows)) for rows in basis], 1)
        return in_basis @ to_numpy(self._krylov.rotation)
