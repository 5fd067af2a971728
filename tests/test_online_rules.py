"""Online learning rules against published recursions, autograd through detached loops and dense definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import registry
import torch
from conftest import cases
from test_learning_rules import GatedInJax, gated
from test_metric import SOLUTIONS, assert_close, dense, flow_of, kronecker
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn import learning_rules as rules
from kpflow_dyn._arrays import Random, like_numpy, to_numpy
from kpflow_dyn._flows.flow import preconditioned
from kpflow_dyn._torch import trace

pytestmark = pytest.mark.usefixtures("x64")

ALL = {
    "eprop": rules.eprop,
    "rflo": lambda flow: rules.rflo(flow, 0.6),
    "duhamel": lambda flow: rules.duhamel(flow, 1),
    "rtrl": rules.rtrl,
    "snap": lambda flow: rules.snap(flow, 1),
    "uoro": lambda flow: rules.uoro(flow, seed=3, rank=2),
    "weight_mirror": lambda flow: rules.weight_mirror(flow, samples=20, seed=1),
}
CLOSE = 1e-10


# e-prop and RFLO as published


def leaky(cell: nn.Module, x: Tensor, z: Tensor, seen: Tensor) -> Tensor:
    return 0.7 * z + 0.3 * cell(x, seen)


def gru(cell: nn.GRUCell, x: Tensor, z: Tensor, seen: Tensor) -> Tensor:
    of_x, of_z = x @ cell.weight_ih.T + cell.bias_ih, seen @ cell.weight_hh.T + cell.bias_hh
    (r, u, n), (r_z, u_z, n_z) = of_x.chunk(3, -1), of_z.chunk(3, -1)
    r, u = torch.sigmoid(r + r_z), torch.sigmoid(u + u_z)
    return (1 - u) * torch.tanh(n + r * n_z) + u * z


def lstm(cell: nn.LSTMCell, x: Tensor, z: Tensor, seen: Tensor) -> Tensor:
    gates = x @ cell.weight_ih.T + cell.bias_ih + seen[:, :4] @ cell.weight_hh.T + cell.bias_hh
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * z[:, 4:] + torch.sigmoid(i) * torch.tanh(g)
    return torch.cat([torch.sigmoid(o) * torch.tanh(c), c], -1)


def two_layers(cell: nn.GRU, x: Tensor, z: Tensor, seen: Tensor) -> Tensor:
    """The second layer sees of the first what its weights do in this very step."""
    layers = [nn.GRUCell(n, 4).double() for n in (3, 4)]
    for i, layer in enumerate(layers):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(layer, name, getattr(cell, f"{name}_l{i}"))
    first, now = (gru(layers[0], x, of[:, :4], seen[:, :4]) for of in (z, seen))
    return torch.cat([first, gru(layers[1], now, z[:, 4:], seen[:, 4:])], -1)


PUBLISHED: dict[str, tuple[Callable[[], nn.Module], Callable, int]] = {
    "rnn": (lambda: nn.RNNCell(3, 4), lambda cell, x, z, seen: cell(x, seen), 4),
    "leaky": (lambda: kp.models.CTRNNCell(3, 4, alpha=0.3), leaky, 4),
    "gru": (lambda: nn.GRUCell(3, 4), gru, 4),
    "lstm": (lambda: nn.LSTMCell(3, 4), lstm, 8),
    "two layers": (lambda: nn.GRU(3, 4, num_layers=2, batch_first=True), two_layers, 8),
}


def problem_of(name: str) -> kp.DiscreteProblem:
    torch.manual_seed(5)
    make, _, units = PUBLISHED[name]
    x, z0 = torch.randn(2, 5, 3, dtype=torch.float64), 0.5 * torch.randn(2, units, dtype=torch.float64)
    return kp.DiscreteProblem(make().double(), x, z0)


def detached_loop(problem: kp.DiscreteProblem, step: Callable) -> Tensor:
    """The states, with weights that see the state before without its gradient."""
    z, found = problem.z0, []
    for x in problem.x.unbind(1):
        z = step(problem.cell, x, z, z.detach())
        found.append(z)
    return torch.stack(found, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_eprop_is_autograd_through_a_loop_with_detached_weights(name: str) -> None:
    problem, step = problem_of(name), PUBLISHED[name][1]
    if name == "leaky":
        step = own_leak(problem.cell)
    flow, states = kp.linearize(kp.solve(problem)), detached_loop(problem, step)
    assert_close(states.detach().numpy(), flow.solution.state.numpy(), CLOSE)
    q = torch.randn(3, *states.shape, dtype=torch.float64)
    learnt = [problem.cell.get_parameter(part) for part in flow.parameters]
    found = [torch.autograd.grad(states, learnt, each, retain_graph=True) for each in q]
    expected = torch.stack([torch.cat([g.reshape(-1) for g in each]) for each in found])
    rule = rules.eprop(flow)
    assert_close(rule.gradient.mv(q).numpy(), expected.numpy(), CLOSE)
    assert_close(rule.mv(q).numpy(), flow.J.mv(expected).numpy(), CLOSE)


def own_leak(cell: nn.Module) -> Callable:
    return lambda cell, x, z, seen: cell(x, seen) - 0.7 * seen + 0.7 * z


def test_rflo_is_the_recursion_of_murray() -> None:
    """h' = (1 - a) h + a tanh(W h + b): p_t[i, j] = (1 - a) p_{t-1}[i, j] + a tanh'(u_t[i]) h_{t-1}[j]."""
    torch.manual_seed(2)
    W, h0, a = torch.randn(4, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64), 0.3

    class Murray(registry.WithHiddenSize):
        def __init__(self) -> None:
            super().__init__()
            self.W = nn.Parameter(W)

        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return (1 - a) * h + a * torch.tanh(h @ self.W.T + x)

    x, q = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(Murray(), x, h0)))
    h, p, change = h0, torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for t in range(6):
        u = h @ W.T + x[:, t]
        p = (1 - a) * p + a * (1 - torch.tanh(u) ** 2)[:, :, None] * h[:, None]
        h = (1 - a) * h + a * torch.tanh(u)
        change += (q[:, t, :, None] * p).sum(0)
    for rule in (rules.rflo(flow), rules.rflo(flow, 0.7), rules.eprop(flow), rules.duhamel(flow, 0, "decay")):
        assert_close(rule.gradient.mv(q).numpy(), change.numpy().ravel(), CLOSE)


# Dense definitions


@pytest.fixture(scope="module", params=cases({**SOLUTIONS, "torch_lstm": 0}, {"torch_gru", "torch_ode", "jax_gru"}))
def flow(request: pytest.FixtureRequest, x64: None) -> kp.Flow:
    if request.param == "torch_lstm":
        return kp.linearize(kp.solve(registry.MODELS["lstm"].problem(True)))
    return flow_of(request.param).nodal


def matrices(flow: kp.Flow) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and B V, and J of the recurrence J_t = A_t J_{t-1} + B_t V_t, all on flat states."""
    A = np.eye(flow.P.domain.size) - dense(flow.P.inv)
    return A, dense(flow.K.factor), dense(flow.ntk.factor)


def solved(A: np.ndarray) -> np.ndarray:
    return np.linalg.inv(np.eye(len(A)) - A)


def constant(flow: kp.Flow, matrix: np.ndarray) -> np.ndarray:
    trials, times, _ = flow.P.domain.shape
    return np.kron(np.eye(trials), np.kron(np.eye(times, k=-1), matrix))


def test_rules_along_paths(flow: kp.Flow) -> None:
    A, kick, J = matrices(flow)
    times, units = flow.P.domain.shape[1:]
    M = 0.4 * np.random.default_rng(0).standard_normal((units, units))
    assert_close(dense(rules.rflo(flow, 0.6)), J @ (solved(constant(flow, 0.6 * np.eye(units))) @ kick).T, CLOSE)
    own = np.linalg.lstsq(J, dense(rules.duhamel(flow, 0)), rcond=None)[0]
    assert_close(J @ own, dense(rules.eprop(flow)), CLOSE)
    for base, A_0 in ((M, constant(flow, M)), (0.3, constant(flow, 0.3 * np.eye(units)))):
        P_0 = solved(A_0)
        for k in {0, 1, times - 2}:
            P_k = sum(np.linalg.matrix_power(P_0 @ (A - A_0), j) @ P_0 for j in range(k + 1))
            found = rules.duhamel(flow, k, base)
            assert_close(dense(found), J @ (P_k @ kick).T, CLOSE)
            assert_close(dense(found.T), (P_k @ kick) @ J.T, CLOSE)
    assert_close(dense(rules.duhamel(flow, 1, 0.0)), dense(rules.truncated_bptt(flow, 1)), CLOSE)
    for base in ("own", 0.5, M):
        assert_close(dense(rules.duhamel(flow, times - 1, base)), J @ J.T, CLOSE)


def test_influence_matrices(flow: kp.Flow) -> None:
    """RTRL is the ntk; SnAp-k is its recursion with the entries of the first k steps; SnAp of many steps is RTRL."""
    A, kick, J = matrices(flow)
    assert_close(dense(rules.rtrl(flow)), dense(flow.ntk), 1e-13)
    assert_close(dense(rules.snap(flow, 100)), dense(flow.ntk), CLOSE)
    trials, times, units = flow.P.domain.shape
    A, kicks = A.reshape(trials, times, units, trials, times, units), kick.reshape(trials, times, units, -1)
    first = (abs(kicks) > 0).any((0, 1))
    couples = np.array([abs(A[b, t, :, b, t - 1]) > 0 for b in range(trials) for t in range(1, times)]).any(0)
    for k, kept in ((1, first), (2, first | (couples.astype(int) @ first > 0))):
        E = np.zeros_like(kicks)
        for b in range(trials):
            for t in range(times):
                E[b, t] = kept * (kicks[b, t] + (A[b, t, :, b, t - 1] @ E[b, t - 1] if t else 0))
        found = rules.snap(flow, k)
        assert_close(dense(found), J @ E.reshape(J.shape).T, CLOSE)
        assert_close(dense(found.gradient), E.reshape(J.shape).T, CLOSE)


def test_adjoints_and_rules_that_are_one_gradient(flow: kp.Flow) -> None:
    for make in ALL.values():
        rule = make(flow)
        assert kp.check_adjoint(rule) < 1e-12
        q = rule.domain.normal(1, Random(0))
        assert_close(to_numpy(rule.mv(q)), to_numpy(flow.ntk.factor.mv(rule.gradient.mv(q))), CLOSE)


def test_snap_one_of_an_rnn_has_the_diagonal_of_the_jacobians() -> None:
    """E_t[i, (i, j)] = A_t[i, i] E_{t-1}[i, (i, j)] + phi'(u_t[i]) v_t[j]."""
    problem = problem_of("rnn")
    flow = kp.linearize(kp.solve(problem), params="weight_hh")
    state, W = flow.solution.state.numpy(), problem.cell.weight_hh.detach().numpy()
    before = np.concatenate([problem.z0.numpy()[:, None], state[:, :-1]], 1)
    E, found = np.zeros((2, 4, 4)), np.zeros((2, 5, 4, 4, 4))
    for t in range(5):
        slope = 1 - state[:, t] ** 2
        E = (slope * np.diag(W))[:, :, None] * E + slope[:, :, None] * before[:, t, None]
        found[:, t, range(4), range(4)] = E
    assert_close(dense(rules.snap(flow, 1).gradient), found.reshape(40, 16).T, CLOSE)


# Random rules


def test_uoro_is_of_rank_one_and_unbiased() -> None:
    flow = kp.linearize(kp.solve(problem_of("gru")))
    E = dense(rules.uoro(flow, seed=4).gradient).T.reshape(2, 5 * 8 // 2, -1)
    for trial in E:
        parts = trial.reshape(5, 4, -1)
        assert all(np.linalg.matrix_rank(part, tol=1e-10) == 1 for part in parts)
    J = dense(flow.J)
    found = np.stack([dense(rules.uoro(flow, seed=i).gradient).T for i in range(200)])
    mean, error = found.mean(0), found.std(0) / len(found) ** 0.5
    assert np.linalg.norm(mean - J) < 1.5 * np.linalg.norm(error)
    assert np.linalg.norm(error) < 0.5 * np.linalg.norm(J)
    one = np.stack([dense(rules.uoro(flow, seed=7).gradient) for _ in range(2)])
    assert (one[0] == one[1]).all()
    rng = Random(7)  # copies follow one another in the stream
    two = sum(dense(rules.uoro(flow, rng).gradient) for _ in range(2)) / 2
    assert_close(dense(rules.uoro(flow, 7, rank=2).gradient), two, CLOSE)


def test_a_weight_mirror_sees_the_weights_through_noise() -> None:
    flow = kp.linearize(kp.solve(problem_of("two layers")))
    rng, B = Random(1), {}

    def noted(name: str, W: Tensor) -> Tensor:
        x = rng.normal((20, W.shape[1]), W)
        B[name] = torch.stack([torch.outer(W @ each, each) for each in x]).mean(0)
        return B[name]

    flow.feedback(noted)
    expected = dense(rules.feedback_alignment(flow, matrices=B))
    assert_close(dense(rules.weight_mirror(flow, samples=20, seed=1)), expected, CLOSE)
    off = [np.linalg.norm(dense(rules.weight_mirror(flow, n)) - dense(flow.ntk)) for n in (100, 10000)]
    assert off[1] < 0.3 * off[0]


# Frameworks, masks, metrics, steps of training


def test_jax_agrees_with_torch() -> None:
    problem, _ = gated()
    twin = GatedInJax(**{name: jnp_of(p) for name, p in problem.cell.named_parameters()})
    theirs = kp.DiscreteProblem(twin, jnp_of(problem.x), jnp_of(problem.z0))
    flows = [kp.linearize(kp.solve(each)) for each in (problem, theirs)]
    q = np.random.default_rng(2).standard_normal((2, *flows[0].ntk.domain.shape))
    random = {"uoro", "weight_mirror"}  # whose numbers are drawn by the framework
    for make in (make for name, make in ALL.items() if name not in random):
        found = [to_numpy(make(flow).mv(like_numpy(q, flow.solution.state))) for flow in flows]
        assert_close(found[1], found[0], CLOSE)
    expected = to_numpy(flows[0].ntk.mv(like_numpy(q, flows[0].solution.state)))
    assert_close(to_numpy(rules.rtrl(flows[1]).mv(like_numpy(q, flows[1].solution.state))), expected, CLOSE)


def jnp_of(values: Tensor) -> object:
    import jax.numpy as jnp

    return jnp.asarray(values.detach().numpy())


@pytest.mark.parametrize("name", ["torch_gru", "jax_gru"])
def test_masks_and_metrics(name: str) -> None:
    """A = R J M^{-1} E* R with the E of all states and weights, also where places in between do not count."""
    plain = flow_of(name)
    trials, times, units = plain.P.domain.shape
    mask = np.ones((trials, times), bool)
    mask[0, 1] = mask[1, -1] = False
    metric, inverse = kronecker(plain)
    flow = preconditioned(plain, metric.preconditioner(plain.parameters)).where(mask)
    seen = np.repeat(mask.ravel(), units)
    for make in ALL.values():
        E = dense(make(plain).gradient).T
        expected = dense(plain.J) @ inverse @ E.T * seen[:, None] * seen
        assert_close(dense(make(flow)), expected, CLOSE)
    one = next(iter(plain.parameters))
    size = int(np.prod(plain.parameters[one].shape))
    assert_close(dense(rules.snap(plain.only(one), 1).gradient), dense(rules.snap(plain, 1).gradient)[:size], CLOSE)


def test_a_step_moves_the_states_as_the_rule_says() -> None:
    problem = problem_of("gru")
    flow, cell = kp.linearize(kp.solve(problem)), problem.cell
    q, kept = torch.randn(2, 5, 4, dtype=torch.float64), [p.detach().clone() for p in cell.parameters()]
    for make in ALL.values():
        rule, errors = make(flow), []
        changes = flow.as_parameters(rule.gradient.mv(q)).values()
        for lr in (1e-3, 1e-4):
            with torch.no_grad():
                for p, value, change in zip(cell.parameters(), kept, changes, strict=True):
                    p.copy_(value - lr * change)
            moved = kp.solve(problem).state - flow.solution.state
            errors.append(float((moved + lr * rule.mv(q)).norm()))
        assert errors[1] < 0.011 * errors[0]


def test_learnt_starts_and_truncated_sites() -> None:
    """A learnt start enters the first step as it is; a truncated flow has rules of its own sites."""
    problem = problem_of("gru")
    same = kp.DiscreteProblem(problem.cell, problem.x, problem.z0[:1].repeat(2, 1))
    started = kp.linearize(kp.solve(same.learn_start()))
    plain = kp.linearize(kp.solve(problem))
    assert started.J.domain.size == plain.J.domain.size + 4
    for flow in (started, plain.truncate(0.5)):
        assert_close(dense(rules.rtrl(flow)), dense(flow.ntk), CLOSE)
        assert_close(dense(rules.duhamel(flow, 4)), dense(flow.ntk), CLOSE)
        expected = dense(flow.J) @ (solved(constant(flow, 0.6 * np.eye(4))) @ dense(flow.K.factor)).T
        assert_close(dense(rules.rflo(flow, 0.6)), expected, CLOSE)


# What is refused


def test_refusals() -> None:
    flow, whole, problem = flow_of("torch_rnn"), flow_of("torch_ode"), problem_of("rnn")
    normed = kp.DiscreteProblem(nn.utils.parametrizations.weight_norm(problem.cell, "weight_hh"), problem.x, problem.z0)
    for make in ALL.values():
        with pytest.raises(ValueError, match=r"take flow\.nodal"):
            make(whole)
    with pytest.raises(ValueError, match="not one constant decay"):
        rules.rflo(kp.linearize(kp.solve(problem_of("gru"))))
    for call, message in (
        (lambda: rules.rflo(flow, float("nan")), "expected a finite number"),
        (lambda: rules.duhamel(flow, -1), "k is -1, expected a number of insertions"),
        (lambda: rules.duhamel(flow, 1, "all"), 'expected "own", "decay"'),
        (lambda: rules.duhamel(flow, 1, np.ones((2, 4))), r"\[unit, unit\] = \(4, 4\)"),
        (lambda: rules.snap(flow, 0), "k is 0, expected a number of steps, 1 or more"),
        (lambda: rules.uoro(flow, rank=True), "expected a number of copies"),
        (lambda: rules.weight_mirror(flow, 0.5), "expected a number of noise vectors"),
        (lambda: rules.eprop(kp.linearize(kp.solve(normed))), "divided by its norm"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_own_paths_through_matrices_that_are_no_parameters_are_said() -> None:
    flow = kp.linearize(kp.solve(registry.MODELS["reservoir"].problem(True)))
    with pytest.warns(UserWarning, match="reaches 4 units of 4"):
        rules.eprop(flow)


@pytest.mark.parametrize("make", [rules.rtrl, lambda flow: rules.snap(flow, 2), rules.uoro])
def test_matrices_that_are_too_large_are_refused(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpflow_dyn.learning_rules._paths.DENSE_BYTES", 100)
    with pytest.raises(ValueError, match="take fewer trials or times, a smaller network, or a rule such as eprop"):
        make(flow_of("torch_rnn"))


class Rectified(registry.WithHiddenSize):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(0.5 * torch.randn(4, 4))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.relu(z) @ self.W.T + x


def test_models_that_were_not_traced_have_no_own_paths_but_influence_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "MOVES", trace.MOVES | {torch.ops.aten.relu})  # a wrong trace, which is noticed
    torch.manual_seed(0)
    problem = kp.DiscreteProblem(Rectified().double(), torch.randn(2, 4, 4).double(), torch.randn(2, 4).double())
    with pytest.warns(kp.UntracedWarning):
        flow = kp.linearize(kp.solve(problem))
    assert flow.untraced
    assert_close(dense(rules.rtrl(flow)), dense(flow.ntk), CLOSE)
    with pytest.raises(ValueError, match="was not traced"):
        rules.eprop(flow)


def test_steps_that_look_up_several_states() -> None:
    """The own path of z' = -z + tanh(W z(t - 0.3)) is the leak, and all insertions of the delayed rest give the ntk."""
    torch.manual_seed(1)
    W = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    class Delayed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W = W

        def forward(self, t: Tensor, z: Tensor, past: Tensor) -> Tensor:
            return torch.tanh(past[0] @ self.W.T) - z

    problem = kp.DDEProblem(Delayed(), torch.randn(2, 3, dtype=torch.float64), np.arange(9) / 10, 0.3)
    flow = kp.linearize(kp.solve(problem, "euler")).nodal
    P_D = solved(constant(flow, 0.9 * np.eye(3)))
    assert_close(dense(rules.eprop(flow)), dense(flow.J) @ (P_D @ dense(flow.K.factor)).T, CLOSE)
    assert_close(dense(rules.duhamel(flow, 8)), dense(flow.ntk), CLOSE)
    with pytest.raises(ValueError, match="look up states of several times"):
        rules.rtrl(flow)
