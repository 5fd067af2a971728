"""The tensors of a file by their names, and those of other libraries under the names of torch."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kpflow_dyn._checkpoint.keras import translated_cell
from kpflow_dyn._checkpoint.objects import Skipped
from kpflow_dyn._problems.parameters import CheckpointError

CONTAINERS = 200_000
LONGEST = 2_000  # name, of all keys around it together
_OF_OPTIMISERS = re.compile(r"opt(im(i[sz]ers?)?)?(_states?)?(_dicts?)?")


@dataclass(frozen=True)
class Names:
    """The tensors of a file.

    Attributes:
        tensors: by name: the keys of the mappings around each, joined by dots.
        keys: of each name, the keys of the mappings around the one that holds the tensor.
        words: texts and truth values beside them, by name.
        skipped: names of classes and functions whose objects were not made.
        origins: of each prefix whose names were translated, from what.
        short: the dtypes of half precision in the file, which become float32.
    """

    tensors: dict[str, Tensor]
    keys: dict[str, str]
    words: dict[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    origins: dict[str, str] = field(default_factory=dict)
    short: tuple[str, ...] = ()

    def under(self, key: str) -> "Names":
        """Only what is under a key, the name of a mapping in the file."""
        head = key if not key or key.endswith(".") else f"{key}."
        kept = {name: tensor for name, tensor in self.tensors.items() if name.startswith(head)}
        return replace(self, tensors=kept)


def named(tree: Any, as_torch: bool = True) -> Names:
    """The tensors of a tree by name, without those of optimisers.

    As in torch, a kernel [in, out] of flax is a weight [out, in]; and half precision becomes float32.
    """
    found, keys, words, skipped, halves = {}, {}, {}, {}, {}
    for path, leaf in _leaves(tree):
        name, key = ".".join(path), ".".join(path[:-1])
        if isinstance(leaf, str):
            words[name] = leaf
        elif isinstance(leaf, Skipped):
            skipped[leaf.name] = True
        elif isinstance(leaf, Tensor) and not any(map(_OF_OPTIMISERS.fullmatch, path[:-1])):
            short = leaf.is_floating_point() and leaf.dtype.itemsize < torch.float32.itemsize
            value = leaf.detach().float() if as_torch and short else leaf.detach()
            halves |= {str(leaf.dtype).removeprefix("torch."): True} if short else {}
            kernel = as_torch and path[-1:] == ("kernel",) and value.ndim == 2
            name = f"{key}.weight".removeprefix(".") if kernel else name
            found[name], keys[name] = value.T if kernel else value, key
    return Names(found, keys, words, tuple(skipped), short=tuple(halves))


def _leaves(tree: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Everything that is no container, with its path. The variables of flax's nnx are mappings with a `value`."""
    todo: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    containers = 0
    while todo:
        path, node = todo.pop()
        if sum(map(len, path)) > LONGEST:
            raise CheckpointError(f"names of more than {LONGEST:,} letters in the file; no checkpoint has any")
        if not isinstance(node, Mapping | list):
            yield path, node
            continue
        containers += 1
        if containers > CONTAINERS:
            raise CheckpointError(f"more than {CONTAINERS:,} containers in the file; no checkpoint has so many")
        if path and isinstance(node, Mapping) and len(node) == 1 and set(node) <= {"value", "raw_value"}:
            todo.append((path, *node.values()))
            continue
        items = node.items() if isinstance(node, Mapping) else enumerate(node)
        todo += [((*path, str(key)), value) for key, value in items if not _is_number(value)][::-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | None)


@dataclass(frozen=True)
class Translation:
    """How a library names the weights of a cell.

    Attributes:
        origin: the library and its cell, in words.
        anchor: the end of a name that tells the cell.
        parts: for each of torch's names, the ends of the names whose tensors make it, one under the other.
        fits: whether the tensors under a prefix are such a cell, where the anchor does not tell.
    """

    origin: str
    anchor: str
    parts: dict[str, tuple[str, ...]]
    fits: Callable[[Mapping[str, Tensor]], bool] = lambda tensors: True


def _gates(before: str, gates: tuple[str, ...], what: str) -> tuple[str, ...]:
    return tuple(f"{before}{gate}.{what}" for gate in gates)


def _flax(origin: str, anchor: str, gates: tuple[str, ...], of_input: str, forget: str = "f") -> Translation:
    """A cell of flax that has a layer for each gate, whose bias is that of its input or of its state."""
    inputs = tuple(forget if gate == "f" else gate for gate in gates)
    weights = {"weight_ih": _gates("i", inputs, "weight"), "weight_hh": _gates("h", gates, "weight")}
    bias = _gates("i", inputs, "bias") if of_input == "i" else _gates("h", gates, "bias")
    return Translation(origin, anchor, weights | {"bias": bias})


FUSED = {"weight_ih": ("dense_i.weight",), "weight_hh": ("dense_h.weight",)}


def _rows(gates: int) -> Callable[[Mapping[str, Tensor]], bool]:
    def fits(tensors: Mapping[str, Tensor]) -> bool:
        weight = tensors["dense_h.weight"]
        return weight.ndim == 2 and weight.shape[0] == gates * weight.shape[1]

    return fits


_GRU = _flax("flax GRUCell (a layer for each of r, z, n; the bias of hn apart)", "hn.weight", ("r", "z", "n"), "i")
TRANSLATIONS = [
    replace(_GRU, parts=_GRU.parts | {"bias_n": ("hn.bias",)}),
    _flax("flax LSTMCell (a layer for each of i, f, g, o)", "if.weight", ("i", "f", "g", "o"), "h"),
    _flax("flax nnx LSTMCell (a layer for each of i, f, g, o)", "if_.weight", ("i", "f", "g", "o"), "h", "f_"),
    Translation("flax nnx GRUCell (gates r, z, n)", "dense_h.weight", FUSED | {"bias": ("dense_i.bias",)}, _rows(3)),
    Translation(
        "flax nnx OptimizedLSTMCell (gates i, f, g, o)",
        "dense_h.weight",
        FUSED | {"bias": ("dense_h.bias",)},
        _rows(4),
    ),
    Translation("flax nnx SimpleCell", "dense_h.weight", FUSED | {"bias": ("dense_i.bias",)}, _rows(1)),
    Translation(
        "flax SimpleCell",
        "h.weight",
        {"weight_ih": ("i.weight",), "weight_hh": ("h.weight",), "bias": ("i.bias",)},
    ),
]


def translated(names: Names) -> Names:
    """The names with those of cells of flax and Keras as torch's; what is named as in torch stays."""
    names = replace(names, tensors=dict(names.tensors), keys=dict(names.keys), origins={})
    for translation in TRANSLATIONS:
        parts = [part for some in translation.parts.values() for part in some]
        for prefix in _before(names, translation.anchor):
            own = {part: names.tensors[prefix + part] for part in parts if prefix + part in names.tensors}
            if all(part in own for part in _needed(translation)) and translation.fits(own):
                made = {to: _stacked(own, some) for to, some in translation.parts.items() if some[0] in own}
                _exchange(names, prefix, parts, made, translation.origin)
    for prefix in _before(names, "recurrent_kernel"):
        parts = ["weight", "recurrent_kernel", "bias"]
        own = {part: names.tensors[prefix + part] for part in parts if prefix + part in names.tensors}
        origin, made = translated_cell(own, f"{prefix}recurrent_kernel")
        _exchange(names, prefix, parts, made, origin)
    return names


def _before(names: Names, anchor: str) -> list[str]:
    """What stands before the anchor in names that end with it."""
    return [name.removesuffix(anchor) for name in names.tensors if name == anchor or name.endswith(f".{anchor}")]


def _exchange(names: Names, prefix: str, parts: list[str], made: dict[str, Tensor], origin: str) -> None:
    """Put tensors under a prefix in the place of others, in the names themselves: a copy for each cell is slow."""
    for part in parts:
        names.tensors.pop(prefix + part, None)
    for name, tensor in made.items():
        names.tensors[prefix + name], names.keys[prefix + name] = tensor, prefix.rstrip(".")
    names.origins[prefix] = origin


def _needed(translation: Translation) -> list[str]:
    return [part for name, parts in translation.parts.items() if name.startswith("weight") for part in parts]


def _stacked(own: Mapping[str, Tensor], parts: tuple[str, ...]) -> Tensor:
    missing = [part for part in parts if part not in own]
    if missing:
        raise CheckpointError(
            f"the cell of flax has no {', '.join(missing)} beside {parts[0]}; save all of its weights"
        )
    try:
        return torch.cat([own[part] for part in parts])
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{', '.join(parts)} do not fit together: {error}") from error
