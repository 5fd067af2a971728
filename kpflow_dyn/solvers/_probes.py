"""Traces and norms from independent random probes: Hutchinson, Hutch++, and one side of a factor alone."""

from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, eps_of, joined, to_numpy
from kpflow_dyn._arrays.dots import gram, products, row_dots, row_norms
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn.solvers._doors import OfFactor, OfOperator
from kpflow_dyn.solvers._moments import Moments, check_samples, of_pairs, of_samples
from kpflow_dyn.solvers._orthogonalise import concat, orthonormalise, project_out


@dataclass(frozen=True)
class Hutchinson(OfOperator):
    """tr A = E x^T A x and |A|_F^2 = E |A x|^2 over standard normal x.

    Source: Girard (1987); Hutchinson, "A stochastic estimator of the trace of the influence matrix" (1990).

    >>> import numpy as np
    >>> found = Hutchinson().moments(lambda rows: 2 * rows, 1000, 200, like=np.zeros(1))
    >>> bool(abs(found.trace.value - 2000) < 4 * found.trace.stderr), found.trace.applications
    (True, 200)
    """

    def moments(self, apply: Rows, n: int, samples: int, *, like: Array, seed: int | Random = 0) -> Moments:
        """tr A and |A|_F^2 of an operator on rows [b, n] from `samples` applications.

        Raises:
            ValueError: fewer than 8 samples.
        """
        check_samples(samples)
        rows = Random(seed).normal((samples, n), like)
        return of_samples(products(rows, apply(rows)), samples, "Hutchinson", eps_of(like))


@dataclass(frozen=True)
class HutchPlusPlus(OfOperator):
    """A random range finder, and Hutchinson for the rest: with Q = orth(A Omega) and y = (1 - Q Q^T) x,

        tr A = tr Q^T A Q + E y^T A y        |A|_F^2 = |A Q|_F^2 + E |A y|^2

    A third of the applications, rounded down, goes to Omega, a third to Q, and the rest to x, so that it is unbiased
    for any number of them.

    Source: Meyer, Musco, Musco, Woodruff, "Hutch++: optimal stochastic trace estimation" (2021).

    >>> import numpy as np
    >>> found = HutchPlusPlus().moments(lambda rows: rows * 2.0 ** -np.arange(99), 99, 60, like=np.zeros(1))
    >>> round(found.trace.value, 3)
    2.0
    """

    def moments(self, apply: Rows, n: int, samples: int, *, like: Array, seed: int | Random = 0) -> Moments:
        """As `Hutchinson.moments`."""
        check_samples(samples)
        rng, rank = Random(seed), min(samples // 3, n)
        q, _c, _r = orthonormalise(apply(rng.normal((rank, n), like)), [], 0.0)
        y, _c = project_out(rng.normal((samples - 2 * rank, n), like), [q])
        known = products(q, apply(q)).sum(1, keepdims=True)
        return of_samples(known + products(y, apply(y)), samples, "Hutch++", eps_of(like))


@dataclass(frozen=True)
class OneSided(OfFactor):
    """tr L L* and |L L*|_F^2 from L* alone, or for `backward=L` from L alone: with z = L* x,

        tr = E |z|^2        |L L*|_F^2 = E <z, z'>^2 over independent z, z'

    Each costs half of an application. Best for traces of flat spectra; the norm needs many samples.

    Source: Hutchinson (1990); Kong, Valiant, "Spectrum estimation from samples", arXiv:1602.00061, for the norm.

    >>> import numpy as np
    >>> found = OneSided().moments(lambda rows: rows, 1000, 100, like=np.zeros(1))
    >>> bool(abs(found.trace.value - 1000) < 4 * found.trace.stderr)
    True
    """

    def moments(self, backward: Rows, n: int, samples: int, *, like: Array, seed: int | Random = 0) -> Moments:
        """Those of A = L L* from 2 `samples` rows through L*, [b, n] -> [b, p]; raises as `Hutchinson.moments`."""
        check_samples(samples)
        return moments_of_images(images_of_normal(backward, 2 * samples, n, Random(seed), like))

    def moments_product(
        self, factor: tuple[Rows, Rows], shape: tuple[int, int], samples: int, *, like: Array, seed: int | Random = 0
    ) -> Moments:
        """The same from both, of which it needs L* alone."""
        return self.moments(factor[1], shape[0], samples, like=like, seed=seed)


def images_of_normal(apply: Rows, count: int, n: int, rng: Random, like: Array) -> Array:
    """A map's images of independent standard normal rows [count, n], which are made a few at a time."""
    step = rows_at_once(n, like)
    sizes = (min(step, count - first) for first in range(0, count, step))
    return joined((apply(rng.normal((size, n), like)) for size in sizes), count)


def moments_of_images(images: Array) -> Moments:
    """tr and |.|_F^2 of L L* from independent images L* x [b, p]."""
    products = to_numpy(gram(images, images))
    traces = np.diag(products)
    pairs = np.stack([(traces[:, None] + traces) / 2, products**2])
    return of_pairs(pairs, (len(traces) + 1) // 2, "one-sided probes", eps_of(images))


@dataclass(frozen=True)
class KrylovDeflation(OfFactor):
    """Leading directions from a block Krylov space of G = L* L, probes for the rest: with Q its basis and W = G Q,

        tr = tr Q^T W + E |L y|^2        |L L*|_F^2 = 2 |W|_F^2 - |Q^T W|_F^2 + E |(1 - Q Q^T) G y|^2

    for y = (1 - Q Q^T) x. Better than a range finder where many eigenvalues matter and samples are many.

    Args:
        block: rows of the Krylov space's first block.

    Raises:
        ValueError: a block below 1.
    Source: Chen, Hallman, "Krylov-aware stochastic trace estimation" (2022).

    >>> import numpy as np
    >>> halves = (lambda rows: rows * 0.5 ** np.arange(99),) * 2
    >>> round(KrylovDeflation().moments(halves, (99, 99), 60, like=np.zeros(1)).trace.value, 3)
    1.333
    """

    block: int = 8

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}, expected at least 1")

    def moments(
        self, factor: tuple[Rows, Rows], shape: tuple[int, int], samples: int, *, like: Array, seed: int | Random = 0
    ) -> Moments:
        """As `XNysTrace.moments`; half of the applications are for the Krylov space."""
        check_samples(samples)
        (forward, backward), (_n, p), rng = factor, shape, Random(seed)
        space = KrylovSpace(lambda rows: backward(forward(rows)), rng.normal((self.block, p), like))
        space.grow(min(samples // 2, p))
        q = space.rows
        y, _c = project_out(rng.normal((samples - len(q), p), like), [q])
        image = forward(y)
        rest, _c = project_out(backward(image), [q])
        found = np.stack([to_numpy(row_dots(image, image)), to_numpy(row_dots(rest, rest))])
        return of_samples(space.moments()[:, None] + found, samples, "Krylov deflation and probes", eps_of(like))


class KrylovSpace:
    """An orthonormal basis Q of the block Krylov space of a symmetric G from start rows, and G Q, to any rank."""

    def __init__(self, apply: Rows, start: Array) -> None:
        self.apply, self.rows, self.images = apply, start[:0], start[:0]
        self.next = orthonormalise(start, [], 0.0)[0]

    def grow(self, rank: int) -> None:
        """Apply G to further rows, until there are `rank` of them or the space has ended."""
        basis, images = [self.rows], [self.images]
        while (left := rank - sum(len(rows) for rows in basis)) > 0 and len(self.next):
            fresh, waiting = self.next[:left], self.next[left:]
            basis.append(fresh)
            images.append(self.apply(fresh))
            floor = 4 * eps_of(fresh) * max(float(row_norms(image).max()) for image in images if len(image))
            self.next = concat([waiting, orthonormalise(images[-1], [*basis, waiting], floor)[0]])
        self.rows, self.images = concat(basis), concat(images)

    def moments(self) -> np.ndarray:
        """tr G and |G|_F^2, but for those of (1 - Q Q^T) G (1 - Q Q^T)."""
        inside = to_numpy(gram(self.rows, self.images))
        square = 2 * float(row_dots(self.images, self.images).sum()) - (inside**2).sum()
        return np.array([np.trace(inside), square])
