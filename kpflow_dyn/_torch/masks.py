"""What masks of data choose, in one shape for all trials: in a recording all rows stand for those that are chosen.

A model that treats each row by itself, as `y[m] = f(y[m])` does, cannot tell; autograd notices those that can. The
rows that are not chosen are copies of one that is, so that f is not asked where it may have no value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def chosen(values: Tensor, mask: Tensor) -> Tensor:
    """values[mask], with all rows [row, ...] in the place of those that are chosen."""
    rows, here = values.reshape(mask.numel(), *values.shape[mask.ndim :]), mask.reshape(-1)
    first = rows.detach().index_select(0, here.to(torch.int8).argmax(0, keepdim=True))
    other = torch.where(here.any(), first, torch.ones_like(first))
    return torch.where(_along(here, rows), rows, other)


def write(values: Tensor, mask: Tensor, rows: Any) -> None:
    """values[mask] = rows."""
    if isinstance(rows, Tensor) and rows.ndim == values.ndim - mask.ndim + 1 and len(rows) == mask.numel():
        values.copy_(torch.where(_along(mask, values), rows.reshape(*mask.shape, *rows.shape[1:]), values))
    else:
        values[mask] = rows


def select(values: Tensor, mask: Tensor) -> Tensor:
    """masked_select."""
    return chosen(*torch.broadcast_tensors(values, mask))


def _along(mask: Tensor, values: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *(1 for _ in values.shape[mask.ndim :]))


BY_MASKS: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: chosen,
    Tensor.__setitem__: write,
    Tensor.masked_select: select,
    torch.masked_select: select,
}
