"""phi functions and exponential Rosenbrock steps, against dense matrices and solutions that are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.linalg import expm

from kpflow_dyn.solvers import ExponentialRosenbrock, RungeKuttaChebyshev
from kpflow_dyn.solvers._chebyshev import reach, stages_for, stages_of
from kpflow_dyn.solvers._counted import Counted
from kpflow_dyn.solvers._exponential import PhiProducts, phi
from kpflow_dyn.solvers._integration import Integration
from kpflow_dyn.solvers._landscape import Point

ORDERS = [3, 4]


@pytest.mark.parametrize("z", [-1e3, -20.0, -1.0001, -0.9999, -1e-9, 0.0, 1e-3, 0.7, 5.0])
def test_phi_is_the_first_row_of_an_exponential(z: float) -> None:
    matrix = np.diag([z, 0, 0, 0, 0, 0.0]) + np.eye(6, k=1)
    np.testing.assert_allclose(phi(np.array([z]), 5)[:, 0], expm(matrix)[0], rtol=1e-12)


def random_symmetric(n: int) -> np.ndarray:
    matrix = np.random.default_rng(0).standard_normal((n, n))
    return matrix + matrix.T


def dense_sum(A: np.ndarray, S: np.ndarray, h: float, weights: np.ndarray) -> np.ndarray:
    values, V = np.linalg.eigh(A)
    functions = phi(-h * values, 4)[1:]
    return sum(
        w * (V * f) @ V.T @ row for row, ws in zip(S, weights, strict=True) for w, f in zip(ws, functions, strict=True)
    )


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-10])
def test_sums_of_phi_products_of_an_indefinite_matrix(tolerance: float) -> None:
    A, rng = random_symmetric(80), np.random.default_rng(1)
    S, weights = rng.standard_normal((2, 80)), rng.standard_normal((2, 4))
    operator = Counted(lambda rows: rows @ A)
    products = PhiProducts(operator, S, 80)
    for h in (0.2, 0.05):
        assert products.reach(h, weights, tolerance) == h
        found, image = products.sum(h, weights)
        assert np.linalg.norm(found - dense_sum(A, S, h, weights)) < 3 * tolerance
        np.testing.assert_allclose(image, A @ found, atol=1e-11 * np.linalg.norm(image))
    assert operator.applications < 80


def test_a_full_basis_shortens_the_step() -> None:
    A, S, weights = random_symmetric(80), np.ones((1, 80)), np.array([[1.0, 0, 0, 0]])
    products = PhiProducts(Counted(lambda rows: rows @ A), S, 8)
    h = products.reach(1.0, weights, 1e-6, relative=True)
    assert 0 < h < 1
    exact = dense_sum(A, S, h, weights)
    assert np.linalg.norm(products.sum(h, weights)[0] - exact) < 3e-6 * np.linalg.norm(exact)


# theta_i' = -a_i theta_i^3 in rotated coordinates, so that the Hessian is full


ROTATION = np.linalg.eigh(random_symmetric(6))[1]
RATES = np.logspace(0, 2, 6)
START = ROTATION.T @ np.linspace(0.6, 1.4, 6)


def quartic(theta: np.ndarray) -> Point:
    y = ROTATION @ theta
    curved = ROTATION.T * (3 * RATES * y**2) @ ROTATION
    return Point(theta, float(RATES @ y**4) / 4, quartic_gradient(theta), lambda rows: rows @ curved, quartic_around)


def quartic_around(theta: np.ndarray) -> tuple[float, np.ndarray]:
    return float(RATES @ (ROTATION @ theta) ** 4) / 4, quartic_gradient(theta)


def quartic_gradient(theta: np.ndarray) -> np.ndarray:
    return ROTATION.T @ (RATES * (ROTATION @ theta) ** 3)


def quartic_solution(tau: float) -> np.ndarray:
    y = ROTATION @ START
    return ROTATION.T @ (y / np.sqrt(1 + 2 * RATES * y**2 * tau))


def scalar(theta: np.ndarray) -> Point:
    def around(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return float(theta @ theta**3) / 4, theta**3

    return Point(theta, *around(theta), lambda rows: 3 * theta**2 * rows, around)


def arrival(landscape: Callable, start: np.ndarray, span: float, order: int, rtol: float) -> Integration:
    run = Integration(landscape, start, span, ExponentialRosenbrock(order=order), rtol)
    while not run.finished:
        run.advance()
    return run


@pytest.mark.parametrize("order", ORDERS)
def test_the_error_of_one_step_has_the_order_of_the_method(order: int) -> None:
    errors = []
    for h in (0.1, 0.05, 0.025, 0.0125):
        run = arrival(scalar, np.ones(1), h, order, 0.9)
        assert run.steps == 1
        errors.append(abs(float(run.point.theta[0]) - 1 / math.sqrt(1 + 2 * h)))
    slopes = np.diff(np.log2(errors[::-1]))
    assert abs(slopes[0] - order - 1) < 0.2 and (np.abs(slopes - order - 1) < 0.6).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_smaller_tolerance_converges_at_the_order_of_the_method(order: int) -> None:
    runs = [arrival(quartic, START, 3.0, order, rtol) for rtol in (1e-2, 1e-3, 1e-4)]
    errors = [np.linalg.norm(run.point.theta - quartic_solution(3.0)) for run in runs]
    steps = [run.steps for run in runs]
    slope = np.log(errors[0] / errors[-1]) / np.log(steps[-1] / steps[0])
    assert order - 0.5 < slope < order + 1.5
    assert errors[-1] < 1e-4 * np.linalg.norm(START)


@pytest.mark.parametrize("order", ORDERS)
def test_stiffness_does_not_limit_the_steps(order: int) -> None:
    """Explicit descent is stable up to 2 / l_1, where l_1 stays above 3 max(a y^2) at the end."""
    run = arrival(quartic, START, 3.0, order, 1e-2)
    stable = 2 / (3 * float((RATES * (ROTATION @ START) ** 2).max()))
    assert 10 * run.steps < 3.0 / stable


def test_a_gradient_of_zero_stays() -> None:
    run = arrival(scalar, np.zeros(1), 5.0, 4, 1e-2)
    assert run.time == 5.0 and run.point.theta[0] == 0


# Explicit steps


def explicit(landscape: Callable, start: np.ndarray, span: float, rtol: float) -> Integration:
    run = Integration(landscape, start, span, RungeKuttaChebyshev(), rtol)
    while not run.finished:
        run.advance()
    return run


@pytest.mark.parametrize("s", [2, 3, 7, 40])
def test_stages_are_of_second_order_and_stable(s: int) -> None:
    """On y' = z y a step is a polynomial in z: e^z to z^2, and at most one in size down to where it is said to be."""
    stages = stages_of(s)
    z = np.concatenate([[-1e-3, -2e-3], -np.linspace(0, reach(s), 500)])
    before, now = np.ones_like(z), 1 + stages.first * z
    for mu, nu, f, f0 in stages.rows:
        before, now = now, (1 - mu - nu) + mu * now + nu * before + z * (f * now + f0)
    errors = np.abs(now - np.exp(z))[:2]
    assert np.log2(errors[1] / errors[0]) == pytest.approx(3, abs=0.05)
    assert (np.abs(now) <= 1 + 1e-12).all()
    assert stages_for(reach(s)) == s


def test_a_smaller_tolerance_converges_at_second_order() -> None:
    runs = [explicit(quartic, START, 3.0, rtol) for rtol in (1e-1, 1e-2, 1e-3)]
    errors = [np.linalg.norm(run.point.theta - quartic_solution(3.0)) for run in runs]
    slope = np.log(errors[0] / errors[-1]) / np.log(runs[-1].steps / runs[0].steps)
    assert 1.5 < slope < 3.5 and errors[-1] < 1e-3 * np.linalg.norm(START)


@pytest.mark.parametrize("bad", [{"stages": 1}, {"max_steps": 0}])
def test_explicit_options_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="stages >= 2"):
        RungeKuttaChebyshev(**bad)


@pytest.mark.parametrize("bad", [{"order": 5}, {"columns": 1}, {"max_linearisations": 0}])
def test_options_out_of_range(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="order 3 or 4"):
        ExponentialRosenbrock(**bad)
