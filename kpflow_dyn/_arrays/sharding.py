"""Trials sharded over devices: where arrays of trials lie, and what all trials share.

Each device holds some trials, and a copy of everything they share. Compiled code follows its data; arrays made on the
host or drawn at random are placed here. Meshes have automatic axes: the compiler finds the collectives.
"""

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kpflow_dyn._arrays.sooner_jax import sooner

FEW = 2**18  # random numbers, which take longer to compile than to draw


def by_trials(values: jax.Array) -> jax.Array:
    """Values [trial, ...] with no axis sharded but the first."""
    return _put(values, _on(values, _spec(values)[:1])) if _is_sharded(values) else values


def like_trials(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values [trial, ...] sharded as other ones are."""
    return _put(values, _on(x, _spec(x)[:1])) if _is_sharded(x) else values


def shared_place(a: jax.Array) -> Any:
    """Where what all trials share lies: on every device that has some; None where JAX may choose, as in a jit."""
    if _is_sharded(a):
        return _on(a, ())
    return None if isinstance(a, Tracer) or not a.committed else a.device


def like_numpy(values: np.ndarray, like: jax.Array) -> jax.Array:
    """Numpy numbers in the dtype of `like`, where what all trials share lies; nothing is compiled for it."""
    if isinstance(like, Tracer):
        return jnp.asarray(values, like.dtype)
    with jax.ensure_compile_time_eval():
        return jax.device_put(np.asarray(values, like.dtype), shared_place(like))


def empty_row(like: jax.Array, of_trials: bool) -> jax.Array:
    """An array [0] that lies as flat rows [trial, ...] lie, of trials as in `like`, or as what they share."""
    row = like_numpy(np.zeros(0), like)
    return _put(row, _on(like, _spec(like)[:1] if of_trials else ())) if _is_sharded(like) else row


def placed(values: jax.Array, row: jax.Array, axis: int) -> jax.Array:
    """Values whose trials stand at an axis < 0, or are outermost in it, where such a flat row lies."""
    if not _is_sharded(row):
        return values
    return _put(values, _on(row, (None,) * (values.ndim + axis) + _spec(row)[-1:]))


def normal(seed: int, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Standard normal rows, which lie as those of `like` do if they are as long, or it has none; else shared."""
    if prod(shape) <= FEW and not isinstance(like, Tracer) and not _is_sharded(like):
        with jax.ensure_compile_time_eval():
            return _compiled_sooner()(jax.random.key(seed), shape, like.dtype)
    key = jax.random.key(seed)
    if not _is_sharded(like):
        return jax.random.normal(key, shape, like.dtype)
    rows = like.shape[-1] in (0, shape[-1])
    place = _on(like, (None,) * (len(shape) - 1) + _spec(like)[-1:] if rows else ())
    return jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=place)(key, shape, like.dtype)


@cache
def _compiled_sooner() -> Callable[..., jax.Array]:
    return jax.jit(jax.random.normal, static_argnums=(1, 2), compiler_options=sooner())


def on_accelerator(a: jax.Array) -> bool:
    """Whether it lies on one; of a traced array, whether arrays do unless they are put elsewhere."""
    if isinstance(a, Tracer):
        return jax.default_backend() != "cpu"
    return any(place.platform != "cpu" for place in a.devices())


def shards(a: jax.Array, axis: int) -> int:
    """In how many parts an axis is sharded."""
    return a.shape[axis] // a.sharding.shard_shape(a.shape)[axis] if _is_sharded(a) and a.shape[axis] else 1


def _is_sharded(a: jax.Array) -> bool:
    return not isinstance(a, Tracer) and isinstance(a.sharding, NamedSharding)


def _spec(a: jax.Array) -> tuple:
    """What each axis is sharded over."""
    spec = tuple(a.sharding.spec)  # type: ignore[attr-defined]
    return spec + (None,) * (a.ndim - len(spec))


def _on(a: jax.Array, spec: tuple) -> NamedSharding:
    mesh = a.sharding.mesh  # type: ignore[attr-defined]
    automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return NamedSharding(automatic, PartitionSpec(*spec))


def _put(values: jax.Array, place: NamedSharding) -> jax.Array:
    if isinstance(values, Tracer):
        return lax.with_sharding_constraint(values, place)
    return values if values.sharding == place else jax.device_put(values, place)
