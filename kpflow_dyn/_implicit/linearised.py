"""What a linearised constraint can do, as its trace and autograd both give it; all transposes plain."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kpflow_dyn._arrays import Array, Rows, array_namespace
from kpflow_dyn._arrays.memory import in_blocks
from kpflow_dyn._flows.referee import Derivative
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._implicit.equations import Equations
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._spaces.operators import GramOperator, Operator, on_spaces
from kpflow_dyn._spaces.space import Space


@dataclass(frozen=True)
class Map:
    """A linear map and its transpose on blocks [probe, ...]; `squared` is push(pull(q)), where it has its own way."""

    push: Rows
    pull: Rows
    squared: Rows | None = None

    def between(self, domain: Space, codomain: Space) -> Operator:
        """As an operator."""
        return on_spaces(domain, codomain, self.push, self.pull)

    def gram(self, factor: Operator) -> GramOperator:
        """L L* of this map as an operator L on a space without a measure."""
        squared, measure = self.squared, factor.codomain.measure
        if squared is None or factor.domain.measure is not None:
            return GramOperator(factor)
        return GramOperator(factor, lambda q: squared(q if measure is None else measure * q))


@dataclass(frozen=True)
class Pair:
    """A derivative in the parameters and in an argument like the states, each a map of its own."""

    of_value: Callable[[], Array]
    parameters: Map
    argument: Map

    @property
    def value(self) -> Array:
        """The states."""
        return self.of_value()

    def push(self, theta: Array, argument: Array) -> Array:
        """Of both."""
        return self.parameters.push(theta) + self.argument.push(argument)

    def pull(self, q: Array) -> tuple[Array, Array]:
        """In both."""
        return self.parameters.pull(q), self.argument.pull(q)


def pair_of(own: Derivative) -> Pair:
    """Autograd's derivative by its two arguments."""

    def squared(q: Array) -> Array:
        parameters = own.probe.theta.shape[1]
        return in_blocks(lambda block: own.push(own.pull(block)[0], None), parameters, q)(q)

    return Pair(
        lambda: own.value,
        Map(lambda theta: own.push(theta, None), lambda q: own.pull(q)[0], squared),
        Map(lambda argument: own.push(None, argument), lambda q: own.pull(q)[1]),
    )


class Linearised(Protocol):
    """A constraint linearised at a solution S_0.

    parameters  those that learn, by name.
    untraced    why it was not traced; empty where it was.
    apart       S_0 - F: in the parameters, and in the state.
    whole       of a network the state: in the parameters, and in kicks that are added to each value; else None.
    outputs     how many outputs the sites of a row have.
    write       changes of the parameters -> of the outputs of all sites.
    enter       kicks at these -> -F.
    sites       the weight sites.
    """

    @property
    def parameters(self) -> dict[str, Array]: ...
    @property
    def untraced(self) -> str: ...
    @property
    def apart(self) -> Pair: ...
    @property
    def whole(self) -> Pair | None: ...
    @property
    def outputs(self) -> int: ...
    @property
    def write(self) -> Map: ...
    @property
    def enter(self) -> Map: ...
    def sites(self, measure: Array | None) -> list[WeightSite]: ...


@dataclass(frozen=True)
class Own:
    """See `Linearised`, by autograd through the model as its user calls it; a row is one site, whose output is -F."""

    model: Any  # of a backend
    derivatives: dict[str, Derivative]  # "apart" and, of a network, "whole"
    row: tuple[int, ...]  # the shape of the state of a row
    untraced: str = ""

    @property
    def parameters(self) -> dict[str, Array]:
        """Those of the model."""
        return self.model.parameters

    @property
    def apart(self) -> Pair:
        """S_0 - F."""
        return pair_of(self.derivatives["apart"])

    @property
    def whole(self) -> Pair | None:
        """The state of a network."""
        return pair_of(self.derivatives["whole"]) if "whole" in self.derivatives else None

    @property
    def outputs(self) -> int:
        """All entries of the state."""
        return math.prod(self.row)

    @property
    def write(self) -> Map:
        """Those of -F itself, side by side."""
        kick = self.apart.parameters
        return Map(lambda theta: self._flat(kick.push(theta)), lambda q: kick.pull(self._shaped(q)))

    @property
    def enter(self) -> Map:
        """The identity."""
        return Map(self._shaped, self._flat)

    def sites(self, measure: Array | None) -> list[WeightSite]:
        """None are known."""
        return []

    def _flat(self, q: Array) -> Array:
        return q.reshape((*q.shape[: q.ndim - len(self.row)], self.outputs))

    def _shaped(self, q: Array) -> Array:
        return q.reshape((*q.shape[:-1], *self.row))


def own_of(equations: Equations, model: Any, state: Array) -> Own:
    """The derivatives by autograd of a backend's `Model` of these equations."""
    found = {"apart": apart_of(equations, model, state)}
    if equations.form is Form.NETWORK:
        found["whole"] = whole_of(equations, model, state)
    return Own(model, found, tuple(state.shape if equations.form is Form.FREE else state.shape[1:]))


def apart_of(equations: Equations, model: Any, state: Array) -> Derivative:
    """S_0 - F in the parameters and in the state."""
    return model.derivative(lambda call, s: state - equations.residual(call, s), state)


def parameters_of(equations: Equations, model: Any, state: Array) -> Derivative:
    """F at the state in the parameters alone."""
    return model.derivative(lambda call, _nothing: equations.residual(call, state), state.reshape(-1)[:0])


def whole_of(equations: Equations, model: Any, state: Array) -> Derivative:
    """The state of a network in its parameters and in kicks."""
    return model.derivative(equations.kicked, array_namespace(state).zeros_like(state))
