"""A torch model at constant inputs: its step or field on many states at once, with the Jacobian of each."""

from collections.abc import Callable

import torch
from torch import Tensor

from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._torch.cells import discrete_step
from kpflow_dyn._torch.rollout import check_step

ACTIVATIONS = 16  # arrays of the size of the state that a step keeps for its derivative, or so


class Dynamics:
    """z [n, unit] -> F(x, z) of a step or a field, and dF/dz [n, unit, unit]; x has no width where f takes none."""

    def __init__(self, problem: DiscreteProblem | ODEProblem, x: Tensor, z: Tensor) -> None:
        self.apply = _step(problem, x, z) if isinstance(problem, DiscreteProblem) else _field(problem)

    def __call__(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """F and dF/dz."""
        units = z.shape[1]
        parts = zip(*(rows.split(rows_at_once(ACTIVATIONS * units**2, z)) for rows in (x, z)), strict=True)
        values, jacobians = zip(*(self._on_copies(*part) for part in parts), strict=True)
        return torch.cat(values), torch.cat(jacobians)

    @torch.enable_grad()
    def _on_copies(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Each state as often as there are units, so that one gradient gives all rows of the Jacobians."""
        n, units = z.shape
        copies = z.detach().repeat_interleave(units, 0).requires_grad_()
        values = self.apply(x.repeat_interleave(units, 0), copies)
        seeds = torch.eye(units, dtype=z.dtype, device=z.device).repeat(n, 1)
        (rows,) = torch.autograd.grad(values, copies, seeds, materialize_grads=True)
        return values.detach()[::units], rows.reshape(n, units, units)


def _step(problem: DiscreteProblem, x: Tensor, z: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    step, _ = discrete_step(problem)
    check_step(step, problem.cell, x, z)
    return lambda x, z: step(problem.cell, x, z)


def _field(problem: ODEProblem) -> Callable[[Tensor, Tensor], Tensor]:
    t = torch.tensor(problem.t[0], dtype=problem.z0.dtype, device=problem.z0.device)
    return lambda x, z: problem.f(t, z, x) if x.shape[1] else problem.f(t, z)
