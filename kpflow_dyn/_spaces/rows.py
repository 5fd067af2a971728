"""Operators as callables on flat rows, in coordinates where every inner product is the plain one."""

from collections.abc import Iterator

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, device, eps_of, joined, to_numpy
from kpflow_dyn._arrays.dots import gram, row_norms
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._spaces.operators import GramOperator, Operator, check_operator
from kpflow_dyn._spaces.space import Space

TRIED = 4  # vectors that show whether an operator is symmetric
CHEAP = 512  # up to this many applications are spent on exact results


def on_rows(op: Operator) -> Rows:
    """The operator on blocks of rows [b, domain.size] -> [b, codomain.size]; a long block is applied in parts."""

    def apply(rows: Array) -> Array:
        q = op.domain.from_euclidean(rows.reshape((rows.shape[0], *op.domain.shape)))
        return op.codomain.to_euclidean(op.mv(q)).reshape((rows.shape[0], op.codomain.size))

    def in_parts(rows: Array) -> Array:
        if rows.shape[0] == 0:
            return op.codomain.xp.zeros((0, op.codomain.size), dtype=rows.dtype, device=device(rows))
        step = rows_at_once(max(op.domain.size, op.codomain.size), rows)
        return joined((apply(rows[i : i + step]) for i in range(0, rows.shape[0], step)), rows.shape[0])

    return in_parts


def sides_of(op: GramOperator) -> tuple[tuple[Rows, Rows], tuple[int, int]]:
    """The factor from the smaller side to the larger, its adjoint, and both sizes: A or its mirror J*J alike."""
    factor = op.factor if op.factor.domain.size <= op.domain.size else op.factor.T
    return (on_rows(factor), on_rows(factor.T)), (factor.codomain.size, factor.domain.size)


def unit_rows(space: Space) -> Iterator[Array]:
    """The rows of the identity [b, size], in blocks that fit the working memory."""
    eye = space.xp.eye(space.size, dtype=space.dtype, device=device(space.like))
    step = rows_at_once(space.size, space.like)
    yield from (eye[i : i + step] for i in range(0, space.size, step))


def between_counted(space: Space) -> tuple[Rows, Rows]:
    """Rows of all entries [b, size] -> of those that the mask counts [b, dimension], and back, with zeros elsewhere."""
    if space.mask is None:
        return (lambda rows: rows), (lambda rows: rows)
    counts = to_numpy(space.xp.broadcast_to(space.mask, space.shape)).reshape(-1)
    numbers = np.flatnonzero(counts), np.where(counts, np.cumsum(counts) - 1, counts.sum())
    xp, (kept, places) = space.xp, (space.xp.asarray(each, device=device(space.like)) for each in numbers)

    def back(rows: Array) -> Array:
        return xp.take(xp.concat([rows, xp.zeros_like(rows[:, :1])], axis=1), places, axis=1)

    return lambda rows: xp.take(rows, kept, axis=1), back


def on_counted(op: Operator) -> Rows:
    """`on_rows` of an operator from a space to itself, on rows of the entries that count [b, dimension]."""
    apply, (pick, back) = on_rows(op), between_counted(op.domain)
    return lambda rows: pick(apply(back(rows)))


def euclidean_matrix(op: Operator) -> Array:
    """The matrix in coordinates where the inner products are plain; symmetric when the operator is."""
    rows = op.codomain.to_euclidean(op.dense().T.reshape((op.domain.size, *op.codomain.shape)))
    columns = op.domain.from_euclidean(rows.reshape((op.domain.size, -1)).T.reshape((-1, *op.domain.shape)))
    return columns.reshape((op.codomain.size, op.domain.size))


def matrix_on_values(matrix: Array, space: Space) -> Array:
    """The inverse of `euclidean_matrix`, for an operator from a space to itself."""
    rows = space.to_euclidean(matrix.reshape((space.size, *space.shape))).reshape((space.size, space.size))
    return space.from_euclidean(rows.T.reshape((space.size, *space.shape))).reshape((space.size, space.size)).T


def is_symmetric(op: Operator, rng: Random) -> bool:
    """Whether A is its own adjoint: by construction, else by <y, A x> = <A y, x> for all pairs of a few random vectors.

    A single pair may satisfy this by chance.
    """
    if op.symmetric or not op.domain.matches(op.codomain):
        return op.symmetric
    rows = rng.normal((TRIED, op.domain.size), op.domain.like)
    images = on_rows(op)(rows)
    products = to_numpy(gram(rows, images))
    scale = float(row_norms(rows).max() * row_norms(images).max())
    return float(np.abs(products - products.T).max()) <= 0.1 * eps_of(rows) ** 0.5 * scale


def require_square(op: Operator, what: str) -> None:
    """Raise unless this is an operator that maps a space to itself."""
    check_operator(op)
    if not op.domain.matches(op.codomain):
        raise ValueError(f"{what} needs an operator from a space to itself, got {op!r}; take op @ op.T or op.T @ op")
