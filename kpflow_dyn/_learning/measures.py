"""How alike are two kernels on the same places? Each measure prepares a kernel once, and then takes pairs.

Kernels A, B [n, n] are symmetric and positive semi-definite, H = 1 - 1 1^T / n takes the mean out:

    cka         tr(HAH HBH) / (|HAH|_F |HBH|_F),    with quadrature weights w H = 1 - r r^T, r^2 = w / sum w
    alignment   tr(A B) / (|A|_F |B|_F)
    angles      the mean of the principal angles between the spans of the k leading eigenvectors, in radians
    spectrum    sum_i |p_i - q_i| / 2 of the eigenvalues, descending, each over their sum
    bures       d = min_Q |X - Y Q|_F of roots A = X X^T, B = Y Y^T with |X|_F = |Y|_F = 1, over orthogonal Q
    procrustes  2 arcsin(d / 2): the angle between X and the rotated root nearest to it

d^2 = 2 - 2 tr (A^{1/2} B A^{1/2})^{1/2} for A and B of trace one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import subspace_angles

Matrix = np.ndarray


@dataclass(frozen=True)
class Measure:
    """One measure of two kernels.

    Attributes:
        prepare: of one kernel [n, n] and the roots of the weights of its places [n], what pairs need.
        pair: the number of two that are prepared.
        same: its value for a kernel and itself: 1 of a similarity, 0 of a distance.
    """

    prepare: Callable[[Matrix, np.ndarray], Any]
    pair: Callable[[Any, Any], float]
    same: float


def measure_of(name: str, k: int, unbiased: bool) -> Measure:
    """The measure of this name.

    Raises:
        ValueError: an unknown name, or an option of another measure.
    """
    if name == "angles" and not (isinstance(k, int | np.integer) and k >= 1):
        raise ValueError(f"k is {k!r}, expected a number of leading eigenvectors, 1 or more")
    known = {
        "cka": _UNBIASED if unbiased else Measure(lambda A, roots: _unit(centred(A, roots)), _product, 1.0),
        "alignment": Measure(lambda A, _: _unit(A), _product, 1.0),
        "angles": Measure(lambda A, _: _leading(A, k), lambda a, b: float(np.mean(subspace_angles(a, b))), 0.0),
        "spectrum": Measure(lambda A, _: _shares(A), lambda p, q: float(abs(p - q).sum() / 2), 0.0),
        "bures": Measure(lambda A, _: _root(A), _between_roots, 0.0),
        "procrustes": Measure(
            lambda A, _: _root(A), lambda X, Y: 2 * float(np.arcsin(min(_between_roots(X, Y) / 2, 1.0))), 0.0
        ),
    }
    if name not in known:
        raise ValueError(f"measure is {name!r}, expected one of {', '.join(known)}")
    if unbiased and name != "cka":
        raise ValueError(f"unbiased is an option of measure='cka', not of {name!r}")
    return known[name]


def centred(A: Matrix, roots: np.ndarray) -> Matrix:
    """H A H, which takes out the mean by the weights of the places."""
    r = roots / np.linalg.norm(roots)
    along = np.outer(r, A @ r)
    return A - along - along.T + (r @ A @ r) * np.outer(r, r)


def _unit(A: Matrix) -> Matrix:
    """A over its Frobenius norm."""
    return A / _not_zero(float(np.linalg.norm(A)), "norm")


def _product(A: Matrix, B: Matrix) -> float:
    return float((A * B).sum())


def _without_own(A: Matrix, roots: np.ndarray) -> Matrix:
    """A without its diagonal, centred so that each row sums to zero, over its norm.

    <A, B> of two such matrices is an unbiased estimate of the product for a population of places.
    Source: Szekely, Rizzo, Ann. Stat. 42, 2382 (2014), "U-centering"; Song et al., JMLR 13, 1393 (2012).
    """
    n = len(A)
    if not np.allclose(roots, roots[0]):
        raise ValueError("the unbiased CKA is for places that count alike, not for quadrature weights; unbiased=False")
    if n < 4:
        raise ValueError(f"the unbiased CKA needs at least 4 places, got {n}; take unbiased=False")
    A = A - np.diag(np.diag(A))
    sums = A.sum(0) / (n - 2)
    centred = A - sums - sums[:, None] + A.sum() / (n - 1) / (n - 2)
    return _unit(centred - np.diag(np.diag(centred)))


_UNBIASED = Measure(_without_own, _product, 1.0)


def _leading(A: Matrix, k: int) -> Matrix:
    """The k leading eigenvectors [n, k]."""
    values, vectors = np.linalg.eigh(A)
    found = int((values > ROUND_OFF * values[-1]).sum())
    if k > found:
        raise ValueError(f"k = {k} leading modes of a kernel of rank {found}; take k of at most {found}")
    return vectors[:, -k:]


def _shares(A: Matrix) -> np.ndarray:
    """Its eigenvalues over their sum, descending."""
    values = np.linalg.eigvalsh(A)[::-1].clip(0)
    return values / _not_zero(float(values.sum()), "trace")


def _root(A: Matrix) -> Matrix:
    """X [n, n] with A / tr A = X X^T; eigenvalues of round-off are zero, as their roots would not be small."""
    values, vectors = np.linalg.eigh(A)
    values = np.where(values > len(A) * np.finfo(float).eps * values[-1], values, 0.0)
    return vectors * np.sqrt(values / _not_zero(float(values.sum()), "trace"))


def _between_roots(X: Matrix, Y: Matrix) -> float:
    """min |X - Y Q|_F over orthogonal Q. The difference itself is formed: 2 - 2 tr would lose half of the digits."""
    left, _s, right = np.linalg.svd(Y.T @ X)
    return float(np.linalg.norm(X - Y @ (left @ right)))


ROUND_OFF = 1e-12


def _not_zero(size: float, what: str) -> float:
    if not 0 < size < np.inf:
        raise ValueError(f"a kernel whose {what} is {size:g} is like no other; check that it changes over the places")
    return size
