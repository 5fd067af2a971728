"""Implicit Runge-Kutta stages as one Newton correction of the converged ones, which has explicit sites and no loop.

With converged stages k^_i and the field's Jacobians A_i there as data,

    k_i = k^_i - (I - h a_ii A_i)^{-1} (k^_i - f(t_i, y + h sum_{j<i} a_ij k_j + h a_ii k^_i))

gives k_i = k^_i with the exact derivatives in y and in the parameters.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, side_by_side
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
    transforms = problem.backend.transforms
    field = partial(call_field, problem.backend.tracing.on_one_trial(problem.f))
    rows = [before, *(like_numpy(values, before) for values in (dt, times)), *([] if x is None else [x])]
    newton, of_rows = partial(_newton, transforms, field), (None, *(0,) * (1 + len(rows)))
    newton = transforms.compiled(transforms.vmap(transforms.vmap(newton, of_rows), of_rows))
    k = like_numpy(np.zeros((*times.shape, before.shape[2])), before) if guess is None else guess
    inverses, implicit = [], implicit_stages(tableau)
    for i in range(len(tableau.b)):
        begin, go_on = (_numbers(tableau, i, known, before) for known in (False, True))
        if guess is None or i not in implicit:
            k, _ = newton(begin, k, *rows)
        for _ in range(ITERATIONS if i in implicit else 0):
            k, _ = newton(go_on, k, *rows)
        inverses += [newton(go_on, k, *rows)[1]] if i in implicit else []
    return side_by_side([k, *inverses], axes=2)


def _earlier(tableau: Tableau, i: int, stages: Sequence[Array], like: Array) -> Array:
    """sum_{j<i} a_ij k_j."""
    return sum((tableau.a[i, j] * stages[j] for j in range(i) if tableau.a[i, j]), 0 * like)


def _numbers(tableau: Tableau, i: int, known: bool, like: Array) -> list[Array]:
    """What an iteration for stage i is told: which it is, the weights of those before it, and a_ii.

    Where it is not known yet it is taken for zero with a_ii = 0, so that the iteration gives f at its start.
    """
    which, earlier = np.eye(len(tableau.b))[i], np.tril(tableau.a, -1)[i]
    return [like_numpy(np.asarray(a), like) for a in (which, which * known, earlier, tableau.a[i, i] * known)]


def _newton(
    transforms: Transforms,
    field: Field,
    numbers: list[Array],
    stages: Array,
    before: Array,
    h: Array,
    times: Array,
    x: Array | None = None,
) -> tuple[Array, Array]:
    """One iteration for a stage k = f(start + step k), in its place among the stages [stage, unit].

    And the transposed inverse of I - step Df where it began.
    """
    which, known, earlier, own = numbers
    start, step, t = before + h * (earlier @ stages), own * h, which @ times
    here = None if x is None else which @ x

    def residual(k: Array) -> Array:
        return k - field(t, start + step * k, here)

    k = known @ stages
    xp, directions = array_namespace(k), like_numpy(np.eye(len(k)), k)
    slopes = transforms.vmap(lambda direction: transforms.jvp(residual, (k,), (direction,))[1])(directions)
    inverse = xp.linalg.inv(slopes)  # of the transpose, as the rows are directions
    return xp.where(which[:, None] > 0, k - residual(k) @ inverse, stages), inverse
