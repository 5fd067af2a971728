"""The charts of what `kp.analyze` returns."""

from __future__ import annotations

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
    with_bars,
)
from kpflow_dyn.report._numbers import percent, short
from kpflow_dyn.report._self_reference_chart import self_reference_charts

if TYPE_CHECKING:
    import xarray as xr

LINES = 4
KERNELS = {"temporal": "time", "spatial": "unit", "trial": "trial"}
NAMED = 3  # modes, in a sentence


def analysis_charts(dataset: xr.Dataset) -> list[Chart]:
    """All charts of an analysis, in the order of the page."""
    draw = (_ranks, _spectra, _temporal, _spatial, _trials, _ntk_modes, _kernels, _states)
    return [*(chart(dataset) for chart in draw), *self_reference_charts(dataset)]


def _spectra(dataset: xr.Dataset) -> Chart:
    core = np.repeat(dataset.core_eigenvalue.values, dataset.core_multiplicity.values)
    core = core[core > 1e-7 * core.max(initial=0)]
    shown = np.unique(np.geomspace(1, max(core.size, 1), 400).astype(int)) - 1 if core.size else np.arange(0)
    traces = [line(1 + shown, core[shown], "core", 6, hovertemplate="rank %{x}: %{y:.4g}")]
    for name, label, color, symbol in (("K", "K", 0, "square"), ("ntk", "NTK", 1, "circle")):
        values, done = dataset[f"{name}_eigenvalue"].values, dataset[f"{name}_converged"].values.astype(bool)
        marker = {"size": 8, "symbol": [symbol if good else f"{symbol}-open" for good in done]}
        hover = "rank %{x}: %{y:.4g}<br>residual %{customdata:.1e}"
        residual = numbers(dataset[f"{name}_residual"].values)
        ranks = 1 + np.arange(values.size)
        style = {"mode": "lines+markers", "marker": marker, "hovertemplate": hover, "customdata": residual}
        style["also"] = "residual"
        traces.append(line(ranks, values, label, color, **style))
    axes = {"xaxis": _log("Rank of the eigenvalue"), "yaxis": _log("Eigenvalue")}
    return Chart(
        "spectra",
        "Spectra",
        "Eigenvalues from the largest down, on logarithmic axes. The core (line) is what the weights see: all its "
        "eigenvalues, exact. K (squares) is what a change of the weights does directly to one step, or to an ODE's "
        "field. The NTK (circles) is what it does to the whole trajectory. A steep fall: few directions can be learnt "
        "fast. An NTK high above K: the dynamics amplify changes; of an ODE compare the shapes only, as K and the NTK "
        "have different units. Hollow marks have not converged.",
        {(): figure(traces, **axes)},
        finding=" ".join(_fall(dataset, name) for name in ("ntk", "K")),
    )


def _fall(dataset: xr.Dataset, name: str) -> str:
    values = dataset[f"{name}_eigenvalue"].values
    label = name.replace("ntk", "NTK")
    return f"{label}: the largest eigenvalue is {short(values[0])}, number {len(values)} is {short(values[-1])}."


def _ranks(dataset: xr.Dataset) -> Chart:
    names = [str(name) for name in dataset.data_vars if str(name).endswith("effective_rank")]
    labels = [name.removesuffix("_effective_rank").replace("ntk", "NTK") for name in names]
    found = np.array([float(dataset[name]) for name in names])
    stderr = np.array([dataset[name].attrs["stderr"] for name in names])
    most = np.array([dataset[name].attrs["dimension"] for name in names])
    band = {"line": {"width": 6}, "opacity": 0.3, "hoverinfo": "skip", "hovertemplate": None, "showlegend": False}
    spans = [line([1, end], [label, label], label, 6, **band) for label, end in zip(labels, most, strict=True)]
    dots = line(
        found, labels, "effective rank", 1, "of", mode="markers", marker={"size": 10}, showlegend=False,
        error_x=with_bars(stderr), customdata=most, hovertemplate="%{y}: %{x:.4g} of %{customdata:,}<extra></extra>",
    )  # fmt: skip
    axes = {
        "xaxis": _log("Effective rank"),
        "yaxis": {"title": {"text": "Operator"}, "autorange": "reversed", "showgrid": False},
    }
    return Chart(
        "effective_ranks",
        "Effective ranks",
        "The participation ratio of each operator's eigenvalues, (sum)² / sum of squares: about how many directions "
        "carry most of it. Bars are two standard errors. The grey band ends at the dimension of the space: where a dot "
        "is far left of that end, few of the directions carry most.",
        {(): figure([*spans, dots], **axes)},
        finding=", ".join(f"{a} {short(b)} of {c:,}" for a, b, c in zip(labels, found, most, strict=True)) + ".",
    )


def _temporal(dataset: xr.Dataset) -> Chart:
    modes, time = dataset.temporal_mode.values, dataset.time.values
    count = min(len(modes), 8)
    axes = {"xaxis": {"title": {"text": _time(dataset)}}, "yaxis": {"title": {"text": "Temporal mode"}}}

    lines = [line(time, modes[i], f"mode {i + 1} ({_share(dataset, 'temporal', i)})", i) for i in range(count)]
    shown = [lines[:LINES], *([one] for one in lines)]
    return Chart(
        "temporal_modes",
        "Temporal modes",
        "When learning can act: eigenvectors of the NTK summed over trials and units, each with its share of the "
        "NTK's trace. A change of the states in time that modes with small shares must carry is learnt late or never.",
        views(lambda some: figure(some, **axes), shown),
        (Choice("Mode", (f"leading {min(LINES, count)}", *_numbered("mode", count))),),
        finding=_shares(dataset, "temporal"),
    )


def _spatial(dataset: xr.Dataset) -> Chart:
    return _loadings(
        dataset,
        "spatial",
        "Which units learning can move: eigenvectors of the NTK summed over trials and times. A row is a mode, a "
        "column a unit, sorted by its loading on the mode chosen. Units that are pale in the rows with large shares "
        "hardly change.",
    )


def _trials(dataset: xr.Dataset) -> Chart:
    return _loadings(
        dataset,
        "trial",
        "Which trials change together: eigenvectors of the NTK summed over times and units. A row is a mode, a column "
        "a trial. A mode of one sign changes all trials alike; one whose sign follows the condition can pull "
        "conditions apart.",
    )


def _loadings(dataset: xr.Dataset, kernel: str, caption: str) -> Chart:
    axis, labels = KERNELS[kernel], _labels(dataset) if kernel == "trial" else []
    modes = dataset[f"{kernel}_mode"].values[:8]
    keys = [*(dataset[name].values for name in labels), *modes]
    names = [f"sorted by {name}" for name in (*map(_spaced, labels), *_numbered("mode", len(modes)))]
    rows = [f"{i + 1} ({_share(dataset, kernel, i)})" for i in range(len(modes))]

    def view(key: np.ndarray) -> Any:
        order = np.argsort(key, kind="stable")
        hover = f"mode %{{y}}<br>{axis} %{{x}}: %{{z:.3g}}<extra></extra>"
        columns = [str(i) for i in order]
        title = {"text": axis.capitalize()}
        rank = {"title": {"text": "Mode (share)"}, "autorange": "reversed"}
        layout = {"xaxis": {"title": title, "type": "category", "nticks": 12}, "yaxis": rank}
        return figure([heat_map(modes[:, order], columns, rows, DIVERGING, hover, "Loading")], **layout)

    title, order = f"{kernel.capitalize()} modes", Choice("Order", tuple(names))
    return Chart(f"{kernel}_modes", title, caption, views(view, keys), (order,), 320, _shares(dataset, kernel))


def _ntk_modes(dataset: xr.Dataset) -> Chart:
    vectors = dataset.ntk_mode.transpose("rank", "trial", "time", "unit").values
    ranks, trials, times, units = vectors.shape
    ranks = min(ranks, max(1, MOST_NUMBERS // (times * units)))
    shown = evenly(trials, MOST_NUMBERS // (ranks * times * units))
    hover = "time %{x}<br>unit %{y}: %{z:.3g}<extra></extra>"
    layout = {"xaxis": {"title": {"text": _time(dataset)}}, "yaxis": {"title": {"text": "Unit"}}}

    def view(rank: int, trial: int) -> Any:
        z, most = vectors[rank, trial].T, float(np.nanmax(np.abs(vectors[rank])))
        time = numbers(dataset.time.values)
        return figure([heat_map(z, time, np.arange(units), DIVERGING, hover, "Change of the state", most)], **layout)

    return Chart(
        "ntk_modes",
        "Modes of the NTK",
        "What learning changes most easily: leading eigenvectors of the NTK itself. Each is a change of the whole "
        "trajectory, of which one trial is shown at a time. All trials of a mode have one colour scale.",
        views(view, range(ranks), shown),
        (Choice("Mode", _numbered("mode", ranks)), Choice("Trial", tuple(_trial_name(dataset, i) for i in shown))),
        finding=_carried(dataset.ntk_eigenvalue.values / float(dataset.ntk_trace)),
    )


def _kernels(dataset: xr.Dataset) -> Chart:
    most = int((MOST_NUMBERS / 3) ** 0.5)

    def view(kernel: str) -> Any:
        axis = KERNELS[kernel]
        matrix, shown = dataset[f"{kernel}_kernel"].values, evenly(dataset.sizes[axis], most)
        where = numbers(dataset[axis].values[shown])
        hover = f"{axis} %{{y}} and %{{x}}: %{{z:.4g}}<extra></extra>"
        name = {"text": _time(dataset) if axis == "time" else axis.capitalize()}
        layout = {"xaxis": {"title": name}, "yaxis": {"title": name, "autorange": "reversed"}}
        return figure([heat_map(matrix[shown][:, shown], where, where, DIVERGING, hover, "NTK")], **layout)

    largest = {axis: int(np.nanargmax(np.diagonal(dataset[f"{name}_kernel"].values))) for name, axis in KERNELS.items()}
    when = f"{float(dataset.time[largest['time']]):.4g} {dataset.time.attrs.get('units', '')}".strip()
    return Chart(
        "kernels",
        "The NTK between times, units and trials",
        "The NTK summed over all other axes: how much a gradient at one time (unit, trial) changes the state at "
        "another. A block of one colour learns together; where the off-diagonal is pale, the two are learnt apart.",
        views(view, KERNELS),
        (Choice("Between", ("times", "units", "trials")),),
        440,
        f"Learning changes most at time {when}, in unit {largest['unit']} and in trial {largest['trial']}: the largest "
        "entries on the diagonals.",
    )


def _states(dataset: xr.Dataset) -> Chart:
    components = min(dataset.sizes["pc"], 3)
    pairs = [(0, 1), (0, 2), (1, 2)][: {1: 0, 2: 1}.get(components, 3)]
    shown = evenly(dataset.sizes["trial"], MOST_NUMBERS // (2 * 4 * dataset.sizes["time"]))
    explained = dataset.pc_variance.values
    axes = [f"PC {i + 1} ({percent(explained[i])} of the variance)" for i in range(components)]
    time = dataset.time.values
    score, colors, labels = dataset.pc_projection.values, _group(dataset), _labels(dataset)

    def view(x: int | None, y: int) -> Any:
        """Component y against component x, or against time."""
        against = [time if x is None else score[trial, :, x] for trial in shown]
        paths = [_trajectory(dataset, n, colors, a, score[n, :, y]) for n, a in zip(shown, against, strict=True)]
        title = _time(dataset) if x is None else axes[x]
        return figure(paths, xaxis={"title": {"text": title}}, yaxis={"title": {"text": axes[y]}})

    drawn = [view(*pair) for pair in (*pairs, *((None, pc) for pc in range(components)))]
    names = [*(f"PC {x + 1} and {y + 1}" for x, y in pairs), *(f"PC {pc + 1} over time" for pc in range(components))]
    return Chart(
        "state_pca",
        "State PCA",
        "Where the state is, as opposed to where learning can move it: principal components of the states over all "
        "trials and times (of an ODE weighted by the time that each stands for). A line is a trial; a dot is its end. "
        + (f"Colours are those of {_spaced(labels[0])}." if labels else "A colour is a trial."),
        views(lambda one: one, drawn),
        (Choice("Plane", tuple(names)),),
        440,
        ", ".join(f"PC {i + 1} has {percent(explained[i])}" for i in range(components)) + " of the variance.",
    )


def _trajectory(dataset: xr.Dataset, trial: int, colors: np.ndarray, x: np.ndarray, y: np.ndarray) -> Any:
    ends = np.zeros(len(x))
    ends[np.flatnonzero(np.isfinite(y))[-1:]] = 7
    name = _trial_name(dataset, trial)
    return line(
        x, y, name, int(colors[trial]), mode="lines+markers", marker={"size": ends, "opacity": 1}, line={"width": 1.2},
        showlegend=False, hovertemplate=f"{plain(name)}<br>(%{{x:.3g}}, %{{y:.3g}})<extra></extra>",
    )  # fmt: skip


def _group(dataset: xr.Dataset) -> np.ndarray:
    """A number for each trial: trials of the same first label share it; their own numbers where they have none."""
    labels = _labels(dataset)
    if not labels:
        return np.arange(dataset.sizes["trial"])
    return np.unique(dataset[labels[0]].values, return_inverse=True)[1]


def _labels(dataset: xr.Dataset) -> list[str]:
    """What is known of the trials as numbers."""
    names = [str(name) for name in dataset.coords if str(name).startswith("label_")]
    return [name for name in names if dataset[name].dtype.kind in "biuf"]


def _trial_name(dataset: xr.Dataset, trial: int) -> str:
    known = ", ".join(f"{_spaced(name)} {dataset[name].values[trial]:.3g}" for name in _labels(dataset)[:2])
    return f"trial {trial}" + (f" ({known})" if known else "")


def shares(dataset: xr.Dataset, kernel: str) -> np.ndarray:
    """Of the NTK's trace, by mode of one of its kernels."""
    values = dataset[f"{kernel}_eigenvalue"].values
    return values / values.sum()


def _share(dataset: xr.Dataset, kernel: str, mode: int) -> str:
    return percent(shares(dataset, kernel)[mode])


def _shares(dataset: xr.Dataset, kernel: str) -> str:
    return _carried(shares(dataset, kernel), f"{kernel.capitalize()} mode")


def _carried(share: np.ndarray, mode: str = "Mode") -> str:
    """What the first modes carry, and how much is left."""
    named = [f"{mode if i == 0 else 'mode'} {i + 1} carries {percent(one)}" for i, one in enumerate(share[:NAMED])]
    rest = 1 - share[:NAMED].sum()
    return f"{', '.join(named)} of the NTK's trace; {percent(max(rest, 0))} is left for all others."


def _numbered(what: str, count: int) -> tuple[str, ...]:
    return tuple(f"{what} {i + 1}" for i in range(count))


def _time(dataset: xr.Dataset) -> str:
    units = dataset.time.attrs.get("units")
    return f"Time ({plain(units)})" if units else "Time"


def _spaced(name: str) -> str:
    return name.removeprefix("label_").replace("_", " ")


def _log(title: str) -> dict[str, Any]:
    return {"type": "log", "title": {"text": title}, "exponentformat": "power"}
