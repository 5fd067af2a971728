"""Losses of a model's states, and losses that bring parameters of their own."""

from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, to_numpy
from kpflow_dyn._backend import Values, backend_for


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
    weights = full_mask(mask, tuple(target.shape))
    weights = like_numpy(weights / weights.sum(), target)
    constants = {"target": counted(target, weights), "weights": weights}
    linear = {name: value for name in ("weight", "bias") if (value := getattr(readout, name, None)) is not None}
    make = backend_for(target, "target", "[trial, time, out]").models.with_arrays
    return make(_weighted_squares, linear, constants) if learn else make(_weighted_squares, {}, linear | constants)


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


def counted(values: Array, mask: Array) -> Array:
    """Values where the mask is positive, and zeros elsewhere: NaN times zero would be NaN."""
    return array_namespace(values).where(mask > 0, values, array_namespace(values).zeros_like(values))


def _weighted_squares(arrays: Values, state: Array) -> Array:
    y = state @ arrays["weight"].T if "weight" in arrays else state
    y = y + arrays["bias"] if "bias" in arrays else y
    return (arrays["weights"] * (y - arrays["target"]) ** 2).sum()


def mean_squared_error(output: Array, targets: Array, mask: Array) -> Array:
    """sum of m (y - y*)^2 over trials, times and outputs, divided by their number where m = 1.

    Args:
        output: y [trial, time, out].
        targets: y* [trial, time, out], anything where m = 0.
        mask: m [trial, time], ones and zeros.

    Raises:
        ValueError: output and targets of two shapes.
    """
    if output.shape != targets.shape:
        raise ValueError(
            f"the readout gives {tuple(output.shape)} [trial, time, out], expected {tuple(targets.shape)} as the "
            "task's targets have; take a readout of as many outputs"
        )
    mask = mask[..., None]
    return (mask * (output - counted(targets, mask)) ** 2).sum() / (mask.sum() * targets.shape[-1])
