"""A JAX model and the parameters of it that learn, ready to be linearised in any step that is made of it."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._jax.checks import floating_leaves, with_parameters
from kpflow_dyn._jax.derivative import Derivative
from kpflow_dyn._jax.tangent import Tangent
from kpflow_dyn._jax.trace import trace
from kpflow_dyn._problems.choice import Choice, choose
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

        graph = trace(with_values, self._all, rows[0, 0], before[0, 0])
        yield Tangent(analyse(graph, set(self.parameters), BACKENDS["jax"].transforms), rows, before)
