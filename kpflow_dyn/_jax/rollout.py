"""Run a JAX cell over time, watching for what would make its analysis wrong."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
from jax import lax

from kpflow_dyn._jax.cells import Step, discrete_step
from kpflow_dyn._jax.checks import check_parameters, result_of
from kpflow_dyn._jax.failures import cause_of, of_all_trials
from kpflow_dyn._problems.checks import check_finite
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._shown import type_name


def roll_out(problem: DiscreteProblem) -> tuple[jax.Array, jax.Array]:
    """The states z_1 ... z_T [trial, time, unit], and z_0; a ValueError names the first step that is not finite."""
    x = problem.x
    check_parameters(problem.model, x)
    step, z0 = discrete_step(problem)
    check_step(step, problem.cell, *(jax.ShapeDtypeStruct(a.shape[n:], a.dtype) for a, n in ((x, 2), (z0, 1))))
    try:
        state = run(step, problem.cell, x, z0)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"the cell failed{cause_of(error)}") from error
    check_finite(state, "the state")
    return state, z0


@eqx.filter_jit
def run(step: Step, cell: Any, x: jax.Array, z0: jax.Array, kicks: jax.Array | None = None) -> jax.Array:
    """The states z_1 ... z_T [trial, time, unit] of inputs [trial, time, input] from z_0, kicked after each step."""

    def over_trials(z: jax.Array, at: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        x_t, kick = at
        z = jax.vmap(lambda x, z: step(cell, x, z))(x_t, z)
        z = z if kick is None else z + kick
        return z, z

    by_times = jax.tree.map(lambda values: values.swapaxes(0, 1), (x, kicks))
    return lax.scan(over_trials, z0, by_times)[1].swapaxes(0, 1)


def check_step(step: Step, cell: Any, x: Any, z: Any) -> None:
    """Raise unless the step of one trial gives a state like z; the numbers of x and z are not used."""
    try:
        out = result_of(step, cell, x, z)
    except Exception as error:
        raise ValueError(
            f"the cell failed on x_t {x.shape} and z {z.shape}{cause_of(error)}. A cell in JAX is called on one trial, "
            f"as cell(x_t, z) with x_t [input] and z [unit]{of_all_trials(partial(step, cell), x, z)}"
        ) from error
    if getattr(out, "shape", None) != z.shape or out.dtype != z.dtype:
        got = f"{out.shape} of {out.dtype}" if hasattr(out, "shape") else type_name(out)
        is_complex = "complex" in str(getattr(out, "dtype", ""))
        advice = "; a cell with a complex state needs a complex z0" if is_complex else ""
        raise ValueError(f"the cell returned {got}, expected the next state {z.shape} of {z.dtype}{advice}")
