"""Models with their weights from torch to JAX and back."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
import torch
from torch import nn

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._jax.checks import as_jax, floating_leaves, with_parameters
from kpflow_dyn._shown import type_name
from kpflow_dyn.models import _torch_models as in_torch
from kpflow_dyn.models import jax as in_jax
from kpflow_dyn.models._plants import Plant

Values = dict[str, np.ndarray]


def to_jax(module: nn.Module) -> Any:
    """The JAX model of the same equation, weights and dtype as a torch module.

        nn.Linear, nn.GRUCell, nn.LSTMCell           eqx.nn.Linear, GRUCell, LSTMCell
        nn.Sequential of Linear and one nonlinearity eqx.nn.MLP
        nn.RNNCell, CTRNNCell, LowRankRNNCell        those of `kpflow_dyn.models.jax`
        MLPField, CTRNNField, HodgkinHuxleyField     those of `kpflow_dyn.models.jax`
        ClosedLoop of a plant and a policy above     the same

    A sum of two biases in nn.GRUCell and nn.LSTMCell is one bias in equinox (the reset gate multiplies the second bias
    of a GRU's new state, which stays apart as `bias_n`). The function is the same then, but an NTK counts one bias
    where it counted two. Which parameters are frozen is not carried over.

    Args:
        module: one of these, called on rows [trial, ...]; the model is called on one trial. It is on JAX's default
            device, and shares no memory with the module.

    Raises:
        TypeError: another module (a subclass is another one), or one of float64 while JAX rounds to float32.
        ValueError: an nn.Sequential that no eqx.nn.MLP is.

    >>> cell = torch.nn.GRUCell(3, 8)
    >>> found = to_jax(cell)(np.ones(3, "float32"), np.zeros(8, "float32"))
    >>> bool(np.allclose(found, cell(torch.ones(1, 3)).detach()[0], atol=1e-6))
    True
    """
    if type(module) is in_torch.ClosedLoop:
        return in_jax.ClosedLoop(_shared(module.plant), to_jax(module.policy))
    kind = _kind(module, "of_torch")
    values = {name: np.array(to_numpy(parameter)) for name, parameter in module.named_parameters()}
    options = kind.options(module, _has_bias(values))
    model = kind.of_jax(*options, key=jax.random.key(0))  # its weights are replaced
    values, names = kind.to_jax(values), {name: _dotted(name) for name in floating_leaves(model)}
    return with_parameters(model, {name: as_jax(values[dotted], name, "") for name, dotted in names.items()})


def to_torch(model: Any) -> nn.Module:
    """The torch module of the same equation, weights and dtype as a JAX model; the inverse of `to_jax`.

    eqx.nn.GRUCell and eqx.nn.LSTMCell have one bias where torch has two that add up: the second one is 0 then, but for
    the part that is `bias_n`.

    Args:
        model: one of the JAX models that `to_jax` gives, called on one trial; the module is called on rows
            [trial, ...], on the CPU.

    Raises:
        TypeError: another model (a subclass is another one).
        ValueError: an eqx.nn.MLP with scalars in the place of vectors, with scan=True, or with another nonlinearity
            than tanh, relu, sigmoid or silu.

    >>> import equinox as eqx, jax
    >>> to_torch(eqx.nn.MLP(2, 1, width_size=4, depth=1, activation=jax.numpy.tanh, key=jax.random.key(0)))
    Sequential(
      (0): Linear(in_features=2, out_features=4, bias=True)
      (1): Tanh()
      (2): Linear(in_features=4, out_features=1, bias=True)
    )
    """
    if type(model) is in_jax.ClosedLoop:
        return in_torch.ClosedLoop(_shared(model.plant), to_torch(model.policy))
    kind = _kind(model, "of_jax")
    values = {_dotted(name): np.array(leaf) for name, leaf in floating_leaves(model).items()}
    with torch.random.fork_rng(devices=[]):  # the weights that a module draws at the start are replaced
        module = kind.of_torch(*kind.options(model, _has_bias(values)))
    weights = {name: torch.from_numpy(value) for name, value in kind.to_torch(values).items()}
    module.load_state_dict(weights, strict=False, assign=True)
    return module


@dataclass(frozen=True)
class Kind:
    """A model in both frameworks, the options to make either of the other, and what becomes of the parameters."""

    of_torch: type[nn.Module]
    of_jax: type[Any]
    options: Callable[[Any, bool], tuple[Any, ...]]
    to_jax: Callable[[Values], Values] = dict
    to_torch: Callable[[Values], Values] = dict


def _kind(model: Any, side: str) -> Kind:
    found = next((kind for kind in KINDS if type(model) is getattr(kind, side)), None)
    if found is None:
        known = ", ".join(_name(getattr(kind, side)) for kind in KINDS)
        raise TypeError(
            f"{_name(type(model))} does not convert; what does: {known}, and a ClosedLoop of a plant and these"
        )
    return found


def _name(kind: type) -> str:
    return {"torch": "nn.", "equinox": "eqx.nn."}.get(kind.__module__.partition(".")[0], "") + kind.__name__


def _dotted(name: str) -> str:
    """A path in a pytree as torch spells it: layers[0].weight is layers.0.weight."""
    return re.sub(r"\[(\d+)\]", r".\1", name)


def _has_bias(values: Values) -> bool:
    return any(name.startswith("bias") for name in values)


def _shared(plant: Any) -> Plant:
    if not isinstance(plant, Plant):
        raise TypeError(
            f"the plant is {type_name(plant)}, expected one of kpflow_dyn.models or another derived from their "
            "Plant, to serve both frameworks; make a ClosedLoop of your plant for the other one, and of the converted "
            "policy"
        )
    return plant


def _one_bias(values: Values) -> Values:
    """Both biases of each gate summed, but of a GRU's third, where the reset gate multiplies the second bias."""
    if not _has_bias(values):
        return values
    first, second, (rows, hidden) = values.pop("bias_ih"), values.pop("bias_hh"), values["weight_hh"].shape
    summed = rows - hidden if rows == 3 * hidden else rows
    bias = np.r_[first[:summed] + second[:summed], first[summed:]]
    return {**values, "bias": bias, "bias_n": second[summed:]}


def _two_biases(values: Values) -> Values:
    if not _has_bias(values):
        return values
    bias = values.pop("bias")
    apart = values.pop("bias_n", bias[:0])
    return {**values, "bias_ih": bias, "bias_hh": np.r_[np.zeros(len(bias) - len(apart), bias.dtype), apart]}


def _leaky(cell: Any, bias: bool) -> tuple[Any, ...]:
    """Options of a leaky cell; a learnt leak is a weight, which is replaced."""
    rank, fixed = [cell.m.shape[1]] if hasattr(cell, "m") else [], cell.alpha is not None
    alpha = float(cell.alpha) if fixed else 0.5
    return cell.input_size, cell.hidden_size, *rank, alpha, not fixed, cell.nonlinearity


def _mlp_field(field: Any, bias: bool) -> tuple[Any, ...]:
    return field.units, field.layers[0].out_features, field.inputs, len(field.layers) - 1, field.nonlinearity


def _ctrnn_field(field: Any, bias: bool) -> tuple[Any, ...]:
    tau = field.tau.tolist() if isinstance(field.tau, torch.Tensor) else field.tau
    return len(field.b), _inputs(field), tau, 1.0, field.nonlinearity


def _inputs(field: Any) -> int:
    return 0 if field.U is None else field.U.shape[1]


def _linear(layer: Any, bias: bool) -> tuple[Any, ...]:
    if "scalar" in (layer.in_features, layer.out_features):
        raise ValueError(f"{layer} is on scalars and does not convert; make it with 1 in the place of 'scalar'")
    return layer.in_features, layer.out_features, bias


PHI: dict[type[nn.Module], tuple[Callable[..., Any], ...]] = {
    nn.Identity: (inspect.signature(eqx.nn.MLP).parameters["final_activation"].default,),
    nn.Tanh: (jax.numpy.tanh, jax.nn.tanh, jax.lax.tanh),
    nn.ReLU: (jax.nn.relu,),
    nn.Sigmoid: (jax.nn.sigmoid, jax.lax.logistic),
    nn.SiLU: (jax.nn.silu,),
}
"""Each nonlinearity of torch, and the functions that are the same in JAX; the first is taken."""


def _mlp(net: Any, bias: bool) -> tuple[Any, ...]:
    """Options of an eqx.nn.MLP, or the modules of an nn.Sequential."""
    return _modules(net) if isinstance(net, eqx.nn.MLP) else _perceptron(net)


def _perceptron(net: nn.Sequential) -> tuple[Any, ...]:
    linear, between = list[Any](net)[::2], list(net)[1::2]
    _check_mlp(net, linear, between)
    *hidden, last = linear
    phi, final = (*between[:1], nn.Identity())[0], (*between[len(hidden) :], nn.Identity())[0]
    sizes = linear[0].in_features, last.out_features, linear[0].out_features, len(hidden)
    biases = all(layer.bias is not None for layer in hidden), last.bias is not None
    return *sizes, PHI[type(phi)][0], PHI[type(final)][0], *biases


def _check_mlp(net: nn.Sequential, linear: list[Any], between: list[nn.Module]) -> None:
    fits = bool(linear) and all(type(layer) is nn.Linear for layer in linear) and all(type(f) in PHI for f in between)
    hidden = linear[:-1] if fits else []
    kinds = {(layer.out_features, layer.bias is None) for layer in hidden}
    if not fits or len(kinds) > 1 or len({type(phi) for phi in between[: len(hidden)]}) > 1:
        raise ValueError(
            f"no eqx.nn.MLP is this {net}; expected Linear layers, all hidden ones of one width and all with a bias or "
            f"none, and one of {', '.join(kind.__name__ for kind in PHI)} after each hidden one"
        )


def _modules(mlp: eqx.nn.MLP) -> tuple[nn.Module, ...]:
    if getattr(mlp, "scan", False):
        raise ValueError("an MLP with scan=True does not convert, since its layers are one array; make it without")
    phi, final = _nonlinearity(mlp.activation), _nonlinearity(mlp.final_activation)
    pairs = [(nn.Linear(*_linear(layer, layer.use_bias)), phi()) for layer in mlp.layers]
    last = [] if final is nn.Identity else [final()]
    return *[module for pair in pairs for module in pair][:-1], *last


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


def _gated(cell: Any, bias: bool) -> tuple[Any, ...]:
    return cell.input_size, cell.hidden_size, bias


KINDS = [
    Kind(nn.RNNCell, in_jax.RNNCell, lambda cell, bias: (*_gated(cell, bias), cell.nonlinearity)),
    Kind(nn.GRUCell, eqx.nn.GRUCell, _gated, _one_bias, _two_biases),
    Kind(nn.LSTMCell, eqx.nn.LSTMCell, _gated, _one_bias, _two_biases),
    Kind(in_torch.CTRNNCell, in_jax.CTRNNCell, _leaky),
    Kind(in_torch.LowRankRNNCell, in_jax.LowRankRNNCell, _leaky),
    Kind(nn.Linear, eqx.nn.Linear, _linear),
    Kind(nn.Sequential, eqx.nn.MLP, _mlp, _numbered, _spread),
    Kind(in_torch.MLPField, in_jax.MLPField, _mlp_field),
    Kind(in_torch.CTRNNField, in_jax.CTRNNField, _ctrnn_field),
    Kind(
        in_torch.HodgkinHuxleyField,
        in_jax.HodgkinHuxleyField,
        lambda field, bias: (len(field.W), _inputs(field), 0.1, field.axon),
    ),
]
