"""ODEs are solved as torchdiffeq and diffrax solve them, and the accepted steps that are kept replay them."""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn._jax.diffrax_library import tableau_of
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.measure import gauss_points, trapezoid
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau, hermite
from kpflow_dyn._torch.torchdiffeq_library import method_named

pytestmark = pytest.mark.usefixtures("x64")

SOLVERS = import_module("torchdiffeq._impl.odeint").SOLVERS
ADAPTIVE = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
ADAMS = ["explicit_adams", "implicit_adams", "fixed_adams"]
TABLEAUS = [name for name in SOLVERS if method_named(name).tableau]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


W, U, START = random(8, 4)[:4], random(2, 4), random(12, 4)[8:11]
GRID = np.linspace(0.0, 2.0, 11)
BETWEEN = np.array([0.0, 0.03, 0.7, 1.234, 2.0])


class Field(nn.Module):
    """z' = tanh(z W) - z sin(3 t) + x U."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.W, self.U = nn.Parameter(torch.tensor(W, dtype=dtype)), nn.Parameter(torch.tensor(U, dtype=dtype))

    def forward(self, t: Tensor, z: Tensor, x: Tensor | None = None) -> Tensor:
        rate = torch.tanh(z @ self.W) - z * torch.sin(3 * t)
        return rate if x is None else rate + x @ self.U


def field(parameters, t, z, x=None):
    rate = jnp.tanh(z @ parameters["W"]) - z * jnp.sin(3 * t)
    return rate if x is None else rate + x @ parameters["U"]


def in_torch(t=GRID, x=None, dtype=torch.float64) -> kp.ODEProblem:
    return kp.ODEProblem(Field(dtype), torch.tensor(START, dtype=dtype), t, x)


def in_jax(t=GRID, x=None) -> kp.ODEProblem:
    parameters = {"W": jnp.asarray(W), "U": jnp.asarray(U)}
    return kp.ODEProblem(jax.tree_util.Partial(field, parameters), jnp.asarray(START), t, x)


def exact(times, x=None, breaks=()) -> np.ndarray:
    """By scipy at its tightest, [trial, time, unit]; restarted at the breaks of x."""
    times, state, found = np.asarray(times), START.ravel(), {0.0: START}

    def rate(t, z):
        z = z.reshape(START.shape)
        return (np.tanh(z @ W) - z * np.sin(3 * t) + (0 if x is None else x(t) @ U)).ravel()

    edges = [0.0, *breaks, 2.0]
    for a, b in pairwise(edges):
        here = times[(times > a) & (times <= b)]
        out = solve_ivp(rate, (a, b), state, "DOP853", rtol=1e-13, atol=1e-13, t_eval=np.unique([*here, b]))
        found |= dict(zip(out.t, out.y.T.reshape(-1, *START.shape), strict=True))
        state = out.y[:, -1]
    return np.stack([found[time] for time in times], 1)


def far(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# torch


ERRORS = {
    "euler": 0.1,
    "midpoint": 1e-4,
    "heun2": 2e-4,
    "heun3": 2e-6,
    "rk4": 1e-8,
    "adaptive_heun": 2e-4,
    "fehlberg2": 1e-4,
    "bosh3": 2e-6,
    "dopri5": 1e-11,
    "dopri8": 1e-12,
    "implicit_adams": 1e-7,
    "fixed_adams": 1e-7,
}


@pytest.mark.parametrize("method", ERRORS)
def test_torch_with_given_steps_against_scipy(method: str) -> None:
    solution = kp.solve(in_torch(), method, steps=0.01, rtol=1e-12, atol=1e-12)
    assert solution.success and solution.alg == method and solution.stats["steps"] == 200
    assert far(solution.state, exact(GRID)) < ERRORS[method]


@pytest.mark.parametrize(("method", "error"), [("dopri5", 1e-7), ("dopri8", 1e-3), ("scipy_solver", 1e-7)])
def test_torch_with_chosen_steps_against_scipy(method: str, error: float) -> None:
    """dopri8 takes few steps, and torchdiffeq's dense output between them is a quartic."""
    assert far(kp.solve(in_torch(), method, rtol=1e-9, atol=1e-10).state, exact(GRID)) < error


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", SOLVERS)
def test_torch_is_torchdiffeq(method: str, dtype: torch.dtype) -> None:
    """The state on the grid, and the dense output anywhere."""
    problem, round_off = in_torch(dtype=dtype), 50 * torch.finfo(dtype).eps
    solution = kp.solve(problem, method, rtol=1e-4, atol=1e-5)
    settings = {"method": method, "rtol": 1e-4, "atol": 1e-5, "options": {}}
    with torch.no_grad():
        states = odeint(problem.f, problem.z0, torch.tensor(GRID), **settings).transpose(0, 1)
        if method not in [*ADAPTIVE, "scipy_solver"]:
            grid = torch.tensor(GRID)
            settings["options"] = {"interp": "cubic", "grid_constructor": lambda *_: grid}
        dense = odeint(problem.f, problem.z0, torch.tensor(BETWEEN), **settings).transpose(0, 1)
    torch.testing.assert_close(solution.state, states, rtol=round_off, atol=round_off)
    torch.testing.assert_close(solution(BETWEEN), dense, rtol=4 * round_off, atol=4 * round_off)
    torch.testing.assert_close(solution(1.234), dense[:, 3], rtol=4 * round_off, atol=4 * round_off)
    assert (solution.steps is None) == (method in ["adaptive_heun", "fehlberg2", "scipy_solver", *ADAMS])


@pytest.mark.parametrize("method", TABLEAUS)
def test_torch_steps_follow_one_another(method: str) -> None:
    for t in (GRID, (0.0, 2.0)):
        steps = kp.solve(in_torch(t), method, steps=0.1).steps
        assert steps.t.shape == steps.dt.shape == (3, 21) and steps.stage_times.shape == (3, 21, len(steps.tableau.b))
        np.testing.assert_allclose(steps.t[0], np.append(0.0, np.arange(20) * 0.1), atol=1e-15)
        assert (steps.dt[:, 0] == 0).all() and (steps.t[0, 1:] + steps.dt[0, 1:])[-1] == 2.0
        torch.testing.assert_close(steps.after[:, :-1], steps.before[:, 1:], rtol=0, atol=0)
        torch.testing.assert_close(steps.before[:, 0], torch.tensor(START), rtol=0, atol=0)


def test_one_step_over_the_whole_horizon() -> None:
    for problem in (in_torch((0.0, 0.1)), in_jax((0.0, 0.1))):
        solution = kp.solve(problem, steps=1.0)
        assert solution.stats["steps"] == 1 and solution.state.shape == (3, 3, 4)
        assert far(solution.steps.after[:, 1], exact([0.1])[:, 0]) < 1e-6


def test_torch_adaptive_steps_end_beyond_a_grid_and_at_the_end_of_a_span() -> None:
    grid, span = kp.solve(in_torch()).steps, kp.solve(in_torch((0.0, 2.0))).steps
    assert grid.t[0, -1] < 2.0 < (grid.t + grid.dt)[0, -1]
    assert (span.t + span.dt)[0, -1] == 2.0
    assert far(span.after[:, -1], exact([2.0])[:, 0]) < 1e-4


@pytest.mark.parametrize("method", TABLEAUS)
def test_torch_jumps_of_the_input_at_given_steps(method: str) -> None:
    """Held inputs are solved to the order of an adaptive method when its steps end where they jump."""
    values = torch.tensor(random(5, 3, 2))

    def held(t):
        return values[int(float(t) / 0.5)]

    def before_a_jump(t):
        return values[int(np.ceil(float(t) / 0.5 - 1e-9)) - 1 if t > 0 else 0].numpy()

    steps = np.linspace(0, 2, 81)
    solution = kp.solve(in_torch((0.0, 2.0), held), method, steps=steps)
    expected = exact(steps, before_a_jump, breaks=(0.5, 1.0, 1.5))
    bound = {"dopri5": 1e-7, "dopri8": 1e-7, "bosh3": 1e-4, "adaptive_heun": 5e-3, "fehlberg2": 5e-3}.get(method, 0.2)
    assert far(solution.steps.after, expected) < bound


# JAX


class ThreeEighths(diffrax.AbstractERK):
    """A method of the user's own: torchdiffeq's "rk4"."""

    tableau = diffrax.ButcherTableau(
        c=np.array([1 / 3, 2 / 3, 1.0]),
        b_sol=np.array([1 / 8, 3 / 8, 3 / 8, 1 / 8]),
        b_error=np.zeros(4),
        a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1.0]), np.array([1.0, -1.0, 1.0])),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


EXPLICIT = [diffrax.Tsit5(), diffrax.Dopri5(), diffrax.Dopri8(), diffrax.Bosh3()]
SECOND_ORDER = [diffrax.Heun(), diffrax.Midpoint(), diffrax.Ralston()]
IMPLICIT = [diffrax.Kvaerno5(), diffrax.Kvaerno3(), diffrax.Kvaerno4(), diffrax.ImplicitEuler()]
WITH_MEMORY = [diffrax.ReversibleHeun(), diffrax.HalfSolver(diffrax.Euler()), diffrax.LeapfrogMidpoint()]
ALL = [*EXPLICIT, *SECOND_ORDER, *IMPLICIT, *WITH_MEMORY, diffrax.Euler(), ThreeEighths()]
FIRST_ORDER = ["HalfSolver", "ImplicitEuler", "LeapfrogMidpoint", "Euler"]
QUICK = ["Tsit5", "ImplicitEuler", "Euler"]


def named(solver) -> str:
    return type(solver).__name__


@pytest.mark.parametrize(
    "solver", [pytest.param(s, id=named(s), marks=[] if named(s) in QUICK else pytest.mark.slow) for s in ALL]
)
def test_jax_is_diffrax(solver) -> None:
    """The state on the grid and the dense output are diffrax's own, and near those of scipy."""
    problem = in_jax()
    solution = kp.solve(problem, solver, rtol=1e-5, atol=1e-6)
    adaptive = isinstance(solver, diffrax.AbstractAdaptiveSolver) and named(solver) != "ThreeEighths"
    controller = diffrax.PIDController(1e-5, 1e-6) if adaptive else diffrax.StepTo(GRID)
    wanted = [diffrax.SubSaveAt(ts=GRID), diffrax.SubSaveAt(ts=BETWEEN)]

    @jax.jit
    @jax.vmap
    def states(z):
        term = diffrax.ODETerm(lambda t, z, _: problem.f(t, z))
        saveat = diffrax.SaveAt(subs=wanted)
        return diffrax.diffeqsolve(
            term, solver, 0.0, 2.0, None, z, saveat=saveat, stepsize_controller=controller, max_steps=4096
        ).ys

    on_grid, between = states(problem.z0)
    assert far(solution.state, on_grid) < 1e-12
    assert far(solution(BETWEEN), between) < 1e-12
    assert far(on_grid, exact(GRID)) < (1.0 if named(solver) in FIRST_ORDER else 2e-3)
    assert (solution.steps is None) == (named(solver) in {named(other) for other in WITH_MEMORY})
    if solution.steps is not None:
        assert far(solution.steps.after[:, :-1], solution.steps.before[:, 1:]) == 0
        assert (solution.steps.stages is None) == (solver not in IMPLICIT)


@pytest.mark.parametrize(("solver", "error"), [(diffrax.Tsit5(), 1e-7), (diffrax.Kvaerno5(), 1e-7)], ids=str)
def test_jax_on_a_span_against_scipy(solver, error: float) -> None:
    solution = kp.solve(in_jax((0.0, 2.0)), solver, rtol=1e-9, atol=1e-9)
    assert solution.state.shape == (3, 3 * solution.stats["steps"], 4)
    assert far(solution.state, exact(solution.t)) < error
    assert far(solution(solution.t), solution.state) < 1e-13
    assert (solution.steps.t == solution.steps.t[:1]).all()


@pytest.mark.slow
def test_stiff_problems_by_an_implicit_method() -> None:
    """Prothero and Robinson's z' = -rate (z - cos t) - sin t, whose solution is cos t whatever the rate."""
    f = jax.tree_util.Partial(lambda rate, t, z: -rate * (z - jnp.cos(t)) - jnp.sin(t), jnp.asarray(1e6))
    problem = kp.ODEProblem(f, jnp.ones((2, 1)), GRID)
    solution = kp.solve(problem, diffrax.Kvaerno5())
    steps = solution.steps
    assert far(steps.after[0, :, 0], np.cos(steps.t + steps.dt)[0]) < 1e-5
    assert far(solution.state[0, :, 0], np.cos(GRID)) < 2e-2  # diffrax's cubic has slopes f, of 1e6 times the error
    assert solution.stats["steps"] < 200
    with pytest.raises(kp.SolveError, match=r"max_steps = 4096.*Kvaerno5"):
        kp.solve(problem)
    sums = jnp.einsum("s,bnsu->bnu", jnp.asarray(steps.tableau.b), steps.stages)
    assert far(steps.before + steps.dt[..., None] * sums, steps.after) < 1e-12
    again = kp.solve(problem, diffrax.Kvaerno5(), steps=(steps.t + steps.dt)[0])
    assert far(again.steps.after, steps.after) < 1e-9


@pytest.mark.slow
def test_each_trial_has_steps_of_its_own_on_a_grid_in_jax() -> None:
    f = jax.tree_util.Partial(lambda a, t, z: jnp.stack([z[1], -a * z[2] ** 2 * z[0], 0 * z[2]]), jnp.ones(()))
    start = jnp.asarray([[1.0, 0.0, 1.0], [1.0, 0.0, 20.0], [1.0, 0.0, 5.0]])
    together = kp.solve(kp.ODEProblem(f, start, GRID))
    counts = (together.steps.dt > 0).sum(1)
    assert counts[0] < counts[2] < counts[1] == together.steps.dt.shape[1] - 1
    assert far(together.state[:, :, 0], np.cos(np.outer([1, 20, 5], GRID))) < 1e-3
    for trial in range(3):
        alone = kp.solve(kp.ODEProblem(f, start[trial : trial + 1], GRID))
        assert far(alone.state[0], together.state[trial]) < 1e-12
        padding = counts[trial] + 1
        assert (together.steps.t[trial, padding:] == 2.0).all() and (together.steps.dt[trial, padding:] == 0).all()
        assert far(together.steps.after[trial, padding - 1 :], together.steps.after[trial, -1]) == 0
        np.testing.assert_array_equal((together.steps.t + together.steps.dt)[trial, padding - 1 :], 2.0)


def test_a_second_solve_is_not_compiled_again() -> None:
    traced = []

    def counted(parameters, t, z):
        traced.append(1)
        return field(parameters, t, z)

    def solve(scale):
        f = jax.tree_util.Partial(counted, {"W": scale * jnp.asarray(W)})
        return kp.solve(kp.ODEProblem(f, jnp.asarray(START), GRID))

    solve(1.0)
    before = len(traced)
    solve(1.1)
    assert len(traced) <= before + 1  # the check of what f returns


def test_jax_in_float32() -> None:
    with jax.enable_x64(False):
        f = jax.tree_util.Partial(field, {"W": jnp.asarray(W, jnp.float32)})
        problem = kp.ODEProblem(f, jnp.asarray(START, jnp.float32), GRID)
        solution = kp.solve(problem)
        assert solution.state.dtype == solution.steps.after.dtype == jnp.float32
        assert solution.steps.t.dtype == np.float64 and solution.options["rtol"] == 1e-4
        assert far(solution.state, exact(GRID)) < 1e-2
        assert far(solution(GRID), solution.state) < 1e-5
        index, theta = solution.steps.locate(GRID[[0, -1]])
        assert (index[:, 0] == 0).all() and (theta == 1).all()


# both


@pytest.mark.parametrize(("method", "solver"), [("rk4", ThreeEighths()), ("dopri5", diffrax.Dopri5())])
@pytest.mark.parametrize("t", [GRID, (0.0, 2.0)], ids=["grid", "span"])
def test_torch_and_jax_agree_on_the_same_steps(method, solver, t) -> None:
    x = random(3, 7, 2)
    times = np.linspace(0, 2, 7)
    ours = kp.solve(in_torch(t, (times, torch.tensor(x))), method, steps=0.125)
    theirs = kp.solve(in_jax(t, (times, jnp.asarray(x))), solver, steps=0.125)
    assert far(ours.steps.after, theirs.steps.after) < 1e-12
    np.testing.assert_allclose(ours.steps.dt, theirs.steps.dt, atol=1e-15)
    if method == "dopri5":
        assert far(ours.state, theirs.state) < 1e-12
        np.testing.assert_allclose(ours.weights, theirs.weights, rtol=1e-12)


def tableaus() -> dict[str, Tableau]:
    ours = {name: method_named(name).tableau for name in TABLEAUS}
    return ours | {named(s): tableau for s in ALL if (tableau := tableau_of(s)) is not None}


@pytest.mark.parametrize("name", tableaus())
def test_tableaus(name: str) -> None:
    tableau = tableaus()[name]
    np.testing.assert_allclose(tableau.a.sum(1), tableau.c, atol=1e-12)
    np.testing.assert_allclose(tableau.b.sum(), 1, atol=1e-12)
    assert tableau.explicit == (name not in map(named, IMPLICIT))
    assert (tableau.interpolation(np.ones(3)) == 0).all()
    np.testing.assert_allclose(tableau.interpolation(np.zeros((2, 1))), -tableau.b + np.zeros((2, 1, 1)), atol=1e-15)
    theta = np.linspace(0, 1, 7)
    np.testing.assert_allclose(
        tableau.interpolation(theta).sum(-1), theta - 1, atol=1e-12
    )  # k = 1: y_1 - (1 - theta) h


ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4, "bosh3": 3, "dopri5": 5, "adaptive_heun": 2}


@pytest.mark.parametrize("method", ORDERS)
def test_orders_of_convergence(method: str) -> None:
    counts, end = np.array([8, 16, 32]), exact([2.0])[:, 0]
    errors = [
        far(kp.solve(in_torch((0.0, 2.0)), method, steps=np.linspace(0, 2, n + 1)).steps.after[:, -1], end)
        for n in 4 * counts
    ]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(counts))
    assert abs(slopes[-1] + ORDERS[method]) < 0.6


@pytest.mark.parametrize(
    ("problem", "convert"), [(in_torch, torch.tensor), (in_jax, jnp.asarray)], ids=["torch", "jax"]
)
def test_inputs_in_all_their_forms(problem, convert) -> None:
    samples = random(3, len(GRID), 2)
    on_grid = kp.solve(problem(GRID, convert(samples)))
    paired = kp.solve(problem(GRID, (GRID, convert(samples))))
    assert far(on_grid.state, paired.state) == 0

    def linear(t):
        return np.stack([[np.interp(t, GRID, trial[:, i]) for i in range(2)] for trial in samples])

    breaks = GRID[1:-1]
    assert far(on_grid.state, exact(GRID, linear, breaks)) < 1e-3
    times = 1 + np.sort(random(3, 6))
    values = np.stack(
        [
            [[np.interp(t, GRID, trial[:, i]) for i in range(2)] for t in row]
            for trial, row in zip(samples, times, strict=True)
        ]
    )
    np.testing.assert_allclose(inputs_at(on_grid.problem, times), values, atol=1e-14)
    assert inputs_at(problem(), times) is None


@pytest.mark.parametrize(("problem", "xp"), [(in_torch, torch), (in_jax, jnp)], ids=["torch", "jax"])
def test_inputs_that_are_functions_of_time(problem, xp) -> None:
    def each_trial(t):
        return xp.stack([xp.stack([xp.sin((1 + trial) * t), xp.cos(t)]) for trial in range(3)])

    def same_for_all(t):
        return xp.stack([xp.sin(t), xp.cos(t)])

    for x in (each_trial, same_for_all):
        known = lambda t, x=x: np.asarray(x(xp.asarray(t)))  # noqa: E731
        solution = kp.solve(problem(GRID, x))
        assert far(solution.state, exact(GRID, known)) < 1e-4
        times = np.tile(GRID[:4], (3, 1))
        expected = np.stack([np.broadcast_to(known(t), (3, 2)) for t in GRID[:4]], 1)
        np.testing.assert_allclose(inputs_at(solution.problem, times), expected, atol=1e-14)
        apart = inputs_at(solution.problem, times + np.array([[0.0], [0.1], [0.2]]))
        np.testing.assert_allclose(apart[0], expected[0], atol=1e-14)
        np.testing.assert_allclose(apart[2, 1], np.broadcast_to(known(GRID[1] + 0.2), (3, 2))[2], atol=1e-14)


@pytest.mark.parametrize("problem", [in_torch, in_jax])
def test_nodes_and_weights(problem) -> None:
    grid, span = kp.solve(problem()), kp.solve(problem((0.0, 2.0)))
    np.testing.assert_allclose(grid.weights, trapezoid(GRID))
    assert (grid.t == GRID).all() and grid.start.shape == (3, 4)
    assert span.t.shape == span.weights.shape == span.state.shape[1:2]
    assert (np.diff(span.t) > 0).all() and span.t[0] > 0 and span.t[-1] < 2
    np.testing.assert_allclose(span.weights.sum(), 2.0)
    np.testing.assert_allclose(span.weights @ np.exp(span.t), np.exp(2) - 1, rtol=1e-9)


@pytest.mark.parametrize("problem", [in_torch, in_jax])
def test_a_solution_is_a_function_of_time(problem) -> None:
    solution = kp.solve(problem(), rtol=1e-9, atol=1e-9)
    assert solution(0.5).shape == (3, 4) and solution([0.5, 0.25]).shape == (3, 2, 4)
    assert far(solution(GRID), solution.state) < 1e-13
    assert far(solution(0.0), START) == 0
    times = np.linspace(0, 2, 23)[::-1]
    assert far(solution(times), exact(times[::-1])[:, ::-1]) < 1e-6
    for t in (-0.1, 2.1, [0.5, 3.0], np.nan):
        with pytest.raises(ValueError, match=r"outside of the solved span \[0.0, 2.0\]"):
            solution(t)
    with pytest.raises(ValueError, match=r"a number or times \[n\]"):
        solution(np.zeros((2, 2)))


class Power(nn.Module):
    """z' = a z^2, which is at infinity at t = 1 / (a z(0))."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.a * z**2


def squared(a, t, z):
    return a * z**2


EXPLOSIVE = np.array([[0.1], [0.8], [0.2], [2.0]])


def explosive(framework: str, t) -> kp.ODEProblem:
    if framework == "torch":
        return kp.ODEProblem(Power(), torch.tensor(EXPLOSIVE), t)
    return kp.ODEProblem(jax.tree_util.Partial(squared, jnp.ones(1)), jnp.asarray(EXPLOSIVE), t)


@pytest.mark.parametrize(
    ("framework", "t"),
    [
        pytest.param("torch", [0.0, 1.0, 2.0], id="grid-torch"),
        pytest.param("jax", [0.0, 1.0, 2.0], id="grid-jax"),
        pytest.param("torch", (0.0, 2.0), id="span-torch"),
        pytest.param("jax", (0.0, 2.0), id="span-jax", marks=pytest.mark.slow),
    ],
)
def test_explosions_name_the_trials_and_the_rest_is_kept(framework, t) -> None:
    for options in ({}, {"steps": 0.01}):
        with pytest.raises(kp.SolveError) as caught:
            kp.solve(explosive(framework, t), **options)
        found = r"trial 1 left the finite numbers at t = 1\.2[5-8]\d*, trial 3 left the finite numbers at t = 0\.5"
        assert caught.match(found) and caught.match(r"look at f near there.*\.solution")
        rest = caught.value.solution
        assert caught.value.trials == [1, 3] and rest.success and far(rest.start, EXPLOSIVE[[0, 2]]) == 0
        end = EXPLOSIVE[[0, 2]] / (1 - 2 * EXPLOSIVE[[0, 2]])
        assert far(rest.steps.after[:, -1] if isinstance(t, tuple) else rest.state[:, -1], end) < 1e-4
        assert rest.problem.z0.shape == (2, 1)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_when_all_trials_fail_there_is_no_solution(framework) -> None:
    problem = explosive(framework, (0.0, 2.0))
    with pytest.raises(kp.SolveError) as caught:
        kp.solve(problem.remake(z0=problem.z0[np.array([1, 3])]))
    assert caught.value.trials == [0, 1] and caught.value.solution is None
    assert "other trials" not in str(caught.value)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_too_many_steps(framework) -> None:
    problem = {"torch": in_torch, "jax": in_jax}[framework](GRID)
    with pytest.raises(kp.SolveError, match=r"trial 0 reached max_steps = 5 at t = .*raise max_steps") as caught:
        kp.solve(problem, max_steps=5)
    assert caught.value.trials == [0, 1, 2]


@pytest.mark.slow
def test_failures_with_inputs_keep_the_inputs_of_the_rest() -> None:
    class Driven(Power):
        def forward(self, t: Tensor, z: Tensor, x: Tensor) -> Tensor:
            return self.a * z**2 * x

    samples = torch.ones(4, 3, 1, dtype=torch.float64)
    for x in (samples, ([0.0, 1.0, 2.0], samples), lambda t: samples[:, 0], lambda t: samples[0, 0]):
        problem = kp.ODEProblem(Driven(), torch.tensor(EXPLOSIVE), [0.0, 1.0, 2.0], x)
        with pytest.raises(kp.SolveError) as caught:
            kp.solve(problem)
        assert caught.value.trials == [1, 3]
        assert inputs_at(caught.value.solution.problem, np.zeros((2, 1))).shape == (2, 1, 1)


# the pieces


def test_locate() -> None:
    b = np.array([1.0, 0.0])
    tableau = Tableau(np.array([[0.0, 0.0], [1.0, 0.0]]), b, np.array([0.0, 1.0]), hermite(b))
    t = np.array([[0.0, 0.0, 0.3, 1.0], [0.0, 0.0, 1.0, 1.0]])
    dt = np.array([[0.0, 0.3, 0.7, 0.0], [0.0, 1.0, 0.0, 0.0]])
    steps = AcceptedSteps(tableau, t, dt, torch.zeros(2, 4, 1).double(), torch.zeros(2, 4, 1).double())
    index, theta = steps.locate(np.array([0.0, 0.15, 0.3, 0.3 + 1e-16, 0.65, 1.0]))
    assert index.tolist() == [[0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1]]
    np.testing.assert_allclose(theta, [[1, 0.5, 1, 1, 0.5, 1], [1, 0.15, 0.3, 0.3, 0.65, 1]])
    with pytest.raises(ValueError, match=r"t = 1.5 lies outside of the solved span \[0.0, 1.0\]"):
        steps.locate(np.array([1.5]))
    np.testing.assert_allclose(steps.stage_times[0], [[0, 0], [0, 0.3], [0.3, 1], [1, 1]])


def test_quadrature() -> None:
    edges = np.sort(random(6))
    nodes, weights = gauss_points(edges)
    np.testing.assert_allclose(weights @ nodes**5, (edges[-1] ** 6 - edges[0] ** 6) / 6, rtol=1e-12)
    assert nodes.shape == weights.shape == (15,)
    np.testing.assert_allclose(trapezoid(edges) @ (2 * edges + 1), (edges[-1] ** 2 - edges[0] ** 2) + np.ptp(edges))


def test_problems_are_remade() -> None:
    problem = in_torch()
    assert problem.remake(t=(0, 1)).is_span and not problem.is_span
    assert problem.remake(t=[0, 1, 2]).f is problem.f
    with pytest.raises(TypeError, match=r"remake got \['y'\], expected some of f, z0, t, x"):
        problem.remake(y=1)
