"""Linearised ODEs in JAX against forward mode through diffrax itself, on the same frozen steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
import pytest
from conftest import cases
from synthetic import check_apart

import kpflow_dyn as kp
from kpflow_dyn import models
from kpflow_dyn._jax.checks import with_parameters
from kpflow_dyn._jax.step import _rectangles
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn.models.jax import MLPField

pytestmark = pytest.mark.usefixtures("x64")

GRID = np.array([0.0, 0.2, 0.5, 0.6, 1.0])
SHORT = np.linspace(0, 0.1, 4)
LOOSE = {"rtol": 1e-3, "atol": 1e-4}


class Driven(eqx.Module):
    """A field with inputs that depends on the time, too."""

    inner: eqx.nn.Linear
    outer: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        keys = jax.random.split(key)
        self.inner, self.outer = eqx.nn.Linear(5, 4, key=keys[0]), eqx.nn.Linear(4, 3, key=keys[1])

    def __call__(self, t: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
        return 3 * self.outer(jnp.tanh(self.inner(jnp.concatenate([z, x])))) * jnp.cos(2 * t) - z


class Drift(eqx.Module):
    """z' = b."""

    b: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return self.b


def cart_pole(key: jax.Array) -> Callable:
    return models.ClosedLoop(models.CartPole(), eqx.nn.MLP(4, 1, 4, 1, activation=jnp.tanh, key=key))


@dataclass(frozen=True)
class Field:
    """A registered field, its solver and options."""

    make: Callable[[jax.Array], Callable]
    units: int
    alg: diffrax.AbstractSolver
    inputs: bool = False
    t: object = field(default_factory=lambda: GRID)
    options: dict = field(default_factory=lambda: LOOSE)
    scale: float = 1.0

    def problem(self) -> kp.ODEProblem:
        keys = jax.random.split(jax.random.key(5), 3)
        model = self.make(keys[0])
        start = self.scale * jax.random.normal(keys[1], (2, self.units))
        if isinstance(model, models.jax.HodgkinHuxleyField):
            start = model.resting_state() + 0.01 * start
        samples = jax.random.normal(keys[2], (2, len(GRID), 2))
        return kp.ODEProblem(model, start, self.t, (GRID, samples) if self.inputs else None)


TIGHT = optimistix.Newton(rtol=1e-13, atol=1e-13)
FIELDS = {
    "tsit5_grid": Field(Driven, 3, diffrax.Tsit5(), True),
    "tsit5_span": Field(Driven, 3, diffrax.Tsit5(), True, (0.0, 1.0)),
    "heun_given_steps": Field(Driven, 3, diffrax.Heun(), True, options={"steps": GRID}),
    "euler": Field(lambda key: Drift(jax.random.normal(key, (2,))), 2, diffrax.Euler(), options={}),
    "dopri8": Field(cart_pole, 4, diffrax.Dopri8(), scale=0.3),
    "bosh3_span": Field(Driven, 3, diffrax.Bosh3(), True, (0.0, 1.0)),
    "implicit_euler": Field(Driven, 3, diffrax.ImplicitEuler(root_finder=TIGHT), True, options={"steps": GRID}),
    "kvaerno5": Field(Driven, 3, diffrax.Kvaerno5(root_finder=TIGHT), True),
    "kvaerno3_span": Field(cart_pole, 4, diffrax.Kvaerno3(root_finder=TIGHT), t=(0.0, 0.5), scale=0.3),
    "stiff_neurons": Field(
        lambda key: models.jax.HodgkinHuxleyField(2, key=key),
        *(10, diffrax.ImplicitEuler(root_finder=TIGHT), False, SHORT, {"steps": SHORT}),
    ),
}


def reference(flow: kp.Flow) -> Callable[[dict[str, jax.Array]], jax.Array]:
    """Parameters -> states, by diffrax stepping to the very times of the accepted steps."""
    solution, problem = flow.solution, flow.solution.problem
    nodes = np.asarray(solution.t)

    def of_trial(parameters: dict[str, jax.Array], trial: int) -> jax.Array:
        f = with_parameters(problem.f, parameters)

        def rate(t: jax.Array, z: jax.Array, _: object) -> jax.Array:
            if problem.x is None:
                return f(t, z)
            known, samples = problem.x
            return f(t, z, jax.vmap(lambda x: jnp.interp(t, known, x), 1)(samples[trial]))

        taken = solution.steps.dt[trial] > 0
        ends = np.append(solution.steps.t[trial, 0], (solution.steps.t + solution.steps.dt)[trial][taken])
        return diffrax.diffeqsolve(
            diffrax.ODETerm(rate), solution.alg, ends[0], ends[-1], None, problem.z0[trial],
            saveat=diffrax.SaveAt(ts=jnp.asarray(np.clip(nodes, ends[0], ends[-1]))),
            stepsize_controller=diffrax.StepTo(jnp.asarray(ends)), max_steps=len(ends), adjoint=diffrax.ForwardMode(),
        ).ys  # fmt: skip

    return jax.jit(lambda p: jnp.stack([of_trial(p, trial) for trial in range(len(problem.z0))]))


QUICK = {"euler"}


@pytest.fixture(scope="module", params=cases(FIELDS, QUICK))
def flow(request: pytest.FixtureRequest, x64: None) -> kp.Flow:
    case = FIELDS[request.param]
    return kp.linearize(kp.solve(case.problem(), case.alg, **case.options))


@pytest.fixture(scope="module")
def jacobian(flow: kp.Flow) -> jax.Array:
    found = jax.jit(jax.jacfwd(reference(flow)))(flow.parameters)
    return jnp.concatenate([found[name].reshape(flow.ntk.domain.size, -1) for name in flow.parameters], 1)


def relative(a: jax.Array, b: jax.Array) -> float:
    assert a.shape == b.shape
    return float(abs(a - b).max() / abs(b).max())


def test_jacobian_and_ntk_are_those_of_the_solver(flow: kp.Flow, jacobian: jax.Array) -> None:
    assert relative(reference(flow)(flow.parameters), flow.solution.state) < 1e-9
    assert relative(flow.J.dense(), jacobian) < 1e-9
    weights = np.repeat(np.tile(flow.solution.weights, 2), flow.ntk.domain.shape[2])
    assert relative(flow.ntk.dense(), jacobian @ jacobian.T * weights) < 1e-9


def test_nodal_identity(flow: kp.Flow) -> None:
    nodal = flow.nodal
    assert relative((nodal.P @ nodal.K @ nodal.P.T).dense(), nodal.ntk.dense()) < 1e-10


def test_adjointness(flow: kp.Flow) -> None:
    for name in ("P", "K", "core", "B", "J", "ntk"):
        assert kp.check_adjoint(getattr(flow, name), seed=3) < 1e-12


def test_gradient_step_moves_the_state_by_the_ntk(flow: kp.Flow) -> None:
    state, states = flow.solution.state, reference(flow)
    error = jax.random.normal(jax.random.key(1), state.shape)
    predicted = -flow.ntk.mv(error)
    gradient = flow.as_parameters(flow.J.T.mv(error))
    off = []
    for eta in (1e-3, 1e-4):
        moved = states({name: value - eta * gradient[name] for name, value in flow.parameters.items()})
        off.append(float(jnp.linalg.norm((moved - state) / eta - predicted) / jnp.linalg.norm(predicted)))
    assert off[1] < 0.2 * off[0] or off[1] < 1e-5


@pytest.mark.slow
def test_trials_step_by_themselves_on_a_grid(x64: None) -> None:
    """Each trial has the steps that it would have alone; shorter ones are filled up with steps of length zero."""
    problem, alg = FIELDS["tsit5_grid"].problem(), diffrax.Bosh3()
    both = kp.linearize(kp.solve(problem, alg, **LOOSE))
    samples = problem.x[1]
    single = problem.remake(z0=problem.z0[:1], x=(GRID, samples[:1]))
    alone = kp.linearize(kp.solve(single, alg, **LOOSE))
    assert not np.array_equal(*both.solution.steps.dt)
    assert relative(both.J.dense().reshape(2, -1, both.J.domain.size)[0], alone.J.dense()) < 1e-11


@pytest.mark.slow
def test_inputs_are_those_of_the_field(x64: None) -> None:
    problem = FIELDS["tsit5_grid"].problem()
    flow = kp.linearize(kp.solve(problem, diffrax.Tsit5(), **LOOSE))
    x = inputs_at(problem, np.tile(GRID, (2, 1)))
    expected = jnp.concatenate([flow.solution.state, x, jnp.ones((2, len(GRID), 1))], -1)
    assert relative(flow.sites[0].inputs, expected) < 1e-12


def test_each_trial_by_itself_has_the_blocks_of_the_ntk_within_trials(flow: kp.Flow) -> None:
    check_apart(flow.ntk)


def test_kicks_of_stages_that_share_weights_are_never_turned() -> None:
    """The products of a span write and read them as they lie; what is transposed are rows of one time."""
    times, trials, probes, units, hidden = 12, 4, 3, 5, 7
    t, z0 = np.linspace(0, 1, times), jax.random.normal(jax.random.key(1), (trials, units))
    field = MLPField(units, hidden, key=jax.random.key(0))
    flow = kp.linearize(kp.solve(kp.ODEProblem(field, z0, t), diffrax.Heun(), steps=t)).nodal
    program = jax.jit(flow.ntk.mv).lower(jnp.ones((probes, *flow.ntk.domain.shape))).as_text()
    turned = re.findall(r"stablehlo.transpose.*-> tensor<([\dx]*)x", program)
    assert max(prod(map(int, shape.split("x"))) for shape in turned) == trials * probes * hidden


@pytest.mark.parametrize(
    ("ends", "parts"), [((0, 8), [(0, 2, 0, 4)]), ((2, 9), [(0, 1, 2, 2), (1, 1, 0, 4), (2, 1, 0, 1)])]
)
def test_kicks_side_by_side_are_whole_rows_or_parts_of_rows(ends: tuple[int, int], parts: list[tuple]) -> None:
    assert list(_rectangles(*ends, 4)) == parts


def test_what_changes_after_linearize_changes_no_operator() -> None:
    """Such as a numpy array that the field reads: P belongs to K and to the NTK."""
    scale = np.array([1.0])

    class Scaled(eqx.Module):
        W: jax.Array

        def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
            return jnp.tanh(self.W @ z) * scale[0] - z

    model = Scaled(jax.random.normal(jax.random.key(0), (4, 4)))
    problem = kp.ODEProblem(model, jax.random.normal(jax.random.key(1), (2, 4)), np.linspace(0, 1, 5))
    solution = kp.solve(problem)
    q = jax.random.normal(jax.random.key(2), (2, 5, 4))
    before = kp.linearize(solution).P.mv(q)
    flow = kp.linearize(solution)
    scale[0] = 0.3
    np.testing.assert_allclose(flow.P.mv(q), before, rtol=1e-6, atol=1e-9)
