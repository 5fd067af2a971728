"""The commands on several checkpoints: `kpflow-dyn track` and `kpflow-dyn compare`."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpflow_dyn._folder import check_folder, new_folder, replaced
from kpflow_dyn._progress import stages
from kpflow_dyn.cli import _options as given
from kpflow_dyn.cli._alike import (
    ALIKE_FILES,
    all_distances,
    few_trials,
    files_of,
    paths_in_short,
    table_of,
    write_distances,
)
from kpflow_dyn.cli._checkpoints import Files, checkpoints_in
from kpflow_dyn.cli._report import PAGE
from kpflow_dyn.cli._sources import (
    Network,
    as_found,
    attributes_of,
    limit_threads,
    load,
    posed,
    readout_of,
    said_of_options,
)
from kpflow_dyn.cli._terminal import notes, plain_errors, print_notes

if TYPE_CHECKING:
    import xarray as xr

    from kpflow_dyn._checkpoint import Checkpoint
    from kpflow_dyn._flows.flow import Flow
    from kpflow_dyn._learning.comparison import Comparison
    from kpflow_dyn._learning.recorder import Recording
    from kpflow_dyn._problems.problems import DiscreteProblem
    from kpflow_dyn.tasks import TaskData

COMPARISON_FILES = {*(f"comparison.{kind}" for kind in ("json", "nc", "png", "txt")), "index.html", PAGE}
TRACK_KEPT = "the checkpoints that are done are kept; run again to resume"


def track(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(
            help="The folder of a kp.Recorder; or the checkpoint files of your own loop, each as `analyze` takes it, "
            "with the step as the last number in its name."
        ),
    ],
    task: given.OnTask,
    task_option: given.TaskOption = None,
    model: given.Model = None,
    key: given.Key = None,
    prefix: given.Prefix = None,
    readout: given.Readout = None,
    nonlinearity: given.Nonlinearity = None,
    alpha: given.Alpha = None,
    trials: given.Trials = None,
    seed: given.Seed = 0,
    samples: given.Samples = 60,
    all_steps: given.AllSteps = False,
    carry_state: given.CarryState = False,
    loss: given.LossOfTask = None,
    dtype: given.Dtype = None,
    threads: given.Threads = None,
    out: Annotated[
        Path | None,
        given.of_output(help="Folder to write; by default track beside the checkpoints. What is known there is kept."),
    ] = None,
    debug: given.Debug = False,
) -> None:
    """Follow a network over its training: in how many directions it can learn, and how its kernel turns.

    It writes a page, track.json, track.nc and figures.

    Running the same command again computes only what is new.
    """
    with plain_errors(debug, interrupted=TRACK_KEPT):
        given.check_learning(loss)
        limit_threads(threads)
        run = checkpoints_in(checkpoints)
        out = run.folder / "track" if out is None else out
        source = Network(run.folder, model, task, prefix, readout, nonlinearity, trials, dtype, key, alpha)
        source = dataclasses.replace(source, task_options=given.task_options(task_option), carry_state=carry_state)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dataset, said = _tracked(run, source, seed, samples, loss, all_steps, out)
        warned = notes(caught)
        dataset.attrs |= {"warnings": "\n".join(warned)}
        _write_track(dataset, out)
        typer.echo("\n".join([_table(dataset), *said]))
        print_notes(warned)
        typer.echo(f"The page: {out.absolute() / 'index.html'}")


def compare(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(help="Two checkpoints, as `analyze` takes them; or more of them, or a folder, for all pairs."),
    ],
    task: given.OnTask,
    task_option: given.TaskOption = None,
    model: given.Model = None,
    model_b: Annotated[str | None, given.of_network(help="Where B is another kind of network.")] = None,
    key: given.Key = None,
    prefix: given.Prefix = None,
    readout: given.Readout = None,
    nonlinearity: given.Nonlinearity = None,
    alpha: given.Alpha = None,
    trials: given.Trials = None,
    seed: given.Seed = 0,
    modes: Annotated[int, given.of_numbers(help="Leading modes of the NTKs to compare.", min=1)] = 8,
    samples: given.Samples = 120,
    measure: Annotated[
        str,
        given.of_numbers(help="Of more than two: cka, alignment, angles, spectrum, bures or procrustes."),
    ] = "cka",
    all_steps: given.AllSteps = False,
    carry_state: given.CarryState = False,
    loss: given.LossOfTask = None,
    dtype: given.Dtype = None,
    threads: given.Threads = None,
    out: given.Out = Path("kpflow-comparison"),
    overwrite: given.Overwrite = False,
    debug: given.Debug = False,
) -> None:
    """Compare how two networks learn on the same trials: how alike are their kernels and their leading modes?

    Where both have a readout, their kernels are those under the loss. K and P compare unit i with unit i, which means
    nothing for networks from different seeds.

    It writes a page, comparison.json, .nc, .txt and .png.

    Of more than two, or of a folder, it compares all pairs on common trials and times, whatever their numbers of units:
    their states, their NTKs and their P P*. It writes a tree and a distance matrix of each, and distances.txt.
    """
    with plain_errors(debug):
        given.check_learning(loss)
        limit_threads(threads)
        check_folder(out, COMPARISON_FILES | ALIKE_FILES, overwrite)
        files = files_of(checkpoints)
        first = Network(files[0], model, task, prefix, readout, nonlinearity, trials, dtype, key, alpha)
        first = dataclasses.replace(first, task_options=given.task_options(task_option), carry_state=carry_state)
        if len(files) > 2 or checkpoints[0].is_dir():
            if model_b is not None or loss is not None:
                raise ValueError("--model-b and --loss compare two files; all pairs of more are compared by kernels")
            return _compare_all(files, few_trials(first), measure, modes, samples, seed, all_steps, out)
        a, b = files
        sources = first, dataclasses.replace(first, checkpoint=b, model=model_b or model)
        with stages() as progress, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            progress("running and linearising", 0, None)
            both = [_linearised(source, seed, loss, all_steps) for source in sources]
            progress("comparing", 0, None)
            found, about = _compared(both, {"k": modes, "samples": samples, "seed": seed}, loss)
        warned = notes(caught)
        about = said_of_options(first) | about | {"warnings": "\n".join(warned)}
        said = "\n".join([str(found), about["learning"], *_on_files(both, found.names), *both[0].on_mask.values()])
        with new_folder(out) as folder:
            _write_comparison(found, _labelled(found, both, about), folder)
            (folder / "comparison.txt").write_text(f"{a} and {b} on {task}\n{said}\n")
        typer.echo(said)
        print_notes(warned)
        typer.echo(f"The page: {out.absolute() / 'index.html'}")


def _compare_all(
    files: Sequence[Path], first: Network, measure: str, k: int, samples: int, seed: int, all_steps: bool, out: Path
) -> None:
    """Distances of all pairs of networks."""
    from kpflow_dyn._learning.measures import measure_of

    measure_of(measure, k, False)  # raises before the work
    names = paths_in_short(files)
    with stages() as progress, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        progress("running and linearising", 0, None)
        every = [_linearised(dataclasses.replace(first, checkpoint=file), seed, None, all_steps) for file in files]
        progress("comparing all pairs", 0, None)
        flows = [one.flow for one in every]
        found = all_distances(flows, names, measure, k=k, samples=samples, seed=seed)
    trials, times, _units = flows[0].ntk.domain.shape
    on = f"{len(files)} networks on {every[0].data.name}, {trials} trials x {times} times"
    said = "\n".join([on, table_of(found), *every[0].on_mask.values()])
    with new_folder(out) as folder:
        write_distances(found, {"title": on, "seed": seed, "samples": samples}, said, folder)
    typer.echo(said)
    print_notes(notes(caught))
    typer.echo(f"Trees and tables: {out.absolute()}")


@dataclasses.dataclass(frozen=True, eq=False)
class Linearised:
    """A network on a task: its flow at the steps that count, its readout, or None, and what is to be said of both."""

    file: Path
    network: Checkpoint
    flow: Flow
    data: TaskData
    readout: Any
    on_readout: str
    on_mask: dict[str, str]


def _on_files(both: Sequence[Linearised], names: Sequence[str]) -> list[str]:
    """What was found in the files, as lines: first what is the same in both."""
    found = [one.network.found for one in both]
    same = {subject: words for subject, words in found[0].items() if words == found[1].get(subject)}
    own = [{subject: words for subject, words in each.items() if subject not in same} for each in found]
    said = zip([" and ".join(names), *names], [same, *own], strict=True)
    return [line for name, each in said if any(each.values()) for line in as_found(name, each)]


def _linearised(source: Network, seed: int, loss: str | None, all_steps: bool) -> Linearised:
    import kpflow_dyn as kp
    from kpflow_dyn._flows.places import said_of_targets, said_of_weights

    network, data = load(source, seed, loss)
    found = data, *readout_of(network, data, source.readout is not None)
    flow = kp.linearize(kp.solve(posed(network, data, source.carry_state)))
    off = said_of_targets(data.mask, not all_steps)
    flow = flow.where(data.mask != 0) if off and not all_steps else flow
    return Linearised(source.checkpoint, network, flow, *found, off | said_of_weights(data.mask))


def _compared(both: Sequence[Linearised], asked: dict[str, Any], loss: str | None) -> tuple[Comparison, dict[str, Any]]:
    """The comparison, of outputs under the loss where both networks have a readout, and what is to be said of it."""
    import kpflow_dyn as kp
    from kpflow_dyn._learning.losses import loss_of_task
    from kpflow_dyn._problems.versions import versions_behind

    names, data, flows = short_names(*(one.file for one in both)), both[0].data, [one.flow for one in both]
    trials, times, _units = flows[0].ntk.domain.shape
    units = " and ".join(dict.fromkeys(str(flow.ntk.domain.shape[-1]) for flow in flows))
    about = {"task": data.name, "trials": f"{trials} x {times} times x {units} units", **asked}
    about |= both[0].on_mask
    about |= versions_behind(flows[0].solution.problem)
    without = [one.on_readout for one in both if one.readout is None]
    if without and loss is not None:
        raise ValueError(f"--loss is that of a readout and its targets: {without[0]}")
    if without:
        return kp.compare(*flows, **asked, names=names), about | {"learning": f"On the loss: {without[0]}."}
    outputs = [one.flow.output(one.readout, learn=True) for one in both]
    loss = loss_of_task(data, outputs[0].values.shape) if loss is None else loss
    found = kp.compare(*outputs, **asked, names=names, target=data.targets, mask=data.mask, loss=loss)
    return found, about | {"loss": loss, "learning": f"The loss is {loss}; {both[0].on_readout}."}


def short_names(a: Path, b: Path) -> tuple[str, str]:
    """The names of two files, with as many of their folders as it takes to tell them apart."""
    first, second = (path.absolute().parts for path in (a, b))
    for count in range(1, max(len(first), len(second))):
        names = "/".join(first[-count:]), "/".join(second[-count:])
        if names[0] != names[1]:
            return names
    return f"{a.name} (A)", f"{b.name} (B)"


def _labelled(found: Comparison, both: Sequence[Linearised], about: dict[str, Any]) -> xr.Dataset:
    """The comparison as a dataset that says of what it is: file, network and what was found, by the name of each."""
    each = {
        "file": [str(one.file) for one in both],
        "network": [str(one.network.cell) for one in both],
        "found": [json.dumps({name: words for name, words in one.network.found.items() if words}) for one in both],
    }
    dataset = found.to_xarray().assign_coords({name: ("model", texts) for name, texts in each.items()})
    title = f"{' and '.join(found.names)} on {about['task']}"
    return dataset.assign_attrs({"title": title} | about)


def _write_comparison(found: Comparison, dataset: xr.Dataset, folder: Path) -> None:
    """All files of a comparison but its text."""
    from kpflow_dyn.cli._records import comparison_record
    from kpflow_dyn.report import write_report

    found.plot().savefig(folder / "comparison.png")
    (folder / "comparison.json").write_text(comparison_record(dataset), "utf-8")
    dataset.to_netcdf(folder / "comparison.nc", engine="h5netcdf")
    write_report(dataset, folder / "index.html")


def _tracked(
    run: Recording | Files, source: Network, seed: int, samples: int, loss: str | None, all_steps: bool, out: Path
) -> tuple[xr.Dataset, list[str]]:
    """`kp.track` of checkpoint files, each read as `analyze` reads it; and what was found in the last one."""
    from kpflow_dyn._flows.places import said_in
    from kpflow_dyn._learning.losses import loss_of_task
    from kpflow_dyn._learning.tracking import Settings, recorded, track_checkpoints

    last_file = run.file(run.steps[-1])
    last, _ = load(dataclasses.replace(source, checkpoint=last_file), seed, loss)
    # The task tells the nonlinearity of a network that has learnt it, and one network has one.
    source = dataclasses.replace(source, nonlinearity=getattr(last.cell, "nonlinearity", None))

    def at(step: int) -> tuple[DiscreteProblem, Any]:
        network, data = load(dataclasses.replace(source, checkpoint=run.file(step)), seed)
        return posed(network, data, source.carry_state), readout_of(network, data, False)[0]

    first, data = load(dataclasses.replace(source, checkpoint=run.file(run.steps[0])), seed)
    layer, on_readout = readout_of(first, data, source.readout is not None)
    if layer is None and loss is not None:
        raise ValueError(f"--loss is that of a readout and its targets: {on_readout}")
    if layer is not None and loss is None:
        loss = loss_of_task(data, (*data.inputs.shape[:2], layer.out_features))
    settings = Settings(samples, seed, None if layer is None else data.targets, data.mask, loss, all_steps)
    starts = "carried" if source.carry_state else "apart"
    found = track_checkpoints(recorded(run, at), posed(first, data).x, settings, f"trials {starts}", out, True)
    title = f"{last.model.upper()} of {last.cell.hidden_size} units over {len(run.steps)} checkpoints on {data.name}"
    about = {
        "title": title,
        "run": str(run.folder),
        **({"steps_are": run.numbered_by} if isinstance(run, Files) else {}),
        "task": data.name,
        **said_of_options(source),
        "learning": on_readout,
        **attributes_of(last),
    }
    without = [f"On the loss: {on_readout}."] if layer is None else []
    return found.assign_attrs(about), [*said_in(found.attrs), *without, *as_found(last_file.name, last.found)]


def _write_track(dataset: xr.Dataset, out: Path) -> None:
    """All files of a track, each whole or not at all, beside the numbers of each checkpoint."""
    from kpflow_dyn.cli._records import track_record
    from kpflow_dyn.figures._learning import TRACK
    from kpflow_dyn.report import write_report

    with replaced(out / "track.nc") as path:
        dataset.to_netcdf(path, engine="h5netcdf")
    with replaced(out / "track.json") as path:
        path.write_text(track_record(dataset), "utf-8")
    write_report(dataset, out / "index.html")
    for name, draw in TRACK.items():
        if name != "target" or "component_share" in dataset:
            with replaced(out / f"{name}.png") as path:
                draw(dataset).savefig(path, format="png")


def _table(dataset: Any) -> str:
    """A line for each of some twelve checkpoints."""
    more = [name for name in ("loss", "recorded_loss", "accuracy") if name in dataset]
    titles = "".join(f" {name.replace('_', ' '):>13}" for name in more)
    rows = [f"    step   er(K)   er(P)  er(NTK)  with first  with last{titles}"]
    for place in range(0, dataset.sizes["step"], max(1, dataset.sizes["step"] // 12)):
        one = dataset.isel(step=place)
        ranks = one.effective_rank.sel(kind="full").values
        ends = [float(one[f"alignment_{end}"].sel(operator="NTK")) for end in ("first", "last")]
        numbers = "{:8} {:7.1f} {:7.1f} {:8.1f} {:11.3f} {:10.3f}".format(int(one.step), *ranks, *ends)
        rows.append(numbers + "".join(f" {float(one[name]):13.4g}" for name in more))
    return "\n".join(rows)
