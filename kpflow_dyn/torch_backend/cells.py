"""One calling convention for every torch cell: a module step(x [trial, input], z [trial, unit]) -> z."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn.torch_backend.checks import check_module


class Step(nn.Module):
    """A cell with a flat state; the cell's parameters keep their names behind "cell."."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.training = cell.training

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The next state."""
        return self.cell(x, z)


class TupleStep(Step):
    """A cell whose state is a tuple, such as (h, c), laid side by side on the unit axis."""

    def __init__(self, cell: nn.Module, sizes: list[int]) -> None:
        super().__init__(cell)
        self.sizes = sizes

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The next state."""
        return torch.cat(self.cell(x, z.split(self.sizes, -1)), -1)


class StackedStep(Step):
    """One time step of nn.RNN, nn.GRU or nn.LSTM: all layers; z = [h_1 ... h_L], for an LSTM then c_1 ... c_L."""

    cell: nn.RNNBase

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """The next state."""
        layers, size = self.cell.num_layers, self.cell.hidden_size
        states = z.split(size, -1)
        hidden, cells = [], []
        for layer in range(layers):
            weights = [getattr(self.cell, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh")]
            if self.cell.bias:
                weights += [getattr(self.cell, f"{name}_l{layer}") for name in ("bias_ih", "bias_hh")]
            if isinstance(self.cell, nn.LSTM):
                x, cell = torch.lstm_cell(x, [states[layer], states[layers + layer]], *weights)
                cells.append(cell)
            else:
                x = self._cell_function(x, states[layer], *weights)
            hidden.append(x)
        return torch.cat(hidden + cells, -1)

    def _cell_function(self, *args: Tensor) -> Tensor:
        if isinstance(self.cell, nn.GRU):
            return torch.gru_cell(*args)
        return torch.rnn_tanh_cell(*args) if self.cell.nonlinearity == "tanh" else torch.rnn_relu_cell(*args)


def as_step(cell: Any, x: Tensor, z0: Any) -> tuple[Step, Tensor]:
    """The cell as a step, and its initial state [trial, unit].

    Raises:
        TypeError, ValueError: for a cell, input or initial state that do not fit together.
    """
    module = check_module(cell, x)
    _check_width(module, x)
    if isinstance(module, nn.RNNBase):
        step, sizes = _stacked(module)
    elif isinstance(module, nn.LSTMCell):
        step, sizes = TupleStep(module, [module.hidden_size] * 2), [module.hidden_size] * 2
    elif isinstance(z0, tuple | list):
        sizes = [_flat_part(part).shape[-1] for part in z0]
        step = TupleStep(module, sizes)
    else:
        step, sizes = Step(module), [getattr(module, "hidden_size", None)]
    return step, _initial_state(sizes, x, z0)


def _stacked(module: nn.RNNBase) -> tuple[Step, list[int]]:
    if module.bidirectional:
        raise ValueError("a bidirectional module is no step map z_t = Phi(z_{t-1}, x_t); analyse each direction alone")
    if module.proj_size:
        raise ValueError("an LSTM with proj_size is not supported; write the projected step as a module of its own")
    parts = module.num_layers * (2 if isinstance(module, nn.LSTM) else 1)
    return StackedStep(module), [module.hidden_size] * parts


def _check_width(module: nn.Module, x: Tensor) -> None:
    width = getattr(module, "input_size", None)
    if isinstance(width, int) and x.shape[-1] != width:
        raise ValueError(f"x has {x.shape[-1]} input channels, but the cell takes {width}; x is [trial, time, input]")


def _initial_state(sizes: list[int | None], x: Tensor, z0: Any) -> Tensor:
    trials = x.shape[0]
    if z0 is None:
        if None in sizes:
            raise ValueError(
                "the cell has no hidden_size attribute, so its state size is unknown; pass z0 [trial, unit]"
            )
        return x.new_zeros(trials, sum(size for size in sizes if size is not None))
    parts = [_flat_part(part) for part in (z0 if isinstance(z0, tuple | list) else [z0])]
    if len({part.shape[:-1] for part in parts}) > 1:
        raise ValueError(
            f"the parts of z0 have shapes {[tuple(p.shape) for p in parts]}; they must have the same trials"
        )
    flat = torch.cat(parts, -1)
    flat = flat.expand(trials, -1) if flat.ndim == 1 else flat
    units = flat.shape[-1] if None in sizes else sum(size for size in sizes if size is not None)
    if tuple(flat.shape) != (trials, units):
        raise ValueError(
            f"z0 has shape {tuple(flat.shape)}, expected [trial, unit] = [{trials}, {units}] as x has {trials} trials"
        )
    if flat.dtype != x.dtype or flat.device != x.device:
        raise TypeError(f"z0 is {flat.dtype} on {flat.device}, x is {x.dtype} on {x.device}; they must agree")
    if not torch.isfinite(flat).all():
        raise ValueError("z0 holds NaN or inf")
    return flat.detach().clone()


def _flat_part(part: Any) -> Tensor:
    """[unit] or [trial, unit] as it is; torch's [layer, trial, unit] with the layers side by side."""
    if not isinstance(part, Tensor):
        raise TypeError(f"z0 is {type(part).__name__}, expected a tensor [trial, unit] or a tuple of tensors")
    return torch.cat(part.unbind(0), -1) if part.ndim == 3 else part
