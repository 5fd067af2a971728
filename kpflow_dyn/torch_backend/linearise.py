"""From a torch model and its states to the linear recurrence along them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kpflow_dyn.structure import analyse
from kpflow_dyn.torch_backend.cells import as_step
from kpflow_dyn.torch_backend.tangent import Tangent
from kpflow_dyn.torch_backend.trace import trace

if TYPE_CHECKING:
    from kpflow_dyn.solution import Solution

Choice = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None


def linearise(solution: Solution, params: Choice) -> tuple[Tangent, dict[str, Tensor]]:
    """The tangent of the step along the solution, and the parameters that learn, by name.

    Raises:
        ValueError: when no parameter learns, or the traced step does not reproduce the states.
    """
    problem, state = solution.problem, solution.state
    step, start = as_step(problem.cell, problem.x, problem.z0)
    names = choose(problem.cell, params)
    graph = trace(step, problem.x[:, 0], start)
    used = {node: name.removeprefix("cell.") for node, name in graph.parameters.items()}
    graph.parameters = used
    structure = analyse(graph, set(names), torch.from_numpy)
    if not structure.sites:
        raise ValueError(f"the step uses none of the parameters that should learn ({', '.join(names)})")
    before = torch.cat([start[:, None], state[:, :-1]], 1)
    tangent = Tangent(structure, problem.x, before)
    _check_trace(tangent.next_state, state)
    return tangent, {used[node]: graph.values[node] for node in structure.parameters}


def choose(cell: nn.Module, params: Choice) -> list[str]:
    """The names of the parameters that learn: all that require a gradient, or those that `params` picks."""
    known = dict(cell.named_parameters())
    if params is None:
        chosen = [name for name, parameter in known.items() if parameter.requires_grad]
    elif callable(params):
        chosen = [name for name, parameter in known.items() if params(name, parameter)]
    else:
        chosen = [params] if isinstance(params, str) else list(params)
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise ValueError(f"unknown parameters {unknown}; the model has {', '.join(known)}")
    if not chosen:
        raise ValueError(f"no parameter learns: all of {', '.join(known) or 'none'} are frozen or left out by params=")
    return chosen


def _check_trace(traced: Tensor, state: Tensor) -> None:
    scale = state.abs().max().clamp_min(torch.finfo(state.dtype).tiny)
    error = (traced - state).abs().amax((0, 2)) / scale
    if float(error.max()) > 1e3 * torch.finfo(state.dtype).eps:
        time = int(error.argmax())
        raise ValueError(
            f"the traced step differs from the solved states by {float(error.max()):.1e} of their size (step {time}). "
            "Either the parameters changed after solve (solve again), or a step depends on other trials, on the time, "
            "or on something outside of x_t and z"
        )
