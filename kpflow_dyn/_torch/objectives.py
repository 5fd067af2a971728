"""A loss of a torch model's states as a function of its parameters, twice differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._arrays import Rows
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem, StaticProblem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._problems.steps import Tableau, stages, step
from kpflow_dyn._torch.cells import as_step
from kpflow_dyn._torch.rollout import run
from kpflow_dyn._torch.trace import differentiable_attention
from kpflow_dyn.ode._discretise import Nodes, call_field

Scheme = Any


def rollout(problem: DiscreteProblem) -> Callable[[nn.Module, Scheme], Tensor]:
    """(cell, None) -> the states."""
    step, z0 = as_step(problem.cell, problem.x, problem.z0)

    return lambda cell, _scheme: run(step, cell, problem.x, z0)


def pull_back(problem: DiscreteProblem | StaticProblem) -> tuple[Tensor, Rows]:
    """The states, and J* on rows [b, n], both with a graph to the parameters that require gradients."""
    model = problem.cell if isinstance(problem, DiscreteProblem) else problem.net
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not learning:
        raise ValueError("no parameter of the model requires a gradient: nothing learns")
    with torch.enable_grad(), differentiable_attention():
        state = rollout(problem)(model, None) if isinstance(problem, DiscreteProblem) else model(problem.x)

    def back(rows: Tensor) -> Tensor:
        outputs = rows.reshape((-1, *state.shape))
        found = torch.autograd.grad(
            state, learning, outputs, is_grads_batched=True, create_graph=True, materialize_grads=True
        )
        return torch.cat([gradient.reshape((len(rows), -1)) for gradient in found], 1)

    return state, back


def scheme(solution: Solution) -> Scheme:
    """The steps that were taken, and how the nodes are read off them."""
    steps, problem = solution.steps, solution.problem
    assert steps is not None and isinstance(problem, ODEProblem)
    nodes = Nodes(steps, solution.t, solution.state)
    x = inputs_at(problem, steps.stage_times.reshape(len(steps.dt), -1))
    x = None if x is None else x.reshape((*steps.stage_times.shape, -1))
    h, times = (torch.as_tensor(a[0]).to(solution.state) for a in (steps.dt, steps.stage_times))
    return h, times, x, nodes


def replay(problem: ODEProblem, tableau: Tableau) -> Callable[[nn.Module, Scheme], Tensor]:
    """(field, scheme) -> the states, by the steps of the scheme."""

    def run(field: nn.Module, scheme: Scheme) -> Tensor:
        h, times, x, nodes = scheme
        y, after = problem.z0, []
        for n in range(len(h)):
            inputs = [None] * len(tableau.c) if x is None else x[:, n].unbind(1)
            k = stages(lambda t, z, x_t: call_field(field, t, z, x_t), tableau, times[n].unbind(), h[n], y, inputs)
            y = step(tableau, h[n], y, k)
            after.append(torch.cat([y, *(h[n] * k_i for k_i in k)], -1) if nodes.with_stages else y)
        return nodes.read(torch.stack(after, 1)[None])[0]

    return run


class Derivatives:
    """Of a function (theta [n], scheme) -> 0-dim."""

    def __init__(self, function: Callable[[Tensor, Scheme], Tensor]) -> None:
        self._function = function

    def gradient(self, theta: Tensor, scheme: Scheme) -> Tensor:
        """Its gradient [n]."""
        return self._first(theta, scheme, twice=False)[2]

    def both(self, theta: Tensor, scheme: Scheme) -> tuple[float, Tensor, Rows]:
        """Its value, its gradient, and products with its Hessian on rows [b, n]."""
        value, theta, gradient = self._first(theta, scheme, twice=True)

        def hessian(rows: Tensor) -> Tensor:
            return torch.stack([torch.autograd.grad(gradient, theta, row, retain_graph=True)[0] for row in rows])

        return float(value), gradient.detach(), hessian

    @torch.enable_grad()
    def _first(self, theta: Tensor, scheme: Scheme, twice: bool) -> tuple[Tensor, Tensor, Tensor]:
        theta = theta.detach().requires_grad_()
        with differentiable_attention():
            value = self._function(theta, scheme)
            (gradient,) = torch.autograd.grad(value, theta, create_graph=twice)
        return value.detach(), theta, gradient + 0 * theta if twice else gradient  # so that a constant one has a graph
