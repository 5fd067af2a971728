"""Scalars against dense matrices: exact where cheap, unbiased with covering error bars elsewhere."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import cases
from synthetic import (
    LIBRARIES,
    as_array,
    assert_close,
    diagonal,
    eager_library,
    factor,
    library,
    matrix,
    parameters,
    space,
    spectra,
    spread_over_trials,
    with_trials_apart,
)

import kpflow_dyn as kp
from kpflow_dyn._arrays import Random, to_numpy
from kpflow_dyn._numbers.estimate import scalars
from kpflow_dyn._numbers.trials_apart import TrialsApart
from kpflow_dyn._spaces.rows import CHEAP, euclidean_matrix

__all__ = ["eager_library", "library"]

RUNS = 200


def dense(op: kp.Operator) -> np.ndarray:
    """The matrix in coordinates where the inner products are plain."""
    form = op.to_scipy()
    return form @ np.eye(op.domain.size)


def truths(op: kp.Operator) -> dict[str, float]:
    A = dense(op)
    square = np.sum(A**2)
    return {"trace": np.trace(A), "frobenius_norm": square**0.5, "effective_rank": np.trace(A) ** 2 / square}


SCALARS = ["trace", "frobenius_norm", "effective_rank"]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", SCALARS)
def test_small_operators_are_exact(eager_library, name, weighted):
    state, theta = space(eager_library, weighted=weighted), parameters(eager_library)
    for op in (kp.GramOperator(factor(state, theta)), kp.GramOperator(factor(state, theta).T)):
        estimate = getattr(kp, name)(op)
        assert estimate.value == pytest.approx(truths(op)[name], rel=1e-10) and estimate.stderr == 0
        assert estimate.method.startswith("exact") and estimate.applications == theta.size
        assert float(estimate) == estimate.value


@pytest.mark.parametrize("name", SCALARS)
def test_a_matrix_is_exact_at_any_size_and_free(name):
    line = kp.Space(("time",), (CHEAP + 50,), np.zeros(1), np.linspace(1, 2, CHEAP + 50))
    values = np.arange(1.0, line.size + 1)
    op = kp.MatrixOperator(np.diag(values), line, line)
    estimate = getattr(kp, name)(op)
    assert estimate.value == pytest.approx(truths(op)[name]) and estimate.applications == 0 and estimate.stderr == 0


def test_the_core_is_exact_from_its_spectrum():
    from kpflow_dyn._flows.sites import CoreOperator

    class Known(CoreOperator):
        def spectrum(self):
            return np.array([3.0, 1.0]), np.array([100, 1000])

    n = 2 * CHEAP
    line = kp.Space(("site",), (n,), np.zeros(1))
    core = Known(kp.Operator(line, line, lambda q: q, None), [])
    assert kp.trace(core).value == 1300 and kp.frobenius_norm(core).value == pytest.approx(1900**0.5)
    assert kp.effective_rank(core).value == pytest.approx(1300**2 / 1900)
    assert kp.trace(core).applications == 0 and "V^T V" in kp.trace(core).method


@pytest.mark.parametrize("spectrum", cases(spectra(200), {"power", "flat"}))
@pytest.mark.parametrize("name", SCALARS)
def test_estimates_are_unbiased_and_their_error_bars_cover(name, spectrum):
    values = spectra(200)[spectrum]
    op, truth = diagonal(values), truths(kp.MatrixOperator(np.diag(values), *[diagonal(values).domain] * 2))[name]
    runs = [getattr(kp, name)(op, samples=100, seed=seed) for seed in range(RUNS)]
    assert {run.applications for run in runs} == {100} and all(run.stderr > 0 for run in runs)
    errors, bars = np.array([[run.value - truth, run.stderr] for run in runs]).T
    assert 0.90 <= np.mean(np.abs(errors) <= 1.96 * bars) <= 0.99
    assert abs(errors.mean()) < 4 * errors.std() / RUNS**0.5
    assert np.sqrt(np.mean(errors**2)) < 0.05 * truth


@pytest.mark.parametrize("name", SCALARS)
def test_error_bars_cover_for_operators_without_a_factor(name):
    """A product P K P*, not known to be positive by its type, and P itself, which is not symmetric."""
    line = kp.Space(("state",), (60,), np.zeros(1))
    J = kp.MatrixOperator(matrix(line, line) / 8, line, line)
    running = kp.Operator(line, line, lambda q: q.cumsum(-1), lambda q: q[:, ::-1].cumsum(-1)[:, ::-1])
    for op in (running @ kp.GramOperator(J) @ running.T, running):
        positive = op if op is not running else kp.GramOperator(op)
        truth = truths(positive if name == "effective_rank" else op)[name]
        runs = [getattr(kp, name)(op, samples=30, seed=seed) for seed in range(RUNS // 2)]
        errors, bars = np.array([[run.value - truth, run.stderr] for run in runs]).T
        assert 0.89 <= np.mean(np.abs(errors) <= 1.96 * bars) <= 0.99
        assert abs(errors.mean()) < 4 * errors.std() / len(runs) ** 0.5


def test_the_trace_of_a_flat_kernel_comes_from_each_trial_by_itself():
    state = space(shape=(10, 5, 12))
    op = with_trials_apart(state, parameters(size=590))
    truth = truths(op)["trace"]
    runs = [kp.trace(op, samples=20, seed=seed) for seed in range(RUNS)]
    errors, bars = np.array([[run.value - truth, run.stderr] for run in runs]).T
    assert 0.90 <= np.mean(np.abs(errors) <= 1.96 * bars) <= 0.99 and abs(errors.mean()) < 4 * errors.std() / RUNS**0.5
    shared = [kp.trace(kp.GramOperator(op.factor), samples=20, seed=seed).value - truth for seed in range(RUNS)]
    assert errors.std() < 0.6 * np.std(shared)
    assert runs[0].method == "one-sided probes, each trial apart" and runs[0].applications == 20
    assert kp.effective_rank(kp.GramOperator(op.factor), samples=20).method == "XNysTrace"


@pytest.mark.parametrize("spectrum", cases(spectra(240), {"power", "flat"}))
@pytest.mark.parametrize("trials", [4, 60])
def test_scalars_of_several_trials_cover_and_take_fewer_applications(trials, spectrum):
    """Leading directions, and each trial apart for the rest, beside the sketch of as many applications."""
    values = spectra(240)[spectrum]
    op = spread_over_trials(space(shape=(trials, 240 // trials, 2)), values)
    truth = values.sum() ** 2 / (values**2).sum()
    runs = [scalars(op, 16, seed) for seed in range(RUNS)]
    assert {run.norm.applications for run in runs} == {16}
    for name, value in (("trace", values.sum()), ("norm", (values**2).sum() ** 0.5), ("effective_rank", truth)):
        found = [getattr(run, name) for run in runs]
        errors, bars = np.array([[each.value - value, each.stderr] for each in found]).T
        assert np.mean(np.abs(errors) <= 1.96 * bars) >= 0.89, name
        assert abs(errors.mean()) < 4 * errors.std() / RUNS**0.5, name
        assert bars.mean() < 1.5 * errors.std(), name
    if spectrum in ("power", "exponential"):
        sketch = [scalars(kp.GramOperator(op.factor), 16, seed).effective_rank.value - truth for seed in range(RUNS)]
        assert errors.std() < np.std(sketch) / (3 if trials > 4 else 1.3)


def test_the_effective_rank_of_many_trials_stops_early_and_its_bar_covers():
    values = np.arange(1, 601) ** -0.5
    op = spread_over_trials(space(shape=(60, 10, 2)), values)
    truth = values.sum() ** 2 / (values**2).sum()
    runs = [kp.effective_rank(op, rtol=0.02, seed=seed, samples=16) for seed in range(RUNS)]
    assert all(run.stderr <= 0.02 * run.value for run in runs)
    assert np.mean([abs(run.value - truth) <= 1.96 * run.stderr for run in runs]) >= 0.89
    spent = [run.applications for run in runs]
    assert (
        np.mean(spent) < 25 and kp.effective_rank(kp.GramOperator(op.factor), rtol=0.02, samples=16).applications > 60
    )
    within = kp.effective_rank(op, samples=100)
    assert abs(within.value - truth) < 4 * within.stderr < 0.04 * truth


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_library_finds_the_scalars_of_several_trials(library, dtype):
    values = np.arange(1, 101) ** -0.5
    op = spread_over_trials(space(library, dtype, (10, 10, 2)), values)
    found = scalars(op, 24)
    for each, value in (
        (found.trace, values.sum()),
        (found.norm, (values**2).sum() ** 0.5),
        (found.effective_rank, values.sum() ** 2 / (values**2).sum()),
    ):
        assert "each trial apart" in each.method and abs(each.value - value) < 4 * each.stderr < 0.1 * value


def test_trials_are_added_up_to_groups_where_there_are_many_or_little_memory():
    op = spread_over_trials(space(shape=(60, 10, 2)), np.arange(1, 601) ** -0.5)
    seen = []
    for size in (None, 4 * 50 * 600 * 8):
        with contextlib.nullcontext() if size is None else kp.memory_budget(size):
            found = TrialsApart(op, Random(0))
            for samples in (16, 80):
                seen.append((found(samples).effective_rank, found.images[0].shape[:2]))
    assert [shape for _, shape in seen] == [(30, 8), (15, 20), (4, 8), (2, 20)]
    values = [rank.value for rank, _ in seen]
    assert np.ptp(values) < 4 * max(rank.stderr for rank, _ in seen)


def test_the_error_falls_with_the_samples():
    op = diagonal(np.arange(1, 401) ** -1.0)
    bars = [kp.effective_rank(op, samples=m).stderr for m in (40, 120, 360)]
    assert bars[0] > 2 * bars[1] > 4 * bars[2]


@pytest.mark.parametrize(
    ("spectrum", "rtol"), [("power", 3e-4), pytest.param("repeated", 0.004, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", cases(SCALARS, ["trace", "frobenius_norm"]))
def test_rtol_goes_on_until_the_bar_is_below_it_and_the_bar_still_covers(name, spectrum, rtol):
    values = spectra(400)[spectrum]
    op = diagonal(values)
    truth = truths(kp.MatrixOperator(np.diag(values), *[op.domain] * 2))[name]
    runs = [getattr(kp, name)(op, samples=16, seed=seed, rtol=rtol) for seed in range(RUNS)]
    errors, bars = np.array([[run.value - truth, run.stderr] for run in runs]).T
    assert all(run.stderr <= rtol * run.value for run in runs)
    assert 0.88 <= np.mean(np.abs(errors) <= 1.96 * bars) <= 0.99
    assert min(run.applications for run in runs) > 16


@pytest.mark.parametrize("rtol", [0.03, 0.015])
def test_the_trace_of_many_trials_stops_after_a_few_vectors_and_its_bar_covers(rtol):
    """The variances of ten trials add up: four vectors tell the error, and no more are drawn than the bar needs."""
    op = with_trials_apart(space(shape=(10, 5, 12)), parameters(size=590))
    truth = truths(op)["trace"]
    runs = [kp.trace(op, rtol=rtol, seed=seed) for seed in range(2 * RUNS)]
    assert all(run.stderr <= rtol * run.value for run in runs)
    assert 0.90 <= np.mean([abs(run.value - truth) <= 1.96 * run.stderr for run in runs]) <= 0.99
    assert min(run.applications for run in runs) >= 4 and np.mean([run.applications for run in runs]) < 30
    assert kp.trace(op, rtol=rtol).applications < kp.trace(op, rtol=rtol / 4).applications


@pytest.mark.parametrize("trials", [1, 3])
def test_the_trace_of_few_trials_begins_with_more_vectors_so_that_its_bar_covers(trials):
    op = with_trials_apart(space(shape=(trials, 50, 12)), parameters(size=590))
    truth = truths(op)["trace"]
    runs = [kp.trace(op, rtol=0.1, seed=seed) for seed in range(2 * RUNS)]
    assert 0.90 <= np.mean([abs(run.value - truth) <= 1.96 * run.stderr for run in runs]) <= 0.99
    assert min(run.applications for run in runs) >= 8


def test_one_number_is_exact_by_xtrace():
    op = kp.MatrixOperator(np.array([[3.0]]), *[kp.Space(("unit",), (1,), np.zeros(1))] * 2)
    found = kp.trace(op, samples=8, alg=kp.solvers.XTrace())
    assert found.value == pytest.approx(3) and found.stderr < 1e-12


def test_nothing_is_applied_twice_on_the_way_to_a_smaller_bar():
    halves, root = [], np.arange(1, 1001) ** -0.5
    line = kp.Space(("state",), (1000,), np.zeros(1))

    def counted(q):
        halves.append(len(q))
        return q * root

    op = kp.GramOperator(kp.Operator(line, line, counted, counted))
    found = kp.effective_rank(op, rtol=0.02)
    assert 16 < found.applications < 120 and sum(halves) == 2 * found.applications
    whole = kp.effective_rank(op, samples=found.applications)
    assert found.stderr <= 0.02 * found.value and whole.stderr == pytest.approx(found.stderr, rel=0.5)


def test_rtol_stops_at_the_most_applications_and_says_so():
    op = diagonal(np.ones(2 * CHEAP))
    with pytest.warns(UserWarning, match=r"after 140 applications the standard error is .* above rtol = 1e-06"):
        found = kp.effective_rank(op, samples=40, rtol=1e-6, max_applications=140)
    assert found.applications == 140 and found.stderr > 1e-6 * found.value
    rows, root = [], np.arange(1, 2 * CHEAP + 1) ** -0.15
    line = kp.Space(("state",), (2 * CHEAP,), np.zeros(1))
    plain = kp.Operator(line, line, lambda q: rows.append(len(q)) or root**2 * q, None)  # its sign is found out first
    with pytest.warns(UserWarning, match=r"after 450 applications the standard error"):
        found = kp.effective_rank(plain, rtol=1e-6, max_applications=450)
    assert found.applications == 450 >= sum(rows)
    with pytest.raises(ValueError, match="rtol is 0, expected a positive number"):
        kp.trace(op, rtol=0)
    assert kp.trace(diagonal(np.ones(5)), rtol=0.01).stderr == 0
    op = kp.GramOperator(factor(space(), parameters(size=20)))
    with pytest.warns(UserWarning, match="give kp.partial_trace more samples"):
        kp.trace(kp.partial_trace(op, "time", samples=40), rtol=1e-6)


def test_a_large_operator_is_sampled_unless_a_side_is_small():
    values = np.arange(1.0, 2 * CHEAP) ** -2.0
    assert kp.trace(diagonal(values)).stderr > 0
    theta, state = parameters(size=4), space(shape=(10, 10, 20))
    gram = kp.GramOperator(factor(state, theta))
    assert kp.trace(gram).stderr == 0 and kp.trace(gram).applications == 4


@pytest.mark.parametrize("kind", ["gram", "callables"])
def test_more_samples_than_dimensions_are_exact(kind):
    op = kp.GramOperator(factor(space(), parameters(size=5)))
    op = op if kind == "gram" else kp.Operator(op.domain, op.domain, op.mv, None)
    for name in SCALARS:
        found = getattr(kp, name)(op, samples=100)
        assert found.value == pytest.approx(truths(op)[name]) and found.stderr < 1e-9 * found.value
    assert kp.alignment(op, op + op, samples=100).value == pytest.approx(1)
    kernel = kp.partial_trace(op, "time", samples=100)
    assert kp.effective_rank(kernel).stderr < (1e-9 if kind == "gram" else 1)


def test_effective_rank_is_of_the_operator_not_of_its_square():
    values = np.array([2.0, 1.0, 1.0])
    line = kp.Space(("unit",), (3,), np.zeros(1))
    own, square = 16 / 6, 36 / 18
    assert kp.effective_rank(kp.MatrixOperator(np.diag(values), line, line)).value == pytest.approx(own)
    assert kp.effective_rank(kp.Operator(line, line, lambda q: values * q, None)).value == pytest.approx(own)
    plain = kp.Operator(line, line, lambda q: values * q, lambda q: values * q)  # symmetric, but not flagged so
    assert kp.effective_rank(plain).value == pytest.approx(own)
    signed = kp.MatrixOperator(np.diag([2.0, -1.0, 1.0]), line, line, symmetric=True)
    assert kp.effective_rank(signed).value == pytest.approx(square)
    assert kp.effective_rank(kp.Operator(line, line, lambda q: q * [2, -1, 1], None)).value == pytest.approx(square)


@pytest.mark.parametrize("name", SCALARS)
@pytest.mark.parametrize("kind", ["gram", "callables"])
@pytest.mark.parametrize("samples", [8, 50])
def test_scalars_share_the_applications(name, kind, samples):
    op = diagonal(spectra(200)["exponential"])
    op = op if kind == "gram" else kp.Operator(op.domain, op.domain, op.mv, None)
    found, alone = (
        getattr(scalars(op, samples), {"frobenius_norm": "norm"}.get(name, name)),
        getattr(kp, name)(op, samples),
    )
    if kind == "gram":
        assert found == alone and found.applications == samples
    assert abs(found.value - truths(op)[name]) < 5 * found.stderr


def kernels(name: str) -> tuple[kp.GramOperator, np.ndarray]:
    """J J* on [time, unit] and its partial trace on time, diagonal with this spectrum."""
    spectrum = {"flat": np.ones(40), "nearly flat": np.linspace(0.6, 1.4, 40), "power": np.arange(1, 41) ** -1.0}[name]
    state = kp.Space(("time", "unit"), (40, 5), np.zeros(1))
    root = np.sqrt(np.repeat(spectrum[:, None], 5, axis=1))
    return kp.GramOperator(kp.Operator(state, state, lambda q: root * q, None)), np.diag(5 * spectrum)


@pytest.mark.parametrize("samples", [10, 50])
@pytest.mark.parametrize("name", ["flat", "nearly flat", "power"])
def test_scalars_of_an_estimated_partial_trace_do_not_count_its_noise(name, samples):
    op, matrix = kernels(name)
    time = op.domain.keep(("time",))
    other = kp.MatrixOperator(matrix + np.diag(np.linspace(0, matrix[0, 0], 40)), time, time, symmetric=True)
    truth = truths(kp.MatrixOperator(matrix, time, time))
    truth["alignment"] = np.sum(matrix * other.matrix) / truth["frobenius_norm"] / np.linalg.norm(other.matrix)
    found = [kp.partial_trace(op, "time", samples, seed) for seed in range(RUNS)]
    runs = {scalar: [getattr(kp, scalar)(kernel) for kernel in found] for scalar in SCALARS}
    runs["alignment"] = [kp.alignment(kernel, other) for kernel in found]
    for scalar, estimates in runs.items():
        errors, bars = np.array([[run.value - truth[scalar], run.stderr] for run in estimates]).T
        assert 0.90 <= np.mean(np.abs(errors) <= 1.96 * bars) <= 0.99, scalar
        assert abs(errors.mean()) < 4 * errors.std() / RUNS**0.5, scalar
        assert {run.applications for run in estimates} == {found[0].applications}
    plain = [truths(kp.MatrixOperator(kernel.matrix, time, time))["effective_rank"] for kernel in found]
    if name != "power":
        assert np.mean(plain) - truth["effective_rank"] < -5 * np.mean([run.stderr for run in runs["effective_rank"]])


def test_two_estimated_partial_traces_are_compared_with_an_error():
    op, _ = kernels("nearly flat")
    a, b = (kp.partial_trace(op, "time", samples=40, seed=seed) for seed in (0, 1))
    runs = [kp.alignment(a, a), kp.alignment(a, b), kp.alignment(b, kp.partial_trace(op, "time"))]
    assert runs[0].value == pytest.approx(1)
    assert all(abs(run.value - 1) <= 5 * run.stderr + 1e-9 for run in runs) and runs[1].stderr > 0
    lazy = kp.marginal(op, "time")  # the same here but for a factor
    found = kp.alignment(a, lazy, samples=100)
    assert abs(found.value - 1) <= 5 * found.stderr and found.applications == a.applications + 40
    with pytest.raises(ValueError, match="come from 20 and 10 groups of probes; give both 20 samples or more"):
        kp.alignment(a, kp.partial_trace(op, "time", samples=10))


def test_estimates_without_a_factor_are_positive_up_to_their_noise_or_refused():
    op, matrix = kernels("nearly flat")
    plain = kp.Operator(op.domain, op.domain, op.mv, None)
    truth = kp.effective_rank(kp.MatrixOperator(matrix, *[op.domain.keep(("time",))] * 2)).value
    kernel = kp.partial_trace(plain, "time", samples=40)
    assert np.linalg.eigvalsh(kernel.matrix)[0] > 0
    found = kp.effective_rank(kernel)
    assert abs(found.value - truth) < 4 * found.stderr
    signed = kp.Operator(op.domain, op.domain, lambda q: -op.mv(q), None)
    with pytest.raises(ValueError, match="is not positive semi-definite, so that its effective rank is not known"):
        kp.effective_rank(kp.partial_trace(signed, "time", samples=40))


def test_zero_and_identity():
    zero = diagonal(np.zeros(30))
    for samples in (None, 20):
        assert kp.trace(zero, samples=samples).value == 0 == kp.effective_rank(zero, samples=samples).value
        assert kp.frobenius_norm(zero, samples=samples).value == 0
    assert kp.effective_rank(diagonal(np.ones(30))).value == pytest.approx(30)
    one = diagonal(np.eye(30)[0])
    assert kp.effective_rank(one, samples=20).value == pytest.approx(1)


@pytest.mark.parametrize("weighted", [False, True])
def test_exact_alignment_is_the_cosine_of_the_matrices(library, weighted):
    state, theta = space(library, weighted=weighted), parameters(library)
    a, b = kp.GramOperator(factor(state, theta)), kp.GramOperator(factor(state, theta, 1))
    A, B = dense(a), dense(b)
    expected = np.sum(A * B) / np.linalg.norm(A) / np.linalg.norm(B)
    estimate = kp.alignment(a, b)
    assert estimate.value == pytest.approx(expected, rel=1e-10) and estimate.stderr == 0
    assert kp.alignment(a, a).value == pytest.approx(1)
    assert kp.alignment(a, -1.0 * a).value == pytest.approx(-1)
    matrices = [kp.partial_trace(op, ("trial", "time", "unit")) for op in (a, b)]
    assert kp.alignment(*matrices).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("kind", ["generic", "rectangular", "same"])
def test_sampled_alignment_covers(kind):
    line, theta = kp.Space(("state",), (50,), np.zeros(1)), parameters(size=40)
    J, other = factor(line, theta), factor(line, theta, 1)
    a, b = {
        "generic": (kp.GramOperator(J), kp.GramOperator(J + 0.5 * other)),
        "rectangular": (J, J + other),
        "same": (kp.GramOperator(J), 3 * kp.GramOperator(J)),
    }[kind]
    A, B = dense(a), dense(b)
    truth = np.sum(A * B) / np.linalg.norm(A) / np.linalg.norm(B)
    runs = [kp.alignment(a, b, samples=100, seed=seed) for seed in range(RUNS)]
    assert {run.applications for run in runs} == {200}
    errors, bars = np.array([[run.value - truth, run.stderr] for run in runs]).T
    if kind == "same":
        assert np.abs(errors).max() < 1e-12
        return
    assert 0.90 <= np.mean(np.abs(errors) <= 1.96 * bars) <= 0.99
    assert abs(errors.mean()) < 4 * errors.std() / RUNS**0.5


def test_rayleigh_quotient(eager_library):
    state, theta = space(eager_library, weighted=True), parameters(eager_library)
    op = kp.GramOperator(factor(state, theta))
    q = state.normal(1, Random(0))[0]
    expected = float(state.inner(q, op.mv(q)) / state.inner(q, q))
    assert kp.rayleigh(op, q).value == pytest.approx(expected) and kp.rayleigh(op, q).applications == 1
    top = kp.eigs(op, 1)
    assert kp.rayleigh(op, top.vectors[0]).value == pytest.approx(float(top.values[0]))
    assert expected < float(top.values[0])


def test_same_seed_same_estimate(eager_library):
    op = diagonal(spectra(200)["power"], eager_library)
    first, again, other = (kp.trace(op, samples=40, seed=seed) for seed in (5, 5, 6))
    assert first == again and first.value != other.value


def test_float32_agrees_with_float64_and_keeps_a_floor():
    values = spectra(200)["power"]
    single, double = (kp.effective_rank(diagonal(values, dtype=dtype), samples=60) for dtype in ("float32", "float64"))
    assert single.value == pytest.approx(double.value, rel=1e-3)
    low_rank = kp.trace(diagonal(np.r_[1.0, np.zeros(199)], dtype="float32"), samples=40)
    assert abs(low_rank.value - 1) <= 2 * low_rank.stderr < 1e-5


@pytest.mark.skipif("torch" not in LIBRARIES, reason="torch is not installed")
def test_euclidean_matrix_is_symmetric_for_a_symmetric_operator(library):
    state = space(library, weighted=True)
    matrix = kp.partial_trace(kp.GramOperator(factor(state, parameters(library))), keep=("time", "unit"))
    plain = to_numpy(euclidean_matrix(matrix))
    assert_close(plain, plain.T)
    assert np.abs(to_numpy(matrix.matrix) - to_numpy(matrix.matrix).T).max() > 1e-3


def test_what_is_not_defined_is_refused():
    state, theta = space(), parameters()
    J, gram = factor(state, theta), kp.GramOperator(factor(state, theta))
    with pytest.raises(ValueError, match="a trace needs an operator from a space to itself"):
        kp.trace(J)
    with pytest.raises(ValueError, match="give at least 8"):
        kp.trace(gram, samples=4)
    with pytest.raises(ValueError, match="between the same spaces"):
        kp.alignment(J, gram)
    with pytest.raises(ValueError, match="zero operator"):
        kp.alignment(gram, 0.0 * gram)
    with pytest.raises(ValueError, match="zero vector"):
        kp.rayleigh(gram, np.zeros(state.shape))
    with pytest.raises(ValueError, match="expected one vector"):
        kp.rayleigh(gram, np.zeros((1, *state.shape)))
    with pytest.raises(ValueError, match="a Rayleigh quotient needs"):
        kp.rayleigh(J, np.zeros(theta.shape))


def test_one_trial_that_counts_alone_is_left_to_a_sketch() -> None:
    """Errors of trials do not average out where there is one."""
    rng = np.random.default_rng(0)
    states, like = space(shape=(9, 10, 2)), np.zeros(1)
    of_trials, weights = (kp.Space(("trial", "parameter")[-len(n) :], n, like) for n in ((9, 30), (30,)))
    own = rng.normal(size=(9, 20, 30)) * np.where(np.arange(9) == 4, 1.0, 1e-4)[:, None, None] * 0.7 ** np.arange(30)
    apart = kp.MatrixOperator(scipy.linalg.block_diag(*own), of_trials, states)
    op = kp.GramOperator(kp.MatrixOperator(own.reshape(180, 30), weights, states), apart=apart)
    truth = np.linalg.norm(own.reshape(180, 30) @ own.reshape(180, 30).T)
    runs = [kp.frobenius_norm(op, samples=16, seed=seed) for seed in range(100)]
    assert np.mean([abs(run.value - truth) <= 1.96 * run.stderr for run in runs]) > 0.88


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_alignment_where_few_entries_count_is_that_of_the_matrices(library, dtype):
    """As under a mask of the last step: more probes than entries, so that some are round-off of the others."""
    state, theta = space(library, dtype, shape=(32, 20, 1)), parameters(library, dtype, size=100)
    keep = as_array(library, (np.arange(640) % 20 == 19).astype(float)[:, None], dtype)
    a, b = (kp.GramOperator(kp.MatrixOperator(keep * matrix(state, theta, n), theta, state)) for n in range(2))
    A, B = dense(a), dense(b)
    found = kp.alignment(a, b, samples=120)
    expected = np.sum(A * B) / np.linalg.norm(A) / np.linalg.norm(B)
    assert found.value == pytest.approx(expected, rel=1e-10 if dtype == "float64" else 1e-5)


def test_masked_flows_are_compared_with_more_probes_than_entries():
    torch.manual_seed(0)
    x, mask = torch.randn(5, 6, 3).double(), (torch.rand(5, 6) > 0.5).double()
    problems = [kp.DiscreteProblem(torch.nn.GRUCell(3, 4).double(), x) for _ in range(2)]
    a, b = (kp.linearize(kp.solve(problem)).where(mask).ntk for problem in problems)
    assert kp.alignment(a, b, samples=400).value == pytest.approx(kp.alignment(a, b).value, rel=1e-10)
