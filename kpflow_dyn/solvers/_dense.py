"""Eigenpairs, singular triplets and traces by way of the whole matrix: exact, for small dimensions."""

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, to_numpy
from kpflow_dyn._arrays.dots import products
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn.solvers._certify import Certificate, InPlace, OfProduct, Result
from kpflow_dyn.solvers._counted import Counted, Product
from kpflow_dyn.solvers._doors import OfOperator
from kpflow_dyn.solvers._lanczos import Callback, check_request
from kpflow_dyn.solvers._matrix import identity
from kpflow_dyn.solvers._moments import Moments, exact
from kpflow_dyn.solvers._orthogonalise import Which, no_rows, orthogonal_part, rows_or_none
from kpflow_dyn.solvers._results import Eigenpairs, Triplets


@dataclass(frozen=True)
class Dense(OfOperator):
    """All of A V = V diag(l), from the matrix: the operator applied to the identity, decomposed in float64.

    It takes n applications, 24 n^2 bytes and about 10 n^3 flops, for n up to 20,000; multiplicities and the smallest
    eigenvalues are right for any spectrum. For J J* and J it takes the matrix J* J on the parameters.

    Args:
        tol: the residual that counts as converged.
    Source: Anderson et al., "LAPACK users' guide" (1999): syevd and gesdd.

    >>> import numpy as np
    >>> Dense().solve(lambda rows: rows * np.array([1.0, 3.0, 2.0]), 3, 2, like=np.zeros(1)).values
    array([3., 2.])
    """

    tol: float = 1e-6

    def moments(self, apply: Rows, n: int, samples: int = 0, *, like: Array, seed: int | Random = 0) -> Moments:
        """tr A and |A|_F^2 of any operator on rows [b, n], exact, from n applications; `samples` play no part."""
        rows, step = identity(no_rows(n, like)), rows_at_once(n, like)
        parts = (rows[i : i + step] for i in range(0, n, step))
        sums = sum(products(part, apply(part)).sum(1) for part in parts)
        return exact(np.asarray(sums), n, "exact: applied to the identity")

    def solve(
        self,
        apply: Rows,
        n: int,
        k: int,
        *,
        like: Array,
        seed: int | Random = 0,
        which: Which = "LA",
        deflate: Array | None = None,
        callback: Callback | None = None,
    ) -> Eigenpairs:
        """As `BlockLanczos.solve`, without a start; `callback` is called once."""
        known = rows_or_none(deflate, n, like)
        check_request(k, None, known)
        operator = Counted(orthogonal_part(apply, known))
        return _of_matrix(InPlace(operator, self.tol, Random(seed), which), known, k, callback)

    def solve_product(
        self,
        forward: Rows,
        backward: Rows,
        p: int,
        k: int,
        *,
        like: Array,
        seed: int | Random = 0,
        squared: bool = False,
        callback: Callback | None = None,
    ) -> Triplets:
        """As `BlockLanczos.solve_product`, without a start; `callback` is called once."""
        known = no_rows(p, like)
        check_request(k, None, known)
        certificate = OfProduct(Product(forward, backward), self.tol, Random(seed), squared)
        return _of_matrix(certificate, known, k, callback)


def _of_matrix(certificate: Certificate[Result], known: Array, k: int, callback: Callback | None) -> Result:
    found = certificate.of_matrix(known, k)
    if callback is not None:
        callback(found.calls, to_numpy(found.residuals))
    certificate.warn(found)
    return found
