"""Evaluate an analysed step, its glue and their derivatives on many rows (time, trial) at once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import jacfwd, jvp, vjp, vmap

from kpflow_dyn.graph import Node, Role, ancestors, evaluate, run
from kpflow_dyn.structure import Kind, Product, Structure

ROWS_AT_ONCE = 8192

with warnings.catch_warnings():  # torch's first forward derivative in a process calls its own deprecated torch.jit
    warnings.simplefilter("ignore", DeprecationWarning)
    jvp(torch.tanh, (torch.zeros(1),), (torch.zeros(1),))


class Rows:
    """The row functions of a step: all take one row and are mapped over rows by `each_row`."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        graph, kinds = structure.graph, structure.kinds
        fixed = [node for node in graph.nodes if kinds[node] in (Kind.CONSTANT, Kind.WEIGHT)]
        with torch.no_grad():
            self.fixed = run(fixed, dict(graph.values))
        self.input = next(node for node in graph.nodes if node.role is Role.INPUT)
        self.state = next(node for node in graph.nodes if node.role is Role.STATE)

    def values(self, nodes: Sequence[Node]) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """(x, z) -> the values of these nodes."""
        order = self._order(ancestors(nodes))

        def row(x: Tensor, z: Tensor) -> list[Tensor]:
            env = run(order, self.fixed | {self.input: x[None], self.state: z[None]})
            return [env[node] for node in nodes]

        return row

    def glue(self) -> Callable[[Tensor, Tensor, Tensor], list[Tensor]]:
        """(x, z, a) -> the sinks: each product's operand and the next state, with the kicks a in their places."""
        structure = self.structure
        sinks = [product.operand for product in structure.products] + [structure.graph.output]
        order = self._order(ancestors(sinks, stop=structure.replaced))
        takes = [self.index(product.positions.ravel()) for product in structure.products] + [None]
        replaced = {node: self.index(kicks) for node, kicks in structure.replaced.items()}
        added = {node: self.index(kicks) for node, kicks in structure.added.items()}

        def row(x: Tensor, z: Tensor, a: Tensor) -> list[Tensor]:
            kicks = torch.cat([a, a.new_zeros(1)])
            env = self.fixed | {self.input: x[None], self.state: z[None]}
            for node in order:
                if node in replaced:
                    env[node] = kicks[replaced[node]].reshape(node.shape)
                    continue
                run([node], env)
                if node in added:
                    env[node] = env[node] + kicks[added[node]].reshape(node.shape)
            flat = [env[node].reshape(-1) for node in sinks]
            return [f if take is None else f[take] for f, take in zip(flat, takes, strict=True)]

        return row

    def tangent(self, dtheta: Tensor) -> Callable[[Tensor, Tensor, Tensor], list[Tensor]]:
        """(x, z, dz) -> the next state's tangent along (dz, dtheta), by forward mode through the whole step."""
        structure = self.structure
        order = self._order(ancestors([structure.graph.output]))
        fixed = {node: value for node, value in self.fixed.items() if structure.kinds[node] is Kind.CONSTANT}
        values = [self.fixed[node] for node in structure.parameters]
        parts = dtheta.split([value.numel() for value in values])
        directions = [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]

        def row(x: Tensor, z: Tensor, dz: Tensor) -> list[Tensor]:
            def step(z: Tensor, *weights: Tensor) -> Tensor:
                env = fixed | dict(zip(structure.parameters, weights, strict=True))
                return run(order, env | {self.input: x[None], self.state: z[None]})[structure.graph.output].reshape(-1)

            return [jvp(step, (z, *values), (dz, *directions))[1]]

        return row

    def derivative_in_weight(self, node: Node, operand: Node) -> Callable[[Tensor, Tensor], list[Tensor]]:
        """(x, z) -> [d node / d operand] of a pointwise operation, element by element."""
        others = [o for o in node.operands if o is not operand]
        values = self.values(others)

        def row(x: Tensor, z: Tensor) -> list[Tensor]:
            env = dict(zip(others, values(x, z), strict=True))
            weight = self.fixed[operand]
            return [jvp(lambda w: evaluate(node, env | {operand: w}), (weight,), (torch.ones_like(weight),))[1]]

        return row

    def matrix(self, product: Product) -> Tensor:
        """The product's matrix [d, m]."""
        if product.entries is not None:
            return self.fixed[product.weight].reshape(-1)[self.index(product.entries)].contiguous()
        eye = torch.eye(product.positions.size, dtype=self.like.dtype, device=self.like.device).reshape(
            -1, *product.operand.shape
        )
        return vmap(lambda v: evaluate(product.node, {product.operand: v}).reshape(-1))(eye)

    @property
    def like(self) -> Tensor:
        """A tensor of the step's dtype and device."""
        return self.fixed[self.structure.parameters[0]]

    def index(self, numbers: np.ndarray) -> Tensor:
        """Element numbers as a tensor on the step's device."""
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self.like.device)

    def weights(self) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """All weights that sites multiply [w], and the derivative (push, pull) of those in the parameters [p]."""
        parameters, derived = self.structure.parameters, self.structure.derived
        values = [self.fixed[node] for node in parameters]
        order = self._order(ancestors(derived))
        fixed = {node: value for node, value in self.fixed.items() if self.structure.kinds[node] is Kind.CONSTANT}
        sizes = [value.numel() for value in values]

        def compute(theta: Tensor) -> Tensor:
            parts = [t.reshape(v.shape) for t, v in zip(theta.split(sizes), values, strict=True)]
            env = run(order, fixed | dict(zip(parameters, parts, strict=True)))
            return torch.cat([theta, *(_flat(env[node]) for node in derived)])

        theta = torch.cat([value.reshape(-1) for value in values])
        if not derived:
            return theta, lambda t: t, lambda w: w
        return (
            compute(theta),
            vmap(lambda t: jvp(compute, (theta,), (t,))[1]),
            vmap(lambda w: vjp(compute, theta)[1](w)[0]),
        )

    def opaque(self, node: Node, operand: Node) -> tuple[list[Node], Callable[..., Tensor], Callable[..., Tensor]]:
        """(data operands, push, pull): an operation's derivative in its weight, (w, *data) -> q and (q, *data) -> w."""
        others = [o for o in dict.fromkeys(node.operands) if o is not operand]
        weight = self.fixed[operand]

        def as_function(data: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
            env = dict(zip(others, data, strict=True))
            return lambda w: evaluate(node, env | {operand: w.reshape(operand.shape)}).reshape(-1)

        def push(w: Tensor, *data: Tensor) -> Tensor:
            return jvp(as_function(data), (weight.reshape(-1),), (w,))[1]

        def pull(q: Tensor, *data: Tensor) -> Tensor:
            return vjp(as_function(data), weight.reshape(-1))[1](q)[0]

        return others, push, pull

    def _order(self, nodes: set[Node]) -> list[Node]:
        return [node for node in self.structure.graph.nodes if node in nodes]


@torch.no_grad()
def each_row(function: Callable, *rows: Tensor) -> list[Tensor]:
    """A row function on [time, trial, ...] data -> its outputs as [time, trial, ...], some thousand rows at a time."""
    lead = rows[0].shape[:2]
    flat = [r.reshape(-1, *r.shape[2:]) for r in rows]
    parts = [vmap(function)(*chunk) for chunk in zip(*(r.split(ROWS_AT_ONCE) for r in flat), strict=True)]
    return [torch.cat(outputs).reshape(*lead, *outputs[0].shape[1:]) for outputs in zip(*parts, strict=True)]


def jacobians(glue: Callable, x: Tensor, z: Tensor, a: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each sink its derivatives in z and in a, [time, trial, sink, source]."""
    found = each_row(lambda *row: [d for pair in jacfwd(glue, argnums=(1, 2))(*row) for d in pair], x, z, a)
    return list(zip(found[::2], found[1::2], strict=True))


def tangents(glue: Callable, x: Tensor, z: Tensor, a: Tensor, dz: Tensor, da: Tensor) -> Tensor:
    """The sinks' tangents in one direction (dz [unit], da [kick]) for all rows, side by side [time, trial, sink]."""

    def row(x: Tensor, z: Tensor, a: Tensor) -> list[Tensor]:
        return [torch.cat(jvp(lambda z, a: glue(x, z, a), (z, a), (dz, da))[1])]

    return each_row(row, x, z, a)[0]


def _flat(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([v.reshape(-1) for v in value]) if isinstance(value, tuple | list) else value.reshape(-1)
