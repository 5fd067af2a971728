"""The one pass over a flow: every scalar and mode against its dense definition, and nothing applied twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.models import CTRNNCell
from kpflow_dyn.solvers import BlockLanczos

SUMS = {"temporal": "btnbsn->ts", "spatial": "btnbtm->nm", "trial": "btnctn->bc"}


def make_flow(cell: torch.nn.Module, trials: int, times: int, dtype: torch.dtype = torch.float64) -> kp.Flow:
    torch.manual_seed(0)
    x = torch.randn(trials, times, 2, dtype=torch.float64).to(dtype)
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell.to(dtype), x)))


def rank_of(matrix: np.ndarray) -> float:
    return float(np.trace(matrix) ** 2 / (matrix**2).sum())


def truth(flow: kp.Flow) -> dict[str, float]:
    dense = {name: to_numpy(getattr(flow, name).dense()).astype(float) for name in ("core", "K", "ntk")}
    numbers = {f"{name}_trace": np.trace(matrix) for name, matrix in dense.items()}
    numbers |= {f"{name}_norm": np.linalg.norm(matrix) for name, matrix in dense.items()}
    numbers |= {f"{name}_effective_rank": rank_of(matrix) for name, matrix in dense.items()}
    ntk = dense["ntk"].reshape(flow.ntk.domain.shape * 2)
    numbers |= {f"{name}_effective_rank": rank_of(np.einsum(of, ntk)) for name, of in SUMS.items()}
    product = (dense["K"] * dense["ntk"]).sum()
    return numbers | {"K_ntk_alignment": product / np.linalg.norm(dense["K"]) / np.linalg.norm(dense["ntk"])}


@pytest.mark.parametrize(
    ("units", "trials", "times"), [(4, 3, 5), (12, 2, 3)], ids=["fewer parameters", "fewer states"]
)
def test_small_flows_are_exact_from_either_side(units: int, trials: int, times: int) -> None:
    torch.manual_seed(1)
    flow = make_flow(torch.nn.GRUCell(2, units), trials, times)
    found = kp.summary(flow, k=3)
    for name, value in truth(flow).items():
        assert found.numbers()[name].value == pytest.approx(value, rel=1e-9), name
        assert found.numbers()[name].stderr == 0, name
    np.testing.assert_allclose(found.modes.values, np.linalg.eigvalsh(flow.ntk.dense())[::-1][:3], rtol=1e-9)
    ntk = to_numpy(flow.ntk.dense()).reshape(flow.ntk.domain.shape * 2)
    for name, of in SUMS.items():
        expected = np.linalg.eigvalsh(np.einsum(of, ntk))[::-1]
        np.testing.assert_allclose(getattr(found, name).values, expected, atol=1e-9 * expected[0])
        np.testing.assert_allclose(found.kernels[name].matrix, np.einsum(of, ntk), atol=1e-9 * expected[0])


@pytest.fixture(scope="module")
def flow() -> kp.Flow:
    torch.manual_seed(2)
    return make_flow(torch.nn.RNNCell(2, 24), trials=12, times=4)


@pytest.mark.parametrize("apart", [True, False])
def test_estimates_are_unbiased_and_their_bars_cover(flow: kp.Flow, apart: bool) -> None:
    if not apart:
        flow = _without_trials_apart(flow)
    expected = truth(flow)
    runs = [kp.summary(flow, k=4, samples=40, seed=seed, alg=BlockLanczos(block=4)).numbers() for seed in range(60)]
    for name, value in expected.items():
        errors, bars = np.array([[run[name].value - value, run[name].stderr] for run in runs]).T
        if name.startswith("core"):
            assert np.abs(errors).max() < 1e-9 * value and not bars.any()
            continue
        assert np.mean(np.abs(errors) <= 1.96 * bars) >= 0.85, name
        assert abs(errors.mean()) < 4 * errors.std() / 60**0.5, name
        assert errors.std() < 0.1 * value, name


def _without_trials_apart(flow: kp.Flow) -> kp.Flow:
    import dataclasses

    return dataclasses.replace(flow, ntk=kp.GramOperator(flow.J, flow.ntk.mv))


def test_nothing_is_applied_twice(flow: kp.Flow) -> None:
    """J to each leading pair once, J and J* to each probe once, J_b to each probe of the trials' own once."""
    import dataclasses

    rows = {"J": 0, "J*": 0, "apart": 0}

    def counted(op: kp.Operator, name: str, adjoint: str) -> kp.Operator:
        def note(apply, name):
            def applied(q):
                rows[name] += len(q)
                return apply(q)

            return applied

        return kp.Operator(op.domain, op.codomain, note(op.mv, name), note(op.T.mv, adjoint))

    ntk = kp.GramOperator(counted(flow.J, "J", "J*"), None, counted(flow.ntk.apart, "apart", "apart"))
    found = kp.summary(dataclasses.replace(flow, ntk=ntk), k=5, samples=60, alg=BlockLanczos(block=4))
    alone = kp.eigs(flow.ntk, 5, BlockLanczos(block=4), seed=0)
    assert found.modes.applications == alone.applications
    assert (
        rows["apart"] == 20 and rows["J"] + rows["J*"] == 2 * alone.applications + 2 * 60 - (rows["J"] - rows["J*"]) % 2
    )
    assert found.applications == (sum(rows.values()) + 1) // 2


def test_K_takes_as_few_samples_as_show_its_scalars_to_one_percent() -> None:
    """K needs no sweep, but its sketch would cost as much as the probes of the NTK."""
    flow = make_flow(torch.nn.GRUCell(2, 32), trials=6, times=30)
    found = kp.summary(flow, k=2, samples=200, alg=BlockLanczos(tol=1e-3))
    of_K = (found.K.trace, found.K.norm, found.K.effective_rank)
    assert found.K.trace.applications < 200 <= found.ntk.norm.applications
    assert all(0 < each.stderr <= 0.01 * each.value for each in of_K)
    spectrum = np.linalg.svd(flow.K.factor.dense(), compute_uv=False) ** 2
    expected = spectrum.sum(), np.linalg.norm(spectrum), spectrum.sum() ** 2 / (spectrum**2).sum()
    for each, value in zip(of_K, expected, strict=True):
        assert each.value == pytest.approx(value, abs=4 * each.stderr)


def test_leading_modes_are_those_of_eigs(flow: kp.Flow) -> None:
    found = kp.summary(flow, k=5)
    expected = np.linalg.eigvalsh(flow.ntk.dense())[::-1][:5]
    np.testing.assert_allclose(found.modes.values, expected, rtol=1e-6)
    assert found.modes.converged.all() and found.modes.vectors.shape == (5, *flow.ntk.domain.shape)
    assert found.temporal.vectors.shape == (4, 4) and found.spatial.stderr is not None
    assert "temporal_effective_rank" in str(found) and f"{found.applications} applications" in str(found)


def test_temporal_rank_of_a_tanh_rnn_is_that_of_the_dense_partial_trace_and_not_of_the_marginal() -> None:
    """g = 2, 8 trials x 30 times x 32 units."""
    torch.manual_seed(0)
    flow = make_flow(CTRNNCell(2, 32, alpha=1.0, gain=2.0), 8, 30)
    columns = flow.J.mv(torch.eye(flow.J.domain.size, dtype=torch.float64))
    kernel = torch.einsum("pbtu,pbsu->ts", columns, columns).numpy()
    exact = kp.effective_rank(kp.partial_trace(flow.ntk, "time"), samples=None)
    assert exact.value == pytest.approx(rank_of(kernel), abs=4 * exact.stderr + 1e-9)
    found = kp.summary(flow, samples=240).temporal_rank
    assert abs(found.value - rank_of(kernel)) < 4 * found.stderr < 0.1 * rank_of(kernel)
    averaged = to_numpy(kp.marginal(flow.ntk, "time").dense())
    assert abs(rank_of(averaged) - rank_of(kernel)) > 0.2 * rank_of(kernel)


def test_float32_agrees_with_float64() -> None:
    torch.manual_seed(3)
    cell = torch.nn.GRUCell(2, 4)
    single, double = (kp.summary(make_flow(cell, 3, 5, dtype)).numbers() for dtype in (torch.float32, torch.float64))
    for name, value in double.items():
        assert single[name].value == pytest.approx(value.value, rel=1e-4), name


def test_same_seed_same_summary_and_progress(flow: kp.Flow) -> None:
    seen: dict[str, list[int]] = {}
    first = kp.summary(flow, k=3, progress=lambda stage, done, _total: seen.setdefault(stage, []).append(done))
    again, other = kp.summary(flow, k=3), kp.summary(flow, k=3, seed=1)
    assert first.numbers() == again.numbers() and first.ntk.trace != other.ntk.trace
    assert set(seen) == {"leading eigenpairs of ntk", "probes of ntk", "trace, norm and effective rank of K"}
    assert all(counts == sorted(counts) for counts in seen.values())


def test_bad_requests(flow: kp.Flow) -> None:
    with pytest.raises(ValueError, match="k = 0 eigenpairs asked for, expected at least 1"):
        kp.summary(flow, k=0)
    with pytest.raises(ValueError, match="samples = 10 is too few for error bars; give at least 40"):
        kp.summary(flow, samples=10)
