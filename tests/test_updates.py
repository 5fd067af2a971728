"""Rules that change the gradient before it moves the weights, against dense definitions and the optimisers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax.contrib._muon as optax_muon
import pytest
import torch
from test_learning_rules import linear
from test_metric import assert_close, dense, flow_of, is_jax

import kpflow_dyn as kp
from kpflow_dyn import learning_rules as rules
from kpflow_dyn._arrays import like_numpy, to_numpy
from kpflow_dyn._flows.flow import preconditioned

pytestmark = pytest.mark.usefixtures("x64")

FLOWS = ["torch_rnn", "torch_gru", "torch_ode", "jax_gru"]


def error(flow: kp.Flow, seed: int = 0):
    return like_numpy(np.random.default_rng(seed).standard_normal(flow.ntk.domain.shape), flow.ntk.domain.like)


def step_of(rule: kp.learning_rules.Rule, flow: kp.Flow, q) -> dict[str, np.ndarray]:
    return {name: to_numpy(value) for name, value in flow.as_parameters(rule.gradient.mv(q)).items()}


def plain_gradient(flow: kp.Flow, q) -> dict[str, np.ndarray]:
    return {name: to_numpy(value) for name, value in flow.as_parameters(flow.J.T.mv(q)).items()}


def power(A: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(A)
    return (vectors * values**exponent) @ vectors.T


# The natural gradient


@pytest.fixture(scope="module", params=FLOWS)
def flow(request: pytest.FixtureRequest, x64: None) -> kp.Flow:
    return flow_of(request.param)


def hessian_of_classes(flow: kp.Flow, layer: object) -> tuple[np.ndarray, np.ndarray]:
    """The kernel's J_y, and the Hessian of the mean cross-entropy in the logits, diag(p) - p p^T at each place."""
    y = flow.output(layer)
    logits = to_numpy(y.values)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    places = p.reshape(-1, p.shape[-1])
    H = np.zeros((p.size, p.size))
    for n, row in enumerate(places):
        block = slice(n * len(row), (n + 1) * len(row))
        H[block, block] = (np.diag(row) - np.outer(row, row)) / len(places)
    return dense(y.J), H


@pytest.mark.parametrize("solver", ["by eigenvectors", "by conjugate gradients"])
def test_natural_gradient_of_classes(flow: kp.Flow, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if solver == "by conjugate gradients":
        monkeypatch.setattr("kpflow_dyn.learning_rules._second_order.CHEAP", 0)
    trials, times, units = flow.ntk.domain.shape
    layer = linear(np.random.default_rng(1).standard_normal((3, units)), is_jax(flow))
    classes = np.random.default_rng(2).integers(0, 3, (trials, times))
    J, (J_y, H) = dense(flow.J), hessian_of_classes(flow, layer)
    if flow.ntk.domain.measure is not None:  # the loss is of values, which are coordinates over the root of the measure
        root = np.broadcast_to(to_numpy(flow.ntk.domain.measure), (trials, times, 3)).reshape(-1) ** -0.5
        H = root[:, None] * H * root
    fisher = J_y.T @ H @ J_y
    damping = 0.05 * np.linalg.norm(fisher, 2)
    rule = rules.natural_gradient(flow, damping, readout=layer, loss="cross_entropy", target=classes)
    expected = J @ np.linalg.solve(fisher + damping * np.eye(len(fisher)), J.T)
    assert_close(dense(rule), expected, 1e-10)
    assert_close(dense(rule.gradient), np.linalg.solve(fisher + damping * np.eye(len(fisher)), J.T), 1e-10)


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_natural_gradient_keeps_the_leading_eigenpairs(flow: kp.Flow, rank: int) -> None:
    C = np.random.default_rng(1).standard_normal((2, flow.ntk.domain.shape[-1]))
    J, J_y = dense(flow.J), dense(flow.output(C).J)
    values, vectors = np.linalg.eigh(J_y.T @ J_y)
    leading = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
    damping = 0.1 * values[-1]
    rule = rules.natural_gradient(flow, damping, rank, readout=C)
    assert_close(dense(rule), J @ np.linalg.solve(leading + damping * np.eye(len(leading)), J.T), 1e-10)


def test_with_a_unit_hessian_it_is_gauss_newton(flow: kp.Flow) -> None:
    damping = 0.03 * np.linalg.norm(dense(flow.J), 2) ** 2
    found = rules.natural_gradient(flow, damping)
    assert_close(dense(found), dense(rules.gauss_newton(flow, damping)), 1e-10)
    most = min(flow.ntk.domain.size, flow.J.domain.size)
    assert_close(dense(rules.natural_gradient(flow, damping, rank=most)), dense(found), 1e-10)


# Shampoo and Muon


def test_shampoo_is_its_definition(flow: kp.Flow) -> None:
    """Two steps of it, and the same kernel as that of its factors as a metric."""
    q, later, eps = error(flow), error(flow, 1), 1e-3
    rule = rules.shampoo(flow, q, eps)
    second = rules.shampoo(flow, later, eps, previous=rule)
    first, then = plain_gradient(flow, q), plain_gradient(flow, later)
    steps, factors = (step_of(rule, flow, q), step_of(second, flow, later)), {}
    for name, G in first.items():
        if G.ndim < 2:
            assert_close(steps[0][name], G, 1e-12)
            continue
        left, right = eps * np.eye(G.shape[0]) + G @ G.T, eps * np.eye(G.shape[1]) + G.T @ G
        factors[name] = power(left, 0.25), power(right, 0.25)
        assert_close(steps[0][name], np.linalg.solve(factors[name][0], G) @ np.linalg.inv(factors[name][1]), 1e-10)
        left, right = left + then[name] @ then[name].T, right + then[name].T @ then[name]
        roots = power(left, -0.25), power(right, -0.25)
        assert_close(steps[1][name], roots[0] @ then[name] @ roots[1], 1e-10)
    as_metric = preconditioned(flow, kp.KroneckerMetric(factors).preconditioner(flow.parameters))
    assert_close(dense(rule), dense(as_metric.ntk), 1e-10)
    assert_close(to_numpy(rule.mv(q)), to_numpy(flow.J.mv(rule.gradient.mv(q))), 1e-12)


def test_muon_gives_the_orthogonal_factor(flow: kp.Flow) -> None:
    q = error(flow)
    rule = rules.muon(flow, q)
    step = step_of(rule, flow, q)
    M = []
    for name, G in plain_gradient(flow, q).items():
        if G.ndim < 2:
            assert_close(step[name], G, 1e-12)
            M.append(np.eye(G.size))
            continue
        U, s, Vt = np.linalg.svd(G, full_matrices=False)
        assert_close(step[name], U @ Vt, 1e-10)
        m, d = G.shape
        M.append(np.kron((U / s) @ U.T, np.eye(d)) if m <= d else np.kron(np.eye(m), (Vt.T / s) @ Vt))
    sizes = np.cumsum([0, *map(len, M)])
    J = dense(flow.J)
    expected = sum(J[:, a:b] @ block @ J[:, a:b].T for a, b, block in zip(sizes, sizes[1:], M, strict=False))
    assert_close(dense(rule), expected, 1e-10)


def test_muon_by_newton_and_schulz_is_that_of_optax(flow: kp.Flow) -> None:
    q = error(flow)
    step = step_of(rules.muon(flow, q, newton_schulz=5), flow, q)
    coefficients = jnp.asarray((3.4445, -4.7750, 2.0315))
    for name, G in plain_gradient(flow, q).items():
        if G.ndim == 2:
            expected = optax_muon.orthogonalize_via_newton_schulz(jnp.asarray(G), coefficients, 5, eps=0.0)
            assert_close(step[name], np.asarray(expected), 1e-10)


def test_muon_is_the_first_step_of_torch_optim_muon() -> None:
    """torch iterates in bfloat16, whose round-off the iteration multiplies."""
    flow = flow_of("torch_gru")
    q = error(flow)
    step = step_of(rules.muon(flow, q, newton_schulz=5), flow, q)
    for name, G in plain_gradient(flow, q).items():
        if G.ndim == 2:
            weight = torch.nn.Parameter(torch.zeros(*G.shape, dtype=torch.float64))
            weight.grad = torch.from_numpy(G)
            torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
            scale = max(1, G.shape[0] / G.shape[1]) ** 0.5
            assert np.linalg.norm(-weight.detach().numpy() / scale - step[name]) < 0.15 * np.linalg.norm(step[name])


def test_a_gradient_of_low_rank_keeps_its_zeros() -> None:
    """Of a single trial and time the gradient of a weight has rank one, and so has the step."""
    torch.manual_seed(0)
    problem = kp.DiscreteProblem(torch.nn.RNNCell(3, 5).double(), torch.randn(1, 1, 3).double())
    flow = kp.linearize(kp.solve(problem))
    q = error(flow)
    for rule in (rules.muon(flow, q), rules.muon(flow, 0 * q)):
        step = step_of(rule, flow, q)["weight_ih"]
        assert np.isfinite(step).all()
    step = step_of(rules.muon(flow, q), flow, q)["weight_ih"]
    np.testing.assert_allclose(np.linalg.svd(step)[1], [1, 0, 0], atol=1e-10)


def test_bad_requests() -> None:
    flow = flow_of("torch_rnn")
    q = error(flow)
    scaled = preconditioned(flow, kp.LearningRates(0.5).preconditioner(flow.parameters))
    for eps in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected a positive number"):
            rules.shampoo(flow, q, eps)
    for rule in (rules.shampoo, rules.muon):
        with pytest.raises(ValueError, match="has a metric of its own"):
            rule(scaled, q)
        with pytest.raises(ValueError, match="q has shape"):
            rule(flow, q[:1])
        with pytest.raises(TypeError, match="expected a Flow"):
            rule(flow.ntk, q)
    with pytest.raises(ValueError, match="expected a number of steps"):
        rules.muon(flow, q, newton_schulz=0)
    with pytest.raises(ValueError, match="damping is 0, expected a positive number"):
        rules.natural_gradient(flow, 0)


def test_muon_does_not_move_a_weight_without_a_gradient() -> None:
    cell = torch.nn.RNNCell(3, 4).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.randn(2, 1, 3).double())))  # z_0 = 0, one step
    for steps in (5, None):
        rule = kp.learning_rules.muon(flow, flow.solution.state, newton_schulz=steps)
        moved = flow.as_parameters(rule.gradient.mv(flow.solution.state))
        assert not moved["weight_hh"].any() and moved["weight_ih"].isfinite().all()


def test_a_target_without_its_loss_is_refused() -> None:
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 4), torch.randn(2, 5, 3))))
    with pytest.raises(ValueError, match="name it too"):
        kp.learning_rules.natural_gradient(flow, 0.1, target=torch.zeros(2, 5, 4))
