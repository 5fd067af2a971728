"""Reaches of a hand to targets around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpflow_dyn.tasks._data import TaskData, check_at_least, check_counts, count, with_noise


@dataclass(frozen=True)
class Reaching:
    """Reach from the centre to a target, when told to go, on the path of least jerk.

        inputs   target x, y (from the preparation on), and a hold signal that goes off at the go     3 channels
        targets  hand x, y                                                                            2 channels

    The hand moves by r (10 s^3 - 15 s^4 + 6 s^5), s = 0 ... 1 over the movement period, to r = (x, y), and rests there.
    Each trial has one of the targets, drawn at random. `labels` holds "angle" [trial].

    Args:
        hold, preparation, movement, rest: the length of each period in steps.
        directions: how many targets there are, at equal distances on the unit circle.
        noise: the standard deviation of Gaussian noise on every input.
        dt: milliseconds of a step.

    Raises as `MemoryPro`.

    Source: Georgopoulos, Kalaska, Caminiti, Massey, J. Neuroscience 2, 1527 (1982), with the preparation of Sussillo,
    Churchland, Kaufman, Shenoy, Nature Neuroscience 18, 1025 (2015); the path is that of Flash, Hogan, J. Neuroscience
    5, 1688 (1985).

    Example:
        >>> Reaching().sample(trials=8, seed=0).targets.shape
        (8, 80, 2)
    """

    hold: int = 10
    preparation: int = 30
    movement: int = 30
    rest: int = 10
    directions: int = 8
    noise: float = 0.0
    dt: float = 20.0

    def __post_init__(self) -> None:
        check_counts(self, hold=0, preparation=0, movement=1, rest=0, directions=1)
        check_at_least("noise", self.noise, 0)

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of hold + preparation + movement + rest steps."""
        rng = np.random.default_rng(seed)
        angle = 2 * np.pi / self.directions * rng.integers(self.directions, size=count(trials))
        there = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]  # [trial, 1, 2]
        go = self.hold + self.preparation
        inputs = np.zeros((len(angle), go + self.movement + self.rest, 3))
        inputs[:, self.hold :, :2] = there
        inputs[:, :go, 2] = 1
        s = np.clip((np.arange(inputs.shape[1]) - go + 1) / self.movement, 0, 1)[:, None]
        targets = there * (10 * s**3 - 15 * s**4 + 6 * s**5)
        return TaskData(with_noise(inputs, self.noise, rng), targets, None, {"angle": angle}, "reaching", self.dt)
