"""What stands on the page of a comparison: two models side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._flows.places import said_in
from kpflow_dyn._learning.comparison import on_one_mode, on_units
from kpflow_dyn._shown import with_error
from kpflow_dyn.report._charts import Chart, figure, line, numbers, plain, with_bars
from kpflow_dyn.report._numbers import percent, settings, short, versions
from kpflow_dyn.report._page import Page, Table

if TYPE_CHECKING:
    import xarray as xr

RIGHT_ANGLE, HALF = 90.0, 45.0
ERRORS = "± is one standard error; without it a number is exact in the digits shown."
LOG = {"type": "log", "exponentformat": "power"}
OPERATORS = {
    "NTK": "how one step of gradient descent moves the whole trajectory",
    "K": "what the parameters change directly, in each step by itself",
    "P": "how the dynamics pass a change on to later states",
}


def page_of_comparison(dataset: xr.Dataset) -> Page:
    """The page of what `Comparison.to_xarray` gives."""
    return Page(
        title=dataset.attrs.get("title", " and ".join(_names(dataset))),
        lead=tuple(_lead(dataset)),
        warnings=tuple(dataset.attrs.get("warnings", "").splitlines()),
        charts=[_ranks(dataset), _angles(dataset), _eigenvalues(dataset)],
        tables=[_side_by_side(dataset), _alike(dataset)],
        settings=settings(dataset),
        versions=versions(dataset),
    )


def _names(dataset: xr.Dataset) -> list[str]:
    return [str(name) for name in dataset.model.values]


def _lead(dataset: xr.Dataset) -> list[str]:
    a, b = _names(dataset)
    aligned = float(dataset.alignment.sel(operator="NTK"))
    under = ", as the loss trains them," if "loss" in dataset else ""
    lead = [
        f"The kernels of {a} and {b}{under} have an alignment of {short(aligned, 2)}: 1 would be the same kernel up to "
        "a factor, 0 kernels that have nothing in common."
    ]
    one_mode = on_one_mode(dataset.effective_rank.sel(operator="NTK").values.tolist())
    lead[0] += f" {one_mode}" if one_mode else ""
    if "loss" in dataset:
        first, second = (_now(dataset.sel(model=name)) for name in (a, b))
        lead.append(f"The loss of {a} is {first}, that of {b} {second}.")
    if np.isfinite(step := float(dataset.step_cosine)):
        lead.append(
            "The next small step of gradient descent would move the outputs of the two in directions with a cosine of "
            f"{step:.2f} (1: both the same way; below 0: against each other)."
        )
    return [*lead, *(f"{one}." for one in said_in(dataset.attrs))]


def _now(one: xr.Dataset) -> str:
    return short(float(one.loss)) + (f" (accuracy {percent(float(one.accuracy))})" if "accuracy" in one else "")


def _side_by_side(dataset: xr.Dataset) -> Table:
    now = {"loss": ("Loss", "on these trials"), "accuracy": ("Accuracy", "the share whose largest output is right")}
    rows = [
        (label, *(short(float(one), 4) for one in dataset[name].values), meaning)
        for name, (label, meaning) in now.items()
        if name in dataset
    ]
    rows += [
        (f"Effective rank of {name}", *_rank_texts(dataset, name), f"of {meaning}")
        for name, meaning in _operators(dataset).items()
    ]
    rows += [(name.capitalize(), *pair, "") for name, pair in _texts(dataset).items()]
    note = f"An effective rank says in how many directions most lies: (sum)² / sum of squares of eigenvalues. {ERRORS}"
    return Table("The two networks", ("", *_names(dataset), "What it is"), rows, note)


def _operators(dataset: xr.Dataset) -> dict[str, str]:
    """What the operators are, by name: under a loss the NTK is that of the outputs, K and P are those of the states."""
    under = {"NTK": "the outputs under the loss: how one step of gradient descent on the loss moves them"}
    if "loss" in dataset:
        under |= {name: f"the states: {OPERATORS[name]}" for name in ("K", "P")}
    return {name: under[name] if "loss" in dataset else OPERATORS[name] for name in map(str, dataset.operator.values)}


def _texts(dataset: xr.Dataset) -> dict[str, list[str]]:
    """What is said of each of the two, by subject, as far as the dataset says."""
    texts = {name: [str(text) for text in dataset[name].values] for name in ("file", "network") if name in dataset}
    found = [json.loads(str(text)) for text in dataset.found.values] if "found" in dataset else [{}, {}]
    for subject in {**found[0], **found[1]}:
        texts["kind of file" if subject == "file" else subject] = [each.get(subject, "") for each in found]
    return texts


def _rank_texts(dataset: xr.Dataset, operator: str) -> list[str]:
    one = dataset.sel(operator=operator)
    pairs = zip(one.effective_rank.values, one.effective_rank_stderr.values, strict=True)
    return [with_error(float(value), float(stderr), most=4) for value, stderr in pairs]


def _alike(dataset: xr.Dataset) -> Table:
    rows = [
        (f"Alignment of {name}", _alignment(dataset, name), f"of {meaning}")
        for name, meaning in _operators(dataset).items()
        if np.isfinite(float(dataset.alignment.sel(operator=name)))
    ]
    if np.isfinite(step := float(dataset.step_cosine)):
        rows.append(("Cosine of the next steps", f"{step:.3f}", "where the next small step moves the outputs of each"))
    angles = np.degrees(dataset.principal_angle.values)
    shown = ", ".join("-" if np.isnan(angle) else f"{angle:.0f}" for angle in angles)
    rows.append(("Principal angles, in degrees", shown, f"between the spans of the {angles.size} leading modes"))
    note = f"The alignment of A and B is tr(A* B) / (|A| |B|). {ERRORS}"
    if np.isfinite(float(dataset.alignment.sel(operator="K"))):
        note += f"\n{on_units('loss' in dataset)}"
    return Table("How alike they are", ("Number", "Value", "Of what"), rows, note)


def _alignment(dataset: xr.Dataset, operator: str) -> str:
    one = dataset.sel(operator=operator)
    return with_error(float(one.alignment), float(one.alignment_stderr), most=4)


def _ranks(dataset: xr.Dataset) -> Chart:
    operators = [str(name) for name in dataset.operator.values]
    traces = [
        line(
            operators, dataset.effective_rank.sel(model=name).values, name, i, mode="markers",
            marker={"size": 10, "symbol": ("circle", "square")[i]},
            error_y=with_bars(dataset.effective_rank_stderr.sel(model=name).values),
        )
        for i, name in enumerate(_names(dataset))
    ]  # fmt: skip
    axes = {"xaxis": {"type": "category", "title": {"text": "Operator"}}, "yaxis": _y("Effective rank") | LOG}
    text = "In how many directions most of each operator lies, with bars of two standard errors."
    ranks = dataset.effective_rank.sel(operator="NTK").values
    a, b = _names(dataset)
    ntk = "NTK of the outputs, under the loss," if "loss" in dataset else "NTK"
    finding = f"Most of the {ntk} lies in {short(ranks[0])} directions in {a}, and in {short(ranks[1])} in {b}."
    return Chart("ranks", "Effective ranks side by side", text, {(): figure(traces, **axes)}, finding=finding)


def _angles(dataset: xr.Dataset) -> Chart:
    import plotly.graph_objects as go

    angles = np.degrees(dataset.principal_angle.values)
    bars = go.Bar(
        x=dataset.mode.values, y=numbers(angles), name="angle", meta={"color": 0}, hovertemplate="%{x}: %{y:.1f}°",
        showlegend=False,
    )  # fmt: skip
    axes = {"xaxis": {"title": {"text": "Principal angle"}, "dtick": 1}, "yaxis": _y("Degrees")}
    axes["yaxis"] |= {"range": [0, RIGHT_ANGLE], "dtick": 30}
    text = (
        "Between the spans of the leading modes of the two: 0 degrees for a direction that both can learn in, 90 for "
        "one that only one of them has."
    )
    near = f"{(angles < HALF).sum()} of {angles.size} angles are below 45 degrees."
    return Chart("angles", "Angles of the leading modes", text, {(): figure([bars], **axes)}, height=320, finding=near)


def _eigenvalues(dataset: xr.Dataset) -> Chart:
    what = "Rate under the loss" if "loss" in dataset else "Eigenvalue of the NTK"
    traces = [
        line(
            dataset.mode.values, dataset.eigenvalues.sel(model=name).values, name, i, mode="lines+markers",
            marker={"size": 8, "symbol": ("circle", "square")[i]},
        )
        for i, name in enumerate(_names(dataset))
    ]  # fmt: skip
    axes = {"xaxis": {"title": {"text": "Rank of the eigenvalue"}, "dtick": 1}}
    axes["yaxis"] = _y(what) | LOG
    text = "The leading eigenvalues of both: how fast gradient descent moves each along its own leading modes."
    first, second = (short(value) for value in dataset.eigenvalues.isel(mode=0).values)
    a, b = _names(dataset)
    finding = f"The largest is {first} in {a}, and {second} in {b}."
    return Chart("eigenvalues", what, text, {(): figure(traces, **axes)}, finding=finding)


def _y(title: str) -> dict[str, Any]:
    return {"title": {"text": plain(title)}}
