"""What will be learnt: the sentences, the table and the charts that stand first on the page of an analysis."""

from __future__ import annotations

import math
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
    views,
)
from kpflow_dyn.report._page import Table

if TYPE_CHECKING:
    import xarray as xr

LOSSES = {"squared_error": "squared error", "cross_entropy": "cross-entropy", "own": "loss of your own"}
NOTE = (
    "Times are tau = learning rate x steps of plain gradient descent on all trials, under the kernel as it is, when "
    "all parts are trained together. Training changes the kernel: trust the order more than the times; kp.forecast "
    "says how long they hold. Out of reach is what this kernel does not move at all. K stands in the way where the "
    "parameters write less along what a part needs than along a typical direction; P where what is written is "
    "forgotten, beside kicks that last, or explodes; C where the readout does not read it."
)
OF_CLASSES = (
    " Of a cross-entropy these are times of the parabola with the value and slope of the loss at each trial and time."
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
    return (f"{now}. {_order(dataset)}",)


def learning_table(dataset: xr.Dataset) -> Table:
    """A row for the whole loss and for each part of it, and the charts."""
    of_classes = "accuracy" in dataset
    header = ("Part", "Share of the loss", *(("Accuracy",) if of_classes else ()))
    header += ("Half at tau", "Tenth at tau", "Out of reach", "What stands in the way")
    rows = [_row(dataset.isel(part=i), of_classes) for i in range(dataset.sizes["part"])]
    note = NOTE + (OF_CLASSES if of_classes else "")
    return Table("What will be learnt", header, rows, note, [_predicted(dataset), _reach(dataset)])


def as_records(dataset: xr.Dataset) -> list[dict[str, Any]]:
    """The parts as plain values, for JSON: a text where a number is not finite."""
    names = (
        ("loss", "share", "accuracy", "half", "tenth", "unreached", "rate", "words") if has_learning(dataset) else ()
    )
    columns = {name: dataset[f"part_{name}"].values.tolist() for name in names}
    rows = [{"part": str(part)} for part in dataset.part.values] if has_learning(dataset) else []
    return [row | {name: _plain(column[i]) for name, column in columns.items()} for i, row in enumerate(rows)]


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) or math.isfinite(value) else str(value)


def _order(dataset: xr.Dataset) -> str:
    whole = f"Gradient descent under the kernel as it is would halve it {_at(float(dataset.part_half[0]))}"
    named = [i for i in range(1, dataset.sizes["part"]) if not str(dataset.part.values[i]).startswith("error PC")]
    half = dataset.part_half.values
    known = sorted((i for i in named if not math.isnan(half[i])), key=lambda i: half[i])
    if len(known) < 2:
        return f"{whole}."
    each = [f"{dataset.part.values[i]} ({'never' if math.isinf(half[i]) else f'{half[i]:.3g}'})" for i in known]
    return f"{whole}; by parts, in the order of their halves: {', '.join(each)}."


def _at(tau: float) -> str:
    if math.isnan(tau):
        return "at a time that was not found"
    return "never" if math.isinf(tau) else f"at tau = {tau:.3g} (tau = learning rate x steps)"


def _row(one: xr.Dataset, of_classes: bool) -> tuple[str, ...]:
    accuracy = float(one.part_accuracy)
    shown = (("" if math.isnan(accuracy) else f"{accuracy:.1%}"),) if of_classes else ()
    times = tuple(_time(float(one[f"part_{name}"])) for name in ("half", "tenth"))
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


def _time(tau: float) -> str:
    if math.isnan(tau):
        return "?"
    return "never" if math.isinf(tau) else f"{tau:.3g}"


def _predicted(dataset: xr.Dataset) -> Chart:
    tau, names = dataset.tau.values, dataset.part.values
    losses = {
        "relative": dataset.part_curve.values,
        "of_whole": dataset.part_curve.values * dataset.part_share.values[:, None],
    }

    def view(kind: str) -> Any:
        traces = [
            line(tau, losses[kind][i], str(names[i]), i, hovertemplate="tau %{x:.3g}: %{y:.3g}")
            for i in _shown(dataset)
        ]
        traces += [_half(dataset, i, kind) for i in _shown(dataset)]
        label = "Loss of the part / now" if kind == "relative" else "Loss of the part / whole loss now"
        axes = {"xaxis": {"type": "log", "title": {"text": "tau = learning rate x steps"}, "exponentformat": "power"}}
        return figure(traces, **axes, yaxis={"title": {"text": label}, "rangemode": "tozero"})

    return Chart(
        "predicted_loss",
        "What will be learnt, and when",
        "The loss under the kernel as it is now, of the whole and of its parts: outputs (or classes) by name, and "
        "principal components (PC) of the error. A dot stands where half is learnt. A curve that stays high is out of "
        "the kernel's reach, or waits for slow directions; one that rises is undone by other parts.",
        views(view, losses),
        (Choice("Loss", ("over the part's own now", "over the whole loss now")),),
    )


def _half(dataset: xr.Dataset, part: int, kind: str) -> Any:
    half = float(dataset.part_half[part])
    inside = math.isfinite(half) and dataset.tau.values[0] <= half <= dataset.tau.values[-1]
    height = 0.5 * (1 if kind == "relative" else float(dataset.part_share[part]))
    name = f"half of {dataset.part.values[part]}"
    marker = {"size": 9}
    x, y = ([half], [height]) if inside else ([], [])
    return line(x, y, name, part, mode="markers", marker=marker, showlegend=False, hovertemplate="half at tau %{x:.3g}")


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
        "How fast one step of gradient descent on a part moves the outputs along its error, at each trial and time, "
        "per learning rate and |e|²: the sum is <e, NTK e> / |e|². Where it is pale, nothing is learnt there; where it "
        "is negative, the step makes it worse.",
        views(view, range(parts), ("map", "times", "trials")),
        (
            Choice("Part", tuple(str(name) for name in dataset.part.values)),
            Choice("Show", ("trials and times", "sum over trials", "sum over times")),
        ),
    )
