"""Errors that name what came, what was expected and what to do, before a wrong number can arise."""

import hashlib
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._arrays import is_finite, is_torch_module
from kpflow_dyn._arrays.sharding import by_trials
from kpflow_dyn._jax.differential import Controlled, PairInForm
from kpflow_dyn._jax.forms import InForm, Through, field_of
from kpflow_dyn._jax.starts import Started
from kpflow_dyn._shown import type_name


def as_jax(values: object, what: str, axes: str) -> jax.Array:
    """A jax array of jax or numpy floats, of the same dtype; a TypeError where JAX would round them to float32."""
    if not isinstance(values, jax.Array | np.ndarray):
        raise TypeError(f"{what} is {type_name(values)}, expected a jax array {axes}")
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        raise TypeError(f"{what} is {values.dtype}, expected float32 or float64; use {what}.astype(float)")
    if values.dtype in (np.float64, np.complex128) and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{what} is {values.dtype}, but JAX would round it to float32; call jax.config.update('jax_enable_x64', "
            f"True) first, or pass {what}.astype('{'complex64' if np.iscomplexobj(values) else 'float32'}')"
        )
    return by_trials(jnp.asarray(values))


def named_parameters(model: object) -> dict[str, jax.Array]:
    """The floating arrays of a callable pytree, by their path in it; a TypeError for other models."""
    if is_torch_module(model):
        raise TypeError("the model is a torch module, but the data are jax arrays; pass torch tensors, or a JAX model")
    if not callable(model):
        raise TypeError(f"the model is {type_name(model)}, expected a callable such as an equinox module")
    found = floating_leaves(model)
    if not found:
        inner = field_of(model)
        raise TypeError(
            f"{getattr(inner, '__name__', type(inner).__name__)} holds no arrays: parameters that a function closes "
            "over cannot be told from constants, and args are constants. Pass an equinox module, or "
            "jax.tree_util.Partial(function, parameters) with function(parameters, ...)"
        )
    return found


def floating_leaves(model: object) -> dict[str, jax.Array]:
    """The floating arrays of any pytree, by their path in it."""
    return {name: leaf for name, leaf in _named_leaves(model) if name is not None and eqx.is_inexact_array(leaf)}


def check_parameters(model: object, like: jax.Array) -> None:
    """Raise unless the model's parameters are finite and of the dtype of the data."""
    _check_leaves(named_parameters(model), like)


def check_values(model: object, like: jax.Array) -> None:
    """The same of a pytree that need not be callable itself."""
    if not (found := floating_leaves(model)):
        raise TypeError(
            "the model holds no arrays: parameters that a function closes over cannot be told from constants. Pass "
            "equinox modules, or jax.tree_util.Partial(function, parameters)"
        )
    _check_leaves(found, like)


def _check_leaves(found: dict[str, jax.Array], like: jax.Array) -> None:
    for name, leaf in found.items():
        if jnp.finfo(leaf.dtype).dtype != jnp.finfo(like.dtype).dtype:
            raise TypeError(f"parameter {name} is {leaf.dtype} but the data are {like.dtype}; convert one of them")
        if not is_finite(leaf):
            raise ValueError(f"parameter {name} holds NaN or inf; load a healthy checkpoint")


def result_of(function: Callable[..., Any], *args: Any) -> Any:
    """What a function gives, in shapes.

    JAX keeps compiled programs by the function and the form of its arguments. Where the same function computes
    something else than before, as after a change of a global that it reads, they are all forgotten.
    """
    program, arrays, rest = eqx.filter_make_jaxpr(lambda function, *args: function(*args))(function, *args)
    leaves, form = jax.tree.flatten((function, args))
    known = form, *((leaf.shape, leaf.dtype) if eqx.is_array(leaf) else leaf for leaf in leaves)
    with suppress(TypeError):  # no key of JAX's either, as it cannot be hashed; or inside of a jit, which is its own
        if _COMPUTED.setdefault(known, now := _digest(program)) != now:
            jax.clear_caches()
            _COMPUTED.clear()
            _COMPUTED[known] = now
        while len(_COMPUTED) > 256:
            del _COMPUTED[next(iter(_COMPUTED))]
    return eqx.combine(arrays, rest)


_COMPUTED: dict[tuple, str] = {}  # the digest of what each function computed


def _digest(program: Any) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", str(program.jaxpr)).encode()
    return hashlib.sha256(b"".join([text, *(np.asarray(value).tobytes() for value in program.consts)])).hexdigest()


def with_parameters(model: object, values: dict[str, jax.Array]) -> object:
    """The same model with other values of its parameters."""
    leaves = [leaf if name is None else values.get(name, leaf) for name, leaf in _named_leaves(model)]
    return jax.tree.unflatten(jax.tree.structure(model), leaves)


def _named_leaves(model: object) -> list[tuple[str | None, Any]]:
    """All leaves by their path; those of a Partial by their argument: "[0].weight", "['weight']"; args have no name."""
    if isinstance(model, Started):
        return [(_within(name, inner), leaf) for name, part in model.parts for inner, leaf in _named_leaves(part)]
    if isinstance(model, Through):
        return _named_leaves(model.through_model)
    if isinstance(model, InForm | PairInForm):
        return [*_named_leaves(field_of(model)), *((None, leaf) for leaf in jax.tree.leaves(model.args))]
    paths = jax.tree_util.tree_flatten_with_path(model)[0]
    inner = model.field if isinstance(model, Controlled) else model
    skipped = (inner is not model) + isinstance(inner, jax.tree_util.Partial)
    names = [jax.tree_util.keystr(path[skipped:]).removeprefix(".") for path, _ in paths]
    return [(name.replace("[<flat index 0>]", ""), leaf) for name, (_, leaf) in zip(names, paths, strict=True)]


def _within(name: str, inner: str | None) -> str | None:
    """The path of what lies under a name."""
    if inner is None:
        return None
    return f"{name}.{inner}" if inner and not inner.startswith("[") else name + inner
