"""Sensitivities by differentiating diffrax's own solve, for methods whose steps are no Runge-Kutta steps.

J is forward mode through the solve and J^T reverse mode, both on the steps of the solve: diffrax does not differentiate
the choice of its steps.
"""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from kpflow_dyn._jax.diffrax_library import DIFFRAX, controller_of, integrate
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.variational import FieldOf
from kpflow_dyn._problems.solutions import ODESolution
from kpflow_dyn.ode._libraries import Options
from kpflow_dyn.ode._options import with_steps


class ThroughSolver:
    """J and J^T of an ODE's solution on blocks [probe, ...], all transposes plain."""

    def __init__(self, sol: ODESolution, model: Model) -> None:
        self._solve = _Solve(sol, model)
        self.state = _states(self._solve)

    def jvp(self, theta: jax.Array) -> jax.Array:
        """J theta [probe, trial, time, unit] of parameters [probe, p]."""
        return self.jvp_from(theta, jnp.zeros((len(theta), *self._solve.z0.shape), theta.dtype))

    def vjp(self, q: jax.Array) -> jax.Array:
        """J^T q [probe, p] of states [probe, trial, time, unit]."""
        return self.vjp_from(q)[0]

    def jvp_from(self, theta: jax.Array, start: jax.Array) -> jax.Array:
        """How they move with the parameters and with z(t_0) [probe, trial, unit]."""
        return _jvp(self._solve, theta, start)

    def vjp_from(self, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Its transpose."""
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
    alone: bool = eqx.field(static=True)

    def __init__(self, sol: ODESolution, model: Model) -> None:
        problem = sol.problem
        if not DIFFRAX.accepts(sol.alg):
            raise ValueError(
                f"the steps of {sol.alg!r} cannot be replayed; solve with a Runge-Kutta method, or linearize with "
                "sensealg=InterpolatingAdjoint()"
            )
        options = with_steps(problem, DIFFRAX, sol.alg, Options(**sol.options))
        self.field, self.z0, self.solver = FieldOf(problem, model), problem.z0, sol.alg
        self.times = jnp.asarray([problem.t[0], *sol.nodes, problem.t[-1]], problem.z0.dtype)
        self.controller = controller_of(problem, self.solver, options)
        taken = sol.stats["steps"] + sol.stats["rejected"]
        self.max_steps = 2 ** max(6, taken.bit_length())  # more room costs little, and solves share the program
        self.alone = not problem.is_span or options.steps is not None

    @property
    def at(self) -> tuple[jax.Array, jax.Array]:
        """The parameters and the start, as they are."""
        return self.field.theta, self.z0

    def __call__(self, at: tuple[jax.Array, jax.Array], adjoint: diffrax.AbstractAdjoint) -> jax.Array:
        """The state [trial, time, unit]."""
        theta, z0 = at
        how = self.solver, self.controller, self.max_steps, self.alone, diffrax.SaveAt(ts=self.times[1:-1])
        ends = self.times[0], self.times[-1]
        states = integrate(self.field(theta), z0, ends, *how, adjoint=adjoint).ys
        return states if self.alone else states.swapaxes(0, 1)


@eqx.filter_jit
def _states(solve: _Solve) -> jax.Array:
    return solve(solve.at, diffrax.ForwardMode())


@eqx.filter_jit
def _jvp(solve: _Solve, *changes: jax.Array) -> jax.Array:
    def push(change: tuple[jax.Array, ...]) -> jax.Array:
        return jax.jvp(lambda at: solve(at, diffrax.ForwardMode()), (solve.at,), (change,))[1]

    return lax.map(push, changes)


@eqx.filter_jit
def _vjp(solve: _Solve, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    pull = jax.vjp(lambda at: solve(at, diffrax.RecursiveCheckpointAdjoint()), solve.at)[1]
    return lax.map(lambda probe: pull(probe)[0], q)
