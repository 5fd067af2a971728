"""The commands on several checkpoints: `kpflow-dyn track` and `kpflow-dyn compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kpflow_dyn._folder import check_folder, new_folder, replaced
from kpflow_dyn._progress import stages
from kpflow_dyn.cli import _options as given
from kpflow_dyn.cli._sources import Network, as_found, limit_threads, load, posed, readout_of
from kpflow_dyn.cli._terminal import noted, plain_errors

if TYPE_CHECKING:
    from kpflow_dyn._flows.flow import Flow, Output
    from kpflow_dyn.tasks import TaskData

COMPARISON_FILES = {"comparison.png", "comparison.txt"}


def track(
    run_dir: Annotated[Path, typer.Argument(help="The folder of a Recorder, of checkpoints along a training.")],
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
    loss: given.LossOfTask = None,
    threads: given.Threads = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; by default RUN_DIR/track. What is known there is kept.")
    ] = None,
    debug: given.Debug = False,
) -> None:
    """Follow the operators of a network over its training; write track.nc and figures."""
    with plain_errors(debug), noted():
        limit_threads(threads)
        out = run_dir / "track" if out is None else out
        source = Network(run_dir, model, task, prefix, readout, nonlinearity, trials, key=key, alpha=alpha)
        source = dataclasses.replace(source, task_options=given.task_options(task_option))
        dataset = _tracked(source, seed, samples, loss, all_steps, out)
        with replaced(out / "track.nc") as path:
            dataset.to_netcdf(path, engine="h5netcdf")
        _draw_track(dataset, out)
        typer.echo("\n".join([_table(dataset), *([dataset.attrs["steps"]] if "steps" in dataset.attrs else [])]))
        typer.echo(f"The figures: {out.absolute()}")


def compare(
    a: Annotated[Path, typer.Argument(help="A checkpoint, as `analyze` takes it.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    task: given.OnTask,
    task_option: given.TaskOption = None,
    model: given.Model = None,
    model_b: Annotated[str | None, typer.Option(help="Where B is another kind of network.")] = None,
    key: given.Key = None,
    prefix: given.Prefix = None,
    readout: given.Readout = None,
    nonlinearity: given.Nonlinearity = None,
    alpha: given.Alpha = None,
    trials: given.Trials = None,
    seed: given.Seed = 0,
    modes: Annotated[int, typer.Option(help="Leading modes of the NTKs to compare.", min=1)] = 8,
    samples: given.Samples = 120,
    all_steps: given.AllSteps = False,
    carry_state: given.CarryState = False,
    loss: given.LossOfTask = None,
    dtype: given.Dtype = None,
    threads: given.Threads = None,
    out: given.Out = Path("kpflow-comparison"),
    overwrite: given.Overwrite = False,
    debug: given.Debug = False,
) -> None:
    """Compare how two networks can learn on the same trials: alignments of their operators, angles of their modes.

    Where both have a readout and the task has targets, it is how the loss trains them, beside loss and accuracy now.
    """
    import kpflow_dyn as kp

    with plain_errors(debug), noted():
        limit_threads(threads)
        check_folder(out, COMPARISON_FILES, overwrite)
        first = Network(a, model, task, prefix, readout, nonlinearity, trials, dtype, key, alpha)
        first = dataclasses.replace(first, task_options=given.task_options(task_option), carry_state=carry_state)
        second = dataclasses.replace(first, checkpoint=b, model=model_b or model)
        with stages() as progress:
            progress("running and linearising", 0, None)
            one, other = (_linearised(source, seed, all_steps) for source in (first, second))
            flows, asked, note = _under_loss(one, other, loss)
            progress("comparing", 0, None)
            found = kp.compare(*flows, k=modes, samples=samples, seed=seed, **asked)
        with new_folder(out) as folder:
            found.plot().savefig(folder / "comparison.png")
            said = "\n".join([str(found), note, *one.on_file, *other.on_file, *one.on_steps])
            (folder / "comparison.txt").write_text(f"{a} and {b} on {task}\n{said}\n")
        typer.echo(said)
        typer.echo(f"The figure: {out.absolute() / 'comparison.png'}")


@dataclasses.dataclass(frozen=True, eq=False)
class Linearised:
    """A network on a task: its flow at the steps that count, its readout, or None, and what is to be said of both."""

    flow: Flow
    data: TaskData
    readout: Any
    on_readout: str
    on_steps: list[str]
    on_file: list[str]


def _linearised(source: Network, seed: int, all_steps: bool) -> Linearised:
    import kpflow_dyn as kp
    from kpflow_dyn._flows.places import said_of_targets

    network, data = load(source, seed)
    found = data, *readout_of(network, data, source.readout is not None)
    flow = kp.linearize(kp.solve(posed(network, data, source.carry_state)))
    on_file = as_found(source.checkpoint.name, network.found)
    if data.mask is None or data.mask.all():
        return Linearised(flow, *found, [], on_file)
    mask = data.mask != 0
    on_steps = [said_of_targets(mask, not all_steps)]
    return Linearised(flow if all_steps else flow.where(mask), *found, on_steps, on_file)


def _under_loss(a: Linearised, b: Linearised, loss: str | None) -> tuple[Sequence[Flow | Output], dict[str, Any], str]:
    """What is compared, under which loss, and what is to be said of it: outputs where both networks have a readout."""
    from kpflow_dyn._learning.losses import loss_of_task

    without = [network.on_readout for network in (a, b) if network.readout is None]
    if without and loss is not None:
        raise ValueError(f"--loss is that of a readout and its targets: {without[0]}")
    if without:
        return [a.flow, b.flow], {}, f"On the loss: {without[0]}."
    outputs = [network.flow.output(network.readout, learn=True) for network in (a, b)]
    loss = loss_of_task(a.data, outputs[0].values.shape) if loss is None else loss
    asked = {"target": a.data.targets, "mask": a.data.mask, "loss": loss}
    return outputs, asked, f"The loss is {loss}; {a.on_readout}."


def _tracked(source: Network, seed: int, samples: int, loss: str | None, all_steps: bool, out: Path) -> Any:
    """`kp.track` of checkpoint files, each read as `analyze` reads it."""
    import kpflow_dyn as kp
    from kpflow_dyn._learning.tracking import Settings, recorded, track_checkpoints

    run = kp.Recorder.read(source.checkpoint)
    last, _ = load(dataclasses.replace(source, checkpoint=run.file(run.steps[-1])), seed, loss)
    # The task tells the nonlinearity of a network that has learnt it, and one network has one.
    source = dataclasses.replace(source, nonlinearity=getattr(last.cell, "nonlinearity", None))

    def at(step: int) -> tuple[Any, Any]:
        network, _ = load(dataclasses.replace(source, checkpoint=run.file(step)), seed)
        return network.cell, network.readout

    first, data = load(dataclasses.replace(source, checkpoint=run.file(run.steps[0])), seed)
    known = first.readout is not None and data.targets is not None
    settings = Settings(samples, seed, data.targets if known else None, data.mask, loss, all_steps)
    return track_checkpoints(recorded(run, at), posed(first, data).x, settings, kp.DiscreteProblem, out, True)


def _draw_track(dataset: Any, out: Path) -> None:
    from kpflow_dyn.figures._learning import TRACK

    for name, draw in TRACK.items():
        if name != "target" or "loss" in dataset:
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
