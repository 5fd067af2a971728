"""Neural differential equations in torch: torchdiffeq, torchdyn, torchcde, torchsde, torchdeq."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchcde
import torchdeq
import torchsde
from torch import Tensor, nn
from torchdiffeq import odeint
from torchdyn.core import NeuralODE
from torchdyn.models import CNF, GNF, HNN
from torchdyn.nn import DepthCat

import kpflow_dyn as kp

from ..member import Member

TRIALS, INPUTS, UNITS = 2, 3, 4
GRID = np.linspace(0, 1, 6)
TIMES = torch.linspace(0, 1, 6, dtype=torch.float64)
TRAJECTORY = ("time", "trial", "unit")
RK4 = {"alg": "rk4"}


def normal(*shape: int) -> Tensor:
    return torch.randn(TRIALS, *shape, dtype=torch.float64)


def mlp(inputs: int = UNITS, outputs: int = UNITS) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def along(make: Callable[[], nn.Module], units: int = UNITS) -> Callable[[], kp.ODEProblem]:
    """An ODE on the grid."""
    return lambda: kp.ODEProblem(make().double(), normal(units), GRID)


def inside(make: Callable[[], nn.Module], state: str = "", units: int = UNITS) -> Callable[[], kp.StaticProblem]:
    """A network of the start that solves its own equation."""
    return lambda: kp.StaticProblem(make().double(), normal(units), state=state, axes=TRAJECTORY)


def of_torchdyn(field: nn.Module) -> nn.Module:
    """The field that torchdyn would integrate."""
    return NeuralODE(field, solver="rk4").vf


class Field(nn.Module):
    """The field of torchdiffeq's own example."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, _t: Tensor, y: Tensor) -> Tensor:
        return self.net(y**3)


class Flowing(nn.Module):
    """A network with torchdiffeq inside."""

    def __init__(self) -> None:
        super().__init__()
        self.field = Field()

    def forward(self, y: Tensor) -> Tensor:
        return odeint(self.field, y, TIMES, method="rk4")


class Controlled(nn.Module):
    """torchcde's example: a neural CDE along a spline through the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.initial, self.field = nn.Linear(INPUTS, UNITS), MatrixField()

    def forward(self, coefficients: Tensor) -> Tensor:
        path = torchcde.CubicSpline(coefficients)
        return torchcde.cdeint(path, self.field, self.initial(path.evaluate(path.interval[0])), path.grid_points,
                               adjoint=False, method="rk4")  # fmt: skip


class MatrixField(nn.Module):
    """z -> a matrix [unit, input]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(UNITS, UNITS * INPUTS)

    def forward(self, _t: Tensor, z: Tensor) -> Tensor:
        return self.net(z).tanh().unflatten(-1, (UNITS, INPUTS))


def controlled() -> kp.StaticProblem:
    samples = normal(6, INPUTS).cumsum(1) / 2
    coefficients = torchcde.hermite_cubic_coefficients_with_backward_differences(samples)
    return kp.StaticProblem(Controlled().double(), coefficients, state="", axes=("trial", "time", "unit"))


class SDE(nn.Module):
    """torchsde's example: a drift and a diffusion."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self) -> None:
        super().__init__()
        self.mu, self.sigma = mlp(), mlp()

    def f(self, _t: Tensor, y: Tensor) -> Tensor:
        return self.mu(y)

    def g(self, _t: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(self.sigma(y))


class Sampled(nn.Module):
    """The solution of an SDE along a Brownian path that is given with each trial."""

    def __init__(self) -> None:
        super().__init__()
        self.sde = SDE()

    def forward(self, y: Tensor, noise: Tensor) -> Tensor:
        path = Given(noise)
        return torchsde.sdeint(self.sde, y, TIMES, bm=path, dt=0.2, method="euler")


class Given(torchsde.BaseBrownian):
    """A Brownian path that is known at the times of the grid."""

    def __init__(self, path: Tensor) -> None:
        super().__init__()
        self.path = path

    def __call__(self, ta: Tensor, tb: Tensor, **_options: Any) -> Tensor:
        first, last = (round(5 * float(t)) for t in (ta, tb))
        return self.path[:, last] - self.path[:, first]

    def __repr__(self) -> str:
        return "Given()"

    dtype = property(lambda self: self.path.dtype)
    device = property(lambda self: self.path.device)
    shape = property(lambda self: self.path[:, 0].shape)
    levy_area_approximation = property(lambda self: "none")


def sampled() -> kp.StaticProblem:
    noise = normal(6, UNITS).cumsum(1) * 0.2**0.5
    return kp.StaticProblem(Sampled().double(), (normal(UNITS), noise), state="", axes=TRAJECTORY)


class Equilibrium(nn.Module):
    """The map of a deep equilibrium model."""

    hidden_size = UNITS

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(UNITS, UNITS), nn.Linear(INPUTS, UNITS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.U(x)) / 2


class Solved(nn.Module):
    """A network that finds its equilibrium with torchdeq, differentiated through its last steps."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.deq = (
            Equilibrium(),
            torchdeq.get_deq(f_solver="fixed_point_iter", f_max_iter=60, f_tol=1e-12, grad=5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.deq(lambda z: self.f(x, z), torch.zeros(len(x), UNITS).to(x))[0][-1]


MEMBERS = [
    Member("torchdiffeq: neural ODE", "torchdiffeq", along(Field), options=RK4),
    Member("torchdiffeq: solved inside of a network", "torchdiffeq", inside(Flowing)),
    Member("torchdyn: neural ODE", "torchdyn", along(lambda: of_torchdyn(mlp())), options=RK4),
    Member(
        "torchdyn: with its depth",
        "torchdyn",
        along(lambda: of_torchdyn(nn.Sequential(DepthCat(1), mlp(UNITS + 1)))),
        options=RK4,
    ),
    Member("torchdyn: Hamiltonian", "torchdyn", along(lambda: of_torchdyn(HNN(mlp(UNITS, 1)))), options=RK4),
    Member("torchdyn: gradient flow", "torchdyn", along(lambda: of_torchdyn(GNF(mlp(UNITS, 1)))), options=RK4),
    Member("torchdyn: normalising flow", "torchdyn", along(lambda: of_torchdyn(CNF(mlp())), UNITS + 1), options=RK4),
    Member("torchdyn: solved inside of a network", "torchdyn", inside(lambda: NeuralODE(mlp(), solver="rk4"), "1")),
    Member("torchcde: neural CDE", "torchcde", controlled),
    Member("torchsde: drift and diffusion", "torchsde", sampled, Given),
    Member("torchdeq: equilibrium", "torchdeq", lambda: kp.FixedPointProblem(Equilibrium().double(), normal(INPUTS))),
    Member(
        "torchdeq: solved inside of a network",
        "torchdeq",
        lambda: kp.StaticProblem(Solved().double(), normal(INPUTS), state=""),
    ),
]
