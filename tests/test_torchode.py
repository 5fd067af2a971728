"""Torchode as a library: trials of torch with steps of their own, replayed exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp

to = pytest.importorskip("torchode")

GRID = np.array([0.0, 0.3, 0.7, 1.0])
SIZES = torch.tensor([[0.1], [2.0], [20.0]]).double()  # so that the trials take other numbers of steps


class Field(nn.Module):
    """As torchode calls it: t [trial]."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.w = nn.Parameter(torch.randn(2, 2).double()), nn.Parameter(torch.ones(2).double())

    def forward(self, t: Tensor, y: Tensor, x: Any = None) -> Tensor:
        drive = torch.cos(3 * t)[:, None] * self.w
        return 3 * torch.tanh(y @ self.W) - 0.1 * y + drive + (0 if x is None else x)


class OfOneTime(Field):
    """As torchdiffeq calls it: t is one number."""

    def forward(self, t: Tensor, y: Tensor, x: Any = None) -> Tensor:
        assert t.ndim == 0
        return super().forward(t.expand(len(y)), y, x)


def posed(field: nn.Module, t: Any = GRID, x: Any = None) -> kp.ODEProblem:
    return kp.ODEProblem(field, torch.tensor([[1.0, -0.5], [0.3, 0.2], [0.5, 1.0]]).double() * SIZES, t, x)


def solver(method: Any = None, tolerance: float = 1e-6) -> Any:
    """What a user of torchode holds; its steps are no function of the parameters to autograd, as ours are not."""
    controller = to.PIDController(tolerance, tolerance, 0.2, 0.5, 0.0)
    return to.AutoDiffAdjoint(method or to.Dopri5(), controller, backprop_through_step_size_control=False)


@pytest.mark.parametrize("method", ["Dopri5", "Tsit5", "Heun"])
def test_states_and_derivatives_are_torchodes_own(method: str) -> None:
    field, alg = Field(), solver(getattr(to, method)(), 1e-3 if method == "Heun" else 1e-6)
    solution = kp.solve(posed(field), alg)
    grid = torch.tensor(GRID).expand(3, 4)
    own = alg.solve(to.InitialValueProblem(solution.problem.z0, t_eval=grid), to.ODETerm(field)).ys
    taken = (solution.steps.dt > 0).sum(1)
    assert len(set(taken.tolist())) > 1 and solution.stats["steps"] == taken.max()
    assert torch.allclose(solution.state, own, rtol=1e-12, atol=1e-12)
    flow, q = kp.linearize(solution), torch.randn(own.shape).double()
    gradient = torch.autograd.grad(own, list(field.parameters()), q)
    found = flow.as_parameters(flow.J.T.mv(q[None] / torch.tensor(solution.weights)[:, None]))
    for name, expected in zip(("W", "w"), gradient, strict=True):
        assert torch.allclose(found[name][0], expected, rtol=1e-10, atol=1e-12)
    assert not flow.untraced and max(kp.check_adjoint(op) for op in (flow.J, flow.P, flow.ntk)) < 1e-12


def test_a_field_of_one_time_is_called_trial_by_trial() -> None:
    field, other = Field(), OfOneTime()
    other.load_state_dict(field.state_dict())
    ours, theirs = (kp.linearize(kp.solve(posed(f), solver())) for f in (field, other))
    assert torch.allclose(ours.solution.state, theirs.solution.state, rtol=1e-12)
    assert torch.allclose(ours.J.dense(), theirs.J.dense(), rtol=1e-10, atol=1e-12)


def test_one_time_for_all_units_is_not_taken_for_one_of_each_trial() -> None:
    """As many units as trials: then t [trial] fits the axis of units too, where it would be wrong."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(3).double())

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -self.a * y + 1e-4 * torch.cos(9 * t)

    problem = kp.ODEProblem(Square(), torch.tensor([0.1, 2.0, 20.0]).double() * torch.ones(3, 3).double().mT, GRID)
    found = kp.solve(problem, to.Tsit5(), rtol=1e-9, atol=1e-11)
    expected = kp.solve(problem, "dopri5", rtol=1e-9, atol=1e-11)
    assert torch.allclose(found.state, expected.state, rtol=0, atol=1e-7)


def test_torchdiffeq_agrees() -> None:
    field = OfOneTime()
    ours = kp.linearize(kp.solve(posed(field), to.Tsit5(), rtol=1e-8, atol=1e-10))
    theirs = kp.linearize(kp.solve(posed(field), "dopri5", rtol=1e-8, atol=1e-10))
    assert torch.allclose(ours.solution.state, theirs.solution.state, atol=1e-6)
    assert torch.allclose(ours.J.dense(), theirs.J.dense(), atol=1e-4)
    equations = kp.linearize(ours.solution, sensealg=kp.InterpolatingAdjoint(1e-7, 1e-9))
    assert torch.allclose(equations.J.dense(), theirs.J.dense(), atol=1e-3)


def test_inputs_that_jump_spans_and_time_backward() -> None:
    def light(t: Tensor) -> Tensor:
        return (t >= 1 / 3).double()[None].expand(2)

    light.jumps = [1 / 3]
    problem = posed(Field(), (0.0, 1.0), light)
    solution = kp.solve(problem, to.Dopri5(), rtol=1e-9, atol=1e-11)
    reference = kp.solve(posed(OfOneTime(), (0.0, 1.0), light), rtol=1e-9, atol=1e-11)
    reference.problem.f.load_state_dict(problem.f.state_dict())
    reference = kp.solve(reference.problem, rtol=1e-9, atol=1e-11)
    assert torch.allclose(solution(0.9), reference(0.9), rtol=1e-6, atol=1e-7)
    assert kp.check_adjoint(kp.linearize(solution).J) < 1e-12
    back = kp.solve(problem.remake(z0=solution(1.0), t=(1.0, 0.0)), to.Dopri5(), rtol=1e-9, atol=1e-11)
    assert torch.allclose(back(0.0), problem.z0, rtol=1e-4, atol=1e-5)
    x = torch.randn(3, 4, 2).double()
    sampled = kp.solve(posed(Field(), GRID, x), to.Heun(), steps=0.1)
    assert sampled.stats == {"steps": 11, "rejected": 0} or sampled.stats["steps"] == 10
    flow = kp.gradient_flow(sampled, lambda state: (state**2).mean(), span=1e-3)
    assert flow.loss[-1] < flow.loss[0]


def test_a_closed_loop_is_seen_as_one() -> None:
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), nn.Linear(2, 1).double())
    problem = kp.ODEProblem(loop, torch.randn(3, 2).double(), GRID)
    found = []
    for alg in (to.Tsit5(), "dopri5"):
        solution = kp.solve(problem, alg, rtol=1e-9, atol=1e-11)
        found.append(kp.control.linearize_ltv(solution, inputs="control"))
    assert np.allclose(found[0].A.values, found[1].A.values, atol=1e-7)
    assert np.allclose(kp.control.gram(found[0], "c").W, kp.control.gram(found[1], "c").W, atol=1e-7)


def test_what_is_refused() -> None:
    class Mixed(Field):
        def forward(self, t: Tensor, y: Tensor, x: Any = None) -> Tensor:
            raise RuntimeError("no way to call this")

    with pytest.raises(ValueError, match="no way to call this"):
        kp.solve(posed(Mixed()), to.Dopri5())
    with pytest.raises(kp.SolveError, match="reached max_steps = 3"):
        kp.solve(posed(Field()), to.Dopri5(), max_steps=3)
    for alg in (to.Dopri5, to.PIDController(1e-3, 1e-3, 0.2, 0.5, 0.0)):
        with pytest.raises(TypeError, match=r"expected an instance of torchode's step methods"):
            kp.solve(posed(Field()), alg)
    term = to.ODETerm(Field())
    with pytest.raises(TypeError, match=r"sensealg=kp.InterpolatingAdjoint"):
        kp.solve(posed(Field()), to.BacksolveAdjoint(term, to.Dopri5(term), solver().step_size_controller))
    with pytest.raises(ValueError, match="steps"):
        kp.solve(posed(Field(), (0.0, 1.0)), to.Euler(None))
