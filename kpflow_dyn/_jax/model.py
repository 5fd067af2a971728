"""A JAX model and the parameters of it that learn, ready to be linearised in any step that is made of it."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from kpflow_dyn._arrays.complex_numbers import in_pairs, is_complex
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._jax.checks import floating_leaves, with_parameters
from kpflow_dyn._jax.derivative import Derivative
from kpflow_dyn._jax.programs import PROGRAMS, bytes_of, form_of
from kpflow_dyn._jax.step import Fixed
from kpflow_dyn._jax.tangent import Cut, Programs, Tangent
from kpflow_dyn._jax.trace import graph_of, jaxpr_of
from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn.tracing._copies import deciding
from kpflow_dyn.tracing._graph import Role
from kpflow_dyn.tracing._rules import RULES
from kpflow_dyn.tracing._steps import analyse


class Model:
    """A pytree, which a function of it calls; `parameters` are those that learn, by name."""

    decided = ""  # JAX lets no values decide what is traced

    def __init__(self, call: Any, params: Choice) -> None:
        self.call, self._all = call, dict(sorted(floating_leaves(call).items()))  # in the order of JAX
        self.parameters = {name: self._all[name] for name in choose(self._all, params)}

    def derivative(self, function: Callable[[Any, jax.Array], jax.Array], at: jax.Array) -> Derivative:
        """That of function(model, s) in the parameters that learn and in s, by JAX's autodiff of the model itself."""
        return Derivative(lambda values, s: function(with_parameters(self.call, values), s), self.parameters, at)

    def causes(self, derivative: Derivative) -> list[str]:
        """What of the model may be why a trace differs from it."""
        return derivative.custom

    def tangents(self, step: Callable[..., jax.Array], rows: jax.Array, before: jax.Array) -> Iterator[Tangent]:
        """The recurrence z -> step(model, row, z) along rows [trial, time, ...] from the states before each step."""

        def with_values(values: dict[str, jax.Array], row: jax.Array, z: jax.Array) -> jax.Array:
            return step(with_parameters(self.call, values), row, z)

        programs, given = programs_of(with_values, self._all, frozenset(self.parameters), rows, before)
        yield Tangent(programs, given, rows, before)


def programs_of(
    step: Callable[..., jax.Array],
    parameters: dict[str, jax.Array],
    learnt: frozenset[str],
    rows: jax.Array,
    before: jax.Array,
) -> tuple[Programs, Fixed]:
    """The programs of step(parameters, row, z) along rows [trial, time, ...], and the values of its graph."""
    parameters = {name: jnp.asarray(value) for name, value in parameters.items()}
    like = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (rows, before)]
    x, z = (jax.ShapeDtypeStruct(a.shape[2:], a.dtype) for a in like)
    jaxpr, cut = jaxpr_of(step, parameters, (Role.INPUT, x), (Role.STATE, z)), Cut.of(before)
    key = (form_of(jaxpr), *sorted(parameters), learnt, rows.shape, before.shape, cut, frozenset(RULES.items()))
    own = [*jaxpr.consts, *(value for _, value in sorted(parameters.items()))]
    if (found := PROGRAMS.find(key, own)) is not None:
        return found.programs, [*map(in_pairs, own), *found.rest]
    graph = graph_of(jaxpr, parameters, (Role.INPUT, x), (Role.STATE, z))
    analysed = analyse(graph, learnt, BACKENDS["jax"].transforms)
    given = list(graph.values.values())
    plain = replace(analysed, graph=replace(analysed.graph, values={}))
    programs = Programs(
        plain, dict(zip(graph.values, jax.eval_shape(lambda: given), strict=True)), like[0], like[1], cut
    )
    if not any(map(is_complex, jaxpr.consts)):  # whose imaginary parts the graph leaves out where they are zero
        decide = set(deciding(graph, analysed.dependence))
        decided = {n: bytes_of(own[n]) for n, node in enumerate(graph.values) if n < len(own) and node in decide}
        PROGRAMS.keep(key, _Structure(programs, given[len(own) :], decided))
    return programs, given


@dataclass(frozen=True)
class _Structure:
    """The programs of all steps of one form."""

    programs: Programs
    rest: Fixed  # constants within, which are part of the form
    decided: dict[int, Hashable]  # the values, by their number, that say which elements are copied

    def fits(self, values: Fixed) -> bool:
        """Whether it is that of a step with these constants and parameters too."""
        return all(bytes_of(values[n]) == known for n, known in self.decided.items())
