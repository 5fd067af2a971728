"""Figures of an analysis. Each takes the Dataset that `analyze` returns and gives a matplotlib Figure; none computes.

    kp.figures.spectra(dataset).savefig("spectra.png")

Every function takes `dark=True` for a figure that suits a dark page. `style` makes all figures fit for a paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kpflow_dyn.figures._palette import SERIES
from kpflow_dyn.figures._style import Draw, faint, muted, new_figure, series, style, styled, to_bytes

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "effective_ranks",
    "spatial_modes",
    "spectra",
    "state_pca",
    "style",
    "temporal_modes",
    "to_bytes",
    "trial_modes",
]

SHOWN_MODES = 4
SHOWN_TIMES = 60  # more would merge into the line


@styled
def spectra(dataset: xr.Dataset) -> Figure:
    """Eigenvalues of the core (all), of K and of the NTK (the leading ones), against their rank.

    Args:
        dataset: what `kp.analyze` returns.
        dark: whether the figure is for a dark page.

    Example as `style`.
    """
    figure, axes = new_figure(3.6)
    colors = series()
    core = np.repeat(dataset.core_eigenvalue.values, dataset.core_multiplicity.values)
    core = core[core > 1e-7 * core.max(initial=0)]
    axes.plot(1 + np.arange(core.size), core, color=muted(), linewidth=2, label="core")
    for name, label, marker, color in (("K", "K", "s", colors[0]), ("ntk", "NTK", "o", colors[1])):
        values, done = dataset[f"{name}_eigenvalue"].values, dataset[f"{name}_converged"].values.astype(bool)
        ranks = 1 + np.arange(values.size)
        axes.plot(ranks, values, color=color, marker=marker, markersize=5, label=label)
        axes.plot(ranks[~done], values[~done], color=axes.get_facecolor(), marker=marker, markersize=2.5, linestyle="")
    axes.set(xscale="log", yscale="log", xlabel="Rank of the eigenvalue", ylabel="Eigenvalue")
    axes.legend()
    return figure


@styled
def temporal_modes(dataset: xr.Dataset) -> Figure:
    """The share of each temporal mode of the NTK, and the leading modes over time.

    Args and Example as `spectra`.
    """
    figure, (shares, modes) = new_figure(5.0, rows=2)
    _draw_shares(shares, dataset, "temporal")
    time = dataset.time.values
    draw_over_time(modes, time, dataset.temporal_mode.values[:SHOWN_MODES], "units" not in dataset.time.attrs)
    modes.set(xlabel=_time_label(dataset))
    return figure


@styled
def spatial_modes(dataset: xr.Dataset) -> Figure:
    """The share of each spatial mode of the NTK, and the units that the leading modes move.

    Args and Example as `spectra`.
    """
    order = np.argsort(dataset.spatial_mode.values[0])
    return _loadings(dataset, "spatial", order, "Unit, sorted by mode 1")


@styled
def trial_modes(dataset: xr.Dataset) -> Figure:
    """The share of each trial mode of the NTK, and the trials that the leading modes move.

    Args and Example as `spectra`.
    """
    label = trial_label(dataset)
    order = np.argsort(dataset.trial_mode.values[0] if label is None else dataset[label].values, kind="stable")
    return _loadings(dataset, "trial", order, f"Trial, sorted by {'mode 1' if label is None else _spaced(label)}")


@styled
def effective_ranks(dataset: xr.Dataset) -> Figure:
    """Effective ranks with error bars of two standard errors, beside the dimension of the space each lives in.

    Args and Example as `spectra`.
    """
    names = [name for name in dataset.data_vars if str(name).endswith("effective_rank")]
    figure, axes = new_figure(0.8 + 0.36 * len(names))
    found = {name: dataset[name] for name in map(str, names)}
    draw_ranks(axes, {n: (float(one), one.attrs["stderr"], one.attrs["dimension"]) for n, one in found.items()})
    return figure


def draw_ranks(axes: Axes, found: dict[str, tuple[float, float, int | None]]) -> None:
    """Ranks (value, standard error, dimension if it is known) by the names of their variables, a row for each."""
    color, most = series()[1], max(dimension or value for value, _, dimension in found.values())
    for row, (value, stderr, known) in enumerate(found.values()):
        bar, dimension = 2 * stderr, known or 1
        axes.plot([1, dimension], [row, row], color=faint(), linewidth=5, solid_capstyle="butt", zorder=1)
        low = min(value, max(value - bar, 0.5))  # a logarithmic axis has no room for 0
        axes.errorbar(value, row, xerr=[[value - low], [bar]], fmt="o", color=color, capsize=4, zorder=3)
        text = f"{_short(value)} of {dimension:,}" if known else _short(value)
        axes.annotate(text, (max(dimension, value + bar), row), (6, 0), textcoords="offset points", va="center")
    labels = [name.removesuffix("_effective_rank").replace("ntk", "NTK") for name in found]
    axes.set(xscale="log", xlabel="Effective rank", xlim=(0.8, 60 * most), ylim=(len(found) - 0.5, -0.7))
    axes.set_yticks(range(len(found)), labels)
    axes.grid(axis="y", visible=False)


@styled
def state_pca(dataset: xr.Dataset) -> Figure:
    """The variance that each principal component of the state explains, and the trials in the plane of two.

    Args and Example as `spectra`.
    """
    figure, (shares, plane) = new_figure(6.4, rows=2, heights=(1, 2.2))
    bars(shares, 100 * dataset.pc_variance.values, "Principal component", "Variance (%)")
    _draw_trajectories(plane, dataset)
    return figure


FIGURES: dict[str, Draw] = {
    "spectra": spectra,
    "effective_ranks": effective_ranks,
    "temporal_modes": temporal_modes,
    "spatial_modes": spatial_modes,
    "trial_modes": trial_modes,
    "state_pca": state_pca,
}
"""All figures, by the name of their file, in the order of the page."""


def trial_label(dataset: xr.Dataset) -> str | None:
    """The first thing known of the trials by which they can be sorted, or None."""
    labels = (str(name) for name in dataset.coords if str(name).startswith("label_"))
    return next((name for name in labels if dataset[name].dtype.kind in "biuf"), None)


def _draw_shares(axes: Axes, dataset: xr.Dataset, kernel: str) -> None:
    values = dataset[f"{kernel}_eigenvalue"]
    given = (values, dataset[f"{kernel}_eigenvalue_stderr"])
    shares, stderr = (100 * found.values[:12] / float(values.sum()) for found in given)
    bars(axes, shares, f"{kernel.capitalize()} mode", "Share of the trace (%)", stderr)
    axes.set_ylim(bottom=0)


def draw_over_time(axes: Axes, time: np.ndarray, modes: np.ndarray, has_steps: bool) -> None:
    """Modes [mode, time] as lines, with dots at steps where these are few; dashes where colours come again."""
    axes.axhline(0, color=muted(), linewidth=0.8)
    colors, dots = series(), {"marker": ".", "markersize": 5} if has_steps and time.size <= SHOWN_TIMES else {}
    for i, mode in enumerate(modes):
        line = "-" if i < len(colors) else "--"
        axes.plot(time, mode, line, color=colors[i % len(colors)], label=f"mode {i + 1}", **dots)
    axes.set(ylabel="Temporal mode", xlim=(time[0], time[-1]) if time.size > 1 else None)
    axes.legend(ncols=(len(modes) + 1) // 2, loc="lower center", bbox_to_anchor=(0.5, 1))


def bars(axes: Axes, heights: np.ndarray, xlabel: str, ylabel: str, stderr: np.ndarray | None = None) -> None:
    """A bar for each number, over its rank, with error bars of two standard errors where these are given."""
    ranks = 1 + np.arange(len(heights))
    axes.bar(ranks, heights, width=0.7)
    if stderr is not None:
        axes.errorbar(ranks, heights, 2 * stderr, fmt="none", ecolor=muted(), capsize=2)
    axes.set(xlabel=xlabel, ylabel=ylabel, xticks=ranks)
    axes.grid(axis="x", visible=False)


def _loadings(dataset: xr.Dataset, kernel: str, order: np.ndarray, xlabel: str) -> Figure:
    figure, (shares, map_) = new_figure(5.0, rows=2)
    _draw_shares(shares, dataset, kernel)
    modes = dataset[f"{kernel}_mode"].values[:SHOWN_MODES, order]
    most = np.nanmax(np.abs(modes))
    extent = (0.5, order.size + 0.5, len(modes) + 0.5, 0.5)
    image = map_.imshow(
        modes, aspect="auto", cmap=diverging(), vmin=-most, vmax=most, extent=extent, interpolation="none"
    )
    map_.set(xlabel=xlabel, ylabel=f"{kernel.capitalize()} mode", yticks=1 + np.arange(len(modes)))
    map_.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    map_.grid(visible=False)
    figure.colorbar(image, ax=map_, label="Loading", pad=0.02)
    return figure


def diverging() -> LinearSegmentedColormap:
    """Blue to orange through the colour of the page, so that zero looks like nothing."""
    low, high = series()[:2]
    return LinearSegmentedColormap.from_list("loading", [low, matplotlib.rcParams["axes.facecolor"], high])


def _draw_trajectories(axes: Axes, dataset: xr.Dataset) -> None:
    projections = dataset.pc_projection.values
    flat = projections.shape[2] == 1
    x = np.broadcast_to(dataset.time.values, projections.shape[:2]) if flat else projections[..., 0]
    y = projections[..., 0] if flat else projections[..., 1]
    for trial, color in enumerate(_color_trials(axes, dataset)):
        axes.plot(x[trial], y[trial], color=color, linewidth=1, alpha=0.8)
        last = np.flatnonzero(np.isfinite(y[trial]))[-1:]
        axes.plot(x[trial, last], y[trial, last], color=color, marker="o", markersize=3.5)
    names = (_time_label(dataset), "PC 1") if flat else ("PC 1", "PC 2")
    axes.set(xlabel=names[0], ylabel=names[1])


def _time_label(dataset: xr.Dataset) -> str:
    """The time with its unit, where one is known."""
    units = dataset.time.attrs.get("units")
    return f"Time ({units})" if units else "Time"


def _color_trials(axes: Axes, dataset: xr.Dataset) -> list[Any]:
    """A colour for each trial by its label, explained by a legend for a few values and by a colour bar for many."""
    label = trial_label(dataset)
    if label is None:
        return [series()[0]] * dataset.sizes["trial"]
    values = dataset[label].values.astype(float)
    known = np.unique(values)
    if known.size <= len(SERIES):
        for value, color in zip(known, series(), strict=False):
            axes.plot([], [], color=color, marker="o", label=f"{value:g}")
        axes.legend(title=_spaced(label))
        return [series()[place] for place in np.searchsorted(known, values)]
    norm, colors = Normalize(known[0], known[-1]), _gradient()
    axes.figure.colorbar(ScalarMappable(norm, colors), ax=axes, label=_spaced(label), pad=0.02)
    return [colors(norm(value)) for value in values]


def trial_colors(trials: int) -> list[Any]:
    """A colour for each trial, so that one can be told from another."""
    return series()[:trials] if trials <= len(series()) else list(_gradient()(np.linspace(0, 1, trials)))


def _gradient() -> LinearSegmentedColormap:
    """cividis without the end that the page would swallow."""
    light_page = to_rgb(matplotlib.rcParams["axes.facecolor"])[0] > 0.5
    ends = (0, 0.85) if light_page else (0.3, 1)
    return LinearSegmentedColormap.from_list("trials", matplotlib.colormaps["cividis"](np.linspace(*ends, 64)))


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _spaced(name: str) -> str:
    return name.removeprefix("label_").replace("_", " ")
