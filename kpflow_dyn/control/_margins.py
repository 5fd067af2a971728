"""How far a loop is from instability: margins of gain and phase, and disk margins of all channels at once.

The loop transfer L is what returns to a point where the loop is opened there, with negative feedback: 1 + L is zero at
the poles of the closed loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from scipy.linalg import eig
from scipy.optimize import brentq, minimize_scalar

from kpflow_dyn._shown import Row, Shown, number, numbers
from kpflow_dyn.control._frequency import are_poles, response_at, some_frequencies
from kpflow_dyn.control._modes import DEFECTIVE
from kpflow_dyn.control._systems import LTI, as_system

NEAR = 1e-4  # part of a frequency within which a crossing that was found as an eigenvalue is looked for
REAL = 1e-6  # part of a response below which its imaginary part, or its distance from size one, is rounding
NONE = 1e-12  # size of L below which it is rounding: a larger gain is no margin
HALVINGS = 40  # of an interval of scales
SWEEPS = 4  # over the channels that are scaled
PHASE_OF_ALL = 180.0


class _Told(Shown):
    """Margins that print themselves, and say where they are none."""

    stable = True

    def _of_loop(self, rows: list[Row]) -> list[Row]:
        return rows if self.stable else ["the closed loop is unstable: these are no margins", *rows]


Margins = TypeVar("Margins", bound=_Told)


class _StabilityMargins(NamedTuple):
    gain: float
    phase: float
    distance: float
    phase_crossover: float
    gain_crossover: float
    nearest: float


class StabilityMargins(_Told, _StabilityMargins):
    """What `stability_margins` gives, in the order of python-control.

    Attributes:
        gain: the factor on L, nearest to one in ratio, that takes a pole to the boundary; inf where none does.
        phase: the smallest lag in degrees that does; inf where none does.
        distance: the smallest |1 + L(i omega)|.
        phase_crossover: the frequency of the first, NaN where there is none.
        gain_crossover: of the second.
        nearest: of the third.
        stable: whether the closed loop is; where it is not, these are no margins.

    Example as `stability_margins`.
    """

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [("gain", f"{number(self.gain)} (a factor)" + _at(self.phase_crossover))]
        rows += [("phase", f"{number(self.phase)} degrees" + _at(self.gain_crossover))]
        rows += [("distance", f"{number(self.distance)} from -1" + _at(self.nearest))]
        return "StabilityMargins", self._of_loop(rows)


class _DiskMargins(NamedTuple):
    margin: Any
    gain: Any
    phase: Any


class DiskMargins(_Told, _DiskMargins):
    """What `disk_margins` gives, in the order of python-control: numbers, or arrays [omega] with `returnall`.

    Attributes:
        margin: alpha, the size of the disk.
        gain: by how many dB the gain of every channel may change, up or down, in any combination.
        phase: by how many degrees their phases may.
        stable: whether the closed loop is; where it is not, these are no margins.

    Example as `disk_margins`.
    """

    def _shown(self) -> tuple[str, list[Row]]:
        told = {"margin": "", "gain": " dB", "phase": " degrees"}
        rows: list[Row] = [(name, numbers(np.ravel(getattr(self, name)), 4) + unit) for name, unit in told.items()]
        return "DiskMargins", self._of_loop(rows)


def _at(omega: float) -> str:
    return "" if np.isnan(omega) else f", at {number(omega)} radians per unit of time"


def _judged(found: Margins, system: LTI) -> Margins:
    """Margins that know whether their closed loop is stable."""
    poles = _closed(system).poles
    found.stable = bool(((poles.real < 0) if system.dt is None else (abs(poles) < 1)).all())
    return found


def stability_margins(L: Any) -> StabilityMargins:
    """Gain and phase margins of one loop, and the distance of its Nyquist plot from -1.

        gain: 1 / |L| where L(i omega) < 0        phase: arg L + 180 degrees where |L(i omega)| = 1

    The crossings are generalised eigenvalues, so none is missed between frequencies. They are margins of stability
    where the closed loop is stable. Of an unstable plant the gain margin may be below one: how far the gain may fall.

    Args:
        L: an `LTI` with one input and one output, or what `LTI` takes.

    Raises:
        TypeError, ValueError: no system, or several inputs or outputs: then take `disk_margins`.
    Source: Astrom, Murray, "Feedback Systems" (2008), section 9.3.

    >>> from kpflow_dyn import control
    >>> found = control.stability_margins(control.LTI([[0.0, 1.0], [0.0, -1.0]], [0.0, 1.0], [1.0, 0.0]))
    >>> round(found.phase, 3), found.gain
    (51.827, inf)
    """
    system = _well_posed(L)
    if system.B.shape[1] != 1 or len(system.C) != 1:
        raise ValueError(
            f"L has {system.B.shape[1]} inputs and {len(system.C)} outputs, expected one of each; take disk_margins, "
            "or close all loops but one"
        )
    gains, at_180 = gain_margins(system)
    crossovers = _crossings(system, _of_size_one, lambda value: abs(value) ** 2 - 1, _ends(system))
    phases = np.mod(np.angle(_values(system, crossovers), deg=True), 360) - PHASE_OF_ALL
    best_gain, best_phase = (int(np.argmin(a)) if len(a) else None for a in (abs(np.log(gains)), abs(phases)))
    nearest, distance = _smallest(lambda omega: abs(1 + _values(system, omega)), _grid(system))
    if system.dt is None and abs(far := 1 + float(system.D[0, 0])) < distance:
        nearest, distance = np.inf, abs(far)
    found = StabilityMargins(
        np.inf if best_gain is None else float(gains[best_gain]),
        np.inf if best_phase is None else float(phases[best_phase]),
        distance,
        np.nan if best_gain is None else float(at_180[best_gain]),
        np.nan if best_phase is None else float(crossovers[best_phase]),
        nearest,
    )
    return _judged(found, system)


def _well_posed(L: Any) -> LTI:
    """The system; raise where it has not as many inputs as outputs, or 1 + D has no inverse."""
    system = as_system(L)
    if system.B.shape[1] != len(system.C):
        raise ValueError(f"L has {system.B.shape[1]} inputs and {len(system.C)} outputs, expected as many of each")
    if np.linalg.cond(np.eye(len(system.D)) + system.D) > 1 / NONE:
        raise ValueError("1 + D is singular, so that the closed loop has no solution; D is what L passes on at once")
    return system


def gain_margins(system: LTI) -> tuple[np.ndarray, np.ndarray]:
    """All factors on L that take a pole to the boundary, and the frequencies of these poles, both [crossing].

    In continuous time a pole may go there at infinity, where 1 + factor D = 0.
    """
    ends = _ends(system)
    omega = np.append(_crossings(system, _on_real_axis, lambda value: value.imag, ends), ends)
    values = _values(system, omega).real
    if system.dt is None:
        omega, values = np.append(omega, np.inf), np.append(values, system.D[0, 0])
    negative = values < -NONE
    return -1 / values[negative], omega[negative]


def disk_margins(L: Any, omega: Any = None, skew: float = 0.0, returnall: bool = False) -> DiskMargins:
    """How much gain and phase of all channels of a loop may change at once.

        alpha = 1 / max over omega of mu(S + (skew - 1) / 2),    S = (1 + L)^{-1}

    The loop stays stable where channel i has a factor (1 + (1 - skew) d_i / 2) / (1 - (1 + skew) d_i / 2) with any
    |d_i| < alpha. mu is that of diagonal complex d; of several channels its upper bound by scaling, so that alpha is no
    larger than it should be; up to three channels it is exact. It is a margin where the closed loop is stable.

    Args:
        L: a square `LTI`, or what `LTI` takes.
        omega: frequencies [omega] at which to look; where the worst is when None, found by search.
        skew: 0 for balanced disks, 1 for those of S, -1 for those of the complementary sensitivity.
        returnall: give arrays over omega.

    Raises:
        TypeError, ValueError: no system, one that is not square, or `returnall` without omega.
    Source: Seiler, Packard, Gahinet, "An introduction to disk margins", IEEE Control Systems Magazine 40, 78 (2020).

    >>> from kpflow_dyn import control
    >>> double = control.LTI([[0.0, 1.0], [0.0, 0.0]], [0.0, 1.0], [[1.0, 3.0 ** 0.5]])  # an optimal regulator's loop
    >>> found = control.disk_margins(double, skew=1.0)
    >>> round(found.margin, 4)
    1.0
    """
    system = _well_posed(L)
    if omega is None and returnall:
        raise ValueError("returnall needs the frequencies omega=")
    if omega is None:
        return _judged(DiskMargins(*(float(a) for a in _of_disk(np.array(worst_disk(system, skew)), skew))), system)
    margin, gain, phase = _of_disk(1 / _mu(_balanced(system, np.asarray(omega, float), skew)), skew)
    found = (margin, gain, phase) if returnall else (float(a.min()) for a in (margin, gain, phase))
    return _judged(DiskMargins(*found), system)


def worst_disk(system: LTI, skew: float = 0.0) -> float:
    """The disk margin, over all frequencies."""
    of = lambda omega: -_mu(_balanced(system, omega, skew))  # noqa: E731
    largest = -_smallest(of, _grid(system))[1]
    if system.dt is None:
        far = np.linalg.inv(np.eye(len(system.D)) + system.D) + (skew - 1) / 2 * np.eye(len(system.D))
        largest = max(largest, float(_mu(far[None].astype(complex))[0]))
    return 1 / largest if largest else np.inf


def _of_disk(margin: np.ndarray, skew: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Margins of gain (dB) and phase (degrees) of disks of this size: where they meet the real axis and the circle."""
    with np.errstate(divide="ignore", invalid="ignore"):
        low = (1 - margin * (1 - skew) / 2) / (1 + margin * (1 + skew) / 2)
        high = (1 + margin * (1 - skew) / 2) / (1 - margin * (1 + skew) / 2)
        gain = 20 * np.log10(np.minimum(1 / low, high))
        cosine = np.where(np.isinf(high), 0.0, (1 + low * high) / (low + high))
        phase = np.where(abs(cosine) >= 1, np.inf, np.degrees(np.arccos(np.clip(cosine, -1, 1))))
    return margin, np.where(np.isnan(gain), np.inf, gain), phase


def _balanced(system: LTI, omega: np.ndarray, skew: float) -> np.ndarray:
    """S + (skew - 1) / 2 at frequencies [omega, channel, channel], of the closed loop: it need not have L's poles."""
    return response_at(_closed(system), omega) + (skew - 1) / 2 * np.eye(len(system.D))


def _closed(system: LTI) -> LTI:
    """S = (1 + L)^{-1}."""
    inner = np.linalg.inv(np.eye(len(system.D)) + system.D)
    A = system.A - system.B @ inner @ system.C
    return LTI(A, system.B @ inner, -inner @ system.C, inner, system.dt, system.names)


def _mu(M: np.ndarray) -> np.ndarray:
    """The least largest singular value of D M D^{-1} over diagonal D [omega], for M [omega, channel, channel].

    It is convex in log D: each channel's is searched for by golden sections, one after the other, at all frequencies.
    """
    channels = M.shape[-1]
    if channels == 1:
        return np.abs(M[:, 0, 0])
    logs = _osborne(M)

    def norm(logs: np.ndarray) -> np.ndarray:
        scaled = M * np.exp(logs[:, :, None] - logs[:, None, :])
        return np.linalg.norm(scaled, 2, (1, 2))

    for sweep in range(SWEEPS if channels > 2 else 1):
        for i in range(1, channels):
            logs[:, i] = _golden(lambda value, i=i: norm(_with(logs, i, value)), logs[:, i], 3.0 / 4**sweep)
    return norm(logs)


def _with(logs: np.ndarray, i: int, value: np.ndarray) -> np.ndarray:
    changed = logs.copy()
    changed[:, i] = value
    return changed


def _osborne(M: np.ndarray, sweeps: int = 10) -> np.ndarray:
    """log D that makes rows and columns of D M D^{-1} of equal size [omega, channel]."""
    size = np.abs(M) ** 2 * (1 - np.eye(M.shape[-1]))
    logs = np.zeros(M.shape[:2])
    for _ in range(sweeps):
        for i in range(M.shape[-1]):
            scaled = size * np.exp(2 * (logs[:, :, None] - logs[:, None, :]))
            row, column = scaled[:, i].sum(-1), scaled[:, :, i].sum(-1)
            both = (row > 0) & (column > 0)
            ratio = np.where(both, column, 1) / np.where(both, row, 1)
            logs[:, i] += np.clip(np.log(ratio) / 4, -20, 20)
    return logs - logs[:, :1]


def _golden(of: Callable[[np.ndarray], np.ndarray], middle: np.ndarray, width: float) -> np.ndarray:
    """Where a convex function is least, each entry by itself, within `width` of the middle."""
    part = (5**0.5 - 1) / 2
    low, high = middle - width, middle + width
    for _ in range(HALVINGS):
        a, b = high - part * (high - low), low + part * (high - low)
        left = of(a) < of(b)
        low, high = np.where(left, low, a), np.where(left, b, high)
    return (low + high) / 2


# Frequencies


def _values(system: LTI, omega: np.ndarray) -> np.ndarray:
    return response_at(system, np.atleast_1d(omega))[:, 0, 0] if np.size(omega) else np.zeros(0, complex)


def _ends(system: LTI) -> np.ndarray:
    """The frequencies at which a response is real anyway: zero, and half of the sampling rate; none that is a pole."""
    ends = np.array([0.0] if system.dt is None else [0.0, np.pi / system.dt])
    return ends[~are_poles(system, ends)]


def _grid(system: LTI) -> np.ndarray:
    """Frequencies that follow the poles of the open and of the closed loop."""
    closed = _closed(system)
    rates: Any = np.concatenate([one.poles if one.dt is None else _rates(one) for one in (system, closed)])
    near = np.abs(rates.imag)[:, None] + np.abs(rates.real)[:, None] * np.linspace(-2, 2, 17)
    limit = np.inf if system.dt is None else np.pi / system.dt
    both = np.concatenate([some_frequencies(system, 30), some_frequencies(closed, 30), near.ravel(), _ends(system)])
    both = np.unique(both[(both >= 0) & (both <= limit)])
    return both[~(are_poles(system, both) | are_poles(closed, both))]


def _rates(system: LTI) -> np.ndarray:
    poles = system.poles[np.abs(system.poles) > 1e-12]
    return np.log(poles) / float(system.dt or 1)


def _smallest(of: Callable[[np.ndarray], np.ndarray], grid: np.ndarray) -> tuple[float, float]:
    """Where a function of frequency is least, and how much it is: the best of a grid, then within its neighbours."""
    values = of(grid)
    best = int(np.argmin(values))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    inner = minimize_scalar(lambda omega: float(of(np.array([omega]))[0]), bounds=(low, high), method="bounded",
                            options={"xatol": 1e-9 * max(high, 1e-300)})  # fmt: skip
    if inner.fun < values[best]:
        return float(inner.x), float(inner.fun)
    return float(grid[best]), float(values[best])


def _crossings(
    system: LTI,
    pencil: Callable[[LTI], tuple[np.ndarray, np.ndarray]],
    sign: Callable[[np.ndarray], np.ndarray],
    ends: np.ndarray,
) -> np.ndarray:
    """The frequencies where sign(L) is zero, of the pencil's eigenvalues on the boundary of stability."""
    tested = _values(system, _grid(system))
    if (np.abs(sign(tested)) <= REAL * np.abs(tested)).all():  # of each, as L is very large near a pole
        return np.zeros(0)  # everywhere: L is real, or of size one, at all frequencies
    found: Any = eig(*pencil(system), right=False)
    found = found[np.isfinite(found) & (np.abs(found) < 1e12)]
    if system.dt is not None:
        found = np.log(found[np.abs(found) > 1e-12]) / float(system.dt)
    on_boundary = np.abs(found.real) <= NEAR * np.maximum(np.abs(found), 1e-12)
    limit = np.inf if system.dt is None else np.pi / system.dt * (1 - 1e-9)
    candidates = [omega for omega in np.sort(found.imag[on_boundary]) if 1e-9 < omega < limit]
    polished = [_polished(system, sign, omega) for omega in candidates]
    kept: list[float] = []
    for omega in polished:
        if omega is not None and not any(abs(omega - other) <= 1e-7 * omega for other in [*kept, *ends]):
            kept.append(omega)
    return np.array(kept)


def _polished(system: LTI, sign: Callable[[np.ndarray], np.ndarray], omega: float) -> float | None:
    """The zero next to a candidate; None where there is none."""
    low, high = omega * (1 - NEAR), omega * (1 + NEAR)
    if are_poles(system, np.array([low, omega, high]), DEFECTIVE).any():
        return None
    of = lambda at: float(sign(_values(system, np.array([at])))[0])  # noqa: E731
    if of(low) * of(high) < 0:
        return cast(float, brentq(of, low, high, xtol=1e-14 * omega))
    return omega if abs(of(omega)) <= REAL * abs(_values(system, np.array([omega]))[0]) else None


def _on_real_axis(system: LTI) -> tuple[np.ndarray, np.ndarray]:
    """M - s N, singular where L(s) = L(-s), in discrete time where L(z) = L(1 / z)."""
    A, B, C = system.A, system.B, system.C
    last = np.concatenate([C, -C, np.zeros((1, 1))], 1)
    return _pencil(system, np.concatenate([A, 0 * A, B], 1), last)


def _of_size_one(system: LTI) -> tuple[np.ndarray, np.ndarray]:
    """The same where L(s) L(-s) = 1, or L(z) L(1 / z) = 1."""
    A, B, C, D = system.A, system.B, system.C, system.D
    last = np.concatenate([C, D @ C, D @ D - 1], 1)
    return _pencil(system, np.concatenate([A, B @ C, B @ D], 1), last)


def _pencil(system: LTI, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the states of L, of the states of its mirror image, and of the output."""
    A, B, n = system.A, system.B, len(system.A)
    N = np.zeros((2 * n + 1, 2 * n + 1))
    N[:n, :n] = np.eye(n)
    if system.dt is None:
        mirror = np.concatenate([0 * A, A, B], 1)
        N[n : 2 * n, n : 2 * n] = -np.eye(n)
    else:
        mirror = np.concatenate([0 * A, np.eye(n), 0 * B], 1)
        N[n : 2 * n, n:] = np.concatenate([A, B], 1)
    return np.concatenate([first, mirror, last]), N
