"""A checkpoint on a task, as the command line names them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from kpflow_dyn._checkpoint import Checkpoint
    from kpflow_dyn._problems.problems import DiscreteProblem, StaticProblem
    from kpflow_dyn.tasks import TaskData


FOUND = "found_"
"""Before the names of attributes that say what was found in a file."""


@dataclass(frozen=True)
class Network:
    """A checkpoint and its inputs: on a task, or the array in a file."""

    checkpoint: Path
    model: str | None = None
    task: str | None = None
    prefix: str | None = None
    readout: str | None = None
    nonlinearity: str | None = None
    trials: int | None = None
    dtype: str | None = None
    key: str | None = None
    alpha: float | None = None
    module: str | None = None
    x: Path | None = None
    state: str | None = None
    axes: str | None = None
    task_options: Mapping[str, Any] | None = None
    carry_state: bool | None = None


def load(source: Network, seed: int, loss: str | None = None) -> tuple[Checkpoint, TaskData]:
    """The network and its task, fitting each other, in the dtype asked for."""
    from kpflow_dyn._arrays.memory import require_machine
    from kpflow_dyn._checkpoint import load_checkpoint

    _check(source)
    data = _inputs(source, seed)
    named = source.prefix, source.readout, source.nonlinearity
    asked = {"key": source.key, "alpha": source.alpha, "task": data, "loss": loss}
    network = load_checkpoint(source.checkpoint, source.model, *named, **asked)
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
    return _with_start(network, source), data


def load_module(source: Network, seed: int) -> tuple[Checkpoint, DiscreteProblem | StaticProblem, TaskData | None]:
    """The user's own module, filled; the problem on its inputs; and the task, where there is one."""
    from kpflow_dyn._checkpoint import load_checkpoint
    from kpflow_dyn._checkpoint.modules import cast, problem_of
    from kpflow_dyn._solve import carry_state
    from kpflow_dyn.cli._user_code import module_from

    _check(source)
    for name in ("model", "prefix", "readout", "nonlinearity", "alpha"):
        if getattr(source, name) is not None:
            raise ValueError(f"--{name} is for networks that are found in a file; leave it out with --module")
    data = None if source.task is None else _inputs(source, seed)
    array = _read_inputs(source.x, source.trials) if data is None else data.inputs
    module = module_from(str(source.module))
    network = _with_start(load_checkpoint(source.checkpoint, module, key=source.key), source)
    cell = network.cell if source.dtype is None else cast(network.cell, source.dtype)
    names = [None if given is None else given.replace(" ", "").split(",") for given in (source.state, source.axes)]
    problem = problem_of(cell, array, *names)
    if source.carry_state:
        problem = carry_state(problem, None if data is None else data.mask)  # type: ignore[arg-type]  # it refuses others
    return network, problem, data


def _with_start(network: Checkpoint, source: Network) -> Checkpoint:
    """The network, which says where its trials start if that is not what the file has."""
    carried = {"start": "the end of the trial before"} if source.carry_state else {}
    return replace(network, found={**network.found, **carried})


def attributes_of(network: Checkpoint) -> dict[str, str]:
    """What was found in the file and what was assumed, as attributes of the results."""
    return {f"{FOUND}{subject.replace(' ', '_')}": words for subject, words in network.found.items() if words}


def as_found(file: str, found: Mapping[str, str]) -> list[str]:
    """What was found in a file, as lines."""
    return [f"Found in {file}:", *(f"  {subject}: {words}" for subject, words in found.items() if words)]


def said_of_options(source: Network) -> dict[str, str]:
    """The options of the task, as an attribute of the results; nothing where there are none."""
    return {"task_options": json.dumps(source.task_options)} if source.task_options else {}


def _check(source: Network) -> None:
    if source.dtype not in (None, "float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got {source.dtype!r}")
    if not source.checkpoint.exists():
        raise FileNotFoundError(f"no checkpoint file {source.checkpoint}")
    if source.module is None and (source.state, source.axes) != (None, None):
        raise ValueError("--state and --axes are those of a module of your own; give it with --module")
    if source.trials is not None and source.trials < 1:
        raise ValueError(f"trials must be at least 1, got {source.trials}")
    if source.task is not None and source.x is not None:
        raise ValueError("--task and --x are both inputs; leave one out")
    if source.task is None and source.task_options:
        raise ValueError("--task-option is for the task of --task; leave it out with --x")


def _inputs(source: Network, seed: int) -> TaskData:
    """The trials of the task, or of a file of inputs alone."""
    from kpflow_dyn.tasks import TaskData, make_task

    if source.task is not None:
        return make_task(source.task, trials=source.trials, seed=seed, **(source.task_options or {}))
    return TaskData(_read_inputs(source.x, source.trials).astype(float), name=Path(str(source.x)).stem)


def _read_inputs(path: Path | None, trials: int | None) -> np.ndarray:
    """The array of a .npy file, or `x` or `inputs` of a .npz file, or its only one."""
    from kpflow_dyn._checkpoint.files import read
    from kpflow_dyn._checkpoint.names import named

    assert path is not None  # the command line asked for it, or for a task
    if not path.is_file():
        raise FileNotFoundError(f"no file of inputs {path}")
    arrays = named(read(path).tree, as_torch=False).tensors
    names = [name for name in ("x", "inputs") if name in arrays] or list(arrays)
    if len(names) != 1 or arrays[names[0]].ndim < 2:
        raise ValueError(f"{path} has the arrays {', '.join(arrays) or 'none'}, expected one named x [trial, ...]")
    return arrays[names[0]].numpy()[:trials]


def posed(network: Checkpoint, data: TaskData, carries: bool | None = None) -> DiscreteProblem:
    """The network on the inputs of the task, in its own dtype; with its state carried from trial to trial, or not."""
    from kpflow_dyn._arrays import like_numpy
    from kpflow_dyn._problems.problems import DiscreteProblem
    from kpflow_dyn._solve import carry_state

    like = next(network.cell.parameters())
    start = None if network.start is None else network.start.to(like.dtype)
    problem = DiscreteProblem(network.cell, like_numpy(data.inputs, like), start)
    return carry_state(problem, data.mask) if carries else problem


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
    outputs: Any = getattr(layer, "out_features", None)
    if outputs is None:
        return f"the readout {network.readout_name!r} is a function of the state that is not linear"
    if not data.fits(outputs):
        had = f"has {outputs} outputs, and the task {data.expected_outputs}"
        return f"the readout {network.readout_name!r} {had}"
    return ""


def limit_threads(threads: int | None) -> None:
    """Let torch use so many threads; None leaves it its own choice."""
    if threads is not None:
        from kpflow_dyn._backend import BACKENDS

        BACKENDS["torch"].runtime.limit_threads(threads)
