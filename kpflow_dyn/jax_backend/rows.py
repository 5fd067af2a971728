"""Row functions in JAX: function transforms and the map over rows."""

from __future__ import annotations

import jax
import numpy as np

from kpflow_dyn.framework import Framework, RowFunction


def each_row(function: RowFunction, *rows: jax.Array) -> list[jax.Array]:
    """A row function on [time, trial, ...] data -> its outputs as [time, trial, ...]."""
    return jax.jit(jax.vmap(jax.vmap(function)))(*rows)


def index(numbers: np.ndarray, like: jax.Array) -> np.ndarray:
    """Element numbers as they are: constants of a compiled program."""
    return numbers


JAX = Framework(jax.jvp, jax.vjp, jax.jit, each_row, index)
