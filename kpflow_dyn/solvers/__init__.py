"""Krylov solvers for symmetric operators given as callables on blocks of rows, on numpy, torch and jax arrays."""

from __future__ import annotations

from kpflow_dyn.solvers.lanczos import BlockLanczos, Eigenpairs

__all__ = ["BlockLanczos", "Eigenpairs"]
