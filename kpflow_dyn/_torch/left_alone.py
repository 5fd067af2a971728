"""Leave a torch module as it was: what a forward pass changes in it is taken back."""

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

CONTAINERS = (dict, list, set, deque)


@contextmanager
def left_alone(model: Any, values: bool = True) -> Iterator[None]:
    """Restore attributes, hooks, mode, gradients, the random state and, where asked, the values of all tensors.

    What is no module is left to itself.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    held = held_by(model)
    contents = [(value, value.copy()) for value in held if isinstance(value, CONTAINERS)]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    numbers = Numbers(held) if values else None
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with _random_states_kept(), torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for container, kept in contents:
                container.clear()
                add = container.extend if isinstance(container, list | deque) else container.update
                add(kept)
            for parameter, gradient, requires_grad in gradients:
                parameter.grad = gradient
                if parameter.requires_grad != requires_grad:
                    parameter.requires_grad_(requires_grad)
            if numbers is not None:
                numbers.write_back()


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Those of Python and numpy, from which a forward may draw."""
    python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)  # noqa: NPY002


class Numbers:
    """The numbers of a module's tensors and arrays, which it or its user may write to later."""

    def __init__(self, held: list[Any]) -> None:
        self._tensors = [(value, value.detach().clone()) for value in held if _has_numbers(value)]
        arrays = (value for value in held if isinstance(value, np.ndarray) and value.flags.writeable)
        self._arrays = [(array, array.copy()) for array in arrays]

    def write_back(self) -> None:
        """Only where they changed: a write is noticed by graphs that the user may hold."""
        with torch.no_grad():
            for tensor, kept in self._changed():
                tensor.copy_(kept)
        for array, kept in self._arrays:
            array[...] = kept

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """As they were, for a while; no graph notices."""
        changed = [(tensor, kept, tensor.detach().clone()) for tensor, kept in self._changed()]
        try:
            for tensor, kept, _ in changed:
                tensor.data.copy_(kept)
            yield
        finally:
            for tensor, _, now in changed:
                tensor.data.copy_(now)

    def _changed(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(tensor, kept) for tensor, kept in self._tensors if not torch.equal(tensor, kept)]


def held_by(model: nn.Module) -> list[Any]:
    """All that a module holds: its attributes, theirs where they are modules or plain records, and what is in them."""
    found: dict[int, Any] = {}
    waiting: list[Any] = [model]
    while waiting:
        value = waiting.pop()
        if id(value) in found:
            continue
        found[id(value)] = value
        if isinstance(value, (*CONTAINERS, tuple)):
            waiting.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, nn.Module | SimpleNamespace) or (is_dataclass(value) and hasattr(value, "__dict__")):
            waiting.append(vars(value))
    return list(found.values())


def _has_numbers(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return plain and not (value.is_meta or is_lazy(value))
