"""Krylov bases of a direct sum A = A_1 + ... + A_c, all parts at once.

Where parts are alike, as of K the units of a network, the leading values of the whole crowd together, and an iteration
of the whole takes hundreds of applications to tell them apart. Within a part they lie apart. One application moves a
vector of every part, so that c iterations, each of which needs a dozen applications, cost a dozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, eps_of, full_precision, to_numpy
from kpflow_dyn._arrays.dots import products, row_dots
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._spaces.parts import Parts
from kpflow_dyn.solvers._counted import Counted, Product
from kpflow_dyn.solvers._lanczos import Callback
from kpflow_dyn.solvers._moments import LEAST_SAMPLES, Moments, of_samples
from kpflow_dyn.solvers._orthogonalise import no_rows, to_like

BLOCK = 2  # rows of each part: two find both copies of a value
COLUMNS = 96  # rows of a basis at most, for pairs
WORKING = 6 * BLOCK  # rows around a basis
CLUSTER = 2  # values closer than this many tolerances count as one
PASSES = 3  # of orthogonalisation
SMALL_PART = 0.1  # of a vector's usual part in a random row; one in 100 has less in both rows of a part


@dataclass(frozen=True, eq=False)
class Leading:
    """Leading Ritz pairs of the whole.

    Attributes:
        part, column: of each pair.
        values, residuals: of each, |A v - l v| over the largest value, by the recurrence.
        hidden: the residual, over what it may be, of the values behind: an open part may hide a larger one.
    """

    part: np.ndarray
    column: np.ndarray
    values: np.ndarray
    residuals: np.ndarray
    hidden: float

    def within(self, k: int, tol: float) -> bool:
        """Whether there are k pairs, good to a tolerance, and none that hides."""
        return len(self.values) == k and bool((self.residuals <= tol).all()) and self.hidden <= tol

    @property
    def sheet(self) -> np.ndarray:
        """How many of its part come before each: pairs with one number have parts of their own."""
        return np.array([int((self.part[:i] == part).sum()) for i, part in enumerate(self.part)])


class Bases:
    """A basis Q of each part, with A Q = H Q + C^T pending; all blocks are [part, row, coordinate].

    A part whose space is used up goes on with rows of zeros.
    """

    def __init__(self, operator: Counted, parts: Parts, rng: Random, like: Array, room: int) -> None:
        self.operator, self.parts, self.rng, self.like = operator, parts, rng, like
        self.most = room - WORKING  # rows of the basis
        self.basis: list[Array] = []
        self.projected = np.zeros((parts.count, 0, 0))
        self.pending, self.coupling = parts.split(no_rows(parts.order.size, like)), np.zeros((parts.count, 0, 0))
        self.scale, self.eps = 0.0, eps_of(like)
        self.inject()

    @property
    def size(self) -> int:
        """Rows of each part's basis."""
        return self.projected.shape[1]

    @property
    def is_full(self) -> bool:
        """Whether it has as many rows as pairs are looked for in."""
        return self.size >= min(COLUMNS, self.most)

    @property
    def open(self) -> bool:
        """Whether some part has more to find."""
        return bool((_squares(self.pending) > 0.5).any())

    def inject(self) -> None:
        """Further random rows of each part beside the pending ones."""
        rows = self.parts.split(self.rng.normal((BLOCK, self.parts.order.size), self.like))
        fresh, _c, _r = _orthonormal(rows, [*self.basis, self.pending], 1e-3)
        self.pending = array_namespace(fresh).concat([self.pending, fresh], axis=1)
        self.coupling = np.pad(self.coupling, ((0, 0), (0, BLOCK), (0, 0)))

    def expand(self) -> None:
        """Apply the operator to the pending rows, and make them part of the bases."""
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
        ranked = np.argsort(-np.where(there, values, -np.inf), axis=None)[: int(there.sum())]
        part, column = np.unravel_index(ranked, values.shape)
        norm = max(float(np.abs(values).max()), 1e-300)
        values, left = values[part, column] / norm, left[part, column] / norm
        following = k + np.unique(part[k:], return_index=True)[1]  # of each part the first that is not wanted
        behind = np.maximum(values[:k].min(initial=np.inf) - values[following], 0.0)
        hidden = left[following] - SMALL_PART * behind / self.parts.size**0.5
        return Leading(part[:k], column[:k], norm * values[:k], left[:k], float(hidden.max(initial=0.0)))

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

    def settle(self, k: int, tol: float, calls: int, callback: Callback | None) -> Leading | None:
        """Expand until the k largest pairs are within the tolerance by the recurrence; None where that takes long."""
        found = self.leading(k) if self.size else None
        while found is None or not found.within(k, tol):
            if self.is_full or self.operator.calls >= calls:
                return None
            self.expand()
            found = self.leading(k)
            if callback is not None:
                callback(self.operator.calls, found.residuals)
        return found

    def rest(self, rows: Array) -> Array:
        """(1 - Q Q^T) of rows [b, n]."""
        blocks = self.parts.split(rows)
        for q in self.basis * 2:
            blocks = blocks - _products(_products(blocks, _transposed(q)), q)
        return self.parts.join(blocks)


def leading_of(bases: Bases, k: int, tol: float, calls: int, callback: Callback | None = None) -> Leading | None:
    """The k largest pairs, with none missing as far as random rows tell; None where that takes long.

    Where as many of a part's agree as it had random rows, there may be more copies of the value: further rows are
    iterated for as long, until they change nothing.
    """

    found, steps = bases.settle(k, tol, calls, callback), len(bases.basis)
    while found is not None and _agree(found, CLUSTER * tol * found.values[0]):
        before = found.values
        bases.inject()
        for _ in range(steps):
            if bases.is_full:
                return None
            bases.expand()
        found = bases.settle(k, tol, calls, callback)
        if found is not None and (found.values - before <= tol * found.values[0]).all():
            return found
    return found


class MomentsOfParts:
    """tr A and |A|_F^2, or tr A alone: what the bases hold of them, and probes of the rest."""

    first = 2 * LEAST_SAMPLES  # the fewest samples that tell an error

    def __init__(self, bases: Bases, only_trace: bool) -> None:
        self.bases, self.moments = bases, 1 if only_trace else 2
        self.by_images = only_trace and isinstance(bases.operator, Product)  # <x, L* L x> = |L x|^2, half as dear
        self.grown, self.samples = 0, np.zeros((self.moments, 0))

    def __call__(self, samples: int) -> Moments:
        """From this many applications in all. Half of them go to the bases, which leave less and less to probes."""
        bases, operator = self.bases, self.bases.operator
        if samples >= 2 * self.grown and bases.size < bases.most:
            self._grow(samples)
        count = max(
            (2 * samples - operator.halves) // (1 if self.by_images else 2), LEAST_SAMPLES - self.samples.shape[1]
        )
        step = rows_at_once(2 * bases.parts.order.size, bases.like)
        drawn = [self._probes(min(step, count - i)) for i in range(0, count, step)]
        self.samples = np.concatenate([self.samples, *drawn], 1)
        known = np.array([np.trace(bases.projected, axis1=1, axis2=2).sum(), (bases.projected**2).sum()])
        known[1] += 2 * (bases.coupling**2).sum()
        found = known[: self.moments, None] + self.samples
        return of_samples(found, operator.applications, "unit by unit", eps_of(bases.like))

    def _grow(self, samples: int) -> None:
        """Bases of half of the applications; probes of what smaller ones left are of no more use."""
        bases, spent = self.bases, self.bases.operator.applications
        target = min(samples // 2, samples - LEAST_SAMPLES - (spent - bases.size), bases.most)
        while bases.open and bases.size + bases.pending.shape[1] <= target:
            bases.expand()
            self.samples = self.samples[:, :0]
        self.grown = samples

    def _probes(self, count: int) -> np.ndarray:
        """<x, A x> and |A x|^2 [moment, probe] of random x in what the bases leave, less what they hold of A x."""
        bases, operator = self.bases, self.bases.operator
        x = bases.rest(bases.rng.normal((count, bases.parts.order.size), bases.like))
        if self.by_images and isinstance(operator, Product):
            image = operator.forward(x)
            return to_numpy(row_dots(image, image))[None]
        return products(x, bases.rest(operator(x)))[: self.moments]


def _agree(found: Leading, width: float) -> bool:
    """Whether some part has as many values closer than `width` as it had random rows."""
    own = [np.sort(found.values[found.part == part]) for part in np.unique(found.part)]
    return any((values[BLOCK - 1 :] - values[: 1 - BLOCK] <= width).any() for values in own if len(values) >= BLOCK)


def _orthonormal(w: Array, basis: list[Array], floor: float) -> tuple[Array, np.ndarray, np.ndarray]:
    """w = c basis + r q in each part, with q orthonormal to each other and to the basis, or zero: q, c and r.

    Rows of q whose part of w is not larger than the floor are zeros.
    """
    eps = eps_of(w)
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
    return w * to_like(kept[:, :, None].astype(float), w), c, r * kept[:, None]


def _squares(w: Array) -> np.ndarray:
    return to_numpy(array_namespace(w).sum(w * w, axis=2)).astype(np.float64)


def _transposed(w: Array) -> Array:
    return array_namespace(w).permute_dims(w, (0, 2, 1))


def _products(a: Array, b: Array) -> Array:
    """Of each part's matrices."""
    with full_precision(b):
        return array_namespace(b).matmul(a, b)
