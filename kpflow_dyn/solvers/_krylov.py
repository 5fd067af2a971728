"""A block Krylov basis of a symmetric operator: it grows by applications, is cut by restarts, and gives Ritz pairs."""

from kpflow_dyn._arrays import Array, Random, array_namespace, device, eps_of, products_in, to_numpy
from kpflow_dyn._arrays.dots import gram, row_norms, to_double
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._orthogonalise import (
    ORDERS,
    Which,
    combine,
    concat,
    diagonal,
    ordered_eigh,
    orthonormalise,
    relative,
)

DEPENDENT = 1e-6  # start rows with a smaller part of their own are dropped


class Krylov:
    """A basis Q = [rows expanded so far], with A Q = H Q + C^T (pending rows): exact up to round-off.

    `pending` rows are orthonormal and not expanded yet. The first `parked` of them wait, the `active` others are next.
    All rows are orthogonal to `known` ones, and A stands for its part orthogonal to those.
    """

    def __init__(self, operator: Counted, known: Array, rng: Random, which: Which, products: str | None = None) -> None:
        self.products = products
        self.operator, self.known, self.rng, self.wanted = operator, known, rng, ORDERS[which]
        self.which: Which = which
        self.pending = known[:0]
        self.basis: list[Array] = []
        self.projected = self.rotation = self.coupling = to_double(self.pending[:, :0])
        self.values = self.projected.reshape(-1)
        self.parked = self.random_rows = 0
        self.scale = self.norm = 0.0  # the largest |A q| of a row, and the largest |Ritz value|, so far
        self.eps = eps_of(known)

    @property
    def size(self) -> int:
        """How many rows were expanded."""
        return sum(q.shape[0] for q in self.basis)

    @property
    def active(self) -> int:
        """How many pending rows the next application takes."""
        return self.pending.shape[0] - self.parked

    def begin(self, start: Array | None, block: int) -> None:
        """Take given rows, or random ones."""
        if start is None:
            self.inject(block)
            self.random_rows = self.pending.shape[0]
        else:
            floor = DEPENDENT * float(row_norms(start).max())
            self.pending, _c, _r = orthonormalise(start, [self.known], floor)
            self.coupling = self._uncoupled(self.pending.shape[0])

    def inject(self, rows: int) -> None:
        """Append random rows, orthogonal to all others, to the pending ones."""
        n = self.pending.shape[1]
        rows = min(rows, n - self.known.shape[0] - self.size - self.pending.shape[0])
        if rows < 1:
            return
        others = [self.known, *self.basis, self.pending]
        fresh, _c, _r = orthonormalise(self.rng.normal((rows, n), self.pending), others, DEPENDENT)
        self.pending = concat([self.pending, fresh])
        self.coupling = concat([self.coupling, self._uncoupled(fresh.shape[0])])

    def expand(self) -> None:
        """Apply the operator to the active rows and make them part of the basis."""
        waiting, active = self.pending[: self.parked], self.pending[self.parked :]
        with products_in(self.products, active):
            image = self.operator(active)
        self.scale = max(self.scale, float(row_norms(image).max()))
        others = [self.known, *self.basis, waiting, active]
        fresh, c, r = orthonormalise(image, others, 4 * self.eps * self.scale)
        c = c[:, self.known.shape[0] :]
        m, p = self.size, self.size + self.parked
        to_basis, to_waiting, to_active = c[:, :m], c[:, m:p], c[:, p:]
        self._check_symmetry(to_basis, to_active)
        self.projected = _blocks(self.projected, to_basis.T, to_basis, (to_active + to_active.T) / 2)
        self.coupling = _blocks(self.coupling[: self.parked], to_waiting.T, self._uncoupled(fresh.shape[0]), r.T)
        self._append(active)
        self.pending = concat([waiting, fresh])
        self._solve()

    def restart(self, keep: int) -> None:
        """Keep the leading Ritz vectors only."""
        rotation = self.rotation[:, :keep]
        self.basis = [combine(rotation.T, self.basis)]
        self.coupling = self.coupling @ rotation
        self.values = self.values[:keep]
        self.projected = diagonal(self.values)
        self.rotation = diagonal(array_namespace(self.values).ones_like(self.values))

    def begin_again(self, vectors: Array, values: Array, rest: Array, done: Array) -> None:
        """Keep only these Ritz pairs, and go on with the residuals A v - l v of those that have not converged."""
        still_open = [i for i, yes in enumerate(to_numpy(done)) if not yes]
        rows = concat([rest[i : i + 1] for i in still_open])
        self.pending, _c, _r = orthonormalise(rows, [self.known, vectors], 4 * self.eps * self.scale)
        self.basis, self.projected, self.parked = [vectors], diagonal(values), 0
        self.coupling = gram(self.pending, rest)
        self._solve()

    def ritz(self, k: int) -> tuple[Array, Array, Array]:
        """The k leading Ritz values and vectors, and A v - l v in coordinates of the pending rows [k, pending]."""
        return self.values[:k], combine(self.rotation[:, :k].T, self.basis), (self.coupling @ self.rotation[:, :k]).T

    def residuals(self) -> Array:
        """|A v - l v| / |l_1| of all Ritz pairs, by the recurrence."""
        return relative(row_norms((self.coupling @ self.rotation).T), self.norm)

    def converged(self, k: int, tol: float) -> bool:
        """Whether the k leading pairs are within the tolerance, by the recurrence."""
        return self.size >= k and bool((self.residuals()[:k] <= tol).all())

    def aim(self, k: int, tol: Array | float, rows: int) -> None:
        """Turn the pending rows so that the last ones carry most of the open residuals of wanted pairs, and let all but
        so many wait.

        One row after another, each the best that is pending, does what a block does with fewer applications.
        """
        self.parked = max(0, self.pending.shape[0] - rows)
        left = self.coupling @ self.rotation[:, :k]  # [pending, k]
        is_open = relative(row_norms(left.T), self.norm) > tol
        if self.parked and bool(is_open.any()):
            left = left * is_open
            turn = ordered_eigh(left @ left.T, "SA")[1].T
            self.pending, self.coupling = combine(turn, [self.pending]), turn @ self.coupling

    def _append(self, rows: Array) -> None:
        """Join blocks of similar sizes, so that there are few blocks and few shapes."""
        self.basis.append(rows)
        while len(self.basis) > 1 and self.basis[-2].shape[0] <= self.basis[-1].shape[0]:
            self.basis[-2:] = [concat(self.basis[-2:])]

    def _solve(self) -> None:
        self.values, self.rotation = ordered_eigh(self.projected, self.which)
        self.norm = max(self.norm, float(abs(self.values).max()))

    def _uncoupled(self, rows: int) -> Array:
        xp = array_namespace(self.projected)
        return xp.zeros((rows, self.size), dtype=self.projected.dtype, device=device(self.projected))

    def _check_symmetry(self, to_basis: Array, to_active: Array) -> None:
        coupling = self.coupling[self.parked :]
        defects = concat([(to_active - to_active.T).reshape(-1), (to_basis - coupling).reshape(-1)])
        if self.scale:
            self.operator.check_symmetry(float(abs(defects).max()) / self.scale, self.eps)


def _blocks(a: Array, b: Array, c: Array, d: Array) -> Array:
    xp = array_namespace(d)
    return concat([xp.concat([a, b], axis=1), xp.concat([c, d], axis=1)])
