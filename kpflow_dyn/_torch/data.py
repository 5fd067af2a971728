"""Arrays of torch, taken in and checked; see `kpflow_dyn._backend.Data`."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kpflow_dyn._arrays import like_numpy
from kpflow_dyn._problems.checks import check_sequence
from kpflow_dyn._problems.inputs import input_row
from kpflow_dyn._shown import type_name
from kpflow_dyn._torch.trees import flattened as flattened


def is_own(value: Any) -> bool:
    """Whether it is a tensor."""
    return isinstance(value, Tensor)


def as_floats(values: Any, what: str, axes: str) -> Tensor:
    """The tensor itself; of one made in inference mode, which autograd refuses, a copy."""
    if not isinstance(values, Tensor):
        advice = f": torch.from_numpy({'...' if ' ' in what else what})" * isinstance(values, np.ndarray)
        raise TypeError(f"{what} is {type_name(values)}, expected a torch tensor {axes}{advice}")
    with torch.inference_mode(False):
        return values.clone() if values.is_inference() else values


as_rows = as_floats


def check_inputs(x: Tensor) -> None:
    """Raise unless they are finite floats [trial, time, input]."""
    check_sequence(x)
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}, expected float32 or float64; use x.float() or x.double()")


def inputs_at(function: Callable[[Tensor], Tensor], times: np.ndarray, like: Tensor) -> Tensor:
    """x(t) [trial, n, input], called once for each time where all trials share their times."""
    rows = like_numpy(np.ascontiguousarray(times), like)
    if (times == times[:1]).all():
        return torch.stack([function(t).expand(len(times), -1) for t in rows[0]], 1)
    return torch.stack([torch.stack([input_row(function(t), i) for t in row]) for i, row in enumerate(rows)])


def increments(function: Callable[..., Tensor], times: np.ndarray, like: Tensor) -> Tensor:
    """What it gives between times that follow each other, [n, ...]."""
    return torch.stack([torch.as_tensor(function(a, b)).to(like) for a, b in pairwise(times.tolist())])
