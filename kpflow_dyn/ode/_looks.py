"""The conditions of events along steps, by their dense output, at as many points as show how they move.

The points are doubled until the conditions at others between them are where a cubic through their neighbours says, or
so far from zero that this does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kpflow_dyn.ode._libraries import Failed

MOST = 64  # times as many looks at one step as at first
BETWEEN = 0.382  # where between two looks another one tests the cubic
CLEAR = 0.25  # what it may be off, in units of how far the condition is from zero

Steps = dict[str, np.ndarray]


class Trial(Protocol):
    """What is asked of a model on one trial.

    dense       the states in a step at parts of its length [n]: [n, unit].
    step_to     the states [1, n, unit] at lengths [n] from the beginning of a step.
    conditions  of all events that have one, at times [n] of states [1, n, unit]: [n, event].
    """

    def dense(self, steps: Steps, parts: np.ndarray) -> np.ndarray: ...
    def step_to(self, steps: Steps, place: int, lengths: np.ndarray) -> np.ndarray: ...
    def conditions(self, times: np.ndarray, states: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Looks:
    """Looks at the steps of a trial, at this number of parts of each at first."""

    trial: Trial
    count: int

    def at(self, steps: Steps, times_more: int = 1) -> np.ndarray:
        """The conditions in each step, at its parts and between these [step, look, event]."""
        parts = parts_of(times_more * self.count)
        states = self.trial.dense(steps, parts)  # [step, look, unit]
        times = steps["t"][:, :1] + parts * (steps["end"] - steps["t"])[:, :1]
        flat = states.reshape(1, -1, states.shape[-1])
        c = self.trial.conditions(times.ravel(), flat).reshape(*times.shape, -1)
        check_finite(c, times)
        return c

    def resolved(self, steps: Steps, place: int, c: np.ndarray, small: np.ndarray) -> np.ndarray:
        """The conditions [look, event] in one step, at more looks where needed; what is smaller is zero [event]."""
        alone, times_more = {name: values[place : place + 1] for name, values in steps.items()}, 1
        while times_more < MOST and _is_hidden(c, small):
            times_more *= 2
            c = self.at(alone, times_more)[0]
        return c


def parts_of(count: int) -> np.ndarray:
    """The parts of a step at which it is looked at: evenly, and between any two of these."""
    even = np.arange(count + 1) / count
    return np.sort(np.append(even, even[:-1] + BETWEEN / count))


def _is_hidden(c: np.ndarray, small: np.ndarray) -> bool:
    """Whether conditions [look, event] may be across zero between two looks, as they move in ways not yet seen."""
    at, between = c[::2], c[1::2]
    stays = (at[:-1] * at[1:] > 0) & (at[:-1] * between > 0)
    clear = CLEAR * np.minimum(np.abs(at[1:]), np.abs(at[:-1]))
    off = np.abs(between - _cubic(at))
    return bool((stays & (off > np.maximum(clear, small))).any())


def _cubic(at: np.ndarray) -> np.ndarray:
    """Where the cubics through four neighbours of the values at even looks [look, event] are in between."""
    count = len(at) - 1
    first = np.clip(np.arange(count) - 1, 0, count - 3)
    along = np.arange(count) + BETWEEN - first
    weights = [np.prod([(along - k) / (j - k) for k in range(4) if k != j], axis=0) for j in range(4)]
    return np.sum([w[:, None] * at[first + j] for j, w in enumerate(weights)], axis=0)


def check_finite(c: np.ndarray, times: np.ndarray) -> None:
    """Raise where conditions [..., event] at these times [...] are not finite."""
    bad = ~np.isfinite(c).reshape(times.size, -1).all(1)
    if bad.any():
        raise Failed({0: ("has a condition that is not finite", float(times.ravel()[bad.argmax()]))}, apart=True)
