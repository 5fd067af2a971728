"""The cells and fields of `kpflow_dyn.models` as equinox modules, with the same parameters, called on one trial.

Their parameters are all their array leaves. Options and constants are static.
"""

from __future__ import annotations

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
from kpflow_dyn.models._jax_cells import CTRNNCell, LowRankRNNCell, RNNCell

__all__ = ["CTRNNCell", "CTRNNField", "ClosedLoop", "HodgkinHuxleyField", "LowRankRNNCell", "MLPField", "RNNCell"]

_PHI: dict[str, Callable[[Array], Array]] = {"relu": jax.nn.relu, "silu": jax.nn.silu, "tanh": jnp.tanh}


class MLPField(eqx.Module):
    """A multilayer perceptron as the field of a neural ODE, for one trial: z [units], x_t [inputs] -> [units].

        f(t, z, x_t) = W_out phi(... phi(W_1 [z, x_t] + b_1) ...) + b_out

    The layers are `layers[0]`, ..., `layers[depth]`, each an eqx.nn.Linear with its usual start.

    Args, Raises and Source as `models.MLPField`.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    Example:
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
        equations.choose(nonlinearity, _PHI)
        self.units, self.inputs, self.nonlinearity = units, inputs, nonlinearity
        widths, keys = [units + inputs, *[hidden] * depth, units], jax.random.split(key, depth + 1)
        self.layers = tuple(eqx.nn.Linear(a, b, key=k) for (a, b), k in zip(pairwise(widths), keys, strict=True))

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [units]."""
        equations.check_widths(self.units, self.inputs, z, x_t)
        return equations.mlp(self.layers, _PHI[self.nonlinearity], z, x_t)


class CTRNNField(eqx.Module):
    """Leaky-current recurrent network in continuous time, for one trial: z [units], x_t [inputs] -> [units].

        tau z' = -z + W phi(z) + U x_t + b

    Args, Raises and Source as `models.CTRNNField`; tau is static.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    Example:
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
        equations.choose(nonlinearity, _PHI)
        fixed = equations.time_constants(tau, units)
        self.tau, self.nonlinearity = tuple(fixed.tolist()) if fixed.ndim else float(fixed), nonlinearity
        recurrent, outside = jax.random.split(key)
        self.W = gain / math.sqrt(units) * jax.random.normal(recurrent, (units, units))
        self.U, self.b = _input_weight(units, inputs, outside), jnp.zeros(units)

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [units]."""
        equations.check_widths(len(self.b), _width(self.U), z, x_t)
        tau = jnp.asarray(self.tau, z.dtype)
        return equations.ctrnn(self.W, self.U, self.b, tau, _PHI[self.nonlinearity], z, x_t)


class HodgkinHuxleyField(eqx.Module):
    """A network of Hodgkin-Huxley neurons, for one trial: z [5 neurons], x_t [inputs] -> [5 neurons].

        C V_i' = sum_j W_ij s_j (E_syn - V_i) + (U x_t)_i - I_Na - I_K - I_L

    Args, Raises and Source as `models.HodgkinHuxleyField`.

    Args:
        key: a key [] of jax.random, for the weights at the start.

    Source as `models.SquidAxon`.

    Example:
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

    Source as `models.ClosedLoop`.

    Example:
        >>> from kpflow_dyn.models import Pendulum
        >>> loop = ClosedLoop(Pendulum(), eqx.nn.Linear(2, 1, key=jax.random.key(0)))
        >>> loop(0.0, jnp.zeros(2)).shape
        (2,)
    """

    plant: Callable[[Array, Array], Array] = eqx.field(static=True)
    policy: Callable[[Array], Array]

    def __init__(self, plant: Any, policy: Any) -> None:
        self.plant, self.policy = _hashable(plant), policy

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [state]."""
        return equations.closed_loop(self.plant, self.policy, z, x_t)


class _ByIdentity:
    """A plant that cannot be hashed, because it holds arrays, as something that can."""

    def __init__(self, plant: Any) -> None:
        self.plant = plant
        if hasattr(plant, "control_size"):
            self.control_size = plant.control_size

    def __call__(self, z: Array, u: Array) -> Array:
        return self.plant(z, u)


def _hashable(plant: Any) -> Any:
    try:
        hash(plant)
    except TypeError:
        return _ByIdentity(plant)
    return plant


def _input_weight(units: int, inputs: int, key: Array) -> Array | None:
    return jax.random.normal(key, (units, inputs)) / math.sqrt(inputs) if inputs else None


def _width(weight: Array | None) -> int:
    return 0 if weight is None else weight.shape[1]
