"""Figures of linear systems and what follows from them, in the style of `kpflow_dyn.figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from kpflow_dyn.figures._style import muted, new_figure, new_grid, series, styled

if TYPE_CHECKING:
    from kpflow_dyn.control._angles import ReachableAngles
    from kpflow_dyn.control._costates import Costates
    from kpflow_dyn.control._frequency import FrequencyResponse
    from kpflow_dyn.control._gramians import Gramian
    from kpflow_dyn.control._hankel_modes import Hankel
    from kpflow_dyn.control._regulators import TimeVaryingRegulator
    from kpflow_dyn.control._systems import LTI, LTV
    from kpflow_dyn.gym import Episodes

SHOWN = 4  # lines of one kind
LINES = ("-", "--", ":", "-.")  # of lines that share a colour


@styled
def poles(system: LTI) -> Figure:
    """Poles in the complex plane, beside the imaginary axis or the unit circle."""
    figure, axes = new_figure(4.2)
    if system.dt is None:
        axes.axvline(0, color=muted(), linewidth=0.8)
    else:
        axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor=muted(), linewidth=0.8))
        axes.set_aspect("equal", adjustable="datalim")
    axes.plot(system.poles.real, system.poles.imag, "x", color=series()[0], markersize=8, markeredgewidth=2)
    axes.set(xlabel="Real part of the pole", ylabel="Imaginary part")
    return figure


@styled
def growth(system: LTV) -> Figure:
    """The leading pole of A over time, in each trial."""
    figure, axes = new_figure(3.6)
    values = np.linalg.eigvals(system.A.values)
    leading = (abs(values) if system.dt is not None else values.real).max(-1)
    axes.axhline(float(system.dt is not None), color=muted(), linewidth=0.8)
    axes.plot(system.time, leading.T, color=series()[0], alpha=0.6, linewidth=1)
    axes.set(xlabel="Time", ylabel="Largest size of a pole" if system.dt is not None else "Largest real part of a pole")
    return figure


@styled
def gramian(found: Gramian) -> Figure:
    """Eigenvalues over time, those of all trials in one colour by their rank; or against their rank."""
    figure, axes = new_figure(3.6)
    values = found.eigenvalues.where(found.eigenvalues > 0)  # the axis is logarithmic
    label = "Reachability" if found.kind[0] == "c" else "Observability"
    axes.set(yscale="log", ylabel=f"{label} eigenvalue")
    if "time" not in values.dims:
        axes.plot(1 + np.arange(values.size), values, "o-", markersize=5)
        axes.set(xlabel="Rank of the eigenvalue", xticks=1 + np.arange(values.size))
        return figure
    for mode in range(min(SHOWN, values.sizes["mode"])):
        _trials(axes, values.isel(mode=mode), series()[mode], str(mode + 1))
    axes.legend(title="Rank")
    axes.set(xlabel="Time")
    return figure


@styled
def hankel(found: Hankel) -> Figure:
    """Hankel singular values of all trials; the leading mode of the first one, past input and future output."""
    figure, (values, modes) = new_figure(5.0, rows=2)
    ranks = 1 + np.arange(found.values.sizes["mode"])
    values.plot(ranks, found.values.values.T, "o-", color=series()[0], markersize=4, alpha=0.6)
    values.set(xlabel="Rank", ylabel="Hankel singular value", yscale="log", xticks=ranks)
    first = {"trial": 0, "mode": 0}
    _each(modes, found.inputs.isel(first), "input", "past input")
    _each(modes, found.outputs.isel(first), "output", "future output")
    modes.axvline(found.split, color=muted(), linewidth=0.8)
    modes.legend(fontsize="small")
    modes.set(xlabel="Time", ylabel="Leading mode")
    return figure


@styled
def costates(found: Costates) -> Figure:
    """The costates of the first trial by unit, and the norm of the gradient in the input of all trials."""
    figure, (first, gradient) = new_figure(5.0, rows=2)
    _units(first, found.costate.isel(trial=0), "unit")
    first.set(ylabel="Costate of the first trial")
    _trials(gradient, (found.gradient**2).sum("input") ** 0.5, series()[0], None)
    gradient.set(xlabel="Time", ylabel="Norm of dJ/du")
    return figure


@styled
def gains(found: TimeVaryingRegulator) -> Figure:
    """The gains of the first trial's first input by unit, and the norm of K of all trials."""
    figure, (first, norm) = new_figure(5.0, rows=2)
    _units(first, found.K.isel(trial=0, input=0), "unit")
    first.set(ylabel="Gain of the first input")
    _trials(norm, (found.K**2).sum(("input", "unit")) ** 0.5, series()[0], None)
    norm.set(xlabel="Time", ylabel="Norm of K")
    return figure


@styled
def bode(found: FrequencyResponse) -> Figure:
    """Magnitude and phase of each pair of an input and an output."""
    figure, (magnitude, phase) = new_figure(5.0, rows=2)
    omega, colors = found.response.omega.values, series()
    for output in range(found.response.sizes["output"]):
        for entry in range(found.response.sizes["input"]):
            pair = {"output": output, "input": entry}
            number = len(magnitude.lines)
            style = {"color": colors[number % len(colors)], "linestyle": LINES[number // len(colors) % len(LINES)]}
            magnitude.plot(omega, found.magnitude.isel(pair), label=f"{entry} to {output}", **style)
            phase.plot(omega, np.degrees(found.phase.isel(pair)), **style)
    magnitude.set(xscale="log", yscale="log", ylabel="Magnitude")
    phase.set(xscale="log", xlabel="Frequency (radians per unit of time)", ylabel="Phase (degrees)")
    handles, labels = magnitude.get_legend_handles_labels()
    figure.legend(handles, labels, title="Input to output", loc="outside lower center", ncols=4, fontsize="small")
    return figure


@styled
def angles(found: ReachableAngles) -> Figure:
    """Principal angles and shares over time, averaged over trials; or against their number."""
    figure, (angle, share) = new_figure(5.0, rows=2)
    degrees = found.angles * (180 / np.pi)
    for axes, values, name in ((angle, degrees, "angle"), (share, found.share, "mode")):
        mean = values.mean("trial") if "trial" in values.dims else values
        if "time" not in mean.dims:
            axes.plot(1 + np.arange(mean.size), mean, "o-", markersize=5)
            continue
        for number in range(min(SHOWN, mean.sizes[name])):
            axes.plot(mean.time, mean.isel({name: number}), color=series()[number], label=f"{name} {number + 1}")
        axes.legend()
    angle.set(ylabel="Principal angle (degrees)", ylim=(0, 92))
    share.set(xlabel="Time" if "time" in found.share.dims else "Mode", ylabel="Reachable share", ylim=(0, 1.05))
    return figure


@styled
def episodes(found: Episodes) -> Figure:
    """The states over time, a panel for each and a line for each episode."""
    names = found.states.state.values
    figure, panels = new_figure(1.3 * len(names), rows=len(names))
    for panel, name in zip(panels, names, strict=True):
        panel.plot(found.states.time, found.states.sel(state=name).T, color=series()[0], alpha=0.4, linewidth=1)
        panel.set(ylabel=str(name).replace("_", " "))
        panel.label_outer()
    panels[-1].set(xlabel="Time (s)")
    return figure


def _each(axes: Axes, values: xr.DataArray, axis: str, label: str) -> None:
    """A line for each input or output over time, in a colour of the kind and a style of its own."""
    color = series()[int(axis == "output")]
    for number in range(values.sizes[axis]):
        name = values[axis].values[number] if axis in values.coords else number
        told = label if values.sizes[axis] == 1 else f"{label} {name}"
        axes.plot(values.time, values.isel({axis: number}), LINES[number % len(LINES)], color=color, label=told)


def _trials(axes: Axes, values: xr.DataArray, color: str, label: str | None) -> None:
    """One thin line for each trial [trial, time]."""
    lines = axes.plot(values.time, values.transpose("time", "trial"), color=color, alpha=0.6, linewidth=1)
    lines[0].set_label(label or "")


def _units(axes: Axes, values: xr.DataArray, axis: str) -> None:
    names = values[axis].values if axis in values.coords else np.arange(values.sizes[axis])
    for number in range(min(SHOWN, values.sizes[axis])):
        shown = values.isel({axis: number})
        axes.plot(values.time, shown, color=series()[number], label=str(names[number]).replace("_", " "))
    axes.legend()


@styled
def loop(data: xr.Dataset) -> Figure:
    """What a loop can learn, reach and tell over time, its cost, sensitivity and margins; a colour for each step."""
    figure, panels = new_grid(6, 2.8)
    steps = data.step.values.tolist() if "step" in data.dims else [None]
    runs = [(data if step is None else data.sel(step=step), step) for step in steps]
    _cost_to_go(panels[0], runs)
    _sensitivity(panels[1], data)
    _directions(panels[2], runs[-1][0])
    _shares(panels[3], runs)
    _margins(panels[4], runs)
    _excess(panels[5], runs[-1][0])
    return figure


def _cost_to_go(axes: Axes, runs: list) -> None:
    for (run, step), color in zip(runs, series() * len(runs), strict=False):
        mean = run.cost_to_go.mean("trial")
        axes.plot(run.time, mean.where(mean > 0), color=color, label=None if step is None else f"step {step}")
    axes.set(yscale="log", xlabel="Time", ylabel="Cost to go, mean of trials")
    if len(runs) > 1:
        axes.legend()


def _sensitivity(axes: Axes, data: xr.Dataset) -> None:
    """Of each parameter over time, or over steps of training."""
    over = "step" if "step" in data.dims else "time"
    found = data.gradient_norm if over == "step" else data.sensitivity
    colors, marker = series(), "." if over == "step" else ""
    for number, name in enumerate(data.parameter.values.tolist()):
        style = LINES[number // len(colors) % len(LINES)] + marker
        label, color = name.removeprefix("policy."), colors[number % len(colors)]
        axes.plot(data[over], found.sel(parameter=name), style, color=color, label=label)
    axes.set(ylabel="|gradient of the cost|" if over == "step" else "|gradient of the cost| per time", yscale="log")
    axes.set(xlabel="Step of training" if over == "step" else "Time")
    axes.legend(fontsize="small")


def _directions(axes: Axes, run: xr.Dataset) -> None:
    for name, color in zip(("learnable", "reachable", "observable"), series(), strict=False):
        values = run[name].mean("trial")
        for mode in range(min(SHOWN, values.sizes["mode"])):
            line = values.isel(mode=mode)
            label = name if mode == 0 else None
            axes.plot(run.time, line.where(line > 0), color=color, alpha=1 / (1 + mode), label=label)
    axes.set(yscale="log", xlabel="Time", ylabel="Eigenvalues, mean of trials")
    axes.legend()


def _shares(axes: Axes, runs: list) -> None:
    for (run, step), color in zip(runs, series() * len(runs), strict=False):
        for name, style in (("reachable", "-"), ("observable", ":")):
            label = name if step is None else f"step {step}, {name}"
            axes.plot(run.time, 100 * run[f"learnable_{name}"].mean("trial"), style, color=color, label=label)
    axes.set(xlabel="Time", ylabel="Learnable in leading directions (%)", ylim=(0, 105))
    axes.legend(fontsize="small")


def _margins(axes: Axes, runs: list) -> None:
    for (run, _), color in zip(runs, series() * len(runs), strict=False):
        along = run.disk_margin_along.mean("trial").dropna("time")
        axes.plot(along.time, along, "o-", color=color, markersize=4)
        axes.axhline(float(run.disk_margin), color=color, linestyle="--", linewidth=1)
    axes.set(xlabel="Time (dashed: at rest)", ylabel="Disk margin", ylim=(0, None))


def _excess(axes: Axes, run: xr.Dataset) -> None:
    """Of the last step: which modes carry what the policy costs more than the regulator."""
    if not run.excess.notnull().all():
        axes.set_axis_off()
        axes.text(0.5, 0.5, "No regulator to compare with,\nor an unstable loop", ha="center", va="center")
        return
    poles = run.excess_pole.values
    labels = [f"{p.real:.2g}" + (f"{p.imag:+.2g}i" if abs(p.imag) > 1e-9 * abs(p) else "") for p in poles]
    axes.bar(range(len(poles)), run.excess.values, color=series()[0])
    axes.set_xticks(range(len(poles)), labels, fontsize="small")
    axes.set(xlabel="Pole of the closed loop", ylabel="Cost beyond the regulator's")
