"""A = D_S F at a state, its inverse P, and how far 1 - A contracts, where a model is no recurrence and no network."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kpflow_dyn._arrays import Array, Rows, array_namespace, eps_of, like_numpy, to_numpy
from kpflow_dyn._arrays.dots import row_norms
from kpflow_dyn._arrays.linear_systems import iterate, on_host

DENSE = 1024  # unknowns of a row up to which its matrix is formed
SINGULAR = 0.01  # of 1 / eps: a larger condition number leaves no digits
TERMS = 200  # of a Neumann series that is worth more than GMRES


@dataclass(frozen=True)
class Inverse:
    """A^{-1} on blocks [probe, row, ...].

    Attributes:
        solve, solve_adjoint: the maps.
        method: "matrix", "Neumann" or "GMRES".
        condition: the condition number of A, the largest of all rows; None where it was not computed.
    """

    solve: Rows
    solve_adjoint: Rows
    method: str
    condition: float | None = None


@dataclass(frozen=True)
class StateDerivative:
    """A and its transpose on blocks [probe, row, ...], block diagonal over rows; `like` is the state [row, ...]."""

    apply: Rows
    adjoint: Rows
    like: Array

    @cached_property
    def matrices(self) -> np.ndarray | None:
        """The block of each row [row, n, n] in float64; None where they are large."""
        rows, *shape = self.like.shape
        n = math.prod(shape)
        if n > DENSE:
            return None
        unit = like_numpy(np.eye(n), self.like).reshape((n, 1, *shape))
        columns = self.apply(array_namespace(self.like).broadcast_to(unit, (n, rows, *shape)))
        return to_numpy(columns).astype(np.float64).reshape((n, rows, n)).transpose(1, 2, 0)

    def spectral_radius(self) -> float:
        """The largest |eigenvalue| of 1 - A: exact from its matrices, else by ARPACK to 1e-3."""
        from scipy.sparse.linalg import ArpackError, eigs

        if (A := self.matrices) is not None:
            finite = np.isfinite(A).all()
            return float(abs(np.linalg.eigvals(np.eye(A.shape[-1]) - A)).max()) if finite else math.nan
        operator = on_host(lambda v: v - self.apply(v[None])[0], self.like)
        start = np.random.default_rng(0).standard_normal(operator.shape[0]).astype(operator.dtype)
        if not operator.matvec(start).any():
            return 0.0
        try:
            return float(abs(eigs(operator, 1, tol=1e-3, v0=start, return_eigenvectors=False)).max())  # type: ignore
        except ArpackError as error:
            raise ValueError(f"the spectral radius of D_z f was not found: {error}; work in float64") from error

    def inverse(self) -> Inverse:
        """A^{-1}, by its matrices where they are small.

        Else by the Neumann series sum_k (1 - A)^k where that ends, as it does after as many terms as a recurrence has
        steps, or contracts fast; else by GMRES.
        """
        if self.matrices is not None:
            return self._by_matrices(self.matrices)
        start = like_numpy(np.random.default_rng(0).standard_normal((1, *self.like.shape)), self.like)
        if _ends(self.apply, start):
            return Inverse(_series(self.apply), _series(self.adjoint), "Neumann")
        return Inverse(_by_gmres(self.apply), _by_gmres(self.adjoint), "GMRES")

    def _by_matrices(self, A: np.ndarray) -> Inverse:
        condition = float(np.linalg.cond(A).max())
        if not condition < SINGULAR / eps_of(self.like):
            raise ValueError(
                f"D_S F is singular (condition number {condition:.1e}): the solution is not the only one nearby, and "
                "how it moves is not defined; add what fixes it (a leak, a gauge), or look at another point"
            )
        xp, inverses = array_namespace(self.like), like_numpy(np.linalg.inv(A), self.like)

        def by(matrices: Array) -> Rows:
            rows, n, _ = matrices.shape
            return lambda q: xp.einsum("bij,pbj->pbi", matrices, q.reshape((-1, rows, n))).reshape(q.shape)

        return Inverse(by(inverses), by(xp.permute_dims(inverses, (0, 2, 1))), "matrix", condition)


def _series(apply: Rows) -> Rows:
    """The Neumann series of A = 1 - N, to round-off."""

    def solve(q: Array) -> Array:
        found, term = q, q
        for _ in range(100 * TERMS):
            term = term - apply(term)
            found = found + term
            if _size(term) <= eps_of(q) * _size(found):
                return found
        raise RuntimeError(f"the Neumann series did not converge in {100 * TERMS} terms; please report this model")

    return solve


def _ends(apply: Rows, q: Array) -> bool:
    """Whether some hundred terms of the series are enough."""
    enough, term = eps_of(q) * _size(q), q
    for _ in range(TERMS):
        term = term - apply(term)
        if (size := _size(term)) <= enough or not np.isfinite(size):
            return size <= enough
    return False


def _by_gmres(apply: Rows) -> Rows:
    """Each probe by itself, to the precision of the dtype."""

    def one(q: Array) -> Array:
        found = iterate("gmres", lambda v: apply(v[None])[0], q, 10 * eps_of(q))
        error = _size(apply(found[None])[0] - q) / max(_size(q), 1e-300)
        if not error <= 1e5 * eps_of(q):
            raise ValueError(
                f"GMRES stopped at a residual of {error:.1e}: D_S F is singular or badly conditioned; look at the "
                "solution, or work in float64"
            )
        return found

    return lambda q: array_namespace(q).stack([one(probe) for probe in q])


def _size(q: Array) -> float:
    return float(row_norms(q.reshape((1, -1)))[0])
