"""Which recurrent network the names and shapes of a file's tensors make up, and which layer reads it out."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._checkpoint.cells import GATES
from kpflow_dyn._checkpoint.names import Names
from kpflow_dyn._problems.parameters import CheckpointError, check_names, listing

READOUT_NAMES = ("readout", "out", "output", "fc", "linear", "decoder", "head", "h2o", "dense")
"""Last components of a name under which a readout is found without being named."""
LEAKY = ("ctrnn", "lowrank")
MODELS = (*GATES, *LEAKY)
UNNAMED_PHI = ("rnn", *LEAKY)

_ANCHORS = ("weight_hh_l0", "weight_hh", "W", "W_rec", "m")
_TORCH_NAME = re.compile(r"(weight|bias)_(ih|hh|hr)(_l\d+(_reverse)?)?|bias|bias_n")
_LEAKY_NAMES = ("U", "b", "alpha", "alpha_logit")
_PSYCHRNN_NAMES = ("W_in", "W_rec", "b_rec", "input_connectivity", "rec_connectivity", "Dale_rec", "dale_ratio")
_OWN_NAMES: dict[str, Callable[[str], bool]] = {
    "W": lambda name: name in ("W", *_LEAKY_NAMES),
    "m": lambda name: name in ("m", "n", *_LEAKY_NAMES),
    "W_rec": lambda name: name in _PSYCHRNN_NAMES,
}


@dataclass(frozen=True)
class Found:
    """A recurrent network among the names of a file.

    Attributes:
        model: rnn, gru, lstm, ctrnn, lowrank, or unknown.
        key: of the mapping that holds its weights, as `Names.keys`.
        prefix: what stands before the names of its weights in that mapping, with a dot behind it.
        anchor: the weight by which it was found.
    """

    model: str
    key: str
    prefix: str
    anchor: str

    @property
    def whole(self) -> str:
        """What stands before the weights in the names of the file."""
        return f"{self.key}.{self.prefix}" if self.key else self.prefix

    def weights(self, names: Names) -> dict[str, Tensor]:
        """Its weights, by their names below the prefix."""
        own = _OWN_NAMES.get(self.anchor, lambda name: bool(_TORCH_NAME.fullmatch(name)))
        below = {name.removeprefix(self.whole): name for name in names.tensors if name.startswith(self.whole)}
        return {short: names.tensors[name] for short, name in below.items() if own(short)}


def networks_in(names: Names) -> list[Found]:
    """All recurrent networks; their model is `unknown` where the shape of the weights says none."""
    found = []
    for name, tensor in names.tensors.items():
        head, dot, anchor = name.rpartition(".")
        model = _model(names.tensors, head + dot, anchor, tensor) if anchor in _ANCHORS else None
        if model is not None:
            key = names.keys[name]
            prefix = (head + dot).removeprefix(f"{key}." if key else "")
            found.append(Found(model, key, prefix, anchor))
    return found


def _model(tensors: dict[str, Tensor], prefix: str, anchor: str, weight: Tensor) -> str | None:
    if anchor in ("weight_hh_l0", "weight_hh"):
        rows, hidden = weight.shape if weight.ndim == 2 else (0, 0)
        return {gates * hidden: name for name, gates in GATES.items()}.get(rows, "unknown") if hidden else "unknown"
    beside = [tensors.get(prefix + name) for name in {"W": "U", "m": "nU", "W_rec": ["W_in"]}[anchor]]
    if any(other is None for other in beside):
        return None
    flat = all(other is not None and other.ndim == 2 for other in (weight, *beside))
    return {"m": "lowrank"}.get(anchor, "ctrnn") if flat else "unknown"


def choose(names: Names, model: str | None, prefix: str | None) -> Found:
    """The only network of this model with this prefix."""
    found = networks_in(names)
    if not found:
        raise CheckpointError(
            "no recurrent weights: expected names that end in weight_hh_l0 (a layer), weight_hh (a cell) or W beside U "
            f"(a CTRNNCell), a cell of flax or a network of PsychRNN, got {listing(names.tensors)}; give a module of "
            "your own to be filled, on the command line by --module; to compare such models, solve them in Python and "
            "give the solutions to kp.compare"
        )
    if prefix is not None:
        asked = prefix if prefix.endswith(".") or not prefix else prefix + "."
        fits = [network for network in found if asked in (network.prefix, network.whole)]
        if not fits:
            there = listing(dict.fromkeys(network.prefix for network in found))
            raise CheckpointError(f"no recurrent weights with prefix {asked!r}; there are some with {there}")
        found = fits
    fitting = [network for network in found if model in (None, network.model)]
    if len(fitting) > 1:
        raise CheckpointError(_several(fitting, model))
    if not fitting or fitting[0].model == "unknown":
        raise CheckpointError(_other_architecture(names, found[0], model))
    return fitting[0]


def _several(found: list[Found], model: str | None) -> str:
    kinds = model or " and ".join(dict.fromkeys(network.model for network in found))
    if len(keys := dict.fromkeys(network.key for network in found)) > 1:
        below = listing(dict.fromkeys(network.prefix for network in found))
        return (
            f"several {kinds} networks, under the keys {listing(keys)} with prefixes {below}; choose one with key= or "
            "prefix= (--key, --prefix)"
        )
    prefixes = listing(network.prefix for network in found)
    return f"several {kinds} networks, with prefixes {prefixes}; choose one with prefix= (--prefix)"


def _other_architecture(names: Names, network: Found, model: str | None) -> str:
    name = network.whole + network.anchor
    here = f"{name} has shape {list(names.tensors[name].shape)}"
    asked = "a recurrent network" if model is None else f"model {model}"
    if network.model == "unknown":
        return (
            f"not a checkpoint of {asked}: {here}, and rows / columns is 1 for an rnn, 3 for a gru, 4 for an lstm; "
            "where it is another (an LSTM with projections), give a module of your own to be filled (--module)"
        )
    return f"not a checkpoint of {asked}, its model is {network.model}: {here}; ask for model {network.model}"


def find_readout(names: Names, network: Found, hidden: int, asked: str | None, outputs: Any) -> str | None:
    """The name of the layer that reads the network out, in the smallest mapping around the network that has one."""
    weights = [name for name, tensor in names.tensors.items() if tensor.ndim == 2 and tensor.shape[1] == hidden]
    layers = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    if asked is not None:
        return _asked_readout(layers, network, hidden, asked)
    for head in around(network.key):
        found = _only_readout(names, [layer for layer in layers if layer.startswith(head)], outputs)
        if found is not None:
            return found
    return None


def _asked_readout(layers: list[str], network: Found, hidden: int, asked: str) -> str:
    near = [f"{head}{asked}" for head in around(network.key) if f"{head}{asked}" in layers]
    if not near:
        raise CheckpointError(f"no layer {asked!r} with a weight [out, {hidden}]; there are {listing(layers)}")
    return near[0]


def around(key: str) -> list[str]:
    """The mapping of this key and those around it, as the starts of names."""
    parts = key.split(".") if key else []
    return [".".join(parts[:count]) + "." if count else "" for count in range(len(parts), -1, -1)]


def _only_readout(names: Names, layers: list[str], outputs: Any) -> str | None:
    fits = outputs if callable(outputs) else lambda width: width == outputs
    named = [layer for layer in layers if re.sub(r"_\d+$", "", layer.rpartition(".")[2]).lower() in READOUT_NAMES]
    fitting = [layer for layer in layers if fits(len(names.tensors[f"{layer}.weight"]))]
    if len(named) != 1 and len(both := [layer for layer in named or fitting if layer in fitting]) == 1:
        return both[0]
    if len(named) > 1:
        raise CheckpointError(
            f"several layers could be the readout, {listing(named)}; choose one with readout= (--readout)"
        )
    return named[0] if named else None


def build_readout(names: Names, name: str) -> nn.Linear:
    """The layer of this name."""
    weights = {
        part: names.tensors[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in names.tensors
    }
    return linear_of(weights, f"{name}.")


def linear_of(weights: dict[str, Tensor], prefix: str) -> nn.Linear:
    """The linear layer of these weights, whose names in the file begin with the prefix."""
    if weights["weight"].ndim != 2:
        raise CheckpointError(f"{prefix}weight must be [out, hidden], got {list(weights['weight'].shape)}")
    out, hidden = weights["weight"].shape
    layer = nn.Linear(hidden, out, bias="bias" in weights, device="meta")
    check_names(weights, layer.state_dict(), "the readout is no linear layer", "name another one", prefix)
    layer.load_state_dict({part: value.clone() for part, value in weights.items()}, assign=True)
    return layer


def check_numbers(used: dict[str, Tensor]) -> None:
    """Raise a CheckpointError unless these weights share a floating dtype and are finite."""
    fixed = ("alpha", "dale_ratio")
    dtypes = {key: tensor.dtype for key, tensor in used.items() if key.rpartition(".")[2] not in fixed}
    if len(set(dtypes.values())) > 1 or not all(dtype.is_floating_point for dtype in dtypes.values()):
        raise CheckpointError(f"weights must share one floating dtype, got {dtypes}; save model.float().state_dict()")
    for key, tensor in used.items():
        if key.rpartition(".")[2] in fixed and not tensor.is_floating_point():
            continue
        if not (finite := torch.isfinite(tensor)).all():
            first = tuple((~finite).nonzero()[0].tolist())
            problem = f"{key} has a NaN or infinity, first at {first}"
            raise CheckpointError(f"{problem}; take a checkpoint from before it diverged")
