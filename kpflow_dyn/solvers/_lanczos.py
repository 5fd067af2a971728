"""Thick-restart block Lanczos: the leading eigenpairs of a symmetric operator that can only be applied."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic

import numpy as np

from kpflow_dyn._arrays import PRECISIONS, Array, Random, Rows, products_in, to_numpy
from kpflow_dyn._arrays.memory import budget, bytes_of, require
from kpflow_dyn.solvers._block import FastestBlock, block_for
from kpflow_dyn.solvers._certify import Certificate, InPlace, OfProduct, Result
from kpflow_dyn.solvers._copies import certain, is_one_missing, suspects
from kpflow_dyn.solvers._counted import Counted, Product
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._orthogonalise import Which, check_which, no_rows, orthogonal_part, rows_or_none
from kpflow_dyn.solvers._results import Eigenpairs, Triplets

Callback = Callable[[int, np.ndarray], None]

TEST_ROWS = 4  # random rows that look for missed pairs
WORKING = 4  # blocks of rows around a basis: images and what orthogonalising them takes
CLUSTER = 2  # eigenvalues closer than this many tolerances count as one: each is off by at most one


@dataclass(frozen=True)
class BlockLanczos:
    """Block Lanczos with thick restart, two orthogonalisation passes and a test for missed pairs.

    From start rows Q_1 the basis grows by A Q_j = H Q + R Q_{j+1} (A acts on rows); the eigenpairs of the small
    matrix H = Q A Q^T, solved in float64, give Ritz pairs. A full basis is cut to the k + max(block, k/4) leading
    Ritz vectors. Residuals cannot show that a copy of a repeated eigenvalue is missing: c random start rows find at
    most c copies. So when c of the wanted pairs agree to twice the tolerance, a few steps from a random row show
    whether there are more, the fewer the more pairs are known behind these. If so, random rows are iterated beside the
    others until they improve a wanted pair, and all goes on with it. Where `maxiter` ends this, a warning says that
    copies may be missing.

    Args:
        block: rows in a call of the operator. Small blocks need fewest applications, large ones fewest calls: about
            25 + 2.6 k + 10 block applications to 1e-6. None takes 2 to 16, by the length of the vectors and whether
            they lie on an accelerator; of 2 long ones it applies the operator to one at a time, along which most of the
            residuals lies, as 1 needs fewest, and 2 find both copies of an eigenvalue. A `FastestBlock()` times a few
            calls first, which are not counted.
        tol: residual |A v - l v| / |l_1| to reach. float32 cannot go below about 3e-7.
        maxiter: most calls of the operator before the pairs are certified as they are.
        columns: most rows of the basis; None keeps max(4 k, 32) + 6 block; more than these save little.
        dense: up to this dimension, and where the basis would fill the space, the matrix is formed instead.
        products: "tf32" or "bf16" to iterate with faster products of float32, where the device has them. Residuals are
            recomputed in the operator's usual precision, and the iteration goes on from there as long as this halves
            them: residuals of 1e-3 to 1e-2 take less time so, smaller ones more.

    Raises:
        ValueError: options out of range.
    Source: Golub, Underwood (1977); Wu, Simon, "Thick-restart Lanczos" (2000).

    >>> import numpy as np
    >>> spectrum = 1.0 / np.arange(1, 1001) ** 2
    >>> pairs = BlockLanczos(block=4).solve(lambda rows: rows * spectrum, 1000, 3, like=np.zeros(1))
    >>> bool(np.allclose(pairs.values, [1, 1 / 4, 1 / 9])), bool(pairs.converged.all())
    (True, True)
    """

    block: int | FastestBlock | None = None
    tol: float = 1e-6
    maxiter: int = 1000
    columns: int | None = None
    dense: int = 256
    products: str | None = None

    def __post_init__(self) -> None:
        if (isinstance(self.block, int) and self.block < 1) or self.maxiter < 1 or not 0 < self.tol < 1:
            raise ValueError(f"expected block >= 1, a FastestBlock() or None, maxiter >= 1 and 0 < tol < 1, got {self}")
        if self.products is not None and self.products not in PRECISIONS:
            raise ValueError(
                f"products is {self.products!r}, expected {', '.join(PRECISIONS)} or None for what the operator does"
            )

    def solve(
        self,
        apply: Rows,
        n: int,
        k: int,
        *,
        like: Array,
        seed: int | Random = 0,
        which: Which = "LA",
        start: Array | None = None,
        deflate: Array | None = None,
        callback: Callback | None = None,
    ) -> Eigenpairs:
        """The k most wanted eigenpairs of a symmetric operator on vectors of length n.

        Args:
            apply, n, like, seed: as for `TraceEstimator.trace`.
            k: how many pairs, 1 <= k <= n.
            which, callback: as for `kp.eigs`.
            start: rows [b, n] to begin with, such as the eigenvectors of a nearby operator; random when None.
            deflate: orthonormal rows [d, n], such as known eigenvectors, to which the pairs stay orthogonal.

        Raises:
            ValueError: k out of range, NaN or inf or a wrong shape from `apply`, or an operator that is not symmetric.

        Warns:
            UserWarning: copies of a repeated eigenvalue may be missing, as `maxiter` ended the search for them; or
                some pairs did not reach the tolerance; they are returned flagged. So are pairs of an operator
                that is only nearly symmetric, to 1% of |A q|, where that keeps them from it.
        """
        check_which(which)
        rng, known = Random(seed), rows_or_none(deflate, n, like)
        certificate = InPlace(Counted(orthogonal_part(apply, known)), self.tol, rng, which)
        return _solved(self, certificate, known, k, rng, which, start, callback)

    def solve_product(
        self,
        forward: Rows,
        backward: Rows,
        p: int,
        k: int,
        *,
        like: Array,
        seed: int | Random = 0,
        squared: bool = False,
        start: Array | None = None,
        callback: Callback | None = None,
    ) -> Triplets:
        """The k largest singular triplets L v = s u, L* u = s v, from the eigenpairs of A = L* L.

        Squares lose half of the digits: s below sqrt(eps) s_1 are noise.

        Args:
            forward: L on a block of rows, [b, p] -> [b, n].
            backward: L*, [b, n] -> [b, p].
            p: the dimension of L* L, the smaller one.
            k: how many triplets, 1 <= k <= p.
            like, seed, callback: as in `solve`.
            squared: whether tolerance and residuals are those of (s^2, u) as eigenpairs of L L*.
            start: rows v [b, p] to begin with.

        Raises, warns: as `solve`.
        """
        rng = Random(seed)
        certificate = OfProduct(Product(forward, backward), self.tol, rng, squared)
        return _solved(self, certificate, no_rows(p, like), k, rng, "LA", start, callback)


def _solved(
    alg: BlockLanczos,
    certificate: Certificate[Result],
    known: Array,
    k: int,
    rng: Random,
    which: Which,
    start: Array | None,
    callback: Callback | None,
) -> Result:
    """Pairs or triplets, orthogonal to known rows [d, n]; by way of the matrix where the basis would fill the space."""
    check_request(k, start, known)
    (d, n), operator, block, together = known.shape, certificate.operator, alg.block, None
    if start is not None or block is None:
        block, together = block_for(n, known)
        block = block if start is None else start.shape[0]
    least = block if isinstance(block, int) else 1
    if n <= alg.dense or _columns(alg, k, least) + least >= n - d:
        found = certificate.of_matrix(known, k)
    else:
        if not isinstance(block, int):
            with products_in(alg.products, known):
                block = block(operator.uncounted, n, k, known)
        krylov = Krylov(operator, known, rng, which, alg.products)
        krylov.begin(start, block)
        found = _Run(alg, krylov, certificate, k, block, together or block, callback).certified()
    certificate.warn(found)
    return found


def _kept(k: int, block: int) -> int:
    """The rows of a basis after a restart."""
    return k + max(block, k // 4)


def _columns(alg: BlockLanczos, k: int, block: int) -> int:
    """The most rows of a basis."""
    least = _kept(k, block) + block
    columns = max(4 * k, 32) + 6 * block if alg.columns is None else alg.columns
    if columns < least:
        raise ValueError(f"columns = {columns} is too few for k = {k} and block = {block}: give at least {least}")
    return columns


def _fitting(alg: BlockLanczos, k: int, block: int, known: Array) -> int:
    """The same, fewer where a memory budget allows no more."""
    keep, row = _kept(k, block), bytes_of(known.shape[1], known)
    columns, around = _columns(alg, k, block), keep + WORKING * max(block, TEST_ROWS)
    require(
        (keep + block + around) * row,
        f"the vectors of k = {k} pairs with block = {block}",
        "ask for fewer pairs, give a smaller block, or raise the budget",
    )
    left = budget()
    return columns if left is None else min(columns, left // row - around)


def _halfway(columns: int, k: int, block: int, known: Array) -> int:
    """The rows of a basis after a restart amid a few test rows: half of those behind the wanted pairs, if they fit."""
    left, keep = budget(), _kept(k, block)
    most = (k + columns) // 2
    if left is not None:
        most = min(most, left // bytes_of(known.shape[1], known) - columns - WORKING * max(block, TEST_ROWS))
    return max(keep, most)


class _Run(Generic[Result]):
    """One run of the iteration for k pairs."""

    def __init__(
        self,
        alg: BlockLanczos,
        krylov: Krylov,
        certificate: Certificate[Result],
        k: int,
        block: int,
        together: int,
        callback: Callback | None,
    ) -> None:
        self.alg, self.krylov, self.certificate, self.k = alg, krylov, certificate, k
        self.block, self.together = block, together
        self.columns, self.keep, self.callback = _fitting(alg, k, block, krylov.known), _kept(k, block), callback
        self.halfway = _halfway(self.columns, k, block, krylov.known)

    def certified(self) -> Result:
        """Converge, look for missed pairs, certify; once more from the true residuals while that helps."""
        krylov, certificate, k = self.krylov, self.certificate, self.k
        before, tol = math.inf, self.alg.tol
        while True:
            self.converge(tol)
            while self.misses():
                self.search()
                self.converge(tol)
            krylov.restart(self.keep)  # the basis has served: its vectors make room for results
            found, again = certificate.claimed(krylov, k), None
            if found is None:
                found, again = certificate.anew(krylov.ritz(k)[1], krylov.norm)
            worst = float(found.residuals.max())
            if worst <= self.alg.tol or worst > before / 2 or krylov.operator.calls >= self.alg.maxiter:
                return found
            before, tol = worst, 0.4 * tol
            if again is not None:
                krylov.begin_again(*again, found.converged)

    def converge(self, tol: float) -> None:
        """Expand until the wanted pairs are within the tolerance, by the recurrence."""
        krylov, k = self.krylov, self.k
        while (krylov.operator.calls < self.alg.maxiter or krylov.size < k) and not krylov.converged(
            k, wanted := self.certificate.tolerances(krylov, k, tol)
        ):
            if krylov.size:
                krylov.aim(k, wanted, self.together)
            if not krylov.active:
                krylov.inject(self.block)
            self.step(self.keep)
            if self.callback is not None:
                self.callback(krylov.operator.calls, to_numpy(krylov.residuals()[:k]))

    def step(self, keep: int) -> None:
        """Expand once, after a restart with so many Ritz vectors where the basis is full."""
        if self.krylov.size + self.krylov.active > self.columns:
            self.krylov.restart(keep)
        self.krylov.expand()

    def misses(self) -> bool:
        """Whether a random row shows that a copy of an eigenvalue is missing.

        The basis is cut to the pairs that are certain.
        """
        krylov, k, tol = self.krylov, self.k, self.alg.tol
        least = krylov.wanted(float(krylov.values[k - 1])) + tol * krylov.norm
        found = suspects(krylov, k, least, CLUSTER * tol * krylov.norm)
        if not found.size:
            return False
        krylov.restart(certain(krylov, k, float(krylov.wanted(found).min()), tol * krylov.norm))
        missed = is_one_missing(krylov, found, least, self.alg.maxiter)
        self.certificate.incomplete |= missed is None
        return bool(missed)

    def search(self) -> None:
        """Random rows, until they improve a wanted pair."""
        krylov, k, tol = self.krylov, self.k, self.alg.tol
        krylov.restart(k)
        known = krylov.values
        krylov.parked = 0
        krylov.inject(TEST_ROWS)
        while krylov.active and not _better(krylov, known, tol) and krylov.operator.calls < self.alg.maxiter:
            self.step(self.halfway)


def _better(krylov: Krylov, known: Array, tol: float) -> bool:
    """Whether a leading value is wanted more than the known one in its place, by more than the tolerance."""
    gain = krylov.wanted(krylov.values[: known.shape[0]]) - krylov.wanted(known)
    return bool((gain > tol * krylov.norm).any())


def check_request(k: int, start: Array | None, known: Array) -> None:
    """Raise for more pairs than there can be orthogonal to known rows [d, n], and for start rows of another length."""
    d, n = known.shape
    if start is not None and (start.ndim != 2 or start.shape[1] != n):
        raise ValueError(f"start has shape {tuple(start.shape)}, expected rows [b, {n}]")
    if not 1 <= k <= n - d:
        raise ValueError(f"k = {k} eigenpairs asked of an operator of dimension {n - d}; expected 1 <= k <= {n - d}")
