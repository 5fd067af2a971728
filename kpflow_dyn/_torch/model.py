"""A torch module and the parameters of it that learn, ready to be linearised in any step that is made of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from torch import Tensor, nn

from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn._torch.causes import likely_causes
from kpflow_dyn._torch.derivative import Derivative
from kpflow_dyn._torch.kept_traces import KeptTrace, KeptTraces
from kpflow_dyn._torch.tangent import Tangent
from kpflow_dyn._torch.trace import Applied
from kpflow_dyn.tracing._graph import Role

TRACES = KeptTraces()  # of the steps of all models in this process


class Model:
    """A module; `parameters` are copies of those that learn, by name, or by what `names` calls them.

    `decided` is what the last trace of it hangs on; see `kpflow_dyn.tracing._graph.Graph`.
    """

    def __init__(self, call: nn.Module, params: Choice, names: Mapping[str, str] | None = None) -> None:
        known = {(names or {}).get(name, name): value for name, value in call.named_parameters()}
        self.call, self.decided = call, ""
        self.learning = {name: known[name] for name in choose(known, params)}
        self.parameters = {name: value.detach().clone() for name, value in self.learning.items()}

    def derivative(self, function: Callable[[nn.Module, Tensor], Tensor], at: Tensor) -> Derivative:
        """That of function(module, s) in the parameters that learn and in s, by autograd through the module itself."""
        return Derivative(function, self.call, self.learning, at)

    def causes(self, derivative: Derivative) -> list[str]:
        """What of the module may be why a trace differs from it."""
        return likely_causes(self.call, derivative.states)

    def tangents(self, step: Callable[..., Tensor], rows: Tensor, before: Tensor) -> Iterator[Tangent]:
        """The recurrence z -> step(model, row, z) along rows [trial, time, ...] from the states before each step.

        Of a trace that is known already, if any, and of a new one. The caller compares each with the module.
        """
        module = Applied(step, self.call)
        one = (Role.INPUT, rows[:1, 0]), (Role.STATE, before[:1, 0])
        known = TRACES.known(module, *one)
        if known is not None:
            with suppress(Exception):
                yield self._tangent(known, module, rows, before)
        yield self._tangent(TRACES.new(module, *one), module, rows, before)

    def _tangent(self, trace: KeptTrace, module: Applied, rows: Tensor, before: Tensor) -> Tangent:
        self.decided = trace.outline.decided
        return Tangent(*trace.analysed(module, frozenset(self.parameters)), rows, before)
