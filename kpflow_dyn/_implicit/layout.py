"""How several values of one trial make one state: side by side on named axes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kpflow_dyn._arrays import Array, array_namespace


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
        """The state of these values."""
        xp, flat = array_namespace(values[0]), [v.reshape(_flat(s)) for v, s in zip(values, self.shapes, strict=True)]
        if self._stacked:
            return xp.stack(flat) if len(flat) > 1 else flat[0]
        if (axis := self._joined) is None:
            return xp.concat([v.reshape(-1) for v in flat], axis=0)
        return xp.concat(flat, axis=axis)

    def split(self, state: Array) -> list[Array]:
        """The values of a state: the transpose of `join`, and its inverse."""
        if self._stacked:
            parts = [state[i] for i in range(len(self.names))] if len(self.names) > 1 else [state]
        else:
            axis, parts, start = self._joined or 0, [], 0
            for shape in self.shapes:
                size = _flat(shape)[axis] if self._joined is not None else math.prod(shape)
                parts.append(state[(slice(None),) * axis + (slice(start, start + size),)])
                start += size
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

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


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A scalar as one unit; positions as one axis of tokens."""
    return (1,) if not shape else shape if len(shape) < 3 else (shape[0], math.prod(shape[1:]))
