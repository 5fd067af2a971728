"""Reductions of an operator to some of its axes: the partial trace and the marginal view, two different things.

With A on X (x) Y, `keep` naming the axes of X:

    partial trace   (tr_Y A)[x, x'] = sum_y A[(x, y), (x', y)]
    marginal view   <A>_Y[x, x']    = (1 / |Y|) sum_{y, y'} A[(x, y), (x', y')]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from kpflow_dyn.arrays import Array, Random, array_namespace
from kpflow_dyn.flat import CHEAP, is_symmetric, matrix_on_values, on_rows, require_square, unit_rows
from kpflow_dyn.operators import DENSE_BYTES, GramOperator, MatrixOperator, Operator
from kpflow_dyn.solvers.orthogonalise import to_double, to_like
from kpflow_dyn.space import Space

SAMPLES, PART, GROUPS = 100, 16, 20

Keep = str | Sequence[str]


class PartialTrace(MatrixOperator):
    """A partial trace as a matrix on the kept axes.

    Attributes:
        matrix: [size, size] of the kept space, on values.
        stderr: the standard error of each entry, [size, size]; zeros where exact.
        without: the same estimate with one group of probes left out in turn, for the jackknife; empty where exact.
            `effective_rank`, `trace`, `frobenius_norm` and `alignment` of a partial trace use it.
        applications: how many applications to one vector it took.
        method: how it was found.
    """

    def __init__(
        self,
        matrix: Array,
        stderr: Array,
        without: list[MatrixOperator],
        space: Space,
        symmetric: bool,
        applications: int,
    ) -> None:
        super().__init__(matrix, space, space, symmetric=symmetric)
        self.stderr, self.without, self.applications = stderr, without, applications
        self.method = "probes" if without else "exact"


def partial_trace(op: Operator, keep: Keep, samples: int | None = None, seed: int | Random = 0) -> PartialTrace:
    """(tr_Y A)[x, x'] = sum_y A[(x, y), (x', y)], the sum over all axes but those kept.

    Exact when the matrix or the columns of J are few (at most `flat.CHEAP`), else the mean of u u^T summed over y, with
    u = J xi and standard normal xi: unbiased and positive semi-definite. Operators without a factor use (A xi) xi^T.

    Args:
        op: A, from a space to itself.
        keep: the name of the axis to keep, or several; () gives the trace, all give the matrix.
        samples: how many probes; None gives the exact result where it is cheap and 100 probes elsewhere.
        seed: an int, or a `Random` to continue.

    Raises:
        ValueError: an unknown axis, a domain that is not the codomain, or a result of more than 2 GiB.

    Example:
        >>> import numpy as np, kpflow_dyn as kp
        >>> space = kp.Space(("time", "unit"), (2, 3), np.zeros(1))
        >>> kp.partial_trace(kp.MatrixOperator(np.eye(6), space, space), keep="time").matrix
        array([[3., 0.],
               [0., 3.]])
    """
    return partial_traces(op, [keep], samples, seed)[0]


def partial_traces(
    op: Operator, keeps: Iterable[Keep], samples: int | None = None, seed: int | Random = 0
) -> list[PartialTrace]:
    """Several partial traces of one operator from the same applications; arguments as for `partial_trace`."""
    require_square(op, "a partial trace")
    rng = Random(seed)
    symmetric = is_symmetric(op, rng)
    sums = [_Sums(op.domain, _names(keep), symmetric) for keep in keeps]
    if samples is None and _is_cheap(op):
        return _sum_exactly(op, sums)
    return _sum_samples(op, sums, SAMPLES if samples is None else samples, rng)


def marginal(op: Operator, keep: Keep) -> Operator:
    """<A>_Y[x, x'] = (1 / |Y|) sum_{y, y'} A[(x, y), (x', y')]: feed copies along the other axes, then average.

    A lazy operator on the kept axes. It is not the partial trace: it sees only what is common to all of Y, and averages
    with the measure where there is one.

    Args:
        op: A, from a space to itself.
        keep: the name of the axis to keep, or several; () gives the mean over everything, all give A.

    Raises:
        ValueError: an unknown axis, or a domain that is not the codomain.
    """
    require_square(op, "a marginal")
    space, names = op.domain, _names(keep)
    kept = space.keep(names)

    def through(op: Operator):
        return lambda q: _average(op.mv(_copies(q, space, names)), space, names)

    return Operator(kept, kept, through(op), None if op.symmetric else through(op.T))


class _Sums:
    """sum over pairs and y of left[x, y] right[x', y], in coordinates where the inner product is plain."""

    def __init__(self, space: Space, names: tuple[str, ...], symmetric: bool) -> None:
        kept = space.positions(names)
        self.space, self.symmetric, self._shape = space.keep(names), symmetric, space.shape
        self._order = (0, *(1 + i for i in kept), *(1 + i for i in range(len(space.shape)) if i not in kept))
        self.groups: dict[int, Array] = {}
        self.counts: Counter[int] = Counter()
        self.squares = 0.0
        if self.space.size**2 * 8 > DENSE_BYTES:
            raise ValueError(
                f"a partial trace on {self.space} has {self.space.size}^2 entries, more than "
                f"{DENSE_BYTES / 2**30:.0f} GiB; keep fewer axes, or use eigs on the operator itself"
            )

    def add(self, left: Array, right: Array, group: int = 0) -> None:
        """Add a block of pairs [b, size] to one of the groups."""
        product = to_double(self._split(left) @ self._split(right).T)
        if self.symmetric:
            product = (product + product.T) / 2
        self.groups[group] = product + self.groups[group] if group in self.groups else product
        self.counts[group] += 1
        self.squares = product * product + self.squares

    def exact(self, applications: int) -> PartialTrace:
        """The sum of the pairs."""
        matrix = self._on_values(self.groups[0])
        return PartialTrace(matrix, 0 * matrix, [], self.space, self.symmetric, applications)

    def sampled(self, applications: int) -> PartialTrace:
        """The mean of independent pairs, with its standard error and without each of the groups."""
        count, total = self.counts.total(), sum(self.groups.values())
        variance = (self.squares / count - (total / count) ** 2) / (count - 1)
        stderr = array_namespace(variance).sqrt(abs(variance))
        left_out = [(total - part) / (count - self.counts[group]) for group, part in self.groups.items()]
        without = [MatrixOperator(self._on_values(m), self.space, self.space) for m in left_out]
        mean, stderr = self._on_values(total / count), self._on_values(stderr)
        return PartialTrace(mean, stderr, without, self.space, self.symmetric, applications)

    def _on_values(self, matrix: Array) -> Array:
        return matrix_on_values(to_like(matrix, self.space.like), self.space)

    def _split(self, rows: Array) -> Array:
        """Rows [b, size] -> [x, b y]."""
        xp = array_namespace(rows)
        axes_kept_first = xp.permute_dims(rows.reshape((-1, *self._shape)), self._order)
        block = axes_kept_first.reshape((rows.shape[0], self.space.size, -1))
        return xp.permute_dims(block, (1, 0, 2)).reshape((self.space.size, -1))


def _is_cheap(op: Operator) -> bool:
    columns = op.factor.domain.size if isinstance(op, GramOperator) else op.domain.size
    return isinstance(op, MatrixOperator) or min(columns, op.domain.size) <= CHEAP


def _sum_exactly(op: Operator, sums: list[_Sums]) -> list[PartialTrace]:
    """tr_Y A from A applied to every unit vector, or from every column of J."""
    source = op.factor if isinstance(op, GramOperator) and op.factor.domain.size < op.domain.size else op
    factored, forward, columns = source is not op, on_rows(source), source.domain.size
    for unit in unit_rows(source.domain):
        image = forward(unit)
        for kept in sums:
            kept.add(image, image if factored else unit)
    return [kept.exact((columns + 1) // 2 if factored else columns) for kept in sums]


def _sum_samples(op: Operator, sums: list[_Sums], samples: int, rng: Random) -> list[PartialTrace]:
    """tr_Y A = E tr_Y u u^T with u = J xi, or E tr_Y (A xi) xi^T."""
    if samples < 2:
        raise ValueError(f"samples = {samples} is too few for an error bar; give at least 2")
    source = op.factor if isinstance(op, GramOperator) else op
    factored, forward = source is not op, on_rows(source)
    for start in range(0, samples, PART):
        probes = rng.normal((min(PART, samples - start), source.domain.size), source.domain.like)
        image = forward(probes)
        for i, (left, right) in enumerate(zip(image, image if factored else probes, strict=True), start):
            for kept in sums:
                kept.add(left[None], right[None], i % GROUPS)
    return [kept.sampled((samples + 1) // 2 if factored else samples) for kept in sums]


def _names(keep: Keep) -> tuple[str, ...]:
    return (keep,) if isinstance(keep, str) else tuple(keep)


def _dropped(space: Space, names: tuple[str, ...]) -> tuple[int, ...]:
    kept = space.positions(names)
    return tuple(1 + i for i in range(len(space.shape)) if i not in kept)


def _copies(q: Array, space: Space, names: tuple[str, ...]) -> Array:
    """[b, *kept] -> [b, *shape]."""
    dropped = _dropped(space, names)
    lengths = tuple(1 if 1 + i in dropped else n for i, n in enumerate(space.shape))
    return space.xp.broadcast_to(q.reshape((q.shape[0], *lengths)), (q.shape[0], *space.shape))


def _average(u: Array, space: Space, names: tuple[str, ...]) -> Array:
    """[b, *shape] -> [b, *kept], weighted by the measure."""
    xp, dropped = space.xp, _dropped(space, names)
    if not dropped:
        return u
    if space.measure is None:
        return xp.mean(u, axis=dropped)
    weights = xp.broadcast_to(space.measure, u.shape)
    return xp.sum(weights * u, axis=dropped) / xp.sum(weights, axis=dropped)
