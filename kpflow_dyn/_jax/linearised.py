"""The steps of a traced recurrence in JAX, linearised along its states, each by itself.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    dz_t = A_t dz_{t-1} + B_t a_t        a_t = V_t dW^T

Arrays are [time, trial, probe, ...] inside.
"""

from copy import copy
from math import prod
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._jax.sites import SiteMaps, side_by_side
from kpflow_dyn._jax.step import Fixed, StepTangent, rows_at
from kpflow_dyn.tracing._graph import Node, run
from kpflow_dyn.tracing._rows import fixed_nodes
from kpflow_dyn.tracing._steps import AnalysedStep

Changes = list[jax.Array]  # of the weights, site by site


class Data(NamedTuple):
    """All numbers of linearised steps."""

    moving: list[jax.Array]  # residuals of the step at each row [time, trial, ...]
    variables: list[list[jax.Array]]  # of which each site's variables are made [time, trial, ...]
    everywhere: list[jax.Array]  # residuals that do not depend on the row
    fixed: Fixed  # the values of nodes that depend on no row
    bases: list[jax.Array | None]  # to which the variables of each site are cut


class LinearisedSteps:
    """What steps of one form are linearised by; it holds no numbers, so that other states and weights share it.

    Args:
        step: as analysed, without values.
        given: like the values that its graph had, of these nodes.
        x: like the inputs [trial, time, input].
        z: like the states before each step [trial, time, unit].
    """

    def __init__(self, step: AnalysedStep, given: dict[Node, Any], x: Any, z: Any) -> None:
        self.analysed, self._given, self.dtype = step, list(given), z.dtype
        self.trials, self.times, self.units = z.shape
        row = (jax.ShapeDtypeStruct(like.shape[2:], like.dtype) for like in (x, z))
        self.step = StepTangent(step, jax.eval_shape(self._fixed, list(given.values())), *row)
        self.parameter_size = sum(prod(node.shape) for node in step.parameters)
        none = np.zeros(0, int)
        self.site_kicks = np.concatenate([none, *(site.kicks.ravel() for site in step.sites)])
        used = np.concatenate([none, *(site.entries.ravel() for site in step.sites)])
        self.plain = not step.computed and len(np.unique(used)) == len(used)

    def at(self, data: Data) -> Self:
        """The same with maps of the sites and weights at these values, inside of a program."""
        found, rows = copy(self), rows_at(self.analysed, data.fixed)
        found.sites = [SiteMaps(site, rows, Q) for site, Q in zip(self.analysed.sites, data.bases, strict=True)]
        _, found._push, _ = rows.weights()
        return found

    sites: list[SiteMaps]
    _push: Any

    def _evaluate(self, given: Fixed, x: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array, Data]:
        """The next states [trial, time, unit], all weights, and what sweeps need to know."""
        fixed, (x, z) = self._fixed(given), (a.swapaxes(0, 1) for a in (x, z))  # [time, trial, ...]
        rows, sites = rows_at(self.analysed, fixed), self.analysed.sites
        next_state, moving = self.step.along(fixed, x, z)
        variables = rows.variables(sites, x, z)
        data = Data(moving, variables, self.step.everywhere(fixed), fixed, [None for _ in sites])
        return next_state.swapaxes(0, 1), rows.weights()[0], data

    def _fixed(self, given: Fixed) -> Fixed:
        """The values of all nodes that depend on no row, from those of the graph."""
        nodes = fixed_nodes(self.analysed)
        env = run(nodes, dict(zip(self._given, given, strict=True)))
        return [env[node] for node in nodes]

    def _everywhere(self, given: Fixed) -> list[jax.Array]:
        """The residuals that do not depend on the row."""
        return self.step.everywhere(self._fixed(given))

    # Weight changes

    def _changes(self, theta: jax.Array) -> Changes:
        """Parameter changes [probe, p] -> weight changes."""
        weights = jax.vmap(self._push)(theta)  # [probe, weight]
        return [site.take(weights) for site in self.sites]

    def _gradient(self, changes: Changes, probes: int) -> jax.Array:
        """The transpose: gradients of the weights -> of the parameters [probe, p]."""
        return jax.linear_transpose(self._changes, self._theta(probes))(changes)[0]

    def _no_changes(self, probes: int) -> Changes:
        shapes = jax.eval_shape(self._changes, self._theta(probes))
        return [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]

    def _theta(self, probes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((probes, self.parameter_size), self.dtype)

    def _kicks_of(self, changes: Changes, variables: list[list[jax.Array]]) -> list[jax.Array]:
        return [site.kick(c, v) for site, c, v in zip(self.sites, changes, variables, strict=True)]

    def _gather(self, kicks: list[jax.Array], variables: list[list[jax.Array]]) -> Changes:
        return [site.gather(k, v) for site, k, v in zip(self.sites, kicks, variables, strict=True)]

    def _kick(self, data: Data, theta: jax.Array) -> jax.Array:
        """B V dW^T: what one step makes of changes of the parameters."""
        return self._enter(data, self._write(data, theta))

    def _kick_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        return self._read(data, self._enter_adjoint(data, q))

    def _write(self, data: Data, theta: jax.Array) -> jax.Array:
        """V dW^T of every site, side by side [probe, trial, time, site]."""
        return block_of(self._values(data, theta))

    def _read(self, data: Data, values: jax.Array) -> jax.Array:
        return self._gradient(self._gather(self._by_site(rows_of(values)), data.variables), len(values))

    def _enter(self, data: Data, values: jax.Array) -> jax.Array:
        """B: site values -> state, each step on its own."""
        still = jnp.zeros((self.times, *self._still(len(values)).shape), values.dtype)
        return block_of(self._each_step(data, still, self._as_kicks(rows_of(values))))

    def _enter_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        return block_of(self._joined(self._each_step_transposed(data, rows_of(q))[1], len(q)))

    def _step_jvp(self, data: Data, theta: jax.Array, dz: jax.Array) -> jax.Array:
        """Each step by itself, of the parameters and the state before it."""
        return block_of(self._each_step(data, rows_of(dz), self._as_kicks(self._values(data, theta))))

    def _step_vjp(self, data: Data, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        dz, kicks = self._each_step_transposed(data, rows_of(q))
        changes = self._gather(self._by_site(self._joined(kicks, len(q))), data.variables)
        return self._gradient(changes, len(q)), block_of(dz)

    def _advance(self, data: Data, dz: jax.Array) -> jax.Array:
        """A_t dz_t, each step on its own."""
        rows = rows_of(dz)  # [time, trial, probe, unit]
        return block_of(self._each_step(data, rows, self._no_kicks(rows)))

    def _advance_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        """A_t^T q_t."""
        return block_of(self._each_step_transposed(data, rows_of(q))[0])

    def _each_step(self, data: Data, z: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        step = jax.vmap(lambda moving, z, kicks: self.step((moving, data.everywhere), z, kicks))
        return step(data.moving, z, kicks)

    def _each_step_transposed(self, data: Data, q: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        return jax.vmap(lambda moving, q: self.step.transpose((moving, data.everywhere), q))(data.moving, q)

    def _values(self, data: Data, theta: jax.Array) -> jax.Array:
        """V dW^T of every site, side by side [time, trial, probe, site]."""
        kicks = self._kicks_of(self._changes(theta), data.variables)
        return self._joined([side_by_side(block) for block in kicks], len(theta))

    def _by_site(self, values: jax.Array) -> list[jax.Array]:
        """Site values, side by side -> the kicks of each site."""
        parts = _split(values, [prod(site.shape) for site in self.sites])
        return [site.as_kicks(part) for site, part in zip(self.sites, parts, strict=True)]

    def _as_kicks(self, values: jax.Array) -> list[jax.Array]:
        """Site values, side by side -> what enters a step."""
        return _split(values, self.step.kick_sizes)

    def _joined(self, values: list[jax.Array], probes: int) -> jax.Array:
        """Blocks [time, trial, probe, width] side by side, of which there may be none."""
        return jnp.concatenate([jnp.zeros((self.times, self.trials, probes, 0), self.dtype), *values], -1)

    def _still(self, probes: int) -> jax.Array:
        return jnp.zeros((self.trials, probes, self.units), self.dtype)

    def _no_kicks(self, s: jax.Array) -> list[jax.Array]:
        return [jnp.zeros((*s.shape[:-1], size), s.dtype) for size in self.step.kick_sizes]


def _split(values: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """Parts of these sizes side by side, of which there may be none."""
    return jnp.split(values, np.cumsum(sizes)[:-1], axis=-1)[: len(sizes)]


def rows_of(block: jax.Array) -> jax.Array:
    """[probe, trial, time, ...] -> [time, trial, probe, ...]."""
    return block.swapaxes(0, 2)


block_of = rows_of
