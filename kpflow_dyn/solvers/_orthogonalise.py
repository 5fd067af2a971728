"""Orthonormal bases of row vectors, and the small float64 matrices that describe them.

Vectors stay on their device and in their dtype. Small matrices are float64 on that device too, save with jax, which
compiles every new shape and may lack float64: they are numpy arrays there.
"""

from collections.abc import Callable
from typing import Literal

import numpy as np

from kpflow_dyn._arrays import Array, Rows, array_namespace, device, eps_of, full_precision
from kpflow_dyn._arrays.dots import dots, gram, row_norms, to_double

Which = Literal["LA", "SA", "LM"]
ORDERS: dict[str, Callable[[Array], Array]] = {"LA": lambda x: x, "SA": lambda x: -x, "LM": abs}
"""How much an eigenvalue is wanted."""

MOST_PASSES = 3  # after the first
ILL_CONDITIONED = 1e-10  # smallest eigenvalue of a Gram matrix with unit diagonal for which Cholesky is trusted


def check_which(which: str) -> None:
    """Raise unless it is one of `ORDERS`."""
    if which not in ORDERS:
        raise ValueError(f"which is {which!r}, expected one of {', '.join(ORDERS)}")


def to_like(small: Array, like: Array) -> Array:
    """A small matrix in the library, dtype and device of the vectors `like`."""
    return array_namespace(like).asarray(small, dtype=like.dtype, device=device(like))


def combine(coefficients: Array, basis: list[Array]) -> Array:
    """coefficients [p, m] times the m rows of all the blocks of `basis` -> [p, n]."""
    total, at = None, 0
    for q in basis:
        with full_precision(q):
            part = to_like(coefficients[:, at : at + q.shape[0]], q) @ q
        total, at = part if total is None else total + part, at + q.shape[0]
    return total


def project_out(w: Array, basis: list[Array]) -> tuple[Array, Array]:
    """One pass: w less its projection on the rows of `basis`, and its coefficients there [rows of w, rows of basis]."""
    found = [to_double(w[:, :0])]
    for q in basis:
        if q.shape[0]:
            c = dots(w, q)
            w = w - combine(c, [q])
            found.append(c)
    return w, array_namespace(found[0]).concat(found, axis=1)


def ordered_eigh(matrix: Array, which: Which) -> tuple[Array, Array]:
    """Eigenvalues, the most wanted first, and eigenvectors as columns, of the symmetric part of a small matrix."""
    values, vectors = descending_eigh(matrix)
    if which == "LA":
        return values, vectors
    xp = array_namespace(matrix)
    order = xp.argsort(-ORDERS[which](values), stable=True)
    return values[order], vectors[:, order]


def descending_eigh(matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, descending, and eigenvectors as columns, of the symmetric part of a small matrix."""
    xp, matrix = array_namespace(matrix), (matrix + matrix.T) / 2
    try:
        values, vectors = xp.linalg.eigh(matrix)
    except (np.linalg.LinAlgError, RuntimeError):  # LAPACK's syevd, rarely, where many eigenvalues are equal
        values, vectors = xp.linalg.eigh(xp.flip(matrix))  # rows and columns in the other order
        vectors = xp.flip(vectors, axis=0)
    return xp.flip(values, axis=0), xp.flip(vectors, axis=1)


def rotate(rows: Array, images: Array, which: Which = "LA") -> tuple[Array, Array, Array]:
    """Rayleigh-Ritz on orthonormal rows with known images A rows: values, Ritz vectors, and rest A v - l v."""
    values, rotation = ordered_eigh(gram(rows, images), which)
    vectors, images = combine(rotation.T, [rows]), combine(rotation.T, [images])
    return values, vectors, images - to_like(values, vectors)[:, None] * vectors


def relative(residuals: Array, norm: float) -> Array:
    """Residuals over |l_1|; as they are for the zero operator."""
    return residuals / norm if norm > 0 else residuals


def orthonormalise(w: Array, basis: list[Array], floor: float) -> tuple[Array, Array, Array]:
    """Write w = c basis + r q with rows q orthonormal to each other and to `basis`, in two passes: q, c and r.

    Rows that are almost in the basis, such as those of round-off, take a third one.

    Rows w [b, n] whose rest is not larger than `floor`, or than the row's own round-off, count as dependent: q [p, n]
    has then fewer rows. c [b, rows of basis] and r [b, p] are float64; r is triangular for independent rows.

    Source: CholQR2, Yamamoto et al. (2015), with row-by-row Gram-Schmidt where the Gram matrix is ill-conditioned.
    """
    rest, c = project_out(w, basis)
    q, r = _orthonormal_rows(rest, basis, floor)
    for _ in range(MOST_PASSES):
        if not q.shape[0]:
            break
        rest, correction = project_out(q, basis)
        q, again = _orthonormal_rows(rest, basis, 4 * eps_of(w))
        c, r = c + r @ correction, r @ again
        if float(row_norms(rest).min()) > 0.5**0.5:
            break  # nothing was left in the basis
    return q, c, r


def _orthonormal_rows(w: Array, basis: list[Array], floor: float) -> tuple[Array, Array]:
    g = gram(w, w)
    if _well_conditioned(g, floor):
        return _cholesky_rows(w, g)
    q = _one_by_one(w, basis, floor)
    return q, gram(w, q)


def _cholesky_rows(w: Array, g: Array) -> tuple[Array, Array]:
    xp = array_namespace(g)
    lower = xp.linalg.cholesky(g)
    return combine(xp.linalg.inv(lower), [w]), lower


def _well_conditioned(g: Array, floor: float) -> bool:
    xp = array_namespace(g)
    size = xp.sqrt(xp.linalg.diagonal(g))
    if float(xp.min(size)) <= floor:
        return False
    return float(xp.linalg.eigvalsh(g / (size[:, None] * size[None, :]))[0]) > ILL_CONDITIONED


def _one_by_one(w: Array, basis: list[Array], floor: float) -> Array:
    found: list[Array] = []
    for i in range(w.shape[0]):
        row = w[i : i + 1]
        least = max(floor, eps_of(w) * float(row_norms(row)[0]))  # what is left of a dependent row is its round-off
        for _ in range(2):
            row, _coefficients = project_out(row, basis + found)
        size = float(row_norms(row)[0])
        if size > least:
            found.append(row / size)
    return array_namespace(w).concat([w[:0], *found], axis=0)


def diagonal(values: Array) -> Array:
    """The diagonal matrix of small values."""
    return array_namespace(values).eye(values.shape[0], dtype=values.dtype, device=device(values)) * values


def concat(parts: list[Array]) -> Array:
    """Blocks of rows, one after another."""
    return array_namespace(parts[0]).concat(parts, axis=0)


def no_rows(n: int, like: Array) -> Array:
    """A block [0, n]."""
    return array_namespace(like).zeros((0, n), dtype=like.dtype, device=device(like))


def rows_or_none(rows: Array | None, n: int, like: Array) -> Array:
    """The rows [b, n], perhaps none."""
    if rows is None:
        return no_rows(n, like)
    if rows.ndim != 2 or rows.shape[1] != n:
        raise ValueError(f"deflate has shape {tuple(rows.shape)}, expected rows [d, {n}]")
    return rows


def orthogonal_part(apply: Rows, known: Array) -> Rows:
    """The map followed by (1 - U U^T) for known rows U^T, perhaps none."""
    return lambda rows: project_out(apply(rows), [known])[0]


def with_sign(rows: Array) -> Array:
    """Each row [b, n] with its largest entry positive: eigenvectors are known up to their sign."""
    xp = array_namespace(rows)
    return xp.where((-xp.min(rows, axis=1) > xp.max(rows, axis=1))[:, None], -rows, rows)
