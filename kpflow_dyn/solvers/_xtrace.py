"""XTrace and XNysTrace: every random probe tests what all the others built.

Let Q be an orthonormal basis of the images of m probes. Without probe i the space loses one direction s_i, the unit
vector of span Q that is orthogonal to all other images; without i and j it loses span{s_i, s_j}. So small matrices give
all estimates without one and without two probes, and from these the mean and its covariance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, eps_of, to_numpy
from kpflow_dyn._arrays.dots import dots, gram, products, row_dots, row_norms
from kpflow_dyn._arrays.memory import bytes_of, in_blocks, within_budget
from kpflow_dyn.solvers._doors import OfFactor, OfOperator
from kpflow_dyn.solvers._moments import Moments, check_samples, exact, of_exchangeable, of_samples
from kpflow_dyn.solvers._orthogonalise import combine, orthonormalise, project_out
from kpflow_dyn.solvers._probes import images_of_normal

LIFTED_BYTES = 2**32  # of the images of a basis in the larger space that may be held at once


@dataclass(frozen=True)
class XTrace(OfOperator):
    """tr A and |A|_F^2 of any A: for a probe x_i, Q_i a basis of all other images A x and y_i = (1 - Q_i Q_i^T) x_i,

        tr A = E[ tr Q_i^T A Q_i + c_i y_i^T A y_i ]        |A|_F^2 = E[ |A Q_i|_F^2 + c_i |A y_i|^2 ]

    where c_i = (n - m + 1) / |y_i|^2 keeps the random length of y_i from adding to the error.

    Source: Epperly, Tropp, Webber, "XTrace: making the most of every sample in stochastic trace estimation",
    arXiv:2301.07825, for the trace; the second line is the same for the norm.

    >>> import numpy as np
    >>> spectrum = 1.0 / np.arange(1, 1001) ** 2
    >>> found = XTrace().moments(lambda rows: rows * spectrum, 1000, 100, like=spectrum)
    >>> bool(abs(found.trace.value - spectrum.sum()) < 4 * found.trace.stderr < 0.01)
    True
    """

    def moments(self, apply: Rows, n: int, samples: int, *, like: Array, seed: int | Random = 0) -> Moments:
        """As `Hutchinson.moments`; half of the applications are to random probes."""
        check_samples(samples)
        count = min(samples // 2, max(n, 2))  # two tell how far they differ
        x = Random(seed).normal((count, n), like)
        images = apply(x)
        q, r = _basis(images)
        z = apply(q)
        inside, squares = to_numpy(gram(q, z)), to_numpy(gram(z, z))
        known = np.array([np.trace(inside), np.trace(squares)])
        if len(q) < count or count == n:  # Q spans the whole range of A whatever the probes, which then only test
            y, c = project_out(x, [q])
            rest = products(y, images - combine(c, [z]))
            return of_samples(known[:, None] + rest, count + len(q), "XTrace: the whole range", eps_of(like))
        w, wz = to_numpy(gram(q, x)), to_numpy(gram(z, x))
        lengths, image_lengths = (to_numpy(row_dots(rows, rows))[:, None] for rows in (x, images))

        def without(out: _LeftOut) -> np.ndarray:
            length = lengths - out.inner(w) + out.square(np.eye(count))
            scale = (n - count + out.count) / length
            trace = out.inner(r) - out.rest(wz) - out.rest(r) + out.rest_square(inside)
            square = image_lengths - 2 * out.rest(inside.T @ r) + out.rest_square(squares)
            return np.stack(
                [known[0] - out.trace(inside) + scale * trace, known[1] - out.trace(squares) + scale * square]
            )

        return _mean(without, r, w, 2 * count, "XTrace", eps_of(like))


@dataclass(frozen=True)
class XNysTrace(OfFactor):
    """tr and |.|_F^2 of A = L L*: for a probe x_i, z_i = L* x_i, Q_i a basis of all other z and C_i = (L Q_i)^T L Q_i,

        tr A    = E[ tr C_i + |(1 - Q_i Q_i^T) z_i|^2 ]
        |A|_F^2 = E[ |C_i|_F^2 + |L z_i|^2 - (Q_i^T z_i)^T C_i Q_i^T z_i ]

    One L and one L* for each probe; every probe helps to build the bases, and tests one.

    Source: Epperly, Tropp, Webber, arXiv:2301.07825, for the trace; the second line is the same for (L* L)^2.

    >>> import numpy as np
    >>> root = 1.0 / np.arange(1, 1001)
    >>> halves = (lambda rows: rows * root,) * 2
    >>> found = XNysTrace().moments(halves, (1000, 1000), 50, like=root)
    >>> bool(abs(found.trace.value - (root**2).sum()) < 4 * found.trace.stderr < 0.01)
    True
    """

    def moments(
        self, factor: tuple[Rows, Rows], shape: tuple[int, int], samples: int, *, like: Array, seed: int | Random = 0
    ) -> Moments:
        """tr and |.|_F^2 of A = L L*; arguments as for `FactorTraceEstimator.trace_product`. Q is on the smaller side.

        Raises:
            ValueError: fewer than 8 samples.
        """
        check_samples(samples)
        forward, backward = factor if shape[1] <= shape[0] else factor[::-1]
        images = images_of_normal(backward, samples, max(shape), Random(seed), like)
        sketch = NystromSketch((forward, backward), max(shape))
        sketch.add(images)
        return sketch.moments()


class NystromSketch:
    """The moments of L L* by `XNysTrace`, from more and more images L* x of independent standard normal probes.

    Args:
        factor: L and L*.
        n: the length of the vectors that L gives.
    """

    def __init__(self, factor: tuple[Rows, Rows], n: int) -> None:
        self.factor, self.n, self.count = factor, n, 0
        self.basis: list[Array] = []
        self.lifted: list[Array] | None = []  # L of the basis; None where that is too long to be held
        self.r = self.inside = np.zeros((0, 0))  # the images as columns in coordinates of the basis Q; Q L* L Q^T

    def add(self, images: Array) -> None:
        """Take further images [b, p]."""
        floor = 10 * eps_of(images) * float(row_norms(images).max())
        fresh, c, own = orthonormalise(images, self.basis, floor)
        columns = np.hstack([to_numpy(c), to_numpy(own)]).T
        self.r = np.hstack([np.pad(self.r, ((0, len(fresh)), (0, 0))), columns])
        self.count += len(images)
        if len(fresh):
            cross, among = self._products(fresh)
            self.inside = np.block([[self.inside, cross.T], [cross, among]])
            self.basis.append(fresh)

    def moments(self) -> Moments:
        """tr and |.|_F^2."""
        inside, squared, r, count = self.inside, self.inside @ self.inside, self.r, self.count
        known = np.array([np.trace(inside), np.trace(squared)])
        if len(inside) < count:
            return exact(known, count, "exact: the whole range")

        def without(out: _LeftOut) -> np.ndarray:
            trace = known[0] - out.trace(inside) + out.square(np.eye(count))
            square = known[1] - 2 * out.trace(squared) + out.trace_square(inside)
            return np.stack([trace, square + 2 * out.along(inside @ r) - out.square(inside)])

        return _mean(without, r, r, count, "XNysTrace", eps_of(self.basis[0]))

    def _products(self, fresh: Array) -> tuple[np.ndarray, np.ndarray]:
        """F L* L Q^T and F L* L F^T of new rows F of the basis, by L of all of it where that may be held."""
        needed = bytes_of(2 * (len(self.inside) + len(fresh)) * self.n, fresh)
        if self.lifted is not None and within_budget(needed) and needed <= LIFTED_BYTES:
            image, others = self.factor[0](fresh), self.lifted
            own, self.lifted = image, [*self.lifted, image]
        else:
            forward, backward = self.factor
            image = in_blocks(lambda rows: backward(forward(rows)), self.n, fresh)(fresh)
            own, others, self.lifted = fresh, self.basis, None
        cross = [np.zeros((len(fresh), 0)), *(to_numpy(dots(image, other)) for other in others)]
        among = to_numpy(dots(image, own))
        return np.hstack(cross), (among + among.T) / 2


def _basis(images: Array) -> tuple[Array, np.ndarray]:
    """Orthonormal rows that span the images, fewer where these are dependent, and the images in it as columns."""
    q, _c, r = orthonormalise(images, [], 10 * eps_of(images) * float(row_norms(images).max()))
    return q, to_numpy(r).T


def _mean(
    without: Callable[[_LeftOut], np.ndarray], r: np.ndarray, w: np.ndarray, applications: int, method: str, eps: float
) -> Moments:
    """The mean of the estimates [moment, i, 1] that leave out one probe; those that leave out two give its error."""
    one, two = (without(_LeftOut(r, w, pairs)) for pairs in (False, True))
    return of_exchangeable(one[:, :, 0], two, applications, method, eps)


class _LeftOut:
    """The projector P on the directions that the space loses without probe i, or i and j: for all [i, j] or [i, 1].

    The images r of the probes, and the vectors w that P is applied to, are columns in coordinates of Q [m, i]. Entries
    with i = j are not to be used for `pairs`.
    """

    def __init__(self, r: np.ndarray, w: np.ndarray, pairs: bool) -> None:
        directions = np.linalg.inv(r).T
        self.s, self.w = directions / np.linalg.norm(directions, axis=0), w
        self.count, self.pairs = 1 + pairs, pairs
        self.c = (self.s.T @ self.s) * ~np.eye(len(r), dtype=bool) if pairs else np.zeros((len(r), 1))
        self.k = 1 - self.c**2
        on_i, on_j = self._along(w)
        self.a, self.b = (on_i - self.c * on_j) / self.k, (on_j - self.c * on_i) / self.k  # P w_i = a s_i + b s_j

    def trace(self, matrix: np.ndarray) -> np.ndarray:
        """tr P M."""
        ii, jj, ij, ji = self._between(matrix)
        return (ii + jj - self.c * (ij + ji)) / self.k

    def trace_square(self, matrix: np.ndarray) -> np.ndarray:
        """tr P M P M of a symmetric M."""
        ii, jj, ij, _ji = self._between(matrix)
        c, k = self.c, self.k
        return ((ii - c * ij) ** 2 + 2 * (ij - c * jj) * (ij - c * ii) + (jj - c * ij) ** 2) / k**2

    def along(self, vectors: np.ndarray) -> np.ndarray:
        """<v_i, P w_i>."""
        on_i, on_j = self._along(vectors)
        return self.a * on_i + self.b * on_j

    def square(self, matrix: np.ndarray) -> np.ndarray:
        """<P w_i, M P w_i>."""
        ii, jj, ij, ji = self._between(matrix)
        return self.a**2 * ii + self.a * self.b * (ij + ji) + self.b**2 * jj

    def inner(self, vectors: np.ndarray) -> np.ndarray:
        """<v_i, w_i>."""
        return np.einsum("ki,ki->i", vectors, self.w)[:, None]

    def rest(self, vectors: np.ndarray) -> np.ndarray:
        """<v_i, w_i - P w_i>."""
        return self.inner(vectors) - self.along(vectors)

    def rest_square(self, matrix: np.ndarray) -> np.ndarray:
        """<w_i - P w_i, M (w_i - P w_i)>."""
        return self.inner(matrix @ self.w) - self.along((matrix + matrix.T) @ self.w) + self.square(matrix)

    def _along(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """<v_i, s_i> and <v_i, s_j>."""
        on = vectors.T @ self.s
        return np.diag(on)[:, None], on if self.pairs else 0 * on[:, :1]

    def _between(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """<s_i, M s_i>, <s_j, M s_j>, <s_i, M s_j>, <s_j, M s_i>."""
        on = self.s.T @ matrix @ self.s
        own = np.diag(on)[:, None]
        return (own, own.T, on, on.T) if self.pairs else (own, 0 * own, 0 * own, 0 * own)
