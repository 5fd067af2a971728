"""Whether fixed points are missing, by their indices and by how often each was found, in words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist

from kpflow_dyn._shown import plural
from kpflow_dyn.dynamics._search import Ends, Polished, Search

FACES, RARE, ASKED, ITERATIONS = 256, 0.01, 16, 100
FACTORS = 2.0 ** np.append(np.arange(10), np.arange(12, 34, 3))  # all states may be near one point


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

    Inputs x [n, input] are taken in turn. If all states there do, the indices of the points in the box sum to one
    (Poincare, Miranda).
    """
    rng, units, rows = np.random.default_rng(0), places.shape[1], np.arange(FACES)
    unit, side = rng.integers(units, size=FACES), rng.choice([-1.0, 1.0], FACES)
    away = rng.uniform(-1, 1, (FACES, units))
    away[rows, unit] = side
    inputs = x[np.arange(FACES) % len(x)]
    for box in (surroundings(places, factor) for factor in FACTORS):
        z = box.mean(0) + away * (box[1] - box[0]) / 2
        if (side * search.in_numpy(inputs, z)[0][rows, unit] < 0).all():
            return box
    return None


def crowded(search: Search, ends: Ends, points: Polished, unique: float) -> int:
    """How many isolated points have another fixed point nearer than `unique`, that is left out as the same."""
    ends, found = ends.some(ends.at_rest(search.eps)), points.some(points.isolated)
    if not len(ends.z) or not len(found.z):
        return 0
    away = cdist(found.z, ends.z)
    own = np.where((away <= unique) & (away == away.min(0)), away, -1.0)
    found, farthest = found.some(own.max(1) > 0), own.argmax(1)[own.max(1) > 0]
    others = search.polished(ends.x[farthest], ends.z[farthest].astype(np.float64), unique)
    apart = np.linalg.norm(others.z - found.z, axis=1) > 2 * (others.errors + found.errors)
    return int((apart & others.isolated).sum())


def on_a_continuum(search: Search, x: np.ndarray, points: Polished) -> bool:
    """Whether degenerate points are seen to belong to a line or ring: between two of them there is another."""
    z = points.z[points.fixed & points.degenerate]
    if len(z) < 2:
        return False
    away = cdist(z[:ASKED], z)
    away[away == 0] = np.inf
    other = z[away.argmin(1)]
    ends = search.ends(np.repeat(x[None], len(other), 0), (z[:ASKED] + other) / 2, ITERATIONS)
    least = 0.1 * away.min(1)
    between = np.minimum(*(np.linalg.norm(ends.z - a, axis=1) for a in (z[:ASKED], other))) > least
    return bool((between & ends.at_rest(search.eps)).any())


def judged(
    points: Polished,
    counts: np.ndarray,
    tried: int,
    new: int | None,
    bounded: bool | None,
    near: int = 0,
    continuum: bool = False,
) -> Verdict:
    """The verdict on points of which each was found `counts` times, `new` of them by the last round of starts alone.

    `new` is None where there was but one round, and `bounded` where points rest under different inputs, so that no sum
    is known. `near` of them were taken as one with another.
    """
    degenerate = int((points.fixed & points.degenerate).sum())
    isolated = points.isolated
    signs = [*_by_index(index_sum(points.J[isolated]))] if bounded and not degenerate else []
    signs += _by_distances(near) + _by_counts(counts[isolated], tried, new)
    doubts = _doubts(degenerate, continuum, bounded, new is None and not signs)
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
    return [f"the last of {tried} starts still found {plural(new, 'new point')}"] if new else []


def _by_distances(near: int) -> list[str]:
    have = "points have others" if near > 1 else "point has another"
    return [f"{near} {have} nearer than `unique`, left out as the same: give a smaller one"] if near else []


def _doubts(degenerate: int, continuum: bool, bounded: bool | None, few: bool) -> list[str]:
    if bounded is None:
        return ["points under different inputs have no index sum that is known"]
    if degenerate:
        return [
            f"{degenerate} points of a continuum, such as a line or ring: their number means little, and the index sum "
            "cannot be used"
            if continuum
            else f"{plural(degenerate, 'degenerate point')}, which may be several points or part of a "
            "line: the index sum cannot be used"
        ]
    if few and bounded:
        return ['only starts as given were tried: starts="auto" also tries others']
    return [] if bounded else ["states far away were not seen to return, so the index sum cannot be used"]
