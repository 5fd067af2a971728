"""What the models of one framework are in the other: how to make them, and which of their parameters are the same."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from torch import nn

from kpflow_dyn.models import _torch_cells as torch_cells
from kpflow_dyn.models import _torch_fields as torch_fields
from kpflow_dyn.models import jax as in_jax

Values = dict[str, np.ndarray]

PHI: dict[type[nn.Module], tuple[Callable[..., Any], ...]] = {
    nn.Identity: (inspect.signature(eqx.nn.MLP).parameters["final_activation"].default,),
    nn.Tanh: (jax.numpy.tanh, jax.nn.tanh, jax.lax.tanh),
    nn.ReLU: (jax.nn.relu,),
    nn.Sigmoid: (jax.nn.sigmoid, jax.lax.logistic),
    nn.SiLU: (jax.nn.silu,),
}
"""Each nonlinearity of torch, and the functions that are the same in JAX; the first is taken."""


@dataclass(frozen=True)
class Kind:
    """A model in both frameworks: how each is made of the other's options, and what becomes of the parameters."""

    of_torch: type[nn.Module]
    of_jax: type[eqx.Module]
    make_jax: Callable[[Any], Any]
    make_torch: Callable[[Any], nn.Module]
    to_jax: Callable[[Values], Values] = dict
    to_torch: Callable[[Values], Values] = dict


def _key() -> jax.Array:
    return jax.random.key(0)  # for weights that are replaced


def _bias_of_lstm(values: Values) -> Values:
    if "bias_ih" not in values:
        return values
    first, second = values.pop("bias_ih"), values.pop("bias_hh")
    return {**values, "bias": first + second}


def _biases_of_lstm(values: Values) -> Values:
    if "bias" not in values:
        return values
    bias = values.pop("bias")
    return {**values, "bias_ih": bias, "bias_hh": np.zeros_like(bias)}


def _biases_of_gru(values: Values) -> Values:
    """Of the gates r, z, n the first two sum both biases; in the third, r multiplies the second bias."""
    if "bias_ih" not in values:
        return values
    first, second = values.pop("bias_ih"), values.pop("bias_hh")
    gates = 2 * len(second) // 3
    return {**values, "bias": np.r_[first[:gates] + second[:gates], first[gates:]], "bias_n": second[gates:]}


def _biases_of_torch_gru(values: Values) -> Values:
    if "bias" not in values:
        return values
    bias, bias_n = values.pop("bias"), values.pop("bias_n")
    return {**values, "bias_ih": bias, "bias_hh": np.r_[np.zeros(2 * len(bias_n), bias.dtype), bias_n]}


def _sizes(cell: Any) -> tuple[int, int]:
    return cell.input_size, cell.hidden_size


def _leak(cell: Any) -> dict[str, Any]:
    """Options of a leaky cell; a learnt leak is a weight, which is replaced."""
    fixed = cell.alpha is not None
    return {"alpha": float(cell.alpha) if fixed else 0.5, "learn_alpha": not fixed, "nonlinearity": cell.nonlinearity}


def _phi(field: Any) -> str:
    return next(name for name, function in torch_fields.PHI.items() if function is field.phi)


def _mlp_field_in_torch(field: Any) -> nn.Module:
    hidden, depth = field.layers[0].weight.shape[0], len(field.layers) - 1
    return torch_fields.MLPField(field.units, hidden, field.inputs, depth, field.nonlinearity)


def _mlp_field_in_jax(field: Any) -> Any:
    hidden, depth = field.layers[0].out_features, len(field.layers) - 1
    return in_jax.MLPField(field.units, hidden, field.inputs, depth, _phi(field), key=_key())


def _inputs(field: Any) -> int:
    return 0 if field.U is None else field.U.shape[1]


def _mlp_in_jax(net: nn.Sequential) -> eqx.nn.MLP:
    linear, between = list[Any](net)[::2], list(net)[1::2]
    _check_mlp(net, linear, between)
    hidden = linear[:-1]
    phi, final = (*between[:1], nn.Identity())[0], (*between[len(hidden) :], nn.Identity())[0]
    return eqx.nn.MLP(
        linear[0].in_features,
        linear[-1].out_features,
        width_size=linear[0].out_features,
        depth=len(hidden),
        activation=PHI[type(phi)][0],
        final_activation=PHI[type(final)][0],
        use_bias=all(layer.bias is not None for layer in hidden),
        use_final_bias=linear[-1].bias is not None,
        key=_key(),
    )


def _check_mlp(net: nn.Sequential, linear: list[Any], between: list[nn.Module]) -> None:
    fits = bool(linear) and all(type(layer) is nn.Linear for layer in linear) and all(type(f) in PHI for f in between)
    hidden = linear[:-1] if fits else []
    kinds = {(layer.out_features, layer.bias is None) for layer in hidden}
    if not fits or len(kinds) > 1 or len({type(phi) for phi in between[: len(hidden)]}) > 1:
        raise ValueError(
            f"no eqx.nn.MLP is this {net}; expected Linear layers, all hidden ones of one width and all with a bias or "
            f"none, and one of {', '.join(kind.__name__ for kind in PHI)} after each hidden one"
        )


def _mlp_in_torch(mlp: eqx.nn.MLP) -> nn.Sequential:
    if getattr(mlp, "scan", False):
        raise ValueError("an MLP with scan=True does not convert, since its layers are one array; make it without")
    phi, final = _nonlinearity(mlp.activation), _nonlinearity(mlp.final_activation)
    pairs = [(_linear_in_torch(layer), phi()) for layer in mlp.layers]
    last = [] if final is nn.Identity else [final()]
    return nn.Sequential(*[module for pair in pairs for module in pair][:-1], *last)


def _linear_in_torch(layer: eqx.nn.Linear) -> nn.Linear:
    if layer.in_features == "scalar" or layer.out_features == "scalar":
        raise ValueError(f"{layer} is on scalars and does not convert; make it with 1 in the place of 'scalar'")
    return nn.Linear(layer.in_features, layer.out_features, bias=layer.use_bias)


def _nonlinearity(function: Any) -> type[nn.Module]:
    found = next((kind for kind, functions in PHI.items() if any(function is same for same in functions)), None)
    if found is None:
        raise ValueError(f"the MLP's nonlinearity is {function}, expected jax.nn.tanh, relu, sigmoid or silu")
    return found


def _numbered(values: Values) -> Values:
    """Of an nn.Sequential, whose every second module is a layer."""
    return {re.sub(r"^\d+", lambda at: f"layers.{int(at[0]) // 2}", name): value for name, value in values.items()}


def _spread(values: Values) -> Values:
    return {re.sub(r"^layers\.(\d+)", lambda at: str(2 * int(at[1])), name): value for name, value in values.items()}


KINDS = [
    Kind(
        nn.RNNCell,
        in_jax.RNNCell,
        lambda cell: in_jax.RNNCell(*_sizes(cell), cell.bias, cell.nonlinearity, key=_key()),
        lambda cell: nn.RNNCell(*_sizes(cell), cell.bias_ih is not None, cell.nonlinearity),
    ),
    Kind(
        nn.GRUCell,
        eqx.nn.GRUCell,
        lambda cell: eqx.nn.GRUCell(*_sizes(cell), cell.bias, key=_key()),
        lambda cell: nn.GRUCell(*_sizes(cell), cell.use_bias),
        _biases_of_gru,
        _biases_of_torch_gru,
    ),
    Kind(
        nn.LSTMCell,
        eqx.nn.LSTMCell,
        lambda cell: eqx.nn.LSTMCell(*_sizes(cell), cell.bias, key=_key()),
        lambda cell: nn.LSTMCell(*_sizes(cell), cell.use_bias),
        _bias_of_lstm,
        _biases_of_lstm,
    ),
    Kind(
        torch_cells.CTRNNCell,
        in_jax.CTRNNCell,
        lambda cell: in_jax.CTRNNCell(*_sizes(cell), **_leak(cell), key=_key()),
        lambda cell: torch_cells.CTRNNCell(*_sizes(cell), **_leak(cell)),
    ),
    Kind(
        torch_cells.LowRankRNNCell,
        in_jax.LowRankRNNCell,
        lambda cell: in_jax.LowRankRNNCell(*_sizes(cell), cell.m.shape[1], **_leak(cell), key=_key()),
        lambda cell: torch_cells.LowRankRNNCell(*_sizes(cell), cell.m.shape[1], **_leak(cell)),
    ),
    Kind(
        nn.Linear,
        eqx.nn.Linear,
        lambda layer: eqx.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, key=_key()),
        _linear_in_torch,
    ),
    Kind(nn.Sequential, eqx.nn.MLP, _mlp_in_jax, _mlp_in_torch, _numbered, _spread),
    Kind(torch_fields.MLPField, in_jax.MLPField, _mlp_field_in_jax, _mlp_field_in_torch),
    Kind(
        torch_fields.CTRNNField,
        in_jax.CTRNNField,
        lambda field: in_jax.CTRNNField(
            field.units, field.inputs, field.tau.tolist(), nonlinearity=_phi(field), key=_key()
        ),
        lambda field: torch_fields.CTRNNField(len(field.b), _inputs(field), field.tau, nonlinearity=field.nonlinearity),
    ),
    Kind(
        torch_fields.HodgkinHuxleyField,
        in_jax.HodgkinHuxleyField,
        lambda field: in_jax.HodgkinHuxleyField(field.neurons, field.inputs, axon=field.axon, key=_key()),
        lambda field: torch_fields.HodgkinHuxleyField(len(field.W), _inputs(field), axon=field.axon),
    ),
]
