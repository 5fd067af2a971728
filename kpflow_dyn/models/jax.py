"""The cells and fields of `kpflow_dyn.models` as equinox modules, with the same parameters, called on one trial.

Their parameters are all their array leaves. Options and constants are static.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from kpflow_dyn.models import _equations as equations
from kpflow_dyn.models._hodgkin_huxley import SQUID_AXON, SquidAxon

__all__ = ["CTRNNCell", "CTRNNField", "ClosedLoop", "HodgkinHuxleyField", "LowRankRNNCell", "MLPField", "RNNCell"]

RATES: dict[str, Callable[[Array], Array]] = {"tanh": jnp.tanh, "relu": jax.nn.relu}
PHI = RATES | {"silu": jax.nn.silu}


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


class MLPField(eqx.Module):
    """A multilayer perceptron as the field of a neural ODE, for one trial: z [units], x_t [inputs] -> [units].

        f(t, z, x_t) = W_out phi(... phi(W_1 [z, x_t] + b_1) ...) + b_out

    The layers are `layers[0]`, ..., `layers[depth]`, each an eqx.nn.Linear with its usual start.

    Args, Raises and Source as `models.MLPField`.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    >>> field = MLPField(4, hidden=16, inputs=2, key=jax.random.key(0))
    >>> field(0.0, jnp.zeros(4), jnp.ones(2)).shape
    (4,)
    """

    layers: tuple[eqx.nn.Linear, ...]
    units: int = eqx.field(static=True)
    inputs: int = eqx.field(static=True)
    nonlinearity: str = eqx.field(static=True)

    def __init__(
        self, units: int, hidden: int, inputs: int = 0, depth: int = 1, nonlinearity: str = "tanh", *, key: Array
    ) -> None:
        equations.check_sizes(inputs, units=units, hidden=hidden, depth=depth)
        equations.choose(nonlinearity, PHI)
        self.units, self.inputs, self.nonlinearity = units, inputs, nonlinearity
        widths, keys = [units + inputs, *[hidden] * depth, units], jax.random.split(key, depth + 1)
        self.layers = tuple(eqx.nn.Linear(a, b, key=k) for (a, b), k in zip(pairwise(widths), keys, strict=True))

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [units]."""
        equations.check_widths(self.units, self.inputs, z, x_t)
        return equations.mlp(self.layers, PHI[self.nonlinearity], z, x_t)


class CTRNNField(eqx.Module):
    """Leaky-current recurrent network in continuous time, for one trial: z [units], x_t [inputs] -> [units].

        tau z' = -z + W phi(z) + U x_t + b

    Args, Raises and Source as `models.CTRNNField`; tau is static.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    >>> CTRNNField(128, inputs=3, tau=0.1, key=jax.random.key(0))(0.0, jnp.ones(128), jnp.zeros(3)).shape
    (128,)
    """

    W: Array
    U: Array | None
    b: Array
    tau: float | tuple[float, ...] = eqx.field(static=True)
    nonlinearity: str = eqx.field(static=True)

    def __init__(
        self, units: int, inputs: int = 0, tau: Any = 1.0, gain: float = 1.0, nonlinearity: str = "tanh", *, key: Array
    ) -> None:
        equations.check_sizes(inputs, units=units)
        equations.choose(nonlinearity, PHI)
        fixed = equations.time_constants(tau, units)
        self.tau, self.nonlinearity = tuple(fixed.tolist()) if fixed.ndim else float(fixed), nonlinearity
        recurrent, outside = jax.random.split(key)
        self.W = gain / math.sqrt(units) * jax.random.normal(recurrent, (units, units))
        self.U, self.b = _input_weight(units, inputs, outside), jnp.zeros(units)

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [units]."""
        equations.check_widths(len(self.b), _width(self.U), z, x_t)
        tau = jnp.asarray(self.tau, z.dtype)
        return equations.ctrnn(self.W, self.U, self.b, tau, PHI[self.nonlinearity], z, x_t)


class HodgkinHuxleyField(eqx.Module):
    """A network of Hodgkin-Huxley neurons, for one trial: z [5 neurons], x_t [inputs] -> [5 neurons].

        C V_i' = sum_j W_ij s_j (E_syn - V_i) + (U x_t)_i - I_Na - I_K - I_L

    Args, Raises and Source as `models.HodgkinHuxleyField`.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    >>> field = HodgkinHuxleyField(3, inputs=1, key=jax.random.key(0))
    >>> bool(abs(field(0.0, field.resting_state(), jnp.zeros(1))).max() < 1e-4)
    True
    """

    W: Array
    U: Array | None
    axon: SquidAxon = eqx.field(static=True)

    def __init__(
        self, neurons: int, inputs: int = 0, conductance: float = 0.1, axon: SquidAxon = SQUID_AXON, *, key: Array
    ) -> None:
        equations.check_sizes(inputs, neurons=neurons)
        recurrent, outside = jax.random.split(key)
        self.W = 2 * conductance / neurons * jax.random.uniform(recurrent, (neurons, neurons))
        self.U, self.axon = _input_weight(neurons, inputs, outside), axon

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [5 neurons], per ms."""
        equations.check_widths(5 * len(self.W), _width(self.U), z, x_t)
        return self.axon.velocity(z, self.W, equations.drive(self.U, x_t))

    def resting_state(self) -> Array:
        """[5 neurons], where each neuron would rest alone: at rest the synapses are all but shut."""
        return jnp.repeat(jnp.asarray(self.axon.resting_state(), self.W.dtype), len(self.W))


class ClosedLoop(eqx.Module):
    """The field z' = plant(z, u) with u = policy(z) or u = policy([z, x_t]), for one trial.

    Args, Raises and Source as `models.ClosedLoop`. Arrays of the plant are constants and no leaves.

    >>> from kpflow_dyn.models import Pendulum
    >>> loop = ClosedLoop(Pendulum(), eqx.nn.Linear(2, 1, key=jax.random.key(0)))
    >>> loop(0.0, jnp.zeros(2)).shape
    (2,)
    """

    plant: Callable[[Array, Array], Array] = eqx.field(static=True)
    policy: Callable[[Array], Array]

    def __init__(self, plant: Any, policy: Any) -> None:
        self.plant, self.policy = hashable(plant), policy

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [state]."""
        return equations.closed_loop(self.plant, self.policy, z, x_t)


class BesideControl(eqx.Module):
    """A closed loop beside whose state stands the integral of its control: s = [z, int u dt]; its parameters."""

    plant: Callable[[Array, Array], Array] = eqx.field(static=True)
    policy: Callable[[Array], Array]
    units: int = eqx.field(static=True)

    def __init__(self, loop: ClosedLoop, units: int) -> None:
        self.plant, self.policy, self.units = loop.plant, loop.policy, units

    def __call__(self, t: Any, s: Array, x_t: Array | None = None) -> Array:
        """s' [state + control]."""
        return equations.beside_control(self.plant, self.policy, self.units, s, x_t)


class _ByIdentity:
    """A plant that cannot be hashed, because it holds arrays, as something that can."""

    def __init__(self, plant: Any) -> None:
        self.plant = plant

    def __call__(self, z: Array, u: Array) -> Array:
        return self.plant(z, u)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["plant"], name)


def hashable(plant: Any) -> Any:
    """The plant, as something that can be a static part of a pytree."""
    try:
        hash(plant)
    except TypeError:
        return _ByIdentity(plant)
    return plant


def _input_weight(units: int, inputs: int, key: Array) -> Array | None:
    return jax.random.normal(key, (units, inputs)) / math.sqrt(inputs) if inputs else None


def _width(weight: Array | None) -> int:
    return 0 if weight is None else weight.shape[1]


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
