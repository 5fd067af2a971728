"""Pytrees of torch: tuples, lists, dicts in the order of their keys, as JAX has them, named tuples and dataclasses."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kpflow_dyn._shown import type_name


@dataclass(frozen=True)
class Tree:
    """A pytree without its leaves.

    Attributes:
        kind: the type of a node, None of a leaf.
        keys: those of its parts, their numbers in a sequence.
        parts: its parts.
    """

    kind: type | None = None
    keys: tuple = ()
    parts: tuple[Tree, ...] = ()

    @property
    def num_nodes(self) -> int:
        """How many nodes there are, leaves included."""
        return 1 + sum(part.num_nodes for part in self.parts)

    def unflatten(self, leaves: Iterable[Any]) -> Any:
        """The pytree with these leaves."""
        return self._made(iter(leaves))

    def flatten_up_to(self, value: Any) -> list[Any]:
        """The leaves of a pytree of this structure; a ValueError for others."""
        if self.kind is None:
            return [value]
        if type(value) is not self.kind or tuple(_parts(value)) != self.keys:
            raise ValueError(f"expected {self}, got {type_name(value)}")
        parts = zip(self.parts, _parts(value).values(), strict=True)
        return [leaf for own, part in parts for leaf in own.flatten_up_to(part)]

    def _made(self, leaves: Iterator[Any]) -> Any:
        if self.kind is None:
            return next(leaves)
        made = [part._made(leaves) for part in self.parts]
        if issubclass(self.kind, Mapping):
            return self.kind(zip(self.keys, made, strict=True))  # type: ignore[call-arg]
        return self.kind(*made) if self._by_place else self.kind(made)  # type: ignore[call-arg]

    @property
    def _by_place(self) -> bool:
        return hasattr(self.kind, "_fields") or dataclasses.is_dataclass(self.kind)

    def __str__(self) -> str:
        if self.kind is None:
            return "*"
        named = [f"{key}: {part}" for key, part in zip(self.keys, self.parts, strict=True)]
        return f"{self.kind.__name__}({', '.join(named)})"


def flattened(value: Any) -> tuple[list[Any], Tree]:
    """The leaves of a pytree, and its structure."""
    if (parts := _parts(value)) is None:
        return [value], Tree()
    found = [flattened(part) for part in parts.values()]
    return [leaf for leaves, _ in found for leaf in leaves], Tree(type(value), tuple(parts), tuple(t for _, t in found))


def _parts(value: Any) -> Any:
    """The parts of a node by their keys, None of a leaf."""
    if isinstance(value, Mapping):
        return dict(value) if isinstance(value, OrderedDict) else {key: value[key] for key in sorted(value, key=str)}
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None
