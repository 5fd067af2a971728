"""A loss of a JAX model's states as a function of its parameters, twice differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from kpflow_dyn._arrays import Rows
from kpflow_dyn._jax.cells import as_step
from kpflow_dyn._jax.rollout import run
from kpflow_dyn._problems.inputs import input_width
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem, StaticProblem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._problems.steps import Tableau
from kpflow_dyn.ode._discretise import Nodes, RungeKuttaStep, read_off

Scheme = Any

ROOM = 32  # steps of an adaptive solve are filled up to a multiple of this: each further length is compiled anew


def rollout(problem: DiscreteProblem) -> Callable[[Any, Scheme], jax.Array]:
    """(cell, None) -> the states."""
    step, z0 = as_step(problem.cell, problem.x, problem.z0)
    return lambda cell, _scheme: run(step, cell, problem.x, z0)


def pull_back(problem: DiscreteProblem | StaticProblem) -> tuple[jax.Array, Rows]:
    """The states, and J* on rows [b, n], both differentiable in the parameters."""
    model = problem.cell if isinstance(problem, DiscreteProblem) else problem.net
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def states(arrays: Any) -> jax.Array:
        whole = eqx.combine(arrays, rest)
        return rollout(problem)(whole, None) if isinstance(problem, DiscreteProblem) else jax.vmap(whole)(problem.x)

    state, back = jax.vjp(states, arrays)

    def of_row(row: jax.Array) -> jax.Array:
        return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(back(row.reshape(state.shape)))])

    return state, jax.vmap(of_row)


def scheme(solution: Solution) -> Scheme:
    """The rows of the steps that were taken, [step, trial, ...], and how the nodes are read off them."""
    steps, problem = solution.steps, solution.problem
    assert steps is not None and isinstance(problem, ODEProblem)
    nodes = Nodes(steps, solution.t, solution.state)
    rows = _step(problem, steps.tableau, True).rows(problem, steps.dt, steps.stage_times, steps.before)
    more = -rows.shape[1] % ROOM
    still = rows[:, -1:].at[..., 0].set(0.0)  # of length zero, at the last time
    rows = jnp.concatenate([rows, jnp.repeat(still, more, 1)], 1)
    return rows.swapaxes(0, 1), jnp.asarray(nodes.index), nodes.weights


def replay(problem: ODEProblem, tableau: Tableau) -> Callable[[Any, Scheme], jax.Array]:
    """(field, scheme) -> the states, by the steps of the scheme."""
    units = problem.z0.shape[1]

    def states(field: Any, scheme: Scheme) -> jax.Array:
        rows, index, weights = scheme
        step = _step(problem, tableau, with_stages=weights.shape[-1] > 1)

        def over_trials(y: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array]:
            z = jax.vmap(lambda row, y: step(field, row, y))(row, y)
            return z[:, :units], z

        after = lax.scan(over_trials, problem.z0, rows)[1].swapaxes(0, 1)
        return read_off(after[None], index, weights)[0]

    return states


def _step(problem: ODEProblem, tableau: Tableau, with_stages: bool) -> RungeKuttaStep:
    return RungeKuttaStep(tableau, problem.z0.shape[1], input_width(problem), with_stages)


class Derivatives:
    """Of a function (theta [n], scheme) -> 0-dim."""

    def __init__(self, function: Callable[[jax.Array, Scheme], jax.Array]) -> None:
        def both(theta: jax.Array, scheme: Scheme) -> Any:
            return jax.linearize(lambda theta: jax.value_and_grad(function)(theta, scheme), theta)

        self.gradient = jax.jit(jax.grad(function))
        self._both = jax.jit(both)
        self._product = jax.jit(lambda push, row: push(row)[1])

    def both(self, theta: jax.Array, scheme: Scheme) -> tuple[float, jax.Array, Rows]:
        """Its value, its gradient, and products with its Hessian on rows [b, n]."""
        (value, gradient), push = self._both(theta, scheme)
        return float(value), gradient, lambda rows: jnp.stack([self._product(push, row) for row in rows])
