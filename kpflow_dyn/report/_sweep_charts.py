"""The charts of what the `collect` of a sweep returns: numbers over the axes that were swept."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn.report._charts import (
    MOST_NUMBERS,
    SEQUENTIAL,
    Chart,
    Choice,
    evenly,
    figure,
    heat_map,
    line,
    numbers,
    plain,
    spread,
    views,
    with_bars,
)
from kpflow_dyn.report._numbers import short

if TYPE_CHECKING:
    import xarray as xr

ABOUT = ("done", "status", "error", "seconds")
PANELS, COLUMNS = 9, 3
MOST_LINES = 8
MOST_TRACES = 1500  # in all views of the small multiples
NUMBERS = "iuf"
FIELDS = {"type": "category", "showgrid": False}  # of one size, whatever the steps of the axis


def quantities(dataset: xr.Dataset) -> list[str]:
    """The numbers that each point has one of."""
    dims = set(swept(dataset))
    names = [str(name) for name in dataset.data_vars if name not in ABOUT and not str(name).endswith("_stderr")]
    return [name for name in names if set(dataset[name].dims) == dims and dataset[name].dtype.kind in NUMBERS]


def not_shown(dataset: xr.Dataset) -> list[str]:
    """The arrays that each point has, which no chart shows, such as: curve [3]."""
    dims = swept(dataset)
    inner = {str(name): [n for dim, n in array.sizes.items() if dim not in dims] for name, array in dataset.items()}
    return [f"{name} {sizes}" for name, sizes in inner.items() if sizes and name not in ABOUT]


def swept(dataset: xr.Dataset) -> list[str]:
    """The dimensions that were swept: the axes of a grid, or the points of a list."""
    return [str(dim) for dim in dataset.status.dims]


def spaced(name: str) -> str:
    """A number's name as one reads it."""
    return name.replace("_", " ").replace("ntk", "NTK")


def sweep_charts(dataset: xr.Dataset) -> list[Chart]:
    """All charts of a sweep, in the order of the page; none where no point has a single number."""
    names, axes = quantities(dataset), swept(dataset)
    if not names:
        return []
    if axes == ["point"]:
        return [_scatter(dataset, names)]
    longest = sorted(axes, key=lambda axis: -dataset.sizes[axis])  # what there is most of is what one looks along first
    several = [axis for axis in longest if dataset.sizes[axis] > 1] or axes[:1]
    charts = [_lines(dataset, names, several)]
    if len(several) > 1:
        charts += [_maps(dataset, names, several), _multiples(dataset, names, several)]
    return charts


def _lines(dataset: xr.Dataset, names: list[str], axes: list[str]) -> Chart:
    most = MOST_NUMBERS // (2 * len(names) * len(axes))

    def view(name: str, axis: str) -> Any:
        return figure(_means(dataset, name, axis, most), xaxis=_axis(dataset, axis), yaxis=_of(name))

    return Chart(
        "lines",
        "Along one axis",
        "The mean over all other axes, with bars from the least to the largest point. A grey dot is a point"
        + (f"; {most} of {dataset.status.size} are shown." if dataset.status.size > most else "."),
        views(view, names, axes),
        (_quantity(names), Choice("Against", tuple(axes))),
        finding=views(lambda name, axis: _ends(dataset, name, axis), names, axes),
    )


def _ends(dataset: xr.Dataset, name: str, axis: str) -> str:
    """Where the mean of a number is least and largest along an axis."""
    mean, where = _over(np.mean, _moved(dataset[name], [axis])), _texts(dataset, axis)
    if not np.isfinite(mean).any():
        return f"{spaced(name)} is not known at any point."
    ends = [(word, int(find(mean))) for word, find in (("least", np.nanargmin), ("largest", np.nanargmax))]
    said = [f"{word} at {axis} = {where[i]} ({short(mean[i])})" for word, i in ends]
    return f"The mean of {spaced(name)} is {' and '.join(said)}."


def _means(dataset: xr.Dataset, name: str, axis: str, most: int) -> list[Any]:
    """The points, at most so many, and their mean."""
    values = _moved(dataset[name], [axis])  # [axis, others]
    x = _positions(dataset, axis)
    shown = evenly(values.size, most)
    each = line(
        np.repeat(x, values.shape[1])[shown], values.ravel()[shown], "points", 6, mode="markers",
        marker={"size": 5, "opacity": 0.35}, hovertemplate=f"{plain(axis)} %{{x}}: %{{y:.4g}}<extra></extra>",
    )  # fmt: skip
    mean, low, high = (_over(how, values) for how in (np.mean, np.min, np.max))
    return [each, line(x, mean, "mean", 0, mode="lines+markers", error_y=spread(high - mean, mean - low))]


def _maps(dataset: xr.Dataset, names: list[str], axes: list[str]) -> Chart:
    pairs = list(itertools.permutations(axes, 2)) if len(axes) < 4 else list(itertools.combinations(axes, 2))

    def view(name: str, pair: tuple[str, str]) -> Any:
        x, y = pair
        z = _over(np.mean, _moved(dataset[name], [y, x]))
        hover = f"{plain(y)} %{{y}}, {plain(x)} %{{x}}: %{{z:.4g}}<extra></extra>"
        trace = heat_map(z, _names(dataset, x), _names(dataset, y), SEQUENTIAL, hover, spaced(name))
        return figure([trace], xaxis=_axis(dataset, x) | FIELDS, yaxis=_axis(dataset, y) | FIELDS)

    return Chart(
        "maps",
        "Over two axes",
        "The mean over all other axes. A field without colour has no number.",
        views(view, names, pairs),
        (_quantity(names), Choice("Over", tuple(f"{x} and {y}" for x, y in pairs))),
        finding=views(lambda name, pair: _highest(dataset, name, *pair), names, pairs),
    )


def _highest(dataset: xr.Dataset, name: str, x: str, y: str) -> str:
    """Where the mean of a number is largest over two axes."""
    mean = _over(np.mean, _moved(dataset[name], [y, x]))
    if not np.isfinite(mean).any():
        return f"{spaced(name)} is not known at any point."
    row, column = np.unravel_index(np.nanargmax(mean), mean.shape)
    place = f"{x} = {_texts(dataset, x)[column]} and {y} = {_texts(dataset, y)[row]}"
    return f"The mean of {spaced(name)} is largest at {place} ({short(mean[row, column])})."


def _multiples(dataset: xr.Dataset, names: list[str], axes: list[str]) -> Chart:
    """A panel for each value of one axis: the number against another, a line for each value of a third."""
    pairs = list(itertools.permutations(axes, 2))

    most = MOST_TRACES // (len(names) * len(pairs))
    third = " Lines are the values of a third axis" if len(axes) > 2 else ""
    third += "; over any further axes they are means." if len(axes) > 3 else "." if third else ""

    def view(name: str, pair: tuple[str, str]) -> Any:
        return _panels(dataset, name, *pair, [axis for axis in axes if axis not in pair][:1], most)

    return Chart(
        "multiples",
        "Small multiples",
        f"A panel for each value of one axis, all on one scale.{third} Of many values some are shown.",
        views(view, names, pairs),
        (_quantity(names), Choice("Show", tuple(f"against {x}, by {panel}" for x, panel in pairs))),
        520,
        views(lambda name, pair: _ends(dataset, name, pair[1]), names, pairs),
    )


def _panels(dataset: xr.Dataset, name: str, x: str, panel: str, third: list[str], most: int) -> Any:
    """Lines in panels, at most so many in all."""
    values = _over(np.mean, _moved(dataset[name], [panel, x, *third]))  # [panel, x] or [panel, x, third]
    values = values if third else values[..., None]
    titles = [f"{panel} = {text}" for text in _texts(dataset, panel)]
    lines = [f"{third[0]} = {text}" for text in _texts(dataset, third[0])] if third else [name]
    shown = evenly(len(values), PANELS)
    drawn = evenly(values.shape[2], min(MOST_LINES, most // len(shown)))
    traces = [
        line(
            _positions(dataset, x), values[p, :, k], lines[k], color, mode="lines+markers",
            xaxis=f"x{place + 1}", yaxis="y", legendgroup=str(k), showlegend=bool(third) and place == 0,
            hovertemplate=f"{plain(titles[p])}<br>{plain(x)} %{{x}}: %{{y:.4g}}<extra>{plain(lines[k])}</extra>",
        )
        for place, p in enumerate(shown)
        for color, k in enumerate(drawn)
    ]  # fmt: skip
    return figure(traces, **_grid(dataset, [titles[p] for p in shown], x, name))


def _grid(dataset: xr.Dataset, titles: Sequence[str], x: str, name: str) -> dict[str, Any]:
    """Panels beside each other on one y axis, with the value of each below it."""
    width = 1 / len(titles)
    layout: dict[str, Any] = {"yaxis": _of(name), "meta": {"x": x}}
    for place, title in enumerate(titles):
        own = {"title": {"text": plain(title)}, "anchor": "y", "domain": [place * width, (place + 0.92) * width]}
        layout[f"xaxis{place + 1}"] = _axis(dataset, x) | own | {"nticks": 4}
    layout["yaxis"]["anchor"] = "x"
    return layout


def _scatter(dataset: xr.Dataset, names: list[str]) -> Chart:
    """Numbers of a list of points against each of their arguments."""
    arguments = [str(name) for name, coord in dataset.coords.items() if coord.dims == ("point",)]

    def view(name: str, argument: str) -> Any:
        dots = line(
            _positions(dataset, argument), dataset[name].values, name, 0, mode="markers", marker={"size": 8},
            text=[f"point {i}" for i in range(dataset.sizes["point"])],
            hovertemplate="%{text}: %{y:.4g}<extra></extra>",
            error_y=with_bars(dataset[f"{name}_stderr"].values) if f"{name}_stderr" in dataset else None,
        )  # fmt: skip
        return figure([dots], xaxis=_axis(dataset, argument), yaxis=_of(name))

    return Chart(
        "points",
        "Each point",
        "A dot for each point, with bars of two standard errors where they are known.",
        views(view, names, arguments),
        (_quantity(names), Choice("Against", tuple(arguments))),
        finding=views(lambda name, _argument: _span(dataset, name), names, arguments),
    )


def _span(dataset: xr.Dataset, name: str) -> str:
    values = dataset[name].values[np.isfinite(dataset[name].values)]
    between = f"between {short(values.min())} and {short(values.max())}" if values.size else "not known"
    return f"{spaced(name)} is {between} at {values.size} points."


def _moved(array: xr.DataArray, first: list[str]) -> np.ndarray:
    """The values with these axes first and all others in one."""
    rest = [str(dim) for dim in array.dims if dim not in first]
    values = array.transpose(*first, *rest).values.astype(float)
    return values.reshape((*values.shape[: len(first)], -1))


def _over(how: Any, values: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is known; NaN where nothing is."""
    known = np.ma.masked_invalid(values)
    return np.ma.filled(getattr(known, how.__name__)(-1).astype(float), np.nan)


def _positions(dataset: xr.Dataset, axis: str) -> np.ndarray:
    """Numbers where they are, and everything else as text."""
    return dataset[axis].values if _is_scale(dataset, axis) else _names(dataset, axis)


def _names(dataset: xr.Dataset, axis: str) -> np.ndarray:
    return np.array([plain(text) for text in _texts(dataset, axis)])


def _axis(dataset: xr.Dataset, axis: str) -> dict[str, Any]:
    kind = {} if _is_scale(dataset, axis) else {"type": "category"}
    return {"title": {"text": plain(axis)}, **kind}


def _is_scale(dataset: xr.Dataset, axis: str) -> bool:
    """Whether the values are numbers, which stay apart as they are written into the page."""
    values = dataset[axis].values
    return values.dtype.kind in NUMBERS and len(np.unique(numbers(values))) == len(np.unique(values))


def _of(name: str) -> dict[str, Any]:
    return {"title": {"text": plain(spaced(name))}}


def _quantity(names: list[str]) -> Choice:
    return Choice("Number", tuple(spaced(name) for name in names))


def _texts(dataset: xr.Dataset, axis: str) -> list[str]:
    """The values along an axis, with as few digits, from four on, as tell them apart."""
    values = dataset[axis].values
    if not all(isinstance(value, float | np.floating) for value in values):
        return [str(value) for value in values]
    for digits in range(4, 17):
        texts = [f"{value:.{digits}g}" for value in values]
        if len(set(texts)) == len(np.unique(values)):
            return texts
    return [repr(float(value)) for value in values]
