"""Implicit Runge-Kutta stages as one Newton correction of the converged ones, which has explicit sites and no loop.

With converged stages k^_i and the field's Jacobians A_i there as data,

    k_i = k^_i - (I - h a_ii A_i)^{-1} (k^_i - f(t_i, y + h sum_{j<i} a_ij k_j + h a_ii k^_i))

gives k_i = k^_i with the exact derivatives in y and in the parameters.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy
from kpflow_dyn._backend import Transforms
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.steps import Field, Tableau, call_field

ITERATIONS = 6


def implicit_stages(tableau: Tableau) -> list[int]:
    """Which stages stand on both sides of their equation; a ValueError where stages depend on later ones."""
    if np.triu(tableau.a, 1).any():
        raise ValueError(
            "only diagonally implicit Runge-Kutta methods can be replayed, and this one's stages depend on later ones; "
            "linearize with sensealg=InterpolatingAdjoint()"
        )
    return np.flatnonzero(np.diag(tableau.a)).tolist()


def corrected_stages(
    field: Field, tableau: Tableau, t: Sequence[Any], h: Any, y: Array, inputs: Sequence[Any], k: Array, inverse: Array
) -> list[Array]:
    """The stages, from converged ones k [..., stage, unit] and inverses, transposed [..., implicit, unit, unit]."""
    where = {stage: n for n, stage in enumerate(implicit_stages(tableau))}
    found: list[Array] = []
    for i in range(len(tableau.b)):
        start = y + h * _earlier(tableau, i, found, y)
        if i in where:
            k_i = k[..., i, :]
            rest = k_i - field(t[i], start + h * tableau.a[i, i] * k_i, inputs[i])
            found.append(k_i - _times(rest, inverse[..., where[i], :, :]))
        else:
            found.append(field(t[i], start, inputs[i]))
    return found


def _times(row: Array, matrix: Array) -> Array:
    """row @ matrix, of one row or with a matrix for each."""
    return row @ matrix if matrix.ndim == 2 else (row[..., None, :] @ matrix)[..., 0, :]


def converged(
    problem: ODEProblem,
    tableau: Tableau,
    dt: np.ndarray,
    times: np.ndarray,
    x: Array | None,
    before: Array,
    guess: Array | None,
) -> Array:
    """For each step its stages and the inverses of their Newton matrices, transposed: flat [trial, step, ...].

    dt [trial, step], times [trial, step, stage], inputs x of these, and the states before [trial, step, unit] are those
    of the steps; `guess` are stage derivatives to begin with [trial, step, stage, unit], if any are known.
    """
    transforms, on_one = problem.backend.transforms, problem.backend.tracing.on_one_trial
    field = partial(call_field, on_one(problem.f))
    newton: Any = transforms.compiled(transforms.vmap(transforms.vmap(partial(_newton, transforms, field))))
    implicit, h, times = implicit_stages(tableau), like_numpy(dt, before), like_numpy(times, before)
    stages, inverses, still = [], [], 0 * before
    for i in range(len(tableau.b)):
        start = before + h[..., None] * _earlier(tableau, i, stages, before)
        row = start, times[..., i], *(() if x is None else (x[:, :, i],))
        known = guess if i in implicit else None
        k = newton(still, 0 * h, *row)[0] if known is None else known[:, :, i]  # f at the start of the stage
        for _ in range(ITERATIONS if i in implicit else 0):
            k, _ = newton(k, tableau.a[i, i] * h, *row)
        stages.append(k)
        inverses += [newton(k, tableau.a[i, i] * h, *row)[1]] if i in implicit else []
    parts = [part.reshape((*dt.shape, -1)) for part in (*stages, *inverses)]
    return array_namespace(before).concat(parts, axis=-1)


def _earlier(tableau: Tableau, i: int, stages: Sequence[Array], like: Array) -> Array:
    """sum_{j<i} a_ij k_j."""
    return sum((tableau.a[i, j] * stages[j] for j in range(i) if tableau.a[i, j]), 0 * like)


def _newton(
    transforms: Transforms, field: Field, k: Array, step: Array, start: Array, t: Array, x: Array | None = None
) -> tuple[Array, Array]:
    """One iteration for k = f(start + step k), and the transposed inverse of I - step Df where it began."""

    def residual(k: Array) -> Array:
        return k - field(t, start + step * k, x)

    xp, directions = array_namespace(k), like_numpy(np.eye(len(k)), k)
    slopes = transforms.vmap(lambda direction: transforms.jvp(residual, (k,), (direction,))[1])(directions)
    inverse = xp.linalg.inv(slopes)  # of the transpose, as the rows are directions
    return k - residual(k) @ inverse, inverse
