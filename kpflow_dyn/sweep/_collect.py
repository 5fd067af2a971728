"""The records of all points as one labelled dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn.sweep._design import Design, design, label
from kpflow_dyn.sweep._store import Store
from kpflow_dyn.sweep._values import MISSING, Record, Variable

if TYPE_CHECKING:
    import xarray as xr


def dataset_in(folder: Path) -> xr.Dataset:
    """What the `collect` of the sweep in a folder gives, without the function that was called.

    Raises:
        FileNotFoundError: there is no sweep.
        ValueError: an earlier version of this package wrote it, or a file is damaged.
    """
    store = Store(folder)
    if (about := store.about()) is None:
        raise FileNotFoundError(f"{folder} has no sweep.json, so it is no folder of a sweep")
    if "over" not in about:
        raise ValueError(f"{folder} is of an earlier version, which did not write down the design; use collect()")
    records = [store.read(path.stem) for path in store.points.glob("*.npz")]
    found, known = {_name(record.point): record for record in records}, design(about["over"])
    return dataset_of(known, [found.get(_name(point), MISSING) for point in known.points], about["attrs"])


def _name(point: Mapping[str, Any]) -> str:
    return json.dumps(point, sort_keys=True)


def dataset_of(design: Design, records: Sequence[Record], about: Mapping[str, Any]) -> xr.Dataset:
    """One dataset of the records of all points, in the order of the design, with attributes."""
    import xarray as xr

    axes = design.axes or {"point": range(len(records))}
    dims, shape = tuple(axes), tuple(map(len, axes.values()))
    names = {name: None for record in records for name in record.variables}
    given = {name: [record.variables.get(name) for record in records] for name in names}
    shared = {name: variable for name, each in given.items() if (variable := _shared(name, each))}
    stacked = {name: _stacked(name, each, dims, shape) for name, each in given.items() if name not in shared}
    status = {
        "done": np.array([record.status in ("done", "not finite") for record in records]),
        **{name: np.array([getattr(record, name) for record in records]) for name in ("status", "error", "seconds")},
    }
    found = xr.Dataset(stacked | {name: (dims, values.reshape(shape)) for name, values in status.items()})
    coords = {name: (v.dims, v.values, v.attrs) for name, v in shared.items()}
    return found.assign_coords({**coords, **_coordinates(design)}).assign_attrs(about)


def _coordinates(design: Design) -> dict[str, Any]:
    if design.axes is not None:
        return {name: (name, _labels(values)) for name, values in design.axes.items()}
    arguments = {name: ("point", _labels([point[name] for point in design.points])) for name in design.points[0]}
    return {"point": np.arange(len(design.points))} | arguments


def _labels(values: Sequence[Any]) -> np.ndarray:
    """Numbers as they are, and mixed kinds as texts."""
    labels = [label(value) for value in values]
    kinds = {str if isinstance(v, str) else bool if isinstance(v, bool) else float for v in labels}
    return np.array(labels if len(kinds) == 1 else [str(v) for v in labels])


def _shared(name: str, each: Sequence[Variable | None]) -> Variable | None:
    """The coordinate of a dimension, where all points have the same one."""
    known = [variable for variable in each if variable is not None]
    first = known[0]
    same = all(v.dims == (name,) and np.array_equal(v.values, first.values) for v in known)
    return first if same else None


def _stacked(name: str, each: Sequence[Variable | None], dims: tuple[str, ...], shape: tuple[int, ...]) -> Any:
    """The arrays of one name at all points [*axes, *dims], filled up where they are smaller or missing."""
    known = [variable for variable in each if variable is not None]
    if len(found := {variable.dims for variable in known}) > 1:
        raise ValueError(f"{name} has dimensions {' and '.join(map(str, found))} at different points of the sweep")
    own = tuple(f"{name}_index" if dim == name else dim for dim in known[0].dims)
    largest = tuple(np.max([v.values.shape for v in known], axis=0)) if own else ()
    whole = len(known) == len(each) and len({v.values.shape for v in known}) == 1
    kind = np.result_type(*{v.values.dtype for v in known})
    values = _empty((len(each), *largest), kind, whole)
    for place, variable in enumerate(each):
        if variable is not None:
            values[(place, *map(slice, variable.values.shape))] = variable.values
    return (*dims, *own), values.reshape((*shape, *largest)), _attributes(known)


def _attributes(known: Sequence[Variable]) -> dict[str, Any]:
    """Those of one name at all points; both texts where points differ, as in the kind of a loss."""
    given: dict[str, dict[Any, None]] = {}
    for variable in known:
        for name, value in variable.attrs.items():
            given.setdefault(name, {})[str(value)] = None
    first = {name: value for variable in reversed(known) for name, value in variable.attrs.items()}
    return {name: first[name] if len(values) == 1 else " or ".join(values) for name, values in given.items()}


def _empty(shape: tuple[int, ...], kind: np.dtype, whole: bool) -> np.ndarray:
    """NaN, where numbers could be missing; empty texts."""
    if kind.kind in "f":
        return np.full(shape, np.nan, kind)
    return np.zeros(shape, kind) if whole or kind.kind == "U" else np.full(shape, np.nan)
