"""Tasks that ask what the inputs were: the last pulse, or the value so many steps ago."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpflow_dyn.tasks._data import TaskData, check_at_least, check_counts, count, with_noise


@dataclass(frozen=True)
class FlipFlop:
    """Remember the sign of the last pulse on each channel.

        inputs   pulses of +1 or -1, else 0       bits channels
        targets  the sign of the last pulse       bits channels

    The first step has a pulse on every channel, so that the memory is defined from the start.

    Args:
        bits: how many channels.
        steps: the length of a trial.
        rate: the probability of a pulse at a step of a channel.
        dt: milliseconds of a step.
        noise: the standard deviation of Gaussian noise on every input.

    Raises as `MemoryPro`.

    Source: Sussillo, Barak, Neural Computation 25, 626 (2013).

    Example:
        >>> FlipFlop(bits=3).sample(trials=8, seed=0).targets.shape
        (8, 60, 3)
    """

    bits: int = 3
    steps: int = 60
    rate: float = 0.1
    dt: float = 20.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, bits=1, steps=1)
        check_at_least("noise", self.noise, 0)
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a probability, between 0 and 1, got {self.rate}")

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of `steps` steps."""
        rng = np.random.default_rng(seed)
        shape = (count(trials), self.steps, self.bits)
        pulsed = rng.random(shape) < self.rate
        pulsed[:, 0] = True
        pulses = np.where(pulsed, rng.choice([-1.0, 1.0], shape), 0.0)
        last = np.maximum.accumulate(np.where(pulsed, np.arange(self.steps)[:, None], 0), axis=1)  # time of last pulse
        targets = np.take_along_axis(pulses, last, axis=1)
        return TaskData(with_noise(pulses, self.noise, rng), targets, None, {}, "flipflop", self.dt)


@dataclass(frozen=True)
class Lag:
    """Say what the input was `lag` steps ago.

        inputs   white Gaussian signals s(t) of variance 1, and noise     channels
        targets  s(t - lag)                                               channels

    The mask is False in the first `lag` steps, whose targets (zeros) do not exist yet.

    Args:
        lag: in steps.
        steps: the length of a trial.
        channels: how many signals.
        noise: the standard deviation of Gaussian noise on every input.
        dt: milliseconds of a step.

    Raises as `MemoryPro`.

    Source: White, Lee, Sompolinsky, Phys. Rev. Lett. 92, 148102 (2004); Jaeger, GMD Report 152 (2001).

    Example:
        >>> Lag(lag=5).sample(trials=8, seed=0).mask.sum(axis=1)[0]
        np.int64(55)
    """

    lag: int = 10
    steps: int = 60
    channels: int = 1
    noise: float = 0.0
    dt: float = 20.0

    def __post_init__(self) -> None:
        check_counts(self, lag=0, steps=1, channels=1)
        check_at_least("noise", self.noise, 0)
        if self.lag >= self.steps:
            raise ValueError(f"lag must be less than steps = {self.steps}, or no target exists; got {self.lag}")

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of `steps` steps."""
        rng = np.random.default_rng(seed)
        signal = rng.standard_normal((count(trials), self.steps, self.channels))
        targets = np.zeros_like(signal)
        targets[:, self.lag :] = signal[:, : self.steps - self.lag]
        mask = np.ones(signal.shape[:2], bool)
        mask[:, : self.lag] = False
        return TaskData(with_noise(signal, self.noise, rng), targets, mask, {}, "lag", self.dt)
