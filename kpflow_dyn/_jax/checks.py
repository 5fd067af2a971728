"""Errors that name what came, what was expected and what to do, before a wrong number can arise."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._arrays import is_torch_module
from kpflow_dyn._arrays.sharding import by_trials


def as_jax(values: object, what: str, axes: str) -> jax.Array:
    """A jax array of jax or numpy data, of the same dtype.

    Raises:
        TypeError: not an array of floats, or float64 data where JAX would silently round it to float32.
    """
    if not isinstance(values, jax.Array | np.ndarray):
        raise TypeError(f"{what} is {type(values).__name__}, expected a jax array {axes}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{what} is {values.dtype}, expected float32 or float64; use {what}.astype(float)")
    if values.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{what} is float64, but JAX would round it to float32; call jax.config.update('jax_enable_x64', True) "
            f"first, or pass {what}.astype('float32')"
        )
    return by_trials(jnp.asarray(values))


def check_input(x: jax.Array) -> None:
    """Raise unless x is a finite array [trial, time, input] with no empty axis."""
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected [trial, time, input]; add the missing axis with x[None]")
    if 0 in x.shape:
        raise ValueError(f"x has shape {x.shape} [trial, time, input]: an analysis needs at least one of each")
    check_finite(x, "x")


def check_finite(values: jax.Array, what: str) -> None:
    """Raise for NaN or inf in [trial, time, ...] data, naming the first time and a trial."""
    with jax.ensure_compile_time_eval():  # a problem may be posed inside of a jit whose model alone is traced
        bad = np.asarray(~jnp.isfinite(values).all(-1))
    if bad.any():
        time = int(np.flatnonzero(bad.any(0))[0])
        trial = int(np.flatnonzero(bad[:, time])[0])
        raise ValueError(
            f"{what} holds NaN or inf, first at step {time} (trial {trial}); clean the data or look at the weights"
        )


def named_parameters(model: object) -> dict[str, jax.Array]:
    """The floating arrays of a callable pytree, by their path in it.

    Raises:
        TypeError: a torch module, no callable, or a plain function, whose arrays are closed over and so cannot be told
            from constants.
    """
    if is_torch_module(model):
        raise TypeError("the model is a torch module, but the data are jax arrays; pass torch tensors, or a JAX model")
    if not callable(model):
        raise TypeError(f"the model is {type(model).__name__}, expected a callable such as an equinox module")
    found = floating_leaves(model)
    if not found:
        raise TypeError(
            f"{getattr(model, '__name__', type(model).__name__)} holds no arrays: parameters that a function closes "
            "over cannot be told from constants. Pass an equinox module, or jax.tree_util.Partial(function, "
            "parameters) with function(parameters, ...)"
        )
    return found


def floating_leaves(model: object) -> dict[str, jax.Array]:
    """The floating arrays of any pytree, by their path in it."""
    return {name: leaf for name, leaf in _named_leaves(model) if eqx.is_inexact_array(leaf)}


def check_parameters(model: object, like: jax.Array) -> None:
    """Raise unless the model's parameters are finite and of the dtype of the data."""
    for name, leaf in named_parameters(model).items():
        if leaf.dtype != like.dtype:
            raise TypeError(f"parameter {name} is {leaf.dtype} but the data are {like.dtype}; convert one of them")
        if not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"parameter {name} holds NaN or inf; load a healthy checkpoint")


def with_parameters(model: object, values: dict[str, jax.Array]) -> object:
    """The same model with other values of its parameters."""
    leaves = [values.get(name, leaf) for name, leaf in _named_leaves(model)]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _named_leaves(model: object) -> list[tuple[str, Any]]:
    """All leaves by their path; those of a Partial by their argument: "[0].weight", "['weight']"."""
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    skipped = 1 if isinstance(model, jax.tree_util.Partial) else 0
    return [(jax.tree_util.keystr(path[skipped:]).removeprefix("."), leaf) for path, leaf in paths]
