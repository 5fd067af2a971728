"""Each bad input that a user can hand over raises, saying what came and what to do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._torch import trace


def solve(cell: object, x: object = None, z0: object = None) -> kp.Solution:
    return kp.solve(kp.DiscreteProblem(cell, torch.randn(2, 5, 3) if x is None else x, z0))


class Cell(nn.Module):
    """z' = step(x, z) of a function given by a test, with one parameter."""

    hidden_size = 4

    def __init__(self, step) -> None:
        super().__init__()
        self.step, self.W = step, nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.step(self.W, x, z)


def test_shapes_of_the_input() -> None:
    cell = nn.GRUCell(3, 4)
    with pytest.raises(ValueError, match=r"\[trial, time, input\].*x\[None\]"):
        solve(cell, torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"2 input channels, but the cell takes 3"):
        solve(cell, torch.randn(2, 5, 2))
    with pytest.raises(ValueError, match=r"0 input channels, but the cell takes 3"):
        solve(cell, torch.randn(2, 5, 0))
    for shape in ((0, 5, 3), (2, 0, 3)):
        with pytest.raises(ValueError, match=r"needs a trial and a time"):
            solve(cell, torch.randn(shape))
    with pytest.raises(TypeError, match=r"torch tensor"):
        solve(cell, [[1.0]])
    with pytest.raises(TypeError, match=r"float32 or float64"):
        solve(cell, torch.ones(2, 5, 3, dtype=torch.int64))


def test_initial_states() -> None:
    cell = nn.GRUCell(3, 4)
    with pytest.raises(ValueError, match=r"z0 has shape \(3, 4\), expected .*\[2, 4\]"):
        solve(cell, z0=torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"z0 has shape \(2, 5\)"):
        solve(cell, z0=torch.zeros(2, 5))
    with pytest.raises(TypeError, match=r"z0 is torch.float64"):
        solve(cell, z0=torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"z0 holds NaN"):
        solve(cell, z0=torch.full((2, 4), torch.nan))
    with pytest.raises(ValueError, match=r"the same trials"):
        solve(nn.LSTMCell(3, 4), z0=(torch.zeros(2, 4), torch.zeros(1, 4)))
    with pytest.raises(TypeError, match=r"expected a tensor"):
        solve(cell, z0=[0.0, 1.0])
    unsized = Cell(lambda W, x, z: torch.tanh(z @ W))
    unsized.hidden_size = None
    with pytest.raises(ValueError, match=r"hidden_size.*pass z0"):
        solve(unsized)


def test_one_initial_state_serves_all_trials_and_torch_layout_is_understood() -> None:
    x = torch.randn(2, 5, 3)
    one, cell = torch.randn(4), nn.GRUCell(3, 4)
    torch.testing.assert_close(solve(cell, x, one).state, solve(cell, x, one.expand(2, 4)).state)
    lstm = nn.LSTM(3, 4, num_layers=2)
    h, c = torch.randn(2, 2, 4), torch.randn(2, 2, 4)
    state = solve(lstm, x, (h, c)).state
    output, (h_n, c_n) = lstm(x.transpose(0, 1), (h, c))
    torch.testing.assert_close(state[:, :, 4:8].transpose(0, 1), output)
    torch.testing.assert_close(state[:, -1], torch.cat([*h_n, *c_n], -1))


def test_numbers_that_are_not_finite_name_the_first_step() -> None:
    x = torch.randn(2, 5, 3)
    x[1, 3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"x holds NaN or inf, first at step 3 \(trial 1\)"):
        solve(nn.GRUCell(3, 4), x)
    cell = nn.GRUCell(3, 4)
    with torch.no_grad():
        cell.weight_hh[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"parameter weight_hh holds NaN or inf"):
        solve(cell)
    explosive = Cell(lambda W, x, z: (z + 2) ** 8)
    with pytest.raises(ValueError, match=r"the state holds NaN or inf, first at step \d+"):
        solve(explosive)


def test_steps_without_a_derivative_somewhere() -> None:
    solution = solve(Cell(lambda W, x, z: torch.sqrt((z @ W).abs())))
    with pytest.raises(ValueError, match=r"derivative of the step holds NaN or inf, first at step 0 \(trial 0\)"):
        kp.linearize(solution)


def test_an_operation_that_is_misread_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong table of operations must not give a wrong number: autograd through the module checks each flow."""
    monkeypatch.setattr(trace, "MOVES", trace.MOVES | {torch.ops.aten.relu})
    solution = solve(Cell(lambda W, x, z: torch.relu(z) @ W + x.sum(-1, keepdim=True)))
    with pytest.warns(kp.UntracedWarning, match=r"the trace is not the model.*off by"):
        flow = kp.linearize(solution)
    assert flow.sites == [] and flow.untraced


def test_dtypes_must_agree() -> None:
    with pytest.raises(TypeError, match=r"weight_ih is torch.float32 but x is torch.float64"):
        solve(nn.GRUCell(3, 4), torch.randn(2, 5, 3, dtype=torch.float64))


def test_devices_must_agree() -> None:
    with pytest.raises(ValueError, match=r"weight_ih lies on meta but x on cpu; move one"):
        solve(nn.GRUCell(3, 4, device="meta"))


def test_active_dropout_and_batch_norm() -> None:
    with pytest.raises(ValueError, match=r"drops out with p = 0.5 in train mode.*eval\(\)"):
        solve(nn.GRU(3, 4, num_layers=2, dropout=0.5))
    solve(nn.GRU(3, 4, num_layers=2, dropout=0.5).eval())
    cell = Cell(lambda W, x, z: torch.tanh(cell.drop(z) @ W))
    cell.drop = nn.Dropout(0.2)
    with pytest.raises(ValueError, match=r"drop drops out with p = 0.2"):
        solve(cell)
    normed = Cell(lambda W, x, z: normed.norm(z @ W))
    normed.norm = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match=r"couples the trials"):
        solve(normed)


def test_steps_that_are_no_functions() -> None:
    with pytest.raises(ValueError, match=r"two results for the same arguments"):
        solve(Cell(lambda W, x, z: torch.tanh(z @ W) + torch.rand_like(z)))

    def in_place(W: Tensor, x: Tensor, z: Tensor) -> Tensor:
        z += 1.0
        return torch.tanh(z @ W)

    with pytest.raises(ValueError, match=r"writes to its arguments"):
        solve(Cell(in_place))
    with pytest.raises(ValueError, match=r"returned \(2, 3\).*expected the next state \(2, 4\)"):
        solve(Cell(lambda W, x, z: z[:, :3]))
    with pytest.raises(ValueError, match=r"returned tuple"):
        solve(Cell(lambda W, x, z: (z, z)))
    with pytest.raises(ValueError, match=r"called as cell\(x_t, z\)"):
        solve(Cell(lambda W, x, z: x @ W))


def test_trials_that_influence_each_other() -> None:
    solution = solve(Cell(lambda W, x, z: torch.tanh(z @ W + x.sum(-1, keepdim=True)) - z.mean(0)), z0=torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"trials influence each other"):
        kp.linearize(solution)


def test_branches_on_values_cannot_be_traced() -> None:
    cell = Cell(lambda W, x, z: torch.stack([torch.tanh(row @ W) if row.sum() > 0 else row * W[0] for row in z]))
    solution = solve(cell, z0=torch.tensor([[1.0] * 4, [-1.0] * 4]))
    with pytest.warns(kp.UntracedWarning, match=r"could not be traced.*test_bad_input.py.*torch.where"):
        kp.linearize(solution)


def test_parameters_that_changed_since_solve() -> None:
    cell = nn.GRUCell(3, 4)
    solution = solve(cell)
    with torch.no_grad():
        cell.weight_hh.add_(0.1)
    with pytest.raises(ValueError, match=r"parameters changed after solve"):
        kp.linearize(solution)


def test_models_without_a_learnable_parameter() -> None:
    frozen = nn.GRUCell(3, 4).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter learns.*weight_ih"):
        kp.linearize(solve(frozen))
    assert kp.linearize(solve(frozen), params=["weight_hh"]).J.domain.size == 48
    with pytest.raises(ValueError, match=r"unknown parameters.*nonsense.*weight_ih"):
        kp.linearize(solve(nn.GRUCell(3, 4)), params=["nonsense"])
    with pytest.raises(TypeError, match=r"nn.Module"):
        solve(lambda x, z: z)


def test_modules_that_are_no_step() -> None:
    with pytest.raises(ValueError, match=r"bidirectional"):
        solve(nn.GRU(3, 4, bidirectional=True))
    with pytest.raises(ValueError, match=r"proj_size"):
        solve(nn.LSTM(3, 4, proj_size=2))


def test_arguments_of_solve_and_linearize() -> None:
    problem = kp.DiscreteProblem(nn.GRUCell(3, 4), torch.randn(2, 5, 3))
    with pytest.raises(TypeError, match=r"alg must be None"):
        kp.solve(problem, "euler")
    with pytest.raises(TypeError, match=r"DiscreteProblem"):
        kp.solve(problem.cell)
    with pytest.raises(TypeError, match=r"Solution that solve returns"):
        kp.linearize(problem)
    with pytest.raises(TypeError, match=r"DiscreteAdjoint\(\)"):
        kp.linearize(kp.solve(problem), sensealg="adjoint")
    with pytest.raises(TypeError, match=r"remake"):
        problem.remake(y=1)
    assert problem.remake(z0=torch.ones(4)).cell is problem.cell


def test_solution_interpolates_between_steps() -> None:
    solution = solve(nn.GRUCell(3, 4), z0=torch.ones(2, 4))
    torch.testing.assert_close(solution(0), torch.ones(2, 4))
    torch.testing.assert_close(solution(3), solution.state[:, 2])
    torch.testing.assert_close(solution(3.25), 0.75 * solution.state[:, 2] + 0.25 * solution.state[:, 3])
    torch.testing.assert_close(solution(5), solution.state[:, -1])
    with pytest.raises(ValueError, match=r"outside"):
        solution(5.1)


def test_probes_of_the_wrong_shape_dtype_or_library() -> None:
    flow = kp.linearize(solve(nn.GRUCell(3, 4)))
    with pytest.raises(ValueError, match=r"expected \[..., trial, time, unit\]"):
        flow.ntk.mv(torch.zeros(2, 5, 3))
    with pytest.raises(TypeError, match=r"float64"):
        flow.P.mv(torch.zeros(2, 5, 4, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"ndarray"):
        flow.P.mv(torch.zeros(2, 5, 4).numpy())
    with pytest.raises(ValueError, match=r"theta has shape"):
        flow.as_parameters(torch.zeros(3))


@settings(max_examples=15, deadline=None)
@given(
    trials=st.integers(1, 3),
    times=st.integers(1, 6),
    inputs=st.integers(1, 3),
    units=st.integers(1, 5),
    probes=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell]),
)
def test_any_sizes_keep_the_identities(trials, times, inputs, units, probes, dtype, kind) -> None:
    torch.manual_seed(0)
    x = torch.randn(trials, times, inputs, dtype=dtype)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(kind(inputs, units).to(dtype), x)))
    q = torch.randn(*probes, *flow.ntk.domain.shape, dtype=dtype)
    together = flow.P.mv(flow.K.mv(flow.P.T.mv(q)))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    scale = float(together.abs().max())
    assert together.shape == q.shape
    assert float((flow.ntk.mv(q) - together).abs().max()) <= tolerance * scale
    assert kp.check_adjoint(flow.J) < tolerance
