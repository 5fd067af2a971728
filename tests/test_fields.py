"""Fields of differential equations against their equations, and in torch against JAX."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import Array
from torch import Tensor, nn

import kpflow_dyn.models.jax as in_jax
from kpflow_dyn.models import CTRNNCell, CTRNNField, HodgkinHuxleyField, MLPField, SquidAxon
from kpflow_dyn.models._hodgkin_huxley import _exponential_ramp

T, KEY = torch.tensor(0.0), 5
PHI = {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0), "silu": lambda v: v / (1 + np.exp(-v))}
TAU = (0.1, 0.2, 0.3, 0.7)

OPTIONS = {
    "MLPField": {"units": 4, "hidden": 6, "depth": 2},
    "MLPField_shallow": {"units": 4, "hidden": 6, "nonlinearity": "silu"},
    "CTRNNField": {"units": 4, "tau": 0.1},
    "CTRNNField_units": {"units": 4, "tau": TAU, "nonlinearity": "relu"},
    "HodgkinHuxleyField": {"neurons": 3},
}
every_field = pytest.mark.parametrize("name", OPTIONS)
with_and_without_input = pytest.mark.parametrize("inputs", [0, 2])
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def jax_in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def make(name: str, inputs: int, dtype: torch.dtype = torch.float64) -> Any:
    """A torch field whose biases are not at zero."""
    torch.manual_seed(1)
    kind = {"MLPField": MLPField, "CTRNNField": CTRNNField, "HodgkinHuxleyField": HodgkinHuxleyField}
    field = kind[name.split("_")[0]](inputs=inputs, **OPTIONS[name])
    field = field.double() if dtype is torch.float64 else field
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    return field


def make_in_jax(name: str, inputs: int) -> Any:
    return getattr(in_jax, name.split("_")[0])(inputs=inputs, **OPTIONS[name], key=jax.random.key(KEY))


def twin(field: nn.Module, name: str, inputs: int) -> Any:
    """The JAX field of the same options, with the weights of the torch one, copied by name."""
    weights = {key: jnp.asarray(p.detach().numpy()) for key, p in field.named_parameters()}
    other = make_in_jax(name, inputs)
    named = {jax.tree_util.keystr(k, simple=True, separator="."): v for k, v in jax.tree.leaves_with_path(other)}
    assert {key: value.shape for key, value in named.items()} == {key: value.shape for key, value in weights.items()}
    return jax.tree.map_with_path(lambda k, v: weights[jax.tree_util.keystr(k, simple=True, separator=".")], other)


def draw(field: Any, inputs: int, trials: int = 5, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    torch.manual_seed(2)
    if isinstance(field, HodgkinHuxleyField):
        V = -90 + 140 * torch.rand(trials, field.neurons)
        z = torch.cat([V, torch.rand(trials, 4 * field.neurons)], 1)
    else:
        z = torch.randn(trials, field.units)
    return (z.to(dtype), torch.randn(trials, inputs, dtype=dtype)) if inputs else (z.to(dtype),)


def in_rows(field: Any) -> Any:
    """The JAX field on batches, as the torch one."""
    return eqx.filter_jit(lambda t, *arguments: jax.vmap(lambda *row: field(t, *row))(*arguments))


@every_field
@with_and_without_input
def test_torch_and_jax_agree_on_the_same_weights(name, inputs):
    field = make(name, inputs)
    arguments = draw(field, inputs)
    expected = in_rows(twin(field, name, inputs))(0.0, *(jnp.asarray(a.numpy()) for a in arguments))
    np.testing.assert_allclose(field(T, *arguments).detach(), expected, rtol=1e-12, atol=1e-12)


@every_field
@with_and_without_input
def test_torch_export_traces_one_row(name, inputs):
    field = make(name, inputs)
    arguments = draw(field, inputs)
    row = [a[:1] for a in arguments]
    traced = torch.export.export(field, (T, *row), strict=False).module()
    other = [a[1:2] for a in arguments]
    torch.testing.assert_close(traced(T, *other), field(T, *other))


@every_field
@with_and_without_input
def test_float32_stays_float32(name, inputs):
    field = make(name, inputs, torch.float32)
    arguments = draw(field, inputs, dtype=torch.float32)
    exact = field(T, *arguments).double()
    assert field(T, *arguments).dtype == torch.float32
    out = in_rows(twin(field, name, inputs))(0.0, *(jnp.asarray(a.numpy()) for a in arguments))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tau", [0.1, TAU])
def test_time_constants_are_exact_in_float64(tau):
    field = CTRNNField(4, tau=tau).double()
    assert field.tau.tolist() == (tau if isinstance(tau, float) else list(tau))
    assert "tau" in field.state_dict() and "tau" not in dict(field.named_parameters())


@pytest.mark.parametrize("nonlinearity", PHI)
@pytest.mark.parametrize("depth", [1, 3])
def test_mlp_is_its_equation(nonlinearity, depth):
    field = MLPField(3, hidden=5, inputs=2, depth=depth, nonlinearity=nonlinearity).double()
    z, x_t = draw(field, 2)
    assert len(field.layers) == depth + 1
    v = np.concatenate([z, x_t], 1)
    for i, layer in enumerate(field.layers):
        v = v @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        v = PHI[nonlinearity](v) if i < depth else v
    np.testing.assert_allclose(field(T, z, x_t).detach(), v, rtol=1e-12)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_an_euler_step_of_the_ctrnn_field_is_a_ctrnn_cell(nonlinearity):
    dt, tau = 0.05, 0.2
    cell = CTRNNCell(2, 4, alpha=dt / tau, nonlinearity=nonlinearity).double()
    field = CTRNNField(4, inputs=2, tau=tau, nonlinearity=nonlinearity).double()
    with torch.no_grad():
        cell.b += torch.randn(4)
    assert not field.load_state_dict({**cell.state_dict(), "tau": field.tau}, strict=False).missing_keys
    z, x_t = draw(field, 2)
    torch.testing.assert_close(z + dt * field(T, z, x_t), cell(x_t, z), rtol=1e-14, atol=1e-14)


def test_time_constants_act_unit_by_unit():
    slow, fast = make("CTRNNField_units", 2), make("CTRNNField_units", 2)
    fast.tau.fill_(1.0)
    z, x_t = draw(slow, 2)
    torch.testing.assert_close(slow(T, z, x_t) * torch.tensor(TAU).double(), fast(T, z, x_t), rtol=1e-6, atol=1e-6)


def test_gain_is_the_spectral_radius():
    torch.manual_seed(0)
    field = in_jax.CTRNNField(400, gain=1.5, key=jax.random.key(0))
    for weight in (CTRNNField(400, gain=1.5).W.detach().numpy(), np.asarray(field.W)):
        assert np.abs(np.linalg.eigvals(weight)).max() == pytest.approx(1.5, rel=0.1)


@every_field
def test_the_seed_or_key_gives_the_weights(name):
    first, second = make_in_jax(name, 2), make_in_jax(name, 2)
    assert eqx.tree_equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(make(name, 2).parameters(), make(name, 2).parameters(), strict=True))
    other = getattr(in_jax, name.split("_")[0])(inputs=2, **OPTIONS[name], key=jax.random.key(KEY + 1))
    assert not eqx.tree_equal(first, other)


@every_field
@with_and_without_input
def test_a_wrong_input_is_explained(name, inputs):
    field, other = make(name, inputs), make_in_jax(name, inputs)
    z, *_ = draw(field, 0)
    with pytest.raises(ValueError, match=f"x_t has 3 entries, expected {inputs}; give"):
        field(T, z, torch.zeros(5, 3))
    with pytest.raises(ValueError, match=f"x_t has 3 entries, expected {inputs}; give"):
        other(0.0, jnp.zeros(z.shape[1]), jnp.zeros(3))
    with pytest.raises(ValueError, match=rf"z has the shape \(5, {z.shape[1] + 1}\), expected a last axis of"):
        field(T, torch.zeros(5, z.shape[1] + 1), torch.zeros(5, inputs))
    if inputs:
        with pytest.raises(ValueError, match=r"x_t has 0 entries, expected 2; .* make the field with inputs=0"):
            field(T, z)


@pytest.mark.parametrize("module", ["torch", "jax"])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("MLPField", {"units": 0, "hidden": 3}, "units must be at least 1, got 0"),
        ("MLPField", {"units": 2, "hidden": 3, "depth": 0}, "depth must be at least 1, got 0"),
        ("MLPField", {"units": 2, "hidden": 3, "nonlinearity": "sin"}, r"one of \['relu', 'silu', 'tanh'\], got 'sin'"),
        ("CTRNNField", {"units": 2, "inputs": -1}, "inputs must be at least 0, got -1"),
        ("CTRNNField", {"units": 2, "tau": 0.0}, r"tau must be finite and > 0, got 0\.0"),
        ("CTRNNField", {"units": 2, "tau": [1.0, float("nan")]}, "tau must be finite and > 0"),
        (
            "CTRNNField",
            {"units": 2, "tau": [1.0] * 3},
            r"tau has the shape \(3,\), expected one number or one",
        ),
        ("CTRNNField", {"units": 2, "nonlinearity": "sin"}, "nonlinearity must be one of"),
        ("HodgkinHuxleyField", {"neurons": 0}, "neurons must be at least 1, got 0"),
    ],
)
def test_bad_options_are_explained(module, name, options, message):
    torch_kinds = {"MLPField": MLPField, "CTRNNField": CTRNNField, "HodgkinHuxleyField": HodgkinHuxleyField}
    with pytest.raises(ValueError, match=message):
        if module == "torch":
            torch_kinds[name](**options)
        else:
            getattr(in_jax, name)(**options, key=jax.random.key(0))


def test_only_the_weights_of_hodgkin_huxley_neurons_learn():
    assert [name for name, _ in HodgkinHuxleyField(3).named_parameters()] == ["W"]
    assert [name for name, _ in HodgkinHuxleyField(3, inputs=1).named_parameters()] == ["W", "U"]
    W = HodgkinHuxleyField(200, conductance=0.3).W.detach()
    assert W.min() >= 0
    np.testing.assert_allclose(W.sum(1), 0.3, rtol=0.2)


def original(z: np.ndarray, W: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Equations (12), (13), (20), (21), (23), (24), (26) of the paper: v is measured from rest, its sign turned."""
    V, m, h, n, s = np.split(z, 5)
    v = -(V + 65)
    alpha_n, beta_n = 0.01 * (v + 10) / (np.exp((v + 10) / 10) - 1), 0.125 * np.exp(v / 80)
    alpha_m, beta_m = 0.1 * (v + 25) / (np.exp((v + 25) / 10) - 1), 4 * np.exp(v / 18)
    alpha_h, beta_h = 0.07 * np.exp(v / 20), 1 / (np.exp((v + 30) / 10) + 1)
    ionic = 36 * n**4 * (v - 12) + 120 * m**3 * h * (v + 115) + 0.3 * (v + 10.613)
    synaptic = np.array([sum(W[i, j] * s[j] for j in range(len(V))) * (0 - V[i]) for i in range(len(V))])
    transmitter = 1 / (1 + np.exp(-(V - 2) / 5))
    return np.concatenate(
        [
            current + synaptic + ionic,
            alpha_m * (1 - m) - beta_m * m,
            alpha_h * (1 - h) - beta_h * h,
            alpha_n * (1 - n) - beta_n * n,
            1.1 * transmitter * (1 - s) - 0.19 * s,
        ]
    )


def test_neurons_obey_the_equations_of_the_paper():
    field = make("HodgkinHuxleyField", 2)
    z, x_t = draw(field, 2)
    W, U = field.W.detach().numpy(), field.U.detach().numpy()
    expected = [original(a, W, U @ b) for a, b in zip(z.numpy(), x_t.numpy(), strict=True)]
    np.testing.assert_allclose(field(T, z, x_t).detach(), expected, rtol=1e-11, atol=1e-11)


def test_rest_is_a_fixed_point_near_minus_65_mv():
    field = HodgkinHuxleyField(2).double()
    with torch.no_grad():
        field.W.zero_()
    rest = field.resting_state(trials=3)
    assert rest.shape == (3, 10) and rest.dtype == torch.float64
    assert rest[0, 0].item() == pytest.approx(-65, abs=0.01)
    torch.testing.assert_close(field(T, rest), torch.zeros(3, 10).double(), rtol=0, atol=1e-11)
    twin = in_jax.HodgkinHuxleyField(2, key=jax.random.key(0))
    np.testing.assert_array_equal(twin.resting_state(), rest[0])
    assert HodgkinHuxleyField(2).resting_state().dtype == torch.float32


@pytest.mark.slow
def test_synapses_hardly_move_the_rest():
    field = in_jax.HodgkinHuxleyField(5, key=jax.random.key(0))
    rest = field.resting_state()
    moved = rest - jnp.linalg.solve(jax.jit(jax.jacobian(lambda z: field(0.0, z)))(rest), field(0.0, rest))
    assert 0 < jnp.abs(moved - rest)[:5].max() < 1e-3


@eqx.filter_jit
def simulate(current: Array) -> Array:
    """The trajectory of one neuron over 500 ms under a step of current, every 0.05 ms."""
    field = in_jax.HodgkinHuxleyField(1, inputs=1, key=jax.random.key(0))
    field = eqx.tree_at(lambda f: (f.W, f.U), field, (jnp.zeros((1, 1)), jnp.ones((1, 1))))
    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, z, x: field(t, z, x)),
        diffrax.Tsit5(),
        0.0,
        500.0,
        0.01,
        field.resting_state(),
        args=current[None],
        saveat=diffrax.SaveAt(ts=jnp.arange(0.0, 500.0, 0.05)),
        stepsize_controller=diffrax.PIDController(rtol=1e-7, atol=1e-9),
        max_steps=100_000,
    ).ys


def spikes(V: Array) -> int:
    return int(((V[1:] > 0) & (V[:-1] <= 0)).sum())


@pytest.mark.slow
def test_a_step_of_current_makes_the_axon_fire():
    path = simulate(jnp.array(10.0))
    assert 60 <= spikes(path[:, 0]) / 0.5 <= 80
    assert -80 < path[:, 0].min() < -70 and 30 < path[:, 0].max() < 50
    assert path[:, 1:].min() >= 0 and path[:, 1:].max() <= 1
    assert path[:, 4].max() > 0.3


def test_without_current_it_rests_and_with_little_it_fires_once():
    rest = simulate(jnp.array(0.0))
    np.testing.assert_allclose(rest, jnp.broadcast_to(rest[0], rest.shape), rtol=1e-6, atol=1e-6)
    assert spikes(simulate(jnp.array(4.0))[:, 0]) == 1


def test_a_synapse_excites_or_inhibits_by_its_reversal_potential():
    for reversal in (0.0, -80.0):
        field = HodgkinHuxleyField(2, axon=SquidAxon(synaptic_reversal=reversal)).double()
        with torch.no_grad():
            field.W.copy_(torch.tensor([[0.0, 0.25], [0.0, 0.0]]))
        z = field.resting_state()
        z[0, 9] = 0.5  # the synapse of the second neuron, which only the first one listens to
        driven, other = field(T, z)[0, :2].tolist()
        assert driven == pytest.approx(0.25 * 0.5 * (reversal - z[0, 0].item()), rel=1e-9)
        assert other == pytest.approx(0, abs=1e-11)


RAMP = np.concatenate([np.linspace(-4, 4, 81), [0.2, -0.2, 0.19999, 0.20001, 1e-3, 1e-9, -1e-300]])


def integrals(order: int) -> np.ndarray:
    """The integral of s^order exp(-s y) over [0, 1] for each y: its reciprocal is the ramp where order is 0."""
    nodes, weights = np.polynomial.legendre.leggauss(30)
    s, w = (1 + nodes) / 2, weights / 2
    return np.exp(-np.outer(RAMP, s)) @ (w * s**order)


@forward_mode
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_ramp_and_its_derivatives_have_all_their_digits(mode):
    y, slope = torch.from_numpy(RAMP), integrals(1) / integrals(0) ** 2
    np.testing.assert_allclose(_exponential_ramp(RAMP), 1 / integrals(0), rtol=4e-15)
    ones = torch.ones_like(y)
    if mode == "forward":
        of_torch = torch.func.jvp(_exponential_ramp, (y,), (ones,))[1]
        of_jax = jax.jvp(_exponential_ramp, (jnp.asarray(RAMP),), (jnp.ones(len(RAMP)),))[1]
    else:
        of_torch = torch.func.vjp(_exponential_ramp, y)[1](ones)[0]
        of_jax = jax.vjp(_exponential_ramp, jnp.asarray(RAMP))[1](jnp.ones(len(RAMP)))[0]
    np.testing.assert_allclose(of_torch, slope, rtol=1e-13)
    np.testing.assert_allclose(of_jax, slope, rtol=1e-13)


@forward_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_voltages_are_regular_in_both_modes(dtype):
    """alpha_n(-55) = 0.1, alpha_n'(-55) = 0.005, alpha_m(-40) = 1, alpha_m'(-40) = 0.05, all of them 0/0 as written."""
    field = HodgkinHuxleyField(2).to(dtype)
    z = torch.tensor([[-55.0, -40.0, *[0.0] * 8]], dtype=dtype)
    other = twin_of_neurons(field)
    direction = torch.tensor([[1.0, 1.0, *[0.0] * 8]], dtype=dtype)
    exact = {2 + 1: (1.0, 0.05), 6: (0.1, 0.005)}
    for out, forward, jacobian in (torch_derivatives(field, z, direction), jax_derivatives(other, z, direction)):
        assert np.isfinite(out).all() and np.isfinite(forward).all() and np.isfinite(jacobian).all()
        np.testing.assert_allclose(jacobian @ direction[0].numpy(), forward, rtol=1e-5, atol=1e-5)
        for entry, (value, slope) in exact.items():
            np.testing.assert_allclose([out[entry], forward[entry]], [value, slope], rtol=1e-6)


def twin_of_neurons(field: HodgkinHuxleyField) -> in_jax.HodgkinHuxleyField:
    other = in_jax.HodgkinHuxleyField(field.neurons, key=jax.random.key(0))
    return eqx.tree_at(lambda f: f.W, other, jnp.asarray(field.W.detach().numpy()))


def torch_derivatives(field: nn.Module, z: Tensor, direction: Tensor) -> tuple[np.ndarray, ...]:
    """The value, a derivative by forward mode and the Jacobian by reverse mode."""
    out, forward = torch.func.jvp(lambda z: field(T, z), (z,), (direction,))
    jacobian = torch.func.jacrev(lambda z: field(T, z[None])[0])(z[0])
    return out[0].detach().numpy(), forward[0].detach().numpy(), jacobian.detach().numpy()


def jax_derivatives(field: Any, z: Tensor, direction: Tensor) -> tuple[np.ndarray, ...]:
    z, direction = jnp.asarray(z[0].numpy()), jnp.asarray(direction[0].numpy())

    @jax.jit
    def derivatives(z: Array) -> tuple[Array, Array, Array]:
        return *jax.jvp(lambda z: field(0.0, z), (z,), (direction,)), jax.jacrev(lambda z: field(0.0, z))(z)

    out, forward, jacobian = derivatives(z)
    return np.asarray(out), np.asarray(forward), np.asarray(jacobian)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacitance": 0.0}, "capacitance must be a finite number > 0"),
        ({"sodium_conductance": -1.0}, "sodium_conductance must be a finite number >= 0"),
        ({"leak_reversal": -80.0}, r"leak_reversal must lie between potassium_reversal = -77\.0 and"),
    ],
)
def test_constants_of_the_axon_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        SquidAxon(**options)
