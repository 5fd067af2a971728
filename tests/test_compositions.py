"""Hybrid models of hybrid models, events around sampled loops, and what has no jumps and says so."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.models import ClosedLoop, Event, Hybrid, MLPField

pytestmark = pytest.mark.usefixtures("x64")
DT, GRAVITY = 0.1, 9.81
GRID = DT * np.arange(9)
START = torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=torch.float64)


class Ball:
    state_size, control_size = 2, 1

    def __call__(self, z, u):
        xp = torch if isinstance(z, torch.Tensor) else jnp
        return xp.concatenate([z[..., 1:], u - GRAVITY], -1)


class Bounce(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.restitution = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def forward(self, t, z):
        return torch.stack([z[:, 0], -self.restitution * z[:, 1]], -1)


class JaxBounce(eqx.Module):
    restitution: jax.Array

    def __call__(self, t, y, args):
        assert args is None
        return jnp.stack([y[0], -self.restitution * y[1]])


class Recurrent(nn.Module):
    """A policy with a memory of two numbers, which sees the height alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(3, 2).double(), nn.Linear(2, 1).double()

    def forward(self, memory, z):
        memory = torch.tanh(self.layer(torch.cat([memory, z[:, :1]], -1)))
        return memory, self.out(memory)


def ground(reset) -> Event:
    return Event(lambda t, z: z[..., 0], reset, direction=False)


def by_hand(act, restitution: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """[time, (height, speed, held control)] of one ball: parabolas between samples and impacts, differentiable."""
    (y, v), found, carry = start, [], None
    for _ in GRID:
        u, carry = act(torch.stack([y, v])[None], carry)
        found.append(torch.stack([y, v, u]))
        left, a = torch.tensor(DT, dtype=torch.float64), u - GRAVITY
        while 0 < (s := (-v - torch.sqrt(v**2 - 2 * a * y)) / a) < left:
            y, v, left = y + s * v + a * s**2 / 2, -restitution * (v + a * s), left - s
        y, v = y + v * left + a * left**2 / 2, v + a * left
    return torch.stack(found)


@pytest.mark.parametrize("memory", [None, 2])
def test_a_sampled_policy_over_contacts_is_that_written_by_hand(memory: int | None) -> None:
    torch.manual_seed(0)
    policy = nn.Linear(2, 1).double() if memory is None else Recurrent()
    loop = Hybrid(ClosedLoop(Ball(), policy, every=DT, memory=memory), ground(bounce := Bounce()))
    names = [f"policy.{name}" for name, _ in policy.named_parameters()] + ["plant_events.0.reset.restitution"]
    assert [name for name, _ in loop.named_parameters()] == names
    sol = kp.solve(kp.ODEProblem(loop, START, GRID), "rk4")
    assert {event for _, event in sol.events[0]} == {0, 1}
    torch.testing.assert_close(sol.problem.z0, loop.start(START))

    def act(z, carry):
        if memory is None:
            return policy(z)[0, 0], None
        carry, u = policy(torch.zeros(1, 2).double() if carry is None else carry, z)
        return u[0, 0], carry

    expected = torch.stack([by_hand(act, bounce.restitution, start) for start in START])
    seen = torch.eye(loop.sampling.size).double()[[0, 1, -1]]
    torch.testing.assert_close(sol.state @ seen.T, expected, rtol=1e-10, atol=1e-10)
    flow = kp.linearize(sol)
    q = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, list(loop.parameters()), q)
    g = flow.as_parameters(flow.J.T.mv(q @ seen / flow.J.codomain.measure))
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(g[name], gradient, rtol=1e-6, atol=1e-8, msg=name)
    kp.check_adjoint(flow.J)
    q = torch.randn_like(sol.state)
    torch.testing.assert_close(flow.ntk.mv(q), flow.P.mv(flow.K.mv(flow.P.T.mv(q))), rtol=1e-8, atol=1e-9)


def test_jax_is_the_same_with_signatures_of_diffrax() -> None:
    torch.manual_seed(0)
    policy = nn.Linear(2, 1).double()
    theirs = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias),
        eqx.nn.Linear(2, 1, key=jax.random.key(0)),
        tuple(jnp.asarray(value.detach().numpy()) for value in (policy.weight, policy.bias)),
    )
    options = {"every": DT, "delay": 0.05}
    ours = Hybrid(ClosedLoop(Ball(), policy, **options), ground(Bounce()))
    other = Hybrid(
        ClosedLoop(Ball(), theirs, **options), Event(lambda t, y, args: y[0], JaxBounce(jnp.asarray(0.8)), -1)
    )
    sol = kp.solve(kp.ODEProblem(ours, START, GRID), "dopri5")
    in_jax = kp.solve(kp.ODEProblem(other, jnp.asarray(START.numpy()), GRID), diffrax.Dopri5())
    np.testing.assert_allclose(in_jax.state, sol.state, rtol=1e-9, atol=1e-10)
    assert [event for _, event in in_jax.events[0]] == [event for _, event in sol.events[0]]
    assert {event for _, event in sol.events[0]} == {0, 1, 2}  # samples, when their controls act, and the ground
    q = np.random.default_rng(0).standard_normal(sol.state.shape)
    flows = kp.linearize(sol), kp.linearize(in_jax)
    mine = flows[0].as_parameters(flows[0].J.T.mv(torch.from_numpy(q)))
    found = flows[1].as_parameters(flows[1].J.T.mv(jnp.asarray(q)))
    assert list(found) == ["plant_events[0].reset.restitution", "policy.bias", "policy.weight"]
    for name, values in found.items():
        np.testing.assert_allclose(values, mine[name.replace("[0]", ".0")], rtol=1e-7, atol=1e-9)


def test_samples_do_not_count_among_the_events_of_a_trial() -> None:
    loop = Hybrid(ClosedLoop(Ball(), nn.Linear(2, 1).double(), every=DT), ground(Bounce()), max_events=1)
    sol = kp.solve(kp.ODEProblem(loop, START[:1], GRID[:7]), "rk4")
    assert sol.stats["events"] > 1
    assert Hybrid(loop, ground(Bounce())).max_events == 1


def field_and_events(framework: str):
    if framework == "torch":
        return MLPField(2, 4).double(), Event(reset=lambda t, z: 0.5 * z, every=0.3), START
    return (
        kp.models.jax.MLPField(2, 4, key=jax.random.key(0)),
        Event(reset=lambda t, z: 0.5 * z, every=0.3),
        jnp.asarray(START.numpy()),
    )


@pytest.mark.parametrize("framework", cases(["torch", "jax"], {"torch"}))
def test_a_hybrid_of_a_hybrid_is_one(framework: str) -> None:
    flow, halves, z0 = field_and_events(framework)
    push = Event(reset=lambda t, z: z + 1.0, at=[0.3, 0.5])
    inner = Hybrid(flow, halves, max_events=7)
    models = Hybrid(inner, push), Hybrid(flow, halves, push), Hybrid(flow, [halves, push], max_events=3)
    solutions = [kp.solve(kp.ODEProblem(model, z0, GRID)) for model in models]
    for sol in solutions[1:]:
        np.testing.assert_array_equal(sol.state, solutions[0].state)
        assert sol.events == solutions[0].events
        assert list(kp.linearize(sol).parameters) == list(kp.linearize(solutions[0]).parameters)
    assert [model.max_events for model in models] == [7, 1000, 3]
    assert Hybrid(inner, push, max_events=9).max_events == 9


def test_terms_of_diffrax_are_flows() -> None:
    def linear(rate, t, y, args):
        return -rate * y

    terms = [diffrax.ODETerm(jax.tree_util.Partial(linear, jnp.asarray(rate))) for rate in (0.3, 0.4)]
    plain = jax.tree_util.Partial(lambda rate, t, y: -rate * y, jnp.asarray(0.7))
    event = Event(reset=lambda t, y, args: y + 1.0, every=0.3)
    states = [
        kp.solve(kp.ODEProblem(Hybrid(flow, event), jnp.ones((1, 2)), GRID[:5])).state
        for flow in (diffrax.MultiTerm(*terms), plain, Hybrid(diffrax.ODETerm(plain), event).flow)
    ]
    np.testing.assert_allclose(states[0], states[1], rtol=1e-12)
    np.testing.assert_allclose(states[2], states[1], rtol=1e-12)
    with pytest.raises(TypeError, match=r"flow is the class ODETerm, expected"):
        Hybrid(diffrax.ODETerm, Event(reset=Bounce(), every=0.1))


def hybrid() -> nn.Module:
    return Hybrid(MLPField(2, 4).double(), Event(reset=lambda t, z: z, every=0.3))


def sampled() -> nn.Module:
    return ClosedLoop(Ball(), nn.Linear(2, 1).double(), every=DT)


X = torch.zeros(2, len(GRID), 1).double()
LOST = {
    "noise of a hybrid": (lambda: kp.SDEProblem(hybrid(), MLPField(2, 4), START, GRID), "kicks in an event"),
    "noise of a loop": (lambda: kp.SDEProblem(sampled(), MLPField(2, 4), START, GRID), "kicks in an event"),
    "a hybrid noise": (lambda: kp.SDEProblem(MLPField(2, 4), hybrid(), START, GRID), "kicks in an event"),
    "a path": (lambda: kp.CDEProblem(hybrid(), START, GRID, X), r"with X'\(t\) as its input x"),
    "a delay": (lambda: kp.DDEProblem(hybrid(), START, GRID, 0.1), "delay=tau"),
    "a method": (lambda: kp.SDEProblem(hybrid().forward, MLPField(2, 4), START, GRID), "kicks in an event"),
    "the method of a field": (lambda: kp.ODEProblem(hybrid().forward, START, GRID), "give the model itself"),
    "a wrapper": (
        lambda: kp.ODEProblem(nn.Linear(2, 2), START, GRID).remake(f=nn.Sequential(hybrid())),
        "model inside",
    ),
    "rest": (lambda: kp.FixedPointProblem(sampled(), START), "kp.ODEProblem"),
    "steps": (lambda: kp.DiscreteProblem(hybrid(), X), "kp.ODEProblem"),
    "a network": (lambda: kp.StaticProblem(nn.Sequential(hybrid()), X), "hybrid model inside"),
    "a part of a field": (lambda: kp.ODEProblem(nn.Sequential(sampled()), START, GRID), "hybrid model inside"),
    "a part of a flow": (lambda: Hybrid(nn.Sequential(sampled()), ground(Bounce())), "hybrid model inside"),
    "a reset": (lambda: Hybrid(MLPField(2, 4), Event(reset=hybrid(), every=0.1)), "a condition or reset"),
    "a plant": (lambda: ClosedLoop(hybrid(), nn.Linear(2, 1)), "give its events to the loop"),
    "a plant of JAX": (
        lambda: ClosedLoop(Hybrid(*field_and_events("jax")[:2]), nn.Linear(2, 1)),
        "give its events to the loop",
    ),
    "a policy": (lambda: ClosedLoop(Ball(), nn.Sequential(hybrid())), "hybrid model inside"),
    "a sum of terms": (
        lambda: kp.ODEProblem(
            diffrax.MultiTerm(*[diffrax.ODETerm(Hybrid(*field_and_events("jax")[:2]))] * 2), jnp.ones((1, 2)), GRID
        ),
        "hybrid model inside",
    ),
}


@pytest.mark.parametrize("case", LOST)
def test_jumps_are_not_dropped(case: str) -> None:
    call, message = LOST[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_reset_around_a_loop_gives_the_state_of_the_plant() -> None:
    loop = Hybrid(sampled(), ground(lambda t, z: z[:, :1]))
    with pytest.raises(ValueError, match=r"the reset of event 1 failed: it gave \(1, 1\), expected the plant's state"):
        kp.solve(kp.ODEProblem(loop, START, GRID))


@pytest.mark.parametrize(("given", "kept"), [(True, 1), (False, -1), (None, 0), (np.int64(1), 1), (np.True_, 1)])
def test_directions_are_those_of_diffrax_too(given, kept: int) -> None:
    assert Event(lambda t, z: z[:, 0], Bounce(), direction=given).direction == kept


@pytest.mark.parametrize("given", [2, 1.0, "down", [1]])
def test_other_directions_are_refused(given) -> None:
    with pytest.raises(ValueError, match="expected 1 or True"):
        Event(lambda t, z: z[:, 0], Bounce(), direction=given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Event(cond_fn=ground, reset=ground), "cond_fn= is here `condition`"),
        (lambda: Event(ground, affect=ground), "affect= is here `reset`"),
        (lambda: Event(ground, **{"affect!": ground}), "affect!= is here `reset`"),
        (lambda: Event(ground, ground, terminal=True), "terminal= is here nothing: a solve goes on"),
        (lambda: Hybrid(MLPField(2, 4), events=[]), r"Hybrid\(flow, event"),
        (lambda: Hybrid(MLPField(2, 4), [None]), "events are NoneType, expected"),
        (
            lambda: kp.DDEProblem(MLPField(2, 4), z0=START, t=GRID, tau=1.0),
            "tau= is here `delays=`.*z0= is here `history=",
        ),
        (lambda: kp.DDEProblem(MLPField(2, 4), START, GRID, lags=1.0), "lags= is here `delays="),
        (lambda: kp.SDEProblem(MLPField(2, 4), MLPField(2, 4), START, GRID, bm=1), "bm= is here `brownian="),
        (lambda: kp.CDEProblem(MLPField(2, 4), START, GRID, coeffs=X), "coeffs= is here the path `path`"),
    ],
)
def test_what_others_call_them_is_told(call, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize("around", [lambda loop: loop, lambda loop: Hybrid(loop, ground(Bounce()))])
def test_a_policy_without_its_inputs_is_told_what_it_gets(around) -> None:
    loop = around(ClosedLoop(Ball(), nn.Linear(3, 1).double()))
    with pytest.raises(ValueError, match="its policy gets z, and the problem has no x"):
        kp.solve(kp.ODEProblem(loop, START, GRID))


def test_errors_do_not_print_networks() -> None:
    large = nn.Sequential(*[nn.Linear(2, 2) for _ in range(50)])
    calls = [
        lambda: Hybrid([large], ground(Bounce())),
        lambda: Event(large),
        lambda: Event(1, large),
        lambda: Hybrid(large, large),
        lambda: ClosedLoop(Ball(), [large]),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert len(str(error.value)) < 300


def test_costates_through_contacts_are_derivatives_of_the_cost() -> None:
    torch.manual_seed(0)
    policy = nn.Linear(2, 1).double()
    loop = Hybrid(ClosedLoop(Ball(), policy, every=DT), ground(Bounce()))
    cost = kp.control.QuadraticCost(np.diag([1.0, 0.1]), [[0.1]])

    def of_start(shift: float):
        z0 = START + torch.tensor([shift, 0.0]).double()
        return kp.control.adjoint(kp.solve(kp.ODEProblem(loop, z0, GRID[:7]), "rk4"), cost)

    slope = (of_start(1e-5).cost.values - of_start(-1e-5).cost.values) / 2e-5
    costate = of_start(0.0).costate.values[:, 0]  # behind the sample at t0, which sees the start as well
    np.testing.assert_allclose(costate[:, 0] + costate[:, 2] * policy.weight[0, 0].item(), slope, rtol=1e-6)
    with pytest.raises(ValueError, match="the plant of the loop has events"):
        kp.control.analyze(kp.solve(kp.ODEProblem(loop, START, GRID[:7]), "rk4"), cost)


@pytest.mark.parametrize(
    "posed",
    [
        lambda: kp.ODEProblem(Hybrid(ClosedLoop(Ball(), nn.Linear(2, 1).double()), ground(Bounce())), START, GRID),
        lambda: kp.ODEProblem(MLPField(2, 4).double(), START, GRID),
        lambda: kp.DiscreteProblem(nn.GRUCell(1, 2).double(), X),
    ],
)
def test_a_cost_of_the_control_is_not_dropped(posed) -> None:
    cost = kp.control.QuadraticCost(np.eye(2), [[0.1]])
    with pytest.raises(ValueError, match="cost has R, of a control"):
        kp.control.training_cost(posed(), cost)
    assert kp.control.training_cost(posed(), kp.control.QuadraticCost(np.eye(2))).loss is not None
