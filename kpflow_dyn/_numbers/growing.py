"""tr A and |A|_F^2 of A = J J* from more and more applications, so that an estimate can stop where its bar is there.

Nothing is applied twice: images J* x of random x are kept, and so is what was found of them. For the trace alone each
trial b has its own x_b where that is known,

    tr A = E sum_b |J_b* x_b|^2        J* x = sum_b J_b* x_b

so that the errors of the trials average out; and the sum over trials is an image that a sketch can use.
"""

from __future__ import annotations

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, eps_of, to_numpy
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._numbers.by_parts import bases_of
from kpflow_dyn._numbers.trials_apart import TrialsApart
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.rows import on_rows, sides_of
from kpflow_dyn.solvers import Moments
from kpflow_dyn.solvers._direct_sum import MomentsOfParts
from kpflow_dyn.solvers._moments import LEAST_SAMPLES, of_strata
from kpflow_dyn.solvers._orthogonalise import concat
from kpflow_dyn.solvers._probes import images_of_normal, moments_of_images
from kpflow_dyn.solvers._xtrace import NystromSketch

FLAT = 8  # a sketch has nothing to take out where the effective rank is this many times the samples
FEW, SOME = 4, 16  # samples that tell an error: of several trials each by itself, and of a sketch
MANY = 100  # samples that trials by themselves have room for, or are not taken
SEVERAL = 4


def growing(op: GramOperator, rng: Random, only_trace: bool) -> MomentsOfParts | TrialsApart | Growing:
    """What gives the moments of A from more and more applications: by parts, by trials, or as a whole."""
    bases = bases_of(op, rng)
    if bases is not None:
        return MomentsOfParts(bases, only_trace)
    if not only_trace and TrialsApart.serves(op, MANY):
        by_trials = TrialsApart(op, rng)
        if by_trials.spread_out():
            return by_trials
    return Growing(op, rng, only_trace)


class Growing:
    """The moments of A, or those that give tr A best where nothing else is wanted.

    By XNysTrace, or one side alone where only the trace is wanted and the sketch finds too little to take out.
    """

    def __init__(self, op: GramOperator, rng: Random, only_trace: bool) -> None:
        (forward, self.backward), (self.n, _p) = sides_of(op)
        self.rng, self.only_trace, self.like = rng, only_trace, op.domain.like
        self.apart = op.apart if only_trace else None
        self.shared = self.apart is not None and op.domain.size == self.n  # images are sums over trials
        self.sketch = NystromSketch((forward, self.backward), self.n)
        self.images: list[Array] = []
        self.squares = np.zeros((0, 0))  # |J_b* x_b|^2 [trial, sample]

    @property
    def first(self) -> int:
        """The fewest samples that tell an error."""
        if not self.only_trace:
            return SOME
        several = self.apart is not None and self.apart.domain.shape[0] >= SEVERAL
        return FEW if several else LEAST_SAMPLES

    def __call__(self, samples: int) -> Moments:
        """From this many applications in all, no fewer than before."""
        images = self._images(samples)
        if self.only_trace:
            trace, square = moments_of_images(images).means
            rank = trace**2 / square if square > 0 else np.inf
            if self.apart is not None and rank > samples:
                self._draw_apart(self.apart, samples)
                return of_strata(self.squares, samples, "one-sided probes, each trial apart", eps_of(self.like))
            if rank > FLAT * samples:
                return moments_of_images(self._images(2 * samples))
        samples = max(samples, LEAST_SAMPLES)
        self.sketch.add(self._images(samples)[self.sketch.count : samples])
        return self.sketch.moments()

    def _images(self, count: int) -> Array:
        """The first images of one side."""
        held = sum(len(rows) for rows in self.images)
        if held < count and self.shared and self.apart is not None:
            self._draw_apart(self.apart, count)
        elif held < count:
            self.images.append(images_of_normal(self.backward, count - held, self.n, self.rng, self.like))
        self.images = [concat(self.images)]
        return self.images[0][:count]

    def _draw_apart(self, factor: Operator, count: int) -> None:
        """Further vectors of each trial's own through J_b*, a few at a time; and the images that they add up to."""
        backward, (trials, p), turn = on_rows(factor.T), factor.domain.shape, array_namespace(self.like).permute_dims
        step = rows_at_once(max(factor.domain.size, factor.codomain.size), self.like)
        while (held := self.squares.shape[-1]) < count:
            number = min(step, count - held)
            z = backward(self.rng.normal((number, factor.codomain.size), self.like)).reshape((number, trials, p))
            if self.shared:
                self.images.append(array_namespace(z).sum(z, axis=1))
            rows = turn(z, (1, 0, 2)).reshape((trials * number, p))  # trials outermost: they may be sharded
            # sums in the dtype: bars are no smaller than its round-off
            squares = to_numpy(array_namespace(z).sum(rows * rows, axis=1)).astype(np.float64).reshape(trials, number)
            self.squares = np.hstack([self.squares, squares]) if held else squares
