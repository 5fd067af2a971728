"""Options that commands share."""

import ast
import json
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

of_network, of_task, of_numbers, of_training, of_output = (
    partial(typer.Option, rich_help_panel=panel)
    for panel in ("Network", "Task and trials", "Numbers", "Training by an optimiser", "Output")
)

Trials = Annotated[int | None, of_task(help="Trials to draw; by default 32, and all of those in a file.")]
Seed = Annotated[int, of_task(help="The same seed gives the same trials and the same numbers.", min=0)]
Modes = Annotated[int, of_numbers(help="Leading eigenvalues of K and of the NTK to find.", min=1)]
Samples = Annotated[int, of_numbers(help="Random probes behind each estimate; more make error bars smaller.", min=40)]
Dtype = Annotated[str | None, of_numbers(help="float32 or float64; by default the checkpoint's own.")]
Threads = Annotated[
    int | None, of_numbers(help="Threads of torch; its own choice unless given. JAX has no such setting.", min=1)
]
AllSteps = Annotated[
    bool,
    of_task(
        "--all-steps",
        "--include-padding",
        help="Analyse all steps, also those that do not count for the task: the padding behind the end of a shorter "
        "trial, and steps without a target. The loss and the errors leave them out all the same.",
    ),
]
CarryState = Annotated[
    bool,
    of_task(
        "--carry-state",
        help="Run the trials as one session: each starts from the state at the end of the one before it, padding left "
        "out, and that state counts as given. Unless given, each trial starts afresh: from the start in the "
        "checkpoint, or else from zeros.",
    ),
]
Out = Annotated[Path, of_output(help="Folder to write.")]
Overwrite = Annotated[bool, of_output("--overwrite", help="Replace the results of an earlier run.")]
Verbose = Annotated[bool, of_output("--verbose", "--all-numbers", help="Print all numbers, not the main ones alone.")]
DryRun = Annotated[
    bool, of_output("--dry-run", help="Only say how long it will take, and how much memory; write nothing.")
]
Debug = Annotated[bool, of_output("--debug", envvar="KPFLOW_DYN_DEBUG", help="Show the traceback of an error.")]
Model = Annotated[
    str | None, of_network(help="rnn, gru, lstm, ctrnn or lowrank; by default the one that is in the file.")
]
OnTask = Annotated[str, of_task(help="The name of a task, neurogym:NAME-v0, or a path that ends in .npz.")]
TaskOption = Annotated[
    list[str] | None,
    of_task(
        "--task-option",
        metavar="NAME=VALUE",
        help="An option of the task, as often as you like: a field of a task of kpflow_dyn.tasks (memory=20), or what "
        "the neurogym environment takes (dt=20, sigma=0.5, timing.stimulus=500).",
        show_default=False,
    ),
]
Key = Annotated[str | None, of_network(help='What holds the network in the file, where several do: "model", "ema".')]
Prefix = Annotated[str | None, of_network(help='Before the names of the weights, such as "rnn." or "lstm_actor."')]
Readout = Annotated[str | None, of_network(help="The readout layer's name, where several could be it.")]
LossOfTask = Annotated[
    str | None,
    of_task(help="Of the outputs: squared_error or cross_entropy; by default the latter where the task has classes."),
]
Optimizer = Annotated[
    str | None,
    of_training(
        help="Also say when training by it comes to a half of the loss: adam, adamw, rmsprop or sgd, with --lr. This "
        "costs at most 1.1 times --steps gradients on all trials."
    ),
]
Rate = Annotated[float | None, of_training(help="The learning rate of --optimizer.")]
Clip = Annotated[float | None, of_training(help="The norm down to which it scales the gradient.")]
Steps = Annotated[int, of_training(help="Steps of --optimizer at most; it ends at a twentieth of the loss.", min=1)]
Nonlinearity = Annotated[
    str | None,
    of_network(
        help="tanh or relu, for rnn and ctrnn, whose files do not say; by default the one with which the network does "
        "the task, or else tanh. The output says which was taken, and why."
    ),
]
Alpha = Annotated[
    float | None, of_network(help="dt / tau of a leaky network whose file does not say; 0.1 for PsychRNN.")
]
Module = Annotated[
    str | None,
    of_network(
        help="module:function or file.py:function of your own, which makes the torch module or JAX pytree that was "
        "saved; it is filled with the weights. This RUNS that code."
    ),
]
State = Annotated[
    str | None,
    of_network(help="With --module: the parts whose outputs are the state, such as rnn or encoder.0,encoder.1."),
]
Axes = Annotated[
    str | None,
    of_network(help="With --module: the axes of what it gives, such as trial,time,unit, the default for sequences."),
]
Inputs = Annotated[
    Path | None,
    of_task(
        "--x",
        help="In the place of --task: inputs by trial, time and channel (of a module by trial and whatever it takes), "
        "in a .npy file, or as x in a .npz file.",
    ),
]


def check_learning(
    loss: str | None, optimizer: str | None = None, lr: float | None = None, clip: float | None = None
) -> None:
    """Raise for a loss or an optimiser that no model would take, before anything is loaded."""
    from kpflow_dyn._analyze import training_of
    from kpflow_dyn._backend import BACKENDS
    from kpflow_dyn._learning.descent import optimizer_of
    from kpflow_dyn._learning.losses import check_name

    if loss is not None:
        check_name(loss)
    if training_of(optimizer, lr=lr, clip=clip) is not None:  # both frameworks have optimisers of the same names
        optimizer_of(BACKENDS["torch" if find_spec("torch") else "jax"], optimizer, lr, clip)


def task_options(given: Sequence[str] | None) -> dict[str, Any] | None:
    """The values of `--task-option`, by name; those of timing.stimulus=500 as {"timing": {"stimulus": 500}}.

    A value is read as JSON or as a value of Python, and else is the text itself.
    """
    options: dict[str, Any] = {}
    for text in given or ():
        names, equals, value = text.partition("=")
        *outer, name = names.strip().split(".")
        if not (equals and all([*outer, name])):
            raise ValueError(f"--task-option is {text!r}, expected NAME=VALUE, such as dt=20 or timing.stimulus=500")
        if names.strip() in ("trials", "seed"):
            raise ValueError(f"--task-option {text}: give it as --{names.strip()}")
        inner = options
        for key in outer:
            inner = inner.setdefault(key, {})
        if not isinstance(inner, dict) or name in inner:
            raise ValueError(f"--task-option {names} is given twice; leave one out")
        inner[name] = _value(value.strip())
    return options or None


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text
