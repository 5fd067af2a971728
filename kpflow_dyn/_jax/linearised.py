"""The steps of a traced recurrence in JAX, linearised along its states, each by itself.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    dz_t = A_t dz_{t-1} + B_t a_t        a_t = V_t dW^T

Arrays are [time, trial, probe, ...] inside.
"""

from collections.abc import Callable
from copy import copy
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._jax.sites import SiteData
from kpflow_dyn._jax.step import StepTangent
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._steps import AnalysedStep

Data = tuple  # what a sweep needs to know of the rows: the step's residuals and each site's variables
Changes = list[jax.Array]  # of the weights, site by site


class LinearisedSteps:
    """The steps from states z_prev [trial, time, unit] under inputs x [trial, time, input]."""

    untraced = ""

    def __init__(self, step: AnalysedStep, x: jax.Array, z_prev: jax.Array) -> None:
        rows = RowFunctions(step, BACKENDS["jax"].transforms)
        self.trials, self.times, self.units = z_prev.shape
        self.like = z_prev.reshape(-1)[:0]
        self.rows, self.one = rows, (x[0, 0], z_prev[0, 0])
        self.step = StepTangent(rows, step.sites, *self.one)
        self.sites = [("a", SiteData(site, rows)) for site in step.sites]
        self.weights, self._push, _pull = rows.weights()
        self.parameter_size = sum(value.size for value in rows.parameter_values())
        self.site_kicks = np.concatenate([site.kicks.ravel() for site in step.sites])
        used = np.concatenate([site.entries.ravel() for _, site in self.sites])
        self.plain = not step.computed and len(np.unique(used)) == len(used)
        self.next_state, self.data = self._evaluate(rows, x, z_prev)
        (_, variables), _ = self.data
        for (_, site), data in zip(self.sites, variables, strict=True):
            site.data = data

    def _evaluate(self, rows: RowFunctions, x: jax.Array, z: jax.Array) -> tuple[jax.Array, Data]:
        """The next states, and what sweeps need to know of the rows."""

        @jax.jit
        def evaluated(*states: jax.Array) -> tuple[jax.Array, Data]:
            x, z = (a.swapaxes(0, 1) for a in states)  # [time, trial, ...]
            next_state, (moving, fixed) = self.step.along(x, z)
            variables = [rows.variables(site, x, z) for site in rows.step.sites]
            return next_state.swapaxes(0, 1), ((moving, variables), fixed)

        return evaluated(x, z)

    def truncated(self, bases: list[jax.Array | None]) -> Self:
        """The same with each site's variables cut to V Q Q^T, for orthonormal columns Q [d, r]; None for all of V."""
        cut = copy(self)
        cut.sites = [
            (name, site if basis is None else site.truncated(basis))
            for (name, site), basis in zip(self.sites, bases, strict=True)
        ]
        (moving, _), fixed = self.data
        cut.data = (moving, [site.data for _, site in cut.sites]), fixed
        return cut

    def fed_back(self, draw: Callable[[str, jax.Array], jax.Array]) -> Self:
        """The same gates, but what moves is multiplied by draw(name, W) in the place of each matrix W.

        The weights are what the step's tangent knows of all rows alike.
        """
        step, turned = StepTangent(self.rows.with_matrices(draw), self.rows.step.sites, *self.one), copy(self)
        known, _ = self.data
        turned.data = known, step.fixed_at(*self.one)
        return turned

    # Weight changes

    def _changes(self, theta: jax.Array) -> Changes:
        """Parameter changes [probe, p] -> weight changes."""
        weights = jax.vmap(self._push)(theta)  # [probe, weight]
        return [site.take(weights) for _, site in self.sites]

    def _gradient(self, changes: Changes, probes: int) -> jax.Array:
        """The transpose: gradients of the weights -> of the parameters [probe, p]."""
        return jax.linear_transpose(self._changes, self._theta(probes))(changes)[0]

    def _no_changes(self, probes: int) -> Changes:
        shapes = jax.eval_shape(self._changes, self._theta(probes))
        return [jnp.zeros(shape.shape, shape.dtype) for shape in shapes]

    def _theta(self, probes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((probes, self.parameter_size), self.like.dtype)

    def _kick(self, changes: Changes, variables: list[list[jax.Array]]) -> list[jax.Array]:
        return [site.kick(c, v) for (_, site), c, v in zip(self.sites, changes, variables, strict=True)]

    def _gather(self, kicks: list[jax.Array], variables: list[list[jax.Array]]) -> Changes:
        return [site.gather(k, v) for (_, site), k, v in zip(self.sites, kicks, variables, strict=True)]

    def _write(self, data: Data, theta: jax.Array) -> jax.Array:
        """V dW^T of every site, side by side [probe, trial, time, site]."""
        (_, variables), _ = data
        return block_of(jnp.concatenate(self._kick(self._changes(theta), variables), -1))

    def _read(self, data: Data, values: jax.Array) -> jax.Array:
        (_, variables), _ = data
        return self._gradient(self._gather(self._by_site(rows_of(values)), variables), len(values))

    def _enter(self, data: Data, values: jax.Array) -> jax.Array:
        """B: site values -> state, each step on its own."""
        still = jnp.zeros((self.times, *self._still(len(values)).shape), values.dtype)
        return block_of(self._each_step(data, still, self._as_kicks(rows_of(values))))

    def _enter_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        return block_of(jnp.concatenate(self._each_step_transposed(data, rows_of(q))[1], -1))

    def _step_jvp(self, data: Data, theta: jax.Array, dz: jax.Array) -> jax.Array:
        """Each step by itself, of the parameters and the state before it."""
        (_, variables), _ = data
        values = jnp.concatenate(self._kick(self._changes(theta), variables), -1)
        return block_of(self._each_step(data, rows_of(dz), self._as_kicks(values)))

    def _step_vjp(self, data: Data, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        (_, variables), _ = data
        dz, kicks = self._each_step_transposed(data, rows_of(q))
        changes = self._gather(self._by_site(jnp.concatenate(kicks, -1)), variables)
        return self._gradient(changes, len(q)), block_of(dz)

    def _advance(self, data: Data, dz: jax.Array) -> jax.Array:
        """A_t dz_t, each step on its own."""
        rows = rows_of(dz)  # [time, trial, probe, unit]
        return block_of(self._each_step(data, rows, self._no_kicks(rows)))

    def _advance_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        """A_t^T q_t."""
        return block_of(self._each_step_transposed(data, rows_of(q))[0])

    def _each_step(self, data: Data, z: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        (moving, _), fixed = data
        step = jax.vmap(lambda moving, z, kicks: self.step((moving, fixed), z, kicks))
        return step(moving, z, kicks)

    def _each_step_transposed(self, data: Data, q: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        (moving, _), fixed = data
        return jax.vmap(lambda moving, q: self.step.transpose((moving, fixed), q))(moving, q)

    def _by_site(self, values: jax.Array) -> list[jax.Array]:
        """Site values, side by side -> each site's."""
        return jnp.split(values, np.cumsum([site.kicks.size for _, site in self.sites])[:-1], axis=-1)

    def _as_kicks(self, values: jax.Array) -> list[jax.Array]:
        """Site values, side by side -> the kicks of a step."""
        return jnp.split(values, np.cumsum(self.step.kick_sizes)[:-1], axis=-1)

    def _still(self, probes: int) -> jax.Array:
        return jnp.zeros((self.trials, probes, self.units), self.like.dtype)

    def _no_kicks(self, s: jax.Array) -> list[jax.Array]:
        return [jnp.zeros((*s.shape[:-1], size), s.dtype) for size in self.step.kick_sizes]


def rows_of(block: jax.Array) -> jax.Array:
    """[probe, trial, time, ...] -> [time, trial, probe, ...]."""
    return block.swapaxes(0, 2)


block_of = rows_of
