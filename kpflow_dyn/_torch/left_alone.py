"""Leave a torch module as it was: what a forward pass changes in it is taken back."""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

CONTAINERS = (dict, list, set, deque)


@contextmanager
def left_alone(model: Any, values: bool = True) -> Iterator[None]:
    """Restore attributes, hooks, mode, gradients, the random state and, where asked, the values of all tensors.

    What is no module is left to itself.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    modules = [(module, dict(vars(module)), _contents(module)) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    numbers = [tensor.detach().clone() for tensor in tensors] if values else []
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with _random_states_kept(), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, attributes, contents in modules:
                _restore(module, attributes, contents)
            for parameter, gradient, requires_grad in gradients:
                parameter.grad = gradient
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
            _restore_numbers(tensors, numbers)


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Those of Python and numpy, from which a forward may draw."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)  # noqa: NPY002


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The containers among its attributes, and those inside of them, each with a copy."""
    found: dict[int, Any] = {}
    waiting = list(vars(module).values())
    while waiting:
        value = waiting.pop()
        if isinstance(value, (*CONTAINERS, tuple)) and id(value) not in found:
            found[id(value)] = value
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return [(value, value.copy()) for value in found.values() if isinstance(value, CONTAINERS)]


def _restore(module: nn.Module, attributes: dict[str, Any], contents: list[tuple[Any, Any]]) -> None:
    vars(module).clear()
    vars(module).update(attributes)
    for container, kept in contents:
        container.clear()
        add = container.extend if isinstance(container, list | deque) else container.update
        add(kept)


@torch.no_grad()
def _restore_numbers(tensors: list[torch.Tensor], numbers: list[torch.Tensor]) -> None:
    """Only where they changed: a write is noticed by graphs that the user may hold."""
    for tensor, kept in zip(tensors, numbers, strict=False):
        if not tensor.is_meta and not torch.equal(tensor, kept):
            tensor.copy_(kept)
