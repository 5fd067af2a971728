"""From starts to points: where Levenberg and Marquardt's method ends, which ends are points, and what they are.

All numbers here are in the search's own units, in which states are of size one and a field has rates of about one. So
the results do not hang on the units of the model.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy, to_numpy
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn.dynamics._deflation import deflated
from kpflow_dyn.dynamics._levenberg import Residual, minimise

OUTLIER, POLISH, SMALL = 10.0, 6, 1e-8
REST, ROUND_OFF = 2e-11, 30.0  # the speed of a fixed point over 1 + |z|: at most this, or this many eps


class Units(NamedTuple):
    """What is one in the search: a length of states, and a rate per unit of time (of a map 1)."""

    length: float
    rate: float

    @property
    def speed(self) -> float:
        """Of r."""
        return self.length * self.rate


def size(*arrays: np.ndarray) -> float:
    """The largest entry of some arrays; 1 where all are zero."""
    return max(float(np.abs(a).max(initial=0)) for a in arrays) or 1.0


class Ends(NamedTuple):
    """Where starts came to: inputs x [n, input], starts and ends [n, unit], and q of the ends [n]."""

    x: np.ndarray
    start: np.ndarray
    z: np.ndarray
    q: np.ndarray

    def __add__(self, others: Any) -> Ends:
        return Ends(*(np.concatenate(pair) for pair in zip(self, others, strict=True)))

    def some(self, rows: np.ndarray) -> Ends:
        return Ends(*(a[rows] for a in self))

    def fixed(self, eps: float) -> Ends:
        """Without those that are not fixed to round-off."""
        return self._replace(q=np.where(self.at_rest(eps), self.q, np.inf))

    def at_rest(self, eps: float) -> np.ndarray:
        """Which are fixed to round-off."""
        return _at_rest((2 * self.q) ** 0.5, self.z, eps)

    def near(self, box: np.ndarray | None) -> np.ndarray:
        """Which did not run away: from the starts, or where states return to a box [2, unit], beyond it."""
        largest = float(np.linalg.norm(self.start, axis=1).max())
        corner = 0.0 if box is None else float(np.linalg.norm(np.abs(box).max(0)))
        return np.linalg.norm(self.z, axis=1) <= max(OUTLIER * max(largest, self.z.shape[1] ** 0.5), corner)


def merged(
    x: np.ndarray, z: np.ndarray, q: np.ndarray, counts: np.ndarray, unique: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of points none of which is nearer to another than `unique`, those of least q, and their counts.

    `unique` may be one distance for each point.

    `counts` says how many starts led to each row; those to which none did are left out. The largest count is first.
    """
    rows = np.concatenate([z, x], 1).astype(np.float64)
    unique = np.broadcast_to(unique, len(rows))
    order = np.argsort(q, kind="stable")
    left = order[counts[order] > 0]
    found: list[tuple[int, int]] = []
    while len(left):
        same = np.linalg.norm(rows[left] - rows[left[0]], axis=1) <= unique[left[0]]
        found.append((left[0], int(counts[left[same]].sum())))
        left = left[~same]
    found.sort(key=lambda point: -point[1])
    numbers, totals = np.array(found, int).reshape(-1, 2).T
    return numbers, totals


class Polished(NamedTuple):
    """Points z [n, unit], r [n, unit] = F(z) - z or f(z), J = dr/dz [n, unit, unit], the last change of q [n]."""

    z: np.ndarray
    r: np.ndarray
    J: np.ndarray
    dq: np.ndarray
    eps: float

    def some(self, rows: np.ndarray) -> Polished:
        return Polished(self.z[rows], self.r[rows], self.J[rows], self.dq[rows], self.eps)

    @property
    def isolated(self) -> np.ndarray:
        """Which are fixed, and alone in their surroundings."""
        return self.fixed & ~self.degenerate

    @property
    def fixed(self) -> np.ndarray:
        """Which are fixed to round-off."""
        return _at_rest(np.linalg.norm(self.r, axis=1), self.z, self.eps)

    @property
    def degenerate(self) -> np.ndarray:
        """Where J is singular to half the digits, so that no single point need be there."""
        sizes = np.linalg.svd(self.J, compute_uv=False)
        return sizes[:, -1] <= self.eps**0.5 * np.maximum(sizes[:, 0], 1)

    @property
    def errors(self) -> np.ndarray:
        """How far off isolated points may be [n], by the speed that counts as none; 0 for others."""
        slopes = np.linalg.svd(self.J, compute_uv=False)[:, -1]
        return np.where(self.isolated, _resting(self.z, self.eps) / np.where(slopes > 0, slopes, 1), 0)


def _at_rest(speed: np.ndarray, z: np.ndarray, eps: float) -> np.ndarray:
    return speed <= _resting(z, eps)


def _resting(z: np.ndarray, eps: float) -> np.ndarray:
    """The largest speed that counts as none."""
    return max(REST, ROUND_OFF * eps) * (1 + np.linalg.norm(z, axis=1))


class Search:
    """A model, asked at rows of inputs x [n, input] and states z [n, unit]."""

    def __init__(
        self, problem: DiscreteProblem | ODEProblem, x: np.ndarray, z: np.ndarray, like: Array, length: float
    ) -> None:
        self.like, self.continuous = like, isinstance(problem, ODEProblem)
        one = like_numpy(length * z[:1], like)
        self.dynamics = problem.backend.dynamics.Dynamics(problem, like_numpy(x[:1], like), one)
        self.rounded, self.compiled = problem.backend.solving.rounded, problem.backend.transforms.compiled
        self.eps = float(np.finfo(to_numpy(one).dtype).eps)
        self.units = Units(length, 1.0)

    def at(self, x: Array, z: Array) -> tuple[Array, Array]:
        """F(z) - z and its Jacobian, or f and its own."""
        length, rate = self.units
        F, J = self.dynamics(x, length * z)
        if self.continuous:
            return F / length / rate, J / rate
        return (F - length * z) / length, J - like_numpy(np.eye(z.shape[1]), z)

    def residual(self, x: np.ndarray) -> Residual:
        """`at`, of rows by their numbers."""
        inputs = like_numpy(x, self.like)
        xp, place = array_namespace(inputs), device(inputs)
        return lambda numbers, z: self.at(xp.take(inputs, xp.asarray(numbers, device=place), axis=0), z)

    def in_numpy(self, x: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`at`, in float64; rows are repeated up to a number for which a framework may have compiled it."""
        count = len(z)
        filled = np.minimum(np.arange(self.rounded(count)), count - 1)
        r, J = self.at(like_numpy(x[filled], self.like), like_numpy(z[filled], self.like))
        return to_numpy(r)[:count].astype(np.float64), to_numpy(J)[:count].astype(np.float64)

    def begin(self, x: np.ndarray, z: np.ndarray) -> None:
        """Take the unit of time from the starts; raise where F is a number at one and its Jacobian is not."""
        r, J = self.in_numpy(x, z)
        for n in np.flatnonzero(np.isfinite(r).all(1) & ~np.isfinite(J).all((1, 2)))[:1]:
            raise ValueError(
                f"the Jacobian at start {n}, z = {np.array2string(self.units.length * z[n], threshold=8)}, holds NaN "
                "or inf, though the model gives numbers there; where and sqrt pass on derivatives of what they leave "
                "out, so keep the argument of sqrt or a division away from zero, or start elsewhere"
            )
        known = np.isfinite(r).all(1)
        if self.continuous and known.any():
            speeds, slopes = (np.linalg.norm(a[known].reshape(known.sum(), -1), axis=1) for a in (r, J))
            usual = max(float(np.median(speeds)), float(np.median(slopes)))
            self.units = self.units._replace(rate=usual / z.shape[1] ** 0.5 or 1.0)

    def ends(self, x: np.ndarray, start: np.ndarray, iterations: int) -> Ends:
        """Where q has a minimum near each start."""
        z = minimise(self.residual(x), like_numpy(start, self.like), iterations, self.compiled)
        return Ends(x, start, z, self._q(x, z))

    def others(self, x: np.ndarray, start: np.ndarray, iterations: int, known: np.ndarray, scale: float) -> Ends:
        """Zeros near each start other than the known points; the starts that lead to none have q = inf."""
        without = deflated(self.residual(x), known, scale, self.compiled)
        z = minimise(without, like_numpy(start, self.like), iterations, self.compiled)
        near = self._q(x, z) <= SMALL
        if not near.any():
            return Ends(x, start, z, np.full(len(z), np.inf))
        again = self.ends(x, np.where(near[:, None], z, z[near.argmax()]), iterations)  # of q itself
        return again._replace(start=start, q=np.where(near, again.q, np.inf))

    def _q(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        r, _ = self.in_numpy(x, z)
        return np.where(np.isfinite(r).all(1), (r**2).sum(1) / 2, np.inf)

    def polished(self, x: np.ndarray, z: np.ndarray, unique: float) -> Polished:
        """After Newton steps that lower q and do not leave the point."""
        z, dq, units = z.astype(np.float64), np.zeros(len(z)), z.shape[1]
        if not len(z):
            return Polished(z, z, np.zeros((0, units, units)), dq, self.eps)
        r, J = self.in_numpy(x, z)
        most = np.maximum(unique, Polished(z, r, J, dq, self.eps).errors)
        for _ in range(POLISH):
            step = (np.linalg.pinv(J, rcond=1e-8) @ r[..., None])[..., 0]
            candidate = to_numpy(like_numpy(z - step, self.like)).astype(np.float64)
            r_next, J_next = self.in_numpy(x, candidate)
            change = ((r**2).sum(1) - (r_next**2).sum(1)) / 2
            better = (change > 0) & (np.linalg.norm(step, axis=1) <= most) & np.isfinite(J_next).all((1, 2))
            if not better.any():
                break
            dq = np.where(better, change, dq)
            z, r = (np.where(better[:, None], new, old) for new, old in ((candidate, z), (r_next, r)))
            J = np.where(better[:, None, None], J_next, J)
        return Polished(z, r, J, dq, self.eps)
