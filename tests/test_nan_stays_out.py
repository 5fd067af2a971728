"""NaN where nothing counts changes no number, and is named where it would."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import kpflow_dyn as kp


def masked() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, the same with NaN, and the mask of what counts."""
    targets = np.random.default_rng(0).standard_normal((4, 5, 1))
    mask = np.ones((4, 5))
    mask[:, :2] = 0
    return targets, np.where(mask[..., None] > 0, targets, np.nan), mask


def test_the_squared_error_and_its_gradient_in_torch() -> None:
    targets, holed, mask = masked()
    readout, state = nn.Linear(6, 1).double(), torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    losses = [kp.squared_error(torch.tensor(y), readout, mask=mask) for y in (targets, holed)]
    (first, a), (second, b) = ((loss(state), torch.autograd.grad(loss(state), state)[0]) for loss in losses)
    expected = (torch.tensor(mask)[..., None] * (readout(state) - torch.tensor(targets)) ** 2).sum() / mask.sum()
    assert first.item() == second.item() == pytest.approx(expected.item()) and torch.equal(a, b)


def test_the_squared_error_and_its_gradient_in_jax() -> None:
    targets, holed, mask = masked()
    readout = eqx.nn.Linear(6, 1, key=jax.random.key(0))
    state = jax.random.normal(jax.random.key(1), (4, 5, 6))
    losses = [kp.squared_error(jnp.asarray(y), readout, mask=mask) for y in (targets, holed)]
    (first, a), (second, b) = (jax.value_and_grad(loss)(state) for loss in losses)
    assert math.isfinite(first) and float(first) == float(second) and bool((a == b).all())


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_training_on_targets_with_holes(framework: str) -> None:
    targets, holed, mask = masked()
    x, losses = np.random.default_rng(1).standard_normal((4, 5, 2)), []
    for y in (targets, holed):
        torch.manual_seed(0)
        cell, readout = nn.RNNCell(2, 6), nn.Linear(6, 1)
        if framework == "jax":
            cell, readout = eqx.nn.GRUCell(2, 6, key=jax.random.key(0)), eqx.nn.Linear(6, 1, key=jax.random.key(1))
        task = kp.tasks.TaskData(x, y, mask > 0)
        losses.append(kp.train.fit(cell, task, readout, steps=3, lr=0.01).losses)
    assert np.isfinite(losses[0]).all()
    np.testing.assert_array_equal(*losses)
    with pytest.raises(ValueError, match="NaN or infinity"):
        kp.tasks.TaskData(x, holed)


def test_forecasts_of_targets_with_holes() -> None:
    targets, holed, mask = masked()
    torch.manual_seed(0)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(nn.RNNCell(2, 6).double(), torch.randn(4, 5, 2).double())))
    y = flow.output(nn.Linear(6, 1).double())
    ours, theirs = (kp.forecast(y, torch.tensor(t), lr=0.01, steps=20, mask=mask).loss for t in (targets, holed))
    np.testing.assert_array_equal(ours, theirs)
    tables = [kp.learnability(y, {"y": torch.tensor(t)}, mask=mask) for t in (targets, holed)]
    assert tables[0].score == tables[1].score and tables[0].half == tables[1].half
    with pytest.raises(ValueError, match="finite numbers"):
        kp.forecast(y, torch.tensor(holed), lr=0.01, steps=20)


def test_a_jacobian_of_nan_is_named() -> None:
    class Guarded(nn.Module):
        hidden_size = 2

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            length = (z**2).sum(1, keepdim=True).sqrt()
            return 0.5 * torch.where(length > 0, z / length, torch.zeros_like(z)) + 0 * x

    problem = kp.DiscreteProblem(Guarded(), torch.zeros(2, 4, 1).double(), torch.ones(2, 2).double())
    starts = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double()
    with pytest.raises(ValueError, match=r"Jacobian at start 1, z = \[0. 0.\], holds NaN"):
        kp.dynamics.fixed_points(problem, starts=starts)


def test_a_zero_gramian_has_no_angles() -> None:
    sol = kp.solve(kp.DiscreteProblem(nn.RNNCell(3, 8).double(), torch.randn(2, 5, 3).double()))
    learning = kp.modes(kp.linearize(sol).ntk, axis="unit", k=2)
    ltv = kp.control.linearize_ltv(sol)
    still = dataclasses.replace(ltv, B=0 * ltv.B)
    found = kp.control.reachable_angles(learning, kp.control.gram(still, "c"))
    assert np.isnan(found.angles).all() and np.isnan(found.share).all()
    assert np.isfinite(kp.control.reachable_angles(learning, kp.control.gram(sol, "c")).angles).all()


@pytest.mark.parametrize("scale", [1e-170, 1.0, 1e170])
def test_the_participation_ratio_at_any_scale(scale: float) -> None:
    circle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    states = scale * np.stack([np.cos(circle), np.sin(circle), 0 * circle], -1)[None]
    assert float(kp.dynamics.participation_ratio(states)) == pytest.approx(2.0)
