"""Closed loops and hybrid models with more states beside their own: what a cost needs, as a part of the state.

continuous         s = [z, int L dt]          so that steps, jumps and the times of events are those of one model
discrete time      s = [z, u]                 with the control that acted in the step which made z
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace, device
from kpflow_dyn._backend import Backend
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._problems.steps import call_field
from kpflow_dyn.models._discrete import parts_after
from kpflow_dyn.models._equations import join
from kpflow_dyn.models._sampling import OfPart


@dataclass(frozen=True)
class Arguments:
    """What a cost is called on: z, or L(z, u) with the plant's state and its control."""

    has_control: bool

    def __call__(self, model: Any, z: Array, x: Array | None) -> tuple[Array, ...]:
        """Of states [..., unit] of a closed loop, which may be the flow of a hybrid model, or of a sampled one."""
        if not self.has_control:
            return (z,)
        if hasattr(model, "sampling"):
            return z[..., : model.sampling.state], z[..., model.sampling.of_held]
        return z, getattr(model, "flow", model).policy(join(z, x))


@dataclass(frozen=True)
class BesideCost:
    """s' = [z', L] of a field whose state has this many units; events of a hybrid one leave the cost as it is."""

    backend: Backend
    cost: Any
    units: int
    arguments: Arguments

    def __call__(self, model: Any, t: Array, s: Array, *x: Array) -> Array:
        """s' in torch of all trials, in JAX of one."""
        z = s[..., : self.units]
        rate = of_rows(self.backend, self.cost, *self.arguments(model, z, *(x or (None,))))
        return array_namespace(s).concat([call_field(model, t, z, *(x or (None,))), rate[..., None]], axis=-1)

    def event(self, event: Any) -> Any:
        """An event of the model as one of s."""
        return OfPart(event, self.units)


@dataclass(frozen=True)
class WithControl:
    """s = [z, u] of a loop in discrete time whose state has this many units."""

    units: int

    def __call__(self, loop: Any, x_t: Array, s: Array) -> Array:
        """The next s."""
        parts = parts_after(loop.plant, loop.policy, loop.readout, s[..., : self.units], x_t)
        return array_namespace(s).concat(parts, axis=-1)


@dataclass(frozen=True)
class AtRest:
    """A step of [plant, memory, control] by Euler's method, whose fixed points are those of a sampled loop."""

    def __call__(self, loop: Any, x: Array, s: Array) -> Array:
        """The next s."""
        sampling, xp = loop.sampling, array_namespace(s)
        z, memory, u = (
            s[..., : sampling.state],
            s[..., sampling.state : sampling.of_held.start],
            s[..., sampling.of_held],
        )
        moved, seen = z + sampling.every * loop.plant(z, u), join(z, x) if x.shape[-1] else z
        answer = sampling.after_sample(loop.policy, loop.readout, seen, memory, u)
        return xp.concat([part for part in (moved, *answer) if part.shape[-1]], axis=-1)


def of_rows(backend: Backend, cost: Any, *rows: Array) -> Array:
    """A cost of one state, of rows [unit], or [trial, unit]."""
    if rows[0].ndim == 1:
        return cost(*rows)
    if len(rows[0]) == 1:  # one row, as where steps are traced
        return cost(*(row[0] for row in rows))[None]
    return backend.transforms.vmap(cost)(*rows)


def beside_cost(problem: ODEProblem, cost: Any, has_control: bool) -> ODEProblem:
    """A problem with the integral of its cost as a last state; a start that learns counts as given."""
    function = BesideCost(problem.backend, cost, int(problem.z0.shape[-1]), Arguments(has_control))
    model = problem.backend.models.through(problem.f, function)
    plain = {"args": None, "order": 1, "encoder": None}  # problem.f is a field of a real state [unit] alone
    return problem.remake(f=model, z0=_widened(problem.z0, 1), t=problem.t, **plain)


def with_control(problem: DiscreteProblem) -> tuple[DiscreteProblem, int]:
    """A loop in discrete time with its control as further states, and how many units it had; likewise."""
    start = problem.backend.tracing.discrete_step(problem)[1]
    units = int(start.shape[-1])
    loop = problem.cell
    one = problem.backend.tracing.on_one_trial(
        lambda z, x: parts_after(loop.plant, loop.policy, loop.readout, z, x)[-1]
    )
    width = int(one(start[0], problem.x[0, 0]).shape[-1])
    cell = problem.backend.models.through(loop, WithControl(units))
    return problem.remake(cell=cell, z0=_widened(start, width), encoder=None), units


def _widened(z0: Array, more: int) -> Array:
    xp = array_namespace(z0)
    return xp.concat([z0, xp.zeros((len(z0), more), dtype=z0.dtype, device=device(z0))], axis=-1)
