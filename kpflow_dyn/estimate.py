"""Scalars of operators with their standard errors: trace, Frobenius norm, effective rank, alignment, Rayleigh quotient.

Each is exact (standard error 0) where that is cheap: from the core's spectrum, from a matrix, or from at most
`flat.CHEAP` applications. Otherwise, in coordinates where inner products are plain, a basis Q of the leading range is
taken out and treated exactly, and random probes x estimate the rest. The probes are independent of Q, so the estimate
is unbiased and its standard error, by the jackknife, is that of a mean of independent samples.

For A = J J* with G = J*J, Q = orth(J* Omega), C = Q^T G Q, z = J* x and c = Q^T z

    tr A    = E[ tr C + |z - Q c|^2 ]
    |A|_F^2 = E[ |C|_F^2 + |J z|^2 - c^T C c ]

and for any A and B, with y = x - Q Q^T x,

    tr A^T B = sum_q <A q, B q> + E <A y, B y>

A partial trace that was itself estimated comes as T_1, ..., T_n from independent groups of probes. The norm of their
mean contains its noise; products of different groups do not:

    tr T = E T_i,    tr T^T U = E tr T_i^T U_j    for i != j

Their variance is that of a function of means over pairs, after Efron and Stein, "The jackknife estimate of variance"
(1981): the jackknife alone counts the noise of the products twice.

Source: Meyer, Musco, Musco, Woodruff, "Hutch++" (2021); the Frobenius line is the same identity for G^2.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kpflow_dyn.arrays import Array, Random, array_namespace, to_numpy
from kpflow_dyn.flat import CHEAP, Rows, euclidean_matrix, is_symmetric, on_rows, require_square, unit_rows
from kpflow_dyn.operators import GramOperator, MatrixOperator, Operator
from kpflow_dyn.reductions import LEAST_SAMPLES, PartialTrace, student
from kpflow_dyn.sites import CoreOperator
from kpflow_dyn.solvers import BlockLanczos
from kpflow_dyn.solvers.orthogonalise import gram, orthonormalise, project_out, row_norms, to_double
from kpflow_dyn.space import Space

SAMPLES = 120
MOST = 10_000  # applications, unless given
NEGATIVE = 1e-3  # an eigenvalue below minus this share of the largest makes an operator indefinite


@dataclass(frozen=True)
class Estimate:
    """A number that says how good it is; `float(estimate)` is its value.

    Attributes:
        value: unbiased, up to terms of second order in the standard error for ratios and roots.
        stderr: standard error; value +- 1.96 stderr covers the truth in about 95% of runs. 0 where exact.
        applications: how many applications to one vector it took, one of J and one of J* counting as one of J J*.
        method: how it was found.
    """

    value: float
    stderr: float
    applications: int
    method: str

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Moments:
    """Scalars of one operator that come from the same applications, each of which counts all of them.

    Attributes:
        trace: tr A.
        norm: |A|_F.
        effective_rank: (tr A)^2 / |A|_F^2 of a positive semi-definite A, of A A* for any other.
    """

    trace: Estimate
    norm: Estimate
    effective_rank: Estimate


@dataclass(frozen=True)
class _Means:
    """Means of some quadratic moments, and the means with each sample left out (none where exact)."""

    means: np.ndarray  # [moment]
    without: np.ndarray  # [sample, moment]
    applications: int
    method: str
    eps: float
    without_two: np.ndarray | None = None  # [sample, sample, moment]; None for means over samples, not over pairs


def moments(op: Operator, samples: int | None = None, seed: int | Random = 0) -> Moments:
    """`trace`, `frobenius_norm` and `effective_rank` of an operator from a space to itself, for the price of one.

    Arguments and errors as for `trace`, and those of `effective_rank`.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> from kpflow_dyn.estimate import moments
        >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
        >>> found = moments(kp.MatrixOperator(np.diag([1.0, 2.0, 2.0]), unit, unit))
        >>> found.trace.value, found.norm.value, round(found.effective_rank.value, 6)
        (5.0, 3.0, 2.777778)
    """
    require_square(op, "a trace")
    rng = Random(seed)
    positive, spent = _is_positive(op, rng)
    means = _means(op, samples, rng)
    for_rank = means if positive else _means(GramOperator(op), samples, rng)
    return Moments(_estimate(means, _trace), _estimate(means, _norm), _estimate(_spend(for_rank, spent), _rank))


def trace(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
) -> Estimate:
    """tr A of an operator from a space to itself.

    Args:
        op: A.
        samples: how many applications to spend on an estimate; None gives the exact value where it is cheap. An
            estimated partial trace needs none: it brings its own error.
        seed: an int, or a `Random` to continue.
        rtol: begin anew with twice the samples until the standard error is at most rtol times the value; None takes the
            first estimate.
        max_applications: the most to spend on that.

    Raises:
        ValueError: a domain that is not the codomain, fewer than 8 samples, or rtol <= 0.

    Warns:
        UserWarning: max_applications would be exceeded before the estimate is as good as rtol.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
        >>> kp.trace(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit)).value
        6.0
    """
    require_square(op, "a trace")
    rng = Random(seed)
    return _until(lambda count: _estimate(_means(op, count, rng), _trace), samples, rtol, max_applications)


def frobenius_norm(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
) -> Estimate:
    """|A|_F = sqrt(tr A* A), the root of the sum of the squared singular values, in the inner products of the spaces.

    Arguments as for `trace`; the domain may differ from the codomain.
    """
    rng = Random(seed)

    def estimate(count: int | None) -> Estimate:
        if isinstance(op, GramOperator) or _groups(op) or (count is None and isinstance(op, MatrixOperator)):
            return _estimate(_means(op, count, rng), _norm)
        means = _means(GramOperator(op), count, rng)  # |A|_F^2 = tr A A*
        return _estimate(means, lambda trace, square: np.sqrt(np.maximum(trace, 0)))

    return _until(estimate, samples, rtol, max_applications)


def effective_rank(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
) -> Estimate:
    """er(A) = (tr A)^2 / |A|_F^2 of a positive semi-definite A; of A A* for any other. 0 for the zero operator.

    A `GramOperator` is positive semi-definite as built. For others symmetry and sign are checked: by the
    spectrum where the matrix is cheap, else by a Lanczos run for the smallest eigenvalue.

    Arguments as for `trace`; the domain may differ from the codomain.

    Raises:
        ValueError: fewer than 8 samples, or an estimated partial trace that is not positive semi-definite.
    """
    rng = Random(seed)
    positive, spent = _is_positive(op, rng)
    squared = op if positive else GramOperator(op)
    found = _until(lambda count: _estimate(_means(squared, count, rng), _rank), samples, rtol, max_applications - spent)
    return replace(found, applications=found.applications + spent)


def alignment(a: Operator, b: Operator, samples: int | None = None, seed: int | Random = 0) -> Estimate:
    """cos(A, B) = tr(A^T B) / (|A|_F |B|_F).

    Args:
        a: A.
        b: B, between the same spaces.
        samples: how many applications of each to spend; None gives the exact value where it is cheap. An estimated
            partial trace brings its own error, and what it is compared with is then taken as a matrix.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: spaces that differ, an operator that is zero, or one whose norm is not above its noise.
    """
    if not (a.domain.matches(b.domain) and a.codomain.matches(b.codomain)):
        raise ValueError(f"alignment compares operators between the same spaces, got {a!r} and {b!r}")
    matrices = isinstance(a, MatrixOperator) and isinstance(b, MatrixOperator)
    if _groups(a) or _groups(b) or (samples is None and matrices):
        found = _of_matrices(a, b)
    elif samples is None and a.domain.size <= CHEAP:
        found = _exact_products(on_rows(a), on_rows(b), a.domain)
    else:
        found = _sampled_products(on_rows(a), on_rows(b), [a.T, b.T], samples, Random(seed))
    if not ((found.means[1:] > 0).all() and (found.without[:, 1:] > 0).all()):
        raise ValueError(
            "alignment with the zero operator is not defined, nor with an estimate that is no larger than its noise; "
            "check what the operators learn from, or take more samples"
        )
    return _estimate(found, lambda product, first, second: product / np.sqrt(first * second))


def rayleigh(op: Operator, q: Array) -> Estimate:
    """<q, A q> / <q, q> for one vector q of the operator's space.

    Raises:
        ValueError: q = 0, q of another shape, or a domain that is not the codomain.
    """
    require_square(op, "a Rayleigh quotient")
    if tuple(q.shape) != op.domain.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected one vector {op.domain.shape}")
    size = float(op.domain.inner(q, q))
    if size == 0:
        raise ValueError("the Rayleigh quotient of the zero vector is not defined")
    return Estimate(float(op.domain.inner(q, op.mv(q))) / size, 0.0, 1, "exact")


def _until(of: Callable[[int | None], Estimate], samples: int | None, rtol: float | None, most: int) -> Estimate:
    """The estimate of so many samples, or of more where it has to be better."""
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


def _trace(trace: np.ndarray, square: np.ndarray) -> np.ndarray:
    return trace


def _norm(trace: np.ndarray, square: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(square, 0))


def _rank(trace: np.ndarray, square: np.ndarray) -> np.ndarray:
    return np.divide(trace**2, square, out=np.zeros_like(square), where=square > 0)


def _spend(means: _Means, applications: int) -> _Means:
    return replace(means, applications=means.applications + applications)


def _estimate(found: _Means, of: Callable[..., np.ndarray]) -> Estimate:
    """A function of moments, with the jackknife's correction of its bias, and its standard error.

    The error is widened by Student's factor, so that 1.96 of it cover as many runs with few samples as with many.
    """
    value, n = float(of(*found.means)), len(found.without)
    if not n:
        return Estimate(value, 0.0, found.applications, found.method)
    left_out = of(*found.without.T)
    if found.without_two is None:
        spread = float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2)))
    else:
        spread = _spread_of_pairs(value, left_out, of(*np.moveaxis(found.without_two, 2, 0)))
    value = n * value - (n - 1) * float(left_out.mean())
    return Estimate(value, max(student(n) * spread, 10 * found.eps * abs(value)), found.applications, found.method)


def _spread_of_pairs(value: float, without: np.ndarray, without_two: np.ndarray) -> float:
    """The standard error of a mean over pairs, h_ij for i != j, from that mean without i, and without i and j.

    Var = E h_ij h_kl - (E h)^2, estimated by the square of the mean less that of the products of disjoint pairs; it is
    not let below the noise that the products of groups would have if it were all.
    """
    n = len(without)
    pairs = n * (n - 1) * value - (n - 1) * (n - 2) * (without[:, None] + without) + (n - 2) * (n - 3) * without_two
    pairs = (pairs / 2 - value) * ~np.eye(n, dtype=bool)
    rows, entries = np.sum(pairs.sum(1) ** 2), np.sum(pairs**2)
    return float(np.sqrt(max(4 * rows - 2 * entries, 2 * rows) / (n * (n - 1) * (n - 2) * (n - 3))))


def _means(op: Operator, samples: int | None, rng: Random) -> _Means:
    """tr A and |A|_F^2."""
    if isinstance(op, PartialTrace) and op.groups:
        return _of_matrix(op)
    exact = _exact(op) if samples is None else None
    if exact is not None:
        return exact
    if isinstance(op, GramOperator):
        return _sampled_gram(op, samples, rng)
    products = _sampled_products(_identity, on_rows(op), [op.T], samples, rng)
    return replace(products, means=products.means[[0, 2]], without=products.without[:, [0, 2]])


def _exact(op: Operator) -> _Means | None:
    if isinstance(op, MatrixOperator):
        return _of_matrix(op)
    spectrum = op.spectrum() if isinstance(op, CoreOperator) else None
    if spectrum is not None:
        values, counts = spectrum
        return _known(float(counts @ values), float(counts @ values**2), 0, "exact: spectrum of V^T V", op)
    smaller = op.factor.T @ op.factor if isinstance(op, GramOperator) and op.factor.domain.size < op.domain.size else op
    if smaller.domain.size > CHEAP:
        return None
    product, _one, square = (found := _exact_products(_identity, on_rows(smaller), smaller.domain)).means
    return _known(product, square, found.applications, found.method, op)


def _of_matrix(op: MatrixOperator) -> _Means:
    """tr A and |A|_F^2 of a matrix, or of one that was estimated from groups of probes."""
    rows = _flat(op)
    traces = rows[:, :: op.domain.size + 1].sum(1)
    return _of_pairs(np.stack([(traces[:, None] + traces) / 2, rows @ rows.T]), [op])


def _of_matrices(a: Operator, b: Operator) -> _Means:
    """tr A^T B, |A|_F^2 and |B|_F^2 of matrices, or of ones that were estimated from groups of probes."""
    x, y = _flat(a), _flat(b)
    if len(x) != len(y) and 1 not in (len(x), len(y)):
        raise ValueError(f"the matrices come from {len(x)} and {len(y)} groups of probes; give both 20 samples or more")
    product, count = x @ y.T, max(len(x), len(y))
    squares = [np.broadcast_to(each, (count, count)) for each in ((product + product.T) / 2, x @ x.T, y @ y.T)]
    return _of_pairs(np.stack(squares), [a, b])


def _of_pairs(pairs: np.ndarray, ops: list[Operator]) -> _Means:
    """Means of symmetric [moment, group, group] over pairs of different groups; a single group is exact."""
    eps, n = _eps(ops[0].domain), pairs.shape[1]
    if n == 1:
        return _Means(pairs[:, 0, 0], np.zeros((0, len(pairs))), 0, "exact: matrix", eps)
    pairs = pairs * ~np.eye(n, dtype=bool)
    total, by_group = pairs.sum((1, 2)), 2 * pairs.sum(2).T
    without = (total - by_group) / ((n - 1) * (n - 2))
    without_two = (total - by_group[:, None] - by_group + 2 * np.moveaxis(pairs, 0, 2)) / ((n - 2) * (n - 3))
    without_two[np.arange(n), np.arange(n)] = without
    applications = sum(_spent_on(op) for op in ops)
    return _Means(total / (n * (n - 1)), without, applications, "products of groups of probes", eps, without_two)


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


def _known(trace: float, square: float, applications: int, method: str, op: Operator) -> _Means:
    return _Means(np.array([trace, square]), np.zeros((0, 2)), applications, method, _eps(op.domain))


def _exact_products(first: Rows, second: Rows, space: Space) -> _Means:
    """tr A^T B, |A|_F^2 and |B|_F^2 by applying both to the identity."""
    sums = sum(_dots(first(rows), second(rows)).sum(0) for rows in unit_rows(space))
    applied = sum(space.size for f in (first, second) if f is not _identity)
    return _Means(np.asarray(sums), np.zeros((0, 3)), applied, "exact: applied to the identity", _eps(space))


def _sampled_products(first: Rows, second: Rows, ranges: list[Operator], samples: int | None, rng: Random) -> _Means:
    """tr A^T B, |A|_F^2 and |B|_F^2, the part on the leading ranges of the adjoints exactly, the rest by probes."""
    space, each = ranges[0].codomain, _samples(samples)
    rank = min(each // 3, space.size) // len(ranges)
    probes = each - (1 + len(ranges)) * rank
    leading = [on_rows(op)(_normal(rank, op.domain, rng)) for op in ranges]
    q, _c, _r = orthonormalise(space.xp.concat(leading, axis=0), [], 0.0)
    rest, _c = project_out(_normal(probes, space, rng), [q])
    found = _dots(first(q), second(q)).sum(0) + _dots(first(rest), second(rest))
    return _mean(found, len(ranges) * each, space)


def _sampled_gram(op: GramOperator, samples: int | None, rng: Random) -> _Means:
    """tr J J* and |J J*|_F^2; see the head of this file."""
    total = _samples(samples)
    rank = min(total // 2, op.factor.domain.size)
    probes = total - rank
    forward, backward = on_rows(op.factor), on_rows(op.factor.T)
    q, _c, _r = orthonormalise(backward(_normal(rank, op.domain, rng)), [], 0.0)
    image = forward(q)
    core = gram(image, image)
    z = backward(_normal(probes, op.domain, rng))
    rest, c = project_out(z, [q])
    traces = float(array_namespace(core).linalg.trace(core)) + to_numpy(row_norms(rest)) ** 2
    squares = float((core * core).sum()) + to_numpy(row_norms(forward(z)) ** 2 - ((c @ core) * c).sum(1))
    return _mean(np.stack([traces, squares], axis=1), total, op.domain)


def _mean(samples: np.ndarray, applications: int, space: Space) -> _Means:
    without = (samples.sum(0) - samples) / (len(samples) - 1)
    return _Means(samples.mean(0), without, applications, "deflation and probes", _eps(space))


def _samples(samples: int | None) -> int:
    samples = SAMPLES if samples is None else samples
    if samples < LEAST_SAMPLES:
        raise ValueError(f"samples = {samples} is too few for an error bar; give at least {LEAST_SAMPLES}")
    return samples


def _dots(a: Array, b: Array) -> np.ndarray:
    """<a, b>, <a, a> and <b, b> of rows -> [row, 3]."""
    return np.stack([to_numpy(to_double((x * y).sum(1))) for x, y in ((a, b), (a, a), (b, b))], axis=1)


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
        return False, 2
    rows, solver = on_rows(op), BlockLanczos(block=8, tol=NEGATIVE)
    top = solver.solve(rows, op.domain.size, 1, like=op.domain.like, seed=rng)
    bottom = solver.solve(rows, op.domain.size, 1, like=op.domain.like, seed=rng, which="SA")
    spent = 2 + top.applications + bottom.applications
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
