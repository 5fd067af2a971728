"""Figures of forecasts, gradient flows, comparisons and of operators over training, in the style of `figures`."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.figures import bars, diverging, trial_label
from kpflow_dyn.figures._style import muted, new_figure, new_row, series, styled

if TYPE_CHECKING:
    import xarray as xr

    from kpflow_dyn._learning.comparison import Comparison
    from kpflow_dyn._learning.descent import GradientFlow
    from kpflow_dyn._learning.forecasting import Forecast
    from kpflow_dyn._learning.self_reference import SelfReference
    from kpflow_dyn._learning.similarity import Similarities
    from kpflow_dyn.learning_rules._table import RuleTable
    from kpflow_dyn.models._design import Design


@styled
def gradient_flow(flow: GradientFlow) -> Figure:
    """The loss and the norm of its gradient over the time of a gradient flow, a dot at each step."""
    figure, axes = new_figure(5.0, rows=2)
    first = flow.time[min(1, flow.time.size - 1)]
    time, colors = np.geomspace(first / 30, flow.time[-1], 400), series()
    axes[0].plot(time, flow(time), color=colors[0])
    axes[0].plot(flow.time[1:], flow.loss[1:], ".", color=colors[0], markersize=5)
    axes[1].plot(flow.time[1:], flow.gradient_norm[1:], ".-", color=colors[1], markersize=5)
    for panel, label in zip(axes, ("Loss", "Norm of the gradient"), strict=True):
        panel.set(xscale="log", yscale="log" if flow.loss.min() > 0 else "linear", ylabel=label)
    label = f"Step of {flow.optimizer}" if flow.optimizer else "Time (learning rate x steps)"
    axes[1].set(xlabel=label, xlim=axes[0].get_xlim())
    return figure


@styled
def forecast(given: tuple[Forecast, Any]) -> Figure:
    """The forecast, the training beside it, and recorded losses, one for each step from 0 on."""
    found, recorded = given
    figure, axes = new_figure(3.6)
    if recorded is not None:
        losses = np.asarray(recorded, float)
        axes.plot(np.arange(1, len(losses)), losses[1:], color=muted(), linewidth=3, alpha=0.6, label="recorded")
    axes.plot(found.steps[1:], found.loss[1:], label=f"{found.optimizer}, frozen kernel".removeprefix(", "))
    optimizer = found.optimizer
    axes.plot(found.flow_steps[1:], found.flow_loss[1:], ".", markersize=5, label=optimizer or "gradient flow")
    if np.isfinite(found.holds_until) and found.holds_until >= 1:
        axes.axvline(found.holds_until, color=muted(), linewidth=0.8, linestyle=":")
        side, offset = ("right", -4) if found.holds_until**2 > found.steps[1] * found.steps[-1] else ("left", 4)
        place, units = (found.holds_until, 0.02), ("data", "axes fraction")
        axes.annotate("kernel has changed", place, (offset, 0), units, "offset points", ha=side)
    axes.set(xscale="log", yscale="log", xlabel=f"Step of {optimizer or 'gradient descent'}", ylabel="Loss")
    axes.legend()
    return figure


MOST_STARTS = 12


@styled
def design(found: Design) -> Figure:
    """Steps to the goal of the soonest candidates, a dot for each seed; a hollow dot at the end for one not there."""
    order, colors = found.order[:MOST_STARTS], series()
    figure, axes = new_figure(1.0 + 0.3 * len(order))
    finite = [values[np.isfinite(values)].max(initial=1.0) for values in (found.steps[order], found.trained[order])]
    runs = {"forecast, frozen kernel": found.steps, "training": found.trained}
    for (label, values), color, shift in zip(runs.items(), colors, (-0.12, 0.12), strict=False):
        for place, steps in enumerate(values[order]):
            late = np.isinf(steps)
            at = np.where(late, 1.3 * max(finite), steps)
            for which, face in ((~late, color), (late, "none")):
                axes.plot(
                    at[which], np.full(which.sum(), place + shift), "o", color=color, markerfacecolor=face, markersize=5
                )
        axes.plot([], [], "o", color=color, markersize=5, label=label)
    axes.plot([], [], "o", color=muted(), markerfacecolor="none", markersize=5, label="not within these steps")
    axes.set(
        yticks=range(len(order)), yticklabels=[str(found.candidates[i]) for i in order], xlabel="Steps to the goal"
    )
    axes.set_xscale("symlog", linthresh=1)
    axes.invert_yaxis()
    figure.legend(ncols=3, loc="outside lower center")
    return figure


HIGHEST = 2.0  # of losses over their first values, as some optimisers overshoot by far


@styled
def predicted_loss(dataset: xr.Dataset) -> Figure:
    """The loss of each part over its value now, with a dot where half is learnt: under the kernel as it is, and in
    training by an optimiser where that was asked for.
    """
    of_optimizer = "optimizer_curve" in dataset
    figure, panels = new_figure(4.2 + 2.4 * of_optimizer, rows=1 + of_optimizer)
    first, *others = np.atleast_1d(panels)
    _courses(first, dataset, "part", dataset.tau)
    first.set(xscale="log", xlabel="tau = learning rate x steps, kernel as it is")
    for axes in others:
        _courses(axes, dataset, "optimizer", dataset.step)
        axes.set(xlabel=f"Step of {dataset.attrs['optimizer']}")
    figure.legend(*first.get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return figure


def _courses(axes: Axes, dataset: xr.Dataset, road: str, time: xr.DataArray) -> None:
    lines = [(color, style) for style in ("-", "--") for color in series()]
    for part, (color, style) in zip(range(dataset.sizes["part"]), lines, strict=False):
        one = dataset.isel(part=part)
        label = _shortened(str(one.part.values))
        axes.plot(time, one[f"{road}_curve"], color=color, linestyle=style, label=label)
        axes.plot(one[f"{road}_half"], 0.5, "o", color=color, markersize=5)
    axes.set(ylabel="Loss of the part / now", xlim=(float(time[0]), float(time[-1])))
    axes.set(ylim=(0, min(axes.get_ylim()[1], HIGHEST)))


@styled
def reach(dataset: xr.Dataset) -> Figure:
    """Where one step on the whole loss moves the outputs along the error, and the sum over trials for each part."""
    figure, (map_, sums) = new_figure(5.8, rows=2)
    label = trial_label(dataset)
    order = np.argsort(np.arange(dataset.sizes["trial"]) if label is None else dataset[label].values, kind="stable")
    z, time = dataset.part_reach.values[0, order], dataset.time.values
    most = float(np.nanmax(np.abs(z))) or 1.0
    half = (time[1] - time[0]) / 2 if time.size > 1 else 0.5
    extent = (time[0] - half, time[-1] + half, len(z) + 0.5, 0.5)
    shown = {"cmap": diverging(), "vmin": -most, "vmax": most, "aspect": "auto", "interpolation": "none"}
    image = map_.imshow(z, extent=extent, **shown)
    map_.set(ylabel="Trial" if label is None else f"Trial, sorted by {label.removeprefix('label_').replace('_', ' ')}")
    map_.grid(visible=False)
    figure.colorbar(image, ax=map_, label="Speed along the error", pad=0.02)
    for part, color in zip(range(dataset.sizes["part"]), series(), strict=False):
        one = dataset.isel(part=part)
        total = np.nansum(one.part_reach, 0)
        sums.plot(time, total / (np.abs(total).max() or 1.0), color=color, label=_shortened(str(one.part.values)))
    units = dataset.time.attrs.get("units")
    sums.set(xlabel=f"Time ({units})" if units else "Time", ylabel="Sum over trials / largest")
    figure.legend(*sums.get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return figure


OF_PARTS = {"predicted_loss": predicted_loss, "reach": reach}
"""Figures of what will be learnt, by the name of their file: of an analysis with a readout and targets."""


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."


@styled
def comparison(found: Comparison) -> Figure:
    """Principal angles between the leading modes of two NTKs, and the eigenvalues of both, under a loss the rates."""
    figure, (angles, values) = new_figure(5.0, rows=2)
    numbers = 1 + np.arange(len(found.angles))
    bars(angles, np.degrees(found.angles), "Principal angle", "Degrees")
    angles.set(ylim=(0, 90), yticks=range(0, 91, 30))
    names, kind = found.names, "Eigenvalue of the NTK"
    if found.loss is not None:
        names = [f"{name}, loss {now:.3g}" for name, now in zip(names, found.loss, strict=True)]
        kind = "Rate under the loss"
    for modes, name, marker in zip(found.modes, names, ("o", "s"), strict=True):
        values.plot(1 + np.arange(len(modes.values)), to_numpy(modes.values), marker=marker, markersize=5, label=name)
    values.set(xlabel="Rank of the eigenvalue", ylabel=kind, yscale="log", xticks=numbers)
    values.legend()
    return figure


@styled
def similarities(found: Similarities) -> Figure:
    """The tree of some networks and recordings by their average distance, and all distances in its order."""
    from scipy.cluster.hierarchy import dendrogram

    count, order = len(found.names), found.order
    figure, (tree, map_) = new_figure(2.2 + max(0.24 * count, 2.0), 2, (1.3, max(0.24 * count, 2.0)))
    dendrogram(found.linkage, ax=tree, no_labels=True, color_threshold=0, above_threshold_color=series()[0])
    tree.set(ylabel="Distance", xticks=[], xlim=(0, 10 * count))
    tree.grid(False)
    image = map_.imshow(found.distance[np.ix_(order, order)], aspect="auto", cmap="cividis_r", vmin=0)
    map_.set_yticks(range(count), [found.names[i] for i in order])
    map_.set_xticks([])
    map_.grid(False)
    figure.colorbar(image, ax=(tree, map_), label=f"Distance: {found.measure} of {found.of}")
    return figure


@styled
def self_reference(found: SelfReference) -> Figure:
    """The share of each change of the states in leading directions: of core and NTK, and of controls, thin."""
    figure, panels = new_figure(0.8 + 2.4 * len(found.changes), rows=len(found.changes))
    dataset, colors, dashes = found.to_xarray(), series(), ("-", "--", "-.", ":")
    styles: dict[str, Any] = {name: {"color": color} for name, color in zip(("core", "NTK"), colors, strict=False)}
    controls = zip(dataset.basis.values[len(styles) :], dashes, strict=True)
    styles |= {name: {"color": muted(), "linewidth": 1.1, "linestyle": dash} for name, dash in controls}
    panels = np.atleast_1d(panels)
    for change, axes in zip(found.changes, panels, strict=True):
        for basis, style in styles.items():
            axes.plot(dataset.directions, dataset.share.sel(change=change, basis=basis), label=basis, **style)
        axes.axvline(found.k, color=muted(), linewidth=0.8, linestyle=":")
        axes.set(ylim=(0, 1.05), ylabel="Share", title=change)
    panels[-1].set_xlabel(f"Directions of {' x '.join(found.axes)}")
    figure.legend(*panels[-1].get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return figure


@styled
def rules(found: RuleTable) -> Figure:
    """Of each learning rule cosines to backpropagation and ranks, and how much it keeps of the temporal modes."""
    count, names = len(found.rules), [textwrap.fill(name.replace("_", " "), 18) for name in found.rules]
    figure, (cosines, ranks, map_) = new_row(3, 1.4 + 0.32 * count)
    places, colors = np.arange(count), series()
    pairs = (
        (cosines, {"operator": found.alignment, "step": found.step}, "Cosine to backpropagation"),
        (ranks, {"of the operator": found.rank, "temporal": found.temporal_rank}, "Effective rank"),
    )
    for axes, numbers, label in pairs:
        for shift, (name, values), color in zip((-0.2, 0.2), numbers.items(), colors, strict=False):
            axes.barh(places + shift, values, height=0.36, color=color, label=name)
        axes.set(yticks=places, yticklabels=names, ylim=(count - 0.4, -0.6), xlabel=label)
        axes.grid(axis="y", visible=False)
        axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    ranks.set(xscale="log", xlim=(0.8, None))
    shown = {"cmap": diverging(), "vmin": 0, "vmax": 2, "aspect": "auto", "interpolation": "none"}
    map_.imshow(found.kept, **shown)
    for (rule, mode), kept in np.ndenumerate(found.kept):
        told = f"{kept:.1f}" if abs(kept) < 9.95 else f"{kept:.0f}"
        color = map_.get_facecolor() if abs(kept - 1) > 0.6 else map_.xaxis.label.get_color()
        map_.text(mode, rule, told, ha="center", va="center", size="x-small", color=color)
    map_.set(ylim=(count - 0.5, -0.5), xlabel="Temporal mode of the NTK", title="Kept (1: as backpropagation)")
    map_.set_xticks(range(len(found.share)), 1 + np.arange(len(found.share)))
    map_.grid(visible=False)
    return figure


@styled
def ranks_over_training(dataset: xr.Dataset) -> Figure:
    """Effective ranks of K, P and NTK over the steps of training, in full and by axis."""
    kinds = dataset.kind.values
    figure, panels = new_figure(1.7 * len(kinds), rows=len(kinds))
    for kind, axes in zip(kinds, panels, strict=True):
        _over_steps(axes, dataset, dataset.effective_rank.sel(kind=kind))
        axes.set(ylabel=f"{kind} rank".capitalize(), yscale="log", ylim=(0.8, None))
    panels[-1].legend(ncols=3)
    panels[-1].set_xlabel("Step of training")
    return figure


@styled
def alignment_over_training(dataset: xr.Dataset) -> Figure:
    """Alignments of K, P and NTK with those of the first and of the last checkpoint."""
    figure, panels = new_figure(4.2, rows=2)
    for end, axes in zip(("first", "last"), panels, strict=True):
        _over_steps(axes, dataset, dataset[f"alignment_{end}"])
        axes.set(ylabel=f"Alignment with the {end}", ylim=(0, 1.05))
    panels[0].legend(ncols=3)
    panels[-1].set_xlabel("Step of training")
    return figure


@styled
def target_over_training(dataset: xr.Dataset) -> Figure:
    """The loss, beside what was recorded, and the accuracy where there are classes; of each component of the target how
    much is learnt, and how fast the kernel moves the outputs along it.
    """
    right, parts = "accuracy" in dataset, "component_share" in dataset
    rows = 1 + right + 3 * parts
    figure, panels = new_figure(1.8 * rows, rows=rows)
    panels = np.atleast_1d(panels).tolist()
    _losses(panels[0], dataset)
    if right:
        panels[1].plot(dataset.step, dataset.accuracy, color=muted())
        panels[1].set(ylabel="Accuracy", ylim=(0, 1.05))
    if parts:
        _components(panels[1 + right :], dataset)
    panels[-1].set_xlabel("Step of training")
    return figure


def _losses(axes: Axes, dataset: xr.Dataset) -> None:
    axes.plot(dataset.step, dataset.loss, color=muted(), label="on these trials")
    if "recorded_loss" in dataset:
        axes.plot(dataset.step, dataset.recorded_loss, ":", color=series()[1], label="recorded")
        axes.legend()
    axes.set(ylabel="Loss", yscale="log" if float(dataset.loss.min()) > 0 else "linear")


def _components(panels: Sequence[Axes], dataset: xr.Dataset) -> None:
    names = {"learnt": "Learnt part of c", "alignment": "cos(c, NTK c)", "rayleigh": "<c, NTK c> / <c, c>"}
    for (name, label), axes in zip(names.items(), panels, strict=True):
        for number in range(min(dataset.sizes["component"], len(series()))):
            shown = dataset[f"component_{name}"].isel(component=number)
            axes.plot(dataset.step, shown, label=f"component {number + 1}")
        axes.set(ylabel=label)
    panels[0].legend()
    panels[1].set_ylim(0, 1.05)
    panels[2].set_yscale("log")


TRACK = {"ranks": ranks_over_training, "alignment": alignment_over_training, "target": target_over_training}
"""The figures of `track`, by the name of their file; that of the target only where there is one."""


def _over_steps(axes: Axes, dataset: xr.Dataset, numbers: xr.DataArray) -> None:
    for name in dataset.operator.values:
        axes.plot(dataset.step, numbers.sel(operator=name), marker=".", markersize=4, label=str(name))
