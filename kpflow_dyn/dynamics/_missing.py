"""Whether fixed points are missing, by their indices and by how often each was found, in words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kpflow_dyn.dynamics._search import Polished, Search

FACES, FACTORS, RARE = 256, 2.0 ** np.arange(10), 0.01


class Verdict(NamedTuple):
    """True: nothing says that points are missing; False: something does; None: it cannot be told. And why."""

    complete: bool | None
    missing: str


def index_sum(J: np.ndarray) -> int:
    """The sum of sign det(-dr/dz) over points [n, unit, unit]."""
    return int(np.linalg.slogdet(-J).sign.sum()) if len(J) else 0


def surroundings(places: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """A box around places [n, unit], wider than they are, and not small where they are one: its corners [2, unit]."""
    low, high = places.min(0), places.max(0)
    half = factor * np.maximum(high - low, max(1.0, np.abs(places).max()))
    return (low + high) / 2 + np.stack([-half, half])


def returning(search: Search, x: np.ndarray, places: np.ndarray) -> np.ndarray | None:
    """The smallest of some boxes around places [n, unit] on whose faces a sample of states moves inwards, under x.

    If all states there do, the indices of the points in the box sum to one (Poincare, Miranda).
    """
    rng, units, rows = np.random.default_rng(0), places.shape[1], np.arange(FACES)
    unit, side = rng.integers(units, size=FACES), rng.choice([-1.0, 1.0], FACES)
    away = rng.uniform(-1, 1, (FACES, units))
    away[rows, unit] = side
    inputs = np.repeat(x[None], FACES, 0)
    for box in (surroundings(places, factor) for factor in FACTORS):
        z = box.mean(0) + away * (box[1] - box[0]) / 2
        if (side * search.in_numpy(inputs, z)[0][rows, unit] < 0).all():
            return box
    return None


def judged(points: Polished, counts: np.ndarray, tried: int, new: int | None, bounded: bool | None) -> Verdict:
    """The verdict on points of which each was found `counts` times, `new` of them by the last round of starts alone.

    `new` is None where there was but one round, and `bounded` where points rest under different inputs, so that no sum
    is known.
    """
    degenerate = int((points.fixed & points.degenerate).sum())
    isolated = points.isolated
    signs = [*_by_index(index_sum(points.J[isolated]))] if bounded and not degenerate else []
    signs += _by_counts(counts[isolated], tried, new)
    doubts = _doubts(degenerate, bounded, new is None and not signs)
    return Verdict(False if signs else None if doubts else True, "; ".join(signs + doubts))


def _by_index(total: int) -> list[str]:
    less = abs(total - 1)
    which = "unstable" if total > 1 else "stable or with two real unstable directions"
    points = f"{less} point{'s are' if less > 1 else ' is'}"
    reason = f"at least {points} missing, {which}, or nearer to another than `unique`"
    return [f"the index sum is {total}, expected 1: {reason}"] if less else []


def _by_counts(counts: np.ndarray, tried: int, new: int | None) -> list[str]:
    """Good's estimate of what another start finds: the share of starts whose point no other start found."""
    once = int((counts == 1).sum())
    if once >= RARE * tried:
        return [
            f"{once} of {len(counts)} points were reached by one start only: another finds a new one with "
            f"probability {once / tried:.2g}"
        ]
    return [f"the last of {tried} starts still found {new} new point{'s' * (new > 1)}"] if new else []


def _doubts(degenerate: int, bounded: bool | None, few: bool) -> list[str]:
    if bounded is None:
        return ["points under different inputs have no index sum that is known"]
    if degenerate:
        return [
            f"{degenerate} degenerate point{'s' * (degenerate > 1)}, as on a line or ring: their number "
            "means little, and the index sum cannot be used"
        ]
    if few and bounded:
        return ['only starts as given were tried: starts="auto" also tries others']
    return [] if bounded else ["states far away were not seen to return, so the index sum cannot be used"]
