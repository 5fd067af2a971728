"""What JAX does otherwise than numpy: its arrays do not change, may be sharded, and may be traced."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax.core import Tracer

from kpflow_dyn._arrays import dots_jax, sharding
from kpflow_dyn._arrays.of_numpy import PRECISIONS, Library


class Jax(Library):
    """JAX, on any device; small float64 matrices are numpy's, as JAX compiles every new shape and may lack float64."""

    normal: Any = staticmethod(sharding.normal)
    device: Any = staticmethod(sharding.shared_place)
    on_device: Any = staticmethod(sharding.on_accelerator)
    empty_row: Any = staticmethod(sharding.empty_row)
    like_numpy: Any = staticmethod(sharding.like_numpy)
    placed: Any = staticmethod(sharding.placed)
    complex_of: Any = staticmethod(lax.complex)

    def concretely(self) -> AbstractContextManager[Any]:
        return jax.ensure_compile_time_eval()

    def is_finite(self, a: Array) -> bool:
        return bool(super().is_finite(np.asarray(a)) if self._on_host(a) else _is_finite(a))

    def finite_rows(self, a: Array) -> np.ndarray:
        return super().finite_rows(np.asarray(a)) if self._on_host(a) else np.asarray(_finite_rows(a))

    def _on_host(self, a: Array) -> bool:
        """Whether it is numpy's as it is, for which nothing is compiled."""
        return not isinstance(a, Tracer) and not self.on_device(a)

    def widened(self, a: Array, width: int) -> Array:
        return _widened(a, width)

    def side_by_side(self, parts: Sequence[Array], axes: int) -> Array:
        return _side_by_side(parts, axes)

    def after(self, first: Array, values: Array) -> Array:
        return _after(first, values)

    def full_precision(self) -> AbstractContextManager[Any]:
        settings: Any = jax.config  # whose names a type checker does not know
        if settings.jax_default_matmul_precision is None:
            return jax.default_matmul_precision("highest")
        return nullcontext()

    def products_in(self, precision: str) -> AbstractContextManager[Any]:
        return jax.default_matmul_precision(PRECISIONS[precision][1])

    def reshaped(self, a: Array, shape: tuple[int, ...]) -> Array:
        return _reshaped(a, shape)

    def joined(self, head: Array, rest: Iterator[Array], count: int) -> Array:
        return jnp.concatenate([head, *rest], axis=0)

    def split_into(self, values: Array, sizes: Sequence[int], axis: int) -> list[Array]:
        return jnp.split(values, np.cumsum(sizes)[:-1].tolist(), axis)

    def take_at(self, values: Array, index: np.ndarray) -> Array:  # a map over trials is seen to need nothing of others
        return _take_at(values, index)

    def taken(self, values: Array, places: np.ndarray) -> Array:
        if not self._on_host(values):
            return _taken(values, places)
        found = np.asarray(values)[np.arange(len(places))[:, None], places]
        return sharding.placed(sharding.like_numpy(found, values), sharding.empty_row(values, True), -found.ndim)

    def add_at(self, zeros: Array, values: Array, index: np.ndarray) -> Array:
        return _add_at(zeros, values, index)

    def to_double(self, a: Array) -> np.ndarray:
        return np.asarray(a, dtype=np.float64)

    def gram(self, a: Array, b: Array) -> np.ndarray:
        return dots_jax.dots(a, b, "float64")

    def row_dots(self, a: Array, b: Array) -> np.ndarray:
        return dots_jax.row_dots(a, b)

    def dots(self, a: Array, b: Array) -> np.ndarray:
        return dots_jax.dots(a, b, str(a.dtype))

    def linear_solvers(self) -> Any:
        from jax.scipy.sparse import linalg

        return linalg


JAX = Jax()


@partial(jax.jit, static_argnums=1)
def _reshaped(a: jax.Array, shape: tuple[int, ...]) -> jax.Array:  # an operation by itself takes four times as long
    return a.reshape(shape)


@jax.jit
def _is_finite(a: jax.Array) -> jax.Array:
    return jnp.isfinite(a).all()


@jax.jit
def _finite_rows(a: jax.Array) -> jax.Array:
    return jnp.isfinite(a).all(-1)


@partial(jax.jit, static_argnums=1)
def _widened(a: jax.Array, width: int) -> jax.Array:
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, width)])


@partial(jax.jit, static_argnums=1)
def _side_by_side(parts: Sequence[jax.Array], axes: int) -> jax.Array:
    return jnp.concatenate([part.reshape((*part.shape[:axes], -1)) for part in parts], -1)


@jax.jit
def _after(first: jax.Array, values: jax.Array) -> jax.Array:
    return jnp.concatenate([first[:, None], values[:, :-1]], 1)


@jax.jit
def _taken(values: jax.Array, places: np.ndarray) -> jax.Array:
    return jax.vmap(lambda own, places: own[places])(values, places)


@jax.jit
def _take_at(values: jax.Array, index: np.ndarray) -> jax.Array:
    return jax.vmap(lambda own, places: own[:, places], (1, 0), 1)(values, index)


@jax.jit
def _add_at(zeros: jax.Array, values: jax.Array, index: np.ndarray) -> jax.Array:
    return jax.vmap(lambda own, places, new: own.at[:, places].add(new), (1, 0, 1), 1)(zeros, index, values)
