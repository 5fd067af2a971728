"""The table of learning rules against dense definitions."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from test_learning_rules import cosine, linear
from test_metric import assert_close, dense, flow_of, is_jax

import kpflow_dyn as kp
from kpflow_dyn import learning_rules as rules
from kpflow_dyn._arrays import like_numpy, to_numpy

pytestmark = pytest.mark.usefixtures("x64")


def of_time(A: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.einsum("btnbsn->ts", A.reshape(*shape, *shape))


@pytest.mark.parametrize("name", ["torch_gru", "torch_ode", "jax_gru"])
def test_all_numbers_are_those_of_dense_operators(name: str) -> None:
    flow = flow_of(name).nodal
    table = rules.compare(flow, k=3, seed=1)
    assert table.rules[0] == "bptt" and set(table.rules) >= {"truncated_bptt", "muon", "natural_gradient"}
    assert set(table.left_out) <= {"rflo"}  # of gates, and of steps of several lengths
    q = kp._arrays.Random(1)  # the q that is drawn without a target
    q = flow.ntk.domain.normal(1, q)[0]
    ntk, root = dense(flow.ntk), to_numpy(flow.ntk.domain.to_euclidean(q)).reshape(-1)
    largest = float(kp.eigs(flow.ntk, 1).values[0])
    values, modes = np.linalg.eigh(of_time(ntk, flow.ntk.domain.shape))
    modes = modes[:, ::-1]
    known = {
        "truncated_bptt": rules.truncated_bptt(flow, 1),
        "gauss_newton": rules.gauss_newton(flow, 0.01 * largest),
        "feedback_alignment": rules.feedback_alignment(flow, seed=1),
        "shampoo": rules.shampoo(flow, q),
    }
    for rule, op in known.items():
        A, n = dense(op), table.rules.index(rule)
        assert table.alignment[n] == pytest.approx(cosine(A, ntk), rel=1e-8)
        assert table.step[n] == pytest.approx(cosine(A @ root, ntk @ root), rel=1e-8)
        s, T = np.linalg.svd(A)[1], of_time(A, flow.ntk.domain.shape)
        assert table.rank[n] == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-8)
        s = np.linalg.svd(T)[1]
        assert table.temporal_rank[n] == pytest.approx((s**2).sum() ** 2 / (s**4).sum(), rel=1e-8)
        along = np.diag(modes.T @ T @ modes)
        share = values[::-1] / values.sum()
        assert_close(table.share, share[:3])
        assert_close(table.kept[n], along[:3] / np.abs(along).sum() / share[:3], 1e-7)
    assert_close(table.kept[0], np.ones(3))


def test_a_rule_that_loses_a_time_course() -> None:
    """One that leaves the leading temporal mode out of the ntk keeps nothing of it, and the rest as it was."""
    flow = flow_of("torch_rnn")
    mode = to_numpy(kp.eigs(kp.partial_trace(flow.ntk, "time"), 1).vectors[0])
    rest = np.eye(len(mode)) - np.outer(mode, mode)
    without = like_numpy(rest, flow.ntk.domain.like)

    def apply(q):
        return torch.einsum("ts,...sn->...tn", without, q)

    project = kp.Operator(flow.ntk.domain, flow.ntk.domain, apply, None)
    table = rules.compare(flow, rules={"all": "bptt", "blind": project @ flow.ntk @ project}, k=3)
    assert table.rules == ["all", "blind"]
    assert abs(table.kept[1, 0]) < 1e-10
    np.testing.assert_allclose(table.kept[1, 1:], 1 / (1 - table.share[0]), rtol=1e-8)


def test_the_gradient_is_that_of_the_loss() -> None:
    flow = flow_of("torch_gru")
    trials, times, units = flow.ntk.domain.shape
    C = np.random.default_rng(0).standard_normal((2, units))
    layer, target = linear(C, is_jax(flow)), np.random.default_rng(1).standard_normal((trials, times, 2))
    mask = np.arange(times) > 0
    mask = np.broadcast_to(mask, (trials, times))
    table = rules.compare(flow, target, layer, mask=mask, rules=["gauss_newton", rules.muon])
    state = flow.solution.state
    error = (layer(state).detach().numpy() - target) * mask[..., None]
    q = torch.from_numpy(2 / (mask.sum() * 2) * error @ C)
    step = rules.muon(flow, q).mv(q)
    expected = cosine(to_numpy(step), to_numpy(flow.ntk.mv(q)))
    assert table.step[1] == pytest.approx(expected, rel=1e-8)


def test_what_a_flow_has_not_is_listed() -> None:
    """The L2 flow of an ODE has no steps to count."""
    flow = flow_of("torch_ode")
    table = rules.compare(flow, k=2)
    assert {"truncated_bptt", "feedback_alignment"} <= set(table.left_out)
    assert "not of this flow: truncated_bptt" in str(table)
    with pytest.raises(ValueError, match=r"take flow\.nodal"):
        rules.compare(flow, rules=["truncated_bptt"])
    with pytest.raises(TypeError, match="expected a Flow"):
        rules.compare(flow.ntk)


def test_it_is_told_labelled_and_drawn() -> None:
    table = rules.compare(flow_of("torch_rnn"), rules=["bptt", "muon"], k=2)
    assert "muon" in str(table) and "cos to BPTT" in str(table)
    data = table.to_xarray()
    assert data.kept.dims == ("rule", "mode") and data.kept.sel(rule="muon").shape == (2,)
    assert data.modes.shape == (2, flow_of("torch_rnn").ntk.domain.shape[1])
    figure = table.plot(dark=True)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["bptt", "muon"]


def test_rules_need_names_of_their_own_and_modes_a_number() -> None:
    flow = flow_of("torch_gru")
    assert rules.compare(flow, rules="bptt", k=2).rules == ["bptt"]
    for given in ([lambda flow: flow.ntk, lambda flow: flow.K], [], [partial(rules.truncated_bptt, k=1)]):
        with pytest.raises(ValueError, match="each with its own"):
            rules.compare(flow, rules=given)
    with pytest.raises(ValueError, match="k is -2"):
        rules.compare(flow, k=-2)


def test_sizes_beyond_single_precision_are_no_nan() -> None:
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 4), torch.randn(2, 5, 3))))
    large = 1e25 * flow.ntk
    table = rules.compare(flow, rules={"bptt": flow.ntk, "large": large}, k=2)
    assert table.temporal_rank[1] == pytest.approx(table.temporal_rank[0], rel=1e-4)
    assert table.step[1] == pytest.approx(1, rel=1e-4)
