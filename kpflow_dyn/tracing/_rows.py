"""The functions of one row (one trial at one time) that an analysed step gives, the same code for every framework.

They are mapped over rows by the framework's `each_row`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn.tracing._framework import Framework, RowFunction
from kpflow_dyn.tracing._graph import Graph, Node, Role, ancestors, evaluate, run
from kpflow_dyn.tracing._structure import Kind, MatrixSite, OpaqueSite, Piece, ScaleSite, Site, Structure


class Rows:
    """The row functions of a step."""

    def __init__(self, structure: Structure, framework: Framework) -> None:
        self.structure, self.framework = structure, framework
        graph, kinds = structure.graph, structure.kinds
        fixed = [node for node in graph.nodes if kinds[node] in (Kind.CONSTANT, Kind.WEIGHT)]
        self.fixed = fixed_values(fixed, graph, framework)
        self.constant = {node: value for node, value in self.fixed.items() if kinds[node] is Kind.CONSTANT}
        self._input = next(node for node in graph.nodes if node.role is Role.INPUT)
        self._state = next(node for node in graph.nodes if node.role is Role.STATE)

    def with_matrices(self, draw: Callable[[str, Array], Array]) -> Rows:
        """The same step with draw(name, W) in the place of each parameter W of two axes or more."""
        graph = self.structure.graph
        drawn = {node: draw(name, graph.values[node]) for node, name in graph.parameters.items() if len(node.shape) > 1}
        graph = replace(graph, values=graph.values | drawn)
        return Rows(replace(self.structure, graph=graph), self.framework)

    @property
    def like(self) -> Array:
        """An array of the step's dtype and device."""
        return self.fixed[self.structure.parameters[0]]

    def index(self, numbers: np.ndarray) -> Any:
        """Element numbers as an index."""
        return self.framework.index(numbers, self.like)

    def order(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes in the order of the graph."""
        wanted = set(nodes)
        return [node for node in self.structure.graph.nodes if node in wanted]

    def arguments(self, x: Array, z: Array) -> dict[Node, Array]:
        """The row's data at their nodes."""
        return {self._input: x.reshape(self._input.shape), self._state: z.reshape(self._state.shape)}

    def values(self, nodes: Sequence[Node]) -> RowFunction:
        """(x, z) -> the values of these nodes."""
        order = self.order(ancestors(nodes))

        def row(x: Array, z: Array) -> list[Array]:
            env = run(order, self.fixed | self.arguments(x, z))
            return [env[node] for node in nodes]

        return row

    def tangent(self, dtheta: Array) -> RowFunction:
        """(x, z, dz) -> the next state's tangent along (dz, dtheta), by forward mode through the whole step."""
        output = self.structure.graph.output
        order, values = self.order(ancestors([output])), self.parameter_values()
        directions = split(dtheta, values)

        def row(x: Array, z: Array, dz: Array) -> list[Array]:
            def step(z: Array, *weights: Array) -> Array:
                env = self.constant | dict(zip(self.structure.parameters, weights, strict=True))
                return run(order, env | self.arguments(x, z))[output].reshape(-1)

            return [self.framework.jvp(step, (z, *values), (dz, *directions))[1]]

        return row

    def parameter_values(self) -> list[Array]:
        """The parameters that learn."""
        return [self.fixed[node] for node in self.structure.parameters]

    def weights(self) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
        """All weights that sites multiply [w], and the derivative (push, pull) of those in the parameters [p]."""
        parameters, derived = self.structure.parameters, self.structure.derived
        values, order = self.parameter_values(), self.order(ancestors(derived))
        jvp, vjp = self.framework.jvp, self.framework.vjp
        concat = array_namespace(self.like).concat

        def compute(theta: Array) -> Array:
            env = run(order, self.constant | dict(zip(parameters, split(theta, values), strict=True)))
            return concat([theta, *(part.reshape(-1) for node in derived for part in _parts(env[node]))])

        theta = concat([value.reshape(-1) for value in values])
        if not derived:
            return theta, lambda t: t, lambda w: w
        return compute(theta), lambda t: jvp(compute, (theta,), (t,))[1], lambda w: vjp(compute, theta)[1](w)[0]

    # Weight sites

    def variables(self, site: Site, x: Array, z: Array) -> list[Array]:
        """A site's variables on rows x, z [time, trial, ...].

        Of a matrix V [time, trial, inner row, d]; of a scale its coefficients [time, trial, e]; of an opaque operation
        its data operands.
        """
        if isinstance(site, MatrixSite):
            return [self._stacked(site.blocks, x, z)]
        if isinstance(site, OpaqueSite):
            return self.framework.each_row(self.values(_others(site)), x, z)
        if site.operand is None:
            xp = array_namespace(x)
            return [xp.broadcast_to(xp.ones_like(z[..., :1]), (*x.shape[:2], len(site.kicks)))]
        (found,) = self.framework.each_row(self._derivative_in_weight(site), x, z)
        return [found.reshape((*x.shape[:2], -1))]

    def _stacked(self, blocks: list[list[Piece]], x: Array, z: Array) -> Array:
        nodes = list(dict.fromkeys(node for block in blocks for node, _ in block if node is not None))
        found = self.framework.each_row(self.values(nodes), x, z) if nodes else []
        values = {node: value.reshape((*x.shape[:2], -1)) for node, value in zip(nodes, found, strict=True)}
        xp = array_namespace(x)
        ones = xp.ones_like(z[..., :1])
        pieces = [
            [(ones if node is None else values[node])[..., self.index(where)] for node, where in block]
            for block in blocks
        ]
        return xp.concat([xp.concat(row, axis=-1) for row in pieces], axis=2)

    def _derivative_in_weight(self, site: ScaleSite) -> RowFunction:
        """(x, z) -> [d node / d operand] of a pointwise operation, element by element."""
        operand = site.operand
        assert operand is not None
        others, values, weight = _others(site), self.values(_others(site)), self.fixed[operand]
        ones = array_namespace(weight).ones_like(weight)

        def row(x: Array, z: Array) -> list[Array]:
            env = dict(zip(others, values(x, z), strict=True))
            return [self.framework.jvp(lambda w: evaluate(site.node, env | {operand: w}), (weight,), (ones,))[1]]

        return row

    def opaque(self, site: OpaqueSite) -> tuple[Callable[..., Array], Callable[..., Array]]:
        """(push, pull): an operation's derivative in its weight, (w, *data) -> q and (q, *data) -> w."""
        others, weight = _others(site), self.fixed[site.operand]

        def as_function(data: tuple[Array, ...]) -> Callable[[Array], Array]:
            env = dict(zip(others, data, strict=True))
            return lambda w: evaluate(site.node, env | {site.operand: w.reshape(site.operand.shape)}).reshape(-1)

        def push(w: Array, *data: Array) -> Array:
            return self.framework.jvp(as_function(data), (weight.reshape(-1),), (w,))[1]

        def pull(q: Array, *data: Array) -> Array:
            return self.framework.vjp(as_function(data), weight.reshape(-1))[1](q)[0]

        return push, pull


def fixed_values(nodes: list[Node], graph: Graph, framework: Framework) -> dict[Node, Array]:
    """The values of nodes that depend on parameters and constants alone."""

    def compute() -> list[Array]:
        env = run(nodes, dict(graph.values))
        return [env[node] for node in nodes]

    return dict(zip(nodes, framework.compiled(compute)(), strict=True))


def _others(site: ScaleSite | OpaqueSite) -> list[Node]:
    return [o for o in dict.fromkeys(site.node.operands) if o is not site.operand]


def _parts(value: Array | Sequence[Array]) -> Sequence[Array]:
    return value if isinstance(value, tuple | list) else [value]


def split(theta: Array, values: list[Array]) -> list[Array]:
    """A vector of all parameters, as one array of each parameter's shape."""
    ends = np.cumsum([math.prod(value.shape) for value in values]).tolist()
    return [theta[end - math.prod(v.shape) : end].reshape(v.shape) for end, v in zip(ends, values, strict=True)]
