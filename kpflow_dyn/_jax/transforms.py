"""Function transforms; see `kpflow_dyn._backend.Transforms`."""

from __future__ import annotations

from kpflow_dyn._jax.rows import JAX

jvp, vjp, vmap, compiled = JAX.jvp, JAX.vjp, JAX.vmap, JAX.compiled
each_row, index, linearised = JAX.each_row, JAX.index, JAX.linearised
