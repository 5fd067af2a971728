"""Tasks on a circle: a direction is shown, and after a delay answered, as it was or turned by pi."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kpflow_dyn.tasks._data import Generated, Trials


class _Directions(Generated):
    """An angle, uniform on the circle, is shown, and answered when the fixation input goes off."""

    _sign: ClassVar[int] = 1

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        angle = rng.uniform(0, 2 * np.pi, trials)
        return *self._course(angle), None, {"angle": angle}

    def _course(self, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets [trial, time, 3]."""
        shown, gone, go, end = self._times()
        direction = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None]  # [trial, 1, 2]
        inputs = np.zeros((len(angle), end, 3))
        inputs[:, :go, 0] = 1
        targets = inputs.copy()
        inputs[:, shown:gone, 1:] = direction
        targets[:, go:, 1:] = self._sign * direction
        return inputs, targets

    def _entries(self) -> int:
        return 3 * self._times()[-1]

    def _named_outputs(self) -> tuple[str, ...]:
        return "fixation", "cos(angle)", "sin(angle)"

    def _times(self) -> tuple[int, int, int, int]:
        """When the direction comes and goes, when to respond, and the end."""
        raise NotImplementedError


@dataclass(frozen=True)
class MemoryPro(_Directions):
    """Respond, after a delay, in the direction that was shown.

    An angle, uniform on the circle, is shown in the stimulus period and gone in the memory period; the response starts
    when the fixation input goes off. `labels` holds "angle" [trial].

        inputs   fixation, cos(angle), sin(angle)           3 channels
        targets  fixation, cos(angle), sin(angle)           3 channels, the last two in the response period only

    Args:
        fixation, stimulus, memory, response: the periods, in steps.
        noise: the standard deviation of independent Gaussian noise on every input.
        dt: milliseconds of a step.

    Raises:
        TypeError, ValueError: a number of steps that is not whole or too small, or another option out of its range.
    Source: Driscoll, Shenoy, Sussillo, Nature Neuroscience 27, 1349 (2024), after Yang et al., Nature Neuroscience 22,
    297 (2019).

    >>> MemoryPro(memory=30).sample(trials=8, seed=0).inputs.shape
    (8, 80, 3)
    """

    fixation: int = 10
    stimulus: int = 20
    memory: int = 40
    response: int = 20
    noise: float = 0.0
    dt: float = 20.0

    _least: ClassVar = {"fixation": 0, "stimulus": 1, "memory": 0, "response": 1}

    def _times(self) -> tuple[int, int, int, int]:
        gone = self.fixation + self.stimulus
        go = gone + self.memory
        return self.fixation, gone, go, go + self.response


@dataclass(frozen=True)
class MemoryAnti(MemoryPro):
    """Respond, after a delay, opposite to the direction that was shown:

        targets  fixation, -cos(angle), -sin(angle)         and all else as `MemoryPro`

    Args, Raises and Source as `MemoryPro`.

    >>> MemoryAnti().sample(trials=8, seed=0).targets.shape
    (8, 90, 3)
    """

    _sign: ClassVar[int] = -1


@dataclass(frozen=True)
class DelayPro(_Directions):
    """Respond in the direction that is shown, but wait for the fixation input to go off.

        inputs, targets  as `MemoryPro`, but the stimulus stays on, so that nothing has to be remembered

    Args:
        fixation, stimulus, response: the periods, in steps: `stimulus` is how long it is on before the response.

    Raises and Source as `MemoryPro`; Yang et al. call it "Go".

    >>> DelayPro(stimulus=60).sample(trials=8, seed=0).inputs.shape
    (8, 90, 3)
    """

    fixation: int = 10
    stimulus: int = 60
    response: int = 20
    noise: float = 0.0
    dt: float = 20.0

    _least: ClassVar = {"fixation": 0, "stimulus": 1, "response": 1}

    def _times(self) -> tuple[int, int, int, int]:
        go = self.fixation + self.stimulus
        return self.fixation, go + self.response, go, go + self.response


@dataclass(frozen=True)
class DelayAnti(DelayPro):
    """Respond opposite to the direction that is shown, when the fixation input goes off:

        targets  fixation, -cos(angle), -sin(angle)         and all else as `DelayPro`

    Args, Raises and Source as `DelayPro`.

    >>> DelayAnti().sample(trials=8, seed=0).targets.shape
    (8, 90, 3)
    """

    _sign: ClassVar[int] = -1


@dataclass(frozen=True)
class FourTasks(MemoryPro):
    """MemoryPro, MemoryAnti, DelayPro and DelayAnti in turn, each trial told by a rule input which one it is.

        inputs   fixation, cos(angle), sin(angle), four rules     7 channels, one rule being 1 throughout
        targets  as in each task                                  3 channels

    As many trials have each rule, in random order. `labels` holds "angle" and "rule" [trial], the rule being the number
    of its input: 0 to 3 in the order above.

    Args, Raises and Source as `MemoryPro`.

    >>> FourTasks().sample(trials=8, seed=0).inputs.shape
    (8, 90, 7)
    """

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        angle = rng.uniform(0, 2 * np.pi, trials)
        rule = rng.permutation(np.arange(trials) % 4)
        courses = [task._course(angle) for task in self._tasks()]
        inputs, targets = (np.choose(rule[:, None, None], arrays) for arrays in zip(*courses, strict=True))
        rules = np.broadcast_to(np.eye(4)[rule][:, None], (*inputs.shape[:2], 4))
        return np.concatenate([inputs, rules], axis=-1), targets, None, {"angle": angle, "rule": rule}

    def _entries(self) -> int:
        return 7 * self._times()[-1]

    def _tasks(self) -> tuple[_Directions, ...]:
        memory = (self.fixation, self.stimulus, self.memory, self.response)
        delay = (self.fixation, self.stimulus + self.memory, self.response)
        return MemoryPro(*memory), MemoryAnti(*memory), DelayPro(*delay), DelayAnti(*delay)
