"""Models converted between the frameworks: the same functions and weights, in their dtype, and the same NTK."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._problems.parameters import parameters_of
from kpflow_dyn.models import (
    ClosedLoop,
    CTRNNCell,
    CTRNNField,
    HodgkinHuxleyField,
    LowRankRNNCell,
    MLPField,
    Pendulum,
    to_jax,
    to_torch,
)
from kpflow_dyn.models import jax as in_jax

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, INPUTS, UNITS, KEY = 4, 3, 5, 7


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1))


CELLS = {
    "rnn": lambda: nn.RNNCell(INPUTS, UNITS),
    "rnn relu": lambda: nn.RNNCell(INPUTS, UNITS, bias=False, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(INPUTS, UNITS),
    "gru without biases": lambda: nn.GRUCell(INPUTS, UNITS, bias=False),
    "lstm": lambda: nn.LSTMCell(INPUTS, UNITS),
    "lstm without biases": lambda: nn.LSTMCell(INPUTS, UNITS, bias=False),
    "ctrnn": lambda: CTRNNCell(INPUTS, UNITS, alpha=0.1, nonlinearity="relu"),
    "ctrnn learnt": lambda: CTRNNCell(INPUTS, UNITS, alpha=0.3, learn_alpha=True),
    "lowrank": lambda: LowRankRNNCell(INPUTS, UNITS, rank=2, alpha=0.2),
    "lowrank learnt": lambda: LowRankRNNCell(INPUTS, UNITS, rank=2, learn_alpha=True),
}
NETS = {
    "linear": lambda: nn.Linear(2, 4),
    "linear without bias": lambda: nn.Linear(2, 4, bias=False),
    "mlp": mlp,
    "mlp of one layer": lambda: nn.Sequential(nn.Linear(2, 3, bias=False)),
    "mlp to the last": lambda: nn.Sequential(nn.Linear(2, 4, bias=False), nn.SiLU(), nn.Linear(4, 2), nn.Sigmoid()),
    "mlp relu": lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2, bias=False)),
}
FIELDS = {
    "mlp field": lambda: MLPField(UNITS, hidden=4, inputs=INPUTS, depth=2, nonlinearity="silu"),
    "ctrnn field": lambda: CTRNNField(UNITS, inputs=INPUTS, tau=[0.1, 0.2, 0.3, 0.4, 0.5]),
    "ctrnn field relu": lambda: CTRNNField(UNITS, inputs=INPUTS, tau=0.1, nonlinearity="relu"),
    "hodgkin huxley": lambda: HodgkinHuxleyField(1, inputs=INPUTS),
    "closed loop": lambda: ClosedLoop(Pendulum(damping=0.2), mlp()),
}
ALL = {**CELLS, **NETS, **FIELDS}
QUICK = ["rnn", "gru", "lstm", "ctrnn", "lowrank learnt", "linear", "mlp to the last", "ctrnn field", "closed loop"]


def made(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = ALL[name]().to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def rows(*widths: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.rand(TRIALS, width, dtype=dtype) for width in widths]


def arguments(name: str, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Rows of what a model takes, the time of a field apart."""
    if name in NETS:
        return rows(2, dtype=dtype)
    if name == "closed loop":
        return rows(2, dtype=dtype)
    if name in FIELDS:
        return rows(UNITS, INPUTS, dtype=dtype)
    x, h, c = rows(INPUTS, UNITS, UNITS, dtype=dtype)
    return [x, (h, c)] if name.startswith("lstm") else [x, h]


def outputs(name: str, model: Any, dtype: torch.dtype = torch.float64) -> list[np.ndarray]:
    """What a model of either framework makes of the same rows."""
    given = arguments(name, dtype)
    before = (torch.tensor(0.0),) if name in FIELDS else ()
    if isinstance(model, nn.Module):
        found = model(*before, *given)
    else:
        arrays = jax.tree.map(lambda row: jnp.asarray(row.numpy()), given)
        found = eqx.filter_jit(jax.vmap(lambda *row: model(*(0.0 for _ in before), *row)))(*arrays)
    return [np.asarray(part.detach() if isinstance(part, torch.Tensor) else part) for part in jax.tree.leaves(found)]


@pytest.mark.parametrize("name", cases(ALL, QUICK))
def test_a_converted_model_is_the_same_function(name: str) -> None:
    model = made(name)
    found, expected = outputs(name, to_jax(model)), outputs(name, model)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", cases(ALL, QUICK))
def test_there_and_back_in_either_dtype(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        model = made(name, dtype)
        state = torch.random.get_rng_state()
        first = to_jax(model)
        back = to_torch(first)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert type(back) is type(model) and str(back) == str(model)
        assert {parameter.dtype for parameter in back.parameters()} == {dtype}
        assert all(parameter.requires_grad for parameter in back.parameters())
        again = to_jax(back)
        assert jax.tree.structure(again) == jax.tree.structure(first)
        for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
            assert one is other or (one.dtype == other.dtype and np.array_equal(one, other))
        if not name.startswith(("gru", "lstm")):
            known = parameters_of(back)
            assert all(torch.equal(known[key], value) for key, value in parameters_of(model).items())


@pytest.mark.parametrize("kind", ["GRUCell", "LSTMCell"])
def test_cells_of_equinox_come_back_as_they_were(kind: str) -> None:
    cell = getattr(eqx.nn, kind)(INPUTS, UNITS, key=jax.random.key(KEY))
    name = kind.removesuffix("Cell").lower()
    for one, other in zip(outputs(name, to_torch(cell)), outputs(name, cell), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
    assert eqx.tree_equal(to_jax(to_torch(cell)), cell)


@pytest.mark.parametrize("activation", cases(["tanh", "relu", "sigmoid", "silu"], ["silu"]))
def test_an_mlp_of_equinox_converts(activation: str) -> None:
    phi = getattr(jax.nn, activation)
    net = eqx.nn.MLP(2, 3, 4, 2, activation=phi, final_activation=jax.nn.sigmoid, key=jax.random.key(KEY))
    np.testing.assert_allclose(outputs("mlp", to_torch(net))[0], outputs("mlp", net)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["rnn", "gru without biases", "ctrnn learnt", "lowrank"])
def test_nothing_is_shared(name: str) -> None:
    model = made(name)
    there = to_jax(model)
    before = {key: np.array(value) for key, value in parameters_of(there).items()}
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert all(np.array_equal(value, before[key]) for key, value in parameters_of(there).items())
    for parameter in to_torch(there).parameters():
        nn.init.zeros_(parameter)
    assert all(np.array_equal(value, before[key]) for key, value in parameters_of(there).items())


@pytest.mark.parametrize(
    "name", cases(["rnn", "ctrnn learnt", "lowrank", "gru without biases"], ["rnn", "ctrnn learnt"])
)
def test_the_ntk_is_the_same(name: str) -> None:
    cell, x = made(name), torch.randn(2, 3, INPUTS, dtype=torch.float64)
    in_torch = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    there = kp.linearize(kp.solve(kp.DiscreteProblem(to_jax(cell), jnp.asarray(x.numpy()))))
    np.testing.assert_allclose(there.ntk.dense(), in_torch.ntk.dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_two_biases_that_become_one_count_once() -> None:
    cell, x = made("gru"), torch.randn(2, 3, INPUTS, dtype=torch.float64)
    both = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    gates = both.only(lambda name: name != "bias_hh").ntk.dense()
    one = kp.linearize(kp.solve(kp.DiscreteProblem(to_jax(cell), jnp.asarray(x.numpy()))))
    only = both.only({"bias_hh": torch.arange(3 * UNITS) >= 2 * UNITS}).ntk.dense()
    np.testing.assert_allclose(one.ntk.dense(), gates + only, rtol=1e-10, atol=1e-12)


def test_what_does_not_convert_is_told_what_does() -> None:
    with pytest.raises(TypeError, match=r"nn.GRU does not convert; what does: nn.RNNCell, .*CTRNNField.*ClosedLoop"):
        to_jax(nn.GRU(2, 3))
    with pytest.raises(TypeError, match=r"eqx.nn.Conv1d does not convert; what does: RNNCell, eqx.nn.GRUCell"):
        to_torch(eqx.nn.Conv1d(1, 1, 1, key=jax.random.key(0)))
    with pytest.raises(TypeError, match=r"eqx.nn.Linear does not convert"):
        to_jax(eqx.nn.Linear(1, 1, key=jax.random.key(0)))
    with pytest.raises(TypeError, match=r"the plant is function, expected one of kpflow_dyn.models"):
        to_jax(ClosedLoop(lambda z, u: z, nn.Linear(2, 1)))


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [nn.Tanh()],
        [nn.Linear(2, 3), nn.Linear(3, 1)],
        [nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 1)],
        [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)],
        [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1)],
        [nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 1)],
    ],
)
def test_a_sequential_that_no_mlp_is(layers: list[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"no eqx.nn.MLP is this Sequential"):
        to_jax(nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": jnp.sin}, r"nonlinearity is .*, expected jax.nn.tanh"),
        ({"in_size": "scalar"}, "make it with 1 in the place of 'scalar'"),
        ({"depth": 3, "scan": True}, "scan=True does not convert"),
    ],
)
def test_an_mlp_that_torch_has_not(options: dict[str, Any], message: str) -> None:
    sizes = {"in_size": 2, "out_size": 1, "width_size": 3, "depth": 1}
    net = eqx.filter_eval_shape(lambda: eqx.nn.MLP(**sizes | options, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=message):
        to_torch(net)


def test_float64_needs_jax_in_float64() -> None:
    with jax.enable_x64(False), pytest.raises(TypeError, match="weight is float64, but JAX would round it"):
        to_jax(nn.Linear(2, 1).double())


@pytest.mark.parametrize("kind", [in_jax.RNNCell, in_jax.CTRNNCell, in_jax.LowRankRNNCell])
def test_cells_in_jax_check_their_options(kind: Any) -> None:
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"hidden_size must be at least 1, got 0|between 1 and hidden_size"):
        kind(2, 0, key=key)
    with pytest.raises(ValueError, match=r"one of \['relu', 'tanh'\], got 'sin'"):
        kind(2, 3, nonlinearity="sin", key=key)


@pytest.mark.parametrize("kind", [in_jax.CTRNNCell, in_jax.LowRankRNNCell])
def test_leaks_in_jax(kind: Any) -> None:
    cell = kind(2, 3, alpha=0.3, learn_alpha=True, key=jax.random.key(0))
    np.testing.assert_allclose(jax.nn.sigmoid(cell.alpha_logit), np.full(3, 0.3))
    with pytest.raises(ValueError, match="cannot start at 1"):
        kind(2, 3, alpha=1.0, learn_alpha=True, key=jax.random.key(0))
    assert kind(2, 3, key=jax.random.key(0)).alpha == 0.1
    small = jax.tree.map(lambda leaf: leaf.astype("float32"), kind(2, 3, key=jax.random.key(0)))
    assert small(jnp.zeros(2, "float32"), jnp.zeros(3, "float32")).dtype == jnp.float32


def test_start_of_the_cells_in_jax() -> None:
    key = jax.random.key(0)
    radius = np.abs(np.linalg.eigvals(in_jax.CTRNNCell(1, 300, gain=1.5, key=key).W)).max()
    assert radius == pytest.approx(1.5, rel=0.1)
    plain = np.array(in_jax.RNNCell(4, 100, key=key).weight_hh)
    assert 0.0999 < np.abs(plain).max() <= 0.1 and plain.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)
    assert in_jax.LowRankRNNCell(1, 300, rank=2, key=key).m.std() == pytest.approx(1, rel=0.1)
