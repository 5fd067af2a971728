"""Reaches of a hand to targets around it."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kpflow_dyn.tasks._data import Generated, Trials


@dataclass(frozen=True)
class Reaching(Generated):
    """Reach from the centre to a target, when told to go, on the path of least jerk.

        inputs   target x, y (from the preparation on), and a hold signal that goes off at the go     3 channels
        targets  hand x, y                                                                            2 channels

    The hand moves by r (10 s^3 - 15 s^4 + 6 s^5), s = 0 ... 1 over the movement period, to r = (x, y) on the unit
    circle, and rests there. `labels` holds "angle" [trial].

    Args:
        hold, preparation, movement, rest: the periods, in steps.
        directions: of the targets, which part the circle equally; each trial has one of them, drawn at random.

    Raises as `MemoryPro`.
    Source: Georgopoulos, Kalaska, Caminiti, Massey, J. Neuroscience 2, 1527 (1982), with the preparation of Sussillo,
    Churchland, Kaufman, Shenoy, Nature Neuroscience 18, 1025 (2015); the path is that of Flash, Hogan, J. Neuroscience
    5, 1688 (1985).

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

    _least: ClassVar = {"hold": 0, "preparation": 0, "movement": 1, "rest": 0, "directions": 1}

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        angle = 2 * np.pi / self.directions * rng.integers(self.directions, size=trials)
        there = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]  # [trial, 1, 2]
        go = self.hold + self.preparation
        inputs = np.zeros((trials, go + self.movement + self.rest, 3))
        inputs[:, self.hold :, :2] = there
        inputs[:, :go, 2] = 1
        s = np.clip((np.arange(inputs.shape[1]) - go + 1) / self.movement, 0, 1)[:, None]
        return inputs, there * (10 * s**3 - 15 * s**4 + 6 * s**5), None, {"angle": angle}

    def _entries(self) -> int:
        return 3 * (self.hold + self.preparation + self.movement + self.rest)

    def _named_outputs(self) -> tuple[str, ...]:
        return "hand x", "hand y"
