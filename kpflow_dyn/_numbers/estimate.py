"""Scalars of operators with their standard errors: trace, Frobenius norm, effective rank, alignment, Rayleigh quotient.

Each is exact (standard error 0) where that is cheap: from the core's spectrum, from a matrix, or from at most
512 applications (CHEAP). Otherwise a method of `kpflow_dyn.solvers` estimates it, in coordinates where inner products
are plain: XNysTrace for A = J J*, XTrace for any other A. Where the effective rank of J J* is larger than the sketch of
XNysTrace, the trace is better found from J alone, with separate random vectors for each trial, or from J* alone; the
sketch shows which case it is.

For any A and B, with an orthonormal basis Q of their leading ranges and y = x - Q Q^T x,

    tr A^T B = sum_q <A q, B q> + E <A y, B y>

A partial trace that was itself estimated comes as T_1, ..., T_n from independent groups of probes. The norm of their
mean contains its noise; products of different groups do not:

    tr T = E T_i,    tr T^T U = E tr T_i^T U_j    for i != j
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, to_numpy
from kpflow_dyn._arrays.dots import row_dots, to_double
from kpflow_dyn._flows.sites import CoreOperator
from kpflow_dyn._numbers.reductions import PartialTrace, probe_images
from kpflow_dyn._spaces.operators import GramOperator, MatrixOperator, Operator
from kpflow_dyn._spaces.rows import CHEAP, TRIED, euclidean_matrix, is_symmetric, on_rows, require_square, unit_rows
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import (
    BlockLanczos,
    Estimate,
    Hutchinson,
    HutchPlusPlus,
    KrylovDeflation,
    Moments,
    OneSided,
    XNysTrace,
    XTrace,
)
from kpflow_dyn.solvers._moments import check_samples, exact, of_pairs, of_samples
from kpflow_dyn.solvers._orthogonalise import no_rows, orthonormalise, project_out
from kpflow_dyn.solvers._probes import images_of_normal, moments_of_images
from kpflow_dyn.solvers._xtrace import nystrom_moments

SAMPLES = 120
MOST = 10_000  # applications, unless given
NEGATIVE = 1e-3  # an eigenvalue below minus this share of the largest makes an operator indefinite
TINY = 1e-300
FLAT = 8  # from an effective rank of this many times the samples on, a sketch gains nothing

OfSquare = Hutchinson | HutchPlusPlus | XTrace
OfFactor = XNysTrace | KrylovDeflation | OneSided
Method = OfSquare | OfFactor | None


@dataclass(frozen=True)
class Scalars:
    """Scalars of one operator that come from the same applications, each of which counts all of them.

    Attributes:
        trace: tr A.
        norm: |A|_F.
        effective_rank: (tr A)^2 / |A|_F^2 of a positive semi-definite A, of A A* for any other.
    """

    trace: Estimate
    norm: Estimate
    effective_rank: Estimate


def scalars(op: Operator, samples: int | None = None, seed: int | Random = 0, alg: Method = None) -> Scalars:
    """`trace`, `frobenius_norm` and `effective_rank` of an operator from a space to itself, for the price of one.

    Arguments and errors as for `trace`, and those of `effective_rank`.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> from kpflow_dyn._numbers.estimate import scalars
        >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
        >>> found = scalars(kp.MatrixOperator(np.diag([1.0, 2.0, 2.0]), unit, unit))
        >>> found.trace.value, found.norm.value, round(found.effective_rank.value, 6)
        (5.0, 3.0, 2.777778)
    """
    require_square(op, "a trace")
    rng = Random(seed)
    positive, spent = _is_positive(op, rng)
    found = moments_of(op, samples, rng, alg)
    for_rank = found if positive else moments_of(GramOperator(op), samples, rng, None)
    return Scalars(found.trace, found.norm, _spend(for_rank, spent).effective_rank)


def trace(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
    alg: Method = None,
) -> Estimate:
    """tr A = sum_i <e_i, A e_i> of an operator from a space to itself, e_i an orthonormal basis.

    Args:
        op: A.
        samples: how many applications to spend on an estimate; None gives the exact value where it is cheap. An
            estimated partial trace needs none: it brings its own error.
        seed: an int, or a `Random` to continue.
        rtol: begin again with twice the samples until the standard error is at most rtol times the value; None takes
            the first estimate.
        max_applications: the most to spend on that.
        alg: a method of `kpflow_dyn.solvers`, used even where the exact value is cheap; the best one for A when None.

    Raises:
        ValueError: a domain that is not the codomain, fewer than 8 samples, or rtol <= 0.
        TypeError: an `alg` that needs the factor J of A = J J* where there is none.

    Warns:
        UserWarning: max_applications would be exceeded before the estimate is as good as rtol.

    Source as `solvers.XNysTrace`.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
        >>> kp.trace(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit)).value
        6.0
    """
    require_square(op, "a trace")
    rng = Random(seed)
    return _until(lambda count: moments_of(op, count, rng, alg, True).trace, samples, rtol, max_applications)


def frobenius_norm(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
    alg: Method = None,
) -> Estimate:
    """|A|_F = sqrt(tr A* A), the root of the sum of the squared singular values, in the inner products of the spaces.

    The domain may differ from the codomain.

    Args, Raises, Warns and Source as `trace`.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> unit = kp.Space(("unit",), (2,), np.zeros(1))
        >>> A = kp.MatrixOperator(np.diag([3.0, 4.0]), unit, unit)
        >>> kp.frobenius_norm(A).value, round(kp.effective_rank(A).value, 4), round(kp.alignment(A, A.T).value, 4)
        (5.0, 1.96, 1.0)
        >>> kp.rayleigh(A, np.array([1.0, 1.0])).value
        3.5
    """
    rng = Random(seed)

    def estimate(count: int | None) -> Estimate:
        own = isinstance(alg, OfSquare) or isinstance(op, GramOperator) or _groups(op)
        if own or (count is None and isinstance(op, MatrixOperator)):
            return moments_of(op, count, rng, alg).norm
        return moments_of(GramOperator(op), count, rng, alg, True).estimate(_root_of_trace)  # |A|_F^2 = tr A A*

    return _until(estimate, samples, rtol, max_applications)


def effective_rank(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
    alg: Method = None,
) -> Estimate:
    """er(A) = (tr A)^2 / |A|_F^2 of a positive semi-definite A; of A A* for any other. 0 for the zero operator.

    A `GramOperator` is positive semi-definite. For others symmetry and sign are checked: by the spectrum where the
    matrix is cheap, else by a Lanczos run for the smallest eigenvalue. The domain may differ from the codomain.

    Args as `trace`.

    Raises:
        ValueError: fewer than 8 samples, or an estimated partial trace that is not positive semi-definite.

    Source: docs/theory.md, "How many: effective ranks".
    Example as `frobenius_norm`.
    """
    rng = Random(seed)
    positive, spent = _is_positive(op, rng)
    squared = op if positive else GramOperator(op)
    most = max_applications - spent
    found = _until(lambda count: moments_of(squared, count, rng, alg).effective_rank, samples, rtol, most)
    return replace(found, applications=found.applications + spent)


def alignment(a: Operator, b: Operator, samples: int | None = None, seed: int | Random = 0) -> Estimate:
    """cos(A, B) = tr(A^T B) / (|A|_F |B|_F).

    Args:
        a: A.
        b: B, between the same spaces.
        samples: how many applications of each to spend; None gives the exact value where it is cheap. An estimated
            partial trace brings its own error; the operator that it is compared with is then taken as a matrix.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: spaces that differ, an operator that is zero, or one whose norm is not above its noise.

    Source: Cristianini, Shawe-Taylor, Elisseeff, Kandola, "On kernel-target alignment" (2001).
    Example as `frobenius_norm`.
    """
    if not (a.domain.matches(b.domain) and a.codomain.matches(b.codomain)):
        raise ValueError(f"alignment compares operators between the same spaces, got {a!r} and {b!r}")
    matrices = isinstance(a, MatrixOperator) and isinstance(b, MatrixOperator)
    if _groups(a) or _groups(b) or (samples is None and matrices):
        found = _of_matrices(a, b)
    elif samples is None and a.domain.size <= CHEAP:
        found = _exact_products(on_rows(a), on_rows(b), a.domain)
    else:
        found = _sampled_products(on_rows(a), on_rows(b), [a.T, b.T], _samples(samples), Random(seed))
    if not (found.means[1:] > 2 * np.sqrt(np.diag(found.covariance)[1:])).all():
        raise ValueError(
            "alignment with the zero operator is not defined, nor with an estimate that is no larger than its noise; "
            "check what the operators learn from, or take more samples"
        )
    return found.estimate(cosine)


def rayleigh(op: Operator, q: Array) -> Estimate:
    """r(q) = <q, A q> / <q, q> for one vector q of the operator's space.

    Args:
        op: A, from a space to itself.
        q: the vector [*op.domain.shape].

    Raises:
        ValueError: q = 0, q of another shape, or a domain that is not the codomain.

    Source: Horn, Johnson, "Matrix analysis" (2012).
    Example as `frobenius_norm`.
    """
    require_square(op, "a Rayleigh quotient")
    if tuple(q.shape) != op.domain.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected one vector {op.domain.shape}")
    size = float(op.domain.inner(q, q))
    if size == 0:
        raise ValueError("the Rayleigh quotient of the zero vector is not defined")
    return Estimate(float(op.domain.inner(q, op.mv(q))) / size, 0.0, 1, "exact")


def _until(of: Callable[[int | None], Estimate], samples: int | None, rtol: float | None, most: int) -> Estimate:
    """The estimate from this number of samples, or from more where it has to be better."""
    if rtol is not None and not rtol > 0:
        raise ValueError(f"rtol is {rtol!r}, expected a positive number such as 0.01, or None")
    found, count, spent = of(samples), _samples(samples), 0
    while rtol is not None and found.stderr > rtol * abs(found.value):
        spent, left = spent + found.applications, most - spent - found.applications
        if left <= count:
            warnings.warn(
                f"after {spent} applications the standard error is {found.stderr:.1e}, above rtol = {rtol:g} of "
                f"{found.value:.3g}; raise max_applications or rtol",
                stacklevel=3,
            )
            return replace(found, applications=spent)
        count = min(2 * count, left)
        found, before = of(count), found
        if found == before:
            warnings.warn("the partial trace was estimated before: give kp.partial_trace more samples", stacklevel=3)
            break
    return replace(found, applications=spent + found.applications)


def cosine(product: float, first: float, second: float) -> float:
    """An alignment from tr A^T B, |A|_F^2 and |B|_F^2."""
    return product / (max(first, TINY) * max(second, TINY)) ** 0.5


def _root_of_trace(trace: float, _square: float) -> float:
    return max(trace, 0.0) ** 0.5


def _spend(moments: Moments, applications: int) -> Moments:
    return replace(moments, applications=moments.applications + applications)


def moments_of(op: Operator, samples: int | None, rng: Random, alg: Method, only_trace: bool = False) -> Moments:
    """tr A and |A|_F^2."""
    if isinstance(op, PartialTrace) and op.groups:
        return _of_matrix(op)
    if alg is not None:
        return _by(alg, op, _samples(samples), rng)
    known = _exact(op) if samples is None else None
    if known is not None:
        return known
    if isinstance(op, GramOperator):
        return _by_spectrum(op, _samples(samples), rng, only_trace)
    return _by(XTrace(), op, _samples(samples), rng)


def _by(alg: OfSquare | OfFactor, op: Operator, samples: int, rng: Random) -> Moments:
    """The moments by a method of the caller's choice."""
    if isinstance(alg, OfSquare):
        return alg.moments(on_rows(op), op.domain.size, samples, like=op.domain.like, seed=rng)
    if not isinstance(alg, OfFactor):
        raise TypeError(f"alg is {alg!r}, expected a trace estimator of kpflow_dyn.solvers, such as XTrace()")
    if not isinstance(op, GramOperator):
        raise TypeError(
            f"{type(alg).__name__} estimates A = J J* from J and J*, and {op!r} has no factor; take XTrace()"
        )
    (forward, backward), (n, p) = _sides(op)
    if isinstance(alg, OneSided):
        return alg.moments(backward, n, samples, like=op.domain.like, seed=rng)
    return alg.moments((forward, backward), (n, p), samples, like=op.domain.like, seed=rng)


def _by_spectrum(op: GramOperator, samples: int, rng: Random, only_trace: bool) -> Moments:
    """XNysTrace; or one side alone where only the trace is wanted and a sketch gains little."""
    (forward, backward), (n, _p) = _sides(op)
    images = images_of_normal(backward, samples, n, rng, op.domain.like)
    rank = moments_of_images(images).effective_rank.value if only_trace else 0
    if op.apart is not None and rank > samples:
        return _of_trials_apart(op.apart, samples, rng)
    if rank > FLAT * samples:
        more = images_of_normal(backward, samples, n, rng, op.domain.like)
        return moments_of_images(array_namespace(images).concat([images, more], axis=0))
    return nystrom_moments((forward, backward), n, images)


def _of_trials_apart(factor: Operator, samples: int, rng: Random) -> Moments:
    """tr A = E sum_b |J_b x_b|^2 with a random vector x_b of each trial's own."""
    nothing = no_rows(factor.domain.shape[-1], factor.domain.like)
    squares = [to_numpy(row_dots(u, u)) for _first, u in probe_images(factor, nothing, samples, rng)]
    return of_samples(np.concatenate(squares)[None], samples, "one-sided probes, each trial apart", _eps(factor.domain))


def _sides(op: GramOperator) -> tuple[tuple[Rows, Rows], tuple[int, int]]:
    """The factor from the smaller side to the larger, its adjoint, and both sizes: A or its mirror J*J alike."""
    factor = op.factor if op.factor.domain.size <= op.domain.size else op.factor.T
    return (on_rows(factor), on_rows(factor.T)), (factor.codomain.size, factor.domain.size)


def _exact(op: Operator) -> Moments | None:
    if isinstance(op, MatrixOperator):
        return _of_matrix(op)
    spectrum = op.spectrum() if isinstance(op, CoreOperator) else None
    if spectrum is not None:
        values, counts = spectrum
        return exact(np.array([counts @ values, counts @ values**2]), 0, "exact: spectrum of V^T V")
    smaller = op.factor.T @ op.factor if isinstance(op, GramOperator) and op.factor.domain.size < op.domain.size else op
    if smaller.domain.size > CHEAP:
        return None
    found = _exact_products(_identity, on_rows(smaller), smaller.domain)
    return exact(found.means[[0, 2]], found.applications, found.method)


def _of_matrix(op: MatrixOperator) -> Moments:
    """tr A and |A|_F^2 of a matrix, or of one that was estimated from groups of probes."""
    rows = _flat(op)
    traces = rows[:, :: op.domain.size + 1].sum(1)
    return _of_groups(np.stack([(traces[:, None] + traces) / 2, rows @ rows.T]), [op])


def _of_matrices(a: Operator, b: Operator) -> Moments:
    """tr A^T B, |A|_F^2 and |B|_F^2 of matrices, or of ones that were estimated from groups of probes."""
    x, y = _flat(a), _flat(b)
    if len(x) != len(y) and 1 not in (len(x), len(y)):
        raise ValueError(f"the matrices come from {len(x)} and {len(y)} groups of probes; give both 20 samples or more")
    product, count = x @ y.T, max(len(x), len(y))
    squares = [np.broadcast_to(each, (count, count)) for each in ((product + product.T) / 2, x @ x.T, y @ y.T)]
    return _of_groups(np.stack(squares), [a, b])


def _of_groups(pairs: np.ndarray, ops: list[Operator]) -> Moments:
    """Means of symmetric [moment, group, group] over pairs of different groups; a single group is exact."""
    if pairs.shape[1] == 1:
        return exact(pairs[:, 0, 0], 0, "exact: matrix")
    return of_pairs(pairs, sum(_spent_on(op) for op in ops), "products of groups of probes", _eps(ops[0].domain))


def _groups(op: Operator) -> list[Array]:
    return op.groups if isinstance(op, PartialTrace) else []


def _spent_on(op: Operator) -> int:
    """The applications behind a matrix: its probes, or none where it was given."""
    if isinstance(op, MatrixOperator):
        return op.applications if isinstance(op, PartialTrace) and op.groups else 0
    return op.domain.size


def _flat(op: Operator) -> np.ndarray:
    """The matrix, or what each group of probes gave for it, as rows [group, entry]."""
    matrix = op if isinstance(op, MatrixOperator) else MatrixOperator(op.dense(), op.domain, op.codomain)
    matrices = _groups(op) or [to_double(euclidean_matrix(matrix))]
    return np.stack([to_numpy(matrix).reshape(-1) for matrix in matrices])


def _exact_products(first: Rows, second: Rows, space: Space) -> Moments:
    """tr A^T B, |A|_F^2 and |B|_F^2 by applying both to the identity."""
    sums = sum(_dots(first(rows), second(rows)).sum(1) for rows in unit_rows(space))
    applied = sum(space.size for f in (first, second) if f is not _identity)
    return exact(np.asarray(sums), applied, "exact: applied to the identity")


def _sampled_products(first: Rows, second: Rows, ranges: list[Operator], samples: int, rng: Random) -> Moments:
    """tr A^T B, |A|_F^2 and |B|_F^2, the part on the leading ranges of the adjoints exactly, the rest by probes."""
    space = ranges[0].codomain
    rank = min(samples // 3, space.size) // len(ranges)
    probes = samples - (1 + len(ranges)) * rank
    leading = [on_rows(op)(_normal(rank, op.domain, rng)) for op in ranges]
    q, _c, _r = orthonormalise(space.xp.concat(leading, axis=0), [], 0.0)
    rest, _c = project_out(_normal(probes, space, rng), [q])
    found = _dots(first(q), second(q)).sum(1, keepdims=True) + _dots(first(rest), second(rest))
    return of_samples(found, len(ranges) * samples, "deflation and probes", _eps(space))


def _samples(samples: int | None) -> int:
    samples = SAMPLES if samples is None else samples
    check_samples(samples)
    return samples


def _dots(a: Array, b: Array) -> np.ndarray:
    """<a, b>, <a, a> and <b, b> of rows -> [3, row]."""
    return np.stack([to_numpy(row_dots(x, y)) for x, y in ((a, b), (a, a), (b, b))])


def _normal(rows: int, space: Space, rng: Random) -> Array:
    return rng.normal((rows, space.size), space.like)


def _identity(rows: Array) -> Array:
    return rows


def _eps(space: Space) -> float:
    return float(space.xp.finfo(space.dtype).eps)


def _is_positive(op: Operator, rng: Random) -> tuple[bool, int]:
    """Whether the operator is symmetric with no clearly negative eigenvalue, and how many applications it took."""
    if isinstance(op, GramOperator):
        return True, 0
    if isinstance(op, MatrixOperator):
        return op.domain.matches(op.codomain) and _is_positive_matrix(op), 0
    if not is_symmetric(op, rng):
        return False, TRIED
    rows, solver = on_rows(op), BlockLanczos(block=8, tol=NEGATIVE)
    top = solver.solve(rows, op.domain.size, 1, like=op.domain.like, seed=rng)
    bottom = solver.solve(rows, op.domain.size, 1, like=op.domain.like, seed=rng, which="SA")
    spent = TRIED + top.applications + bottom.applications
    return float(bottom.values[0]) >= -2 * NEGATIVE * abs(float(top.values[0])), spent


def _is_positive_matrix(op: MatrixOperator) -> bool:
    matrix, groups = to_double(euclidean_matrix(op)), _groups(op)
    symmetric = float(abs(matrix - matrix.T).max()) <= _eps(op.domain) ** 0.5 * float(abs(matrix).max())
    values = array_namespace(matrix).linalg.eigvalsh(matrix)
    positive = symmetric and float(values[0]) >= -NEGATIVE * float(values[-1]) - _noise(groups)
    if groups and not positive:
        raise ValueError(
            f"{op!r} was estimated and is not positive semi-definite, so that its effective rank is not known; "
            "take the partial trace of op @ op.T, or the exact one of a smaller problem"
        )
    return positive


def _noise(groups: list[Array]) -> float:
    """The spectral norm of the noise in the mean of the groups, as half the difference of its halves shows it."""
    if not groups:
        return 0.0
    halves = [sum(half) / len(half) for half in (groups[::2], groups[1::2])]
    return float(array_namespace(groups[0]).linalg.matrix_norm(halves[0] - halves[1], ord=2)) / 2
