"""Models of torch, traced; see `kpflow_dyn._backend.Tracing`."""

from collections.abc import Callable

from torch import Tensor

from kpflow_dyn._torch.cells import as_called, discrete_step, flat_start
from kpflow_dyn._torch.model import Model
from kpflow_dyn._torch.networks import FixedPoint, FreeForm, Network

__all__ = ["FixedPoint", "FreeForm", "Model", "Network", "ThroughSolver"]
__all__ += ["as_called", "discrete_step", "flat_start", "on_one_trial"]

ThroughSolver = None  # torchdiffeq's own derivative is that of its continuous adjoint, or of steps that are replayed


def on_one_trial(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that takes all trials at once, on one of them; numbers such as a time have no trial axis."""

    def on_one(*arguments: Tensor | None) -> Tensor:
        return function(*(a if a is None or a.ndim == 0 else a[None] for a in arguments))[0]

    return on_one
