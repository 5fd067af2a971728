"""Differentiable numbers of the kernel: against the operators, and their gradients against differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

H = 1e-5


def numbers(problem: Any, before: kp.Operator, probes: int | None) -> Any:
    of = kp.regularizers
    rank = of.effective_rank(problem, probes, seed=1)
    return of.trace(problem, probes, seed=1), rank, of.alignment(problem, before, probes, seed=1)


def torch_problem() -> kp.DiscreteProblem:
    torch.manual_seed(0)
    return kp.DiscreteProblem(nn.GRUCell(2, 3).double(), torch.randn(2, 4, 2, dtype=torch.float64))


def jax_problem() -> kp.DiscreteProblem:
    cell = eqx.nn.GRUCell(2, 3, key=jax.random.key(0))
    return kp.DiscreteProblem(cell, jax.random.normal(jax.random.key(1), (2, 4, 2)))


@pytest.mark.parametrize("make", [torch_problem, jax_problem])
def test_exact_ones_are_those_of_the_operators(make: Callable, x64: None) -> None:
    problem = make()
    ntk = kp.linearize(kp.solve(problem)).ntk
    other = kp.linearize(kp.solve(problem.remake(x=2 * problem.x))).ntk
    expected = kp.trace(ntk), kp.effective_rank(ntk), kp.alignment(ntk, other)
    for found, wanted in zip(numbers(problem, other, None), expected, strict=True):
        assert float(to_numpy(found)) == pytest.approx(wanted.value, rel=1e-9)


@pytest.mark.parametrize("probes", [None, 4])
def test_gradients_in_torch(probes: int | None) -> None:
    problem = torch_problem()
    cell, before = problem.cell, kp.linearize(kp.solve(problem.remake(x=2 * problem.x))).ntk
    direction = [torch.randn_like(p) for p in cell.parameters()]
    for which in range(3):
        value = numbers(problem, before, probes)[which]
        slopes = torch.autograd.grad(value, list(cell.parameters()))
        found, ends = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True)), []
        for sign in (1, -2):
            with torch.no_grad():
                for p, d in zip(cell.parameters(), direction, strict=True):
                    p += sign * H * d
            ends.append(numbers(problem, before, probes)[which].detach())
        with torch.no_grad():
            for p, d in zip(cell.parameters(), direction, strict=True):
                p += H * d
        assert float(found) == pytest.approx(float((ends[0] - ends[1]) / (2 * H)), rel=1e-5)


@pytest.mark.parametrize("probes", [None, 4])
def test_gradients_in_jax(probes: int | None, x64: None) -> None:
    problem = jax_problem()
    before = kp.linearize(kp.solve(problem.remake(x=2 * problem.x))).ntk
    arrays, rest = eqx.partition(problem.cell, eqx.is_inexact_array)
    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), arrays)

    @jax.jit
    def along(h: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda a, d: a + h * d, arrays, direction)
        return jnp.stack(numbers(problem.remake(cell=eqx.combine(moved, rest)), before, probes))

    zero = jnp.zeros(())
    found = jax.jvp(along, (zero,), (zero + 1,))[1]
    assert to_numpy(found) == pytest.approx(to_numpy((along(zero + H) - along(zero - H)) / (2 * H)), rel=1e-5)
    assert to_numpy(jax.jacrev(along)(zero)) == pytest.approx(to_numpy(found), rel=1e-9)


def test_probes_average_to_the_exact_ones() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double(), torch.randn(4, 2).double()
    problem = kp.StaticProblem(net, x)
    exact = kp.trace(kp.linearize(kp.solve(kp.StaticProblem(net, x, state=""))).ntk).value
    found = torch.stack([kp.regularizers.trace(problem, 8, seed) for seed in range(100)])
    assert kp.regularizers.trace(problem, None).item() == pytest.approx(exact, rel=1e-9)
    assert abs(found.mean().item() - exact) < 4 * found.std().item() / 10


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_probes_need_no_matrix_of_the_states(library: str) -> None:
    """Of these states it would take 1.6 TB."""
    if library == "torch":
        problem = kp.DiscreteProblem(nn.RNNCell(1, 16), torch.zeros(20_000, 2, 1))
    else:
        cell = eqx.nn.GRUCell(1, 16, key=jax.random.key(0))
        problem = kp.DiscreteProblem(cell, jnp.zeros((20_000, 2, 1)))
    assert kp.regularizers.trace(problem, probes=2) > 0


def test_bad_requests() -> None:
    problem = torch_problem()
    with pytest.raises(ValueError, match="at least 2"):
        kp.regularizers.trace(problem, probes=1)
    with pytest.raises(TypeError, match="expected a DiscreteProblem"):
        kp.regularizers.trace(problem.cell)
    space = kp.Space(("unit",), (3,), problem.x)
    with pytest.raises(ValueError, match="the states have 24 entries"):
        kp.regularizers.alignment(problem, kp.MatrixOperator(torch.eye(3).double(), space, space, symmetric=True))


@pytest.mark.parametrize("make", [torch_problem, jax_problem])
def test_under_a_loss_they_are_those_of_the_gauss_newton_matrix(make: Callable, x64: None) -> None:
    """Against dense J and the Hessian of torch's own cross-entropy, and by probes in the mean."""
    problem, right = make(), torch.tensor([[0, 1, 2, 0], [-100, 2, 2, 1]])
    flow = kp.linearize(kp.solve(problem))
    J, state = torch.tensor(to_numpy(flow.J.dense())), torch.tensor(to_numpy(flow.solution.state))
    loss = kp.cross_entropy(right if make is torch_problem else jnp.asarray(right.numpy()))
    of_rows = lambda rows: nn.functional.cross_entropy(rows.reshape(8, 3), right.reshape(8))  # noqa: E731
    values = torch.linalg.eigvalsh(J.T @ torch.func.hessian(of_rows)(state.reshape(-1)) @ J)
    trace, rank = (of(problem, None, loss=loss) for of in (kp.regularizers.trace, kp.regularizers.effective_rank))
    assert float(to_numpy(trace)) == pytest.approx(values.sum().item(), rel=1e-9)
    assert float(to_numpy(rank)) == pytest.approx((values.sum() ** 2 / (values**2).sum()).item(), rel=1e-9)
    found = [float(to_numpy(kp.regularizers.trace(problem, 16, seed, loss))) for seed in range(40)]
    assert abs(np.mean(found) - values.sum().item()) < 4 * np.std(found) / 40**0.5


def test_the_gradient_under_a_loss() -> None:
    problem, loss = torch_problem(), kp.cross_entropy(torch.tensor([[0, 1, 2, 0], [1, 2, 2, 1]]))
    cell, ends = problem.cell, []
    direction = [torch.randn_like(p) for p in cell.parameters()]
    slopes = torch.autograd.grad(kp.regularizers.trace(problem, 4, loss=loss), list(cell.parameters()))
    found = sum((g * d).sum() for g, d in zip(slopes, direction, strict=True))
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(cell.parameters(), direction, strict=True):
                p += sign * H * d
        ends.append(kp.regularizers.trace(problem, 4, loss=loss).item())
    assert found.item() == pytest.approx((ends[0] - ends[1]) / (2 * H), rel=1e-6)
