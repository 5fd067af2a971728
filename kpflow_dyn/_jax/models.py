"""Models and their parameters; see `kpflow_dyn._backend.Models`."""

from __future__ import annotations

from kpflow_dyn._jax.cells import LearntStart as learnt_start

__all__ = ["learnt_start"]
