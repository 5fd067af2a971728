"""The user's own autograd.Functions in a recording: what they give, with the derivative that their backward says.

With B(u, g) the backward pass of f, which is linear in the gradient g, f(u) is recorded as

    f(u0) + B(u0, .)^T (u - u0)        u0 = u without a derivative
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from kpflow_dyn._torch.functional import functional, values_given
from kpflow_dyn._torch.recording import Recorder, is_wrapped, record, tensors_in

aten = torch.ops.aten
Function = torch.autograd.Function
Backward = Callable[..., Sequence[Tensor]]
APPLY: Any = vars(Function)["apply"]  # a classmethod, in some releases one that is written in C


@contextmanager
def with_functions(recorder: Recorder) -> Iterator[None]:
    """Record autograd.Functions with the derivatives of their own."""

    thread = get_ident()

    def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        out = APPLY.__get__(None, function)(*args, **kwargs)
        given = tensors_in(args)
        results = [value for value in tensors_in(out) if value.requires_grad]
        ours = get_ident() == thread and not recorder.paused and not kwargs
        if ours and results and not any(map(is_wrapped, given)):
            _follow(recorder, function, args, results)
        return out

    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        Function.apply = APPLY


def _follow(recorder: Recorder, function: Any, args: Any, results: list[Tensor]) -> None:
    """Let the results have the derivative of the backward pass."""
    given = tensors_in(args)
    moving = [value.requires_grad for value in given]
    nodes = [recorder.node_of(value) for value in given]
    with recorder.unheard():
        transposed = Transposed(_backward(function, args, given, moving, results), moving, results)
    add = recorder.graph.call_function
    fixed = [add(aten.detach.default, (node,)) for node in nodes]
    changes = [add(aten.sub.Tensor, (nodes[n], fixed[n])) for n, here in enumerate(moving) if here]
    moved = add(transposed, (*fixed, *changes))
    for n, value in enumerate(results):
        still = add(aten.detach.default, (recorder.node_of(value),))
        recorder.stand_for(value, add(aten.add.Tensor, (still, add(_item, (moved, n)))))


def _item(values: tuple[Tensor, ...], n: int) -> Tensor:
    return values[n]


def _backward(function: Any, args: Any, given: list[Tensor], moving: list[bool], results: list[Tensor]) -> Backward:
    """(the tensors among the arguments, gradients of the results) -> gradients of those that move."""

    def backward(*rows: Tensor) -> list[Tensor]:
        own, gradients = rows[: len(given)], rows[len(given) :]
        values = iter(own)
        out = APPLY.__get__(None, function)(*(next(values) if isinstance(arg, Tensor) else arg for arg in args))
        outputs = [value for value in tensors_in(out) if value.requires_grad]
        inputs = [value for value, here in zip(own, moving, strict=True) if here]
        found = torch.autograd.grad(outputs, inputs, gradients, create_graph=True, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, inputs, strict=True)]

    rows = [*given, *(torch.ones_like(value) for value in results)]
    recording = record(backward, [row.detach() for row in rows], {}, stops=False)
    module = functional(recording, rows, {})
    return lambda *rows: module(*values_given(recording, rows, {}))


class Transposed:
    """A backward pass, transposed: (what it was called with, changes of that) -> changes of the results."""

    __name__ = "transposed"  # torch.fx asks for it

    def __init__(self, backward: Backward, moving: list[bool], results: list[Tensor]) -> None:
        self.backward, self.given = backward, len(moving)
        self.like = [(tuple(value.shape), value.dtype) for value in results]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The changes of the results."""
        own, changes = tensors[: self.given], tensors[self.given :]
        none = [tensors[0].new_zeros(shape, dtype=dtype) for shape, dtype in self.like]
        return vjp(lambda *gradients: tuple(self.backward(*own, *gradients)), *none)[1](tuple(changes))
