"""Truncated flows against dense matrices: what is left out is positive, and below the bound that is claimed."""

from __future__ import annotations

import jax_registry
import numpy as np
import pytest
import registry
import torch
from conftest import cases
from test_ode_flow import Driven

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

QUICK = {"gru", "tied", "computed_weight", "shared_over_tokens"}


def check(flow: kp.Flow, rtol: float) -> kp.Flow:
    """The truncated flow, after all that must hold of it."""
    short = flow.truncate(rtol)
    cut = short.truncation
    root = 1.0 if (w := flow.ntk.domain.measure) is None else to_numpy(w)
    root = (np.ones(flow.ntk.domain.shape) * root).reshape(-1) ** 0.5

    def dense(op: kp.Operator) -> np.ndarray:
        return root[:, None] * to_numpy(op.dense()) / root

    whole, kept = dense(flow.ntk), dense(short.ntk)
    left_out, largest = np.linalg.eigvalsh(whole - kept), np.linalg.norm(whole, 2)
    assert left_out.min() > -1e-12 * largest
    assert left_out.max() <= cut.bound * largest * (1 + 1e-9)
    assert cut.bound <= rtol
    for site, short_site, basis, separate in zip(flow.sites, short.sites, cut.bases, flow.core.separate, strict=True):
        Q = np.eye(site.inputs.shape[-1]) if basis is None else to_numpy(basis)
        np.testing.assert_allclose(to_numpy(short_site.inputs), to_numpy(site.inputs) @ Q @ Q.T, atol=1e-12)
        assert basis is None or separate
    np.testing.assert_allclose(dense(short.P @ short.K @ short.P.T), kept, atol=1e-11 * largest)
    np.testing.assert_allclose(dense(short.J @ short.J.T), kept, atol=1e-11 * largest)
    assert kp.check_adjoint(short.J) < 1e-12
    assert short.P is not flow.P and kp.check_adjoint(short.core) < 1e-12
    return short


@pytest.mark.parametrize("name", cases(registry.MODELS, QUICK))
def test_torch_models(name: str) -> None:
    check(kp.linearize(kp.solve(registry.MODELS[name].problem(True))), 0.3)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", cases(jax_registry.MODELS, {"tanh_rnn", "tied"}))
def test_jax_models(name: str) -> None:
    check(kp.linearize(kp.solve(jax_registry.MODELS[name].problem(False))), 0.3)


def smooth_flow(dtype: torch.dtype = torch.float64, units: int = 24, **options: object) -> kp.Flow:
    torch.manual_seed(0)
    x = torch.sin(0.2 * torch.arange(15.0) + torch.arange(3.0)[:, None])[..., None].to(dtype)
    cell = torch.nn.GRUCell(1, units).to(dtype)
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)), **options)


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [0.1, 1e-3, 1e-6])
def test_directions_are_as_few_as_the_bound_allows(rtol: float) -> None:
    flow = smooth_flow()
    short = check(flow, rtol)
    amplified = np.linalg.norm(to_numpy((flow.P @ flow.B).dense()), 2) ** 2 / np.linalg.norm(
        to_numpy(flow.ntk.dense()), 2
    )
    for site, rank in zip(flow.sites, short.truncation.ranks, strict=True):
        values = site.gram_eigenvalues()
        assert rank == len(values) or values[rank] * amplified <= rtol
        assert rank == 1 or values[rank - 1] * amplified > 0.95 * rtol
    rest = max(np.append(s.gram_eigenvalues(), 0)[r] for s, r in zip(flow.sites, short.truncation.ranks, strict=True))
    assert max(short.truncation.ranks) < 25
    assert short.truncation.bound == pytest.approx(rest * amplified, rel=0.04)  # the norms are good to 3%


def test_with_a_measure_the_norm_is_that_of_its_space() -> None:
    weights = np.linspace(0.2, 2.0, 3)
    check(smooth_flow(measure=kp.Measure(trial=weights)), 0.01)


def test_eigenvalues_move_by_less_than_the_bound_in_float32() -> None:
    flow = smooth_flow(torch.float32)
    short = flow.truncate(1e-4)
    whole, kept = (to_numpy(kp.eigs(f.ntk, 5).values) for f in (flow, short))
    assert sum(short.truncation.ranks) < sum(site.inputs.shape[-1] for site in flow.sites)
    assert np.abs(whole - kept).max() <= (short.truncation.bound + 2e-6) * whole[0]


def test_below_float32_nothing_is_cut() -> None:
    assert set(smooth_flow(torch.float32).truncate(1e-9).truncation.bases) == {None}


def test_of_an_ode_the_steps_are_truncated() -> None:
    x = torch.ones(2, 6, 2, dtype=torch.float64)
    problem = kp.ODEProblem(Driven().double(), torch.ones(2, 3, dtype=torch.float64), np.linspace(0, 1, 6), x)
    flow = kp.linearize(kp.solve(problem))
    with pytest.raises(ValueError, match=r"flow\.nodal"):
        flow.truncate()
    check(flow.nodal, 0.1)


def test_bad_requests() -> None:
    flow = smooth_flow()
    with pytest.raises(ValueError, match="between 0 and 1"):
        flow.truncate(rtol=2)
    with pytest.raises(ValueError, match="truncated already"):
        flow.truncate().truncate()
