"""One calling convention for every torch cell: step(cell, x [trial, input], z [trial, unit]) -> z."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._arrays import is_array
from kpflow_dyn._problems.checks import cell_start, check_width
from kpflow_dyn._problems.layouts import Layout, is_plain_start, layout_of, start_of
from kpflow_dyn._problems.problems import DiscreteProblem, OverTimes
from kpflow_dyn._problems.starts import encode, rows_of_parameter, start_named
from kpflow_dyn._shown import type_name
from kpflow_dyn._torch.checks import check_module
from kpflow_dyn._torch.left_alone import left_alone
from kpflow_dyn._torch.trees import flattened

HOOKS = ("forward", "forward_pre", "backward", "backward_pre")
Step = Callable[[nn.Module, Tensor, Tensor], Tensor]


def plain(cell: nn.Module, x: Tensor, z: Tensor) -> Tensor:
    """The step of a cell with a flat state."""
    return cell(x, z)


@dataclass(frozen=True)
class LaidOut:
    """The step of a cell whose state is a pytree, such as (h, c), or complex, laid side by side on the unit axis."""

    layout: Layout

    def __call__(self, cell: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        """The next state."""
        return self.layout.join(cell(x, self.layout.split(z)), "what the cell returns")


def stacked(cell: Any, x: Tensor, z: Tensor) -> Tensor:
    """One time step of nn.RNN, nn.GRU or nn.LSTM: all layers; z = [h_1 ... h_L], for an LSTM then c_1 ... c_L."""
    layers, states = cell.num_layers, z.split(cell.hidden_size, -1)
    hidden, cells = [], []
    for layer in range(layers):
        weights = [getattr(cell, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh")]
        if cell.bias:
            weights += [getattr(cell, f"{name}_l{layer}") for name in ("bias_ih", "bias_hh")]
        if isinstance(cell, nn.LSTM):
            x, memory = torch.lstm_cell(x, [states[layer], states[layers + layer]], *weights)
            cells.append(memory)
        else:
            x = _cell_function(cell)(x, states[layer], *weights)
        hidden.append(x)
    return torch.cat(hidden + cells, -1)


def as_module(cell: Any, x: Tensor, z: Tensor) -> Tensor:
    """The same step by the layer itself, called on a sequence of one; for layers that only their hooks complete."""
    return over_sequence(cell, x[:, None], z)[1]


def _is_plain(layer: nn.RNNBase) -> bool:
    """Whether a layer is what its weights say: neither hooks nor a forward of its own come in between."""
    plain = type(layer).forward in (nn.RNN.forward, nn.GRU.forward, nn.LSTM.forward)
    return plain and not any(getattr(layer, f"_{when}_hooks") for when in HOOKS)


def as_called(problem: DiscreteProblem) -> tuple[Callable[..., Tensor], slice] | None:
    """A layer as torch runs it, (layer, nothing) -> the last h [trial, time, unit], and where that is in the state.

    None where nothing comes in between its weights and its steps.
    """
    layer, x = problem.cell, problem.x
    if not isinstance(layer, nn.RNNBase) or _is_plain(layer):
        return None
    z0, last = discrete_step(problem)[1], layer.num_layers * layer.hidden_size
    cell = (lambda model: model) if problem.encoder is None else (lambda model: model.of_states)
    return lambda model, _: over_sequence(cell(model), x, z0)[0], slice(last - layer.hidden_size, last)


def _cell_function(cell: nn.RNNBase) -> Callable[..., Tensor]:
    if isinstance(cell, nn.GRU):
        return torch.gru_cell
    return torch.rnn_tanh_cell if cell.nonlinearity == "tanh" else torch.rnn_relu_cell


def over_sequence(module: nn.RNNBase, x: Tensor, z0: Tensor) -> tuple[Tensor, Tensor]:
    """nn.RNN, nn.GRU or nn.LSTM as torch runs it: the last layer's h [trial, time, hidden], and the last z."""
    layered = torch.stack(z0.split(module.hidden_size, -1)).contiguous()  # [layer, trial, hidden], all h, then all c
    lstm = isinstance(module, nn.LSTM)
    initial = (layered[: module.num_layers], layered[module.num_layers :]) if lstm else layered
    output, final = module(x if module.batch_first else x.transpose(0, 1), initial)
    final = torch.cat(final) if lstm else final
    return output if module.batch_first else output.transpose(0, 1), torch.cat(final.unbind(0), -1)


def discrete_step(problem: DiscreteProblem) -> tuple[Step, Tensor]:
    """The step (cell, x, z) -> z on all trials, and the initial state."""
    given = encode(problem.backend, problem.encoder, problem.z0) if problem.encodes else problem.z0
    with start_named(problem):
        step, z0 = as_step(problem.cell, problem.x, given)
    return step, rows_of_parameter(problem.backend, problem.encoder, z0) if is_array(problem.encoder) else z0


def flat_start(problem: DiscreteProblem | OverTimes, given: Any) -> Tensor:
    """What an encoder gives as z_0 [trial, unit], differentiable."""
    if isinstance(problem, OverTimes):
        return problem.form.layout.join(given)
    if is_plain_start(given):
        return given
    if isinstance(problem.cell, nn.RNNBase | nn.LSTMCell) or _is_layered(problem.cell, given):
        parts = given if isinstance(given, tuple | list) else [given]
        return torch.cat([_flat_part(part) for part in parts], -1)
    return start_of(given, len(problem.x), flattened, _part)[1]


def as_step(cell: Any, x: Tensor, z0: Any) -> tuple[Step, Tensor]:
    """The step of cells like this one, and the initial state [trial, unit]; raises where cell, x and z0 do not fit."""
    module = check_module(cell, x)
    check_width(module, x)
    if isinstance(module, nn.RNNBase):
        step, sizes = _stacked(module)
    elif isinstance(module, nn.LSTMCell):
        sizes = [module.hidden_size] * 2
        step = LaidOut(layout_of((z := x.new_zeros(1, module.hidden_size), z), flattened, _part)[0])
    elif z0 is not None and not (is_plain_start(z0) or _is_layered(module, z0)):
        layout, z0 = start_of(z0, len(x), flattened, _part)
        step, sizes = LaidOut(layout), [sum(layout.sizes)]
    else:
        step, sizes = plain, [getattr(module, "hidden_size", None)]
    start = initial_state(sizes, x, z0)
    return _with_derivatives_inside(step, module, x[:, 0], start), start


def _is_layered(cell: nn.Module, z0: Any) -> bool:
    """Whether a start is torch's own h_0 [layer, trial, unit], of a cell whose state is flat."""
    return isinstance(z0, Tensor) and not z0.is_complex() and isinstance(getattr(cell, "hidden_size", None), int)


def _with_derivatives_inside(step: Step, cell: nn.Module, x: Tensor, z: Tensor) -> Step:
    """The step as it is, unless it takes a derivative inside, as of an energy, and so fails where gradients are off."""
    # Any other failure is told where the step is checked.
    with left_alone(cell, values=False), torch.no_grad(), suppress(Exception):
        try:
            step(cell, x, z)
        except RuntimeError as error:
            return Differentiating(step) if "does not require grad" in str(error) else step
    return step


@dataclass(frozen=True)
class Differentiating:
    """A step that takes derivatives inside, so that gradients must be on while it runs."""

    step: Step

    def __call__(self, cell: nn.Module, x: Tensor, z: Tensor) -> Tensor:
        """The next state."""
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            after = self.step(cell, x, z)
        return after if recording else after.detach()


def _stacked(module: nn.RNNBase) -> tuple[Step, list[int]]:
    if module.bidirectional:
        raise ValueError("a bidirectional module is no step map z_t = Phi(z_{t-1}, x_t); pose StaticProblem(module, x)")
    if module.proj_size:
        raise ValueError("an LSTM with proj_size is no step map of its cells; pose StaticProblem(module, x)")
    parts = module.num_layers * (2 if isinstance(module, nn.LSTM) else 1)
    return stacked if _is_plain(module) else as_module, [module.hidden_size] * parts


def initial_state(sizes: Sequence[int | None], x: Tensor, z0: Any) -> Tensor:
    """z0 [trial, unit] with the parts of a state of these sizes side by side, on the device of x; zeros when None."""
    start = cell_start(sizes, x, z0, _flat_part)
    if start.device != x.device:
        raise TypeError(f"z0 lies on {start.device}, x on {x.device}; they must agree")
    return start.detach().clone()


def _flat_part(part: Any) -> Tensor:
    """[unit] or [trial, unit] as it is; torch's [layer, trial, unit] with the layers side by side."""
    part = _part(part)
    return torch.cat(part.unbind(0), -1) if part.ndim == 3 else part


def _part(part: Any) -> Tensor:
    if not isinstance(part, Tensor):
        raise TypeError(f"z0 is {type_name(part)}, expected a tensor [trial, unit] or a pytree of tensors")
    return part
