"""A convolution is a matrix of patches everywhere: in the cells of both frameworks as in networks."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from registry import dense_jacobian
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

CHANNELS, SIDE = 2, 3


class ConvCell(nn.Module):
    """z' = tanh(C * z + c + U x) on images of two channels, or `folded` on each of them by itself."""

    hidden_size = CHANNELS * SIDE**2

    def __init__(self, folded: bool) -> None:
        super().__init__()
        channels = 1 if folded else CHANNELS
        self.shape = (-1, channels, SIDE, SIDE)
        self.C = nn.Conv2d(channels, channels, 3, padding=1)
        self.U = nn.Linear(2, self.hidden_size, bias=False)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.C(z.reshape(self.shape)).reshape(z.shape) + self.U(x))


def check(flow: kp.Flow, J: np.ndarray) -> None:
    """The operators, and the core's spectrum from the variables alone."""
    near = {"rtol": 0, "atol": 1e-12 * np.abs(J @ J.T).max()}
    np.testing.assert_allclose(to_numpy(flow.J.dense()), J, **near)
    np.testing.assert_allclose(to_numpy(flow.J.T.dense()), J.T, **near)
    np.testing.assert_allclose(to_numpy((flow.P @ flow.K @ flow.P.T).dense()), J @ J.T, **near)
    np.testing.assert_allclose(to_numpy((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).dense()), J @ J.T, **near)
    spectrum = flow.core.spectrum()
    assert spectrum is not None
    claimed, dense = np.sort(np.repeat(*spectrum)), np.linalg.eigvalsh(to_numpy(flow.core.dense()))
    np.testing.assert_allclose(claimed, dense[-len(claimed) :], rtol=0, atol=1e-10 * dense.max())


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("largest", [2**24, 0], ids=["as a matrix", "as it is"])
def test_in_a_cell_of_torch(folded: bool, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kpflow_dyn._torch.plan.LARGEST_MATRIX", largest)
    torch.manual_seed(0)
    cell, x = ConvCell(folded).double(), torch.randn(2, 3, 2, dtype=torch.float64)
    z0 = torch.randn(2, cell.hidden_size, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, z0=z0)))
    sites = {site.name: site for site in flow.sites}
    assert {name: site.kind for name, site in sites.items()} == {"C.weight + C.bias": "matrix", "U.weight": "matrix"}
    patches = (
        nn.functional.unfold(z0.reshape(cell.shape), 3, padding=1).transpose(1, 2).reshape(2, -1, 9 * cell.shape[1])
    )
    assert float((sites["C.weight + C.bias"].inputs[:, 0, :, :-1] - patches).abs().max()) < 1e-14
    check(flow, dense_jacobian(flow).numpy())


class JaxConvCell(eqx.Module):
    """The same in one dimension, with two channels."""

    C: eqx.nn.Conv1d
    U: jax.Array

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.C(z.reshape(CHANNELS, -1)).reshape(-1) + self.U @ x)


@pytest.mark.usefixtures("x64")
def test_in_a_cell_of_jax() -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    convolution = eqx.nn.Conv1d(CHANNELS, CHANNELS, 3, stride=1, padding=1, key=keys[0])
    cell = JaxConvCell(convolution, jax.random.normal(keys[1], (8, 2)))
    x, z0 = jax.random.normal(keys[2], (2, 3, 2)), jax.random.normal(keys[3], (2, 8))
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, z0=z0)))
    assert {site.name: site.kind for site in flow.sites} == {"C.weight + C.bias": "matrix", "U": "matrix"}

    def states(cell: JaxConvCell) -> jax.Array:
        z, found = z0, []
        for x_t in x.swapaxes(0, 1):
            z = jax.vmap(cell)(x_t, z)
            found.append(z)
        return jnp.stack(found, 1)

    jacobian = jax.jacrev(states)(cell)
    by_name = {"C.weight": jacobian.C.weight, "C.bias": jacobian.C.bias, "U": jacobian.U}
    J = np.concatenate([np.reshape(by_name[name], (flow.J.codomain.size, -1)) for name in flow.parameters], 1)
    check(flow, J)
