"""Losses of a model's states that bring parameters of their own, in either framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, is_torch_array, like_numpy, to_numpy


def squared_error(target: Array, readout: Any = None, mask: Any = None, learn: bool = True) -> Any:
    """L(S) = sum m (y - target)^2 / sum m, with y = S C^T + c or the states themselves: a loss for `gradient_flow`.

    Args:
        target: [trial, time, out], a torch tensor or a jax array, which decides the framework.
        readout: a Linear layer of torch or equinox, copied; None for a target of the states.
        mask: m >= 0, [trial, time] or as the target; all ones when None.
        learn: whether the readout's weights are parameters of the loss, `weight` and `bias`, or constants.

    Returns:
        An nn.Module, or an equinox module.

    Raises:
        ValueError: a mask that does not fit, or is nowhere positive.

    Source: docs/theory.md, "What it predicts".

    Example:
        >>> import torch, kpflow_dyn as kp
        >>> loss = kp.squared_error(torch.zeros(2, 5, 1), torch.nn.Linear(8, 1))
        >>> [name for name, _ in loss.named_parameters()], loss(torch.zeros(2, 5, 8)).shape
        (['weight', 'bias'], torch.Size([]))
    """
    weights = full_mask(mask, tuple(target.shape))
    if is_torch_array(target):
        from kpflow_dyn._torch.losses import SquaredError
    else:
        from kpflow_dyn._jax.losses import SquaredError
    make: Any = SquaredError
    weight, bias = (getattr(readout, name, None) for name in ("weight", "bias"))
    return make(target, like_numpy(weights / weights.sum(), target), weight, bias, learn)


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


def weighted_squares(state: Array, loss: Any) -> Array:
    """What such a loss gives."""
    y = state
    if loss.weight is not None:
        y = y @ loss.weight.T
    if loss.bias is not None:
        y = y + loss.bias
    return (loss.weights * (y - loss.target) ** 2).sum()
