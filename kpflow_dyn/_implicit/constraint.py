"""A traced model as one constraint F(S, theta; x) = 0 on the values of some nodes, by functions of one row.

A row is one trial, or the whole of a free-form constraint. With F = S - G(S, theta; x), where G computes each value of
S from the others as they are given, all operators are derivatives of three functions at a solution:

    residual   F(theta, S, q): q are kicks that are added to the outputs of all uses of weights
    outputs    what all uses of weights give, q = V dW^T side by side, the data that they meet held as they are
    direct     the values themselves, with kicks added to each as it arises: the solution of F = kicks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, split_into
from kpflow_dyn._arrays.complex_numbers import in_pairs
from kpflow_dyn._backend import Transforms, Values
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.layout import Layout, ShapeLayout
from kpflow_dyn.tracing._dependence import FIXED, ON_DATA, Dependences, dependences
from kpflow_dyn.tracing._graph import Graph, Node, Role, ancestors, descendants, evaluate, run
from kpflow_dyn.tracing._lifetimes import last_needed, most_entries
from kpflow_dyn.tracing._numbers import parameters_behind
from kpflow_dyn.tracing._rows import fixed_values
from kpflow_dyn.tracing._sums import sums_of_uses
from kpflow_dyn.tracing._uses import Use, find_uses


@dataclass(frozen=True)
class TracedConstraint:
    """A model that was traced.

    Attributes:
        graph: the model of one row.
        form: how it states the constraint.
        states: the nodes whose values are the state, or else its output.
        layout: how values make the state of a network, else None.
        transforms: those of the graph's framework.
        rows: what the model takes besides its state, with trials in front (but for a free form).
    """

    graph: Graph
    form: Form
    states: list[Node]
    layout: Layout | None
    transforms: Transforms
    rows: list[Array]

    def at_output(self, layout: Layout) -> TracedConstraint:
        """The same network with its output as the state."""
        return replace(self, states=[self.graph.output], layout=layout)


def on_rows(traced: TracedConstraint, function: Callable[..., Any], axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """A function of a row, compiled for all rows of the model; a free form is one row.

    Its last arguments are the model's own inputs; of the others, axes say 0, or None where all rows share it. The rows
    are arguments of what is compiled: constants of a program would be whole on every device.
    """
    every = (*axes, *(0 for _ in traced.rows))
    over = function if traced.form is Form.FREE else traced.transforms.vmap(function, every)
    compiled = traced.transforms.compiled(over)
    return lambda *args: compiled(*args, *traced.rows)


def direct(traced: TracedConstraint, row: Constraint) -> Callable[[list[Array]], Array]:
    """theta -> the states of a network."""
    return on_rows(traced, lambda theta, *x: row.direct(theta, None, *x), (None,))


def states(traced: TracedConstraint, learnable: Iterable[str]) -> Array:
    """The states of a network as its parameters are."""
    row = Constraint(traced, learnable)
    return direct(traced, row)(row.values)


def named_states(traced: TracedConstraint, learnable: Sequence[str]) -> Callable[[Values], Array]:
    """The states of a network as a function of these of its parameters, by name."""
    function = direct(traced, Constraint(traced, learnable))
    return lambda values: function([in_pairs(values[name]) for name in learnable])


def network_of(
    graph: Graph, transforms: Transforms, rows: Sequence[Array], parts: Sequence[tuple[str, Node]], layout: Layout
) -> TracedConstraint:
    """A network whose state are these named values, in this order."""
    names, states = [name for name, _ in parts], [node for _, node in parts]
    if tuple(names) != layout.names or len(set(states)) < len(states):
        raise ValueError(f"the trace has the values {', '.join(names)}, the network {', '.join(layout.names)}")
    return TracedConstraint(graph, Form.NETWORK, states, layout, transforms, list(rows))


def network_of_uses(
    graph: Graph,
    transforms: Transforms,
    rows: Sequence[Array],
    of_one_trial: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> TracedConstraint:
    """A network whose state are the outputs of all uses of weights, which only the trace knows."""
    if graph.decided:
        raise ValueError(graph.decided)
    dependence = dependences(graph, graph.parameters)
    order = in_order(graph, dependence, ancestors([graph.output]))
    sums = sums_of_uses(find_uses(order, dependence), order, dependence)
    if not sums:
        raise ValueError("no weight meets data in the network; nothing to analyse")
    states = sorted(sums, key=graph.nodes.index)
    names = [_named(graph, sums[node]) for node in states]
    layout = ShapeLayout(tuple(names), tuple(of_one_trial(node.shape) for node in states))
    return TracedConstraint(graph, Form.NETWORK, states, layout, transforms, list(rows))


def in_order(graph: Graph, dependence: Dependences, among: set[Node]) -> list[Node]:
    """Those of these nodes that depend on data."""
    return [node for node in graph.nodes if node in among and dependence[node] in ON_DATA]


def _named(graph: Graph, uses: list[Use]) -> str:
    names = (", ".join(parameters_behind(graph, graph.parameters, use.weight)) for use in uses)
    return " + ".join(dict.fromkeys(names))


class Constraint:
    """The functions of one row, where the parameters of these names learn and the others are constants.

    theta is a list of the parameters, one array each: a vector of them all would be filled anew for each.
    """

    def __init__(self, traced: TracedConstraint, learnable: Iterable[str]) -> None:
        graph, transforms = traced.graph, traced.transforms
        nodes = {name: node for node, name in graph.parameters.items()}
        self.form, self.states, self.layout = traced.form, traced.states, traced.layout
        self.graph, self.transforms = graph, transforms
        self.parameters = [nodes[name] for name in learnable]
        self.dependence, behind = dependences(graph, self.parameters), ancestors(self.states)
        fixed = [node for node in graph.nodes if node in behind and self.dependence[node] in FIXED]
        moved = descendants(graph, self.parameters)
        self.computed = [node for node in fixed if node in moved]  # also behind a detach, or a comparison
        self.order = in_order(graph, self.dependence, behind)
        self.needed = last_needed(self.order)
        self.work = most_entries(self.order, self.needed)
        if unmoved := [node.name for node in self.states if node not in self.order]:
            raise ValueError(f"the values {unmoved} depend on neither the input nor the state; ask for others")
        self.inputs = [node for node in graph.nodes if node.role is Role.INPUT]
        self.uses, self.looked_at = find_uses(self.order, self.dependence), set(self.states)
        self.sizes = [math.prod(use.node.shape) for use in self.uses]
        self.values = [graph.values[node] for node in self.parameters]
        self.constants = fixed_values([node for node in fixed if node not in moved], graph, transforms)

    # The functions of a row

    def residual(self, theta: list[Array], state: Array, kicks: Array, *x: Array) -> Array:
        """F, in the form of the state; kicks [site] are added to the outputs of the uses."""
        added, env = self._added(kicks), self._start(theta, x)
        if self.form is not Form.NETWORK:
            found = self._run(env | self._at(state), added, {})[self.graph.output].reshape(state.shape)
            return found if self.form is Form.FREE else state - found
        found = self._run(env, added, dict(zip(self.states, self._layout.split(state), strict=True)))
        return state - self._joined(found)

    def at(self, state: Array, *x: Array) -> Array:
        """F at a state, as the parameters are."""
        return self.residual(self.values, state, self.no_kicks(), *x)

    def outputs(self, theta: list[Array], state: Array, *x: Array) -> Array:
        """What all uses give [site], from weights of these parameters and data at the linearisation."""
        data, weights = self.data(state, x), self.weights(theta)
        found = [evaluate(use.node, data | {use.weight: weights[use.weight]}).reshape(-1) for use in self.uses]
        xp = array_namespace(state)
        return xp.astype(xp.concat(found, axis=0), state.dtype, copy=False)

    def direct(self, theta: list[Array], kicks: Array | None, *x: Array) -> Array:
        """The state of a network; a kick to a value is felt by all that comes later."""
        added = {} if kicks is None else dict(zip(self.states, self._layout.split(kicks), strict=True))
        found = self._run(self._start(theta, x), added, {})
        return self._joined(found)

    # Parts of these

    @property
    def _layout(self) -> Layout:
        assert self.layout is not None
        return self.layout

    def _joined(self, found: Mapping[Node, Array]) -> Array:
        """The state of a row."""
        values = zip(self.states, self._layout.shapes, strict=True)
        return self._layout.join([found[node].reshape(shape) for node, shape in values])

    def no_kicks(self) -> Array:
        """Zeros [site]."""
        return like_numpy(np.zeros(sum(self.sizes)), self.values[0])

    def weights(self, theta: list[Array]) -> dict[Node, Array]:
        """All that is computed from the parameters alone."""
        return run(self.computed, self.constants | dict(zip(self.parameters, theta, strict=True)))

    def _start(self, theta: list[Array], x: Sequence[Array]) -> dict[Node, Array]:
        given = {node: value.reshape(node.shape) for node, value in zip(self.inputs, x, strict=True)}
        return self.weights(theta) | given

    def data(self, state: Array, x: Sequence[Array]) -> dict[Node, Array]:
        """All values at the linearisation."""
        env = self._start(self.values, x)
        return run(self.order, env if self.form is Form.NETWORK else env | self._at(state))

    def _run(self, env: dict[Node, Array], added: dict[Node, Array], given: dict[Node, Array]) -> dict[Node, Array]:
        """The values of all nodes, those of states as they arise; what comes later sees those that are given."""
        found: dict[Node, Array] = {}
        for node in self.order:
            run([node], env)
            if node in added:
                env[node] = env[node] + _alike(added[node], env[node])
            if node in self.looked_at:
                found[node] = env[node]
            if node in given:
                env[node] = _alike(given[node], env[node])
            for done in self.needed.get(node, ()):
                env.pop(done, None)
        return found

    def _added(self, kicks: Array) -> dict[Node, Array]:
        added: dict[Node, Array] = {}
        for use, kick in zip(self.uses, split_into(kicks, self.sizes), strict=True):
            added[use.node] = added[use.node] + kick if use.node in added else kick
        return added

    def _at(self, state: Array) -> dict[Node, Array]:
        node = next(node for node in self.graph.nodes if node.role is Role.STATE)
        return {node: state.reshape(node.shape)}


def _alike(value: Array, other: Array) -> Array:
    """In the shape and the precision of another: a part of a model may compute with less."""
    return array_namespace(other).astype(value, other.dtype, copy=False).reshape(other.shape)
