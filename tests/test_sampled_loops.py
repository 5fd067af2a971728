"""Sampled-data loops against plain loops by hand, under autograd."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import kpflow_dyn as kp

pytestmark = pytest.mark.usefixtures("x64")
DT, UNITS = 0.1, 3
TIMES = np.array([0.0, 0.1, 0.25, 0.4, 0.5])
LOW, HIGH, RATE = -0.4, 0.3, 2.0


class Recurrent(nn.Module):
    """A policy of its own kind: (memory, observation) -> (memory, control)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(UNITS + 3, UNITS), nn.Linear(UNITS, 1)

    def forward(self, memory, seen):
        memory = torch.tanh(self.a(torch.cat([memory, seen], -1)))
        return memory, self.out(memory)


def noise() -> torch.Tensor:
    return 0.3 * torch.from_numpy(np.random.default_rng(1).standard_normal((2, len(TIMES), 1)))


def start() -> torch.Tensor:
    return torch.tensor([[0.4, -0.2], [1.0, 0.3]], dtype=torch.float64)


def policies(kind: str):
    torch.manual_seed(3)
    if kind == "none":
        return {"policy": nn.Sequential(nn.Linear(3, UNITS), nn.Tanh(), nn.Linear(UNITS, 1)).double()}
    if kind == "own":
        return {"policy": Recurrent().double(), "memory": UNITS}
    cell = (nn.GRUCell if kind == "gru" else nn.LSTMCell)(3, UNITS).double()
    return {"policy": cell, "readout": nn.Linear(UNITS, 1).double()}


def by_hand(parts, z0, x, times, delay, limits):
    """Whole steps of rk4 (the 3/8 rule) of length 0.05 or less, and a policy at every 0.1; differentiable."""
    f = kp.models.Pendulum()
    policy, readout, memory = parts["policy"], parts.get("readout"), parts.get("memory", 0)
    hidden = torch.zeros(len(z0), UNITS, dtype=torch.float64) if readout is not None or memory else None
    carry = (hidden, hidden) if isinstance(policy, nn.LSTMCell) else hidden
    commands = []  # (when it acts, control)
    held = last = torch.zeros(len(z0), 1, dtype=torch.float64)
    samples = DT * np.arange(6)  # and steps end where controls act, also before the first one does
    edges = np.unique(np.concatenate([times, samples, samples + delay % DT]).round(12))
    edges = edges[edges <= times[-1] + 1e-12]
    found, z = [], z0
    for n, now in enumerate(edges):
        if abs(now / DT - round(now / DT)) < 1e-9:
            seen = torch.cat([z, x(now)], -1)
            if readout is None and not memory:
                u = policy(seen)
            elif memory:
                carry, u = policy(carry, seen)
            else:
                carry = policy(seen, carry)
                u = readout(carry[0] if isinstance(carry, tuple) else carry)
            if limits:
                u = last + torch.clip(torch.clip(u, LOW, HIGH) - last, -RATE * DT, RATE * DT)
            last = u
            commands.append((now + delay, u))
        for when, u in commands:
            held = u if abs(when - now) < 1e-9 else held
        if np.abs(times - now).min() < 1e-12:
            found.append((z, held))
        if n + 1 < len(edges):
            h = edges[n + 1] - now
            k1 = f(z, held)
            k2 = f(z + h / 3 * k1, held)
            k3 = f(z + h * (k2 - k1 / 3), held)
            k4 = f(z + h * (k1 - k2 + k3), held)
            z = z + h / 8 * (k1 + 3 * k2 + 3 * k3 + k4)
    return torch.stack([torch.cat(pair, -1) for pair in found], 1)


def linear(samples):
    def x(t):
        right = int(np.clip(np.searchsorted(TIMES, t), 1, len(TIMES) - 1))
        along = (t - TIMES[right - 1]) / (TIMES[right] - TIMES[right - 1])
        return samples[:, right - 1] + along * (samples[:, right] - samples[:, right - 1])

    return x


@pytest.mark.parametrize(
    ("kind", "delay", "limits"),
    [("none", 0.0, True), ("own", 0.1, False), ("gru", 0.15, True), ("lstm", 0.03, False), ("gru", 0.0, False)],
)
def test_a_sampled_loop_is_the_loop_written_by_hand(kind: str, delay: float, limits: bool) -> None:
    parts = policies(kind)
    options = {"saturation": (LOW, HIGH), "rate_limit": RATE} if limits else {}
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), every=DT, delay=delay, **options, **parts)
    sol = kp.solve(kp.ODEProblem(loop, start(), TIMES, noise()), "rk4")
    expected = by_hand(parts, start(), linear(noise()), TIMES, delay, limits)
    held = slice(loop.sampling.state + loop.sampling.memory, None)
    found = torch.cat([sol.state[..., :2], sol.state[..., held][..., :1]], -1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    flow = kp.linearize(sol)
    assert not flow.untraced
    q = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = torch.zeros_like(sol.state)
    whole[..., :2], whole[..., held.start : held.start + 1] = q[..., :2], q[..., 2:]
    gradients = torch.autograd.grad(expected, list(loop.parameters()), q, allow_unused=True)
    weights = flow.J.codomain.measure
    g = flow.as_parameters(flow.J.T.mv(whole / weights))
    for (name, parameter), gradient in zip(loop.named_parameters(), gradients, strict=True):
        gradient = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(g[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    kp.check_adjoint(flow.J)
    kp.check_adjoint(flow.P)
    q = torch.randn_like(sol.state)
    torch.testing.assert_close(flow.ntk.mv(q), flow.P.mv(flow.K.mv(flow.P.T.mv(q))), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flow.K.mv(q), flow.B.mv(flow.core.mv(flow.B.T.mv(q))), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(flow.P.inv.mv(flow.P.mv(q)), q, rtol=1e-10, atol=1e-12)


def test_jax_is_the_same() -> None:
    torch.manual_seed(0)
    cell, readout = nn.GRUCell(3, UNITS).double(), nn.Linear(UNITS, 1).double()
    with torch.no_grad():
        cell.bias_hh[: 2 * UNITS] = 0  # equinox has one bias for these gates
    w = {name: jnp.asarray(value.detach().numpy()) for name, value in cell.named_parameters()}
    theirs = eqx.tree_at(
        lambda c: (c.weight_ih, c.weight_hh, c.bias, c.bias_n),
        eqx.nn.GRUCell(3, UNITS, key=jax.random.key(0)),
        (w["weight_ih"], w["weight_hh"], w["bias_ih"], w["bias_hh"][2 * UNITS :]),
    )
    reads = eqx.tree_at(
        lambda c: (c.weight, c.bias),
        eqx.nn.Linear(UNITS, 1, key=jax.random.key(0)),
        (jnp.asarray(readout.weight.detach().numpy()), jnp.asarray(readout.bias.detach().numpy())),
    )
    options = {"every": DT, "delay": 0.15, "saturation": (LOW, HIGH), "rate_limit": RATE}
    loops = (
        kp.models.ClosedLoop(kp.models.Pendulum(), cell, readout=readout, **options),
        kp.models.ClosedLoop(kp.models.Pendulum(), theirs, readout=reads, **options),
    )
    data = (start(), noise()), (jnp.asarray(start().numpy()), jnp.asarray(noise().numpy()))
    algs = "dopri5", diffrax.Dopri5()
    ours, other = (
        kp.linearize(kp.solve(kp.ODEProblem(loop, z0, TIMES, x), alg, rtol=1e-11, atol=1e-12))
        for loop, (z0, x), alg in zip(loops, data, algs, strict=True)
    )
    np.testing.assert_allclose(other.solution.state, ours.solution.state.numpy(), rtol=1e-9, atol=1e-10)
    q = np.random.default_rng(0).standard_normal(ours.J.codomain.shape)
    mine = ours.as_parameters(ours.J.T.mv(torch.from_numpy(q)))
    found = other.as_parameters(other.J.T.mv(jnp.asarray(q)))
    for name in ("policy.weight_ih", "policy.weight_hh", "readout.weight", "readout.bias"):
        np.testing.assert_allclose(found[name], mine[name].numpy(), rtol=1e-8, atol=1e-10)
    ours, other = (flow.only(lambda name: "policy.bias" not in name) for flow in (ours, other))
    np.testing.assert_allclose(
        other.ntk.mv(jnp.asarray(q)), ours.ntk.mv(torch.from_numpy(q)).numpy(), rtol=1e-7, atol=1e-9
    )


def test_a_gradient_flow_follows_a_sampled_loop() -> None:
    parts = policies("none")
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), every=DT, **parts)
    sol = kp.solve(kp.ODEProblem(loop, start(), TIMES, noise()), "rk4")
    flow = kp.gradient_flow(sol, lambda state: (state[..., :2] ** 2).mean(), span=2.0)
    losses, rate = [], 0.1
    for _ in range(21):
        states = by_hand(parts, start(), linear(noise()), TIMES, 0.0, False)[..., :2]
        losses.append((loss := (states**2).mean()).item())
        for parameter, gradient in zip(
            loop.parameters(), torch.autograd.grad(loss, list(loop.parameters())), strict=True
        ):
            parameter.data -= rate * gradient
    fallen = losses[0] - losses[-1]
    assert fallen > 0.01 * losses[0]
    assert abs(flow.loss[0] - losses[0]) < 1e-10
    assert abs(flow.loss[-1] - losses[-1]) < 0.1 * fallen


def test_the_start_may_be_the_plants_alone_or_whole() -> None:
    loop = kp.models.ClosedLoop(kp.models.CartPole(), nn.Linear(4, 1).double(), every=0.1, delay=0.15)
    z0 = torch.ones(2, 4, dtype=torch.float64)
    alone = kp.ODEProblem(loop, z0, [0.0, 0.05, 0.1])
    assert loop.sampling.size == alone.z0.shape[1] == 7
    held = loop.start(z0, control=torch.full((1,), 0.3, dtype=torch.float64))
    sol = kp.solve(alone.remake(z0=held))
    torch.testing.assert_close(sol.state[:, 1, 4], torch.full((2,), 0.3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delay": 0.1}, "delay is of sampled loops; give every="),
        ({"every": 0.0}, "every is 0.0, expected a positive number"),
        ({"every": 0.1, "delay": -0.1}, "delay is -0.1, expected a time >= 0"),
        ({"every": 0.1, "saturation": (1.0, 0.0)}, "expected \\(low, high\\)"),
        ({"every": 0.1, "rate_limit": -1.0}, "rate_limit is -1.0"),
        ({"every": 0.1, "saturation": -1.0}, "a positive number s for"),
        ({"every": 0.1, "saturation": True}, "saturation is True"),
        ({"every": 0.1, "memory": 2, "policy": nn.Linear(2, 1)}, "the policy takes one argument"),
        ({"every": 0.1, "memory": 2, "policy": nn.GRUCell(2, 3), "readout": 1}, "the GRUCell keeps 3 numbers"),
        ({"every": 0.1, "policy": nn.GRU(2, 3)}, r"give torch.nn.GRUCell\(2, 3\)"),
        ({"policy": nn.GRUCell(2, 3)}, "whose memory moves in steps; give every="),
        ({"every": 0.1, "policy": Recurrent()}, "takes 2 arguments, .* memory=, how many numbers"),
        (
            {"every": 0.1, "policy": Recurrent(), "memory": UNITS},
            "the policy failed: .* 2 entries .* no x, with a memory",
        ),
        ({"every": 0.1, "policy": nn.Linear(3, 1)}, "the policy failed: .* called on the 2 entries of the plant's"),
        ({"dt": 0.1}, "dt= is here `every=`"),
        ({"every": 0.1, "measurement_delay": 0.1}, "measurement_delay= is here `delay=`"),
        ({"every": 0.1, "noise": 0.1}, "noise= is here an input `x`"),
        ({"every": 0.1, "hold": "first"}, "zero-order"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    policy = options.pop("policy", nn.Linear(2, 1)).double()
    with pytest.raises((TypeError, ValueError), match=message):
        loop = kp.models.ClosedLoop(kp.models.Pendulum(), policy, **options)
        kp.solve(kp.ODEProblem(loop, start(), TIMES))


def test_saturation_by_a_number_is_that_on_both_sides() -> None:
    policy = nn.Linear(2, 1).double()
    one, two = (
        kp.models.ClosedLoop(kp.models.Pendulum(), policy, every=DT, saturation=s).sampling for s in (2, (-2.0, 2.0))
    )
    assert one == two


class Wide(nn.Linear):
    hidden_size = 8  # of layers that it might have, and no memory


@pytest.mark.parametrize("every", [None, DT])
def test_a_policy_that_names_its_hidden_size_is_no_cell(every: float | None) -> None:
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), Wide(2, 1).double(), every=every)
    assert kp.solve(kp.ODEProblem(loop, start(), TIMES), "rk4").state.shape == (2, len(TIMES), 2 + (every is not None))


def test_a_start_of_a_wrong_width_says_what_the_state_is() -> None:
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), nn.Linear(2, 1).double(), every=DT, delay=0.05)
    with pytest.raises(
        ValueError, match=r"z0 has 3 entries, expected the 2 of .* or the 4 of .*1 x 1 of controls that"
    ):
        kp.ODEProblem(loop, torch.zeros(2, 3).double(), TIMES)


@pytest.mark.parametrize("every", [None, DT])
def test_inputs_that_are_drawn_anew_are_refused(every: float | None) -> None:
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), nn.Linear(3, 1).double(), every=every)
    with pytest.raises(ValueError, match="draw noise once, as samples"):
        kp.solve(kp.ODEProblem(loop, start(), TIMES, lambda t: torch.randn(2, 1).double()))


def test_a_cell_without_a_readout_and_a_plant_without_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="give readout="):
        kp.models.ClosedLoop(kp.models.Pendulum(), nn.GRUCell(2, 3), every=0.1)
    with pytest.raises(ValueError, match=r"give ClosedLoop\(..., state_size=\)"):
        kp.models.ClosedLoop(lambda z, u: -z + u, nn.Linear(2, 2), every=0.1)


def test_a_loop_with_samples_is_no_cell() -> None:
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), nn.Linear(2, 1).double(), every=0.1)
    with pytest.raises(ValueError, match="ODEProblem"):
        kp.DiscreteProblem(loop, torch.zeros(2, 3, 0).double(), torch.zeros(2, 2).double())


def test_what_controls_reach_and_outputs_tell_of_a_sampled_loop() -> None:
    dt, K = 0.1, np.array([[-1.0, -1.5]])
    policy = nn.Linear(2, 1, bias=False).double()
    policy.weight.data = torch.from_numpy(K)
    loop = kp.models.ClosedLoop(kp.models.DoubleIntegrator(), policy, every=dt)
    start, times = torch.tensor([[1.0, 0.0], [0.2, -0.4]]).double(), dt * np.arange(6)
    sol = kp.solve(kp.ODEProblem(loop, start, times), "rk4")
    plant, pushed = np.array([[1, dt], [0, 1]]), np.array([[dt**2 / 2], [dt]])
    A = np.block([[plant, pushed], [K @ plant, K @ pushed]])  # of [position, velocity, held control]
    ltv = kp.control.linearize_ltv(sol)
    np.testing.assert_allclose(ltv.A.values[:, 1:], np.broadcast_to(A, (2, 5, 3, 3)), atol=1e-12)
    np.testing.assert_allclose(ltv.B.values[:, 1:], np.broadcast_to(A[:, 2:], (2, 5, 3, 1)), atol=1e-12)
    powers = [np.linalg.matrix_power(A, k) for k in range(6)]
    reached = sum(power @ A[:, 2:] @ A[:, 2:].T @ power.T for power in powers[:5])
    np.testing.assert_allclose(kp.control.gram(sol, "c").W.values[1, -1], reached, atol=1e-12)
    C = np.array([[1.0, 0.0, 0.0]])
    told = sum(power.T @ C.T @ C @ power for power in powers)
    np.testing.assert_allclose(kp.control.gram(sol, "o", C=C).W.values[0, 0], told, atol=1e-12)


def test_a_class_of_ones_own_below_a_cell_is_that_cell() -> None:
    class Own(nn.LSTMCell):
        pass

    torch.manual_seed(0)
    own, readout = Own(2, 3).double(), nn.Linear(3, 1).double()
    plain = nn.LSTMCell(2, 3).double()
    plain.load_state_dict(own.state_dict())
    states = []
    for cell in (own, plain):
        loop = kp.models.ClosedLoop(kp.models.Pendulum(), cell, readout=readout, every=0.1)
        states.append(kp.solve(kp.ODEProblem(loop, torch.ones(2, 2).double(), [0.0, 0.2, 0.4]), "rk4").state)
    torch.testing.assert_close(*states)
