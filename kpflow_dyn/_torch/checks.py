"""Errors that name what came, what was expected and what to do, before a wrong number can arise."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def check_input(x: Tensor) -> None:
    """Raise unless x is a finite floating tensor [trial, time, input] with no empty axis."""
    if x.ndim != 3:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected [trial, time, input]; add the missing axis with x[None]"
        )
    if 0 in x.shape:
        raise ValueError(f"x has shape {tuple(x.shape)} [trial, time, input]: an analysis needs at least one of each")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, expected float32 or float64; use x.float() or x.double()")
    check_finite(x, "x")


def check_finite(values: Tensor, what: str) -> None:
    """Raise for NaN or inf in [trial, time, ...] data, naming the first time and a trial."""
    bad = ~torch.isfinite(values)
    if bad.any():
        time = int(bad.any(2).any(0).nonzero()[0])
        trial = int(bad[:, time].any(1).nonzero()[0])
        raise ValueError(
            f"{what} holds NaN or inf, first at step {time} (trial {trial}); clean the data or look at the weights"
        )


def check_module(cell: object, x: Tensor) -> nn.Module:
    """Raise unless the cell is an nn.Module in a state that can be analysed, on the dtype and device of x."""
    if not isinstance(cell, nn.Module):
        raise TypeError(
            f"cell is {type(cell).__name__}, expected an nn.Module: a plain function does not name its parameters"
        )
    for name, tensor in cell.named_parameters():
        if tensor.is_complex():
            raise TypeError(f"parameter {name} is complex; only real parameters are supported")
        if tensor.dtype != x.dtype:
            raise TypeError(f"parameter {name} is {tensor.dtype} but x is {x.dtype}; use cell.to(x.dtype) or x.to(...)")
        if tensor.device != x.device:
            raise ValueError(f"parameter {name} lies on {tensor.device} but x on {x.device}; move one with .to(device)")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"parameter {name} holds NaN or inf; load a healthy checkpoint")
    for name, module in cell.named_modules():
        _check_dropout(name or "the cell", module)
    return cell


def _check_dropout(name: str, module: nn.Module) -> None:
    layered = isinstance(module, nn.RNNBase) and module.num_layers > 1
    rate = (
        module.dropout
        if layered
        else getattr(module, "p", 0)
        if isinstance(module, nn.modules.dropout._DropoutNd)
        else 0
    )
    if module.training and isinstance(rate, float | int) and rate > 0:
        raise ValueError(
            f"{name} drops out with p = {rate} in train mode, so its step is random; call cell.eval() first"
        )
    if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"{name} is a BatchNorm in train mode, which couples the trials; call cell.eval() first")
