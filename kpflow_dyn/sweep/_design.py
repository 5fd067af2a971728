"""Which points a sweep visits: a grid, or a list of points."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._shown import type_name

Point = dict[str, Any]
"""The arguments of one call, by name: numbers, strings, bools, frozen dataclasses."""


@dataclass(frozen=True)
class Design:
    """The points of a sweep."""

    points: list[Point]
    axes: dict[str, list[Any]] | None  # of a grid, whose last axis varies fastest; None for a list of points

    def labelled(self) -> dict[str, list[Any]] | list[Point]:
        """What `design` makes it of, as it stands in files."""
        if self.axes is not None:
            return {name: [label(value) for value in values] for name, values in self.axes.items()}
        return [labelled(point) for point in self.points]


def design(over: Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]]) -> Design:
    """The grid of a mapping, or the points of a list, checked.

    >>> design({"g": [0.5, 1.5], "seed": range(2)}).points[1]
    {'g': 0.5, 'seed': 1}
    """
    if isinstance(over, Mapping):
        axes = {str(name): _axis(str(name), values) for name, values in over.items()}
        found = Design([dict(zip(axes, each, strict=True)) for each in itertools.product(*axes.values())], axes)
    else:
        found = Design([{name: value_of(name, v) for name, v in point.items()} for point in over], None)
    _check(found.points)
    return found


def zipped(axes: Mapping[str, Iterable[Any]]) -> list[Point]:
    """Points that take the first value of every axis, then the second, and so on.

    Args:
        axes: the values of each argument, by its name.

    Raises:
        ValueError: axes of different lengths.

    >>> zipped({"g": [0.5, 1.5], "seed": [3, 4]})
    [{'g': 0.5, 'seed': 3}, {'g': 1.5, 'seed': 4}]
    """
    values = {name: list(axis) for name, axis in axes.items()}
    if len(lengths := {name: len(axis) for name, axis in values.items()}) and len(set(lengths.values())) > 1:
        raise ValueError(f"axes of lengths {lengths}, expected equal ones; a dict in the place of zipped() is a grid")
    return [dict(zip(values, each, strict=True)) for each in zip(*values.values(), strict=True)]


def random(ranges: Mapping[str, Any], n: int, seed: int = 0) -> list[Point]:
    """n independent points, each argument uniform in its range.

    Args:
        ranges: (low, high) for a real number; a list or `range` to choose from.
        n: how many; the points of a smaller n are the first ones of a larger.
        seed: the same one gives the same points.

    Raises:
        ValueError: n < 1, or a range that is none.

    >>> points = random({"g": (0.0, 3.0), "cell": ["rnn", "gru"]}, n=4, seed=1)
    >>> [0 <= point["g"] <= 3 for point in points], points[:2] == random({"g": (0, 3), "cell": ["rnn", "gru"]}, 2, 1)
    ([True, True, True, True], True)
    """
    _check_count(n)
    return _scaled(ranges, np.random.default_rng(seed).random((n, len(ranges))))


def sobol(ranges: Mapping[str, Any], n: int, seed: int = 0) -> list[Point]:
    """n points of a scrambled Sobol sequence, which cover the ranges more evenly than random ones.

    Args and Raises as `random`; n is best a power of two.

    Source: scipy.stats.qmc.Sobol.

    >>> [point["g"] < 1.5 for point in sobol({"g": (0.0, 3.0)}, n=2)].count(True)
    1
    """
    from scipy.stats.qmc import Sobol

    _check_count(n)
    sequence = Sobol(len(ranges), scramble=True, seed=seed)  # type: ignore[call-arg]
    return _scaled(ranges, sequence.random_base2(math.ceil(math.log2(n)))[:n])


def value_of(name: str, value: Any) -> Any:
    """A value in Python's own types; raise for one that cannot name a point."""
    plain = value.item() if isinstance(value, np.generic) else value
    if isinstance(plain, float) and math.isnan(plain):
        raise ValueError(f"{name} is NaN at a point of the sweep; leave that point out")
    frozen = dataclasses.is_dataclass(plain) and not isinstance(plain, type) and _is_frozen(plain)
    if not (isinstance(plain, bool | int | float | str) or frozen):
        raise TypeError(
            f"{name} is {plain!r} of type {type_name(plain)} at a point of the sweep, expected a number, a string, "
            "a bool or a frozen dataclass; give a name or a number, and make the object inside of run"
        )
    if frozen and " object at 0x" in repr(plain):
        raise TypeError(f"{name} is {plain!r}, whose repr differs from run to run, so it cannot name a point")
    return plain


def label(value: Any) -> Any:
    """How a value stands in files and coordinates: itself, or the repr of a dataclass."""
    return value if isinstance(value, bool | int | float | str) else repr(value)


def labelled(point: Point) -> Point:
    """A point as it stands in files."""
    return {name: label(value) for name, value in point.items()}


def _axis(name: str, values: Iterable[Any]) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"axis {name} is {values!r}, expected a list of values; one value is [{values!r}]")
    return [value_of(name, value) for value in values]


def _check(points: list[Point]) -> None:
    if not points:
        raise ValueError("a sweep over no points; give each axis at least one value")
    for point in points:
        if set(point) != set(points[0]):
            raise ValueError(f"a point with {sorted(point)} beside one with {sorted(points[0])}; all need the same")
    seen = set()
    for point in points:
        if (named := tuple(sorted((name, repr(value)) for name, value in point.items()))) in seen:
            raise ValueError(f"the point {point} is there twice; leave one out")
        seen.add(named)


def _is_frozen(value: Any) -> bool:
    return type(value).__dataclass_params__.frozen


def _check_count(n: int) -> None:
    if not isinstance(n, int | np.integer) or n < 1:
        raise ValueError(f"n must be a whole number of points, at least 1, got {n!r}")


def _scaled(ranges: Mapping[str, Any], unit: np.ndarray) -> list[Point]:
    """Points in the ranges from points [n, argument] of the unit cube."""
    columns = {name: _in_range(name, ranges[name], column) for name, column in zip(ranges, unit.T, strict=True)}
    return zipped(columns)


def _in_range(name: str, given: Any, unit: np.ndarray) -> list[Any]:
    if isinstance(given, list | range) and len(given):
        return [given[int(u * len(given))] for u in unit]
    if isinstance(given, tuple) and len(given) == 2 and given[0] < given[1]:
        return (given[0] + (given[1] - given[0]) * unit).tolist()
    raise ValueError(f"the range of {name} is {given!r}, expected (low, high), or a list to choose from")
