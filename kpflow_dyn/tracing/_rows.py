"""The functions of one row (one trial at one time) that an analysed step gives, the same code for every framework.

They are mapped over rows by the framework's `each_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn._arrays.complex_numbers import split
from kpflow_dyn._backend import RowFunction, Transforms
from kpflow_dyn.tracing._dependence import FIXED, Dependence
from kpflow_dyn.tracing._graph import Graph, Node, Role, ancestors, evaluate, run
from kpflow_dyn.tracing._numbers import Term
from kpflow_dyn.tracing._sites import LookupSite, MatrixSite, OpaqueSite, ScaleSite, Site
from kpflow_dyn.tracing._steps import AnalysedStep
from kpflow_dyn.tracing._uses import Use, coefficients_of_scale, elements_of_lookup, variables_of_matrix


class RowFunctions:
    """The functions of one row of a step."""

    def __init__(self, step: AnalysedStep, transforms: Transforms, fixed: dict[Node, Array] | None = None) -> None:
        """`fixed` are the values of all that depends on no row, where they are known."""
        self.step, self.transforms = step, transforms
        graph, dependence = step.graph, step.dependence
        self.fixed = fixed_values(fixed_nodes(step), graph, transforms) if fixed is None else fixed
        self.constant = {node: value for node, value in self.fixed.items() if dependence[node] is Dependence.CONSTANT}
        self._input = next(node for node in graph.nodes if node.role is Role.INPUT)
        self._state = next(node for node in graph.nodes if node.role is Role.STATE)

    def with_matrices(self, draw: Callable[[str, Array], Array]) -> RowFunctions:
        """The same step with draw(name, W) in the place of each parameter W of two axes or more."""
        graph = self.step.graph
        drawn = {node: draw(name, graph.values[node]) for node, name in graph.parameters.items() if len(node.shape) > 1}
        graph = replace(graph, values=graph.values | drawn)
        return RowFunctions(replace(self.step, graph=graph), self.transforms)

    @property
    def like(self) -> Array:
        """An array of the step's dtype and device."""
        return self.fixed[self.step.parameters[0]]

    def index(self, numbers: np.ndarray) -> Any:
        """Element numbers as an index."""
        return self.transforms.index(numbers, self.like)

    def order(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes in the order of the graph."""
        wanted = set(nodes)
        return [node for node in self.step.graph.nodes if node in wanted]

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

    def parameter_values(self) -> list[Array]:
        """The parameters that learn."""
        return [self.fixed[node] for node in self.step.parameters]

    def weights(self) -> tuple[Array, Callable[[Array], Array], Callable[[Array], Array]]:
        """All weights that sites multiply [w], and the derivative (push, pull) of those in the parameters [p]."""
        parameters, derived = self.step.parameters, self.step.computed
        values, order = self.parameter_values(), self.order(ancestors(derived))
        jvp, vjp = self.transforms.jvp, self.transforms.vjp
        concat = array_namespace(self.like).concat

        def compute(theta: Array) -> Array:
            env = run(order, self.constant | dict(zip(parameters, split(theta, values), strict=True)))
            return concat([theta, *(part.reshape(-1) for node in derived for part in _parts(env[node]))])

        theta = concat([value.reshape(-1) for value in values])
        if not derived:
            return theta, lambda t: t, lambda w: w
        return compute(theta), lambda t: jvp(compute, (theta,), (t,))[1], lambda w: vjp(compute, theta)[1](w)[0]

    # Weight sites

    def variables(self, sites: Sequence[Site], x: Array, z: Array, multiple: int = 1) -> list[list[Array]]:
        """Each site's variables on rows x, z [time, trial, ...].

        Of a matrix V [time, trial, inner row, d], d filled up with zeros to a multiple of this; of a scale its
        coefficients [time, trial, e]; of a lookup which elements it takes [time, trial, e], counted from 1; of an
        opaque operation its data operands.
        """
        blocks = [block for site in sites if isinstance(site, MatrixSite) for block in site.blocks]
        uses = list(dict.fromkeys(term.use for block in blocks for term in block if term is not None))
        found = self.transforms.each_row(self._matrices(uses), x, z) if uses else []
        matrices = dict(zip(uses, found, strict=True))

        def of(site: Site) -> list[Array]:
            if isinstance(site, MatrixSite):
                return [_stacked(site.blocks, matrices, multiple)]
            return self._listed(site, x, z)

        return [*map(of, sites)]

    def _listed(self, site: ScaleSite | LookupSite | OpaqueSite, x: Array, z: Array) -> list[Array]:
        """The variables of a site that is no matrix."""
        if isinstance(site, OpaqueSite):
            return self.transforms.each_row(self.values(site.use.others), x, z)
        if isinstance(site, LookupSite):
            return self.transforms.each_row(self._with_data(site.use, elements_of_lookup), x, z)
        if site.use.node.role is not Role.POINTWISE:
            xp = array_namespace(x)
            return [xp.broadcast_to(xp.ones_like(z[..., :1]), (*x.shape[:2], len(site.kicks)))]
        jvp = self.transforms.jvp
        return self.transforms.each_row(self._with_data(site.use, partial(coefficients_of_scale, jvp=jvp)), x, z)

    def _matrices(self, uses: Sequence[Use]) -> RowFunction:
        """(x, z) -> V [matrix, inner row, d] of these uses."""
        operands = list(dict.fromkeys(use.operand for use in uses))
        values = self.values(operands)

        def row(x: Array, z: Array) -> list[Array]:
            env = dict(zip(operands, values(x, z), strict=True))
            return [variables_of_matrix(use, env) for use in uses]

        return row

    def _with_data(self, use: Use, function: Callable[[Use, dict[Node, Array]], Array]) -> RowFunction:
        """(x, z) -> [function(use, values of all that the use takes)]."""
        values, weight = self.values(use.others), self.fixed[use.weight]

        def row(x: Array, z: Array) -> list[Array]:
            env = dict(zip(use.others, values(x, z), strict=True))
            return [function(use, env | {use.weight: weight})]

        return row

    def opaque(self, site: OpaqueSite) -> tuple[Callable[..., Array], Callable[..., Array]]:
        """An operation's derivative in its weight on rows of its data [time, trial, ...], and the transpose.

        They are (w [probe, w], *data) -> q [time, trial, probe, e] and (q, *data) -> w. All rows share the weight: a
        gradient for each row would be as large as the weight.
        """
        use, weight = site.use, self.fixed[site.use.weight].reshape(-1)
        jvp, vjp, vmap = self.transforms.jvp, self.transforms.vjp, self.transforms.vmap

        def on_row(w: Array, *data: Array) -> Array:
            env = dict(zip(use.others, data, strict=True))
            return evaluate(use.node, env | {use.weight: w.reshape(use.weight.shape)}).reshape(-1)

        times, trials = ((None, *(axis for _ in use.others)) for axis in (0, 1))
        on_rows = vmap(vmap(on_row, times), trials, 1)

        def push(change: Array, *data: Array) -> Array:
            return vmap(lambda w: jvp(lambda v: on_rows(v, *data), (weight,), (w,))[1], 0, 2)(change)

        def pull(values: Array, *data: Array) -> Array:
            return vmap(vjp(lambda v: on_rows(v, *data), weight)[1], 2)(values)[0]

        return push, pull


def fixed_nodes(step: AnalysedStep) -> list[Node]:
    """What depends on parameters and constants alone."""
    return [node for node in step.graph.nodes if step.dependence[node] in FIXED]


def fixed_values(nodes: list[Node], graph: Graph, transforms: Transforms) -> dict[Node, Array]:
    """The values of nodes that depend on parameters and constants alone."""

    def compute() -> list[Array]:
        env = run(nodes, dict(graph.values))
        return [env[node] for node in nodes]

    return dict(zip(nodes, transforms.once(compute)(), strict=True))


def _stacked(blocks: Sequence[Sequence[Term | None]], matrices: dict[Use, Array], multiple: int) -> Array:
    """V [time, trial, inner row, d] of terms side by side, block after block; a term that is None is a one."""
    rows = []
    for block in blocks:
        parts = [None if term is None else matrices[term.use][:, :, term.matrix] for term in block]
        like = next(part for part in parts if part is not None)
        xp = array_namespace(like)
        ones = xp.ones_like(like[..., :1])
        parts = [ones if part is None else part for part in parts]
        parts += -sum(part.shape[-1] for part in parts) % multiple * [0 * ones]
        rows.append(xp.concat(parts, axis=-1))
    return rows[0] if len(rows) == 1 else array_namespace(rows[0]).concat(rows, axis=2)


def _parts(value: Array | Sequence[Array]) -> Sequence[Array]:
    return value if isinstance(value, tuple | list) else [value]
