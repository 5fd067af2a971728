"""Hybrid models in the forms that fields have: args, several arrays, second order, complex, backward, on a span."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.models import Event, Hybrid

pytestmark = pytest.mark.usefixtures("x64")

GRID = np.array([0.0, 0.3, 0.8, 1.3])
FIXED = {"steps": 0.1}
START = np.array([[1.0, 0.0], [0.6, 0.3]])
ARGS = {"gravity": 9.81, "kept": 0.9, "ground": 0.1}
RESTITUTION = 0.8
ONE = torch.ones(1, dtype=torch.float64)


class Bounce(nn.Module):
    """A learnt part of the speed is kept; state, inputs and args in any of the forms that have them."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.e = form, nn.Parameter(torch.tensor(RESTITUTION, dtype=torch.float64))

    def forward(self, t, *given):
        return bounced(self.form, self.e, *given)


class JaxBounce(eqx.Module):
    e: jax.Array
    form: str = eqx.field(static=True)

    def __call__(self, t, *given):
        return bounced(self.form, self.e, *given)


def bounced(form: str, e: Any, *given: Any) -> Any:
    if form == "second":
        q, v, args = given
        return q, -e * args["kept"] * v
    z, args = given
    if form == "flat":
        return xp(z).stack([z[..., 0], -e * args["kept"] * z[..., 1]], -1)
    q, v = parts(form, z)
    return like(form, q, -e * args["kept"] * v)


def xp(z: Any) -> Any:
    return torch if isinstance(z, Tensor) else jnp


def parts(form: str, z: Any) -> tuple[Any, Any]:
    return z if form == "tuple" else (z["body"][0], z["speed"])


def like(form: str, q: Any, v: Any) -> Any:
    return (q, v) if form == "tuple" else {"body": [q], "speed": v}


def falling(form: str) -> Any:
    if form == "second":
        return lambda t, q, v, args: 0 * q - args["gravity"]
    if form == "flat":
        return lambda t, z, args: xp(z).stack([z[..., 1], 0 * z[..., 1] - args["gravity"]], -1)
    return lambda t, z, args: like(form, parts(form, z)[1], 0 * parts(form, z)[1] - args["gravity"])


def above(form: str) -> Any:
    if form == "second":
        return lambda t, q, v, args: q[..., 0] - args["ground"]
    if form == "flat":
        return lambda t, z, args: z[..., 0] - args["ground"]
    return lambda t, z, args: parts(form, z)[0][..., 0] - args["ground"]


def posed(form: str, framework: str, t: Any = GRID) -> kp.ODEProblem:
    array = torch.tensor if framework == "torch" else jnp.asarray
    bounce = Bounce(form) if framework == "torch" else JaxBounce(jnp.asarray(RESTITUTION), form)
    model, args = Hybrid(falling(form), Event(above(form), bounce, direction=-1)), dict(ARGS)
    if form == "flat":
        return kp.ODEProblem(model, array(START), t, args=args)
    q, v = array(START[:, :1]), array(START[:, 1:])
    if form == "second":
        return kp.SecondOrderProblem(model, q, v, t, args=args)
    return kp.ODEProblem(model, like(form, q, v), t, args=args)


def simulated(e: float, times: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Plain scipy, from bounce to bounce."""
    now, z, states = times[0], start, []

    def hits(t, z):
        return z[0] - ARGS["ground"]

    hits.terminal, hits.direction = True, -1
    for begin, end in pairwise(times):
        now = begin
        while now < end:
            found = solve_ivp(
                lambda t, z: [z[1], -ARGS["gravity"]], (now, end), z, "DOP853", events=hits, rtol=1e-12, atol=1e-13
            )
            now, z = found.t[-1], found.y[:, -1]
            if found.status == 1:
                z = np.array([ARGS["ground"] + 1e-15, -e * ARGS["kept"] * z[1]])
        states.append(z)
    return np.array([start, *states])


def far(a: Any, b: Any) -> float:
    return float(np.abs(to_numpy(a) - to_numpy(b)).max())


def test_args_reach_flow_condition_and_reset() -> None:
    solution = kp.solve(posed("flat", "torch"), rtol=1e-10, atol=1e-12)
    own = [np.stack([simulated(RESTITUTION + d, GRID, z) for z in START]) for d in (0.0, 1e-6, -1e-6)]
    assert far(solution.state, own[0]) < 1e-8
    assert far(kp.linearize(solution).J.mv(ONE), (own[1] - own[2]) / 2e-6) < 1e-6


@pytest.mark.parametrize(
    ("form", "framework"),
    [
        *((form, "torch") for form in ("tuple", "dict", "second")),
        ("second", "jax"),
        *(pytest.param(form, "jax", marks=pytest.mark.slow) for form in ("tuple", "dict")),
    ],
)
def test_a_state_of_several_arrays_is_the_flat_one(form: str, framework: str) -> None:
    alg = "dopri5" if framework == "torch" else diffrax.Dopri5()
    problem = posed(form, framework)
    plain, solution = kp.solve(posed("flat", "torch"), "dopri5", **FIXED), kp.solve(problem, alg, **FIXED)
    assert solution.events == [[(pytest.approx(time, abs=1e-12), n) for time, n in trial] for trial in plain.events]
    assert far(solution.state, plain.state) < 1e-11
    flow, q = kp.linearize(solution), np.random.default_rng(0).standard_normal(plain.state.shape)
    ours = flow.ntk.mv(torch.tensor(q) if framework == "torch" else jnp.asarray(q))
    assert not flow.untraced and far(ours, kp.linearize(plain).ntk.mv(torch.tensor(q))) < 1e-9
    shapes = jax.tree.map(lambda part: tuple(part.shape), problem.unflatten(solution.state))
    assert set(jax.tree.leaves(shapes, is_leaf=lambda s: isinstance(s, tuple) and isinstance(s[0], int))) == {(2, 4, 1)}
    assert far(problem.remake(z0=solution.state[:, 0]).z0, problem.z0) == 0


def test_parts_that_take_a_tuple_of_args_one_by_one_or_not() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e = nn.Parameter(torch.tensor(RESTITUTION, dtype=torch.float64))

        def forward(self, t, z, args):
            return torch.stack([z[:, 0], -self.e * args[1] * z[:, 1]], -1)

    def fall(t, z, gravity, _kept, _ground):
        return torch.stack([z[:, 1], 0 * z[:, 1] - gravity], -1)

    model = Hybrid(fall, Event(lambda t, z, args: z[:, 0] - args[2], Both(), direction=-1))
    solution = kp.solve(kp.ODEProblem(model, torch.tensor(START), GRID, args=tuple(ARGS.values())), **FIXED)
    assert far(solution.state, kp.solve(posed("flat", "torch"), **FIXED).state) == 0


def test_parts_that_take_no_args_are_named() -> None:
    model = Hybrid(falling("flat"), Event(lambda t, z: z[:, 0], Bounce("flat"), direction=-1))
    with pytest.raises(TypeError, match=r"the condition of event 0 takes \(t, z\), but with args .* z, args\)"):
        kp.ODEProblem(model, torch.tensor(START), GRID, args=ARGS)
    loop = kp.models.ClosedLoop(kp.models.Pendulum(), nn.Linear(2, 1).double(), every=0.1)
    with pytest.raises(TypeError, match="flow takes"):
        kp.ODEProblem(loop, torch.tensor(START), GRID, args=ARGS)
    with pytest.raises(ValueError, match="a sampled loop has a real state"):
        kp.ODEProblem(loop, torch.tensor(START), GRID[::-1].copy())


def test_what_fails_is_told_in_the_form_of_the_user() -> None:
    bad = Event(above("dict"), lambda t, z, args: z["speed"], direction=-1)
    given = posed("dict", "torch")
    with pytest.raises(ValueError, match=r"reset of event 0 failed: what it returns .* called as \(t, z, args\); with"):
        kp.solve(kp.ODEProblem(Hybrid(falling("dict"), bad, *_learning()), _start("dict"), GRID, args=ARGS))
    assert given.args == ARGS


def _learning() -> tuple[Event]:
    return (Event(above("dict"), Bounce("dict"), direction=-1),)


def _start(form: str) -> Any:
    return like(form, torch.tensor(START[:, :1]), torch.tensor(START[:, 1:]))


# Complex numbers


class Turning(nn.Module):
    """z' = (a + i w) z; when its size is 1 it loses a learnt part and turns."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.Parameter(torch.tensor(0.5 + 0.2j, dtype=torch.complex128))

    def forward(self, t, z):
        return self.kept * z


@pytest.mark.parametrize("times", [GRID, (0.0, 1.3)], ids=["grid", "span"])
def test_a_complex_state_is_the_pair_of_real_ones(times: Any) -> None:
    options = {"rtol": 1e-7, "atol": 1e-9}
    spiral = Hybrid(lambda t, z: (1 + 2j) * z, Event(lambda t, z: z.abs().square()[:, 0] - 1, Turning(), direction=1))
    z0 = torch.tensor([[0.4 + 0.2j], [0.3 - 0.5j]], dtype=torch.complex128)
    solution = kp.solve(kp.ODEProblem(spiral, z0, times), **options)
    nodes = solution.t
    expected = np.zeros((2, len(nodes)), complex)
    for trial, start in enumerate(z0[:, 0].numpy()):
        first = -np.log(abs(start))
        again = -np.log(abs(0.5 + 0.2j))
        bounces = np.where(nodes < first, 0, 1 + np.floor((nodes - first) / again))
        expected[trial] = start * np.exp((1 + 2j) * nodes) * (0.5 + 0.2j) ** bounces
    assert far(solution.state, np.stack([expected.real, expected.imag], -1)) < 1e-5
    flow = kp.linearize(solution)  # |z| is 1 at the events, so that their times move with what is kept
    assert kp.check_adjoint(flow.J) < 1e-12 and list(flow.parameters) == ["events.0.reset.kept"]
    theta, d = torch.tensor([0.3, -0.7]).double(), 1e-6
    change = flow.as_parameters(theta)["events.0.reset.kept"]

    def at(step: float) -> Tensor:
        with torch.no_grad():
            spiral.events[0].reset.kept += step * change
            grid = nodes if len(times) > 2 else np.append(0.0, nodes)
            found = kp.solve(kp.ODEProblem(spiral, z0, grid), **options).state[:, -len(nodes) :]
            spiral.events[0].reset.kept -= step * change
        return found

    assert far(flow.J.mv(theta), (at(d) - at(-d)) / (2 * d)) < 1e-5


# Backward in time


class Scale(nn.Module):
    """The speed times a learnt number."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.tensor(by, dtype=torch.float64))

    def forward(self, t, z):
        return torch.stack([z[:, 0], self.by * z[:, 1]], -1)


def fall(t, z):
    return torch.stack([z[:, 1], 0 * z[:, 1] - 9.81], -1)


def test_backward_in_time_a_ball_flies_back_through_its_bounces() -> None:
    times = np.array([0.0, 0.3, 0.8, 1.0])
    ball = Hybrid(fall, Event(lambda t, z: z[:, 0], Scale(-0.8), direction=-1))
    there = kp.solve(kp.ODEProblem(ball, torch.tensor(START), times), rtol=1e-10, atol=1e-12)
    back = Hybrid(fall, Event(lambda t, z: z[:, 0], Scale(-1 / 0.8), direction=-1))  # it falls, seen backward
    problem = kp.ODEProblem(back, there.state[:, -1], times[::-1].copy())
    again = kp.solve(problem, rtol=1e-10, atol=1e-12)
    assert far(again.state.flip(1), there.state) < 1e-7 and far(again(0.6), there(0.6)) < 1e-7
    assert again.t.tolist() == times[::-1].tolist()
    expected = [[(pytest.approx(time, abs=1e-8), n) for time, n in trial[::-1]] for trial in there.events]
    assert again.events == expected and all(expected)
    flow, d = kp.linearize(again), 1e-6

    def at(step: float) -> Tensor:
        with torch.no_grad():
            back.events[0].reset.by += step
            found = kp.solve(problem, rtol=1e-12, atol=1e-13).state
            back.events[0].reset.by -= step
        return found

    assert far(flow.J.mv(ONE), (at(d) - at(-d)) / (2 * d)) < 1e-6 * float(abs(flow.J.mv(ONE)).max())


def test_given_times_backward_are_counted_from_the_first_time_and_order_is_that_of_the_solve() -> None:
    events = [Event(reset=Scale(0.5), every=0.4, offset=0.1), Event(reset=Scale(2.0), at=[0.3, 0.5])]
    problem = kp.ODEProblem(Hybrid(lambda t, z: 0 * z, *events), torch.tensor(START), [1.0, 0.6, 0.0])
    solution = kp.solve(problem)
    expected = [(0.9, 0), (0.5, 0), (0.5, 1), (0.3, 1), (0.1, 0)]
    assert [(round(time, 9), n) for time, n in solution.events[1]] == expected
    assert far(solution.state[:, -1, 1], START[:, 1] / 2) < 1e-14


# On a span


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_on_a_span_the_states_are_at_points_between_steps_and_events(framework: str) -> None:
    solution = kp.solve(posed("tuple", framework, (0.0, 1.3)), rtol=1e-9, atol=1e-11)
    on_grid = kp.solve(posed("flat", "torch"), rtol=1e-10, atol=1e-12)
    assert far(solution(GRID), on_grid.state) < 1e-6
    assert solution.weights.sum() == pytest.approx(1.3) and solution.t[0] > 0
    heights = (solution.weights[None] * to_numpy(solution.state)[..., 0]).sum(1)
    fine = np.linspace(0, 1.3, 13001)
    assert heights == pytest.approx(np.trapezoid(to_numpy(on_grid(fine))[..., 0], fine), abs=1e-5)
    flow = kp.linearize(solution)
    q = np.random.default_rng(0).standard_normal(solution.state.shape)
    q = torch.tensor(q) if framework == "torch" else jnp.asarray(q)
    assert far(flow.ntk.mv(q), flow.P.mv(flow.K.mv(flow.P.T.mv(q)))) < 1e-10
    assert far(flow.K.mv(q), flow.B.mv(flow.core.mv(flow.B.T.mv(q)))) < 1e-10
    assert kp.trace(flow.ntk).value > 0


@pytest.mark.slow
def test_a_flow_of_gradients_is_that_of_the_plain_form() -> None:
    losses = []
    for problem in (posed("flat", "torch"), posed("tuple", "torch")):
        cost = kp.control.training_cost(problem, lambda z: z[0] ** 2)
        sol, paid = kp.solve(problem, "rk4", **FIXED), kp.solve(cost.problem, "rk4", **FIXED)
        losses.append(kp.gradient_flow(paid, cost.loss, span=0.01).loss)
        losses.append(kp.forecast(kp.linearize(sol), loss=lambda z: (z[..., 0] ** 2).mean(), lr=1e-3, steps=3).loss)
    assert all(found[-1] < 0.9999 * found[0] for found in losses)
    assert all(np.allclose(*pair, rtol=1e-8) for pair in zip(losses[:2], losses[2:], strict=True))
