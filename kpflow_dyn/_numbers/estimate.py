"""Scalars of operators with their standard errors: trace, Frobenius norm, effective rank, alignment, Rayleigh quotient.

Each is exact (standard error 0) where that is cheap: from the core's spectrum, from a matrix, or from at most
512 applications (CHEAP). Otherwise a method of `kpflow_dyn.solvers` estimates it, in coordinates where inner products
are plain: XNysTrace for A = J J*, XTrace for any other A. Where J J* acts on several trials, its norm and effective
rank come from leading directions, and the rest of them from separate random vectors for each trial (`trials_apart`).
Where its effective rank is larger than the sketch of XNysTrace, the trace is better found from J* alone, of each trial
where these are known; the sketch shows which case it is.

For any A and B, with an orthonormal basis Q of their leading ranges and y = x - Q Q^T x,

    tr A^T B = sum_q <A q, B q> + E <A y, B y>

A partial trace that was itself estimated comes as T_1, ..., T_n from independent groups of probes. The norm of their
mean contains its noise; products of different groups do not:

    tr T = E T_i,    tr T^T U = E tr T_i^T U_j    for i != j
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from kpflow_dyn._arrays import Array, Random, Rows, array_namespace, eps_of, to_numpy
from kpflow_dyn._arrays.dots import row_dots, to_double
from kpflow_dyn._numbers.growing import growing
from kpflow_dyn._numbers.moments import (
    SAMPLES,
    Estimator,
    count_of,
    exactly,
    groups_of,
    moments_of,
    of_matrices,
    offered,
    trace_of,
)
from kpflow_dyn._numbers.reductions import MeanOfSamples
from kpflow_dyn._spaces.operators import GramOperator, MatrixOperator, Operator, check_operator
from kpflow_dyn._spaces.rows import CHEAP, TRIED, euclidean_matrix, is_symmetric, on_rows, require_square, unit_rows
from kpflow_dyn._spaces.scaling import Size, at_unit_size, largest
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers import BlockLanczos, Estimate, Moments
from kpflow_dyn.solvers._moments import LEAST_SAMPLES, exact, of_samples
from kpflow_dyn.solvers._orthogonalise import orthonormalise, project_out

MOST = 10_000  # applications, unless given
NEGATIVE = 1e-3  # an eigenvalue below minus this share of the largest makes an operator indefinite
TINY = 1e-300


@dataclass(frozen=True)
class Scalars:
    """Scalars of one operator that come from the same applications, each of which counts all of them."""

    trace: Estimate
    norm: Estimate
    effective_rank: Estimate


def scalars(op: Operator, samples: int | None = None, seed: int | Random = 0, alg: Estimator | None = None) -> Scalars:
    """`trace`, `frobenius_norm` and `effective_rank` of an operator from a space to itself, for the price of one."""
    require_square(op, "a trace")
    op, size = at_unit_size(op)
    rng = Random(seed)
    positive, spent = _is_positive(op, rng)
    found = moments_of(op, samples, rng, alg)
    for_rank = found if positive else moments_of(GramOperator(op), samples, rng, None)
    rank = for_rank.effective_rank
    rank = replace(rank, applications=rank.applications + spent)
    return Scalars(restored(found.trace, size), restored(found.norm, size), rank)


def restored(found: Estimate, size: Size) -> Estimate:
    """An estimate of A over its size as that of A."""
    return replace(found, value=size.times(found.value), stderr=size.times(found.stderr))


def trace(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
    alg: Estimator | None = None,
) -> Estimate:
    """tr A = sum_i <e_i, A e_i> of an operator from a space to itself, where e_i is an orthonormal basis.

    Args:
        op: A.
        samples: how many applications to spend on an estimate; None gives the exact value where it is cheap. An
            estimated partial trace needs none, because it has its own error.
        seed: an int, or a `Random` to continue.
        rtol: take more samples until the standard error is at most rtol times the value. It begins with a few samples
            unless `samples` says how many. For A = J J* the earlier samples are kept. For other operators, and with an
            `alg`, sampling begins again. None takes the first estimate.
        max_applications: the most applications to spend on that. For `effective_rank` they include its first step, the
            test of the sign.
        alg: a method of `kpflow_dyn.solvers`, used even where the exact value is cheap; the best one for A when None.

    Raises:
        ValueError: a domain that is not the codomain, fewer than 8 samples, or rtol <= 0.
        TypeError: an `alg` that needs the factor J of A = J J* where there is none.

    Warns:
        UserWarning: max_applications would be exceeded before the estimate is as good as rtol.

    Source as `solvers.XNysTrace`.

    >>> import numpy as np, kpflow_dyn as kp
    >>> unit = kp.Space(("unit",), (3,), np.zeros(1))
    >>> kp.trace(kp.MatrixOperator(np.diag([1.0, 2.0, 3.0]), unit, unit)).value
    6.0
    """
    require_square(op, "a trace")
    if isinstance(op, MeanOfSamples):
        known = _over_samples(op, samples, seed, rtol is None and alg is None)
        return known.trace if known else _of_these(op, trace(_plain(op), samples, seed, rtol, max_applications, alg))
    op, size = at_unit_size(op)
    rng = Random(seed)
    course = _Course(op, rng, alg, rtol, True)

    def estimate(count: int | None) -> Estimate:
        return course(count).trace if alg is None else trace_of(op, count, rng, alg)

    return restored(course.until(estimate, samples, rtol, max_applications), size)


def frobenius_norm(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
    alg: Estimator | None = None,
) -> Estimate:
    """|A|_F = sqrt(tr A* A), the root of the sum of the squared singular values, in the inner products of the spaces.

    The domain may differ from the codomain.

    Args, Raises, Warns and Source as `trace`.

    >>> import numpy as np, kpflow_dyn as kp
    >>> unit = kp.Space(("unit",), (2,), np.zeros(1))
    >>> A = kp.MatrixOperator(np.diag([3.0, 4.0]), unit, unit)
    >>> kp.frobenius_norm(A).value, round(kp.effective_rank(A).value, 4), round(kp.alignment(A, A.T).value, 4)
    (5.0, 1.96, 1.0)
    >>> kp.rayleigh(A, np.array([1.0, 1.0])).value
    3.5
    """
    if isinstance(op, MeanOfSamples):
        known, given = _over_samples(op, samples, seed, rtol is None and alg is None), (rtol, max_applications, alg)
        return known.norm if known else _of_these(op, frobenius_norm(_plain(op), samples, seed, *given))
    op, size = at_unit_size(op)
    rng, beside = Random(seed), _gives_norm(op, samples, alg)
    squared = op if beside else GramOperator(op)  # |A|_F^2 = tr A A*
    course = _Course(squared, rng, alg, rtol, not beside)

    def estimate(count: int | None) -> Estimate:
        if beside:
            return course(count).norm
        if alg is None or offered(alg, "moments", squared):
            return course(count).estimate(lambda trace, *_: max(trace, 0.0) ** 0.5)
        found = trace_of(squared, count, rng, alg)  # without its samples
        value = max(found.value, 0.0) ** 0.5
        return replace(found, value=value, stderr=found.stderr / (2 * value) if value else found.stderr**0.5)

    return restored(course.until(estimate, samples, rtol, max_applications), size)


def effective_rank(
    op: Operator,
    samples: int | None = None,
    seed: int | Random = 0,
    rtol: float | None = None,
    max_applications: int = MOST,
    alg: Estimator | None = None,
) -> Estimate:
    """er(A) = (tr A)^2 / |A|_F^2 of a positive semi-definite A; of A A* for any other. 0 for the zero operator.

    A `GramOperator` is positive semi-definite. Symmetry and sign of other operators are checked: by the spectrum where
    the matrix is cheap, else by a Lanczos run for the smallest eigenvalue. The domain may differ from the codomain.

    Args as `trace`.

    Raises:
        ValueError: fewer than 8 samples, or an estimated partial trace that is not positive semi-definite.
    Source: docs/theory.md, "How many: effective ranks".
    Example as `frobenius_norm`.
    """
    if isinstance(op, MeanOfSamples):
        known, given = _over_samples(op, samples, seed, rtol is None and alg is None), (rtol, max_applications, alg)
        return known.effective_rank if known else _of_these(op, effective_rank(_plain(op), samples, seed, *given))
    op, _size = at_unit_size(op)
    rng = Random(seed)
    positive, spent = _is_positive(op, rng)
    squared = op if positive else GramOperator(op)
    course = _Course(squared, rng, alg, rtol)
    return course.until(lambda count: course(count).effective_rank, samples, rtol, max_applications, spent)


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
    check_operator(a)
    check_operator(b)
    if not (a.domain.matches(b.domain) and a.codomain.matches(b.codomain)):
        raise ValueError(f"alignment compares operators between the same spaces, got {a!r} and {b!r}")
    (x, _size), (y, _size) = at_unit_size(a), at_unit_size(b)
    matrices = isinstance(x, MatrixOperator) and isinstance(y, MatrixOperator)
    if groups_of(x) or groups_of(y) or (samples is None and matrices):
        found = of_matrices(x, y)
    elif samples is None and x.domain.size <= CHEAP:
        found = _exact_products(on_rows(x), on_rows(y), x.domain)
    else:
        found = _sampled_products(on_rows(x), on_rows(y), [x.T, y.T], count_of(samples), Random(seed))
    if not (found.means[1:] > 2 * np.sqrt(np.diag(found.covariance)[1:])).all():
        raise ValueError(
            "alignment with the zero operator is not defined, nor with an estimate that is no larger than its noise; "
            "check what the operators learn from, or take more samples"
        )
    return _of_these(a if isinstance(a, MeanOfSamples) else b, found.estimate(cosine))


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
    length = largest(q)
    if not 0 < length < math.inf:
        what = "the zero vector" if length == 0 else "a vector that holds NaN or inf"
        raise ValueError(f"the Rayleigh quotient of {what} is not defined")
    whole, (op, size) = op, at_unit_size(op)
    row = op.domain.to_euclidean(q / 2.0 ** round(math.log2(length))).reshape((1, -1))
    product, square = (float(row_dots(row, other)[0]) for other in (on_rows(op)(row), row))
    return _of_these(whole, Estimate(size.times(product / square), 0.0, 1, "exact"))


class _Course:
    """Moments from a number of samples, and from more of them: of A = J J* what was applied before is used again.

    None samples give the exact ones where that is cheap; elsewhere the usual number, or a few where more may follow.
    """

    def __init__(
        self, op: Operator, rng: Random, alg: Estimator | None, rtol: float | None, only_trace: bool = False
    ) -> None:
        self.op, self.rng, self.alg, self.only_trace = op, rng, alg, only_trace
        self.growing = growing(op, rng, only_trace) if alg is None and isinstance(op, GramOperator) else None
        self.usual = SAMPLES if self.growing is None or rtol is None else self.growing.first

    def __call__(self, samples: int | None) -> Moments:
        if self.growing is None:
            return moments_of(self.op, samples, self.rng, self.alg, self.only_trace)
        known = exactly(self.op) if samples is None else None
        return known or self.growing(self.usual if samples is None else samples)

    def until(
        self, of: Callable[[int | None], Estimate], samples: int | None, rtol: float | None, most: int, before: int = 0
    ) -> Estimate:
        """An estimate from this number of samples, or from more where it has to be better.

        `most` bounds all applications, those before among them. The bar says how many more, but at most twice as many:
        few looks at it, and few samples more than it takes.
        """
        if rtol is not None and not rtol > 0:
            raise ValueError(f"rtol is {rtol!r}, expected a positive number such as 0.01, or None")
        count, spent = self.usual if samples is None else count_of(samples), before
        if rtol is not None and before + count > most and samples is None:
            samples = count = max(LEAST_SAMPLES, most - before)
        found = of(samples)
        while rtol is not None and found.stderr > rtol * abs(found.value):
            done = spent + found.applications
            spent = before if self.growing else done
            if (left := most - spent) <= count:
                warnings.warn(
                    f"after {done} applications the standard error is {found.stderr:.1e}, above rtol = {rtol:g} of "
                    f"{found.value:.3g}; raise max_applications or rtol",
                    stacklevel=3,
                )
                return replace(found, applications=done)
            excess = found.stderr / max(rtol * abs(found.value), TINY)
            count = min(max(math.ceil(1.1 * count * min(excess, 2) ** 2), count + count // 4), 2 * count, left)
            found, last = of(count), found
            if found == last:
                warnings.warn(
                    "the partial trace was estimated before: give kp.partial_trace more samples", stacklevel=3
                )
                break
        return replace(found, applications=spent + found.applications)


def _over_samples(op: MeanOfSamples, samples: int | None, seed: int | Random, is_asked: bool) -> Moments | None:
    """The moments with errors over samples such as paths, where there are enough of these."""
    return op.moments(samples, seed) if op.has_errors and is_asked else None


def _plain(op: MeanOfSamples) -> GramOperator:
    """The mean of these samples alone."""
    return GramOperator(op.factor)


def _of_these(op: Operator, found: Estimate) -> Estimate:
    """An estimate that says where it is one of the mean of these samples alone."""
    if not isinstance(op, MeanOfSamples):
        return found
    return replace(found, method=f"{found.method}; of the mean over these {op.samples}")


def cosine(product: float, first: float, second: float) -> float:
    """An alignment from tr A^T B, |A|_F^2 and |B|_F^2."""
    return product / (max(first, TINY) * max(second, TINY)) ** 0.5


def _gives_norm(op: Operator, samples: int | None, alg: Estimator | None) -> bool:
    """Whether |A|_F^2 is found beside tr A, and not as the trace of A A*."""
    if alg is None or groups_of(op):
        known = (GramOperator, MatrixOperator) if samples is None else GramOperator
        return isinstance(op, known) or bool(groups_of(op))
    return op.domain.matches(op.codomain) and offered(alg, "moments", op) is not None


def _exact_products(first: Rows, second: Rows, space: Space) -> Moments:
    """tr A^T B, |A|_F^2 and |B|_F^2 by applying both to the identity."""
    sums = sum(_dots(first(rows), second(rows)).sum(1) for rows in unit_rows(space))
    return exact(np.asarray(sums), 2 * space.size, "exact: applied to the identity")


def _sampled_products(first: Rows, second: Rows, ranges: list[Operator], samples: int, rng: Random) -> Moments:
    """tr A^T B, |A|_F^2 and |B|_F^2, the part on the leading ranges of the adjoints exactly, the rest by probes."""
    space = ranges[0].codomain
    rank = min(samples // 3, space.size) // len(ranges)
    probes = samples - (1 + len(ranges)) * rank
    leading = [on_rows(op)(rng.normal((rank, op.domain.size), op.domain.like)) for op in ranges]
    q, _c, _r = orthonormalise(space.xp.concat(leading, axis=0), [], 0.0)
    rest, _c = project_out(rng.normal((probes, space.size), space.like), [q])
    found = _dots(first(q), second(q)).sum(1, keepdims=True) + _dots(first(rest), second(rest))
    return of_samples(found, len(ranges) * samples, "deflation and probes", eps_of(space.like))


def _dots(a: Array, b: Array) -> np.ndarray:
    """<a, b>, <a, a> and <b, b> of rows -> [3, row]."""
    return np.stack([to_numpy(row_dots(x, y)) for x, y in ((a, b), (a, a), (b, b))])


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
    matrix, groups = to_double(euclidean_matrix(op)), groups_of(op)
    symmetric = float(abs(matrix - matrix.T).max()) <= eps_of(op.domain.like) ** 0.5 * float(abs(matrix).max())
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
