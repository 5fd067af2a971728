"""The linearised recurrence of a JAX step and its sweeps: P, P*, J, J* as compiled scans.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    s_t = A_t s_{t-1} + B_t a_t + q_t,    a_t = V_t dW^T

run forward, and transposed backward, where dW gathers as the sweep goes.
"""

from collections.abc import Callable
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
from jax import lax

from kpflow_dyn._arrays.memory import on_device
from kpflow_dyn._arrays.sharding import shards
from kpflow_dyn._jax.linearised import Data
from kpflow_dyn._jax.sweeps import Probes, Sweeps, residuals_at
from kpflow_dyn.tracing._steps import AnalysedStep

Map = Callable[[Data, jax.Array], jax.Array]

SPAN_ROWS = 640  # whose products with the variables are formed at once
ROWS_TOGETHER = 160  # rows trial x probe of a step that keep a CPU's products in its second-level cache
DEVICE_ROWS_TOGETHER = 2**14  # the same on a device that likes large products


class Tangent(Sweeps):
    """The linear recurrence of the steps, as compiled operators on blocks [probe, ...]."""

    def __init__(self, step: AnalysedStep, x: jax.Array, z_prev: jax.Array) -> None:
        super().__init__(step, x, z_prev)
        here = self.trials // shards(z_prev, 0)  # trials on one device
        self.span = -(-self.times // -(-self.times * here // SPAN_ROWS))
        rows_together = DEVICE_ROWS_TOGETHER if on_device(self.like) else ROWS_TOGETHER
        self.probes_together = max(1, rows_together // here)
        self._make_maps()

    def truncated(self, bases: list[jax.Array | None]) -> Self:
        cut = super().truncated(bases)
        cut._make_maps()
        return cut

    def fed_back(self, draw: Callable[[str, jax.Array], jax.Array]) -> Self:
        turned = super().fed_back(draw)
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
        self.step_jvp = partial(jax.jit(self._step_jvp), self.data)
        self.step_vjp = partial(jax.jit(self._step_vjp), self.data)
        block = partial(_on_blocks, data=self.data, together=self.probes_together)
        self.kick = block(lambda data, theta: self._enter(data, self._write(data, theta)))
        self.kick_adjoint = block(lambda data, q: self._read(data, self._enter_adjoint(data, q)))
        self.write = block(self._write)
        self.read = block(self._read)
        self.enter = block(self._enter)
        self.enter_adjoint = block(self._enter_adjoint)
        self.advance = block(self._advance)
        self.advance_adjoint = block(self._advance_adjoint)

    def _propagate(self, data: Data, q: jax.Array) -> jax.Array:
        """s_t = A_t s_{t-1} + q_t."""

        def sweep(states: jax.Array, probes: Probes) -> jax.Array:
            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                s, states = carry
                s = self.step(residuals_at(data, time), s, self._no_kicks(s)) + probes.read(q, time)
                return (s, probes.written(states, time, s)), None

            return lax.scan(step, (self._still(probes.count), states), jnp.arange(self.times))[0][1]

        return self._by_probes(sweep, jnp.zeros_like(q))

    def _propagate_adjoint(self, data: Data, q: jax.Array) -> jax.Array:
        """l_t = A_{t+1}^T l_{t+1} + q_t."""

        def sweep(costates: jax.Array, probes: Probes) -> jax.Array:
            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                later, costates = carry
                here = later + probes.read(q, time)
                later, _ = self.step.transpose(residuals_at(data, time), here)
                return (later, probes.written(costates, time, here)), None

            return lax.scan(step, (self._still(probes.count), costates), jnp.arange(self.times), reverse=True)[0][1]

        return self._by_probes(sweep, jnp.zeros_like(q))

    def _factorise(self, data: Data, start: jax.Array, interval: int) -> jax.Array:
        """R [block, trial, k, k] of A_t ... A_{t-interval+1} Q = Q' R, block after block, the last maybe shorter.

        The first Q is `start` [k, trial, unit].
        """

        def step(s: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
            return self.step(residuals_at(data, time), s, self._no_kicks(s)), None

        def block(s: jax.Array, times: jax.Array) -> tuple[jax.Array, jax.Array]:
            Q, R = jnp.linalg.qr(lax.scan(step, s, times)[0].swapaxes(1, 2))  # of [trial, unit, k]
            return Q.swapaxes(1, 2), R  # [trial, k, unit], [trial, k, k]

        whole, rest = divmod(self.times, interval)
        times = jnp.arange(self.times)
        # from [trial, k, unit] on
        s, found = lax.scan(block, start.swapaxes(0, 1), times[: self.times - rest].reshape(whole, interval))
        return jnp.concatenate([found, block(s, times[-rest:])[1][None]]) if rest else found

    def _jvp(self, data: Data, theta: jax.Array) -> jax.Array:
        """J."""

        def sweep(states: jax.Array, probes: Probes) -> jax.Array:
            return self._forward(data, self._changes(probes.of(theta)), states, probes)

        return self._by_probes(sweep, self._no_states(len(theta)))

    def _vjp(self, data: Data, q: jax.Array) -> jax.Array:
        """J^T."""

        def sweep(gradients: jax.Array, probes: Probes) -> jax.Array:
            found = self._gradient(self._backward(data, q, probes), probes.count)
            return lax.dynamic_update_slice_in_dim(gradients, found, probes.first, 0)

        return self._by_probes(sweep, jnp.zeros((len(q), self.parameter_size), q.dtype))

    def _jvp_apart(self, data: Data, theta: jax.Array) -> jax.Array:
        """J_b theta_b for parameter changes [probe, trial, p]."""

        def sweep(states: jax.Array, probes: Probes) -> jax.Array:
            changes = jax.vmap(self._changes, 1)(probes.of(theta))
            return self._forward(data, changes, states, probes, self._kick_apart)

        return self._by_probes(sweep, self._no_states(len(theta)))

    def _vjp_apart(self, data: Data, q: jax.Array) -> jax.Array:
        """The transpose: each trial's own gradient [probe, trial, p]."""

        def sweep(gradients: jax.Array, probes: Probes) -> jax.Array:
            still = [jnp.zeros((self.trials, *change.shape), q.dtype) for change in self._no_changes(probes.count)]
            changes = self._backward(data, q, probes, self._gather_apart, still)
            found = jax.vmap(lambda changes: self._gradient(changes, probes.count), out_axes=1)(changes)
            return lax.dynamic_update_slice_in_dim(gradients, found, probes.first, 0)

        return self._by_probes(sweep, jnp.zeros((len(q), self.trials, self.parameter_size), q.dtype))

    def _gram(self, data: Data, q: jax.Array) -> jax.Array:
        """J J^T; where no two sites share a weight, what gathers at the sites is what kicks them."""

        def sweep(states: jax.Array, probes: Probes) -> jax.Array:
            changes = self._backward(data, q, probes)
            if not self.plain:
                changes = self._changes(self._gradient(changes, probes.count))
            return self._forward(data, changes, states, probes)

        return self._by_probes(sweep, jnp.zeros_like(q))


def _on_blocks(function: Map, data: Data, together: int) -> Callable[[jax.Array], jax.Array]:
    """The function on blocks of any length, `together` at once; compiled for each length up to that."""
    compiled = jax.jit(function)

    def apply(block: jax.Array) -> jax.Array:
        found = [compiled(data, block[i : i + together]) for i in range(0, len(block), together)]
        return found[0] if len(found) == 1 else jnp.concatenate(found)

    return apply
