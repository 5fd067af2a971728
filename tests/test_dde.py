"""DDEs: exact solutions, orders, a plain loop under autograd, and the flows of their steps."""

from __future__ import annotations

from math import factorial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp

pytestmark = pytest.mark.usefixtures("x64")

GRID = np.array([0.0, 0.3, 0.5, 1.0])
RNG = np.random.default_rng(0)
W, B, Z0, X = (RNG.normal(size=size) for size in ((3, 3), (3,), (2, 3), (2, 4, 3)))
DELAYS = (0.3, 0.41)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(torch.tensor(W)), nn.Parameter(torch.tensor(B))

    def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...], *x: Tensor) -> Tensor:
        return torch.tanh(delayed[0] @ self.W.T + self.b) - z * torch.cos(t) * delayed[-1] + (x[0] if x else 0)


class JaxField(eqx.Module):
    W: jax.Array
    b: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array, delayed: tuple[jax.Array, ...], *x: jax.Array) -> jax.Array:
        return jnp.tanh(self.W @ delayed[0] + self.b) - z * jnp.cos(t) * delayed[-1] + (x[0] if x else 0)


class Decay(nn.Module):
    """z'(t) = a z(t - tau)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...]) -> Tensor:
        return self.a * delayed[0]


class Cubic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...]) -> Tensor:
        return self.a * delayed[0] / (1 + delayed[1] ** 4) - z


def jax_field() -> JaxField:
    return JaxField(jnp.array(W), jnp.array(B))


def problem(**more: object) -> kp.DDEProblem:
    given = {"f": Field(), "history": torch.tensor(Z0), "t": GRID, "delays": DELAYS}
    return kp.DDEProblem(**(given | more))  # type: ignore[arg-type]


def relative(a: object, b: object) -> float:
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    return float(abs(a - b).max() / abs(b).max())


def exact(t: float) -> float:
    """Of z'(t) = -z(t - 1), z = 1 before 0, by the method of steps."""
    return sum((-1) ** k * (t - k + 1) ** k / factorial(k) for k in range(9) if t >= k - 1)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_linear_equation_by_the_method_of_steps(method: str, order: int) -> None:
    t, lengths = np.linspace(0, 3.3, 12), np.array([0.2, 0.1, 0.05])
    errors = []
    for h in lengths:
        found = kp.solve(kp.DDEProblem(Decay(), torch.ones(1, 1).double(), t, 1.0), method, steps=float(h))
        errors.append(abs(found.state[0, :, 0].numpy() - [exact(s) for s in t]).max())
    assert abs(np.polyfit(np.log(lengths), np.log(errors), 1)[0] - order) < 0.15


def test_fourth_order_is_exact_where_solutions_are_polynomials_of_degree_four() -> None:
    t = np.linspace(0, 3.0, 11)
    found = kp.solve(kp.DDEProblem(Decay(), torch.ones(1, 1).double(), t, 1.0), steps=0.3)
    assert abs(found.state[0, :, 0].numpy() - [exact(s) for s in t]).max() < 1e-13
    between = np.linspace(0, 3.0, 40)
    assert abs(found(between)[0, :, 0].numpy() - [exact(s) for s in between]).max() < 1e-13


def test_fourth_order_with_two_delays_and_a_history_that_moves() -> None:
    t, lengths, found = np.linspace(0, 2.0, 5), np.array([0.04, 0.02, 0.01]), []
    for h in (*lengths, 0.0025):
        posed = kp.DDEProblem(Cubic(), lambda s: torch.cos(3 * s)[None, None] + 0.5, t, (0.7, 0.31))
        found.append(kp.solve(posed, "rk4", steps=float(h)).state.numpy())
    errors = [abs(state - found[-1]).max() for state in found[:-1]]
    assert np.polyfit(np.log(lengths), np.log(errors), 1)[0] > 3 and errors[-1] < 1e-8


def test_jacobian_is_that_of_a_plain_loop() -> None:
    """Euler steps that divide the delays, with a list of states and nothing else."""
    h, t = 0.1, np.arange(11) / 10
    solution = kp.solve(problem(t=t, delays=(0.3, 0.4), x=None), "euler")
    flow = kp.linearize(solution)
    assert not flow.untraced and solution.stats["steps"] == 10

    def states(W: Tensor, b: Tensor) -> Tensor:
        past = {n: torch.tensor(Z0) for n in range(-10, 1)}
        for n in range(10):
            rate = torch.tanh(past[n - 3] @ W.T + b) - past[n] * np.cos(t[n]) * past[n - 4]
            past[n + 1] = past[n] + h * rate
        return torch.stack([past[n] for n in range(11)], 1)

    J = torch.autograd.functional.jacobian(states, (torch.tensor(W), torch.tensor(B)))
    J = torch.cat([part.reshape(66, -1) for part in J], 1)
    assert relative(flow.J.dense(), J) < 1e-10
    weights = torch.tensor(solution.weights)[None, :, None].expand(2, 11, 3).reshape(-1)
    assert relative(flow.ntk.dense(), J @ J.T * weights) < 1e-10


@pytest.fixture(scope="module", params=[("euler", None, False), ("heun", 0.07, True), ("rk4", 0.1, False)])
def flow(request: pytest.FixtureRequest) -> kp.Flow:
    method, steps, driven = request.param
    return kp.linearize(kp.solve(problem(x=torch.tensor(X) if driven else None), method, steps=steps))


def test_identities_of_the_steps(flow: kp.Flow) -> None:
    nodal = flow.nodal
    P, K, ntk = nodal.P.dense(), nodal.K.dense(), nodal.ntk.dense()
    assert not nodal.untraced and nodal.ntk.domain.shape[2] == 3
    assert relative(P @ K @ nodal.P.T.dense(), ntk) < 1e-10
    assert relative(nodal.B.dense() @ nodal.core.dense() @ nodal.B.T.dense(), K) < 1e-10
    assert relative(nodal.P.inv.dense() @ P, torch.eye(len(P))) < 1e-10
    ops = (flow.P, flow.J, flow.B, flow.core, flow.ntk.apart, nodal.P, nodal.P.inv, nodal.B, nodal.J)
    assert all(kp.check_adjoint(op) < 1e-12 for op in ops)
    at = flow.solution.places
    rows = (np.arange(2)[:, None, None] * len(flow.solution.ends) + at[:, None]) * 3 + np.arange(3)
    assert relative(flow.J.dense(), nodal.J.dense()[rows.reshape(-1)]) < 1e-12


def test_places_of_the_steps_follow_those_of_the_grid(flow: kp.Flow) -> None:
    mask = np.array([[1, 1, 0, 1], [1, 1, 1, 0]]) > 0
    part = flow.where(mask)
    whole = flow.J.dense().reshape(2, 4, 3, -1) * torch.tensor(mask)[..., None, None]
    assert relative(part.J.dense(), whole.reshape(24, -1)) < 1e-12
    steps = part.nodal
    assert relative((steps.P @ steps.K @ steps.P.T).dense(), steps.ntk.dense()) < 1e-10


def test_kicks_pass_on_through_delays() -> None:
    """P on functions of time against a solution that is driven, of second order but at the ends."""

    class Driven(Decay):
        def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...]) -> Tensor:
            return super().forward(t, z, delayed) + 1e-5 * torch.sin(4 * t)

    errors = []
    for count in (21, 41, 81):
        t = np.linspace(0, 1, count)
        plain, driven = (
            kp.solve(kp.DDEProblem(f, torch.ones(1, 1).double(), t, 0.2512), "heun") for f in (Decay(), Driven())
        )
        found = kp.linearize(plain).P.mv(torch.sin(4 * torch.tensor(t))[None, :, None])
        errors.append(relative(found[:, 1:-1], ((driven.state - plain.state) / 1e-5)[:, 1:-1]))
    assert errors[1] / errors[0] < 0.3 and errors[2] / errors[1] < 0.3 and errors[2] < 2e-4


def test_torch_and_jax_agree() -> None:
    method = "rk4"
    theirs = kp.linearize(kp.solve(problem(f=jax_field(), history=jnp.array(Z0), x=jnp.array(X)), method, steps=0.25))
    ours = kp.linearize(kp.solve(problem(x=torch.tensor(X)), method, steps=0.25))
    assert relative(theirs.solution.state, ours.solution.state) < 1e-12 and not theirs.untraced
    for name in ("J", "ntk", "P", "K"):
        assert relative(getattr(theirs, name).dense(), getattr(ours, name).dense()) < 1e-10
    assert relative(theirs.nodal.P.dense(), ours.nodal.P.dense()) < 1e-10


class FromHistory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.tensor(Z0))

    def forward(self, t: Tensor) -> Tensor:
        return self.z


@pytest.mark.parametrize(
    ("change", "alg", "options", "said"),
    [
        ({"delays": lambda t, z: 1.0}, None, {}, "depend on the state"),
        ({"delays": nn.Parameter(torch.ones(1))}, None, {}, "delays that learn"),
        ({"delays": (0.3, -1.0)}, None, {}, "positive, finite"),
        ({"delays": 0.0}, None, {}, "positive, finite"),
        ({"delays": 1e-7}, None, {}, "is so short"),
        ({"history": FromHistory(), "encoder": nn.Linear(3, 3)}, None, {}, "what learns is a constant one"),
        ({"history": torch.ones(2, 3, dtype=torch.complex128)}, None, {}, "imaginary parts side by side"),
        ({}, "dopri5", {}, "no method for a DDE here"),
        ({}, "rk4", {"rtol": 1e-3}, "adaptive steps"),
        ({"t": (0.0, 1.0)}, "rk4", {}, "on a span"),
        ({"f": nn.Linear(3, 3).double()}, None, {}, "f failed"),
        ({"t": [1.0, 0.5, 0.0]}, None, {}, "forward in time"),
    ],
)
def test_refused_in_words(change: dict, alg: str | None, options: dict, said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        kp.solve(problem(**change), alg, **options)


def test_solutions_that_leave_the_finite_numbers_say_so() -> None:
    class Growing(Decay):
        def forward(self, t: Tensor, z: Tensor, delayed: tuple[Tensor, ...]) -> Tensor:
            return 1e200 * z**3 * self.a

    with pytest.raises(ValueError, match="NaN or inf"):
        kp.solve(kp.DDEProblem(Growing(), torch.ones(1, 1).double(), GRID, 0.1))
