"""Schmidt ranks against singular values of the rearranged matrix."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import OPERATORS, eager_library, factor, library, parameters, space

import kpflow_dyn as kp

__all__ = ["eager_library", "library"]

CUTS = ["trial", "time", "unit", ("trial", "unit")]


def defined(op: kp.Operator, keep: tuple[str, ...]) -> float:
    """By its definition: the rearranged matrix entry by entry."""
    A, axes = (op.to_scipy() @ np.eye(op.domain.size)).reshape(op.domain.shape * 2), op.domain.axes
    kept = [axes.index(name) for name in keep]
    dropped = [i for i in range(3) if i not in kept]
    order = [*kept, *(3 + i for i in kept), *dropped, *(3 + i for i in dropped)]
    size = np.prod([op.domain.shape[i] for i in kept])
    s = np.linalg.svd(A.transpose(order).reshape(int(size**2), -1), compute_uv=False)
    return float((s**2).sum() ** 2 / (s**4).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keep", CUTS)
def test_small_operators_are_exact(library, keep, weighted):
    state, theta = space(library, weighted=weighted), parameters(library)
    names = (keep,) if isinstance(keep, str) else keep
    for name in ("matrix", "gram", "product"):
        op = OPERATORS[name](state, theta)
        found = kp.schmidt_rank(op, keep)
        assert found.value == pytest.approx(defined(op, names), rel=1e-10) and found.stderr == 0
        rest = tuple(axis for axis in state.axes if axis not in names)
        assert kp.schmidt_rank(op, rest).value == pytest.approx(found.value, rel=1e-10)


def test_a_product_has_rank_one_and_a_sum_of_two_orthogonal_ones_two():
    state = space(shape=(2, 3, 4))
    B, C = np.diag([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), np.diag([1.0, -1.0, 1.0, -1.0])
    other = np.diag([0.0, 0.0, 1.0, 1.0, 0.0, 0.0]), np.eye(4)
    one = kp.MatrixOperator(np.kron(B, C), state, state)
    two = kp.MatrixOperator(np.kron(B, C) + np.kron(*other), state, state)
    assert kp.schmidt_rank(one, "unit").value == pytest.approx(1)
    assert kp.schmidt_rank(two, "unit").value == pytest.approx(2)


@pytest.mark.parametrize("size", [3, 40])
@pytest.mark.parametrize("keep", ["time", "unit"])
def test_estimates_are_near_and_their_error_bars_cover(eager_library, keep, size):
    op = kp.GramOperator(factor(space(eager_library, weighted=True), parameters(eager_library, size=size)))
    truth = defined(op, (keep,))
    runs = [kp.schmidt_rank(op, keep, samples=16, seed=seed) for seed in range(100)]
    errors, bars = np.array([[run.value - truth, run.stderr] for run in runs]).T
    if size == 3:
        assert np.abs(errors).max() < 1e-9 * truth  # the leading range is the whole of it
        return
    assert np.mean(np.abs(errors) <= 1.96 * bars) >= 0.9
    assert np.abs(errors.mean()) < max(4 * errors.std() / 10, 0.05 * truth) and errors.std() < 0.5 * truth
    assert {run.applications for run in runs} == {4 + 8}


def test_more_probes_are_better():
    op = kp.GramOperator(factor(space(), parameters(size=40)))
    truth = defined(op, ("time",))
    errors = [
        np.mean([abs(kp.schmidt_rank(op, "time", samples=count, seed=seed).value - truth) for seed in range(20)])
        for count in (8, 24)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_what_is_not_defined_is_refused():
    state, theta = space(), parameters()
    op = OPERATORS["gram"](state, theta)
    for keep in ((), ("trial", "time", "unit")):
        with pytest.raises(ValueError, match="expected some but not all of the axes"):
            kp.schmidt_rank(op, keep)
    with pytest.raises(ValueError, match="expected distinct names"):
        kp.schmidt_rank(op, "neuron")
    with pytest.raises(ValueError, match="give at least 8"):
        kp.schmidt_rank(op, "time", samples=4)
    with pytest.raises(ValueError, match=r"estimates need A = J J\*.*op @ op.T"):
        kp.schmidt_rank(OPERATORS["matrix"](state, theta), "time", samples=16)
    with pytest.raises(ValueError, match="zero operator"):
        kp.schmidt_rank(0.0 * op, "time")
    with pytest.raises(ValueError, match="from a space to itself"):
        kp.schmidt_rank(factor(state, theta), "time")
