"""What a point returns, as named arrays with dimensions, and as bytes that hold no pickle."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._shown import type_name

RESERVED = ("status", "done", "error", "seconds", "point")
STATUSES = ("done", "not finite", "failed", "timed out", "missing")


@dataclass(frozen=True)
class Variable:
    """One named array of a result."""

    dims: tuple[str, ...]
    values: np.ndarray
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What is known of one point."""

    status: str  # one of STATUSES
    error: str = ""  # what went wrong, in a line
    trace: str = ""
    seconds: float = float("nan")
    variables: dict[str, Variable] = field(default_factory=dict)
    point: dict[str, Any] = field(default_factory=dict)  # its arguments, for readers of the file


MISSING = Record("missing")


def variables_of(result: Any, axes: Iterable[str]) -> dict[str, Variable]:
    """The arrays in what `run` returned: of a mapping or an xarray.Dataset; an Estimate also gives `<name>_stderr`.

    >>> variables_of({"rank": np.ones(3)}, ["g"])["rank"].dims
    ('rank_0',)
    """
    if not isinstance(result, Mapping):
        raise TypeError(f"run returned {type_name(result)}, expected a dict of numbers and arrays or a xr.Dataset")
    coords = getattr(result, "coords", {})
    given = {**dict(result.items()), **dict(coords.items())}
    found = dict(entry for name, value in given.items() for entry in _entries(str(name), value))
    if taken := [name for name in found if name in RESERVED or name in set(axes)]:
        raise ValueError(f"run returned {taken[0]!r}, which the sweep itself uses; give it another name")
    return found


def is_finite(variables: Mapping[str, Variable]) -> bool:
    """Whether no real number is NaN or infinite."""
    return all(np.isfinite(v.values).all() for v in variables.values() if v.values.dtype.kind == "f")


def to_bytes(record: Record) -> bytes:
    """An npz file: the arrays, and everything else as JSON in `record`."""
    names = {name: {"dims": v.dims, "attrs": v.attrs} for name, v in record.variables.items()}
    rest = {name: getattr(record, name) for name in ("status", "error", "trace", "seconds", "point")}
    text = json.dumps(rest | {"variables": names}, default=_plain)
    arrays = {str(i): v.values for i, v in enumerate(record.variables.values())}
    with io.BytesIO() as file:
        np.savez(file, allow_pickle=False, record=np.frombuffer(text.encode(), np.uint8), **arrays)
        return file.getvalue()


def from_file(path: Any, values: bool = True) -> Record:
    """What `to_bytes` wrote; without values, all but the arrays, which is quicker."""
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        rest = json.loads(file["record"].tobytes())
        names = rest.pop("variables") if values else rest.pop("variables") and {}
        arrays = {
            name: Variable(tuple(about["dims"]), file[str(i)], about["attrs"])
            for i, (name, about) in enumerate(names.items())
        }
    return Record(**rest, variables=arrays)


def _entries(name: str, value: Any) -> Iterator[tuple[str, Variable]]:
    if hasattr(value, "dims") and hasattr(value, "coords"):  # a xr.DataArray, whose package this need not import
        for coord, entry in value.coords.items():
            if str(coord) != name:
                yield str(coord), _variable(str(coord), entry.values, map(str, entry.dims), entry.attrs)
        yield name, _variable(name, value.values, map(str, value.dims), value.attrs)
    elif hasattr(value, "stderr") and hasattr(value, "value"):
        yield name, _variable(name, value.value, None)
        yield f"{name}_stderr", _variable(name, value.stderr, None)
    else:
        yield name, _variable(name, value, None)


def _variable(name: str, value: Any, dims: Iterable[str] | None, attrs: Mapping[Any, Any] | None = None) -> Variable:
    plain = isinstance(value, bool | int | float | str | list | tuple)
    array = np.asarray(value) if plain else to_numpy(value) if hasattr(value, "__array__") else np.asarray(None)
    if array.dtype.kind not in "biufU":
        raise TypeError(
            f"run returned {name} of type {type_name(value)} ({array.dtype}), expected a number, a string, a real "
            "array, a xr.DataArray or an Estimate"
        )
    named = tuple(dims) if dims is not None else tuple(f"{name}_{axis}" for axis in range(array.ndim))
    return Variable(named, array, {str(key): entry for key, entry in (attrs or {}).items()})


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)
