"""Spectra, scalars and reductions of real flows against their dense matrices."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from registry import MODELS
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.models import CTRNNCell

AXES = ("trial", "time", "unit")
SUBSETS = [keep for size in range(4) for keep in combinations(AXES, size)]


@pytest.fixture(scope="module")
def flow() -> kp.Flow:
    return kp.linearize(kp.solve(MODELS["gru_cell"].problem(True)))


def as_tensor(op: kp.Operator) -> torch.Tensor:
    return op.dense().reshape((*op.codomain.shape, *op.domain.shape))


@pytest.mark.parametrize("keep", SUBSETS, ids=["-".join(keep) or "none" for keep in SUBSETS])
def test_partial_trace_and_marginal_of_the_ntk_are_their_definitions(flow: kp.Flow, keep: tuple[str, ...]) -> None:
    matrix, letters = as_tensor(flow.ntk), {"trial": "a", "time": "b", "unit": "c"}
    out = "".join(letters[name] for name in keep)
    columns = "".join(letters[name].upper() if name in keep else letters[name] for name in AXES)
    expected = torch.einsum(f"abc{columns}->{out}{out.upper()}", matrix)
    found = as_tensor(kp.partial_trace(flow.ntk, keep=keep))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    dropped = float(np.prod([n for name, n in zip(AXES, flow.ntk.domain.shape, strict=True) if name not in keep]))
    mean = torch.einsum(f"abcABC->{out}{out.upper()}", matrix) / dropped
    torch.testing.assert_close(as_tensor(kp.marginal(flow.ntk, keep=keep)), mean, rtol=1e-10, atol=1e-12)
    if len(keep) < 3:
        assert float((expected - mean).abs().max()) > 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["ntk", "K", "core"])
def test_leading_eigenpairs_are_those_of_the_dense_matrix(flow: kp.Flow, name: str) -> None:
    op = getattr(flow, name)
    found, matrix = kp.eigs(op, 7), op.dense()
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(matrix).flip(0)[:7], rtol=1e-9, atol=1e-12)
    rows = found.vectors.reshape(7, -1)
    true = (rows @ matrix - found.values[:, None] * rows).norm(dim=1) / found.values[0]
    torch.testing.assert_close(found.residuals, true, rtol=1e-2, atol=1e-14)
    assert bool(found.converged.all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_network_without_recurrence_repeats_every_eigenvalue(dtype: torch.dtype) -> None:
    """g = 0 and leak 1: NTK = V V^T (x) I_n exactly, so each eigenvalue stands n = 24 times."""
    torch.manual_seed(0)
    cell = CTRNNCell(3, 24, alpha=1.0, gain=0.0).to(dtype)
    x = torch.randn(3, 8, 3, dtype=dtype)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    values, counts = flow.core.spectrum()
    expected = np.sort(np.repeat(values, counts))[::-1][:30]
    found = kp.eigs(flow.ntk, 30, alg=kp.solvers.BlockLanczos(tol=1e-6 if dtype == torch.float64 else 3e-6))
    assert expected[23] > 1.1 * expected[24]
    np.testing.assert_allclose(found.values.numpy(), expected, rtol=0, atol=1e-5 * expected[0])


@pytest.mark.parametrize(("k", "block", "table"), [(10, 8, 136), (10, 16, 192), (50, 8, 240), (50, 16, 320)])
def test_applications_are_those_of_block_krylov_without_restart(k: int, block: int, table: int) -> None:
    """A leaky tanh RNN, 20 trials x 60 times x 128 units; vectors and residuals of all states included."""
    torch.manual_seed(0)
    cell = CTRNNCell(3, 128, alpha=0.3, gain=0.9).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.randn(20, 60, 3, dtype=torch.float64))))
    found = kp.eigs(flow.ntk, k, alg=kp.solvers.BlockLanczos(block=block))
    rest = flow.ntk.mv(found.vectors) - found.values[:, None, None, None] * found.vectors
    true = rest.flatten(1).norm(dim=1) / found.values[0]
    assert float(true.max()) <= 1e-6
    torch.testing.assert_close(found.residuals, true, rtol=1e-4, atol=1e-12)
    assert found.applications <= 1.1 * table


def test_core_scalars_are_exact_and_need_no_application() -> None:
    torch.manual_seed(0)
    cell = nn.GRU(3, 20, num_layers=2).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.randn(3, 10, 3, dtype=torch.float64))))
    dense = flow.core.dense()
    for function, expected in (
        (kp.trace, dense.trace()),
        (kp.frobenius_norm, dense.norm()),
        (kp.effective_rank, dense.trace() ** 2 / dense.norm() ** 2),
    ):
        found = function(flow.core)
        assert found.value == pytest.approx(float(expected), rel=1e-12)
        assert (found.stderr, found.applications) == (0.0, 0)


def test_scalars_of_the_ntk_and_their_error_bars(flow: kp.Flow) -> None:
    ntk, K = flow.ntk.dense(), flow.K.dense()
    expected = {
        "trace": float(ntk.trace()),
        "norm": float(ntk.norm()),
        "rank": float(ntk.trace() ** 2 / ntk.norm() ** 2),
        "alignment": float((ntk * K).sum() / ntk.norm() / K.norm()),
    }
    for samples in (None, 64):
        found = {
            "trace": kp.trace(flow.ntk, samples=samples, seed=5),
            "norm": kp.frobenius_norm(flow.ntk, samples=samples, seed=5),
            "rank": kp.effective_rank(flow.ntk, samples=samples, seed=5),
            "alignment": kp.alignment(flow.ntk, flow.K, samples=samples, seed=5),
        }
        for name, estimate in found.items():
            assert abs(estimate.value - expected[name]) <= 4 * estimate.stderr + 1e-10 * abs(expected[name])
    q = torch.randn(flow.ntk.domain.shape, dtype=torch.float64)
    quotient = float(q.reshape(-1) @ ntk @ q.reshape(-1) / (q * q).sum())
    assert kp.rayleigh(flow.ntk, q).value == pytest.approx(quotient, rel=1e-12)


def test_temporal_modes_are_eigenvectors_of_the_temporal_partial_trace(flow: kp.Flow) -> None:
    found = kp.modes(flow.ntk, axis="time", k=3)
    matrix = torch.einsum("abcaBc->bB", as_tensor(flow.ntk))
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(matrix).flip(0)[:3], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.vectors @ matrix, found.values[:, None] * found.vectors, rtol=1e-8, atol=1e-10)
    assert found.to_xarray()["vectors"].dims == ("mode", "time")


def test_a_short_axis_gives_all_of_its_modes(flow: kp.Flow) -> None:
    assert kp.modes(flow.ntk, axis="trial").values.shape == (flow.ntk.domain.shape[0],)
    with pytest.raises(ValueError, match=r"k = 3 pairs .* expected 1 <= k <= 2"):
        kp.modes(flow.ntk, axis="trial", k=3)


def test_seeds_decide() -> None:
    torch.manual_seed(0)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(nn.GRUCell(3, 24), torch.randn(4, 20, 3))))
    first, again, other = (kp.trace(flow.ntk, samples=16, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.value != other.value
    assert torch.equal(kp.eigs(flow.ntk, 4, seed=3).vectors, kp.eigs(flow.ntk, 4, seed=3).vectors)
