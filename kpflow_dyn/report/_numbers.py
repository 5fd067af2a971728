"""Numbers, settings and versions of a dataset, as text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kpflow_dyn._shown import with_error

if TYPE_CHECKING:
    import xarray as xr

NAMES = {
    "checkpoint": "file",
    "found_file": "kind of file",
    "found_prefix": "names of the weights begin with",
    "found_cell": "found in the file",
    "found_readout": "readout found",
    "found_start": "first state",
    "found_precision": "precision of the file",
    "learning": "readout",
    "readout": "outputs",
    "largest_rate": "fastest rate of learning (descent is stable below a learning rate of 2 / this)",
    "followed": "losses followed up to tau",
    "problem": "kind of problem",
    "state": "states",
    "parameters": "parameters that learn",
    "weight_sites": "uses of the weights",
    "dtype": "precision",
    "k": "modes computed",
    "samples": "random probes",
}


def summarize(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    """The numbers of an analysis, by name: value, stderr, text ("34.0 ± 0.5"), and what the dataset says of each.

    Args:
        dataset: what `kp.analyze` returned; `settings` and `versions` also take that of a track or a sweep.

    >>> import xarray as xr
    >>> dataset = xr.Dataset({"loss": ((), 2.0, {"stderr": 0.1})}, attrs={"seed": 0, "version_torch": "2.9"})
    >>> summarize(dataset)["loss"]["text"], settings(dataset), versions(dataset)
    ('2.00 ± 0.10', {'seed': 0}, {'torch': '2.9'})
    """
    scalars = [str(name) for name, variable in dataset.data_vars.items() if variable.ndim == 0]
    return {name: _summary(float(dataset[name]), dict(dataset[name].attrs)) for name in scalars}


def settings(dataset: xr.Dataset) -> dict[str, Any]:
    """The attributes of the dataset that are settings.

    Args and Example as `summarize`.
    """
    others = ("version_", "warnings", "title")
    return {str(key): value for key, value in dataset.attrs.items() if not str(key).startswith(others)}


def versions(dataset: xr.Dataset) -> dict[str, str]:
    """The attributes of the dataset that are versions, by package.

    Args and Example as `summarize`.
    """
    known = {str(key): str(value) for key, value in dataset.attrs.items()}
    return {key.removeprefix("version_"): value for key, value in known.items() if key.startswith("version_")}


def short(value: float, digits: int = 3) -> str:
    """A number to this many digits, without an exponent where one reads it better so.

    >>> short(1907.3), short(0.012345), short(1.5e-7)
    ('1907', '0.0123', '1.5e-07')
    """
    return f"{value:.0f}" if 10.0**digits <= abs(value) < 1e5 else f"{value:.{digits}g}"


def percent(share: float) -> str:
    """A share as one reads it.

    >>> percent(0.8137), percent(0.00032), percent(0.998)
    ('81%', '0.032%', '99.8%')
    """
    return f"{100 * share:.{3 if share >= 0.995 else 2}g}%"


def words(name: str) -> str:
    """The name of a setting as one reads it.

    >>> words("found_cell"), words("loss"), words("kpflow_dyn")
    ('found in the file', 'loss', 'kpflow_dyn')
    """
    return NAMES.get(name, name if name == "kpflow_dyn" else name.replace("_", " "))


def lines(value: Any) -> list[str]:
    """The value of a setting as lines of text: tables in JSON by their entries, lists by theirs.

    >>> lines(109.1110949669231), lines("a; b"), lines('{"units": 8, "kind": "gru"}')
    (['109.1'], ['a', 'b'], ['units: 8', 'kind: gru'])
    """
    if isinstance(value, float):
        return [f"{value:.4g}"]
    text = str(value)
    try:
        table = json.loads(text) if text.startswith(("{", "[")) else None
    except ValueError:
        table = None
    if not table:
        return text.split("; ")
    if isinstance(table, dict):
        return [f"{words(str(name))}: {entry}" for name, entry in table.items()]
    return [str(entry) for entry in table]


def _summary(value: float, attrs: dict[str, Any]) -> dict[str, Any]:
    return {"value": value, "text": with_error(value, attrs["stderr"]), **attrs}
