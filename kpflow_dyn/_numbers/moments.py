"""tr A and |A|_F^2 of operators: exact where that is cheap, by the caller's estimator, or by the best one for A."""

from collections.abc import Callable
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Random, eps_of, to_numpy
from kpflow_dyn._arrays.dots import to_double
from kpflow_dyn._flows.sites import CoreOperator
from kpflow_dyn._numbers.growing import growing
from kpflow_dyn._numbers.reductions import PartialTrace
from kpflow_dyn._spaces.operators import GramOperator, MatrixOperator, Operator, smaller_of
from kpflow_dyn._spaces.rows import CHEAP, euclidean_matrix, on_rows, sides_of
from kpflow_dyn.solvers import Dense, Estimate, FactorTraceEstimator, Moments, TraceEstimator, XTrace
from kpflow_dyn.solvers._doors import called
from kpflow_dyn.solvers._moments import check_samples, exact, of_pairs

SAMPLES = 120

Estimator = TraceEstimator | FactorTraceEstimator


def moments_of(
    op: Operator, samples: int | None, rng: Random, alg: Estimator | None = None, only_trace: bool = False
) -> Moments:
    """tr A and |A|_F^2, or the moments that give tr A best where nothing else is wanted."""
    if groups_of(op):
        return _of_matrix(op)
    if alg is not None:
        return _asked(alg, "moments", Moments, op, samples, rng)
    known = exactly(op) if samples is None else None
    if known is not None:
        return known
    if isinstance(op, GramOperator):
        return growing(op, rng, only_trace)(count_of(samples))
    return _asked(XTrace(), "moments", Moments, op, samples, rng)


def trace_of(op: Operator, samples: int | None, rng: Random, alg: Estimator | None) -> Estimate:
    """tr A alone."""
    if alg is None or groups_of(op):
        return moments_of(op, samples, rng, None, True).trace
    return _asked(alg, "trace", Estimate, op, samples, rng)


def offered(alg: Estimator, what: str, op: Operator) -> tuple[Callable[..., Any], Any] | None:
    """The method of an estimator that gives "trace" or "moments" of A, and A or its factor as it takes it."""
    if isinstance(alg, type) or not isinstance(alg, TraceEstimator | FactorTraceEstimator):
        raise TypeError(
            f"alg is {alg!r}, expected an object with trace(...) or trace_product(...), such as kp.solvers.XTrace()"
        )
    if isinstance(op, GramOperator) and (method := getattr(alg, f"{what}_product", None)):
        return method, sides_of(op)
    if isinstance(alg, TraceEstimator) and (method := getattr(alg, what, None)):
        return method, (on_rows(op), op.domain.size)
    return None


def _asked(alg: Estimator, what: str, result: Any, op: Operator, samples: int | None, rng: Random) -> Any:
    """What an estimator says of an operator."""
    offer, name = offered(alg, what, op), type(alg).__name__
    if offer is None and not isinstance(alg, TraceEstimator) and not isinstance(op, GramOperator):
        raise TypeError(f"{name} estimates A = J J* from J and J*, and {op!r} has no factor; take XTrace()")
    if offer is None:
        raise TypeError(
            f"{name} gives tr A alone: it has no method moments, or moments_product, which gives |A|_F^2 as well; add "
            "it (kp.solvers.TraceEstimator says how), or take XTrace()"
        )
    method, operator = offer
    return called(method, result, *operator, count_of(samples), like=op.domain.like, seed=rng)


def exactly(op: Operator) -> Moments | None:
    if isinstance(op, MatrixOperator):
        return _of_matrix(op)
    spectrum = op.spectrum() if isinstance(op, CoreOperator) else None
    if spectrum is not None:
        values, counts = spectrum
        return exact(np.array([counts @ values, counts @ values**2]), 0, "exact: spectrum of V^T V")
    smaller = smaller_of(op)
    if smaller.domain.size > CHEAP:
        return None
    return Dense().moments(on_rows(smaller), smaller.domain.size, like=smaller.domain.like)


def _of_matrix(op: Operator) -> Moments:
    """tr A and |A|_F^2 of a matrix, or of one that was estimated from groups of probes."""
    rows = _flat(op)
    traces = rows[:, :: op.domain.size + 1].sum(1)
    return _of_groups(np.stack([(traces[:, None] + traces) / 2, rows @ rows.T]), [op])


def of_matrices(a: Operator, b: Operator) -> Moments:
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
    return of_pairs(pairs, sum(_spent_on(op) for op in ops), "products of groups of probes", eps_of(ops[0].domain.like))


def groups_of(op: Operator) -> list[Array]:
    return op.groups if isinstance(op, PartialTrace) else []


def _spent_on(op: Operator) -> int:
    """The applications behind a matrix: its probes, or none where it was given."""
    if isinstance(op, MatrixOperator):
        return op.applications if isinstance(op, PartialTrace) and op.groups else 0
    return op.domain.size


def _flat(op: Operator) -> np.ndarray:
    """The matrix, or what each group of probes gave for it, as rows [group, entry]."""
    matrices = groups_of(op) or [to_double(euclidean_matrix(op))]
    return np.stack([to_numpy(matrix).reshape(-1) for matrix in matrices])


def count_of(samples: int | None) -> int:
    """How many applications an estimate takes."""
    samples = SAMPLES if samples is None else samples
    check_samples(samples)
    return samples
