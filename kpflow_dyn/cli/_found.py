"""What an analysis was made of, and how each choice came about: given, read from the file, or guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

    from kpflow_dyn._checkpoint import Checkpoint
    from kpflow_dyn.cli._sources import Network
    from kpflow_dyn.tasks import TaskData

GIVEN, READ, GUESSED = "given", "read", "guessed"
Choice = dict[str, Any]
"""Of one subject: "value", "how" (given, read or guessed), "option", which sets it, and "words" for readers."""


def choice(value: Any, how: str, option: str | None = None, words: str = "") -> Choice:
    """A choice, with the words that tell it where the value does not."""
    return {"value": value, "how": how, "option": option, "words": words or str(value)}


def in_checkpoint(source: Network, network: Checkpoint, data: TaskData | None) -> dict[str, Choice]:
    """What was read of a checkpoint and of its inputs."""
    words = network.found
    found = {"file": choice(words.get("file"), READ, words=f"{source.checkpoint.name} ({words.get('file')})")}
    for subject in ("key", "prefix"):
        if subject in words:
            found[subject] = choice(words[subject], _how(getattr(source, subject), READ), f"--{subject}")
    if source.module is not None:
        found["module"] = choice(source.module, GIVEN, "--module", words["cell"])
    else:
        found |= _of_network(source, network)
    if network.unused:
        found["left out"] = choice(list(network.unused), READ, words=words.get("left out", ""))
    if data is not None:
        found |= _of_task(source, data)
    return found


def _of_network(source: Network, network: Checkpoint) -> dict[str, Choice]:
    words, cell = network.found, network.cell
    dtype = str(next(cell.parameters()).dtype).removeprefix("torch.")
    found = {"model": choice(network.model, _how(source.model, READ), "--model", words["cell"])}
    if said := words.get("nonlinearity"):
        how = READ if "as the file says" in said else _how(source.nonlinearity, GUESSED)
        found["nonlinearity"] = choice(cell.nonlinearity, how, "--nonlinearity", said)
    if said := words.get("leak"):
        alpha = None if cell.alpha is None else float(cell.alpha)
        found["alpha"] = choice(alpha, _how(source.alpha, GUESSED if "assumed" in said else READ), "--alpha", said)
    name = network.readout_name
    size = "" if network.readout is None else _size(network.readout)
    said = "none" if name is None else f"the layer {name!r}{size}"
    found["readout"] = choice(name, _how(source.readout, GUESSED), "--readout", said)
    return found | {
        "start": _start(source, network),
        "dtype": choice(dtype, _how(source.dtype, READ), "--dtype", _on_dtype(dtype, words.get("precision", ""))),
    }


def _start(source: Network, network: Checkpoint) -> Choice:
    if source.carry_state:
        said = "of each trial the state at the end of the one before it"
        return choice("carried", GIVEN, "--carry-state", said)
    if network.start is not None:
        return choice("init_state", READ, "--carry-state", network.found["start"])
    return choice("zeros", GUESSED, "--carry-state", "zeros, in each trial")


def _on_dtype(dtype: str, in_file: str) -> str:
    """The dtype, and that of a file of half precision."""
    return f"{dtype} ({in_file.partition(',')[0]})" if in_file else dtype


def _of_task(source: Network, data: TaskData) -> dict[str, Choice]:
    option = "--x" if source.task is None else "--task"
    found = {"task": choice(data.name, GIVEN, option)}
    if source.task_options:
        found["task options"] = choice(source.task_options, GIVEN, "--task-option")
    own = READ if source.task is None or source.task.endswith(".npz") else GUESSED  # a file holds so many, and no more
    return found | {"trials": choice(len(data.inputs), _how(source.trials, own), "--trials")}


def in_analysis(dataset: xr.Dataset, loss: str | None, all_steps: bool) -> dict[str, Choice]:
    """What `kp.analyze` chose: the loss, and which steps count."""
    found = {}
    if "loss" in dataset.attrs:
        found["loss"] = choice(dataset.attrs["loss"], _how(loss, GUESSED), "--loss")
    if said := dataset.attrs.get("steps"):
        value = "all steps" if all_steps else "steps that count for the task"
        found["mask"] = choice(value, GIVEN if all_steps else READ, "--all-steps", said)
    return found


def _how(given: Any, otherwise: str) -> str:
    return otherwise if given is None else GIVEN


def _size(layer: Any) -> str:
    return f" [{layer.out_features}, {layer.in_features}]" if hasattr(layer, "out_features") else ""
