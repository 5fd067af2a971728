"""Models of JAX, traced; see `kpflow_dyn._backend.Tracing`."""

from __future__ import annotations

from collections.abc import Callable

import jax

from kpflow_dyn._jax.cells import Step, as_step
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.networks import fixed_point, free_form, network
from kpflow_dyn._jax.through_solver import ThroughSolver
from kpflow_dyn._problems.problems import DiscreteProblem

__all__ = ["Model", "ThroughSolver", "discrete_step", "fixed_point", "free_form", "network", "on_one_trial"]


def discrete_step(problem: DiscreteProblem) -> Step:
    """The step (cell, x, z) -> z on one trial."""
    return as_step(problem.cell, problem.x, problem.z0)[0]


def on_one_trial(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The same: models of JAX are called on one trial."""
    return function
