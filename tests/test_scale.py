"""Numbers at any scale: those of A are those of A at an ordinary size, times the scale."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._arrays.dots import row_norms

SCALES = [1e-200, 1e-30, 1e30, 1e150]
SPACE = kp.Space(("time", "unit"), (6, 10), np.zeros(1))
ROOT = np.random.default_rng(0).standard_normal((60, 60)) * np.exp(-np.arange(60) / 8.0)
MATRIX = ROOT @ ROOT.T


def of_kind(kind: str, scale: float) -> Any:
    if kind == "matrix":
        return kp.MatrixOperator(scale * MATRIX, SPACE, SPACE, symmetric=True)
    if kind == "rows":
        return kp.Operator(SPACE, SPACE, lambda q: (q.reshape(-1, 60) @ (scale * MATRIX)).reshape(q.shape), None)
    factor = kp.MatrixOperator(scale**0.5 * ROOT, SPACE, SPACE)
    return kp.GramOperator(factor if kind == "gram" else kp.Operator(SPACE, SPACE, factor.mv, factor.T.mv))


NUMBERS = {
    "trace": (lambda A, n: kp.trace(A, n).value, 1),
    "norm": (lambda A, n: kp.frobenius_norm(A, n).value, 1),
    "rank": (lambda A, n: kp.effective_rank(A, n).value, 0),
    "rank_of_partial_trace": (lambda A, n: kp.effective_rank(kp.partial_trace(A, "time", n)).value, 0),
    "partial_trace": (lambda A, n: to_numpy(kp.partial_trace(A, "unit", n).matrix), 1),
    "alignment": (lambda A, n: kp.alignment(A, of_kind("matrix", 1.0), n).value, 0),
    "rayleigh": (lambda A, n: kp.rayleigh(A, np.linspace(1e-180, 2e-180, 60).reshape(6, 10)).value, 1),
    "eigs": (lambda A, n: kp.eigs(A, 4).values, 1),
    "eigenvalues": (lambda A, n: kp.eigenvalues(A)[:20], 1),
    "svds": (lambda A, n: kp.svds(A, 4).values, 1),
    "modes": (lambda A, n: kp.modes(A, "time", 3, n).values, 1),
    "schmidt": (lambda A, n: kp.schmidt_rank(A, "time").value, 0),
    "density": (lambda A, n: kp.spectral_density(A, k=3, steps=8).nodes.max(), 1),
    "adjoint": (lambda A, n: kp.check_adjoint(A) < 1e-12, 0),
}


@pytest.mark.parametrize("samples", [None, 40])
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", ["matrix", "rows", "gram", "gram_of_rows"])
def test_numbers_are_those_at_an_ordinary_scale(kind: str, name: str, samples: int | None) -> None:
    number, power = NUMBERS[name]
    ordinary = number(of_kind(kind, 1.0), samples)
    for scale in SCALES:
        found = number(of_kind(kind, scale), samples)
        np.testing.assert_allclose(np.asarray(found) / scale**power, ordinary, rtol=1e-6, atol=1e-9 * power)


@pytest.mark.parametrize("growth", [2.2, 4.0, 1e-2])
def test_a_float32_flow_has_the_numbers_of_float64(growth: float) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.u = nn.Parameter(torch.tensor(growth)), nn.Parameter(torch.randn(4, 3))

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return self.a * z + x @ self.u.T

    torch.manual_seed(0)
    model, x = Growing(), torch.randn(2, 30, 3)

    def numbers(dtype: torch.dtype) -> np.ndarray:
        cell, data = Growing().to(dtype), x.to(dtype)
        cell.load_state_dict({name: value.to(dtype) for name, value in model.state_dict().items()})
        flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, data, torch.zeros(2, 4, dtype=dtype))))
        of = [kp.effective_rank, kp.frobenius_norm, kp.trace, lambda op: kp.eigs(op, 2).values.max()]
        parts = kp.contributions(flow)
        return np.array([float(f(op)) for f in of for op in (flow.ntk, flow.K, flow.core)] + [float(parts["a"])])

    np.testing.assert_allclose(numbers(torch.float32), numbers(torch.float64), rtol=1e-3)


def test_a_summary_has_the_numbers_of_each_where_they_are_large() -> None:
    torch.manual_seed(0)
    cell, x = nn.Linear(7, 4), torch.randn(2, 30, 3)
    cell.weight.data[:, 3:] = 2.2 * torch.eye(4)
    step = nn.ModuleDict({"map": cell})
    step.forward = lambda x, z: cell(torch.cat([x, z], -1))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(step, x, torch.zeros(2, 4))))
    found = kp.summary(flow, k=3)
    for name in ("ntk", "K", "core"):
        of, op = getattr(found, name), getattr(flow, name)
        assert of.trace.value == pytest.approx(kp.trace(op).value, rel=1e-4)
        assert of.effective_rank.value == pytest.approx(kp.effective_rank(op).value, rel=1e-4)
    assert found.modes.values[0] == pytest.approx(float(kp.eigs(flow.ntk, 1).values[0]), rel=1e-4)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_an_error(wrong: float) -> None:
    A = kp.Operator(SPACE, SPACE, lambda q: q * wrong, None)
    for number in (kp.trace, kp.frobenius_norm, kp.effective_rank, lambda A: kp.eigs(A, 2), kp.check_adjoint):
        with np.errstate(all="ignore"), pytest.raises(ValueError, match="NaN or inf"):
            number(A)


def test_what_float64_cannot_hold_is_an_error() -> None:
    A = kp.GramOperator(kp.MatrixOperator(1e200 * ROOT, SPACE, SPACE))
    ordinary = kp.effective_rank(kp.GramOperator(kp.MatrixOperator(ROOT, SPACE, SPACE))).value
    assert kp.effective_rank(A).value == pytest.approx(ordinary)
    with pytest.raises(ValueError, match="float64 cannot hold"):
        kp.trace(A)
    thin = kp.Space(("time", "unit"), (6, 10), np.zeros(1, np.float32))
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="take float64"):
        kp.partial_trace(kp.GramOperator(kp.MatrixOperator(np.float32(1e25) * ROOT.astype("f"), thin, thin)), "time")


def test_solvers_called_directly_do_not_overflow_in_float32() -> None:
    spectrum = np.float32(1e23) * np.exp(-np.arange(300) / 5.0).astype("f")
    found = kp.solvers.XTrace().moments(lambda rows: rows * spectrum, 300, 100, like=spectrum)
    exact = spectrum.astype(float)
    assert abs(found.trace.value - exact.sum()) < 1e-3 * exact.sum()
    assert abs(found.norm.value - np.linalg.norm(exact)) < 1e-3 * np.linalg.norm(exact)
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="squares"):
        kp.solvers.Dense().moments(lambda rows: rows * 1e-200, 30, like=np.zeros(1))


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy, None])
def test_norms_of_rows_at_any_scale(make: Any) -> None:
    if make is None:
        make = pytest.importorskip("jax").numpy.asarray
    rows = np.array([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]], np.float32) * np.array([[1e30], [1.0], [1e-30]], np.float32)
    np.testing.assert_allclose(to_numpy(row_norms(make(rows))), [5e30, 0, 5e-30], rtol=1e-6)
    if make is not torch.from_numpy and make is not np.asarray:
        return
    np.testing.assert_allclose(to_numpy(row_norms(make(np.array([[3e200, 4e200], [3e-200, 4e-200]])))), [5e200, 5e-200])


@pytest.mark.parametrize("block", [None, 1, 2, 4, 16])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_copies_are_found_or_said_to_be_in_doubt(block: int | None, which: str) -> None:
    rng = np.random.default_rng(1)
    below = np.r_[1 + 0.1 * np.arange(1, 4), np.ones(17), 0.9 * rng.random(280)]
    two = np.r_[2 * np.ones(5), np.ones(16), 0.5 * np.ones(279)]
    for values in (below, two):
        spectrum = -values if which == "SA" else values
        for k in (5, 12, 19):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                alg = kp.solvers.BlockLanczos(block=block)
                pairs = alg.solve(lambda rows, s=spectrum: rows * s, 300, k, like=np.zeros(1), which=which)
            wanted = np.sort(values)[::-1][:k]
            assert caught or np.abs(np.sort(abs(pairs.values))[::-1] - wanted).max() < 1e-5


def test_exact_multiplicities_do_not_spoil_orthogonality() -> None:
    spectrum = np.r_[np.ones(2), 0.5 * np.ones(598)]
    alg = kp.solvers.BlockLanczos(block=2)
    pairs = alg.solve(lambda rows: rows * spectrum, 600, 15, like=np.zeros(1))
    np.testing.assert_allclose(pairs.values, np.r_[np.ones(2), 0.5 * np.ones(13)], atol=1e-6)
    np.testing.assert_allclose(pairs.vectors @ pairs.vectors.T, np.eye(15), atol=1e-10)
