"""Which directions neither grow nor decay at fixed points, as far as round-off lets one tell."""

import numpy as np

from kpflow_dyn.dynamics._search import ROUND_OFF, Polished


def neutral(points: Polished, values: np.ndarray, vectors: np.ndarray, continuous: bool) -> np.ndarray:
    """Which eigenvalues of dF/dz have |l| = 1, or of a field Re l = 0, to round-off [n, unit].

    An eigenvalue is known to eps |J| / |y^H x|, where y and x are its left and right eigenvectors, and a double one to
    sqrt(eps). Where J is singular to sqrt(eps), the point itself is not known better, and so is no eigenvalue near 0.
    """
    J = points.J + (0 if continuous else np.eye(values.shape[1]))
    sizes = np.maximum(np.linalg.norm(J, axis=(1, 2)), 1)[:, None]
    known = np.minimum(ROUND_OFF * points.eps * _conditions(vectors), points.eps**0.5) * sizes
    still = np.abs(values.real if continuous else np.abs(values) - 1) <= known
    rates = np.abs(values if continuous else values - 1)
    unsure = rates <= np.maximum(points.eps**0.5 * sizes, rates.min(1, keepdims=True))
    return still | unsure & points.degenerate[:, None]


def _conditions(vectors: np.ndarray) -> np.ndarray:
    """1 / |y^H x| of unit eigenvectors, the columns of `vectors`: the norms of the rows of their inverse [n, unit]."""
    _, sizes, right = np.linalg.svd(vectors)
    return np.linalg.norm(right.conj().swapaxes(1, 2) / np.maximum(sizes, np.finfo(float).eps)[:, None], axis=2)
