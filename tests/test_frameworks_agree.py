"""The same weights in torch and in JAX give the same states, operators, eigenvalues and partial traces, in float64."""

from __future__ import annotations

from collections.abc import Callable

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.models import ClosedLoop, MLPField, Pendulum
from kpflow_dyn.models.jax import MLPField as JaxMLPField

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, INPUTS, UNITS = 3, 2, 4
GRID = np.array([0.0, 0.1, 0.3, 0.4, 0.7, 1.0])
THIRDS = np.array([1, 3, 3, 1]) / 8


class RungeKutta4(diffrax.AbstractERK):
    """The 3/8 rule, which is torchdiffeq's rk4."""

    tableau = diffrax.ButcherTableau(
        c=np.array([1 / 3, 2 / 3, 1]),
        a_lower=(np.array([1 / 3]), np.array([-1 / 3, 1]), np.array([1.0, -1.0, 1.0])),
        b_sol=THIRDS,
        b_error=THIRDS - np.array([0, 0, 1, 0]),
    )
    interpolation_cls = staticmethod(diffrax.ThirdOrderHermitePolynomialInterpolation.from_k)

    def order(self, terms: object) -> int:
        return 4


class TorchRNN(eqx.Module):
    """nn.RNNCell."""

    weight_ih: jax.Array
    weight_hh: jax.Array
    bias_ih: jax.Array
    bias_hh: jax.Array

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.weight_ih @ x + self.bias_ih + self.weight_hh @ z + self.bias_hh)


class TorchGRU(TorchRNN):
    """nn.GRUCell."""

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        r_x, u_x, n_x = jnp.split(self.weight_ih @ x + self.bias_ih, 3)
        r_z, u_z, n_z = jnp.split(self.weight_hh @ z + self.bias_hh, 3)
        update = jax.nn.sigmoid(u_x + u_z)
        return (1 - update) * jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_z) * n_z) + update * z


class TorchLSTM(TorchRNN):
    """nn.LSTMCell."""

    def __call__(self, x: jax.Array, z: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        gates = self.weight_ih @ x + self.bias_ih + self.weight_hh @ z[0] + self.bias_hh
        i, f, g, o = jnp.split(gates, 4)
        c = jax.nn.sigmoid(f) * z[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c


def cells(torch_cell: type[nn.Module], jax_cell: type[TorchRNN], parts: int = 1) -> tuple[kp.Flow, kp.Flow]:
    torch.manual_seed(1)
    cell = torch_cell(INPUTS, UNITS).double()
    x, z0 = torch.randn(TRIALS, 5, INPUTS).double(), [torch.randn(TRIALS, UNITS).double() for _ in range(parts)]
    twin = jax_cell(**{name: jnp.asarray(p.detach().numpy()) for name, p in cell.named_parameters()})
    starts = [jnp.asarray(part.numpy()) for part in z0]
    ours = kp.DiscreteProblem(cell, x, tuple(z0) if parts > 1 else z0[0])
    theirs = kp.DiscreteProblem(twin, jnp.asarray(x.numpy()), tuple(starts) if parts > 1 else starts[0])
    return kp.linearize(kp.solve(ours)), kp.linearize(kp.solve(theirs))


def equinox_cell(torch_cell: type[nn.Module], jax_cell: Callable, parts: int = 1) -> tuple[kp.Flow, kp.Flow]:
    """Equinox has other biases than torch, so without any."""
    torch.manual_seed(2)
    cell = torch_cell(INPUTS, UNITS, bias=False).double()
    twin = jax_cell(INPUTS, UNITS, use_bias=False, key=jax.random.key(0))
    where = lambda c: (c.weight_ih, c.weight_hh)  # noqa: E731
    twin = eqx.tree_at(where, twin, tuple(jnp.asarray(p.detach().numpy()) for p in where(cell)))
    x = torch.randn(TRIALS, 5, INPUTS).double()
    jax_x = jnp.asarray(x.numpy())
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))), kp.linearize(kp.solve(kp.DiscreteProblem(twin, jax_x)))


def fields(torch_alg: str, jax_alg: diffrax.AbstractSolver, t: object, steps: object) -> tuple[kp.Flow, kp.Flow]:
    torch.manual_seed(3)
    field = MLPField(UNITS, 5, inputs=INPUTS).double()
    twin = copied(field, JaxMLPField(UNITS, 5, inputs=INPUTS, key=jax.random.key(0)))
    z0, x = torch.randn(TRIALS, UNITS).double(), torch.randn(TRIALS, len(GRID), INPUTS).double()
    ours = kp.ODEProblem(field, z0, t, (GRID, x))
    theirs = kp.ODEProblem(twin, jnp.asarray(z0.numpy()), t, (GRID, jnp.asarray(x.numpy())))
    return solved(ours, torch_alg, steps), solved(theirs, jax_alg, steps)


def copied(field: nn.Module, twin: eqx.Module) -> eqx.Module:
    """The JAX twin with the weights of the torch field."""
    weights = {name: jnp.asarray(p.detach().numpy()) for name, p in field.named_parameters()}
    paths, tree = jax.tree_util.tree_flatten_with_path(twin)
    names = [jax.tree_util.keystr(path).replace("[", ".").replace("]", "").removeprefix(".") for path, _ in paths]
    return jax.tree_util.tree_unflatten(tree, [weights.get(n, leaf) for n, (_, leaf) in zip(names, paths, strict=True)])


def solved(problem: kp.ODEProblem, alg: object, steps: object) -> kp.Flow:
    return kp.linearize(kp.solve(problem, alg, steps=steps))


def pendulum() -> tuple[kp.Flow, kp.Flow]:
    torch.manual_seed(4)
    policy = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    keys = jax.random.split(jax.random.key(0))
    layers = [eqx.nn.Linear(2, 5, key=keys[0]), eqx.nn.Lambda(jnp.tanh), eqx.nn.Linear(5, 1, key=keys[1])]
    for i in (0, 2):
        values = jnp.asarray(policy[i].weight.detach().numpy()), jnp.asarray(policy[i].bias.detach().numpy())
        layers[i] = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layers[i], values)
    z0, plant = torch.randn(TRIALS, 2).double(), Pendulum(damping=0.1)
    ours = kp.ODEProblem(ClosedLoop(plant, policy), z0, GRID)
    theirs = kp.ODEProblem(ClosedLoop(plant, eqx.nn.Sequential(layers)), jnp.asarray(z0.numpy()), GRID)
    return solved(ours, "rk4", GRID), solved(theirs, RungeKutta4(), GRID)


PAIRS = {
    "rnn": lambda: cells(nn.RNNCell, TorchRNN),
    "gru": lambda: cells(nn.GRUCell, TorchGRU),
    "lstm": lambda: cells(nn.LSTMCell, TorchLSTM, parts=2),
    "equinox_gru": lambda: equinox_cell(nn.GRUCell, eqx.nn.GRUCell),
    "equinox_lstm": lambda: equinox_cell(nn.LSTMCell, eqx.nn.LSTMCell),
    "mlp_rk4": lambda: fields("rk4", RungeKutta4(), GRID, GRID),
    "mlp_dopri5": lambda: fields("dopri5", diffrax.Dopri5(), GRID, GRID),
    "mlp_dopri5_span": lambda: fields("dopri5", diffrax.Dopri5(), (0.0, 1.0), GRID),
    "pendulum": pendulum,
}


QUICK = {"gru", "equinox_lstm", "pendulum"}


@pytest.fixture(scope="module", params=cases(PAIRS, QUICK))
def flows(request: pytest.FixtureRequest, x64: None) -> tuple[kp.Flow, kp.Flow]:
    return PAIRS[request.param]()


def assert_same(ours: Tensor, theirs: jax.Array) -> None:
    ours, theirs = ours.detach().numpy(), np.asarray(theirs)
    assert theirs.dtype == np.float64
    np.testing.assert_allclose(theirs, ours, rtol=1e-10, atol=1e-10 * abs(ours).max())


def test_states(flows: tuple[kp.Flow, kp.Flow]) -> None:
    assert_same(flows[0].solution.state, flows[1].solution.state)


@pytest.mark.parametrize("name", ["P", "K", "ntk"])
def test_operators(flows: tuple[kp.Flow, kp.Flow], name: str) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, *flows[0].ntk.domain.shape, dtype=torch.float64)
    ours, theirs = (getattr(flow, name) for flow in flows)
    for a, b in ((ours, theirs), (ours.T, theirs.T)):
        assert_same(a.mv(q), b.mv(jnp.asarray(q.numpy())))


def test_eigenvalues(flows: tuple[kp.Flow, kp.Flow]) -> None:
    ours, theirs = (kp.eigs(flow.ntk, k=4).values for flow in flows)
    assert_same(ours, theirs)


@pytest.mark.parametrize("keep", ["time", "unit", "trial"])
def test_partial_traces(flows: tuple[kp.Flow, kp.Flow], keep: str) -> None:
    ours, theirs = (kp.partial_trace(flow.ntk, keep=keep).matrix for flow in flows)
    assert_same(ours, theirs)


def test_core_spectra(flows: tuple[kp.Flow, kp.Flow]) -> None:
    """Sites may be cut differently, but the core's nonzero eigenvalues are the same."""
    ours, theirs = (np.sort(np.repeat(*flow.core.spectrum()))[::-1] for flow in flows)
    np.testing.assert_allclose(ours.sum(), theirs.sum(), rtol=1e-10)
    size = min(len(ours), len(theirs))
    np.testing.assert_allclose(ours[:size], theirs[:size], atol=1e-10 * ours[0])
