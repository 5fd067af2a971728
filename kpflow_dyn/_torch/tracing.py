"""Models of torch, traced; see `kpflow_dyn._backend.Tracing`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._torch.cells import Step, as_step
from kpflow_dyn._torch.model import Model
from kpflow_dyn._torch.networks import fixed_point, free_form, network

__all__ = ["Model", "ThroughSolver", "discrete_step", "fixed_point", "free_form", "network", "on_one_trial"]

ThroughSolver = None  # torchdiffeq's own derivative is that of its continuous adjoint, or of steps that are replayed


def discrete_step(problem: DiscreteProblem) -> Step:
    """The step (cell, x, z) -> z on all trials."""
    return as_step(problem.cell, problem.x, problem.z0)[0]


def on_one_trial(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that takes all trials at once, on one of them; numbers such as a time have no trial axis."""

    def on_one(*arguments: Tensor | None) -> Tensor:
        return function(*(a if a is None or a.ndim == 0 else a[None] for a in arguments))[0]

    return on_one
