"""The command line: `kpflow-dyn analyze`, `demo`, `track`, `compare`, `sweep` and `report`."""

from __future__ import annotations

import json
import warnings
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kpflow_dyn
from kpflow_dyn._folder import check_folder, new_folder
from kpflow_dyn._progress import stages
from kpflow_dyn.cli import _options as given
from kpflow_dyn.cli._report import PAGE, report
from kpflow_dyn.cli._sources import (
    Network,
    as_found,
    attributes_of,
    found_in,
    limit_threads,
    load,
    load_module,
    posed,
    readout_of,
    said_of_options,
)
from kpflow_dyn.cli._sweep import sweep
from kpflow_dyn.cli._terminal import notes, plain_errors, print_notes
from kpflow_dyn.cli._training import compare, track

# Torch, xarray and matplotlib take seconds to import: commands do so when they need them.
if TYPE_CHECKING:
    import xarray as xr

    from kpflow_dyn._problems.problems import Problem
    from kpflow_dyn._problems.solutions import Solution
    from kpflow_dyn.report import Table
    from kpflow_dyn.tasks import TaskData

    Posed = tuple[Problem | Solution, TaskData | None, Any, dict[str, str]]
    """A problem, or one that is solved; its task and readout, if it has them; and what the results should say of it."""

FIGURE_NAMES = ("spectra", "effective_ranks", "temporal_modes", "spatial_modes", "trial_modes", "state_pca")
LEARNING_NAMES = {"predicted_loss.png", "reach.png"}  # where there is a readout, and targets
FILE_NAMES = {"results.json", "results.nc", "index.html", *(f"{name}.png" for name in FIGURE_NAMES)}
NO_THREADS = (
    "--threads has no effect on JAX; leave it out, and limit the process itself (on Linux: taskset -c 0-3 kpflow-dyn "
    "...)"
)
DEMO_TASK = "neurogym:PerceptualDecisionMaking-v0"

app = typer.Typer(
    help="In which time, trial and unit modes can gradient descent change a dynamical model?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def analyze(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="What training left: a file of torch.save, Lightning, safetensors, numpy, flax, equinox, Keras, "
            "PsychRNN or stable-baselines3, or a folder of orbax. No code in it is run.",
            show_default=False,
        ),
    ] = None,
    model: given.Model = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="memorypro, flipflop or another of kpflow_dyn.tasks, neurogym:NAME-v0, or a path that ends in .npz."
        ),
    ] = None,
    task_option: given.TaskOption = None,
    problem: Annotated[
        str | None,
        typer.Option(
            help="In the place of CHECKPOINT and --task: module:function or file.py:function of your own. "
            "This RUNS that code. The function takes no arguments and returns a kp.DiscreteProblem, a kp.ODEProblem, "
            "a kp.StaticProblem(..., axes=...) or a kp.Solution, in torch or JAX."
        ),
    ] = None,
    module: given.Module = None,
    x: given.Inputs = None,
    state: given.State = None,
    axes: given.Axes = None,
    key: given.Key = None,
    prefix: given.Prefix = None,
    readout: given.Readout = None,
    loss: given.LossOfTask = None,
    nonlinearity: given.Nonlinearity = None,
    alpha: given.Alpha = None,
    trials: given.Trials = None,
    seed: given.Seed = 0,
    modes: given.Modes = 8,
    samples: given.Samples = 40,
    all_steps: given.AllSteps = False,
    carry_state: given.CarryState = False,
    optimizer: given.Optimizer = None,
    lr: given.Rate = None,
    clip: given.Clip = None,
    steps: given.Steps = 1000,
    dtype: given.Dtype = None,
    threads: given.Threads = None,
    out: given.Out = Path("kpflow-analysis"),
    overwrite: given.Overwrite = False,
    debug: given.Debug = False,
) -> None:
    """Analyse a network on a task, or a problem of your own; write numbers, figures and a page."""
    with plain_errors(debug):
        named = {"key": key, "prefix": prefix, "readout": readout, "nonlinearity": nonlinearity, "alpha": alpha}
        inputs = {"task": task, "x": x, "trials": trials, "dtype": dtype, "state": state, "axes": axes}
        inputs |= {"task_options": given.task_options(task_option), "carry_state": carry_state or None}
        source = _source(problem, {"CHECKPOINT": checkpoint, "model": model, "module": module} | named | inputs)
        asked = {"k": modes, "samples": samples, "all_steps": all_steps, "loss": loss}
        asked |= {"optimizer": optimizer, "lr": lr, "clip": clip, "steps": steps}
        _run(source, seed, asked, threads, out, overwrite)


@app.command()
def demo(
    trials: given.Trials = None,
    seed: given.Seed = 0,
    modes: given.Modes = 8,
    samples: given.Samples = 40,
    all_steps: given.AllSteps = False,
    optimizer: given.Optimizer = None,
    lr: given.Rate = None,
    dtype: given.Dtype = None,
    threads: given.Threads = 1,
    out: given.Out = Path("kpflow-demo"),
    overwrite: given.Overwrite = False,
    debug: given.Debug = False,
) -> None:
    """Analyse the network that ships with the package: a GRU that decides which of two noisy inputs is larger."""
    with plain_errors(debug), as_file(files("kpflow_dyn").joinpath("data/demo.safetensors")) as checkpoint:
        source = Network(checkpoint, model="gru", task=DEMO_TASK, trials=trials, dtype=dtype)
        asked = {"k": modes, "samples": samples, "all_steps": all_steps, "mask": _choices_as_fixation}
        asked |= {"optimizer": optimizer, "lr": lr}
        _run(source, seed, asked, threads, out, overwrite)


def _choices_as_fixation(data: TaskData) -> Any:
    """The weights in the loss that the demo's network was trained with: fixation and decision weigh the same."""
    fixation = data.labels["class"] == 0
    return fixation / fixation.sum() + ~fixation / (~fixation).sum()


EXAMPLES = {
    track: "kpflow-dyn track runs/1 --task memorypro",
    compare: "kpflow-dyn compare before.pt after.pt --task memorypro",
    report: "kpflow-dyn report runs/gains --open",
    sweep: "kpflow-dyn sweep gains.toml --workers 4",
}
for command, example in EXAMPLES.items():
    app.command(epilog=f"Example: {example}")(command)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kpflow-dyn {kpflow_dyn.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


def _source(problem: str | None, network: dict[str, Any]) -> Network | str:
    """What to analyse: either a checkpoint with its inputs, or the name of a function of the user's own."""
    named = {name: f"--{name}" for name in network} | {
        "CHECKPOINT": "CHECKPOINT",
        "task_options": "--task-option",
        "carry_state": "--carry-state",
    }
    chosen = [named[name] for name, value in network.items() if value is not None]
    if problem is not None:
        if chosen:
            raise ValueError(
                f"{', '.join(chosen)} cannot be given with --problem, whose function decides that; leave one out"
            )
        return problem
    missing = ["CHECKPOINT"] * ("CHECKPOINT" not in chosen) + ["--task"] * (not {"--task", "--x"} & {*chosen})
    if missing:
        raise ValueError(
            f"no {' and no '.join(missing)}; give CHECKPOINT and --task (or --x), or --problem file.py:function alone"
        )
    return Network(network.pop("CHECKPOINT"), **network)


def _run(
    source: Network | str, seed: int, asked: dict[str, Any], threads: int | None, out: Path, overwrite: bool
) -> None:
    import kpflow_dyn as kp

    check_folder(out, {*FILE_NAMES, *LEARNING_NAMES, PAGE}, overwrite)
    with stages() as progress:
        progress("loading the model and its inputs", 0, None)
        problem, task, readout, about = _posed(source, seed, threads, asked.get("loss"))
        for name in ("loss", "optimizer"):
            if asked.get(name) is not None and readout is None:
                why = about.get("learning", "leave it out")
                raise ValueError(f"--{name} is that of a readout and its targets: {why}")
        asked |= {"mask": asked["mask"](task)} if "mask" in asked else {}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            progress("running and linearising", 0, None)
            flow = kp.linearize(problem if isinstance(problem, kp.Solution) else kp.solve(problem))
            dataset = kp.analyze(flow, **asked, seed=seed, task=task, readout=readout, progress=progress)
            warned = [*about.get("warnings", "").splitlines(), *notes(caught)]
            dataset.attrs = about | dataset.attrs | about | {"warnings": "\n".join(warned)}
            progress("drawing", 0, None)
            contents = _render(dataset)
    with new_folder(out) as folder:
        for name, content in contents.items():
            folder.joinpath(name).write_bytes(content)
        dataset.to_netcdf(folder / "results.nc", engine="h5netcdf")
    _print_table(dataset)
    typer.echo(f"The page: {out.absolute() / 'index.html'}")


def _posed(source: Network | str, seed: int, threads: int | None, loss: str | None) -> Posed:
    """What a source names. Warnings of the user's own code are shown as they come."""
    limit_threads(threads)
    if isinstance(source, str):
        return _own_problem(source, threads)
    if source.module is not None:
        return _module_on_inputs(source, seed, threads)
    with warnings.catch_warnings(record=True) as caught:  # of other packages none is about the numbers
        warnings.simplefilter("always")
        problem, task, readout, about = _network_on_task(source, seed, loss)
    return problem, task, readout, about | {"warnings": "\n".join(notes(caught))}


def _own_problem(reference: str, threads: int | None) -> Posed:
    """The problem of the user's own code."""
    import kpflow_dyn as kp
    from kpflow_dyn.cli._user_code import problem_from

    problem = problem_from(reference)
    posed = problem.problem if isinstance(problem, kp.Solution) else problem
    _limit_threads(posed, threads)
    return problem, None, None, {"title": f"Analysis of {reference}", "code": reference}


def _limit_threads(problem: Problem, threads: int | None) -> None:
    if threads is not None and not problem.backend.runtime.limit_threads(threads):
        raise ValueError(NO_THREADS)


def _network_on_task(source: Network, seed: int, loss: str | None) -> Posed:
    network, data = load(source, seed, loss)
    readout, said = readout_of(network, data, source.readout is not None)
    attributes = {
        "title": f"{network.model.upper()} of {network.cell.hidden_size} units on {data.name}",
        "checkpoint": source.checkpoint.name,
        "model": str(network.cell),
        "task": data.name,
        **said_of_options(source),
        "learning": said,
    }
    return posed(network, data, source.carry_state), data, readout, attributes | attributes_of(network)


def _module_on_inputs(source: Network, seed: int, threads: int | None) -> Posed:
    """The user's own module with the weights of the file."""
    network, problem, data = load_module(source, seed)
    _limit_threads(problem, threads)
    attributes = {
        "title": f"Analysis of {source.module}",
        "checkpoint": source.checkpoint.name,
        "code": str(source.module),
        "learning": "nothing is said, as a module of your own comes without a readout",
    }
    return problem, data, None, attributes | attributes_of(network)


def _render(dataset: xr.Dataset) -> dict[str, bytes]:
    """All files but the NetCDF one, by name."""
    from kpflow_dyn.figures import FIGURES, to_bytes
    from kpflow_dyn.figures._learning import OF_PARTS
    from kpflow_dyn.report import page_of

    figures = FIGURES | (OF_PARTS if "part" in dataset.dims else {})
    return {
        **{f"{name}.png": to_bytes(draw(dataset)) for name, draw in figures.items()},
        "index.html": page_of(dataset).to_html().encode(),
        "results.json": _to_json(dataset).encode(),
    }


def _to_json(dataset: xr.Dataset) -> str:
    from kpflow_dyn.report import settings, summarize, versions
    from kpflow_dyn.report._learning_charts import as_records, steps_as_records

    content = {
        "found": found_in(dataset.attrs),
        "learning": as_records(dataset),
        "optimizer": steps_as_records(dataset),
        "numbers": summarize(dataset),
        "settings": settings(dataset),
        "versions": versions(dataset),
        "warnings": dataset.attrs["warnings"].splitlines(),
    }
    return json.dumps(content, indent=2, ensure_ascii=False, default=lambda n: n.item(), allow_nan=False) + "\n"


def _print_table(dataset: xr.Dataset) -> None:
    from rich.console import Console
    from rich.table import Table

    from kpflow_dyn.report import summarize
    from kpflow_dyn.report._learning_charts import has_learning, learning_lead, learning_table

    if has_learning(dataset):
        _print_rows(learning_table(dataset), "\n".join(learning_lead(dataset)))
    if "learning" in dataset.attrs:
        typer.echo(f"On what will be learnt: {dataset.attrs['learning']}.")
    if found := found_in(dataset.attrs):
        typer.echo("\n".join(as_found(dataset.attrs["checkpoint"], found)))
    steps = [f"{dataset.attrs['steps']}"] if "steps" in dataset.attrs else []
    caption = "\n".join(["± standard error; numbers without it are exact", *steps])
    table = Table(title=dataset.attrs["title"], caption=caption)
    for column in ("", "value", "of"):
        table.add_column(column, justify="right" if column else "left")
    for number in summarize(dataset).values():
        table.add_row(number["long_name"], number["text"], str(number.get("dimension", "")))
    Console().print(table)
    print_notes(dataset.attrs["warnings"].splitlines())


def _print_rows(rows: Table, caption: str) -> None:
    """A table, with what its last column says below it, as terminals are narrow."""
    from rich.console import Console
    from rich.table import Table as Drawn

    table = Drawn(title=rows.title, caption=caption, caption_justify="left")
    for name in rows.header[:-1]:
        table.add_column(name, justify="left" if name == rows.header[0] else "right")
    for row in rows.rows:
        table.add_row(*row[:-1])
    Console().print(table)
    for row in rows.rows:
        if row[-1] != "-":
            typer.echo(f"{rows.header[-1]} of {row[0]}: {row[-1]}")
