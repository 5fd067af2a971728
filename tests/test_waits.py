"""Work that takes long says so beforehand; what is short, or a part of other work, says nothing. Less to compile."""

from __future__ import annotations

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._progress import one_by_one, quietly
from kpflow_dyn._torch.rows import jacobians


class Clock:
    """One on which each look is so many seconds later."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def worked(seconds: float, count: int = 6) -> list[int]:
    with one_by_one("trials", range(count), Clock(seconds)) as pieces:
        return list(pieces)


def test_long_work_says_beforehand_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    assert worked(3.0) == list(range(6))
    assert "4 trials left, about 3.0 s each: about 12 s" in capsys.readouterr().err
    worked(120.0, 2)  # already the first one tells much
    assert "1 trial left, about 2.0 min each" in capsys.readouterr().err


def test_short_work_and_parts_of_other_work_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    worked(0.1)
    with quietly():
        worked(300.0)
    with one_by_one("checkpoints", range(4), Clock(30.0)) as pieces:
        for piece in pieces:
            if piece == 3:
                worked(300.0)
    assert "trials" not in capsys.readouterr().err


def ball(trials: int) -> kp.ODEProblem:
    class Fall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gravity = nn.Parameter(torch.tensor(9.81, dtype=torch.float64))

        def forward(self, t: Tensor, z: Tensor) -> Tensor:
            return torch.stack([z[:, 1], -self.gravity * torch.ones_like(z[:, 1])], -1)

    ground = kp.models.Event(lambda t, z: z[:, 0], lambda t, z: z * torch.tensor([1.0, -0.8]).to(z), direction=-1)
    start = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(trials, 1)
    return kp.ODEProblem(kp.models.Hybrid(Fall(), ground), start, [0.0, 0.3, 0.6])


def test_trials_that_are_solved_one_by_one_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kpflow_dyn.ode._hybrid.one_by_one", partial(one_by_one, clock=Clock(6.0)))
    kp.solve(ball(4))
    assert "2 trials left, about 6.0 s each: about 12 s" in capsys.readouterr().err
    kp.gradient_flow(kp.solve(ball(2)), lambda z: (z**2).mean(), span=1e-3)
    assert not capsys.readouterr().err


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("probes", [1, 100, 101])  # two trials ride with 80 probes at once
def test_blocks_of_any_length_are_each_probe_by_itself(probes: int) -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 5, 3)))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(eqx.nn.GRUCell(3, 4, key=jax.random.key(0)), x)))
    for op in (flow.ntk, flow.K, flow.P, flow.P.T, flow.J.T):
        q = jnp.asarray(rng.standard_normal((probes, *op.domain.shape)))
        whole, picked = op.mv(q), sorted({0, probes // 2, probes - 1})
        for n in picked:
            np.testing.assert_allclose(whole[n], op.mv(q[n]), rtol=0, atol=1e-12 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize("sinks", [2, 9])
def test_dense_derivatives_by_reverse_and_by_forward_mode(sinks: int) -> None:
    rng = torch.Generator().manual_seed(0)
    x, z, a, W = (
        torch.randn(*n, dtype=torch.float64, generator=rng) for n in ((3, 2, 1), (3, 2, 2), (3, 2, 4), (sinks, 6))
    )

    def function(x: Tensor, z: Tensor, a: Tensor) -> list[Tensor]:
        return [torch.tanh(W @ torch.cat([z, a]) * x)]

    ((of_z, of_a),) = jacobians(function, x, z, a, sinks)
    for at in np.ndindex(3, 2):
        expected = torch.autograd.functional.jacobian(lambda *za, at=at: function(x[at], *za)[0], (z[at], a[at]))
        torch.testing.assert_close((of_z[at], of_a[at]), expected, rtol=0, atol=1e-14)
