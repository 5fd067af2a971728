"""Arrays of JAX, taken in and checked; see `kpflow_dyn._backend.Data`."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._arrays.sharding import by_trials
from kpflow_dyn._jax.checks import as_jax
from kpflow_dyn._problems.checks import check_sequence
from kpflow_dyn._problems.inputs import input_row

as_floats, check_inputs, flattened = as_jax, check_sequence, jax.tree.flatten


def is_own(value: Any) -> bool:
    """Whether it is an array of JAX."""
    return isinstance(value, jax.Array)


def as_rows(values: Any, what: str, axes: str) -> jax.Array:
    """Floats and integers."""
    if jnp.issubdtype(values.dtype, np.inexact):
        return as_floats(values, what, axes)
    return by_trials(jnp.asarray(values))


def inputs_at(function: Callable[[jax.Array], jax.Array], times: np.ndarray, like: jax.Array) -> jax.Array:
    """x(t) [trial, n, input], compiled for each function and number of times."""
    return _inputs_at(function, jnp.asarray(times, like.dtype))


@eqx.filter_jit
def _inputs_at(function: Callable[[jax.Array], jax.Array], times: jax.Array) -> jax.Array:
    at = jax.vmap(jax.vmap(lambda t, trial: input_row(function(t), trial), (0, None)))
    return at(times, jnp.arange(len(times)))


def increments(function: Callable[..., jax.Array], times: np.ndarray, like: jax.Array) -> jax.Array:
    """What it gives between times that follow each other, [n, ...]."""
    t = jnp.asarray(times, like.dtype)
    return jax.vmap(function)(t[:-1], t[1:])
