"""Lyapunov and finite-time exponents, step Jacobians and principal components, against what is known of them."""

from __future__ import annotations

import io
from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
import torch
from conftest import cases
from registry import MODELS
from scipy.linalg import expm
from test_fixed_points import Field, TorchGRU
from torch import Tensor, nn
from torch.func import jacrev

import kpflow_dyn as kp
from kpflow_dyn._torch.cells import as_step
from kpflow_dyn.dynamics import finite_time_exponents, lyapunov_spectrum, participation_ratio, pca, step_jacobians
from kpflow_dyn.dynamics._singular_values import GradedProduct
from kpflow_dyn.models import CTRNNCell


class Henon(nn.Module):
    """x' = 1 - a x^2 + y, y' = b x."""

    hidden_size = 2

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (1.4, 0.3))

    def forward(self, _: Tensor, z: Tensor) -> Tensor:
        return torch.stack([1 - self.a * z[:, 0] ** 2 + z[:, 1], self.b * z[:, 0]], -1)


class Linear(nn.Module):
    """z -> W z, or z' = W z."""

    def __init__(self, W: np.ndarray) -> None:
        super().__init__()
        self.hidden_size, self.W = len(W), nn.Parameter(torch.from_numpy(W))

    def forward(self, _: Tensor, z: Tensor) -> Tensor:
        return z @ self.W.T


def lorenz(z: Tensor) -> Tensor:
    x, y, w = z.unbind(-1)
    return torch.stack([10 * (y - x), x * (28 - w) - y, x * y - 8 / 3 * w], -1)


def lorenz_problem(trials: int, span: float) -> kp.ODEProblem:
    start = torch.randn(trials, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return kp.ODEProblem(Field(lorenz), 5 * start + torch.tensor([0.0, 0.0, 25.0]).double(), (0.0, span))


LORENZ, LORENZ_SUM = [0.9056, 0.0, -14.5723], -(10 + 1 + 8 / 3)


def symmetric(values: list[float]) -> np.ndarray:
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((len(values), len(values))))[0]
    return Q * np.array(values) @ Q.T


def rnn(trials: int = 2, steps: int = 50, units: int = 5, leak: float | None = None) -> kp.DiscreteProblem:
    torch.manual_seed(0)
    cell = nn.RNNCell(2, units).double() if leak is None else CTRNNCell(2, units, alpha=leak).double()
    nn.init.normal_(cell.get_parameter("weight_hh" if leak is None else "W"), std=1.5 / units**0.5)
    return kp.DiscreteProblem(cell, torch.randn(trials, steps, 2).double(), torch.randn(trials, units).double())


def jacobians_of(problem: kp.DiscreteProblem) -> np.ndarray:
    """A_t [trial, time, unit, unit], by reverse mode through the model, one step after another."""
    step, start = as_step(problem.cell, problem.x, problem.z0)
    state = torch.cat([start[:, None], kp.solve(problem).state], 1)
    found = [
        [jacrev(lambda z, x=x: step(problem.cell, x[None], z[None])[0])(z) for x, z in zip(*rows, strict=False)]
        for rows in zip(problem.x, state, strict=True)
    ]
    return np.array([[a.detach().numpy() for a in row] for row in found])


def product(A: np.ndarray) -> mpmath.matrix:
    """A_t ... A_1 with a thousand digits."""
    P = mpmath.eye(A.shape[1])
    for a in A:
        P = mpmath.matrix(a.tolist()) * P
    return P


def log_singular_values(A: np.ndarray) -> np.ndarray:
    with mpmath.workdps(1000):
        return np.array([float(mpmath.log(s)) for s in mpmath.svd_r(product(A), compute_uv=False)])


# Jacobians


@pytest.mark.parametrize("name", cases(MODELS, quick=["gru_cell", "pair_state"]))
def test_step_jacobians_are_those_of_the_model(name: str) -> None:
    problem = MODELS[name].problem(started=True)
    np.testing.assert_allclose(step_jacobians(problem), jacobians_of(problem), atol=1e-13)


def test_frozen_models_have_jacobians_too() -> None:
    problem = rnn(steps=3)
    problem.cell.requires_grad_(False)
    np.testing.assert_allclose(step_jacobians(kp.solve(problem)), jacobians_of(problem), atol=1e-13)


def test_step_jacobians_of_an_ode_are_those_of_its_scheme() -> None:
    W, h = symmetric([-1.0, 0.5, 2.0]), 0.25
    sol = kp.solve(kp.ODEProblem(Linear(W), torch.ones(2, 3).double(), (0.0, 1.0)), "midpoint", steps=h)
    expected = np.eye(3) + h * W + h**2 * W @ W / 2
    A = step_jacobians(sol)
    np.testing.assert_allclose(A[:, 1:], np.broadcast_to(expected, (2, 4, 3, 3)), atol=1e-14)
    np.testing.assert_array_equal(A[:, 0], np.broadcast_to(np.eye(3), (2, 3, 3)))


def test_jacobians_keep_to_the_memory_budget() -> None:
    with kp.memory_budget(1000), pytest.raises(MemoryError, match=r"use flow\.P"):
        step_jacobians(rnn())


# Lyapunov exponents


def test_henon() -> None:
    start = 0.1 * torch.rand(40, 2, generator=torch.Generator().manual_seed(0)).double()
    problem = kp.DiscreteProblem(Henon(), torch.zeros(40, 1100, 1).double(), start)
    found = lyapunov_spectrum(problem, transient=100)
    np.testing.assert_allclose(found.mean, [0.4192, -1.6232], rtol=1e-2)
    assert np.abs(found.mean - [0.4192, -1.6232]).max() < 4 * found.stderr.max() < 0.015
    np.testing.assert_allclose(found.exponents.sum(1), np.log(0.3), atol=1e-12)  # the map contracts areas by b
    assert found.dimension == pytest.approx(1.258, abs=0.01)  # Russell, Hanson, Ott (1980)
    assert found.entropy == found.mean[0]
    few = lyapunov_spectrum(kp.solve(problem), 1, transient=100)
    np.testing.assert_allclose(few.mean, found.mean[:1], atol=1e-10)
    assert np.isnan(few.dimension)


def test_an_error_that_is_not_known_is_said_to_be_unknown() -> None:
    problem = kp.DiscreteProblem(Henon(), torch.zeros(1, 1, 1).double(), torch.zeros(1, 2).double())
    found = lyapunov_spectrum(problem)
    assert np.isnan(found.stderr).all() and str(found).count("± unknown") == 2


def test_lorenz() -> None:
    problem = lorenz_problem(150, 10.0)
    on_attractor = kp.solve(problem, "rk4", steps=0.025).state[:, -1]
    sol = kp.solve(problem.remake(z0=on_attractor), "rk4", steps=0.025)
    found = lyapunov_spectrum(sol, transient=1.0, interval=2)
    np.testing.assert_allclose(found.mean[[0, 2]], np.take(LORENZ, [0, 2]), rtol=2e-2)
    assert abs(found.mean[1]) < 0.02
    assert found.mean.sum() == pytest.approx(LORENZ_SUM, abs=5e-3)  # the divergence, to the accuracy of the steps
    assert found.dimension == pytest.approx(2.062, abs=3e-3)


@pytest.mark.slow
def test_lorenz_on_adaptive_steps() -> None:
    found = lyapunov_spectrum(kp.solve(lorenz_problem(40, 60.0)), transient=5.0)
    np.testing.assert_allclose(found.mean[[0, 2]], np.take(LORENZ, [0, 2]), rtol=1e-2)
    assert abs(found.mean[1]) < 5e-3
    assert found.mean.sum() == pytest.approx(LORENZ_SUM, abs=1e-4)


def test_a_linear_map_has_the_exponents_of_its_eigenvalues() -> None:
    values = [1.01, -0.8, 0.5, 0.3]
    problem = kp.DiscreteProblem(Linear(symmetric(values)), torch.zeros(2, 500, 1).double(), torch.ones(4).double())
    found = lyapunov_spectrum(problem, transient=300)
    np.testing.assert_allclose(found.exponents, [np.log(np.abs(values))] * 2, atol=1e-12)
    np.testing.assert_allclose(found.stderr, 0, atol=1e-12)


@pytest.mark.slow
def test_a_linear_field_has_the_exponents_of_its_eigenvalues() -> None:
    rates = [0.2, -0.1, -1.0]
    field = kp.ODEProblem(Linear(symmetric(rates)), torch.ones(1, 3).double(), (1.0, 81.0))
    found = lyapunov_spectrum(kp.solve(field, "rk4", steps=0.1), 2, transient=40.0)
    np.testing.assert_allclose(found.mean, rates[:2], atol=1e-6)


def test_the_sum_of_all_exponents_is_that_of_the_volume() -> None:
    problem = rnn()
    expected = np.linalg.slogdet(jacobians_of(problem)).logabsdet
    found = lyapunov_spectrum(problem)
    np.testing.assert_allclose(found.exponents.sum(1), expected.mean(1), atol=1e-12)
    np.testing.assert_allclose(found.history.sum(2), expected.cumsum(1) / np.arange(1, 51), atol=1e-11)
    late = lyapunov_spectrum(problem, transient=20)
    np.testing.assert_allclose(late.exponents.sum(1), expected[:, 20:].mean(1), atol=1e-12)
    assert np.isnan(late.history[:, :20]).all() and np.isfinite(late.history[:, 20:]).all()


@pytest.mark.slow
def test_factors_of_several_steps_give_the_same() -> None:
    problem = rnn(leak=0.3)
    found, apart = (finite_time_exponents(problem, interval=n) for n in (1, 7))
    np.testing.assert_array_equal(apart.times[0], [7, 14, 21, 28, 35, 42, 49, 50])
    np.testing.assert_allclose(apart.exponents, found.exponents[:, apart.times[0].astype(int) - 1], atol=1e-9)


def test_exponents_that_are_round_off_are_warned_of() -> None:
    problem = kp.DiscreteProblem(Linear(symmetric([1.0, 1e-6])), torch.zeros(1, 12, 1).double(), torch.ones(2).double())
    with pytest.warns(UserWarning, match="from rank 2 on the exponents are round-off.*take a shorter interval"):
        lyapunov_spectrum(problem, interval=3)


def test_dimension_and_entropy_at_the_ends() -> None:
    def of(*mean: float, units: int | None = None) -> kp.dynamics.Lyapunov:
        values, none = np.array(mean), np.zeros((1, len(mean)))
        return kp.dynamics.Lyapunov(none, values, none[0], none[None], none[:, :1], units or len(mean))

    assert of(-1.0, -2.0).dimension == 0 and of(-1.0).entropy == 0
    assert of(1.0, -0.5).dimension == 2 and np.isnan(of(1.0, -0.5, units=3).dimension)
    assert of(1.0, 0.0, -4.0).dimension == 2.25 and of(1.0, 0.5, -4.0).entropy == 1.5


# Finite time


def test_finite_time_exponents_are_those_of_the_exact_product() -> None:
    problem = rnn()
    A, found = jacobians_of(problem), finite_time_exponents(problem)
    for trial, t in [(0, 1), (0, 10), (1, 50)]:
        expected = log_singular_values(A[trial, :t]) / t
        np.testing.assert_allclose(found.exponents[trial, t - 1], expected, atol=1e-12)
    np.testing.assert_array_equal(finite_time_exponents(problem, horizon=20).exponents, found.exponents[:, :20])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_products_whose_singular_values_no_number_holds(size: int) -> None:
    A = np.random.default_rng(1).standard_normal((60, size, size)) * 10.0 ** -np.arange(0, 5 * size, 5)
    whole = GradedProduct(1, size)
    found = [whole.multiply(a[None])[0] for a in A][-1]
    expected = log_singular_values(A)
    assert size == 1 or expected[0] - expected[-1] > 100
    assert size < 3 or expected[-1] < np.log(np.finfo(float).tiny)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_finite_time_exponents_of_a_field() -> None:
    W = np.array([[-1.0, 8.0], [0.0, -1.5]])  # amplifies for a while
    problem = kp.ODEProblem(Linear(W), torch.ones(2, 2).double(), (1.0, 4.0))
    found = finite_time_exponents(kp.solve(problem, rtol=1e-9, atol=1e-9), horizon=2.0)
    assert found.start == 1.0 and found.times.min() > 1 and found.times.max() <= 3.0
    for t, values in zip(found.times[0] - 1, found.exponents[0], strict=True):
        np.testing.assert_allclose(values, np.log(np.linalg.svd(expm(W * t)).S) / t, atol=1e-5)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_exponents_near_rest_are_those_of_the_flow(framework: str, x64: None) -> None:
    """There a solver's steps are as long as stability allows, and contract by less than the flow."""
    rates = np.array([-1.5, -10.3])
    W = np.diag(rates) + np.array([[0.0, 2.0], [0.0, 0.0]])
    if framework == "torch":
        problem = kp.ODEProblem(Linear(W), torch.ones(1, 2).double(), (0.0, 6.0))
    else:
        rate = jax.tree_util.Partial(lambda W, t, z: W @ z, jnp.asarray(W))
        problem = kp.ODEProblem(rate, jnp.ones((1, 2)), (0.0, 6.0))
    with jax.enable_x64(True):
        sol = kp.solve(problem)
        found = lyapunov_spectrum(sol, transient=3.0)
    np.testing.assert_allclose(found.mean, rates, rtol=3e-3)


def test_exponents_of_steps_that_never_converge_are_warned_of(x64: None) -> None:
    rate = jax.tree_util.Partial(lambda W, t, z: W @ z, jnp.diag(jnp.array([-1.0, -200.0])))
    problem = kp.ODEProblem(rate, jnp.array([[1.0, 0.0]]), (0.0, 1.0))
    sol = kp.solve(problem, diffrax.ImplicitEuler(), steps=0.125)
    with pytest.warns(UserWarning, match="from rank 2 on the exponents are not accurate: .* still changes by"):
        found = lyapunov_spectrum(sol)
    assert found.mean[1] < -100 < -2 < found.mean[0]


# Both frameworks


def test_jax_agrees(x64: None) -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(2, 6).double(), torch.randn(2, 23, 2).double()
    weights = (cell.weight_hh, cell.weight_ih, cell.bias_ih, cell.bias_hh)
    twin = TorchGRU(*(jnp.asarray(w.detach().numpy()) for w in weights))
    one, other = kp.solve(kp.DiscreteProblem(cell, x)), kp.solve(kp.DiscreteProblem(twin, jnp.asarray(x.numpy())))
    np.testing.assert_allclose(step_jacobians(other), jacobians_of(one.problem), atol=1e-13)
    found, wanted = (finite_time_exponents(sol, interval=4) for sol in (other, one))
    np.testing.assert_allclose(found.exponents, wanted.exponents, atol=1e-10)
    np.testing.assert_array_equal(found.times, wanted.times)


class JaxLinear(eqx.Module):
    W: jax.Array

    def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return self.W @ z


@pytest.mark.slow
def test_jax_trials_with_steps_of_their_own(x64: None) -> None:
    W = symmetric([0.3, -1.0])
    start = jnp.asarray([[1.0, 0.0], [1000.0, 3.0]])
    problem = kp.ODEProblem(JaxLinear(jnp.asarray(W)), start, np.linspace(0.0, 20.0, 3))
    sol = kp.solve(problem, diffrax.Tsit5(), rtol=1e-10, atol=1e-7)
    assert (sol.steps.dt > 0).sum(1).min() < sol.steps.dt.shape[1] - 1  # type: ignore[union-attr]
    np.testing.assert_allclose(lyapunov_spectrum(sol, transient=8.0).exponents, [[0.3, -1.0]] * 2, atol=2e-5)
    found = finite_time_exponents(sol)
    np.testing.assert_allclose(found.exponents[:, -1], [[0.3, -1.0]] * 2, atol=2e-5)
    np.testing.assert_allclose(found.times[:, -1], 20.0)


# Principal components


def test_components_are_those_of_the_singular_value_decomposition() -> None:
    states = np.random.default_rng(0).standard_normal((3, 20, 4)) * [1.0, 5.0, 2.0, 0.1]
    rows = states.reshape(-1, 4) - states.mean((0, 1))
    _, s, Vt = np.linalg.svd(rows, full_matrices=False)
    found = pca(states, 3)
    np.testing.assert_allclose(found.variance, s[:3] ** 2 / 60, rtol=1e-10)
    np.testing.assert_allclose(found.explained, (s**2 / (s**2).sum())[:3], rtol=1e-10)
    np.testing.assert_allclose(np.abs(found.components @ Vt[:3].T), np.eye(3), atol=1e-10)
    assert (found.components.max(1) > -found.components.min(1)).all()
    whole = pca(torch.from_numpy(states))
    np.testing.assert_allclose(whole.scores @ whole.components + whole.mean, states, atol=1e-12)
    np.testing.assert_allclose(whole.project(states), whole.scores, atol=1e-12)
    dataset = found.to_xarray()
    assert dataset.scores.dims == ("trial", "time", "pc") and dataset.sizes["pc"] == 3
    ratio = (s**2).sum() ** 2 / (s**4).sum()
    assert float(participation_ratio(states)) == pytest.approx(ratio, rel=1e-12)


def test_weights_count_as_repetitions() -> None:
    states = np.random.default_rng(0).standard_normal((2, 3, 4))
    repeated, weights = np.repeat(states, [1, 2, 3], axis=1), np.array([1.0, 2.0, 3.0])
    one, other = pca(states, weights=weights), pca(repeated)
    np.testing.assert_allclose(one.variance, other.variance, rtol=1e-10)
    np.testing.assert_allclose(one.mean, other.mean, atol=1e-12)
    assert float(participation_ratio(states, weights=weights)) == pytest.approx(float(participation_ratio(repeated)))
    by_trial = pca(states, weights=np.outer([1.0, 1e-300], weights))
    np.testing.assert_allclose(by_trial.mean, pca(states[:1], weights=weights).mean, atol=1e-12)


def test_an_ode_counts_times_by_their_quadrature() -> None:
    problem = kp.ODEProblem(Linear(np.diag([-1.0, -3.0])), torch.ones(1, 2).double(), (0.0, 2.0))
    sol = kp.solve(problem, rtol=1e-8, atol=1e-8)

    def mean(rate: float) -> float:
        return float((1 - np.exp(-2 * rate)) / (2 * rate))

    rates, means = np.array([1.0, 3.0]), np.array([mean(1.0), mean(3.0)])
    covariance = np.array([[mean(a + b) for a in rates] for b in rates]) - np.outer(means, means)
    found = pca(sol)
    np.testing.assert_allclose(found.mean, means, atol=1e-6)
    np.testing.assert_allclose(found.variance, np.linalg.eigvalsh(covariance)[::-1], atol=1e-6)
    expected = np.trace(covariance) ** 2 / (covariance**2).sum()
    assert float(participation_ratio(sol)) == pytest.approx(expected, abs=1e-5)


def test_states_that_do_not_vary_fill_nothing() -> None:
    assert float(participation_ratio(np.ones((2, 4, 3)))) == 0
    assert (pca(np.ones((2, 4, 3))).explained == 0).all()


def test_results_are_drawn_and_labelled_where_a_direction_dies_too() -> None:
    components = pca(np.random.default_rng(0).standard_normal((2, 5, 3)))
    problem = kp.DiscreteProblem(Linear(np.diag([0.5, 0.0])), torch.zeros(2, 20, 1).double(), torch.ones(2).double())
    spectrum, short = lyapunov_spectrum(problem), finite_time_exponents(problem)
    assert spectrum.mean[1] == -np.inf and spectrum.mean[0] == pytest.approx(np.log(0.5), abs=0.1)  # W is singular
    np.testing.assert_allclose(short.exponents[0], [[np.log(0.5), -np.inf]] * 20, atol=1e-13)
    assert spectrum.to_xarray().history.dims == ("trial", "time", "exponent")
    assert short.to_xarray().exponents.dims == ("trial", "time", "exponent")
    for result in (spectrum, short, components, pca(np.random.default_rng(0).standard_normal((1, 5, 1)))):
        result.plot(dark=True).savefig(io.BytesIO())


# Bad input


@pytest.mark.parametrize("of", [lyapunov_spectrum, finite_time_exponents, step_jacobians])
def test_what_has_no_steps_is_refused(of: Callable[..., object]) -> None:
    static = kp.StaticProblem(nn.Linear(2, 2), torch.zeros(1, 2))
    for given in (static, kp.solve(static), "cell"):
        with pytest.raises(TypeError, match=r"has no steps in time; expected a DiscreteProblem"):
            of(given)
    problem = kp.ODEProblem(Linear(np.eye(1)), torch.ones(1, 1).double(), [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="'explicit_adams' cannot be replayed"):
        of(kp.solve(problem, "explicit_adams"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sol: lyapunov_spectrum(sol, 6), "k is 6, expected a number of exponents from 1 to the 5 units"),
        (lambda sol: lyapunov_spectrum(sol, 0), "k is 0"),
        (lambda sol: lyapunov_spectrum(sol, 1.5), "k is 1.5"),
        (lambda sol: lyapunov_spectrum(sol, interval=0), "interval is 0, expected a number of steps"),
        (lambda sol: lyapunov_spectrum(sol, transient=50), "transient is 50, expected less than the length 50"),
        (lambda sol: lyapunov_spectrum(sol, transient=-1), "transient is -1"),
        (lambda sol: lyapunov_spectrum(sol, 1, transient=45, interval=20), "nothing is left after a transient of 45"),
        (lambda sol: finite_time_exponents(sol, 51), "horizon is 51, expected at most the length 50"),
        (lambda sol: finite_time_exponents(sol, 0), "horizon is 0"),
        (lambda sol: finite_time_exponents(sol, 3, interval=4), "no step ends within a horizon of 3; the first .* 4"),
        (lambda sol: pca(sol, 6), "k is 6, expected a number of components from 1 to the 5 units"),
        (lambda sol: pca(sol.state[0]), r"states have shape \(50, 5\), expected \[trial, time, unit\]"),
        (lambda sol: pca(sol.state * torch.nan), "states hold NaN or inf"),
        (lambda sol: pca(sol, weights=np.ones(3)), r"weights have shape \(3,\), expected \[time\] = \(50,\)"),
        (lambda sol: participation_ratio(sol, weights=-np.ones(50)), "weights must be finite, not negative"),
    ],
)
def test_bad_input_is_explained(call: Callable[[kp.Solution], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(kp.solve(rnn()))


def test_an_interval_over_which_directions_overflow_is_refused() -> None:
    problem = kp.DiscreteProblem(Linear(1e200 * np.eye(2)), torch.zeros(1, 4, 1).double(), torch.zeros(2).double())
    with pytest.raises(ValueError, match="within 2 steps; take a shorter interval"):
        lyapunov_spectrum(problem, interval=2)
