"""The tangent of one JAX step: linearised once for one row, its residuals evaluated on all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun

from kpflow_dyn.graph import Node, ancestors, run
from kpflow_dyn.jax_backend.rows import each_row
from kpflow_dyn.jax_backend.sites import place, runs
from kpflow_dyn.rows import Rows
from kpflow_dyn.structure import Site

Residuals = tuple[list[jax.Array], list[jax.Array]]


class StepTangent:
    """(dz, kicks) -> the next state's tangent, along all rows.

    What it needs to know of a row are the residuals of `jax.linearize`. Those that depend on the row are kept for each,
    [time, trial, ...]; the others, the weights above all, only once.

    Args:
        rows: the row functions of the step.
        sites: its weight sites.
        x, z: one row.
    """

    def __init__(self, rows: Rows, sites: list[Site], x: jax.Array, z: jax.Array) -> None:
        step = _kicked(rows, sites)
        self._kick_sizes = [site.kicks.size for site in sites]
        zeros = [jnp.zeros(size, z.dtype) for size in self._kick_sizes]

        def linearise(x: jax.Array, z: jax.Array) -> list[jax.Array]:
            out, tangent = jax.linearize(lambda z, kicks: step(x, z, kicks), z, zeros)
            leaves, self._tree = jax.tree.flatten(tangent)
            return [out, *leaves]

        self._tree: Any = None
        program = jax.make_jaxpr(linearise)(x, z)
        self._evaluate, self._moving = jaxpr_as_fun(program), _depend_on_inputs(program)[1:]

    def along(self, x: jax.Array, z: jax.Array) -> tuple[jax.Array, Residuals]:
        """The next states of rows x, z [time, trial, ...], and the residuals."""

        def row(x: jax.Array, z: jax.Array) -> list[jax.Array]:
            out, *leaves = self._evaluate(x, z)
            return [out, *_choose(leaves, self._moving)]

        next_state, *moving = each_row(row, x, z)
        fixed = _choose(self._evaluate(x[0, 0], z[0, 0])[1:], [not moves for moves in self._moving])
        return next_state, (moving, fixed)

    def __call__(self, residuals: Residuals, dz: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        """The tangents at one time, from dz [trial, probe, unit] and each site's kicks [trial, probe, kick]."""
        moving, fixed = residuals

        def row(moving: list[jax.Array], dz: jax.Array, kicks: list[jax.Array]) -> jax.Array:
            here, everywhere = iter(moving), iter(fixed)
            leaves = [next(here) if m else next(everywhere) for m in self._moving]
            return jax.tree.unflatten(self._tree, leaves)(dz, kicks)

        return jax.vmap(jax.vmap(row, (None, 0, 0)))(moving, dz, kicks)

    def transpose(self, residuals: Residuals, q: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        """The same transposed: q [trial, probe, unit] -> what it is of dz and of the kicks."""
        kicks = [jax.ShapeDtypeStruct((*q.shape[:2], size), q.dtype) for size in self._kick_sizes]
        return jax.linear_transpose(lambda dz, kicks: self(residuals, dz, kicks), q, kicks)(q)


def _kicked(rows: Rows, sites: list[Site]) -> Callable[[jax.Array, jax.Array, list[jax.Array]], jax.Array]:
    """(x, z, kicks of each site) -> the next state, with the kicks added where they enter."""
    structure = rows.structure
    order = rows.order(ancestors([structure.graph.output]))
    entries = {
        node: found
        for node, numbers in (structure.replaced | structure.added).items()
        if (found := _entries(numbers, sites, structure.kick_size))
    }

    def step(x: jax.Array, z: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        env = rows.fixed | rows.arguments(x, z)
        for node in order:
            run([node], env)
            if node in entries:
                env[node] = env[node] + _sum(entries[node], kicks, node)
        return env[structure.graph.output].reshape(-1)

    return step


def _entries(numbers: np.ndarray, sites: list[Site], kick_size: int) -> list[tuple[int, list[tuple[int, int, int]]]]:
    """For each site whose kicks enter at this node, the runs from its outputs to the node's elements."""
    element = np.full(kick_size, -1)
    element[numbers[numbers >= 0]] = np.flatnonzero(numbers >= 0)
    found = []
    for s, site in enumerate(sites):
        target = element[site.kicks.ravel()]
        if (target >= 0).any():
            found.append((s, runs(np.flatnonzero(target >= 0), target[target >= 0])))
    return found


def _sum(entries: list[tuple[int, list[tuple[int, int, int]]]], kicks: list[jax.Array], node: Node) -> jax.Array:
    size = int(np.prod(node.shape))
    parts = [place(kicks[s], where, size) for s, where in entries]
    return sum(parts[1:], parts[0]).reshape(node.shape)


def _choose(values: list, which: list[bool]) -> list:
    return [value for value, chosen in zip(values, which, strict=True) if chosen]


def _depend_on_inputs(program: ClosedJaxpr) -> list[bool]:
    """Which outputs depend on an input."""
    depend = set(program.jaxpr.invars)
    for equation in program.jaxpr.eqns:
        if any(isinstance(v, Var) and v in depend for v in equation.invars):
            depend.update(equation.outvars)
    return [isinstance(v, Var) and v in depend for v in program.jaxpr.outvars]
