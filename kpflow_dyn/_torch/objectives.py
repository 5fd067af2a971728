"""A loss of a torch model's states as a function of its parameters, twice differentiable."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._arrays import Rows
from kpflow_dyn._arrays.complex_numbers import in_halves, in_pairs
from kpflow_dyn._backend import Values
from kpflow_dyn._problems.problems import DiscreteProblem, StaticProblem
from kpflow_dyn._problems.starts import start_map
from kpflow_dyn._torch import rollout
from kpflow_dyn._torch.cells import Step, discrete_step, over_sequence
from kpflow_dyn._torch.networks import states_of
from kpflow_dyn._torch.trace import differentiable_attention

Scheme = Any


def pull_back(problem: DiscreteProblem | StaticProblem) -> tuple[Tensor, Rows]:
    """The states, and J* on rows [b, n], both with a graph to the parameters that require gradients."""
    model = problem.model
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning:
        raise ValueError("no parameter of the model requires a gradient: nothing learns")
    with torch.enable_grad(), differentiable_attention():
        state = _states(problem, model)

    def back(rows: Tensor) -> Tensor:
        outputs = rows.reshape((-1, *state.shape))
        found = torch.autograd.grad(
            state, learning, outputs, is_grads_batched=True, create_graph=True, materialize_grads=True
        )
        return torch.cat([in_pairs(gradient).reshape((len(rows), -1)) for gradient in found], 1)

    return state, back


def _states(problem: DiscreteProblem | StaticProblem, model: nn.Module) -> Tensor:
    if isinstance(problem, StaticProblem):
        return in_halves(states_of(problem))
    (step, z0), start = discrete_step(problem), start_map(problem)
    return run(step, problem.cell, problem.x, z0 if start is None else start(model))


def run(step: Step, cell: nn.Module, x: Tensor, z0: Tensor) -> Tensor:
    """The states [trial, time, unit]; by torch's own loop where that gives them all, and has two derivatives."""
    if isinstance(cell, nn.RNN | nn.GRU) and cell.num_layers == 1 and x.device.type == "cpu":
        return over_sequence(cell, x, z0)[0]
    return rollout.run(step, cell, x, z0)


@torch.enable_grad()
def unreached(loss: Callable[[Values], Tensor], values: Values) -> list[str]:
    """The parameters by name that a loss does not hang on."""
    leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
    with differentiable_attention():
        found = loss(leaves)
    if not found.requires_grad:
        return list(leaves)
    gradients = torch.autograd.grad(found, list(leaves.values()), allow_unused=True)
    return [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None]


class Derivatives:
    """Of a function (theta [n], scheme) -> 0-dim."""

    def __init__(self, function: Callable[[Tensor, Scheme], Tensor]) -> None:
        self._function = function

    @torch.no_grad()
    def value(self, theta: Tensor, scheme: Scheme) -> float:
        """Its value."""
        return float(self._function(theta, scheme))

    def gradient(self, theta: Tensor, scheme: Scheme) -> tuple[float, Tensor]:
        """Its value and its gradient [n]."""
        value, _theta, gradient = self._first(theta, scheme, twice=False)
        return float(value), gradient.detach()

    def hessian(self, theta: Tensor, scheme: Scheme) -> Rows:
        """Products with its Hessian on rows [b, n]."""
        _value, theta, gradient = self._first(theta, scheme, twice=True)

        def products(rows: Tensor) -> Tensor:
            return torch.stack([torch.autograd.grad(gradient, theta, row, retain_graph=True)[0] for row in rows])

        return products

    @torch.enable_grad()
    def _first(self, theta: Tensor, scheme: Scheme, twice: bool) -> tuple[Tensor, Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        with differentiable_attention():
            value = self._function(theta, scheme) + 0 * theta.sum()
            (gradient,) = torch.autograd.grad(value, theta, create_graph=twice)
        return (
            value.detach(),
            theta,
            gradient + 0 * theta if twice else gradient,
        )  # zeros, so that constants have a graph
