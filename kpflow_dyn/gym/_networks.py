"""Which part of a network acts: policies of stable-baselines3 and CleanRL, by the names of their weights."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kpflow_dyn._checkpoint.files import read
from kpflow_dyn._checkpoint.names import named
from kpflow_dyn._checkpoint.networks import linear_of
from kpflow_dyn._checkpoint.torch_files import is_sb3
from kpflow_dyn._problems.archives import Archive, is_zip
from kpflow_dyn._problems.parameters import CheckpointError, listing


@dataclass(frozen=True)
class Kind:
    """How a library names the layers that act, in their order.

    Attributes:
        origin: the library and its algorithms.
        parts: names of layers, or of sequences of them.
        phi: the nonlinearity between layers, where it is not among them.
        head: as in `kpflow_dyn.gym.policy`; of "" the standard deviation tells.
    """

    origin: str
    parts: tuple[str, ...]
    phi: type[nn.Module]
    head: str


MAY_BE_EMPTY = "mlp_extractor.policy_net"
KINDS = (
    Kind("stable-baselines3 PPO or A2C", (MAY_BE_EMPTY, "action_net"), nn.Tanh, ""),
    Kind("stable-baselines3 SAC", ("latent_pi", "mu"), nn.ReLU, "tanh"),
    Kind("stable-baselines3 TD3 or DDPG", ("mu",), nn.ReLU, "tanh"),
    Kind("stable-baselines3 DQN", ("q_net",), nn.ReLU, "logits"),
    Kind("CleanRL PPO of continuous actions", ("actor_mean",), nn.Tanh, "mean"),
    Kind("CleanRL PPO", ("actor",), nn.Tanh, "logits"),
    Kind("CleanRL SAC", ("fc1", "fc2", "fc_mean"), nn.ReLU, "tanh"),
    Kind("CleanRL TD3 or DDPG", ("fc1", "fc2", "fc_mu"), nn.ReLU, "tanh"),
    Kind("CleanRL DQN", ("network",), nn.ReLU, "logits"),
)
CLIP_MEAN = 2.0  # stable-baselines3's default, of SAC with state-dependent exploration


def acting_part(net: Any) -> tuple[Any, str | None, str]:
    """The layers that act, of a module or a file; the head that they have, if that is known; and what was found."""
    from_file = isinstance(net, str | Path)
    tensors = named(read(Path(net)).tree).tensors if from_file else dict(net.state_dict())
    for kind in KINDS:
        if (prefix := _prefix(kind, tensors)) is not None:
            return _of_kind(kind, prefix, tensors, net)
    if from_file:
        kinds = ", ".join(kind.origin for kind in KINDS)
        raise CheckpointError(f"{net} holds no policy of {kinds}; it has {listing(tensors)}. Give the module, filled")
    return net, None, f"a {type(net).__name__}"


def _prefix(kind: Kind, tensors: Mapping[str, Tensor]) -> str | None:
    """What stands before the names of this kind, where all of its parts are; target networks do not act."""
    pattern = re.compile(rf"((?:.*\.)?){re.escape(kind.parts[-1])}(?:\.\d+)?\.weight")
    found = {match[1] for name in tensors if (match := pattern.fullmatch(name)) and "target" not in match[1]}
    needed = [part for part in kind.parts if part != MAY_BE_EMPTY]
    whole = [p for p in found if all(any(name.startswith(f"{p}{part}.") for name in tensors) for part in needed)]
    return min(whole, key=len, default=None)


def _of_kind(kind: Kind, prefix: str, tensors: Mapping[str, Tensor], net: Any) -> tuple[Any, str, str]:
    own = [name for name in tensors if re.match(rf"{re.escape(prefix)}((pi_)?features_extractor|lstm_actor)\.", name)]
    if own:
        raise ValueError(
            f"the policy has layers of its own ({listing(own)}), of a CNN or an LSTM, before those that act; "
            "give a torch module of all of them, that takes observations, and one with a memory to ClosedLoop itself"
        )
    phi, on_phi = kind.phi, ""
    if isinstance(net, nn.Module):
        layers = [layer for part in kind.parts for layer in _flat(net.get_submodule(prefix + part))]
    else:
        layers, said = list(_rebuilt(kind, prefix, tensors)), _said_phi(Path(net))
        phi = said or kind.phi
        on_phi = f", {phi.__name__} {'as the file says' if said else 'assumed, as the file does not say'}"
    layers = list(_with_phi(layers, phi))
    head = kind.head or ("mean" if f"{prefix}log_std" in tensors else "logits")
    if head == "mean" and getattr(net, "squash_output", False):
        head = "tanh"
    if head == "tanh" and isinstance(layers[-1], nn.Tanh):
        head = "scaled"
    return nn.Sequential(*layers), head, f"{kind.origin}{on_phi}"


def _said_phi(path: Path) -> type[nn.Module] | None:
    """The nonlinearity that a file of stable-baselines3 names among its options, which are text."""
    with path.open("rb") as file:
        if not is_zip(file.read(16)):
            return None
        archive = Archive(file)
        if not is_sb3(archive) or "data" not in archive.names:
            return None
        match = re.search(
            rb"\"activation_fn\": \"<class 'torch\.nn\.modules\.activation\.(\w+)'>", archive.read("data")
        )
    found = getattr(nn.modules.activation, match[1].decode(), None) if match else None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None


def _flat(module: nn.Module) -> Iterator[nn.Module]:
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for child in module:
        yield from _flat(child)


def _with_phi(layers: list[nn.Module], phi: type[nn.Module]) -> Iterator[nn.Module]:
    """The layers, with a nonlinearity between two linear ones that follow each other."""
    for before, layer in zip([None, *layers], layers, strict=False):
        if isinstance(before, nn.Linear) and isinstance(layer, nn.Linear):
            yield phi()
        yield layer


def _rebuilt(kind: Kind, prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """The linear layers of a file."""
    for part in kind.parts:
        pattern = re.compile(rf"{re.escape(prefix + part)}((?:\.\d+)?)\.weight")
        numbers = sorted((int(m[1][1:] or 0), m[1]) for name in tensors if (m := pattern.fullmatch(name)))
        for _, number in numbers:
            head = f"{prefix}{part}{number}."
            yield linear_of({n: tensors[head + n] for n in ("weight", "bias") if head + n in tensors}, head)
        if part == "mu" and len(kind.parts) == 2 and numbers and numbers[-1][1]:
            yield nn.Hardtanh(-CLIP_MEAN, CLIP_MEAN)
