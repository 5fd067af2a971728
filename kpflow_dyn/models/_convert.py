"""Models with their weights from torch to JAX and back."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import nn

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._jax.checks import as_jax, floating_leaves, with_parameters
from kpflow_dyn.models import _torch_fields as torch_fields
from kpflow_dyn.models import jax as in_jax
from kpflow_dyn.models._counterparts import KINDS, Kind
from kpflow_dyn.models._plants import Plant


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
        module: one of these, called on rows [trial, ...].

    Returns:
        The model, called on one trial, on JAX's default device; it shares no memory with the module.

    Raises:
        TypeError: another module (a subclass is another one), or one of float64 while JAX rounds to float32.
        ValueError: an nn.Sequential that no eqx.nn.MLP is.

    Example:
        >>> cell = torch.nn.GRUCell(3, 8)
        >>> found = to_jax(cell)(np.ones(3, "float32"), np.zeros(8, "float32"))
        >>> bool(np.allclose(found, cell(torch.ones(1, 3)).detach()[0], atol=1e-6))
        True
    """
    if type(module) is torch_fields.ClosedLoop:
        return in_jax.ClosedLoop(_shared(module.plant), to_jax(module.policy))
    kind = _kind(module, "of_torch")
    values = {name: np.array(to_numpy(parameter)) for name, parameter in module.named_parameters()}
    return _with_values_in_jax(kind.make_jax(module), kind.to_jax(values))


def to_torch(model: Any) -> nn.Module:
    """The torch module of the same equation, weights and dtype as a JAX model; the inverse of `to_jax`.

    eqx.nn.GRUCell and eqx.nn.LSTMCell have one bias where torch has two that add up: the second one is 0 then, but for
    the part that is `bias_n`.

    Args:
        model: one of the JAX models that `to_jax` gives, called on one trial.

    Returns:
        The module, called on rows [trial, ...], on the CPU.

    Raises:
        TypeError: another model (a subclass is another one).
        ValueError: an eqx.nn.MLP with scalars in the place of vectors, with scan=True, or with another nonlinearity
            than tanh, relu, sigmoid or silu.

    Example:
        >>> import equinox as eqx, jax
        >>> to_torch(eqx.nn.MLP(2, 1, width_size=4, depth=1, activation=jax.numpy.tanh, key=jax.random.key(0)))
        Sequential(
          (0): Linear(in_features=2, out_features=4, bias=True)
          (1): Tanh()
          (2): Linear(in_features=4, out_features=1, bias=True)
        )
    """
    if type(model) is in_jax.ClosedLoop:
        return torch_fields.ClosedLoop(_shared(model.plant), to_torch(model.policy))
    kind = _kind(model, "of_jax")
    values = {_dotted(name): np.array(leaf) for name, leaf in floating_leaves(model).items()}
    with torch.random.fork_rng(devices=[]):  # the weights that a module draws at the start are replaced
        module = kind.make_torch(model)
    weights = {name: torch.from_numpy(value) for name, value in kind.to_torch(values).items()}
    module.load_state_dict(weights, strict=False, assign=True)
    return module


def _kind(model: Any, side: str) -> Kind:
    found = next((kind for kind in KINDS if type(model) is getattr(kind, side)), None)
    if found is None:
        known = ", ".join(_name(getattr(kind, side)) for kind in KINDS)
        raise TypeError(
            f"{_name(type(model))} does not convert; what does: {known}, and a ClosedLoop of a plant and these"
        )
    return found


def _name(kind: type) -> str:
    library = {"torch": "nn.", "equinox": "eqx.nn."}.get(kind.__module__.partition(".")[0], "")
    return library + kind.__name__


def _with_values_in_jax(model: Any, values: dict[str, np.ndarray]) -> Any:
    names = floating_leaves(model)
    return with_parameters(model, {name: as_jax(values[_dotted(name)], name, "") for name in names})


def _dotted(name: str) -> str:
    """A path in a pytree as torch spells it: layers[0].weight is layers.0.weight."""
    return re.sub(r"\[(\d+)\]", r".\1", name)


def _shared(plant: Any) -> Plant:
    if not isinstance(plant, Plant):
        raise TypeError(
            f"the plant is {type(plant).__name__}, expected one of kpflow_dyn.models or another derived from their "
            "Plant, to serve both frameworks; make a ClosedLoop of your plant for the other one, and of the converted "
            "policy"
        )
    return plant
