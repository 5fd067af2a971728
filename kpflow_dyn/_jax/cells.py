"""One calling convention for every JAX cell: step(cell, x [input], z [unit]) -> z on one trial."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from kpflow_dyn._arrays.complex_numbers import in_halves, is_complex, of_halves
from kpflow_dyn._arrays.sharding import like_trials
from kpflow_dyn._jax.checks import as_jax
from kpflow_dyn._problems.checks import cell_start, check_width
from kpflow_dyn._problems.problems import DiscreteProblem
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


def _form_of(part: Any) -> Any:
    """The part itself, or zeros in its place where it is traced."""
    return np.zeros(part.shape, part.dtype) if isinstance(part, Tracer) else part


def as_step(cell: Any, x: jax.Array, z0: Any) -> tuple[Step, jax.Array]:
    """The step of cells like this one, and the initial state [trial, unit]; raises where cell, x and z0 do not fit."""
    check_width(cell, x)
    if isinstance(cell, eqx.nn.LSTMCell) and z0 is None:
        sizes = [cell.hidden_size] * 2
        complexes = [False, False]
    elif isinstance(z0, tuple | list):
        parts = [_part(part) for part in z0]
        sizes, complexes = [in_halves(part).shape[-1] for part in parts], [is_complex(part) for part in parts]
    elif z0 is not None and is_complex(z0):
        return _on_halves, initial_state([None], x, z0)
    else:
        return _plain, initial_state([getattr(cell, "hidden_size", None)], x, z0)
    return _OnTuples(tuple(np.cumsum(sizes)[:-1].tolist()), tuple(complexes)), initial_state(sizes, x, z0)


def initial_state(sizes: Sequence[int | None], x: jax.Array, z0: Any) -> jax.Array:
    """z0 [trial, unit] with the parts of a state of these sizes side by side, placed like x; zeros when None."""
    return like_trials(cell_start(sizes, x, z0, _part), x)


def _part(part: Any) -> jax.Array:
    return as_jax(part, "z0", "[trial, unit]")


def _plain(cell: Any, x: jax.Array, z: jax.Array) -> jax.Array:
    return cell(x, z)


def _on_halves(cell: Any, x: jax.Array, z: jax.Array) -> jax.Array:
    """A cell with a complex state, whose real parts come before the imaginary ones."""
    return in_halves(cell(x, of_halves(z)))


@dataclass(frozen=True)
class _OnTuples:
    """A cell whose state is a tuple, such as (h, c), laid side by side; complex parts are twice as wide.

    Equal ones are the same function to JAX, which compiles it once.
    """

    ends: tuple[int, ...]
    complexes: tuple[bool, ...]

    def __call__(self, cell: Any, x: jax.Array, z: jax.Array) -> jax.Array:
        parts = zip(jnp.split(z, self.ends), self.complexes, strict=True)
        given = tuple(of_halves(part) if halves else part for part, halves in parts)
        return jnp.concatenate([in_halves(part) for part in cell(x, given)])
