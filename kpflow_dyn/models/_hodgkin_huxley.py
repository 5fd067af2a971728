"""The squid giant axon of Hodgkin and Huxley with kinetic synapses, written once for torch, JAX and numpy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn.models._constants import Constants, any_sign, at_least_zero


@dataclass(frozen=True)
class SquidAxon(Constants):
    """The constants of a Hodgkin-Huxley neuron and of its outgoing synapse, and their equations.

        C V' = current + (W s) (E_syn - V) - g_Na m^3 h (V - E_Na) - g_K n^4 (V - E_K) - g_L (V - E_L)
        g'   = alpha_g(V) (1 - g) - beta_g(V) g                          for the gates g = m, h, n
        s'   = synaptic_opening sigma((V - synaptic_threshold) / synaptic_width) (1 - s) - s / synaptic_decay

    sigma is the logistic function. Potentials are in mV with rest near -65 mV, times in ms, conductances in mS/cm^2,
    currents in uA/cm^2 (positive depolarises).

    Args:
        capacitance: C [uF/cm^2].
        sodium_conductance, potassium_conductance, leak_conductance: g_Na, g_K, g_L [mS/cm^2].
        sodium_reversal, potassium_reversal, leak_reversal, synaptic_reversal: E_Na, E_K, E_L, E_syn [mV]. The synapse
            excites with the default 0 and inhibits with -80.
        synaptic_opening: the fastest rate of opening [1/ms].
        synaptic_decay: tau_s, the time constant of closing [ms].
        synaptic_threshold, synaptic_width: where and over what range of V the synapse releases [mV].

    Raises:
        TypeError, ValueError: a constant is not a number, or not positive where it must be.
        ValueError: the leak's reversal does not lie between those of potassium and sodium.
    Source: Hodgkin, Huxley, J. Physiology 117, 500 (1952) at 6.3 degrees Celsius, with today's sign of V and rest moved
    to -65 mV; the synapse is AMPA of Destexhe, Mainen, Sejnowski, Kinetic models of synaptic transmission, in Koch,
    Segev (eds.), Methods in Neuronal Modeling (1998), with 1 mM of transmitter.

    >>> SquidAxon().resting_state().round(2).tolist()
    [-65.0, 0.05, 0.6, 0.32, 0.0]
    """

    capacitance: float = 1.0
    sodium_conductance: float = at_least_zero(120.0)
    potassium_conductance: float = at_least_zero(36.0)
    leak_conductance: float = 0.3
    sodium_reversal: float = any_sign(50.0)
    potassium_reversal: float = any_sign(-77.0)
    leak_reversal: float = any_sign(-54.387)
    synaptic_reversal: float = any_sign(0.0)
    synaptic_opening: float = 1.1
    synaptic_decay: float = 1 / 0.19
    synaptic_threshold: float = any_sign(2.0)
    synaptic_width: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.potassium_reversal < self.leak_reversal < self.sodium_reversal:
            raise ValueError(
                f"leak_reversal must lie between potassium_reversal = {self.potassium_reversal} and "
                f"sodium_reversal = {self.sodium_reversal}, got {self.leak_reversal}; the axon would have no rest"
            )

    def velocity(self, z: Array, W: Array, current: Array | float) -> Array:
        """z' of z = [V, m, h, n, s] [..., 5 neurons], for weights W [neuron, neuron] and a current [..., neuron]."""
        neurons = z.shape[-1] // 5
        V, m, h, n, s = (z[..., i * neurons : (i + 1) * neurons] for i in range(5))
        synaptic = (s @ W.T) * (self.synaptic_reversal - V)
        slope = (current + synaptic - self._membrane_current(V, m, h, n)) / self.capacitance
        rates = zip((m, h, n, s), self._rates(V), strict=True)
        gates = [opening * (1 - g) - closing * g for g, (opening, closing) in rates]
        return array_namespace(z).concat([slope, *gates], axis=-1)

    def resting_state(self) -> np.ndarray:
        """[V, m, h, n, s] of one neuron at rest, without any current: a float64 array [5]."""
        V = brentq(
            lambda V: self._membrane_current(V, *self._steady(V)[:3]), self.potassium_reversal, self.sodium_reversal
        )
        return np.array([V, *self._steady(V)])

    def _membrane_current(self, V: Any, m: Any, h: Any, n: Any) -> Any:
        sodium = self.sodium_conductance * m**3 * h * (V - self.sodium_reversal)
        potassium = self.potassium_conductance * n**4 * (V - self.potassium_reversal)
        return sodium + potassium + self.leak_conductance * (V - self.leak_reversal)

    def _rates(self, V: Array) -> list[tuple[Array, Array | float]]:
        """The rates of opening and closing [1/ms] of m, h, n and s."""
        exp = array_namespace(V).exp
        release = 1 / (1 + exp((self.synaptic_threshold - V) / self.synaptic_width))
        return [
            (_exponential_ramp((V + 40) / 10), 4 * exp(-(V + 65) / 18)),
            (0.07 * exp(-(V + 65) / 20), 1 / (1 + exp(-(V + 35) / 10))),
            (0.1 * _exponential_ramp((V + 55) / 10), 0.125 * exp(-(V + 65) / 80)),
            (self.synaptic_opening * release, 1 / self.synaptic_decay),
        ]

    def _steady(self, V: Any) -> list[Any]:
        return [opening / (opening + closing) for opening, closing in self._rates(np.asarray(V))]


SQUID_AXON = SquidAxon()


def _exponential_ramp(y: Array) -> Array:
    """y / (1 - exp(-y)), with all its digits and derivatives through y = 0.

    The series has an error below 1e-16 for |y| < 0.2, also in its derivative. Each branch sees only arguments at which
    it is regular: a NaN in the branch that is not taken would survive differentiation.
    """
    xp = array_namespace(y)
    near = xp.abs(y) < 0.2
    close, far = xp.where(near, y, 0.0), xp.where(near, 1.0, y)
    q = close * close
    series = 1 / 12 + q * (-1 / 720 + q * (1 / 30240 + q * (-1 / 1209600 + q / 47900160)))
    return xp.where(near, 1 + close / 2 + q * series, far / -xp.expm1(-far))
