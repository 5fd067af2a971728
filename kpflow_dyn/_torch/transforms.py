"""Function transforms of torch, and maps over rows in chunks; see `kpflow_dyn._backend.Transforms`."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from kpflow_dyn._arrays.memory import bytes_of
from kpflow_dyn._backend import RowFunction
from kpflow_dyn._flows.referee import OWN, check_transpose, drawn
from kpflow_dyn._torch.cell_equations import CellEquations
from kpflow_dyn._torch.left_alone import ONE_AT_A_TIME
from kpflow_dyn._torch.reverse import Recorded
from kpflow_dyn._torch.twice import TwiceDifferentiable

__all__ = ["compiled", "each_row", "index", "jvp", "linearised", "once", "over_models", "vjp", "vmap"]

ROWS_BYTES = 2**21  # of the widest value of the rows that are mapped at once
Tree = Any  # a tensor, or a list of tensors


def jvp(function: Callable[..., Any], points: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Any:
    """torch's own, at copies of points whose entries share memory, as those of an expanded tensor do.

    Of one thread at a time: torch counts the levels of forward mode for the whole process.
    """
    with ONE_AT_A_TIME:
        return torch.func.jvp(function, tree_map(_apart, points), tangents)


def _apart(point: Tensor) -> Tensor:
    shared = any(step == 0 and length > 1 for step, length in zip(point.stride(), point.shape, strict=True))
    return point.contiguous() if shared else point


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
def each_row(function: RowFunction, *rows: Tensor, width: int = 1) -> list[Tensor]:
    """A row function on [time, trial, ...] data -> its outputs as [time, trial, ...].

    As many rows at a time as keep rows of that width in the cache.
    """
    lead = rows[0].shape[:2]
    flat = [r.flatten(0, 1) for r in rows]  # [time * trial, ...]
    width = max(width, *(r[:1].numel() for r in flat))
    count, length = len(flat[0]), max(1, ROWS_BYTES // bytes_of(width, flat[0]))
    whole: list[Tensor] = []
    for start in range(0, count, length):
        parts = vmap(function)(*(r[start : start + length] for r in flat))
        whole = whole or [part.new_empty(count, *part.shape[1:]) for part in parts]
        for output, part in zip(whole, parts, strict=True):
            output[start : start + length] = part
    return [output.reshape(*lead, *output.shape[1:]) for output in whole]


def index(numbers: np.ndarray, like: Tensor) -> Tensor:
    """Element numbers as a tensor on the same device."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(like.device)


def linearised(function: Callable[[Tree], Tensor], point: Tree) -> tuple[Callable[[Any], Any], ...]:
    """The derivative of a function at a point, its transpose, and it after its transpose, on blocks of probes.

    They replay graphs of autograd: what is pushed forward is pulled back through the backward pass. Where torch cannot
    differentiate that, or does so wrongly, forward mode computes the function anew each time.
    """

    @cache
    def recorded() -> Recorded:
        with TwiceDifferentiable():
            return Recorded(function, point)

    @cache
    def push() -> Callable[[Tree], Tensor]:
        try:
            return _checked(recorded(), point)
        except (RuntimeError, ValueError):
            return lambda tangent: jvp(function, (point,), (tangent,))[1]

    def pull() -> Callable[[Tensor], Tree]:
        graph = recorded()
        return lambda q: graph.pull(q)[0]

    def both() -> Callable[[Tensor], Tensor]:
        forward, backward = push(), pull()
        return lambda q: forward(backward(q))

    return _on_block(push), _on_block(pull), _on_block(both)


def _checked(recorded: Recorded, point: Tree) -> Callable[[Tree], Tensor]:
    """The transpose of reverse mode; an error unless <q, push(v)> is <pull(q), v> for random ones."""
    push, (leaves, form) = recorded.transposed(), tree_flatten(point)
    moved = [part for leaf in leaves for part in drawn([tuple(leaf.shape)], leaf)]
    pushed = push(tree_unflatten(moved, form))
    (q,) = drawn([tuple(pushed.shape)], pushed, seed=2)
    check_transpose(q, pushed, tree_leaves(recorded.pull(q)), moved, OWN)
    return push


def _on_block(prepared: Callable[[], Callable[[Tree], Tree]]) -> Callable[[Tree], Tree]:
    """A function over probes; a single one by itself, as operations on blocks are several on others."""

    @torch.no_grad()
    def on_block(block: Tree) -> Tree:
        function = prepared()
        if len(tree_leaves(block)[0]) > 1:
            return vmap(function)(block)
        return tree_map(lambda part: part[None], function(tree_map(lambda part: part[0], block)))

    return on_block


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself: torch runs it eagerly."""
    return function


once = compiled
