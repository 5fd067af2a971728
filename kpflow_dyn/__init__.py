"""kpflow_dyn: how gradient descent can move the trajectories of a dynamical model.

A model is one implicit constraint F(S, theta; x) = 0 on its whole state S [trial, time, unit]; a step of gradient
descent moves the state by the global empirical neural tangent kernel NTK_S = P K P*.

    problem --solve--> solution --linearize--> flow: sites, core, B, P, K, J, ntk --> modes and numbers
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "space": ["Space"],
    "memory": ["memory_budget"],
    "operators": ["GramOperator", "MatrixOperator", "Operator", "check_adjoint"],
    "numbers.reductions": ["marginal", "partial_trace"],
    "numbers.shares": ["Contributions", "contributions"],
    "numbers.estimate": ["Estimate", "alignment", "effective_rank", "frobenius_norm", "rayleigh", "trace"],
    "numbers.separability": ["schmidt_rank"],
    "numbers.density": ["SpectralDensity", "spectral_density"],
    "numbers.spectra": ["Modes", "SingularModes", "eigenvalues", "eigs", "modes", "svds"],
    "sites": ["WeightSite"],
    "problems": ["DiscreteProblem", "FixedPointProblem", "ImplicitProblem", "ODEProblem", "StaticProblem"],
    "solution": ["Solution", "SolveError", "solve"],
    "measure": ["Measure"],
    "metric": ["KroneckerMetric", "LearningRates", "Reparametrization"],
    "flow": ["DiscreteAdjoint", "Flow", "InterpolatingAdjoint"],
    "output": ["Output"],
    "learning.forecasting": ["Forecast", "forecast"],
    "learning.learnable": ["Learnability", "core_learnability", "learnability"],
    "linearise": ["linearize"],
    "empirical": ["empirical_ntk"],
    "learning.descent": ["GradientFlow", "gradient_flow"],
    "numbers.one_pass": ["Summary", "summary"],
    "analysis": ["analyze"],
    "learning.losses": ["squared_error"],
    "learning.comparison": ["Comparison", "compare"],
    "learning.tracking": ["track"],
    "learning.recorder": ["Recorder", "Recording"],
    "sweep.sweep": ["Sweep"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_SUBMODULES = {
    "control",
    "dynamics",
    "gym",
    "learning_rules",
    "models",
    "regularizers",
    "report",
    "solvers",
    "sweep",
    "tasks",
    "train",
}

__version__ = "0.1.0"
__all__ = sorted([*_HOME, *_SUBMODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"kpflow_dyn.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"kpflow_dyn.{name}")
    raise AttributeError(f"module 'kpflow_dyn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
