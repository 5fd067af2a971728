"""Starts that learn of models that jump: finite differences of solves through the times of their events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.models import Event, Hybrid

TIMES = [0.0, 0.5, 1.0]


class Bounce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.restitution = nn.Parameter(torch.tensor(0.8).double())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([z[:, 0], -self.restitution * z[:, 1]], -1)


def fall(t: Tensor, z: Tensor) -> Tensor:
    return torch.stack([z[:, 1], torch.full_like(z[:, 1], -9.81)], -1)


def ball() -> nn.Module:
    return Hybrid(fall, Event(lambda t, z: z[:, 0], Bounce(), direction=-1))


def encoded() -> kp.ODEProblem:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(3, 2), nn.Softplus()).double()
    return kp.ODEProblem(ball(), torch.randn(2, 3).double(), TIMES, encoder=encoder)


def learnt() -> kp.ODEProblem:
    return kp.ODEProblem(ball(), torch.tensor([[1.0, 0.0], [1.0, 0.0]]).double(), TIMES).learn_start()


@pytest.mark.parametrize(("posed", "first"), [(encoded, "f.events.0.reset.restitution"), (learnt, "z0")])
def test_the_start_moves_the_times_of_events(posed: Callable[[], Any], first: str) -> None:
    problem = posed()
    solution = kp.solve(problem, "rk4", steps=0.05)
    assert [len(events) for events in solution.events] == [1, 1]
    flow = kp.linearize(solution)
    assert next(iter(flow.parameters)) == first
    theta = torch.cat([value.reshape(-1) for value in flow.parameters.values()])

    def states(theta: Tensor) -> np.ndarray:
        sizes = [value.numel() for value in flow.parameters.values()]
        parts = zip(flow.parameters.items(), theta.split(sizes), strict=True)
        values = {name: part.reshape(value.shape) for (name, value), part in parts}
        models = problem.backend.models
        model = models.changed(models.copied(problem.model), values)
        return kp.solve(problem.with_model(model), "rk4", steps=0.05).state.numpy().ravel()

    steps = 1e-6 * torch.eye(len(theta)).double()
    differences = np.stack([(states(theta + step) - states(theta - step)) / 2e-6 for step in steps], 1)
    J = flow.J.dense().reshape(differences.shape).numpy()
    assert np.abs(J - differences).max() < 1e-7 * np.abs(differences).max()
    ntk = flow.ntk.dense()
    assert torch.allclose((flow.P @ flow.K @ flow.P.T).dense(), ntk, rtol=0, atol=1e-12 * float(ntk.abs().max()))
    core = flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T
    assert torch.allclose(core.dense(), ntk, rtol=0, atol=1e-12 * float(ntk.abs().max()))
    assert kp.check_adjoint(flow.J) < 1e-12


def test_a_gradient_flow_moves_the_start_of_a_sampled_loop() -> None:
    policy = nn.Linear(2, 1).double()
    loop = kp.models.ClosedLoop(kp.models.DoubleIntegrator(), policy, every=0.25)
    problem = kp.ODEProblem(loop, torch.tensor([[1.0, 0.0]]).double(), TIMES).learn_start()
    found = kp.gradient_flow(kp.solve(problem, "rk4"), lambda state: (state[..., 0] ** 2).mean(), span=0.1)
    assert found.loss[-1] < found.loss[0] and set(found.parameters) >= {"z0", "f.policy.weight"}


def test_jumps_are_seen_by_torchode() -> None:
    torchode = pytest.importorskip("torchode")
    problem = kp.ODEProblem(ball(), torch.tensor([[1.0, 0.0], [2.0, 0.0]]).double(), TIMES)
    found = kp.solve(problem, torchode.Dopri5(term=None), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.state, kp.solve(problem, rtol=1e-10, atol=1e-12).state, rtol=1e-9, atol=1e-9)


class Driven(nn.Module):
    def __init__(self, rate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rate, self.I = rate, nn.Parameter(torch.tensor(1.0).double())

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.rate(z) + self.I


def to(value: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda t, z: 0 * z + value


@pytest.mark.parametrize("restitution", [0.0, 0.8])
@pytest.mark.parametrize("options", [{}, {"alg": "rk4", "steps": 0.05}])
def test_a_ball_that_comes_to_rest_does_not_fall_through(restitution: float, options: dict[str, Any]) -> None:
    bounce = Bounce()
    bounce.restitution.data.fill_(restitution)
    model = Hybrid(fall, Event(lambda t, z: z[:, 0], bounce, direction=-1))
    with pytest.raises(kp.SolveError, match="pile up"):
        kp.solve(kp.ODEProblem(model, torch.tensor([[0.1, 0.0]]).double(), [0.0, 1.0, 5.0]), **options)


def test_what_a_field_does_behind_an_event_does_not_count() -> None:
    spikes = Event(lambda t, z: z[:, 0] - 10, to(-10.0), direction=1)  # of z' = z^2 + 1, which blows up behind it
    quadratic = kp.ODEProblem(Hybrid(Driven(lambda z: z**2), spikes), torch.zeros(1, 1).double(), [0.0, 2.0, 6.0])
    found = kp.solve(quadratic, rtol=1e-10, atol=1e-12)
    first = np.arctan(10.0)
    assert np.allclose([time for time, _ in found.events[0]], [first, 3 * first], rtol=1e-8)
    grows = Event(lambda t, z: z[:, 0] - 1, to(0.5), direction=1)  # e^{60} behind the event, from one time to the next
    unstable = kp.ODEProblem(Hybrid(Driven(lambda z: 5 * z - 0.9), grows), torch.zeros(1, 1).double(), [0.0, 6.0, 12.0])
    assert len(kp.solve(unstable).events[0]) == len(kp.solve(unstable, "rk4", steps=0.02).events[0]) > 50


def test_trials_with_events_do_not_influence_each_other() -> None:
    coupled = Hybrid(Driven(lambda z: z.mean(0, keepdim=True) - z), Event(lambda t, z: z[:, 0] - 9, to(0.0)))
    with pytest.raises(ValueError, match="influence"):
        kp.solve(kp.ODEProblem(coupled, torch.ones(3, 1).double(), TIMES))


def test_the_solution_at_a_sample_is_that_of_the_grid() -> None:
    loop = kp.models.ClosedLoop(kp.models.DoubleIntegrator(), nn.Linear(2, 1).double(), every=0.1)
    start, times = torch.tensor([[1.0, 0.0]]).double(), [0.0, 0.3, 0.6, 0.7, 1.0]
    on_grid = kp.solve(kp.ODEProblem(loop, start, times), "rk4", steps=0.05)
    off_grid = kp.solve(kp.ODEProblem(loop, start, [0.0, 0.5, 1.0]), "rk4", steps=0.05)
    torch.testing.assert_close(off_grid(times), on_grid.state)


def test_an_encoder_gives_the_state_of_the_plant_alone() -> None:
    loop = kp.models.ClosedLoop(kp.models.DoubleIntegrator(), nn.Linear(2, 1).double(), every=0.25)
    encoder, data = nn.Linear(3, 2).double(), torch.randn(2, 3).double()
    found = kp.solve(kp.ODEProblem(loop, data, TIMES, encoder=encoder), "rk4")
    torch.testing.assert_close(found.start, loop.start(encoder(data)).detach())
    assert "encoder.weight" in kp.linearize(found).parameters


def test_trials_at_rest_are_no_trials_that_influence_each_other() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(20, 20).double()
    rest = torch.linalg.solve(linear.weight, -linear.bias).detach()  # where the rate is rounding alone

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return self.linear(z)

    model = Hybrid(Field(), Event(lambda t, z: z[:, 0] - 1e3, lambda t, z: z))
    found = kp.solve(kp.ODEProblem(model, rest.expand(3, 20).clone(), TIMES))
    assert found.events == [[], [], []]
