"""Function transforms by autograd alone, for functions of a module's own parameters, probe by probe.

The functions take live tensors, and need neither torch.func nor a forward mode; see `kpflow_dyn._backend.Transforms`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
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
    recorded = Recorded(function, *point)
    return recorded.value, recorded.pull


def jvp(function: Callable[..., Tensor], point: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> tuple[Tensor, Tensor]:
    """The value, and the transpose of what it pulls back, by reverse mode through reverse mode."""
    recorded = Recorded(function, *point)
    return recorded.value, recorded.transposed()(*tangents)


class Recorded:
    """A function's value at a point, with the graph that autograd made of it.

    Gradients are taken in parameters as they are, and in copies of other tensors.
    """

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __init__(self, function: Callable[..., Tensor], *point: Tree) -> None:
        leaves, self._form = tree_flatten(point)
        self._inputs = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
        self._value = function(*tree_unflatten(self._inputs, self._form))

    @property
    def value(self) -> Tensor:
        """Without the graph."""
        return self._value.detach()

    def pull(self, q: Tensor) -> tuple[Tree, ...]:
        """Reverse mode."""
        return tree_unflatten(_gradients(self._value, self._inputs, q), self._form)

    def transposed(self) -> Callable[..., Tensor]:
        """With u = 0 and g what it pulls back, which is linear in it: v -> what v pulls back through g."""
        with torch.inference_mode(False), torch.enable_grad():
            u = torch.zeros_like(self._value, requires_grad=True)
            pulled = _gradients(self._value, self._inputs, u, create_graph=True)
            edges = [get_gradient_edge(g) if g.requires_grad else None for g in pulled]

        def push(*tangents: Tree) -> Tensor:
            pairs = [(g, v) for g, v in zip(edges, tree_flatten(tangents)[0], strict=True) if g is not None]
            if not pairs:
                return u.detach().clone()
            outputs, vectors = zip(*pairs, strict=True)
            return _gradients(outputs, [u], vectors)[0]

        return push


def _gradients(value: Any, inputs: list[Tensor], q: Any, create_graph: bool = False) -> list[Tensor]:
    """Of one value or of several, in all inputs."""
    if isinstance(value, Tensor) and not value.requires_grad:
        return [torch.zeros_like(leaf) for leaf in inputs]
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True, "materialize_grads": True}
    return list(torch.autograd.grad(value, inputs, q, **options))
