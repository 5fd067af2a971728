"""Control theory along solved trajectories and at equilibria, under the names that control engineers know.

    solution --linearize_ltv--> LTV: A(t), B(t), C    --gram, hankel, tvlqr--> what inputs reach and outputs tell
    equilibrium --linearize_lti--> LTI: A, B, C, D    --gram, hsvd, lqr, frequency_response--> ...
    solution, cost --adjoint--> costates and the gradient in the input
    solution, cost --analyze--> all of these beside what the policy can still learn, over time and over training

The models are those of the rest of the package, in torch or JAX: `kp.models.ClosedLoop(plant, policy)`, other fields of
an `ODEProblem`, cells of a `DiscreteProblem`. Linearisations and all that follows are numpy arrays in float64. How much
each weight of a controller contributes to what learning can change is told by `kp.contributions(flow)`.
"""

from kpflow_dyn.control._analysis import LoopAnalysis, analyze
from kpflow_dyn.control._angles import ReachableAngles, reachable_angles
from kpflow_dyn.control._costates import Costates, QuadraticCost, adjoint
from kpflow_dyn.control._elsewhere import advice_on as _advice_on
from kpflow_dyn.control._frequency import FrequencyResponse, frequency_response
from kpflow_dyn.control._gramians import Gramian, gram
from kpflow_dyn.control._hankel_modes import Hankel, hankel, hsvd
from kpflow_dyn.control._linearisation import linearize_lti, linearize_ltv
from kpflow_dyn.control._margins import DiskMargins, StabilityMargins, disk_margins, stability_margins
from kpflow_dyn.control._matrix_free import gram_operator
from kpflow_dyn.control._ranks import ctrb, obsv
from kpflow_dyn.control._reduction import balred, minreal
from kpflow_dyn.control._regulators import (
    Estimator,
    Regulator,
    TimeVaryingRegulator,
    dlqe,
    dlqr,
    lqe,
    lqr,
    tvlqr,
)
from kpflow_dyn.control._systems import LTI, LTV
from kpflow_dyn.control._training_cost import TrainingCost, training_cost
from kpflow_dyn.control._yardstick import opened_loop

__all__ = ["LTI", "LTV", "Costates", "Estimator", "FrequencyResponse", "Gramian", "Hankel", "QuadraticCost"]
__all__ += ["ReachableAngles", "Regulator", "TimeVaryingRegulator", "adjoint", "balred", "ctrb", "dlqe", "dlqr"]
__all__ += ["frequency_response", "gram", "gram_operator", "hankel", "hsvd", "linearize_lti", "linearize_ltv", "lqe"]
__all__ += ["lqr", "minreal", "obsv", "reachable_angles", "tvlqr"]

__all__ += ["DiskMargins", "StabilityMargins", "TrainingCost", "disk_margins", "stability_margins", "training_cost"]

__all__ += ["LoopAnalysis", "analyze", "opened_loop"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> None:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_advice_on(name)}", name=name)
