"""The states of a JAX problem as its user computes them, and their derivatives by jax.jvp and jax.vjp."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp

import kpflow_dyn as kp

from .torch_oracle import called, picked

ITERATIONS = 100  # of a fixed point, whose maps contract by a half or more


class Oracle:
    """J and its transpose by function transforms, compiled."""

    def __init__(self, problem: Any, solution: Any) -> None:
        learnt, fixed = eqx.partition(problem.model, lambda a: isinstance(a, jax.Array) and eqx.is_inexact_array(a))
        paths, self.tree = jax.tree_util.tree_flatten_with_path(learnt)
        first = 1 if isinstance(problem.model, jax.tree_util.Partial) else 0  # its arguments name themselves
        self.names = [jax.tree_util.keystr(path[first:]).removeprefix(".") for path, _ in paths]
        self.leaves = [leaf for _, leaf in paths]

        def states(leaves: list[jax.Array]) -> jax.Array:
            value = states_of(problem, eqx.combine(jax.tree.unflatten(self.tree, leaves), fixed), solution)
            return jnp.concat([value.real, value.imag], axis=-1) if jnp.iscomplexobj(value) else value

        self._value = jax.jit(states)
        self._vjp = jax.jit(lambda leaves, q: jax.vjp(states, leaves)[1](q)[0])
        self._jvp = jax.jit(lambda leaves, theta: jax.jvp(states, (leaves,), (theta,))[1])

    @property
    def value(self) -> jax.Array:
        return self._value(self.leaves)

    @property
    def rounding(self) -> float:
        """That of the states."""
        return float(jnp.finfo(self.value.dtype).eps)

    def vjp(self, q: jax.Array) -> dict[str, jax.Array]:
        """J* q, by name, with torch's sign of the imaginary part."""
        return dict(zip(self.names, [g.conj() for g in self._vjp(self.leaves, q)], strict=True))

    def jvp(self, theta: dict[str, jax.Array]) -> jax.Array:
        """J theta."""
        return self._jvp(self.leaves, [theta[name] for name in self.names])

    def product(self, q: jax.Array) -> jax.Array:
        """J J* q."""
        return self.jvp(self.vjp(q))

    transformed = product


@singledispatch
def states_of(problem: kp.StaticProblem, net: Any, _solution: Any) -> jax.Array:
    """What the network gives for each trial."""

    def of_trial(x: Any) -> jax.Array:
        return picked(called(net, x), *problem.state)

    axes = getattr(problem, "axes", None) or ("trial",)
    return jax.vmap(of_trial)(problem.x) if "trial" in axes else of_trial(problem.x)[None]


@states_of.register
def _(problem: kp.DiscreteProblem, cell: Any, solution: Any) -> jax.Array:
    parts = problem.z0 if isinstance(problem.z0, tuple | list) else None

    def of_trial(x: jax.Array, start: Any) -> jax.Array:
        def step(z: Any, x_t: jax.Array) -> tuple[Any, jax.Array]:
            z = cell(x_t, z)
            return z, jnp.concat(list(z), axis=-1) if isinstance(z, tuple | list) else z

        return jax.lax.scan(step, start, x)[1]

    start = solution.start if parts is None else parts
    if isinstance(cell, eqx.nn.LSTMCell) and parts is None:
        start = tuple(jnp.split(start, 2, -1))
    return jax.vmap(of_trial)(problem.x, start)


@states_of.register
def _(problem: kp.ODEProblem, field: Any, solution: Any) -> jax.Array:
    t = jnp.asarray(problem.t)

    def of_trial(z0: jax.Array) -> jax.Array:
        term = diffrax.ODETerm(lambda t, z, _: field(t, z) if problem.x is None else field(t, z, problem.x(t)))
        return diffrax.diffeqsolve(
            term, solution.alg, t[0], t[-1], None, z0, saveat=diffrax.SaveAt(ts=t), adjoint=diffrax.DirectAdjoint(),
            stepsize_controller=diffrax.StepTo(ts=t),
        ).ys  # fmt: skip

    return jax.vmap(of_trial)(problem.z0)


@states_of.register
def _(problem: kp.FixedPointProblem, f: Any, solution: Any) -> jax.Array:
    def of_trial(x: jax.Array, z: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda z, _: (f(x, z), None), z, length=ITERATIONS)[0]

    return jax.vmap(of_trial)(problem.x, jax.lax.stop_gradient(solution.state))
