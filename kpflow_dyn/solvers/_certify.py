"""From Ritz pairs of a Krylov basis to results with true residuals.

The recurrence A Q = H Q + C^T (pending rows) predicts the residual A v - l v of every Ritz pair without an application,
up to round-off. A few applications check all predictions at once: for random combinations x of the vectors, A x must be
the same combination of the predicted A v. The root mean square difference is added to the residuals. If it is as large
as the tolerance (float32 at its round-off, an operator that is nearly symmetric), A is applied to every vector again.
"""

import warnings
from typing import Generic, NamedTuple, TypeVar

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, eps_of, to_numpy
from kpflow_dyn._arrays.dots import gram, row_norms
from kpflow_dyn.solvers._counted import Counted, Product
from kpflow_dyn.solvers._krylov import Krylov
from kpflow_dyn.solvers._matrix import identity, pairs_of_matrix
from kpflow_dyn.solvers._orthogonalise import (
    Which,
    combine,
    concat,
    descending_eigh,
    orthonormalise,
    relative,
    rotate,
    to_like,
)
from kpflow_dyn.solvers._results import Eigenpairs, Triplets

SMALL = 512  # dimensions at which L itself is decomposed, which keeps the digits of small values
TRUSTED = 0.9  # of the tolerance may be round-off
SMALL_ERROR = 0.2  # of the tolerance, which adds 2% to a residual
CHECKS = 2  # random combinations behind a check
TINY = 1e-300
Result = TypeVar("Result", Eigenpairs, Triplets)


class Again(NamedTuple):
    """Ritz pairs to go on from, with the true A v - l v."""

    vectors: Array
    values: Array
    rest: Array


class Certificate(Generic[Result]):
    """How Ritz pairs of an operator become results with residuals to reach `tol`; `what` names them in warnings."""

    def __init__(self, operator: Counted, tol: float, rng: Random, what: str) -> None:
        self.operator, self.tol, self.rng, self.what = operator, tol, rng, what
        self.incomplete = False  # whether copies of a repeated eigenvalue may be missing

    def tolerances(self, krylov: Krylov, k: int, tol: float) -> Array | float:
        """The residuals |A v - l v| / |l_1| of the leading pairs to iterate to."""
        return tol

    def claimed(self, krylov: Krylov, k: int) -> Result | None:
        """The results that the recurrence predicts; None where the check fails."""
        raise NotImplementedError

    def anew(self, vectors: Array, norm: float) -> tuple[Result, Again]:
        """The results from new applications to approximate eigenvectors; `norm` is the largest |l| seen."""
        raise NotImplementedError

    def of_matrix(self, known: Array, k: int) -> Result:
        """The results by way of the operator's matrix, orthogonal to known rows [d, n]."""
        raise NotImplementedError

    def warn(self, found: Result) -> None:
        """Say how many did not converge or may be missing, and what to do."""
        if self.incomplete:
            warnings.warn(
                f"as many {self.what} agree as there were random rows, and {found.calls} calls did not show whether "
                "more copies are missing; give a larger block or maxiter",
                stacklevel=5,
            )
        done, worst, asymmetry = to_numpy(found.converged), float(found.residuals.max()), self.operator.asymmetry
        advice = "raise maxiter or tol, or work in float64"
        if asymmetry:
            advice = (
                f"the operator is symmetric only to {asymmetry:.1e} of |A q|, so raise tol or compute it more "
                "accurately: products in float32, lower rtol and atol of InterpolatingAdjoint, or DiscreteAdjoint()"
            )
        if not done.all():
            warnings.warn(
                f"{int((~done).sum())} of {done.size} {self.what} did not reach the residual {self.tol:.0e} (worst "
                f"{worst:.1e}, after {found.calls} calls); {advice}",
                stacklevel=5,
            )

    def off(self, apply: Rows, rows: Array, values: Array, images: Array, rest: Array) -> Array:
        """Random combinations, of the size of one row, of the errors in A rows = values images + rest."""
        mix = self.rng.normal((CHECKS, rows.shape[0]), rows) / rows.shape[0] ** 0.5
        claims = combine(mix * to_like(values, mix), [images]) + combine(mix, [rest])
        return apply(combine(mix, [rows])) - claims


class InPlace(Certificate[Eigenpairs]):
    """Eigenpairs of A, at one end `which` of its spectrum."""

    def __init__(self, operator: Counted, tol: float, rng: Random, which: Which) -> None:
        super().__init__(operator, tol, rng, "eigenpairs")
        self.which: Which = which

    def claimed(self, krylov: Krylov, k: int) -> Eigenpairs | None:
        values, vectors, left = krylov.ritz(k)
        rest = combine(left, [krylov.pending])
        off = relative(_root_mean_square(self.off(self.operator, vectors, values, vectors, rest)), krylov.norm)
        if off > TRUSTED * self.tol:
            return None
        return self._pairs(values, vectors, (relative(row_norms(rest), krylov.norm) ** 2 + off**2) ** 0.5)

    def anew(self, vectors: Array, norm: float) -> tuple[Eigenpairs, Again]:
        vectors, _c, _r = orthonormalise(vectors, [], 0.0)
        values, vectors, rest = rotate(vectors, self.operator(vectors), self.which)
        return self._pairs(values, vectors, relative(row_norms(rest), norm)), Again(vectors, values, rest)

    def of_matrix(self, known: Array, k: int) -> Eigenpairs:
        values, vectors, residuals = pairs_of_matrix(self.operator, known, k, self.which)
        return self._pairs(values, vectors, residuals)

    def _pairs(self, values: Array, vectors: Array, residuals: Array) -> Eigenpairs:
        spent = self.operator
        return Eigenpairs(values, vectors, residuals, residuals <= self.tol, spent.applications, spent.calls)


class OfProduct(Certificate[Triplets]):
    """Singular triplets of L, from eigenpairs v of A = L* L: u = L v / s with s the root of the eigenvalue.

    `squared` takes the residuals of (s^2, u) as eigenpairs of L L*, |L L* u - s^2 u| / s_1^2, not of the triplets.
    """

    operator: Product

    def __init__(self, operator: Product, tol: float, rng: Random, squared: bool) -> None:
        super().__init__(operator, tol, rng, "eigenpairs" if squared else "singular triplets")
        self.squared = squared

    def tolerances(self, krylov: Krylov, k: int, tol: float) -> Array | float:
        if self.squared or not krylov.size:
            return tol
        values, xp = krylov.values[:k], array_namespace(krylov.values)
        s = xp.sqrt(xp.clip(values / max(float(values[0]), TINY), 0.0, 1.0))
        return xp.clip(tol * s, 30 * krylov.eps, tol)  # |L* u - s v| = |A v - s^2 v| / s

    def claimed(self, krylov: Krylov, k: int) -> Triplets | None:
        values, v, left = krylov.ritz(k)
        if float(values[-1]) <= 30 * krylov.eps**0.5 * float(values[0]):
            return None  # u would not be orthogonal
        s, product = values**0.5, self.operator
        u, left = product.forward(to_like(1 / s, v)[:, None] * v), left / s[:, None]
        off = self.off(product.backward, u, s, v, combine(left, [krylov.pending]))
        norm, pending, error = self._norm(s), krylov.pending, _root_mean_square(off)
        if self.squared:
            error = float(s[0]) * error  # |L x| <= s_1 |x|, which is enough where it is small
            if error > SMALL_ERROR * self.tol * norm:
                error = _root_mean_square(product.forward(off))
            pending = product.forward(pending)
        rest = _norms_of_combinations(left, pending)
        if (error := error / norm) > TRUSTED * self.tol:
            return None
        return self._triplets(s, u, v, ((rest / norm) ** 2 + error**2) ** 0.5)

    def anew(self, vectors: Array, norm: float) -> tuple[Triplets, Again]:
        return self._between(orthonormalise(vectors, [], 0.0)[0], vectors.shape[0])

    def of_matrix(self, known: Array, k: int) -> Triplets:
        p = known.shape[1]
        rows = identity(known) if p <= SMALL else pairs_of_matrix(self.operator, known, k, "LA")[1]
        return self._between(rows, k)[0]

    def _between(self, rows: Array, k: int) -> tuple[Triplets, Again]:
        """The k largest triplets of L between orthonormal rows and the span of their images."""
        images = self.operator.forward(rows)
        basis = self._basis(images)
        small = gram(images, basis)
        turn, s, turned = array_namespace(small).linalg.svd(small)
        s, u, v = s[:k], combine(turned[:k], [basis]), combine(turn.T[:k], [rows])
        rest = self.operator.backward(u) - to_like(s, v)[:, None] * v
        if float(s[0]):  # if L* is the adjoint, <L* u, v> = <u, L v>, so this is zero
            self.operator.check_symmetry(float(abs(gram(rest, v)).max()) / float(s[0]), eps_of(v))
        left = row_norms(self.operator.forward(rest) if self.squared else rest)
        residuals = relative(left, self._norm(s))
        return self._triplets(s, u, v, residuals), Again(v, s**2, to_like(s, v)[:, None] * rest)

    def _basis(self, images: Array) -> Array:
        """Orthonormal rows that span the images, filled up with random ones where these vanish."""
        squares, rotation = descending_eigh(gram(images, images))
        floor = 10 * eps_of(images) * float(abs(squares[0])) ** 0.5
        rows, _c, _r = orthonormalise(combine(rotation.T, [images]), [], floor)
        missing = images.shape[0] - rows.shape[0]
        if missing:
            fresh, _c, _r = orthonormalise(self.rng.normal((missing, images.shape[1]), images), [rows], 1e-6)
            rows = concat([rows, fresh])
        return rows

    def _norm(self, s: Array) -> float:
        return float(s[0]) ** (2 if self.squared else 1)

    def _triplets(self, s: Array, u: Array, v: Array, residuals: Array) -> Triplets:
        spent = self.operator
        return Triplets(s, u, v, residuals, residuals <= self.tol, spent.applications, spent.calls)


def _norms_of_combinations(coefficients: Array, rows: Array) -> Array:
    """|sum_j c[i, j] row_j|, without forming the sums."""
    xp = array_namespace(coefficients)
    squares = xp.sum((coefficients @ gram(rows, rows)) * coefficients, axis=1)
    return xp.sqrt(xp.clip(squares, 0.0, None))


def _root_mean_square(rows: Array) -> float:
    return float((row_norms(rows) ** 2).sum() / rows.shape[0]) ** 0.5
