"""Recurrent cells with the weights of a file, and the parameters that the network had which wrote it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kpflow_dyn._problems.parameters import CheckpointError, check_names, listing
from kpflow_dyn.models import CTRNNCell, LowRankRNNCell

Cell = nn.RNNBase | nn.RNNCellBase | CTRNNCell | LowRankRNNCell

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
_LAYERS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
_CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}


def cell_of(weights: dict[str, Tensor], model: str, prefix: str, nonlinearity: str, alpha: float | None) -> Cell:
    """The cell of this model whose weights these are, by their names below the prefix."""
    for key in weights:
        if key.endswith("_reverse"):
            raise CheckpointError(
                f"bidirectional networks are no recurrence ({key}); give the module to be filled (--module)"
            )
        if key.startswith("weight_hr"):
            raise CheckpointError(f"an LSTM with proj_size ({key}); give the module to be filled (--module)")
    if "W_rec" in weights:
        return _of_psychrnn(weights, nonlinearity, 0.1 if alpha is None else alpha)
    if model in ("ctrnn", "lowrank"):
        return _filled(_leaky(weights, model, nonlinearity), _with_leak(weights, alpha, prefix), prefix)
    if "bias" in weights:
        return _one_bias(weights, model, prefix, nonlinearity)
    return _filled(_of_torch(weights, model, nonlinearity), weights, prefix)


def _filled(make: Callable[[], Cell], weights: Mapping[str, Tensor], prefix: str) -> Cell:
    # On the meta device nothing is initialised, so no random number is drawn; load_state_dict brings values and dtype.
    with torch.device("meta"):
        cell = make()
    problem = f"the weights under prefix {prefix!r} do not make up a network"
    check_names(weights, cell.state_dict(), problem, "save all of the module's state_dict()", prefix)
    cell.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
    return cell.eval()


def _of_torch(weights: Mapping[str, Tensor], model: str, nonlinearity: str) -> Callable[[], Cell]:
    options = {"nonlinearity": nonlinearity} if model == "rnn" else {}
    layers = sum(key.startswith("weight_hh_l") for key in weights)
    number = "_l0" if layers else ""
    weight_ih, weight_hh = weights.get(f"weight_ih{number}"), weights[f"weight_hh{number}"]
    if weight_ih is None or weight_ih.ndim != 2:
        raise CheckpointError(f"weight_hh{number} needs a matrix weight_ih{number} beside it; got {listing(weights)}")
    inputs, hidden = weight_ih.shape[1], weight_hh.shape[1]
    bias = any(key.startswith("bias") for key in weights)
    if not layers:
        return lambda: _CELLS[model](inputs, hidden, bias=bias, **options)
    return lambda: _LAYERS[model](inputs, hidden, layers, bias=bias, batch_first=True, **options)


def _one_bias(weights: dict[str, Tensor], model: str, prefix: str, nonlinearity: str) -> Cell:
    """The cell of torch for one bias in the place of two: the second stays zero, but for `bias_n` of a GRU."""
    apart = weights.pop("bias_n", None)
    bias = weights.pop("bias")
    both = weights | {"bias_ih": bias, "bias_hh": torch.zeros_like(bias)}
    cell = _filled(_of_torch(both, model, nonlinearity), both, prefix)
    cell.bias_hh.requires_grad_(False)
    if apart is not None:
        if 3 * len(apart) != len(bias):
            raise CheckpointError(f"{prefix}bias_n must be [{len(bias) // 3}], got {list(apart.shape)}")
        cell.bias_hh = nn.Parameter(apart.clone())
        parametrize.register_parametrization(cell, "bias_hh", LastGate(), unsafe=True)
    return cell


class LastGate(nn.Module):
    """The bias of a GRU's new state behind zeros for its two gates."""

    def forward(self, bias: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(bias), torch.zeros_like(bias), bias])


def _leaky(weights: Mapping[str, Tensor], model: str, nonlinearity: str) -> Callable[[], Cell]:
    inputs, options = weights["U"].shape[-1], {"learn_alpha": "alpha_logit" in weights, "nonlinearity": nonlinearity}
    if model == "lowrank":
        units, rank = weights["m"].shape
        return lambda: LowRankRNNCell(inputs, units, rank, alpha=0.5, **options)
    return lambda: CTRNNCell(inputs, len(weights["W"]), alpha=0.5, **options)


def _with_leak(weights: dict[str, Tensor], alpha: float | None, prefix: str) -> dict[str, Tensor]:
    own = weights.get("alpha")
    if own is not None and not (own.numel() == 1 and 0 < own.item() <= 1):
        raise CheckpointError(f"{prefix}alpha must be one number in (0, 1], dt / tau, got {own.flatten()[:6].tolist()}")
    if alpha is None:
        return weights
    if "alpha" in weights or "alpha_logit" in weights:
        raise CheckpointError("the file has the leak itself; leave alpha out")
    return weights | {"alpha": torch.tensor(alpha, dtype=torch.float64)}


PSYCHRNN = {"W_in": ("U", "input_connectivity"), "W_rec": ("W", "rec_connectivity")}


def _of_psychrnn(weights: Mapping[str, Tensor], nonlinearity: str, alpha: float) -> Cell:
    """The leaky cell of PsychRNN, h' = (1 - a) h + a (W phi(h) + U x + b), with what is fixed of its weights."""
    dtype = weights["W_rec"].dtype
    own = {name: weights[key] for key, name in (("W_rec", "W"), ("W_in", "U"), ("b_rec", "b")) if key in weights}
    own["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    cell = _filled(_leaky(own, "ctrnn", nonlinearity), own, "")
    for key, (name, mask) in PSYCHRNN.items():
        signs = weights["Dale_rec"].diagonal() if key == "W_rec" and "Dale_rec" in weights else None
        constrain(cell, name, weights.get(mask), signs if is_dale(weights) else None, is_dale(weights), dtype)
    return cell


def is_dale(weights: Mapping[str, Tensor]) -> bool:
    """Whether a network of PsychRNN keeps Dale's law: it has a ratio, or units that inhibit."""
    ratio, signs = weights.get("dale_ratio"), weights.get("Dale_rec")
    if ratio is not None and ratio.numel() == 1 and ratio.is_floating_point():
        return bool(0 < ratio.item() <= 1)
    return signs is not None and bool((signs < 0).any())


def constrain(
    module: nn.Module, name: str, mask: Tensor | None, signs: Tensor | None, positive: bool, dtype: torch.dtype
) -> None:
    """Keep a weight's mask and the signs of its columns while it learns."""
    if positive or (mask is not None and not (mask == 1).all()):
        shape = getattr(module, name).shape
        for part, expected in ((mask, shape), (signs, shape[1:])):
            if part is not None and part.shape != expected:
                raise CheckpointError(f"what is fixed of {name} must be {list(expected)}, got {list(part.shape)}")
        first, second = (None if part is None else part.to(dtype) for part in (mask, signs))
        parametrize.register_parametrization(module, name, Constrained(first, second, positive), unsafe=True)


class Constrained(nn.Module):
    """|w m| s of a weight w [out, in], with a mask m [out, in] and a sign s [in] of each column where there are any."""

    mask: Tensor | None
    signs: Tensor | None

    def __init__(self, mask: Tensor | None, signs: Tensor | None, positive: bool) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.register_buffer("signs", signs)
        self.positive = positive

    def forward(self, weight: Tensor) -> Tensor:
        weight = weight if self.mask is None else weight * self.mask
        weight = weight.abs() if self.positive else weight
        return weight if self.signs is None else weight * self.signs
