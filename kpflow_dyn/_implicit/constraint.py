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
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, eps_of, like_numpy
from kpflow_dyn._implicit.layout import Layout
from kpflow_dyn.tracing._framework import Framework
from kpflow_dyn.tracing._graph import Graph, Node, Role, ancestors, evaluate, run
from kpflow_dyn.tracing._rows import fixed_values, split
from kpflow_dyn.tracing._structure import Kind, kinds_of
from kpflow_dyn.tracing._uses import Numbers, Use, find_uses, outputs_of


class Form(Enum):
    """What a traced graph says of the state S."""

    FREE = "its output is F(S)"
    FIXED_POINT = "its output is f(S), and F = S - f(S)"
    NETWORK = "S are values of its nodes"


@dataclass
class Traced:
    """A model that was traced for a solve.

    Attributes:
        graph: the model of one row.
        form: how it states the constraint.
        states: the nodes whose values are the state, or else its output.
        layout: how values make the state of a network, else None.
        framework: that of the graph.
        known: all parameters by name.
        rows: what the model takes besides its state, with trials in front (but for a free form).
        start: where the search for a state begins; of a network, None.
        model: z -> f(x, z) of a fixed point, by the model itself on all trials; None where it is called on each alone.
    """

    graph: Graph
    form: Form
    states: list[Node]
    layout: Layout | None
    framework: Framework
    known: Mapping[str, Any]
    rows: list[Array]
    start: Array | None = None
    model: Callable[[Array], Array] | None = None

    def constraint(self, learnable: Iterable[str]) -> Constraint:
        """The functions of a row, where these parameters learn."""
        return Constraint(self, learnable)


def every(traced: Traced) -> Constraint:
    """The functions of a row, where all parameters learn."""
    return traced.constraint(traced.graph.parameters.values())


def on_rows(traced: Traced, function: Callable[..., Any], axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """A function of a row, compiled for all rows of the model; a free form is one row.

    The rows are arguments of what is compiled: constants of a program would be whole on every device.

    Args:
        traced: the model, whose own inputs are the function's last arguments.
        function: of one row.
        axes: for each of its other arguments 0, or None for one that all rows share.
    """
    every = (*axes, *(0 for _ in traced.rows))
    over = function if traced.form is Form.FREE else traced.framework.vmap(function, every)
    compiled = traced.framework.compiled(over)
    return lambda *args: compiled(*args, *traced.rows)


def direct(traced: Traced, row: Constraint) -> Callable[[Array], Array]:
    """theta -> the states of a network."""
    return on_rows(traced, lambda theta, *x: row.direct(theta, None, *x), (None,))


def residual(traced: Traced, row: Constraint) -> Callable[[Array], Array]:
    """state -> F at all rows, as the parameters are."""
    return on_rows(traced, row.at, (0,))


def check_alike(found: Array, expected: Array) -> None:
    """Raise where a traced model, row by row, does not give what the model gives on all of its trials."""
    error = float(abs(found - expected).max()) / max(float(abs(expected).max()), 1e-30)
    if not error <= 1e4 * eps_of(expected):
        raise ValueError(
            f"the traced model differs from the model on all trials by {error:.1e} of its size: its trials influence "
            "each other, or it is random or changes itself"
        )


def network_of(
    graph: Graph,
    known: Mapping[str, Any],
    framework: Framework,
    x: Array,
    parts: Sequence[tuple[str, Node]] | None,
    of_one_trial: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> Traced:
    """A network whose state are these named values; the outputs of all uses of weights when None."""
    if parts is None:
        kinds = kinds_of(graph, set(graph.parameters))
        order = in_order(graph, kinds, ancestors([graph.output]))
        outputs = outputs_of(find_uses(order, kinds), order, kinds)
        parts = [(_named(graph, uses), node) for node, uses in outputs.items()]
    names, states = [name for name, _ in parts], [node for _, node in parts]
    if not states:
        raise ValueError("no weight meets data in the network, or no named module was called; nothing to analyse")
    if len(set(states)) < len(states):
        same = [name for name, node in parts if states.count(node) > 1]
        raise ValueError(f"the modules {same} give the very same value; name one of them")
    states.sort(key=graph.nodes.index)
    names = [next(name for name, node in parts if node is state) for state in states]
    layout = Layout(tuple(names), tuple(of_one_trial(node.shape) for node in states))
    return Traced(graph, Form.NETWORK, states, layout, framework, known, [x])


def in_order(graph: Graph, kinds: dict[Node, Kind], among: set[Node]) -> list[Node]:
    """Those of these nodes that depend on data."""
    return [node for node in graph.nodes if node in among and kinds[node] in (Kind.DATA, Kind.MOVING)]


def parameters_behind(graph: Graph, weight: Node) -> list[str]:
    """The names of the parameters that a weight is computed from."""
    behind = ancestors([weight])
    return [name for node, name in graph.parameters.items() if node in behind]


def _named(graph: Graph, uses: list[Use]) -> str:
    return " + ".join(dict.fromkeys(", ".join(parameters_behind(graph, use.weight)) for use in uses))


class Constraint:
    """The functions of one row.

    Args:
        traced: the model.
        learnable: the names of the parameters that learn; the others are constants.
    """

    def __init__(self, traced: Traced, learnable: Iterable[str]) -> None:
        names, graph, framework = set(learnable), traced.graph, traced.framework
        self.form, self.states, self.layout = traced.form, traced.states, traced.layout
        self.graph, self.framework = graph, framework
        self.parameters = [node for node, name in graph.parameters.items() if name in names]
        kinds, behind = kinds_of(graph, set(self.parameters)), ancestors(self.states)
        by_kind = {kind: [n for n in graph.nodes if n in behind and kinds[n] is kind] for kind in Kind}
        self.computed = by_kind[Kind.WEIGHT]
        self.order = in_order(graph, kinds, behind)
        if unmoved := [node.name for node in self.states if node not in self.order]:
            raise ValueError(f"the values {unmoved} depend on neither the input nor the state; ask for others")
        self.inputs = [node for node in graph.nodes if node.role is Role.INPUT]
        self.uses, self.looked_at = find_uses(self.order, kinds), set(self.states)
        self.sizes = [math.prod(use.node.shape) for use in self.uses]
        self.values = [graph.values[node] for node in self.parameters]
        self.constants = fixed_values(by_kind[Kind.CONSTANT], graph, framework)

    # The functions of a row

    def residual(self, theta: Array, state: Array, kicks: Array, *x: Array) -> Array:
        """F, in the form of the state; kicks [site] are added to the outputs of the uses."""
        added = self._added(kicks)
        if self.form is not Form.NETWORK:
            env = self._start(theta, x) | self._at(state)
            found = self._run(env, added, {})[self.graph.output].reshape(state.shape)
            return found if self.form is Form.FREE else state - found
        given = dict(zip(self.states, self._layout.split(state), strict=True))
        env = self._start(theta, x)
        found = self._run(env, added, given)
        return state - self._layout.join([found[node] for node in self.states])

    def at(self, state: Array, *x: Array) -> Array:
        """F at a state, as the parameters are."""
        return self.residual(self.theta, state, self.no_kicks(), *x)

    def outputs(self, theta: Array, state: Array, *x: Array) -> Array:
        """What all uses give [site], from weights of these parameters and data at the linearisation."""
        data, weights = self._data(state, x), self._weights(theta)
        found = [evaluate(use.node, data | {use.weight: weights[use.weight]}).reshape(-1) for use in self.uses]
        return array_namespace(theta).concat(found, axis=0)

    def direct(self, theta: Array, kicks: Array | None, *x: Array) -> Array:
        """The state of a network; a kick to a value is felt by all that comes later."""
        added = {} if kicks is None else dict(zip(self.states, self._layout.split(kicks), strict=True))
        found = self._run(self._start(theta, x), added, {})
        return self._layout.join([found[node] for node in self.states])

    def variables(self, state: Array, *x: Array) -> list[Array]:
        """The weight-site variables of all uses: V [matrix, row, d], coefficients [element], or data operands [...]."""
        env = self._data(state, x)
        return [self._variables(use, env, state) for use in self.uses]

    def _variables(self, use: Use, env: dict[Node, Array], state: Array) -> Array:
        if use.kind == "matrix":
            return self._rows_of(use, env)
        if use.kind == "opaque":
            others = [o for o in dict.fromkeys(use.node.operands) if o is not use.weight and o.floating]
            data = [env[o].reshape(-1) for o in others] or [state.reshape(-1)[:0]]
            return array_namespace(state).concat(data, axis=0)
        if use.node.role is Role.ADD:
            return like_numpy(np.ones(math.prod(use.node.shape)), state)
        weight = env[use.weight]
        ones = array_namespace(weight).ones_like(weight)
        slope = self.framework.jvp(lambda w: evaluate(use.node, env | {use.weight: w}), (weight,), (ones,))[1]
        return slope.reshape(-1)

    # Parts of these

    @property
    def _layout(self) -> Layout:
        assert self.layout is not None
        return self.layout

    @property
    def theta(self) -> Array:
        """The parameters that learn [p]."""
        return array_namespace(self.values[0]).concat([value.reshape(-1) for value in self.values], axis=0)

    def no_kicks(self) -> Array:
        """Zeros [site]."""
        return like_numpy(np.zeros(sum(self.sizes)), self.values[0])

    def weights(self) -> dict[Node, tuple[Array, np.ndarray]]:
        """Each used weight's value, and the numbers of its elements."""
        numbers, values = Numbers(self.parameters, self.framework, self.values[0]), self._weights(self.theta)
        return {use.weight: (values[use.weight], numbers.of(use.weight)) for use in self.uses}

    def _rows_of(self, use: Use, env: dict[Node, Array]) -> Array:
        """V of a product or of a convolution: patches are what it gives for the unit kernels."""
        operand = env[use.operand]
        if use.node.role is Role.CONVOLUTION:
            weight = env[use.weight]
            d = math.prod(weight.shape[1:])
            unit = like_numpy(np.eye(d), weight).reshape((d, *weight.shape[1:]))
            return evaluate(use.node, {use.weight: unit, use.operand: operand}).reshape((1, d, -1)).swapaxes(1, 2)
        V = operand if operand.ndim == 3 else operand[None]
        return V.swapaxes(1, 2) if use.transposed else V

    def _weights(self, theta: Array) -> dict[Node, Array]:
        given = dict(zip(self.parameters, split(theta, self.values), strict=True))
        return run(self.computed, self.constants | given)

    def _start(self, theta: Array, x: Sequence[Array]) -> dict[Node, Array]:
        given = {node: value.reshape(node.shape) for node, value in zip(self.inputs, x, strict=True)}
        return self._weights(theta) | given

    def _data(self, state: Array, x: Sequence[Array]) -> dict[Node, Array]:
        """All values at the linearisation."""
        env = self._start(self.theta, x)
        return run(self.order, env if self.form is Form.NETWORK else env | self._at(state))

    def _run(self, env: dict[Node, Array], added: dict[Node, Array], given: dict[Node, Array]) -> dict[Node, Array]:
        """The values of all nodes, those of states as they arise; what comes later sees those that are given."""
        found: dict[Node, Array] = {}
        for node in self.order:
            run([node], env)
            if node in added:
                env[node] = env[node] + added[node].reshape(node.shape)
            if node in self.looked_at:
                found[node] = env[node]
            if node in given:
                env[node] = given[node].reshape(node.shape)
        return found

    def _added(self, kicks: Array) -> dict[Node, Array]:
        added: dict[Node, Array] = {}
        for use, size, end in zip(self.uses, self.sizes, np.cumsum(self.sizes).tolist(), strict=True):
            kick = kicks[end - size : end]
            added[use.node] = added[use.node] + kick if use.node in added else kick
        return added

    def _at(self, state: Array) -> dict[Node, Array]:
        node = next(node for node in self.graph.nodes if node.role is Role.STATE)
        return {node: state.reshape(node.shape)}


def as_site(use: Use, weight: Array) -> Array:
    """A use's weight, or the numbers of its elements, as W [matrix, m, d]; of a scale one for each output element."""
    if use.kind == "opaque":
        return weight.reshape((-1,))
    if use.kind == "scale":
        return array_namespace(weight).broadcast_to(weight, use.node.shape).reshape((-1,))
    if use.node.role is Role.CONVOLUTION:
        return weight.reshape((1, len(weight), -1))
    weight = weight if weight.ndim == 3 else weight[None]
    return weight if use.transposed else weight.swapaxes(1, 2)
