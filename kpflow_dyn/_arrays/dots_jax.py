"""Inner products of long JAX rows: XLA on a CPU transposes the right factor first, so that it must be the small one."""

from functools import partial

import jax
import numpy as np
from jax import lax

from kpflow_dyn._arrays.sharding import shards

ADDED_UP = 2**11  # entries in a product; it adds them up in few sums, which loses digits if there are many


def dots(a: jax.Array, b: jax.Array, dtype: str) -> np.ndarray:
    """a b^T with products and sums in the given precision -> float64."""
    with jax.enable_x64(dtype == "float64"):
        parts = max(shards(a, 1), shards(b, 1))
        found = _dots(b, a, dtype, parts).T if len(a) < len(b) else _dots(a, b, dtype, parts)
        return np.asarray(found).astype(np.float64)


def row_dots(a: jax.Array, b: jax.Array) -> np.ndarray:
    """<a, b> of each pair of rows, in float64."""
    with jax.enable_x64(True):
        return np.asarray(_row_dots(a, b))


@jax.jit
def _row_dots(a: jax.Array, b: jax.Array) -> jax.Array:
    return (a.astype("float64") * b.astype("float64")).sum(1)


@partial(jax.jit, static_argnames=("dtype", "parts"))
def _dots(large: jax.Array, small: jax.Array, dtype: str, parts: int) -> jax.Array:
    """The sum over what each device has of the rows."""
    a, b = (rows.reshape((len(rows), parts, rows.shape[1] // parts)) for rows in (large, small))
    return jax.vmap(lambda a, b: _dots_of_one(a, b, dtype), 1)(a, b).sum(0)


def _dots_of_one(large: jax.Array, small: jax.Array, dtype: str) -> jax.Array:
    n = large.shape[1]
    width = min(n, ADDED_UP)
    whole = n // width

    def part(start: int | jax.Array, length: int) -> jax.Array:
        a, b = (lax.dynamic_slice_in_dim(rows, start, length, 1).astype(dtype) for rows in (large, small))
        return lax.dot_general(a, b, (((1,), (1,)), ((), ())), precision="highest")

    rest = part(whole * width, n - whole * width)
    return lax.fori_loop(0, whole, lambda i, total: total + part(i * width, width), rest)
