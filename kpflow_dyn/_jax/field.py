"""The field of an ODE together with its inputs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from kpflow_dyn._problems.inputs import input_at, input_row, sampled
from kpflow_dyn._problems.problems import ODEProblem


class Field(eqx.Module):
    """f of one trial with its inputs: field(t, z [unit], trial)."""

    f: Any
    x: Any
    times: jax.Array | None
    samples: jax.Array | None

    def __init__(self, problem: ODEProblem) -> None:
        known = sampled(problem)
        self.f = problem.f
        self.x = problem.x if callable(problem.x) else None
        self.times, self.samples = (None, None) if known is None else (jnp.asarray(known[0], known[1].dtype), known[1])

    def __call__(self, t: jax.Array, z: jax.Array, trial: Any) -> jax.Array:
        x = self.input(t, trial)
        return self.f(t, z) if x is None else self.f(t, z, x)

    def input(self, t: jax.Array, trial: Any) -> jax.Array | None:
        """x(t) [input]."""
        if self.x is not None:
            return input_row(self.x(t), trial)
        return None if self.samples is None else input_at(self.times, self.samples, t, trial)
