"""The linearised recurrence of a JAX step and its sweeps: P, P*, J, J* as compiled scans.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    s_t = A_t s_{t-1} + B_t a_t + q_t,    a_t = V_t dW^T

run forward, and transposed backward, where dW gathers as the sweep goes. Inside of a sweep arrays are [time, trial,
probe, ...], so that the rows of some probes make one product; states [probe, trial, time, unit] are read and written in
place, one time after another, since copies of a block would cost as much as the glue of all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpflow_dyn._arrays.memory import on_device
from kpflow_dyn._arrays.sharding import shards
from kpflow_dyn._jax.checks import check_finite
from kpflow_dyn._jax.rows import JAX, each_row
from kpflow_dyn._jax.sites import SiteData
from kpflow_dyn._jax.step import Residuals, StepTangent
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._steps import AnalysedStep

Data = tuple  # what a sweep needs to know of the rows: the step's residuals and each site's variables
Changes = list[jax.Array]  # of the weights, site by site
Map = Callable[[Data, jax.Array], jax.Array]
Sweep = Callable[[jax.Array, "_Probes"], jax.Array]
Span = Callable[[tuple, jax.Array], tuple]

SPAN_ROWS = 640  # whose products with the variables are formed at once
ROWS_TOGETHER = 160  # rows trial x probe of a step that keep a CPU's products in its second-level cache
DEVICE_ROWS_TOGETHER = 2**14  # the same on a device that likes large products


class Tangent:
    """The linear recurrence of one step along the states z_prev -> z under inputs x.

    Args:
        step: the analysed step.
        x: inputs [trial, time, input].
        z_prev: the states that the step started from [trial, time, unit].
    """

    def __init__(self, step: AnalysedStep, x: jax.Array, z_prev: jax.Array) -> None:
        rows = RowFunctions(step, JAX)
        self.trials, self.times, self.units = z_prev.shape
        self.like = z_prev.reshape(-1)[:0]
        here = self.trials // shards(z_prev, 0)  # trials on one device
        self.span = -(-self.times // -(-self.times * here // SPAN_ROWS))
        rows_together = DEVICE_ROWS_TOGETHER if on_device(self.like) else ROWS_TOGETHER
        self.probes_together = max(1, rows_together // here)
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
        self._make_maps()

    def _evaluate(self, rows: RowFunctions, x: jax.Array, z: jax.Array) -> tuple[jax.Array, Data]:
        """The next states, and what sweeps need to know of the rows.

        Each row is compared with forward mode through the whole step, in one random direction.
        """
        generator = np.random.default_rng(0)
        dz, dtheta = (jnp.asarray(generator.standard_normal(n), z.dtype) for n in (z.shape, self.parameter_size))

        @jax.jit
        def evaluated(*states: jax.Array) -> tuple[jax.Array, Data, jax.Array, jax.Array]:
            x, z, dz = (a.swapaxes(0, 1) for a in states)
            next_state, (moving, fixed) = self.step.along(x, z)
            variables = [rows.variables(site, x, z) for site in rows.step.sites]
            data = (moving, variables), fixed
            (expected,) = each_row(rows.tangent(dtheta), x, z, dz)
            kicks = jnp.concatenate(self._kick(self._changes(dtheta[None]), variables), -1)
            found = self._each_step(data, dz[:, :, None], self._as_kicks(kicks))[:, :, 0]
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

    def truncated(self, bases: list[jax.Array | None]) -> Tangent:
        """The same with each site's variables cut to V Q Q^T, for orthonormal columns Q [d, r]; None for all of V."""
        cut = copy(self)
        cut.sites = [
            (name, site if basis is None else site.truncated(basis))
            for (name, site), basis in zip(self.sites, bases, strict=True)
        ]
        (moving, _), fixed = self.data
        cut.data = (moving, [site.data for _, site in cut.sites]), fixed
        cut._make_maps()
        return cut

    def fed_back(self, draw: Callable[[str, jax.Array], jax.Array]) -> Tangent:
        """The same gates, but what moves is multiplied by draw(name, W) in the place of each matrix W.

        The weights are what the step's tangent knows of all rows alike.
        """
        step, turned = StepTangent(self.rows.with_matrices(draw), self.rows.step.sites, *self.one), copy(self)
        known, _ = self.data
        turned.data = known, step.fixed_at(*self.one)
        turned._make_maps()
        return turned

    def _make_maps(self) -> None:
        """The compiled operators on blocks [probe, ...]."""
        self.propagate = partial(jax.jit(self._propagate), self.data)
        self.propagate_adjoint = partial(jax.jit(self._propagate_adjoint), self.data)
        self.factorise = partial(jax.jit(self._factorise, static_argnums=2), self.data)
        self.jvp = partial(jax.jit(self._jvp), self.data)
        self.vjp = partial(jax.jit(self._vjp), self.data)
        self.jvp_apart = partial(jax.jit(self._jvp_apart), self.data)
        self.vjp_apart = partial(jax.jit(self._vjp_apart), self.data)
        self.gram = partial(jax.jit(self._gram), self.data)
        block = partial(_on_blocks, data=self.data, together=self.probes_together)
        self.kick = block(lambda data, theta: self._enter(data, self._write(data, theta)))
        self.kick_adjoint = block(lambda data, q: self._read(data, self._enter_adjoint(data, q)))
        self.write = block(self._write)
        self.read = block(self._read)
        self.enter = block(self._enter)
        self.enter_adjoint = block(self._enter_adjoint)
        self.advance = block(self._advance)
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

    # Sweeps of states [probe, trial, time, unit], some probes at once

    def _propagate(self, data: Data, q: jax.Array) -> jax.Array:
        """s_t = A_t s_{t-1} + q_t."""

        def sweep(states: jax.Array, probes: _Probes) -> jax.Array:
            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                s, states = carry
                s = self.step(_residuals(data, time), s, self._no_kicks(s)) + probes.read(q, time)
                return (s, probes.written(states, time, s)), None

            return lax.scan(step, (self._still(probes.count), states), jnp.arange(self.times))[0][1]

        return self._by_probes(sweep, jnp.zeros_like(q))

    def _propagate_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        """l_t = A_{t+1}^T l_{t+1} + q_t."""

        def sweep(costates: jax.Array, probes: _Probes) -> jax.Array:
            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                later, costates = carry
                here = later + probes.read(q, time)
                later, _ = self.step.transpose(_residuals(data, time), here)
                return (later, probes.written(costates, time, here)), None

            return lax.scan(step, (self._still(probes.count), costates), jnp.arange(self.times), reverse=True)[0][1]

        return self._by_probes(sweep, jnp.zeros_like(q))

    def _factorise(self, data: Data, start: jax.Array, interval: int) -> jax.Array:
        """R [block, trial, k, k] of A_t ... A_{t-interval+1} Q = Q' R, block after block, the last maybe shorter.

        The first Q is `start` [k, trial, unit].
        """

        def step(s: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
            return self.step(_residuals(data, time), s, self._no_kicks(s)), None

        def block(s: jax.Array, times: jax.Array) -> tuple[jax.Array, jax.Array]:
            Q, R = jnp.linalg.qr(lax.scan(step, s, times)[0].swapaxes(1, 2))
            return Q.swapaxes(1, 2), R

        whole, rest = divmod(self.times, interval)
        times = jnp.arange(self.times)
        s, found = lax.scan(block, start.swapaxes(0, 1), times[: self.times - rest].reshape(whole, interval))
        return jnp.concatenate([found, block(s, times[-rest:])[1][None]]) if rest else found

    def _jvp(self, data: Data, theta: jax.Array) -> jax.Array:
        """J."""

        def sweep(states: jax.Array, probes: _Probes) -> jax.Array:
            return self._forward(data, self._changes(probes.of(theta)), states, probes)

        return self._by_probes(sweep, self._no_states(len(theta)))

    def _vjp(self, data: Data, q: jax.Array) -> jax.Array:
        """J^T."""

        def sweep(gradients: jax.Array, probes: _Probes) -> jax.Array:
            found = self._gradient(self._backward(data, q, probes), probes.count)
            return lax.dynamic_update_slice_in_dim(gradients, found, probes.first, 0)

        return self._by_probes(sweep, jnp.zeros((len(q), self.parameter_size), q.dtype))

    def _jvp_apart(self, data: Data, theta: jax.Array) -> jax.Array:
        """J_b theta_b for parameter changes [probe, trial, p]."""

        def sweep(states: jax.Array, probes: _Probes) -> jax.Array:
            changes = jax.vmap(self._changes, 1)(probes.of(theta))
            return self._forward(data, changes, states, probes, self._kick_apart)

        return self._by_probes(sweep, self._no_states(len(theta)))

    def _vjp_apart(self, data: Data, q: jax.Array) -> jax.Array:
        """The transpose: each trial's own gradient [probe, trial, p]."""

        def sweep(gradients: jax.Array, probes: _Probes) -> jax.Array:
            still = [jnp.zeros((self.trials, *change.shape), q.dtype) for change in self._no_changes(probes.count)]
            changes = self._backward(data, q, probes, self._gather_apart, still)
            found = jax.vmap(lambda changes: self._gradient(changes, probes.count), out_axes=1)(changes)
            return lax.dynamic_update_slice_in_dim(gradients, found, probes.first, 0)

        return self._by_probes(sweep, jnp.zeros((len(q), self.trials, self.parameter_size), q.dtype))

    def _gram(self, data: Data, q: jax.Array) -> jax.Array:
        """J J^T; where no two sites share a weight, what gathers at the sites is what kicks them."""

        def sweep(states: jax.Array, probes: _Probes) -> jax.Array:
            changes = self._backward(data, q, probes)
            if not self.plain:
                changes = self._changes(self._gradient(changes, probes.count))
            return self._forward(data, changes, states, probes)

        return self._by_probes(sweep, jnp.zeros_like(q))

    def _forward(
        self, data: Data, changes: Changes, states: jax.Array, probes: _Probes, kick: Callable | None = None
    ) -> jax.Array:
        """s_t = A_t s_{t-1} + B_t V_t dW^T, where the products with V are formed for a span of times at once."""
        (_, variables), _ = data
        kick = kick or self._kick

        def span(carry: tuple, times: jax.Array) -> tuple:
            kicks = kick(changes, _during(times, variables))

            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                s, states = carry
                s = self.step(_residuals(data, time), s, self.step.kicks_at(time - times[0], kicks))
                return (s, probes.written(states, time, s)), None

            return lax.scan(step, carry, times)[0]

        return self._by_spans(span, (self._still(probes.count), states))[1]

    def _backward(
        self,
        data: Data,
        q: jax.Array,
        probes: _Probes,
        gather: Callable | None = None,
        still: Changes | None = None,
    ) -> Changes:
        """The transpose, backward in time; the kicks of a span gather at once."""
        (_, variables), _ = data
        gather, still = gather or self._gather, still or self._no_changes(probes.count)

        def span(carry: tuple, times: jax.Array) -> tuple:
            later, changes = carry

            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                later, kicks = carry
                later, found = self.step.transpose(_residuals(data, time), later + probes.read(q, time))
                return (later, self.step.kicks_with(found, time - times[0], kicks)), None

            kicks = [jnp.zeros((len(times), *later.shape[:2], site.kicks.size), q.dtype) for _, site in self.sites]
            (later, kicks), _ = lax.scan(step, (later, kicks), times, reverse=True)
            return later, jax.tree.map(jnp.add, changes, gather(kicks, _during(times, variables)))

        return self._by_spans(span, (self._still(probes.count), still), reverse=True)[1]

    def _by_probes(self, sweep: Sweep, out: jax.Array) -> jax.Array:
        """What the sweeps of some probes at a time write into `out`."""
        together = self.probes_together
        whole, rest = divmod(len(out), together)
        if whole:
            out = lax.fori_loop(0, whole, lambda i, out: sweep(out, _Probes(i * together, together)), out)
        return sweep(out, _Probes(whole * together, rest)) if rest else out

    def _by_spans(self, span: Span, carry: tuple, reverse: bool = False) -> tuple:
        """What spans of times carry from one to the next; the last one may be shorter."""
        whole, rest = divmod(self.times, self.span)

        def spans(carry: tuple) -> tuple:
            times = jnp.arange(self.times - rest).reshape(whole, self.span)
            return lax.scan(lambda carry, times: (span(carry, times), None), carry, times, reverse=reverse)[0]

        def last(carry: tuple) -> tuple:
            return span(carry, jnp.arange(self.times - rest, self.times)) if rest else carry

        return spans(last(carry)) if reverse else last(spans(carry))

    def _still(self, probes: int) -> jax.Array:
        return jnp.zeros((self.trials, probes, self.units), self.like.dtype)

    def _no_states(self, probes: int) -> jax.Array:
        return jnp.zeros((probes, self.trials, self.times, self.units), self.like.dtype)

    def _no_kicks(self, s: jax.Array) -> list[jax.Array]:
        return [jnp.zeros((*s.shape[:-1], size), s.dtype) for size in self.step.kick_sizes]

    # All times at once

    def _write(self, data: Data, theta: jax.Array) -> jax.Array:
        """V dW^T of every site, side by side [probe, trial, time, site]."""
        (_, variables), _ = data
        return _block(jnp.concatenate(self._kick(self._changes(theta), variables), -1))

    def _read(self, data: Data, values: jax.Array) -> jax.Array:
        (_, variables), _ = data
        return self._gradient(self._gather(self._by_site(_rows(values)), variables), len(values))

    def _enter(self, data: Data, values: jax.Array) -> jax.Array:
        """B: site values -> state, each step on its own."""
        still = jnp.zeros((self.times, *self._still(len(values)).shape), values.dtype)
        return _block(self._each_step(data, still, self._as_kicks(_rows(values))))

    def _enter_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        return _block(jnp.concatenate(self._each_step_transposed(data, _rows(q))[1], -1))

    def _unpropagate(self, data: Data, s: jax.Array) -> jax.Array:
        """P^{-1}: s_t - A_t s_{t-1}."""
        previous = jnp.concatenate([jnp.zeros_like(s[:, :, :1]), s[:, :, :-1]], 2)
        return s - self._advance(data, previous)

    def _advance(self, data: Data, dz: jax.Array) -> jax.Array:
        """A_t dz_t, each step on its own."""
        rows = _rows(dz)
        return _block(self._each_step(data, rows, self._no_kicks(rows)))

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

    def _by_site(self, values: jax.Array) -> list[jax.Array]:
        """Site values, side by side -> each site's."""
        return jnp.split(values, np.cumsum([site.kicks.size for _, site in self.sites])[:-1], axis=-1)

    def _as_kicks(self, values: jax.Array) -> list[jax.Array]:
        """Site values, side by side -> the kicks of a step."""
        return jnp.split(values, np.cumsum(self.step.kick_sizes)[:-1], axis=-1)


@dataclass(frozen=True)
class _Probes:
    """Those of a block that ride in one sweep, and their states at one time."""

    first: int | jax.Array
    count: int

    def of(self, block: jax.Array) -> jax.Array:
        """Those rows of a block [probe, ...]."""
        return lax.dynamic_slice_in_dim(block, self.first, self.count)

    def read(self, block: jax.Array, time: jax.Array) -> jax.Array:
        """Of states [probe, trial, time, unit], these [trial, probe, unit]."""
        _, trials, _, units = block.shape
        found = lax.dynamic_slice(block, (self.first, 0, time, 0), (self.count, trials, 1, units))
        return found[:, :, 0].swapaxes(0, 1)

    def written(self, block: jax.Array, time: jax.Array, s: jax.Array) -> jax.Array:
        """States [probe, trial, time, unit] with these [trial, probe, unit] in their place."""
        return lax.dynamic_update_slice(block, s.swapaxes(0, 1)[:, :, None], (self.first, 0, time, 0))


def _residuals(data: Data, time: jax.Array) -> Residuals:
    """What the step needs to know at one time."""
    (moving, _), fixed = data
    return [lax.dynamic_index_in_dim(rows, time, keepdims=False) for rows in moving], fixed


def _alone(rows: Any) -> Any:
    """Arrays [time, ...] of one trial as those of several [time, trial, ...]."""
    return jax.tree.map(lambda a: a[:, None], rows)


def _during(times: jax.Array, rows: Any) -> Any:
    """Of rows [time, ...], those of consecutive times."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, times[0], len(times)), rows)


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
