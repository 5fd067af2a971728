"""Plants in discrete time under a policy, as torch modules; see `kpflow_dyn.models.ClosedLoop`."""

from typing import Any

from torch import Tensor, nn

from kpflow_dyn.models import _discrete as discrete
from kpflow_dyn.models._torch_models import with_buffers


class DiscreteLoop(nn.Module):
    """What `kpflow_dyn.models.ClosedLoop` returns for a torch policy where the plant has a `step`."""

    def __init__(self, plant: Any, policy: nn.Module, readout: nn.Module | None = None) -> None:
        super().__init__()
        self.plant = with_buffers(plant) if isinstance(plant, nn.Module) else plant
        self.policy, self.readout = policy, readout

    def forward(self, x_t: Tensor, z: Tensor) -> Tensor:
        """The next state [trial, state + memory]."""
        return discrete.advance(self.plant, self.policy, self.readout, z, x_t)

    def controls(self, x: Tensor, z: Tensor) -> Tensor:
        """u [row, control] of inputs [row, input] and states before the step [row, state + memory]."""
        return discrete.control_of(self.plant, self.policy, self.readout, z, x)[1]

    def extra_repr(self) -> str:
        """The plant, where it is not a module and so printed anyway."""
        return "" if isinstance(self.plant, nn.Module) else f"plant={self.plant}"
