"""Torch's own cells as their equations.

`torch.func.vmap` has no rule, or a slow one, for torch's cell functions, and torch's decompositions write in place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


def rnn(phi: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """h' = phi(W x + b + U h + c)."""
    return lambda x, h, W, U, b=None, c=None: phi(linear(x, W, b) + linear(h, U, c))


def gru(x: Tensor, h: Tensor, W: Tensor, U: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
    """h' = n + z (h - n), n = tanh(W_n x + b_n + r (U_n h + c_n))."""
    (r, z, n), (r_h, z_h, n_h) = linear(x, W, b).chunk(3, -1), linear(h, U, c).chunk(3, -1)
    new = torch.tanh(n + torch.sigmoid(r + r_h) * n_h)
    return new + torch.sigmoid(z + z_h) * (h - new)


def lstm(
    x: Tensor, state: Sequence[Tensor], W: Tensor, U: Tensor, b: Tensor | None = None, c: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """m' = f m + i g, h' = o tanh(m')."""
    i, f, g, o = (linear(x, W, b) + linear(state[0], U, c)).chunk(4, -1)
    memory = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(memory), memory


EQUATIONS = {"rnn_tanh_cell": rnn(torch.tanh), "rnn_relu_cell": rnn(torch.relu), "gru_cell": gru, "lstm_cell": lstm}


class CellEquations(TorchFunctionMode):
    """While it is entered, these stand in the place of torch's cell functions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function, or the equations."""
        return EQUATIONS.get(getattr(func, "__name__", ""), func)(*args, **(kwargs or {}))
