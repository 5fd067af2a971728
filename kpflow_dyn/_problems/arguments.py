"""What a network is called with: one array, or several arguments by their place or their name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, is_array
from kpflow_dyn._backend import Backend, backend_for
from kpflow_dyn._problems.checks import check_argument, check_rows
from kpflow_dyn._shown import type_name

ROWS = "[trial, ...]"


@dataclass(frozen=True)
class Arguments:
    """The arguments of a network: arrays with a row for each trial, arrays that all trials share, and other values.

    Attributes:
        rows: by name, such as "x", "x[1]" or "x['mask']", the arrays [trial, ...].
        shared: by name the arrays that all trials share.
        form: x as its user gave it, with a `Hole` in the place of each array.
        alone: whether the network is called once, on the only row.
    """

    rows: dict[str, Array]
    shared: dict[str, Array]
    form: Any
    alone: bool

    @property
    def like(self) -> Array:
        """The first of the rows that holds floats, or else the first."""
        return next((row for row in self.rows.values() if "float" in str(row.dtype)), next(iter(self.rows.values())))

    @property
    def trials(self) -> int:
        """How many there are."""
        return len(next(iter(self.rows.values())))

    def filled(self, arrays: Sequence[Array]) -> tuple[tuple, dict[str, Any]]:
        """The arguments by their place and by their name, with these rows, and what is shared where that follows."""
        now = self.shared | dict(zip([*self.rows, *self.shared], arrays, strict=False))
        whole = mapped(lambda _name, leaf: now[leaf.name] if isinstance(leaf, Hole) else leaf, self.form)
        return ((), whole) if isinstance(whole, dict) else ((whole if isinstance(whole, tuple) else (whole,)), {})

    def __str__(self) -> str:
        rows = [f"{name} {list(row.shape)}" for name, row in self.rows.items()]
        shared = [f"{name} {list(array.shape)}" for name, array in self.shared.items()]
        return ", ".join(rows) + (f" by trial, {', '.join(shared)} shared by all trials" if shared else "")


@dataclass(frozen=True)
class Hole:
    """Where an array goes."""

    name: str


def arguments_of(x: Any, shared: Sequence[str | int] | None, alone: bool, net: Any) -> tuple[Backend, Any, Arguments]:
    """The framework of x, x as it is kept, and its parts.

    Args:
        x: an array, a tuple of arguments, or a mapping of arguments by their name.
        shared: which of these all trials share; None for arrays with another number of rows than the first.
        alone: whether the network is called once on x as it is, which is then one trial.
        net: the network, whose framework is that of arrays of numpy.

    Raises:
        TypeError, ValueError: no array at all, arrays that are not finite, or of other numbers of rows.
    """
    x = dict(x) if isinstance(x, Mapping) else x
    found: dict[str, Array] = {}
    mapped(lambda name, leaf: found.update({name: leaf}) if _holds_rows(leaf) else None, x)
    if not found or isinstance(x, list):
        expected = "a torch tensor or a jax array [trial, ...], or a tuple or dict of arguments that holds some"
        raise TypeError(f"x is {type_name(x)}, expected {expected}")
    backend = backend_for(min(found.values(), key=lambda array: isinstance(array, np.ndarray)), "x", ROWS, net)
    if "x" in found:  # it is the only one, and no mask
        check_rows(found["x"], "x", ROWS, net)
    kept = {name: check_argument(array, name, ROWS, backend) if array.ndim else array for name, array in found.items()}
    common = _shared(x, kept, shared, alone)
    rows = {name: array[None] if alone else array for name, array in kept.items() if name not in common}
    if not rows:
        raise ValueError(f"all of {', '.join(kept)} are shared, so there are no trials; leave some out of shared")
    form = mapped(lambda name, leaf: Hole(name) if name in kept else leaf, x)
    given = mapped(lambda name, leaf: kept.get(name, leaf), x)
    return backend, given, Arguments(rows, {name: kept[name] for name in common}, form, alone)


def _holds_rows(leaf: Any) -> bool:
    return is_array(leaf) and not isinstance(leaf, np.generic)


def _has_derivatives(array: Array) -> bool:
    return any(kind in str(array.dtype) for kind in ("float", "complex"))


def _shared(x: Any, arrays: dict[str, Array], shared: Sequence[str | int] | None, alone: bool) -> list[str]:
    """The names of the arrays that all trials share."""
    single = [name for name, array in arrays.items() if array.ndim == 0]
    if shared is None and alone:  # what has no derivative is fixed, and edges may be chosen by their values
        fixed = [name for name, array in arrays.items() if name in single or not _has_derivatives(array)]
        return fixed if len(fixed) < len(arrays) else single
    if shared is None:
        trials = next((len(array) for array in arrays.values() if array.ndim), 0)
        return [name for name, array in arrays.items() if name in single or len(array) != trials]
    known = list(x) if isinstance(x, dict) else list(range(len(x))) if isinstance(x, tuple) else []
    if unknown := [name for name in shared if name not in known]:
        raise ValueError(f"shared names {unknown}, expected some of the arguments {known}")
    inside = tuple(f"x[{name!r}]" for name in shared)
    named = [name for name in arrays if name.startswith(inside)]
    rows = {name: len(array) for name, array in arrays.items() if name not in (*named, *single)}
    if len(set(rows.values())) > 1 and not alone:
        raise ValueError(f"the arguments have different numbers of trials, {rows}; name what all share in shared")
    return list(dict.fromkeys([*single, *named]))


def mapped(function: Callable[[str, Any], Any], x: Any, name: str = "x") -> Any:
    """The same tuples, lists and dicts with function(name, leaf) in the place of each leaf."""
    if isinstance(x, dict):
        return {key: mapped(function, part, f"{name}[{key!r}]") for key, part in x.items()}
    if isinstance(x, tuple | list):
        parts = [mapped(function, part, f"{name}[{i}]") for i, part in enumerate(x)]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return function(name, x)
