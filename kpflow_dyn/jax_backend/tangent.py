"""The linearised recurrence of a JAX step and its sweeps: P, P*, J, J* as compiled scans.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    s_t = A_t s_{t-1} + B_t a_t + q_t,    a_t = V_t dW^T

Only this forward sweep is written; the backward one is its transpose by JAX, in which dW gathers as the sweep goes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpflow_dyn.jax_backend.checks import check_finite
from kpflow_dyn.jax_backend.rows import Jax, each_row
from kpflow_dyn.jax_backend.sites import SiteData
from kpflow_dyn.jax_backend.step import StepTangent
from kpflow_dyn.rows import Rows
from kpflow_dyn.structure import Structure

Data = tuple  # what a sweep needs to know of the rows: the step's residuals and each site's variables
Map = Callable[[Data, jax.Array], jax.Array]

SPAN_ROWS = 640
PROBES_TOGETHER = 64  # on a device that likes large products; a CPU is fastest with one after another


class Tangent:
    """The linear recurrence of one step along the states z_prev -> z under inputs x.

    Args:
        structure: the analysed step.
        x: inputs [trial, time, input].
        z_prev: the states that the step started from [trial, time, unit].
    """

    def __init__(self, structure: Structure, x: jax.Array, z_prev: jax.Array) -> None:
        rows = Rows(structure, Jax)
        self.trials, self.times, self.units = z_prev.shape
        self.like = z_prev.reshape(-1)[:0]
        self.span = -(-self.times // -(-self.times * self.trials // SPAN_ROWS))
        self.step = StepTangent(rows, structure.sites, x[0, 0], z_prev[0, 0])
        self.next_state, self.data = self._evaluated(rows, x, z_prev)
        (_, variables), _ = self.data
        pairs = zip(structure.sites, variables, strict=True)
        self.sites = [("a", SiteData(site, rows, data, self.times)) for site, data in pairs]
        self.weights, self._push, _pull = rows.weights()
        self.parameter_size = sum(value.size for value in rows.parameter_values())
        self.site_kicks = np.concatenate([site.kicks.ravel() for site in structure.sites])
        used = np.concatenate([site.entries.ravel() for _, site in self.sites])
        self.plain = not structure.derived and len(np.unique(used)) == len(used)
        self._make_maps()
        self._check(rows, x, z_prev)

    def _evaluated(self, rows: Rows, x: jax.Array, z: jax.Array) -> tuple[jax.Array, Data]:
        """The next states, and what sweeps need to know of the rows."""

        @jax.jit
        def evaluated(x: jax.Array, z: jax.Array) -> tuple[jax.Array, Data]:
            x, z = x.swapaxes(0, 1), z.swapaxes(0, 1)
            next_state, (moving, fixed) = self.step.along(x, z)
            variables = [rows.variables(site, x, z) for site in rows.structure.sites]
            return next_state.swapaxes(0, 1), (self._padded((moving, variables)), fixed)

        return evaluated(x, z)

    def _padded(self, rows: tuple) -> tuple:
        """Filled up with zeros to whole spans."""
        more = -self.times % self.span
        return jax.tree.map(lambda a: jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))), rows) if more else rows

    def _make_maps(self) -> None:
        """The compiled operators on blocks [probe, ...]."""
        state = jax.ShapeDtypeStruct((self.trials, self.times, self.units), self.like.dtype)
        theta = jax.ShapeDtypeStruct((self.parameter_size,), self.like.dtype)
        outputs = jax.ShapeDtypeStruct((self.trials, self.times, len(self.site_kicks)), self.like.dtype)
        changes = jax.eval_shape(self._changes, theta)
        gradient = _transposed(self._from_changes, changes) if self.plain else _transposed(self._from_parameters, theta)
        forward = self._from_changes if self.plain else self._from_parameters
        together = 1 if self.like.device.platform == "cpu" else PROBES_TOGETHER

        def block(function: Map) -> Callable[[jax.Array], jax.Array]:
            return _on_blocks(function, self.data, together)

        self.propagate = block(self._propagate)
        self.propagate_adjoint = block(_transposed(self._propagate, state))
        self.push_forward = block(self._from_parameters)
        self.pull_back = block(_transposed(self._from_parameters, theta))
        self.descend = block(lambda data, q: forward(data, gradient(data, q)))
        self.write, self.read = block(self._write), block(_transposed(self._write, theta))
        self.enter, self.enter_adjoint = block(self._enter), block(_transposed(self._enter, outputs))
        self.unpropagate = block(self._unpropagate)
        self.unpropagate_adjoint = block(_transposed(self._unpropagate, state))

    # One probe: states [trial, time, unit], parameters [p]

    def _changes(self, theta: jax.Array) -> list[jax.Array]:
        """Parameter changes -> weight changes, site by site."""
        weights = self._push(theta)
        return [site.take(weights) for _, site in self.sites]

    def _from_parameters(self, data: Data, theta: jax.Array) -> jax.Array:
        """J theta."""
        return self._from_changes(data, self._changes(theta))

    def _from_changes(self, data: Data, changes: list[jax.Array]) -> jax.Array:
        """s_t = A_t s_{t-1} + B_t V_t dW^T, where the products with V are formed for a span of times at once."""
        rows, fixed = data

        def span(s: jax.Array, rows: tuple) -> tuple[jax.Array, jax.Array]:
            moving, variables = rows
            return lax.scan(step, s, (self._kicks(changes, variables), moving))

        def step(s: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
            kicks, moving = row
            s = self.step((moving, fixed), s, kicks)
            return s, s

        start = jnp.zeros((self.trials, self.units), self.like.dtype)
        spans = jax.tree.map(lambda a: a.reshape(-1, self.span, *a.shape[1:]), rows)
        states = lax.scan(span, start, spans)[1]
        return states.reshape(-1, self.trials, self.units)[: self.times].swapaxes(0, 1)

    def _propagate(self, data: Data, q: jax.Array) -> jax.Array:
        """s_t = A_t s_{t-1} + q_t."""
        (moving, _), fixed = data

        def step(s: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
            q, moving = row
            s = self.step((moving, fixed), s, self._no_kicks()) + q
            return s, s

        return self._scan(step, (q.swapaxes(0, 1), self._unpadded(moving)))

    def _scan(self, step: Callable, rows: tuple) -> jax.Array:
        start = jnp.zeros((self.trials, self.units), self.like.dtype)
        return lax.scan(step, start, rows)[1].swapaxes(0, 1)

    def _write(self, data: Data, theta: jax.Array) -> jax.Array:
        """V dW^T of every site, side by side [trial, time, site]."""
        (_, variables), _ = data
        changes = self._changes(theta)
        return jnp.concatenate(self._kicks(changes, self._unpadded(variables)), -1).swapaxes(0, 1)

    def _enter(self, data: Data, values: jax.Array) -> jax.Array:
        """B: site values -> state, each step on its own."""
        still = jnp.zeros((self.times, self.trials, self.units), values.dtype)
        return self._each_step(data, still, values.swapaxes(0, 1)).swapaxes(0, 1)

    def _unpropagate(self, data: Data, s: jax.Array) -> jax.Array:
        """P^{-1}: s_t - A_t s_{t-1}."""
        previous = jnp.pad(s.swapaxes(0, 1)[:-1], ((1, 0), (0, 0), (0, 0)))
        still = jnp.zeros((self.times, self.trials, len(self.site_kicks)), s.dtype)
        return s - self._each_step(data, previous, still).swapaxes(0, 1)

    def _each_step(self, data: Data, z: jax.Array, values: jax.Array) -> jax.Array:
        (moving, _), fixed = data
        ends = np.cumsum([site.kicks.size for _, site in self.sites])[:-1]
        parts = jnp.split(values, ends, axis=-1)
        step = jax.vmap(lambda moving, z, kicks: self.step((moving, fixed), z, kicks))
        return step(self._unpadded(moving), z, parts)

    def _unpadded(self, rows: list) -> list:
        return jax.tree.map(lambda a: a[: self.times], rows)

    def _kicks(self, changes: list[jax.Array], variables: list[list[jax.Array]]) -> list[jax.Array]:
        return [site.kick(c, v) for (_, site), c, v in zip(self.sites, changes, variables, strict=True)]

    def _no_kicks(self) -> list[jax.Array]:
        return [jnp.zeros((self.trials, site.kicks.size), self.like.dtype) for _, site in self.sites]

    def _check(self, rows: Rows, x: jax.Array, z: jax.Array) -> None:
        """Compare every row with forward mode through the whole step, in one random direction."""
        generator = np.random.default_rng(0)
        dz, dtheta = (jnp.asarray(generator.standard_normal(n), z.dtype) for n in (z.shape, self.parameter_size))

        @jax.jit
        def compare(data: Data, x: jax.Array, z: jax.Array, dz: jax.Array) -> tuple[jax.Array, jax.Array]:
            x, z, dz = (a.swapaxes(0, 1) for a in (x, z, dz))
            (expected,) = each_row(rows.tangent(dtheta), x, z, dz)
            found = self._each_step(data, dz, self._write(data, dtheta).swapaxes(0, 1))
            error = abs(found - expected).max() / jnp.maximum(abs(expected).max(), jnp.finfo(z.dtype).tiny)
            return expected.swapaxes(0, 1), error

        expected, error = compare(self.data, x, z, dz)
        check_finite(expected, "the derivative of the step")
        if not error <= 1e4 * jnp.finfo(z.dtype).eps:
            raise RuntimeError(
                f"the linearised step is off by {float(error):.1e} of its size from forward mode through it; please "
                "report this cell, and write it with simpler operations meanwhile"
            )


def _transposed(function: Map, primal: jax.ShapeDtypeStruct) -> Map:
    """The transpose of a function that is linear in its second argument."""
    return lambda data, y: jax.linear_transpose(lambda v: function(data, v), primal)(y)[0]


def _on_blocks(function: Map, data: Data, together: int) -> Callable[[jax.Array], jax.Array]:
    """The function on blocks [probe, ...], compiled once for each number of probes."""

    @jax.jit
    def mapped(data: Data, block: jax.Array) -> jax.Array:
        return lax.map(lambda one: function(data, one), block, batch_size=None if together == 1 else together)

    return lambda block: mapped(data, block)
