"""Problems: a model together with its inputs and its start, posed before anything is computed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from kpflow_dyn.arrays import Array, is_torch_array


@dataclass(frozen=True)
class DiscreteProblem:
    """A recurrent model z_t = cell(x_t, z_{t-1}), whose state is S = (z_1, ..., z_T) [trial, time, unit].

    Args:
        cell: torch's nn.RNN, nn.GRU or nn.LSTM with any number of layers, one of their Cells, or any nn.Module called
            as `cell(x_t, z)` with x_t [trial, input] and z [trial, unit] (or a tuple of such), giving the next z. Its
            trials must not influence each other.
        x: inputs [trial, time, input], whatever the layer's `batch_first` says.
        z0: the state before the first step: [trial, unit]; [unit] for all trials; or torch's own h_0
            [layer, trial, unit] or (h_0, c_0). Zeros when None. The unit axis holds all layers' h one after another,
            then all layers' c.

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.zeros(2, 5, 3))
        >>> tuple(kp.solve(problem).state.shape)
        (2, 5, 8)
    """

    cell: Any
    x: Array
    z0: Any = None

    def __post_init__(self) -> None:
        if not is_torch_array(self.x):
            raise TypeError(f"x is {type(self.x).__name__}, expected a torch tensor [trial, time, input]")
        from kpflow_dyn.torch_backend.checks import check_input

        check_input(self.x)

    def remake(self, **changes: Any) -> DiscreteProblem:
        """A copy with some fields replaced: `problem.remake(z0=...)`."""
        unknown = set(changes) - {field.name for field in dataclasses.fields(self)}
        if unknown:
            raise TypeError(f"remake got {sorted(unknown)}, expected some of cell, x, z0")
        return dataclasses.replace(self, **changes)
