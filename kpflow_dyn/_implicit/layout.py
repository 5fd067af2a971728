"""How several values of one trial make one state: side by side on named axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kpflow_dyn._arrays import Array, array_namespace, split_into


class Layout(Protocol):
    """How the values of a trial make its state.

    names   those of the values, one for each call.
    shapes  theirs, without trials.
    axes    the names of the state's axes, without trials.
    join    the state of these values, each of which may have rows in front.
    split   the values of a state: the transpose of `join`, and its inverse.
    """

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    def join(self, values: Sequence[Array]) -> Array: ...
    def split(self, state: Array) -> list[Array]: ...


def layout_of(names: Sequence[str], shapes: Sequence[tuple[int, ...]], axes: Sequence[str] | None) -> Layout:
    """The layout of values whose axes are named, or told by their shapes.

    Raises:
        ValueError: names that do not fit the shapes.
    """
    if axes is None:
        return ShapeLayout(tuple(names), tuple(shapes))
    found = NamedLayout(tuple(names), tuple(shapes), tuple(axes))
    found.check()
    return found


def axes_of_value(axes: Sequence[str], dims: int) -> tuple[str, ...]:
    """The names of the axes of a value: all, or where it has one fewer all but that of the calls of its module.

    The calls are in their order: of a loop that runs backwards the last time is the first.
    """
    calls = "time" if "time" in axes else axes[0]
    return tuple(name for name in axes if name != calls or len(axes) != dims + 1)


@dataclass(frozen=True)
class ShapeLayout:
    """Values of the shapes [unit], [token, unit] or, channels first as convolutions have them, [unit, ...positions].

    Equal shapes are stacked on a "site" axis; values with as many tokens are put side by side on the unit axis; others
    are flattened to one unit axis. A single one keeps its axes.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the state's axes, without trials."""
        if self._stacked and len(self.names) > 1:
            return "site", *_axes(self.shapes[0])
        return _axes(self.shapes[0]) if self._joined is not None else ("unit",)

    def join(self, values: Sequence[Array]) -> Array:
        """See `Layout`."""
        shapes, axis = self._parts
        parts = [_shaped(v, s, part) for v, s, part in zip(values, self.shapes, shapes, strict=True)]
        return array_namespace(values[0]).concat(parts, axis=axis)

    def split(self, state: Array) -> list[Array]:
        """See `Layout`."""
        shapes, axis = self._parts
        parts = split_into(state, [shape[axis] for shape in shapes], axis)
        return [_shaped(*each) for each in zip(parts, shapes, self.shapes, strict=True)]

    @property
    def _parts(self) -> tuple[list[tuple[int, ...]], int]:
        """The shapes of the values as they lie in the state, side by side on this axis, counted from the last."""
        flat = [_flat(shape) for shape in self.shapes]
        if self._stacked:
            return (flat if len(flat) == 1 else [(1, *shape) for shape in flat]), -len(self.axes)
        if (axis := self._joined) is None:
            return [(math.prod(shape),) for shape in self.shapes], -1
        return flat, axis - len(flat[0])

    @property
    def _stacked(self) -> bool:
        return len(set(self.shapes)) == 1

    @property
    def _joined(self) -> int | None:
        """The axis on which values of other axes alike lie side by side."""
        axes = {_axes(shape) for shape in self.shapes}
        if len(axes) > 1:
            return None
        axis = axes.pop().index("unit")
        others = {tuple(n for i, n in enumerate(_flat(shape)) if i != axis) for shape in self.shapes}
        return axis if len(others) == 1 else None


@dataclass(frozen=True)
class NamedLayout:
    """Values with axes that their user names, side by side on the units: [time, ..., unit].

    Where a value has one axis fewer, its calls are the times (see `axes_of_value`).
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    given: tuple[str, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the state's axes, without trials."""
        return tuple(sorted(self.given, key=lambda name: (name != "time", name == "unit")))

    def join(self, values: Sequence[Array]) -> Array:
        """See `Layout`."""
        return array_namespace(values[0]).concat([self._lying(calls, values) for calls in self._groups], axis=-1)

    def split(self, state: Array) -> list[Array]:
        """See `Layout`."""
        found, end = {}, 0
        for calls in self._groups:
            names = self._given(calls)
            start, end = end, end + self._whole(calls)[names.index("unit")]
            whole = _ordered(state[..., start:end], [self.axes.index(name) for name in names])
            behind = (slice(None),) * len(self.shapes[calls[0]])
            parts = [whole[(..., i, *behind)] for i in range(len(calls))] if self._are_times(calls) else [whole]
            found.update(zip(calls, parts, strict=True))
        return [found[i] for i in range(len(self.names))]

    def _lying(self, calls: Sequence[int], values: Sequence[Array]) -> Array:
        """A value, or those of all calls along the times, [..., *axes]."""
        whole = _stacked(values, calls, self.shapes) if self._are_times(calls) else values[calls[0]]
        names = self._given(calls)
        return _ordered(whole, [names.index(name) for name in self.axes])

    def check(self) -> None:
        """Raise where the axes do not fit the values."""
        sizes = [dict(zip(self._given(calls), self._whole(calls), strict=False)) for calls in self._groups]
        fits = all(len(self._whole(calls)) == len(self.given) and self._may_be_times(calls) for calls in self._groups)
        if not fits or len({tuple(n for name, n in size.items() if name != "unit") for size in sizes}) > 1:
            several = ", ".join(f"{name or 'the output'} {list(shape)}" for name, shape in self._described.items())
            raise ValueError(
                f"axes names {list(self.given)} besides the trials, which does not fit the values of a trial, "
                f"{several}; all must have these axes, of the same lengths but for the units"
            )

    def _given(self, calls: Sequence[int]) -> tuple[str, ...]:
        """The names of the axes of a value, with its calls in front where these are the times."""
        own = axes_of_value(self.given, len(self.shapes[calls[0]]))
        return (*(name for name in self.given if name not in own), *own)

    def _are_times(self, calls: Sequence[int]) -> bool:
        return len(self.given) == len(self.shapes[calls[0]]) + 1

    def _may_be_times(self, calls: Sequence[int]) -> bool:
        """Whether these can lie along the times: the network is called once, and a step [unit] once or more."""
        first = calls[0]
        return not self._are_times(calls) or (
            self.names[first] != "" and (len(calls) > 1 or len(self.shapes[first]) < 2)
        )

    @property
    def _groups(self) -> list[list[int]]:
        """The numbers of the values that lie side by side; those of one name whose calls are times are together."""
        found: dict[object, list[int]] = {}
        for i, name in enumerate(self.names):
            found.setdefault(name if self._are_times([i]) else i, []).append(i)
        return list(found.values())

    def _whole(self, calls: Sequence[int]) -> tuple[int, ...]:
        """The shape of a value, with its calls in front."""
        shapes = {self.shapes[i] for i in calls}
        front = (len(calls),) if self._are_times(calls) else ()
        return (*front, *shapes.pop()) if len(shapes) == 1 else ()

    @property
    def _described(self) -> dict[str, tuple[int, ...]]:
        return {self.names[calls[0]]: self._whole(calls) or self.shapes[calls[0]] for calls in self._groups}


def _stacked(values: Sequence[Array], calls: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> Array:
    """The values of all calls of a module, [..., call, *shape]."""
    return array_namespace(values[0]).stack([values[i] for i in calls], axis=-1 - len(shapes[calls[0]]))


def _ordered(value: Array, order: Sequence[int]) -> Array:
    """A value [..., *axes] with its last axes in this order."""
    rows = value.ndim - len(order)
    return array_namespace(value).permute_dims(value, (*range(rows), *(rows + i for i in order)))


def _axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("unit",) if len(shape) < 2 else ("token", "unit") if len(shape) == 2 else ("unit", "token")


def unit_axis(shape: tuple[int, ...], axes: Sequence[str] | None = None) -> int:
    """The axis of units of a value, counted from the last; axes are those that its user names, without trials."""
    if axes is None:
        return -len(shape) if len(shape) > 2 else -1
    names = axes_of_value(axes, len(shape))
    return names.index("unit") - len(names)


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scalar as one unit; positions as one axis of tokens."""
    return (1,) if not shape else shape if len(shape) < 3 else (shape[0], math.prod(shape[1:]))


def _shaped(values: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
    """Values of one shape in another, with rows in front."""
    return values.reshape((*values.shape[: values.ndim - len(before)], *after))
