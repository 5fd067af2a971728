"""A start z_0 that learns, an encoder that is part of the cell and a readout: their kernel against dense Jacobians."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
from synthetic import assert_close
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kpflow_dyn as kp


class Encoded(nn.Module):
    """A cell that reads its inputs through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell, self.hidden_size = nn.Linear(2, 3), nn.GRUCell(3, 4), 4

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.cell(torch.tanh(self.encoder(x)), z)


def test_start_encoder_and_readout_learn_together() -> None:
    torch.manual_seed(0)
    cell, readout = Encoded().double(), nn.Linear(4, 2).double()
    x, z0 = torch.randn(2, 4, 2, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, z0).learn_start()))

    def outputs(values: dict[str, Tensor], start: Tensor, C: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        z, states = start.expand(2, -1), []
        for x_t in x.unbind(1):
            z = functional_call(cell, values, (x_t, z))
            states.append(z)
        state = torch.stack(states, 1)
        return state, state @ C.T + c

    values = {name: value.detach() for name, value in cell.named_parameters()}
    args = (values, z0, readout.weight.detach(), readout.bias.detach())
    assert_close(flow.solution.state, outputs(*args)[0])
    of_state, of_output = jacrev(outputs, (0, 1, 2, 3))(*args)

    def kernel(jacobians: tuple, size: int) -> Tensor:
        parts = [j.reshape(size, -1) for j in (*jacobians[0].values(), *jacobians[1:])]
        return torch.cat(parts, 1) @ torch.cat(parts, 1).T

    assert_close(flow.ntk.dense(), kernel(of_state[:2], 32))
    assert_close((flow.P @ flow.K @ flow.P.T).dense(), kernel(of_state[:2], 32))
    assert_close(flow.output(readout, learn=True).ntk.dense(), kernel(of_output, 16))


def test_of_tuples_and_layers() -> None:
    torch.manual_seed(0)
    layers, x = nn.LSTM(3, 2, num_layers=2).double(), torch.randn(3, 4, 3, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(layers, x).learn_start()), params="z0")

    def states(z: Tensor) -> Tensor:
        rows = z.expand(3, -1).reshape(3, 2, 2, 2).permute(1, 2, 0, 3).contiguous()  # [h or c, layer, trial, unit]
        return layers(x.transpose(0, 1), (rows[0], rows[1]))[0].transpose(0, 1)

    J = jacrev(states)(torch.zeros(8, dtype=torch.float64)).reshape(-1, 8)
    top = flow.J.dense().reshape(3, 4, 8, 8)[:, :, 2:4].reshape(-1, 8)  # the upper layer's h
    assert_close(top, J)


def test_in_jax(x64: None) -> None:
    cell = eqx.nn.GRUCell(2, 3, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (2, 4, 2))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, jnp.ones(3)).learn_start()), params="z0")

    def states(z0: jax.Array) -> jax.Array:
        step = jax.vmap(cell)
        z, found = jnp.broadcast_to(z0, (2, 3)), []
        for t in range(4):
            z = step(x[:, t], z)
            found.append(z)
        return jnp.stack(found, 1)

    assert_close(flow.J.dense(), jax.jacobian(states)(jnp.ones(3)).reshape(-1, 3))


def test_a_start_of_each_trial_is_refused() -> None:
    with pytest.raises(ValueError, match="differs between trials"):
        kp.DiscreteProblem(nn.RNNCell(2, 3), torch.ones(2, 4, 2), torch.eye(3)[:2]).learn_start()
