"""Leading eigenpairs of operators, and the temporal, trial and unit modes of their partial traces."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kpflow_dyn.arrays import Array, Random, Rows, array_namespace, device, to_numpy
from kpflow_dyn.flat import euclidean_matrix, is_symmetric, on_rows, require_square
from kpflow_dyn.operators import GramOperator, MatrixOperator, Operator
from kpflow_dyn.reductions import PartialTrace, partial_trace
from kpflow_dyn.solvers import BlockLanczos, Eigenpairs
from kpflow_dyn.solvers.lanczos import Callback
from kpflow_dyn.solvers.moments import student
from kpflow_dyn.solvers.orthogonalise import (
    Which,
    combine,
    descending_eigh,
    gram,
    orthonormalise,
    relative,
    rotate,
    row_norms,
    to_double,
    to_like,
)
from kpflow_dyn.space import Space

if TYPE_CHECKING:
    import xarray

TINY = 1e-300


@dataclass(frozen=True, eq=False)
class Modes:
    """Eigenpairs with vectors shaped like the space that they live in.

    Attributes:
        values: [k], descending (up to their errors, where they are estimates), float64.
        vectors: [k, *space.shape], orthonormal in `space.inner`.
        residuals: [k], the true |A v - l v| / |l_1|.
        converged: [k], whether the residual is within the tolerance asked for.
        applications: how many applications to one vector it took, one of J and one of J* counting as one of J J*.
        space: where the vectors live.
        total: the trace of the operator where it is known, else None.
        stderr: [k], standard errors of the values where the operator itself was estimated from probes, else None.
    """

    values: Array
    vectors: Array
    residuals: Array
    converged: Array
    applications: int
    space: Space
    total: float | None = None
    stderr: Array | None = None

    @property
    def explained(self) -> Array:
        """Each value's share of the trace [k].

        Raises:
            ValueError: when the trace is not known; divide `values` by `trace(op).value`.
        """
        if self.total is None:
            raise ValueError("the trace of the operator is not known here; divide .values by kp.trace(op).value")
        return self.values / self.total if self.total else 0 * self.values

    def to_xarray(self) -> xarray.Dataset:
        """A dataset of `eigenvalues`, `vectors`, `residuals`, `converged`, `stderr` on "mode" and the space's axes."""
        import xarray

        data = {
            "eigenvalues": ("mode", to_numpy(self.values)),
            "vectors": (("mode", *self.space.axes), to_numpy(self.vectors)),
            "residuals": ("mode", to_numpy(self.residuals)),
            "converged": ("mode", to_numpy(self.converged)),
        }
        if self.stderr is not None:
            data["stderr"] = ("mode", to_numpy(self.stderr))
        total = {} if self.total is None else {"total": self.total}
        return xarray.Dataset(data, attrs={"applications": self.applications, **total})


def eigs(
    op: Operator,
    k: int,
    alg: BlockLanczos | None = None,
    seed: int | Random = 0,
    callback: Callback | None = None,
    which: Which = "LA",
) -> Modes:
    """The k algebraically largest eigenpairs A v = l v of a symmetric operator, or those at its other end.

    A = J J* with fewer parameters than states is solved as G = J*J on the parameters, which has the same nonzero
    eigenvalues; its vectors w give v = J w / sqrt(l), and residuals are then found anew from A v.

    Args:
        op: A, symmetric in the inner product of its space.
        k: how many pairs, at most the largest rank that A can have.
        alg: `solvers.BlockLanczos` with its options; the default one when None.
        seed: an int, or a `Random` to continue.
        callback: called after each step of the solver with its number of calls and the leading residuals.
        which: "LA" for the algebraically largest, "SA" for the smallest, "LM" for the largest in magnitude.

    Raises:
        ValueError: k out of range, an unknown `which`, or an operator that is not symmetric.

    Warns:
        UserWarning: some pairs did not converge; they are returned flagged.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
        >>> kp.eigs(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit, symmetric=True), k=2).values
        array([3., 2.])
    """
    alg, rng, space = BlockLanczos() if alg is None else alg, Random(seed), op.domain
    require_square(op, "eigs")
    _check_count(k, space.size if which == "SA" else _most(op))
    if not is_symmetric(op, rng):
        raise ValueError(f"eigs needs a symmetric operator, got {op!r}; take op @ op.T for its left singular vectors")
    if isinstance(op, GramOperator) and op.factor.domain.size < space.size and which != "SA":
        pairs = _on_parameters(op, k, alg, rng, callback)
    else:
        pairs = alg.solve(on_rows(op), space.size, k, like=space.like, seed=rng, which=which, callback=callback)
    vectors = space.from_euclidean(pairs.vectors.reshape((k, *space.shape)))
    return Modes(pairs.values, vectors, pairs.residuals, pairs.converged, pairs.applications, space)


@dataclass(frozen=True, eq=False)
class SingularModes:
    """Singular triplets A v = s u, A* u = s v.

    Attributes:
        values: s [k], descending, float64.
        left: u [k, *codomain.shape], orthonormal in the inner product of the codomain; of flow.J, state modes.
        right: v [k, *domain.shape], orthonormal in that of the domain; of flow.J, the changes of the parameters that
            drive them (`flow.as_parameters(right)` for the arrays of each parameter).
        residuals: [k], the true (|A v - s u|^2 + |A* u - s v|^2)^(1/2) / s_1.
        converged: [k], whether the residual is within the tolerance asked for.
        applications: how many applications to one vector it took, one of A and one of A* counting as one.
    """

    values: Array
    left: Array
    right: Array
    residuals: Array
    converged: Array
    applications: int


def svds(
    op: Operator,
    k: int,
    alg: BlockLanczos | None = None,
    seed: int | Random = 0,
    callback: Callback | None = None,
) -> SingularModes:
    """The k largest singular values of any operator A, with their left and right vectors.

    Eigenvectors of A*A, or of A A* where that is smaller, span the leading right (left) vectors; values and vectors are
    those of A between this span and its image. Squares lose half of the digits: s below sqrt(eps) s_1 are noise.

    Args:
        op: A.
        k: how many triplets, at most the smaller dimension.
        alg: `solvers.BlockLanczos` with its options; the default one when None. Its tolerance is that of the residuals.
        seed: an int, or a `Random` to continue.
        callback: called after each step of the solver with its number of calls and its residuals.

    Raises:
        ValueError: k out of range.

    Warns:
        UserWarning: some triplets did not converge; they are returned flagged.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> left, right = (kp.Space((name,), (n,), np.zeros(1)) for name, n in (("out", 2), ("in", 3)))
        >>> kp.svds(kp.MatrixOperator(np.array([[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]]), right, left), k=2).values
        array([2., 1.])
    """
    alg, rng = BlockLanczos() if alg is None else alg, Random(seed)
    _check_count(k, min(op.domain.size, op.codomain.size))
    if op.domain.size > op.codomain.size:
        found = svds(op.T, k, alg, rng, callback)
        return dataclasses.replace(found, left=found.right, right=found.left)
    found = _triplets(op, k, alg, rng, callback)
    if not bool(found.converged.all()):
        warnings.warn(
            f"{int((~found.converged).sum())} of {k} singular triplets did not reach the residual {alg.tol:.0e} (worst "
            f"{float(found.residuals.max()):.1e}); raise maxiter or tol, or work in float64",
            stacklevel=2,
        )
    left, right = (
        space.from_euclidean(rows.reshape((k, *space.shape)))
        for space, rows in ((op.codomain, found.left), (op.domain, found.right))
    )
    return dataclasses.replace(found, left=left, right=right)


def _triplets(op: Operator, k: int, alg: BlockLanczos, rng: Random, callback: Callback | None) -> SingularModes:
    """The singular triplets as rows, from eigenvectors of A*A; solved again if small values lack accuracy."""
    forward, backward, space = on_rows(op), on_rows(op.T), op.domain
    if space.size <= alg.dense:
        eye = space.xp.eye(space.size, dtype=space.dtype, device=device(space.like))
        return _certified(*_between(forward(eye), eye, k, rng), backward, alg.tol, spent=space.size)
    start, solver, spent = None, alg, 0
    while True:
        with warnings.catch_warnings(action="ignore"):  # the residuals of the triplets count
            pairs = solver.solve(
                lambda rows: backward(forward(rows)),
                space.size,
                k,
                like=space.like,
                seed=rng,
                start=start,
                callback=callback,
            )
        spent += pairs.applications + k
        found = _certified(*_between(forward(pairs.vectors), pairs.vectors, k, rng), backward, alg.tol, spent)
        ratio = float(found.values[-1]) / max(float(found.values[0]), TINY)
        if solver is not alg or not ratio or bool(found.converged.all()):
            return found
        solver, start = dataclasses.replace(alg, tol=alg.tol * ratio / 2), found.right


def _certified(values: Array, left: Array, right: Array, backward: Rows, tol: float, spent: int) -> SingularModes:
    """Triplets with A v = s u, and their residuals A* u - s v."""
    rest = backward(left) - to_like(values, right)[:, None] * right
    residuals = relative(row_norms(rest), float(values[0]))
    return SingularModes(values, left, right, residuals, residuals <= tol, spent)


def _between(images: Array, rows: Array, k: int, rng: Random) -> tuple[Array, Array, Array]:
    """The k largest singular values, left and right rows of A between orthonormal rows and the span of their images."""
    basis = _basis(images, rng)
    small = gram(images, basis)
    turn, values, turned = array_namespace(small).linalg.svd(small)
    return values[:k], combine(turned[:k], [basis]), combine(turn.T[:k], [rows])


def modes(
    op: Operator, axis: str = "time", k: int | None = None, samples: int | None = None, seed: int | Random = 0
) -> Modes:
    """The k leading eigenvectors of the partial trace of A on one axis: temporal, trial or unit modes.

    The eigenvalues of an estimate are spread by its noise, so that a flat spectrum would seem to have leading modes.
    Where the partial trace T is estimated, the values are therefore cross-validated,

        value_i = v_i^T T' v_i    with v_i of one half of the probes and T' of the other, both ways

    unbiased for what modes of half of the probes carry. They lie below the leading eigenvalues of T where these modes
    are not resolved, add up to the trace, and come with standard errors. Vectors are those of all probes, and residuals
    say how well these were solved for, not how far they are from those of T.

    Args:
        op: A, symmetric; a partial trace on that axis alone is taken as it is.
        axis: the name of the axis.
        k: how many, at most the length of the axis; None gives five, or all of a shorter axis.
        samples: how many probes for the partial trace; None is exact where it is cheap.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: an unknown axis, k out of range, or an operator that is not symmetric.
    """
    on_axis = op.domain.axes == (axis,)
    reduced = op if isinstance(op, MatrixOperator) and on_axis else partial_trace(op, axis, samples, seed)
    k = min(5, reduced.domain.size) if k is None else k
    _check_count(k, reduced.domain.size)
    if not is_symmetric(reduced, Random(seed)):
        raise ValueError(f"modes needs a symmetric operator, got {op!r}; take op @ op.T or op.T @ op")
    matrix, space = to_double(euclidean_matrix(reduced)), reduced.domain
    values, rotation = descending_eigh(matrix)
    rows = rotation[:, :k].T
    residuals = relative(row_norms(rows @ matrix - values[:k, None] * rows), float(abs(values).max()))
    vectors, total = space.from_euclidean(to_like(rows, space.like).reshape((k, *space.shape))), float(values.sum())
    groups = reduced.groups if isinstance(reduced, PartialTrace) else []
    values, stderr = _cross_validated(groups, k) if groups else (values[:k], None)
    applications = getattr(reduced, "applications", 0)
    return Modes(values, vectors, residuals, residuals <= 1e-6, applications, space, total, stderr)


def _cross_validated(groups: list[Array], k: int) -> tuple[Array, Array]:
    """v^T T v with v found from one half of the groups and T from the other, both ways, and its standard error."""
    xp, halves, means, variances = array_namespace(groups[0]), (groups[::2], groups[1::2]), [], []
    for found, other in (halves, halves[::-1]):
        vectors = descending_eigh(sum(found) / len(found))[1][:, :k]
        each = xp.stack([xp.sum((group @ vectors) * vectors, axis=0) for group in other])
        means.append(xp.mean(each, axis=0))
        variances.append(xp.var(each, axis=0, correction=1) / len(other))
    return (means[0] + means[1]) / 2, student(len(groups)) * xp.sqrt(variances[0] + variances[1]) / 2


def _most(op: Operator) -> int:
    """The largest rank that an operator from a space to itself can have."""
    return min(op.domain.size, op.factor.domain.size) if isinstance(op, GramOperator) else op.domain.size


def _check_count(k: int, most: int) -> None:
    if not isinstance(k, int | np.integer) or not 1 <= k <= most:
        raise ValueError(f"k = {k!r} pairs asked of an operator of rank {most} at most; expected 1 <= k <= {most}")


def _on_parameters(op: GramOperator, k: int, alg: BlockLanczos, rng: Random, callback: Callback | None) -> Eigenpairs:
    """Eigenpairs of J J* from those of J*J."""
    forward, backward, parameters = on_rows(op.factor), on_rows(op.factor.T), op.factor.domain
    inner = alg.solve(
        lambda w: backward(forward(w)), parameters.size, k, like=parameters.like, seed=rng, callback=callback
    )
    basis = _basis(forward(inner.vectors), rng)
    values, vectors, rest = rotate(basis, on_rows(op)(basis))
    residuals = relative(row_norms(rest), float(abs(values).max()))
    converged = residuals <= alg.tol
    if bool(inner.converged.all()) and not bool(converged.all()):
        warnings.warn(
            f"the residuals of the state vectors reach {float(residuals.max()):.1e}, above {alg.tol:.0e}; lower tol, "
            "or rtol and atol of InterpolatingAdjoint if the operator comes from that",
            stacklevel=3,
        )
    return Eigenpairs(values, vectors, residuals, converged, inner.applications + k + (k + 1) // 2, inner.calls + 2)


def _basis(lifted: Array, rng: Random) -> Array:
    """Orthonormal rows that span J w, filled up with random ones where J w vanishes."""
    squares, rotation = descending_eigh(gram(lifted, lifted))
    xp = array_namespace(lifted)
    floor = 10 * float(xp.finfo(lifted.dtype).eps) * float(abs(squares[0])) ** 0.5
    rows, _c, _r = orthonormalise(combine(rotation.T, [lifted]), [], floor)
    missing = lifted.shape[0] - rows.shape[0]
    if missing:
        fresh, _c, _r = orthonormalise(rng.normal((missing, lifted.shape[1]), lifted), [rows], 1e-6)
        rows = xp.concat([rows, fresh], axis=0)
    return rows
