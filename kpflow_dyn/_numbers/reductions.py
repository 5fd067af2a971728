"""Reductions of an operator to some of its axes: the partial trace and the marginal view, two different things.

With A on X (x) Y, `keep` naming the axes of X:

    partial trace   (tr_Y A)[x, x'] = sum_y A[(x, y), (x', y)]
    marginal view   <A>_Y[x, x']    = (1 / |Y|) sum_{y, y'} A[(x, y), (x', y')]
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from kpflow_dyn._arrays import Array, Random, array_namespace, device
from kpflow_dyn._arrays.dots import dots, to_double
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._spaces.operators import DENSE_BYTES, GramOperator, MatrixOperator, Operator, smaller_of
from kpflow_dyn._spaces.rows import (
    CHEAP,
    euclidean_matrix,
    is_symmetric,
    matrix_on_values,
    on_rows,
    require_square,
    unit_rows,
)
from kpflow_dyn._spaces.scaling import Size, at_unit_size, divided, largest
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers._moments import Moments, check_samples, student
from kpflow_dyn.solvers._orthogonalise import orthonormalise, project_out, to_like
from kpflow_dyn.solvers._probes import images_of_normal

SAMPLES, GROUPS, LEADING = 100, 20, 24

Keep = str | Sequence[str]


class PartialTrace(MatrixOperator):
    """A partial trace as a matrix on the kept axes.

    The noise of an estimate would bias nonlinear functions of it. `trace`, `frobenius_norm`, `effective_rank`,
    `alignment` and `modes` therefore use `groups`, which are independent of each other.

    Attributes:
        matrix: [size, size] of the kept space, on values.
        stderr: the standard error of each entry, [size, size]; zeros if exact.
        groups: estimates from independent groups of probes of one size; their mean is the matrix. float64 [size, size],
            in coordinates with the plain inner product. Empty if exact.
        applications: how many applications to one vector it took.
        method: how it was found.
    """

    def __init__(self, mean: Array, groups: list[Array], space: Space, symmetric: bool, applications: int) -> None:
        most, limits = largest(mean), space.xp.finfo(space.dtype)
        if not most <= float(limits.max) or 0 < most < float(limits.smallest_normal):
            what = "numbers as small as zero" if most < 1 else "NaN or inf"
            raise ValueError(
                f"a partial trace on {space} holds {what}: {most:.2g} leaves the range of {space.dtype}; take float64, "
                "or shorter trials"
            )
        super().__init__(_on_values(mean, space), space, space, symmetric=symmetric)
        self.stderr = _on_values(_standard_error(mean, groups), space)
        self.groups, self.applications = groups, applications
        self.method = "probes" if groups else "exact"


class MeanOfSamples(GramOperator):
    """A mean of kernels of independent samples, such as paths, whose traces have errors over these.

    Attributes:
        samples: how many, and what they are, such as "8 paths".
        has_errors: whether these are enough for an error.
    """

    samples: str
    has_errors: bool

    def moments(self, samples: int | None = None, seed: int | Random = 0) -> Moments:
        """tr A and |A|_F^2 of the mean over all samples that there could be."""
        raise NotImplementedError

    def partial_trace(self, keep: Keep, samples: int | None = None, seed: int | Random = 0) -> PartialTrace:
        """The partial trace, whose groups are the samples."""
        raise NotImplementedError


@divided.register
def divided_partial_trace(op: PartialTrace, size: Size) -> Operator:
    """A partial trace over its size, with the groups that it comes from."""
    mean: Any = sum(op.groups) / len(op.groups) if op.groups else to_double(euclidean_matrix(op))
    size.measure(mean, array_namespace(mean).ones_like(mean[:1]))
    if size.exponent == 0:
        return op
    groups = [size.divide(group) for group in op.groups]
    return PartialTrace(size.divide(mean), groups, op.domain, op.symmetric, op.applications)


def partial_trace(op: Operator, keep: Keep, samples: int | None = None, seed: int | Random = 0) -> PartialTrace:
    """(tr_Y A)[x, x'] = sum_y A[(x, y), (x', y)]: sum over all axes except those in `keep`.

    Exact for small matrices and few columns of J (at most 512). Else the columns of Q are orthonormal and span the
    leading range of J*, xi is standard normal, and

        A = (J Q)(J Q)* + E u u*,    u = J (1 - Q Q*) xi

    The mean over probes xi replaces the expectation. It is unbiased and positive semi-definite. If the sum is over the
    trials of a flow, each trial b has its own xi_b, u_b = J_b (1 - Q Q*) xi_b. The errors of the trials then average
    out. Operators without a factor use A = E (A xi) xi*.

    Args:
        op: A, from a space to itself.
        keep: the name of the axis to keep, or several names. () gives the trace; all axes give the matrix.
        samples: how many probes, rounded up to a multiple of 20 if there are more than 20; `sampling` says what they
            cost. None gives the exact result where it is cheap, and 100 probes elsewhere.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: an unknown axis; a domain that is not the codomain; fewer than 8 samples; or a result larger than 2
            GiB.
    Source: docs/theory.md, "Modes: when, where and in which trials".

    >>> import numpy as np, kpflow_dyn as kp
    >>> space = kp.Space(("time", "unit"), (2, 3), np.zeros(1))
    >>> A = kp.MatrixOperator(np.eye(6), space, space)
    >>> kp.partial_trace(A, keep="time").matrix
    array([[3., 0.],
           [0., 3.]])
    >>> kp.marginal(A, keep="time").dense()
    array([[1., 0.],
           [0., 1.]])
    >>> kp.modes(A, axis="unit", k=2).values
    array([2., 2.])
    """
    if isinstance(op, MeanOfSamples) and op.has_errors:
        return op.partial_trace(keep, samples, seed)
    return partial_traces(op, [keep], samples, seed)[0]


def partial_traces(
    op: Operator, keeps: Iterable[Keep], samples: int | None = None, seed: int | Random = 0
) -> list[PartialTrace]:
    """Several partial traces of one operator from the same applications; arguments as for `partial_trace`."""
    require_square(op, "a partial trace")
    op, size = at_unit_size(op)
    rng = Random(seed)
    symmetric = is_symmetric(op, rng)
    sums = [Sums(op.domain, names_of(keep), symmetric, size) for keep in keeps]
    if samples is None and (isinstance(op, MatrixOperator) or smaller_of(op).domain.size <= CHEAP):
        return _sum_exactly(op, sums)
    columns, probes = sampling(SAMPLES if samples is None else samples)
    if isinstance(op, GramOperator):
        return _sample_gram(op, sums, columns, probes, rng)
    return _sample(op, sums, probes, rng)


def sampling(samples: int) -> tuple[int, int]:
    """How many columns of Q and how many probes `partial_traces` of J J* takes for `samples`.

    A column costs one J and one J*, a probe one J; probes are taken twice over for traces that keep trials and traces
    that sum over them.
    """
    check_samples(samples)
    return min(LEADING, samples // 4), samples + -samples % min(GROUPS, samples)


def marginal(op: Operator, keep: Keep) -> Operator:
    """<A>_Y[x, x'] = (1 / |Y|) sum_{y, y'} A[(x, y), (x', y')]: feed copies along the other axes, then average.

    The result is an operator on the kept axes; its matrix is not formed. It is not the partial trace: it sees only what
    all of Y have in common. With a measure, averages are weighted by it. With a mask, they are over the entries that
    count.

    Source: docs/theory.md, "How many: effective ranks".
    Args, Raises and Example as `partial_trace`. For keep, () gives the mean over everything, and all axes give A.
    """
    require_square(op, "a marginal")
    space, names = op.domain, names_of(keep)
    kept = _where_averages_count(space, names)

    def through(op: Operator):
        return lambda q: _average(op.mv(_copies(q, space, names)), space, names)

    return Operator(kept, kept, through(op), None if op.symmetric else through(op.T))


class Sums:
    """A partial trace in the making: sum over pairs and y of left[x, y] right[x', y], in plain coordinates.

    The pairs are those of an operator over its size.
    """

    def __init__(self, space: Space, names: tuple[str, ...], symmetric: bool, size: Size) -> None:
        self._size = size
        self._full, self._kept = space, space.positions(names)
        self.space, self.symmetric = space.keep(names), symmetric
        self.known, self.groups = 0.0, [0.0] * GROUPS
        if self.space.size**2 * 8 > DENSE_BYTES:
            raise ValueError(
                f"a partial trace on {self.space} has {self.space.size}^2 entries, more than "
                f"{DENSE_BYTES / 2**30:.0f} GiB; keep fewer axes, or use eigs on the operator itself"
            )

    def add(self, left: Array, right: Array) -> None:
        """Add a block of pairs [b, size]."""
        self.known = self._product(left, right) + self.known

    def add_probes(self, left: Array, right: Array, first: int) -> None:
        """Add random pairs [b, size], the first of which is number `first`, each to the next group."""
        for number in range(left.shape[0]):
            group = (first + number) % GROUPS
            pair = left[number : number + 1], right[number : number + 1]
            self.groups[group] = self._product(*pair) + self.groups[group]

    def partial_trace(self, probes: int, applications: int) -> PartialTrace:
        """The sum of the pairs and the mean of this number of random ones, if any."""
        count = min(GROUPS, probes)
        groups = [self._size.times(self.known + total / (probes // count)) for total in self.groups[:count]]
        mean = sum(groups) / count if groups else self._size.times(self.known)
        return PartialTrace(mean, groups, self.space, self.symmetric, applications)

    def _product(self, left: Array, right: Array) -> Array:
        product = dots(self._split(left), self._split(right))
        return (product + product.T) / 2 if self.symmetric else product

    def _split(self, rows: Array) -> Array:
        """Rows [b, size] -> [x, y b]: trials, which may be sharded, stay outermost."""
        matrices = as_matrices(rows, self._full, self._kept)
        return array_namespace(rows).permute_dims(matrices, (1, 2, 0)).reshape((matrices.shape[1], -1))


def as_matrices(rows: Array, space: Space, kept: tuple[int, ...]) -> Array:
    """Rows [b, size] -> [b, x, y], with the kept axes in front of the others."""
    order = (*kept, *(i for i in range(len(space.shape)) if i not in kept))
    turned = array_namespace(rows).permute_dims(rows.reshape((-1, *space.shape)), (0, *(1 + i for i in order)))
    size = math.prod(space.shape[i] for i in kept)
    return turned.reshape((rows.shape[0], size, space.size // size))


def _on_values(matrix: Array, space: Space) -> Array:
    return matrix_on_values(to_like(matrix, space.like), space)


def _standard_error(mean: Array, groups: list[Array]) -> Array:
    if not groups:
        return 0 * mean
    variance = sum((group - mean) ** 2 for group in groups) / (len(groups) - 1) / len(groups)
    return student(len(groups)) * array_namespace(mean).sqrt(variance)


def _sum_exactly(op: Operator, sums: list[Sums]) -> list[PartialTrace]:
    """tr_Y A from A applied to every unit vector, or from every column of J."""
    source = op.factor if isinstance(op, GramOperator) and op.factor.domain.size < op.domain.size else op
    factored, forward, columns = source is not op, on_rows(source), source.domain.size
    for unit in unit_rows(source.domain):
        image = forward(unit)
        for kept in sums:
            kept.add(image, image if factored else unit)
    return [kept.partial_trace(0, (columns + 1) // 2 if factored else columns) for kept in sums]


def _sample_gram(op: GramOperator, sums: list[Sums], columns: int, probes: int, rng: Random) -> list[PartialTrace]:
    """tr_Y J J*: of the leading range of J* exactly, and of the rest by probes."""
    J, columns = op.factor, min(columns, op.factor.domain.size)
    images = images_of_normal(on_rows(J.T), columns, J.codomain.size, rng, J.codomain.like)
    q, _c, _r = orthonormalise(images, [], 0.0)
    forward, step = on_rows(J), rows_at_once(J.codomain.size, q)
    for first in range(0, q.shape[0], step):
        leading = forward(q[first : first + step])
        for kept in sums:
            kept.add(leading, leading)
    # Where a trace sums over trials, each trial may have random vectors of its own.
    inside = [kept for kept in sums if op.apart is not None and "trial" not in kept.space.axes]
    across = [kept for kept in sums if kept not in inside]
    by_factor = [(factor, those) for factor, those in ((J, across), (op.apart, inside)) if factor and those]
    for factor, those in by_factor:
        for first, image in probe_images(factor, q, probes, rng):
            for kept in those:
                kept.add_probes(image, image, first)
    return [kept.partial_trace(probes, columns + (len(by_factor) * probes + 1) // 2) for kept in sums]


def probe_images(factor: Operator, q: Array, probes: int, rng: Random) -> Iterator[tuple[int, Array]]:
    """Images of standard normal vectors orthogonal to q [d, p], (number of the first, [b, n]), a few at a time.

    Where the factor takes a vector for each trial, all of them are.
    """
    forward, size, p, turn = on_rows(factor), factor.domain.size, q.shape[1], array_namespace(q).permute_dims
    step = rows_at_once(max(size, factor.codomain.size), q)
    for first in range(0, probes, step):
        count = min(step, probes - first)
        drawn = rng.normal((count, size), factor.domain.like).reshape((count, size // p, p))
        rest, _c = project_out(turn(drawn, (1, 0, 2)).reshape((-1, p)), [q])  # trials outermost: they may be sharded
        yield first, forward(turn(rest.reshape((size // p, count, p)), (1, 0, 2)).reshape((count, size)))


def _sample(op: Operator, sums: list[Sums], probes: int, rng: Random) -> list[PartialTrace]:
    """tr_Y A = E tr_Y (A xi) xi^T."""
    forward, step = on_rows(op), rows_at_once(op.domain.size, op.domain.like)
    for first in range(0, probes, step):
        block = rng.normal((min(step, probes - first), op.domain.size), op.domain.like)
        image = forward(block)
        for kept in sums:
            kept.add_probes(image, block, first)
    return [kept.partial_trace(probes, probes) for kept in sums]


def names_of(keep: Keep) -> tuple[str, ...]:
    """The names of the kept axes."""
    return (keep,) if isinstance(keep, str) else tuple(keep)


def _dropped(space: Space, names: tuple[str, ...]) -> tuple[int, ...]:
    kept = space.positions(names)
    return tuple(1 + i for i in range(len(space.shape)) if i not in kept)


def _copies(q: Array, space: Space, names: tuple[str, ...]) -> Array:
    """[b, *kept] -> [b, *shape]."""
    dropped = _dropped(space, names)
    lengths = tuple(1 if 1 + i in dropped else n for i, n in enumerate(space.shape))
    return space.xp.broadcast_to(q.reshape((q.shape[0], *lengths)), (q.shape[0], *space.shape))


def _where_averages_count(space: Space, names: tuple[str, ...]) -> Space:
    """The space of the kept axes, in which an entry weighs as much as those that it is the average of."""
    kept, dropped = space.keep(names), _dropped(space, names)
    if space.mask is None or not dropped:
        return kept
    shares = space.xp.mean(_weights(space)[None], axis=dropped)
    return replace(kept, measure=space.xp.where(shares > 0, shares, space.xp.ones_like(shares)))


def _weights(space: Space) -> Array:
    """How much each entry weighs in an average [*shape]."""
    ones = space.xp.ones(space.shape, dtype=space.dtype, device=device(space.like))
    return space.counted(ones if space.measure is None else ones * space.measure)


def _average(u: Array, space: Space, names: tuple[str, ...]) -> Array:
    """[b, *shape] -> [b, *kept], weighted by the measure."""
    xp, dropped = space.xp, _dropped(space, names)
    if not dropped:
        return u
    if space.measure is None and space.mask is None:
        return xp.mean(u, axis=dropped)
    weights = _weights(space)[None]
    total = xp.sum(weights, axis=dropped)
    return xp.sum(weights * u, axis=dropped) / xp.where(total > 0, total, xp.ones_like(total))
