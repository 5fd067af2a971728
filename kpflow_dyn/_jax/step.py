"""The tangent of one JAX step: linearised once for one row, its residuals evaluated on all rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Literal, Var, jaxpr_as_fun

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._jax.sites import kicks_shape
from kpflow_dyn._jax.transforms import each_row
from kpflow_dyn.tracing._graph import Node, ancestors, run
from kpflow_dyn.tracing._rows import RowFunctions, fixed_nodes
from kpflow_dyn.tracing._steps import AnalysedStep

Residuals = tuple[list[jax.Array], list[jax.Array]]  # those of the rows, and those that all have in common
Fixed = list[Any]  # the values of the nodes that depend on no row


class StepTangent:
    """(dz, kicks) -> the next state's tangent, along all rows.

    What it needs to know of a row are the residuals of `jax.linearize`. Those that depend on the row are kept for each,
    [time, trial, ...]; the others, the weights above all, only once. `x` and `z` are like those of any one row, and
    `fixed` like the values of the nodes that depend on no row.
    """

    def __init__(self, step: AnalysedStep, fixed: Fixed, x: Any, z: Any) -> None:
        needed = ancestors([step.graph.output])
        order = [node for node in step.graph.nodes if node in needed]
        self._entries = _entries(step, order)
        self.kick_sizes = [entry.length for entry in self._entries]

        def linearise(fixed: Fixed, x: jax.Array, z: jax.Array) -> list[jax.Array]:
            zeros = [jnp.zeros(size, z.dtype) for size in self.kick_sizes]
            kicked = _kicked(rows_at(step, fixed), order, self._entries)
            out, tangent = jax.linearize(lambda z, kicks: kicked(x, z, kicks), z, zeros)
            leaves, self._tree = jax.tree.flatten(tangent)
            return [out, *leaves]

        self._tree: Any = None
        program = jax.make_jaxpr(linearise)(fixed, x, z)
        of_row = [False] * len(jax.tree.leaves(fixed)) + [True, True]
        self._evaluate, self._moving = jaxpr_as_fun(program), _depend_on(program, of_row)[1:]
        self._row = x, z
        leaves = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in program.out_avals[1:]]
        kicks = [jax.ShapeDtypeStruct((size,), z.dtype) for size in self.kick_sizes]
        self._summed = _summed(jax.make_jaxpr(self._applied)(leaves, z, kicks).jaxpr)[: len(leaves)]

    def along(self, fixed: Fixed, x: jax.Array, z: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The next states of rows x, z [time, trial, ...], and those residuals that depend on the row."""

        def row(x: jax.Array, z: jax.Array) -> list[jax.Array]:
            out, *leaves = self._evaluate(*jax.tree.leaves(fixed), x, z)
            return [out, *_choose(leaves, self._moving)]

        next_state, *moving = each_row(row, x, z)
        return next_state, moving

    def everywhere(self, fixed: Fixed) -> list[jax.Array]:
        """The residuals that do not depend on the row."""
        row = (jnp.zeros(like.shape, like.dtype) for like in self._row)
        return _choose(self._evaluate(*jax.tree.leaves(fixed), *row)[1:], [not moves for moves in self._moving])

    def __call__(self, residuals: Residuals, dz: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        """The tangents at one time, from dz [trial, probe, unit] and kicks [trial, probe, kick] of `kick_sizes`."""
        return self._along(self._lying(residuals, 1), dz, kicks)

    def transpose(self, residuals: Residuals, q: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The same transposed: q [trial, probe, unit] -> what it is of dz and of the kicks."""
        kicks = [jax.ShapeDtypeStruct((*q.shape[:2], size), q.dtype) for size in self.kick_sizes]
        lying = self._lying(residuals, 0)
        return jax.linear_transpose(lambda dz, kicks: self._along(lying, dz, kicks), q, kicks)(q)

    def _along(self, residuals: Residuals, dz: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        moving, fixed = residuals

        def row(moving: list[jax.Array], dz: jax.Array, kicks: list[jax.Array]) -> jax.Array:
            here, everywhere = iter(moving), iter(fixed)
            return self._applied([next(here) if m else next(everywhere) for m in self._moving], dz, kicks)

        return jax.vmap(jax.vmap(row, (None, 0, 0)))(moving, dz, kicks)  # over trials, then over probes

    def _applied(self, leaves: list[jax.Array], dz: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        return jax.tree.unflatten(self._tree, leaves)(dz, kicks)

    def _lying(self, residuals: Residuals, axis: int) -> Residuals:
        """Matrices of which products sum over this axis as transposes of others, so that few rows times these are fast.

        The others are made once, before a loop over times; the barrier keeps XLA from undoing both.
        """
        moving, fixed = residuals
        axes = _choose(self._summed, [not moves for moves in self._moving])
        turned = [lax.optimization_barrier(W.T).T if over == axis else W for W, over in zip(fixed, axes, strict=True)]
        return moving, turned

    def kicks_at(self, time: jax.Array, kicks: list[jax.Array]) -> list[jax.Array]:
        """Each site's kicks [time, trial, inner, probe, m] -> those of one time, as the step takes them.

        Each is cut out by itself: XLA on a CPU does not vectorise what takes several parts of one dynamic slice.
        """

        def cut(entry: _Entry) -> jax.Array:
            block = kicks[entry.site]
            _, trials, _, probes, _ = block.shape
            found = lax.dynamic_slice(
                block, (time, 0, entry.row, 0, entry.start), (1, trials, entry.rows, probes, entry.m)
            )
            return found[0].swapaxes(1, 2).reshape(trials, probes, -1)

        return [cut(entry) for entry in self._entries]

    def kicks_with(self, here: list[jax.Array], time: jax.Array, kicks: list[jax.Array]) -> list[jax.Array]:
        """The transpose: each site's kicks, with those of the step in their place."""
        kicks = list(kicks)
        for values, entry in zip(here, self._entries, strict=True):
            block = values.reshape(*values.shape[:2], entry.rows, entry.m).swapaxes(1, 2)[None]
            start = (time, 0, entry.row, 0, entry.start)
            kicks[entry.site] = lax.dynamic_update_slice(kicks[entry.site], block, start)
        return kicks


@dataclass(frozen=True)
class _Entry:
    """Kicks of a site that enter side by side, at which node (if any) and from where on.

    They are a part of one inner row, m kicks from `start` on, or some whole rows.
    """

    site: int
    row: int
    rows: int
    start: int
    m: int
    node: Node | None
    element: int

    @property
    def length(self) -> int:
        """How many they are."""
        return self.rows * self.m


def rows_at(step: AnalysedStep, fixed: Fixed) -> RowFunctions:
    """The functions of one row, by the values of the nodes that depend on none."""
    known = dict(zip(fixed_nodes(step), fixed, strict=True))
    return RowFunctions(step, BACKENDS["jax"].transforms, known)


def _entries(step: AnalysedStep, order: list[Node]) -> list[_Entry]:
    """All kicks of all sites, in order. Those that nothing depends on enter nowhere."""
    where = {**step.kicks.replaced, **step.kicks.added}
    nodes, elements = np.full((2, step.kicks.size), -1)
    for n, node in enumerate(order):
        numbers = where.get(node, np.zeros(0, int))
        (here,) = np.nonzero(numbers >= 0)
        nodes[numbers[here]], elements[numbers[here]] = n, here
    found = []
    for s, site in enumerate(step.sites):
        n, e = nodes[site.kicks.ravel()], elements[site.kicks.ravel()]
        breaks = np.flatnonzero((np.diff(n) != 0) | (np.diff(e) != 1)) + 1
        _, width = kicks_shape(site)
        for ends in pairwise([0, *breaks.tolist(), len(n)]):
            for row, rows, start, m in _rectangles(*ends, width):
                first = row * width + start
                node = order[n[first]] if n[first] >= 0 else None
                found.append(_Entry(s, row, rows, start, m, node, int(e[first])))
    return found


def _rectangles(start: int, stop: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """A run of kicks as whole rows of this width, or as parts of rows: (row, rows, start, m)."""
    if start % width == stop % width == 0:
        yield start // width, (stop - start) // width, 0, width
        return
    ends = [start, *range((start // width + 1) * width, stop, width), stop]
    for a, b in pairwise(ends):
        yield a // width, 1, a % width, b - a


def _kicked(
    rows: RowFunctions, order: list[Node], entries: list[_Entry]
) -> Callable[[jax.Array, jax.Array, list[jax.Array]], jax.Array]:
    """(x, z, kicks) -> the next state, with the kicks added where they enter."""

    def step(x: jax.Array, z: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        env = rows.fixed | rows.arguments(x, z)
        for node in order:
            run([node], env)
            for values, entry in zip(kicks, entries, strict=True):
                if entry.node is node:
                    size = int(np.prod(node.shape))
                    padded = jnp.pad(values, (entry.element, size - entry.element - entry.length))  # [element]
                    env[node] = env[node] + padded.reshape(node.shape)
        return env[rows.step.graph.output].reshape(-1)

    return step


def _choose(values: Sequence, which: Sequence[bool]) -> list:
    return [value for value, chosen in zip(values, which, strict=True) if chosen]


def _depend_on(program: ClosedJaxpr, those: Sequence[bool]) -> list[bool]:
    """Which outputs depend on those inputs."""
    depend = set(_choose(program.jaxpr.invars, those))
    for equation in program.jaxpr.eqns:
        if any(isinstance(v, Var) and v in depend for v in equation.invars):
            depend.update(equation.outvars)
    return [isinstance(v, Var) and v in depend for v in program.jaxpr.outvars]


def _summed(program: Any) -> list[int | None]:
    """Over which axis of each matrix that goes in a product sums; None if there is no such product."""
    found = {}
    for equation in program.eqns:
        if equation.primitive.name == "dot_general":
            sums, _ = equation.params["dimension_numbers"]
            for var, axes in zip(equation.invars, sums, strict=True):
                if axes and not isinstance(var, Literal) and len(var.aval.shape) == 2:
                    found[var] = axes[0]
    return [found.get(var) for var in program.invars]
