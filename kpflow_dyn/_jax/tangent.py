"""The linearised recurrence of a JAX step and its sweeps: P, P*, J, J* as compiled scans.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    s_t = A_t s_{t-1} + B_t a_t + q_t,    a_t = V_t dW^T

run forward, and transposed backward, where dW gathers as the sweep goes.
"""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax

from kpflow_dyn._arrays.memory import on_device
from kpflow_dyn._arrays.sharding import shards
from kpflow_dyn._arrays.sooner_jax import jit, soon, sooner
from kpflow_dyn._jax.linearised import Data
from kpflow_dyn._jax.sites import inputs_of
from kpflow_dyn._jax.step import Fixed
from kpflow_dyn._jax.sweeps import Probes, Sweeps, residuals_at
from kpflow_dyn.tracing._graph import Node
from kpflow_dyn.tracing._sites import Site
from kpflow_dyn.tracing._steps import AnalysedStep

Map = Callable[..., Any]

SPAN_ROWS = 640  # whose products with the variables are formed at once
ROWS_TOGETHER = 160  # rows trial x probe of a step that keep a CPU's products in its second-level cache
DEVICE_ROWS_TOGETHER = 2**14  # the same on a device that likes large products

WHOLE = ("propagate", "propagate_adjoint", "factorise", "jvp", "vjp", "jvp_from", "vjp_from")
WHOLE += ("jvp_apart", "vjp_apart", "gram")
ONCE = ("step_jvp", "step_vjp")  # which a linearisation is compared by
PARTS = ("kick", "kick_adjoint", "write", "read", "enter", "enter_adjoint", "advance", "advance_adjoint")


class Cut(NamedTuple):
    """How sweeps are cut: times whose products with the variables are formed at once, and probes that ride together."""

    span: int
    probes: int

    @classmethod
    def of(cls, z: jax.Array) -> Self:
        """That of states [trial, time, unit]."""
        trials, times, _ = z.shape
        here = trials // shards(z, 0)  # trials on one device
        together = DEVICE_ROWS_TOGETHER if on_device(z) else ROWS_TOGETHER
        return cls(-(-times // -(-times * here // SPAN_ROWS)), max(1, together // here))


class Programs(Sweeps):
    """The compiled operators of a linear recurrence, as functions of its data and of blocks [probe, ...]."""

    def __init__(self, step: AnalysedStep, given: dict[Node, Any], x: Any, z: Any, cut: Cut) -> None:
        super().__init__(step, given, x, z)
        self.span, self.probes_together = cut
        self.evaluate = jax.jit(self._evaluate, compiler_options=sooner())
        self.everywhere = jax.jit(self._everywhere, compiler_options=sooner())
        self._drawn = [step.graph.parameters.get(node, "") if len(node.shape) > 1 else "" for node in given]
        often = soon(z.size)
        for name in WHOLE:
            setattr(self, name, self._compiled(name, often))
        for name in ONCE:
            setattr(self, name, self._compiled(name, sooner()))
        for name in PARTS:
            setattr(self, name, partial(_on_blocks, self._compiled(name, often), self.probes_together))

    def drawn(self, given: Fixed, draw: Callable[[str, jax.Array], jax.Array]) -> Fixed:
        """The values of the graph with draw(name, W) in the place of each parameter W of two axes or more."""
        return [draw(name, value) if name else value for name, value in zip(self._drawn, given, strict=True)]

    def _compiled(self, name: str, options: dict[str, Any]) -> Callable[..., Any]:
        def applied(data: Data, block: jax.Array, *more: Any) -> Any:
            return getattr(self.at(data), f"_{name}")(data, block, *more)

        return jit(applied, options, static_argnums=2 if name == "factorise" else None)

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
        return self._jvp_from(data, theta, self._no_starts(len(theta)))

    def _vjp(self, data: Data, q: jax.Array) -> jax.Array:
        """J^T."""
        return self._vjp_from(data, q)[0]

    def _jvp_from(self, data: Data, theta: jax.Array, start: jax.Array) -> jax.Array:
        """The derivative in the parameters and in z_0 [probe, trial, unit]."""

        def sweep(states: jax.Array, probes: Probes) -> jax.Array:
            changes, first = self._changes(probes.of(theta)), probes.of(start).swapaxes(0, 1)
            return self._forward(data, changes, states, probes, start=first)

        return self._by_probes(sweep, self._no_states(len(theta)))

    def _vjp_from(self, data: Data, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its transpose."""

        def sweep(out: tuple[jax.Array, jax.Array], probes: Probes) -> tuple[jax.Array, jax.Array]:
            start, changes = self._backward(data, q, probes)
            found = self._gradient(changes, probes.count), start.swapaxes(0, 1)
            return probes.put(out[0], found[0]), probes.put(out[1], found[1])

        parameters = jnp.zeros((len(q), self.parameter_size), q.dtype)
        return self._by_probes(sweep, (parameters, self._no_starts(len(q))), len(q))

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
            changes = self._backward(data, q, probes, self._gather_apart, still)[1]
            of_one = lambda changes: self._gradient(changes, probes.count)  # noqa: E731
            found = jax.vmap(of_one, out_axes=1, axis_size=self.trials)(changes)
            return probes.put(gradients, found)

        return self._by_probes(sweep, jnp.zeros((len(q), self.trials, self.parameter_size), q.dtype))

    def _gram(self, data: Data, q: jax.Array) -> jax.Array:
        """J J^T; where no two sites share a weight, what gathers at the sites is what kicks them."""

        def sweep(states: jax.Array, probes: Probes) -> jax.Array:
            changes = self._backward(data, q, probes)[1]
            if not self.plain:
                changes = self._changes(self._gradient(changes, probes.count))
            return self._forward(data, changes, states, probes)

        return self._by_probes(sweep, jnp.zeros_like(q))


class Tangent:
    """The linear recurrence of some steps on blocks [probe, ...]: its programs at its numbers."""

    untraced = ""
    propagate: Map
    propagate_adjoint: Map
    factorise: Map
    jvp: Map
    vjp: Map
    jvp_from: Map
    vjp_from: Map
    gram: Map
    step_jvp: Map
    step_vjp: Map
    advance: Map
    advance_adjoint: Map

    def __init__(self, programs: Programs, given: Fixed, x: jax.Array, z: jax.Array) -> None:
        self._programs, self._given = programs, given
        self.site_kicks, self.parameter_size = programs.site_kicks, programs.parameter_size
        self.next_state, self.weights, data = programs.evaluate(given, x, z)
        self._take(data)

    def _take(self, data: Data) -> None:
        self._data, programs = data, self._programs
        for name in (*WHOLE, *ONCE, *PARTS):
            setattr(self, name, partial(getattr(programs, name), data))

    @property
    def sites(self) -> list[tuple[str, Site]]:
        """Its weight sites."""
        return [("a", site) for site in self._programs.analysed.sites]

    @property
    def inputs(self) -> list[jax.Array]:
        """What the weights of each site multiply [trial, time, ...]."""
        kinds = tuple(site.kind for _, site in self.sites)
        return inputs_of(self._data.variables, self._data.bases, kinds)

    def truncated(self, bases: list[jax.Array | None]) -> Self:
        """The same with each site's variables cut to V Q Q^T, for orthonormal columns Q [d, r]; None for all of V."""
        cut, whole = copy(self), self._data.variables
        variables = [v if Q is None else [v[0] @ Q] for v, Q in zip(whole, bases, strict=True)]
        cut._take(self._data._replace(variables=variables, bases=bases))
        return cut

    def fed_back(self, draw: Callable[[str, jax.Array], jax.Array]) -> Self:
        """The same gates, but what moves is multiplied by draw(name, W) in the place of each matrix W.

        The weights are what the step's tangent knows of all rows alike.
        """
        turned, given = copy(self), self._programs.drawn(self._given, draw)
        turned._take(self._data._replace(everywhere=self._programs.everywhere(given)))
        return turned


def _on_blocks(program: Map, together: int, data: Data, block: jax.Array) -> jax.Array:
    """A program on blocks of any length, at most `together` at once; parts have one length, the last some once more."""
    count = len(block)
    rounds = -(-count // together)
    if rounds <= 1:
        return program(data, block)
    length = -(-count // rounds)
    starts = [min(n * length, count - length) for n in range(rounds)]
    *found, last = (program(data, lax.dynamic_slice_in_dim(block, start, length)) for start in starts)
    return jnp.concatenate([*found, last[rounds * length - count :]])
