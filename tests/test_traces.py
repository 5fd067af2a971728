"""Trace estimators on operators with known moments: unbiased, with error bars that cover, on every array library."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import as_array, library, spectra

from kpflow_dyn._arrays import Array, Random, is_jax_array, is_torch_array
from kpflow_dyn.solvers import Hutchinson, HutchPlusPlus, KrylovDeflation, Moments, OneSided, XNysTrace, XTrace
from kpflow_dyn.solvers._moments import of_exchangeable, of_pairs, of_samples

__all__ = ["library"]

N = 100
GENERIC = np.random.default_rng(3).standard_normal((30, 30)) / np.arange(1, 31) + np.eye(30)
LOW = np.random.default_rng(4).standard_normal((30, 24)) / np.arange(1, 25)
OF_SQUARE = {"hutchinson": Hutchinson(), "hutch++": HutchPlusPlus(), "xtrace": XTrace()}
OF_FACTOR = {"one-sided": OneSided(), "xnystrace": XNysTrace(), "krylov": KrylovDeflation(block=4)}
SCALARS = ["trace", "norm", "effective_rank"]


def moments(name: str, matrix: np.ndarray, samples: int, seed: int = 0, like: str = "numpy") -> Moments:
    """Of a square matrix A, or for methods that need a factor of A = matrix matrix^T."""
    turned, straight = as_array(like, matrix.T), as_array(like, matrix)
    if name in OF_SQUARE:
        return OF_SQUARE[name].moments(lambda x: x @ turned, len(matrix), samples, like=straight, seed=seed)
    if name == "one-sided":
        return OneSided().moments(lambda x: x @ straight, len(matrix), samples, like=straight, seed=seed)
    halves = (lambda w: w @ turned, lambda q: q @ straight)
    return OF_FACTOR[name].moments(halves, matrix.shape, samples, like=straight, seed=seed)


def diagonal(name: str, values: np.ndarray, samples: int, seed: int) -> Moments:
    """Of a positive operator with this spectrum; normal probes make its eigenvectors as good as any."""
    if name in OF_SQUARE:
        return OF_SQUARE[name].moments(lambda x: x * values, len(values), samples, like=values, seed=seed)
    root = np.sqrt(values)
    half = lambda x: x * root  # noqa: E731
    if name == "one-sided":
        return OneSided().moments(half, len(values), samples, like=values, seed=seed)
    return OF_FACTOR[name].moments((half, half), (len(values),) * 2, samples, like=values, seed=seed)


def truth(matrix: np.ndarray) -> dict[str, float]:
    square = np.sum(matrix**2)
    return {"trace": np.trace(matrix), "norm": square**0.5, "effective_rank": np.trace(matrix) ** 2 / square}


@pytest.mark.parametrize("samples", [8, 13])
@pytest.mark.parametrize("name", [*OF_SQUARE, *OF_FACTOR])
def test_moments_are_unbiased(name, samples):
    """Of a matrix that is not symmetric, or the square of a factor with either side the longer one."""
    for matrix in [GENERIC] if name in OF_SQUARE else [LOW, LOW.T]:
        square = matrix if name in OF_SQUARE else matrix @ matrix.T
        runs = np.array([moments(name, matrix, samples, seed).means for seed in range(2000)])
        errors = runs - [np.trace(square), np.sum(square**2)]
        assert (np.abs(errors.mean(0)) < 4 * errors.std(0) / 2000**0.5).all()


@pytest.mark.parametrize("samples", range(8, 18))
def test_hutch_plus_plus_is_unbiased_at_every_count(samples):
    runs = [moments("hutch++", GENERIC, samples, seed) for seed in range(1000)]
    errors = np.array([run.means for run in runs]) - [np.trace(GENERIC), np.sum(GENERIC**2)]
    assert (np.abs(errors.mean(0)) < 4 * errors.std(0) / 1000**0.5).all()
    assert {run.applications for run in runs} == {samples}


@pytest.mark.parametrize("spectrum", spectra(N))
@pytest.mark.parametrize("name", [*OF_SQUARE, *OF_FACTOR])
def test_error_bars_cover(name, spectrum):
    values = spectra(N)[spectrum]
    expected = truth(np.diag(values))
    runs = [diagonal(name, values, 40, seed) for seed in range(500)]
    for scalar in SCALARS:
        found = [getattr(run, scalar) for run in runs]
        errors, bars = np.array([[run.value - expected[scalar], run.stderr] for run in found]).T
        assert {run.applications for run in found} == {40}
        if (name, spectrum) == ("xtrace", "flat"):
            assert np.abs(errors).max() < 1e-12 * expected[scalar]  # nothing but the length of a probe was unknown
            continue
        assert 0.90 <= np.mean(np.abs(errors) <= 1.96 * bars) <= 0.99, scalar
        assert abs(errors.mean()) < 4 * errors.std() / 500**0.5, scalar


@pytest.mark.parametrize("spectrum", ["power", "exponential"])
def test_what_builds_on_every_probe_is_better_at_the_same_price(spectrum):
    values = spectra(N)[spectrum]
    total = values.sum()
    error = {
        name: np.sqrt(np.mean([(diagonal(name, values, 40, seed).trace.value / total - 1) ** 2 for seed in range(60)]))
        for name in [*OF_SQUARE, *OF_FACTOR]
    }
    assert max(error["xnystrace"], error["xtrace"]) < 0.8 * error["hutch++"] < 0.8 * error["hutchinson"]


def test_on_a_flat_spectrum_one_side_is_best_for_the_trace():
    values = np.ones(4000)
    error = {
        name: np.std([diagonal(name, values, 20, seed).trace.value for seed in range(60)])
        for name in ["one-sided", "xnystrace", "hutchinson"]
    }
    assert error["one-sided"] < 0.85 * min(error["xnystrace"], error["hutchinson"])


@pytest.mark.parametrize("name", [*OF_SQUARE, *OF_FACTOR])
def test_every_library_gives_the_same(name, library, monkeypatch):
    """From the same probes: those of numpy are given to all."""
    matrix = GENERIC if name in OF_SQUARE else LOW
    monkeypatch.setattr("kpflow_dyn._arrays.Random.normal", numpy_numbers)
    expected, found = (moments(name, matrix, 12, like=like) for like in ("numpy", library))
    np.testing.assert_allclose(found.means, expected.means, rtol=1e-10)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-8)


def numpy_numbers(self: Random, shape: tuple[int, ...], like: Array) -> Array:
    rows = np.random.default_rng(self._next()).standard_normal(shape)
    return as_array("torch" if is_torch_array(like) else "jax" if is_jax_array(like) else "numpy", rows)


@pytest.mark.parametrize("name", [*OF_SQUARE, *OF_FACTOR])
def test_more_samples_than_the_range_and_the_zero_operator(name):
    low = np.random.default_rng(0).standard_normal((30, 3)) @ np.random.default_rng(1).standard_normal((3, 30))
    square = low if name in OF_SQUARE else low @ low.T
    found = moments(name, low, 40)
    if name not in ("hutchinson", "one-sided"):
        for scalar in SCALARS if name in OF_FACTOR else ["trace"]:
            assert getattr(found, scalar).value == pytest.approx(truth(square)[scalar], rel=1e-10)
            assert getattr(found, scalar).stderr < 1e-9 * abs(truth(square)[scalar])
    assert abs(found.norm.value - truth(square)["norm"]) <= 4 * found.norm.stderr + 1e-10 * found.norm.value
    zero = moments(name, 0 * low, 40)
    assert (zero.trace.value, zero.norm.value, zero.effective_rank.value) == (0, 0, 0)
    assert zero.trace.stderr == 0


def test_a_wide_and_a_tall_factor_have_the_same_moments():
    tall, wide = moments("xnystrace", LOW, 12, 1), moments("xnystrace", LOW.T, 12, 1)
    np.testing.assert_allclose(tall.means, wide.means)


def test_single_precision_accumulates_in_double():
    values = np.full(200_000, 1.0, "float32")
    found = OneSided().moments(lambda x: x * values, len(values), 10, like=values)
    assert found.trace.value == pytest.approx(200_000, rel=0.01) and found.means.dtype == np.float64


@pytest.mark.parametrize("name", [*OF_SQUARE, *OF_FACTOR])
def test_too_few_samples_are_refused(name):
    with pytest.raises(ValueError, match="samples = 7 is too few for an error bar; give at least 8"):
        moments(name, GENERIC, 7)
    with pytest.raises(ValueError, match="block is 0"):
        KrylovDeflation(block=0)


def test_same_seed_same_moments():
    for name in [*OF_SQUARE, *OF_FACTOR]:
        first, again, other = (moments(name, GENERIC, 12, seed).means for seed in (1, 1, 2))
        assert (first == again).all() and (first != other).all()


# The covariances of the three kinds of means


def covered(make, expected: np.ndarray, runs: int = 2000) -> None:
    """Unbiased means, with covariances that are so on average."""
    found = [make(np.random.default_rng(seed)) for seed in range(runs)]
    means, claimed = np.array([f.means for f in found]), np.mean([f.covariance for f in found], axis=0)
    assert (np.abs(means.mean(0) - expected) < 4 * means.std(0) / runs**0.5).all()
    true = np.cov(means.T)
    assert (np.abs(claimed - true) < 0.15 * np.sqrt(np.outer(np.diag(true), np.diag(true)))).all()


def test_covariance_of_independent_samples():
    mix = np.array([[1.0, 0.0], [0.8, 0.3]])
    covered(lambda rng: of_samples(mix @ rng.standard_normal((2, 15)) + 2, 15, "", 0.0), np.array([2.0, 2.0]))


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_covariance_of_pairs(offset):
    """Of products of numbers with this mean: all noise of second order where it is zero."""

    def make(rng):
        x = rng.standard_normal(10) + offset
        return of_pairs(np.stack([np.outer(x, x), (x[:, None] + x) / 2]), 0, "", 0.0)

    if offset:
        covered(make, np.array([offset**2, offset]))
    else:
        found = [make(np.random.default_rng(seed)) for seed in range(2000)]
        means = np.array([f.means[0] for f in found])
        assert np.mean([f.covariance[0, 0] for f in found]) >= 0.85 * means.var()


@pytest.mark.parametrize("shared", [0.0, 1.0, 3.0])
def test_covariance_of_exchangeable_samples(shared):
    """h_i = x_i (1 + a sum_j y_ij), with y_ij = x_j: pairs meet in x_i x_j, which the naive bar leaves out."""

    def make(rng):
        x = rng.standard_normal(12)
        sums = x.sum() - x
        samples = np.stack([x * (1 + shared * sums), 2 * x])
        without = np.stack([x[:, None] * (1 + shared * (sums[:, None] - x)), np.broadcast_to(2 * x[:, None], (12, 12))])
        return of_exchangeable(samples, without, 0, "", 0.0)

    covered(make, np.zeros(2), 4000)


def test_functions_of_moments_lose_their_bias():
    """(mean of x)^2 / mean of x^2, whose plain ratio is off by more than its error over the runs."""

    def make(rng):
        x = rng.gamma(2.0, size=20)
        return of_samples(np.stack([x, x**2]), 20, "", 0.0)

    found = [make(np.random.default_rng(seed)) for seed in range(4000)]
    values = np.array([f.effective_rank.value for f in found])
    plain = np.array([f.means[0] ** 2 / f.means[1] for f in found])
    assert abs(values.mean() - 4 / 6) < abs(plain.mean() - 4 / 6) / 3


def test_long_images_are_not_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where J* of a basis would be too long, it is taken back a part at a time: the same moments."""
    rows = np.random.default_rng(0).standard_normal((40, 300)) / (1 + np.arange(40))[:, None]
    pair, shape = (lambda q: q @ rows, lambda q: q @ rows.T), (300, 40)
    whole = XNysTrace().moments(pair, shape, 12, like=np.zeros(1), seed=0)
    monkeypatch.setattr("kpflow_dyn.solvers._xtrace.LIFTED_BYTES", 0)
    parts = XNysTrace().moments(pair, shape, 12, like=np.zeros(1), seed=0)
    assert parts.trace.value == pytest.approx(whole.trace.value, rel=1e-10)
    assert parts.norm.value == pytest.approx(whole.norm.value, rel=1e-10)
