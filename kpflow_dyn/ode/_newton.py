"""Implicit Runge-Kutta stages as one Newton correction of the converged ones, which has explicit sites and no loop.

With converged stages k^_i and the field's Jacobians A_i there as data,

    k_i = k^_i - (I - h a_ii A_i)^{-1} (k^_i - f(t_i, y + h sum_{j<i} a_ij k_j + h a_ii k^_i))

gives k_i = k^_i with the exact derivatives in y and in the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._problems.steps import Field, Tableau

ITERATIONS = 6


def implicit_stages(tableau: Tableau) -> list[int]:
    """Which stages stand on both sides of their equation.

    Raises:
        ValueError: when stages depend on later ones.
    """
    if np.triu(tableau.a, 1).any():
        raise ValueError(
            "only diagonally implicit Runge-Kutta methods can be replayed, and this one's stages depend on later ones; "
            "linearize with sensealg=InterpolatingAdjoint()"
        )
    return np.flatnonzero(np.diag(tableau.a)).tolist()


def corrected_stages(
    field: Field, tableau: Tableau, t: Sequence[Any], h: Any, y: Array, inputs: Sequence[Any], k: Array, inverse: Array
) -> list[Array]:
    """The stages of one row, from converged ones k [stage, unit] and inverses [implicit stage, unit, unit]."""
    where = {stage: n for n, stage in enumerate(implicit_stages(tableau))}
    found: list[Array] = []
    for i in range(len(tableau.b)):
        start = y + h * sum((tableau.a[i, j] * found[j] for j in range(i) if tableau.a[i, j]), 0 * y)
        if i in where:
            rest = k[i] - field(t[i], start + h * tableau.a[i, i] * k[i], inputs[i])
            found.append(k[i] - inverse[where[i]] @ rest)
        else:
            found.append(field(t[i], start, inputs[i]))
    return found
