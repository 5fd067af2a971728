"""Krylov bases of a direct sum A = A_1 + ... + A_c, all parts at once.

Where parts are alike, as of K the units of a network, the leading values of the whole crowd together, and an iteration
of the whole takes hundreds of applications to tell them apart. Within a part they lie apart. One application moves a
vector of every part, so that c iterations, each of which needs a dozen applications, cost a dozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, eps_of, full_precision, to_numpy
from kpflow_dyn._arrays.dots import row_dots
from kpflow_dyn._spaces.parts import Parts
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._moments import LEAST_SAMPLES, Moments, of_samples
from kpflow_dyn.solvers._orthogonalise import to_like

BLOCK = 2  # rows of each part: two find both copies of a value
COLUMNS = 96  # rows of a basis at most
CLUSTER = 2  # values closer than this many tolerances count as one
PASSES = 3  # of orthogonalisation


@dataclass(frozen=True, eq=False)
class Leading:
    """Leading Ritz pairs of the whole: the part and column of each, and its value and predicted residual."""

    part: np.ndarray
    column: np.ndarray
    values: np.ndarray
    residuals: np.ndarray

    @property
    def sheet(self) -> np.ndarray:
        """How many of its part come before each: pairs with one number have parts of their own."""
        return np.array([int((self.part[:i] == part).sum()) for i, part in enumerate(self.part)])


class Bases:
    """A basis Q of each part, with A Q = H Q + C^T pending; all blocks are [part, row, coordinate].

    A part whose space is used up goes on with rows of zeros.
    """

    def __init__(self, operator: Counted, parts: Parts, rng: Random, like: Array) -> None:
        self.operator, self.parts, self.rng, self.like = operator, parts, rng, like
        self.basis: list[Array] = []
        self.projected = np.zeros((parts.count, 0, 0))
        self.pending, self.coupling = None, np.zeros((parts.count, 0, 0))
        self.scale, self.eps = 0.0, eps_of(like)
        self.inject()

    @property
    def size(self) -> int:
        """Rows of each part's basis."""
        return self.projected.shape[1]

    def inject(self) -> None:
        """Further random rows of each part beside the pending ones."""
        xp, others = array_namespace(self.like), [*self.basis, *([] if self.pending is None else [self.pending])]
        rows = self.parts.split(self.rng.normal((BLOCK, self.parts.order.size), self.like))
        fresh, _c, _r = _orthonormal(rows, others, 1e-3)
        self.pending = fresh if self.pending is None else xp.concat([self.pending, fresh], axis=1)
        self.coupling = np.pad(self.coupling, ((0, 0), (0, BLOCK), (0, 0)))

    def expand(self) -> None:
        """Apply the operator to the pending rows, and make them part of the bases."""
        assert self.pending is not None
        active, before = self.pending, self.size
        image = self.parts.split(self.operator(self.parts.join(active)))
        squares = to_numpy(array_namespace(image).sum(image * image, axis=2))
        self.scale = max(self.scale, float(squares.max()) ** 0.5)
        self.basis.append(active)
        self.pending, c, r = _orthonormal(image, self.basis, 4 * self.eps * self.scale)
        own = (c[:, :, before:] + c[:, :, before:].transpose(0, 2, 1)) / 2
        above = np.concatenate([self.projected, c[:, :, :before].transpose(0, 2, 1)], 2)
        self.projected = np.concatenate([above, np.concatenate([c[:, :, :before], own], 2)], 1)
        rest = np.zeros((self.parts.count, r.shape[2], before))
        self.coupling = np.concatenate([rest, r.transpose(0, 2, 1)], 2)

    def leading(self, k: int) -> Leading:
        """The k largest Ritz pairs of all parts; fewer where there are no more."""
        values, self.vectors = np.linalg.eigh(self.projected)
        left = np.linalg.norm(self.coupling @ self.vectors, axis=1)
        real = np.concatenate([_squares(rows) for rows in self.basis], 1) > 0.5  # rows that are not zeros
        there = (self.vectors**2 * real[:, :, None]).sum(1) > 0.5
        order = np.argsort(-np.where(there, values, -np.inf), axis=None)[: min(k, int(there.sum()))]
        part, column = np.unravel_index(order, values.shape)
        norm = max(float(np.abs(values).max()), 1e-300)
        return Leading(part, column, values[part, column], left[part, column] / norm)

    def sheets(self, found: Leading) -> Array:
        """The Ritz vectors as rows [sheet, n], each of which holds one pair of several parts."""
        count = int(found.sheet.max()) + 1
        coefficients = np.zeros((self.parts.count, count, self.size))
        coefficients[found.part, found.sheet] = self.vectors[found.part, :, found.column]
        total, at = 0.0, 0
        for q in self.basis:
            total = total + _products(to_like(coefficients[:, :, at : at + q.shape[1]], q), q)
            at += q.shape[1]
        return self.parts.join(total)

    def settle(self, k: int, tol: float) -> Leading | None:
        """Expand until the k largest pairs are within the tolerance by the recurrence; None where that takes long."""
        while not self.size or not self._settled(found := self.leading(k), k, tol):
            if self.size >= COLUMNS:
                return None
            self.expand()
        return found

    def _settled(self, found: Leading, k: int, tol: float) -> bool:
        return len(found.values) == k and bool((found.residuals <= tol).all())

    def rest(self, rows: Array) -> Array:
        """(1 - Q Q^T) of rows [b, n]."""
        blocks = self.parts.split(rows)
        for q in self.basis * 2:
            blocks = blocks - _products(_products(blocks, _transposed(q)), q)
        return self.parts.join(blocks)


def leading_of(bases: Bases, k: int, tol: float) -> Leading | None:
    """The k largest pairs, with none missing as far as random rows tell; None where that takes long.

    Where as many of a part's agree as it had random rows, there may be more copies of the value: further rows are
    iterated for as long, until they change nothing.
    """
    found, steps = bases.settle(k, tol), len(bases.basis)
    while found is not None and _agree(found, CLUSTER * tol * found.values[0]):
        before = found.values
        bases.inject()
        for _ in range(steps):
            bases.expand()
        found = bases.settle(k, tol)
        if found is not None and (found.values - before <= tol * found.values[0]).all():
            return found
    return found


class MomentsOfParts:
    """tr A and |A|_F^2: what the bases hold of them, and probes of the rest."""

    first = 2 * LEAST_SAMPLES  # the fewest samples that tell an error

    def __init__(self, bases: Bases) -> None:
        self.bases, self.samples = bases, np.zeros((2, 0))

    def __call__(self, samples: int) -> Moments:
        """From this many applications in all; half of the first ones go to the bases."""
        bases, operator = self.bases, self.bases.operator
        while not self.samples.size and bases.size < min(samples - LEAST_SAMPLES, samples // 2, COLUMNS):
            bases.expand()
        more = max(samples - operator.applications, LEAST_SAMPLES if not self.samples.size else 0)
        for _ in range(more):
            x = bases.rest(bases.rng.normal((1, bases.parts.order.size), bases.like))
            y = bases.rest(operator(x))
            self.samples = np.hstack([self.samples, np.stack([to_numpy(row_dots(x, y)), to_numpy(row_dots(y, y))])])
        known = np.array([np.trace(bases.projected, axis1=1, axis2=2).sum(), (bases.projected**2).sum()])
        known[1] += 2 * (bases.coupling**2).sum()
        return of_samples(known[:, None] + self.samples, operator.applications, "unit by unit", eps_of(bases.like))


def _agree(found: Leading, width: float) -> bool:
    """Whether some part has as many values closer than `width` as it had random rows."""
    own = [np.sort(found.values[found.part == part]) for part in np.unique(found.part)]
    return any((values[BLOCK - 1 :] - values[: 1 - BLOCK] <= width).any() for values in own if len(values) >= BLOCK)


def _orthonormal(w: Array, basis: list[Array], floor: float) -> tuple[Array, np.ndarray, np.ndarray]:
    """w = c basis + r q in each part, with q orthonormal to each other and to the basis, or zero: q, c and r.

    Rows of q whose part of w is not larger than the floor are zeros.
    """
    xp, eps = array_namespace(w), eps_of(w)
    c = np.zeros((*w.shape[:2], sum(q.shape[1] for q in basis)))
    r = np.broadcast_to(np.eye(w.shape[1]), (w.shape[0], w.shape[1], w.shape[1]))
    for _ in range(PASSES):
        found = [np.zeros((*w.shape[:2], 0))]
        for q in basis:
            part = _products(w, _transposed(q))
            w = w - _products(part, q)
            found.append(to_numpy(part).astype(np.float64))
        c = c + r @ np.concatenate(found, 2)
        values, turn = np.linalg.eigh(to_numpy(_products(w, _transposed(w))).astype(np.float64))
        root = np.sqrt(np.maximum(values, eps * np.maximum(values[:, -1:], 0)))
        root = np.where(root > 0, root, 1.0)
        w = _products(to_like(turn.transpose(0, 2, 1) / root[:, :, None], w), w)
        r = r @ (turn * root[:, None])
    kept = (np.linalg.norm(r, axis=1) > floor) & (_squares(w) > 0.5)
    return w * xp.asarray(to_like(kept[:, :, None].astype(float), w)), c, r * kept[:, None]


def _squares(w: Array) -> np.ndarray:
    return to_numpy(array_namespace(w).sum(w * w, axis=2)).astype(np.float64)


def _transposed(w: Array) -> Array:
    return array_namespace(w).permute_dims(w, (0, 2, 1))


def _products(a: Array, b: Array) -> Array:
    """Of each part's matrices."""
    with full_precision(b):
        return array_namespace(b).matmul(a, b)
