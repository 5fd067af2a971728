"""Variational and adjoint equations of an ODE in JAX, solved by diffrax's Tsit5, compiled for each shape of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from kpflow_dyn._flows.adjoints import InterpolatingAdjoint
from kpflow_dyn._jax.checks import with_parameters
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.solving import Field
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn.ode._variational import MAX_STEPS, Path, at_unit_size, path_of, solve_failed

Rate = Callable[[Any, Any], Any]


class Variational:
    """J, J^T, P_node and its transpose by adaptive solves, on blocks [probe, ...], all transposes plain.

    Args:
        sol: a solution of an ODE.
        model: its field, and which parameters learn.
        alg: the tolerances.
    """

    def __init__(self, sol: Solution, model: Model, alg: InterpolatingAdjoint) -> None:
        problem = sol.problem
        assert isinstance(problem, ODEProblem)
        self.path = path_of(sol, alg)
        times = jnp.asarray(np.append(problem.t[0], sol.t), sol.state.dtype)
        self._system = _System(FieldOf(problem, model), self.path, times, alg)

    @at_unit_size
    def jvp(self, theta: jax.Array) -> jax.Array:
        """J theta [probe, trial, time, unit] of parameters [probe, p]."""
        return _checked(_jvp(self._system, theta))

    @at_unit_size
    def vjp(self, q: jax.Array) -> jax.Array:
        """J^T q [probe, p] of states [probe, trial, time, unit]."""
        return _checked(_vjp(self._system, q))

    @at_unit_size
    def propagate(self, q: jax.Array) -> jax.Array:
        """P_node q, both [probe, trial, time, unit]."""
        return _checked(_propagate(self._system, q))

    @at_unit_size
    def propagate_adjoint(self, q: jax.Array) -> jax.Array:
        """P_node^T q, both [probe, trial, time, unit]."""
        return _checked(_propagate_adjoint(self._system, q))

    def gram(self, q: jax.Array) -> jax.Array:
        """J J^T q."""
        return self.jvp(self.vjp(q))


class FieldOf(eqx.Module):
    """The field of one trial as a function of the parameters that learn, theta [p]."""

    field: Field
    values: list[jax.Array]
    names: tuple[str, ...] = eqx.field(static=True)  # jit would sort the names of a dict

    def __init__(self, problem: ODEProblem, model: Model) -> None:
        self.field = Field(problem)
        self.names, self.values = tuple(model.parameters), list(model.parameters.values())

    @property
    def theta(self) -> jax.Array:
        """The parameters as they are [p]."""
        return ravel_pytree(self.values)[0]

    def __call__(self, theta: jax.Array) -> Field:
        """The field at theta."""
        values = dict(zip(self.names, ravel_pytree(self.values)[1](theta), strict=True))
        return eqx.tree_at(lambda field: field.f, self.field, with_parameters(self.field.f, values))


class _System(eqx.Module):
    """What the equations are made of.

    Attributes:
        field: f, by theta.
        path: z(t).
        times: t_0 and the nodes [1 + time].
        controller: what chooses the steps.
    """

    field: FieldOf
    path: Path
    times: jax.Array
    controller: diffrax.PIDController

    def __init__(self, field: FieldOf, path: Path, times: jax.Array, alg: InterpolatingAdjoint) -> None:
        self.field, self.path, self.times = field, path, times
        rtol, atol = (jnp.asarray(value, times.dtype) for value in (alg.rtol, alg.atol))
        least = float(jnp.finfo(times.dtype).tiny)  # a step that shrinks to nothing ends the solve
        self.controller = diffrax.PIDController(rtol, atol, norm=_norm, dtmin=least, force_dtmin=False)

    def at(self, t: jax.Array) -> tuple[Callable[..., jax.Array], jax.Array]:
        """f at this time, of the states [trial, unit] and theta [p]; and the states."""

        def f(z: jax.Array, theta: jax.Array) -> jax.Array:
            return jax.vmap(self.field(theta), (None, 0, 0))(t, z, jnp.arange(len(z)))

        return f, self.path(t)

    def still(self, block: jax.Array) -> jax.Array:
        """Zero states [probe, trial, unit] for a block."""
        trials, _, _, units = self.path.coefficients.shape
        return jnp.zeros((len(block), trials, units), block.dtype)

    def solve(self, rate: Rate, state: Any, start: Any, end: Any, saveat: diffrax.SaveAt, dt0: Any) -> tuple[Any, Any]:
        """What `saveat` asks for, and whether the end was reached."""
        solved = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: rate(t, y)),
            diffrax.Tsit5(),
            start,
            end,
            dt0,
            state,
            saveat=saveat,
            stepsize_controller=self.controller,
            adjoint=diffrax.ForwardMode(),
            max_steps=MAX_STEPS,
            throw=False,
        )
        return solved.ys, solved.result == diffrax.RESULTS.successful

    def sweep(self, rate: Rate, state: Any, order: np.ndarray, jump: Callable[[Any, jax.Array], Any]) -> Any:
        """From time to time in this order, jumping at each end: the last state, all of them, and whether all went well.

        An interval is one step if that is good enough.
        """

        def advance(carry: tuple[Any, Any], interval: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            start, end, node = interval
            state, fine = carry
            state, reached = self.solve(rate, state, start, end, diffrax.SaveAt(t1=True), end - start)
            state = jump(jax.tree.map(lambda values: values[-1], state), node)
            return (state, fine & reached), state

        intervals = self.times[order[:-1]], self.times[order[1:]], jnp.asarray(order[1:] - 1)
        (last, fine), states = lax.scan(advance, (state, jnp.asarray(True)), intervals)
        return last, states, fine


@eqx.filter_jit
def _jvp(system: _System, changes: jax.Array) -> tuple[jax.Array, jax.Array]:
    theta = system.field.theta

    def rate(t: jax.Array, d: jax.Array) -> jax.Array:
        f, z = system.at(t)
        return jax.vmap(lambda *change: jax.jvp(f, (z, theta), change)[1])(d, changes)

    order = np.arange(len(system.times))
    _, states, fine = system.sweep(rate, system.still(changes), order, lambda state, _: state)
    return jnp.moveaxis(states, 0, 2), fine


@eqx.filter_jit
def _vjp(system: _System, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    theta = system.field.theta

    def rate(t: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        f, z = system.at(t)
        rates = jax.vmap(jax.vjp(f, z, theta)[1])(state[0])
        return -rates[0], -rates[1]

    def jump(state: tuple[jax.Array, jax.Array], node: jax.Array) -> tuple[jax.Array, jax.Array]:
        # The last interval ends at t_0, where nothing is added: its number is -1.
        return state[0] + jnp.where(node >= 0, q[:, :, node], 0), state[1]

    order, still = np.arange(len(system.times))[::-1], jnp.zeros((len(q), theta.size), q.dtype)
    (_, g), _, fine = system.sweep(rate, (q[:, :, -1], still), order, jump)
    return g, fine


@eqx.filter_jit
def _propagate(system: _System, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    theta = system.field.theta

    def rate(t: jax.Array, s: jax.Array) -> jax.Array:
        f, z = system.at(t)
        return jax.vmap(lambda s: jax.jvp(lambda z: f(z, theta), (z,), (s,))[1])(s)

    return _kicked(system, rate, q, np.arange(1, len(system.times)))


@eqx.filter_jit
def _propagate_adjoint(system: _System, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    theta = system.field.theta

    def rate(t: jax.Array, costate: jax.Array) -> jax.Array:
        f, z = system.at(t)
        return -jax.vmap(jax.vjp(lambda z: f(z, theta), z)[1])(costate)[0]

    return _kicked(system, rate, q, np.arange(1, len(system.times))[::-1])


def _kicked(system: _System, rate: Rate, q: jax.Array, order: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """The states at the nodes, going through them in this order and adding q at each."""
    first = q[:, :, order[0] - 1]
    _, states, fine = system.sweep(rate, first, order, lambda state, node: state + q[:, :, node])
    states = jnp.concatenate([first[None], states])
    return jnp.moveaxis(states[np.argsort(order)], 0, 2), fine


def _checked(found: tuple[jax.Array, jax.Array]) -> jax.Array:
    values, fine = found
    if not fine:
        raise solve_failed(f"it took more than {MAX_STEPS} steps, or left the finite numbers")
    return values


def _norm(parts: Any) -> jax.Array:
    """The largest root mean square of a probe's part."""
    means = [(part**2).reshape(len(part), -1).mean(1).max() for part in jax.tree.leaves(parts)]
    return jnp.sqrt(jnp.stack(means).max())
