"""What the package needs of an array library beyond the array API standard: random numbers, places, the way to numpy.

Each function asks one object, chosen by `library_of`; torch and JAX are imported when an array of theirs comes, not
before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_jax_array, is_torch_array

from kpflow_dyn._arrays.of_numpy import NUMPY, PRECISIONS, Array, Library
from kpflow_dyn._shown import type_name

Rows = Callable[[Array], Array]
"""A map on blocks of rows [b, n] -> [b, m]."""

__all__ = [
    "PRECISIONS",
    "Array",
    "Random",
    "Rows",
    "add_at",
    "after",
    "array_namespace",
    "concretely",
    "device",
    "empty_row",
    "eps_of",
    "finite_rows",
    "full_precision",
    "is_array",
    "is_finite",
    "is_jax_array",
    "is_torch_array",
    "is_torch_module",
    "joined",
    "library_of",
    "like_numpy",
    "placed",
    "products_in",
    "reshaped",
    "side_by_side",
    "split_into",
    "take_at",
    "taken",
    "to_numpy",
    "widened",
]


def library_of(a: Array) -> Library:
    """What is done with arrays of this kind; all that are neither torch's nor JAX's are taken for numpy's."""
    if is_torch_array(a):
        from kpflow_dyn._arrays.of_torch import TORCH

        return TORCH
    if is_jax_array(a):
        from kpflow_dyn._arrays.of_jax import JAX

        return JAX
    return NUMPY


class Random:
    """A stream of random arrays, in the library and on the device of a given array.

    Args:
        seed: an int (the same int gives the same stream), or a `Random` to continue.

    Raises:
        TypeError: another seed.

    >>> from kpflow_dyn.solvers import Random
    >>> Random(0).normal((2, 3), like=np.zeros(1)).shape
    (2, 3)
    """

    def __init__(self, seed: int | Random = 0) -> None:
        if not isinstance(seed, int | np.integer | Random):
            raise TypeError(f"seed must be an int or a Random, got {type_name(seed)}")
        self._sequence = seed._sequence if isinstance(seed, Random) else np.random.SeedSequence(int(seed))

    def _next(self) -> int:
        return int(self._sequence.spawn(1)[0].generate_state(1, np.uint64)[0] >> np.uint64(1))

    def normal(self, shape: tuple[int, ...], like: Array) -> Array:
        """Independent standard normal numbers, with the library, dtype and device of `like`; sharded like its rows."""
        return library_of(like).normal(self._next(), shape, like)


def is_array(a: object) -> bool:
    """Whether this is an array of numpy, torch or JAX."""
    return isinstance(a, np.ndarray | np.generic) or is_torch_array(a) or is_jax_array(a)


def is_torch_module(model: object) -> bool:
    """Whether a model is torch's, without importing torch."""
    return "torch" in sys.modules and isinstance(model, sys.modules["torch"].nn.Module)


def eps_of(a: Array) -> float:
    """The round-off of an array's dtype."""
    if str(a.dtype) == "bfloat16":  # which numpy does not know
        return 2.0**-7
    return float(array_namespace(a).finfo(a.dtype).eps)


def device(a: Array) -> Any:
    """The device of an array; of a sharded one, the placement of a copy on each of its devices."""
    return library_of(a).device(a)


def empty_row(like: Array, of_trials: bool) -> Array:
    """An array [0] of the library, dtype and device of `like`, which may be sharded by trials, as rows then are."""
    return library_of(like).empty_row(like, of_trials)


def placed(values: Array, row: Array, axis: int) -> Array:
    """Values sharded by trials as `row` is; trials are on the axis, which is counted from the last."""
    return library_of(row).placed(values, row, axis)


def to_numpy(a: Array) -> np.ndarray:
    """A numpy copy or view of an array of any library, on any device."""
    return library_of(a).to_numpy(a)


def like_numpy(values: np.ndarray, like: Array) -> Array:
    """Numpy numbers as an array of the library, dtype and device of `like`."""
    return library_of(like).like_numpy(values, like)


def is_finite(a: Array) -> bool:
    """Whether all numbers are finite."""
    return library_of(a).is_finite(a)


def finite_rows(a: Array) -> np.ndarray:
    """Where all numbers on the last axis are finite."""
    return library_of(a).finite_rows(a)


def widened(a: Array, width: int) -> Array:
    """The array with this many zeros more at the end of its last axis."""
    return library_of(a).widened(a, width)


def side_by_side(parts: Sequence[Array], axes: int) -> Array:
    """Arrays that have this number of first axes in common, with all that follows side by side on one more."""
    return library_of(parts[0]).side_by_side(parts, axes)


def after(first: Array, values: Array) -> Array:
    """What stands before each of the values [trial, time, unit]: first [trial, unit], then these but for the last."""
    return library_of(values).after(first, values)


def concretely(like: Array) -> AbstractContextManager[Any]:
    """Compute what does not depend on traced arrays at once, also inside a `jax.jit`."""
    return library_of(like).concretely()


def full_precision(like: Array) -> AbstractContextManager[Any]:
    """Products of float32 in float32: JAX takes fewer digits on accelerators, unless its configuration says more.

    Whoever sets `jax.default_matmul_precision` gets that. In torch float32 is the default already.
    """
    return library_of(like).full_precision()


def products_in(precision: str | None, like: Array) -> AbstractContextManager[Any]:
    """Products of float32 from as many digits as "tf32" or "bf16" have, where the device can; None changes nothing."""
    return nullcontext() if precision is None else library_of(like).products_in(precision)


def reshaped(a: Array, shape: tuple[int, ...]) -> Array:
    """The array in another shape, or itself where it has that."""
    return a if tuple(a.shape) == shape else library_of(a).reshaped(a, shape)


def joined(parts: Iterable[Array], count: int) -> Array:
    """Blocks with this total number of rows in one array; where arrays can change, each is written into its place."""
    rest = iter(parts)
    head = next(rest)
    return head if head.shape[0] == count else library_of(head).joined(head, rest, count)


def split_into(values: Array, sizes: Sequence[int], axis: int = -1) -> list[Array]:
    """Parts of these sizes, one after the other on an axis; the transpose joins them at once, which slices do not."""
    return library_of(values).split_into(values, sizes, axis)


def take_at(values: Array, index: np.ndarray) -> Array:
    """The values [probe, trial, n, width] at the places index [trial, m]: [probe, trial, m, width]."""
    return library_of(values).take_at(values, index)


def taken(values: Array, places: np.ndarray) -> Array:
    """Values [trial, step, ...] at places [trial, n]."""
    return library_of(values).taken(values, places)


def add_at(values: Array, index: np.ndarray, size: int) -> Array:
    """Add values [probe, trial, n, width] into zeros [probe, trial, size, width] at the places index [trial, n]."""
    shape = (*values.shape[:2], size, values.shape[3])
    zeros = array_namespace(values).zeros(shape, dtype=values.dtype, device=device(values))
    return library_of(values).add_at(zeros, values, index)
