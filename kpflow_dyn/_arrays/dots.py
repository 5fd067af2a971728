"""Inner products of long rows, in float64.

Vectors stay on their device and in their dtype. Small matrices are float64 on that device too, save with JAX, which
compiles every new shape and may lack float64: they are numpy arrays there.
"""

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, library_of, to_numpy

SAFE = (1e-280, 1e300)  # sums of squares that lost no digits


def to_double(a: Array) -> Array:
    """A float64 version of a small array."""
    return library_of(a).to_double(a)


def gram(a: Array, b: Array) -> Array:
    """a b^T [rows of a, rows of b], with products in float64."""
    return library_of(a).gram(a, b)


def dots(a: Array, b: Array) -> Array:
    """a b^T [rows of a, rows of b] in float64, from products over a few thousand entries in the dtype of the rows.

    A float32 product over 10^6 entries is off by as much as 1e-5 |a| |b| in torch and 1e-4 in JAX: it adds them up in a
    few sums. In parts it takes as long, and is right to round-off.
    """
    return library_of(a).dots(a, b)


def row_norms(a: Array) -> Array:
    """The Euclidean norm of each row, float64, also where its square is out of range."""
    squares = row_dots(a, a)
    xp = array_namespace(squares)
    if a.shape[1] == 0 or bool(xp.all((squares > SAFE[0]) & (squares < SAFE[1]))):
        return xp.sqrt(squares)
    largest = array_namespace(a).max(abs(a), axis=1, keepdims=True)
    largest = largest + (largest == 0)
    rows = a / largest
    return to_double(largest)[:, 0] * xp.sqrt(row_dots(rows, rows))


def row_dots(a: Array, b: Array) -> Array:
    """<a, b> of each pair of rows, float64, with products and sums in it."""
    return library_of(a).row_dots(a, b)


def products(rows: Array, images: Array) -> np.ndarray:
    """<x, y> and <y, y> of rows x and their images y -> [2, row]."""
    return np.stack([to_numpy(row_dots(rows, images)), to_numpy(row_dots(images, images))])
