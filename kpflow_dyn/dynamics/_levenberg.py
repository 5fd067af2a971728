"""Zeros and local minima of many small systems at once, by damped Gauss-Newton steps."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, eps_of, to_numpy

Residual = Callable[[np.ndarray, Array], tuple[Array, Array]]
"""(numbers of the rows [n], z [n, unit]) -> r [n, unit] and dr/dz [n, unit, unit]."""
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

LESS, MORE, LEAST, MOST = 0.2, 4.0, 1e-8, 1e12  # of the damping
FLAT = 1e-7  # cosine between r and the image of dr/dz below which q has a minimum
SMALLEST = 16  # a batch that is not made smaller


class Rows(NamedTuple):
    """States z, residuals r, Jacobians J and damping mu of some rows."""

    z: Array
    r: Array
    J: Array
    mu: Array


def minimise(residual: Residual, z: Array, iterations: int, compiled: Compile) -> np.ndarray:
    """Levenberg and Marquardt's method on 1/2 |r|^2 for each row of z [n, unit].

        z <- z - (J^T J + mu |r|)^{-1} J^T r

    with mu smaller after a step that lowers |r|, and larger after one that does not, which is taken back. Damping by
    |r| keeps convergence quadratic where zeros are not isolated. Rows that are done leave the batch, once half are.
    `compiled` makes a function of arrays fast, as the framework does.

    Source: Fan, Yuan, "On the quadratic convergence of the Levenberg-Marquardt method without nonsingularity
    assumption", Computing 74, 23 (2005).
    """
    propose, choose, at_end = compiled(_proposed), compiled(_chosen), compiled(_done)
    found, left = to_numpy(z).copy(), np.arange(len(z))
    rows = Rows(z, *residual(left, z), array_namespace(z).ones_like(z[:, 0]))
    for _ in range(iterations):
        done = to_numpy(at_end(rows))
        if done.all():
            break
        if len(left) > SMALLEST and 2 * done.sum() >= len(left):
            found[left] = to_numpy(rows.z)
            count = SMALLEST * 2 ** max(0, int(len(left) - done.sum() - 1) // SMALLEST).bit_length()
            which = np.sort(np.argsort(done, kind="stable")[:count])  # with some that are done: searches share it
            left, rows = left[which], _taken(rows, which)
        candidate = propose(rows)
        rows = choose(rows, candidate, *residual(left, candidate))
    found[left] = to_numpy(rows.z)
    return found


def _done(rows: Rows) -> Array:
    """Which rows are at a zero or a minimum, to round-off, or got nowhere."""
    size, zero = _norm(rows.r), 1e3 * eps_of(rows.z) * (1 + _norm(rows.z))
    flat = _norm(_gradient(rows)) <= FLAT * size * _norm(rows.J)
    return ~(size > zero) | flat | (rows.mu > MOST)


def _proposed(rows: Rows) -> Array:
    """Where the damped Gauss-Newton step leads."""
    xp, (z, r, J, mu) = array_namespace(rows.z), rows
    damping = mu * _norm(r) + eps_of(z) * (1 + _norm(J) ** 2)
    square = xp.matrix_transpose(J) @ J + damping[:, None, None] * xp.eye(z.shape[1], dtype=z.dtype, device=device(z))
    return z - xp.linalg.solve(square, _gradient(rows)[..., None])[..., 0]


def _chosen(rows: Rows, z: Array, r: Array, J: Array) -> Rows:
    """The proposed rows where they are better, the others as they were."""
    where = array_namespace(z).where
    better = (_norm(r) < _norm(rows.r)) & array_namespace(z).isfinite(_norm(J))
    mu = where(better, (LESS * rows.mu).clip(LEAST), MORE * rows.mu)
    one, square = better[:, None], better[:, None, None]
    return Rows(where(one, z, rows.z), where(one, r, rows.r), where(square, J, rows.J), mu)


def _taken(rows: Rows, which: np.ndarray) -> Rows:
    """Those rows alone."""
    xp = array_namespace(rows.z)
    index = xp.asarray(which, device=device(rows.z))
    return Rows(*(xp.take(a, index, axis=0) for a in rows))


def _gradient(rows: Rows) -> Array:
    return (array_namespace(rows.z).matrix_transpose(rows.J) @ rows.r[..., None])[..., 0]


def _norm(a: Array) -> Array:
    """Of each row [n, ...]."""
    flat = a.reshape((a.shape[0], -1))
    return array_namespace(a).linalg.vector_norm(flat, axis=1)
