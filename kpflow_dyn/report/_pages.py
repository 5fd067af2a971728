"""What stands on the page of each kind of dataset."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from kpflow_dyn._flows.places import said_in
from kpflow_dyn._shown import INVISIBLE, with_error
from kpflow_dyn.report._analysis_charts import analysis_charts, shares
from kpflow_dyn.report._comparison_charts import page_of_comparison
from kpflow_dyn.report._learning_charts import LOSSES, has_learning, learning_lead, learning_table
from kpflow_dyn.report._numbers import percent, settings, short, summarize, versions
from kpflow_dyn.report._page import Page, Table
from kpflow_dyn.report._sweep_charts import not_shown, quantities, spaced, sweep_charts, swept
from kpflow_dyn.report._track_charts import track_charts

if TYPE_CHECKING:
    import xarray as xr

EXACT = (
    "Numbers without ± are exact in the digits shown.\n"
    "An effective rank is a participation ratio of eigenvalues: (sum)² / sum of squares."
)
PATTERNS = ("temporal", "spatial", "trial")
ROWS = 12  # of a table over training
SHOWN = 50  # points that failed


def page_of(dataset: xr.Dataset) -> Page:
    """The page of an analysis, a track, a comparison or a sweep.

    Args:
        dataset: what `kp.analyze`, `kp.track`, `kp.compare(...).to_xarray()` or `Sweep.collect` gave.

    Raises:
        ValueError: any other dataset.

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(4, 5, 3))))
    >>> page = page_of(kp.analyze(flow, k=2))
    >>> page.charts[0].title, "<html" in page.to_html()
    ('Effective ranks', True)
    """
    if "core_eigenvalue" in dataset:
        return _of_analysis(dataset)
    if "alignment_first" in dataset and "step" in dataset.dims:
        return _of_track(dataset)
    if "principal_angle" in dataset:
        return replace(page_of_comparison(dataset), about=_about(dataset))
    if {"status", "error", "done"} <= set(dataset.data_vars):
        return _of_sweep(dataset)
    raise ValueError(
        f"no page is known for a dataset of {', '.join(map(str, dataset.data_vars)) or 'nothing'}; give what "
        "kp.analyze, kp.track, the to_xarray of kp.compare or the collect of a sweep returned"
    )


def _of_analysis(dataset: xr.Dataset) -> Page:
    found, attrs = summarize(dataset), dataset.attrs
    ode = "solver" in attrs
    return Page(
        title=attrs["title"],
        lead=(
            *learning_lead(dataset),
            _learnable(dataset, found),
            _what_the_ntk_is(ode),
            *(f"{one}." for one in said_in(attrs)),
        ),
        warnings=tuple(attrs.get("warnings", "").splitlines()),
        charts=analysis_charts(dataset),
        tables=[learning_table(dataset)] if has_learning(dataset) else [],
        settings=settings(dataset),
        versions=versions(dataset),
        about=_about(dataset),
        numbers=[_numbers(found)],
    )


def _about(dataset: xr.Dataset) -> str:
    """Model, task, sizes, seed and version in one line, as far as the dataset says."""
    attrs, sizes = dataset.attrs, dataset.sizes
    model, task = (_named(str(attrs.get(what, ""))) for what in ("model", "task"))
    known = {"units": "unit", "trials": "trial", "times": "time"}
    count = {name: f"{sizes[dim]} {name}" for name, dim in known.items() if dim in sizes}
    if str(attrs.get("trials", "")).isdecimal():  # of a track, which keeps no trial
        count["trials"] = f"{attrs['trials']} trials"
    seed = f"seed {attrs['seed']}" if "seed" in attrs else ""
    version = attrs.get("version_kpflow_dyn", attrs.get("kpflow_dyn", ""))
    parts = (
        (model, count.get("units", "")),
        (task.removeprefix("neurogym:"), count.get("trials", ""), count.get("times", ""), seed),
        (f"kpflow_dyn {version}" if version else "",),
    )
    return " · ".join(filter(None, (", ".join(filter(None, part)) for part in parts)))


def _named(text: str) -> str:
    """The name of a model or a task, of which there may be a repr or a table in JSON."""
    return str(json.loads(text).get("name", "")) if text.startswith("{") else text.partition("(")[0]


def _learnable(dataset: xr.Dataset, found: dict) -> str:
    if not found["ntk_trace"]["value"]:
        return "The NTK is zero: gradient descent on these parameters changes no state that counts."
    carried = [_carried(shares(dataset, kind), found[f"{kind}_effective_rank"]) for kind in PATTERNS]
    return (
        f"Of what gradient descent can change in the states, the first pattern in time {carried[0]}. Of patterns over "
        f"units the first {carried[1]}, and of patterns over trials the first {carried[2]}. Shares are of the trace of "
        "the NTK."
    )


def _carried(share: np.ndarray, rank: dict) -> str:
    """What the first modes carry, and their participation ratio."""
    three = f", the first three {percent(share[:3].sum())}" if len(share) > 3 else ""
    return f"carries {percent(share[0])}{three} (participation ratio {short(rank['value'])} of {rank['dimension']})"


def _what_the_ntk_is(ode: bool) -> str:
    exactly = ", as exactly as its times resolve the trajectory" if ode else ""
    functions = (
        " States are functions of time: inner products are integrals, so that numbers and modes hardly depend on how "
        "densely the times lie."
    )
    return (
        "One step of gradient descent with learning rate η changes the states by -η NTK ∇L, where L is the loss. The "
        f"NTK is P K P*{exactly}: K is what the parameters change directly in one step, P passes it on through the "
        f"dynamics.{functions if ode else ''}"
    )


def _numbers(found: dict) -> Table:
    rows = [
        (str(number["long_name"]), _of(number["text"], number.get("dimension")), str(number["description"]))
        for number in found.values()
    ]
    return Table("Numbers", ("Number", "Value ± standard error", "What it means"), rows, EXACT)


def _of(text: str, dimension: int | None) -> str:
    return text if dimension is None else f"{text} of {dimension}"


def _of_track(dataset: xr.Dataset) -> Page:
    steps = dataset.step.values
    first, last = (float(dataset.effective_rank.sel(operator="NTK", kind="full").isel(step=i)) for i in (0, -1))
    kept = float(dataset.alignment_first.sel(operator="NTK").isel(step=-1))
    lead = (
        *_learnt(dataset),
        *([f"{dataset.attrs['weights']}."] if "weights" in dataset.attrs else []),
        f"From step {steps[0]} to step {steps[-1]} the effective rank of the NTK goes from {first:.3g} to {last:.3g}; "
        f"its alignment with the NTK at the start ends at {kept:.2f} (1: unchanged in direction).",
        "The effective rank is the participation ratio of the eigenvalues: about how many directions carry most. K is "
        "what the parameters change directly in one step, P passes it on through the dynamics, and the NTK = P K P* is "
        "how one step of gradient descent moves the whole trajectory.",
    )
    return Page(
        title=dataset.attrs.get("title", f"{len(steps)} checkpoints of a training"),
        lead=lead,
        charts=track_charts(dataset),
        settings=settings(dataset),
        versions=versions(dataset),
        about=_about(dataset),
        numbers=[_over_training(dataset)],
    )


def _learnt(dataset: xr.Dataset) -> list[str]:
    """What became of the loss and of the accuracy, where they are known."""
    texts = {name: text for name, text in {"loss": short, "accuracy": percent}.items() if name in dataset}
    ends = {name: [text(float(dataset[name][place])) for place in (0, -1)] for name, text in texts.items()}
    parts = [f"the {name} goes from {first} to {last}" for name, (first, last) in ends.items()]
    return [f"Over these {dataset.sizes['step']} checkpoints {' and '.join(parts)}."] if parts else []


def _over_training(dataset: xr.Dataset) -> Table:
    operators = [str(name) for name in dataset.operator.values]
    ranks = (f"Effective rank of {name}" for name in operators)
    header = ("Step", *ranks, "Alignment of the NTK with the first", "with the last")
    header += ("Loss",) if "loss" in dataset else ()
    chosen = range(0, dataset.sizes["step"], max(1, dataset.sizes["step"] // ROWS))
    rows = [_row(dataset.isel(step=place), operators) for place in chosen]
    return Table("Numbers", header, rows, "± one standard error.")


def _row(one: xr.Dataset, operators: list[str]) -> tuple[str, ...]:
    ranks = [_text(one, "effective_rank", operator=name, kind="full") for name in operators]
    ends = [_text(one, f"alignment_{end}", operator="NTK") for end in ("first", "last")]
    return (f"{int(one.step)}", *ranks, *ends, *([f"{float(one.loss):.4g}"] if "loss" in one else []))


def _text(one: xr.Dataset, name: str, **chosen: str) -> str:
    return with_error(float(one[name].sel(chosen)), float(one[f"{name}_stderr"].sel(chosen)), most=4)


def _left_out(dataset: xr.Dataset) -> list[str]:
    names = not_shown(dataset)
    return [f"Not shown: {', '.join(names)}. These arrays are in the dataset of the sweep."] if names else []


def _of_sweep(dataset: xr.Dataset) -> Page:
    axes, done = swept(dataset), int(dataset.done.sum())
    sizes = "" if axes == ["point"] else f" ({' x '.join(f'{dataset.sizes[axis]} {axis}' for axis in axes)})"
    failed = [_failure(dataset, index) for index in zip(*np.nonzero(~dataset.done.values.astype(bool)), strict=True)]
    tables = []
    if failed:
        more = "" if len(failed) <= SHOWN else f"The first {SHOWN} of {len(failed)}."
        tables.append(Table("What is missing", ("Point", "Status", "Why"), failed[:SHOWN], more))
    return Page(
        title=dataset.attrs.get("title", "Sweep of points" if axes == ["point"] else f"Sweep over {', '.join(axes)}"),
        lead=(f"{done} of {dataset.done.size} points have numbers{sizes}.", *_kinds(dataset), *_left_out(dataset)),
        charts=sweep_charts(dataset),
        tables=tables,
        settings=settings(dataset) | {"seconds per point": f"{float(dataset.seconds.where(dataset.done).mean()):.3g}"},
        versions=versions(dataset),
        about=_about(dataset),
        numbers=[_statistics(dataset)] if quantities(dataset) else [],
    )


def _kinds(dataset: xr.Dataset) -> list[str]:
    """Which loss the loss of a sweep on a task is."""
    kind = str(dataset["loss"].attrs.get("kind", "")) if "loss" in dataset else ""
    return [f"The loss is the {' or the '.join(LOSSES.get(one, one) for one in kind.split(' or '))}."] if kind else []


def _failure(dataset: xr.Dataset, index: tuple) -> tuple[str, str, str]:
    one = dataset.isel(dict(zip(swept(dataset), map(int, index), strict=True)))
    point = ", ".join(f"{name} = {one[name].values}" for name in one.coords if one[name].ndim == 0)
    return point, str(one.status.values), str(one.error.values)


def _statistics(dataset: xr.Dataset) -> Table:
    """Each number over all points: how it spreads, and how well a single one is known."""
    rows = []
    for name in quantities(dataset):
        values = dataset[name].values
        known = values[np.isfinite(values)]
        spread = np.quantile(known, [0, 0.25, 0.5, 0.75, 1]) if known.size else np.full(5, np.nan)
        bar = float(dataset[f"{name}_stderr"].mean()) if f"{name}_stderr" in dataset else 0.0
        shown = "" if bar <= INVISIBLE * abs(spread[2]) else f"{bar:.2g}"
        kind = f" ({dataset[name].attrs['kind']})" if "kind" in dataset[name].attrs else ""
        rows.append((spaced(name + kind), *(f"{value:.4g}" for value in spread), shown, str(known.size)))
    header = ("Number", "Least", "Quarter", "Median", "Three quarters", "Largest", "Standard error", "Points")
    return Table("Numbers", header, rows, "The standard error is that of one point, in the mean; none where exact.")
