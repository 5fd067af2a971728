"""Modules called with other tensors in the place of their own."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call


def called(module: nn.Module, values: Mapping[str, Tensor], *args: Any) -> Any:
    """module(*args) with these tensors, by their first names, also where the module has them under other ones.

    Each place is written once: torch's own call writes that of a submodule with two names twice, and leaves the new
    tensor there.
    """
    names: dict[int, list[str]] = {}
    for prefix, part in module.named_modules():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    everywhere = {name: values[first] for first, *rest in names.values() if first in values for name in (first, *rest)}
    return functional_call(module, everywhere, args, tie_weights=False)
