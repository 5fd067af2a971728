"""The user's own autograd.Functions and gradient hooks in a recording, with the derivatives that these say.

With B(u, g) the backward pass of f, which is linear in the gradient g, f(u) is recorded as

    f(u0) + B(u0, .)^T (u - u0)        u0 = u without a derivative

A hook is the backward pass of f(u) = u.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.overrides import TorchFunctionMode

from kpflow_dyn._torch.functional import functional, values_given
from kpflow_dyn._torch.recording import FxNode, Recorder, is_wrapped, record, tensors_in

aten = torch.ops.aten
Function = torch.autograd.Function
Backward = Callable[..., Sequence[Tensor]]
APPLY: Any = vars(Function)["apply"]  # a classmethod, in some releases one that is written in C


@contextmanager
def with_functions(parameters: Sequence[Tensor], recorder: Recorder) -> Iterator[None]:
    """Record autograd.Functions, and hooks of parameters and of what is computed, with the derivatives of their own."""

    thread = get_ident()

    def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
        out = APPLY.__get__(None, function)(*args, **kwargs)
        given = tensors_in(args)
        results = [value for value in tensors_in(out) if value.requires_grad]
        if results and not kwargs and get_ident() == thread and _is_heard(recorder, given):
            moving = [value.requires_grad for value in given]
            _follow(recorder, _backward_of(function, args, moving), given, moving, results)
        return out

    hooks = _Hooks(recorder)
    for parameter in parameters:
        for hook in (parameter._backward_hooks or {}).values():
            hooks.add(parameter, hook)
    Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        with hooks:
            yield
    finally:
        Function.apply = APPLY


def _is_heard(recorder: Recorder, given: Sequence[Tensor]) -> bool:
    return not recorder.paused and not any(map(is_wrapped, given))


class _Hooks(TorchFunctionMode):
    """Lets tensors have the derivatives of their gradient hooks."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self._known: dict[int, tuple[FxNode, list[Any]]] = {}  # what a tensor was before, and its hooks in their order

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook and _is_heard(self.recorder, args[:1]):
            self.add(*args)
        return func(*args, **(kwargs or {}))

    def add(self, tensor: Tensor, hook: Any) -> None:
        """Let a tensor have the derivative of one more hook from now on."""
        node, hooks = self._known.setdefault(id(tensor), (self.recorder.node_of(tensor), []))
        hooks.append(hook)
        self.recorder.stand_for(tensor, node)

        def backward(_own: Tensor, gradient: Tensor) -> list[Tensor]:
            for hook in hooks:
                found = hook(gradient)
                gradient = gradient if found is None else found
            return [gradient]

        _follow(self.recorder, backward, [tensor], [True], [tensor])


def _follow(
    recorder: Recorder, backward: Backward, given: list[Tensor], moving: list[bool], results: list[Tensor]
) -> None:
    """Let the results have the derivative of a backward pass in those of the given that move."""
    nodes = [recorder.node_of(value) for value in given]
    with recorder.unheard():
        transposed = Transposed(_recorded(backward, given, results), moving, results)
    add = recorder.graph.call_function
    fixed = [add(aten.detach.default, (node,)) for node in nodes]
    changes = [add(aten.sub.Tensor, (nodes[n], fixed[n])) for n, here in enumerate(moving) if here]
    moved = add(transposed, (*fixed, *changes))
    for n, value in enumerate(results):
        still = add(aten.detach.default, (recorder.node_of(value),))
        recorder.stand_for(value, add(aten.add.Tensor, (still, add(_item, (moved, n)))))


def _item(values: tuple[Tensor, ...], n: int) -> Tensor:
    return values[n]


def _backward_of(function: Any, args: Any, moving: list[bool]) -> Backward:
    """(the tensors among the arguments, gradients of the results) -> gradients of those that move."""

    def backward(*rows: Tensor) -> list[Tensor]:
        own, gradients = rows[: len(moving)], rows[len(moving) :]
        values = iter(own)
        out = APPLY.__get__(None, function)(*(next(values) if isinstance(arg, Tensor) else arg for arg in args))
        outputs = [value for value in tensors_in(out) if value.requires_grad]
        inputs = [value for value, here in zip(own, moving, strict=True) if here]
        found = torch.autograd.grad(outputs, inputs, gradients, create_graph=True, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, inputs, strict=True)]

    return backward


def _recorded(backward: Backward, given: list[Tensor], results: list[Tensor]) -> Backward:
    """The same, as a graph."""
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
