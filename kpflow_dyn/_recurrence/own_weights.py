"""Which units have weights of their own: K is a direct sum over them.

In a recurrent cell a weight enters the kick of one unit alone (the h and the c of an LSTM's cell count as one), so that
K does not couple units. Which unit each output of a site enters, B* shows: by random vectors on half of the units, once
for each binary digit of the units' numbers. What is zero there is zero exactly.
"""

from typing import Any

import numpy as np

from kpflow_dyn._arrays import Random, array_namespace, like_numpy, to_numpy
from kpflow_dyn._recurrence.tangent import Tangent
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.parts import DirectSum, Parts

TOGETHER = (1, 2)  # how many units may share weights


def unit_by_unit(tangent: Tangent, B: Operator) -> DirectSum | None:
    """The parts of K, the most that there can be; None where weights of all kinds of units mix.

    Args:
        tangent: of the step.
        B: from the outputs of its sites [trial, time, site] to the state [trial, time, unit].
    """
    sites = [] if tangent.untraced else [site for _, site in tangent.sites]
    units, known = B.codomain.shape[-1], bool(sites) and all(site.kind in ("matrix", "scale") for site in sites)
    for count in (units // together for together in TOGETHER if units % together == 0):
        if known and count > 1:
            entered = _entered(B, count)
            owners = None if entered is None else _owners(sites, entered, tangent.parameter_size)
            if owners is not None:
                return DirectSum(count, _of_one_size(owners, count))
    return None


def _entered(B: Operator, count: int) -> np.ndarray | None:
    """Which part each output of a site enters, -1 for none; None where one enters several."""
    part, rng, found, nowhere = np.arange(B.codomain.shape[-1]) % count, Random(0), 0, False
    for digit in range((count - 1).bit_length()):
        zero, one = (_met(B, part >> digit & 1 == value, rng) for value in (0, 1))
        if (zero & one).any():
            return None
        nowhere, found = ~(zero | one), found + (one << digit)
    return np.where(nowhere, -1, found)


def _met(B: Operator, units: np.ndarray, rng: Random) -> np.ndarray:
    """Which outputs of sites enter some of these units."""
    space = B.codomain
    q = space.normal(1, rng) * like_numpy(units.astype(float), space.like)
    return to_numpy(array_namespace(q).max(abs(B.T.mv(q)), axis=(0, 1, 2))) > 0


def _owners(sites: list[Any], entered: np.ndarray, weights: int) -> np.ndarray | None:
    """The part of each weight, -1 where it enters none; None where one enters several, or is computed."""
    least, most, at = np.full(weights, len(entered)), np.full(weights, -1), 0
    for site in sites:
        entries, kicks = to_numpy(site.entries), tuple(site.kicks.shape)
        entries = np.broadcast_to(entries[:, None], (len(entries), *kicks)) if site.kind == "matrix" else entries[None]
        part = np.broadcast_to(entered[at : at + np.prod(kicks, dtype=int)].reshape(kicks), entries.shape)
        at += np.prod(kicks, dtype=int)
        if entries.max() >= weights:
            return None
        np.minimum.at(least, entries[part >= 0], part[part >= 0])
        np.maximum.at(most, entries[part >= 0], part[part >= 0])
    return most if (least >= most).all() else None


def _of_one_size(owners: np.ndarray, count: int) -> Parts | None:
    """The weights by parts of one size, for which those of none fill up what lacks; None where they cannot be."""
    lacks = len(owners) // count - np.bincount(owners[owners >= 0], minlength=count)
    if len(owners) % count or (lacks < 0).any():
        return None
    owners = owners.copy()
    owners[owners < 0] = np.repeat(np.arange(count), lacks)
    return Parts(count, np.argsort(owners, kind="stable"))
