"""Forward passes in JAX; see `kpflow_dyn._backend.Solving`."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpflow_dyn._arrays.sooner_jax import FEW, filter_jit
from kpflow_dyn._jax import rollout
from kpflow_dyn._jax.checks import check_parameters, check_values, result_of
from kpflow_dyn._jax.failures import cause_of, of_all_trials
from kpflow_dyn._jax.field import Field
from kpflow_dyn._jax.starts import parts_of
from kpflow_dyn._problems.inputs import input_width
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._shown import type_name

roll_out, run = rollout.roll_out, rollout.run
without_gradients = nullcontext

ROOM = 8  # steps are filled up to a multiple of this or of a fourth to an eighth of their number


def each_step(
    step: Callable[..., jax.Array], model: Any, rows: jax.Array, before: jax.Array, count: int | None = None
) -> jax.Array:
    """step(model, row, z) of the rows [trial, time, ...] and the states before them; of the first ones, then zeros."""
    if count is None:
        return jax.vmap(jax.vmap(lambda row, z: step(model, row, z)))(rows, before)
    return filter_jit(_each_step, before.size <= FEW)(step, model, rows, before, np.asarray(count))


def times_at_once(before: jax.Array) -> int:
    """All: one program."""
    return before.shape[1]


def _each_step(step: Any, model: Any, rows: jax.Array, before: jax.Array, count: Any) -> jax.Array:
    of_trials = jax.vmap(lambda row, z: step(model, row, z))
    rows, before = rows.swapaxes(0, 1), before.swapaxes(0, 1)  # [time, trial, ...]
    one = jax.eval_shape(of_trials, rows[0], before[0])

    def body(n: jax.Array, found: jax.Array) -> jax.Array:
        return found.at[n].set(of_trials(rows[n], before[n]))

    return lax.fori_loop(0, count, body, jnp.zeros((len(rows), *one.shape), one.dtype)).swapaxes(0, 1)


def rounded(count: int) -> int:
    """A number of steps for which one program is compiled."""
    return count + -count % max(ROOM, 2 ** (count.bit_length() - 3))


def ode_library(_alg: Any) -> Any:
    """Diffrax."""
    from kpflow_dyn._jax.diffrax_library import DIFFRAX

    return DIFFRAX


def understood(given: dict[str, Any]) -> dict[str, Any]:
    """The controllers of diffrax in the terms of the package."""
    if "stepsize_controller" not in given:
        return given
    from kpflow_dyn._jax.diffrax_library import understood_controller

    return understood_controller(given)


def default_algorithm() -> Any:
    """A solver of diffrax."""
    from diffrax import Tsit5

    return Tsit5()


def variational_system(*args: Any, own: bool) -> Any:
    """A `System`."""
    from kpflow_dyn._jax.variational import OwnSystem, System

    return (OwnSystem if own else System)(*args)


def rate_of(problem: ODEProblem) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(t, z [trial, unit]) -> z', with the inputs."""
    of_trials = jax.vmap(Field(problem), (None, 0, 0))
    return lambda t, z: of_trials(t, z, jnp.arange(len(z)))


def check_encoder(problem: DiscreteProblem | ODEProblem) -> None:
    """Raise unless its parameters fit: it is called on one trial, and JAX's functions draw no random numbers."""
    if problem.encodes:
        check_parameters(problem.model, problem.data)


def check_field(problem: ODEProblem) -> None:
    """Raise unless f holds parameters and maps t, z [unit] (and x_t) to z' [unit]."""
    z0, f = problem.z0, problem.f
    check_parameters(problem.model, z0)
    shapes = [(), z0.shape[1:]] + ([] if (width := input_width(problem)) is None else [(width,)])
    t, *arguments = [jax.ShapeDtypeStruct(shape, z0.dtype) for shape in shapes]

    def advice() -> str:
        return of_all_trials(lambda *rows: f(jnp.zeros((), z0.dtype), *rows), *arguments, trials=len(z0))

    try:
        rate = result_of(f, t, *arguments)
    except Exception as error:
        given = ", ".join(f"{name} {a.shape}" for name, a in zip(("t", "z", "x_t"), [t, *arguments], strict=False))
        given += ", where z is the start that the encoder gives" * problem.encodes
        raise ValueError(
            f"f failed on {given}{cause_of(error)}. A field in JAX is called on one trial, as "
            f"{problem.called('unit', 'input')}{advice()}"
        ) from error
    if not eqx.is_array(rate) and not isinstance(rate, jax.ShapeDtypeStruct):
        raise ValueError(f"f returned {type_name(rate)}, expected z' {z0.shape[1:]} of {z0.dtype}")
    if rate.shape != z0.shape[1:] or rate.dtype != z0.dtype:
        raise ValueError(
            f"f returned {rate.shape} of {rate.dtype}, expected z' {z0.shape[1:]} of {z0.dtype}, like z0[0], as it is "
            f"called on one trial{advice() if rate.shape != z0.shape[1:] else ''}"
        )


def check_called(what: str, model: Any, name: str, t: float, arguments: tuple[Any, ...], form: str) -> tuple[int, ...]:
    """The shape of the result."""
    like = arguments[0]
    check_values(model, like)
    given = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), arguments)
    called = _Named(name)
    try:
        found = result_of(called, parts_of(model)[0], jax.ShapeDtypeStruct((), like.dtype), *given)
    except Exception as error:
        raise ValueError(f"{what} failed{cause_of(error)}. It is called as {form}, in JAX on one trial") from error
    if not hasattr(found, "shape") or found.dtype != like.dtype:
        got = f"{found.shape} of {found.dtype}" if hasattr(found, "shape") else type_name(found)
        raise ValueError(f"{what} returned {got}, expected an array of {like.dtype}")
    return tuple(found.shape)


@dataclass(frozen=True)
class _Named:
    """model.name(...), or model(...)."""

    name: str

    def __call__(self, model: Any, *args: Any) -> Any:
        return (getattr(model, self.name) if self.name else model)(*args)
