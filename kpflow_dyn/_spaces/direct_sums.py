"""Which units an operator L L* does not couple, as K of a recurrent cell, where each unit has weights of its own.

A weight that moves one unit alone is that unit's. L* shows it: from random vectors on half of the units, once for each
binary digit of the units' numbers, and from vectors on the other half. What a vector does not reach is zero exactly.
"""

import numpy as np

from kpflow_dyn._arrays import Random, array_namespace, like_numpy, to_numpy
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.parts import DirectSum, Parts

TOGETHER = (1, 2)  # units that may share weights, such as the h and the c of an LSTM's cell


def unit_by_unit(factor: Operator) -> DirectSum | None:
    """The direct sum over units that L L* is, with the most parts; None where weights are shared otherwise.

    Args:
        factor: L, from weights to states whose last axis is that of the units.
    """
    units = factor.codomain.shape[-1]
    for count in (units // together for together in TOGETHER if units % together == 0 and units > together):
        owners = _owners(factor, count)
        if owners is not None:
            return DirectSum(count, _of_one_size(owners, count))
    return None


def _owners(factor: Operator, count: int) -> np.ndarray | None:
    """The part of each weight, -1 where it moves none; None where one moves several."""
    part, rng, found, nowhere = np.arange(factor.codomain.shape[-1]) % count, Random(0), 0, False
    for digit in range((count - 1).bit_length()):
        zero, one = (_moving(factor, part >> digit & 1 == value, rng) for value in (0, 1))
        if (zero & one).any():
            return None
        nowhere, found = ~(zero | one), found + (one.astype(int) << digit)
    return np.where(nowhere, -1, found)


def _moving(factor: Operator, units: np.ndarray, rng: Random) -> np.ndarray:
    """Which weights move some of these units."""
    space = factor.codomain
    q = space.normal(1, rng) * like_numpy(units.astype(float), space.like)
    return to_numpy(array_namespace(q).reshape(factor.T.mv(q), (-1,))) != 0


def _of_one_size(owners: np.ndarray, count: int) -> Parts | None:
    """The weights by parts of one size, for which those of none fill up what lacks; None where they cannot be."""
    lacks = len(owners) // count - np.bincount(owners[owners >= 0], minlength=count)
    if len(owners) % count or (lacks < 0).any():
        return None
    owners = owners.copy()
    owners[owners < 0] = np.repeat(np.arange(count), lacks)
    return Parts(count, np.argsort(owners, kind="stable"))
