"""JAX compiles a program once for all models that compute the same, whatever their numbers."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cases
from jax_registry import dense_jacobian

import kpflow_dyn as kp
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.programs import PROGRAMS, form_of
from kpflow_dyn.models import ClosedLoop, Pendulum

pytestmark = pytest.mark.usefixtures("x64")

UNITS = 4
X = np.random.default_rng(0).standard_normal((2, 5, 3))


class Compilations:
    """How often XLA compiled, since it was last asked."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event: str, _seconds: float, **_rest: Any) -> None:
        self.count += event.endswith("backend_compile_duration")

    def since(self) -> int:
        found, self.count = self.count, 0
        return found


@pytest.fixture(scope="module")
def compilations() -> Iterator[Compilations]:
    found = Compilations()
    yield found
    jax.monitoring.unregister_event_duration_listener(found)


class Cell(eqx.Module):
    """A cell with an activation of its own, and perhaps with numbers that it closes over."""

    linear: eqx.nn.Linear
    activation: Callable[[jax.Array], jax.Array] = eqx.field(static=True)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return self.activation(self.linear(jnp.concatenate([x, z])))


def cell(activation: Callable[[jax.Array], jax.Array], seed: int = 0) -> kp.DiscreteProblem:
    linear = eqx.nn.Linear(3 + UNITS, UNITS, key=jax.random.key(seed))
    return kp.DiscreteProblem(Cell(linear, activation), jnp.asarray(X), jnp.zeros((2, UNITS)))


def ode(seed: int) -> kp.ODEProblem:
    policy = eqx.nn.MLP(2, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(seed))
    start = jax.random.normal(jax.random.key(1), (2, 2))
    return kp.ODEProblem(ClosedLoop(Pendulum(), policy), jnp.asarray(start), np.linspace(0, 1, 6))


PROBLEMS: dict[str, Callable[[int], Any]] = {
    "gru": lambda seed: kp.DiscreteProblem(eqx.nn.GRUCell(3, UNITS, key=jax.random.key(seed)), jnp.asarray(X)),
    "lstm": lambda seed: kp.DiscreteProblem(eqx.nn.LSTMCell(3, UNITS, key=jax.random.key(seed)), jnp.asarray(X)),
    "relu": lambda seed: cell(jax.nn.relu, seed),
    "tsit5": ode,
    "kvaerno5": ode,
    "network": lambda seed: kp.StaticProblem(eqx.nn.MLP(3, 2, 4, 2, key=jax.random.key(seed)), jnp.asarray(X[:, 0])),
}
ALGORITHMS = {"tsit5": diffrax.Tsit5, "kvaerno5": diffrax.Kvaerno5}


def applied(solution: Any) -> tuple[kp.Flow, jax.Array]:
    flow = kp.linearize(solution)
    return flow, flow.ntk.mv(jnp.ones((1, *flow.ntk.domain.shape)))


@pytest.mark.parametrize("name", cases(PROBLEMS, {*PROBLEMS} - {"kvaerno5"}))
def test_other_weights_compile_nothing(name: str, compilations: Compilations) -> None:
    algorithm = [alg() for alg in [ALGORITHMS.get(name)] if alg]
    first, other = (kp.solve(PROBLEMS[name](seed), *algorithm) for seed in (0, 1))
    applied(first)
    compilations.since()
    found = applied(other)[1]
    assert compilations.since() == 0
    PROGRAMS.forget()
    assert jnp.abs(found - applied(other)[1]).max() < 1e-12 * jnp.abs(found).max()


@pytest.mark.parametrize(
    ("name", "most"), [("gru", 8), ("tsit5", 22), pytest.param("kvaerno5", 27, marks=pytest.mark.slow)]
)
def test_the_first_linearize_compiles_few_programs(name: str, most: int, compilations: Compilations) -> None:
    """Those of the derivative, the trace and their comparison, and of the solver; its glue compiles nothing."""
    solution = kp.solve(PROBLEMS[name](0), *(alg() for alg in [ALGORITHMS.get(name)] if alg))
    PROGRAMS.forget()
    jax.clear_caches()
    compilations.since()
    kp.linearize(solution)
    assert compilations.since() <= most


def test_the_propagator_of_an_ode_is_made_when_it_is_applied() -> None:
    flow = flow_of("tsit5", 0, diffrax.Tsit5())
    q = jnp.asarray(np.random.default_rng(1).standard_normal((1, *flow.P.domain.shape)))
    found = jax.jit(flow.P.mv)(q)
    assert jnp.abs(found - flow.P.mv(q)).max() < 1e-12
    assert abs(flow.P.domain.inner(q, found) - flow.P.domain.inner(flow.P.T.mv(q), q)).max() < 1e-12


class ComplexCell(eqx.Module):
    """c / (1 + |c|) of c = W c + U x, real parts first."""

    W: jax.Array
    U: jax.Array

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        c = self.W @ (z[:2] + 1j * z[2:]) + self.U @ x
        c = c / (1 + jnp.abs(c))
        return jnp.concatenate([c.real, c.imag])


def complex_cell(seed: int) -> kp.DiscreteProblem:
    rng = np.random.default_rng(seed)
    W, U = (jnp.asarray(rng.standard_normal((2, n)) + 1j * rng.standard_normal((2, n))) for n in (2, 3))
    return kp.DiscreteProblem(ComplexCell(W, U), jnp.asarray(X), jnp.zeros((2, 4)))


@jax.custom_vjp
def called_back(z: jax.Array) -> jax.Array:
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(z.shape, z.dtype), z, vmap_method="expand_dims")


called_back.defvjp(lambda z: (called_back(z), z), lambda z, q: (q * jnp.cos(z),))

Y = np.random.default_rng(3).standard_normal((2, 5, 2))


def flow_of(name: str, seed: int, *algorithm: Any, **options: Any) -> kp.Flow:
    return kp.linearize(kp.solve(PROBLEMS[name](seed), *algorithm), **options)


def output(seed: int) -> kp.Flow:
    return flow_of("gru", seed).output(eqx.nn.Linear(UNITS, 2, key=jax.random.key(seed)))


def propagated(seed: int) -> Any:
    flow = flow_of("tsit5", seed, diffrax.Tsit5())
    return flow.P.T.mv(flow.P.mv(jnp.ones(flow.P.domain.shape)))


def tracked(seed: int) -> Any:
    cells = [PROBLEMS["gru"](seed + n).cell for n in (10, 20)]
    named = [{name: getattr(cell, name) for name in ("weight_ih", "weight_hh", "bias", "bias_n")} for cell in cells]
    return kp.track(lambda: cells[0], dict(enumerate(named)), jnp.asarray(X), progress=False, samples=10)


def swept(seed: int) -> Any:
    def run(seed: int) -> dict[str, float]:
        return {"sum": float(applied(kp.solve(PROBLEMS["gru"](seed)))[1].sum())}

    with tempfile.TemporaryDirectory() as folder:
        return kp.Sweep(run, over={"seed": [seed]}, out=folder).run()


def loss(states: jax.Array) -> jax.Array:
    return (states**2).mean()


ANALYSES: dict[str, Callable[[int], Any]] = {
    "interpolating adjoint": lambda seed: flow_of("tsit5", seed, diffrax.Tsit5(), sensealg=kp.InterpolatingAdjoint()),
    "through the solver": lambda seed: applied(kp.solve(ode(seed), diffrax.ReversibleHeun(), rtol=1e-3)),
    "propagator": propagated,
    "complex numbers": lambda seed: applied(kp.solve(complex_cell(seed))),
    "callback": lambda seed: applied(kp.solve(cell(called_back, seed))),
    "eigs": lambda seed: kp.eigs(flow_of("gru", seed).ntk, 3),
    "summary": lambda seed: kp.summary(flow_of("gru", seed), k=3),
    "analyze": lambda seed: kp.analyze(flow_of("gru", seed), k=3),
    "forecast": lambda seed: kp.forecast(output(seed), jnp.asarray(Y), lr=1e-2, steps=3),
    "learnability": lambda seed: kp.learnability(output(seed), {"y": jnp.asarray(Y)}),
    "gradient flow": lambda seed: kp.gradient_flow(PROBLEMS["gru"](seed), loss, 0.5),
    "gradient flow of an ODE": lambda seed: kp.gradient_flow(kp.solve(ode(seed), diffrax.Tsit5()), loss, 0.5),
    "compare": lambda seed: kp.compare(flow_of("gru", seed), flow_of("gru", seed + 5)),
    "track": tracked,
    "sweep": swept,
    "fixed points": lambda seed: kp.dynamics.fixed_points(PROBLEMS["gru"](seed), starts=16),
    "fixed points of a field": lambda seed: kp.dynamics.fixed_points(ode(seed), starts=16),
    "lyapunov": lambda seed: kp.dynamics.lyapunov_spectrum(kp.solve(PROBLEMS["gru"](seed)), 2),
}


@pytest.mark.parametrize("name", ANALYSES)
def test_analyses_of_other_weights_compile_nothing(name: str, compilations: Compilations) -> None:
    ANALYSES[name](0)
    compilations.since()
    ANALYSES[name](1)
    assert compilations.since() == 0


def test_captured_numbers_are_arguments(compilations: Compilations) -> None:
    """Programs of functions that close over other arrays are the same, and their results those of these arrays."""
    slopes = [np.linspace(0.5, 1.5, UNITS) + shift for shift in (0.0, 1.0)]
    solved = [kp.solve(cell(lambda z, slope=slope: jnp.tanh(slope * z))) for slope in slopes]
    applied(solved[0])
    compilations.since()
    flow, found = applied(solved[1])
    assert compilations.since() == 0
    J = dense_jacobian(flow)
    assert jnp.abs(found.ravel() - (J @ J.T).sum(1)).max() < 1e-12


@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 0, 3, 2]])
def test_captured_indices_say_which_elements_are_copied(order: list[int]) -> None:
    flow, _ = applied(kp.solve(cell(lambda z: jnp.tanh(z[np.array(order)]))))
    assert not flow.untraced
    J = dense_jacobian(flow)
    assert jnp.abs(flow.J.dense() - J).max() < 1e-12


def surrogate(slope: float) -> Callable[[jax.Array], jax.Array]:
    """The same function each time, with a derivative of another slope."""

    @jax.custom_jvp
    def spike(z: jax.Array) -> jax.Array:
        return jnp.tanh(z)

    spike.defjvp(lambda primals, tangents: (spike(primals[0]), slope * tangents[0]))
    return spike


def test_other_functions_of_equal_shapes_are_others() -> None:
    functions = [jnp.tanh, jax.nn.sigmoid, jax.nn.relu, jax.nn.silu, surrogate(0.5), surrogate(2.0)]
    forms = [form_of(jax.make_jaxpr(function)(jnp.ones(3))) for function in functions]
    again = [form_of(jax.make_jaxpr(function)(jnp.ones(3))) for function in functions]
    assert None not in forms
    assert forms == again
    assert len(set(forms)) == len(forms)
    for function in functions:
        flow, _ = applied(kp.solve(cell(function)))
        assert jnp.abs(flow.J.dense() - dense_jacobian(flow)).max() < 1e-12


def product(rule: Callable[..., jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """a * b with the derivative rule(a, b, da, db)."""

    @jax.custom_jvp
    def times(a: jax.Array, b: jax.Array) -> jax.Array:
        return a * b

    times.defjvp(lambda primals, tangents: (times(*primals), rule(*primals, *tangents)))
    return times


def circle(back: Callable[..., jax.Array]) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """(sin, cos) with the backward pass back(results, cotangents)."""

    @jax.custom_vjp
    def both(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sin(z), jnp.cos(z)

    both.defvjp(lambda z: (both(z),) * 2, lambda results, q: (back(results, q),))
    return both


@pytest.mark.parametrize(
    ("made", "rules"),
    [
        (product, [lambda a, _b, _da, db: a * db, lambda _a, b, da, _db: da * b]),
        (circle, [lambda o, q: q[0] * o[1], lambda o, q: o[0] * q[1]]),
    ],
)
def test_derivatives_that_meet_where_a_direction_is_the_point(made: Callable, rules: list[Callable]) -> None:
    for rule in rules:
        function = made(rule)
        flow, _ = applied(kp.solve(cell(lambda z, f=function: f(z, jnp.sin(z)) if made is product else f(z)[0])))
        assert jnp.abs(flow.J.dense() - dense_jacobian(flow)).max() < 1e-12


class Chain(eqx.Module):
    """p[names[0]] sin(p[names[1]] z) + p["a"] x."""

    p: dict[str, jax.Array]
    names: tuple[str, str] = eqx.field(static=True)

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        first, second = self.names
        return jnp.tanh(self.p[first] @ jnp.sin(self.p[second] @ z) + self.p["a"] @ x)


def test_parameters_are_known_by_name() -> None:
    rng = np.random.default_rng(2)
    weights = [jnp.asarray(rng.standard_normal((3, 3))) for _ in range(4)]

    def fed_back(*names: str) -> jax.Array:
        chain = Chain(dict(zip(("a", *names), weights, strict=False)), names)
        problem = kp.DiscreteProblem(chain, jnp.asarray(X), jnp.zeros((2, 3)))
        flow = kp.linearize(kp.solve(problem), params=["p['a']"])
        return kp.learning_rules.feedback_alignment(flow, matrices={"p['o']": weights[3]}).dense()

    fed_back("n", "o")
    found = fed_back("o", "p")
    PROGRAMS.forget()
    assert jnp.abs(found - fed_back("o", "p")).max() < 1e-12


def test_a_random_key_is_a_constant() -> None:
    for seed in (0, 1):
        key = jax.random.key(seed)
        flow, _ = applied(kp.solve(cell(lambda z, key=key: jnp.tanh(z[jax.random.permutation(key, UNITS)]))))
        assert not flow.untraced
        assert jnp.abs(flow.J.dense() - dense_jacobian(flow)).max() < 1e-12


class Ending(eqx.Module):
    """z' = rate z / sqrt(1 - t), which has no value at t = 1."""

    rate: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return self.rate * z / jnp.sqrt(1 - t)


def test_no_field_is_asked_beyond_what_its_solver_asked() -> None:
    problem = kp.ODEProblem(Ending(jnp.ones(1)), jnp.ones((1, 1)), (0.0, 1.0))
    flow = kp.linearize(kp.solve(problem, diffrax.Midpoint(), rtol=1e-2, atol=1e-3))
    assert flow.solution.steps.padded(lambda count: count + 2, problem.z0).dt.shape[1] > flow.solution.stats["steps"]
    assert bool(jnp.isfinite(flow.J.dense()).all())


def test_what_cannot_be_told_apart_has_no_form() -> None:
    def called(z: jax.Array) -> jax.Array:
        return jax.pure_callback(lambda a: np.sin(a) + z.size, jax.ShapeDtypeStruct(z.shape, z.dtype), z)

    assert form_of(jax.make_jaxpr(called)(jnp.ones(3))) is None


def test_a_model_without_a_form_is_compiled_once_for_each_flow(compilations: Compilations) -> None:
    """One that calls a function back which closes over something, and that autograd alone answers."""

    @jax.custom_vjp
    def sine(z: jax.Array) -> jax.Array:
        return jax.pure_callback(
            lambda a: np.sin(a, dtype=z.dtype), jax.ShapeDtypeStruct(z.shape, z.dtype), z, vmap_method="expand_dims"
        )

    sine.defvjp(lambda z: (sine(z), z), lambda z, q: (q * jnp.cos(z),))
    no_traces = mock.patch.object(Model, "tangents", side_effect=ValueError("traces are switched off"))
    with no_traces, pytest.warns(kp.UntracedWarning):
        flow, found = applied(kp.solve(cell(sine)))
    q = jnp.ones((1, *flow.ntk.domain.shape))
    compilations.since()
    again = flow.ntk.mv(q)
    assert compilations.since() == 0
    np.testing.assert_allclose(again, found, rtol=1e-12)


def test_numbers_close_to_each_other_are_told_apart() -> None:
    forms = [form_of(jax.make_jaxpr(lambda z, a=a: z + a)(jnp.ones(3))) for a in (0.0, -0.0, 1.0)]
    assert len(set(forms)) == 3


def test_weights_and_states_are_let_go() -> None:
    problem = PROBLEMS["gru"](5)
    flow, _ = applied(kp.solve(problem))
    alive = [weakref.ref(value) for value in (problem.cell.weight_hh, problem.x, flow.solution.state)]
    del problem, flow
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_the_last_forms_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PROGRAMS, "most", 3)
    for activation in (jnp.tanh, jnp.sin, jnp.cos):
        applied(kp.solve(cell(activation)))
    assert len(PROGRAMS._kept) == 3


def test_threads_share_programs() -> None:
    solved = [kp.solve(PROBLEMS["gru"](seed)) for seed in range(4)]
    alone = [np.asarray(applied(solution)[1]) for solution in solved]
    PROGRAMS.forget()
    with ThreadPoolExecutor(4) as threads:
        together = [np.asarray(found) for _, found in threads.map(applied, solved)]
    np.testing.assert_allclose(together, alone, atol=1e-13)


def test_steps_that_fill_up_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    solution = kp.solve(ode(3), diffrax.Tsit5())
    found = kp.linearize(solution)
    monkeypatch.setattr("kpflow_dyn._jax.solving.rounded", lambda count: count)
    exact = kp.linearize(solution)
    assert jnp.abs(found.J.dense() - exact.J.dense()).max() < 1e-13
    assert jnp.abs(found.ntk.dense() - exact.ntk.dense()).max() < 1e-13
    assert found.nodal.ntk.domain.shape == exact.nodal.ntk.domain.shape
    assert jnp.abs(found.nodal.ntk.dense() - exact.nodal.ntk.dense()).max() < 1e-13


def test_transformations_around_operators_work() -> None:
    flow, found = applied(kp.solve(PROBLEMS["gru"](0)))
    q = jnp.ones((1, *flow.ntk.domain.shape))
    assert jnp.abs(jax.jit(flow.ntk.mv)(q) - found).max() < 1e-12
    assert jnp.abs(jax.vmap(flow.ntk.mv)(jnp.stack([q, 2 * q])) - jnp.stack([found, 2 * found])).max() < 1e-12
    assert jnp.abs(jax.grad(lambda q: (q * flow.ntk.mv(q)).sum() / 2)(q) - found).max() < 1e-12


@pytest.mark.parametrize("transformed", [eqx.filter_jit, eqx.filter_grad])
def test_transformations_around_linearize_are_refused(transformed: Callable[..., Any]) -> None:
    x = jnp.asarray(X)

    def found(cell: Any) -> jax.Array:
        return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).solution.state.sum()

    with pytest.raises(TypeError, match="call it outside"):
        transformed(found)(eqx.nn.GRUCell(3, UNITS, key=jax.random.key(0)))


SCRIPT = """
import collections, sys, jax
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
import diffrax, equinox as eqx, jax.numpy as jnp, kpflow_dyn as kp
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rsplit("/", 1)[-1]]))
key = jax.random.key(0)
if sys.argv[2] == "cell":
    solution = kp.solve(kp.DiscreteProblem(eqx.nn.GRUCell(3, 4, key=key), jnp.ones((2, 5, 3))))
else:
    field = kp.models.ClosedLoop(kp.models.Pendulum(), eqx.nn.MLP(2, 1, 4, 1, key=key))
    solution = kp.solve(kp.ODEProblem(field, jnp.ones((2, 2)), jnp.linspace(0, 1, 6)), diffrax.Tsit5())
flow = kp.linearize(solution)
flow.ntk.mv(jnp.ones((1, *flow.ntk.domain.shape))).block_until_ready()
print(events["cache_hits"], events["cache_misses"])
"""


@pytest.mark.parametrize(("model", "least"), [("cell", 10), pytest.param("field", 30, marks=pytest.mark.slow)])
def test_another_process_finds_them_in_the_cache_of_jax(model: str, least: int, tmp_path: Path) -> None:
    """Where the user has switched JAX's persistent cache on: programs are the same in every process."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), model]
    counts = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    (_, misses), (hits, missed) = (map(int, found.stdout.split()) for found in counts)
    assert misses > least
    assert hits >= misses and missed == 0
