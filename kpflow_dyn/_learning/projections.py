"""Named parts of errors f [trial, time, out]: the whole, outputs or classes, and principal components."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kpflow_dyn._learning.losses import OutputLoss
from kpflow_dyn._learning.parabolas import probabilities

EVERYTHING = "everything"
MOST_OUTPUTS, MOST_COMPONENTS = 8, 4
SMALLEST = 1e-6  # share of the loss of a part that is shown

Projection = Callable[[np.ndarray], np.ndarray]
"""The part of arrays [..., trial, time, out]."""


def projections(f: np.ndarray, loss: OutputLoss, names: Sequence[str]) -> dict[str, Projection]:
    """Onto the whole, the largest outputs or classes, numbered as their indices, and principal components."""
    named = [names[i] if i < len(names) else f"{_what(loss)} {i}" for i in range(f.shape[-1])]
    own = dict(zip(named, _of_each(f, loss), strict=True))
    found: dict[str, Projection] = {EVERYTHING: lambda all: all}
    found |= _largest(own, f, MOST_OUTPUTS) if f.shape[-1] > 1 else {}
    return found | _largest(_components(f), f, MOST_COMPONENTS)


def energies(parts: dict[str, Projection], f: np.ndarray) -> np.ndarray:
    """|Pi f|^2 / 2 of each part [part]."""
    return np.array([(project(f) ** 2).sum() for project in parts.values()]) / 2


def _what(loss: OutputLoss) -> str:
    return "class" if loss.of_classes else "output"


def _of_each(f: np.ndarray, loss: OutputLoss) -> list[Projection]:
    """Onto each output; of classes, onto the places where each is the right one."""
    if loss.of_classes:
        right = probabilities(loss, f.shape)[0].argmax(-1)[..., None]
        return [_masked(right == number) for number in range(f.shape[-1])]
    return [_masked(np.arange(f.shape[-1]) == number) for number in range(f.shape[-1])]


def _masked(mask: np.ndarray) -> Projection:
    return lambda all: all * mask


def _components(f: np.ndarray) -> dict[str, Projection]:
    """Onto principal components over trials and times: patterns over the outputs; of one output patterns over times."""
    _, _, patterns = np.linalg.svd(f.reshape((-1, f.shape[-1])) if f.shape[-1] > 1 else f[..., 0], full_matrices=False)
    onto = _along_outputs if f.shape[-1] > 1 else _along_times
    return {f"error PC {i + 1}": onto(pattern) for i, pattern in enumerate(patterns[:MOST_COMPONENTS])}


def _along_outputs(pattern: np.ndarray) -> Projection:
    return lambda all: (all @ pattern)[..., None] * pattern


def _along_times(pattern: np.ndarray) -> Projection:
    return lambda all: np.einsum("...bto,t,s->...bso", all, pattern, pattern)


def _largest(parts: dict[str, Projection], f: np.ndarray, most: int) -> dict[str, Projection]:
    """So many parts that are not zero, in their order."""
    shares = {name: float((project(f) ** 2).sum() / (f**2).sum()) for name, project in parts.items()}
    kept = sorted((name for name in parts if shares[name] > SMALLEST), key=lambda name: -shares[name])[:most]
    return {name: one for name, one in parts.items() if name in kept}
