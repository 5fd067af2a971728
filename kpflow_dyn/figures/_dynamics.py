"""Figures of fixed points, exponents and principal components, in the style of `kpflow_dyn.figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kpflow_dyn.dynamics._components import pca
from kpflow_dyn.figures import bars
from kpflow_dyn.figures._style import muted, new_figure, series, styled

if TYPE_CHECKING:
    from kpflow_dyn.dynamics._components import PCA
    from kpflow_dyn.dynamics._exponents import FiniteTimeExponents, Lyapunov
    from kpflow_dyn.dynamics._points import FixedPoints

SHOWN_TRIALS, SHOWN_SHARES, SHOWN_EXPONENTS = 60, 12, 4


@styled
def components(found: PCA) -> Figure:
    """The share of the variance of each component, and the trials in the plane of the first two."""
    figure, (shares, plane) = new_figure(6.4, rows=2, heights=(1, 2.2))
    bars(shares, 100 * found.explained[:SHOWN_SHARES], "Principal component", "Variance (%)")
    draw_plane(plane, found, series()[0])
    return figure


@styled
def fixed_points(found: FixedPoints) -> Figure:
    """States and points in the plane of the states' first two principal components, the stable ones filled."""
    figure, axes = new_figure(4.4)
    plane = pca(found.states, min(2, found.states.shape[2]))
    draw_plane(axes, plane, muted())
    places = _in_plane(plane.project(found.xstar))
    kinds = {
        "stable": (found.is_stable & found.is_fixed, series()[0], series()[0]),
        "unstable": (~found.is_stable & found.is_fixed, axes.get_facecolor(), series()[1]),
        "slow": (~found.is_fixed, axes.get_facecolor(), series()[2]),
    }
    for name, (which, inside, edge) in kinds.items():
        if which.any():
            x, y = places[which].T
            label = f"{name} ({which.sum()})"
            axes.plot(x, y, "o", markersize=8, markerfacecolor=inside, color=edge, markeredgewidth=1.8, label=label)
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


def draw_plane(axes: Axes, found: PCA, color: str) -> None:
    """Trials as lines; states without times as dots."""
    style = "." if found.scores.shape[0] == 1 else "-"
    for path in _in_plane(found.scores)[:SHOWN_TRIALS]:
        axes.plot(*path.T, style, color=color, linewidth=0.7, alpha=0.5, markersize=3)
    axes.set(xlabel="PC 1", ylabel="PC 2" if found.scores.shape[2] > 1 else "")


def _in_plane(scores: np.ndarray) -> np.ndarray:
    """[..., 2], with zeros where there is but one component."""
    flat = np.concatenate([scores, np.zeros_like(scores)], -1)
    return scores[..., :2] if scores.shape[-1] > 1 else flat
