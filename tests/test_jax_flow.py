"""The operators of every registered JAX model against dense Jacobians of the real model, in float64."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import cases
from jax_registry import MODELS, TanhRNN, dense_jacobian, dense_steps, states_of
from synthetic import check_apart

import kpflow_dyn as kp

pytestmark = pytest.mark.usefixtures("x64")

QUICK = {"tanh_rnn", "lstm", "computed_weight", "tied", "attending", "function"}


def relative(a: jax.Array, b: jax.Array) -> float:
    assert a.shape == b.shape
    return float(abs(a - b).max() / abs(b).max())


@pytest.fixture(scope="module", params=cases(MODELS, QUICK))
def flow(request: pytest.FixtureRequest, x64: None) -> kp.Flow:
    return kp.linearize(kp.solve(MODELS[request.param].problem(request.param != "lstm")))


@pytest.fixture(scope="module")
def jacobian(flow: kp.Flow) -> jax.Array:
    return dense_jacobian(flow)


def test_state_jacobian_is_that_of_the_real_model(flow: kp.Flow, jacobian: jax.Array) -> None:
    assert relative(flow.J.dense(), jacobian) < 1e-10
    assert relative(flow.J.T.dense(), jacobian.T) < 1e-10


def test_ntk_is_propagated_kicks_three_ways(flow: kp.Flow, jacobian: jax.Array) -> None:
    expected = jacobian @ jacobian.T
    assert relative(flow.ntk.dense(), expected) < 1e-10
    assert relative((flow.P @ flow.K @ flow.P.T).dense(), expected) < 1e-10
    assert relative((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense(), expected) < 1e-10


def test_propagator_inverts_the_linearised_constraint(flow: kp.Flow) -> None:
    steps = dense_steps(flow)
    assert relative(flow.P.inv.dense(), steps) < 1e-10
    assert relative(flow.P.dense(), jnp.linalg.inv(steps)) < 1e-10


@pytest.mark.parametrize("name", ["P", "K", "core", "B", "J", "ntk"])
def test_adjointness(flow: kp.Flow, name: str) -> None:
    assert kp.check_adjoint(getattr(flow, name), seed=3) < 1e-12


def test_adjointness_of_the_inverse(flow: kp.Flow) -> None:
    assert kp.check_adjoint(flow.P.inv, seed=3) < 1e-12


def test_core_spectrum_follows_from_the_variables(flow: kp.Flow) -> None:
    spectrum = flow.core.spectrum()
    if spectrum is None:
        pytest.skip("some weight is computed, shared in parts, or acts through an operation of its own")
    claimed = np.sort(np.repeat(*spectrum))[::-1]
    dense = np.linalg.eigvalsh(np.asarray(flow.core.dense()))[::-1]
    size = min(len(claimed), len(dense))
    np.testing.assert_allclose(claimed[:size], dense[:size], atol=1e-12 * dense[0])
    assert claimed[size:].sum() + abs(dense[size:]).sum() < 1e-10 * dense.sum()


def test_gradient_step_moves_the_state_by_the_ntk(flow: kp.Flow) -> None:
    """Relative error of S(theta - eta g) - S = -eta NTK grad_S L falls linearly in eta."""
    state, problem = flow.solution.state, flow.solution.problem
    error = state - jax.random.normal(jax.random.key(1), state.shape)
    predicted = -flow.ntk.mv(error)
    gradient = flow.as_parameters(flow.J.T.mv(error))
    off = []
    for eta in (1e-4, 1e-5):
        moved = states_of(problem)({name: value - eta * gradient[name] for name, value in flow.parameters.items()})
        off.append(float(jnp.linalg.norm((moved - state) / eta - predicted) / jnp.linalg.norm(predicted)))
    assert off[1] < 1e-2
    assert off[1] < 0.15 * off[0]


def test_spectra_and_traces_are_those_of_the_dense_matrix(flow: kp.Flow) -> None:
    dense = np.asarray(flow.ntk.dense())
    values = np.linalg.eigvalsh(dense)[::-1]
    found = kp.eigs(flow.ntk, k=3)
    np.testing.assert_allclose(np.asarray(found.values), values[:3], rtol=1e-9)
    kept = np.einsum("btubsu->ts", dense.reshape(*flow.ntk.domain.shape, *flow.ntk.domain.shape))
    traced = kp.partial_trace(flow.ntk, keep="time").matrix
    np.testing.assert_allclose(np.asarray(traced), kept, atol=1e-12 * kept.max())


def test_some_parameters_learn() -> None:
    solution = kp.solve(MODELS["gru"].problem(True))
    every, some = kp.linearize(solution), kp.linearize(solution, params=["weight_hh", "bias"])
    assert list(some.parameters) == ["bias", "weight_hh"]
    rows, chosen = every.J.dense().T, []
    for name, part in every.as_parameters(jnp.arange(every.J.domain.size, dtype=float)).items():
        chosen += np.asarray(part, int).ravel().tolist() if name in some.parameters else []
    assert relative(some.J.dense().T, rows[jnp.array(chosen)]) < 1e-12


@pytest.mark.parametrize("times", [1, 2, 37])
def test_spans_and_probes_of_any_number_join(times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps go span by span and some probes at a time; how time and probes are cut must not be seen."""
    keys = jax.random.split(jax.random.key(0))
    x, q = jax.random.normal(keys[0], (2, times, 3)), jax.random.normal(keys[1], (3, 2, times, 4))
    solution = kp.solve(kp.DiscreteProblem(TanhRNN(keys[0]), x))

    def applied() -> list[jax.Array]:
        flow = kp.linearize(solution)
        gradients = flow.J.T.mv(q)
        return [flow.P.mv(q), flow.P.T.mv(q), gradients, flow.J.mv(gradients), flow.ntk.mv(q)]

    whole = applied()
    monkeypatch.setattr("kpflow_dyn._jax.tangent.SPAN_ROWS", 10)
    monkeypatch.setattr("kpflow_dyn._jax.tangent.ROWS_TOGETHER", 4)
    for found, expected in zip(applied(), whole, strict=True):
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=1e-12)


def test_compiled_once_for_a_shape() -> None:
    """Applying again, on other values, traces nothing anew."""
    traced = []

    def step(p: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
        traced.append(1)
        return jnp.tanh(p @ z + x.sum())

    cell = jax.tree_util.Partial(step, jnp.eye(4))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, jnp.ones((2, 5, 3)), jnp.zeros((2, 4)))))
    first, second = jnp.ones((3, *flow.ntk.domain.shape)), jnp.zeros((3, *flow.ntk.domain.shape))
    flow.ntk.mv(first).block_until_ready()
    before, compiled = len(traced), []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    flow.ntk.mv(second).block_until_ready()
    assert len(traced) == before
    assert not [name for name in compiled if "backend_compile" in name]


def test_single_precision_stays_single() -> None:
    flow = kp.linearize(kp.solve(MODELS["gru"].problem(True, "float32")))
    double = kp.linearize(kp.solve(MODELS["gru"].problem(True)))
    assert flow.ntk.dense().dtype == jnp.float32
    assert flow.ntk.domain.dtype == jnp.float32
    assert float(kp.trace(flow.ntk).value) == pytest.approx(float(kp.trace(double.ntk).value), rel=1e-4)


def test_each_trial_by_itself_has_the_blocks_of_the_ntk_within_trials(flow: kp.Flow) -> None:
    check_apart(flow.ntk)


GAIN = [1.0]


class Gained(eqx.Module):
    w: jax.Array

    def __call__(self, first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.tanh(GAIN[0] * (self.w @ second)) + jnp.sum(first)


def test_a_global_that_was_changed_is_seen() -> None:
    cell, x, z0 = Gained(jnp.eye(3)), jnp.ones((2, 4, 3)), jnp.ones((2, 3))
    problems = kp.DiscreteProblem(cell, x, z0), kp.ODEProblem(cell, z0, np.linspace(0, 1, 3))
    before = [kp.solve(problem).state for problem in problems]
    GAIN[0] = 2.0
    after = [kp.solve(problem) for problem in problems]
    GAIN[0] = 1.0
    again = [kp.solve(problem).state for problem in problems]
    z = jnp.tanh(2 * z0) + 3
    assert np.allclose(after[0].state[:, 0], z, atol=1e-12)
    for one, two, three in zip(before, after, again, strict=True):
        assert abs(one - two.state).max() > 0.01
        assert np.array_equal(one, three)
    with pytest.raises(ValueError, match=r"changed after solve"):
        kp.linearize(after[0])


def test_steps_multiply_by_matrices_as_they_lie() -> None:
    """A product with W^T is slow where its rows are few, so the loop forward has W^T beside W, behind a barrier."""
    keys = jax.random.split(jax.random.key(0))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(TanhRNN(keys[0]), jax.random.normal(keys[1], (2, 5, 3)))))
    vjp, jvp = (jax.jit(op.mv).lower(jnp.ones((1, *op.domain.shape))).as_text() for op in (flow.J.T, flow.J))
    assert "optimization_barrier" in jvp
    assert "optimization_barrier" not in vjp
