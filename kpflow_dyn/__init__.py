"""kpflow_dyn: how gradient descent can move the trajectories of a dynamical model.

A model is one implicit constraint F(S, theta; x) = 0 on its whole state S [trial, time, unit]; a step of gradient
descent moves the state by the global empirical neural tangent kernel NTK_S = P K P*.

    problem --solve--> solution --linearize--> flow: sites, core, B, P, K, J, ntk --> modes and numbers
"""

import importlib
from typing import Any

from kpflow_dyn._elsewhere import PACKAGE, stands_for

_PUBLIC = {
    "_spaces.space": ["Space"],
    "_arrays.memory": ["memory_budget"],
    "_spaces.operators": ["GramOperator", "MatrixOperator", "Operator", "check_adjoint"],
    "_numbers.reductions": ["marginal", "partial_trace"],
    "_numbers.contributions": ["Contributions", "contributions"],
    "_numbers.estimate": ["Estimate", "alignment", "effective_rank", "frobenius_norm", "rayleigh", "trace"],
    "_numbers.separability": ["schmidt_rank"],
    "_numbers.rank_bound": ["RankBound", "rank_bound"],
    "_numbers.over_paths": ["MeanNTK", "mean_ntk"],
    "_numbers.empirical": ["empirical_ntk"],
    "_numbers.density": ["SpectralDensity", "spectral_density"],
    "_numbers.spectra": ["Modes", "eigenvalues", "eigs", "modes"],
    "_numbers.features": ["FeatureShares", "feature_shares"],
    "_numbers.singular": ["SingularModes", "svds"],
    "_flows.sites": ["WeightSite"],
    "_problems.problems": ["DiscreteProblem", "FixedPointProblem", "ImplicitProblem", "ODEProblem", "StaticProblem"],
    "_problems.stochastic": ["SDEProblem"],
    "_problems.delayed": ["DDEProblem"],
    "_problems.controlled": ["CDEProblem"],
    "_problems.second_order": ["SecondOrderProblem"],
    "_problems.solutions": ["Solution", "SolveError"],
    "_problems.starts": ["StartWarning"],
    "_solve": ["carry_state", "solve"],
    "_problems.measure": ["Measure"],
    "_flows.metric": ["KroneckerMetric", "LearningRates", "Reparametrization"],
    "_flows.adjoints": ["DiscreteAdjoint", "InterpolatingAdjoint"],
    "_flows.flow": ["Flow", "Output"],
    "_learning.forecasting": ["Forecast", "forecast"],
    "_learning.starts": ["Starts", "forecast_starts"],
    "_learning.learnable": ["Learnability", "core_learnability", "learnability"],
    "_learning.self_reference": ["SelfReference", "self_reference"],
    "_learning.obstacles": ["Obstacles", "obstacles"],
    "_linearize": ["UntracedWarning", "linearize"],
    "_learning.descent": ["GradientFlow", "gradient_flow"],
    "_numbers.summary": ["Summary", "summary"],
    "_analyze": ["analyze"],
    "_checkpoint": ["Checkpoint", "load_checkpoint"],
    "_learning.losses": ["accuracy", "cross_entropy", "squared_error"],
    "_learning.comparison": ["Comparison", "compare"],
    "_learning.similarity": ["Mantel", "Similarities", "similarities", "similarity"],
    "_learning.tracking": ["track"],
    "_learning.recorder": ["Recorder", "Recording"],
    "sweep._sweep": ["Sweep"],
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
_SUBMODULES = {
    "control",
    "dynamics",
    "figures",
    "gym",
    "learning_rules",
    "models",
    "ode",
    "regularizers",
    "report",
    "solvers",
    "sweep",
    "tasks",
    "tracing",
    "train",
}

__version__ = "0.2.0"
__all__ = sorted([*_HOME, *_SUBMODULES])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"kpflow_dyn.{_HOME[name]}"), name)
    if name in _SUBMODULES:
        return importlib.import_module(f"kpflow_dyn.{name}")
    raise AttributeError(f"module 'kpflow_dyn' has no attribute {name!r}{stands_for(name, PACKAGE)}", name=name)


def __dir__() -> list[str]:
    return __all__
