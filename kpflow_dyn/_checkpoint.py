"""Recurrent networks from checkpoint files: a PyTorch state dict in, a cell with its weights and its readout out.

Nothing in the file is executed: a .pt or .pth file is read with weights_only=True, and .safetensors holds arrays only.
"""

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._problems.parameters import CheckpointError, check_names, listing, opened
from kpflow_dyn.models import CTRNNCell

READOUT_NAMES = ("readout", "out", "output", "fc", "linear", "decoder", "head", "h2o")
"""Last components of a name under which a readout is found without being named."""


Cell = nn.RNNBase | nn.RNNCellBase | CTRNNCell


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file held.

    Attributes:
        cell: the recurrent network: nn.RNN, nn.GRU or nn.LSTM (batch_first), their Cells, or `CTRNNCell`; eval mode.
        readout: the linear layer on its state, or None where the file has none.
        prefix: what stands before the recurrent weights' names in the file, such as "rnn.".
        unused: names in the file that belong to neither, such as an encoder in front of the network.
        readout_name: the readout's name in the file, such as "fc", or None.
    """

    cell: Cell
    readout: nn.Linear | None
    prefix: str
    unused: tuple[str, ...]
    readout_name: str | None


def load_checkpoint(
    path: str | Path,
    model: str,
    prefix: str | None = None,
    readout: str | None = None,
    nonlinearity: str | None = None,
    outputs: int | Callable[[int], bool] | None = None,
) -> Checkpoint:
    """Read a recurrent network, and its readout if there is one, from a state dict on disk.

    The file's sizes and dtype become the network's. A state dict nested under "state_dict" or "model_state_dict" is
    found. Names ending in `_l0, _l1, ...` make an nn.RNN, nn.GRU or nn.LSTM of that many layers, names without a layer
    number a Cell; `ctrnn` is a saved `CTRNNCell`.

    Args:
        path: a .pt, .pth or .safetensors file.
        model: "rnn", "gru", "lstm" or "ctrnn".
        prefix: what stands before the recurrent weights' names ("rnn." in rnn.weight_hh_l0, the dot may be left out).
            By default the only one that fits.
        readout: the readout layer's name. By default the one layer whose last component is in `READOUT_NAMES` and
            whose weight is [out, hidden], or else the only layer with a weight [outputs, hidden].
        nonlinearity: "tanh" (the default) or "relu", for rnn and ctrnn, whose files do not say.
        outputs: how many outputs the readout has, where that is known from a task; or whether so many fit it.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a file that cannot be used; the message says why.
    """
    _check_options(model, nonlinearity)
    tensors = _find_state_dict(_read(Path(path)))
    prefix = _find_prefix(tensors, model, prefix)
    weights = {key.removeprefix(prefix): tensors[key] for key in tensors if _is_recurrent(key, prefix, model)}
    cell = _empty_cell(weights, model, prefix, nonlinearity or "tanh")
    name = _find_readout(tensors, cell.hidden_size, readout, outputs)
    used = [prefix + key for key in weights] + [key for key in (f"{name}.weight", f"{name}.bias") if key in tensors]
    _check_numbers({key: tensors[key] for key in used})
    cell.load_state_dict(weights, assign=True)
    layer = None if name is None else _build_readout(tensors, name)
    return Checkpoint(cell.eval(), layer, prefix, tuple(key for key in tensors if key not in used), name)


_GATES = {"rnn": 1, "gru": 3, "lstm": 4}
_LAYERS: dict[str, Callable[..., nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
_CELLS: dict[str, Callable[..., nn.RNNCellBase]] = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell}
_MODELS = (*_GATES, "ctrnn")
_TORCH_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?")
_CTRNN_NAMES = ("W", "U", "b", "alpha", "alpha_logit")


def _check_options(model: str, nonlinearity: str | None) -> None:
    if model not in _MODELS:
        raise ValueError(f"model must be one of {', '.join(_MODELS)}, got {model!r}")
    if nonlinearity not in (None, "tanh", "relu"):
        raise ValueError(f"nonlinearity must be tanh or relu, got {nonlinearity!r}")
    if nonlinearity is not None and model not in ("rnn", "ctrnn"):
        raise ValueError(f"nonlinearity is a choice for rnn and ctrnn only; leave it out for {model}")


def _read(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file {path}")
    if path.suffix == ".safetensors":
        with opened(path, "pt") as file:
            return {name: file.get_tensor(name) for name in list(file.keys())}
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # on a foreign file torch.load raises whatever its parser stumbled over, KeyError too
        raise CheckpointError(_why_unreadable(path)) from error


def _why_unreadable(path: Path) -> str:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return f"{path} is not a checkpoint written by torch.save, or is damaged"
    return (
        f"{path} holds Python objects ({', '.join(foreign)}) that only unpickling could read, which may run code; "
        "save the weights alone: torch.save(model.state_dict(), path)"
    )


def _find_state_dict(content: Any) -> dict[str, Tensor]:
    for container in ("state_dict", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"expected a state dict, names with tensors, got a {type(content).__name__} without any; "
            "save one with torch.save(model.state_dict(), path)"
        )
    halves = (torch.float16, torch.bfloat16)
    return {key: tensor.float() if tensor.dtype in halves else tensor for key, tensor in tensors.items()}


def _find_prefix(tensors: dict[str, Tensor], model: str, prefix: str | None) -> str:
    found = _find_networks(tensors)
    if not found:
        raise CheckpointError(
            "no recurrent weights: expected names that end in weight_hh_l0 (a layer), weight_hh (a cell) or W beside U "
            f"(a CTRNNCell), got {listing(tensors)}"
        )
    if prefix is not None:
        asked = prefix if prefix.endswith(".") or not prefix else prefix + "."
        if asked not in found:
            raise CheckpointError(f"no recurrent weights with prefix {asked!r}; there are some with {listing(found)}")
        found = {asked: found[asked]}
    fitting = [candidate for candidate, kind in found.items() if kind == model]
    if len(fitting) > 1:
        raise CheckpointError(f"several {model} networks, with prefixes {listing(fitting)}; choose one with prefix=")
    if not fitting:
        raise CheckpointError(_other_architecture(tensors, found, model))
    return fitting[0]


def _find_networks(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Which architecture the weights under each prefix look like; `unknown` where their shape says none."""
    found = {}
    for key, tensor in tensors.items():
        head, dot, name = key.rpartition(".")
        if name in ("weight_hh_l0", "weight_hh"):
            found[head + dot] = _architecture(tensor)
        elif name == "W" and (weight_in := tensors.get(f"{head}{dot}U")) is not None:
            found[head + dot] = "ctrnn" if tensor.ndim == weight_in.ndim == 2 else "unknown"
    return found


def _architecture(weight_hh: Tensor) -> str:
    """nn.RNN, nn.GRU and nn.LSTM differ in the rows of weight_hh [gates x hidden, hidden]."""
    if weight_hh.ndim != 2:
        return "unknown"
    rows, hidden = weight_hh.shape
    return {gates * hidden: name for name, gates in _GATES.items()}.get(rows, "unknown")


def _other_architecture(tensors: dict[str, Tensor], found: dict[str, str], model: str) -> str:
    prefix, kind = next(iter(found.items()))
    name = next(prefix + name for name in ("weight_hh_l0", "weight_hh", "W") if prefix + name in tensors)
    here = f"{name} has shape {list(tensors[name].shape)}"
    if kind == "unknown":
        return f"not a checkpoint of a {model}: {here}, and rows / columns is 1 for an rnn, 3 for a gru, 4 for an lstm"
    return f"not a checkpoint of a {model} but of a {kind}: {here}; ask for model {kind}"


def _is_recurrent(key: str, prefix: str, model: str) -> bool:
    name = key.removeprefix(prefix)
    return key.startswith(prefix) and (name in _CTRNN_NAMES if model == "ctrnn" else bool(_TORCH_NAME.fullmatch(name)))


def _empty_cell(weights: dict[str, Tensor], model: str, prefix: str, nonlinearity: str) -> Cell:
    for key in weights:
        if key.endswith("_reverse"):
            raise CheckpointError(f"bidirectional networks are not supported ({key}): their state is not a recurrence")
        if key.startswith("weight_hr"):
            raise CheckpointError(f"LSTMs with proj_size are not supported ({key})")
    # On the meta device nothing is initialised, so no random number is drawn; load_state_dict brings values and dtype.
    with torch.device("meta"):
        cell = _build_ctrnn(weights, nonlinearity) if model == "ctrnn" else _build_torch(weights, model, nonlinearity)
    _check_names(weights, cell.state_dict(), prefix)
    return cell


def _build_ctrnn(weights: dict[str, Tensor], nonlinearity: str) -> CTRNNCell:
    hidden, inputs = len(weights["W"]), weights["U"].shape[-1]
    return CTRNNCell(inputs, hidden, alpha=0.5, learn_alpha="alpha_logit" in weights, nonlinearity=nonlinearity)


def _build_torch(weights: dict[str, Tensor], model: str, nonlinearity: str) -> nn.RNNBase | nn.RNNCellBase:
    options = {"nonlinearity": nonlinearity} if model == "rnn" else {}
    layers = sum(key.startswith("weight_hh_l") for key in weights)
    number = "_l0" if layers else ""
    weight_ih, weight_hh = weights.get(f"weight_ih{number}"), weights[f"weight_hh{number}"]
    if weight_ih is None or weight_ih.ndim != 2:
        raise CheckpointError(f"weight_hh{number} needs a matrix weight_ih{number} beside it; got {listing(weights)}")
    inputs, hidden = weight_ih.shape[1], weight_hh.shape[1]
    bias = any(key.startswith("bias") for key in weights)
    if not layers:
        return _CELLS[model](inputs, hidden, bias=bias, **options)
    return _LAYERS[model](inputs, hidden, layers, bias=bias, batch_first=True, **options)


def _check_names(weights: dict[str, Tensor], expected: dict[str, Tensor], prefix: str) -> None:
    problem = f"the weights under prefix {prefix!r} do not make up a network"
    check_names(weights, expected, problem, "save all of the module's state_dict()", prefix)


def _find_readout(tensors: dict[str, Tensor], hidden: int, asked: str | None, outputs: Any) -> str | None:
    weights = [key for key, tensor in tensors.items() if tensor.ndim == 2 and tensor.shape[1] == hidden]
    layers = [key.removesuffix(".weight") for key in weights if key.endswith(".weight")]
    if asked is not None:
        if asked not in layers:
            raise CheckpointError(f"no layer {asked!r} with a weight [out, {hidden}]; there are {listing(layers)}")
        return asked
    named = [layer for layer in layers if layer.rpartition(".")[2] in READOUT_NAMES]
    fits = outputs if callable(outputs) else lambda width: width == outputs
    fitting = [layer for layer in layers if fits(len(tensors[f"{layer}.weight"]))]
    if len(named) != 1 and len(both := [layer for layer in named or fitting if layer in fitting]) == 1:
        return both[0]
    if len(named) > 1:
        raise CheckpointError(f"several layers could be the readout, {listing(named)}; choose one with readout=")
    return named[0] if named else None


def _build_readout(tensors: dict[str, Tensor], name: str) -> nn.Linear:
    weights = {part: tensors[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in tensors}
    out, hidden = weights["weight"].shape
    layer = nn.Linear(hidden, out, bias="bias" in weights, device="meta")
    _check_names(weights, layer.state_dict(), f"{name}.")
    layer.load_state_dict(weights, assign=True)
    return layer


def _check_numbers(used: dict[str, Tensor]) -> None:
    dtypes = {key: tensor.dtype for key, tensor in used.items() if key.rpartition(".")[2] != "alpha"}
    if len(set(dtypes.values())) > 1 or not all(dtype.is_floating_point for dtype in dtypes.values()):
        raise CheckpointError(f"weights must share one floating dtype, got {dtypes}; save model.float().state_dict()")
    for key, tensor in used.items():
        if not (finite := tensor.isfinite()).all():
            first = tuple((~finite).nonzero()[0].tolist())
            problem = f"{key} has a NaN or infinity, first at {first}"
            raise CheckpointError(f"{problem}; take a checkpoint from before it diverged")
