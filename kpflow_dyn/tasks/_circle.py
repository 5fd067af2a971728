"""Tasks on a circle: a direction is shown, and after a delay answered, as it was or turned by pi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kpflow_dyn.tasks._data import TaskData, check_at_least, check_counts, count, with_noise


@dataclass(frozen=True)
class MemoryPro:
    """Respond, after a delay, in the direction that was shown.

    An angle, uniform on the circle, is shown in the stimulus period and gone in the memory period; the response starts
    when the fixation input goes off. `labels` holds "angle" [trial].

        inputs   fixation, cos(angle), sin(angle)           3 channels
        targets  fixation, cos(angle), sin(angle)           3 channels, the last two in the response period only

    Args:
        fixation, stimulus, memory, response: the length of each period in steps.
        noise: the standard deviation of Gaussian noise on every input.
        dt: milliseconds of a step.

    Raises:
        TypeError, ValueError: an option that is out of its range, or no whole number where steps are counted.

    Source: Driscoll, Shenoy, Sussillo, Nature Neuroscience 27, 1349 (2024), after Yang et al., Nature Neuroscience 22,
    297 (2019).

    Example:
        >>> MemoryPro(memory=30).sample(trials=8, seed=0).inputs.shape
        (8, 80, 3)
    """

    fixation: int = 10
    stimulus: int = 20
    memory: int = 40
    response: int = 20
    noise: float = 0.0
    dt: float = 20.0

    _sign: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_counts(self, fixation=0, stimulus=1, memory=0, response=1)
        check_at_least("noise", self.noise, 0)

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of fixation + stimulus + memory + response steps."""
        return _sample(self, trials, seed)

    def _course(self, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gone = self.fixation + self.stimulus
        go = gone + self.memory
        return _course(angle, self._sign, slice(self.fixation, gone), go, go + self.response)


@dataclass(frozen=True)
class MemoryAnti(MemoryPro):
    """`MemoryPro` with the opposite response, target = -(cos(angle), sin(angle)).

    Args, Raises and Source as `MemoryPro`.

    Example:
        >>> MemoryAnti().sample(trials=8, seed=0).targets.shape
        (8, 90, 3)
    """

    _sign: ClassVar[int] = -1


@dataclass(frozen=True)
class DelayPro:
    """Respond in the direction that is shown, but wait for the fixation input to go off ("Go" in Yang et al., 2019).

        inputs   fixation, cos(angle), sin(angle), to the end of the trial      3 channels
        targets  as in `MemoryPro`                                              3 channels

    Args:
        fixation, stimulus, response: the length of each period in steps; the stimulus stays on after its own.
        noise: the standard deviation of Gaussian noise on every input.
        dt: milliseconds of a step.

    Raises and Source as `MemoryPro`.

    Example:
        >>> DelayPro(stimulus=60).sample(trials=8, seed=0).inputs.shape
        (8, 90, 3)
    """

    fixation: int = 10
    stimulus: int = 60
    response: int = 20
    noise: float = 0.0
    dt: float = 20.0

    _sign: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_counts(self, fixation=0, stimulus=1, response=1)
        check_at_least("noise", self.noise, 0)

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of fixation + stimulus + response steps."""
        return _sample(self, trials, seed)

    def _course(self, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        go = self.fixation + self.stimulus
        return _course(angle, self._sign, slice(self.fixation, None), go, go + self.response)


@dataclass(frozen=True)
class DelayAnti(DelayPro):
    """`DelayPro` with the opposite response, target = -(cos(angle), sin(angle)).

    Args, Raises and Source as `DelayPro`.

    Example:
        >>> DelayAnti().sample(trials=8, seed=0).targets.shape
        (8, 90, 3)
    """

    _sign: ClassVar[int] = -1


@dataclass(frozen=True)
class FourTasks:
    """MemoryPro, MemoryAnti, DelayPro and DelayAnti in turn, each trial told by a rule input which one it is.

        inputs   fixation, cos(angle), sin(angle), four rules     7 channels, one rule being 1 throughout
        targets  as in each task                                  3 channels

    All trials have the periods of `MemoryPro`. As many trials have each rule, in random order. `labels` holds "angle"
    and "rule" [trial], the rule being the number of its input: 0 to 3 in the order above.

    Args, Raises and Source as `MemoryPro`.

    Example:
        >>> FourTasks().sample(trials=8, seed=0).inputs.shape
        (8, 90, 7)
    """

    fixation: int = 10
    stimulus: int = 20
    memory: int = 40
    response: int = 20
    noise: float = 0.0
    dt: float = 20.0

    def __post_init__(self) -> None:
        check_counts(self, fixation=0, stimulus=1, memory=0, response=1)
        check_at_least("noise", self.noise, 0)

    def sample(self, trials: int | None = None, seed: int = 0) -> TaskData:
        """Trials of fixation + stimulus + memory + response steps."""
        rng = np.random.default_rng(seed)
        angle = rng.uniform(0, 2 * np.pi, count(trials))
        rule = rng.permutation(np.arange(len(angle)) % 4)
        courses = [task._course(angle) for task in self._tasks()]
        inputs, targets = (np.choose(rule[:, None, None], arrays) for arrays in zip(*courses, strict=True))
        rules = np.broadcast_to(np.eye(4)[rule][:, None], (*inputs.shape[:2], 4))
        inputs = with_noise(np.concatenate([inputs, rules], axis=-1), self.noise, rng)
        return TaskData(inputs, targets, None, {"angle": angle, "rule": rule}, "fourtasks", self.dt)

    def _tasks(self) -> tuple[MemoryPro, MemoryPro, DelayPro, DelayPro]:
        memory = (self.fixation, self.stimulus, self.memory, self.response)
        delay = (self.fixation, self.stimulus + self.memory, self.response)
        return MemoryPro(*memory), MemoryAnti(*memory), DelayPro(*delay), DelayAnti(*delay)


def _course(angle: np.ndarray, sign: int, shown: slice, go: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets [trial, time, 3] without noise."""
    direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]  # [trial, 1, 2]
    inputs = np.zeros((len(angle), steps, 3))
    inputs[:, :go, 0] = 1
    targets = inputs.copy()
    inputs[:, shown, 1:] = direction
    targets[:, go:, 1:] = sign * direction
    return inputs, targets


def _sample(task: MemoryPro | DelayPro, trials: int | None, seed: int) -> TaskData:
    rng = np.random.default_rng(seed)
    angle = rng.uniform(0, 2 * np.pi, count(trials))
    inputs, targets = task._course(angle)
    inputs = with_noise(inputs, task.noise, rng)
    return TaskData(inputs, targets, None, {"angle": angle}, type(task).__name__.lower(), task.dt)
