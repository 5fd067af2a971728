"""Trials as one session: each against a plain loop of the user's own module over the trials."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kpflow_dyn as kp

LENGTHS = (5, 3, 4)
MASK = np.arange(5) < np.array(LENGTHS)[:, None]
MASK[1, 1] = False  # a step without a target, within a trial


@pytest.mark.parametrize("kind", [torch.nn.GRU, torch.nn.LSTM, torch.nn.RNN])
def test_the_states_are_those_of_a_loop_over_the_trials(kind: type[torch.nn.RNN]) -> None:
    torch.manual_seed(0)
    layer, x = kind(3, 4, num_layers=2, batch_first=True).double(), torch.randn(3, 5, 3, dtype=torch.float64)
    session = kp.solve(kp.carry_state(kp.DiscreteProblem(layer, x), MASK))
    carried = None
    for trial, length in enumerate(LENGTHS):
        out, carried = layer(x[trial : trial + 1, :length], carried)
        torch.testing.assert_close(session.state[trial, :length, 4:8], out[0].detach())
    assert not session.state.requires_grad


def test_the_kernel_takes_the_starts_as_given() -> None:
    torch.manual_seed(1)
    cell, x = torch.nn.GRUCell(2, 3).double(), torch.randn(2, 3, 2, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.carry_state(kp.DiscreteProblem(cell, x))))

    def states() -> torch.Tensor:
        rows, z = [], torch.zeros(3, dtype=torch.float64)
        for trial in x:
            z = z.detach()
            for u in trial:
                z = cell(u, z)
                rows.append(z)
        return torch.cat(rows)

    gradients = [torch.autograd.grad(entry, tuple(cell.parameters()), retain_graph=True) for entry in states()]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in gradients])
    torch.testing.assert_close(flow.ntk.dense(), J @ J.T)


def test_jax_carries_as_torch_does() -> None:
    jax, equinox = pytest.importorskip("jax"), pytest.importorskip("equinox")
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    cell = equinox.nn.GRUCell(2, 3, key=jax.random.key(1))
    session, z = kp.solve(kp.carry_state(kp.DiscreteProblem(cell, x), MASK)), jax.numpy.zeros(3)
    for trial, length in enumerate(LENGTHS):
        for step in range(length):
            z = cell(x[trial, step], z)
        np.testing.assert_allclose(session.state[trial, length - 1], z, atol=1e-6)


def test_what_cannot_be_carried_is_refused() -> None:
    cell, x = torch.nn.GRUCell(3, 4), torch.randn(2, 5, 3)
    with pytest.raises(TypeError, match=r"takes a recurrent network, a kp\.DiscreteProblem, got StaticProblem"):
        kp.carry_state(kp.StaticProblem(torch.nn.Linear(3, 4), x))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the start of this problem learns"):
        kp.carry_state(kp.DiscreteProblem(cell, x).learn_start())
    with pytest.raises(ValueError, match=r"the mask is \[2, 4\], expected \[trial, time\] = \[2, 5\]"):
        kp.carry_state(kp.DiscreteProblem(cell, x), np.ones((2, 4)))
