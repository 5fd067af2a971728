"""How a system at rest answers to sinusoids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from kpflow_dyn.control._systems import LTI

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class FrequencyResponse:
    """G(i omega) of a linear system.

    Attributes:
        response: complex [output, input, omega].

    Example as `frequency_response`.
    """

    response: xr.DataArray

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

    def plot(self, dark: bool = False) -> Figure:
        """Bode's plot: magnitude and phase of each pair of input and output."""
        from kpflow_dyn.figures import _control as figures

        return figures.bode(self, dark=dark)


def frequency_response(system: LTI, omega: Any) -> FrequencyResponse:
    """G(s) = C (s - A)^{-1} B + D at s = i omega, or at z = exp(i omega dt) in place of s in discrete time.

    Args:
        system: an `LTI`.
        omega: frequencies [omega], >= 0, in radians per unit of time.

    Raises:
        TypeError, ValueError: another system, other frequencies, or a pole at one of them.
    Source: Astrom, Murray, "Feedback Systems" (2008), chapter 8.

    >>> from kpflow_dyn import control
    >>> low_pass = control.LTI([[-1.0]], [[1.0]])
    >>> control.frequency_response(low_pass, [0.0, 1.0]).magnitude.values.round(4)
    array([[[1.    , 0.7071]]])
    """
    if not isinstance(system, LTI):
        raise TypeError(f"system is {type(system).__name__}, expected an LTI, as linearize_lti gives it")
    frequencies = np.asarray(omega, np.float64)
    if frequencies.ndim != 1 or not frequencies.size or not (np.isfinite(frequencies) & (frequencies >= 0)).all():
        raise ValueError(f"omega has shape {frequencies.shape}, expected finite frequencies [omega] >= 0")
    s = 1j * frequencies if system.dt is None else np.exp(1j * frequencies * system.dt)
    poles = system.poles
    near = np.abs(s[:, None] - poles).min(1) <= 1e-12 * max(1.0, float(np.abs(poles).max()))
    if near.any():
        raise ValueError(f"the system has a pole at omega = {frequencies[near][0]:.6g}, where its response is infinite")
    inverse = np.linalg.solve(s[:, None, None] * np.eye(len(system.A)) - system.A, system.B.astype(complex)[None])
    response = np.moveaxis(system.C @ inverse + system.D, 0, -1)
    return FrequencyResponse(xr.DataArray(response, {"omega": frequencies}, ("output", "input", "omega")))
