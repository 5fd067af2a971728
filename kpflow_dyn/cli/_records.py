"""What the commands write as JSON: all numbers with their standard errors, and how they were made."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr


def comparison_record(dataset: xr.Dataset) -> str:
    """The dataset of a comparison whose models have a file, a network and what was found."""
    angles = dataset.principal_angle.values * 180 / math.pi
    return _json(
        {
            "networks": {str(name): _network(dataset.sel(model=name)) for name in dataset.model.values},
            "alignment": _by_operator(dataset, "alignment"),
            "step_cosine": dataset.step_cosine.values,
            "principal_angles_in_degrees": angles,
        },
        dataset,
    )


def track_record(dataset: xr.Dataset) -> str:
    """The dataset of a track, by step."""
    return _json({"steps": [_step(dataset.isel(step=place)) for place in range(dataset.sizes["step"])]}, dataset)


def _network(one: xr.Dataset) -> dict[str, Any]:
    said = {
        "file": str(one.file.values),
        "network": str(one.network.values),
        "found": json.loads(str(one.found.values)),
    }
    now = {name: one[name].values for name in ("loss", "accuracy") if name in one}
    return said | now | {"effective_rank": _by_operator(one, "effective_rank"), "eigenvalues": one.eigenvalues.values}


def _step(one: xr.Dataset) -> dict[str, Any]:
    found = {
        "step": one.step.values,
        "effective_rank": {str(kind): _by_operator(one.sel(kind=kind), "effective_rank") for kind in one.kind.values},
    }
    found |= {name: _by_operator(one, name) for name in ("alignment_first", "alignment_last")}
    return found | {str(name): one[name].values for name in one.data_vars if not set(one[name].dims) - {"component"}}


def _by_operator(dataset: xr.Dataset, name: str) -> dict[str, dict[str, Any]]:
    chosen = {str(operator): dataset.sel(operator=operator) for operator in dataset.operator.values}
    return {n: {"value": one[name].values, "stderr": one[f"{name}_stderr"].values} for n, one in chosen.items()}


def _json(numbers: dict[str, Any], dataset: xr.Dataset) -> str:
    from kpflow_dyn.report import settings, versions

    made = {"settings": settings(dataset), "versions": versions(dataset)}
    warnings = dataset.attrs.get("warnings", "").splitlines()
    return as_json(numbers | made | {"warnings": warnings})


def as_json(content: Any) -> str:
    """Indented, with null where a number is NaN or infinite."""
    return json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Numbers and lists of Python's own; null where a number is NaN or infinite."""
    if isinstance(value, dict):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
