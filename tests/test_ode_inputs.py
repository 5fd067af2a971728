"""Solvers see their inputs: steps end where samples bend and where a callable jumps, and closed forms are met."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import like_numpy, to_numpy
from kpflow_dyn._problems.inputs import take_trials

pytestmark = pytest.mark.usefixtures("x64")

PULSE_TIMES, PULSE = np.array([0, 5, 5.001, 6, 6.001, 10.0]), np.array([0, 0, 1.0, 1.0, 0, 0])
GRID, ONE = np.linspace(0, 10, 201), np.eye(201)[100]
START = np.array([[0.0], [0.5]])
JUMP = 1 / 3


class Leak(nn.Module):
    """z' = k x - z."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, t: Tensor, z: Tensor, x: Tensor) -> Tensor:
        return self.k * x - z


def leak(k, t, z, x):
    return k * x - z


def posed(framework: str, t: Any, x: Any, dtype: str = "float64") -> kp.ODEProblem:
    """Two trials of z' = k x - z, with samples [n] for both."""

    def convert(values: np.ndarray) -> Any:
        samples = np.tile(np.asarray(values)[None, :, None], (2, 1, 1))
        return (
            torch.tensor(samples, dtype=getattr(torch, dtype)) if framework == "torch" else jnp.asarray(samples, dtype)
        )

    x = x if callable(x) else (x[0], convert(x[1])) if isinstance(x, tuple) else convert(x)
    if framework == "torch":
        return kp.ODEProblem(Leak(getattr(torch, dtype)), torch.tensor(START, dtype=getattr(torch, dtype)), t, x)
    return kp.ODEProblem(jax.tree_util.Partial(leak, jnp.ones(1, dtype)), jnp.asarray(START, dtype), t, x)


def switched_on(framework: str, jump: float, dtype: str = "float64") -> Any:
    """x(t) = 1[t > jump], which names its jump."""

    def x(t: Any) -> Any:
        if framework == "torch":
            return (t > jump).to(getattr(torch, dtype))[None]
        return jnp.where(t > jump, 1.0, 0.0).astype(dtype)[None]

    x.jumps = [jump]
    return x


def after_pulse(times: np.ndarray, samples: np.ndarray, t: float) -> float:
    """int exp(s - t) x(s) ds up to t, of x linear between its samples: dz/dk, and z itself from zero."""
    z = 0.0
    for (a, b), (x, y) in zip(pairwise(times), pairwise(samples), strict=True):
        h, slope = min(b, t) - a, (y - x) / (b - a)
        if h > 0:
            z = (z - x + slope) * np.exp(-h) + x + slope * (h - 1)
    return z


def after_jump(t: Any, jump: float) -> np.ndarray:
    return -np.expm1(-np.maximum(np.asarray(t) - jump, 0))


def of_k(flow: kp.Flow) -> np.ndarray:
    """dz/dk [trial, time] by J, whose transpose must agree."""
    shape = flow.J.codomain.shape
    forward = to_numpy(flow.J.dense()).reshape(shape)
    q = np.random.default_rng(0).standard_normal(shape)
    backward = flow.J.T.mv(like_numpy(q, flow.solution.state))
    expected = (np.broadcast_to(to_numpy(flow.J.codomain.measure), shape) * q * forward).sum()
    np.testing.assert_allclose(to_numpy(backward).item(), expected, atol=1e-12 * abs(q).sum())
    return forward[..., 0]


QUICK = ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2", "scipy_solver"]
ADAPTIVE = [("torch", method) for method in QUICK]
ADAPTIVE += [("jax", diffrax.Tsit5()), ("jax", diffrax.Heun()), ("jax", diffrax.Kvaerno3()), ("jax", diffrax.Dopri8())]
ADAPTIVE += [("jax", diffrax.Kvaerno5()), ("jax", diffrax.Bosh3())]  # ReversibleHeun is unstable where z decays
LOW_ORDER = ["bosh3", "adaptive_heun", "fehlberg2", "Heun", "Bosh3", "Kvaerno3"]


def name_of(alg: Any) -> str:
    return alg if isinstance(alg, str) else type(alg).__name__


def marked(cases: list) -> list:
    slow = [pytest.mark.slow]
    return [
        pytest.param(*case, id=name_of(case[1]), marks=[] if name_of(case[1]) in [*QUICK, "Tsit5"] else slow)
        for case in cases
    ]


@pytest.mark.parametrize("way", ["span", "grid"])
@pytest.mark.parametrize(("framework", "alg"), marked(ADAPTIVE))
def test_a_pulse_between_steps_is_seen(framework: str, alg: Any, way: str) -> None:
    if alg == "scipy_solver" and way == "span":
        pytest.skip("it does not tell its steps")
    times, samples, t = (PULSE_TIMES, PULSE, (0.0, 10.0)) if way == "span" else (GRID, ONE, GRID)
    low = name_of(alg) in LOW_ORDER
    rtol = 1e-5 if low else 1e-10
    rtol = {"fehlberg2": 1e-7, "scipy_solver": 1e-8}.get(alg, rtol) if isinstance(alg, str) else rtol
    solution = kp.solve(posed(framework, t, (times, samples)), alg, rtol=rtol, atol=rtol / 100)
    expected = after_pulse(times, samples, 10.0)
    end = to_numpy(solution(10.0))[:, 0] - START[:, 0] * np.exp(-10)
    np.testing.assert_allclose(end, expected, atol=2e-5 if low else 1e-6 if alg == "scipy_solver" else 2e-8)
    if solution.steps is not None:
        at_k = of_k(kp.linearize(solution))  # z from zero is k times dz/dk, also of the steps
        np.testing.assert_allclose(at_k[0], to_numpy(solution.state)[0, :, 0], atol=1e-13)


@pytest.mark.parametrize("span", [True, False], ids=["span", "grid"])
@pytest.mark.parametrize(("framework", "alg"), [("torch", "dopri5"), ("jax", diffrax.Tsit5())], ids=["torch", "jax"])
def test_a_callable_names_its_jumps(framework: str, alg: Any, span: bool) -> None:
    """Against the closed form to 1e-9: the state, J and its transpose; a grid has the jump itself as a node."""
    t = (0.0, 2.0) if span else np.array([0.0, 0.1, JUMP, 1.0, 2.0])
    solution = kp.solve(posed(framework, t, switched_on(framework, JUMP)), alg, rtol=1e-11, atol=1e-12)
    expected = after_jump(solution.t, JUMP)
    state = to_numpy(solution.state)[..., 0] - START * np.exp(-solution.t)
    np.testing.assert_allclose(state, np.tile(expected, (2, 1)), atol=1e-9)
    np.testing.assert_allclose(of_k(kp.linearize(solution)), np.tile(expected, (2, 1)), atol=1e-9)
    assert solution.stats["rejected"] < 10  # it did not have to search for the jump


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_where_jumps_are_in_time_does_not_matter(framework: str) -> None:
    """At zero, where the next number is denormal, at a number that has no digits to spare, and in float32."""
    for jump, dtype, bound in [(0.0, "float64", 1e-9), (1000.1, "float64", 1e-9), (JUMP, "float32", 3e-6)]:
        problem = posed(framework, (jump - 1, jump + 1), switched_on(framework, jump, dtype), dtype)
        tight = {"rtol": 1e-10, "atol": 1e-12} if dtype == "float64" else {}
        solution = kp.solve(problem, **tight)
        found = to_numpy(solution.state)[0, :, 0]
        np.testing.assert_allclose(found, after_jump(solution.t, jump), atol=10 * bound if tight == {} else bound)
        flow = kp.linearize(solution)
        np.testing.assert_allclose(to_numpy(flow.J.dense()).reshape(2, -1)[0], found, atol=bound)


FIXED: list[tuple] = [("torch", "heun2", {}), ("torch", "rk4", {}), ("jax", diffrax.Heun(), {"steps": 0.1})]
FIXED += [("torch", "heun2", {"steps": 0.03}), ("torch", "dopri5", {"steps": 0.1})]


@pytest.mark.parametrize(("framework", "alg", "options"), FIXED, ids=lambda value: str(value))
def test_given_steps_end_at_the_jumps_too(framework: str, alg: Any, options: dict) -> None:
    """Without that, a jump inside of a step or seen from its other side is an error of a tenth of the step."""
    grid = np.linspace(0, 2, 21)
    solution = kp.solve(posed(framework, grid, switched_on(framework, JUMP)), alg, **options)
    assert np.abs((solution.steps.t + solution.steps.dt)[0] - JUMP).min() < 1e-12
    state = to_numpy(solution.state)[0, :, 0]
    bound = {"heun2": 1e-3, "Heun": 1e-3, "rk4": 1e-6, "dopri5": 1e-9}[name_of(alg)]
    np.testing.assert_allclose(state, after_jump(grid, JUMP), atol=bound)
    np.testing.assert_allclose(of_k(kp.linearize(solution))[0], state, atol=1e-14)


def test_one_step_for_each_interval_is_one_for_each_of_the_samples() -> None:
    solution = kp.solve(posed("torch", np.array([0.0, 4.0, 10.0]), (PULSE_TIMES, PULSE)), "rk4")
    ends = (solution.steps.t + solution.steps.dt)[0]
    np.testing.assert_allclose(ends, [0, 4, 5, 5.001, 6, 6.001, 10])
    given = kp.solve(posed("torch", np.array([0.0, 4.0, 10.0]), (PULSE_TIMES, PULSE)), "rk4", steps=2.0)
    assert given.stats["steps"] == 5  # who gives the steps is obeyed


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("kind", ["pulse", "jump"])
def test_equations_solved_adaptively_see_the_inputs(framework: str, kind: str) -> None:
    """The pulse lies between two nodes of the grid, the jump on one of them."""
    if kind == "pulse":
        t = np.array([0.0, 4.0, 10.0])
        problem = posed(framework, t, (PULSE_TIMES, PULSE))
        expected = [after_pulse(PULSE_TIMES, PULSE, time) for time in t]
    else:
        t = np.array([0.0, JUMP, 2.0])
        problem = posed(framework, t, switched_on(framework, JUMP))
        expected = after_jump(t, JUMP)
    solution = kp.solve(problem, rtol=1e-9, atol=1e-11)
    flow = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(1e-8, 1e-10))
    weights = np.broadcast_to(to_numpy(flow.J.codomain.measure), flow.J.codomain.shape).reshape(-1, 1)
    for matrix in (to_numpy(flow.J.dense()), to_numpy(flow.J.T.dense()).T / weights):
        np.testing.assert_allclose(matrix.reshape(2, -1), np.tile(expected, (2, 1)), atol=1e-7)


def test_torchdiffeq_forgets_no_stop_where_a_step_ends_at_one_by_itself() -> None:
    """Before anything happens the steps are the same, so that one of them ends exactly at a stop that is put there."""
    start, late = 0 * START[:1], np.array([8, 8.001, 9, 9.001, 10.0])

    def solved(times: np.ndarray, x: np.ndarray) -> kp.Solution:
        samples = torch.tensor(x[None, :, None])
        return kp.solve(kp.ODEProblem(Leak(torch.float64), torch.tensor(start), (0.0, 10.0), (times, samples)))

    first = solved(np.append(0.0, late), np.array([0, 0, 1, 1, 0, 0.0]))
    end = (first.steps.t + first.steps.dt)[0, 3]
    assert 0 < end < 1
    times, samples = np.array([0, end, end + 0.1, end + 0.2, *late]), np.array([0, 0, 1e-9, 0, 0, 1, 1, 0, 0])
    again = solved(times, samples)
    assert np.isin(times[:-1], again.steps.t[0]).all()
    np.testing.assert_allclose(again.steps.after[0, -1, 0], after_pulse(times, samples, 10.0), rtol=1e-5)


def test_many_samples() -> None:
    """There are steps enough by default; and where samples go on in a straight line nothing stops a step."""
    grid = np.linspace(0, 10, 3001)
    noise = np.random.default_rng(0).standard_normal(3001)
    solution = kp.solve(posed("jax", (0.0, 10.0), (grid, noise)), rtol=1e-8)
    assert solution.stats["steps"] >= 3000
    np.testing.assert_allclose(to_numpy(solution(10.0))[0, 0], after_pulse(grid, noise, 10.0), atol=1e-9)
    for x in (np.ones_like(grid), 0.3 * grid):
        few = kp.solve(posed("torch", (0.0, 10.0), (grid, x)))
        assert few.stats["steps"] < 60
    with pytest.raises(kp.SolveError, match="reached max_steps = 100"):
        kp.solve(posed("torch", (0.0, 10.0), (grid, noise)), max_steps=100)


def test_stops() -> None:
    """All trials and channels count, and only what lies between t0 and the end."""
    grid = np.linspace(0, 1, 11)
    x = torch.zeros(2, 11, 2, dtype=torch.float64)
    x[0, 2:, 0], x[1, 7:, 1] = 1.0, torch.linspace(0.3, 0.6, 4, dtype=torch.float64)
    start = torch.zeros(2, 1, dtype=torch.float64)
    problem = kp.ODEProblem(Leak(torch.float64), start, grid, x)
    np.testing.assert_array_equal(kp.ode.stops_of(problem), grid[[1, 2, 6, 7]])
    later = problem.remake(t=(0.15, 0.7), x=(grid, x))
    np.testing.assert_array_equal(kp.ode.stops_of(later), grid[[2, 6]])
    assert len(kp.ode.stops_of(problem.remake(x=None))) == 0

    def called(t: Tensor) -> Tensor:
        return torch.ones(2, 1, dtype=torch.float64)

    called.jumps = (0.5, 0.2, 0.5, 3.0, 0.0)
    jumping = problem.remake(x=called)
    np.testing.assert_array_equal(kp.ode.stops_of(jumping), [0.2, 0.5])
    np.testing.assert_array_equal(kp.ode.stops_of(take_trials(jumping, np.array([1]))), [0.2, 0.5])
    for jumps, error in [("soon", TypeError), ([0.1, np.nan], ValueError), (0.5, ValueError)]:
        called.jumps = jumps
        with pytest.raises(error, match=r"x.jumps is .*, expected the times at which x jumps \[n\]"):
            problem.remake(x=called)
