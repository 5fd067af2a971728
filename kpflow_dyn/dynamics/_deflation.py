"""Residuals that points found before no longer make zero."""

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy
from kpflow_dyn.dynamics._levenberg import Compile, Residual

FAR, SIZES = 1e6, 16  # an added point, in units of `scale`; numbers of points are rounded up to a multiple of this


def deflated(residual: Residual, points: np.ndarray, scale: float, compiled: Compile) -> Residual:
    """M(z) r(z) and its Jacobian, whose zeros are those of r but for the points z_i [point, unit].

        M(z) = prod_i (1 + scale^2 / |z - z_i|^2)

    A search that starts near a point is so led past it, to its neighbours, which few starts elsewhere reach: the
    unstable ones above all.

    Source: Farrell, Birkisson, Funke, "Deflation techniques for finding distinct solutions of nonlinear partial
    differential equations", SIAM J. Sci. Comput. 37, A2026 (2015).
    """
    far = np.full((-len(points) % SIZES, points.shape[1]), FAR * scale)  # so that few sizes are compiled
    known, times = np.concatenate([points, far]), compiled(_times)

    def product(numbers: np.ndarray, z: Array) -> tuple[Array, Array]:
        return times(z, *residual(numbers, z), like_numpy(known, z), scale)

    return product


def _times(z: Array, r: Array, J: Array, points: Array, scale: float) -> tuple[Array, Array]:
    """M r and its Jacobian M (J + r (d log M / dz)^T)."""
    xp = array_namespace(z)
    away = (z[:, None] - points) / scale  # [n, point, unit]
    near = 1 / (away**2).sum(-1)
    M = xp.prod(1 + near, axis=1)
    slope = -2 / scale * ((near**2 / (1 + near))[..., None] * away).sum(1)
    return M[:, None] * r, M[:, None, None] * (J + r[:, :, None] * slope[:, None])
