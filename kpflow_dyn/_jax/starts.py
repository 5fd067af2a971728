"""Pytrees whose start learns: a cell or field beside what gives z_0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from kpflow_dyn._jax.failures import cause_of
from kpflow_dyn._shown import type_name


@jax.tree_util.register_pytree_with_keys_class
class Started:
    """A cell or field under its name, beside an encoder of the start or the parameter z0; called as the former."""

    def __init__(self, name: str, of_states: Any, start: Any) -> None:
        self.names = name, "z0" if isinstance(start, jax.Array) else "encoder"
        self.of_states, self.start = of_states, start

    def __call__(self, *args: Any) -> Any:
        return self.of_states(*args)

    @property
    def parts(self) -> list[tuple[str, Any]]:
        """Both by their names, in the order of their leaves."""
        return list(zip(self.names, (self.of_states, self.start), strict=True))

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        """Both with their names."""
        return [(GetAttrKey(name), part) for name, part in self.parts], self.names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, str], parts: Iterable[Any]) -> Started:
        """The same of other values, of any kind."""
        found = object.__new__(cls)
        found.names, (found.of_states, found.start) = names, parts
        return found


def parts_of(model: Any) -> tuple[Any, Any]:
    """The cell or field and what gives its start, None where that does not learn."""
    return (model.of_states, model.start) if isinstance(model, Started) else (model, None)


def parameter(value: jax.Array) -> jax.Array:
    """The same."""
    return jnp.asarray(value)


def encoded(encoder: Any, data: jax.Array) -> Any:
    """What the encoder gives of each trial: z_0 [trial, unit], or a tuple of parts."""
    if not callable(encoder):
        raise TypeError(f"the encoder is {type_name(encoder)}, expected a callable such as an equinox module")
    try:
        return jax.vmap(encoder)(data)
    except Exception as error:
        raise ValueError(
            f"the encoder failed on data {data.shape[1:]} of {data.dtype}{cause_of(error)}. An encoder in JAX is "
            "called on the data of one trial, without the axis of trials, and gives z_0 [unit]"
        ) from error


def carries_gradient(start: Any) -> bool:
    """Whether a part that is called holds arrays; others do not say where they come from."""
    parts = jax.tree.leaves(start, is_leaf=callable)
    return any(callable(part) and any(map(eqx.is_inexact_array, jax.tree.leaves(part))) for part in parts)


def without_gradient(start: Any) -> Any:
    """The same."""
    return start
