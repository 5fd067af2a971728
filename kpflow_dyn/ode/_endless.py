"""Why a trial with events does not get further: a surface that holds it or tears its flow, or events without end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kpflow_dyn.ode._surfaces import AT_ONCE, Surfaces

NEAR = 1e-3  # part of the span: a surface that is reached in less may be what stops a solver
PILING = 0.999  # time between two events, in units of that before

Rate = Callable[[np.ndarray], np.ndarray]


def holding(surfaces: Surfaces, now: float, y: np.ndarray, rate: Rate) -> int | None:
    """The event whose surface is near [trial, unit] and pushes the trial back from both sides, by rates there."""

    def slope(z: np.ndarray) -> np.ndarray:
        return (surfaces.at(now, z + step * rate(z)) - surfaces.at(now, z)) / step

    step = 1e-7 * surfaces.span
    c, towards = surfaces.at(now, y), slope(y)
    for n, number in enumerate(surfaces.numbers):
        length = -2 * c[n] / towards[n] if towards[n] else np.inf  # to the other side, and as far behind it
        if 0 <= length < NEAR * surfaces.span:
            beyond = y + max(length, step) * rate(y)
            if surfaces.at(now, beyond)[n] * towards[n] > 0 > slope(beyond)[n] * towards[n]:
                return number
    return None


def is_torn(now_on: np.ndarray, rate: Rate, near: float) -> bool:
    """Whether the flow jumps at a state [trial, unit], as on a surface where it is another one on each side."""
    f = rate(now_on)
    far, close = (np.abs(rate(now_on + d * f) - rate(now_on - d * f)).max() for d in (near, near / 10))
    return bool(close > 1e-3 * np.abs(f).max() and close > far / 2)


def pile_of(times: list[float]) -> float | None:
    """Where times of events pile up that come ever faster, as a geometric series; None where they do not."""
    between = np.diff(times[-6:])
    if len(between) < 3 or (between <= 0).any():
        return None
    ratio = between[1:] / between[:-1]
    return times[-1] + between[-1] * ratio[-1] / (1 - ratio[-1]) if (ratio < PILING).all() else None


def spacing(times: list[float]) -> str:
    """How far apart the last events were."""
    return f", the last ones {np.diff(times[-AT_ONCE:]).mean():.3g} apart"
