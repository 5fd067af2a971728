"""Figures of fixed points, exponents and principal components, in the style of `kpflow_dyn.figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kpflow_dyn.dynamics._components import pca
from kpflow_dyn.figures import bars, trial_colors
from kpflow_dyn.figures._style import muted, new_figure, series, styled

if TYPE_CHECKING:
    from kpflow_dyn.dynamics._components import PCA
    from kpflow_dyn.dynamics._exponents import FiniteTimeExponents, Lyapunov
    from kpflow_dyn.dynamics._points import FixedPoints

SHOWN_TRIALS, SHOWN_SHARES, SHOWN_EXPONENTS = 60, 12, 4
LONGEST = 0.08  # half a segment, over the width of the plane


@styled
def components(found: PCA) -> Figure:
    """The share of the variance of each component, and the trials in the plane of the first two."""
    figure, (shares, plane) = new_figure(6.4, rows=2, heights=(1, 2.2))
    bars(shares, 100 * found.explained[:SHOWN_SHARES], "Principal component", "Variance (%)")
    draw_plane(plane, found)
    return figure


@styled
def fixed_points(found: FixedPoints) -> Figure:
    """Points in the plane of the states' first two principal components, with their unstable and slowest directions.

    Stable points are filled, unstable ones hollow, marginal ones diamonds, slow ones crosses, if they are near the
    others. A segment is an eigenvector seen in this plane: each that grows, and at a stable point the one that decays
    slowest. The slower, the longer, up to a limit.
    """
    figure, axes = new_figure(4.4)
    plane = pca(found.states, min(2, found.states.shape[2]))
    draw_plane(axes, plane, muted(), 0.25)
    places, size = _in_plane(plane.project(found.xstar)), float(np.clip(60 / max(len(found), 1), 4, 8))
    _draw_directions(axes, found, places, _in_plane(plane.project(plane.mean + np.eye(len(plane.mean)))))
    kinds = {
        "stable": (found.is_stable & found.is_fixed, "o", series()[0], series()[0]),
        "unstable": ((found.unstable > 0) & found.is_fixed, "o", axes.get_facecolor(), series()[1]),
        "marginal": (found.is_marginal & found.is_fixed, "D", axes.get_facecolor(), series()[3]),
        "slow": (~found.is_fixed, "x", "none", series()[2]),
    }
    for name, (which, marker, inside, edge) in kinds.items():
        if name == "slow" and found.is_fixed.any():
            axes.autoscale_view()
            axes.autoscale(False)  # slow points may be far away
        if which.any():
            label, style = f"{name} ({which.sum()})", {"markerfacecolor": inside, "color": edge, "markeredgewidth": 1.5}
            axes.plot(*places[which].T, marker, markersize=size, label=label, zorder=4, **style)
    if len(found):
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return figure


@styled
def lyapunov(found: Lyapunov) -> Figure:
    """The exponents with error bars of two standard errors, and how the mean of the first ones settled over time."""
    figure, (spectrum, settling) = new_figure(5.4, rows=2)
    ranks = 1 + np.arange(len(found.mean))
    spectrum.axhline(0, color=muted(), linewidth=0.8)
    spectrum.errorbar(ranks, found.mean, 2 * found.stderr, fmt="o", markersize=4, capsize=2)
    spectrum.set(xlabel="Rank of the exponent", ylabel="Lyapunov exponent")
    spectrum.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    settling.axhline(0, color=muted(), linewidth=0.8)
    for rank, color in zip(range(min(SHOWN_EXPONENTS, len(found.mean))), series(), strict=False):
        for times, values in zip(found.times[:SHOWN_TRIALS], found.history[:SHOWN_TRIALS, :, rank], strict=True):
            settling.plot(times, values, color=color, linewidth=0.8, alpha=0.5)
    settling.set(xlabel="Time", ylabel="Up to this time")
    return figure


@styled
def finite_time(found: FiniteTimeExponents) -> Figure:
    """The mean of each exponent over the trials against time, and the range of the largest."""
    figure, axes = new_figure(3.4)
    times, mean, (color, *_) = found.times.mean(0), found.exponents.mean(0), series()
    axes.axhline(0, color=muted(), linewidth=0.8)
    axes.plot(times, mean[:, 1:], color=muted(), linewidth=0.8)
    largest = found.exponents[..., 0]
    axes.fill_between(times, largest.min(0), largest.max(0), color=color, alpha=0.25, linewidth=0)
    axes.plot(times, mean[:, 0], color=color, label="largest, and its range over the trials")
    axes.set(xlabel="Time", ylabel="Finite-time exponent")
    axes.legend()
    return figure


def _draw_directions(axes: Axes, found: FixedPoints, places: np.ndarray, units: np.ndarray) -> None:
    """Segments through `places` [n, 2] along eigenvectors; `units` [unit, 2] says where each unit points to."""
    times, fixed = found.time_constants, found.is_fixed[:, None]
    grows = (times < 0) & (found.eigval_J_xstar.imag >= 0) & fixed
    slowest = fixed & found.is_stable[:, None] & (np.arange(times.shape[1]) == 0)  # they are sorted
    longest = LONGEST * np.ptp(axes.dataLim.get_points(), axis=0).max()
    for which, color in ((grows, series()[1]), (slowest, series()[0])):
        point, k = np.nonzero(which)
        if not len(point):
            continue
        relative = np.abs(times[which]) / np.median(np.abs(times[which]))
        along = longest * np.clip(relative, 0.2, 1)[:, None] * (found.eigvec_J_xstar[point, :, k].real @ units)
        ends = np.stack([places[point] - along, places[point] + along])
        axes.plot(ends[..., 0], ends[..., 1], color=color, linewidth=1, alpha=0.8, zorder=3)


def draw_plane(axes: Axes, found: PCA, color: str | None = None, alpha: float = 0.6) -> None:
    """Trials as lines, in one colour, or each in its own with a dot at its start; states without times as dots."""
    paths, lines = _in_plane(found.scores)[:SHOWN_TRIALS], found.scores.shape[0] > 1
    colors = trial_colors(len(paths)) if color is None else [color] * len(paths)
    for path, own in zip(paths, colors, strict=True):
        axes.plot(*path.T, "-" if lines else ".", color=own, linewidth=0.7, alpha=alpha, markersize=3)
    if lines and color is None:
        axes.scatter(*paths[:, 0].T, s=14, color=colors, zorder=4)
        axes.scatter([], [], s=14, color=muted(), label="start")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1))
    axes.set(xlabel="PC 1", ylabel="PC 2" if found.scores.shape[2] > 1 else "")


def _in_plane(scores: np.ndarray) -> np.ndarray:
    """[..., 2], with zeros where there is but one component."""
    flat = np.concatenate([scores, np.zeros_like(scores)], -1)
    return scores[..., :2] if scores.shape[-1] > 1 else flat
