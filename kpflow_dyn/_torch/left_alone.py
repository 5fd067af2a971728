"""Leave a torch module as it was: what a forward pass changes in it is taken back."""

import random
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import is_dataclass
from threading import RLock
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

ONE_AT_A_TIME = RLock()
"""Of what a thread does to all of torch, or to a module: a trace, forward mode, and what is taken back."""
CONTAINERS = (dict, list, set, deque)


@contextmanager
def left_alone(model: Any, values: bool = True) -> Iterator[None]:
    """Restore attributes, hooks, mode, gradients, the random state and, where asked, the values of all tensors.

    What is no module is left to itself. Other threads wait, as what they change in it would be taken back, or kept.
    Tensors that are made meanwhile have gradients, also in `torch.inference_mode`.
    """
    with ONE_AT_A_TIME, outside_of_inference(), _restored(model, values):
        yield


def outside_of_inference() -> AbstractContextManager[Any]:
    """Tensors that are made meanwhile can have gradients."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _restored(model: Any, values: bool) -> Iterator[None]:
    if not isinstance(model, nn.Module):
        yield
        return
    held = held_by(model)
    contents = [(value, value.copy()) for value in held if isinstance(value, CONTAINERS)]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    numbers = Numbers(held) if values else None
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({tensor.device.index for tensor in tensors if tensor.is_cuda})
    with _random_states_kept(), torch.random.fork_rng(devices), uncompiled():
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


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled parts run as they were written: what torch.compile makes of them is differentiated once only."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


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
        self._tensors = [(value, _each_once(value).clone()) for value in held if _has_numbers(value)]
        arrays = (value for value in held if isinstance(value, np.ndarray) and value.flags.writeable)
        self._arrays = [(array, array.copy()) for array in arrays]

    def write_back(self) -> None:
        """Only where they changed: a write is noticed by graphs that the user may hold."""
        for tensor, kept in self._changed_tensors():
            tensor.copy_(kept)
        for array, kept in self._changed_arrays():
            array[...] = kept

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """As they were, for a while; no graph notices."""
        with ExitStack() as stack:
            for tensor, kept in self._changed_tensors():
                stack.callback(tensor.data.copy_, tensor.clone())
                tensor.data.copy_(kept)
            for array, kept in self._changed_arrays():
                stack.callback(array.__setitem__, ..., array.copy())
                array[...] = kept
            yield

    def _changed_tensors(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for value, kept in self._tensors:
            now = _each_once(value)
            if (now.shape, now.dtype) == (kept.shape, kept.dtype) and not torch.equal(now, kept):
                yield now, kept

    def _changed_arrays(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for array, kept in self._arrays:
            if array.shape == kept.shape and not np.array_equal(array, kept):
                yield array, kept


def _each_once(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's numbers without those that it repeats, as an expanded one does."""
    return tensor.detach()[tuple(slice(None, 1 if step == 0 else None) for step in tensor.stride())]


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
            waiting += [part for part in (value.values() if isinstance(value, dict) else value)]  # without its __len__
        elif isinstance(value, nn.Module | SimpleNamespace) or (is_dataclass(value) and hasattr(value, "__dict__")):
            waiting.append(vars(value))
    return list(found.values())


def _has_numbers(value: Any) -> bool:
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return plain and not (value.is_meta or value.is_nested or is_lazy(value))
