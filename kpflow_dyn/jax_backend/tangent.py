"""The linearised recurrence of a JAX step and its sweeps: P, P*, J, J* as compiled scans.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    s_t = A_t s_{t-1} + B_t a_t + q_t,    a_t = V_t dW^T

run forward, and transposed backward, where dW gathers as the sweep goes. All arrays of a sweep are [time, trial, probe,
...], so that the rows of all probes make one product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpflow_dyn.jax_backend.checks import check_finite
from kpflow_dyn.jax_backend.rows import JAX, each_row
from kpflow_dyn.jax_backend.sites import SiteData
from kpflow_dyn.jax_backend.step import StepTangent
from kpflow_dyn.rows import Rows
from kpflow_dyn.structure import Structure

Data = tuple  # what a sweep needs to know of the rows: the step's residuals and each site's variables
Changes = list[jax.Array]  # of the weights, site by site
Map = Callable[[Data, jax.Array], jax.Array]

SPAN_ROWS = 640  # whose products with the variables are formed at once
ROWS_TOGETHER = 640  # of all probes at one time
DEVICE_ROWS_TOGETHER = 2**14  # the same on a device that likes large products


class Tangent:
    """The linear recurrence of one step along the states z_prev -> z under inputs x.

    Args:
        structure: the analysed step.
        x: inputs [trial, time, input].
        z_prev: the states that the step started from [trial, time, unit].
    """

    def __init__(self, structure: Structure, x: jax.Array, z_prev: jax.Array) -> None:
        rows = Rows(structure, JAX)
        self.trials, self.times, self.units = z_prev.shape
        self.like = z_prev.reshape(-1)[:0]
        self.span = -(-self.times // -(-self.times * self.trials // SPAN_ROWS))
        self.step = StepTangent(rows, structure.sites, x[0, 0], z_prev[0, 0])
        self.sites = [("a", SiteData(site, rows)) for site in structure.sites]
        self.weights, self._push, _pull = rows.weights()
        self.parameter_size = sum(value.size for value in rows.parameter_values())
        self.site_kicks = np.concatenate([site.kicks.ravel() for site in structure.sites])
        used = np.concatenate([site.entries.ravel() for _, site in self.sites])
        self.plain = not structure.derived and len(np.unique(used)) == len(used)
        self.next_state, self.data = self._evaluate(rows, x, z_prev)
        (_, variables), _ = self.data
        for (_, site), data in zip(self.sites, variables, strict=True):
            site.data = self._unpadded(data)
        self._make_maps()

    def _evaluate(self, rows: Rows, x: jax.Array, z: jax.Array) -> tuple[jax.Array, Data]:
        """The next states, and what sweeps need to know of the rows.

        Each row is compared with forward mode through the whole step, in one random direction.
        """
        generator = np.random.default_rng(0)
        dz, dtheta = (jnp.asarray(generator.standard_normal(n), z.dtype) for n in (z.shape, self.parameter_size))

        @jax.jit
        def evaluated(*states: jax.Array) -> tuple[jax.Array, Data, jax.Array, jax.Array]:
            x, z, dz = (a.swapaxes(0, 1) for a in states)
            next_state, (moving, fixed) = self.step.along(x, z)
            variables = [rows.variables(site, x, z) for site in rows.structure.sites]
            data = (moving, self._in_spans(variables)), fixed
            (expected,) = each_row(rows.tangent(dtheta), x, z, dz)
            found = self._each_step(data, dz[:, :, None], self._kick(self._changes(dtheta[None]), variables))[:, :, 0]
            error = abs(found - expected).max() / jnp.maximum(abs(expected).max(), jnp.finfo(z.dtype).tiny)
            return next_state.swapaxes(0, 1), data, expected.swapaxes(0, 1), error

        next_state, data, expected, error = evaluated(x, z, dz)
        check_finite(expected, "the derivative of the step")
        if not error <= 1e4 * jnp.finfo(z.dtype).eps:
            raise RuntimeError(
                f"the linearised step is off by {float(error):.1e} of its size from forward mode through it; please "
                "report this cell, and write it with simpler operations meanwhile"
            )
        return next_state, data

    def _in_spans(self, rows: list) -> list:
        """Rows [time, trial, ...] -> [span, time, trial, ...], filled up with zeros to whole spans."""
        return jax.tree.map(lambda a: self._padded(a).reshape(-1, self.span, *a.shape[1:]), rows)

    def _unpadded(self, spans: Any) -> Any:
        """Back to [time, trial, ...]."""
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[: self.times], spans)

    def _padded(self, rows: jax.Array) -> jax.Array:
        return jnp.pad(rows, ((0, -self.times % self.span), *((0, 0),) * (rows.ndim - 1)))

    def _span_times(self) -> jax.Array:
        """The times of each span [span, time]."""
        return jnp.arange(self.times + -self.times % self.span).reshape(-1, self.span)

    def _make_maps(self) -> None:
        """The compiled operators on blocks [probe, ...]."""
        on_cpu = next(iter(self.like.devices())).platform == "cpu"
        rows = ROWS_TOGETHER if on_cpu else DEVICE_ROWS_TOGETHER
        block = partial(_on_blocks, data=self.data, together=max(1, rows // self.trials))
        self.propagate = block(self._propagate)
        self.propagate_adjoint = block(self._propagate_adjoint)
        self.push_forward = block(lambda data, theta: self._forward(data, self._changes(theta), len(theta)))
        self.pull_back = block(lambda data, q: self._gradient(self._backward(data, q), len(q)))
        self.push_forward_apart = block(self._push_forward_apart)
        self.pull_back_apart = block(self._pull_back_apart)
        self.descend = block(self._descend)
        self.write = block(self._write)
        self.read = block(self._read)
        self.enter = block(self._enter)
        self.enter_adjoint = block(self._enter_adjoint)
        self.unpropagate = block(self._unpropagate)
        self.unpropagate_adjoint = block(self._unpropagate_adjoint)

    # Weight changes

    def _changes(self, theta: jax.Array) -> Changes:
        """Parameter changes [probe, p] -> weight changes."""
        weights = jax.vmap(self._push)(theta)
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

    # The same with changes of each trial's own, [trial, ...] in front of those that all trials share

    def _kick_apart(self, changes: Changes, variables: list[list[jax.Array]]) -> list[jax.Array]:
        return jax.vmap(self._kick_one, (0, 1), 1)(changes, variables)

    def _gather_apart(self, kicks: list[jax.Array], variables: list[list[jax.Array]]) -> Changes:
        return jax.vmap(self._gather_one, (1, 1), 0)(kicks, variables)

    def _kick_one(self, changes: Changes, variables: list[list[jax.Array]]) -> list[jax.Array]:
        return [kick[:, 0] for kick in self._kick(changes, _alone(variables))]

    def _gather_one(self, kicks: list[jax.Array], variables: list[list[jax.Array]]) -> Changes:
        return self._gather(_alone(kicks), _alone(variables))

    # Sweeps, on blocks of states [probe, trial, time, unit]

    def _push_forward_apart(self, data: Data, theta: jax.Array) -> jax.Array:
        """J_b theta_b for parameter changes [probe, trial, p]."""
        changes = jax.vmap(self._changes, 1)(theta)
        return self._forward(data, changes, len(theta), self._kick_apart)

    def _pull_back_apart(self, data: Data, q: jax.Array) -> jax.Array:
        """The transpose: each trial's own gradient [probe, trial, p]."""
        still = [jnp.zeros((self.trials, *change.shape), q.dtype) for change in self._no_changes(len(q))]
        changes = self._backward(data, q, self._gather_apart, still)
        return jax.vmap(lambda changes: self._gradient(changes, len(q)), out_axes=1)(changes)

    def _descend(self, data: Data, q: jax.Array) -> jax.Array:
        """J J^T; where no two sites share a weight, what gathers at the sites is what kicks them."""
        changes = self._backward(data, q)
        return self._forward(data, changes if self.plain else self._changes(self._gradient(changes, len(q))), len(q))

    def _forward(self, data: Data, changes: Changes, probes: int, kick: Callable | None = None) -> jax.Array:
        """s_t = A_t s_{t-1} + B_t V_t dW^T, where the products with V are formed for a span of times at once."""
        (moving, variables), fixed = data
        kick = kick or self._kick

        def span(s: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
            times, variables = row
            return lax.scan(step, s, (times, kick(changes, variables)))

        def step(s: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
            time, kicks = row
            s = self.step((_at(time, moving), fixed), s, kicks)
            return s, s

        states = lax.scan(span, self._still(probes), (self._span_times(), variables))[1]
        return _block(self._unpadded(states))

    def _backward(
        self, data: Data, q: jax.Array, gather: Callable | None = None, still: Changes | None = None
    ) -> Changes:
        """The transpose, backward in time; the kicks of a span gather at once."""
        (moving, variables), fixed = data
        gather, still = gather or self._gather, still or self._no_changes(len(q))
        q = self._padded(_rows(q))

        def span(carry: tuple, row: tuple) -> tuple[tuple, None]:
            (later, changes), (times, variables) = carry, row
            later, kicks = lax.scan(step, later, times, reverse=True)
            return (later, jax.tree.map(jnp.add, changes, gather(kicks, variables))), None

        def step(later: jax.Array, time: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            return self.step.transpose((_at(time, moving), fixed), later + _at(time, q))

        start = self._still(q.shape[2]), still
        return lax.scan(span, start, (self._span_times(), variables), reverse=True)[0][1]

    def _propagate(self, data: Data, q: jax.Array) -> jax.Array:
        """s_t = A_t s_{t-1} + q_t."""
        (moving, _), fixed = data

        def step(s: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
            moving, q = row
            s = self.step((moving, fixed), s, self._no_kicks(s)) + q
            return s, s

        return _block(lax.scan(step, self._still(len(q)), (moving, _rows(q)))[1])

    def _propagate_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        """l_t = A_{t+1}^T l_{t+1} + q_t."""
        (moving, _), fixed = data

        def step(later: jax.Array, row: tuple) -> tuple[jax.Array, jax.Array]:
            moving, q = row
            here = later + q
            return self.step.transpose((moving, fixed), here)[0], here

        return _block(lax.scan(step, self._still(len(q)), (moving, _rows(q)), reverse=True)[1])

    def _still(self, probes: int) -> jax.Array:
        return jnp.zeros((self.trials, probes, self.units), self.like.dtype)

    def _no_kicks(self, s: jax.Array) -> list[jax.Array]:
        return [jnp.zeros((*s.shape[:-1], site.kicks.size), s.dtype) for _, site in self.sites]

    # All times at once

    def _write(self, data: Data, theta: jax.Array) -> jax.Array:
        """V dW^T of every site, side by side [probe, trial, time, site]."""
        (_, variables), _ = data
        return _block(jnp.concatenate(self._kick(self._changes(theta), self._unpadded(variables)), -1))

    def _read(self, data: Data, values: jax.Array) -> jax.Array:
        (_, variables), _ = data
        return self._gradient(self._gather(self._split(_rows(values)), self._unpadded(variables)), len(values))

    def _enter(self, data: Data, values: jax.Array) -> jax.Array:
        """B: site values -> state, each step on its own."""
        still = jnp.zeros((self.times, *self._still(len(values)).shape), values.dtype)
        return _block(self._each_step(data, still, self._split(_rows(values))))

    def _enter_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        return _block(jnp.concatenate(self._each_step_transposed(data, _rows(q))[1], -1))

    def _unpropagate(self, data: Data, s: jax.Array) -> jax.Array:
        """P^{-1}: s_t - A_t s_{t-1}."""
        rows = _rows(s)
        previous = jnp.concatenate([jnp.zeros_like(rows[:1]), rows[:-1]])
        return _block(rows - self._each_step(data, previous, self._no_kicks(rows)))

    def _unpropagate_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        rows = _rows(q)
        back, _ = self._each_step_transposed(data, rows)
        return _block(rows - jnp.concatenate([back[1:], jnp.zeros_like(back[:1])]))

    def _each_step(self, data: Data, z: jax.Array, kicks: list[jax.Array]) -> jax.Array:
        (moving, _), fixed = data
        step = jax.vmap(lambda moving, z, kicks: self.step((moving, fixed), z, kicks))
        return step(moving, z, kicks)

    def _each_step_transposed(self, data: Data, q: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        (moving, _), fixed = data
        return jax.vmap(lambda moving, q: self.step.transpose((moving, fixed), q))(moving, q)

    def _split(self, values: jax.Array) -> list[jax.Array]:
        """Site by site."""
        ends = np.cumsum([site.kicks.size for _, site in self.sites])[:-1]
        return jnp.split(values, ends, axis=-1)


def _alone(rows: Any) -> Any:
    """Arrays [time, ...] of one trial as those of several [time, trial, ...]."""
    return jax.tree.map(lambda a: a[:, None], rows)


def _at(time: jax.Array, rows: Any) -> Any:
    """One row of arrays [time, ...]; of what lies behind the end, some row."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, time, keepdims=False), rows)


def _rows(block: jax.Array) -> jax.Array:
    """[probe, trial, time, ...] -> [time, trial, probe, ...]."""
    return block.swapaxes(0, 2)


_block = _rows


def _on_blocks(function: Map, data: Data, together: int) -> Callable[[jax.Array], jax.Array]:
    """The function on blocks of any length, `together` at once; compiled for each length up to that."""
    compiled = jax.jit(function)

    def apply(block: jax.Array) -> jax.Array:
        found = [compiled(data, block[i : i + together]) for i in range(0, len(block), together)]
        return found[0] if len(found) == 1 else jnp.concatenate(found)

    return apply
