"""How much of the trace of a neural tangent kernel each parameter contributes.

With ntk = F F*, F = J R and the blocks F = [F_1, F_2, ...] of the parameters,

    tr ntk = sum_i |F_i|_F^2,    |F_i|_F^2 = sum of squared columns = E |F_i* xi|^2
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from kpflow_dyn._arrays import Array, Random, eps_of, to_numpy
from kpflow_dyn._arrays.dots import row_dots
from kpflow_dyn._arrays.memory import rows_at_once
from kpflow_dyn._flows.preconditioner import slices
from kpflow_dyn._numbers.estimate import restored
from kpflow_dyn._numbers.moments import count_of
from kpflow_dyn._shown import ShownAsText, type_name, with_bar
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.rows import CHEAP, on_rows, unit_rows
from kpflow_dyn._spaces.scaling import at_unit_size
from kpflow_dyn.solvers import Estimate, Moments
from kpflow_dyn.solvers._moments import exact, of_samples


class Learning(Protocol):
    """What learns: a `Flow` or an `Output`."""

    @property
    def ntk(self) -> GramOperator: ...
    @property
    def parts(self) -> dict[str, int]: ...


class Contributions(ShownAsText, dict[str, Estimate]):
    """The share of each parameter in a trace, by name.

    Attributes:
        total: the whole trace, which is the sum of the parts.

    Example as `contributions`.
    """

    def __init__(self, parts: Mapping[str, Estimate], total: Estimate) -> None:
        super().__init__(parts)
        self.total = total

    def __str__(self) -> str:
        rows = {**self, "total": self.total}
        return "\n".join(f"{name:24} {with_bar(found)}" for name, found in rows.items())


def contributions(flow: Learning, samples: int | None = None, seed: int | Random = 0) -> Contributions:
    """How much each parameter contributes to tr NTK = sum_i |F_i|_F^2; F_i is its columns of J (with a metric, of J R).

    Args:
        flow: the result of `linearize`, or of `Flow.output`.
        samples: how many applications of J J* to spend on estimates. All estimates use the same probes. None gives
            exact values where they are cheap.
        seed: an int, or a `Random` to continue.

    Returns:
        An `Estimate` by name, and their sum as `.total`.

    Raises:
        ValueError: fewer than 8 samples.
    Source: docs/theory.md, "K: the Kronecker core".

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8), torch.randn(2, 5, 3))))
    >>> found = kp.contributions(flow)
    >>> sorted(found)
    ['bias_hh', 'bias_ih', 'weight_hh', 'weight_ih']
    >>> round(sum(part.value for part in found.values()) / kp.trace(flow.ntk).value, 6)
    1.0
    """
    if not hasattr(flow, "ntk"):
        raise TypeError(f"got {type_name(flow)}, expected a Flow, as kp.linearize makes it, or flow.output(C)")
    factor, size = at_unit_size(flow.ntk.factor)
    size.order = 2  # of traces
    found = _moments(factor, list(flow.parts.values()), samples, Random(seed))
    each = [restored(found.estimate(lambda *means, i=i: means[i]), size) for i in range(1 + len(flow.parts))]
    return Contributions(dict(zip(flow.parts, each, strict=False)), each[-1])


def _moments(factor: Operator, sizes: list[int], samples: int | None, rng: Random) -> Moments:
    """|F_i|_F^2 of each part, and their sum."""
    n, p = factor.codomain.size, factor.domain.size
    if samples is None and min(n, p) <= CHEAP:
        squares = _of_columns(factor, sizes) if p <= n else _of_rows(factor, sizes)
        return exact(np.append(squares, squares.sum()), (min(n, p) + 1) // 2, "exact: all of J")
    count = count_of(samples)
    squares = _of_probes(factor, sizes, 2 * count, rng)
    squares = np.concatenate([squares, squares.sum(0, keepdims=True)])
    return of_samples(squares, count, "one-sided probes", eps_of(factor.domain.like))


def _of_columns(factor: Operator, sizes: list[int]) -> np.ndarray:
    images = map(on_rows(factor), unit_rows(factor.domain))
    squares = np.concatenate([to_numpy(row_dots(u, u)) for u in images])
    return np.array([part.sum() for part in np.split(squares, np.cumsum(sizes)[:-1])])


def _of_rows(factor: Operator, sizes: list[int]) -> np.ndarray:
    backward = on_rows(factor.T)
    return np.sum([_squares(backward(rows), sizes).sum(1) for rows in unit_rows(factor.codomain)], 0)


def _of_probes(factor: Operator, sizes: list[int], count: int, rng: Random) -> np.ndarray:
    """|F_i* xi|^2 [part, probe]."""
    backward, n, like = on_rows(factor.T), factor.codomain.size, factor.codomain.like
    step = rows_at_once(n, like)
    blocks = (min(step, count - first) for first in range(0, count, step))
    return np.concatenate([_squares(backward(rng.normal((size, n), like)), sizes) for size in blocks], 1)


def _squares(rows: Array, sizes: list[int]) -> np.ndarray:
    """The squared norms of the parts of rows [b, p] -> [part, b]."""
    parts = [rows[:, place] for place in slices(sizes)]
    return np.stack([to_numpy(row_dots(part, part)) for part in parts])
