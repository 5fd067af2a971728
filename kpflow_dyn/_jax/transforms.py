"""Function transforms of JAX, and the map over rows; see `kpflow_dyn._backend.Transforms`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax import jvp, vjp, vmap

from kpflow_dyn._arrays.sooner_jax import sooner
from kpflow_dyn._backend import RowFunction
from kpflow_dyn._jax.programs import Shared, compiled_of, constants_of

__all__ = [
    "compiled",
    "each_row",
    "index",
    "jvp",
    "linearised",
    "once",
    "once_of_models",
    "over_models",
    "over_rows",
    "vjp",
    "vmap",
]

over_models, compiled = vmap, Shared
Tree = Any  # an array, or a list of arrays


def each_row(function: RowFunction, *rows: jax.Array) -> list[jax.Array]:
    """A row function on [time, trial, ...] data -> its outputs as [time, trial, ...]."""
    return once(over_rows(function))(*rows)


def over_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    """Over [time, trial, ...], trials outermost: where axes are joined, as by convolutions, these stay sharded."""
    return jax.vmap(jax.vmap(function), 1, 1)


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled for one call."""
    return Shared(function, sooner())


def once_of_models(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function of models, in which not all is an array."""

    def of_models(*models: Any) -> Any:
        arrays, rest = eqx.partition(models, eqx.is_array)
        return once(lambda arrays: function(*eqx.combine(arrays, rest)))(arrays)

    return of_models


def index(numbers: np.ndarray, like: jax.Array) -> np.ndarray:
    """Element numbers as they are: constants of a compiled program."""
    return numbers


def linearised(function: Callable[[Tree], jax.Array], point: Tree) -> tuple[Callable[[Any], Any], ...]:
    """The derivative of a compiled function at a point, its transpose, and it after its transpose, on blocks of probes.

    Each is one program of plain arrays: with a small network all else that a call does takes longer than the numbers.
    """

    def residuals(point: Tree) -> list[jax.Array]:
        nonlocal form
        kept, form = jax.tree.flatten(jax.linearize(function, point)[1])
        return kept

    form: Any = None
    kept, (flat, tree) = compiled(residuals)(point), jax.tree.flatten(point)
    closed = jax.make_jaxpr(lambda kept, tangent: jax.tree.unflatten(form, kept)(tangent))(kept, point)
    given = constants_of(closed), kept, flat
    push, pull, both = (partial(compiled_of(closed, what), *given) for what in (_push, _pull, _push_pulled))
    return lambda tangent: push(jax.tree.leaves(tangent)), lambda q: jax.tree.unflatten(tree, pull(q)), both


def _push(function: Any, kept: list[jax.Array], _point: list[jax.Array], tangents: list[jax.Array]) -> jax.Array:
    """Blocks of tangents through the linear function(*kept, *tangents) -> [value]."""
    return jax.vmap(lambda tangents: function(*kept, *tangents)[0])(tangents)


def _pull(function: Any, kept: list[jax.Array], point: list[jax.Array], q: jax.Array) -> list[jax.Array]:
    """Its transpose."""
    pull = jax.linear_transpose(lambda tangents: function(*kept, *tangents)[0], point)
    return jax.vmap(lambda q: pull(q)[0])(q)


def _push_pulled(function: Any, kept: list[jax.Array], point: list[jax.Array], q: jax.Array) -> jax.Array:
    return _push(function, kept, point, _pull(function, kept, point, q))
