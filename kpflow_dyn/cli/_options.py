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

Trials = Annotated[int | None, of_task(help="How many trials to draw. Default: 32, or all trials of a file.")]
Seed = Annotated[int, of_task(help="The same seed gives the same trials and the same numbers.", min=0)]
Modes = Annotated[int, of_numbers(help="How many leading eigenvalues of K and of the NTK to find.", min=1)]
Samples = Annotated[
    int, of_numbers(help="Random probes for each estimate. More probes make error bars smaller.", min=40)
]
Dtype = Annotated[str | None, of_numbers(help="float32 or float64. Default: as in the checkpoint.")]
Threads = Annotated[
    int | None, of_numbers(help="Threads of torch. Default: its own choice. JAX has no such setting.", min=1)
]
AllSteps = Annotated[
    bool,
    of_task(
        "--all-steps",
        "--include-padding",
        help="Analyse all steps, also those that do not count for the task: padding after the end of a shorter trial, "
        "and steps without a target. The loss never counts them.",
    ),
]
CarryState = Annotated[
    bool,
    of_task(
        "--carry-state",
        help="Run the trials as one session: each trial starts from the state at the end of the trial before. "
        "Default: each trial starts afresh, from the start in the checkpoint or from zeros.",
    ),
]
Out = Annotated[Path, of_output(help="Folder to write.")]
Overwrite = Annotated[bool, of_output("--overwrite", help="Replace the results of an earlier run.")]
Verbose = Annotated[bool, of_output("--verbose", "--all-numbers", help="Print all numbers, not only the main ones.")]
DryRun = Annotated[
    bool, of_output("--dry-run", help="Only say how long it will take and how much memory. Write nothing.")
]
Debug = Annotated[bool, of_output("--debug", envvar="KPFLOW_DYN_DEBUG", help="Show the traceback of an error.")]
Model = Annotated[str | None, of_network(help="rnn, gru, lstm, ctrnn or lowrank. Default: as in the file.")]
OnTask = Annotated[str, of_task(help="The name of a task, neurogym:NAME-v0, or a path that ends in .npz.")]
TaskOption = Annotated[
    list[str] | None,
    of_task(
        "--task-option",
        metavar="NAME=VALUE",
        help="An option of the task, such as memory=20; of a neurogym environment dt=20, sigma=0.5 or "
        "timing.stimulus=500. You can give several.",
        show_default=False,
    ),
]
Key = Annotated[
    str | None, of_network(help='Which entry of the file is the network, if there are several: "model", "ema".')
]
Prefix = Annotated[
    str | None, of_network(help='Take the weights whose names begin like this, such as "rnn." or "lstm_actor."')
]
Readout = Annotated[str | None, of_network(help="The name of the readout layer, if several layers fit.")]
LossOfTask = Annotated[
    str | None,
    of_task(
        help="Loss of the outputs: squared_error or cross_entropy. Default: cross_entropy if the task has classes."
    ),
]
Optimizer = Annotated[
    str | None,
    of_training(
        help="adam, adamw, rmsprop or sgd, with --lr: also say when training by this optimiser halves the loss. It "
        "costs at most 1.1 times --steps gradients on all trials."
    ),
]
Rate = Annotated[float | None, of_training(help="The learning rate of --optimizer.")]
Clip = Annotated[float | None, of_training(help="Clip the gradient to this norm, as in your training.")]
Steps = Annotated[
    int, of_training(help="How many steps of --optimizer at most. It ends at a twentieth of the loss.", min=1)
]
Nonlinearity = Annotated[
    str | None,
    of_network(
        help="tanh or relu, for rnn and ctrnn: their files do not say it. Default: the one with which the network "
        "solves the task, else tanh. The output says which was taken."
    ),
]
Alpha = Annotated[
    float | None, of_network(help="dt / tau of a leaky network, if the file does not say it; 0.1 for PsychRNN.")
]
Module = Annotated[
    str | None,
    of_network(
        help="Your own function, as module:function or file.py:function, that makes the torch module or JAX pytree. "
        "The weights of the file are put into it. This RUNS your code."
    ),
]
State = Annotated[
    str | None,
    of_network(help="With --module: the submodules whose outputs are the state, such as rnn or encoder.0,encoder.1."),
]
Axes = Annotated[
    str | None,
    of_network(help="With --module: the axes of its output. Default for sequences: trial,time,unit."),
]
Inputs = Annotated[
    Path | None,
    of_task(
        "--x",
        help="Instead of --task: a .npy file, or a .npz file with x, of inputs \\[trial, time, channel]. For a module: "
        "\\[trial, ...] as it takes them.",
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
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else inner
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
