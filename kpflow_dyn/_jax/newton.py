"""Converge the stages of implicit Runge-Kutta steps, and keep the inverses of their Newton matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from kpflow_dyn._problems.steps import Tableau
from kpflow_dyn.ode._newton import ITERATIONS

Field = Callable[..., jax.Array]


@eqx.filter_jit
def converge(field: Field, tableau: Tableau, row: tuple, before: jax.Array, guess: jax.Array | None) -> jax.Array:
    """For each row [h, times, inputs] [trial, step, ...]: the stages and the inverses, flat [trial, step, ...].

    Args:
        field: f(t, y, x), on one row.
        tableau: a diagonally implicit method.
        row: h [trial, step], times [trial, step, stage] and inputs [trial, step, stage, input] or None.
        before: the states before the steps [trial, step, unit].
        guess: stage derivatives to begin with [trial, step, stage, unit]; None for those of the state before.
    """
    args = *row, before, guess
    axes = tuple(None if arg is None else 0 for arg in args)
    one: Any = partial(_row, field, tableau)
    return jax.vmap(jax.vmap(one, axes), axes)(*args)


def _row(
    field: Field,
    tableau: Tableau,
    h: jax.Array,
    times: jax.Array,
    inputs: jax.Array | None,
    y: jax.Array,
    guess: jax.Array | None,
) -> jax.Array:
    stages, inverses = [], []
    for i in range(len(tableau.b)):
        x = None if inputs is None else inputs[i]
        start = y + h * sum((tableau.a[i, j] * stages[j] for j in range(i) if tableau.a[i, j]), 0 * y)
        f = partial(_at, field, times[i], x)
        if not tableau.a[i, i]:
            stages.append(f(start))
            continue
        step = h * tableau.a[i, i]
        k, inverse = _solve(f, start, step, f(start) if guess is None else guess[i])
        stages.append(k)
        inverses.append(inverse)
    return jnp.concatenate([jnp.stack(stages).ravel(), jnp.stack(inverses).ravel()])


def _at(field: Field, t: jax.Array, x: jax.Array | None, y: jax.Array) -> jax.Array:
    return field(t, y, x)


def _solve(f: Field, start: jax.Array, step: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k = f(start + step k), by Newton's method, and (I - step Df)^{-1} there."""

    def inverse(k: jax.Array) -> jax.Array:
        return jnp.linalg.inv(jnp.eye(len(k), dtype=k.dtype) - step * jax.jacfwd(f)(start + step * k))

    def iterate(_: int, k: jax.Array) -> jax.Array:
        return k - inverse(k) @ (k - f(start + step * k))

    k = lax.fori_loop(0, ITERATIONS, iterate, k)
    return k, inverse(k)
