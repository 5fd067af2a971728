"""The operators of every registered model against dense Jacobians of the real model, in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from registry import MODELS, dense_jacobian, dense_steps
from synthetic import check_apart

import kpflow_dyn as kp
from kpflow_dyn._recurrence.steps import tangent_of_cell
from kpflow_dyn._torch.program import DenseUpdate, EntriesUpdate, MatrixUpdate, ScaledUpdate
from kpflow_dyn._torch.tangent import Tangent
from kpflow_dyn.models import CTRNNCell

CASES = [(name, started) for name in MODELS for started in (False, True)]
IDS = [f"{name}-{'z0' if started else 'zero'}" for name, started in CASES]
# Weights that are computed, used in several places in different ways, or act through an operation of their own.
WITHOUT_SPECTRUM = {"ctrnn_learnt", "computed_weight", "tied", "meeting_twice", "attending"}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def not_a_number(self: Tangent, times: int, probes: int, width: int) -> torch.Tensor:
    return self.like.new_full((times, self.trials, probes, width), torch.nan)


@pytest.fixture(scope="module", autouse=True)
def work_memory_that_holds_the_worst() -> Iterator[None]:
    """Sweeps work in memory that they do not clear first: nothing may be read before it is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tangent, "_empty", not_a_number)
        yield


@pytest.fixture(scope="module", params=CASES, ids=IDS)
def flow(request: pytest.FixtureRequest) -> kp.Flow:
    name, started = request.param
    return kp.linearize(kp.solve(MODELS[name].problem(started)))


@pytest.fixture(scope="module")
def jacobian(flow: kp.Flow) -> torch.Tensor:
    return dense_jacobian(flow)


def test_state_jacobian_is_that_of_the_real_model(flow: kp.Flow, jacobian: torch.Tensor) -> None:
    assert relative(flow.J.dense(), jacobian) < 1e-10
    assert relative(flow.J.T.dense(), jacobian.T) < 1e-10


def test_ntk_is_propagated_kicks_three_ways(flow: kp.Flow, jacobian: torch.Tensor) -> None:
    expected = jacobian @ jacobian.T
    assert relative(flow.ntk.dense(), expected) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), expected) < 1e-10
    assert relative((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), expected) < 1e-10


def test_propagator_inverts_the_linearised_constraint(flow: kp.Flow) -> None:
    steps = dense_steps(flow)
    assert relative(flow.P.inv.dense(), steps) < 1e-10
    assert relative(flow.P.dense(), torch.linalg.inv(steps)) < 1e-10
    identity = torch.eye(flow.P.domain.size, dtype=torch.float64)
    assert relative((flow.P.inv @ flow.P).dense(), identity) < 1e-12


@pytest.mark.parametrize("name", ["P", "K", "core", "B", "J", "ntk"])
def test_adjointness(flow: kp.Flow, name: str) -> None:
    assert kp.check_adjoint(getattr(flow, name), seed=3) < 1e-12


def test_adjointness_of_the_inverse(flow: kp.Flow) -> None:
    assert kp.check_adjoint(flow.P.inv, seed=3) < 1e-12


def test_core_spectrum_follows_from_the_variables(flow: kp.Flow, request: pytest.FixtureRequest) -> None:
    spectrum = flow.core.spectrum()
    assert (spectrum is None) == (request.node.callspec.params["flow"][0] in WITHOUT_SPECTRUM)
    if spectrum is None:
        return
    values, counts = (torch.from_numpy(part.copy()) for part in spectrum)
    claimed = values.repeat_interleave(counts).sort(descending=True).values
    dense = torch.linalg.eigvalsh(flow.core.dense()).flip(0)
    size = min(len(claimed), len(dense))
    assert relative(claimed[:size], dense[:size]) < 1e-12
    assert float(claimed[size:].sum() + dense[size:].abs().sum()) < 1e-10 * float(dense.sum())


def test_gradient_step_moves_the_state_by_the_ntk(flow: kp.Flow) -> None:
    """Relative error of S(theta - eta g) - S = -eta NTK grad_S L falls linearly in eta."""
    state, problem = flow.solution.state, flow.solution.problem
    torch.manual_seed(1)
    target = torch.randn_like(state)
    predicted = -flow.ntk.mv(state - target)
    gradient = flow.as_parameters(flow.J.T.mv(state - target))
    kept = {name: p.detach().clone() for name, p in problem.cell.named_parameters()}
    errors = []
    for eta in (1e-4, 1e-5):
        with torch.no_grad():
            for name, p in problem.cell.named_parameters():
                p.copy_(kept[name] - eta * gradient[name] if name in gradient else kept[name])
            moved = (kp.solve(problem).state - state) / eta
            for name, p in problem.cell.named_parameters():
                p.copy_(kept[name])
        errors.append(float((moved - predicted).norm() / predicted.norm()))
    assert errors[1] < 1e-2
    assert errors[1] < 0.15 * errors[0]


def test_gradient_agrees_with_backpropagation(flow: kp.Flow) -> None:
    problem, state = flow.solution.problem, flow.solution.state
    from kpflow_dyn._torch.cells import as_step

    step, z = as_step(problem.cell, problem.x, problem.z0)
    q, loss = torch.randn_like(state), 0.0
    for t, x_t in enumerate(problem.x.unbind(1)):
        z = step(problem.cell, x_t, z)
        loss = loss + (z * q[:, t]).sum()
    named = {n: p for n, p in problem.cell.named_parameters() if n in flow.parameters}
    found = flow.as_parameters(flow.J.T.mv(q))
    for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def test_leaky_current_kernel_is_the_gram_matrix() -> None:
    """K = a^2 V V^T (x) I with v = [phi(h_prev), x, 1], no derivative of phi anywhere."""
    torch.manual_seed(0)
    cell = CTRNNCell(3, 5, alpha=0.2).double()
    x, z0 = torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    solution = kp.solve(kp.DiscreteProblem(cell, x, z0))
    before = torch.cat([z0[:, None], solution.state[:, :-1]], 1)
    variables = torch.cat([torch.tanh(before), x, torch.ones(2, 6, 1, dtype=torch.float64)], -1).reshape(12, -1)
    expected = 0.04 * torch.kron(variables @ variables.T, torch.eye(5, dtype=torch.float64))
    assert relative(kp.linearize(solution).K.dense(), expected) < 1e-12


def test_tanh_rnn_kernel_has_the_derivative_on_both_sides() -> None:
    torch.manual_seed(0)
    cell = torch.nn.RNNCell(3, 5).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64)
    solution = kp.solve(kp.DiscreteProblem(cell, x))
    before = torch.cat([torch.zeros(2, 1, 5, dtype=torch.float64), solution.state[:, :-1]], 1)
    variables = torch.cat([before, x, torch.ones(2, 6, 2, dtype=torch.float64)], -1).reshape(12, -1)
    d = (1 - solution.state**2).reshape(-1)
    gram = torch.kron(variables @ variables.T, torch.eye(5, dtype=torch.float64))
    kernel = kp.linearize(solution).K.dense()
    assert relative(kernel, d[:, None] * gram * d) < 1e-12
    assert relative(kernel, gram) > 0.1


@pytest.mark.parametrize("name", list(MODELS))
def test_float32_is_float64_to_1e4(name: str) -> None:
    flow64 = kp.linearize(kp.solve(MODELS[name].problem(True)))
    model = MODELS[name].problem(True)
    cell = model.cell.float()
    z0 = tuple(p.float() for p in model.z0) if isinstance(model.z0, tuple) else model.z0.float()
    flow32 = kp.linearize(kp.solve(kp.DiscreteProblem(cell, model.x.float(), z0)))
    assert flow32.ntk.domain.dtype == torch.float32
    for operator in ("P", "K", "ntk"):
        dense = getattr(flow32, operator).dense().double()
        assert relative(dense, getattr(flow64, operator).dense()) < 1e-4


def test_training_after_linearize_changes_nothing() -> None:
    problem = MODELS["gru_cell"].problem(True)
    flow = kp.linearize(kp.solve(problem))
    q = torch.randn(3, *flow.ntk.domain.shape, dtype=torch.float64)
    before = [getattr(flow, name).mv(q) for name in ("P", "K", "ntk")]
    with torch.no_grad():
        for p in problem.cell.parameters():
            p.add_(torch.randn_like(p))
        problem.x.add_(1.0)
    for name, value in zip(("P", "K", "ntk"), before, strict=True):
        assert torch.equal(getattr(flow, name).mv(q), value)


def test_same_arguments_same_result() -> None:
    flows = [kp.linearize(kp.solve(MODELS["lstm"].problem(True))) for _ in range(2)]
    q = torch.ones(flows[0].ntk.domain.shape, dtype=torch.float64)
    assert torch.equal(flows[0].ntk.mv(q), flows[1].ntk.mv(q))


def test_chosen_parameters_alone_learn() -> None:
    problem = MODELS["gru_cell"].problem(True)
    full = dense_jacobian(kp.linearize(kp.solve(problem)))
    flow = kp.linearize(kp.solve(problem), params="weight_hh")
    assert list(flow.parameters) == ["weight_hh"]
    sizes = [p.numel() for p in problem.cell.parameters()]
    part = full[:, sizes[0] : sizes[0] + sizes[1]]
    assert relative(flow.J.dense(), part) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), part @ part.T) < 1e-10
    biases = kp.linearize(kp.solve(problem), params=lambda name, _: name.startswith("bias"))
    by_name = kp.linearize(kp.solve(problem), params=lambda name: name.startswith("bias"))
    assert list(by_name.parameters) == list(biases.parameters)
    assert list(biases.parameters) == ["bias_ih", "bias_hh"]


def test_many_probes_in_one_call_are_single_probes() -> None:
    flow = kp.linearize(kp.solve(MODELS["lstm_cell"].problem(True)))
    q = torch.randn(2, 3, *flow.ntk.domain.shape, dtype=torch.float64)
    together = flow.ntk.mv(q)
    assert together.shape == q.shape
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(flow.ntk.mv(q[i, j]), together[i, j], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["segments", "entries", "dense", "traced"])
@pytest.mark.parametrize("name", ["gru_cell", "attending", "normalised", "pair_state", "lstm"])
def test_every_form_of_the_glue_gives_the_same(name: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments, entries, dense blocks and the traced function itself, where the pattern allows the first."""
    if form != "segments":
        monkeypatch.setattr("kpflow_dyn._torch.pattern.MAX_SEGMENTS", 0)
        monkeypatch.setattr("kpflow_dyn._torch.plan.SPARSE", 0 if form == "entries" else 10**9)
    if form == "traced":
        monkeypatch.setattr("kpflow_dyn._torch.plan.BLOCKS_BYTES", 0)
    flow = kp.linearize(kp.solve(MODELS[name].problem(True)))
    jacobian = dense_jacobian(flow)
    assert relative(flow.ntk.dense(), jacobian @ jacobian.T) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), jacobian @ jacobian.T) < 1e-10
    assert relative(flow.P.inv.dense(), dense_steps(flow)) < 1e-10
    assert kp.check_adjoint(flow.P) < 1e-12


@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "ctrnn_learnt", "concatenating", "low_rank", "normalised"])
def test_elementwise_cells_keep_no_dense_blocks(name: str) -> None:
    """What is kept of a step grows with units, not with units squared: products and elementwise coefficients."""
    tangent, _ = tangent_of_cell(kp.solve(MODELS[name].problem(True)), None)
    assert all(isinstance(update, MatrixUpdate | ScaledUpdate) for update in tangent.updates)
    numbers = sum(
        u.coefficients.numel() for u in tangent.updates if isinstance(u, ScaledUpdate) and u.coefficients is not None
    )
    assert numbers <= 20 * tangent.times * tangent.trials * tangent.units


class Synapses(torch.nn.Module):
    """A weight for each pair of units inside of the nonlinearity, as in liquid time-constant networks."""

    hidden_size = 16

    def __init__(self) -> None:
        super().__init__()
        self.threshold, self.gain = (torch.nn.Parameter(torch.randn(16, 16)) for _ in range(2))

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            z = 0.5 * z + x + torch.tanh(self.gain * (z[:, :, None] - self.threshold)).mean(1)
        return z


def test_a_step_that_is_mostly_zero_keeps_its_entries_alone() -> None:
    torch.manual_seed(0)
    problem = kp.DiscreteProblem(Synapses().double(), torch.randn(2, 3, 16, dtype=torch.float64))
    tangent, _ = tangent_of_cell(kp.solve(problem), None)
    kept = [u for u in tangent.updates if isinstance(u, EntriesUpdate)]
    assert kept and not any(isinstance(u, DenseUpdate) for u in tangent.updates)
    assert sum(u.entries[0, 0].numel() for u in kept) < 10 * 16 * 16  # of 544 x 1000
    flow = kp.linearize(kp.solve(problem))
    jacobian = dense_jacobian(flow)
    assert relative(flow.J.dense(), jacobian) < 1e-12
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), jacobian @ jacobian.T) < 1e-12


@pytest.mark.parametrize("times", [1, 2, 37])
def test_spans_of_any_length_join(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweeps go span by span; how time is cut must not be seen."""
    torch.manual_seed(0)
    cell, x = torch.nn.GRUCell(2, 3).double(), torch.randn(2, times, 2, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    q = torch.randn(2, 2, times, 3, dtype=torch.float64)
    whole = [op.mv(q) for op in (flow.P, flow.P.T, flow.ntk)]
    monkeypatch.setattr("kpflow_dyn._arrays.memory.SPAN_BYTES", 1)
    monkeypatch.setattr("kpflow_dyn._torch.sweeps.ROWS_TOGETHER", 1)
    for op, expected in zip((flow.P, flow.P.T, flow.ntk), whole, strict=True):
        torch.testing.assert_close(op.mv(q), expected, rtol=1e-12, atol=1e-12)


def test_each_trial_by_itself_has_the_blocks_of_the_ntk_within_trials(flow: kp.Flow) -> None:
    check_apart(flow.ntk)


def test_no_probes_have_no_images() -> None:
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 4), torch.ones(2, 5, 3))))
    for op in (flow.P, flow.K, flow.J, flow.J.T, flow.ntk):
        assert op.mv(torch.zeros(0, *op.domain.shape)).shape == (0, *op.codomain.shape)
