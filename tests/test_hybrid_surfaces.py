"""Where events are: many in one step, at the ends of the grid, where inputs jump; and what no solver gets beyond."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.models import Event, Hybrid


class Moving(nn.Module):
    """z' = w (1 + x)."""

    def __init__(self, w: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, t, z, *x):
        return self.w * (1 + sum(x)) + 0 * z


class Scaled(nn.Module):
    """z times a learnt number."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def forward(self, t, z, *x):
        return self.by * z


def solved(*events: Event, start: float = 0.01, x=None, flow=None, t=(0.0, 0.5, 1.0), looks: int = 8, **options):
    model = Hybrid(flow or Moving(), *events, looks=looks)
    z0 = start * torch.ones(1, 1, dtype=torch.float64)
    return kp.solve(kp.ODEProblem(model, z0, list(t), x), **options)


def times_of(solution) -> list[float]:
    return [time for time, _ in solution.events[0]]


@pytest.mark.parametrize("rate", [20.0, 16 * np.pi])
def test_a_condition_that_swings_many_times_in_a_step_is_seen(rate: float) -> None:
    found = times_of(solved(Event(lambda t, z: torch.sin(rate * z[:, 0] + 0.3), Scaled())))
    phases = np.pi * np.arange(1, 100)
    expected = (phases - 0.3) / rate - 0.01
    np.testing.assert_allclose(found, expected[(expected > 0) & (expected < 1)], atol=1e-12)


@pytest.mark.parametrize(("width", "looks"), [(0.03, 8), (0.003, 8), (0.0015, 64)])
def test_a_short_dip_across_the_surface_is_seen(width: float, looks: int) -> None:
    pulse = Event(lambda t, z: 0.5 - torch.exp(-(((z[:, 0] - 0.4137) / width) ** 2)), Scaled(), direction=-1)
    assert times_of(solved(pulse, looks=looks)) == [pytest.approx(0.4037 - width * np.sqrt(np.log(2)), abs=1e-9)]


@pytest.mark.parametrize("looks", [8, 32])
def test_every_dip_across_the_surface_in_a_step_is_seen(looks: int) -> None:
    near = Event(
        lambda t, z: torch.cos(20 * z[:, 0] - 0.9) - 0.999, Scaled()
    )  # z = t + 0.01: also just behind an event
    found = times_of(solved(near, alg="rk4", steps=0.5, looks=looks))
    peaks = (2 * np.pi * np.arange(9)[:, None] + 0.9 + np.arccos(0.999) * np.array([-1, 1])).ravel() / 20 - 0.01
    np.testing.assert_allclose(found, peaks[(peaks > 0) & (peaks < 1)], atol=1e-9)


def test_looks_are_at_four_points_at_least() -> None:
    with pytest.raises(ValueError, match="looks is 3, expected 4"):
        Hybrid(Moving(), Event(lambda t, z: z[:, 0], Scaled()), looks=3)


@pytest.mark.parametrize("at", [0.1, 0.3, 0.7, 1.0])
def test_an_event_at_a_time_of_the_grid_is_before_it(at: float) -> None:
    event = Event(lambda t, z: z[:, 0] - 0.5 + at, lambda t, z: 9 + 0 * z)
    solution = solved(event, start=0.5, flow=Moving(-1.0), t=sorted({0.0, at, 0.5, 1.0}))
    assert times_of(solution) == [pytest.approx(at, abs=1e-12)]
    place = np.flatnonzero(np.asarray(solution.t) == at)
    assert float(solution.state[0, place[0], 0]) == pytest.approx(9.0)


@pytest.mark.parametrize("at", [0.4, 0.5, 1.0])
def test_several_events_at_one_time_are_all_before_a_time_of_the_grid(at: float) -> None:
    class Falls(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.by, self.n = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)), n

        def forward(self, t, z):
            chosen = torch.eye(2, dtype=torch.float64)[self.n]
            return z + chosen * (self.by - t)

    events = [Event(lambda t, z, n=n: z[:, n] + at - 1, Falls(n), direction=-1) for n in range(2)]
    model, start = Hybrid(Moving(-1.0), *events), torch.ones(1, 2, dtype=torch.float64)
    sol = kp.solve(kp.ODEProblem(model, start, [0.0, 0.5, 1.0]))
    assert [n for _, n in sol.events[0]] == [0, 1] and times_of(sol) == [pytest.approx(at, abs=1e-12)] * 2
    near = kp.solve(kp.ODEProblem(model, start - torch.tensor([1e-9, 2e-9]).double(), [0.0, 0.5, 1.0]))
    torch.testing.assert_close(sol.state, near.state, rtol=1e-7, atol=1e-7)
    found, expected = (kp.linearize(s).J.mv(torch.tensor([0.3, 0.7, -0.4]).double()) for s in (sol, near))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_given_times_may_be_the_first_and_the_last() -> None:
    solution = solved(Event(reset=Scaled(0.5), at=[0.0, 1.0]), start=1.0)
    assert times_of(solution) == [0.0, 1.0]
    np.testing.assert_allclose(solution.state[0, :, 0], [0.5, 1.0, 0.75])


# Inputs that jump


class Pulse:
    """x(t) is 1 from 0.3 to 0.7, else 0."""

    jumps = (0.3, 0.7)

    def __call__(self, t: Tensor) -> Tensor:
        return torch.where((t >= 0.3) & (t < 0.7), 1.0, 0.0).to(torch.float64) * torch.ones(1, 1, dtype=torch.float64)


def test_an_event_may_happen_as_the_inputs_jump_and_its_time_is_theirs() -> None:
    switch = Event(lambda t, z, x: x[:, 0] - 0.5 + 0 * z[:, 0], Scaled(0.5))
    ground = Event(lambda t, z, x: z[:, 0] - 0.203 - 0.5 * x[:, 0], Scaled(0.9), direction=1)
    solution = solved(switch, ground, start=0.1, x=Pulse())
    assert [n for time, n in solution.events[0] if time in (0.3, 0.7)] == [0, 0, 1]
    flow, model, d = kp.linearize(solution), solution.problem.f, 1e-6
    theta = torch.tensor([0.3, -0.5, 0.4], dtype=torch.float64)

    def at(step: float) -> Tensor:
        with torch.no_grad():
            for parameter, change in zip(model.parameters(), theta, strict=True):
                parameter += step * change
            state = kp.solve(solution.problem).state
            for parameter, change in zip(model.parameters(), theta, strict=True):
                parameter -= step * change
        return state

    torch.testing.assert_close(flow.J.mv(theta), (at(d) - at(-d)) / (2 * d), rtol=1e-6, atol=1e-8)


def test_a_condition_that_jumps_at_a_time_that_nobody_named_is_refused() -> None:
    unnamed = Pulse()
    unnamed.jumps = ()
    switch = Event(lambda t, z, x: x[:, 0] - 0.5 + 0 * z[:, 0], Scaled())
    with pytest.raises(kp.SolveError, match=r"condition of event 0 that jumps across zero at t = 0.3; .* \(x.jumps\)"):
        solved(switch, x=unnamed)
    with pytest.raises(kp.SolveError, match=r"jumps across zero at t = 0.4"):
        solved(Event(lambda t, z: torch.sign(t - 0.4) + 0 * z[:, 0], Scaled()))


# Endless events


class Relay(nn.Module):
    """z' = 0.1 cos t - w sign(z), which slides along z = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, t, z):
        return 0.1 * torch.cos(t) - self.w * torch.sign(z)


def test_a_surface_that_pushes_back_from_both_sides_is_named() -> None:
    with pytest.raises(kp.SolveError, match=r"slides along the surface of event 0, which pushes .* hysteresis"):
        solved(Event(lambda t, z: z[:, 0], Scaled()), start=0.5, flow=Relay(), max_steps=300)


class Flips(nn.Module):
    """The velocity is set."""

    def __init__(self, velocity: float) -> None:
        super().__init__()
        self.velocity = nn.Parameter(torch.tensor(velocity, dtype=torch.float64))

    def forward(self, t, z):
        return torch.stack([z[:, 0], self.velocity + 0 * z[:, 1]], -1)


def test_a_switch_with_hysteresis_that_chatters_says_how_fast() -> None:
    up = Event(lambda t, z: z[:, 0] + 1e-3, Flips(1.0), direction=-1)
    down = Event(lambda t, z: z[:, 0] - 1e-3, Flips(-1.0), direction=1)
    model = Hybrid(lambda t, z: torch.stack([z[:, 1], 0 * z[:, 1]], -1), up, down, max_events=12)
    start = torch.tensor([[0.5, -1.0]], dtype=torch.float64)
    with pytest.raises(kp.SolveError, match=r"max_events = 12 events, the last ones 0.002 apart .* raise max_events"):
        kp.solve(kp.ODEProblem(model, start, [0.0, 0.5, 1.0]))


def test_a_reset_without_values_names_its_event_and_its_trial() -> None:
    model = Hybrid(Moving(), Event(lambda t, z: z[:, 0] - 0.4, lambda t, z: torch.sqrt(-z), direction=1))
    start, message = torch.tensor([[0.01], [0.5]], dtype=torch.float64), "trial 0 has no finite state behind the reset"
    with pytest.raises(kp.SolveError, match=message) as found:
        kp.solve(kp.ODEProblem(model, start, [0.0, 0.5, 1.0]))
    assert found.value.trials == [0] and found.value.solution.events == [[]]


# What rests on a surface, and flows that jump there


class Clocked(nn.Module):
    """v' = on (drive - v), state (v, r, on); a neuron that is not on is refractory while its clock r runs down."""

    def __init__(self) -> None:
        super().__init__()
        self.drive = nn.Parameter(torch.tensor([1.6, 2.1], dtype=torch.float64))
        self.refractory = nn.Parameter(torch.tensor(0.15, dtype=torch.float64))

    def forward(self, t, z):
        v, _, on = z
        return on * (self.drive - v), on - 1, 0 * on


class Fires(nn.Module):
    def __init__(self, neurons: Clocked, n: int, clock: bool) -> None:
        super().__init__()
        self.neurons, self.n, self.clock = neurons, n, clock

    def forward(self, t, z):
        (v, r, on), e = z, torch.eye(2, dtype=torch.float64)[self.n]
        if self.clock:
            return v, r * (1 - e), on * (1 - e) + e
        return v * (1 - e) + 0.1 * (1 - e), r * (1 - e) + self.neurons.refractory * e, on * (1 - e)


def test_a_refractory_time_is_a_clock_that_rests_at_zero_until_it_is_set() -> None:
    neurons, events = Clocked(), []
    for n in range(2):
        events.append(Event(lambda t, z, n=n: z[0][:, n] - 1, Fires(neurons, n, clock=False), direction=1))
        events.append(Event(lambda t, z, n=n: z[1][:, n], Fires(neurons, n, clock=True), direction=-1))
    zero = torch.zeros(1, 2, dtype=torch.float64)
    problem = kp.ODEProblem(Hybrid(neurons, *events), (zero, zero, 1 + zero), [0.0, 0.8, 1.6])
    options = {"alg": "rk4", "steps": 0.2}
    solution, d = kp.solve(problem, **options), 1e-6
    assert [n for _, n in solution.events[0]][:4] == [2, 3, 0, 1] and len(solution.events[0]) >= 6
    flow, theta = kp.linearize(solution), torch.tensor([0.3, -0.5, 0.7], dtype=torch.float64)

    def at(step: float) -> Tensor:
        with torch.no_grad():
            neurons.drive += step * theta[:2]
            neurons.refractory += step * theta[2]
            state = kp.solve(problem, **options).state
            neurons.drive -= step * theta[:2]
            neurons.refractory -= step * theta[2]
        return state

    assert [*flow.parameters] == ["flow.drive", "flow.refractory"] and not flow.untraced
    torch.testing.assert_close(flow.J.mv(theta), (at(d) - at(-d)) / (2 * d), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("alg", "why"), [("euler", "has a flow that jumps on"), ("rk4", "has a condition of")])
def test_a_flow_that_reads_its_side_from_the_surface_is_refused(alg: str, why: str) -> None:
    class Torn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

        def forward(self, t, z):
            return torch.where(z > 0, self.a * (1 + z), 3 * self.a * (1 - z))

    with pytest.raises(kp.SolveError, match=f"{why}.* event 0 .*read that from a number of the state"):
        solved(Event(lambda t, z: z[:, 0], Scaled()), start=0.5, flow=Torn(), alg=alg, steps=0.1)
