"""Learning rules against their dense definitions, and readouts against theirs."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import registry
import torch
from conftest import cases
from synthetic import check_apart
from test_metric import SOLUTIONS, assert_close, dense, flow_of, is_jax, kronecker
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn import learning_rules as rules
from kpflow_dyn._arrays import like_numpy, to_numpy
from kpflow_dyn._flows.flow import preconditioned

pytestmark = pytest.mark.usefixtures("x64")

QUICK = {"torch_gru", "torch_ode"}


@pytest.fixture(scope="module", params=cases(SOLUTIONS, QUICK))
def flow(request: pytest.FixtureRequest, x64: None) -> kp.Flow:
    return flow_of(request.param).nodal


def within(space: kp.Space, k: int) -> np.ndarray:
    """Which entries [state, state] lie at most k steps apart."""
    trials, times, units = space.shape
    apart = np.subtract.outer(np.arange(times), np.arange(times))
    return np.kron(np.ones((trials, trials)), np.kron(apart <= k, np.ones((units, units))))


def test_rules_are_what_they_are_defined_as(flow: kp.Flow) -> None:
    P, K = dense(flow.P), dense(flow.K)
    times = P.shape[0] // (flow.P.domain.shape[0] * flow.P.domain.shape[2])
    assert_close(dense(rules.bptt(flow)), P @ K @ P.T)
    assert_close(dense(rules.functional_gradient_descent(flow)), P @ P.T)
    for k in {0, 1, times - 1}:
        found = rules.truncated_bptt(flow, k)
        expected = P @ K @ (P * within(flow.P.domain, k)).T
        assert_close(dense(found), expected)
        assert_close(dense(found.T), expected.T)
        assert k == times - 1 or kp.alignment(found, flow.ntk).value == pytest.approx(cosine(expected, P @ K @ P.T))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("solver", ["by eigenvectors", "by conjugate gradients"])
def test_gauss_newton(flow: kp.Flow, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if solver == "by conjugate gradients":
        monkeypatch.setattr("kpflow_dyn.learning_rules._second_order.CHEAP", 0)
    J = dense(flow.J.T).T
    damping = 0.03 * np.linalg.norm(J, 2) ** 2
    found = dense(rules.gauss_newton(flow, damping))
    assert_close(found, J @ np.linalg.solve(J.T @ J + damping * np.eye(J.shape[1]), J.T))


@pytest.mark.parametrize("name", ["torch_rnn", "torch_ode"])
def test_gauss_newton_from_the_side_of_fewer_parameters_and_with_a_measure(name: str) -> None:
    whole = flow_of(name)
    flow = whole.only(list(whole.parameters)[-1])
    J = dense(flow.J)
    assert J.shape[1] < J.shape[0]
    expected = J @ np.linalg.solve(J.T @ J + 0.1 * np.eye(J.shape[1]), J.T)
    assert_close(dense(rules.gauss_newton(flow, 0.1)), expected)


def test_conjugate_gradients_that_do_not_converge_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpflow_dyn.learning_rules._second_order.CHEAP", 0)
    flow = kp.linearize(kp.solve(registry.MODELS["lstm"].problem(True)))
    with pytest.warns(UserWarning, match="raise the damping"):
        rules.gauss_newton(flow, 1e-18).mv(torch.ones(flow.ntk.domain.shape, dtype=torch.float64))


# Feedback alignment


class Gated(nn.Module):
    """A gate and a candidate, whose products can be taken with feedback matrices backward."""

    hidden_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.W, self.G, self.M = (nn.Parameter(0.7 * torch.randn(4, 4)) for _ in range(3))
        self.U, self.b = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
        self.feedback: dict[str, Tensor] = {}

    def times(self, name: str, z: Tensor) -> Tensor:
        """W z; backward B^T in the place of W^T where there is a feedback matrix B."""
        W = getattr(self, name)
        if name not in self.feedback:
            return z @ W.T
        fed = z @ self.feedback[name].T
        return z.detach() @ W.T + fed - fed.detach()

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        gate = torch.sigmoid(self.times("G", z) + x @ self.U.T)
        inner = torch.tanh(self.times("W", gate * z) + self.b)
        return (1 - gate) * z + torch.sin(self.times("M", inner))


class GatedInJax(eqx.Module):
    """The same, forward."""

    W: jax.Array
    G: jax.Array
    M: jax.Array
    U: jax.Array
    b: jax.Array

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        gate = jax.nn.sigmoid(self.G @ z + self.U @ x)
        inner = jnp.tanh(self.W @ (gate * z) + self.b)
        return (1 - gate) * z + jnp.sin(self.M @ inner)


class Field(Gated):
    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.cos(t) * super().forward(torch.ones(len(z), 3, dtype=z.dtype), z)


def gated() -> tuple[kp.DiscreteProblem, dict[str, Tensor]]:
    torch.manual_seed(3)
    problem = kp.DiscreteProblem(Gated().double(), torch.randn(2, 5, 3).double(), torch.randn(2, 4).double())
    return problem, {name: torch.randn(4, 4, dtype=torch.float64) for name in ("W", "G", "M")}


def by_autograd(states: object, module: Gated, feedback: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """J and J_B [state, parameter], by reverse mode through the loop itself."""
    found = []
    for module.feedback in ({}, feedback):
        named = dict(module.named_parameters())
        state = states()
        rows = [torch.autograd.grad(s, list(named.values()), retain_graph=True) for s in state.reshape(-1)]
        found.append(torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).numpy())
    module.feedback = {}
    return tuple(found)


def test_feedback_alignment_is_backpropagation_through_other_matrices() -> None:
    problem, feedback = gated()

    def states() -> Tensor:
        z, found = problem.z0, []
        for x in problem.x.unbind(1):
            z = problem.cell(x, z)
            found.append(z)
        return torch.stack(found, 1)

    J, fed = by_autograd(states, problem.cell, feedback)
    flow = kp.linearize(kp.solve(problem))
    rule = rules.feedback_alignment(flow, matrices=feedback)
    assert_close(dense(rule), J @ fed.T)
    assert_close(dense(rule.T), fed @ J.T)
    weights = {name: getattr(problem.cell, name).detach() for name in feedback}
    assert_close(dense(rules.feedback_alignment(flow, matrices=weights)), J @ J.T)
    assert kp.alignment(rule, flow.ntk).value == pytest.approx(cosine(J @ fed.T, J @ J.T))
    metric, inverse = kronecker(flow)
    rule = rules.feedback_alignment(preconditioned(flow, metric.preconditioner(flow.parameters)), matrices=feedback)
    assert_close(dense(rule), J @ inverse @ fed.T)


def test_jax_agrees_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rules, readouts and parts, on the same weights."""
    problem, feedback = gated()
    twin = GatedInJax(**{name: jnp.asarray(p.detach().numpy()) for name, p in problem.cell.named_parameters()})
    theirs = kp.DiscreteProblem(twin, jnp.asarray(problem.x.numpy()), jnp.asarray(problem.z0.numpy()))
    flows = [kp.linearize(kp.solve(each)) for each in (problem, theirs)]
    q = np.random.default_rng(2).standard_normal((2, *flows[0].ntk.domain.shape))
    monkeypatch.setattr("kpflow_dyn.learning_rules._second_order.CHEAP", 0)
    names, C = ["b", "W"], np.ones((2, 4))
    for of in (
        lambda flow: rules.feedback_alignment(flow, matrices=feedback),
        lambda flow: rules.truncated_bptt(flow, 1),
        lambda flow: rules.functional_gradient_descent(flow),
        lambda flow: rules.gauss_newton(flow, 0.5),
        lambda flow: flow.only(names).ntk,
        lambda flow: flow.output(C, learn=True).ntk @ flow.output(C).C,
    ):
        found = [to_numpy(of(flow).mv(like_numpy(q, flow.solution.state))) for flow in flows]
        assert_close(found[1], found[0])
    ours, others = (kp.contributions(flow.only(names)) for flow in flows)
    assert {name: part.value for name, part in others.items()} == pytest.approx({n: p.value for n, p in ours.items()})


def test_feedback_alignment_in_the_steps_of_an_ode() -> None:
    torch.manual_seed(4)
    field, grid = Field().double(), np.linspace(0, 0.6, 4)
    z0, feedback = torch.randn(2, 4).double(), gated()[1]

    def states() -> Tensor:
        z, found = z0, [z0 + 0 * sum(p.sum() for p in field.parameters())]
        for t, h in zip(torch.from_numpy(grid), np.diff(grid), strict=False):
            z = z + h * field(t + h / 2, z + h / 2 * field(t, z))
            found.append(z)
        return torch.stack(found, 1)

    J, fed = by_autograd(states, field, feedback)
    flow = kp.linearize(kp.solve(kp.ODEProblem(field, z0, grid), "midpoint")).nodal
    assert_close(dense(flow.J), J)
    assert_close(dense(rules.feedback_alignment(flow, matrices=feedback)), J @ fed.T)


def test_of_a_single_layer_it_changes_the_propagator_alone() -> None:
    """P K P_B* with l_t = B^T D_{t+1} l_{t+1} + q_t for h' = tanh(W h + ...)."""
    flow = flow_of("torch_rnn")
    state = flow.solution.state
    trials, times, units = state.shape
    B = np.random.default_rng(0).standard_normal((units, units))
    inverse = np.eye(state.numel()).reshape(*state.shape, *state.shape)
    for b in range(trials):
        for t in range(1, times):
            inverse[b, t, :, b, t - 1] -= (1 - state[b, t] ** 2).numpy()[:, None] * B
    P_B = np.linalg.inv(inverse.reshape(state.numel(), -1))
    found = rules.feedback_alignment(flow, matrices={"weight_hh": B})
    assert_close(dense(found), dense(flow.P) @ dense(flow.K) @ P_B.T)


def test_random_feedback_is_of_the_size_of_the_weights() -> None:
    drawn: dict[str, Tensor] = {}
    torch.manual_seed(0)
    cell, x = nn.RNNCell(3, 30).double(), torch.randn(1, 3, 3, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)), params="weight_ih")

    def noted(rule: object) -> object:
        return lambda draw: rule(lambda name, W: drawn.setdefault(name, draw(name, W)))

    object.__setattr__(flow, "feedback", noted(flow.feedback))
    first = rules.feedback_alignment(flow, seed=1)
    assert set(drawn) == {"weight_ih", "weight_hh"}  # also of what does not learn
    B, W = drawn["weight_hh"], cell.weight_hh.detach()
    assert float(B.square().mean() / W.square().mean()) == pytest.approx(1, abs=0.15)
    assert abs(float((B * W).mean() / W.square().mean())) < 0.15
    q = torch.randn(flow.ntk.domain.shape, dtype=torch.float64)
    drawn.clear()
    assert torch.equal(first.mv(q), rules.feedback_alignment(flow, seed=1).mv(q))
    assert not torch.equal(first.mv(q), flow.ntk.mv(q))


def test_rules_align_by_probes_too() -> None:
    problem, feedback = gated()
    flow = kp.linearize(kp.solve(problem))
    rule = rules.feedback_alignment(flow, matrices=feedback)
    exact, found = kp.alignment(rule, flow.ntk), kp.alignment(rule, flow.ntk, samples=30)
    assert abs(found.value - exact.value) < 4 * found.stderr + 1e-9


def test_bad_requests() -> None:
    whole = flow_of("torch_ode")
    flow = flow_of("torch_rnn")
    for k in (-1, 1.5, True):
        with pytest.raises(ValueError, match="expected a number of steps"):
            rules.truncated_bptt(flow, k)
    for damping in (0.0, -1.0, float("nan"), "some"):
        with pytest.raises(ValueError, match="expected a positive number"):
            rules.gauss_newton(flow, damping)
    with pytest.raises(ValueError, match=r"take flow\.nodal"):
        rules.truncated_bptt(whole, 1)
    with pytest.raises(ValueError, match=r"take flow\.nodal"):
        rules.feedback_alignment(whole)
    with pytest.raises(
        ValueError, match=r"unknown parameters \['weight'\]; the matrices are \['weight_hh', 'weight_ih"
    ):
        rules.feedback_alignment(flow, matrices={"weight": torch.ones(4, 4)})
    with pytest.raises(ValueError, match=r"has shape \(3, 4\), expected \(4, 4\)"):
        rules.feedback_alignment(flow, matrices={"weight_hh": torch.ones(3, 4)})


# Readouts


@pytest.mark.parametrize("name", cases(SOLUTIONS, {"torch_gru", "torch_ode"}))
def test_output_is_the_kernel_of_the_readout(name: str) -> None:
    plain = flow_of(name)
    flow = preconditioned(plain, kp.LearningRates(0.7).preconditioner(plain.parameters))
    trials, times, units = flow.ntk.domain.shape
    rng = np.random.default_rng(1)
    C, ntk, eye = rng.standard_normal((3, units)), dense(flow.ntk), np.eye(trials * times)
    fixed = np.kron(eye, C) @ ntk @ np.kron(eye, C).T
    layer = linear(C, is_jax(flow))
    assert flow.output(C).ntk.domain.axes == ("trial", "time", "out")
    assert_close(dense(flow.output(C).ntk), fixed)
    assert_close(dense(flow.output(layer).ntk), fixed)
    measure = 1.0 if flow.ntk.domain.measure is None else to_numpy(flow.ntk.domain.measure)
    root = (np.ones((trials, times, 1)) * measure).reshape(-1) ** 0.5
    s = to_numpy(flow.solution.state).reshape(-1, units)
    own = {True: s @ s.T + 1, False: s @ s.T}
    for readout, bias, rate in ((C, False, True), (layer, True, 0.25)):
        y = flow.output(readout, learn=rate)
        gram = rate * root[:, None] * own[bias] * root
        assert_close(dense(y.ntk), fixed + np.kron(gram, np.eye(3)))
        assert_close(dense(y.J @ y.J.T), dense(y.ntk))
        assert kp.check_adjoint(y.J) < 1e-12
        check_apart(y.ntk)
        found = kp.contributions(y)
        assert list(found) == [*flow.parameters, "readout.weight", "readout.bias"][: len(flow.parameters) + 1 + bias]
        whole = rate * (root**2 @ (s**2).sum(1)) * 3
        assert found["readout.weight"].value == pytest.approx(whole)
        assert found.total.value == pytest.approx(np.trace(dense(y.ntk)))


def linear(C: np.ndarray, in_jax: bool) -> object:
    out, units = C.shape
    if in_jax:
        layer = eqx.nn.Linear(units, out, key=jax.random.key(0))
        return eqx.tree_at(lambda layer: layer.weight, layer, jnp.asarray(C))
    layer = nn.Linear(units, out).double()
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(C))
    return layer


def test_an_output_step_moves_the_output_by_its_ntk() -> None:
    """One step of gradient descent on the model and its readout, with an error that falls linearly with the step."""
    problem, _ = gated()
    solution, layer = kp.solve(problem), nn.Linear(4, 2).double()
    y = kp.linearize(solution).output(layer, learn=True)
    output = layer(solution.state).detach()
    q = torch.randn(output.shape, dtype=torch.float64)
    modules, errors = nn.ModuleList([problem.cell, layer]), []
    kept = [p.detach().clone() for p in modules.parameters()]
    gradient = y.J.T.mv(q).split([p.numel() for p in modules.parameters()])
    # The readout's changes are [unit, out], one column after another.
    gradient = [*gradient[:-2], gradient[-2].reshape(4, 2).T.reshape(-1), gradient[-1]]
    for eta in (1e-4, 1e-5):
        with torch.no_grad():
            for p, value, g in zip(modules.parameters(), kept, gradient, strict=True):
                p.copy_(value - eta * g.reshape(p.shape))
            moved = (layer(kp.solve(problem).state) - output) / eta
        errors.append(float((moved + y.ntk.mv(q)).norm() / moved.norm()))
    assert errors[1] < 1e-2
    assert errors[1] < 0.15 * errors[0]


def test_readouts_that_do_not_fit() -> None:
    flow = flow_of("torch_rnn")
    for C, message in ((np.ones((2, 3)), "unit = 4"), (np.ones(4), "unit = 4"), (np.full((1, 4), np.nan), "finite")):
        with pytest.raises(ValueError, match=message):
            flow.output(C)
    with pytest.raises(ValueError, match="expected True, False or a learning rate"):
        flow.output(np.ones((1, 4)), learn=-1.0)
    span = kp.linearize(
        kp.solve(kp.ODEProblem(Field().double(), torch.ones(1, 4).double(), (0.0, 1.0)), "rk4", steps=0.5)
    )
    wide = span.nodal.ntk.domain.shape[2]
    assert wide > 4
    with pytest.raises(ValueError, match=r"not of flow\.nodal"):
        span.nodal.output(np.ones((1, wide)), learn=True)
