"""What will be learnt: the sentences, the table and the charts that stand first on the page of an analysis."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn.report._charts import (
    DIVERGING,
    MOST_NUMBERS,
    Chart,
    Choice,
    evenly,
    figure,
    heat_map,
    line,
    numbers,
    plain,
    views,
)
from kpflow_dyn.report._numbers import short
from kpflow_dyn.report._page import Table

if TYPE_CHECKING:
    import xarray as xr

LOSSES = {"squared_error": "squared error", "cross_entropy": "cross-entropy", "own": "loss of your own"}
NOTE = (
    "tau = learning rate x steps, of plain gradient descent on all trials, all parts trained together, with the kernel "
    "(the NTK) as it is now. Training changes the kernel: trust the order more than the times. kp.forecast says how "
    "long they hold. Never: the loss of the part stays above, whatever the time. > 500: later than tau = 500, up to "
    "which it was followed.",
    "Out of reach: the share of the error in directions with eigenvalues below 1e-6 of the largest, which this kernel "
    "moves very slowly, if at all. Times count them with their own rates.",
    "What stands in the way. K: the parameters write less along what a part needs than along a typical direction. "
    "P: what is written is forgotten sooner than other changes, or explodes. C: the readout hardly reads it.",
)
OF_CLASSES = (
    "The loss of a class is that at the times where it is the right one; classes are numbered from 0. The loss of an "
    "error PC is the loss at each time, multiplied by the share of its error along that component. Errors are measured "
    "in the curvature of the loss. A cross-entropy may fall by more than what is within reach of them."
)
OF_OPTIMIZER = (
    "Steps of {0}: training by {0} itself from a fresh start, on all trials at each step. In the table half and tenth "
    "are for good: the step from which on the loss stays that low, as losses often rise again at first. At the top is "
    "the first step at which it is that low."
)
OTHERS = (
    "Adam and other optimisers take other times. For theirs, give --optimizer adam --lr 1e-3 (in Python "
    'optimizer="adam", lr=1e-3), with the learning rate that you train with.'
)


def has_learning(dataset: xr.Dataset) -> bool:
    """Whether the analysis had a task with targets, and a readout."""
    return "part_half" in dataset


def learning_lead(dataset: xr.Dataset) -> tuple[str, ...]:
    """How the network does now, and what will be learnt first."""
    if not has_learning(dataset):
        return ()
    now = f"The loss is {float(dataset.loss):.3g} ({LOSSES[dataset.attrs['loss']]})"
    now += f", the accuracy {float(dataset.accuracy):.1%}" if "accuracy" in dataset else ""
    if not _has_optimizer(dataset):
        return (f"{now}. {_order(dataset)}", OTHERS)
    return (f"{now}. {_by_optimizer(dataset)}", _order(dataset))


def learning_table(dataset: xr.Dataset) -> Table:
    """A row for the whole loss and for each part of it, and the charts."""
    of_classes = "accuracy" in dataset
    header = ("Part", "Share of the loss", *(("Accuracy",) if of_classes else ()))
    if _has_optimizer(dataset):
        header += (
            f"Half for good, steps of {_name(dataset)}",
            f"Tenth for good, steps of {_name(dataset)}",
            "Half at tau",
        )
    else:
        header += ("Half at tau", "Tenth at tau")
    header += ("Out of reach", "What stands in the way")
    rows = [_row(dataset.isel(part=i), of_classes) for i in range(dataset.sizes["part"])]
    note = (*NOTE, *((OF_CLASSES,) if of_classes else ()))
    note += (OF_OPTIMIZER.format(dataset.attrs["optimizer"]),) if _has_optimizer(dataset) else ()
    return Table("What will be learnt", header, rows, "\n".join(note), [_predicted(dataset), _reach(dataset)])


def as_records(dataset: xr.Dataset) -> list[dict[str, Any]]:
    """The parts as plain values, for JSON: a text where a number is infinite, None where it is not known."""
    names = (
        ("loss", "share", "accuracy", "half", "tenth", "unreached", "rate", "words") if has_learning(dataset) else ()
    )
    columns = {name: dataset[f"part_{name}"].values.tolist() for name in names}
    rows = [{"part": str(part)} for part in dataset.part.values] if has_learning(dataset) else []
    return [row | {name: _plain(column[i]) for name, column in columns.items()} for i, row in enumerate(rows)]


def steps_as_records(dataset: xr.Dataset) -> dict[str, Any]:
    """When the whole loss is at some fractions by the optimiser, for JSON; nothing where there is none."""
    if not _has_optimizer(dataset):
        return {}
    names = ("steps", "earliest", "latest")
    columns = {name: [_plain(value) for value in dataset[f"optimizer_{name}"].values.tolist()] for name in names}
    said = {"optimizer": dataset.attrs["optimizer"], "road": dataset.attrs["optimizer_road"]}
    return said | {"fraction": dataset.fraction.values.tolist()} | columns


def _has_optimizer(dataset: xr.Dataset) -> bool:
    return "optimizer_steps" in dataset


def _name(dataset: xr.Dataset) -> str:
    """Of the optimiser."""
    return dataset.attrs["optimizer"].partition(" ")[0]


def _plain(value: Any) -> Any:
    if isinstance(value, str) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _by_optimizer(dataset: xr.Dataset) -> str:
    """When training by the optimiser comes to fractions of the whole loss and to halves of parts, and by which road."""
    known = np.isfinite(dataset.optimizer_steps.values)
    words = [_steps_to(dataset.isel(fraction=i), dataset) for i in np.flatnonzero(known)]
    late = [f"{float(fraction):.0%}" for fraction in dataset.fraction.values[~known]]
    words += [f"{' and '.join(late)} not within {int(dataset.step[-1])} steps"] if late else []
    ranked = _ranked(dataset, dataset.optimizer_half.values)
    parts = f"; the steps from which its parts stay below their halves: {ranked}" if ranked else ""
    optimizer, road = dataset.attrs["optimizer"], dataset.attrs["optimizer_road"]
    return f"Training by {optimizer} first brings it to {', '.join(words)}{parts}. Found {road}."


def _steps_to(one: xr.Dataset, dataset: xr.Dataset) -> str:
    steps, low, high = (float(one[f"optimizer_{name}"]) for name in ("steps", "earliest", "latest"))
    return (
        f"{float(one.fraction):.0%} after {steps:.3g} steps ({low:.3g} to {high:.3g}{_for_good(one, steps, dataset)})"
    )


def _for_good(one: xr.Dataset, steps: float, dataset: xr.Dataset) -> str:
    """Where the whole loss rises above this fraction again: when it is below for good; known of a half and a tenth."""
    name = {0.5: "half", 0.1: "tenth"}.get(float(one.fraction))
    stays = math.nan if name is None else float(dataset[f"optimizer_{name}"][0])
    if name is None or stays <= 1.05 * steps + 1:
        return ""
    return f"; for good {'not' if math.isnan(stays) else f'after {stays:.3g},'} within {int(dataset.step[-1])}"


def _order(dataset: xr.Dataset) -> str:
    whole = f"Gradient descent under the kernel as it is now {_halved(float(dataset.part_half[0]), _followed(dataset))}"
    ranked = _ranked(dataset, dataset.part_half.values)
    return f"{whole} Its parts are halved in this order: {ranked}." if ranked else whole


def _ranked(dataset: xr.Dataset, half: np.ndarray) -> str:
    """Outputs or classes in the order of their halves; "" where there are no two."""
    named = [i for i in range(1, len(half)) if not str(dataset.part.values[i]).startswith("error PC")]
    known = sorted((i for i in named if not math.isnan(half[i])), key=lambda i: half[i])
    each = [f"{dataset.part.values[i]} ({_time(half[i], math.nan)})" for i in known]
    return ", ".join(each) if len(each) > 1 else ""


def _halved(tau: float, followed: float) -> str:
    if math.isinf(tau):
        return "leaves the loss above its half for ever; training changes the kernel, and may halve it nevertheless."
    when = f"at tau = {short(tau)}" if math.isfinite(tau) else f"later than tau = {short(followed)}"
    sooner = "; training changes the kernel, which often makes it far sooner."
    return f"would halve the loss {when} (tau = learning rate x steps){sooner}"


def _followed(dataset: xr.Dataset) -> float:
    """tau up to which the losses under the kernel as it is were followed; NaN in datasets of earlier versions."""
    return float(dataset.attrs.get("followed", math.nan))


def _row(one: xr.Dataset, of_classes: bool) -> tuple[str, ...]:
    accuracy = float(one.part_accuracy)
    shown = (("" if math.isnan(accuracy) else f"{accuracy:.1%}"),) if of_classes else ()
    times = tuple(_time(float(one[f"part_{name}"]), _followed(one)) for name in ("half", "tenth"))
    if _has_optimizer(one):
        times = tuple(_step(float(one[f"optimizer_{name}"]), one) for name in ("half", "tenth")) + times[:1]
    unreached = float(one.part_unreached)
    out = "?" if math.isnan(unreached) else f"{unreached:.1%}"
    return (
        str(one.part.values),
        f"{float(one.part_share):.1%}",
        *shown,
        *times,
        out,
        str(one.part_words.values) or "-",
    )


def _step(steps: float, one: xr.Dataset) -> str:
    return f"> {int(one.step[-1])}" if math.isnan(steps) else short(steps)


def _time(tau: float, followed: float) -> str:
    if math.isnan(tau):
        return "?" if math.isnan(followed) else f"> {short(followed)}"
    return "never" if math.isinf(tau) else short(tau)


@dataclass(frozen=True)
class Road:
    """One way to train, as the chart of predicted losses shows it."""

    name: str
    variable: str  # of the curves; those of the halves end in "half"
    time: str  # the coordinate
    label: str


HIGHEST = 2.0  # of what is shown at first, as some optimisers overshoot by far
KERNEL = Road("gradient descent, kernel as it is", "part", "tau", "tau = learning rate x steps")


def _predicted(dataset: xr.Dataset) -> Chart:
    roads, training = [KERNEL], ""
    if _has_optimizer(dataset):
        roads.insert(0, Road(dataset.attrs["optimizer"], "optimizer", "step", f"Step of {_name(dataset)}"))
        training = f", or in training by {roads[0].name}"

    def view(road: Road, of_whole: bool) -> Any:
        heights = dataset.part_share.values if of_whole else np.ones(dataset.sizes["part"])
        time, curves = dataset[road.time].values, dataset[f"{road.variable}_curve"].values * heights[:, None]
        traces = [
            line(time, curves[i], str(dataset.part.values[i]), i, hovertemplate=f"{road.time} %{{x:.3g}}: %{{y:.3g}}")
            for i in _shown(dataset)
        ]
        traces += [_half(dataset, i, road, 0.5 * heights[i]) for i in _shown(dataset)]
        label = "Loss of the part / whole loss now" if of_whole else "Loss of the part / now"
        scale = {"type": "log", "exponentformat": "power"} if road is KERNEL else {}
        axes = {"xaxis": {"title": {"text": plain(road.label)}} | scale}
        highest = min(HIGHEST, 1.05 * float(np.nanmax(curves)))
        return figure(traces, **axes, yaxis={"title": {"text": label}, "range": [0, highest]})

    choices = (Choice("Trained by", tuple(road.name for road in roads)),) if len(roads) > 1 else ()
    choices += (Choice("Loss", ("relative to the part's loss now", "relative to the whole loss now")),)
    drawn = views(view, roads, (False, True))
    said = views(lambda road, _: _order(dataset) if road is KERNEL else _by_optimizer(dataset), roads, (False, True))
    return Chart(
        "predicted_loss",
        "What will be learnt, and when",
        f"The predicted loss under the kernel as it is now{training}: of everything, of each output (or class), and of "
        "principal components (PC) of the error. A dot: half is learnt. A curve that stays high is out of the kernel's "
        "reach or needs slow directions; one that rises is disturbed by the learning of other parts.",
        drawn if len(roads) > 1 else {key[1:]: one for key, one in drawn.items()},
        choices,
        finding=said if len(roads) > 1 else _order(dataset),
    )


def _half(dataset: xr.Dataset, part: int, road: Road, height: float) -> Any:
    half, time = float(dataset[f"{road.variable}_half"][part]), dataset[road.time].values
    inside = math.isfinite(half) and time[0] <= half <= time[-1]
    name = f"half of {dataset.part.values[part]}"
    x, y = ([half], [height]) if inside else ([], [])
    hover = f"half at {road.time} %{{x:.3g}}"
    return line(x, y, name, part, mode="markers", marker={"size": 9}, showlegend=False, hovertemplate=hover)


def _shown(dataset: xr.Dataset) -> list[int]:
    """The whole and the largest parts, in their order: a colour for each."""
    share = dataset.part_share.values
    largest = sorted(range(1, len(share)), key=lambda i: -share[i])[:7]
    return [0, *sorted(largest)]


def _reach(dataset: xr.Dataset) -> Chart:
    parts, (trials, times) = dataset.sizes["part"], (dataset.sizes["trial"], dataset.sizes["time"])
    labels = [str(name) for name in dataset.coords if str(name).startswith("label_")]
    sortable = [name for name in labels if dataset[name].dtype.kind in "biuf"]
    order = np.argsort(dataset[sortable[0]].values, kind="stable") if sortable else np.arange(trials)
    order = order[evenly(trials, MOST_NUMBERS // (2 * parts * times))]
    by = f", sorted by {sortable[0].removeprefix('label_').replace('_', ' ')}" if sortable else ""
    time, units = numbers(dataset.time.values), dataset.time.attrs.get("units")
    when = {"title": {"text": f"Time ({units})" if units else "Time"}}

    shown = "map", "times", "trials"

    def view(part: int, how: str) -> Any:
        z = dataset.part_reach.values[part]
        if how == "map":
            hover = "time %{x}<br>trial %{y}: %{z:.3g}<extra></extra>"
            rows = [str(i) for i in order]
            trial = {"title": {"text": f"Trial{by}"}, "type": "category", "nticks": 12, "autorange": "reversed"}
            return figure(
                [heat_map(z[order], time, rows, DIVERGING, hover, "Speed along the error")], xaxis=when, yaxis=trial
            )
        over_trials = how == "times"
        x, sums = (time, np.nansum(z, 0)) if over_trials else (np.arange(trials), np.nansum(z, 1))
        style = {} if over_trials else {"mode": "markers"}
        axis = when if over_trials else {"title": {"text": "Trial"}}
        return figure(
            [line(x, sums, "sum", 0, **style)], xaxis=axis, yaxis={"title": {"text": "Speed along the error"}}
        )

    return Chart(
        "reach",
        "Where the kernel reaches",
        "How fast one step of gradient descent on a part moves the outputs along its error e, at each trial and time, "
        "over the learning rate and |e|²: the sum is <e, NTK e> / |e|². Pale: hardly anything is learnt there. "
        "Negative: the step makes the error larger there.",
        views(view, range(parts), shown),
        (
            Choice("Part", tuple(str(name) for name in dataset.part.values)),
            Choice("Show", ("trials and times", "sum over trials", "sum over times")),
        ),
        finding=views(lambda part, _: _fastest(dataset, part), range(parts), shown),
    )


def _fastest(dataset: xr.Dataset, part: int) -> str:
    """Where a part is learnt fastest, and how much is undone elsewhere."""
    speed, units = dataset.part_reach.values[part], dataset.time.attrs.get("units", "")
    if not np.isfinite(speed).any():
        return f"How fast a step on {dataset.part.values[part]} is, is not known: it has no error."
    trial, time = np.unravel_index(np.nanargmax(speed), speed.shape)
    better, worse = (np.nansum(side(speed, 0)) for side in (np.maximum, np.minimum))
    when = f"{float(dataset.time[time]):.4g} {units}".strip()
    fastest = f"fastest at time {when} of trial {trial} ({short(speed[trial, time])})"
    return (
        f"A step on {dataset.part.values[part]} is {fastest}. "
        f"Over all trials and times the speeds add up to {short(better + worse)}: {short(better)} where the error "
        f"shrinks and {short(worse)} where it grows."
    )
