"""Operations with a custom derivative: whether it differs from the plain one, and forward mode where it is missing."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal

Function = Callable[..., Sequence[Any]]


def is_floating(value: Any) -> bool:
    """Whether an array, or what stands for one, has real or complex numbers."""
    return jnp.issubdtype(value.dtype, jnp.inexact)


def with_forward_mode(function: Function, plain: Function) -> Function:
    """A function with a custom reverse mode, whose transpose is its forward mode; JAX itself does not offer one.

    Where it has no transpose, as a loop, forward mode is that of the plain function. Only what moves is asked for: some
    functions have no derivative in the rest, such as a loop in where it stops.
    """

    def tangent(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple:
        moving = [i for i, t in enumerate(tangents) if not isinstance(t, SymbolicZero) and is_floating(primals[i])]

        def of_moving(function: Function, *values: Any) -> tuple[list[Any], Sequence[Any]]:
            every = dict(enumerate(primals)) | dict(zip(moving, values, strict=True))
            out = function(*every.values())
            return [value for value in out if is_floating(value)], out

        points, moved = ([values[i] for i in moving] for values in (primals, tangents))
        floats, pull, out = jax.vjp(partial(of_moving, function), *points, has_aux=True)
        try:
            (push,) = jax.linear_transpose(pull, floats)(tuple(moved))
        except Exception:  # JAX says that there is none in many ways
            forward = jax.linearize(lambda *values: of_moving(plain, *values)[0], *points)[1]
            push = _with_transpose(forward, pull, moved, floats)
        found = iter(push)
        return out, [next(found) if is_floating(value) else np.zeros(value.shape, jax.dtypes.float0) for value in out]

    both = jax.custom_jvp(function)
    both.defjvp(tangent, symbolic_zeros=True)
    return both


def _with_transpose(forward: Function, pull: Function, moved: list[Any], like: list[Any]) -> Sequence[Any]:
    """forward(*moved), whose transpose is `pull`.

    Only a linear solve lets JAX have both from elsewhere: here it is (moved, 0) -> (0, forward(moved)).
    """

    def push(_identity: Any, both: tuple) -> tuple:
        return _zeros(both[0]), forward(*both[0])

    def back(_identity: Any, both: tuple) -> tuple:
        return list(pull(both[1])), _zeros(both[1])

    zero = jnp.zeros(()) * sum(value.sum() for value in moved)  # JAX wants all that it solves for to hang on what moves
    start = tuple([value + zero.astype(value.dtype) for value in values] for values in (moved, _zeros(like)))
    return lax.custom_linear_solve(lambda both: both, start, push, back)[1]


def _zeros(like: Sequence[Any]) -> list[jax.Array]:
    return [jnp.zeros_like(value) for value in like]


def same_derivative(first: Function, second: Function, variables: Sequence[Any]) -> bool:
    """Whether two functions of the variables of a jaxpr have one derivative, tried at a random point."""
    generator = np.random.default_rng(0)
    args = [sample(variable, generator) for variable in variables]
    try:
        gradients = [_gradient(function, args) for function in (first, second)]
    except Exception:  # one of them has none: a loop without a known length, say
        return False
    return all(jnp.allclose(a, b, 1e-4, 1e-4) for a, b in zip(*gradients, strict=True))


def sample(variable: Any, generator: np.random.Generator) -> np.ndarray:
    """A random value of a variable of a jaxpr; that of a literal."""
    dtype = variable.aval.dtype
    value = variable.val if isinstance(variable, Literal) else generator.standard_normal(variable.aval.shape)
    return np.asarray(value).astype(dtype)


def _gradient(function: Function, args: Sequence[Any]) -> tuple:
    of_floats, floats = _of_floats(function, args)
    outs, pull = jax.vjp(of_floats, *floats)
    return pull([jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape) for out in outs])


def _of_floats(function: Function, args: Sequence[Any]) -> tuple[Function, list[Any]]:
    """The function from its floating arguments to its floating results, and these arguments."""
    where = [i for i, arg in enumerate(args) if is_floating(arg)]

    def of_floats(*floats: Any) -> list[Any]:
        every = dict(enumerate(args)) | dict(zip(where, floats, strict=True))
        return [out for out in function(*every.values()) if is_floating(out)]

    return of_floats, [args[i] for i in where]
