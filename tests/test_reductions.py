"""Partial traces and marginals against their dense definitions, for every subset of axes."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from synthetic import (
    as_array,
    assert_close,
    check_apart,
    eager_library,
    factor,
    library,
    matrix,
    parameters,
    space,
    with_trials_apart,
)

import kpflow_dyn as kp
from kpflow_dyn._arrays import Random, to_numpy
from kpflow_dyn._numbers.reductions import partial_traces, sampling
from kpflow_dyn._spaces.rows import CHEAP, euclidean_matrix

__all__ = ["eager_library", "library"]

AXES = ("trial", "time", "unit")
SUBSETS = [names for r in range(4) for names in combinations(AXES, r)]
LETTERS = {"trial": "b", "time": "t", "unit": "u"}


def defined(op: kp.Operator, keep: tuple[str, ...], how: str) -> np.ndarray:
    """The reduction by its definition, as an einsum over the dense matrix."""
    A = to_numpy(op.dense()).reshape(op.domain.shape * 2)
    rows, dropped = "btu", [name for name in AXES if name not in keep]
    columns = "".join(LETTERS[a].upper() if a in keep or how == "marginal" else LETTERS[a] for a in AXES)
    kept = "".join(LETTERS[a] for a in AXES if a in keep)
    total = np.einsum(f"{rows}{columns}->{kept}{kept.upper()}", A)
    size = int(np.prod([n for a, n in zip(AXES, op.domain.shape, strict=True) if a in keep]))
    count = int(np.prod([op.domain.shape[AXES.index(a)] for a in dropped])) if how == "marginal" else 1
    return total.reshape(size, size) / count


def generic(library="numpy", weighted=False) -> kp.MatrixOperator:
    state = space(library, weighted=weighted)
    return kp.MatrixOperator(matrix(state, state), state, state)


def gram(library="numpy", size=5, weighted=False) -> kp.GramOperator:
    return kp.GramOperator(factor(space(library, weighted=weighted), parameters(library, size=size)))


@pytest.mark.parametrize("keep", SUBSETS)
def test_both_reductions_equal_their_definitions(eager_library, keep):
    for op in (generic(eager_library), gram(eager_library, 5), gram(eager_library, 40)):
        traced, averaged = kp.partial_trace(op, keep=keep), kp.marginal(op, keep=keep)
        assert_close(traced.matrix, defined(op, keep, "partial trace"))
        assert_close(averaged.dense(), defined(op, keep, "marginal"))
        assert traced.domain.axes == averaged.domain.axes == keep
        assert traced.symmetric == averaged.symmetric == op.symmetric
        assert not to_numpy(traced.stderr).any() and traced.method == "exact"


def test_reductions_on_every_library(library):
    op = gram(library)
    assert_close(kp.partial_trace(op, keep="time").matrix, defined(op, ("time",), "partial trace"))
    assert_close(kp.marginal(op, keep="time").dense(), defined(op, ("time",), "marginal"))


@pytest.mark.parametrize("keep", [names for names in SUBSETS if len(names) < 3])
def test_the_two_are_never_the_same(keep):
    op = gram()
    assert np.abs(kp.partial_trace(op, keep).matrix - kp.marginal(op, keep).dense()).max() > 0.1


@pytest.mark.parametrize("keep", SUBSETS)
def test_with_a_measure_symmetry_and_trace_survive(keep):
    op = gram(weighted=True)
    traced, averaged = kp.partial_trace(op, keep=keep), kp.marginal(op, keep=keep)
    assert kp.check_adjoint(traced) < 1e-12 and kp.check_adjoint(averaged) < 1e-12
    assert_close(traced.matrix, defined(op, keep, "partial trace"))
    assert kp.trace(traced).value == pytest.approx(kp.trace(op).value)
    copies = np.ones(op.domain.shape)
    weights = np.broadcast_to(op.domain.measure, op.domain.shape)
    if keep == ():
        expected = np.sum(weights * op.mv(copies)) / weights.sum()
        assert float(averaged.dense()[0, 0]) == pytest.approx(float(expected))


def test_a_measure_that_is_no_product_keeps_symmetry():
    weights = np.random.default_rng(0).uniform(0.5, 2, (2, 3, 1))
    state = kp.Space(AXES, (2, 3, 4), np.zeros(1), weights)
    op = kp.GramOperator(factor(state, parameters()))
    for keep in SUBSETS:
        assert kp.check_adjoint(kp.partial_trace(op, keep)) < 1e-12
        assert kp.check_adjoint(kp.marginal(op, keep)) < 1e-12
        assert kp.trace(kp.partial_trace(op, keep)).value == pytest.approx(kp.trace(op).value)


def test_order_of_names_is_that_of_the_space_and_a_string_is_one_name():
    op = gram()
    assert_close(kp.partial_trace(op, ("unit", "time")).matrix, kp.partial_trace(op, ("time", "unit")).matrix)
    assert_close(kp.partial_trace(op, "unit").matrix, kp.partial_trace(op, ("unit",)).matrix)
    assert kp.partial_trace(op, "unit").domain.axes == ("unit",)


def test_a_sampled_kernel_is_unbiased_positive_and_its_errors_cover():
    op, runs = gram(size=40), 200
    truth = defined(op, ("time",), "partial trace")
    found = [kp.partial_trace(op, keep="time", samples=40, seed=seed) for seed in range(runs)]
    errors = np.array([f.matrix - truth for f in found])
    bars = np.array([f.stderr for f in found])
    assert np.abs(errors.mean(0) / (errors.std(0) / runs**0.5)).max() < 4
    covered = np.mean(np.abs(errors) <= 1.96 * bars, axis=0)
    assert (covered > 0.88).all() and (covered < 1).all()
    assert all(np.linalg.eigvalsh(f.matrix)[0] > 0 for f in found)
    assert {f.applications for f in found} == {10 + 20} and found[0].method == "probes"


@pytest.mark.parametrize("symmetric", [False, True])
def test_without_a_factor_probes_are_unbiased_too(symmetric):
    state = space()
    A = matrix(state, state)
    A = A + A.T if symmetric else A
    op = kp.Operator(
        state, state, lambda q: (q.reshape(-1, 24) @ A.T).reshape(q.shape), None if symmetric else lambda q: q
    )
    op = op if symmetric else kp.MatrixOperator(A, state, state)
    truth = defined(op, ("unit",), "partial trace")
    errors = np.array([kp.partial_trace(op, "unit", samples=40, seed=s).matrix - truth for s in range(200)])
    assert np.abs(errors.mean(0) / (errors.std(0) / 200**0.5)).max() < 4
    one = kp.partial_trace(op, "unit", samples=40).matrix
    assert (np.abs(one - one.T).max() < 1e-12) == symmetric


def test_several_kernels_come_from_the_same_probes():
    state = space(shape=(6, 10, 20))
    calls: list[int] = []
    J = factor(state, parameters(size=900))

    def counted(w):
        calls.append(w.shape[0])
        return J.mv(w)

    op = kp.GramOperator(kp.Operator(J.domain, state, counted, J.T.mv))
    found = partial_traces(op, [(name,) for name in AXES], samples=50, seed=3)
    assert sum(calls) == sum(sampling(50)) == 12 + 60 and len(found[0].groups) == 20
    for name, kernel in zip(AXES, found, strict=True):
        assert_close(kernel.matrix, kp.partial_trace(op, name, samples=50, seed=3).matrix)
    assert len({round(float(np.trace(kernel.matrix)), 6) for kernel in found}) == 1


def test_the_matrix_is_never_formed():
    state = space(shape=(5, 10, 2 * CHEAP))
    largest: list[int] = []
    J = np.random.default_rng(0).standard_normal((300, state.size)) / 100

    def forward(w):
        largest.append(w.shape[0])
        return (w @ J).reshape((-1, *state.shape))

    theta = parameters(size=300)
    op = kp.GramOperator(kp.Operator(theta, state, forward, lambda q: q.reshape(-1, state.size) @ J.T))
    kernel = kp.partial_trace(op, keep="time")
    columns = J.reshape(300, 5, 10, -1)
    assert_close(kernel.matrix, np.einsum("pbtu,pbsu->ts", columns, columns), "float64")
    assert sum(largest) == 300 and kernel.applications == 150
    with pytest.raises(ValueError, match="GiB; keep fewer axes"):
        kp.partial_trace(op, keep=("trial", "time", "unit"))


def test_a_marginal_is_lazy_and_feeds_copies():
    op = gram()
    view = kp.marginal(op, keep="time")
    q = np.random.default_rng(0).standard_normal((4, 3))
    copies = np.broadcast_to(q[:, None, :, None], (4, 2, 3, 4))
    assert_close(view.mv(q), op.mv(copies).mean((1, 3)))


def test_same_seed_same_kernel(eager_library):
    op = gram(eager_library, 40)
    first, again, other = (kp.partial_trace(op, "time", samples=20, seed=seed).matrix for seed in (1, 1, 2))
    assert bool((first == again).all()) and not bool((first == other).any())


def test_float32_stays_float32_and_close(eager_library):
    state, theta = space(eager_library, "float32"), parameters(eager_library, "float32")
    wide = matrix(space(), parameters())
    op = kp.GramOperator(kp.MatrixOperator(as_array(eager_library, wide, "float32"), theta, state))
    kernel = kp.partial_trace(op, keep="unit")
    assert kernel.matrix.dtype == state.dtype
    expected = kp.partial_trace(kp.GramOperator(kp.MatrixOperator(wide, parameters(), space())), keep="unit")
    assert_close(kernel.matrix, expected.matrix, "float32")
    assert tuple(kernel.mv(kernel.domain.normal(2, Random(0))).shape) == (2, 4)


def test_what_is_not_defined_is_refused():
    op, J = gram(), factor(space(), parameters())
    for reduce in (kp.partial_trace, kp.marginal):
        with pytest.raises(ValueError, match=r"expected distinct names out of \('trial', 'time', 'unit'\)"):
            reduce(op, keep="neuron")
        with pytest.raises(ValueError, match="expected distinct names"):
            reduce(op, keep=("time", "time"))
        with pytest.raises(ValueError, match="from a space to itself"):
            reduce(J, keep="trial")
    with pytest.raises(ValueError, match="give at least 8"):
        kp.partial_trace(op, keep="time", samples=7)


def test_groups_of_probes_are_independent_estimates_of_one_size():
    op = gram(size=40, weighted=True)
    kernel, exact = (kp.partial_trace(op, keep="time", samples=samples) for samples in (33, None))
    assert len(kernel.groups) == 20 and not exact.groups
    assert_close(sum(kernel.groups) / 20, to_numpy(euclidean_matrix(kernel)))
    assert kernel.applications == 8 + 20


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_an_operator_of_low_rank_is_found_exactly_by_its_leading_directions(eager_library, rank):
    state, theta = space(eager_library), parameters(eager_library, size=40)
    three = parameters(size=3)
    low = matrix(space(), three)[:, :rank] @ matrix(three, parameters(size=40))[:rank]
    op = kp.GramOperator(kp.MatrixOperator(as_array(eager_library, low), theta, state))
    kernel = kp.partial_trace(op, keep="unit", samples=20)
    assert_close(kernel.matrix, kp.partial_trace(op, keep="unit").matrix)
    assert float(abs(kernel.stderr).max()) < 1e-9


def test_leading_directions_shrink_the_error():
    """Against the spread of u u^T with u = J xi and as many probes."""
    state, theta = space(shape=(4, 6, 10)), parameters(size=100)
    J = factor(state, theta).matrix * np.arange(1, 101) ** -1.5
    op, few = kp.GramOperator(kp.MatrixOperator(J, theta, state)), 60
    truth = kp.partial_trace(op, keep="time").matrix
    u = (np.random.default_rng(0).standard_normal((few, 100)) @ J.T).reshape(few, 4, 6, 10)
    plain = np.linalg.norm(np.einsum("pbtu,pbsu->ts", u, u) / few - truth)
    assert np.linalg.norm(kp.partial_trace(op, keep="time", samples=few).matrix - truth) < plain / 5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keep", ["time", "unit", ("time", "unit"), "trial"])
def test_probes_of_each_trials_own_are_unbiased_and_cover(eager_library, keep, weighted):
    """With a trial axis kept, they would lose what is between trials, and are not used."""
    op = with_trials_apart(space(eager_library, weighted=weighted), parameters(eager_library, size=40))
    check_apart(op)
    truth = to_numpy(kp.partial_trace(op, keep).matrix)
    found = [kp.partial_trace(op, keep=keep, samples=40, seed=seed) for seed in range(200)]
    errors = np.array([to_numpy(f.matrix) - truth for f in found])
    bars = np.array([to_numpy(f.stderr) for f in found])
    assert np.abs(errors.mean(0) / (errors.std(0) / 200**0.5)).max() < 4.5
    covered = np.mean(np.abs(errors) <= 1.96 * bars, axis=0)
    assert (covered > 0.85).all() and covered.mean() < 0.99
    assert {f.applications for f in found} == {10 + 20}


def test_probes_of_each_trials_own_leave_less_error():
    state = space(shape=(16, 3, 4))
    op = with_trials_apart(state, parameters(size=60))
    truth = kp.partial_trace(op, "unit").matrix
    apart, shared = (
        np.mean([np.linalg.norm(kp.partial_trace(a, "unit", 20, seed).matrix - truth) for seed in range(20)])
        for a in (op, kp.GramOperator(op.factor))
    )
    assert apart < 0.5 * shared


def test_kernels_across_and_inside_of_trials_in_one_pass():
    op = with_trials_apart(space(), parameters(size=40))
    found = partial_traces(op, AXES, samples=40, seed=1)
    assert {f.applications for f in found} == {10 + 40}
    for keep, kernel in zip(AXES, found, strict=True):
        truth = kp.partial_trace(op, keep).matrix
        assert (np.abs(kernel.matrix - truth) <= 6 * kernel.stderr).all()


def test_numbers_out_of_range_are_named() -> None:
    unit = kp.Space(("time", "unit"), (2, 3), np.zeros(1, "float32"))
    large = kp.MatrixOperator(np.full((6, 6), 3e38, "float32"), unit, unit)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"holds NaN or inf: .* take float64"):
        kp.partial_trace(large, keep="time")
