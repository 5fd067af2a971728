"""Models of JAX, traced; see `kpflow_dyn._backend.Tracing`."""

from collections.abc import Callable

import jax

from kpflow_dyn._jax.cells import discrete_step, flat_start
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.networks import FixedPoint, FreeForm, Network
from kpflow_dyn._jax.through_solver import ThroughSolver
from kpflow_dyn._problems.problems import DiscreteProblem

__all__ = ["FixedPoint", "FreeForm", "Model", "Network", "ThroughSolver"]
__all__ += ["as_called", "discrete_step", "flat_start", "on_one_trial"]


def as_called(_problem: DiscreteProblem) -> None:
    """None: JAX's cells are called step by step."""
    return None


def on_one_trial(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same: models of JAX are called on one trial."""
    return function
