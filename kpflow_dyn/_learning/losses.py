"""Losses: of outputs y [trial, time, out] for targets, and of a model's states with a readout that learns beside it.

    squared_error    L = sum m (y - y*)^2 / sum m                         over all entries
    cross_entropy    L = sum m (log sum_j exp(y_j) - <p, y>) / sum m      over trials and times, p the target's classes

All that trains, forecasts or reports takes its loss from `output_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy, to_numpy
from kpflow_dyn._backend import Backend, Transforms, Values, backend_for, backend_of
from kpflow_dyn._flows.readout import LAYER
from kpflow_dyn._shown import type_name

IGNORED = -100  # the class that stands for none, as in torch
SUM_TO_ONE = 1e-4  # how far probabilities may sum from one, as those of half precision do

Loss = str | Callable[..., Array]
"""The name of a loss of outputs, or a function (y, target) -> number; without a target, y -> number."""


@dataclass(frozen=True, eq=False)
class OutputLoss:
    """L(y) of outputs, twice differentiable.

    Attributes:
        function: (y, target, mask) -> number of shape (), on all trials or on the same ones of all three.
        target, mask: arrays like the outputs, or class indices, or None; the mask is zero where nothing counts.
        name: "squared_error", "cross_entropy" or "own".
    """

    function: Callable[[Array, Any, Any], Array]
    target: Any
    mask: Any
    name: str

    def __call__(self, y: Array) -> Array:
        """The loss, a number of shape ()."""
        return self.function(y, self.target, self.mask)

    @property
    def quadratic(self) -> bool:
        """Whether the Hessian in y is the same everywhere."""
        return self.name == "squared_error"

    @property
    def of_classes(self) -> bool:
        """Whether the outputs are logits of classes, so that there is an accuracy."""
        return self.name == "cross_entropy"

    def probabilities(self, y: Array) -> Array:
        """The target's classes as probabilities like these outputs; zeros where none counts."""
        if self.target.ndim == y.ndim and tuple(self.target.shape) == tuple(y.shape):
            return self.target
        return _one_hot(self.target.reshape(tuple(y.shape[:-1])), y)

    def on(self, trials: Any) -> OutputLoss:
        """That of some trials alone."""
        target, mask = (array if array is None else array[trials] for array in (self.target, self.mask))
        return replace(self, target=target, mask=mask)

    def accuracy(self, y: Array) -> float:
        """The accuracy of outputs that are logits of classes."""
        return accuracy(y, self.target, self.mask)


def gradient_in(y: Array, loss: Callable[[Array], Array], transforms: Transforms) -> Array:
    """grad_y L."""
    value, pull = transforms.vjp(loss, y)
    return pull(array_namespace(y).ones_like(value))[0]


def output_loss(loss: Loss, target: Any, mask: Any, like: Array) -> OutputLoss:
    """The loss of outputs that these three words of a user stand for.

    Args:
        loss: "squared_error", "cross_entropy", or a function (y, target) -> number; y -> number if there is no target.
        target: as y; of the cross-entropy class indices, integers [trial, time], where negative ones are left out, or
            probabilities as y, which may be one-hot integers. What is masked may be anything.
        mask: m >= 0 [trial, time], for the squared error also as y; all ones when None.
        like: outputs y [trial, time, out], whose library and dtype the loss gets.

    Raises:
        ValueError: an unknown loss, or targets or a mask that do not fit it or the outputs; a function of the user's
            own that gives no finite number of y's library, or comes with a mask.
    """
    found = loss_of_targets(loss, target, mask, like.ndim)
    placed = replace(found, target=_placed(found.target, like), mask=_placed(found.mask, like))
    check_number(placed(like), like)
    return placed


def loss_of_targets(loss: Loss, target: Any, mask: Any, axes: int | None = None) -> OutputLoss:
    """The same before there are outputs, of which only the number of axes may be known: its arrays are of numpy."""
    if callable(loss):
        return _of_function(loss, target, mask)
    check_name(loss)
    if target is None:
        raise ValueError(f"the loss {loss} needs a target; only a function of your own may do without")
    values = to_numpy(target)
    if values.dtype.kind in "biu":
        values = values.astype(float if values.ndim == axes and values.shape[-1] > 1 else int)  # one-hot, or indices
    return OutputLoss(*MAKERS[loss](values, mask), loss)


def check_name(loss: str) -> None:
    """Raise for a name of no loss."""
    if loss not in MAKERS:
        raise ValueError(f"loss is {loss!r}, expected one of {', '.join(MAKERS)}, or a function (y, target) -> number")


def default_loss(target: Any, shape: Sequence[int]) -> str:
    """The loss of targets beside outputs of this shape: that of classes where they are integers for all outputs."""
    values = to_numpy(target)
    for_all = tuple(values.shape) in (tuple(shape[:-1]), (*shape[:-1], 1)) and shape[-1] > 1
    return "cross_entropy" if values.dtype.kind in "biu" and for_all else "squared_error"


def loss_of_task(task: Any, shape: Sequence[int]) -> str:
    """The loss of outputs of this shape that a task is most likely trained with: the cross-entropy of right classes."""
    return "cross_entropy" if "class" in task.labels else default_loss(task.targets, shape)


def squared_error(target: Array, readout: Any = None, mask: Any = None, learn: bool = True) -> Any:
    """L(S) = sum m (y - target)^2 / sum m, with y = S C^T + c or the states themselves: a loss for `gradient_flow`.

    Args:
        target: [trial, time, out], a torch tensor or a jax array, which decides the framework. Where the mask is zero
            it may hold anything, NaN too.
        readout: a Linear layer of torch or equinox, copied; None for a target of the states.
        mask: m >= 0, [trial, time] or as the target; all ones when None.
        learn: whether the readout's weights are parameters of the loss, `weight` and `bias`, or constants.

    Returns:
        An nn.Module, or a callable pytree of JAX.

    Raises:
        ValueError: a mask that does not fit, or is nowhere positive.
    Source: docs/theory.md, "What it predicts".

    >>> import torch, kpflow_dyn as kp
    >>> loss = kp.squared_error(torch.zeros(2, 5, 1), torch.nn.Linear(8, 1))
    >>> [name for name, _ in loss.named_parameters()], loss(torch.zeros(2, 5, 8)).shape
    (['weight', 'bias'], torch.Size([]))
    """
    return _of_targets("squared_error", target, readout, mask, learn)


def cross_entropy(target: Array, readout: Any = None, mask: Any = None, learn: bool = True) -> Any:
    """L(S) = sum m (log sum_j exp(y_j) - <p, y>) / sum m over trials and times: y = S C^T + c are logits of classes.

    Args:
        target: the right class at each trial and time, integers [trial, time], of which negative ones (-100) do not
            count; or probabilities p [trial, time, class], which may be one-hot integers. A torch tensor or a jax
            array, which decides the framework. Where the mask is zero it may hold anything.
        readout: a Linear layer of torch or equinox, copied; None where the states are the logits.
        mask: m >= 0, [trial, time]; all ones when None.
        learn: whether the readout's weights are parameters of the loss, `weight` and `bias`, or constants.

    Returns:
        An nn.Module, or a callable pytree of JAX.

    Raises:
        ValueError: probabilities that do not sum to one, an index that is none of the classes, or a mask that does not
            fit, or is nowhere positive.
    Source: torch.nn.functional.cross_entropy; optax.softmax_cross_entropy.

    >>> import torch, kpflow_dyn as kp
    >>> right = torch.tensor([[2, 0, -100]])
    >>> loss = kp.cross_entropy(right, torch.nn.Linear(8, 3))
    >>> round(kp.cross_entropy(right)(torch.zeros(1, 3, 3)).item(), 4)  # log 3, of three equal logits
    1.0986
    """
    return _of_targets("cross_entropy", target, readout, mask, learn)


def accuracy(y: Array, target: Any, mask: Any = None) -> float:
    """The part of trials and times whose largest output is the right class's: sum m [arg max y = class] / sum m.

    Args:
        y: outputs [trial, time, class], an array of torch, jax or numpy.
        target: class indices [trial, time] or probabilities [trial, time, class], of which the largest is right; as in
            `cross_entropy`.
        mask: m >= 0, [trial, time]; all ones when None.

    Raises and Source as `cross_entropy`.

    >>> import kpflow_dyn as kp
    >>> kp.accuracy(np.array([[[0.2, 0.1], [0.0, 3.0]]]), np.array([[1, 1]]))
    0.5
    """
    logits = to_numpy(y)
    found = loss_of_targets("cross_entropy", target, mask, logits.ndim)
    found(logits)  # raises where they do not fit
    right = found.target if found.target.shape != logits.shape else found.target.argmax(-1)
    weights = found.mask.reshape(logits.shape[:-1])
    return float((weights * (logits.argmax(-1) == right.reshape(weights.shape))).sum() / weights.sum())


# Targets and masks


def full_mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray:
    """m in the shape of a target, from one that may lack the last axis; ones when None.

    Raises:
        ValueError: one of another shape, with NaN or negative numbers, or zero everywhere.
    """
    if mask is None:
        return np.ones(shape)
    given = to_numpy(mask).astype(float)
    values = given[..., None] if given.ndim == len(shape) - 1 else given
    fits = values.ndim == len(shape) and all(n in (1, full) for n, full in zip(values.shape, shape, strict=True))
    if not fits or not (np.isfinite(values).all() and (values >= 0).all() and values.any()):
        raise ValueError(
            f"the mask has shape {given.shape}, expected numbers >= 0, not all zero, {list(shape)} as the target or "
            "without its last axis"
        )
    return np.broadcast_to(values, shape)


def classes_that_count(target: Any) -> np.ndarray | None:
    """Where class indices are not negative [trial, time]; None where all count, or where these are none.

    Integers [trial, time, 1] may be plain numbers too, so that of these only -100 does not count.
    """
    values = to_numpy(target)
    if values.dtype.kind != "i" or (values.ndim != 2 and values.shape[2:] != (1,)):
        return None
    counts = values.reshape(values.shape[:2]) >= 0
    return None if counts.all() or (values.ndim > 2 and (values[~counts] != IGNORED).any()) else counts


def counted(values: Array, mask: Array) -> Array:
    """Values where the mask is positive, and zeros elsewhere: NaN times zero would be NaN."""
    return array_namespace(values).where(mask > 0, values, array_namespace(values).zeros_like(values))


def check_number(value: Any, like: Array) -> None:
    """Raise unless a loss gave a finite number of shape () in the library of `like`."""
    shape = getattr(value, "shape", None)
    if backend_of(value) is not backend_of(like) or shape is None or tuple(shape) != ():
        got = type_name(value) if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"the loss gave {got}, expected one number of shape (), such as ((y - target) ** 2).mean()")
    if not array_namespace(like).isdtype(value.dtype, "real floating"):
        raise ValueError(f"the loss gave a number of dtype {value.dtype}, expected a real floating one")
    if not math.isfinite(number := float(to_numpy(value))):
        raise ValueError(f"the loss is {number} at the start; look at the targets and the weights")


def _of_squares(target: np.ndarray, mask: Any) -> tuple[Callable[..., Array], np.ndarray, np.ndarray]:
    """The function (y, target, mask), and what it takes."""
    weights = full_mask(mask, target.shape)
    return _mean_of_squares, counted(target.astype(float), weights), weights


def _of_classes(target: np.ndarray, mask: Any) -> tuple[Callable[..., Array], np.ndarray, np.ndarray]:
    """The function (y, target, mask), and what it takes."""
    if target.dtype.kind in "iu":
        column = target.reshape((*target.shape[: -1 if target.shape[-1] == 1 else None], 1))
        weights = full_mask(mask, column.shape).reshape(target.shape)
        _check_negative(target, weights)
        weights = weights * (target >= 0)
        if not weights.any():
            raise ValueError("no target counts: all class indices are negative or masked")
        indices = np.where(weights > 0, target, -1)
        return partial(_mean_of_classes, last=int(indices.max())), indices, weights
    weights = full_mask(mask, (*target.shape[:-1], 1))[..., 0]
    found = counted(target.astype(float), weights[..., None])
    _check_probabilities(found, weights)
    return _mean_of_classes, found, weights


def _check_negative(target: np.ndarray, weights: np.ndarray) -> None:
    """Raise for negative classes [trial, time, 1] that `classes_that_count` would not leave out elsewhere."""
    left_out = (target < 0) & (weights > 0)
    if target.shape[2:] == (1,) and left_out.any() and classes_that_count(target) is None:
        raise ValueError(
            f"class indices {list(target.shape)} hold {target.min()}: to leave such places out, give them as "
            f"[trial, time], or write {IGNORED} for them"
        )


def _check_probabilities(target: np.ndarray, weights: np.ndarray) -> None:
    off = np.abs(target.sum(-1) - 1)[weights > 0].max()
    if not off <= SUM_TO_ONE or target.min() < 0:
        raise ValueError(
            f"probabilities [..., class] must be >= 0 and sum to one at each place that counts; the smallest is "
            f"{target.min():.3g}, and a sum is off by {off:.3g}. Class indices are integers [trial, time], not floats"
        )


MAKERS = {"squared_error": _of_squares, "cross_entropy": _of_classes}


# The numbers


def _mean_of_squares(y: Array, target: Array, mask: Array) -> Array:
    if y.shape != target.shape:
        raise ValueError(
            f"the readout gives {tuple(y.shape)}, expected {tuple(target.shape)} as the targets have; take one with as "
            "many outputs, or for class indices the loss cross_entropy"
        )
    target, mask = (array_namespace(y).asarray(array, dtype=y.dtype) for array in (target, mask))
    return (mask * (y - target) ** 2).sum() / mask.sum()


def _mean_of_classes(y: Array, target: Array, mask: Array, last: int | None = None) -> Array:
    target, xp = _fitting(target, y, last), array_namespace(y)
    p = xp.asarray(target, dtype=y.dtype) if last is None else _one_hot(target, y)
    mask = xp.asarray(mask, dtype=y.dtype)
    z = y - xp.max(y, axis=-1, keepdims=True)
    right = xp.sum(xp.where(p > 0, p * z, xp.zeros_like(z)), axis=-1)  # a logit of -inf is a class that cannot be
    each = xp.sum(p, axis=-1) * xp.log(xp.sum(xp.exp(z), axis=-1)) - right
    return (mask.reshape(each.shape) * each).sum() / mask.sum()


def _one_hot(classes: Array, y: Array) -> Array:
    xp = array_namespace(y)
    return xp.asarray(classes[..., None] == xp.arange(y.shape[-1], device=device(y)), dtype=y.dtype)


def softmax(y: Array) -> Array:
    """The probabilities of logits."""
    xp = array_namespace(y)
    powers = xp.exp(y - xp.max(y, axis=-1, keepdims=True))
    return powers / xp.sum(powers, axis=-1, keepdims=True)


def _fitting(target: Array, y: Array, last: int | None) -> Array:
    """Probabilities, or class indices up to the last one without an axis of their own; raise where they do not fit."""
    expected = tuple(y.shape) if last is None else tuple(y.shape[:-1])
    if last is not None and tuple(target.shape) == (*expected, 1):
        target = target[..., 0]
    if tuple(target.shape) != expected:
        raise ValueError(
            f"the target has shape {tuple(target.shape)} beside outputs {tuple(y.shape)}, expected class indices, "
            f"integers {list(y.shape[:-1])}, or probabilities {list(y.shape)}, which sum to one"
        )
    if last is not None and last >= y.shape[-1]:
        raise ValueError(f"a target is class {last}, expected 0 to {y.shape[-1] - 1}, as there are so many outputs")
    return target


def _of_function(loss: Callable[..., Array], target: Any, mask: Any) -> OutputLoss:
    if mask is not None and not _says_what_classes_say(mask, target):
        raise ValueError("a mask does not reach into a loss of your own; leave out inside of it what does not count")

    def function(y: Array, target: Any, _mask: Any) -> Array:
        return loss(y) if target is None else loss(y, target)

    return OutputLoss(function, target, None, "own")


def _says_what_classes_say(mask: Any, target: Any) -> bool:
    """Whether a mask leaves out the negative classes alone, which a function sees in its targets."""
    counts = None if target is None else classes_that_count(target)
    return counts is not None and np.array_equal(counts, to_numpy(mask))


def _placed(values: Any, like: Array) -> Any:
    """Floats of numpy as an array like this one, integers as integers; what is none of numpy's stays as it is."""
    if not isinstance(values, np.ndarray):
        return values
    if values.dtype.kind == "f" and array_namespace(like).isdtype(like.dtype, "real floating"):
        return like_numpy(np.array(values), like)
    return array_namespace(like).asarray(np.array(values), device=device(like))


# Losses of states


def _of_targets(name: str, target: Array, readout: Any, mask: Any, learn: bool) -> Any:
    if callable(target):
        raise TypeError(
            f"the target comes first, then the readout: kp.{name}(target, readout); got {type_name(target)}"
        )
    backend = backend_for(target, "target", "[trial, time, out]")
    return loss_of_states(_readings(name, target, mask), backend, readout, LAYER if learn else ())


@dataclass(frozen=True, eq=False)
class Readings:
    """The losses of integers, which are class indices or one-hot, by the number of axes of the outputs."""

    by_axes: dict[int, OutputLoss]

    @property
    def of_classes(self) -> bool:
        """As of each."""
        return next(iter(self.by_axes.values())).of_classes

    def __call__(self, y: Array) -> Array:
        """The loss; where no reading has as many axes, the first one says what is wrong."""
        return self.by_axes.get(y.ndim, next(iter(self.by_axes.values())))(y)

    def on(self, trials: Any) -> Readings:
        """Those of some trials alone."""
        return Readings({axes: loss.on(trials) for axes, loss in self.by_axes.items()})


def _readings(name: str, target: Array, mask: Any) -> OutputLoss | Readings:
    """The loss for targets beside outputs that are not known yet."""

    def of(axes: int) -> OutputLoss:
        found = loss_of_targets(name, target, mask, axes)
        return replace(found, target=_placed(found.target, target), mask=_placed(found.mask, target))

    values, found, errors = to_numpy(target), {}, []
    if values.dtype.kind not in "biu":
        return of(values.ndim)
    for axes in (values.ndim + 1, values.ndim):
        try:
            found[axes] = of(axes)
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[values.ndim > 2]
    return Readings(found)


def loss_of_states(loss: OutputLoss | Readings, backend: Backend, readout: Any, learnt: Sequence[str]) -> Any:
    """L(S C^T + c), a module or pytree with the readout's weight and bias, if any, as parameters or constants."""
    linear = {name: value for name in LAYER if (value := getattr(readout, name, None)) is not None}
    parts = [{name: value for name, value in linear.items() if (name in learnt) == wanted} for wanted in (True, False)]
    return backend.models.with_arrays(OfStates(loss, not linear), *parts)


@dataclass(frozen=True, eq=False)
class OfStates:
    """The loss of states as a function of the readout's arrays by name; without a readout the states are outputs."""

    loss: OutputLoss | Readings
    direct: bool

    def __call__(self, arrays: Values, state: Array, trials: Any = None) -> Array:
        """The loss, or that of some trials alone."""
        y = state @ arrays["weight"].T if "weight" in arrays else state
        loss = self.loss if trials is None else self.loss.on(trials)
        return loss(y + arrays["bias"] if "bias" in arrays else y)


def has_states_for_logits(loss: Any) -> bool:
    """Whether this loss, of `loss_of_states` or of the user's own, is a cross-entropy of the states themselves."""
    of_states = getattr(loss, "function", None)
    return isinstance(of_states, OfStates) and of_states.direct and of_states.loss.of_classes
