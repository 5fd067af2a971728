"""What linearising needs of torch models."""

from __future__ import annotations

from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._torch.cells import Step, as_step
from kpflow_dyn._torch.model import Model
from kpflow_dyn.ode._variational import Variational

__all__ = ["Model", "Variational", "discrete_step"]


def discrete_step(problem: DiscreteProblem) -> Step:
    """The step (cell, x, z) -> z of a recurrent model."""
    return as_step(problem.cell, problem.x, problem.z0)[0]
