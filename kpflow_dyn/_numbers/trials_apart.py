"""tr A and |A|_F^2 of A = J J* that acts on trials: leading directions, and vectors of each trial's own for the rest.

With Q from a Krylov space of G = J* J, independent x_b of each trial b, and r_b = (1 - Q Q^T) J_b* x_b,

    tr A    = tr Q^T G Q + E sum_b |r_b|^2
    |A|_F^2 = 2 |G Q|_F^2 - |Q^T G Q|_F^2 + E sum_{b,c} <r_b, r'_c>^2

with r' from other x where b = c. Errors of trials average out in both, and so in the effective rank, while those of a
vector over all trials do not. Where there are many vectors, neighbouring trials are added up to fewer groups.
"""

from dataclasses import replace

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, eps_of, to_numpy
from kpflow_dyn._arrays.dots import dots, row_dots
from kpflow_dyn._arrays.memory import budget, bytes_of, rows_at_once
from kpflow_dyn._spaces.operators import GramOperator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn.solvers import Moments
from kpflow_dyn.solvers._moments import LEAST_SAMPLES, of_pairs_of_strata
from kpflow_dyn.solvers._orthogonalise import concat
from kpflow_dyn.solvers._probes import KrylovSpace

ROWS = 400  # images that are held: the products of many more would take longer than the sweeps
ROWS_BYTES = 2**30
BLOCK = 2  # rows of the Krylov space, which is better the deeper it goes
SEVERAL = 4  # groups, below which a sketch does as well
FEW = 2  # trials that make up most of the trace: then errors do not average out
METHOD = "leading directions, and each trial apart"


class TrialsApart:
    """The moments of A from more and more applications; most of them find directions, which is what helps most."""

    first = 2 * LEAST_SAMPLES  # the fewest samples that tell an error

    def __init__(self, op: GramOperator, rng: Random) -> None:
        forward, backward, self.p = on_rows(op.factor), on_rows(op.factor.T), op.factor.domain.size
        assert op.apart is not None
        self.apart, self.rng, self.like = op.apart, rng, op.domain.like
        self.backward, self.trials = on_rows(op.apart.T), op.apart.domain.shape[0]
        self.space = KrylovSpace(lambda rows: backward(forward(rows)), rng.normal((BLOCK, self.p), self.like))
        self.images: list[Array] = []  # J_b* x_b [group, sample, p], several samples at a time
        self.folds = 0  # how often neighbouring groups were added
        self.products = self.along = np.zeros((0, 0))  # of all images with each other, and with directions

    @staticmethod
    def serves(op: GramOperator, samples: int) -> bool:
        """Whether there are several trials, and room for images of several groups."""
        if op.apart is None or op.apart.domain.shape[0] < SEVERAL:
            return False
        return _room(op.factor.domain.size, op.domain.like) >= SEVERAL * samples

    def spread_out(self) -> bool:
        """Whether more than a few trials share tr A, by two vectors of each: else errors do not average out."""
        shape, rows = self._draw(2), self.images[0].reshape((-1, self.p))
        shares = to_numpy(row_dots(rows, rows)).reshape(shape).mean(1)
        return shares.sum() ** 2 > FEW * (shares**2).sum()

    def __call__(self, samples: int) -> Moments:
        """From this many applications in all, no fewer than before."""
        count = max(LEAST_SAMPLES, samples // 4, min(ROWS // self.trials, 2 * samples // 3))
        self.space.grow(samples - (count + 1) // 2)
        shape = self._draw(count)
        products = self._rest()
        squares, pairs = products.diagonal().reshape(shape), (products**2).reshape(shape * 2)
        found = of_pairs_of_strata(squares, pairs, samples, METHOD, eps_of(self.like))
        return replace(found, means=found.means + self.space.moments())

    def _rest(self) -> np.ndarray:
        """Products of (1 - Q Q^T) times the images."""
        rows = self.images[0].reshape((-1, self.p))
        if len(self.products) != len(rows):
            self.products, self.along = to_numpy(dots(rows, rows)), np.zeros((len(rows), 0))
        fresh = self.space.rows[self.along.shape[1] :]
        self.along = np.hstack([self.along, to_numpy(dots(rows, fresh))])
        return self.products - self.along @ self.along.T

    def _draw(self, count: int) -> tuple[int, int]:
        """Images of this many x, added up within groups of trials; how many groups and samples there are."""
        xp = array_namespace(self.like)
        while count * -(-self.trials >> self.folds) > self._most(count) and self.trials > 2**self.folds:
            self.folds, self.images = self.folds + 1, [_folded(z) for z in self.images]
        step = rows_at_once(max(self.apart.domain.size, self.apart.codomain.size), self.like)
        for first in range(sum(z.shape[1] for z in self.images), count, step):
            x = self.rng.normal((min(step, count - first), self.apart.codomain.size), self.like)
            z = self.backward(x).reshape((-1, self.trials, self.p))
            z = xp.permute_dims(z, (1, 0, 2))  # trials may be sharded
            for _ in range(self.folds):
                z = _folded(z)
            self.images.append(z)
        self.images = [xp.concat(self.images, axis=1)]
        groups, held, _p = self.images[0].shape
        return groups, held

    def _most(self, count: int) -> int:
        """The most images that are held."""
        return min(max(ROWS, SEVERAL * count), _room(self.p, self.like))


def _room(p: int, like: Array) -> int:
    """How many images there is room for, half of a budget being for the space."""
    left = budget()
    return (ROWS_BYTES if left is None else min(ROWS_BYTES, left // 4)) // bytes_of(p, like)


def _folded(images: Array) -> Array:
    """Images [group, sample, p] of half as many groups, each the sum of two neighbours; an odd one stays."""
    even = len(images) // 2 * 2
    return concat([images[0:even:2] + images[1:even:2], images[even:]])
