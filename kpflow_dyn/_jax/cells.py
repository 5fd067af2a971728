"""One calling convention for every JAX cell: step(cell, x [input], z [unit]) -> z on one trial."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from kpflow_dyn._arrays.sharding import like_trials
from kpflow_dyn._jax.checks import as_jax
from kpflow_dyn._problems.checks import cell_start, check_width
from kpflow_dyn._problems.layouts import Layout, is_plain_start, start_of
from kpflow_dyn._problems.problems import DiscreteProblem, OverTimes
from kpflow_dyn._problems.starts import encode, start_map, start_named

Step = Callable[[Any, jax.Array, jax.Array], jax.Array]


def discrete_step(problem: DiscreteProblem) -> tuple[Step, jax.Array]:
    """The step (cell, x, z) -> z on one trial, and the initial state of all."""
    start, given = start_map(problem), problem.z0
    if problem.encodes:  # whose weights may be traced, so that the form alone is looked at
        given = jax.tree.map(_form_of, encode(problem.backend, problem.encoder, problem.z0))
    with start_named(problem):
        step, z0 = as_step(problem.cell, problem.x, given)
    return step, z0 if start is None else like_trials(start(problem.model), problem.x)


def flat_start(problem: DiscreteProblem | OverTimes, given: Any) -> jax.Array:
    """What an encoder gives as z_0 [trial, unit], differentiable."""
    if isinstance(problem, OverTimes):
        return problem.form.layout.join(given)
    return given if is_plain_start(given) else start_of(given, len(problem.x), jax.tree.flatten, _part)[1]


def _form_of(part: Any) -> Any:
    """The part itself, or zeros in its place where it is traced."""
    return np.zeros(part.shape, part.dtype) if isinstance(part, Tracer) else part


def as_step(cell: Any, x: jax.Array, z0: Any) -> tuple[Step, jax.Array]:
    """The step of cells like this one, and the initial state [trial, unit]; raises where cell, x and z0 do not fit."""
    check_width(cell, x)
    if isinstance(cell, eqx.nn.LSTMCell) and z0 is None:
        z0 = (np.zeros((len(x), cell.hidden_size), x.dtype),) * 2
    if z0 is None or is_plain_start(z0):
        return _plain, initial_state([getattr(cell, "hidden_size", None)], x, z0)
    layout, z0 = start_of(z0, len(x), jax.tree.flatten, _part)
    return _LaidOut(layout), initial_state([sum(layout.sizes)], x, z0)


def initial_state(sizes: Sequence[int | None], x: jax.Array, z0: Any) -> jax.Array:
    """z0 [trial, unit] with the parts of a state of these sizes side by side, placed like x; zeros when None."""
    return like_trials(cell_start(sizes, x, z0, _part), x)


def _part(part: Any) -> jax.Array:
    return as_jax(part, "z0", "[trial, unit]")


def _plain(cell: Any, x: jax.Array, z: jax.Array) -> jax.Array:
    return cell(x, z)


@dataclass(frozen=True)
class _LaidOut:
    """A cell whose state is a pytree, such as (h, c), or complex, laid side by side.

    Equal ones are the same function to JAX, which compiles it once.
    """

    layout: Layout

    def __call__(self, cell: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        return self.layout.join(cell(x, self.layout.split(z)), "what the cell returns")
