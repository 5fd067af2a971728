"""Sensitivities by differentiating diffrax's own solve, for methods whose steps are no Runge-Kutta steps.

J is forward mode through the solve and J^T reverse mode, both on the steps of the solve: diffrax does not differentiate
the choice of its steps.
"""

from __future__ import annotations

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from kpflow_dyn._jax.diffrax_library import DIFFRAX, controller_of
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.variational import FieldOf
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn.ode._libraries import Options
from kpflow_dyn.ode._options import with_steps


class ThroughSolver:
    """J and J^T on blocks [probe, ...], all transposes plain.

    Args:
        sol: a solution of an ODE.
        model: its field, and which parameters learn.
    """

    def __init__(self, sol: Solution, model: Model) -> None:
        self._solve = _Solve(sol, model)
        self.state = _states(self._solve)

    def jvp(self, theta: jax.Array) -> jax.Array:
        """J theta [probe, trial, time, unit] of parameters [probe, p]."""
        return _jvp(self._solve, theta)

    def vjp(self, q: jax.Array) -> jax.Array:
        """J^T q [probe, p] of states [probe, trial, time, unit]."""
        return _vjp(self._solve, q)

    def gram(self, q: jax.Array) -> jax.Array:
        """J J^T q."""
        return self.jvp(self.vjp(q))


class _Solve(eqx.Module):
    """The solve that gave a solution, as a function of the parameters."""

    field: FieldOf
    z0: jax.Array
    times: jax.Array
    solver: diffrax.AbstractSolver
    controller: diffrax.AbstractStepSizeController
    max_steps: int = eqx.field(static=True)
    together: bool = eqx.field(static=True)

    def __init__(self, sol: Solution, model: Model) -> None:
        problem = sol.problem
        assert isinstance(problem, ODEProblem)
        options = with_steps(problem, DIFFRAX, sol.alg, Options(**sol.options))
        self.field, self.z0, self.solver = FieldOf(problem, model), problem.z0, sol.alg
        self.times = jnp.asarray([problem.t[0], *sol.t, problem.t[-1]], problem.z0.dtype)
        self.controller = controller_of(problem, self.solver, options)
        self.max_steps = sol.stats["steps"] + sol.stats["rejected"]
        self.together = problem.is_span and options.steps is None

    def __call__(self, theta: jax.Array, adjoint: diffrax.AbstractAdjoint) -> jax.Array:
        """The state [trial, time, unit]."""
        trials = jnp.arange(len(self.z0))
        if self.together:
            return self._solved(self.z0, trials, theta, adjoint).swapaxes(0, 1)
        return jax.vmap(lambda z, trial: self._solved(z, trial, theta, adjoint))(self.z0, trials)

    def _solved(self, z0: jax.Array, trial: jax.Array, theta: jax.Array, adjoint: diffrax.AbstractAdjoint) -> jax.Array:
        """The states of one trial, or of all as one system, at the nodes."""

        def rate(t: Any, z: Any, field: Any) -> jax.Array:
            return field(t, z, trial) if z.ndim == 1 else jax.vmap(field, (None, 0, 0))(t, z, trial)

        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(rate),
            self.solver,
            self.times[0],
            self.times[-1],
            None,
            z0,
            self.field(theta),
            saveat=diffrax.SaveAt(ts=self.times[1:-1]),
            stepsize_controller=self.controller,
            adjoint=adjoint,
            max_steps=self.max_steps,
            throw=False,
        )
        assert isinstance(solved.ys, jax.Array)
        return solved.ys


@eqx.filter_jit
def _states(solve: _Solve) -> jax.Array:
    return solve(solve.field.theta, diffrax.ForwardMode())


@eqx.filter_jit
def _jvp(solve: _Solve, theta: jax.Array) -> jax.Array:
    def push(change: jax.Array) -> jax.Array:
        return jax.jvp(lambda theta: solve(theta, diffrax.ForwardMode()), (solve.field.theta,), (change,))[1]

    return lax.map(push, theta)


@eqx.filter_jit
def _vjp(solve: _Solve, q: jax.Array) -> jax.Array:
    pull = jax.vjp(lambda theta: solve(theta, diffrax.RecursiveCheckpointAdjoint()), solve.field.theta)[1]
    return lax.map(lambda probe: pull(probe)[0], q)
