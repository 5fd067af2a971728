"""Hybrid models as equinox modules; see `kpflow_dyn.models.Hybrid` and `ClosedLoop`."""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import numpy as np
from jax import Array

from kpflow_dyn._problems.events import LOOKS
from kpflow_dyn.models._events import Event, given_times
from kpflow_dyn.models._hybrid import MAX_EVENTS
from kpflow_dyn.models._sampling import Sampling
from kpflow_dyn.models.jax import hashable


class _Event(eqx.Module):
    """An event as a pytree of its condition and reset."""

    condition: Any
    reset: Any
    direction: int = eqx.field(static=True)
    given: tuple[Any, Any, float] = eqx.field(static=True)

    def __init__(self, event: Event) -> None:
        self.condition, self.reset, self.direction = event.condition, event.reset, int(event.direction or 0)
        self.given = (event.at, event.every, event.offset)

    def times(self, t0: float, end: float) -> np.ndarray:
        """As of `Event`."""
        return given_times(*self.given, t0, end)


def _as_pytree(event: Any) -> _Event:
    return event if isinstance(event, _Event) else _Event(event)


class Hybrid(eqx.Module):
    """What `kpflow_dyn.models.Hybrid` returns where a part is JAX's."""

    flow: Any
    events: tuple[_Event, ...]
    max_events: int = eqx.field(static=True)
    looks: int = eqx.field(static=True)

    def __init__(self, flow: Callable[..., Array], events: Sequence[Any], max_events: int, looks: int) -> None:
        self.flow, self.events, self.max_events, self.looks = flow, tuple(map(_as_pytree, events)), max_events, looks

    def with_events(self, events: Sequence[Event], max_events: int | None, looks: int | None) -> "Hybrid":
        """The same model with more events behind its own."""
        return Hybrid(self.flow, [*self.events, *events], max_events or self.max_events, looks or self.looks)

    def __call__(self, t: Any, z: Array, *given: Any) -> Any:
        """z' [unit], by a flow of t, z, and of what else it takes."""
        return self.flow(t, z, *given)


class SampledLoop(eqx.Module):
    """What `kpflow_dyn.models.ClosedLoop(..., every=dt)` returns for a policy of JAX."""

    plant: Callable[[Array, Array], Array] = eqx.field(static=True, converter=hashable)
    policy: Any
    readout: Any
    sampling: Sampling = eqx.field(static=True)
    plant_events: tuple[_Event, ...] = ()
    max_events: int = eqx.field(static=True, default=MAX_EVENTS)
    looks: int = eqx.field(static=True, default=LOOKS)

    @property
    def events(self) -> tuple[Any, ...]:
        """The samples, when their controls act where that is at no sample, and the events of the plant."""
        return self.sampling.events(self.policy, self.readout, self.plant_events)

    def with_events(self, events: Sequence[Event], max_events: int | None, looks: int | None) -> "SampledLoop":
        """The same loop with more events of the plant."""
        mine = (*self.plant_events, *map(_as_pytree, events))
        counts = max_events or self.max_events, looks or self.looks
        return SampledLoop(self.plant, self.policy, self.readout, self.sampling, mine, *counts)

    def __call__(self, t: Any, z: Array, x_t: Array | None = None) -> Array:
        """z' [unit]: the plant's under the held control, and zeros."""
        return self.sampling.flow(self.plant, z)

    def start(self, z0: Array, memory: Array | None = None, control: Array | None = None) -> Array:
        """The state [trial, unit] of plants in z0 [trial, state]; memory and control are zeros where None."""
        return self.sampling.start(z0, memory, control)
