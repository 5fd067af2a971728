"""A policy that sees a plant at sampling times and holds its control between them: the equations, in torch and JAX."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn._shown import type_name
from kpflow_dyn.models._equations import join, of_cell
from kpflow_dyn.models._events import Event

Function = Callable[..., Any]
ROUND_OFF = 1e-9  # of a delay, in samples


@dataclass(frozen=True)
class Sampling:
    """The state is [plant, memory, held control, controls that wait for their time, the oldest first].

    Attributes:
        every: the time between samples.
        state, control, memory: how many numbers each has.
        delay: how long after its sample a control acts.
        saturation: (low, high), a function of the control, or None.
        rate_limit: of the control per unit of time, or None.
    """

    every: float
    state: int
    control: int
    memory: int = 0
    delay: float = 0.0
    saturation: Any = None
    rate_limit: float | None = None

    @property
    def delayed(self) -> tuple[int, float]:
        """Whole samples of the delay, and the time that is left."""
        samples = self.delay / self.every
        whole = int(samples + ROUND_OFF)
        return whole, 0.0 if samples - whole <= ROUND_OFF else self.delay - whole * self.every

    @property
    def waiting(self) -> int:
        """How many controls wait."""
        whole, rest = self.delayed
        return whole + (rest > 0)

    @property
    def size(self) -> int:
        """How many numbers the state has."""
        return self.state + self.memory + self.control * (1 + self.waiting)

    @property
    def of_held(self) -> slice:
        """Where the held control is in the state."""
        first = self.state + self.memory
        return slice(first, first + self.control)

    @property
    def sizes(self) -> str:
        """Those of the parts, in words."""
        waiting = f", {self.waiting} x {self.control} of controls that wait" * (self.waiting > 0)
        return f"{self.state} of the plant, {self.memory} of the memory, {self.control} of the held control{waiting}"

    def how_called(self, inputs: int | None) -> str:
        """What the policy is called on, where x has so many entries, in words."""
        x = "and the problem has no x" if inputs is None else f"and {inputs} of x"
        memory = f", with a memory of {self.memory} entries" * (self.memory > 0)
        return (
            f"At a sample the policy is called on the {self.state} entries of the plant's state, {x}{memory}; it gives "
            f"a control of {self.control}"
        )

    def events(self, policy: Function, readout: Function | None, of_plant: Iterable[Any]) -> tuple[Any, ...]:
        """The samples, when their controls act where that is at no sample, and the events of the plant."""
        sample, rest = Event(reset=partial(self._sampled, policy, readout), every=self.every), self.delayed[1]
        acting = (Event(reset=self._acting, every=self.every, offset=rest),) if rest else ()
        return (sample, *acting, *(OfPart(event, self.state) for event in of_plant))

    def flow(self, plant: Function, z: Array) -> Array:
        """z' under the held control."""
        state, _, held, _ = self._parts(z)
        return array_namespace(z).concat([plant(state, held), 0 * z[..., self.state :]], axis=-1)

    def start(self, z0: Array, memory: Array | None, control: Array | None) -> Array:
        """The whole state [trial, unit]."""
        xp = array_namespace(z0)
        if z0.shape[-1] != self.state:
            raise ValueError(f"z0 has {z0.shape[-1]} entries, expected the {self.state} of the plant's state")
        found = [z0]
        given = [("memory", memory, self.memory), *[("control", control, self.control)] * (1 + self.waiting)]
        for name, values, width in given:
            values = 0 * z0[..., :1] if values is None else values
            if values.shape[-1] not in (1, width):
                raise ValueError(f"{name} has {values.shape[-1]} entries, expected {width}")
            found.append(xp.broadcast_to(values, (*z0.shape[:-1], width)))
        return xp.concat(found, axis=-1)

    def after_sample(
        self, policy: Function, readout: Function | None, seen: Array, memory: Array, before: Array
    ) -> tuple[Array, Array]:
        """The memory behind a sample of [plant, x], and its control, from those before."""
        memory, control = self._answer(policy, readout, memory, seen)
        return memory, self._limited(control, before)

    def _parts(self, z: Array) -> tuple[Array, Array, Array, Array]:
        first, second = self.state, self.state + self.memory
        third = second + self.control
        return z[..., :first], z[..., first:second], z[..., second:third], z[..., third:]

    def _sampled(
        self, policy: Function, readout: Function | None, _t: Array, z: Array, x: Array | None = None
    ) -> Array:
        """The state behind a sample: the policy's new memory, and its control held or waiting."""
        state, memory, held, waiting = self._parts(z)
        memory, control = self.after_sample(policy, readout, join(state, x), memory, z[..., -self.control :])
        parts = [state, memory, *([held, waiting[..., self.control :]] if self.delayed[1] else [waiting])]
        return _joined([*parts, control])

    def _acting(self, _t: Array, z: Array, _x: Array | None = None) -> Array:
        """The state behind the time at which the oldest control acts."""
        state, memory, _, waiting = self._parts(z)
        return _joined([state, memory, waiting[..., : self.control], waiting])

    def _answer(self, policy: Function, readout: Function | None, memory: Array, seen: Array) -> tuple[Array, Array]:
        """The memory and the control."""
        if readout is not None:
            memory, control = of_cell(policy, readout, memory, seen)
        elif self.memory:
            memory, control = policy(memory, seen)
        else:
            control = policy(seen)
        _check_width("control", control, self.control, seen)
        _check_width("memory", memory, self.memory, seen)
        return memory, control

    def _limited(self, control: Array, before: Array) -> Array:
        xp = array_namespace(control)
        if callable(self.saturation):
            control = self.saturation(control)
        elif self.saturation is not None:
            control = xp.clip(control, *self.saturation)
        if self.rate_limit is None:
            return control
        most = self.rate_limit * self.every
        return before + xp.clip(control - before, -most, most)


@dataclass(frozen=True)
class OfPart:
    """An event of the first numbers of z, such as the plant's state, as one of z: all others stay as they are."""

    event: Any
    units: int

    @property
    def direction(self) -> int:
        """That of the event."""
        return self.event.direction

    @property
    def condition(self) -> Function | None:
        """(t, z, ...) -> c."""
        condition = self.event.condition
        return None if condition is None else _named_as(condition, partial(self._called, condition))

    @property
    def reset(self) -> Function:
        """(t, z, ...) -> z."""
        return _named_as(self.event.reset, self._after)

    def times(self, t0: float, end: float) -> Any:
        """Those of the event."""
        return self.event.times(t0, end)

    def _called(self, function: Function, t: Array, z: Array, *given: Any) -> Any:
        return function(t, z[..., : self.units], *given)

    def _after(self, t: Array, z: Array, *given: Any) -> Array:
        found = self._called(self.event.reset, t, z, *given)
        expected, got = (*z.shape[:-1], self.units), tuple(getattr(found, "shape", ()))
        if got != expected:
            raise ValueError(f"it gave {got or type_name(found)}, expected the plant's state {expected}")
        return array_namespace(z).concat([found, z[..., self.units :]], axis=-1)


def _named_as(function: Function, wrapped: Function) -> Function:
    """A function with the signature of another one."""

    def call(*given: Any) -> Any:
        return wrapped(*given)

    call.__wrapped__ = getattr(function, "forward", function)  # type: ignore[attr-defined]
    return call


def _joined(parts: list[Array]) -> Array:
    """Those of them that have entries, side by side."""
    return array_namespace(parts[0]).concat([part for part in parts if part.shape[-1]], axis=-1)


def _check_width(name: str, values: Any, width: int, seen: Array) -> None:
    if tuple(getattr(values, "shape", ())) != (*seen.shape[:-1], width):
        got = tuple(values.shape) if hasattr(values, "shape") else type_name(values)
        raise ValueError(f"the policy gave a {name} {got}, expected {(*seen.shape[:-1], width)}")
