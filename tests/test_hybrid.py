"""Hybrid models: values, and derivatives through the times of events, against finite differences and saltation."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
import torch
from torch import nn
from torchdiffeq import odeint_event

import kpflow_dyn as kp
from kpflow_dyn.models import Event, Hybrid

GRAVITY = 9.81
GRID = np.array([0.0, 0.3, 0.5, 1.0, 1.7])
FIXED = {"alg": "rk4", "steps": 0.1}
pytestmark = pytest.mark.usefixtures("x64")


class Bounce(nn.Module):
    """A learnt part of the speed is kept."""

    def __init__(self, restitution: float = 0.8, at: int = 1) -> None:
        super().__init__()
        self.restitution, self.at = nn.Parameter(torch.tensor(restitution, dtype=torch.float64)), at

    def forward(self, t, z):
        columns = list(z.unbind(-1))
        columns[self.at] = -self.restitution * columns[self.at]
        return torch.stack(columns, -1)


class JaxBounce(eqx.Module):
    restitution: jax.Array

    def __call__(self, t, z):
        return jnp.stack([z[0], -self.restitution * z[1]])


def fall(t, z):
    return torch.stack([z[:, 1], torch.full_like(z[:, 1], -GRAVITY)], -1)


def ground(restitution: float = 0.8) -> Event:
    return Event(lambda t, z: z[:, 0], Bounce(restitution), direction=-1)


def ball(restitution: float = 0.8) -> nn.Module:
    return Hybrid(fall, ground(restitution))


def jax_ball():
    return Hybrid(
        lambda t, z: jnp.stack([z[1], jnp.full_like(z[1], -GRAVITY)]),
        Event(lambda t, z: z[0], JaxBounce(jnp.array(0.8)), direction=-1),
    )


def rows(*values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


START = rows([1.0, 0.0], [0.7, 0.3])


def differences(problem, theta: dict[str, torch.Tensor], d: float = 1e-6, **options):
    """dS in a direction of all parameters, by central differences of whole solves."""
    known = dict(problem.f.named_parameters())

    def at(step: float):
        with torch.no_grad():
            for name, change in theta.items():
                known[name] += step * change
            state = kp.solve(problem, **options).state
            for name, change in theta.items():
                known[name] -= step * change
        return state

    return (at(d) - at(-d)) / (2 * d)


def check_in_torch(problem, **options):
    """J against finite differences, and the operators against each other."""
    options = options or FIXED
    sol = kp.solve(problem, **options)
    flow = kp.linearize(sol)
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(flow.J.domain.size, dtype=torch.float64, generator=generator)
    expected = differences(problem, flow.as_parameters(theta), **options)
    found = flow.J.mv(theta)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))
    check_identities(flow, torch.randn(sol.state.shape, dtype=torch.float64, generator=generator))
    return sol, flow


def check_identities(flow, q):
    for operator in (flow.J, flow.P, flow.K, flow.B):
        kp.check_adjoint(operator)
    size = float(abs(flow.ntk.mv(q)).max())
    assert float(abs(flow.ntk.mv(q) - flow.P.mv(flow.K.mv(flow.P.T.mv(q)))).max()) < 1e-11 * size
    assert float(abs(flow.ntk.mv(q) - flow.J.mv(flow.J.T.mv(q))).max()) < 1e-11 * size
    assert float(abs(flow.K.mv(q) - flow.B.mv(flow.core.mv(flow.B.T.mv(q)))).max()) < 1e-11 * size
    assert float(abs(flow.P.inv.mv(flow.P.mv(q)) - q).max()) < 1e-10 * float(abs(flow.P.mv(q)).max())


# A ball: all is known


def exactly(z0: np.ndarray, restitution: float, t: float) -> np.ndarray:
    """Height and speed of a ball, bounce by bounce."""
    height, speed = z0
    while True:
        hit = (speed + np.sqrt(speed**2 + 2 * GRAVITY * height)) / GRAVITY
        if hit > t:
            return np.array([height + speed * t - GRAVITY * t**2 / 2, speed - GRAVITY * t])
        height, speed, t = 0.0, -restitution * (speed - GRAVITY * hit), t - hit


def saltation(speed: float, restitution: float) -> np.ndarray:
    """Xi = D_z g + (f_after - D_z g f_before) D_z c / (D_z c f_before)."""
    reset, normal = np.diag([1.0, -restitution]), np.array([1.0, 0.0])
    before, after = np.array([speed, -GRAVITY]), np.array([-restitution * speed, -GRAVITY])
    return reset + np.outer(after - reset @ before, normal) / (normal @ before)


def test_the_states_of_a_ball_are_exact_on_the_grid_and_between() -> None:
    sol = kp.solve(kp.ODEProblem(ball(), START, GRID))
    assert [[event for _, event in trial] for trial in sol.events] == [[0, 0], [0, 0, 0]]
    between = np.linspace(0, 1.7, 23)
    for times, found in ((GRID, sol.state), (between, sol(between))):
        expected = [[exactly(z, 0.8, t) for t in times] for z in START.numpy()]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-10)


def test_between_steps_the_state_is_that_behind_the_jump() -> None:
    sol = kp.solve(kp.ODEProblem(ball(), START[:1], GRID))
    hit = sol.events[0][0][0]
    assert float(sol(hit)[0, 1]) == pytest.approx(0.8 * GRAVITY * hit)
    assert float(sol(np.nextafter(hit, 0))[0, 1]) == pytest.approx(-GRAVITY * hit)


def test_p_has_the_saltation_matrix_of_a_bounce() -> None:
    sol = kp.solve(kp.ODEProblem(ball(), START[:1], GRID[:4]))
    hit = sol.events[0][0][0]
    flow = kp.linearize(sol)
    kick = torch.zeros_like(sol.state)
    for unit in range(2):
        kick[:] = 0
        kick[0, 0, unit] = 1
        moved = flow.P.mv(kick)[0, 3].numpy()
        fly = [np.array([[1, t], [0, 1]]) for t in (hit, 1.0 - hit)]
        np.testing.assert_allclose(moved, (fly[1] @ saltation(-GRAVITY * hit, 0.8) @ fly[0])[:, unit], rtol=1e-9)


@pytest.mark.parametrize(
    ("alg", "options"),
    [
        ("dopri5", {"rtol": 1e-10, "atol": 1e-12}),
        ("rk4", {}),
        ("euler", {"steps": 0.1}),
        pytest.param("dopri8", {"steps": 0.2}, marks=pytest.mark.slow),
    ],
)
def test_j_of_a_ball_by_many_methods(alg: str, options: dict) -> None:
    check_in_torch(kp.ODEProblem(ball(), START, GRID), alg=alg, **options)


@pytest.mark.parametrize("alg", [diffrax.Tsit5(), pytest.param(diffrax.Kvaerno5(), marks=pytest.mark.slow)])
def test_torch_and_jax_agree(alg: diffrax.AbstractSolver) -> None:
    sol = kp.solve(kp.ODEProblem(ball(), START, GRID))
    other = kp.solve(kp.ODEProblem(jax_ball(), jnp.asarray(START.numpy()), GRID), alg)
    np.testing.assert_allclose(other.state, sol.state.numpy(), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(other(0.7), sol(0.7).numpy(), rtol=1e-8, atol=1e-9)
    flow, theirs = kp.linearize(sol), kp.linearize(other)
    one = torch.ones(1, dtype=torch.float64)
    np.testing.assert_allclose(theirs.J.mv(jnp.ones(1)), flow.J.mv(one).numpy(), rtol=1e-8, atol=1e-8)
    q = np.random.default_rng(0).standard_normal(sol.state.shape)
    kicked = theirs.P.mv(theirs.K.mv(theirs.P.T.mv(jnp.asarray(q))))
    np.testing.assert_allclose(theirs.ntk.mv(jnp.asarray(q)), flow.ntk.mv(torch.from_numpy(q)).numpy(), rtol=1e-8)
    np.testing.assert_allclose(theirs.ntk.mv(jnp.asarray(q)), kicked, rtol=1e-10)


# Models with more in them


class Pushed(nn.Module):
    """A falling ball with a learnt policy that pushes it, and an input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.policy = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, t, z, x):
        return torch.stack([z[:, 1], self.policy(z)[:, 0] - GRAVITY + x[:, 0] * torch.sin(3 * t)], -1)


class Floor(nn.Module):
    """A floor that swings, which has the condition and the reset of its contact; its swing and restitution learn."""

    def __init__(self) -> None:
        super().__init__()
        self.swing = nn.Parameter(torch.tensor(0.05, dtype=torch.float64))
        self.restitution = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

    def forward(self, t, z, x):
        return z[:, 0] - self.swing * torch.sin(5 * t) - 0.02 * x[:, 0]


class OnFloor(nn.Module):
    def __init__(self, floor: Floor) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, t, z, x):
        speed = 5 * self.floor.swing * torch.cos(5 * t) + 0.1 * x[:, 0]
        return torch.stack([z[:, 0], speed - self.floor.restitution * (z[:, 1] - speed)], -1)


def swinging() -> tuple[nn.Module, torch.Tensor]:
    floor = Floor()
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((2, len(GRID), 1)))
    return Hybrid(Pushed(), Event(floor, OnFloor(floor), direction=-1)), x


def test_time_inputs_and_parameters_in_condition_reset_and_flow() -> None:
    model, x = swinging()
    sol, flow = check_in_torch(kp.ODEProblem(model, START, GRID, x))
    assert len(flow.parameters) == 6 and not flow.untraced
    assert all(len(trial) >= 2 for trial in sol.events)


def test_inputs_that_are_a_function_of_time() -> None:
    model, _ = swinging()

    def x(t):
        return torch.sin(4 * t)[None] * torch.ones(1, dtype=torch.float64)

    check_in_torch(kp.ODEProblem(model, START, GRID, x))


class Currents(nn.Module):
    """v' = 2 (-v + drive + i), i' = -4 i of three neurons; state [v, i]."""

    def __init__(self) -> None:
        super().__init__()
        self.drive = nn.Parameter(rows([1.6, 1.3, 1.1])[0])

    def forward(self, t, z):
        v, i = z[:, :3], z[:, 3:]
        return torch.cat([2 * (self.drive + i - v), -4 * i], -1)


class Spike(nn.Module):
    """v of one neuron to zero; the currents of all jump by its synapses."""

    def __init__(self, synapses: nn.Linear, neuron: int) -> None:
        super().__init__()
        self.synapses, self.neuron = synapses, neuron
        self.register_buffer("keep", torch.ones(3).double().index_fill(0, torch.tensor([neuron]), 0))

    def forward(self, t, z):
        fired = (1 - self.keep).expand(len(z), 3)
        return torch.cat([z[:, :3] * self.keep, z[:, 3:] + self.synapses(fired)], -1)


def spiking() -> nn.Module:
    torch.manual_seed(0)
    synapses = nn.Linear(3, 3, bias=False).double()
    events = [Event(lambda t, z, n=n: z[:, n] - 1, Spike(synapses, n), direction=1) for n in range(3)]
    return Hybrid(Currents(), *events)


def test_times_of_spikes_move_with_the_weights_of_an_integrate_and_fire_network() -> None:
    z0 = rows([0.0, 0.1, 0.2, 0, 0, 0], [0.5, 0.0, 0.3, 0, 0, 0])
    sol, flow = check_in_torch(kp.ODEProblem(spiking(), z0, [0.0, 0.5, 1.0, 1.5]))
    assert {event for trial in sol.events for _, event in trial} == {0, 1, 2}
    assert min(map(len, sol.events)) >= 3
    assert [site.name for site in flow.sites if "synapses" in site.name]
    y = flow.output(torch.eye(3, 6).double())
    assert kp.trace(y.ntk).value > 0


class JaxCurrents(eqx.Module):
    drive: jax.Array

    def __call__(self, t, z):
        return jnp.concatenate([2 * (self.drive + z[3:] - z[:3]), -4 * z[3:]])


class JaxSpike(eqx.Module):
    weight: jax.Array
    neuron: int = eqx.field(static=True)

    def __call__(self, t, z):
        return jnp.concatenate([z[:3].at[self.neuron].set(0.0), z[3:] + self.weight[:, self.neuron]])


@pytest.mark.slow
def test_a_spiking_network_in_jax_is_the_same() -> None:
    model = spiking()
    weight = jnp.asarray(model.events[0].reset.synapses.weight.detach().numpy())
    events = [Event(lambda t, z, n=n: z[n] - 1, JaxSpike(weight, n), direction=1) for n in range(3)]
    theirs = Hybrid(JaxCurrents(jnp.array([1.6, 1.3, 1.1])), *events)
    z0, times = rows([0.0, 0.1, 0.2, 0, 0, 0]), [0.0, 0.5, 1.0]
    ours, other = (
        kp.linearize(kp.solve(kp.ODEProblem(f, z, times), rtol=1e-10, atol=1e-12))
        for f, z in ((model, z0), (theirs, jnp.asarray(z0.numpy())))
    )
    q = np.random.default_rng(0).standard_normal(ours.J.codomain.shape)
    mine = ours.as_parameters(ours.J.T.mv(torch.from_numpy(q)))
    found = other.as_parameters(other.J.T.mv(jnp.asarray(q)))
    np.testing.assert_allclose(found["flow.drive"], mine["flow.drive"].numpy(), rtol=1e-8)
    synapses = sum(found[f"events[{n}].reset.weight"] for n in range(3))  # three copies of one weight
    np.testing.assert_allclose(synapses, mine["events.0.reset.synapses.weight"].numpy(), rtol=1e-8, atol=1e-10)


# Each kind of event


class Column(nn.Module):
    """Column `at` becomes the function of the state."""

    def __init__(self, at: int, function) -> None:
        super().__init__()
        self.at, self.function, self.weight = at, function, nn.Parameter(torch.tensor(1.0).double())

    def forward(self, t, z):
        columns = list(z.unbind(-1))
        columns[self.at] = self.weight * self.function(z)
        return torch.stack(columns, -1)


def ramp(t, z):
    return torch.stack([1 + 0 * z[:, 0], 0.3 + 0 * z[:, 0]], -1)


def swing(t, z):
    return torch.stack([z[:, 1], -z[:, 0] * (1 + z[:, 2]), 0 * z[:, 2]], -1)


def parabola(t, z):
    return torch.stack([z[:, 1], torch.full_like(z[:, 1], 2.0)], -1)


def events_of(model, z0, times, **options) -> list[tuple[float, int]]:
    return kp.solve(kp.ODEProblem(model, z0, times), **options).events[0]


def test_an_event_exactly_at_a_time_of_the_grid_comes_before_it() -> None:
    hit = np.sqrt(2 / GRAVITY)
    problem = kp.ODEProblem(ball(), START[:1], [0.0, hit, 1.0])
    sol = kp.solve(problem)
    assert float(sol.state[0, 1, 1]) == pytest.approx(0.8 * GRAVITY * hit)
    early = rows([1.0 - 1e-9, 0.0])  # hits just before
    ours, near = kp.linearize(sol), kp.linearize(kp.solve(problem.remake(z0=early)))
    one = torch.ones(1, dtype=torch.float64)
    torch.testing.assert_close(ours.J.mv(one), near.J.mv(one), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("direction", "count"), [(0, 3), (1, 1), (-1, 1)])
def test_a_switch_is_thrown_once_at_each_crossing_in_its_direction(direction: int, count: int) -> None:
    switch = Event(lambda t, z: z[:, 0], Column(2, lambda z: -z[:, 2]), direction=direction)
    problem = kp.ODEProblem(Hybrid(swing, switch), rows([1.0, 0.0, 0.5]), [0.0, 3.0, 8.5])
    sol, _ = check_in_torch(problem)
    assert len(sol.events[0]) == count


def test_two_events_at_one_time_that_do_not_touch_each_other() -> None:
    def two(t, z):
        return torch.cat([fall(t, z[:, :2]), fall(t, z[:, 2:])], -1)

    def model():
        return Hybrid(two, *(Event(lambda t, z, n=n: z[:, n], Bounce(at=n + 1), direction=-1) for n in (0, 2)))

    def moved(z0):
        return kp.linearize(kp.solve(kp.ODEProblem(model(), z0, [0.0, 0.5, 1.0]))).J.mv(torch.ones(2).double())

    torch.testing.assert_close(moved(rows([1.0, 0, 1.0, 0])), moved(rows([1.0, 0, 1 + 1e-9, 0])), rtol=1e-7, atol=1e-7)


def test_a_jump_across_the_surface_of_another_event_makes_that_one_happen_at_once() -> None:
    push = Event(lambda t, z: z[:, 0] - 0.77, Column(1, lambda z: z[:, 1] + 0.6), direction=1)
    back = Event(lambda t, z: z[:, 1] - 0.8, Column(0, lambda z: 0.1 * z[:, 1]), direction=1)
    sol, _ = check_in_torch(kp.ODEProblem(Hybrid(ramp, push, back), rows([0.0, 0.0]), [0.0, 0.5, 1.0]))
    assert [event for _, event in sol.events[0]] == [0, 1]
    assert sol.events[0][0][0] == sol.events[0][1][0]


def test_a_dip_inside_of_one_step_is_seen() -> None:
    def model(height):
        return Hybrid(parabola, Event(lambda t, z: z[:, 0] - height, Bounce(), direction=-1))

    start, times = rows([0.25, -1.0]), [0.0, 1.0, 2.0]  # exact for rk4, in two steps; the lowest point is at 0.5
    assert events_of(model(1e-4), start, times, alg="rk4") == [(pytest.approx(0.49, abs=1e-9), 0)]
    assert events_of(model(-1e-4), start, times, alg="rk4") == []


def test_a_hop_that_is_shorter_than_a_step_is_seen() -> None:
    events = events_of(ball(0.02), START[:1], [0.0, 0.4, 0.4698])
    first = np.sqrt(2 / GRAVITY)
    assert [time for time, _ in events][:2] == [pytest.approx(first), pytest.approx(1.04 * first)]


def test_given_times_are_those_of_all_trials_and_order_is_kept() -> None:
    class Scale(nn.Module):
        def __init__(self, by: float) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.tensor(by).double())

        def forward(self, t, z):
            return self.by * z + t

    events = [Event(reset=Scale(0.5), every=0.2, offset=0.1), Event(reset=Scale(2.0), at=[0.3, 0.45])]
    field = kp.models.MLPField(2, 3).double()
    sol, flow = check_in_torch(kp.ODEProblem(Hybrid(field, *events), START, [0.0, 0.3, 0.6]))
    assert [(round(time, 6), event) for time, event in sol.events[1]] == [
        (0.1, 0),
        (0.3, 0),
        (0.3, 1),
        (0.45, 1),
        (0.5, 0),
    ]
    before = sol(0.3 - 1e-12)
    torch.testing.assert_close(sol.state[:, 1], 2 * (0.5 * before + 0.3) + 0.3, rtol=1e-9, atol=1e-9)
    assert not flow.untraced


def test_a_reset_that_has_no_value_elsewhere_is_called_only_where_it_happens() -> None:
    event = Event(lambda t, z: z[:, 0], Column(1, lambda z: torch.sqrt(-z[:, 1])), direction=-1)
    check_in_torch(kp.ODEProblem(Hybrid(fall, event), START, [0.0, 0.3, 0.6]))


REFUSED = {
    "a start on the surface": (lambda: ball(), [0.0, -1.0], [0.0, 0.5, 1.0], "begins on the surface of event 0"),
    "a ball at rest": (lambda: ball(), [0.0, 0.0], [0.0, 0.5, 1.0], "begins on the surface"),
    "endless bounces": (lambda: ball(0.5), [1.0, 0.0], [0.0, 0.5, 5.0], r"pile up at about 1.354\d+, the last .*Zeno"),
    "a touch": (
        lambda: Hybrid(parabola, Event(lambda t, z: z[:, 0], Bounce(), direction=-1)),
        *([0.25 - 1e-14, -1.0], [0.0, 0.4, 1.0], "hardly any speed"),
    ),
    "too many": (
        lambda: Hybrid(fall, ground(), max_events=1),
        *([1.0, 0.0], [0.0, 0.5, 1.7], "more than max_events = 1"),
    ),
    "a circle": (
        lambda: Hybrid(
            ramp,
            Event(lambda t, z: z[:, 0] - 0.77, Column(1, lambda z: 1 + 0 * z[:, 1]), direction=1),
            Event(lambda t, z: 0.8 - z[:, 1], Column(1, lambda z: 0 * z[:, 1]), direction=-1),
            Event(lambda t, z: z[:, 1] - 0.1, Column(1, lambda z: 1 + 0 * z[:, 1]), direction=-1),
        ),
        *([0.0, 0.2], [0.0, 0.5, 1.0], "cause each other without end"),
    ),
    "an order that matters": (
        lambda: Hybrid(
            lambda t, z: 1 + 0 * z,
            Event(lambda t, z: z[:, 0] - 0.5, Column(1, lambda z: z[:, 1] + 1), direction=1),
            Event(lambda t, z: z[:, 1] - 0.5, Column(1, lambda z: 0 * z[:, 1]), direction=1),
        ),
        *([0.0, 0.0], [0.0, 0.3, 1.0], "at one time, of which one moves the other"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_derivative_is_refused(case: str) -> None:
    model, start, times, message = REFUSED[case]
    with pytest.raises(kp.SolveError, match=message):
        kp.solve(kp.ODEProblem(model(), rows(start), times))


def test_of_several_trials_the_others_are_solved() -> None:
    with pytest.raises(kp.SolveError, match="trial 1 begins on the surface") as found:
        kp.solve(kp.ODEProblem(ball(), rows([1.0, 0.0], [0.0, -1.0]), GRID))
    assert found.value.trials == [1]
    assert found.value.solution.state.shape == (1, 5, 2)


# What else is asked of a solution


def linearised():
    return kp.linearize(kp.solve(kp.ODEProblem(ball(), START, GRID)))


def test_a_flow_at_some_places_is_exact() -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]]) > 0
    whole = linearised()
    flow, q = whole.where(mask), torch.randn(2, 5, 2, dtype=torch.float64)
    kept = torch.from_numpy(mask)[..., None] * q
    torch.testing.assert_close(flow.ntk.mv(q), torch.from_numpy(mask)[..., None] * whole.ntk.mv(kept))
    torch.testing.assert_close(flow.ntk.mv(q), flow.P.mv(flow.K.mv(flow.P.T.mv(q))))
    torch.testing.assert_close(flow.K.mv(q), flow.B.mv(flow.core.mv(flow.B.T.mv(q))))


def test_the_core_has_rows_only_where_a_reset_happens() -> None:
    flow = linearised()
    events = flow.solution.events
    (site,) = flow.sites
    assert int((site.inputs != 0).sum()) == sum(map(len, events)) == 5
    assert kp.effective_rank(flow.core).value <= 5


def test_matrices_from_time_to_time() -> None:
    flow = linearised()
    A, kick = kp.dynamics.step_jacobians(flow.solution), torch.zeros(2, 5, 2, dtype=torch.float64)
    kick[:, 1] = torch.tensor([0.3, -0.7])
    moved = torch.einsum("buv,bvw,bw->bu", A[:, 3], A[:, 2], kick[:, 1])
    torch.testing.assert_close(flow.P.mv(kick)[:, 3], moved)


def test_an_analysis_and_a_forecast_of_it() -> None:
    flow = linearised()
    found = kp.analyze(flow)
    assert found.attrs["problem"].startswith("hybrid") and found.sizes["time"] == 5
    forecast = kp.forecast(flow, flow.solution.state - flow.J.mv(torch.ones(1).double()), steps=3, lr=1e-4, check=False)
    assert forecast.loss[-1] < forecast.loss[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sol: kp.linearize(sol, sensealg=kp.InterpolatingAdjoint()), "sensitivities jump at events"),
        (lambda sol: kp.control.linearize_ltv(sol, inputs="x"), "inputs='kicks'"),
        (lambda sol: kp.control.linearize_ltv(sol, inputs="control"), "needs kp.models.ClosedLoop"),
        (lambda sol: kp.control.gram(sol, "c", loop="open"), "the closed loop"),
        (lambda sol: kp.control.adjoint(sol, lambda z: z[0], inputs="control"), "costates at the times of the grid"),
        (lambda sol: kp.control.linearize_lti(sol.problem.f, sol.state[0, 0]), "of a hybrid model"),
        (lambda sol: kp.dynamics.fixed_points(sol, starts=3), "fixed points are not searched of a hybrid model"),
        (lambda sol: kp.dynamics.lyapunov_spectrum(sol), "Lyapunov exponents are not computed of a hybrid model"),
    ],
)
def test_what_knows_of_no_jumps_says_so(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kp.solve(kp.ODEProblem(ball(), START, GRID)))


def test_events_of_other_libraries_are_named() -> None:
    event = diffrax.Event(lambda *_args, **_rest: 0.0)
    calls = [
        lambda: Hybrid(fall, event),
        lambda: kp.ODEProblem(ball(), START, GRID, event),
        lambda: kp.solve(kp.ODEProblem(ball(), START, GRID), event),
        lambda: kp.solve(kp.ODEProblem(ball(), START, GRID), event=event),
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"kp.models.Event\(condition, reset"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Event(lambda t, z: z[:, 0]), "reset is None"),
        (lambda: Event(reset=Bounce()), "just one of condition"),
        (lambda: Event(lambda t, z: z, Bounce(), direction=2), "direction is 2"),
        (lambda: Event(reset=Bounce(), every=-1.0), "every = -1.0"),
        (
            lambda: Hybrid(fall, Event(lambda t, z: z[:, 0], lambda t, z: z)),
            "no part of the hybrid model has parameters",
        ),
        (lambda: Hybrid(fall), "events are"),
        (
            lambda: kp.solve(kp.ODEProblem(ball(), START, GRID), "adaptive_heun"),
            "solve a hybrid model by a Runge-Kutta",
        ),
        (
            lambda: kp.solve(kp.ODEProblem(Hybrid(fall, Event(lambda t, z: z[:, :1], Bounce())), START, GRID)),
            "the condition of event 0 gave",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_the_time_of_an_event_is_that_of_the_libraries_own() -> None:
    options = {"rtol": 1e-10, "atol": 1e-12}
    (time, _), *_ = kp.solve(kp.ODEProblem(ball(), START[:1], GRID), **options).events[0]
    theirs, _ = odeint_event(
        fall, START[:1], torch.tensor(0.0).double(), event_fn=lambda t, z: z[0, 0], atol=1e-12, rtol=1e-10
    )
    assert float(theirs) == pytest.approx(time, abs=1e-9)
    ended = diffrax.diffeqsolve(
        *(diffrax.ODETerm(lambda t, z, _: jnp.stack([z[1], -GRAVITY + 0 * z[1]])), diffrax.Tsit5(), 0.0, 1.0, 0.01),
        jnp.asarray(START[0].numpy()),
        stepsize_controller=diffrax.PIDController(**options),
        event=diffrax.Event(lambda t, y, args, **_: y[0], optimistix.Newton(1e-12, 1e-12)),
    )
    assert float(ended.ts[-1]) == pytest.approx(time, abs=1e-9)
