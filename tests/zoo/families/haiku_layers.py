"""haiku: transformed functions with their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

import kpflow_dyn as kp

from ..member import Member

TRIALS, TIMES, INPUTS, UNITS = 2, 5, 3, 6


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (TRIALS, *shape))


def on(
    shape: tuple[int, ...], call: Callable[[jax.Array], jax.Array], **options: Any
) -> Callable[[], kp.StaticProblem]:
    """A function of haiku's modules, transformed."""

    def problem() -> kp.StaticProblem:
        function, x = hk.without_apply_rng(hk.transform(call)), normal(*shape)
        return kp.StaticProblem(
            Partial(function.apply, function.init(jax.random.key(0), x[0])), x, **{"state": ""} | options
        )

    return problem


def steps(make: Callable[[], hk.RNNCore], parts: int = 1) -> Callable[[], kp.DiscreteProblem]:
    """A core, whose state comes last and is given twice; it has so many parts."""

    def step(x: jax.Array, z: Any) -> Any:
        core = make()
        return tuple(core(x, hk.LSTMState(*z))[1]) if parts > 1 else core(x, z)[1]

    def problem() -> kp.DiscreteProblem:
        function, x, zeros = hk.without_apply_rng(hk.transform(step)), normal(TIMES, INPUTS), jnp.zeros((TRIALS, UNITS))
        start = (zeros,) * parts if parts > 1 else zeros
        weights = function.init(jax.random.key(0), x[0, 0], jax.tree.map(lambda a: a[0], start))
        return kp.DiscreteProblem(Partial(function.apply, weights), x, start)

    return problem


def core_step(x: jax.Array, z: jax.Array) -> jax.Array:
    """What `steps` adds to a core."""
    return hk.GRU(UNITS)(x, z)[1]


def perceptron(x: jax.Array) -> jax.Array:
    return hk.nets.MLP([UNITS, 2], activation=jnp.tanh)(hk.LayerNorm(-1, True, True)(x))


def convolutions(x: jax.Array) -> jax.Array:
    return hk.Conv2D(2, 1)(jax.nn.relu(hk.GroupNorm(2)(hk.Conv2D(4, 3)(x[None]))))[0]


def attention(x: jax.Array) -> jax.Array:
    return hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling(1.0))(x, x, x)


def unrolled(x: jax.Array) -> jax.Array:
    core = hk.GRU(UNITS)
    return hk.dynamic_unroll(core, x, core.initial_state(None))[0]


MEMBERS = [
    Member("dm-haiku: MLP, LayerNorm", "dm-haiku", on((INPUTS,), perceptron)),
    Member("dm-haiku: convolutions, GroupNorm", "dm-haiku", on((6, 6, 2), convolutions)),
    Member("dm-haiku: attention", "dm-haiku", on((TIMES, UNITS), attention, axes=("trial", "time", "unit"))),
    Member("dm-haiku: GRU, unrolled", "dm-haiku", on((TIMES, INPUTS), unrolled, axes=("trial", "time", "unit"))),
    Member("dm-haiku: GRU", "dm-haiku", steps(lambda: hk.GRU(UNITS)), core_step),
    Member("dm-haiku: LSTM", "dm-haiku", steps(lambda: hk.LSTM(UNITS), 2), core_step),
]
