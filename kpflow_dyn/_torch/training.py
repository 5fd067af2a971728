"""A torch model and its readout in training, in place."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kpflow_dyn._problems.choice import choose
from kpflow_dyn._torch.cells import as_step, over_sequence
from kpflow_dyn._torch.checks import check_module
from kpflow_dyn._torch.optimisers import OPTIMIZERS, Rule, learning_rates, made, stepped
from kpflow_dyn._torch.rollout import check_step, run

__all__ = ["OPTIMIZERS", "Rule", "Trainee", "learning_rates"]


class Trainee:
    """A model and its readout, on data [trial, time, ...] in their dtype and on their device."""

    def __init__(
        self,
        model: nn.Module,
        readout: nn.Module,
        data: Sequence[np.ndarray],
        z0: Any,
        optimizer: Callable[..., torch.optim.Optimizer],
        lr: float,
        clip: float | None,
        read: Callable[[int], slice],
        loss: Callable[..., Tensor],
    ) -> None:
        self.model, self.readout, self._clip, self._loss = model, readout, clip, loss
        known = dict(nn.ModuleList([model, readout]).named_parameters())
        self._learnt = [known[name] for name in choose(known, None)]
        like = self._learnt[0].detach().real
        self._data = [_placed(array, like) for array in data]
        check_module(readout, like)
        self._step, self._start = as_step(model, self._data[0], z0)
        check_step(self._step, model, self._data[0][:, 0], self._start)
        self._read = read(self._start.shape[-1])
        self._optimizer = made(optimizer, self._learnt, lr)

    def evaluate(self, trials: np.ndarray | slice) -> float:
        """The loss on these trials, whose gradient is kept for `step`, and the outputs as `output`."""
        x, targets, mask = self.rows(trials)
        states = self._states(x, self._start[trials])
        self._seen = states.detach(), targets, mask
        output = self.readout(states)
        loss, self.output = self._loss(output, targets, mask), output.detach()
        self._optimizer.zero_grad()
        loss.backward()
        return loss.item()

    def rows(self, trials: np.ndarray | slice) -> list[Tensor]:
        """Inputs, targets and mask of these trials."""
        return [array[trials] for array in self._data]

    def follow(self, gradient: Mapping[str, Tensor]) -> None:
        """Put this in the place of the gradient of the model's parameters, by name."""
        known, tied = dict(self.model.named_parameters()), self._of_tied()
        for name, value in gradient.items():
            parameter = known[name]
            parameter.grad = value.to(parameter.dtype) + tied.get(id(parameter), 0)

    def _of_tied(self) -> dict[int, Tensor]:
        """The readout's own part of the gradient of weights that it has in common with the model."""
        own = {id(parameter) for parameter in self.model.parameters()}
        tied = [one for one in self.readout.parameters() if one.requires_grad and id(one) in own]
        if not tied:
            return {}
        states, targets, mask = self._seen
        found = torch.autograd.grad(self._loss(self.readout(states), targets, mask), tied)
        return dict(zip(map(id, tied), found, strict=True))

    def step(self) -> None:
        """Change the parameters by the optimiser's step."""
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._learnt, self._clip)
        stepped(self._optimizer)

    def _states(self, x: Tensor, z0: Tensor) -> Tensor:
        """What the readout reads [trial, time, unit]; by torch's own loop over time where there is one."""
        width = self._read.stop - self._read.start
        if isinstance(self.model, nn.RNNBase) and width == self.model.hidden_size:
            return over_sequence(self.model, x, z0)[0]
        return run(self._step, self.model, x, z0)[..., self._read]


def _placed(array: np.ndarray, like: Tensor) -> Tensor:
    """Numbers in the dtype of `like`, class indices as they are."""
    return torch.tensor(array, dtype=None if array.dtype.kind == "i" else like.dtype, device=like.device)
