"""What tests of networks compare with: the Jacobian of the user's own call, and flows that are on the first road."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy


def close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    a, b = to_numpy(a), to_numpy(b)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-300)


def linearized(*args: Any, **options: Any) -> kp.Flow:
    """The flow of a network, which is on the first road."""
    flow = kp.linearize(kp.solve(kp.StaticProblem(*args, **options)))
    assert not flow.untraced
    return flow


def jacobian(net: nn.Module, output: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
    """That of an output of the user's own call, in all parameters [output, p]."""
    values = {name: value.detach() for name, value in net.named_parameters()}

    def of(values: dict[str, Tensor]) -> Tensor:
        return output(lambda *args, **kwargs: functional_call(net, values, args, kwargs))

    found = jacrev(of)(values)
    return torch.cat([found[name].reshape(-1, value.numel()) for name, value in values.items()], 1)
