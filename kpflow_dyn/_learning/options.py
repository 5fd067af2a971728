"""Options of a user's: what numbers are, and answers at one fraction or at many."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np


def is_number(value: Any) -> bool:
    """Whether this is a real number, of Python or of numpy."""
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_count(value: Any, most: float = math.inf) -> bool:
    """Whether this is a whole number from 1 to `most`, of Python or of numpy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(1 <= value <= most)


def plain(value: Any) -> Any:
    """A number of numpy as one of Python, as optimisers want them; anything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def check_seed(seed: Any) -> None:
    """Raise unless this is a seed."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise TypeError(f"seed is {seed!r}, expected a whole number, at least 0")


def at_fractions(of: Callable[[float], Any], fraction: Any) -> Any:
    """What `of` gives for a fraction; for an array of fractions an array like it, or a pair of arrays.

    Raises:
        ValueError: one outside of (0, 1).
    """
    values = np.asarray(fraction)
    if values.dtype.kind not in "iuf" or not ((values > 0) & (values < 1)).all():
        raise ValueError(f"fraction is {fraction!r}, expected 0 < fraction < 1: a number, or an array of them")
    if not values.ndim:
        return of(float(values))
    found = np.array([of(float(one)) for one in values.reshape(-1)])  # [fraction], or of pairs [fraction, 2]
    if found.ndim == 1:
        return found.reshape(values.shape)
    return tuple(column.reshape(values.shape) for column in found.T)
