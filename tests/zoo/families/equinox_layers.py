"""equinox: its layers, called as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import kpflow_dyn as kp

from ..member import Member

TRIALS, TIMES, INPUTS, UNITS = 2, 5, 3, 6


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (TRIALS, *shape))


def on(shape: tuple[int, ...], make: Callable[..., Any], **options: Any) -> Callable[[], kp.StaticProblem]:
    """A layer, made of a key, on inputs of this shape for each trial."""
    options = {"state": ""} | options
    return lambda: kp.StaticProblem(make(jax.random.key(0)), normal(*shape), **options)


def steps(make: Callable[..., Any]) -> Callable[[], kp.DiscreteProblem]:
    """A cell."""
    return lambda: kp.DiscreteProblem(make(INPUTS, UNITS, key=jax.random.key(0)), normal(TIMES, INPUTS))


def mlp(key: jax.Array) -> eqx.Module:
    return eqx.nn.MLP(INPUTS, 2, 8, 2, jnp.tanh, key=key)


def attention() -> kp.StaticProblem:
    """A query, a key and a value."""
    net = eqx.nn.MultiheadAttention(2, UNITS, key=jax.random.key(0))
    return kp.StaticProblem(net, (normal(4, UNITS), normal(TIMES, UNITS), normal(TIMES, UNITS)), state="")


def convolutions(key: jax.Array) -> eqx.Module:
    """Convolutions with norms and pools."""
    keys = jax.random.split(key, 3)
    return eqx.nn.Sequential([
        eqx.nn.Conv2d(2, 4, 3, padding=1, key=keys[0]), eqx.nn.GroupNorm(2, 4), eqx.nn.Lambda(jax.nn.silu),
        eqx.nn.MaxPool2d(2, 2), eqx.nn.Conv2d(4, 3, 1, key=keys[1]), eqx.nn.AdaptiveAvgPool2d((1, 1)),
        eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(3, 2, key=keys[2]),
    ])  # fmt: skip


def norms(key: jax.Array) -> eqx.Module:
    """A perceptron with norms."""
    keys = jax.random.split(key)
    return eqx.nn.Sequential([
        eqx.nn.Linear(INPUTS, UNITS, key=keys[0]), eqx.nn.LayerNorm(UNITS), eqx.nn.Lambda(jax.nn.silu),
        eqx.nn.RMSNorm(UNITS), eqx.nn.Linear(UNITS, 2, key=keys[1]),
    ])  # fmt: skip


def lines(key: jax.Array) -> eqx.Module:
    """Convolutions over time, down and up."""
    keys = jax.random.split(key)
    return eqx.nn.Sequential([
        eqx.nn.Conv1d(INPUTS, 4, 3, dilation=2, key=keys[0]), eqx.nn.Lambda(jax.nn.gelu),
        eqx.nn.ConvTranspose1d(4, 2, 3, key=keys[1]),
    ])  # fmt: skip


def normalised(key: jax.Array) -> eqx.Module:
    """Weights that are computed from others."""
    return eqx.nn.WeightNorm(eqx.nn.Linear(INPUTS, UNITS, key=key))


class Rolled(eqx.Module):
    """A GRU over a sequence, with a readout, as equinox's own example has it."""

    cell: eqx.nn.GRUCell
    readout: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.cell, self.readout = eqx.nn.GRUCell(INPUTS, UNITS, key=keys[0]), eqx.nn.Linear(UNITS, 2, key=keys[1])

    def __call__(self, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            h = self.cell(x_t, h)
            return h, self.readout(h)

        return jax.lax.scan(step, jnp.zeros(UNITS), x)[1]


class Words(eqx.Module):
    """Embeddings, self-attention with rotary positions, and a readout."""

    embedding: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    rotary: eqx.nn.RotaryPositionalEmbedding
    readout: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(11, 8, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=keys[1])
        self.rotary, self.readout = eqx.nn.RotaryPositionalEmbedding(4), eqx.nn.Linear(8, 2, key=keys[2])

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embedding)(tokens)
        turn = jax.vmap(self.rotary, in_axes=1, out_axes=1)
        turned = lambda q, k, v: (turn(q), turn(k), v)  # noqa: E731
        return jax.vmap(self.readout)(x + self.attention(x, x, x, process_heads=turned))


def words() -> kp.StaticProblem:
    tokens = jax.random.randint(jax.random.key(1), (TRIALS, TIMES), 0, 11)
    return kp.StaticProblem(Words(jax.random.key(0)), tokens, state="", axes=("trial", "time", "unit"))


PROBLEMS = {
    "MLP": on((INPUTS,), mlp),
    "GRUCell": steps(eqx.nn.GRUCell),
    "LSTMCell": steps(eqx.nn.LSTMCell),
    "GRU over a sequence": on((TIMES, INPUTS), Rolled, axes=("trial", "time", "unit")),
    "MultiheadAttention": attention,
    "attention with rotary positions": words,
    "Conv2d, GroupNorm": on((2, 6, 6), convolutions),
    "Conv1d, ConvTranspose1d": on((INPUTS, 12), lines),
    "LayerNorm, RMSNorm": on((INPUTS,), norms),
    "WeightNorm": on((INPUTS,), normalised),
}
MEMBERS = [Member(f"equinox: {name}", "equinox", problem) for name, problem in PROBLEMS.items()]
