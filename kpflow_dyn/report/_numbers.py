"""Numbers, settings and versions of a dataset, as text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

INVISIBLE = 1e-6  # share of a number


def summarize(dataset: xr.Dataset) -> dict[str, dict[str, Any]]:
    """The numbers of an analysis, by name: value, stderr, text ("34.0 ± 0.5"), and what the dataset says of each.

    Args:
        dataset: of `kp.analyze`, or like one.

    Example:
        >>> import xarray as xr
        >>> attrs = {"seed": 1, "version_torch": "2.13"}
        >>> found = xr.Dataset({"rank": ((), 34.04, {"stderr": 0.4839})}, attrs=attrs)
        >>> summarize(found)["rank"]["text"], settings(found), versions(found)
        ('34.04 ± 0.48', {'seed': 1}, {'torch': '2.13'})
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
    return {
        str(key).removeprefix("version_"): str(value)
        for key, value in dataset.attrs.items()
        if str(key).startswith("version_")
    }


def with_error(value: float, stderr: float) -> str:
    """A number with its standard error, to the digits that the error leaves: "34.0 ± 0.5".

    Args:
        value: the number.
        stderr: its standard error; left out where four digits would not show it.

    Example:
        >>> with_error(34.04, 0.4839), with_error(8125.8581, 0.0)
        ('34.04 ± 0.48', '8126')
    """
    if not math.isfinite(stderr) or stderr <= INVISIBLE * abs(value) or not value:
        return f"{value:.4g}"
    power = math.floor(math.log10(abs(value)))
    if -3 <= power < 5:
        digits = max(0, 1 - math.floor(math.log10(stderr)))
        return f"{value:.{digits}f} ± {stderr:.{digits}f}"
    digits = max(0, power + 1 - math.floor(math.log10(stderr)))
    scale = 10.0**power
    return f"({value / scale:.{digits}f} ± {stderr / scale:.{digits}f})e{power}"


def _summary(value: float, attrs: dict[str, Any]) -> dict[str, Any]:
    return {"value": value, "text": with_error(value, attrs["stderr"]), **attrs}
