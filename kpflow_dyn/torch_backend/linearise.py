"""What linearising needs of torch models."""

from __future__ import annotations

from kpflow_dyn.problems import DiscreteProblem
from kpflow_dyn.torch_backend.cells import Step, as_step
from kpflow_dyn.torch_backend.model import Model
from kpflow_dyn.torch_backend.variational import Variational

__all__ = ["Model", "Variational", "discrete_step"]


def discrete_step(problem: DiscreteProblem) -> Step:
    """The step (cell, x, z) -> z of a recurrent model."""
    return as_step(problem.cell, problem.x, problem.z0)[0]
