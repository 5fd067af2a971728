"""Inner products of long rows, in float64.

Vectors stay on their device and in their dtype. Small matrices are float64 on that device too, save with jax, which
compiles every new shape and may lack float64: they are numpy arrays there.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, is_jax_array, to_numpy

CHUNK = 2**22  # entries of a vector block that are widened to float64 at a time
ADDED_UP = 2**12  # entries that a float32 product adds up before the sum goes on in float64


def to_double(a: Array) -> Array:
    """A float64 version of a small array."""
    if is_jax_array(a):
        return np.asarray(a, dtype=np.float64)
    xp = array_namespace(a)
    return xp.astype(a, xp.float64)


def gram(a: Array, b: Array) -> Array:
    """a b^T [rows of a, rows of b], with products in float64."""
    if is_jax_array(a):
        return _jax_dots()(a, b, "float64")
    if a.dtype == array_namespace(a).float64:
        return a @ b.T
    step = max(1, CHUNK // max(1, a.shape[0], b.shape[0]))
    chunks = [(a[:, i : i + step], b[:, i : i + step]) for i in range(0, a.shape[1], step)]
    total = to_double(chunks[0][0]) @ to_double(chunks[0][1]).T
    for left, right in chunks[1:]:
        total = total + to_double(left) @ to_double(right).T
    return total


def dots(a: Array, b: Array) -> Array:
    """a b^T [rows of a, rows of b] in float64, from products over a few thousand entries in the dtype of the rows.

    A float32 product over 10^6 entries is off by as much as 1e-5 |a| |b| in torch and 1e-4 in JAX: it adds them up in a
    few sums. In parts it takes as long, and is right to round-off.
    """
    if is_jax_array(a):
        return _jax_dots()(a, b, str(a.dtype))
    xp = array_namespace(a)
    if a.dtype == xp.float64:
        return a @ b.T
    whole = a.shape[1] // ADDED_UP * ADDED_UP
    left, right = (rows[:, :whole].reshape((rows.shape[0], whole // ADDED_UP, ADDED_UP)) for rows in (a, b))
    parts = xp.matmul(xp.permute_dims(left, (1, 0, 2)), xp.permute_dims(right, (1, 2, 0)))
    parts = xp.concat([parts, (a[:, whole:] @ b[:, whole:].T)[None]], axis=0)
    return xp.sum(to_double(parts), axis=0)


def _jax_dots() -> Callable[[Array, Array, str], np.ndarray]:
    from kpflow_dyn._arrays.dots_jax import dots

    return dots


def row_norms(a: Array) -> Array:
    """The Euclidean norm of each row, float64."""
    squares = row_dots(a, a)
    return array_namespace(squares).sqrt(squares)


def row_dots(a: Array, b: Array) -> Array:
    """<a, b> of each pair of rows, float64."""
    return to_double(array_namespace(a).sum(a * b, axis=1))


def products(rows: Array, images: Array) -> np.ndarray:
    """<x, y> and <y, y> of rows x and their images y -> [2, row]."""
    return np.stack([to_numpy(row_dots(rows, images)), to_numpy(row_dots(images, images))])
