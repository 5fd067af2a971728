"""How several values of one trial make one state: side by side on named axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kpflow_dyn._arrays import Array, array_namespace, split_into


@dataclass(frozen=True)
class Layout:
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
        """The state of these values, each of which may have rows in front."""
        shapes, axis = self._parts
        parts = [_shaped(v, s, part) for v, s, part in zip(values, self.shapes, shapes, strict=True)]
        return array_namespace(values[0]).concat(parts, axis=axis)

    def split(self, state: Array) -> list[Array]:
        """The values of a state: the transpose of `join`, and its inverse."""
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


def _axes(shape: tuple[int, ...]) -> tuple[str, ...]:
    return ("unit",) if len(shape) < 2 else ("token", "unit") if len(shape) == 2 else ("unit", "token")


def unit_axis(shape: tuple[int, ...]) -> int:
    """The axis of units of a value, counted from the last."""
    return -len(shape) if len(shape) > 2 else -1


def shape_of_halves(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a complex value whose real and imaginary parts lie side by side on the axis of units."""
    axis = unit_axis(shape) % max(1, len(shape))
    return tuple(2 * n if i == axis else n for i, n in enumerate(shape or (1,)))


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scalar as one unit; positions as one axis of tokens."""
    return (1,) if not shape else shape if len(shape) < 3 else (shape[0], math.prod(shape[1:]))


def _shaped(values: Array, before: tuple[int, ...], after: tuple[int, ...]) -> Array:
    """Values of one shape in another, with rows in front."""
    return values.reshape((*values.shape[: values.ndim - len(before)], *after))
