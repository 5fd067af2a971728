"""Zeros and local minima of many small systems at once, by damped Gauss-Newton steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kpflow_dyn.arrays import Array, array_namespace, device, to_numpy
from kpflow_dyn.solvers.orthogonalise import eps_of

Residual = Callable[[np.ndarray, Array], tuple[Array, Array]]
"""(numbers of the rows [n], z [n, unit]) -> r [n, unit] and dr/dz [n, unit, unit]."""

LESS, MORE, LEAST, MOST = 0.2, 4.0, 1e-8, 1e12  # of the damping
FLAT = 1e-7  # cosine between r and the image of dr/dz below which q has a minimum
SMALLEST = 16  # a batch that is not made smaller


def minimise(residual: Residual, z: Array, iterations: int) -> Array:
    """Levenberg and Marquardt's method on 1/2 |r|^2 for each row of z [n, unit].

        z <- z - (J^T J + mu |r|)^{-1} J^T r

    with mu smaller after a step that lowers |r|, and larger after one that does not, which is taken back. Damping by
    |r| keeps convergence quadratic where zeros are not isolated. Rows that are done leave the batch, once half are.

    Source: Fan, Yuan, "On the quadratic convergence of the Levenberg-Marquardt method without nonsingularity
    assumption", Computing 74, 23 (2005).
    """
    found, left = to_numpy(z).copy(), np.arange(len(z))
    batch = _Batch(residual, left, z)
    for _ in range(iterations):
        done = batch.done()
        if done.all():
            break
        if len(left) > SMALLEST and 2 * done.sum() >= len(left):
            found[left] = to_numpy(batch.z)
            left = left[~done]
            batch.keep(~done)
        batch.step()
    found[left] = to_numpy(batch.z)
    return found


class _Batch:
    """Rows with their residuals, Jacobians and damping."""

    def __init__(self, residual: Residual, numbers: np.ndarray, z: Array) -> None:
        self.residual, self.numbers, self.z = residual, numbers, z
        self.xp, self.eps = array_namespace(z), eps_of(z)
        self.r, self.J = residual(numbers, z)
        self.mu = self.xp.ones_like(z[:, 0])

    def keep(self, which: np.ndarray) -> None:
        """Leave the others out."""
        index = self.xp.asarray(np.flatnonzero(which), device=device(self.z))
        self.numbers = self.numbers[which]
        self.z, self.r, self.J, self.mu = (self.xp.take(a, index, axis=0) for a in (self.z, self.r, self.J, self.mu))

    def done(self) -> np.ndarray:
        """Which rows are at a zero or a minimum, to round-off, or got nowhere."""
        size, zero = _norm(self.r), 1e3 * self.eps * (1 + _norm(self.z))
        slope = _norm(self._gradient()) <= FLAT * size * _norm(self.J)
        return to_numpy(~(size > zero) | slope | (self.mu > MOST))

    def step(self) -> None:
        """One step of every row."""
        xp, eye = self.xp, self.xp.eye(self.z.shape[1], dtype=self.z.dtype, device=device(self.z))
        square = xp.matrix_transpose(self.J) @ self.J
        damping = self.mu * _norm(self.r) + self.eps * (1 + _norm(self.J) ** 2)
        candidate = self.z - xp.linalg.solve(square + damping[:, None, None] * eye, self._gradient()[..., None])[..., 0]
        r, J = self.residual(self.numbers, candidate)
        better = (_norm(r) < _norm(self.r)) & xp.isfinite(_norm(J))
        self.mu = xp.where(better, xp.clip(LESS * self.mu, LEAST, None), MORE * self.mu)
        self.z = xp.where(better[:, None], candidate, self.z)
        self.r, self.J = xp.where(better[:, None], r, self.r), xp.where(better[:, None, None], J, self.J)

    def _gradient(self) -> Array:
        return (self.xp.matrix_transpose(self.J) @ self.r[..., None])[..., 0]


def _norm(a: Array) -> Array:
    """Of each row [n, ...]."""
    flat = a.reshape((a.shape[0], -1))
    return array_namespace(a).linalg.vector_norm(flat, axis=1)
