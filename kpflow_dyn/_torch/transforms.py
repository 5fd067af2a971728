"""Function transforms of torch, and maps over rows in chunks; see `kpflow_dyn._backend.Transforms`."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from kpflow_dyn._arrays import Rows
from kpflow_dyn._arrays.memory import in_blocks
from kpflow_dyn._backend import RowFunction
from kpflow_dyn._torch.cell_equations import CellEquations

__all__ = ["compiled", "each_row", "index", "jvp", "linearised", "over_models", "vjp", "vmap"]

ROWS_AT_ONCE = 8192

with warnings.catch_warnings():  # torch's first forward derivative in a process calls its own deprecated torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)
    jvp(torch.tanh, (torch.zeros(1),), (torch.zeros(1),))


def over_models(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`vmap` of a function that calls models, which then has rules for torch's own cells too."""
    mapped = vmap(function)

    def call(theta: Tensor) -> Tensor:
        with CellEquations():
            return mapped(theta)

    return call


@torch.no_grad()
def each_row(function: RowFunction, *rows: Tensor) -> list[Tensor]:
    """A row function on [time, trial, ...] data -> its outputs as [time, trial, ...], some thousand rows at a time."""
    lead = rows[0].shape[:2]
    flat = [r.reshape(-1, *r.shape[2:]) for r in rows]  # [time * trial, ...]
    parts = [vmap(function)(*chunk) for chunk in zip(*(r.split(ROWS_AT_ONCE) for r in flat), strict=True)]
    return [torch.cat(outputs).reshape(*lead, *outputs[0].shape[1:]) for outputs in zip(*parts, strict=True)]


def index(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Element numbers as a tensor on the same device."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(like.device)


@torch.no_grad()
def linearised(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Rows, Rows]:
    """The derivative of a function at a point, and its transpose, on blocks of probes.

    The values on the way are kept for the transpose, and computed anew by each forward application.
    """
    value, pull = vjp(function, point)[:2]
    maps = vmap(lambda tangent: jvp(function, (point,), (tangent,))[1]), vmap(lambda q: pull(q)[0])
    forward, backward = (in_blocks(torch.no_grad()(of_block), value.numel(), value) for of_block in maps)
    return forward, backward


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself: torch runs it eagerly."""
    return function
