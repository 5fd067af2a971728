"""The recurrent layers of Keras under the names of torch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kpflow_dyn._problems.parameters import CheckpointError

ORIGIN = {
    1: "Keras SimpleRNN",
    3: "Keras GRU (gates z, r, h, put in torch's order)",
    4: "Keras LSTM (gates i, f, c, o)",
}
CELL, LAYER = ("kernel", "recurrent_kernel", "bias"), ("kernel", "bias")


def with_names(tree: Any, inside_cell: bool = False) -> Any:
    """The weights of Keras 3, which numbers those of a layer (`vars`), by their names."""
    if not isinstance(tree, Mapping):
        return tree
    found = {name: with_names(value, name == "cell") for name, value in tree.items() if name != "vars"}
    numbered = tree.get("vars")
    if isinstance(numbered, Mapping):
        names = CELL if inside_cell else LAYER
        found |= {
            names[int(place)]: value for place, value in numbered.items() if place in ("0", "1", "2")[: len(names)]
        }
    return found


def translated_cell(own: Mapping[str, Tensor], name: str) -> tuple[str, dict[str, Tensor]]:
    """What a cell of Keras is, and its weights by torch's names; its kernel is here as a weight [gate unit, input]."""
    recurrent, bias = own["recurrent_kernel"], own.get("bias")
    units, rows = recurrent.shape if recurrent.ndim == 2 else (0, 0)
    gates = rows // units if units and rows % units == 0 else 0
    if gates not in ORIGIN or "weight" not in own:
        raise CheckpointError(f"{name} has shape {list(recurrent.shape)}; expected [units, 1, 3 or 4 times the units]")
    order = [1, 0, 2] if gates == 3 else [*range(gates)]
    found = {"weight_ih": _in_order(own["weight"], order), "weight_hh": _in_order(recurrent.T, order)}
    if bias is None:
        return ORIGIN[gates], found
    if bias.ndim == 2:
        return ORIGIN[gates], found | {"bias_ih": _in_order(bias[0], order), "bias_hh": _in_order(bias[1], order)}
    if gates == 3:
        raise CheckpointError(
            f"{name} is of a GRU with reset_after=False, which is no cell of torch; give a module of your own"
        )
    return ORIGIN[gates], found | {"bias": bias}


def _in_order(rows: Tensor, order: list[int]) -> Tensor:
    blocks = rows.chunk(len(order))
    return torch.cat([blocks[place] for place in order])
