"""A checkpoint on a task, as the command line names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpflow_dyn._checkpoint import Checkpoint
    from kpflow_dyn._problems.problems import DiscreteProblem
    from kpflow_dyn.tasks import TaskData


@dataclass(frozen=True)
class Network:
    """A checkpoint on a task."""

    checkpoint: Path
    model: str
    task: str
    prefix: str | None = None
    readout: str | None = None
    nonlinearity: str | None = None
    trials: int | None = None
    dtype: str | None = None


def load(source: Network, seed: int) -> tuple[Checkpoint, TaskData]:
    """The network and its task, fitting each other, in the dtype asked for."""
    from kpflow_dyn._arrays.memory import require_machine
    from kpflow_dyn._checkpoint import load_checkpoint
    from kpflow_dyn.tasks import make_task

    if source.dtype not in (None, "float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {source.dtype!r}")
    if not source.checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint file {source.checkpoint}")
    data = make_task(source.task, trials=source.trials, seed=seed)
    named = source.prefix, source.readout, source.nonlinearity
    network = load_checkpoint(source.checkpoint, source.model, *named, data.fits)
    width, channels = network.cell.input_size, data.inputs.shape[2]
    if width != channels:
        raise ValueError(
            f"{source.checkpoint} takes {width} inputs, but the task {data.name} gives {channels}; choose the task "
            "that the network was trained on, or give its inputs as an .npz file"
        )
    trials, times, _channels = data.inputs.shape
    advice = "take fewer trials, or shorter ones"
    require_machine(4 * trials * times * network.cell.hidden_size, f"states of {trials} trials", advice)
    if source.dtype is not None:
        network.cell.double() if source.dtype == "float64" else network.cell.float()
    return network, data


def posed(network: Checkpoint, data: TaskData) -> DiscreteProblem:
    """The network on the inputs of the task, in its own dtype."""
    from kpflow_dyn._arrays import like_numpy
    from kpflow_dyn._problems.problems import DiscreteProblem

    return DiscreteProblem(network.cell, like_numpy(data.inputs, next(network.cell.parameters())))


def readout_of(network: Checkpoint, data: TaskData, asked: bool) -> tuple[Any, str]:
    """The readout that learns the task, and which one it is, or None and why there is none.

    Raises:
        ValueError: it was asked for, and does not fit the task.
    """
    if problem := _why_not(network, data):
        if asked:
            raise ValueError(f"{problem}; choose another layer with --readout")
        return None, f"nothing is said, as {problem}"
    layer = network.readout
    assert layer is not None
    shape = f"[{layer.out_features}, {layer.in_features}]"
    return layer, f"the layer {network.readout_name!r} {shape} is taken as the readout; --readout names another"


def _why_not(network: Checkpoint, data: TaskData) -> str:
    """Why there is no readout for this task; "" where there is."""
    cell, layer = network.cell, network.readout
    if data.targets is None:
        return f"the task {data.name} has no targets"
    if layer is None:
        return f"the checkpoint has no single layer [{data.expected_outputs}, {cell.hidden_size}]"
    if not data.fits(layer.out_features):
        had = f"has {layer.out_features} outputs, and the task {data.expected_outputs}"
        return f"the readout {network.readout_name!r} {had}"
    return ""


def limit_threads(threads: int | None) -> None:
    """Let torch use so many threads; None leaves it its own choice."""
    if threads is not None:
        from kpflow_dyn._backend import BACKENDS

        BACKENDS["torch"].runtime.limit_threads(threads)
