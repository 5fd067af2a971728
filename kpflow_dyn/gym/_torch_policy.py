"""A policy on a plant's state as a torch module; see `kpflow_dyn.gym.policy`."""

from torch import Tensor, nn

from kpflow_dyn.gym._policies import Head


class Policy(nn.Module):
    """What `kpflow_dyn.gym.policy` returns for a torch network."""

    def __init__(self, net: nn.Module, head: Head) -> None:
        super().__init__()
        self.net, self.head = net, head

    def forward(self, z: Tensor) -> Tensor:
        """u [trial, control]."""
        return self.head.control(self.net(self.head.observation(z)))

    def extra_repr(self) -> str:
        """The environment, and what was found of the network."""
        return f"{self.head.env.name}, {self.head.found}"
