"""Flows of preconditioned optimisers against dense J M^{-1} J^T, and against real steps of the optimisers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp
import jax_registry
import numpy as np
import pytest
import registry
import test_jax_ode_flow
import test_ode_flow
import torch
from conftest import cases
from synthetic import check_apart

import kpflow_dyn as kp
from kpflow_dyn._arrays import like_numpy, to_numpy
from kpflow_dyn._flows.flow import preconditioned
from kpflow_dyn._flows.metric import Metric

pytestmark = pytest.mark.usefixtures("x64")


def jax_ode() -> kp.Solution:
    problem = test_jax_ode_flow.FIELDS["heun_given_steps"].problem()
    return kp.solve(problem, diffrax.Euler(), steps=test_jax_ode_flow.GRID)


SOLUTIONS: dict[str, Callable[[], kp.Solution]] = {
    "torch_rnn": lambda: kp.solve(registry.MODELS["rnn_cell"].problem(True)),
    "torch_gru": lambda: kp.solve(registry.MODELS["gru"].problem(True)),
    "torch_computed": lambda: kp.solve(registry.MODELS["computed_weight"].problem(True)),
    "torch_ode": lambda: kp.solve(test_ode_flow.FIELDS["driven_rk4"].problem(), "rk4"),
    "jax_gru": lambda: kp.solve(jax_registry.MODELS["gru"].problem(True)),
    "jax_ode": jax_ode,
}


@functools.cache
def flow_of(name: str) -> kp.Flow:
    """The flow of a solution without a metric, the same for all tests."""
    return kp.linearize(SOLUTIONS[name]())


def spd(size: int, rng: np.random.Generator) -> np.ndarray:
    root = rng.standard_normal((size, size))
    return root @ root.T + 0.3 * np.eye(size)


def scalar_rates(flow: kp.Flow) -> tuple[kp.LearningRates, np.ndarray]:
    rates = {name: 0.1 + 0.2 * i for i, name in enumerate(flow.parameters)}
    return kp.LearningRates(rates), np.diag(np.repeat(list(rates.values()), sizes(flow)))


def entry_rates(flow: kp.Flow) -> tuple[kp.LearningRates, np.ndarray]:
    rng = np.random.default_rng(1)
    rates = {name: rng.uniform(0.1, 2, value.shape) for name, value in flow.parameters.items()}
    return kp.LearningRates(rates), np.diag(np.concatenate([rate.ravel() for rate in rates.values()]))


def kronecker(flow: kp.Flow) -> tuple[kp.KroneckerMetric, np.ndarray]:
    """Factors of all matrices but the first, as arrays of numpy and of the framework."""
    rng, blocks, factors = np.random.default_rng(2), [], {}
    for name, value in flow.parameters.items():
        blocks.append(np.eye(int(np.prod(value.shape))))
        if value.ndim == 2:
            left, right = (spd(n, rng) for n in value.shape)
            factors[name] = left, like_numpy(right, value)
            blocks[-1] = np.kron(np.linalg.inv(left), np.linalg.inv(right))
    first = next(iter(factors))
    del factors[first]
    blocks[list(flow.parameters).index(first)] = np.eye(int(np.prod(flow.parameters[first].shape)))
    return kp.KroneckerMetric(factors), block_diagonal(blocks)


def reparametrized(flow: kp.Flow) -> tuple[kp.Reparametrization, np.ndarray]:
    """theta = A tanh(phi) for the last parameter, with more phi than theta."""
    rng, (*others, last) = np.random.default_rng(3), flow.parameters
    size = int(np.prod(flow.parameters[last].shape))
    A, phi = rng.standard_normal((size, size + 1)), rng.standard_normal(size + 1)
    image = A @ np.tanh(phi)
    offset, like = to_numpy(flow.parameters[last]).ravel() - image, flow.parameters[last]
    matrix, shift, tanh = like_numpy(A, like), like_numpy(offset, like), jnp.tanh if is_jax(flow) else torch.tanh

    def g(phi):
        return (matrix @ tanh(phi) + shift).reshape(tuple(like.shape))

    derivative = A * (1 - np.tanh(phi) ** 2)
    blocks = [np.eye(int(np.prod(flow.parameters[name].shape))) for name in others]
    return kp.Reparametrization({last: (g, like_numpy(phi, like))}), block_diagonal(
        [*blocks, derivative @ derivative.T]
    )


METRICS = {"rates": scalar_rates, "entries": entry_rates, "kronecker": kronecker, "reparametrized": reparametrized}


def is_jax(flow: kp.Flow) -> bool:
    return isinstance(flow.solution.state, jax.Array)


def sizes(flow: kp.Flow) -> list[int]:
    return [int(np.prod(value.shape)) for value in flow.parameters.values()]


def block_diagonal(blocks: list[np.ndarray]) -> np.ndarray:
    ends = np.cumsum([0, *map(len, blocks)])
    matrix = np.zeros((ends[-1], ends[-1]))
    for block, start, stop in zip(blocks, ends, ends[1:], strict=False):
        matrix[start:stop, start:stop] = block
    return matrix


def dense(op: kp.Operator) -> np.ndarray:
    """The matrix in coordinates where the inner products are plain."""
    roots = [
        np.ones(space.shape) * (1.0 if space.measure is None else to_numpy(space.measure) ** 0.5)
        for space in (op.codomain, op.domain)
    ]
    return roots[0].reshape(-1, 1) * to_numpy(op.dense()) / roots[1].reshape(1, -1)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@dataclass(frozen=True)
class Plain:
    """A flow without a metric, and the matrices of its factors."""

    flow: kp.Flow
    J: np.ndarray
    kick: np.ndarray
    V: np.ndarray


@pytest.fixture(scope="module", params=cases(SOLUTIONS, {"torch_rnn", "torch_computed", "torch_ode", "jax_gru"}))
def plain(request: pytest.FixtureRequest, x64: None) -> Plain:
    flow = flow_of(request.param)
    return Plain(flow, *(dense(op.T).T for op in (flow.J, flow.K.factor, flow.core.factor)))


@pytest.mark.parametrize("name", METRICS)
def test_operators_have_the_inverse_metric_inside(plain: Plain, name: str) -> None:
    metric, inverse = METRICS[name](plain.flow)
    flow = preconditioned(plain.flow, metric.preconditioner(plain.flow.parameters))
    assert flow.J is plain.flow.J
    assert_close(dense(flow.ntk), plain.J @ inverse @ plain.J.T)
    assert_close(dense(flow.K), plain.kick @ inverse @ plain.kick.T)
    assert_close(dense(flow.core), plain.V @ inverse @ plain.V.T)
    if not is_jax(flow):  # what compiles anew for every shape of a block
        assert max(kp.check_adjoint(op.factor, seed=2) for op in (flow.ntk, flow.K, flow.core)) < 1e-12
        check_apart(flow.ntk)
    check_spectrum(flow.core, known=name == "rates" and plain.flow.core.spectrum() is not None)


def check_spectrum(core: kp.GramOperator, known: bool) -> None:
    """It follows from the inputs where each column of a site's inputs has one rate."""
    assert (core.spectrum() is not None) == known
    if known:
        claimed = np.sort(np.repeat(*core.spectrum()))[::-1]
        exact = np.linalg.eigvalsh(dense(core))[::-1]
        size = min(len(claimed), len(exact))
        assert_close(claimed[:size], exact[:size])
        assert abs(claimed.sum() - exact.sum()) < 1e-9 * exact.sum()


def test_linearize_takes_it_and_so_do_the_steps_of_an_ode() -> None:
    plain = flow_of("torch_ode")
    solution = plain.solution
    metric, inverse = kronecker(plain)
    flow, steps = kp.linearize(solution, metric=metric), dense(plain.nodal.J)
    assert_close(dense(flow.nodal.ntk), steps @ inverse @ steps.T)
    assert_close(dense(flow.nodal.P @ flow.nodal.K @ flow.nodal.P.T), steps @ inverse @ steps.T)
    J = dense(plain.J)
    assert_close(dense(flow.ntk), J @ inverse @ J.T)
    assert kp.summary(flow, k=2).ntk.trace.value == pytest.approx(np.trace(J @ inverse @ J.T))


def test_one_number_is_the_rate_of_all() -> None:
    solution = SOLUTIONS["torch_rnn"]()
    flow, scaled = kp.linearize(solution), kp.linearize(solution, metric=kp.LearningRates(0.3))
    assert_close(dense(scaled.ntk), 0.3 * dense(flow.ntk), 1e-12)
    assert_close(np.repeat(*scaled.core.spectrum()), 0.3 * np.repeat(*flow.core.spectrum()), 1e-12)


@pytest.mark.slow
def test_sensitivities_by_equations_take_a_metric() -> None:
    solution, alg = SOLUTIONS["torch_ode"](), kp.InterpolatingAdjoint(1e-7, 1e-9)
    plain = kp.linearize(solution, sensealg=alg)
    metric, inverse = kronecker(plain)
    flow, J = kp.linearize(solution, sensealg=alg, metric=metric), dense(plain.J)
    assert_close(dense(flow.ntk), J @ inverse @ J.T, 1e-5)


# Real steps of optimisers

SMALL = 1e-4  # gradients beside the second moments that they would change


def moved(problem: kp.DiscreteProblem, optimizer: torch.optim.Optimizer, lr: float) -> torch.Tensor:
    """How far one step of the optimiser on the gradients that are there moves the state, with lr times its rates."""
    kept = [parameter.detach().clone() for parameter in problem.cell.parameters()]
    before = kp.solve(problem).state
    for group in optimizer.param_groups:
        group["lr"] *= lr
    optimizer.step()
    after = kp.solve(problem).state
    with torch.no_grad():
        for parameter, value in zip(problem.cell.parameters(), kept, strict=True):
            parameter.copy_(value)
    return after - before


def sgd(cell: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in cell.parameters() if p.ndim == 2]
    vectors = [p for p in cell.parameters() if p.ndim == 1]
    return torch.optim.SGD([{"params": matrices, "lr": 0.3 * lr}, {"params": vectors}], lr=2 * lr)


def late(optimizer: torch.optim.Optimizer, second: str, step: float = 1e14) -> torch.optim.Optimizer:
    """The optimiser long after its start, when one step hardly changes the second moment."""
    generator = torch.Generator().manual_seed(4)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        moment = torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.1
        optimizer.state[p] = {"step": torch.tensor(step), "exp_avg": torch.zeros_like(p), second: moment}
    return optimizer


STILL = 1 - 1e-12
OPTIMISERS = {
    "sgd": sgd,
    "adam": lambda cell, lr: late(torch.optim.Adam(cell.parameters(), lr, (0.0, STILL)), "exp_avg_sq"),
    "rmsprop": lambda cell, lr: late(torch.optim.RMSprop(cell.parameters(), lr, alpha=STILL), "square_avg"),
    "adagrad": lambda cell, lr: late(torch.optim.Adagrad(cell.parameters(), lr, lr_decay=0.5), "sum", 3.0),
    "shampoo": lambda cell, lr: Shampoo(cell, lr),
}


class Shampoo(torch.optim.Optimizer):
    """theta -= lr L^{-1/4} G R^{-1/4} on matrices, with frozen L = sum G G^T and R = sum G^T G; lr G on all others."""

    def __init__(self, cell: torch.nn.Module, lr: float) -> None:
        super().__init__(cell.parameters(), {"lr": lr})
        rng = np.random.default_rng(6)
        self.sums = {p: tuple(spd(n, rng) for n in p.shape) for p in cell.parameters() if p.ndim == 2}

    @torch.no_grad()
    def step(self) -> None:
        for p in self.param_groups[0]["params"]:
            roots = [torch.from_numpy(power(m, -0.25)) for m in self.sums.get(p, ())]
            p -= self.param_groups[0]["lr"] * (roots[0] @ p.grad @ roots[1] if roots else p.grad)


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.T


def metric_of(optimizer: torch.optim.Optimizer, cell: torch.nn.Module) -> Metric:
    if not isinstance(optimizer, Shampoo):
        return kp.LearningRates.from_optimizer(optimizer, cell)
    named = {name: optimizer.sums[p] for name, p in cell.named_parameters() if p.ndim == 2}
    return kp.KroneckerMetric({name: (power(L, 0.25), power(R, 0.25)) for name, (L, R) in named.items()})


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_step_moves_the_state_by_the_ntk(name: str) -> None:
    """S(theta') - S = -ntk grad_S L with an error that falls linearly with the step."""
    problem = registry.MODELS["rnn_cell"].problem(True)
    solution, optimizer = kp.solve(problem), OPTIMISERS[name](problem.cell, 1.0)
    flow = kp.linearize(solution, metric=metric_of(optimizer, problem.cell))
    residual = SMALL * torch.randn(solution.state.shape, generator=torch.Generator().manual_seed(5)).double()
    gradient, errors = flow.as_parameters(flow.J.T.mv(residual)), []
    for lr in (1e-4 / SMALL, 1e-5 / SMALL):
        optimizer = OPTIMISERS[name](problem.cell, 1.0)
        for parameter_name, parameter in problem.cell.named_parameters():
            parameter.grad = gradient[parameter_name].clone()
        predicted = -lr * flow.ntk.mv(residual)
        errors.append(float((moved(problem, optimizer, lr) - predicted).norm() / predicted.norm()))
    assert errors[1] < 1e-2
    assert errors[1] < 0.15 * errors[0]


@pytest.mark.slow
def test_a_step_of_adam_in_jax_moves_the_state_by_the_ntk() -> None:
    problem = jax_registry.MODELS["tanh_rnn"].problem(True)
    solution = kp.solve(problem)
    plain, residual = kp.linearize(solution), jax.random.normal(jax.random.key(3), solution.state.shape)
    second = {name: 0.1 + jnp.abs(value) for name, value in plain.parameters.items()}
    gradient, states, errors = plain.as_parameters(plain.J.T.mv(residual)), jax_registry.states_of(problem), []
    metric = kp.LearningRates.from_second_moment(second, 2.0, eps=1e-3)
    change = -preconditioned(plain, metric.preconditioner(plain.parameters)).ntk.mv(residual)
    for lr in (1e-4, 1e-5):
        stepped = {n: p - 2 * lr * gradient[n] / (second[n] ** 0.5 + 1e-3) for n, p in plain.parameters.items()}
        error = (states(stepped) - solution.state) / lr - change
        errors.append(float(jnp.linalg.norm(error) / jnp.linalg.norm(change)))
    assert errors[1] < 1e-2
    assert errors[1] < 0.15 * errors[0]


# Bad input


@pytest.mark.parametrize("rates", [0.0, -1.0, float("nan"), {"a": [0.1, 0.0]}, {"a": "fast"}, None])
def test_rates_that_are_not_positive(rates: object) -> None:
    with pytest.raises(ValueError, match="expected positive numbers"):
        kp.LearningRates(rates)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (kp.LearningRates({"weight_ih": 1.0, "bias_ih": 1.0}), "no learning rate for weight_hh, bias_hh"),
        (kp.LearningRates(dict.fromkeys(["weight_ih", "weight_hh", "bias_ih", "bias_hh"], np.ones(3))), "has shape"),
        (kp.KroneckerMetric({"weight": (np.eye(2), np.eye(2))}), "unknown parameters"),
        (kp.KroneckerMetric({"weight_hh": (np.eye(4), np.eye(3))}), "have sizes 4 and 3, expected 4 and 4"),
        (kp.Reparametrization({"weight": (torch.exp, torch.ones(2))}), "unknown parameters"),
        (kp.Reparametrization({"bias_hh": (torch.exp, torch.ones(4).double())}), "is not the parameter bias_hh"),
    ],
)
def test_metrics_of_other_parameters(metric: Metric, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kp.linearize(SOLUTIONS["torch_rnn"](), metric=metric)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (np.ones((2, 2)), "not symmetric and positive definite"),
        (np.array([[1.0, 0.5], [0.0, 1.0]]), "not symmetric and positive definite"),
        (np.full((2, 2), np.nan), "not symmetric and positive definite"),
        (np.ones((2, 3)), "expected a square matrix"),
    ],
)
def test_factors_that_are_no_metrics(factor: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"left factor of w.*{message}"):
        kp.KroneckerMetric({"w": (factor, np.eye(2))})
    with pytest.raises(ValueError, match="expected a pair"):
        kp.KroneckerMetric({"w": factor})


def test_optimisers_without_rates() -> None:
    cell = torch.nn.RNNCell(2, 3)
    for optimizer, kind, message in (
        (torch.optim.Adam(cell.parameters()), ValueError, "take a step first"),
        (torch.optim.SGD(cell.parameters(), maximize=True), ValueError, "uphill"),
        (torch.optim.Rprop(cell.parameters()), TypeError, "Rprop are not known, only those of SGD, Adam"),
    ):
        with pytest.raises(kind, match=message):
            kp.LearningRates.from_optimizer(optimizer, cell)
    with pytest.raises(TypeError, match="metric is 'adam'"):
        kp.linearize(SOLUTIONS["torch_rnn"](), metric="adam")


def test_a_flow_with_a_metric_is_not_truncated() -> None:
    with pytest.raises(ValueError, match="with a metric"):
        kp.linearize(SOLUTIONS["torch_rnn"](), metric=kp.LearningRates(1.0)).truncate()
