"""The charts of what `kp.track` returns: operators over training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn.report._charts import Chart, Choice, figure, line, views, with_bars
from kpflow_dyn.report._numbers import percent, short

if TYPE_CHECKING:
    import xarray as xr

TARGET = {
    "learnt": ("how much is learnt", "Learnt part of c", None, "How much of it is learnt"),
    "alignment": ("alignment with the kernel", "cos(c, NTK c)", None, "Its alignment with the kernel"),
    "rayleigh": ("speed of learning", "<c, NTK c> / <c, c>", "log", "How fast the kernel moves the outputs along it"),
}


def track_charts(dataset: xr.Dataset) -> list[Chart]:
    """All charts of a track, in the order of the page; those of the target where there is one."""
    drawn = {"loss": _loss, "accuracy": _accuracy, "component_share": _target}
    return [_ranks(dataset), _alignments(dataset), *(draw(dataset) for name, draw in drawn.items() if name in dataset)]


def _ranks(dataset: xr.Dataset) -> Chart:
    kinds = [str(kind) for kind in dataset.kind.values]
    return Chart(
        "ranks",
        "Effective ranks",
        "The participation ratio of K, P and the NTK at each checkpoint, in full or along one axis: about how many "
        "directions carry most of each. Bars are two standard errors.",
        views(lambda kind: _by_operator(dataset, "effective_rank", f"Effective {kind} rank", kind=kind), kinds),
        (Choice("Rank", tuple(kinds)),),
        finding=views(lambda kind: _rank_from_to(dataset, kind), kinds),
    )


def _rank_from_to(dataset: xr.Dataset, kind: str) -> str:
    rank = dataset.effective_rank.sel(operator="NTK", kind=kind)
    return _from_to(dataset, f"NTK: the {kind} effective rank", rank)


def _from_to(dataset: xr.Dataset, what: str, values: xr.DataArray) -> str:
    first, last = (short(float(values.isel(step=end))) for end in (0, -1))
    steps = dataset.step.values
    return f"{what} goes from {first} at step {steps[0]} to {last} at step {steps[-1]}."


def _alignments(dataset: xr.Dataset) -> Chart:
    return Chart(
        "alignments",
        "How far the operators turn",
        "The alignment of each operator with that of the first or of the last checkpoint: 1 where learning keeps its "
        "directions (lazy), small where it makes new ones (feature learning).",
        views(lambda end: _by_operator(dataset, f"alignment_{end}", f"Alignment with the {end} checkpoint"), _ENDS),
        (Choice("Compared with", tuple(f"the {end} checkpoint" for end in _ENDS)),),
        finding=views(lambda end: _across(dataset, end), _ENDS),
    )


def _across(dataset: xr.Dataset, end: str) -> str:
    """How alike the first and the last checkpoint are."""
    other = "last" if end == "first" else "first"
    across = dataset[f"alignment_{end}"].isel(step=-1 if end == "first" else 0)
    each = [f"{name} {short(float(across.sel(operator=name)))}" for name in dataset.operator.values]
    return f"Alignment with the {end} checkpoint at the {other} one: {', '.join(each)}."


def _loss(dataset: xr.Dataset) -> Chart:
    names = {"loss": "on these trials", "recorded_loss": "recorded in training"}
    traces = [
        line(dataset.step.values, dataset[name].values, label, i, mode="lines+markers")
        for i, (name, label) in enumerate(names.items())
        if name in dataset
    ]
    axes = _axes("Loss", "log" if float(dataset.loss.min()) > 0 else None)
    text = "The loss on these trials at each checkpoint, and, where there is one, the loss recorded in training."
    return Chart(
        "loss", "Loss", text, {(): figure(traces, **axes)}, finding=_from_to(dataset, "The loss", dataset.loss)
    )


def _accuracy(dataset: xr.Dataset) -> Chart:
    trace = line(dataset.step.values, dataset.accuracy.values, "accuracy", 0, mode="lines+markers", showlegend=False)
    text = "How often the largest output is that of the right class, over all trials and times that count."
    said = _from_to(dataset, "The accuracy", dataset.accuracy)
    return Chart("accuracy", "Accuracy", text, {(): figure([trace], **_axes("Accuracy", None))}, finding=said)


def _target(dataset: xr.Dataset) -> Chart:
    shares = dataset.component_share.isel(step=0).values
    count = min(len(shares), 8)

    def view(name: str) -> Any:
        _, label, kind, _ = TARGET[name]
        values = dataset[f"component_{name}"].transpose("step", "component").values
        traces = [
            line(dataset.step.values, values[:, i], f"{i + 1} ({percent(shares[i])})", i, mode="lines+markers")
            for i in range(count)
        ]
        return figure(traces, **_axes(label, kind))

    def said(name: str) -> str:
        return _from_to(dataset, TARGET[name][3], dataset[f"component_{name}"].isel(component=0))

    return Chart(
        "target",
        "Components of the target",
        "How much is learnt of each component c of the target, given with its share of it, and how fast the kernel "
        "moves the outputs along it: a component in slow directions is learnt late.",
        views(view, TARGET),
        (Choice("Show", tuple(text for text, *_ in TARGET.values())),),
        finding=views(lambda name: f"Component 1 has {percent(shares[0])} of the target. {said(name)}", TARGET),
    )


_ENDS = ("first", "last")


def _by_operator(dataset: xr.Dataset, name: str, label: str, **chosen: str) -> Any:
    found, stderr = (dataset[variable].sel(chosen) for variable in (name, f"{name}_stderr"))
    traces = [
        line(
            dataset.step.values, found.sel(operator=operator).values, str(operator), i, mode="lines+markers",
            error_y=with_bars(stderr.sel(operator=operator).values),
        )
        for i, operator in enumerate(dataset.operator.values)
    ]  # fmt: skip
    return figure(traces, **_axes(label, "log" if np.all(found.values > 0) and "rank" in name else None))


def _axes(label: str, kind: str | None) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": "Step of training"}},
        "yaxis": {"title": {"text": label}, **({"type": kind, "exponentformat": "power"} if kind else {})},
    }
