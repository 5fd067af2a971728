"""Sweeps of a linearised recurrence in JAX: forward and backward over spans of times, some probes at once.

States [probe, trial, time, unit] are read and written in place, one time after another, since copies of a block would
cost as much as the glue of all steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kpflow_dyn._jax.linearised import Changes, Data, LinearisedSteps
from kpflow_dyn._jax.step import Residuals

Span = Callable[[tuple, jax.Array], tuple]
Sweep = Callable[[Any, "Probes"], Any]  # of what is written into: one block, or several


class Sweeps(LinearisedSteps):
    """What all operators of a recurrence are made of."""

    span: int  # times whose products with the variables are formed at once
    probes_together: int  # how many probes ride in one sweep

    def _forward(
        self,
        data: Data,
        changes: Changes,
        states: jax.Array,
        probes: Probes,
        kick: Callable | None = None,
        start: jax.Array | None = None,
    ) -> jax.Array:
        """s_t = A_t s_{t-1} + B_t V_t dW^T, where the products with V are formed for a span of times at once.

        From s_0 [trial, probe, unit], zeros when None.
        """
        kick, start = kick or self._kicks_of, self._still(probes.count) if start is None else start

        def span(carry: tuple, times: jax.Array) -> tuple:
            kicks = kick(changes, _during(times, data.variables))

            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                s, states = carry
                s = self.step(residuals_at(data, time), s, self.step.kicks_at(time - times[0], kicks))
                return (s, probes.written(states, time, s)), None

            return lax.scan(step, carry, times)[0]

        return self._by_spans(span, (start, states))[1]

    def _backward(
        self, data: Data, q: jax.Array, probes: Probes, gather: Callable | None = None, still: Changes | None = None
    ) -> tuple[jax.Array, Changes]:
        """The transpose, backward in time; the kicks of a span gather at once. With A_1^T l_1 [trial, probe, unit]."""
        gather, still = gather or self._gather, still or self._no_changes(probes.count)

        def span(carry: tuple, times: jax.Array) -> tuple:
            later, changes = carry

            def step(carry: tuple, time: jax.Array) -> tuple[tuple, None]:
                later, kicks = carry
                later, found = self.step.transpose(residuals_at(data, time), later + probes.read(q, time))
                return (later, self.step.kicks_with(found, time - times[0], kicks)), None

            kicks = [site.no_kicks(len(times), self.trials, probes.count, q.dtype) for site in self.sites]
            (later, kicks), _ = lax.scan(step, (later, kicks), times, reverse=True)
            return later, jax.tree.map(jnp.add, changes, gather(kicks, _during(times, data.variables)))

        return self._by_spans(span, (self._still(probes.count), still), reverse=True)

    def _by_probes(self, sweep: Sweep, out: Any, probes: int | None = None) -> Any:
        """What the sweeps of some probes at a time write into `out`; each writes what it would write again."""
        count = len(out) if probes is None else probes
        rounds = -(-count // self.probes_together)
        if rounds <= 1:
            return sweep(out, Probes(0, count))
        together = -(-count // rounds)

        def some(n: jax.Array, out: Any) -> Any:  # the last ones perhaps with some once more, as one program does all
            return sweep(out, Probes(jnp.minimum(n * together, count - together), together))

        return lax.fori_loop(0, rounds, some, out)

    def _by_spans(self, span: Span, carry: tuple, reverse: bool = False) -> tuple:
        """What spans of times carry from one to the next; the last one may be shorter."""
        whole, rest = divmod(self.times, self.span)

        def spans(carry: tuple) -> tuple:
            times = jnp.arange(self.times - rest).reshape(whole, self.span)  # [span, time]
            return lax.scan(lambda carry, times: (span(carry, times), None), carry, times, reverse=reverse)[0]

        def last(carry: tuple) -> tuple:
            return span(carry, jnp.arange(self.times - rest, self.times)) if rest else carry

        return spans(last(carry)) if reverse else last(spans(carry))

    def _no_states(self, probes: int) -> jax.Array:
        return jnp.zeros((probes, self.trials, self.times, self.units), self.dtype)

    def _no_starts(self, probes: int) -> jax.Array:
        return jnp.zeros((probes, self.trials, self.units), self.dtype)

    # Changes of each trial's own, [trial, ...] in front of those that all trials share

    def _kick_apart(self, changes: Changes, variables: list[list[jax.Array]]) -> list[jax.Array]:
        return jax.vmap(self._kick_one, (0, 1), 1, axis_size=self.trials)(changes, variables)

    def _gather_apart(self, kicks: list[jax.Array], variables: list[list[jax.Array]]) -> Changes:
        return jax.vmap(self._gather_one, (1, 1), 0, axis_size=self.trials)(kicks, variables)

    def _kick_one(self, changes: Changes, variables: list[list[jax.Array]]) -> list[jax.Array]:
        return [kick[:, 0] for kick in self._kicks_of(changes, _alone(variables))]

    def _gather_one(self, kicks: list[jax.Array], variables: list[list[jax.Array]]) -> Changes:
        return self._gather(_alone(kicks), _alone(variables))


@dataclass(frozen=True)
class Probes:
    """Those of a block that ride in one sweep, and their states at one time."""

    first: int | jax.Array
    count: int

    def of(self, block: jax.Array) -> jax.Array:
        """Those rows of a block [probe, ...]."""
        return lax.dynamic_slice_in_dim(block, self.first, self.count)

    def put(self, block: jax.Array, rows: jax.Array) -> jax.Array:
        """The block with these rows in their place."""
        return lax.dynamic_update_slice_in_dim(block, rows, self.first, 0)

    def read(self, block: jax.Array, time: jax.Array) -> jax.Array:
        """Of states [probe, trial, time, unit], these [trial, probe, unit]."""
        _, trials, _, units = block.shape
        # [probe, trial, 1, unit]
        found = lax.dynamic_slice(block, (self.first, 0, time, 0), (self.count, trials, 1, units))
        return found[:, :, 0].swapaxes(0, 1)  # [trial, probe, unit]

    def written(self, block: jax.Array, time: jax.Array, s: jax.Array) -> jax.Array:
        """States [probe, trial, time, unit] with these [trial, probe, unit] in their place."""
        # [probe, trial, 1, unit]
        return lax.dynamic_update_slice(block, s.swapaxes(0, 1)[:, :, None], (self.first, 0, time, 0))


def residuals_at(data: Data, time: jax.Array) -> Residuals:
    """What the step needs to know at one time."""
    return [lax.dynamic_index_in_dim(rows, time, keepdims=False) for rows in data.moving], data.everywhere


def _alone(rows: Any) -> Any:
    """Arrays [time, ...] of one trial as those of several [time, trial, ...]."""
    return jax.tree.map(lambda a: a[:, None], rows)


def _during(times: jax.Array, rows: Any) -> Any:
    """Of rows [time, ...], those of consecutive times."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, times[0], len(times)), rows)
