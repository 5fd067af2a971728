"""Every use of a weight, matrix by matrix, with the numbers of the weights in it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kpflow_dyn.tracing._copies import Copies, elements_of_scale
from kpflow_dyn.tracing._numbers import WeightNumbers
from kpflow_dyn.tracing._uses import Use, as_matrices


@dataclass(frozen=True, eq=False)
class Term:
    """One matrix of a use, or a use of another kind.

    Attributes:
        use: the use.
        matrix: which matrix of a batch.
        entries: the numbers of its weights: [d, m] of a matrix, [element] of a scale, all of an opaque operation.
        elements: the elements of a scale's result that take a weight, and which of its elements they take.
    """

    use: Use
    matrix: int
    entries: np.ndarray
    elements: tuple[np.ndarray, np.ndarray] | None = None


def terms_of(uses: Sequence[Use], weights: WeightNumbers, copies: Copies) -> tuple[Term, ...]:
    """All terms of these uses, in order."""
    terms = []
    for use in uses:
        numbers = weights.of[use.weight]
        if use.kind == "matrix":
            terms += [Term(use, b, W) for b, W in enumerate(as_matrices(use.node, use.weight, numbers))]
        elif use.kind == "scale":
            taken = elements_of_scale(use, copies)
            (where,) = np.nonzero(taken >= 0)
            terms.append(Term(use, 0, numbers.ravel()[taken[where]], (where, taken[where])))
        else:
            terms.append(Term(use, 0, numbers.ravel()))
    return tuple(terms)


def by_weight(terms: Sequence[Term]) -> list[list[Term]]:
    """The terms of one and the same weight together; opaque ones stay alone."""
    same: dict[object, list[Term]] = defaultdict(list)
    for term in terms:
        digest = hashlib.blake2b(np.ascontiguousarray(term.entries)).digest()
        same[term if term.use.kind == "opaque" else (term.entries.shape, digest)].append(term)
    return list(same.values())
