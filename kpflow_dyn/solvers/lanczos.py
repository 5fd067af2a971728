"""Thick-restart block Lanczos: the leading eigenpairs of a symmetric operator that can only be applied."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kpflow_dyn.arrays import Array, Random, Rows, array_namespace, device, to_numpy
from kpflow_dyn.solvers.orthogonalise import (
    ORDERS,
    Which,
    combine,
    gram,
    ordered_eigh,
    orthonormalise,
    relative,
    rotate,
    row_norms,
    to_double,
    to_like,
)

Callback = Callable[[int, np.ndarray], None]

TEST_COLUMNS, TEST_STEPS = 8, 6
CLUSTER = 100  # eigenvalues closer than this many tolerances count as one
DEPENDENT = 1e-6  # start rows with a smaller part of their own are dropped
ASYMMETRY = 1e-2  # an operator further from symmetric than this, relative to |A q|, is refused


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric operator, and how good they are.

    Attributes:
        values: [k] in the order asked for, the most wanted first, float64.
        vectors: [k, n], orthonormal rows.
        residuals: [k], |A v - l v| / |l_1|, recomputed from A v at the end; l_1 is the largest in magnitude.
        converged: [k], whether the residual is within the tolerance asked for.
        applications: how often the operator was applied to one vector.
        calls: how often it was called with a block.
    """

    values: Array
    vectors: Array
    residuals: Array
    converged: Array
    applications: int
    calls: int


@dataclass(frozen=True)
class BlockLanczos:
    """Block Lanczos with thick restart, two orthogonalisation passes and a test for missed pairs.

    From start rows Q_1 the basis grows by A Q_j = H Q + R Q_{j+1} (A acts on rows); the eigenpairs of the small
    matrix H = Q A Q^T, solved in float64, give Ritz pairs. A full basis is cut to the k + max(block, k/4) leading
    Ritz vectors. Residuals cannot tell that a copy of a repeated eigenvalue is missing: c random start rows find at
    most c copies. So when c pairs of the wanted set agree to 100 tolerances, further random rows are tried for six
    steps, and the iteration goes on with them if they improve any wanted pair.

    Args:
        block: rows in a call of the operator. Small blocks need fewest applications, large ones fewest calls.
        tol: residual |A v - l v| / |l_1| to reach. float32 cannot go below about 3e-7.
        maxiter: most calls of the operator before the pairs are certified as they are.
        columns: most rows of the basis; None keeps max(2.5 k, k + max(block, k/4) + 6 block).
        dense: up to this dimension, and where the basis would fill the space, the matrix is formed instead.

    Source: Golub, Underwood (1977); Wu, Simon, "Thick-restart Lanczos" (2000).

    Example:
        >>> import numpy as np
        >>> spectrum = 1.0 / np.arange(1, 1001) ** 2
        >>> pairs = BlockLanczos(block=4).solve(lambda rows: rows * spectrum, 1000, 3, like=np.zeros(1))
        >>> bool(np.allclose(pairs.values, [1, 1 / 4, 1 / 9])), bool(pairs.converged.all())
        (True, True)
    """

    block: int = 16
    tol: float = 1e-6
    maxiter: int = 1000
    columns: int | None = None
    dense: int = 256

    def __post_init__(self) -> None:
        if self.block < 1 or self.maxiter < 1 or not 0 < self.tol < 1:
            raise ValueError(f"expected block >= 1, maxiter >= 1 and 0 < tol < 1, got {self}")

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
        callback: Callback | None = None,
    ) -> Eigenpairs:
        """The k most wanted eigenpairs of a symmetric operator on vectors of length n.

        Args:
            apply: the operator on a block of rows, [b, n] -> [b, n].
            n: the dimension.
            k: how many pairs, 1 <= k <= n.
            like: any array of the library, dtype and device to work in.
            seed: of the random rows.
            which: "LA" for the algebraically largest eigenvalues, "SA" for the smallest, "LM" for the largest in
                magnitude.
            start: rows [b, n] to begin with, such as the eigenvectors of a nearby operator; random when None.
            callback: called after each step with the number of calls so far and the residuals of the leading pairs,
                fewer than k at first.

        Raises:
            ValueError: k out of range, NaN or inf or a wrong shape from `apply`, or an operator that is not symmetric.

        Warns:
            UserWarning: some pairs did not reach the tolerance; they are returned flagged. So are pairs of an operator
                that is only nearly symmetric, to 1% of |A q|, where that keeps them from it.
        """
        if not 1 <= k <= n:
            raise ValueError(f"k = {k} eigenpairs asked of an operator of dimension {n}; expected 1 <= k <= {n}")
        if start is not None and (start.ndim != 2 or start.shape[1] != n):
            raise ValueError(f"start has shape {tuple(start.shape)}, expected rows [b, {n}]")
        if which not in ORDERS:
            raise ValueError(f"which is {which!r}, expected one of {', '.join(ORDERS)}")
        operator = _Counted(apply)
        columns = self._columns(k)
        if n <= self.dense or columns + self.block >= n:
            pairs = _solve_dense(operator, n, k, like, self.tol, which)
        else:
            krylov = _Krylov(operator, n, like, Random(seed), which)
            krylov.begin(start, self.block)
            pairs = self._iterate(krylov, k, columns, callback)
        _warn(pairs, self.tol, operator.asymmetry)
        return pairs

    def _keep(self, k: int) -> int:
        return k + max(self.block, k // 4)

    def _columns(self, k: int) -> int:
        least = self._keep(k) + self.block
        columns = max(5 * k // 2, self._keep(k) + 6 * self.block) if self.columns is None else self.columns
        if columns < least:
            raise ValueError(
                f"columns = {columns} is too few for k = {k} and block = {self.block}: give at least {least}"
            )
        return columns

    def _iterate(self, krylov: _Krylov, k: int, columns: int, callback: Callback | None) -> Eigenpairs:
        """Converge, look for missed pairs, certify; once more from the true residuals while that helps."""
        before, tol = math.inf, self.tol
        while True:
            self._converge(krylov, k, columns, tol, callback)
            missed = True
            while missed and krylov.doubtful(k, CLUSTER * self.tol):
                missed = self._misses(krylov, k, columns)
                self._converge(krylov, k, columns, tol, callback)
            pairs, rest = krylov.certify(k, self.block, self.tol)
            worst = float(pairs.residuals.max())
            if worst <= self.tol or worst > before / 2 or krylov.operator.calls >= self.maxiter:
                return pairs
            before, tol = worst, tol / 2
            krylov.resume(pairs, rest)

    def _converge(self, krylov: _Krylov, k: int, columns: int, tol: float, callback: Callback | None) -> None:
        while not krylov.converged(k, tol) and (krylov.operator.calls < self.maxiter or krylov.size < k):
            krylov.unpark(k, 0.9 * tol)
            if not krylov.active:
                krylov.inject(self.block)
            self._step(krylov, k, columns)
            if callback is not None:
                callback(krylov.operator.calls, to_numpy(krylov.residuals()[:k]))

    def _step(self, krylov: _Krylov, k: int, columns: int) -> None:
        if krylov.size + krylov.active > columns:
            krylov.restart(self._keep(k))
        krylov.expand()

    def _misses(self, krylov: _Krylov, k: int, columns: int) -> bool:
        """Whether random rows, orthogonal to all that is known, improve a wanted pair in a few steps."""
        if krylov.operator.calls >= self.maxiter:
            return False
        known, norm = krylov.values[:k], krylov.norm
        krylov.park()
        krylov.inject(TEST_COLUMNS)
        for _ in range(TEST_STEPS):
            if not krylov.active:
                break
            self._step(krylov, k, columns)
        return bool((krylov.wanted(krylov.values[:k]) - krylov.wanted(known) > self.tol * norm).any())


class _Counted:
    """The user's operator, counted and checked."""

    def __init__(self, apply: Rows) -> None:
        self._apply = apply
        self.applications = self.calls = 0
        self.asymmetry = 0.0  # how far <q, A p> and <p, A q> were apart so far, relative to |A q|; 0 for round-off

    def check_symmetry(self, defect: float, eps: float) -> None:
        """Take note of a relative difference, or raise."""
        if defect > ASYMMETRY:
            raise ValueError(
                f"the operator is not symmetric: <q, A p> and <p, A q> differ by {defect:.1e} of |A q|; use the "
                "eigenpairs of A A* or A* A, or lower rtol and atol of InterpolatingAdjoint if it comes from that"
            )
        if defect > eps**0.5:
            self.asymmetry = max(self.asymmetry, defect)

    def __call__(self, rows: Array) -> Array:
        image = self._apply(rows)
        self.calls += 1
        self.applications += rows.shape[0]
        if tuple(image.shape) != tuple(rows.shape) or image.dtype != rows.dtype:
            raise ValueError(
                f"the operator gave {tuple(image.shape)} of {image.dtype} for rows {tuple(rows.shape)} of "
                f"{rows.dtype}; it must keep the shape and the dtype"
            )
        xp = array_namespace(image)
        if not bool(xp.all(xp.isfinite(image))):
            raise ValueError(
                f"the operator gave NaN or inf in call {self.calls}; look for them in its inputs and weights"
            )
        return image


class _Krylov:
    """A basis Q = [rows expanded so far], with A Q = H Q + C^T (pending rows): exact up to round-off.

    `pending` rows are orthonormal and not expanded yet. The first `parked` of them wait, the `active` others are next.
    """

    def __init__(self, operator: _Counted, n: int, like: Array, rng: Random, which: Which) -> None:
        self.operator, self.rng, self.wanted = operator, rng, ORDERS[which]
        self.which: Which = which
        xp = array_namespace(like)
        self.pending = xp.zeros((0, n), dtype=like.dtype, device=device(like))
        self.basis: list[Array] = []
        self.projected = self.rotation = self.coupling = to_double(self.pending[:, :0])
        self.values = self.projected.reshape(-1)
        self.parked = self.random_rows = 0
        self.scale = self.norm = 0.0  # the largest |A q| of a row, and the largest |Ritz value|, so far
        self.eps = float(xp.finfo(like.dtype).eps)

    @property
    def size(self) -> int:
        return sum(q.shape[0] for q in self.basis)

    @property
    def active(self) -> int:
        return self.pending.shape[0] - self.parked

    def begin(self, start: Array | None, block: int) -> None:
        if start is None:
            self.inject(block)
        else:
            self.pending, _c, _r = orthonormalise(start, [], DEPENDENT * float(row_norms(start).max()))
            self.coupling = self._uncoupled(self.pending.shape[0])

    def inject(self, rows: int) -> None:
        """Append random rows, orthogonal to all others, to the pending ones."""
        n = self.pending.shape[1]
        rows = min(rows, n - self.size - self.pending.shape[0])
        if rows < 1:
            return
        fresh, _c, _r = orthonormalise(self.rng.normal((rows, n), self.pending), [*self.basis, self.pending], DEPENDENT)
        self.pending = _concat([self.pending, fresh])
        self.coupling = _concat([self.coupling, self._uncoupled(fresh.shape[0])])
        self.random_rows += fresh.shape[0]

    def expand(self) -> None:
        """Apply the operator to the active rows and make them part of the basis."""
        waiting, active = self.pending[: self.parked], self.pending[self.parked :]
        image = self.operator(active)
        self.scale = max(self.scale, float(row_norms(image).max()))
        fresh, c, r = orthonormalise(image, [*self.basis, waiting, active], 4 * self.eps * self.scale)
        m, p = self.size, self.size + self.parked
        to_basis, to_waiting, to_active = c[:, :m], c[:, m:p], c[:, p:]
        self._check_symmetry(to_basis, to_active)
        self.projected = _blocks(self.projected, to_basis.T, to_basis, (to_active + to_active.T) / 2)
        self.coupling = _blocks(self.coupling[: self.parked], to_waiting.T, self._uncoupled(fresh.shape[0]), r.T)
        self.basis.append(active)
        self.pending = _concat([waiting, fresh])
        self._solve()

    def restart(self, keep: int) -> None:
        """Keep the leading Ritz vectors only."""
        rotation = self.rotation[:, :keep]
        self.basis = [combine(rotation.T, self.basis)]
        self.coupling = self.coupling @ rotation
        self.values = self.values[:keep]
        self.projected = _diagonal(self.values)
        self.rotation = _diagonal(array_namespace(self.values).ones_like(self.values))

    def residuals(self) -> Array:
        """|A v - l v| / |l_1| of all Ritz pairs, by the recurrence."""
        return relative(row_norms((self.coupling @ self.rotation).T), self.norm)

    def converged(self, k: int, tol: float) -> bool:
        return self.size >= k and bool((self.residuals()[:k] <= tol).all())

    def park(self) -> None:
        self.parked = self.pending.shape[0]

    def unpark(self, k: int, tol: float) -> None:
        """Take the parked rows up again when the wanted residuals cannot fall below `tol` without them."""
        held = row_norms((self.coupling[: self.parked] @ self.rotation[:, :k]).T)
        if bool((relative(held, self.norm) > tol).any()):
            self.parked = 0

    def doubtful(self, k: int, width: float) -> bool:
        """Whether as many wanted pairs agree as there were random rows, so that further copies may be missing."""
        copies = self.random_rows
        if copies == 0 or copies > k:
            return copies == 0
        values = np.sort(to_numpy(self.values[:k]))
        return bool((values[copies - 1 :] - values[: k - copies + 1] <= width * self.norm).any())

    def certify(self, k: int, block: int, tol: float) -> tuple[Eigenpairs, Array]:
        """The k leading pairs with residuals from fresh applications, and the residual rows [k, n]."""
        vectors, _c, _r = orthonormalise(combine(self.rotation[:, :k].T, self.basis), [], 0.0)
        image = _concat([self.operator(vectors[i : i + block]) for i in range(0, k, block)])
        values, vectors, rest = rotate(vectors, image, self.which)
        residuals = relative(row_norms(rest), self.norm)
        operator = self.operator
        return Eigenpairs(values, vectors, residuals, residuals <= tol, operator.applications, operator.calls), rest

    def resume(self, pairs: Eigenpairs, rest: Array) -> None:
        """Begin again from certified pairs, with the true residuals of those that have not converged as next rows."""
        still_open = [i for i, done in enumerate(to_numpy(pairs.converged)) if not done]
        rows = _concat([rest[i : i + 1] for i in still_open])
        self.pending, _c, _r = orthonormalise(rows, [pairs.vectors], 4 * self.eps * self.scale)
        self.basis, self.projected, self.parked = [pairs.vectors], _diagonal(pairs.values), 0
        self.coupling = gram(self.pending, rest)
        self._solve()

    def _solve(self) -> None:
        self.values, self.rotation = ordered_eigh(self.projected, self.which)
        self.norm = max(self.norm, float(abs(self.values).max()))

    def _uncoupled(self, rows: int) -> Array:
        xp = array_namespace(self.projected)
        return xp.zeros((rows, self.size), dtype=self.projected.dtype, device=device(self.projected))

    def _check_symmetry(self, to_basis: Array, to_active: Array) -> None:
        coupling = self.coupling[self.parked :]
        defects = _concat([(to_active - to_active.T).reshape(-1), (to_basis - coupling).reshape(-1)])
        if self.scale:
            self.operator.check_symmetry(float(abs(defects).max()) / self.scale, self.eps)


def _solve_dense(operator: _Counted, n: int, k: int, like: Array, tol: float, which: Which) -> Eigenpairs:
    """All eigenpairs from the matrix, formed by applying the operator to the identity."""
    xp = array_namespace(like)
    eye = xp.eye(n, dtype=like.dtype, device=device(like))
    step = max(1, 2**22 // n)
    matrix = to_double(xp.concat([operator(eye[i : i + step]) for i in range(0, n, step)]))
    defect, scale = float(abs(matrix - matrix.T).max()), float(row_norms(matrix).max())
    operator.check_symmetry(defect / scale if scale else 0.0, float(xp.finfo(like.dtype).eps))
    values, rotation = ordered_eigh(matrix, which)
    vectors = to_like(rotation[:, :k].T, like)
    wide = to_double(vectors)
    residuals = relative(row_norms(wide @ matrix - values[:k, None] * wide), float(abs(values).max()))
    return Eigenpairs(values[:k], vectors, residuals, residuals <= tol, operator.applications, operator.calls)


def _diagonal(values: Array) -> Array:
    return array_namespace(values).eye(values.shape[0], dtype=values.dtype, device=device(values)) * values


def _concat(parts: list[Array]) -> Array:
    return array_namespace(parts[0]).concat(parts, axis=0)


def _blocks(a: Array, b: Array, c: Array, d: Array) -> Array:
    xp = array_namespace(d)
    return _concat([xp.concat([a, b], axis=1), xp.concat([c, d], axis=1)])


def _warn(pairs: Eigenpairs, tol: float, asymmetry: float) -> None:
    done, worst = to_numpy(pairs.converged), float(pairs.residuals.max())
    advice = "raise maxiter or tol, or work in float64"
    if asymmetry:
        advice = (
            f"the operator is symmetric only to {asymmetry:.1e} of |A q|, so raise tol or compute it more accurately: "
            "lower rtol and atol of InterpolatingAdjoint, or take DiscreteAdjoint()"
        )
    if not done.all():
        warnings.warn(
            f"{int((~done).sum())} of {done.size} eigenpairs did not reach the residual {tol:.0e} (worst {worst:.1e}, "
            f"after {pairs.calls} calls); {advice}",
            stacklevel=3,
        )
