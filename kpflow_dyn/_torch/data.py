"""Arrays of torch, taken in and checked; see `kpflow_dyn._backend.Data`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kpflow_dyn._torch.checks import check_input as check_inputs

__all__ = ["as_floats", "check_inputs", "is_own"]


def is_own(value: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(value, Tensor)


def as_floats(values: Any, what: str, axes: str) -> Tensor:
    """The tensor itself."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{what} is {type(values).__name__}, expected a torch tensor {axes}")
    return values
