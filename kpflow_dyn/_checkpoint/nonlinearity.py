"""Which nonlinearity a network had whose file does not say: the one with which it does its task."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._learning.losses import loss_of_task, output_loss
from kpflow_dyn.tasks import TaskData

TRIALS = 64
CLEARLY = 0.7
"""A loss so many times the other one, or less, is clearly lower."""
CHOICES = ("tanh", "relu")


def loss_on(task: TaskData, cell: nn.Module, readout: nn.Module, start: Tensor | None, loss: str | None) -> float:
    """The loss of a network on the first trials of a task; infinite where it diverges."""
    like = next(cell.parameters())
    x = torch.from_numpy(task.inputs[:TRIALS]).to(like.dtype)
    with torch.no_grad():
        y = readout(states(cell, x, start))
    targets = task.targets[:TRIALS]  # type: ignore[index]  # the task has targets
    mask = None if task.mask is None else task.mask[:TRIALS]
    if not y.isfinite().all() or (mask is not None and not mask.any()):
        return math.inf
    return float(output_loss(loss or loss_of_task(task, y.shape), targets, mask, y)(y))


def states(cell: nn.Module, x: Tensor, start: Tensor | None) -> Tensor:
    """The states [trial, time, unit] of a plain or leaky network, of its last layer, from x [trial, time, input]."""
    if isinstance(cell, nn.RNNBase):
        return cell(x)[0]
    units: Any = cell.hidden_size
    state = torch.zeros(len(x), units, dtype=x.dtype) if start is None else start.to(x.dtype).expand(len(x), -1)
    found = []
    for x_t in x.unbind(1):
        state = cell(x_t, state)
        found.append(state)
    return torch.stack(found, 1)


def from_task(losses: Callable[[str], float], usual: str, where: str) -> tuple[str, str]:
    """The nonlinearity with the clearly lower loss, or else the usual one; and how it was found, in words."""
    found = {name: losses(name) for name in CHOICES}
    better, worse = sorted(CHOICES, key=found.__getitem__)
    said = f"the loss on {where} is {found[better]:.4g} with {better} and {found[worse]:.4g} with {worse}"
    if found[better] <= CLEARLY * found[worse] and math.isfinite(found[better]):
        return better, f"{better}, taken from the task, as the file does not say: {said}; --nonlinearity sets it"
    return usual, f"{usual}, assumed, as neither the file nor the task says: {said}; --nonlinearity sets it"
