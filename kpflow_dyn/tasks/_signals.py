"""Tasks of signals: one to be continued, one to be made."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import expm

from kpflow_dyn.tasks._data import Generated, Trials, check_at_least


@dataclass(frozen=True)
class LowRankForecast(Generated):
    """Say what a linear system of few dimensions, seen through many channels, does next.

        y(t + 1) = A y(t)    inputs C y(t), and noise    targets C y(t + horizon)    y [rank], C [channels, rank]

    A turns y in random planes, and the columns of C are orthogonal. Each trial starts from another y(0), normal, with
    which a channel's mean square is 1.

    Args:
        channels, rank: sizes of C.
        steps: of a trial.
        horizon: how many steps ahead.
        period: steps of the fastest turn.
        system: the seed of A and C, so that all trials of a task, also those of other seeds, are of one system.

    Raises as `MemoryPro`.
    Source: the linear dynamical systems of Churchland et al., Nature 487, 51 (2012), as a signal to be forecast.

    >>> LowRankForecast(channels=12).sample(trials=8, seed=0).inputs.shape
    (8, 60, 12)
    """

    channels: int = 10
    rank: int = 4
    steps: int = 60
    horizon: int = 5
    period: float = 20.0
    system: int = 0
    noise: float = 0.0
    dt: float = 20.0

    _least: ClassVar = {"channels": 2, "rank": 2, "steps": 1, "horizon": 0, "system": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("period", self.period, 2)
        if self.rank > self.channels:
            raise ValueError(f"rank must be at most channels = {self.channels}, got {self.rank}")

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        A, C = self._system()
        states = [rng.standard_normal((trials, self.rank)) / np.sqrt(self.rank)]
        for _ in range(1, self.steps + self.horizon):
            states.append(states[-1] @ A.T)
        signal = np.stack(states, axis=1) @ C.T  # [trial, time, channel]
        return signal[:, : self.steps], signal[:, self.horizon :], None, {}

    def _entries(self) -> int:
        return (self.steps + self.horizon) * self.channels

    def _system(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.system)
        M = rng.standard_normal((self.rank, self.rank))
        turn = M - M.T
        A = expm(2 * np.pi / self.period * turn / np.linalg.norm(turn, 2))
        C = np.linalg.qr(rng.standard_normal((self.channels, self.rank)))[0] * np.sqrt(self.channels)
        return A, C


@dataclass(frozen=True)
class Sine(Generated):
    """Make a sine wave of the frequency that a constant input stands for.

        inputs   j / frequencies + 1/4, and noise       1 channel, j = 1 ... frequencies
        targets  sin(w_j t), t = 0, 1, ... steps        1 channel

    The w_j lie at equal distances; each trial has one of them, drawn at random. `labels` holds "omega" [trial], in
    radians per step.

    Args:
        frequencies: how many there are.
        slowest, fastest: the longest and the shortest period 2 pi / w_j, in steps.
        steps: of a trial.

    Raises as `MemoryPro`.
    Source: Sussillo, Barak, Neural Computation 25, 626 (2013).

    >>> Sine(steps=80).sample(trials=8, seed=0).targets.shape
    (8, 80, 1)
    """

    frequencies: int = 51
    slowest: float = 100.0
    fastest: float = 20.0
    steps: int = 100
    noise: float = 0.0
    dt: float = 20.0

    _least: ClassVar = {"frequencies": 1, "steps": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("fastest", self.fastest, 2)
        check_at_least("slowest", self.slowest, self.fastest)

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        which = rng.integers(self.frequencies, size=trials)
        omega = np.linspace(2 * np.pi / self.slowest, 2 * np.pi / self.fastest, self.frequencies)[which]
        targets = np.sin(omega[:, None] * np.arange(self.steps))[..., None]
        level = np.broadcast_to(((which + 1) / self.frequencies + 0.25)[:, None, None], targets.shape)
        return level, targets, None, {"omega": omega}

    def _entries(self) -> int:
        return self.steps + self.frequencies
