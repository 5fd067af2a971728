"""Cells that call a solver of ODEs inside, in both frameworks."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torchdiffeq import odeint

import kpflow_dyn as kp

pytestmark = pytest.mark.usefixtures("x64")


class Cell(nn.Module):
    """z_t is where z' = f(z) + U x_t is after a time of 0.2."""

    def __init__(self, method: str, one_by_one: bool = False) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
        self.U = nn.Linear(1, 2).double()
        self.method, self.one_by_one = method, one_by_one

    def forward(self, x, z):
        if self.one_by_one:
            return torch.cat([self.solved(x[n : n + 1], z[n : n + 1]) for n in range(len(z))])
        return self.solved(x, z)

    def solved(self, x, z):
        drive, times = self.U(x), torch.tensor([0.0, 0.2], dtype=torch.float64)
        return odeint(lambda t, z: self.f(z) + drive, z, times, method=self.method)[-1]


def posed(cell) -> kp.DiscreteProblem:
    x = torch.randn(3, 3, 1, dtype=torch.float64)
    return kp.DiscreteProblem(cell, x, torch.randn(3, 2, dtype=torch.float64))


@pytest.mark.parametrize(("method", "one_by_one"), [("rk4", False), ("dopri5", True)])
@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
def test_torchdiffeq_inside_of_a_cell(method: str, one_by_one: bool) -> None:
    cell = Cell(method, one_by_one)
    problem = posed(cell)
    flow = kp.linearize(kp.solve(problem))
    assert one_by_one or not flow.untraced
    z, states = problem.z0, []
    for x in problem.x.unbind(1):
        states.append(z := cell(x, z))
    q = torch.randn(3, 3, 2, dtype=torch.float64)
    gradients = torch.autograd.grad(torch.stack(states, 1), list(cell.parameters()), q)
    found = flow.as_parameters(flow.J.T.mv(q))
    for (name, _), gradient in zip(cell.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12)
    kp.check_adjoint(flow.J)


def test_steps_that_are_chosen_for_all_trials_at_once_are_refused() -> None:
    with pytest.raises(ValueError, match="an adaptive ODE solver that chooses its steps for all of them"):
        kp.linearize(kp.solve(posed(Cell("dopri5"))))


class JaxCell(eqx.Module):
    W: jax.Array
    adaptive: bool = eqx.field(static=True)

    def __call__(self, x, z):
        field = diffrax.ODETerm(lambda t, z, args: jnp.tanh(self.W @ z) - z + x)
        if not self.adaptive:
            adjoint = diffrax.DirectAdjoint()
            return diffrax.diffeqsolve(field, diffrax.Midpoint(), 0.0, 0.2, 0.1, z, max_steps=4, adjoint=adjoint).ys[0]
        control = diffrax.PIDController(rtol=1e-8, atol=1e-10)
        return diffrax.diffeqsolve(field, diffrax.Tsit5(), 0.0, 0.2, None, z, stepsize_controller=control).ys[0]


@pytest.mark.parametrize("adaptive", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::kpflow_dyn.UntracedWarning")
def test_diffrax_inside_of_a_cell(adaptive: bool) -> None:
    numbers = np.random.default_rng(0)
    x, z0, q = (jnp.asarray(numbers.standard_normal(shape)) for shape in ((2, 2, 2), (2, 2), (2, 2, 2)))
    cell = JaxCell(jnp.asarray(numbers.standard_normal((2, 2))), adaptive)

    def states(W):
        z, found = z0, []
        for n in range(2):
            found.append(z := jax.vmap(JaxCell(W, adaptive))(x[:, n], z))
        return jnp.stack(found, 1)

    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, z0)))
    gradient = jax.grad(lambda W: (states(W) * q).sum())(cell.W)
    np.testing.assert_allclose(flow.as_parameters(flow.J.T.mv(q))["W"], gradient, rtol=1e-8)
    kp.check_adjoint(flow.J)
