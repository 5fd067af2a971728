"""Traces that are known already: making them takes most of the time of a small analysis, and sweeps repeat it.

With a trace its analysis is kept, which hangs on the values of indices alone.

The key of a trace is the step's modules, their attributes, and the shapes of its tensors. A step may also depend on
something else, such as a global variable, which the key does not see. So the caller must check a known trace.
"""

import types
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._torch.glue import Glue, find_glue
from kpflow_dyn._torch.trace import Applied, Outline, outline
from kpflow_dyn.tracing._copies import deciding
from kpflow_dyn.tracing._graph import Graph, Node, Role
from kpflow_dyn.tracing._rules import RULES
from kpflow_dyn.tracing._steps import AnalysedStep, analyse

MOST = 64
CHOICES = 4  # of what learns, for which the analysis of a trace is kept
LARGE = 2**22  # weights, of which an analysis holds several numbers each: that of more is made anew
PLAIN = (int, float, complex, str, bytes, bool, type(None), type, types.BuiltinFunctionType)


@dataclass(frozen=True)
class Analysis:
    """An analysed step without its values, but for those that say which elements are copied."""

    step: AnalysedStep
    glue: Glue
    decided: dict[Node, Tensor]

    @classmethod
    def of(cls, graph: Graph, learnable: frozenset[str]) -> "Analysis":
        """That of a graph."""
        step = analyse(graph, learnable, BACKENDS["torch"].transforms)
        decided = {node: graph.values[node] for node in deciding(step.graph, step.dependence)}
        return cls(replace(step, graph=replace(step.graph, values={})), find_glue(step), decided)

    def fits(self, graph: Graph) -> bool:
        """Whether it is that of the same graph with these values too."""
        return all(torch.equal(graph.values[node], value) for node, value in self.decided.items())

    def at(self, graph: Graph) -> AnalysedStep:
        """The step with these values."""
        return replace(self.step, graph=replace(self.step.graph, values=graph.values))


@dataclass(frozen=True)
class KeptTrace:
    """A trace, and what was analysed of it by what learns."""

    outline: Outline
    analyses: dict[frozenset[str], Analysis] = field(default_factory=dict)

    def analysed(self, step: Applied, learnable: frozenset[str]) -> tuple[AnalysedStep, Glue]:
        """The step with the values that it has now."""
        graph = self.outline.graph(step)
        found = self.analyses.get(learnable)
        if found is None or not found.fits(graph):
            found = Analysis.of(graph, learnable)
            weights = sum(site.entries.size for site in found.step.sites)
            if (
                graph.nodes is self.outline.nodes and weights <= LARGE
            ):  # those of complex values are made anew each time
                self.analyses[learnable] = found
                for choice in list(self.analyses)[:-CHOICES]:
                    self.analyses.pop(choice, None)
        return found.at(graph), found.glue


class KeptTraces:
    """The traces of some steps, the last ones that were used."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._traces: OrderedDict[Hashable, KeptTrace] = OrderedDict()

    def known(self, step: Applied, *rows: tuple[Role, Tensor]) -> KeptTrace | None:
        """That of a step like one that was traced before; None where there was none."""
        key = _key(step, rows)
        if key is None or key not in self._traces or not self._traces[key].outline.fits(step):
            return None
        self._traces.move_to_end(key)
        return self._traces[key]

    def new(self, step: Applied, *rows: tuple[Role, Tensor]) -> KeptTrace:
        """A new one, remembered."""
        found, key = KeptTrace(outline(step, *rows)), _key(step, rows)
        if key is not None:
            self._traces[key] = found
            self._traces.move_to_end(key)
            while len(self._traces) > self.most:
                self._traces.popitem(last=False)
        return found

    def forget(self) -> None:
        """Have everything traced anew."""
        self._traces.clear()


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
