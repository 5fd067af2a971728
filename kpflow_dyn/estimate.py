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

Source: Meyer, Musco, Musco, Woodruff, "Hutch++" (2021); the Frobenius line is the same identity for G^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import stdtrit

from kpflow_dyn.arrays import Array, Random, array_namespace, to_numpy
from kpflow_dyn.flat import CHEAP, Rows, euclidean_matrix, is_symmetric, on_rows, require_square, unit_rows
from kpflow_dyn.operators import GramOperator, MatrixOperator, Operator
from kpflow_dyn.reductions import PartialTrace
from kpflow_dyn.sites import CoreOperator
from kpflow_dyn.solvers import BlockLanczos
from kpflow_dyn.solvers.orthogonalise import gram, orthonormalise, project_out, row_norms, to_double
from kpflow_dyn.space import Space

SAMPLES = 120
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
class _Moments:
    """Means of some quadratic moments, and the means with each sample left out (none where exact)."""

    means: np.ndarray  # [moment]
    without: np.ndarray  # [sample, moment]
    applications: int
    method: str
    eps: float


def trace(op: Operator, samples: int | None = None, seed: int | Random = 0) -> Estimate:
    """tr A of an operator from a space to itself.

    Args:
        op: A.
        samples: how many applications to spend on an estimate; None gives the exact value where it is cheap.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: a domain that is not the codomain, or fewer than 8 samples.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
        >>> kp.trace(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit)).value
        6.0
    """
    require_square(op, "a trace")
    return _estimate(_moments(op, samples, Random(seed)), lambda trace, square: trace)


def frobenius_norm(op: Operator, samples: int | None = None, seed: int | Random = 0) -> Estimate:
    """|A|_F = sqrt(tr A* A), the root of the sum of the squared singular values, in the inner products of the spaces.

    Arguments as for `trace`; the domain may differ from the codomain.
    """
    if isinstance(op, GramOperator) or (samples is None and isinstance(op, MatrixOperator)):
        return _estimate(_moments(op, samples, Random(seed)), lambda trace, square: np.sqrt(np.maximum(square, 0)))
    moments = _moments(GramOperator(op), samples, Random(seed))  # |A|_F^2 = tr A A*
    return _estimate(moments, lambda trace, square: np.sqrt(np.maximum(trace, 0)))


def effective_rank(op: Operator, samples: int | None = None, seed: int | Random = 0) -> Estimate:
    """er(A) = (tr A)^2 / |A|_F^2 of a positive semi-definite A; of A A* for any other. 0 for the zero operator.

    A `GramOperator` is positive semi-definite as built. For others symmetry and sign are checked: by the
    spectrum where the matrix is cheap, else by a Lanczos run for the smallest eigenvalue.

    Arguments as for `trace`; the domain may differ from the codomain.
    """
    rng = Random(seed)
    positive, spent = _is_positive(op, rng)
    moments = _moments(op if positive else GramOperator(op), samples, rng)
    return _estimate(replace(moments, applications=moments.applications + spent), _effective_rank)


def alignment(a: Operator, b: Operator, samples: int | None = None, seed: int | Random = 0) -> Estimate:
    """cos(A, B) = tr(A^T B) / (|A|_F |B|_F).

    Args:
        a: A.
        b: B, between the same spaces.
        samples: how many applications of each to spend; None gives the exact value where it is cheap.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: spaces that differ, or an operator that is zero.
    """
    if not (a.domain.matches(b.domain) and a.codomain.matches(b.codomain)):
        raise ValueError(f"alignment compares operators between the same spaces, got {a!r} and {b!r}")
    if samples is None and isinstance(a, MatrixOperator) and isinstance(b, MatrixOperator):
        moments = _of_matrices(a, b)
    elif samples is None and a.domain.size <= CHEAP:
        moments = _exact_products(on_rows(a), on_rows(b), a.domain)
    else:
        moments = _sampled_products(on_rows(a), on_rows(b), [a.T, b.T], samples, Random(seed))
    if not moments.means[1:].all():
        raise ValueError("alignment with the zero operator is not defined; check what the operators learn from")
    return _estimate(moments, lambda product, first, second: product / np.sqrt(first * second))


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


def _estimate(moments: _Moments, of: Callable[..., np.ndarray]) -> Estimate:
    """A function of moments, with the jackknife's standard error and its correction of the bias.

    The error is widened by Student's factor, so that 1.96 of it cover as many runs with few samples as with many.
    """
    value, n = float(of(*moments.means)), len(moments.without)
    if not n:
        return Estimate(value, 0.0, moments.applications, moments.method)
    left_out = of(*moments.without.T)
    spread = float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2)))
    value = n * value - (n - 1) * float(left_out.mean())
    spread *= float(stdtrit(n - 1, 0.975)) / 1.96
    return Estimate(value, max(spread, 10 * moments.eps * abs(value)), moments.applications, moments.method)


def _effective_rank(trace: np.ndarray, square: np.ndarray) -> np.ndarray:
    return np.divide(trace**2, square, out=np.zeros_like(square), where=square > 0)


def _moments(op: Operator, samples: int | None, rng: Random) -> _Moments:
    """tr A and |A|_F^2."""
    exact = _exact(op) if samples is None else None
    if exact is not None:
        return exact
    if isinstance(op, GramOperator):
        return _sampled_gram(op, samples, rng)
    products = _sampled_products(_identity, on_rows(op), [op.T], samples, rng)
    return replace(products, means=products.means[[0, 2]], without=products.without[:, [0, 2]])


def _exact(op: Operator) -> _Moments | None:
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


def _of_matrix(op: MatrixOperator) -> _Moments:
    """tr A and |A|_F^2 of a matrix; of one that was estimated itself, with the errors that it brings."""
    found = [_matrix_moments(m) for m in (op, *_left_out(op))]
    return _Moments(found[0], np.array(found[1:]).reshape(-1, 2), 0, _matrix_method(op), _eps(op.domain))


def _of_matrices(a: MatrixOperator, b: MatrixOperator) -> _Moments:
    counts = {len(_left_out(m)) for m in (a, b)} - {0}
    if len(counts) > 1:
        raise ValueError(f"the matrices come from {counts} groups of probes; estimate both with at least 20 samples")
    groups = max(counts, default=0)
    pairs = zip(_left_out(a) or [a] * groups, _left_out(b) or [b] * groups, strict=True)
    found = [_matrix_products(*pair) for pair in ((a, b), *pairs)]
    method = _matrix_method(a if _left_out(a) else b)
    return _Moments(found[0], np.array(found[1:]).reshape(-1, 3), 0, method, _eps(a.domain))


def _left_out(op: MatrixOperator) -> list[MatrixOperator]:
    return op.without if isinstance(op, PartialTrace) else []


def _matrix_method(op: MatrixOperator) -> str:
    return "jackknife of an estimated matrix" if _left_out(op) else "exact: matrix"


def _matrix_moments(op: MatrixOperator) -> np.ndarray:
    matrix = to_double(euclidean_matrix(op))
    return np.array([float(array_namespace(matrix).linalg.trace(matrix)), float((matrix * matrix).sum())])


def _matrix_products(a: MatrixOperator, b: MatrixOperator) -> np.ndarray:
    x, y = to_double(euclidean_matrix(a)), to_double(euclidean_matrix(b))
    return np.array([float((x * y).sum()), float((x * x).sum()), float((y * y).sum())])


def _known(trace: float, square: float, applications: int, method: str, op: Operator) -> _Moments:
    return _Moments(np.array([trace, square]), np.zeros((0, 2)), applications, method, _eps(op.domain))


def _exact_products(first: Rows, second: Rows, space: Space) -> _Moments:
    """tr A^T B, |A|_F^2 and |B|_F^2 by applying both to the identity."""
    sums = sum(_dots(first(rows), second(rows)).sum(0) for rows in unit_rows(space))
    applied = sum(space.size for f in (first, second) if f is not _identity)
    return _Moments(np.asarray(sums), np.zeros((0, 3)), applied, "exact: applied to the identity", _eps(space))


def _sampled_products(first: Rows, second: Rows, ranges: list[Operator], samples: int | None, rng: Random) -> _Moments:
    """tr A^T B, |A|_F^2 and |B|_F^2, the part on the leading ranges of the adjoints exactly, the rest by probes."""
    space, each = ranges[0].codomain, _samples(samples)
    rank = each // (3 * len(ranges))
    probes = each - (1 + len(ranges)) * rank
    leading = [on_rows(op)(_normal(rank, op.domain, rng)) for op in ranges]
    q, _c, _r = orthonormalise(space.xp.concat(leading, axis=0), [], 0.0)
    rest, _c = project_out(_normal(probes, space, rng), [q])
    found = _dots(first(q), second(q)).sum(0) + _dots(first(rest), second(rest))
    return _mean(found, len(ranges) * each, space)


def _sampled_gram(op: GramOperator, samples: int | None, rng: Random) -> _Moments:
    """tr J J* and |J J*|_F^2; see the head of this file."""
    total = _samples(samples)
    rank, probes = total // 2, total - total // 2
    forward, backward = on_rows(op.factor), on_rows(op.factor.T)
    q, _c, _r = orthonormalise(backward(_normal(rank, op.domain, rng)), [], 0.0)
    image = forward(q)
    core = gram(image, image)
    z = backward(_normal(probes, op.domain, rng))
    rest, c = project_out(z, [q])
    traces = float(array_namespace(core).linalg.trace(core)) + to_numpy(row_norms(rest)) ** 2
    squares = float((core * core).sum()) + to_numpy(row_norms(forward(z)) ** 2 - ((c @ core) * c).sum(1))
    return _mean(np.stack([traces, squares], axis=1), total, op.domain)


def _mean(samples: np.ndarray, applications: int, space: Space) -> _Moments:
    without = (samples.sum(0) - samples) / (len(samples) - 1)
    return _Moments(samples.mean(0), without, applications, "deflation and probes", _eps(space))


def _samples(samples: int | None) -> int:
    samples = SAMPLES if samples is None else samples
    if samples < 8:
        raise ValueError(f"samples = {samples} is too few for an error bar; give at least 8")
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
        return op.domain.matches(op.codomain) and _is_positive_matrix(euclidean_matrix(op), _eps(op.domain)), 0
    if not is_symmetric(op, rng):
        return False, 2
    rows, solver = on_rows(op), BlockLanczos(block=8, tol=NEGATIVE)
    top = solver.solve(rows, op.domain.size, 1, like=op.domain.like, seed=rng)
    bottom = solver.solve(lambda x: -rows(x), op.domain.size, 1, like=op.domain.like, seed=rng)
    spent = 2 + top.applications + bottom.applications
    return float(bottom.values[0]) <= 2 * NEGATIVE * abs(float(top.values[0])), spent


def _is_positive_matrix(matrix: Array, eps: float) -> bool:
    if float(abs(matrix - matrix.T).max()) > eps**0.5 * float(abs(matrix).max()):
        return False
    values = array_namespace(matrix).linalg.eigvalsh(to_double(matrix))
    return float(values[0]) >= -NEGATIVE * float(values[-1])
