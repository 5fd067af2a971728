"""Spiking networks: snntorch and norse, whose surrogate gradients are derivatives of the user's choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import norse.torch as norse
import snntorch
import torch
from torch import Tensor, nn

import kpflow_dyn as kp

from ..member import Member

TRIALS, TIMES, INPUTS, UNITS = 2, 6, 3, 6


class Leaky(nn.Module):
    """Spiking neurons behind a layer, as a step of their membrane."""

    hidden_size = UNITS

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer, self.neurons = nn.Linear(INPUTS, UNITS), snntorch.Leaky(beta=0.9, **options)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.neurons(self.layer(x), z)[1]


class Synaptic(nn.Module):
    """The same with currents of synapses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.neurons = nn.Linear(INPUTS, UNITS), snntorch.Synaptic(alpha=0.8, beta=0.9)

    def forward(self, x: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.neurons(self.layer(x), *z)[1:]


class RecurrentLeaky(nn.Module):
    """Neurons that hear each other's spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.neurons = nn.Linear(INPUTS, UNITS), snntorch.RLeaky(beta=0.9, linear_features=UNITS)

    def forward(self, x: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return self.neurons(self.layer(x), *z)


def steps(
    make: Callable[[], nn.Module], parts: int = 1, dtype: Any = torch.float64
) -> Callable[[], kp.DiscreteProblem]:
    """A cell whose state has so many parts."""

    def problem() -> kp.DiscreteProblem:
        x = 2 * torch.randn(TRIALS, TIMES, INPUTS, dtype=dtype)
        start = tuple(torch.zeros(TRIALS, UNITS, dtype=dtype) for _ in range(parts))
        return kp.DiscreteProblem(make().to(dtype), x, start if parts > 1 else None)

    return problem


def over(make: Callable[[], nn.Module], state: str = "0") -> Callable[[], kp.StaticProblem]:
    """A layer of norse on whole sequences, time first, all of them as one trial."""

    def problem() -> kp.StaticProblem:
        x = 5 * torch.randn(TIMES, TRIALS, INPUTS, dtype=torch.float64)
        return kp.StaticProblem(make().double(), x, state=state, axes=("time", "batch", "unit"))

    return problem


class Stepped(nn.Module):
    """A cell of norse, whose state is a named tuple."""

    def __init__(self, cell: nn.Module, kind: type) -> None:
        super().__init__()
        self.cell, self.kind = cell, kind

    def forward(self, x: Tensor, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(self.cell(x, self.kind(*z))[1])


def lsnn() -> nn.Module:
    return Stepped(norse.LSNNRecurrentCell(INPUTS, UNITS), norse.LSNNState)


def lif() -> nn.Module:
    return Stepped(norse.LIFRecurrentCell(INPUTS, UNITS), norse.LIFState)


def stack() -> nn.Module:
    return norse.SequentialState(nn.Linear(INPUTS, UNITS), norse.LIF(), nn.Linear(UNITS, 3), norse.LI())


MEMBERS = [
    Member("snntorch: Leaky", "snntorch", steps(Leaky), Leaky),
    Member("snntorch: Leaky, learnt decay", "snntorch", steps(lambda: Leaky(learn_beta=True)), Leaky),
    Member("snntorch: Synaptic", "snntorch", steps(Synaptic, 2), Synaptic),
    Member("snntorch: RLeaky", "snntorch", steps(RecurrentLeaky, 2, torch.float32), RecurrentLeaky),
    Member("norse: LIFRecurrentCell", "norse", steps(lif, 3), Stepped),
    Member("norse: LSNNRecurrentCell", "norse", steps(lsnn, 4), Stepped),
    Member("norse: LIFRecurrent", "norse", over(lambda: norse.LIFRecurrent(INPUTS, UNITS))),
    Member("norse: SequentialState", "norse", over(stack)),
]
