"""Eigenpairs and traces of models and of known spectra against PRIMME (where installed), scipy and matfree."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

import kpflow_dyn as kp
from kpflow_dyn.solvers import BlockLanczos

N, K = 600, 10
CELLS = {"RNN": torch.nn.RNNCell, "GRU": torch.nn.GRUCell, "LSTM": torch.nn.LSTMCell}
SPECTRA = {
    "power": 1 / np.arange(1.0, N + 1) ** 2,
    "exponential": np.exp(-np.arange(N) / 10),
    "flat": np.linspace(1, 0.5, N),
    "repeated": np.kron(np.exp(-np.arange(N // 8) / 5), np.ones(8)),
}


def ntk(cell: str) -> kp.GramOperator:
    torch.manual_seed(0)
    model, x = CELLS[cell](3, 12).double(), torch.randn(5, 12, 3, dtype=torch.float64)
    return kp.linearize(kp.solve(kp.DiscreteProblem(model, x))).ntk


def with_spectrum(name: str) -> kp.MatrixOperator:
    """A symmetric operator with a known spectrum and no special eigenvectors."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((N, N)))
    line = kp.Space(("unit",), (N,), np.zeros(1))
    return kp.MatrixOperator((q * SPECTRA[name]) @ q.T, line, line, symmetric=True)


OPERATORS: dict[str, Callable[[], kp.Operator]] = {
    **{cell: (lambda cell=cell: ntk(cell)) for cell in CELLS},
    **{name: (lambda name=name: with_spectrum(name)) for name in SPECTRA},
}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> kp.Operator:
    return OPERATORS[request.param]()


def ours(operator: kp.Operator) -> np.ndarray:
    """The leading values by iteration, which have to be as good as their residuals say."""
    found = kp.eigs(operator, K, alg=BlockLanczos(dense=0))
    images, vectors = (np.asarray(a).reshape(K, -1) for a in (operator.mv(found.vectors), found.vectors))
    values = np.asarray(found.values)
    true = np.linalg.norm(images - values[:, None] * vectors, axis=1) / values[0]
    assert true.max() <= 1e-6
    np.testing.assert_allclose(found.residuals, true, atol=1e-8, rtol=0.3)
    return values


@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectra(name: str) -> None:
    np.testing.assert_allclose(ours(with_spectrum(name)), SPECTRA[name][:K], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [*CELLS, "power", "exponential", "flat"])
def test_scipy(name: str) -> None:
    """ARPACK has one start vector, and misses copies of repeated values."""
    operator = OPERATORS[name]()
    expected = eigsh(operator.to_scipy(), K, which="LA", tol=1e-12)[0][::-1]
    np.testing.assert_allclose(ours(operator), expected, rtol=1e-9, atol=1e-9 * expected[0])


def test_primme(operator: kp.Operator) -> None:
    primme = pytest.importorskip("primme", reason="PRIMME is built by hand: pip install primme")
    options = {"maxBlockSize": 8, "return_eigenvectors": False}  # with a block of one it misses copies as well
    expected = np.sort(primme.eigsh(operator.to_scipy(), K, which="LA", tol=1e-10, **options))[::-1]
    np.testing.assert_allclose(ours(operator), expected, rtol=1e-8, atol=1e-9 * expected[0])


@pytest.mark.parametrize("name", [*CELLS, "power", "exponential", "flat"])
def test_matfree(name: str) -> None:
    """Its Lanczos has no restart and one start vector: many steps of it, and no repeated values."""
    decomp, eig = pytest.importorskip("matfree.decomp"), pytest.importorskip("matfree.eig")
    operator = OPERATORS[name]()
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.asarray(operator.dense()))
        start = jnp.asarray(np.random.default_rng(0).standard_normal(len(matrix)))
        values, _vectors = eig.eigh_partial(decomp.tridiag_sym(300))(lambda v: matrix @ v, start)
    np.testing.assert_allclose(ours(operator), np.sort(values)[::-1][:K], rtol=1e-8, atol=1e-9 * float(max(values)))


def test_traces_of_matfree() -> None:
    stochtrace = pytest.importorskip("matfree.stochtrace")
    operator = ntk("GRU")
    with jax.enable_x64(True):
        matrix = jnp.asarray(np.asarray(operator.dense()))
        sampler = stochtrace.sampler_signs(jnp.zeros(len(matrix)), num=60)
        estimator = stochtrace.estimator_leave_one_out_mean_and_sem(stochtrace.leave_one_out_xtrace(), sampler)
        value, stderr = estimator(lambda v: matrix @ v, jax.random.key(0))
    found = kp.trace(operator, samples=60)
    assert abs(found.value - float(value)) < 4 * (found.stderr**2 + float(stderr) ** 2) ** 0.5


def test_scipy_operator_is_the_same() -> None:
    """`to_scipy`, which the comparisons go through."""
    operator = ntk("RNN")
    dense, linear = operator.dense().numpy(), operator.to_scipy()
    assert isinstance(linear, LinearOperator)
    np.testing.assert_allclose(linear @ np.eye(len(dense)), dense, atol=1e-12 * abs(dense).max())
