"""P = A^{-1} and its adjoint for A = D_S F: a linear solve where a model is no recurrence and no network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn.arrays import Array, Rows, array_namespace, is_torch_array, like_numpy, to_numpy

DENSE = 1024  # unknowns of a row up to which its matrix is formed
SINGULAR = 0.01  # of 1 / eps: a larger condition number leaves no digits


@dataclass(frozen=True)
class Inverse:
    """A^{-1} on blocks [probe, row, ...].

    Attributes:
        solve, solve_adjoint: the maps.
        method: "matrix", "Neumann" or "GMRES".
        condition: the condition number of A, the largest of all rows; None where it was not computed.
        spectral_radius: of 1 - A, the largest of all rows; None likewise.
    """

    solve: Rows
    solve_adjoint: Rows
    method: str
    condition: float | None = None
    spectral_radius: float | None = None


def inverse_of(apply: Rows, adjoint: Rows, rows: int, shape: tuple[int, ...], like: Array) -> Inverse:
    """The inverse of a map A that is block diagonal over rows, of vectors [probe, row, *shape].

    Its matrices where they are small; else the Neumann series sum_k (1 - A)^k where that ends, as it does after as many
    terms as a recurrence has steps, or contracts fast; else GMRES.

    Raises:
        ValueError: where A is singular to the precision of the dtype.
    """
    if int(np.prod(shape)) <= DENSE:
        return _by_matrix(apply, rows, shape, like)
    series = _Series(apply)
    if series.ends(like_numpy(np.random.default_rng(0).standard_normal((1, rows, *shape)), like)):
        return Inverse(series, _Series(adjoint), "Neumann")
    return Inverse(_by_gmres(apply), _by_gmres(adjoint), "GMRES")


def _by_matrix(apply: Rows, rows: int, shape: tuple[int, ...], like: Array) -> Inverse:
    n, xp = int(np.prod(shape)), array_namespace(like)
    unit = like_numpy(np.eye(n), like).reshape((n, 1, *shape))
    columns = apply(xp.broadcast_to(unit, (n, rows, *shape))).reshape((n, rows, n))
    matrices = to_numpy(xp.permute_dims(columns, (1, 2, 0))).astype(np.float64)  # [row, n, n]
    condition = float(np.linalg.cond(matrices).max())
    if not condition < SINGULAR / np.finfo(to_numpy(like).dtype).eps:
        raise ValueError(
            f"D_S F is singular (condition number {condition:.1e}): the solution is not the only one nearby, and how "
            "it moves is not defined; add what fixes it (a leak, a gauge), or look at another point"
        )
    radius = float(abs(np.linalg.eigvals(np.eye(n) - matrices)).max())
    inverses = like_numpy(np.linalg.inv(matrices), like)

    def by(matrices: Array) -> Rows:
        def apply(q: Array) -> Array:
            return xp.einsum("bij,pbj->pbi", matrices, q.reshape((-1, rows, n))).reshape(q.shape)

        return apply

    return Inverse(by(inverses), by(xp.permute_dims(inverses, (0, 2, 1))), "matrix", condition, radius)


class _Series:
    """The Neumann series of A = 1 - N."""

    most = 10_000

    def __init__(self, apply: Rows) -> None:
        self.apply = apply

    def __call__(self, q: Array) -> Array:
        found, term, eps = q, q, _eps(q)
        for _ in range(self.most):
            term = term - self.apply(term)
            found = found + term
            if _size(term) <= eps * _size(found):
                return found
        raise RuntimeError(f"the Neumann series did not converge in {self.most} terms; please report this model")

    def ends(self, q: Array) -> bool:
        """Whether some hundred terms are enough."""
        start, term = _size(q), q
        for _ in range(200):
            term = term - self.apply(term)
            if (size := _size(term)) <= _eps(q) * start:
                return True
            if not np.isfinite(size):
                return False
        return False


def _by_gmres(apply: Rows) -> Rows:
    """Each probe by itself, to the precision of the dtype."""

    def solve(q: Array) -> Array:
        gmres = _gmres_of_scipy if is_torch_array(q) or isinstance(q, np.ndarray) else _gmres_of_jax
        return array_namespace(q).stack([gmres(lambda v: apply(v[None])[0], probe) for probe in q])

    return solve


def _gmres_of_scipy(apply: Callable[[Array], Array], q: Array) -> Array:
    from scipy.sparse.linalg import LinearOperator, gmres

    make: Any = LinearOperator  # whose subclass takes these keywords

    def matvec(v: np.ndarray) -> np.ndarray:
        return to_numpy(apply(like_numpy(v.reshape(q.shape), q))).ravel()

    b, eps = to_numpy(q).ravel(), _eps(q)
    found, info = gmres(make((b.size,) * 2, matvec, dtype=b.dtype), b, rtol=10 * eps, restart=100, maxiter=50)
    _check(apply, like_numpy(found.reshape(q.shape), q), q, info)
    return like_numpy(found.reshape(q.shape), q)


def _gmres_of_jax(apply: Callable[[Array], Array], q: Array) -> Array:
    from jax.scipy.sparse.linalg import gmres

    found, info = gmres(apply, q, tol=10 * _eps(q), restart=100, maxiter=50)
    _check(apply, found, q, info)
    return found


def _check(apply: Callable[[Array], Array], found: Array, q: Array, info: object) -> None:
    error = _size(apply(found) - q) / max(_size(q), 1e-300)
    if not error <= 1e5 * _eps(q):
        raise ValueError(
            f"GMRES stopped at a residual of {error:.1e} ({info}): D_S F is singular or badly conditioned; look at the "
            "solution, or work in float64"
        )


def _size(q: Array) -> float:
    return float((q * q).sum()) ** 0.5


def _eps(q: Array) -> float:
    return float(array_namespace(q).finfo(q.dtype).eps)
