"""Arrays of JAX, taken in and checked; see `kpflow_dyn._backend.Data`."""

from __future__ import annotations

from typing import Any

import jax

from kpflow_dyn._jax.checks import as_jax as as_floats
from kpflow_dyn._jax.checks import check_input as check_inputs

__all__ = ["as_floats", "check_inputs", "is_own"]


def is_own(value: Any) -> bool:
    """Whether it is an array of JAX."""
    return isinstance(value, jax.Array)
