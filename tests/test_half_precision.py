"""Models in bfloat16 and float16: states in their own precision, operators in float32."""

from __future__ import annotations

import copy
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import eps_of, to_numpy

HALF = [torch.bfloat16, torch.float16]


def assert_backward(flow: kp.Flow, model: nn.Module, states: Callable[[nn.Module], Tensor], tolerance: float) -> None:
    """J* q against backward() through a model."""
    q = torch.randn(tuple(flow.ntk.domain.shape))
    outputs = states(model)
    (outputs * q.reshape(outputs.shape).to(outputs.dtype)).sum().backward()
    found = flow.as_parameters(flow.J.T.mv(q))
    expected = {name: p.grad for name, p in model.named_parameters()}
    size = max(float(g.abs().max()) for g in expected.values())
    assert max(float((found[name] - g).abs().max()) for name, g in expected.items()) < tolerance * size


def check(problem: kp.Problem, states: Callable[[nn.Module], Tensor]) -> None:
    """To float32's rounding those of the same module in float32, and to its own those of the module."""
    model, solution = problem.model, kp.solve(problem)
    flow = kp.linearize(solution)
    assert solution.state.dtype == next(model.parameters()).dtype and flow.ntk.domain.like.dtype == torch.float32
    assert flow.untraced == "" and flow.sites
    assert_backward(flow, copy.deepcopy(model).float(), states, 1e-5)
    assert_backward(flow, model, states, 10 * eps_of(solution.state))
    assert all(p.dtype == solution.state.dtype for p in model.parameters())


@pytest.mark.parametrize("dtype", HALF)
def test_cells(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 2).to(dtype)

    def states(cell: nn.Module) -> Tensor:
        own = next(cell.parameters()).dtype
        z, found = torch.zeros(3, 4, dtype=own), []
        for x_t in x.to(own).unbind(1):
            z = cell(x_t, z)
            found.append(z)
        return torch.stack(found, 1)

    check(kp.DiscreteProblem(nn.GRUCell(2, 4).to(dtype), x), states)


@pytest.mark.parametrize("dtype", HALF)
def test_networks(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, net = torch.randint(0, 7, (3, 5)), nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3), nn.Tanh())
    check(kp.StaticProblem(net.to(dtype), x, ""), lambda net: net(x))


def test_states_that_half_precision_carries_away_are_refused() -> None:
    class Chaotic(nn.Module):
        hidden_size = 2

        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(3.9))

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return self.rate * (z + x) * (1 - z - x)

    x = torch.cat([torch.full((2, 1, 2), 0.3), torch.zeros(2, 60, 2)], 1).bfloat16()
    with pytest.raises(ValueError, match="solve in float32"):
        kp.linearize(kp.solve(kp.DiscreteProblem(Chaotic().bfloat16(), x)))


def test_in_jax() -> None:
    cell = eqx.nn.GRUCell(2, 4, key=jax.random.key(0))
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if eqx.is_array(a) else a, cell)
    x = jax.random.normal(jax.random.key(1), (3, 5, 2)).astype(jnp.bfloat16)
    solution = kp.solve(kp.DiscreteProblem(half, x))
    flow = kp.linearize(solution)
    again = jax.tree.map(lambda a: a.astype(jnp.float32) if eqx.is_array(a) else a, half)
    expected = kp.linearize(kp.solve(kp.DiscreteProblem(again, x.astype(jnp.float32))))
    assert solution.state.dtype == jnp.bfloat16 and flow.untraced == ""
    q = jax.random.normal(jax.random.key(2), flow.ntk.domain.shape)
    assert abs(to_numpy(flow.ntk.mv(q)) - to_numpy(expected.ntk.mv(q))).max() < 1e-6
