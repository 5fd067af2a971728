"""Errors that name what came, what was expected and what to do, before a wrong number can arise."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from kpflow_dyn._shown import type_name


def is_inexact(tensor: Tensor) -> bool:
    """Whether it has real or complex numbers; also of one that has no shape yet."""
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def check_module(cell: object, x: Tensor, what: str = "cell") -> nn.Module:
    """Raise unless the cell is an nn.Module in a state that can be analysed, on the dtype and device of x."""
    if not isinstance(cell, nn.Module):
        raise TypeError(
            f"{what} is {type_name(cell)}, expected an nn.Module: a plain function does not name its parameters"
        )
    for name, tensor in cell.named_parameters():
        if is_lazy(tensor):
            raise ValueError(f"parameter {name} has no shape yet; call the model once before it is analysed")
        if tensor.dtype.to_real() != x.dtype.to_real():
            raise TypeError(f"parameter {name} is {tensor.dtype} but x is {x.dtype}; use cell.to(x.dtype) or x.to(...)")
        if tensor.device != x.device:
            raise ValueError(f"parameter {name} lies on {tensor.device} but x on {x.device}; move one with .to(device)")
        if tensor.is_inference():
            raise ValueError(
                f"parameter {name} was made in torch.inference_mode(), so it has no gradients; make it outside"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"parameter {name} holds NaN or inf; load a healthy checkpoint")
    for name, module in cell.named_modules():
        _check_dropout(name or f"the {what}", module)
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
            f"{name} drops out with p = {rate} in train mode, so its step is random; call .eval() on it first"
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        _check_statistics(name, module)


def _check_statistics(name: str, module: nn.modules.batchnorm._BatchNorm) -> None:
    if module.training:
        raise ValueError(f"{name} is a BatchNorm in train mode, which couples the trials; call .eval() on it first")
    if module.running_mean is None:
        raise ValueError(
            f"{name} is a BatchNorm without running statistics, which couples the trials in eval mode as well; make it "
            "with track_running_stats=True, or take a LayerNorm"
        )
