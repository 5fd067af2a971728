"""Function transforms by autograd alone, for functions of a module's own parameters, probe by probe.

The functions take live tensors, and need neither torch.func nor a forward mode; see `kpflow_dyn._backend.Transforms`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

Tree = Any  # a tensor, or tensors by name


def vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """One probe after another."""

    def on_block(*blocks: Tree) -> Any:
        count = len(tree_flatten(blocks)[0][0])
        found = [function(*tree_map(lambda block: block[i], blocks)) for i in range(count)]  # noqa: B023
        leaves, form = zip(*map(tree_flatten, found), strict=True)
        return tree_unflatten([torch.stack(parts) for parts in zip(*leaves, strict=True)], form[0])

    return on_block


def vjp(function: Callable[..., Tensor], *point: Tree) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The value, and what it pulls back."""
    value, inputs, form = _recorded(function, point)

    def pull(q: Tensor) -> Any:
        return tree_unflatten(_gradients(value, inputs, q), form)

    return value.detach(), pull


def jvp(function: Callable[..., Tensor], point: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> tuple[Tensor, Tensor]:
    """The value, and the transpose of what it pulls back, by reverse mode through reverse mode."""
    value, inputs, _ = _recorded(function, point)
    with torch.enable_grad():
        u = torch.zeros_like(value, requires_grad=True)
        pulled = _gradients(value, inputs, u, create_graph=True)
        moved = torch.stack([(g * v).sum() for g, v in zip(pulled, tree_flatten(tangents)[0], strict=True)]).sum()
    return value.detach(), _gradients(moved, [u], torch.ones_like(moved))[0]


@torch.enable_grad()
def _recorded(function: Callable[..., Tensor], point: tuple[Tree, ...]) -> tuple[Tensor, list[Tensor], Any]:
    """The value with its graph, and what gradients are taken in: parameters as they are, copies of other tensors."""
    leaves, form = tree_flatten(point)
    leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
    return function(*tree_unflatten(leaves, form)), leaves, form


def _gradients(value: Tensor, inputs: list[Tensor], q: Tensor, create_graph: bool = False) -> list[Tensor]:
    if not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(value, inputs, q, **options))
