"""Trials of torch that step at times of their own, for a field that is written for one time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kpflow_dyn as kp
from kpflow_dyn import ode

GRID = np.linspace(0.0, 1.0, 4)
B = np.array([0.5, 0.5, 0.0])
HEUN = ode.Tableau(
    np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]), B, np.array([0, 1, 1]), ode.hermite(B)
)
COUNTS = (3, 5)  # steps of the two trials


class Heun:
    pass


class OwnSteps:
    """Heun's method, for each trial with another number of steps."""

    name, framework = "own steps", "torch"

    def accepts(self, alg: Any) -> bool:
        return isinstance(alg, Heun)

    def chooses_steps(self, alg: Any) -> bool:
        return True

    def solve(self, problem: kp.ODEProblem, alg: Any, times: np.ndarray, options: ode.Options) -> ode.Solved:
        ends = np.ones((len(problem.z0), max(COUNTS) + 1))
        states = problem.z0[:, None].repeat(1, max(COUNTS) + 1, 1)
        for trial, count in enumerate(COUNTS[: len(ends)]):
            ends[trial, : count + 1] = np.linspace(0.0, 1.0, count + 1) ** 2
            x = None if problem.x is None else problem.x[[trial]]
            one = problem.remake(z0=problem.z0[[trial]], x=x)
            states[trial, 1:] = heun(ode.rate_of(one), one.z0, ends[trial])[0, 1:]
        return ode.Solved(ode.AcceptedSteps.between(HEUN, ends, states))


def heun(f: Any, z: Tensor, ends: np.ndarray) -> Tensor:
    states = [z]
    for t, h in zip(torch.tensor(ends), np.diff(ends), strict=False):
        first = f(t, z)
        z = z + h * (first + f(t + h, z + h * first)) / 2
        states.append(z)
    return torch.stack(states, 1)


class Field(nn.Module):
    """One that takes a 0-dim time alone."""

    mapped = True  # whether torch.func.vmap takes it

    def __init__(self) -> None:
        super().__init__()
        self.W, self.w = nn.Parameter(torch.randn(2, 3).double()), nn.Parameter(torch.randn(2).double())

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        assert t.ndim == 0 and (self.mapped or float(z.detach().sum()) < 1e9)
        time = t.expand(len(z), 1)
        return torch.tanh(torch.cat([z, time], 1) @ self.W.T) * torch.cos(3 * t * self.w) + sum(x)


@pytest.fixture
def library() -> Iterator[None]:
    ode.add_library(OwnSteps())
    yield
    ode.remove_library("own steps")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("driven", "mapped"), [(False, True), (True, True), (True, False)])
def test_each_trial_is_replayed_at_its_own_times(driven: bool, mapped: bool) -> None:
    field, z0 = Field(), torch.randn(2, 2).double()
    field.mapped = mapped
    x = torch.randn(2, 4, 2).double() if driven else None
    solution = kp.solve(kp.ODEProblem(field, z0, GRID, x), Heun())
    flow = kp.linearize(solution)

    def states(parameters: dict[str, Tensor]) -> Tensor:
        found = []
        for trial, count in enumerate(COUNTS):

            def rate(t: Tensor, z: Tensor, trial: int = trial) -> Tensor:
                at = () if x is None else (interpolated(x[[trial]], t),)
                return functional_call(field, parameters, (t, z, *at))

            found.append(heun(rate, z0[[trial]], np.linspace(0.0, 1.0, count + 1) ** 2)[:, -1])
        return torch.cat(found)

    J = torch.cat([j.reshape(4, -1) for j in jacrev(states)(dict(field.named_parameters())).values()], 1)
    dense = flow.J.dense().reshape(2, 4, 2, -1)[:, -1].reshape(4, -1)
    assert torch.allclose(dense, J, rtol=1e-10, atol=1e-12)
    assert not flow.untraced
    assert kp.check_adjoint(flow.ntk) < 1e-12 and kp.check_adjoint(flow.P) < 1e-12
    assert torch.allclose(solution(1.0), states(dict(field.named_parameters())))


def interpolated(x: Tensor, t: Tensor) -> Tensor:
    n = min(int(3 * t + 1e-12), 2)
    return x[:, n] + (3 * t - n) * (x[:, n + 1] - x[:, n])


@pytest.mark.usefixtures("library")
def test_a_gradient_flow_and_a_span_of_such_steps() -> None:
    solution = kp.solve(kp.ODEProblem(Field(), torch.randn(2, 2).double(), (0.0, 1.0)), Heun())
    assert solution.state.shape == (2, 3 * max(COUNTS), 2)
    flow = kp.gradient_flow(solution, lambda state: (state**2).mean(), span=0.1)
    assert flow.loss[-1] < flow.loss[0]
    exact = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(1e-9, 1e-11))
    assert kp.check_adjoint(exact.J) < 1e-7
