"""Krylov and randomised solvers for operators given as callables on blocks of rows, on numpy, torch and jax arrays."""

from __future__ import annotations

from kpflow_dyn.solvers.dense import Dense
from kpflow_dyn.solvers.exchange import XNysTrace, XTrace
from kpflow_dyn.solvers.lanczos import BlockLanczos
from kpflow_dyn.solvers.moments import Estimate, Moments
from kpflow_dyn.solvers.probes import Hutchinson, HutchPlusPlus, KrylovDeflation, OneSided
from kpflow_dyn.solvers.results import Eigenpairs, Triplets
from kpflow_dyn.solvers.rosenbrock import ExponentialRosenbrock

__all__ = [
    "BlockLanczos",
    "Dense",
    "Eigenpairs",
    "Estimate",
    "ExponentialRosenbrock",
    "HutchPlusPlus",
    "Hutchinson",
    "KrylovDeflation",
    "Moments",
    "OneSided",
    "Triplets",
    "XNysTrace",
    "XTrace",
]
