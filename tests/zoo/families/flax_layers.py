"""flax: linen's modules with their variables, and nnx's as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

import kpflow_dyn as kp

from ..member import Member

TRIALS, TIMES, INPUTS, UNITS = 2, 5, 3, 6
SEQUENCE = ("trial", "time", "unit")
DOUBLE = {"param_dtype": jnp.float64}


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (TRIALS, *shape))


def double(tree: Any) -> Any:
    """The same in double precision, which the statistics of a batch norm are not."""
    return jax.tree.map(lambda a: a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def linen(shape: tuple[int, ...], module: nn.Module, **options: Any) -> Callable[[], kp.StaticProblem]:
    """A module of linen: its apply, with its variables in double precision."""

    def problem() -> kp.StaticProblem:
        x = normal(*shape)
        variables = double(module.init(jax.random.key(0), x[0]))
        return kp.StaticProblem(Partial(module.apply, variables), x, **{"state": ""} | options)

    return problem


def cell_of_linen(cell: nn.RNNCellBase) -> Callable[[], kp.DiscreteProblem]:
    """A cell of linen, whose carry comes first and is given twice."""

    def problem() -> kp.DiscreteProblem:
        x = normal(TIMES, INPUTS)
        carry = jax.tree.map(lambda a: jnp.zeros((TRIALS, UNITS)), cell.initialize_carry(jax.random.key(0), (INPUTS,)))
        variables = cell.init(jax.random.key(0), jax.tree.map(lambda a: a[0], carry), x[0, 0])
        return kp.DiscreteProblem(Partial(Swapped(cell), variables), x, carry)

    return problem


class Swapped:
    """The step of a cell of linen."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        self.cell = cell

    def __call__(self, variables: Any, x: jax.Array, z: Any) -> Any:
        return self.cell.apply(variables, z, x)[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Swapped) and self.cell == other.cell

    def __hash__(self) -> int:
        return hash(self.cell)


def of_nnx(shape: tuple[int, ...], make: Callable[[nnx.Rngs], Any], **options: Any) -> Callable[[], kp.StaticProblem]:
    """A module of nnx as it is."""
    return lambda: kp.StaticProblem(double(make(nnx.Rngs(0))), normal(*shape), **{"state": ""} | options)


class NnxStep(nnx.Module):
    """The step of a cell of nnx, whose carry comes first and is given twice."""

    def __init__(self, cell: Any) -> None:
        self.cell = cell

    def __call__(self, x: jax.Array, z: Any) -> Any:
        return self.cell(z, x)[0]


def cell_of_nnx(make: Callable[..., Any], parts: int = 1) -> Callable[[], kp.DiscreteProblem]:
    """A cell of nnx whose carry has so many parts."""

    def problem() -> kp.DiscreteProblem:
        zeros = jnp.zeros((TRIALS, UNITS))
        cell = make(INPUTS, UNITS, rngs=nnx.Rngs(0), **DOUBLE)
        return kp.DiscreteProblem(NnxStep(cell), normal(TIMES, INPUTS), (zeros,) * parts if parts > 1 else zeros)

    return problem


class Perceptron(nnx.Module):
    """Two layers and a norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first, self.norm = (
            nnx.Linear(INPUTS, UNITS, rngs=rngs, **DOUBLE),
            nnx.LayerNorm(UNITS, rngs=rngs, **DOUBLE),
        )
        self.last = nnx.Linear(UNITS, 2, rngs=rngs, **DOUBLE)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(jnp.tanh(self.norm(self.first(x))))


class Convolutions(nnx.Module):
    """A convolution, a batch norm that uses what it knows, and a pool."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.convolution = nnx.Conv(2, 4, (3, 3), rngs=rngs, **DOUBLE)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs, **DOUBLE)
        self.readout = nnx.Linear(4, 2, rngs=rngs, **DOUBLE)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.readout(nnx.avg_pool(nnx.relu(self.norm(self.convolution(x))), (2, 2), (2, 2)))


class Attending(nnx.Module):
    """Self-attention."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention = nnx.MultiHeadAttention(2, UNITS, decode=False, rngs=rngs, **DOUBLE)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.attention(x)


layers = nn.Sequential([nn.Dense(UNITS, **DOUBLE), nn.LayerNorm(**DOUBLE), nn.tanh, nn.Dense(2, **DOUBLE)])
convolutions = nn.Sequential([
    nn.Conv(4, (3, 3), **DOUBLE), nn.BatchNorm(use_running_average=True, **DOUBLE), nn.relu, nn.GroupNorm(2, **DOUBLE),
    nn.Conv(2, (1, 1), **DOUBLE),
])  # fmt: skip
MEMBERS = [
    Member("flax: linen MLP", "flax", linen((INPUTS,), layers)),
    Member("flax: linen convolutions, BatchNorm", "flax", linen((6, 6, 2), convolutions)),
    Member("flax: linen attention", "flax", linen((TIMES, UNITS), nn.SelfAttention(2, **DOUBLE), axes=SEQUENCE)),
    Member(
        "flax: linen RNN of an LSTMCell",
        "flax",
        linen((TIMES, INPUTS), nn.RNN(nn.OptimizedLSTMCell(UNITS, **DOUBLE)), axes=SEQUENCE),
    ),
    Member("flax: linen GRUCell", "flax", cell_of_linen(nn.GRUCell(UNITS, **DOUBLE)), Swapped),
    Member("flax: linen LSTMCell", "flax", cell_of_linen(nn.LSTMCell(UNITS, **DOUBLE)), Swapped),
    Member("flax: nnx MLP", "flax", of_nnx((INPUTS,), Perceptron)),
    Member("flax: nnx convolutions, BatchNorm", "flax", of_nnx((6, 6, 2), Convolutions)),
    Member("flax: nnx attention", "flax", of_nnx((TIMES, UNITS), Attending, axes=SEQUENCE)),
    Member("flax: nnx GRUCell", "flax", cell_of_nnx(nnx.GRUCell), NnxStep),
    Member("flax: nnx LSTMCell", "flax", cell_of_nnx(nnx.LSTMCell, 2), NnxStep),
]
