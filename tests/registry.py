"""The models that every identity is tested on, and their dense Jacobians by reverse mode through the real model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kpflow_dyn as kp
from kpflow_dyn._torch.cells import as_step
from kpflow_dyn.models import CTRNNCell, LowRankRNNCell

TRIALS, TIMES, INPUTS, UNITS = 2, 4, 3, 4


class WithHiddenSize(nn.Module):
    """A hand-written cell of four units."""

    hidden_size = UNITS


class Transposed(WithHiddenSize):
    """Weights on the left of a column, the product written as an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(0.5 * torch.randn(UNITS, UNITS))
        self.U = nn.Parameter(torch.randn(UNITS, INPUTS))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh((self.W @ z.T).T + torch.einsum("bi,oi->bo", x, self.U))


class Concatenating(WithHiddenSize):
    """A gate and a candidate over [x, z, learnt constant]."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(INPUTS + UNITS + 2, UNITS)
        self.candidate = nn.Linear(INPUTS + UNITS + 2, UNITS, bias=False)
        self.constant = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        v = torch.cat([x, z, self.constant.expand(len(x), 2)], -1)
        gate = torch.sigmoid(self.gate(v))
        return gate * z + (1 - gate) * torch.tanh(self.candidate(v))


class ComputedWeight(WithHiddenSize):
    """W = m n^T, a softplus time constant and a weight norm: weights that are themselves computed."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.n = nn.Parameter(torch.randn(UNITS, 2)), nn.Parameter(torch.randn(UNITS, 2))
        self.tau = nn.Parameter(torch.randn(UNITS))
        self.U = nn.utils.parametrizations.weight_norm(nn.Linear(INPUTS, UNITS))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        a = 1 / (1 + nn.functional.softplus(self.tau))
        return (1 - a) * z + a * torch.tanh(z @ (self.m @ self.n.T).T / UNITS + self.U(x))


class Tied(WithHiddenSize):
    """One matrix used three times, once turned."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.b = nn.Parameter(0.5 * torch.randn(UNITS, UNITS)), nn.Parameter(torch.randn(UNITS))
        self.U = nn.Linear(INPUTS, UNITS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(z @ self.W.T + self.b) @ self.W.T + self.U(x)) @ self.W


class MeetingTwice(WithHiddenSize):
    """One matrix with a bias, used in two places whose results meet in a sum, and another that meets them there."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(UNITS, UNITS), nn.Linear(INPUTS, UNITS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.W(torch.sin(z)) + self.U(x)) + self.U(x**2)


class TiedModules(WithHiddenSize):
    """Two submodules that share one parameter object."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, UNITS, bias=False)
        self.second.weight = self.first.weight
        self.U = nn.Linear(INPUTS, UNITS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(z) + self.U(x)))


class Normalised(WithHiddenSize):
    """LayerNorm inside the loop: cut at its means it stays elementwise."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.W, self.U = nn.LayerNorm(UNITS), nn.Linear(UNITS, UNITS), nn.Linear(INPUTS, UNITS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.W(self.norm(z)) + self.U(x))


class Attending(WithHiddenSize):
    """Softmax glue, a product of two moving values, and a scale that enters nonlinearly."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.U = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, UNITS), nn.Linear(INPUTS, UNITS)
        self.sharpness = nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        scores = self.q(z)[:, :, None] @ self.k(z)[:, None, :]
        weights = torch.softmax(torch.exp(self.sharpness) * scores, -1)
        return torch.tanh((weights @ z[:, :, None])[..., 0] + self.U(x))


class SharedOverTokens(WithHiddenSize):
    """One small matrix applied to two halves of the state, and a convolution over the units."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(UNITS // 2, UNITS // 2), nn.Linear(INPUTS, UNITS)
        self.convolution = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        halves = self.W(z.reshape(len(z), 2, UNITS // 2)).reshape(len(z), UNITS)
        return torch.tanh(halves + self.convolution(z[:, None])[:, 0] + self.U(x))


class Embedding(WithHiddenSize):
    """Inputs that pick rows of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.W = nn.Embedding(5, UNITS), nn.Linear(UNITS, UNITS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.table(x[:, 0].abs().long().clamp(max=4)))


class Reservoir(WithHiddenSize):
    """A fixed recurrent matrix, a frozen input matrix and a learnt power: only some of it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("W", 0.5 * torch.randn(UNITS, UNITS))
        self.U = nn.Linear(INPUTS, UNITS)
        self.U.weight.requires_grad_(False)
        self.power = nn.Parameter(torch.rand(UNITS) + 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + self.U(x)).abs() ** self.power


class PairState(nn.Module):
    """A cell with a tuple of two states of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = nn.Linear(INPUTS + 3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        fast = torch.tanh(self.fast(torch.cat([x, z[0]], -1)) * z[1].sum(-1, keepdim=True))
        return fast, 0.9 * z[1] + 0.1 * self.slow(fast)


@dataclass(frozen=True)
class Model:
    """A registered cell, with the shape of its state and whether z0 = 0 is the default."""

    make: Callable[[], nn.Module]
    units: int = UNITS
    parts: tuple[int, ...] = ()

    def problem(self, started: bool, dtype: torch.dtype = torch.float64) -> kp.DiscreteProblem:
        """The model on random inputs, from zero or from a random state."""
        torch.manual_seed(7)
        cell = self.make().to(dtype).eval()
        x = torch.randn(TRIALS, TIMES, INPUTS, dtype=dtype)
        z0 = 0.3 * torch.randn(TRIALS, self.units, dtype=dtype)
        if self.parts:
            z0 = tuple((z0 * started).split(self.parts, -1))
        return kp.DiscreteProblem(cell, x, z0 if started or self.parts else None)


MODELS = {
    "rnn_cell": Model(lambda: nn.RNNCell(INPUTS, UNITS)),
    "gru_cell": Model(lambda: nn.GRUCell(INPUTS, UNITS)),
    "lstm_cell": Model(lambda: nn.LSTMCell(INPUTS, UNITS), 2 * UNITS),
    "rnn": Model(lambda: nn.RNN(INPUTS, UNITS, num_layers=2, nonlinearity="relu"), 2 * UNITS),
    "gru": Model(lambda: nn.GRU(INPUTS, UNITS, num_layers=2, batch_first=True), 2 * UNITS),
    "lstm": Model(lambda: nn.LSTM(INPUTS, 2, num_layers=3, bias=False), 12),
    "ctrnn": Model(lambda: CTRNNCell(INPUTS, UNITS, alpha=0.3)),
    "ctrnn_learnt": Model(lambda: CTRNNCell(INPUTS, UNITS, alpha=0.3, learn_alpha=True)),
    "low_rank": Model(lambda: LowRankRNNCell(INPUTS, UNITS, rank=2)),
    "transposed": Model(Transposed),
    "concatenating": Model(Concatenating),
    "computed_weight": Model(ComputedWeight),
    "tied": Model(Tied),
    "meeting_twice": Model(MeetingTwice),
    "tied_modules": Model(TiedModules),
    "normalised": Model(Normalised),
    "attending": Model(Attending),
    "shared_over_tokens": Model(SharedOverTokens),
    "embedding": Model(Embedding),
    "reservoir": Model(Reservoir),
    "pair_state": Model(PairState, 5, (3, 2)),
}


def dense_jacobian(flow: kp.Flow) -> Tensor:
    """dS/dtheta [state, parameter] by reverse mode through the real model, rolled out step by step."""
    problem = flow.solution.problem
    step, start = as_step(problem.cell, problem.x, problem.z0)

    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = problem.cell

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return step(self.cell, x, z)

    def states(parameters: dict[str, Tensor]) -> Tensor:
        z, out = start, []
        for x_t in problem.x.unbind(1):
            z = functional_call(Cell(), parameters, (x_t, z))
            out.append(z)
        return torch.stack(out, 1)

    jacobian = jacrev(states, chunk_size=1)({f"cell.{name}": value for name, value in flow.parameters.items()})
    size = flow.solution.state.numel()
    return torch.cat([jacobian[f"cell.{name}"].reshape(size, -1) for name in flow.parameters], 1)


def dense_steps(flow: kp.Flow) -> Tensor:
    """D_S F = I - D_S Phi [state, state], from the Jacobian of each step of the real model."""
    problem, state = flow.solution.problem, flow.solution.state
    step, _ = as_step(problem.cell, problem.x, problem.z0)
    trials, times, _ = state.shape
    matrix = torch.eye(state.numel(), dtype=state.dtype).reshape(*state.shape, *state.shape)
    for b in range(trials):
        for t in range(1, times):
            a = jacrev(lambda z, b=b, t=t: step(problem.cell, problem.x[b : b + 1, t], z[None])[0])(state[b, t - 1])
            matrix[b, t, :, b, t - 1, :] -= a.detach()
    return matrix.reshape(state.numel(), state.numel())
