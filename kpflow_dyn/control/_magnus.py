"""Linear differential equations with coefficients that change: one step at a time, by Magnus' series.

Y' = M(t) Y over an interval is exp(Omega) Y. Omega is of sixth order from M at three Gauss points, and exact where M is
constant.

Source: Blanes, Casas, Oteo, Ros, "The Magnus expansion and some of its applications", Phys. Rep. 470, 151 (2009).
"""

import numpy as np
from scipy.linalg import expm

from kpflow_dyn._arrays import Array


def magnus(M: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Omega [trial, step, m, m] of generators M [trial, step, 3, m, m] over intervals of length h [step]."""
    first, middle, last = (h[:, None, None] * M[:, :, i] for i in range(3))
    a, b, c = middle, 15**0.5 / 3 * (last - first), 10 / 3 * (last - 2 * middle + first)
    inner = _commutator(a, b)
    outer = -_commutator(a, 2 * c + inner) / 60
    return a + c / 12 + _commutator(-20 * a - c + inner, b + outer) / 240


def _commutator(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a @ b - b @ a


def spread(A: np.ndarray, Q: np.ndarray, h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Phi = Phi(t + h, t) and G = int Phi(t + h, s) Q(s) Phi(t + h, s)^T ds, both [trial, step, n, n].

    A and the symmetric Q are [trial, step, 3, n, n] at Gauss points, h is [step]. Phi and G are blocks of the
    exponential of Omega for M = [[A, Q], [0, -A^T]] (Van Loan, IEEE Trans. Automatic Control 23, 395, 1978), taken of
    so small a part of Omega that nothing is lost to cancellation, and doubled: G <- Phi G Phi^T + G, Phi <- Phi Phi.
    """
    n, omega = A.shape[-1], magnus(np.block([[A, Q], [0 * A, -transposed(A)]]), h)
    doublings = halvings(omega[..., :n, :n])
    F = expm(omega / 2**doublings)
    phi = F[..., :n, :n]
    G = F[..., :n, n:] @ transposed(phi)
    for _ in range(doublings):
        G, phi = phi @ G @ transposed(phi) + G, phi @ phi
    return phi, (G + transposed(G)) / 2


def halvings(omega: np.ndarray) -> int:
    """How often Omega is to be halved until its norm is at most one."""
    norm = float(np.abs(omega).sum(-1).max())
    return max(0, int(np.ceil(np.log2(norm)))) if norm > 0 else 0


def transposed(M: Array) -> Array:
    """The transpose of matrices [..., m, n]."""
    return np.swapaxes(M, -1, -2)
