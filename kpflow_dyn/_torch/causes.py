"""What of a torch module a trace may not see, for the message that says why the two differ."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

HOOKS = {
    "_forward_hooks": "a forward hook",
    "_forward_pre_hooks": "a forward pre-hook",
    "_backward_hooks": "a backward hook",
    "_backward_pre_hooks": "a backward pre-hook",
}


def likely_causes(call: nn.Module, states: Tensor) -> list[str]:
    """In words: autograd.Functions in the graph of the states, and hooks of modules and parameters."""
    functions = dict.fromkeys(_functions(states))
    hooks = [f"{what} of {name or 'the model'}" for name, m in call.named_modules() for what in _hooks_of(m)]
    on_parameters = [f"a gradient hook of {name}" for name, p in call.named_parameters() if p._backward_hooks]
    return [*functions, *hooks, *on_parameters]


def _hooks_of(module: nn.Module) -> Iterator[str]:
    for attribute, what in HOOKS.items():
        if getattr(module, attribute, None):
            yield what


def _functions(states: Tensor) -> Iterator[str]:
    """The autograd.Functions of the user in a graph."""
    for node in _nodes(states):
        if (function := getattr(node, "_forward_cls", None)) is not None:
            yield f"the autograd.Function {function.__name__}"


def rounding_of(states: Tensor) -> float:
    """The round-off of the least precise numbers in a graph."""
    dtypes = {given.dtype for node in _nodes(states) for given in node._input_metadata} | {states.dtype}
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point or dtype.is_complex)


def _nodes(states: Tensor) -> Iterator[Any]:
    stack: list[Any] = [states.grad_fn]
    seen = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)
