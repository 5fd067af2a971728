"""Leave a torch module as it was: what a forward pass changes in it is taken back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

CONTAINERS = (dict, list, set)


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
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for module, attributes, contents in modules:
                _restore(module, attributes, contents)
            for parameter, gradient, requires_grad in gradients:
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)
            _restore_numbers(tensors, numbers)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The containers among its attributes, each with a copy."""
    return [(value, value.copy()) for value in vars(module).values() if isinstance(value, CONTAINERS)]


def _restore(module: nn.Module, attributes: dict[str, Any], contents: list[tuple[Any, Any]]) -> None:
    vars(module).clear()
    vars(module).update(attributes)
    for container, kept in contents:
        if isinstance(container, list):
            container[:] = kept
        else:
            container.clear()
            container.update(kept)


@torch.no_grad()
def _restore_numbers(tensors: list[torch.Tensor], numbers: list[torch.Tensor]) -> None:
    """Only where they changed: a write is noticed by graphs that the user may hold."""
    for tensor, kept in zip(tensors, numbers, strict=False):
        if not tensor.is_meta and not torch.equal(tensor, kept):
            tensor.copy_(kept)
