"""Traces that are known already: making them takes most of the time of a small analysis, and sweeps repeat it.

The key of a trace is the step's modules, their attributes, and the shapes of its tensors. A step may also depend on
something else, such as a global variable, which the key does not see. So the caller must check a known trace.
"""

import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._torch.trace import Applied, Outline, outline
from kpflow_dyn.tracing._graph import Graph, Role
from kpflow_dyn.tracing._rules import RULES

MOST = 64
PLAIN = (int, float, complex, str, bytes, bool, type(None), type, types.BuiltinFunctionType)


class KeptTraces:
    """The traces of some steps, the last ones that were used."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._outlines: OrderedDict[Hashable, Outline] = OrderedDict()

    def known(self, step: Applied, *rows: tuple[Role, Tensor]) -> Graph | None:
        """The graph of a step like one that was traced before, with this one's values; None where there was none."""
        key = _key(step, rows)
        if key is None or key not in self._outlines or not self._outlines[key].fits(step):
            return None
        self._outlines.move_to_end(key)
        return self._outlines[key].graph(step)

    def new(self, step: Applied, *rows: tuple[Role, Tensor]) -> Graph:
        """`trace`, remembered."""
        found, key = outline(step, *rows), _key(step, rows)
        if key is not None:
            self._outlines[key] = found
            self._outlines.move_to_end(key)
            while len(self._outlines) > self.most:
                self._outlines.popitem(last=False)
        return found.graph(step)

    def forget(self) -> None:
        """Have everything traced anew."""
        self._outlines.clear()


def _key(step: Applied, rows: tuple[tuple[Role, Tensor], ...]) -> Hashable | None:
    """What a step is known by; None where that cannot be said, as with a closure or an attribute that may change."""
    if getattr(step.function, "__closure__", None):
        return None
    tensors = {**dict(_all(step.call, "named_parameters")), **dict(_all(step.call, "named_buffers"))}
    first: dict[int, int] = {}
    shared = tuple(first.setdefault(id(t), place) for place, t in enumerate(tensors.values()))
    named = step.call.named_modules(remove_duplicate=False)
    try:
        hash(step.function)
        modules = tuple((name, type(module), _attributes(module, first)) for name, module in named)
    except (TypeError, _Unknown):
        return None
    if any(tensor._backward_hooks for tensor in tensors.values()):
        return None
    shapes = tuple((name, *_form(tensor)) for name, tensor in tensors.items())
    rules = frozenset(RULES.items())
    return step.function, modules, shapes, shared, rules, tuple((role, *_form(row)) for role, row in rows)


def _all(call: nn.Module, which: str) -> Any:
    return getattr(call, which)(remove_duplicate=False)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.device


class _Unknown(Exception):
    """An attribute whose value cannot be compared."""


def _attributes(module: nn.Module, places: dict[int, int]) -> tuple[Any, ...]:
    own = {name: value for name, value in vars(module).items() if name not in ("_parameters", "_buffers", "_modules")}
    return tuple((name, _compared(value, places)) for name, value in sorted(own.items()))


def _compared(value: Any, places: dict[int, int]) -> Hashable:
    """Something that is equal where the value is; of a tensor by name, such as nn.RNN lists its weights, its place."""
    if isinstance(value, weakref.ref):
        return weakref.ref, _compared(value(), places)
    if id(value) in places:
        return Tensor, places[id(value)]
    if isinstance(value, PLAIN):
        return type(value), value
    if isinstance(value, types.FunctionType) and not value.__closure__:
        return value
    if isinstance(value, tuple | list):
        return type(value), tuple(_compared(part, places) for part in value)
    if isinstance(value, dict | set) and not value:  # such as hooks
        return type(value)
    if isinstance(value, torch.dtype | torch.device):
        return value
    raise _Unknown
