"""Spectral densities against the eigenvalues of dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import diagonal, eager_library, factor, matrix, parameters, space, spectra

import kpflow_dyn as kp

__all__ = ["eager_library"]


def line(n: int) -> kp.Space:
    return kp.Space(("state",), (n,), np.zeros(1))


def test_quadratures_are_exact_for_polynomials(eager_library):
    """sum_j w_j p(n_j) = x^T p(A) x for degrees below twice the steps, so that traces of powers follow on average."""
    J = factor(space(eager_library, weighted=True), parameters(eager_library, size=15))
    op = kp.GramOperator(J)
    values = np.linalg.eigvalsh(op.to_scipy() @ np.eye(op.domain.size))[::-1][:15]
    found = kp.spectral_density(op, k=3, probes=4000, steps=4)
    assert found.zeros == op.domain.size - 15
    np.testing.assert_allclose(found.leading, values[:3], rtol=1e-6)
    for power in range(8):
        each = (found.weights * found.nodes**power).sum(1)
        assert abs(each.mean() - (values[3:] ** power).sum()) < 4 * each.std() / 4000**0.5


@pytest.mark.parametrize("spectrum", ["power", "exponential"])
def test_counts_cover_where_the_quadrature_resolves(spectrum):
    values = spectra(400)[spectrum]
    op, truth = diagonal(values), 20
    edge = np.sqrt(values[truth - 1] * values[truth])
    runs = [kp.spectral_density(op, k=5, probes=20, steps=80, seed=seed).count(edge) for seed in range(100)]
    errors, bars = np.array([[run.value - truth, run.stderr] for run in runs]).T
    assert 0.85 <= np.mean(np.abs(errors) <= 1.96 * bars + 1) <= 1
    assert abs(errors.mean()) < 1 + 4 * errors.std() / 10


def test_the_whole_is_counted_and_the_leading_ones_exactly():
    values = np.concatenate([[9.0, 8.0, -3.0], np.linspace(0, 1, 297)])
    op = kp.Operator(line(300), line(300), lambda q: q * values, None)
    found = kp.spectral_density(op, k=2)
    assert found.count(5).value == 2 and found.count(5).stderr < 1e-9
    assert found.count().value == pytest.approx(300, abs=4 * found.count().stderr)
    grid = np.linspace(-5, 11, 4000)
    assert np.trapezoid(found.density(grid, 0.1), grid) == pytest.approx(found.count().value, rel=1e-3)
    assert found.density(np.array([8.5]), 1.0)[0] == pytest.approx(2 * np.exp(-1 / 8) / (2 * np.pi) ** 0.5, rel=1e-3)


def test_repeated_eigenvalues_and_the_zero_operator():
    """The recurrence ends early; what it goes on with is noise of no weight."""
    op = diagonal(np.repeat([2.0, 1.0], 200))
    found = kp.spectral_density(op, k=0, probes=40)
    assert found.count(1.5).value == pytest.approx(200, abs=4 * found.count(1.5).stderr)
    assert np.abs(found.weights.sum(1) - (found.weights * (np.abs(found.nodes - 1.5) > 0.49)).sum(1)).max() < 1e-6
    zero = kp.Operator(line(50), line(50), lambda q: 0 * q, None)
    assert kp.spectral_density(zero, k=0, probes=200).count(-1e-9, 1e-9).value == pytest.approx(50, rel=0.1)


def test_what_is_not_defined_is_refused():
    op, state = diagonal(np.ones(20)), space()
    with pytest.raises(ValueError, match=r"needs a symmetric operator.*op @ op\.T"):
        kp.spectral_density(kp.MatrixOperator(matrix(state, state), state, state))
    with pytest.raises(ValueError, match="probes = 3, steps = 60; expected at least 8 and 2"):
        kp.spectral_density(op, probes=3)
    with pytest.raises(ValueError, match="k = 20 leading pairs"):
        kp.spectral_density(op, k=20)
    with pytest.raises(ValueError, match="width is 0"):
        kp.spectral_density(op, k=2).density(np.zeros(1), 0)
