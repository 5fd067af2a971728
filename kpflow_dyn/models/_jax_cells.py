"""The cells of `kpflow_dyn.models`, and the plain RNN that equinox has not got, as equinox modules for one trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from kpflow_dyn.models import _equations as equations

RATES: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}


class _Cell(eqx.Module):
    """The options of a cell, which are static."""

    input_size: int = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)
    nonlinearity: str = eqx.field(static=True)

    def __init__(self, input_size: int, hidden_size: int, nonlinearity: str) -> None:
        equations.check_sizes(0, input_size=input_size, hidden_size=hidden_size)
        equations.choose(nonlinearity, RATES)
        self.input_size, self.hidden_size, self.nonlinearity = input_size, hidden_size, nonlinearity


class RNNCell(_Cell):
    """The plain recurrent network, torch's nn.RNNCell with the same parameters.

        h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    All of them start uniform between -1 / sqrt(hidden_size) and 1 / sqrt(hidden_size).

    Args:
        input_size: width of x.
        hidden_size: number of units.
        bias: whether there are b_ih and b_hh; both None otherwise.
        nonlinearity: phi, "tanh" or "relu".
        key: for the weights at the start.

    Shapes: x [input_size], h [hidden_size] -> [hidden_size].

    Raises:
        ValueError: a size that is too small, or an unknown nonlinearity.

    Source: Elman, Cognitive Science 14, 179 (1990).

    Example:
        >>> RNNCell(3, 16, key=jax.random.key(0))(jnp.zeros(3), jnp.ones(16)).shape
        (16,)
    """

    weight_ih: Array
    weight_hh: Array
    bias_ih: Array | None
    bias_hh: Array | None

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh", *, key: Array
    ) -> None:
        super().__init__(input_size, hidden_size, nonlinearity)
        bound, keys = 1 / math.sqrt(hidden_size), jax.random.split(key, 4)
        shapes = [(hidden_size, input_size), (hidden_size, hidden_size), (hidden_size,), (hidden_size,)]
        drawn = [jax.random.uniform(k, size, minval=-bound, maxval=bound) for k, size in zip(keys, shapes, strict=True)]
        self.weight_ih, self.weight_hh = drawn[:2]
        self.bias_ih, self.bias_hh = drawn[2:] if bias else (None, None)

    def __call__(self, x: Array, h: Array) -> Array:
        """The next state [hidden_size]."""
        biases = 0.0 if self.bias_ih is None or self.bias_hh is None else self.bias_ih + self.bias_hh
        return RATES[self.nonlinearity](self.weight_ih @ x + self.weight_hh @ h + biases)


class _LeakyCell(_Cell):
    """Everything but the recurrent weight: U, b, the leak and phi."""

    U: Array
    b: Array
    alpha_logit: Array | None
    alpha: float | None = eqx.field(static=True)

    def __init__(
        self, input_size: int, hidden_size: int, alpha: float, learn_alpha: bool, nonlinearity: str, key: Array
    ) -> None:
        super().__init__(input_size, hidden_size, nonlinearity)
        equations.check_leak(alpha, learn_alpha)
        self.U = jax.random.normal(key, (hidden_size, input_size)) / math.sqrt(input_size)
        self.b = jnp.zeros(hidden_size)
        self.alpha = None if learn_alpha else float(alpha)
        self.alpha_logit = jnp.full(hidden_size, math.log(alpha / (1 - alpha))) if learn_alpha else None

    def recurrent(self, rates: Array) -> Array:
        raise NotImplementedError

    def __call__(self, x: Array, h: Array) -> Array:
        """The next state [hidden_size]."""
        leak = self.alpha if self.alpha_logit is None else jax.nn.sigmoid(self.alpha_logit)
        return equations.leaky_step(h, x, self.recurrent(RATES[self.nonlinearity](h)), self.U, self.b, leak)


class CTRNNCell(_LeakyCell):
    """Leaky-current RNN for one trial: x [input_size], h [hidden_size] -> [hidden_size].

        h_t = (1 - a) h_{t-1} + a (W phi(h_{t-1}) + U x_t + b)

    Args, Raises and Source as `models.CTRNNCell`; an a that is not learnt is static.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    Example:
        >>> cell = CTRNNCell(3, 128, alpha=0.2, gain=1.5, key=jax.random.key(0))
        >>> cell(jnp.zeros(3), jnp.ones(128)).shape
        (128,)
    """

    W: Array

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        alpha: float = 0.1,
        learn_alpha: bool = False,
        nonlinearity: str = "tanh",
        gain: float = 1.0,
        *,
        key: Array,
    ) -> None:
        outside, recurrent = jax.random.split(key)
        super().__init__(input_size, hidden_size, alpha, learn_alpha, nonlinearity, outside)
        self.W = gain / math.sqrt(hidden_size) * jax.random.normal(recurrent, (hidden_size, hidden_size))

    def recurrent(self, rates: Array) -> Array:
        """W r of rates [hidden_size]."""
        return rates @ self.W.T


class LowRankRNNCell(_LeakyCell):
    """Leaky-current RNN whose recurrent weight has low rank, W = m n^T / hidden_size, for one trial.

        h_t = (1 - a) h_{t-1} + a (m n^T phi(h_{t-1}) / hidden_size + U x_t + b)

    Args, Raises and Source as `models.LowRankRNNCell`.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    Example:
        >>> LowRankRNNCell(3, 128, rank=2, key=jax.random.key(0))(jnp.zeros(3), jnp.ones(128)).shape
        (128,)
    """

    m: Array
    n: Array

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        rank: int = 1,
        alpha: float = 0.1,
        learn_alpha: bool = False,
        nonlinearity: str = "tanh",
        *,
        key: Array,
    ) -> None:
        equations.check_rank(rank, hidden_size)
        outside, left, right = jax.random.split(key, 3)
        super().__init__(input_size, hidden_size, alpha, learn_alpha, nonlinearity, outside)
        self.m = jax.random.normal(left, (hidden_size, rank))
        self.n = jax.random.normal(right, (hidden_size, rank))

    def recurrent(self, rates: Array) -> Array:
        """W r = m (n^T r) / hidden_size of rates [hidden_size]."""
        return equations.low_rank(self.m, self.n, rates)


def make(name: str, sizes: tuple[int, int, int], seed: int, dtype: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A cell by its name in `make_model`, and its readout; sizes are those of inputs, units and outputs."""
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise TypeError("JAX rounds float64 to float32; call jax.config.update('jax_enable_x64', True) first")
    kinds: dict[str, Any] = {"rnn": RNNCell, "gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}
    kind = (kinds | {"ctrnn": CTRNNCell, "lowrank": LowRankRNNCell})[name]
    if name in ("gru", "lstm"):
        options = {"use_bias": options.get("bias", True)}
    inputs, units, outputs = sizes
    first, second = jax.random.split(jax.random.key(seed))
    made = kind(inputs, units, **options, key=first), eqx.nn.Linear(units, outputs, key=second)
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if eqx.is_inexact_array(leaf) else leaf, made)
