"""What solvers return: pairs and triplets, and how good they are."""

from dataclasses import dataclass

from kpflow_dyn._arrays import Array
from kpflow_dyn._shown import Shown


@dataclass(frozen=True, repr=False)
class Eigenpairs(Shown):
    """Eigenpairs of a symmetric operator.

    Attributes:
        values: [k] in the order asked for, the most wanted first, float64.
        vectors: [k, n], orthonormal rows.
        residuals: [k], the true |A v - l v| / |l_1|; l_1 is the largest in magnitude.
        converged: [k], whether the residual is within the tolerance asked for.
        applications: how often the operator was applied to one vector; of a product L L*, one L and one L* are one.
        calls: how often it was called with a block.

    Example as `Dense`.
    """

    values: Array
    vectors: Array
    residuals: Array
    converged: Array
    applications: int
    calls: int


@dataclass(frozen=True, repr=False)
class Triplets(Shown):
    """Singular triplets A v = s u, A* u = s v.

    Attributes:
        values: s [k], descending, float64.
        left: u [k, n], orthonormal rows.
        right: v [k, p], orthonormal rows.
        residuals: [k], the true (|A v - s u|^2 + |A* u - s v|^2)^(1/2) / s_1.
        converged: [k], whether the residual is within the tolerance asked for.
        applications: how often the operator was applied to one vector, one A and one A* counting as one.
        calls: how often it was called with a block.

    >>> import numpy as np, kpflow_dyn as kp
    >>> halves = (lambda rows: rows * np.array([1.0, 3.0, 2.0]),) * 2
    >>> kp.solvers.Dense().solve_product(*halves, 3, 2, like=np.zeros(1)).values
    array([3., 2.])
    """

    values: Array
    left: Array
    right: Array
    residuals: Array
    converged: Array
    applications: int
    calls: int
