"""Losses of a model's states that bring parameters of their own, in either framework."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpflow_dyn.arrays import Array, is_torch_array, like_numpy, to_numpy


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

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> loss = kp.squared_error(torch.zeros(2, 5, 1), torch.nn.Linear(8, 1))
        >>> [name for name, _ in loss.named_parameters()], loss(torch.zeros(2, 5, 8)).shape
        (['weight', 'bias'], torch.Size([]))
    """
    weights = np.ones((1,) * target.ndim) if mask is None else to_numpy(mask).astype(float)
    weights = weights[..., None] if weights.ndim == target.ndim - 1 else weights
    try:
        weights = np.broadcast_to(weights, target.shape)
    except ValueError as error:
        raise ValueError(
            f"the mask has shape {weights.shape}, expected to broadcast to {tuple(target.shape)}"
        ) from error
    if not (weights >= 0).all() or not weights.any():
        raise ValueError("the mask must be >= 0, and positive somewhere")
    if is_torch_array(target):
        from kpflow_dyn.torch_backend.losses import SquaredError
    else:
        from kpflow_dyn.jax_backend.losses import SquaredError
    make: Any = SquaredError
    weight, bias = (getattr(readout, name, None) for name in ("weight", "bias"))
    return make(target, like_numpy(weights / weights.sum(), target), weight, bias, learn)


def weighted_squares(state: Array, loss: Any) -> Array:
    """What such a loss gives."""
    y = state
    if loss.weight is not None:
        y = y @ loss.weight.T
    if loss.bias is not None:
        y = y + loss.bias
    return (loss.weights * (y - loss.target) ** 2).sum()
