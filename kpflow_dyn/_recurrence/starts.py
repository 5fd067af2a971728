"""Tangents of steps whose start learns: z_0 = s(theta) moves the states as a kick of the first step does.

    ds_t = A_t ds_{t-1} + B_t V_t dtheta,    ds_0 = D s dtheta

so that J = P (B V + e_1 A_1 D s), and K = (B V + e_1 A_1 D s)(...)*: P is that of the steps, and the identity
ntk = P K P* holds as without it. The first step of an ODE has length zero, and A_1 = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, is_array, like_numpy, to_numpy, widened
from kpflow_dyn._arrays.complex_numbers import count
from kpflow_dyn._flows.flow import Draw
from kpflow_dyn._flows.referee import Derivative, ask, departure
from kpflow_dyn._problems.starts import start_map
from kpflow_dyn._recurrence.autodiff import first_of_times, pulled_apart, pushed_apart
from kpflow_dyn._recurrence.tangent import FromStart, StepsTangent

ENCODER = ("encoder.", "encoder[")  # how the names of its parameters begin


@dataclass(frozen=True)
class Start:
    """D s: how z_0 [probe, trial, unit] moves with the parameters [probe, p], by autograd through the model's start.

    Attributes:
        derivative: of z_0 in the parameters, and in an argument without entries.
        names: the parameters that move it.
        entries: their numbers among all [n].
        alone: whether the only one is z_0 itself.
    """

    derivative: Derivative
    names: tuple[str, ...]
    entries: np.ndarray
    alone: bool

    def jvp(self, theta: Array) -> Array:
        return self.derivative.push(theta, None)

    def vjp(self, start: Array) -> Array:
        return self.derivative.pull(start)[0]


def start_of(sol: Any, model: Any) -> Start | None:
    """The derivative of the start in the parameters that learn; None where none of them moves it."""
    problem, start = sol.problem, start_map(sol.problem)
    if start is None:
        return None
    trials = getattr(problem, "trials", slice(None))  # of an SDE there are several paths of each
    derivative = model.derivative(lambda call, _nothing: start(call)[trials], sol.start[:, :0])
    ask(derivative)
    if error := departure(derivative.value, sol.start[:, : derivative.value.shape[-1]]):
        raise ValueError(
            f"the start that the encoder gives differs from that of the solution by {error:.1e}: its parameters "
            "changed after solve; solve again"
        )
    cut_off = [name for name in model.parameters if name.startswith(ENCODER)]
    if cut_off and not derivative.connected:
        raise ValueError(
            f"z_0 has no derivative in {', '.join(cut_off)}, as far as autograd can tell; look for .detach(), no_grad "
            "or numpy in the encoder, or leave them out by params="
        )
    moving = _moving(model.parameters, to_numpy(derivative.probe.theta)[0])
    if not moving:
        return None
    return Start(derivative, tuple(moving), np.concatenate([*moving.values()]), is_array(problem.encoder))


def _moving(parameters: Mapping[str, Array], gradient: np.ndarray) -> dict[str, np.ndarray]:
    """The numbers of those parameters among all that have a gradient [p]."""
    ends = np.cumsum([0, *map(count, parameters.values())])
    numbers = {name: np.arange(*ends[i : i + 2]) for i, name in enumerate(parameters)}
    return {name: own for name, own in numbers.items() if gradient[own].any()}


class StartedMaps:
    """J, its transpose and J J^T of maps that also know of z_0, which moves with the parameters."""

    def __init__(self, maps: FromStart, start: Start) -> None:
        self._maps, self._start = maps, start

    def jvp(self, theta: Array) -> Array:
        return self._maps.jvp_from(theta, self._start.jvp(theta))

    def vjp(self, q: Array) -> Array:
        theta, start = self._maps.vjp_from(q)
        return theta + self._start.vjp(start)

    def gram(self, q: Array) -> Array:
        return self.jvp(self.vjp(q))


class StartedTangent:
    """See `kpflow_dyn._recurrence.tangent.Tangent`; the start is one more site, whose outputs enter the first step.

    Args:
        steps: the tangent of the steps, whose states may be followed by more units, as of stages, which start at zero.
    """

    def __init__(self, steps: StepsTangent, start: Start) -> None:
        self._steps, self._start, self.untraced = steps, start, steps.untraced
        self.next_state, self.weights, self.parameter_size = steps.next_state, steps.weights, steps.parameter_size
        self._units, self._kicks = start.derivative.value.shape[-1], len(steps.site_kicks)
        self.site_kicks = np.arange(self._kicks + self._units)
        self.propagate, self.propagate_adjoint = steps.propagate, steps.propagate_adjoint
        self.advance, self.advance_adjoint, self.factorise = steps.advance, steps.advance_adjoint, steps.factorise

    @property
    def sites(self) -> list[tuple[str, Any]]:
        """Those of the steps, and the start; none where the steps were not traced."""
        if self.untraced:
            return []
        start = self._start
        kicks = np.arange(self._kicks, self._kicks + self._units)
        site = StartSite(" + ".join(start.names), "scale" if start.alone else "opaque", start.entries, kicks)
        return [*self._steps.sites, ("start", site)]

    @property
    def inputs(self) -> list[Array]:
        """What the weights of each site multiply: those of the start one, before the first step."""
        every = np.zeros((*self.next_state.shape[:2], self._units))
        every[:, 0] = 1
        return [*self._steps.inputs, *([] if self.untraced else [like_numpy(every, self.next_state)])]

    # All steps

    def jvp(self, theta: Array) -> Array:
        return self._steps.jvp_from(theta, self._widened(self._start.jvp(theta)))

    def vjp(self, q: Array) -> Array:
        theta, start = self._steps.vjp_from(q)
        return theta + self._start.vjp(self._narrowed(start))

    def gram(self, q: Array) -> Array:
        return self.jvp(self.vjp(q))

    def jvp_apart(self, theta: Array) -> Array:
        start = self._widened(pushed_apart(self._start.jvp, theta))
        return self._steps.jvp_apart(theta) + self._steps.jvp_from(0 * theta[:, 0], start)

    def vjp_apart(self, q: Array) -> Array:
        start = self._narrowed(self._steps.vjp_from(q)[1])
        return self._steps.vjp_apart(q) + pulled_apart(self._start.vjp, start)

    # Each step by itself

    def step_jvp(self, theta: Array, dz: Array) -> Array:
        return self._steps.step_jvp(theta, dz + self._at_first(self._start.jvp(theta)))

    def step_vjp(self, q: Array) -> tuple[Array, Array]:
        theta, dz = self._steps.step_vjp(q)
        return theta + self._start.vjp(self._narrowed(dz[:, :, 0])), dz

    def kick(self, theta: Array) -> Array:
        return self._steps.kick(theta) + self._steps.advance(self._at_first(self._start.jvp(theta)))

    def kick_adjoint(self, q: Array) -> Array:
        start = self._narrowed(self._steps.advance_adjoint(q)[:, :, 0])
        return self._steps.kick_adjoint(q) + self._start.vjp(start)

    def write(self, theta: Array) -> Array:
        start = first_of_times(self._start.jvp(theta)[:, :, None], self.next_state)
        return self._joined(self._steps.write(theta), start)

    def read(self, values: Array) -> Array:
        of_steps, start = values[..., : self._kicks], values[:, :, 0, self._kicks :]
        return self._steps.read(of_steps) + self._start.vjp(start)

    def enter(self, values: Array) -> Array:
        of_steps, start = values[..., : self._kicks], values[:, :, 0, self._kicks :]
        return self._steps.enter(of_steps) + self._steps.advance(self._at_first(start))

    def enter_adjoint(self, q: Array) -> Array:
        start = self._narrowed(self._steps.advance_adjoint(q)[:, :, :1])
        return self._joined(self._steps.enter_adjoint(q), first_of_times(start, self.next_state))

    # Other steps

    def truncated(self, bases: list[Array | None]) -> StartedTangent:
        return StartedTangent(self._steps.truncated(bases[: len(self._steps.sites)]), self._start)

    def fed_back(self, draw: Draw) -> StartedTangent:
        if not self._start.alone:
            raise ValueError(
                "errors would go back through the encoder by its own weights; leave its parameters out by params="
            )
        return StartedTangent(self._steps.fed_back(draw), self._start)

    # The start among the units and times of the steps

    def _at_first(self, start: Array) -> Array:
        """z_0 [probe, trial, unit] as states before each step, zero but for the first."""
        return first_of_times(self._widened(start)[:, :, None], self.next_state)

    def _widened(self, start: Array) -> Array:
        more = self.next_state.shape[-1] - self._units
        return widened(start, more) if more else start

    def _narrowed(self, start: Array) -> Array:
        return start[..., : self._units]

    def _joined(self, *values: Array) -> Array:
        return array_namespace(self.next_state).concat(values, axis=-1)


@dataclass(frozen=True)
class StartSite:
    """The site of a start: z_0 itself, or the parameters of an encoder, whose derivative it is applied by."""

    name: str
    kind: str
    entries: np.ndarray
    kicks: np.ndarray
