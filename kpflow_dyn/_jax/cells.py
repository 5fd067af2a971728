"""One calling convention for every JAX cell: step(cell, x [input], z [unit]) -> z on one trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from kpflow_dyn._arrays.sharding import like_trials
from kpflow_dyn._jax.checks import as_jax

Step = Callable[[Any, jax.Array, jax.Array], jax.Array]


def as_step(cell: Any, x: jax.Array, z0: Any) -> tuple[Step, jax.Array]:
    """The step of cells like this one, and the initial state [trial, unit].

    Raises:
        TypeError, ValueError: for a cell, input or initial state that do not fit together.
    """
    width = getattr(cell, "input_size", None)
    if isinstance(width, int) and x.shape[-1] != width:
        raise ValueError(f"x has {x.shape[-1]} input channels, but the cell takes {width}; x is [trial, time, input]")
    if isinstance(cell, eqx.nn.LSTMCell) and z0 is None:
        z0 = (jnp.zeros(cell.hidden_size, x.dtype),) * 2
    if isinstance(z0, tuple | list):
        parts = [as_jax(part, "z0", "[trial, unit]") for part in z0]
        ends = [sum(part.shape[-1] for part in parts[: i + 1]) for i in range(len(parts) - 1)]
        return _on_tuples(ends), _of_trials(_side_by_side(parts, x), x, None)
    return _plain, initial_state(cell, x, z0)


def initial_state(cell: Any, x: jax.Array, z0: Any) -> jax.Array:
    """z0 [trial, unit] of a cell with a flat state, like x; zeros when None."""
    size = getattr(cell, "hidden_size", None)
    if z0 is None and size is None:
        raise ValueError("the cell has no hidden_size attribute, so its state size is unknown; pass z0 [trial, unit]")
    with jax.ensure_compile_time_eval():
        start = jnp.zeros(size, x.dtype) if z0 is None else as_jax(z0, "z0", "[trial, unit]")
    return _of_trials(start, x, size)


def _plain(cell: Any, x: jax.Array, z: jax.Array) -> jax.Array:
    return cell(x, z)


def _on_tuples(ends: list[int]) -> Step:
    """A cell whose state is a tuple, such as (h, c), laid side by side."""

    def step(cell: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.concatenate(cell(x, tuple(jnp.split(z, ends))))

    return step


def _side_by_side(parts: list[jax.Array], x: jax.Array) -> jax.Array:
    if len({part.shape[:-1] for part in parts}) > 1:
        raise ValueError(f"the parts of z0 have shapes {[p.shape for p in parts]}; they must have the same trials")
    return jnp.concatenate(parts, -1)


def _of_trials(start: jax.Array, x: jax.Array, size: int | None) -> jax.Array:
    with jax.ensure_compile_time_eval():
        start = jnp.broadcast_to(start, (len(x), *start.shape)) if start.ndim == 1 else start
    units = start.shape[-1] if size is None else size
    if start.shape != (len(x), units):
        raise ValueError(
            f"z0 has shape {start.shape}, expected [trial, unit] = [{len(x)}, {units}] as x has {len(x)} trials"
        )
    if start.dtype != x.dtype:
        raise TypeError(f"z0 is {start.dtype}, x is {x.dtype}; they must agree")
    with jax.ensure_compile_time_eval():
        finite = bool(jnp.isfinite(start).all())
    if not finite:
        raise ValueError("z0 holds NaN or inf")
    return like_trials(start, x)


class LearntStart(eqx.Module):
    """cell(x_t, z), where the first channel of x_t says how much of the parameter z0 is added to z."""

    z0: jax.Array
    cell: Any
    step: Step = eqx.field(static=True)
    hidden_size: int = eqx.field(static=True)

    def __init__(self, cell: Any, x: jax.Array, z0: Any) -> None:
        self.step, start = as_step(cell, x, z0)
        if not bool((start == start[0]).all()):
            raise ValueError("the start z0 differs between trials; one that learns is shared by all, z0 [unit]")
        self.cell, self.z0, self.hidden_size = cell, start[0], start.shape[-1]

    def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
        return self.step(self.cell, x[1:], z + x[0] * self.z0)
