"""Frozen sets of real constants, checked when they are made."""

import dataclasses
import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from kpflow_dyn._shown import type_name


def at_least_zero(default: float) -> Any:
    """The field of a constant that may also be 0; a plain default must be positive."""
    return dataclasses.field(default=default, metadata={"lowest": 0.0})


def any_sign(default: float) -> Any:
    """The field of a constant that may be any finite number."""
    return dataclasses.field(default=default, metadata={"lowest": -math.inf})


@dataclass(frozen=True)
class Constants:
    """A frozen dataclass of Python floats: hashable, and never of a wider dtype than the arrays that it meets."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, checked(field, getattr(self, field.name)))


def checked(field: dataclasses.Field[Any], value: Any) -> float:
    """The value as a float, if it is one that the field may have."""
    if not isinstance(value, Real):
        raise TypeError(f"{field.name} is {type_name(value)}, expected a real number; it is fixed, never learnt")
    number, lowest = float(value), field.metadata.get("lowest")
    if not math.isfinite(number) or not (number > 0 if lowest is None else number >= lowest):
        bound = "> 0" if lowest is None else f">= {lowest:g}"
        raise ValueError(f"{field.name} must be a finite number {bound}, got {number}")
    return number
