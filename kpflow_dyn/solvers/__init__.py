"""Krylov and randomised solvers for operators given as callables on blocks of rows, on numpy, torch and jax arrays."""

from __future__ import annotations

from kpflow_dyn.solvers.exchange import XNysTrace, XTrace
from kpflow_dyn.solvers.lanczos import BlockLanczos, Eigenpairs
from kpflow_dyn.solvers.moments import Estimate, Moments
from kpflow_dyn.solvers.probes import Hutchinson, HutchPlusPlus, KrylovDeflation, OneSided

__all__ = [
    "BlockLanczos",
    "Eigenpairs",
    "Estimate",
    "HutchPlusPlus",
    "Hutchinson",
    "KrylovDeflation",
    "Moments",
    "OneSided",
    "XNysTrace",
    "XTrace",
]
