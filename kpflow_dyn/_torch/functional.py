"""A recording as a graph of functions: no writes in place, and operations taken apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from kpflow_dyn._torch.recording import Recording


def values_given(recording: Recording, rows: Sequence[Tensor], held: Mapping[str, Tensor]) -> list[Tensor]:
    """What the recorded function takes."""

    def value(given: int | str | Tensor) -> Tensor:
        return rows[given] if isinstance(given, int) else held[given] if isinstance(given, str) else given

    return [value(given) for given in recording.given]


def functional(
    recording: Recording,
    rows: Sequence[Tensor],
    held: Mapping[str, Tensor],
    parts: Mapping[Any, Callable[..., Any]] | None = None,
) -> GraphModule:
    """The recorded function without writes in place, its operations taken apart by these decompositions."""
    values = [value.detach() for value in values_given(recording, rows, held)]
    with torch.no_grad():
        module = make_fx(functionalize(recording.module), decomposition_table=dict(parts or {}))(*values)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module
