"""Training on a task: one plain loop, for examples, sweeps and tests."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array
from kpflow_dyn._backend import BACKENDS, backend_of
from kpflow_dyn._learning.descent import optimizer_of
from kpflow_dyn._learning.losses import Loss, OutputLoss, default_loss, loss_of_targets
from kpflow_dyn._learning.options import check_seed, is_number, plain
from kpflow_dyn._problems.starts import StartWarning
from kpflow_dyn._problems.units import units_read
from kpflow_dyn._progress import bars
from kpflow_dyn._shown import Row, Shown, described, number, type_name
from kpflow_dyn.tasks._data import TaskData, check_count

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Training", "fit"]

Gradient = Callable[[Any, Any, Array, Any, OutputLoss], Mapping[str, Array]]
"""(model, readout, inputs, numbers of the trials, loss of outputs) -> by name what stands for the gradient."""


@dataclass(frozen=True, eq=False, repr=False)
class Training(Shown):
    """What a training came to.

    Attributes:
        model, readout: as trained; in torch those that were given, changed in place.
        losses: [step], losses[n] being the loss after n steps, on the trials of the next one; the last is the loss of
            the model as trained.
        success: False where the loss left the finite numbers.
        accuracy: [step], of the same outputs as the losses; None where these are no logits of classes.

    Example as `fit`.
    """

    model: Any
    readout: Any
    losses: np.ndarray
    success: bool
    accuracy: np.ndarray | None = None

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [("model", described(self.model)), ("readout", described(self.readout))]
        rows += [("loss", f"{number(self.losses[0])} to {number(self.losses[-1])}")]
        rows += [] if self.accuracy is None else [("accuracy", f"{self.accuracy[0]:.0%} to {self.accuracy[-1]:.0%}")]
        rows += [] if self.success else [("success", "no: the loss left the finite numbers")]
        return f"Training of {len(self.losses) - 1} steps", rows

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `losses`, and of `accuracy` where there are classes [step]."""
        import xarray as xr

        curves = {"losses": self.losses} | ({} if self.accuracy is None else {"accuracy": self.accuracy})
        data = {name: ("step", values) for name, values in curves.items()}
        return xr.Dataset(data, {"step": np.arange(len(self.losses))}, {"success": int(self.success)})

    def steps_to(self, fraction: float) -> int | None:
        """The number of steps after which the loss was first at most this fraction of what it was; None if never."""
        if not (is_number(fraction) and 0 < fraction < 1):
            raise ValueError(f"fraction must be one number between 0 and 1, got {fraction}")
        reached = np.flatnonzero(self.losses <= fraction * self.losses[0])
        return int(reached[0]) if len(reached) else None


def fit(
    model: Any,
    task: TaskData,
    readout: Any,
    *,
    steps: int = 1000,
    lr: float = 1e-3,
    optimizer: str | Callable[..., Any] = "adam",
    clip: float | None = None,
    stop_below: float | None = None,
    batch: int | None = None,
    loss: Loss | None = None,
    record: Callable[..., Any] | None = None,
    z0: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Training:
    """Train a recurrent model and a readout of its states on the trials of a task.

        z_t = cell(x_t, z_{t-1})    y = readout(z)    loss = sum m (y - y*)^2 / sum m, or another one of y and y*

    Args:
        model: a cell as for `DiscreteProblem`: torch's nn.RNN, nn.GRU or nn.LSTM, one of their Cells or another
            nn.Module called as cell(x_t, z); in JAX an equinox cell or another callable pytree, called on one trial. A
            torch model is trained in place; a JAX one is left as it is, `Training.model` being the new one.
        task: trials with targets, `task.sample(trials, seed)` or `make_task(...)`; they take the model's dtype.
        readout: nn.Linear or eqx.nn.Linear, whose weights learn too. It reads the whole state, or where that is wider
            than the readout (of an LSTM, or of several layers) the h of the last layer.
        steps: how many steps at most.
        lr: the learning rate.
        optimizer: "adam", "sgd", or what makes another one: in torch a class called as optimizer(parameters, lr=lr), in
            JAX a function of optax called as optimizer(lr).
        clip: scales the gradient down to this norm, over all parameters, where it is larger.
        stop_below: stop once the loss is below this.
        batch: how many trials a step sees, drawn anew for each without repetition; all when None.
        loss: "squared_error"; "cross_entropy" of logits y with probabilities or one-hot targets [trial, time, class],
            or class indices, integers [trial, time], negative ones left out; or a function (y, targets) -> number
            of shape () of the framework, for a task without a mask. By default the cross-entropy where targets are
            class indices, else the squared error.
        record: called as record(n, model, loss, readout=readout) with the model after n steps, for n = 0, 1, ...: a
            `Recorder`, or a function of your own.
        z0: the state before the first step, as in `DiscreteProblem`.
        seed: for the draws of trials.
        progress: show a bar on a terminal.

    Raises:
        TypeError, ValueError: a model, readout, task or option that does not fit; each says what to do.

    Warns:
        StartWarning: a z0 of torch that carries a gradient, which does not learn.
        UserWarning: a loss that leaves the finite numbers, which ends the training with `success=False`.
    Source: Kingma, Ba, "Adam", arXiv:1412.6980.

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> task = kp.tasks.FlipFlop(bits=1).sample(trials=16, seed=0)
    >>> training = kp.train.fit(torch.nn.GRU(1, 8), task, torch.nn.Linear(8, 1), steps=50, lr=0.01)
    >>> len(training.losses), bool(training.losses[-1] < training.losses[0])
    (51, True)
    """
    return trained(
        model,
        task,
        readout,
        steps=steps,
        lr=lr,
        optimizer=optimizer,
        clip=clip,
        stop_below=stop_below,
        batch=batch,
        loss=loss,
        record=record,
        z0=z0,
        seed=seed,
        progress=progress,
    )


def trained(
    model: Any,
    task: TaskData,
    readout: Any,
    *,
    steps: int,
    lr: float,
    optimizer: str | Callable[..., Any] = "sgd",
    clip: float | None = None,
    stop_below: float | None = None,
    batch: int | None = None,
    loss: Loss | None = None,
    record: Callable[..., Any] | None = None,
    z0: Any = None,
    seed: int = 0,
    progress: bool = False,
    gradient: Gradient | None = None,
) -> Training:
    """`fit`, where `gradient` gives what stands in the place of the gradient of the model's parameters."""
    of_outputs = _loss(task, loss, readout)
    _check_start(model, z0)
    lr, clip = plain(lr), plain(clip)
    _check_options(steps, lr, clip, seed)
    trainee = _trainee(model, readout, task.inputs, of_outputs, z0, optimizer, lr, clip)
    drawn, losses, hits = _draws(len(task.inputs), batch, seed), [], []
    with bars(progress) as shown:
        bar = shown.add_task("training", total=steps)
        for step in range(steps + 1):
            trials = next(drawn)
            losses.append(now := trainee.evaluate(trials))
            if of_outputs.of_classes:
                hits.append(of_outputs.on(trials).accuracy(trainee.output))
            shown.update(bar, completed=step, description=f"training, loss {now:.3g}")
            if record is not None:
                record(step, trainee.model, now, readout=trainee.readout)
            if step == steps or not math.isfinite(now) or (stop_below is not None and now < stop_below):
                break
            if gradient is not None:
                x, target, mask = trainee.rows(trials)
                of_batch = replace(of_outputs, target=target, mask=mask)
                trainee.follow(gradient(trainee.model, trainee.readout, x, trials, of_batch))
            trainee.step()
    right = np.array(hits) if hits else None
    return Training(trainee.model, trainee.readout, np.array(losses), _converged(losses), right)


def _check_start(model: Any, z0: Any) -> None:
    if (backend := backend_of(model)) is not None and backend.models.carries_gradient(z0):
        warnings.warn(
            StartWarning("z0 carries a gradient, and fit trains the model and the readout alone; pass z0.detach()"),
            stacklevel=4,
        )


def _loss(task: TaskData, loss: Loss | None, readout: Any) -> OutputLoss:
    """That of the task's targets where its mask is on."""
    if not isinstance(task, TaskData):
        hint = "; pass task.sample(trials, seed)" if hasattr(task, "sample") else ""
        raise TypeError(f"task is {type_name(task)}, expected a TaskData{hint}")
    if task.targets is None:
        raise ValueError(f"the task {task.name} has no targets to be trained on")
    _check_counted(task.mask)
    outputs = len(getattr(readout, "weight", (0,)))
    chosen = loss or default_loss(task.targets, (*task.inputs.shape[:2], outputs))
    found = loss_of_targets(chosen, task.targets, task.mask, axes=3)
    _check_counted(found.mask)
    return found


def _check_counted(mask: np.ndarray | None) -> None:
    if mask is not None and not (on := mask.reshape((len(mask), -1)).any(axis=1)).all():
        raise ValueError(f"no target of trial {int(np.argmin(on))} counts: masked, or of negative class; leave it out")


def _check_options(steps: int, lr: float, clip: float | None, seed: int) -> None:
    check_count("steps", steps, 1)
    check_seed(seed)
    for name, value in {"lr": lr, "clip": clip}.items():
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise ValueError(f"{name} must be a positive number, got {value}")


def _trainee(
    model: Any, readout: Any, inputs: np.ndarray, loss: OutputLoss, z0: Any, optimizer: Any, lr: float, clip: Any
) -> Any:
    backend, other = (backend_of(part) or BACKENDS["jax"] for part in (model, readout))  # JAX says what is amiss
    if backend is not other:
        raise TypeError(
            f"the model is {type_name(model)} and the readout {type_name(readout)}; both must be torch modules "
            "(nn.Linear), or both of JAX (eqx.nn.Linear)"
        )
    if not (callable(optimizer) or isinstance(optimizer, str)):
        raise TypeError(f"optimizer is {optimizer!r}, expected a name, or what makes one")
    make = optimizer_of(backend, optimizer, lr, clip)
    read = partial(units_read, model, readout)
    data = (inputs, loss.target, np.ones(len(inputs)) if loss.mask is None else loss.mask)
    return backend.training.Trainee(model, readout, data, z0, make, lr, clip, read, loss.function)


def _draws(trials: int, batch: int | None, seed: int) -> Iterator[np.ndarray | slice]:
    """The numbers of the trials that each step sees."""
    if batch is None:
        while True:
            yield slice(None)
    check_count("batch", batch, 1)
    if batch > trials:
        raise ValueError(f"batch is {batch}, but the task has {trials} trials")
    rng = np.random.default_rng(seed)
    while True:
        yield rng.choice(trials, batch, replace=False)


def _converged(losses: list[float]) -> bool:
    finite = math.isfinite(losses[-1])
    if not finite:
        warnings.warn(
            f"the loss was {losses[-1]} after {len(losses) - 1} steps; take a smaller lr, or clip", stacklevel=4
        )
    return finite
