"""The user's own autograd.Functions and gradient hooks in a recording, with the derivatives that these say.

With B(u, g) the backward pass of f, which is linear in the gradient g, f(u) is recorded as

    f(u0) + B(u0, .)^T (u - u0)        u0 = u without a derivative

A hook is the backward pass of f(u) = u.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from threading import get_ident
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionMeta
from torch.func import vjp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from kpflow_dyn._torch.functional import functional, values_given
from kpflow_dyn._torch.recording import FxNode, Recorder, is_wrapped, record, tensors_in

aten = torch.ops.aten
Function = torch.autograd.Function
Backward = Callable[..., Sequence[Tensor]]
MADE = FunctionMeta.__init__


@contextmanager
def with_functions(parameters: Sequence[Tensor], recorder: Recorder) -> Iterator[None]:
    """Record autograd.Functions, and hooks of parameters and of what is computed, with the derivatives of their own."""
    surrogates = _Surrogates(recorder)
    hooks = _Hooks(surrogates)
    for parameter in parameters:
        for hook in (parameter._backward_hooks or {}).values():
            hooks.add(parameter, hook)
    with _around_forwards(surrogates.heard), hooks:
        yield
    surrogates.record()


@contextmanager
def _around_forwards(around: Callable[[type, Any], Any]) -> Iterator[None]:
    """Let something stand around the forward of each Function: its `apply` may be kept under any name."""
    changed: list[tuple[Any, Any]] = []

    def change(function: Any) -> None:
        changed.append((function, vars(function).get("forward")))
        function.forward = staticmethod(around(function, function.forward))

    def made(function: Any, *args: Any) -> None:
        MADE(function, *args)
        if issubclass(function, Function):
            change(function)

    for function in _subclasses(Function):
        change(function)
    FunctionMeta.__init__ = made  # type: ignore[method-assign]
    try:
        yield
    finally:
        FunctionMeta.__init__ = MADE  # type: ignore[method-assign]
        for function, before in reversed(changed):
            if before is None:
                del function.forward
            else:
                function.forward = before


def _subclasses(kind: Any) -> Iterator[Any]:
    for below in kind.__subclasses__():
        yield below
        yield from _subclasses(below)


class _Surrogates:
    """Lets results have the derivatives of backward passes, which are recorded when all else is."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self._thread = recorder, get_ident()
        self._to_record: list[tuple[Transposed, Backward, list[Tensor]]] = []

    def is_heard(self, given: Sequence[Tensor]) -> bool:
        """Whether what is done to these tensors is recorded."""
        return get_ident() == self._thread and not self.recorder.paused and not any(map(is_wrapped, given))

    def heard(self, function: Any, forward: Any) -> Any:
        """The forward of a Function, after which what it gives has the derivative of its backward pass."""

        @wraps(forward)
        def around(*args: Any, **kwargs: Any) -> Any:
            given = [arg for arg in args if isinstance(arg, Tensor)]
            moving = [value.requires_grad for value in given]
            if not any(moving) or not self.is_heard(given):
                return forward(*args, **kwargs)
            own = args if function.setup_context is not Function.setup_context else args[1:]
            called = self._call(_backward_of(function, own, moving), given, moving)
            versions = {id(value): value._version for value in given}

            def heard(value: Tensor) -> Tensor:
                """torch makes a view of an argument that is given back as it is, where nobody hears it."""
                return value.view_as(value) if versions.get(id(value)) == value._version else value

            out = tree_map_only(Tensor, heard, forward(*args, **kwargs))
            self.recorder.expect(tensors_in(out), called)
            return out

        return around

    def follow(self, backward: Backward, value: Tensor) -> None:
        """Let a value have the derivative of a backward pass in itself."""
        self._call(backward, [value], [True])([value])

    def record(self) -> None:
        """Record the backward passes."""
        with self.recorder.unheard():
            for transposed, backward, given in self._to_record:
                transposed.backward = self._recorded(backward, [*given, *transposed.gradients()])

    def _recorded(self, backward: Backward, given: list[Tensor]) -> Backward:
        """The same, as a graph."""
        recording = record(backward, given, {}, stops=False)
        self.recorder.origins.decided = self.recorder.origins.decided or recording.decided
        module = functional(recording, given, {})
        return lambda *rows: module(*values_given(recording, rows, {}))

    def _call(self, backward: Backward, given: list[Tensor], moving: list[bool]) -> Callable[[list[Tensor]], None]:
        """What lets results have the derivative of a backward pass in those of the given that move."""
        nodes, add = [self.recorder.node_of(value) for value in given], self.recorder.graph.call_function
        with self.recorder.unheard():
            values = [value.detach().clone() for value in given]

        def follow(results: list[Tensor]) -> None:
            transposed = Transposed(moving, results)
            self._to_record.append((transposed, backward, values))
            fixed = [add(aten.detach.default, (node,)) for node in nodes]
            changes = [add(aten.sub.Tensor, (nodes[n], fixed[n])) for n, here in enumerate(moving) if here]
            moved = add(transposed, (*fixed, *changes))
            for n, value in enumerate(results):
                still = add(aten.detach.default, (self.recorder.node_of(value),))
                self.recorder.stand_for(value, add(aten.add.Tensor, (still, add(_item, (moved, n)))))

        return follow


class _Hooks(TorchFunctionMode):
    """Lets tensors have the derivatives of their gradient hooks."""

    def __init__(self, surrogates: _Surrogates) -> None:
        super().__init__()
        self.surrogates, self._known = surrogates, dict[int, _Hooked]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.register_hook and self.surrogates.is_heard(args[:1]):
            self.add(*args)
        return func(*args, **(kwargs or {}))

    def add(self, tensor: Tensor, hook: Any) -> None:
        """Let a tensor have the derivative of one more hook, after those that it has since it was last written to."""
        recorder, known = self.surrogates.recorder, self._known.get(id(tensor))
        if known is None or known.after is not recorder.node_of(tensor):
            known = self._known[id(tensor)] = _Hooked(tensor, recorder.node_of(tensor), [])
        hooks = known.hooks
        hooks.append(hook)
        recorder.stand_for(tensor, known.before)

        def backward(_own: Tensor, gradient: Tensor) -> list[Tensor]:
            for hook in hooks:
                found = hook(gradient)
                gradient = gradient if found is None else found
            return [gradient]

        self.surrogates.follow(backward, tensor)
        known.after = recorder.node_of(tensor)


@dataclass
class _Hooked:
    """A tensor with hooks, and its nodes before and after them."""

    tensor: Tensor
    before: FxNode
    hooks: list[Any]
    after: FxNode = None


def _item(values: tuple[Tensor, ...], n: int) -> Tensor:
    return values[n]


def _backward_of(function: Any, args: Any, moving: list[bool]) -> Backward:
    """(the tensors among the arguments, gradients of the results) -> gradients of those that move."""

    def backward(*rows: Tensor) -> list[Tensor]:
        own, gradients = rows[: len(moving)], rows[len(moving) :]
        values = iter(own)
        out = function.apply(*(next(values) if isinstance(arg, Tensor) else arg for arg in args))
        outputs = [value for value in tensors_in(out) if value.requires_grad]
        inputs = [value for value, here in zip(own, moving, strict=True) if here]
        found = torch.autograd.grad(outputs, inputs, gradients, create_graph=True, allow_unused=True)
        return [torch.zeros_like(v) if g is None else g for g, v in zip(found, inputs, strict=True)]

    return backward


class Transposed:
    """A backward pass, transposed: (what it was called with, changes of that) -> changes of the results."""

    __name__ = "transposed"  # torch.fx asks for it
    backward: Backward

    def __init__(self, moving: list[bool], results: list[Tensor]) -> None:
        self.given = len(moving)
        self._like = [(tuple(value.shape), value.dtype, value.device) for value in results]

    def gradients(self) -> list[Tensor]:
        """Zeros like the results."""
        return [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in self._like]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The changes of the results."""
        own, changes = tensors[: self.given], tensors[self.given :]
        function = lambda *gradients: tuple(self.backward(*own, *gradients))  # noqa: E731
        return vjp(function, *self.gradients())[1](tuple(changes))
