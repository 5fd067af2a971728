"""A loss of a JAX model's states as a function of its parameters, twice differentiable."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from kpflow_dyn._arrays import Rows
from kpflow_dyn._arrays.complex_numbers import vector_of
from kpflow_dyn._backend import Values
from kpflow_dyn._jax.cells import discrete_step
from kpflow_dyn._jax.networks import states_of
from kpflow_dyn._jax.programs import Shared
from kpflow_dyn._jax.rollout import run
from kpflow_dyn._jax.starts import parts_of
from kpflow_dyn._problems.problems import DiscreteProblem, StaticProblem
from kpflow_dyn._problems.starts import start_map

__all__ = ["Derivatives", "pull_back", "run", "unreached"]

Scheme = Any


def pull_back(problem: DiscreteProblem | StaticProblem) -> tuple[jax.Array, Rows]:
    """The states, and J* on rows [b, n], both differentiable in the parameters."""
    arrays, rest = eqx.partition(problem.model, eqx.is_inexact_array)

    def states(arrays: Any) -> jax.Array:
        whole = eqx.combine(arrays, rest)
        if isinstance(problem, StaticProblem):
            return states_of(problem, whole)
        (step, z0), start = discrete_step(problem), start_map(problem)
        return run(step, parts_of(whole)[0], problem.x, z0 if start is None else start(whole))

    state, back = jax.vjp(states, arrays)

    def of_row(row: jax.Array) -> jax.Array:
        slopes = jax.tree.leaves(back(row.reshape(state.shape)))
        return vector_of(map(jnp.conj, slopes))  # as JAX gives the conjugate of a complex parameter's

    return state, jax.vmap(of_row)


def unreached(_loss: Callable[[Values], jax.Array], _values: Values) -> list[str]:
    """None: optax is given zeros, and decays such parameters too."""
    return []


class Derivatives:
    """Of a function (theta [n], scheme) -> 0-dim."""

    def __init__(self, function: Callable[[jax.Array, Scheme], jax.Array]) -> None:
        def linearised(theta: jax.Array, scheme: Scheme) -> Any:
            return jax.linearize(lambda theta: jax.grad(function)(theta, scheme), theta)[1]

        self._value = Shared(function)
        self._first = Shared(jax.value_and_grad(function))
        self._linearised = Shared(linearised)
        self._product = Shared(lambda push, row: push(row))
        self._reverse = Shared(jax.grad(lambda theta, scheme, row: row @ jax.grad(function)(theta, scheme)))

    def value(self, theta: jax.Array, scheme: Scheme) -> float:
        """Its value."""
        return float(self._value(theta, scheme))

    def gradient(self, theta: jax.Array, scheme: Scheme) -> tuple[float, jax.Array]:
        """Its value and its gradient [n]."""
        value, gradient = self._first(theta, scheme)
        return float(value), gradient

    def hessian(self, theta: jax.Array, scheme: Scheme) -> Rows:
        """Products with its Hessian on rows [b, n]."""
        push = self._linearised(theta, scheme)

        def products(rows: jax.Array) -> jax.Array:
            try:
                return jnp.stack([self._product(push, row) for row in rows])
            except TypeError:  # a custom_vjp has no forward mode; the Hessian is its own transpose
                return jnp.stack([self._reverse(theta, scheme, row) for row in rows])

        return products
