"""A solved ODE as a recurrence: one Runge-Kutta step after another on frozen steps, and the nodes read off them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from kpflow_dyn._arrays import (
    Array,
    add_at,
    array_namespace,
    like_numpy,
    reshaped,
    side_by_side,
    take_at,
    widened,
)
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.steps import AcceptedSteps, Field, Tableau, call_field, own_times, stages, step
from kpflow_dyn.ode._newton import converged, corrected_stages


@dataclass(frozen=True)
class RungeKuttaStep:
    """The step map of one row: z = [y, ...] -> [y_1, h k_1, ..., h k_s], or y_1 alone.

    A row is [h, t_1, ..., t_s, x_1, ..., x_s], then for an implicit method what `converged` gives. In torch, where a
    field takes all trials at once, these may share h and the times; see `own_times`.
    """

    tableau: Tableau
    units: int  # the width of y
    inputs: int | None  # the width of x, None where the field takes none
    with_stages: bool  # whether the stage derivatives are wanted, for a dense output

    def __call__(self, field: Callable[..., Array], row: Array, z: Array) -> Array:
        """The step of `field` on this row."""
        return self.taken(field, *self.read(row, z[..., : self.units]))

    def read(self, row: Array, y: Array) -> tuple[Array, list[Array], Array, list[Array | None], Array]:
        """The length of the step, the times of its stages, y, the inputs there, and what an implicit method needs."""
        count, width = len(self.tableau.b), self.inputs or 0
        (h, *times) = own_times(row, 1 + count)
        h = h[:, None] if h.ndim else h
        starts = [1 + count + i * width for i in range(count)]
        inputs = [None if self.inputs is None else row[..., start : start + width] for start in starts]
        of_each = row if row.ndim > 1 and row.shape[0] > 1 else row[0] if row.ndim > 1 else row
        return h, times, y, inputs, of_each[..., 1 + count * (1 + width) :]

    def taken(
        self, field: Callable[..., Array], h: Array, times: list[Array], y: Array, inputs: list, newton: Array
    ) -> Array:
        """The step of this length from y, of what `read` gives."""
        k = self._stages(partial(call_field, field), times, h, y, inputs, newton)
        after = step(self.tableau, h, y, k)
        return array_namespace(y).concat([after, *(h * k_i for k_i in k)], axis=-1) if self.with_stages else after

    def _stages(self, field: Field, times: list, h: Array, y: Array, inputs: list, newton: Array) -> list[Array]:
        if self.tableau.explicit:
            return stages(field, self.tableau, times, h, y, inputs)
        size = len(times) * self.units
        k = newton[..., :size].reshape((*newton.shape[:-1], -1, self.units))
        inverse = newton[..., size:].reshape((*newton.shape[:-1], -1, self.units, self.units))
        return corrected_stages(field, self.tableau, times, h, y, inputs, k, inverse)

    def rows(
        self, problem: ODEProblem, dt: np.ndarray, times: np.ndarray, before: Array, guess: Array | None = None
    ) -> Array:
        """The rows [trial, step, ...] of steps of length dt [trial, step] from `before` [trial, step, unit].

        The stages are evaluated at times [trial, step, stage]; of an implicit method they may be known, as `guess`.
        """
        parts = [like_numpy(np.concatenate([dt[..., None], times], -1), before)]
        x = inputs_at(problem, times.reshape(len(dt), -1))
        if x is not None:
            parts.append(x := reshaped(x, (*times.shape, x.shape[-1])))
        if not self.tableau.explicit:
            parts.append(converged(problem, self.tableau, dt, times, x, before, guess))
        return parts[0] if len(parts) == 1 else side_by_side(parts, axes=2)

    def widen(self, before: Array) -> Array:
        """States before the step [..., unit] as z, filled up with zeros where the stages would be."""
        return widened(before, self.units * len(self.tableau.b)) if self.with_stages else before


def field_step(inputs: int | None) -> Callable[[Callable[..., Array], Array, Array], Array]:
    """The field itself as a step map on rows [t, x]."""

    def step(field: Callable[..., Array], row: Array, z: Array) -> Array:
        (t,) = own_times(row, 1)
        return call_field(field, t, z, None if inputs is None else row[..., 1:])

    return step


class Nodes:
    """How the states at the nodes are read off the steps: y(t_j) = y_1 + sum_i w_ji h k_i of the step that holds t_j.

    Attributes:
        identical: whether the nodes are the ends of all steps in their order, so that nothing is to be read.
        with_stages: whether some node lies inside of a step.
        index, weights: the step of each node [trial, time], and its w after a one [trial, time, 1 (+ stage)].
    """

    def __init__(
        self, steps: AcceptedSteps, times: np.ndarray, like: Array, compiled: Callable[..., Any] = lambda f: f
    ) -> None:
        self.index, theta = steps.locate(times)
        self.steps = steps.t.shape[1]
        ends = np.arange(self.steps)
        self.with_stages = bool((theta < 1).any())
        self.identical = not self.with_stages and self.index.shape[1] == self.steps and bool((self.index == ends).all())
        weights = steps.tableau.interpolation(theta) if self.with_stages else np.zeros((*theta.shape, 0))
        self._read_off, self._spread_on = compiled(read_off), compiled(partial(_spread_on, self.steps))
        self.weights = like_numpy(np.concatenate([np.ones((*theta.shape, 1)), weights], -1), like)

    def read(self, values: Array) -> Array:
        """Values of the steps [probe, trial, step, (1 + stage) unit] -> of the nodes [probe, trial, time, unit]."""
        if self.identical:
            return values
        return self._read_off(values, self.index, self.weights)

    def spread(self, q: Array) -> Array:
        """The transpose of `read`."""
        if self.identical:
            return q
        return self._spread_on(q, self.index, self.weights)


def read_off(values: Array, index: Array, weights: Array) -> Array:
    """`Nodes.read`, by the step [trial, time] of each node and its weights [trial, time, 1 + stage]."""
    here = take_at(values, index)
    parts = here.reshape((*here.shape[:3], weights.shape[-1], -1))
    return (weights[..., None] * parts).sum(-2)


def _spread_on(steps: int, q: Array, index: Array, weights: Array) -> Array:
    parts = weights[..., None] * q[..., None, :]
    return add_at(parts.reshape((*q.shape[:3], -1)), index, steps)
