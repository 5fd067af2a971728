"""A recurrence of which some steps and units are seen: those at the times of a user, without what is kept beside."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, add_at, array_namespace, take_at, taken, widened
from kpflow_dyn._flows.flow import Draw
from kpflow_dyn._recurrence.tangent import Tangent

SAME = ("sites", "inputs", "site_kicks", "weights", "parameter_size", "untraced", "write", "read")  # as of all steps


class Seen:
    """A `Tangent` of the states R s, with s those of all steps and R what is seen of them.

    With P and J of all steps, its P is R P R^T and its J is R J. How parameters kick what is seen is for those below.

    Args:
        steps: the tangent of all steps.
        places: the numbers of the steps that are seen [time], or [trial, time] of each trial; None for all.
        units: how many of the first units are.
    """

    def __init__(self, steps: Any, places: np.ndarray | None, units: int) -> None:
        self.steps, self.places, self.units = steps, places, units
        self.next_state = self.see(steps.next_state[None])[0]

    def __getattr__(self, name: str) -> Any:
        if name not in SAME:
            raise AttributeError(name)
        return getattr(self.steps, name)

    def see(self, values: Array) -> Array:
        """R, [probe, trial, step, width] -> [probe, trial, time, unit]."""
        return self._at(values, self.places)[..., : self.units]

    def spread(self, q: Array) -> Array:
        """Its transpose."""
        more = self.steps.next_state.shape[2] - self.units
        return self._into(widened(q, more) if more else q, self.places)

    def _at(self, values: Array, places: np.ndarray | None) -> Array:
        return values if places is None else take_at(values, _of_trials(places, values))

    def _into(self, values: Array, places: np.ndarray | None) -> Array:
        count = self.steps.next_state.shape[1]
        return values if places is None else add_at(values, _of_trials(places, values), count)

    def propagate(self, q: Array) -> Array:
        return self.see(self.steps.propagate(self.spread(q)))

    def propagate_adjoint(self, q: Array) -> Array:
        return self.see(self.steps.propagate_adjoint(self.spread(q)))

    def jvp(self, theta: Array) -> Array:
        return self.see(self.steps.jvp(theta))

    def vjp(self, q: Array) -> Array:
        return self.steps.vjp(self.spread(q))

    def gram(self, q: Array) -> Array:
        return self.see(self.steps.gram(self.spread(q)))

    def jvp_apart(self, theta: Array) -> Array:
        return self.see(self.steps.jvp_apart(theta))

    def vjp_apart(self, q: Array) -> Array:
        return self.steps.vjp_apart(self.spread(q))


class LookedUp(Seen):
    """A state that carries its past along, a line of states, with kicks between steps, as P on functions of time has.

    A kick lifts the state from its time on, and at this time by half, which is what is looked up there later.
    """

    def propagate(self, q: Array) -> Array:
        return self.see(self.steps.propagate(self.spread(q) - self._half_behind(q)))

    def propagate_adjoint(self, q: Array) -> Array:
        line = self.steps.propagate_adjoint(self.spread(q))
        return self.see(line) - self._half_behind_adjoint(line)

    @property
    def _next(self) -> np.ndarray:
        """The steps after those that are seen, which may end with the last."""
        count = self.steps.next_state.shape[1]
        after = 1 + (np.arange(count) if self.places is None else self.places)
        return after[after < count]

    def _half_behind(self, q: Array) -> Array:
        """Half of the kicks, one step later where the state before the newest is."""
        xp, width = array_namespace(q), self.steps.next_state.shape[2]
        if width == self.units:
            return 0 * self.spread(q)
        behind = xp.concat([xp.zeros_like(q), q / 2], axis=-1)[:, :, : len(self._next)]
        more = width - 2 * self.units
        return self._into(widened(behind, more) if more else behind, self._next)

    def _half_behind_adjoint(self, line: Array) -> Array:
        if line.shape[-1] == self.units:
            return 0 * self.see(line)
        found, xp = self._at(line, self._next)[..., self.units : 2 * self.units] / 2, array_namespace(line)
        last = self.next_state.shape[1] - len(self._next)
        return xp.concat([found, xp.zeros_like(found[:, :, :1])], axis=2) if last else found


class OfLine(Seen):
    """All steps of a state that carries its past along, a line of states; seen is the newest, which alone is kicked."""

    def __init__(self, steps: Any, units: int) -> None:
        super().__init__(steps, None, units)
        self.length = steps.next_state.shape[2] // units

    def kick(self, theta: Array) -> Array:
        return self.see(self.steps.kick(theta))

    def kick_adjoint(self, q: Array) -> Array:
        return self.steps.kick_adjoint(self.spread(q))

    def enter(self, values: Array) -> Array:
        return self.see(self.steps.enter(values))

    def enter_adjoint(self, q: Array) -> Array:
        return self.steps.enter_adjoint(self.spread(q))

    def advance(self, dz: Array) -> Array:
        """From changes of the states before the steps: those before them as well are in the lines."""
        xp, count = array_namespace(dz), dz.shape[2]
        line = [dz] + [
            xp.concat([xp.zeros_like(dz[:, :, : min(j, count)]), dz[:, :, : max(count - j, 0)]], axis=2)
            for j in range(1, self.length)
        ]
        return self.see(self.steps.advance(xp.concat(line, axis=-1)))

    def advance_adjoint(self, q: Array) -> Array:
        xp, count = array_namespace(q), q.shape[2]
        line = self.steps.advance_adjoint(self.spread(q))
        found = line[..., : self.units]
        for j in range(1, self.length):
            part = line[..., j * self.units : (j + 1) * self.units]
            back = [part[:, :, min(j, count) :], xp.zeros_like(part[:, :, : min(j, count)])]
            found = found + xp.concat(back, axis=2)
        return found

    def truncated(self, bases: list[Array | None]) -> "OfLine":
        return OfLine(self.steps.truncated(bases), self.units)

    def fed_back(self, draw: Draw) -> "OfLine":
        return OfLine(self.steps.fed_back(draw), self.units)


class AtGrid(Seen):
    """Steps that are seen at the times of a grid: what is between two times counts as one step.

    Args:
        within: makes the tangent of the same steps where each that follows a time of the grid begins at known states.
    """

    def __init__(self, steps: Any, places: np.ndarray, within: Callable[[], Tangent], units: int | None = None) -> None:
        super().__init__(steps, places, steps.next_state.shape[2] if units is None else units)
        self._make = within
        self._firsts = np.concatenate([0 * places[..., :1], places[..., :-1] + 1], axis=-1)

    @cached_property
    def within(self) -> Any:
        """The steps from one time of the grid to the next."""
        return self._make()

    def kick(self, theta: Array) -> Array:
        return self.see(self.within.jvp(theta))

    def kick_adjoint(self, q: Array) -> Array:
        return self.within.vjp(self.spread(q))

    def enter(self, values: Array) -> Array:
        return self.see(self.within.propagate(self.steps.enter(values)))

    def enter_adjoint(self, q: Array) -> Array:
        return self.steps.enter_adjoint(self.within.propagate_adjoint(self.spread(q)))

    def advance(self, dz: Array) -> Array:
        more = self.steps.next_state.shape[2] - self.units
        first = self._at(self.steps.advance(self._into(widened(dz, more) if more else dz, self._firsts)), self._firsts)
        return self.see(self.within.propagate(self._into(first, self._firsts)))

    def advance_adjoint(self, q: Array) -> Array:
        first = self._at(self.within.propagate_adjoint(self.spread(q)), self._firsts)
        return self._at(self.steps.advance_adjoint(self._into(first, self._firsts)), self._firsts)[..., : self.units]

    def truncated(self, bases: list[Array | None]) -> Any:
        assert self.places is not None
        return type(self)(self.steps.truncated(bases), self.places, lambda: self.within.truncated(bases), self.units)

    def fed_back(self, draw: Draw) -> Any:
        assert self.places is not None
        return type(self)(self.steps.fed_back(draw), self.places, lambda: self.within.fed_back(draw), self.units)

    def measure_of_steps(self, measure: Array | None) -> Array | None:
        """Of each step that of the time it leads to, behind the last one that of this."""
        if measure is None or measure.shape[-2] == 1:
            return measure
        assert self.places is not None
        trials, count = self.steps.next_state.shape[:2]
        every = np.broadcast_to(self.places, (trials, self.places.shape[-1]))
        leads_to = np.stack([np.searchsorted(ends[:-1], np.arange(count)) for ends in every])
        return taken(array_namespace(measure).broadcast_to(measure, (trials, *measure.shape[-2:])), leads_to)


def _of_trials(places: np.ndarray, values: Array) -> np.ndarray:
    """Places of each trial [trial, time], of values [probe, trial, ...]."""
    return np.tile(places, (values.shape[1], 1)) if places.ndim == 1 else places
