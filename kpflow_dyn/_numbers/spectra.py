"""Leading eigenpairs of operators, and the temporal, trial and unit modes of their partial traces."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, device, to_numpy
from kpflow_dyn._arrays.dots import row_norms, to_double
from kpflow_dyn._arrays.memory import budget, bytes_of, memory_budget, require
from kpflow_dyn._flows.sites import CoreOperator
from kpflow_dyn._numbers.by_parts import pairs_by_parts
from kpflow_dyn._numbers.reductions import MeanOfSamples, PartialTrace, partial_trace
from kpflow_dyn._shown import Row, Shown, axes_sizes, listed, numbers, shares, with_error
from kpflow_dyn._spaces.operators import GramOperator, MatrixOperator, Operator, smaller_of
from kpflow_dyn._spaces.rows import (
    between_counted,
    euclidean_matrix,
    is_symmetric,
    on_counted,
    on_rows,
    require_square,
)
from kpflow_dyn._spaces.scaling import Size, at_unit_size
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import BlockLanczos, Eigenpairs, EigenSolver, Triplets
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._doors import eigenpairs, triplets
from kpflow_dyn.solvers._lanczos import Callback
from kpflow_dyn.solvers._matrix import matrix_of
from kpflow_dyn.solvers._moments import student
from kpflow_dyn.solvers._orthogonalise import (
    Which,
    check_which,
    descending_eigh,
    no_rows,
    orthonormalise,
    project_out,
    relative,
    to_like,
    with_sign,
)

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

DEPENDENT = 1e-6  # vectors to deflate with a smaller part of their own are dropped


@dataclass(frozen=True, eq=False, repr=False)
class Modes(Shown):
    """Eigenpairs, with vectors that have the shape of their space.

    Attributes:
        values: [k], descending (estimates only up to their errors), float64.
        vectors: [k, *space.shape], orthonormal in `space.inner`.
        residuals: [k], the true |A v - l v| / |l_1|.
        converged: [k], whether the residual is within the requested tolerance.
        applications: how many applications to one vector it took. One J and one J* count as one of J J*.
        space: the space of the vectors.
        total: the trace of the operator if it is known, else None.
        stderr: [k], standard errors of the values if the operator itself was estimated from probes, else None.

    Example as `eigs`.
    """

    values: Array
    vectors: Array
    residuals: Array
    converged: Array
    applications: int
    space: Space
    total: float | None = None
    stderr: Array | None = None

    def _shown(self) -> tuple[str, list[Row]]:
        values, space = to_numpy(self.values), self.space
        rows: list[Row] = [("vectors", axes_sizes(("mode", *space.axes), (len(values), *space.shape)))]
        of_trace: list[Row] = [("explained", shares(to_numpy(self.explained)))] if self.total else []
        title = f"{len(values)} modes on {' x '.join(space.axes)}"
        if self.stderr is None:
            return title, [*rows, ("values", numbers(values)), *of_trace, *certified(self)]
        rows += [("values", listed(map(with_error, values, to_numpy(self.stderr)))), *of_trace]
        rows += ["estimated, ± one standard error; values of modes that the samples do not resolve lie low"]
        return title, [*rows, ("applications", str(self.applications))]

    @property
    def explained(self) -> Array:
        """Each value's share of the trace [k]; a ValueError where the trace is not known."""
        if self.total is None:
            raise ValueError("the trace of the operator is not known here; divide .values by kp.trace(op).value")
        return self.values / self.total if self.total else 0 * self.values

    def __len__(self) -> int:
        return len(self.values)

    def first(self, k: int) -> Modes:
        """The k leading ones alone."""
        kept = {name: getattr(self, name)[:k] for name in ("values", "vectors", "residuals", "converged")}
        return dataclasses.replace(self, **kept, stderr=None if self.stderr is None else self.stderr[:k])

    def to_xarray(self) -> xarray.Dataset:
        """A dataset of `eigenvalues`, `vectors`, `residuals`, `converged`, `stderr`, `explained` on "mode" and the
        space's axes.

        Units have their names where the model tells these, as a plant does, and times are those of the solution.
        """
        import xarray

        names, arrays = ("mode", *self.space.axes), {"eigenvalues": self.values, "vectors": self.vectors}
        arrays |= {"residuals": self.residuals, "converged": self.converged, "stderr": self.stderr}
        arrays |= {} if self.total is None else {"explained": self.explained}
        data = {key: (names[: a.ndim], to_numpy(a)) for key, a in arrays.items() if a is not None}
        total = {} if self.total is None else {"total": self.total}
        coords: dict[str, Any] = {"unit": list(self.space.units)} if self.space.units else {}
        coords |= {} if self.space.times is None else {"time": to_numpy(self.space.times)}
        return xarray.Dataset(data, coords, {"applications": self.applications, **total})

    def plot(self, dark: bool = False) -> Figure:
        """The share of each mode in the trace, or its eigenvalue, and the leading modes."""
        from kpflow_dyn.figures import _results as figures

        return figures.modes(self, dark=dark)


def certified(found: Any) -> list[Row]:
    """How good pairs or triplets are, as rows of text."""
    done, worst = to_numpy(found.converged), to_numpy(found.residuals).max(initial=0.0)
    rows: list[Row] = [("converged", f"{done.sum()} of {len(done)}, residuals at most {worst:.1e}")]
    return [*rows, ("applications", str(found.applications))]


def eigs(
    op: Operator,
    k: int,
    alg: EigenSolver | None = None,
    seed: int | Random = 0,
    callback: Callback | None = None,
    which: Which = "LA",
    start: Array | None = None,
    deflate: Array | None = None,
) -> Modes:
    """The k algebraically largest eigenpairs A v = l v of a symmetric operator, or those that `which` names.

    If A = J J* has fewer parameters than states, G = J*J on the parameters is solved instead. It has the same nonzero
    eigenvalues. Its eigenvectors w give v = J w / sqrt(l).

    Args:
        op: A, symmetric in the inner product of its space.
        k: how many pairs, at most the largest rank that A can have.
        alg: `solvers.BlockLanczos` with its options (its defaults when None); `solvers.Dense()` for the full matrix; or
            your own solver, see `solvers.EigenSolver`.
        seed: an int, or a `Random` to continue.
        callback: called after each step with the number of calls so far and at most k leading residuals.
        which: "LA" for the algebraically largest, "SA" for the smallest, "LM" for the largest in magnitude.
        start: vectors [b, *shape] to begin with, such as those of an earlier checkpoint; random when None. Random
            vectors take fewer applications, unless the residuals of yours are already close to the tolerance.
        deflate: vectors [d, *shape] that all pairs stay orthogonal to, such as pairs found before. The pairs are then
            those of (1 - U U*) A (1 - U U*), where U is an orthonormal basis of these vectors.

    Raises:
        ValueError: k out of range, an unknown `which`, or an operator that is not symmetric.

    Warns:
        UserWarning: some pairs did not converge. They are returned with a flag.

    Source as `solvers.BlockLanczos`.

    >>> import numpy as np, kpflow_dyn as kp
    >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
    >>> kp.eigs(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit, symmetric=True), k=2).values
    array([3., 2.])
    """
    require_square(op, "eigs")
    alg, rng, space = BlockLanczos() if alg is None else alg, Random(seed), op.domain
    check_which(which)
    op, size = at_unit_size(op)
    known = None
    if deflate is not None:
        rows = _rows(deflate, space, "deflate")
        known, _c, _r = orthonormalise(rows, [], DEPENDENT * float(row_norms(rows).max()))
    most = space.dimension if which == "SA" else min(smaller_of(op).domain.size, space.dimension)
    check_count(k, most - (0 if known is None else known.shape[0]))
    if not is_symmetric(op, rng):
        raise ValueError(f"eigs needs a symmetric operator, got {op!r}; take op @ op.T for its left singular vectors")
    first = None if start is None else _rows(start, space, "start")
    with room_for(k, space):
        plain = which == "LA" and first is None and known is None
        apart = pairs_by_parts(op, k, alg, rng, callback) if plain else None
        if apart is not None:
            return _as_modes(apart, apart.vectors, space, size, apart.values)
        if isinstance(op, GramOperator) and op.factor.domain.size < space.size and which != "SA":
            product = _of_product(op.factor, k, alg, rng, callback, first, known)
            return _as_modes(product, product.left, space, size, product.values**2)
        pick, back = between_counted(space)
        asked = {"start": None if first is None else pick(first), "deflate": None if known is None else pick(known)}
        asked |= {"which": None if which == "LA" else which, "callback": callback}
        found = eigenpairs(alg, on_counted(op), space.dimension, k, space.like, rng, **asked)
        return _as_modes(found, back(found.vectors), space, size, found.values)


def room_for(k: int, space: Space) -> AbstractContextManager[None]:
    """What a memory budget leaves after k vectors."""
    taken = bytes_of(k * space.size, space.like)
    require(taken, f"{k} vectors of {space}", "ask for fewer, or raise the budget")
    left = budget()
    return nullcontext() if left is None else memory_budget(max(1, left - taken))


def _as_modes(found: Eigenpairs | Triplets, rows: Array, space: Space, size: Size, values: Array) -> Modes:
    vectors = space.from_euclidean(rows.reshape((-1, *space.shape)))
    return Modes(size.times(values), vectors, found.residuals, found.converged, found.applications, space)


def modes_and_drives(
    op: GramOperator, k: int, alg: EigenSolver, rng: Random, callback: Callback | None = None
) -> tuple[Modes, Array]:
    """The k leading eigenpairs l, u of A = J J*; and v [k, p] orthonormal, J v = sqrt(l) u, in plain coordinates."""
    factor, space = op.factor, op.domain
    if factor.domain.size <= space.size:
        with room_for(k, space):
            found = _of_product(factor, k, alg, rng, callback, None, None)
        return _as_modes(found, found.left, space, Size(), found.values**2), found.right
    modes = eigs(op, k, alg, rng, callback)
    u, s = space.to_euclidean(modes.vectors).reshape((k, -1)), array_namespace(modes.values).sqrt(abs(modes.values))
    modes = dataclasses.replace(modes, applications=modes.applications + (k + 1) // 2)
    return modes, on_rows(factor.T)(u) / to_like(s + (s == 0), u)[:, None]


def _of_product(
    J: Operator,
    k: int,
    alg: EigenSolver,
    rng: Random,
    callback: Callback | None,
    start: Array | None,
    known: Array | None,
) -> Triplets:
    """The triplets of J whose left vectors are eigenvectors of J J*, orthogonal to known rows."""
    forward, backward = on_rows(J), on_rows(J.T)

    def apart(rows: Array) -> Array:
        return rows if known is None else project_out(rows, [known])[0]

    asked = {"squared": True, "start": None if start is None else backward(apart(start)), "callback": callback}
    sides = (lambda w: apart(forward(w)), lambda q: backward(apart(q)))
    return triplets(alg, *sides, J.domain.size, k, J.domain.like, rng, **asked)


def eigenvalues(op: Operator) -> Array:
    """All l with A v = l v of a symmetric operator [n], descending, in float64, each as often as it occurs.

    From the spectrum of V^T V where A is a core that it determines, else from the matrix: for J J* from the smaller of
    J*J and J J*, whose dimension may be up to 20,000; the rest are zeros.

    Args:
        op: A, from a space to itself.

    Raises:
        ValueError: an operator that is not symmetric, or whose matrix is too large.
    Source: Golub, Van Loan, "Matrix computations" (2013).

    >>> import numpy as np, kpflow_dyn as kp
    >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
    >>> kp.eigenvalues(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit, symmetric=True))
    array([3., 2., 1.])
    """
    require_square(op, "a spectrum")
    op, size = at_unit_size(op)
    if not is_symmetric(op, Random(0)):
        raise ValueError(f"eigenvalues needs a symmetric operator, got {op!r}; take op @ op.T, or kp.svds")
    known = op.spectrum() if isinstance(op, CoreOperator) else None
    if known is not None:
        values = np.sort(np.repeat(*known))[::-1].copy()
        return size.times(_of_length(values, op.domain.dimension))
    space = (smaller := smaller_of(op)).domain
    matrix, _rows = matrix_of(Counted(on_counted(smaller)), no_rows(space.dimension, space.like))
    return size.times(_of_length(descending_eigh(matrix)[0], op.domain.dimension))


def _of_length(values: Array, size: int) -> Array:
    """Descending values with as many zeros as are missing, or without those that are too many."""
    xp = array_namespace(values)
    if values.shape[0] > size:
        nonzero = xp.argsort(xp.abs(values), descending=True)[:size]
        return xp.take(values, xp.sort(nonzero))
    return xp.concat([values, xp.zeros(size - values.shape[0], dtype=values.dtype, device=device(values))])


def modes(
    op: Operator, axis: str = "time", k: int | None = None, samples: int | None = None, seed: int | Random = 0
) -> Modes:
    """The k leading eigenvectors of the partial trace of A on one axis: temporal, trial or unit modes.

    The noise of an estimate spreads its eigenvalues, so a flat spectrum would seem to have leading modes. If the
    partial trace T is estimated, the values are therefore cross-validated,

        value_i = v_i^T T' v_i with v_i from one half of the probes and T' from the other, both ways

    which is unbiased for the modes of half of the probes. If these modes are not resolved, the values lie below the
    leading eigenvalues of T. The values add up to the trace, and come with standard errors. Vectors use all probes.
    Residuals say how well the eigenproblem was solved; they do not say how far the vectors are from those of T. The
    largest entry of each vector is positive.

    Args:
        op: A, symmetric. A partial trace on that axis alone is used as it is.
        axis: the name of the axis.
        k: how many modes, at most the length of the axis. None gives five, or all of a shorter axis.
        samples: how many probes for the partial trace; None is exact where that is cheap.
        seed: an int, or a `Random` to continue.

    Raises:
        TypeError: op is not an operator, for example a flow.
        ValueError: an unknown axis, k out of range, or an operator that is not symmetric.
    Source: docs/theory.md, "Modes: when, where and in which trials".
    Example as `partial_trace`.
    """
    if isinstance(op, MeanOfSamples):
        op = partial_trace(op, axis, samples, seed)
    op, size = at_unit_size(op)
    on_axis = op.domain.axes == (axis,)
    reduced = op if isinstance(op, MatrixOperator) and on_axis else partial_trace(op, axis, samples, seed)
    k = min(5, reduced.domain.dimension) if k is None else k
    check_count(k, reduced.domain.dimension)
    if not is_symmetric(reduced, Random(seed)):
        raise ValueError(f"modes needs a symmetric operator, got {op!r}; take op @ op.T or op.T @ op")
    space, (pick, back) = reduced.domain, between_counted(reduced.domain)

    def inside(matrix: Array) -> Array:
        return pick(pick(matrix).T).T

    matrix = inside(to_double(euclidean_matrix(reduced)))
    values, rotation = descending_eigh(matrix)
    rows = rotation[:, :k].T
    residuals = relative(row_norms(rows @ matrix - values[:k, None] * rows), float(abs(values).max()))
    vectors = with_sign(space.from_euclidean(back(to_like(rows, space.like))))
    groups = [*map(inside, reduced.groups)] if isinstance(reduced, PartialTrace) else []
    total = float(values.sum())
    values, stderr = _cross_validated(groups, k) if groups else (values[:k], None)
    values, total, stderr = size.times(values), size.times(total), None if stderr is None else size.times(stderr)
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


def check_count(k: int, most: int) -> None:
    """Raise unless there may be k pairs."""
    if not isinstance(k, int | np.integer) or not 1 <= k <= most:
        raise ValueError(f"k = {k!r} pairs asked of an operator of rank {most} at most; expected 1 <= k <= {most}")


def _rows(vectors: Array, space: Space, what: str) -> Array:
    """Vectors [b, *shape] as rows in coordinates where the inner product is plain."""
    space.check(vectors, what)
    return space.to_euclidean(space.counted(vectors)).reshape((-1, space.size))
