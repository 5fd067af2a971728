"""Decisions: evidence to be integrated, in a context or without one, and two stimuli to be compared."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kpflow_dyn.tasks._data import Generated, Trials


@dataclass(frozen=True)
class EvidenceIntegration(Generated):
    """Integrate noisy evidence, and say its sign.

        inputs   the coherence in the stimulus period, and noise          1 channel
        targets  0, and the coherence's sign in the response period       1 channel

    The mask is False in the stimulus period, where the output is free. `labels` holds "coherence" [trial].

    Args:
        fixation, stimulus, response: the periods, in steps.
        coherence: that of a trial is uniform between -coherence and coherence.

    Raises as `MemoryPro`.
    Source: the task of Roitman, Shadlen, J. Neuroscience 22, 9475 (2002), posed as one context of `ContextIntegration`.

    >>> EvidenceIntegration(stimulus=50).sample(trials=8, seed=0).inputs.shape
    (8, 70, 1)
    """

    fixation: int = 10
    stimulus: int = 40
    response: int = 10
    coherence: float = 0.2
    noise: float = 0.1
    dt: float = 20.0

    _least: ClassVar = {"fixation": 0, "stimulus": 1, "response": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.coherence < np.inf:
            raise ValueError(f"coherence must be positive, got {self.coherence}")

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        coherence = rng.uniform(-self.coherence, self.coherence, trials)
        return *self._decide(coherence[:, None], coherence), {"coherence": coherence}

    def _entries(self) -> int:
        return self.fixation + self.stimulus + self.response

    def _decide(self, evidence: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Streams [trial, time, stream] of this evidence [trial, stream], targets, and mask."""
        start, go, end = np.cumsum([self.fixation, self.stimulus, self.response])
        streams, targets = np.zeros((len(evidence), end, evidence.shape[1])), np.zeros((len(evidence), end, 1))
        streams[:, start:go] = evidence[:, None]
        targets[:, go:] = np.sign(relevant)[:, None, None]
        mask = np.ones(targets.shape[:2], bool)
        mask[:, start:go] = False
        return streams, targets, mask


@dataclass(frozen=True)
class ContextIntegration(EvidenceIntegration):
    """Integrate one of two streams of noisy evidence, whichever the context says, and say its sign.

        inputs   motion, colour (in the stimulus period), and the two contexts      4 channels, one context being 1
        targets  0, and the sign of the stream that counts in the response period   1 channel

    The mask is False in the stimulus period, where the output is free. `labels` holds "motion", "colour" and "context"
    [trial], the context being 0 where the motion counts and 1 where the colour does; as many trials have each.

    Args and Raises as `EvidenceIntegration`; both coherences are drawn.

    Source: Mante, Sussillo, Shenoy, Newsome, Nature 503, 78 (2013).

    >>> ContextIntegration().sample(trials=8, seed=0).inputs.shape
    (8, 60, 4)
    """

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        evidence = rng.uniform(-self.coherence, self.coherence, (trials, 2))
        context = rng.permutation(np.arange(trials) % 2)
        streams, targets, mask = self._decide(evidence, evidence[np.arange(trials), context])
        contexts = np.broadcast_to(np.eye(2)[context][:, None], streams.shape)
        labels = {"motion": evidence[:, 0], "colour": evidence[:, 1], "context": context}
        return np.concatenate([streams, contexts], axis=-1), targets, mask, labels

    def _entries(self) -> int:
        return 4 * super()._entries()


@dataclass(frozen=True)
class Romo(Generated):
    """Compare the frequency of a vibration with that of an earlier one.

        inputs   f / 34 Hz while either is on                                  1 channel
        targets  0, and in the response +1 where the first was faster, or -1   1 channel

    The pairs are those of the monkeys: 10 to 34 Hz, 8 Hz apart, in either order. `labels` holds "first" and "second"
    [trial], in Hz.

    Args:
        fixation, first, delay, second, response: the periods, in steps.

    Raises as `MemoryPro`.
    Source: Romo, Brody, Hernandez, Lemus, Nature 399, 470 (1999).

    >>> Romo(delay=150).sample(trials=8, seed=0).inputs.shape
    (8, 230, 1)
    """

    fixation: int = 10
    first: int = 25
    delay: int = 75
    second: int = 25
    response: int = 20
    noise: float = 0.0
    dt: float = 20.0

    _least: ClassVar = {"fixation": 0, "first": 1, "delay": 0, "second": 1, "response": 1}

    def _draw(self, trials: int, rng: np.random.Generator) -> Trials:
        first, second = _PAIRS[:, rng.integers(_PAIRS.shape[1], size=trials)]
        *starts, go, end = np.cumsum([self.fixation, self.first, self.delay, self.second, self.response])
        inputs = np.zeros((trials, end, 1))
        inputs[:, starts[0] : starts[1]] = first[:, None, None] / 34
        inputs[:, starts[2] : go] = second[:, None, None] / 34
        targets = np.zeros_like(inputs)
        targets[:, go:] = np.sign(first - second)[:, None, None]
        return inputs, targets, None, {"first": first, "second": second}

    def _entries(self) -> int:
        return self.fixation + self.first + self.delay + self.second + self.response


_LOWER = np.arange(10.0, 27.0, 4.0)
_PAIRS = np.array([[*_LOWER, *(_LOWER + 8)], [*(_LOWER + 8), *_LOWER]])  # [first or second, pair], in Hz
