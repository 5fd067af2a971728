"""The command line: `kpflow-dyn analyze`, `demo`, `track`, `compare`, `sweep`, `report` and `doctor`."""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import kpflow_dyn
from kpflow_dyn._folder import check_folder, new_folder
from kpflow_dyn._progress import stages
from kpflow_dyn.cli import _options as given
from kpflow_dyn.cli._cost import Work, check_memory, cost_of, shape_before
from kpflow_dyn.cli._doctor import doctor
from kpflow_dyn.cli._found import in_analysis
from kpflow_dyn.cli._records import as_json
from kpflow_dyn.cli._report import PAGE, report
from kpflow_dyn.cli._sources import Network
from kpflow_dyn.cli._subject import Subject, subject_of
from kpflow_dyn.cli._summary import print_summary, say
from kpflow_dyn.cli._sweep import sweep
from kpflow_dyn.cli._terminal import notes, plain_errors, print_notes
from kpflow_dyn.cli._training import compare, track

# Torch, xarray and matplotlib take seconds to import: commands do so when they need them.
if TYPE_CHECKING:
    import xarray as xr

    from kpflow_dyn._flows.flow import Flow
    from kpflow_dyn.cli._found import Choice
    from kpflow_dyn.tasks import TaskData

FIGURE_NAMES = ("spectra", "effective_ranks", "temporal_modes", "spatial_modes", "trial_modes", "state_pca")
LEARNING_NAMES = {"predicted_loss.png", "reach.png"}  # where there is a readout, and targets
FILE_NAMES = {"results.json", "results.nc", "index.html", *(f"{name}.png" for name in FIGURE_NAMES)}
DEMO = "demo.safetensors"
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
            help="The trained network: a file of torch.save, Lightning, safetensors, numpy, flax, equinox, Keras, "
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
            help="Instead of CHECKPOINT and --task: your own function, as module:function or file.py:function. It "
            "takes no arguments and returns a kp.DiscreteProblem, a kp.ODEProblem, a kp.StaticProblem(..., axes=...) "
            "or a kp.Solution. This RUNS your code."
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
    verbose: given.Verbose = False,
    dry_run: given.DryRun = False,
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
        _run(source, seed, asked, threads, Output(out, overwrite, verbose, dry_run))


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
    verbose: given.Verbose = False,
    dry_run: given.DryRun = False,
    debug: given.Debug = False,
) -> None:
    """Analyse the network that ships with the package: a GRU that decides which of two noisy inputs is larger."""
    with plain_errors(debug), as_file(files("kpflow_dyn").joinpath("data", DEMO)) as checkpoint:
        source = Network(checkpoint, model="gru", task=DEMO_TASK, trials=trials, dtype=dtype)
        asked = {"k": modes, "samples": samples, "all_steps": all_steps, "optimizer": optimizer, "lr": lr}
        _run(source, seed, asked, threads, Output(out, overwrite or _is_demo(out), verbose, dry_run))


def _is_demo(folder: Path) -> bool:
    """Whether an earlier demo wrote this folder, so that another one may replace it."""
    try:
        settings = json.loads((folder / "results.json").read_text("utf-8"))["settings"]
        return (settings["checkpoint"], settings["task"]) == (DEMO, DEMO_TASK)
    except (OSError, ValueError, KeyError, TypeError):
        return False


EXAMPLES = {
    track: "kpflow-dyn track runs/1 --task memorypro",
    compare: "kpflow-dyn compare before.pt after.pt --task memorypro",
    report: "kpflow-dyn report runs/gains --open",
    sweep: "kpflow-dyn sweep gains.toml --workers 4",
    doctor: "kpflow-dyn doctor --json",
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


@dataclass(frozen=True)
class Output:
    """Where results go, and what is said."""

    folder: Path
    overwrite: bool
    verbose: bool
    dry_run: bool


def _run(source: Network | str, seed: int, asked: dict[str, Any], threads: int | None, out: Output) -> None:
    given.check_learning(asked.get("loss"), asked["optimizer"], asked["lr"], clip=asked.get("clip"))
    check_folder(out.folder, {*FILE_NAMES, *LEARNING_NAMES, PAGE}, out.overwrite)
    begin = time.perf_counter()
    with stages() as progress, warnings.catch_warnings(record=True) as of_flow:
        progress("loading the model and its inputs", 0, None)
        subject = subject_of(source, seed, threads, asked.get("loss"))
        _check_learning(subject, asked)
        work = _work(subject, asked)
        warnings.simplefilter("always")
        progress("running and linearising", 0, None)
        flow = _linearised(subject, work)
        cost = cost_of(flow, work, time.perf_counter() - begin)
    say("", f"{cost}.", 0)
    if out.dry_run:
        return
    with stages() as progress, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dataset = kpflow_dyn.analyze(
            flow, **asked, seed=seed, task=_of_states(subject.task, flow), readout=subject.readout, progress=progress
        )
        warned = [*subject.about.get("warnings", "").splitlines(), *notes([*of_flow, *caught])]
        about = subject.about
        dataset.attrs = about | dataset.attrs | about | {"warnings": "\n".join(warned)}
        found = subject.found | in_analysis(dataset, asked.get("loss"), asked["all_steps"])
        progress("drawing", 0, None)
        contents = _render(dataset, found)
    with new_folder(out.folder) as folder:
        for name, content in contents.items():
            folder.joinpath(name).write_bytes(content)
        dataset.to_netcdf(folder / "results.nc", engine="h5netcdf")
    print_summary(dataset, found, out.verbose)
    print_notes(dataset.attrs["warnings"].splitlines())
    typer.echo(f"The page: {out.folder.absolute() / 'index.html'}")


def _check_learning(subject: Subject, asked: dict[str, Any]) -> None:
    """Raise for options of a training where there is no readout to train."""
    for name in ("loss", "optimizer"):
        if asked.get(name) is not None and subject.readout is None:
            why = subject.about.get("learning", "leave it out")
            raise ValueError(f"--{name} is that of a readout and its targets: {why}")


def _work(subject: Subject, asked: dict[str, Any]) -> Work:
    steps = 0 if asked.get("optimizer") is None else asked.get("steps", 1000)
    return Work(asked["k"], asked["samples"], subject.readout is not None, steps)


def _linearised(subject: Subject, work: Work) -> Flow:
    """The flow, where its analysis fits the memory."""
    from kpflow_dyn._problems.solutions import Solution

    if isinstance(subject.problem, Solution):
        solution = subject.problem
    else:
        check_memory(subject.problem, shape_before(subject.problem), work)
        solution = kpflow_dyn.solve(subject.problem)
    check_memory(solution.problem, tuple(solution.state.shape), work)
    return kpflow_dyn.linearize(solution)


def _of_states(task: TaskData | None, flow: Flow) -> TaskData | None:
    """The task, unless a module has other steps than its inputs; with a mask for them, it cannot do without."""
    if task is None or task.mask is not None or task.inputs.shape[:2] == flow.ntk.domain.shape[:2]:
        return task
    return None


def _render(dataset: xr.Dataset, found: dict[str, Choice]) -> dict[str, bytes]:
    """All files but the NetCDF one, by name."""
    from kpflow_dyn.figures import FIGURES, to_bytes
    from kpflow_dyn.figures._learning import OF_PARTS
    from kpflow_dyn.report import page_of

    figures = FIGURES | (OF_PARTS if "part" in dataset.dims else {})
    return {
        **{f"{name}.png": to_bytes(draw(dataset)) for name, draw in figures.items()},
        "index.html": page_of(dataset).to_html().encode(),
        "results.json": _to_json(dataset, found).encode(),
    }


def _to_json(dataset: xr.Dataset, found: dict[str, Choice]) -> str:
    from kpflow_dyn.report import settings, summarize, versions
    from kpflow_dyn.report._learning_charts import as_records, steps_as_records

    content = {
        "found": found,
        "learning": as_records(dataset),
        "optimizer": steps_as_records(dataset),
        "numbers": summarize(dataset),
        "settings": settings(dataset),
        "versions": versions(dataset),
        "warnings": dataset.attrs["warnings"].splitlines(),
    }
    return as_json(content)
