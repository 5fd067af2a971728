"""Models whose state jumps at events: what they have, and their events in the form of the package.

A hybrid model is a field f(t, z) or f(t, z, x) with `events`, each with these members:

    condition  (t, z[, x]) -> a number for each trial; the event is where it crosses zero. None at given times.
    reset      (t, z[, x]) -> z after the jump, in the form of z.
    direction  of the crossing: -1 from above, 1 from below, 0 both, in the order in which times are solved.
    times      (t0, end) -> the given times of the event from t0 to the end, which may lie before t0.

and with `max_events`, how many may happen in a trial beside those at given times, and with_events(events, max_events,
looks), the same model with more of them. Its field between jumps may stand as its `flow`; `looks` says at how many
points of each step conditions are looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from kpflow_dyn._arrays import Array, is_array
from kpflow_dyn._backend import backend_of
from kpflow_dyn._problems.forms import Form, arguments_for

LOOKS = 8


def is_hybrid(model: Any) -> bool:
    """Whether a model has jumps between which it flows."""
    return hasattr(model, "events") and hasattr(model, "max_events")


def is_moving(model: Any) -> bool:
    """Whether a hybrid model has events whose time a condition says."""
    return any(event.condition is not None for event in model.events)


def looks_of(model: Any) -> int:
    """At how many points of each step the conditions of a hybrid model are looked at first."""
    return getattr(model, "looks", LOOKS)


def refuse_hybrid(model: Any, what: str, advice: str) -> None:
    """Raise where a model has jumps that this does not know of."""
    if is_hybrid(model):
        raise ValueError(f"{what} a hybrid model, whose state jumps at events; {advice}")


def refuse_jumps(value: Any, who: str, instead: str) -> None:
    """Raise where a value is a hybrid model, or has one inside, whose jumps would not happen.

    Args:
        value: a model, or anything else.
        who: got it.
        instead: what to do in its place; "" where one that has none inside of other parts is taken.
    """
    if is_array(value):
        return
    for behind in ("__self__", "func"):  # of a method, and of a functools.partial
        if hasattr(value, behind):
            refuse_jumps(getattr(value, behind), who, instead or "give the model itself")
    backend = backend_of(value)
    parts = [value] if backend is None else backend.models.nodes(value)
    if is_hybrid(parts[0]):
        if instead:
            raise ValueError(f"{who} a hybrid model, whose jumps at events would be lost; {instead}")
    elif any(map(is_hybrid, parts)):
        raise ValueError(
            f"{who} a {type(value).__name__} with a hybrid model inside, such as a sampled loop, whose jumps would be "
            "lost; give events to the outermost model, kp.models.Hybrid(flow, *events), or sample the outermost loop"
        )


@dataclass(frozen=True)
class EventInForm:
    """An event as its user wrote it, of the state [..., unit] at times that increase."""

    event: Any
    form: Form
    of_condition: tuple  # what its condition is called with after t, the state and the inputs
    of_reset: tuple

    @property
    def direction(self) -> int:
        """That of the event: as a solve meets it."""
        return self.event.direction

    @property
    def condition(self) -> Callable[..., Array] | None:
        """(t, z[, x]) -> c."""
        condition = self.event.condition
        return None if condition is None else partial(self.form.called, condition, self.of_condition)

    def reset(self, t: Array, z: Array, *x: Array) -> Array:
        """The state behind the jump."""
        return self.form.state(self.event.reset, self.of_reset, t, z, *x)

    def times(self, t0: float, end: float) -> np.ndarray:
        """The given times."""
        time = self.form.time
        return time(self.event.times(time(t0), time(end)))


class EventsOfAnother:
    """What a model around a hybrid one has of its events."""

    @property
    def around(self) -> Any:
        """The hybrid model."""
        raise NotImplementedError

    @property
    def max_events(self) -> int:
        """How many may happen in a trial."""
        return self.around.max_events

    @property
    def looks(self) -> int:
        """At how many points of a step conditions are looked at first."""
        return looks_of(self.around)


class EventsThrough(EventsOfAnother):
    """Of a model function(model, ...): its events as function.event gives them."""

    through_model: Any
    function: Any

    @property
    def around(self) -> Any:
        """The hybrid model."""
        return self.through_model

    @property
    def events(self) -> Any:
        """The events."""
        return tuple(map(self.function.event, self.around.events))


class EventsInForm(EventsOfAnother):
    """Of a field in the form of the package: its events in that form."""

    field: Any
    form: Form
    args: Any

    @property
    def around(self) -> Any:
        """The hybrid model."""
        return self.field

    @property
    def events(self) -> tuple[EventInForm, ...]:
        """The events."""
        pairs = zip(self.around.events, self.args.events, strict=True)
        return tuple(EventInForm(event, self.form, *given) for event, given in pairs)


class HybridArguments(NamedTuple):
    """What the parts of a hybrid model are called with after t, the state and the inputs; false where with nothing."""

    flow: tuple
    events: tuple[tuple[tuple, tuple], ...]  # the condition and the reset of each

    def __bool__(self) -> bool:
        return bool(self.flow) or any(map(any, self.events))


def arguments_of_field(f: Any, args: Any, given: Sequence[str], function_of: Callable[[Any], Any]) -> tuple:
    """What a field, as a function, is called with after what is given, see `arguments_for`; or parts of a hybrid."""
    if not is_hybrid(f):
        return arguments_for(function_of(f), args, given)

    def of(what: str, part: Any) -> tuple:
        return () if part is None else arguments_for(function_of(part), args, given, what)

    return HybridArguments(
        of("flow", getattr(f, "flow", f)),
        tuple(
            (of(f"the condition of event {n}", event.condition), of(f"the reset of event {n}", event.reset))
            for n, event in enumerate(f.events)
        ),
    )
