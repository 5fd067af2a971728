"""The parameters of pytrees by name, and pytrees made of functions; see `kpflow_dyn._backend.Models`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.errors import ConcretizationTypeError, TracerArrayConversionError
from jax.tree_util import GetAttrKey

from kpflow_dyn._jax.checks import floating_leaves, with_parameters
from kpflow_dyn._jax.differential import controlled as controlled
from kpflow_dyn._jax.differential import drift_and_diffusion as drift_and_diffusion
from kpflow_dyn._jax.differential import pair_in_form as pair_in_form
from kpflow_dyn._jax.forms import Through
from kpflow_dyn._jax.forms import field_of as field_of
from kpflow_dyn._jax.forms import in_form as in_form
from kpflow_dyn._jax.forms import through as through
from kpflow_dyn._jax.starts import Started
from kpflow_dyn._jax.starts import carries_gradient as carries_gradient
from kpflow_dyn._jax.starts import encoded as encoded
from kpflow_dyn._jax.starts import parameter as parameter
from kpflow_dyn._jax.starts import parts_of as parts_of
from kpflow_dyn._jax.starts import without_gradient as without_gradient

parameters_of, changed, started = floating_leaves, with_parameters, Started
Values = dict[str, jax.Array]


@contextmanager
def left_alone(_model: Any) -> Iterator[None]:
    """Pytrees do not change; but a TypeError in words where a transformation of JAX hides the numbers."""
    try:
        yield
    except (ConcretizationTypeError, TracerArrayConversionError) as error:
        raise TypeError(
            "this looks at numbers, to check them and to compare with autograd, and jax.jit, jax.vmap or jax.grad "
            "around it hides them; call it outside, and transform what comes of it, as in jax.jit(flow.ntk.mv), or "
            "take kp.regularizers for derivatives of a kernel"
        ) from error


def nodes(model: Any) -> list[Any]:
    """A pytree and all that it holds."""
    diffrax = sys.modules.get("diffrax")
    while diffrax is not None and isinstance(model, diffrax.ODETerm):
        model = model.vector_field
    if isinstance(model, Through):  # whose function knows the jumps of what it has inside
        return [model]
    found: list[Any] = []
    jax.tree.flatten(model, is_leaf=lambda node: found.append(node) is not None)
    return found


def function_of(f: Any) -> Any:
    """The same."""
    return f


def copied(model: Any) -> Any:
    """The model, with its arrays of numpy copied; those of JAX do not change."""
    return jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, np.ndarray) else leaf, model)


def in_single(value: Any) -> Any:
    """Any pytree with its arrays of half precision in float32."""
    return jax.tree.map(lambda leaf: leaf.astype("float32") if _is_half(leaf) else leaf, value)


def _is_half(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf) and leaf.dtype.itemsize == 2


def learns(value: Any) -> bool:
    """Whether a part of a layer learns: arrays of JAX do, those of numpy are constants."""
    return isinstance(value, jax.Array)


def snapshot(array: jax.Array) -> jax.Array:
    """The same."""
    return array


def call(function: Callable[..., jax.Array], model: Any, values: Values, *args: Any) -> jax.Array:
    """function(model, ...) where the parameters have these values."""
    return function(changed(model, values), *args)


@jax.tree_util.register_pytree_with_keys_class
class OfArrays:
    """A function of arrays by name, and of more arguments: a pytree of these arrays, which are its attributes."""

    def __init__(self, function: Callable[..., jax.Array], arrays: dict[str, Any]) -> None:
        self.function, self._names = function, tuple(arrays)
        vars(self).update(arrays)

    def __call__(self, *args: Any) -> jax.Array:
        """The function's value."""
        return self.function({name: getattr(self, name) for name in self._names}, *args)

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """The arrays with their names, and the rest."""
        return [(GetAttrKey(name), getattr(self, name)) for name in self._names], (self.function, self._names)

    @classmethod
    def tree_unflatten(cls, rest: tuple[Callable[..., jax.Array], tuple[str, ...]], arrays: Iterable[Any]) -> OfArrays:
        """The same function of other arrays."""
        function, names = rest
        return cls(function, dict(zip(names, arrays, strict=True)))


def with_arrays(function: Callable[..., jax.Array], learnt: Values, constants: Values) -> OfArrays:
    """A pytree of a function(arrays, ...), whose arrays of JAX are `learnt`; the constants are arrays of numpy."""
    return OfArrays(function, learnt | {name: np.asarray(value) for name, value in constants.items()})


def on_numpy(policy: Any) -> Callable[[np.ndarray], np.ndarray]:
    """A policy on one observation, from numpy to numpy."""
    compiled, dtype = eqx.filter_jit(policy), next(iter(parameters_of(policy).values())).dtype
    return lambda z: np.asarray(compiled(z.astype(dtype)), float)


def describe(model: Any) -> str:
    """The pytree with shapes in the place of numbers, and without addresses, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-f]+", "", eqx.tree_pformat(model))
