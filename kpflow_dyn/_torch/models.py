"""The parameters of modules by name, and modules made of functions; see `kpflow_dyn._backend.Models`."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from kpflow_dyn._arrays.complex_numbers import in_halves, of_halves
from kpflow_dyn._torch.called import called
from kpflow_dyn._torch.left_alone import left_alone as left_alone
from kpflow_dyn._torch.starts import Started, carries_gradient, encoded, parameter, parts_of, without_gradient
from kpflow_dyn._torch.trace import Applied

__all__ = ["carries_gradient", "encoded", "left_alone", "parameter", "parts_of", "started", "without_gradient"]

started = Started
Values = dict[str, Tensor]


def parameters_of(model: Any) -> Values:
    """By name; none of what is no module."""
    return dict(model.named_parameters()) if isinstance(model, nn.Module) else {}


@torch.no_grad()
def changed(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """The module itself, with these values of some parameters."""
    known = parameters_of(model)
    for name, value in values.items():
        known[name].copy_(value)
    return model


def copied(model: Any) -> Any:
    """A module of its own, which the user's training does not reach; what is no module stays as it is."""
    try:
        return copy.deepcopy(model) if isinstance(model, nn.Module) else model
    except Exception as error:
        raise ValueError(
            f"the {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a flow of gradients "
            "moves a copy; keep no tensors computed from its parameters, and no locks or files, in its attributes"
        ) from error


def in_single(value: Any) -> Any:
    """A copy of a module, a tensor, or a container of these, with float32 in the place of half precision."""
    if isinstance(value, nn.Module):
        return copied(value)._apply(_in_single)
    return tree_map(lambda leaf: _in_single(leaf) if isinstance(leaf, Tensor) else leaf, value)


def _in_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 2 else tensor


def learns(value: Any) -> bool:
    """Whether a part of a layer learns: all but parameters that require no gradient."""
    return not isinstance(value, nn.Parameter) or value.requires_grad


def snapshot(array: Tensor) -> Tensor:
    """Its numbers alone."""
    return array.detach().clone()


def call(function: Callable[..., Tensor], model: Any, values: Values, *args: Any) -> Tensor:
    """function(model, ...) where the parameters have these values."""
    if not isinstance(model, nn.Module):
        return function(model, *args)
    return called(Applied(function, model), {f"call.{name}": v for name, v in values.items()}, *args)


class OfArrays(nn.Module):
    """A function of arrays by name, and of more arguments; the arrays are its attributes."""

    def __init__(self, function: Callable[..., Tensor], learnt: Values, constants: Values) -> None:
        super().__init__()
        self.function, self._names = function, [*learnt, *constants]
        for name, value in learnt.items():
            setattr(self, name, nn.Parameter(snapshot(value), requires_grad=learns(value)))
        for name, value in constants.items():
            setattr(self, name, snapshot(value))

    def forward(self, *args: Any) -> Tensor:
        return self.function({name: getattr(self, name) for name in self._names}, *args)


def with_arrays(function: Callable[..., Tensor], learnt: Values, constants: Values) -> OfArrays:
    """A module of a function(arrays, ...), whose parameters are copies of `learnt`."""
    return OfArrays(function, learnt, constants)


class OnHalves(nn.Module):
    """A field of complex states as one of real states; its parameters are those of the field, by the same names."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        vars(self)["call"] = f  # no module of this one
        self._parameters, self._buffers, self._modules = f._parameters, f._buffers, f._modules
        self.training = f.training

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return in_halves(vars(self)["call"](t, of_halves(z), *x))


def on_halves(f: Any) -> Any:
    """The field on real states; what is no module is refused later."""
    return f if is_on_halves(f) or not isinstance(f, nn.Module) else OnHalves(f)


def is_on_halves(f: Any) -> bool:
    """Whether this is a field on real states."""
    return isinstance(f, OnHalves)


def on_numpy(policy: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    """A policy on one observation, from numpy to numpy."""
    like = next(policy.parameters(), torch.zeros(()))

    @torch.no_grad()
    def act(z: np.ndarray) -> np.ndarray:
        row = torch.as_tensor(z[None], dtype=like.dtype, device=like.device)
        return policy(row)[0].cpu().numpy().astype(float)

    return act


def describe(model: Any) -> str:
    """The module as torch prints it."""
    return str(model)
