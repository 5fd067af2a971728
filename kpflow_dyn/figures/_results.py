"""Figures of solutions, modes, summaries and tasks, in the style of `kpflow_dyn.figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.dynamics._components import pca
from kpflow_dyn.figures import bars, diverging, draw_over_time, draw_ranks, trial_colors
from kpflow_dyn.figures._dynamics import draw_plane
from kpflow_dyn.figures._style import new_figure, series, styled

if TYPE_CHECKING:
    from kpflow_dyn._numbers.spectra import Modes
    from kpflow_dyn._numbers.summary import Summary
    from kpflow_dyn._problems.solutions import Solution
    from kpflow_dyn.tasks._data import TaskData

PANELS, SHOWN_TRIALS, SHOWN_MODES, SHOWN_SHARES = 6, 60, 6, 12


@styled
def solution(found: Solution) -> Figure:
    """The states over time, a panel for each unit and a line for each trial; many units in the plane of two PCs."""
    state = found.to_xarray().state
    if "time" not in state.dims:
        return _map_of(state.values.reshape(state.shape[0], -1), "Unit", "Trial", "State")
    if state.sizes["unit"] > PANELS:
        figure, axes = new_figure(4.4)
        draw_plane(axes, pca(found, 2))
        return figure
    figure, panels = new_figure(0.6 + 1.3 * state.sizes["unit"], rows=state.sizes["unit"])
    for unit, panel in enumerate(np.atleast_1d(panels)):
        panel.set_prop_cycle(color=trial_colors(min(len(state), SHOWN_TRIALS)))
        panel.plot(state.time, state.isel(unit=unit)[:SHOWN_TRIALS].T, alpha=0.6, linewidth=1)
        panel.set(ylabel=_name(state, "unit", unit))
        panel.label_outer()
    np.atleast_1d(panels)[-1].set(xlabel="Time")
    return figure


@styled
def modes(found: Modes) -> Figure:
    """The share of each mode in the trace, or its eigenvalue; and the leading modes, where they have one axis."""
    single, vectors = len(found.space.axes) == 1, to_numpy(found.vectors)[:SHOWN_MODES]
    figure, panels = new_figure(5.0 if single else 2.8, rows=1 + single)
    values, *_ = np.atleast_1d(panels)
    scale, label = (100 / found.total, "Share of the trace (%)") if found.total else (1.0, "Eigenvalue")
    stderr = None if found.stderr is None else scale * to_numpy(found.stderr)[:SHOWN_SHARES]
    bars(values, scale * to_numpy(found.values)[:SHOWN_SHARES], "Mode", label, stderr)
    if single and found.space.axes == ("time",):
        steps, times = 1 + np.arange(vectors.shape[1]), found.space.times
        time = steps if times is None else to_numpy(times)
        draw_over_time(panels[1], time, vectors, np.array_equal(time, steps))
        panels[1].set(xlabel="Time")
    elif single:
        _map(panels[1], vectors, found.space.axes[0].capitalize(), "Mode", "Loading", found.space.units)
    return figure


@styled
def summary(found: Summary) -> Figure:
    """Effective ranks with error bars of two standard errors, and the leading eigenvalues of the NTK."""
    ranks = {name: rank for name, rank in found.numbers().items() if name.endswith("effective_rank")}
    figure, (above, below) = new_figure(3.2 + 0.36 * len(ranks), rows=2, heights=(0.36 * len(ranks), 2.2))
    sizes = {f"{name}_effective_rank": kernel.domain.dimension for name, kernel in found.kernels.items()}
    draw_ranks(above, {name: (one.value, one.stderr, sizes.get(name)) for name, one in ranks.items()})
    bars(below, to_numpy(found.modes.values)[:SHOWN_SHARES], "Rank of the eigenvalue", "Eigenvalue of the NTK")
    return figure


@styled
def task(found: TaskData) -> Figure:
    """Inputs and targets of the first trial over time; where its targets do not count, they are left out."""
    trial = found.to_xarray().isel(trial=0)
    named = [name for name in ("inputs", "targets") if name in trial]
    figure, panels = new_figure(2.2 * len(named), rows=len(named))
    for name, panel in zip(named, np.atleast_1d(panels), strict=True):
        values = trial[name].where(trial["mask"] != 0) if name == "targets" and "mask" in trial else trial[name]
        _channels(panel, values.expand_dims("out", -1) if values.ndim == 1 else values)
        panel.set(ylabel=name.capitalize())
    np.atleast_1d(panels)[-1].set(xlabel="Time (ms)" if found.dt is not None else "Step")
    return figure


def _channels(axes: Axes, values: Any) -> None:
    """Lines, or where there are more than there are colours a map."""
    axis, time, colors = values.dims[-1], values.time.values, series()
    if values.sizes[axis] > len(colors):
        half = (time[1] - time[0]) / 2 if time.size > 1 else 0.5
        extent = (time[0] - half, time[-1] + half, values.sizes[axis] + 0.5, 0.5)
        _map(axes, values.values.T, "", "", "Value", extent=extent)
        return
    for number, color in enumerate(colors[: values.sizes[axis]]):
        label = _name(values, axis, number)
        axes.plot(time, values.isel({axis: number}), color=color, drawstyle="steps-post", label=label)
    if values.sizes[axis] > 1:
        axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _map_of(values: np.ndarray, xlabel: str, ylabel: str, label: str) -> Figure:
    figure, axes = new_figure(3.6)
    _map(axes, values, xlabel, ylabel, label)
    return figure


def _map(axes: Axes, values: np.ndarray, xlabel: str, ylabel: str, label: str, names: Any = (), **shown: Any) -> None:
    """Numbers as colours, with a bar; `names` are those of the columns."""
    most = float(np.nanmax(np.abs(values))) or 1.0
    given = {"extent": (0.5, values.shape[1] + 0.5, len(values) + 0.5, 0.5), **shown}
    image = axes.imshow(values, aspect="auto", cmap=diverging(), vmin=-most, vmax=most, interpolation="none", **given)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    for axis in (axes.yaxis, axes.xaxis)[: 1 + ("extent" not in shown)]:
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if names:
        axes.set_xticks(1 + np.arange(len(names)), [name.replace("_", " ") for name in names])
    axes.grid(visible=False)
    axes.figure.colorbar(image, ax=axes, label=label, pad=0.02)


def _name(values: Any, axis: str, number: int) -> str:
    """What an entry of an axis is called, or its number, from 0 as in arrays and on pages."""
    if axis in values.coords:
        return str(values[axis].values[number]).replace("_", " ")
    return f"{axis} {number}"
