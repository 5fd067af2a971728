"""A JAX model at constant inputs: its step or field on many states at once, with the Jacobian of each."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from kpflow_dyn._jax.cells import discrete_step
from kpflow_dyn._jax.rollout import check_step
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem

Apply = Callable[[Any, jax.Array, jax.Array], jax.Array]


class Dynamics:
    """z [n, unit] -> F(x, z) of a step or a field, and dF/dz [n, unit, unit]; x has no width where f takes none."""

    def __init__(self, problem: DiscreteProblem | ODEProblem, x: jax.Array, z: jax.Array) -> None:
        if isinstance(problem, DiscreteProblem):
            self.model, (self.apply, _) = problem.cell, discrete_step(problem)
            check_step(self.apply, problem.cell, x[0], z[0])
        else:
            self.model, self.apply = problem.f, _field(problem)

    def __call__(self, x: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        """F and dF/dz."""
        return _with_jacobians(self.apply, self.model, x, z)


@eqx.filter_jit
def _with_jacobians(apply: Apply, model: Any, x: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    def row(x: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, push = jax.linearize(lambda z: apply(model, x, z), z)
        return value, jax.vmap(push, out_axes=1)(jnp.eye(len(z), dtype=z.dtype))

    return jax.vmap(row)(x, z)


def _field(problem: ODEProblem) -> Apply:
    return jax.tree_util.Partial(_rate, jnp.asarray(problem.t[0], problem.z0.dtype))  # equal ones are compiled once


def _rate(t: jax.Array, f: Any, x: jax.Array, z: jax.Array) -> jax.Array:
    return f(t, z, x) if x.shape[0] else f(t, z)
