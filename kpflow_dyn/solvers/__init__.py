"""Krylov and randomised solvers for operators given as callables on blocks of rows, on numpy, torch and jax arrays.

`TraceEstimator`, `FactorTraceEstimator` and `EigenSolver` say what `kp.trace` and `kp.eigs` need of an `alg=` of yours.
"""

from kpflow_dyn._arrays import Random
from kpflow_dyn.solvers._block import FastestBlock
from kpflow_dyn.solvers._chebyshev import RungeKuttaChebyshev
from kpflow_dyn.solvers._dense import Dense
from kpflow_dyn.solvers._doors import EigenSolver, FactorTraceEstimator, TraceEstimator
from kpflow_dyn.solvers._lanczos import BlockLanczos
from kpflow_dyn.solvers._moments import Estimate, Moments
from kpflow_dyn.solvers._probes import Hutchinson, HutchPlusPlus, KrylovDeflation, OneSided
from kpflow_dyn.solvers._results import Eigenpairs, Triplets
from kpflow_dyn.solvers._rosenbrock import ExponentialRosenbrock
from kpflow_dyn.solvers._xtrace import XNysTrace, XTrace

__all__ = ["BlockLanczos", "Dense", "EigenSolver", "Eigenpairs", "Estimate", "ExponentialRosenbrock"]
__all__ += ["FactorTraceEstimator", "FastestBlock", "HutchPlusPlus", "Hutchinson", "KrylovDeflation", "Moments"]
__all__ += ["OneSided", "Random", "RungeKuttaChebyshev", "TraceEstimator", "Triplets", "XNysTrace", "XTrace"]
