"""Tasks that ask what the inputs were: the last pulse, or the value so many steps ago."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kpflow_dyn.tasks._data import Generated, Trials


@dataclass(frozen=True)
class FlipFlop(Generated):
    """Remember the sign of the last pulse on each channel.

        inputs   the pulses                       bits channels
        targets  the sign of the last pulse       bits channels

    At each step each channel carries a pulse of +1 or -1, or 0. The first step has a pulse on every channel, so that
    the memory is defined from the start.

    Args:
        bits: number of channels.
        steps: of a trial.
        rate: the probability of a pulse.

    Raises as `MemoryPro`.
    Source: Sussillo, Barak, Neural Computation 25, 626 (2013).

    >>> FlipFlop(bits=3).sample(trials=8, seed=0).targets.shape
    (8, 60, 3)
    """

    bits: int = 3
    steps: int = 60
    rate: float = 0.1
    dt: float = 20.0
    noise: float = 0.0

    _least: ClassVar = {"bits": 1, "steps": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.rate <= 1:
            raise ValueError(f"rate is a probability, between 0 and 1, got {self.rate}")

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        shape = (trials, self.steps, self.bits)
        pulsed = rng.random(shape) < self.rate
        pulsed[:, 0] = True
        pulses = np.where(pulsed, rng.choice([-1.0, 1.0], shape), 0.0)
        last = np.maximum.accumulate(np.where(pulsed, np.arange(self.steps)[:, None], 0), axis=1)  # time of last pulse
        return pulses, np.take_along_axis(pulses, last, axis=1), None, {}

    def _entries(self) -> int:
        return self.steps * self.bits

    def _named_outputs(self) -> tuple[str, ...]:
        return tuple(f"bit {i + 1}" for i in range(self.bits))


@dataclass(frozen=True)
class Lag(Generated):
    """Say what the input was `lag` steps ago.

        inputs   white Gaussian signals s(t) of variance 1, and noise     channels
        targets  s(t - lag)                                               channels

    The mask is False in the first `lag` steps, whose targets (zeros) do not exist yet.

    Args:
        lag: steps back, less than `steps`.
        steps: of a trial.
        channels: number of signals.
        noise: its standard deviation; the targets have none.

    Raises as `MemoryPro`.
    Source: White, Lee, Sompolinsky, Phys. Rev. Lett. 92, 148102 (2004); Jaeger, GMD Report 152 (2001).

    >>> Lag(lag=5).sample(trials=8, seed=0).mask.sum(axis=1)[0]
    np.int64(55)
    """

    lag: int = 10
    steps: int = 60
    channels: int = 1
    noise: float = 0.0
    dt: float = 20.0

    _least: ClassVar = {"lag": 0, "steps": 1, "channels": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag >= self.steps:
            raise ValueError(f"lag must be less than steps = {self.steps}, or no target exists; got {self.lag}")

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        signal = rng.standard_normal((trials, self.steps, self.channels))
        targets = np.zeros_like(signal)
        targets[:, self.lag :] = signal[:, : self.steps - self.lag]
        mask = np.tile(np.arange(self.steps) >= self.lag, (trials, 1))
        return signal, targets, mask, {}

    def _entries(self) -> int:
        return self.steps * self.channels
