"""Function transforms without a forward mode, for functions that have none; see `kpflow_dyn._backend.Transforms`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import vjp, vmap

__all__ = ["jvp", "vjp", "vmap"]


def jvp(function: Callable[..., jax.Array], point: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """The value, and the transpose of what it pulls back, by reverse mode through reverse mode."""
    value, pull = jax.vjp(function, *point)
    return value, jax.vjp(pull, jnp.zeros_like(value))[1](tangents)[0]
