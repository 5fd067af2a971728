"""Models that the frameworks have not got: recurrent cells, fields of differential equations, and controlled plants;
and how they start: laws of recurrent weights, and models by name.

Cells are called as cell(x_t, z), fields as f(t, z) or f(t, z, x_t): the names here are torch modules, and
`kpflow_dyn.models.jax` has equinox modules of the same names and parameters; `to_jax` and `to_torch` convert one into
the other with its weights. Plants serve both.

torch or jax is imported when a name that needs it is first asked for, not before.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpflow_dyn.models._closed_loop import ClosedLoop
    from kpflow_dyn.models._constraints import Constrained, Constraint, MaxRadius, Signs, Sparse
    from kpflow_dyn.models._convert import to_jax, to_torch
    from kpflow_dyn.models._design import Candidate, Design, design
    from kpflow_dyn.models._events import Event
    from kpflow_dyn.models._hodgkin_huxley import SquidAxon
    from kpflow_dyn.models._hybrid import Hybrid
    from kpflow_dyn.models._initializing import initialize
    from kpflow_dyn.models._laws import Dale, Gaussian, Law, Orthogonal, Planted, SpectralRadius, TorchDefault
    from kpflow_dyn.models._mjx import MJXPlant
    from kpflow_dyn.models._motornet import MotorNetPlant, MotorNetPolicy
    from kpflow_dyn.models._named import Model, make_init, make_model
    from kpflow_dyn.models._planting import plant_fixed_points
    from kpflow_dyn.models._plants import CartPole, DoubleIntegrator, Pendulum, PlanarQuadrotor, Plant, VanDerPol
    from kpflow_dyn.models._torch_models import CTRNNCell, CTRNNField, HodgkinHuxleyField, LowRankRNNCell, MLPField

__all__ = ["CTRNNCell", "CTRNNField", "CartPole", "ClosedLoop", "Dale", "DoubleIntegrator", "Event", "Gaussian"]
__all__ += ["HodgkinHuxleyField", "Hybrid", "Law", "LowRankRNNCell", "MJXPlant", "MLPField", "Model", "MotorNetPlant"]
__all__ += ["MotorNetPolicy", "Orthogonal", "Pendulum"]
__all__ += ["PlanarQuadrotor", "Plant", "Planted", "SpectralRadius", "SquidAxon", "TorchDefault", "VanDerPol"]
__all__ += ["Candidate", "Constrained", "Constraint", "Design", "MaxRadius", "Signs", "Sparse", "design"]
__all__ += ["initialize", "make_init", "make_model", "plant_fixed_points", "to_jax", "to_torch"]

_HOME = {
    **dict.fromkeys(["CTRNNCell", "CTRNNField", "HodgkinHuxleyField", "LowRankRNNCell", "MLPField"], "_torch_models"),
    **dict.fromkeys(["CartPole", "DoubleIntegrator", "Pendulum", "PlanarQuadrotor", "Plant", "VanDerPol"], "_plants"),
    **dict.fromkeys(["Dale", "Gaussian", "Law", "Orthogonal", "Planted", "SpectralRadius", "TorchDefault"], "_laws"),
    **dict.fromkeys(["Constrained", "Constraint", "MaxRadius", "Signs", "Sparse"], "_constraints"),
    **dict.fromkeys(["Candidate", "Design", "design"], "_design"),
    **dict.fromkeys(["Model", "make_init", "make_model"], "_named"),
    **dict.fromkeys(["to_jax", "to_torch"], "_convert"),
    **{"MJXPlant": "_mjx", "MotorNetPlant": "_motornet", "MotorNetPolicy": "_motornet"},
    **{"ClosedLoop": "_closed_loop", "SquidAxon": "_hodgkin_huxley", "Event": "_events", "Hybrid": "_hybrid"},
    **{"initialize": "_initializing", "plant_fixed_points": "_planting"},
}


def __getattr__(name: str) -> Any:
    if name == "jax":
        return importlib.import_module("kpflow_dyn.models.jax")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"kpflow_dyn.models.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "jax"]
