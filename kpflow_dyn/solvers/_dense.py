"""Eigenpairs and singular triplets by way of the whole matrix: exact, for small dimensions."""

from __future__ import annotations

from dataclasses import dataclass

from kpflow_dyn._arrays import Array, Random, Rows
from kpflow_dyn.solvers._certify import Certificate, InPlace, OfProduct, Result
from kpflow_dyn.solvers._counted import Counted, Product
from kpflow_dyn.solvers._lanczos import Callback, check_request
from kpflow_dyn.solvers._orthogonalise import Which, no_rows, orthogonal_part, rows_or_none
from kpflow_dyn.solvers._results import Eigenpairs, Triplets


@dataclass(frozen=True)
class Dense:
    """All of A V = V diag(l), from the matrix: the operator applied to the identity, decomposed in float64.

    It takes n applications, 24 n^2 bytes and about 10 n^3 flops, for n up to 20,000; multiplicities and the smallest
    eigenvalues are right for any spectrum. For J J* and J it takes the matrix J* J on the parameters.

    Args:
        tol: the residual that counts as converged.

    Source: Anderson et al., "LAPACK users' guide" (1999): syevd and gesdd.

    Example:
        >>> import numpy as np
        >>> Dense().solve(lambda rows: rows * np.array([1.0, 3.0, 2.0]), 3, 2, like=np.zeros(1)).values
        array([3., 2.])
    """

    tol: float = 1e-6

    def solve(
        self,
        apply: Rows,
        n: int,
        k: int,
        *,
        like: Array,
        seed: int | Random = 0,
        which: Which = "LA",
        start: Array | None = None,
        deflate: Array | None = None,
        callback: Callback | None = None,
    ) -> Eigenpairs:
        """As `BlockLanczos.solve`; `start` and `callback` are not used."""
        known = rows_or_none(deflate, n, like)
        check_request(k, start, known)
        operator = Counted(orthogonal_part(apply, known))
        return _of_matrix(InPlace(operator, self.tol, Random(seed), which), known, k)

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
        start: Array | None = None,
        callback: Callback | None = None,
    ) -> Triplets:
        """As `BlockLanczos.solve_product`; `start` and `callback` are not used."""
        known = no_rows(p, like)
        check_request(k, start, known)
        return _of_matrix(OfProduct(Product(forward, backward), self.tol, Random(seed), squared), known, k)


def _of_matrix(certificate: Certificate[Result], known: Array, k: int) -> Result:
    found = certificate.of_matrix(known, k)
    certificate.warn(found)
    return found
