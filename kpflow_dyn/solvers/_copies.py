"""Whether a block Krylov space missed copies of a repeated eigenvalue, by a few steps from one random row.

A space from c rows holds c copies of an eigenvalue at most, and an eigenvector u of a further one is orthogonal to all
of it. So u belongs to B = (1 - Y Y^T) A (1 - Y Y^T) as well, for Ritz vectors Y of the space, and has a part of about
n^-1/2 in a random row x. With the orthonormal polynomials p_j of Lanczos for B and x,

    <u, x>^2 <= 1 / (p_0(l)^2 + ... + p_m(l)^2)

(the Christoffel function), which falls the faster the farther l stands from what Y has left of the spectrum.
"""

import numpy as np
from scipy.linalg import eigvalsh_tridiagonal

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._orthogonalise import orthonormalise

SMALL_PART = 1e-4  # of a vector's usual part in a random row; one in 12,500 has less
SHIFT = 0.01  # of the tolerance, by which a Ritz vector that holds a part of u may move its eigenvalue in B
DEPENDENT = 1e-6


def suspects(krylov: Krylov, k: int, least: float, width: float) -> np.ndarray:
    """Eigenvalues, wanted more than `least`, of which copies may be missing.

    These are those that as many values share, to this width, as there were random rows. Where a start was given, or one
    random row, which finds values very close together late, it may be any, and `least` stands for them, as it is the
    hardest to tell from others. Rows that came later have not been iterated as long, and do not count.
    """
    values, copies = to_numpy(krylov.values[:k]), krylov.random_rows
    if copies < 2:
        return np.array({"LA": [least], "SA": [-least], "LM": [least, -least]}[krylov.which])
    ordered = np.sort(values)
    first, last = ordered[: max(0, k - copies + 1)], ordered[copies - 1 :]
    shared = first[last - first <= width]
    return shared[krylov.wanted(shared) > least]


def certain(krylov: Krylov, k: int, least: float, width: float) -> int:
    """How many leading Ritz vectors, k at least, have no part that counts in an eigenvector u wanted this much.

    One of the value t that leaves a rest r holds a part of r / (l - t) of u at most, and so moves l by r^2 / (l - t).
    """
    values, left = to_numpy(krylov.wanted(krylov.values)), to_numpy(krylov.residuals()) * krylov.norm
    unsure = np.flatnonzero(left[k:] ** 2 > SHIFT * width * (least - values[k:]))
    return k + int(unsure[0]) if unsure.size else len(values)


def is_one_missing(krylov: Krylov, found: np.ndarray, least: float, maxiter: int) -> bool | None:
    """Whether an eigenvector of one of these eigenvalues lies outside of the basis; None where `maxiter` ends it.

    Any value wanted more than `least` that shows up there is one.
    """
    known, n = [krylov.known, *krylov.basis], krylov.known.shape[1]
    row = orthonormalise(krylov.rng.normal((1, n), krylov.known), known, DEPENDENT)[0]
    before = row[:0]
    diagonal: list[float] = []
    beside: list[float] = []
    last, p, total = 0 * found, 0 * found + 1, 0 * found + 1
    while krylov.operator.calls < maxiter:
        image, held = krylov.operator(row), [*known, before, row]
        fresh, c, r = orthonormalise(image, held, 4 * krylov.eps * krylov.norm)
        diagonal.append(float(c[0, -1]))
        if krylov.wanted(eigvalsh_tridiagonal(np.array(diagonal), np.array(beside))).max() > least:
            return True
        if not len(fresh):
            return False
        lower, upper = (beside[-1] if beside else 0.0), float(r[0, 0])
        last, p = p, ((found - diagonal[-1]) * p - lower * last) / upper
        total = total + p**2
        if (total > n / SMALL_PART**2).all():
            return False
        before, row = row, fresh
        beside.append(upper)
    return None
