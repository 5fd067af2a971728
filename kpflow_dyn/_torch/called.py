"""Modules called with other tensors in the place of their own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def called(module: nn.Module, values: Mapping[str, Tensor], *args: Any) -> Any:
    """module(*args) with these tensors, by their first names, also where the module has them under other ones.

    Each place is written once, and found in the dicts of the modules. torch's own call writes that of a submodule with
    two names twice, and leaves the new tensor there; and it takes a name for an attribute, which may be a property.
    """
    places: dict[int, tuple[str, list[tuple[dict[str, Any], str]]]] = {}
    for prefix, part in module.named_modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                first = f"{prefix}.{name}" if prefix else name
                places.setdefault(id(tensor), (first, []))[1].append((held, name))
    with _written([(*place, values[first]) for first, each in places.values() if first in values for place in each]):
        return module(*args)


@contextmanager
def _written(places: list[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """These entries of dicts have these values."""
    before = [(held, name, held[name]) for held, name, _ in places]
    try:
        for held, name, value in places:
            held[name] = value
        yield
    finally:
        for held, name, value in before:
            held[name] = value
