"""Variational and adjoint equations of an ODE in JAX, solved by diffrax's Tsit5, compiled for each shape of a block."""

from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpflow_dyn._arrays.complex_numbers import split, vector_of
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._flows.adjoints import InterpolatingAdjoint
from kpflow_dyn._jax import reverse
from kpflow_dyn._jax.checks import with_parameters
from kpflow_dyn._jax.diffrax_library import beside, stopping
from kpflow_dyn._jax.field import Field
from kpflow_dyn._jax.model import Model
from kpflow_dyn._jax.programs import Shared
from kpflow_dyn._problems.inputs import jumps_within, stops_of
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn.ode._variational import MAX_STEPS, Jump, Path, Rate, State, solve_failed


class FieldOf(eqx.Module):
    """The field of one trial as a function of the parameters that learn, theta [p]."""

    field: Field
    values: list[jax.Array]
    names: tuple[str, ...] = eqx.field(static=True)  # jit would sort the names of a dict

    def __init__(self, problem: ODEProblem, model: Model) -> None:
        self.field = eqx.tree_at(lambda field: field.f, Field(problem), model.call)
        self.names, self.values = tuple(model.parameters), list(model.parameters.values())

    @property
    def theta(self) -> jax.Array:
        """The parameters as they are [p]."""
        return vector_of(self.values)

    def __call__(self, theta: jax.Array) -> Field:
        """The field at theta."""
        values = dict(zip(self.names, split(theta, self.values), strict=True))
        return eqx.tree_at(lambda field: field.f, self.field, with_parameters(self.field.f, values))


class System(eqx.Module):
    """See `kpflow_dyn.ode._variational.System`; the parameters are flat [p]."""

    transforms: ClassVar[Any] = BACKENDS["jax"].transforms

    of: FieldOf  # the field by its parameters
    path: Path
    times: jax.Array  # t_0 and the nodes [1 + time]
    before: jax.Array  # the same, those at which the inputs jump moved to just before
    after: jax.Array  # or just after it
    controller: diffrax.AbstractAdaptiveStepSizeController  # what chooses the steps
    max_steps: int = eqx.field(static=True)

    def __init__(
        self, problem: ODEProblem, model: Model, path: Path, times: np.ndarray, alg: InterpolatingAdjoint
    ) -> None:
        dtype = problem.z0.dtype
        self.of, self.path, self.times = FieldOf(problem, model), path, jnp.asarray(times, dtype)
        rtol, atol = (jnp.asarray(value, dtype) for value in (alg.rtol, alg.atol))
        least = float(jnp.finfo(dtype).tiny)  # a step that shrinks to nothing ends the solve
        chosen = diffrax.PIDController(rtol, atol, norm=_norm, dtmin=least, force_dtmin=False)
        jumps, nodes = jumps_within(problem).astype(dtype), times.astype(dtype)
        self.before, self.after = (jnp.asarray(beside(nodes, jumps, to)) for to in (-np.inf, np.inf))
        self.controller = stopping(chosen, problem)
        self.max_steps = MAX_STEPS + len(stops_of(problem))

    @property
    def parameters(self) -> jax.Array:
        """Those that learn."""
        return self.of.theta

    @property
    def size(self) -> int:
        """How many parameters there are."""
        return self.parameters.size

    def field(self, t: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """f at this time, of the states [trial, unit] and theta [p]."""
        return lambda z, theta: jax.vmap(self.of(theta), (None, 0, 0))(t, z, jnp.arange(len(z)))

    def split(self, theta: jax.Array) -> jax.Array:
        """As they are."""
        return theta

    join = split

    def each_node(self, function: Callable[..., jax.Array], *values: jax.Array) -> jax.Array:
        """All nodes at once, compiled."""
        return Shared(jax.vmap(function))(self.times[1:], *values)

    def solved(self, equation: Callable[..., jax.Array], block: jax.Array) -> jax.Array:
        """The equation, compiled."""
        found = _compiled(equation, self, block)
        if not bool(jnp.isfinite(found).all()):
            raise solve_failed(f"it took more than {self.max_steps} steps, or left the finite numbers")
        return found

    def sweep(self, rate: Rate, state: State, order: np.ndarray, jump: Jump | None) -> tuple[State, jax.Array]:
        """From time to time in this order, each interval in one step if that is good enough; NaN where that fails."""

        def advance(carry: tuple[State, Any], interval: tuple[Any, Any, Any]) -> tuple[tuple[State, Any], jax.Array]:
            start, end, node = interval
            state, reached = self._solve(rate, carry[0], start, end)
            state = state if jump is None else jump(state, node)
            return (state, carry[1] & reached), state[0]

        starts, ends = (self.after, self.before) if order[0] < order[-1] else (self.before, self.after)
        intervals = starts[order[:-1]], ends[order[1:]], jnp.asarray(order[1:] - 1)
        (state, fine), states = lax.scan(advance, (state, jnp.asarray(True)), intervals)
        failed = jnp.where(fine, 0.0, jnp.nan).astype(states.dtype)
        return tuple(values + failed for values in state), states + failed

    def _solve(self, rate: Rate, state: State, start: jax.Array, end: jax.Array) -> tuple[State, jax.Array]:
        """The state at the end, and whether it was reached."""
        solved: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, _: rate(t, y)),
            diffrax.Tsit5(),
            start,
            end,
            end - start,
            state,
            stepsize_controller=self.controller,
            adjoint=diffrax.ForwardMode(),
            max_steps=self.max_steps,
            throw=False,
        )
        return jax.tree.map(lambda values: values[-1], solved.ys), solved.result == diffrax.RESULTS.successful


class OwnSystem(System):
    """The same for a field without a forward mode."""

    transforms: ClassVar[Any] = reverse


@eqx.filter_jit
def _compiled(equation: Callable[..., jax.Array], system: System, block: jax.Array) -> jax.Array:
    return equation(system, block)


def _norm(parts: State) -> jax.Array:
    """The largest root mean square of a probe's part."""
    return jnp.sqrt(jnp.stack([(part**2).reshape(len(part), -1).mean(1).max() for part in parts]).max())
