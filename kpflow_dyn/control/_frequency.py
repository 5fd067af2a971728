"""How a system at rest answers to sinusoids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from kpflow_dyn._shown import Row, Shown, labelled, number
from kpflow_dyn.control._forms import real
from kpflow_dyn.control._systems import LTI, as_system

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SINGULAR = 1e-14  # part of |A| below which a singular value of s - A is rounding


@dataclass(frozen=True, eq=False, repr=False)
class FrequencyResponse(Shown):
    """G(i omega) of a linear system.

    Attributes:
        response: complex [output, input, omega].

    Example as `frequency_response`.
    """

    response: xr.DataArray

    def _shown(self) -> tuple[str, list[Row]]:
        gain = self.singular_values.values[:, 0]
        rows: list[Row] = [("response", labelled(self.response))]
        rows += [("omega", f"{number(self.omega[0])} to {number(self.omega[-1])}")]
        rows += [("largest gain", f"{number(gain.max())} at {number(self.omega[gain.argmax()])}")]
        return "FrequencyResponse", rows

    @property
    def magnitude(self) -> xr.DataArray:
        """|G| [output, input, omega]."""
        return abs(self.response)

    @property
    def phase(self) -> xr.DataArray:
        """The phase in radians, without jumps along omega [output, input, omega]."""
        return self.response.copy(data=np.unwrap(np.angle(self.response.values)))

    @property
    def singular_values(self) -> xr.DataArray:
        """The gains of the whole matrix at each frequency, descending [omega, mode]."""
        values = np.linalg.svd(np.moveaxis(self.response.values, -1, 0), compute_uv=False)
        return xr.DataArray(values, {"omega": self.response.omega}, ("omega", "mode"))

    def __iter__(self) -> Iterator[np.ndarray]:
        """The magnitude, the phase and omega, as python-control unpacks them: [omega] of one input and output."""
        one = self.response.shape[:2] == (1, 1)
        for values in (self.magnitude.values, self.phase.values):
            yield values[0, 0] if one else values
        yield self.omega

    @property
    def omega(self) -> np.ndarray:
        """The frequencies [omega]."""
        return self.response.omega.values

    def to_xarray(self) -> xr.Dataset:
        """A dataset of the complex `response`, and of `magnitude`, `phase` and `singular_values`."""
        import xarray as xr

        return xr.Dataset({name: getattr(self, name) for name in ("response", "magnitude", "phase", "singular_values")})

    def plot(self, dark: bool = False) -> Figure:
        """Bode's plot: magnitude and phase of each pair of input and output."""
        from kpflow_dyn.figures import _control as figures

        return figures.bode(self, dark=dark)


def frequency_response(system: Any, omega: Any = None) -> FrequencyResponse:
    """G(s) = C (s - A)^{-1} B + D at s = i omega, or at z = exp(i omega dt) in place of s in discrete time.

    Args:
        system: an `LTI`, or what `LTI` takes.
        omega: frequencies [omega], >= 0, in radians per unit of time; some, from a tenth of the slowest pole to ten
            times the fastest one, when None. (python-control takes two frequencies for the ends of a range; here they
            are two.)

    Raises:
        TypeError, ValueError: another system, other frequencies, or a pole at one of them.
    Source: Astrom, Murray, "Feedback Systems" (2008), chapter 8.

    >>> from kpflow_dyn import control
    >>> low_pass = control.LTI([[-1.0]], [[1.0]])
    >>> control.frequency_response(low_pass, [0.0, 1.0]).magnitude.values.round(4)
    array([[[1.    , 0.7071]]])
    >>> magnitude, phase, omega = control.frequency_response(low_pass, [0.0, 1.0])
    >>> magnitude.round(4)
    array([1.    , 0.7071])
    """
    system = as_system(system)
    frequencies = some_frequencies(system) if omega is None else real(omega, "omega")
    frequencies = frequencies[None] if frequencies.ndim == 0 else frequencies
    if frequencies.ndim != 1 or not frequencies.size or not (np.isfinite(frequencies) & (frequencies >= 0)).all():
        raise ValueError(f"omega has shape {frequencies.shape}, expected finite frequencies [omega] >= 0")
    response = np.moveaxis(response_at(system, frequencies), 0, -1)
    return FrequencyResponse(xr.DataArray(response, {"omega": frequencies}, ("output", "input", "omega")))


def response_at(system: LTI, frequencies: np.ndarray) -> np.ndarray:
    """G [omega, output, input]; raise at a pole."""
    near = are_poles(system, frequencies, 1e-12)
    if near.any():
        raise ValueError(f"the system has a pole at omega = {frequencies[near][0]:.6g}, where its response is infinite")
    return system.C @ np.linalg.solve(_shifted(system, frequencies), system.B.astype(complex)[None]) + system.D


def are_poles(system: LTI, frequencies: np.ndarray, within: float = 1e-9) -> np.ndarray:
    """Which frequencies are poles [omega]; of double ones, which rounding moves far, s - A is singular all the same."""
    poles, singular = system.poles, np.linalg.svd(_shifted(system, frequencies), compute_uv=False)[:, -1]
    near = np.abs(_points(system, frequencies)[:, None] - poles).min(1) <= within * max(1.0, float(np.abs(poles).max()))
    return near | (singular <= SINGULAR * np.linalg.norm(system.A, 2))


def _shifted(system: LTI, frequencies: np.ndarray) -> np.ndarray:
    """s - A [omega, unit, unit]."""
    return _points(system, frequencies)[:, None, None] * np.eye(len(system.A)) - system.A


def _points(system: LTI, frequencies: np.ndarray) -> np.ndarray:
    """s, or z [omega]."""
    return 1j * frequencies if system.dt is None else np.exp(1j * frequencies * system.dt)


def some_frequencies(system: LTI, each_decade: int = 100) -> np.ndarray:
    """Frequencies from below the slowest pole to above the fastest, or to half of the sampling rate."""
    rates = np.abs(system.poles if system.dt is None else np.log(system.poles[system.poles != 0]) / system.dt)
    rates = rates[rates > 1e-8 * max(rates, default=0.0)]
    low, high = (rates.min() / 10, rates.max() * 10) if len(rates) else (0.1, 10.0)
    if system.dt is not None:
        high = np.pi / system.dt
        low = min(low, high / 100)
    return np.geomspace(low, high, max(2, round(each_decade * np.log10(high / low))))
