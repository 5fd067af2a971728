"""Leaky-current recurrent cells: h' = (1 - a) h + a (W phi(h) + U x + b)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn.models import _equations as equations

RATES = {"tanh": torch.tanh, "relu": torch.relu}


class _LeakyCell(nn.Module):
    """Everything but the recurrent weight: U, b, the leak and phi."""

    alpha: Tensor  # None where alpha_logit is learnt instead
    alpha_logit: nn.Parameter | None

    def __init__(self, input_size: int, hidden_size: int, alpha: float, learn_alpha: bool, nonlinearity: str) -> None:
        super().__init__()
        equations.check_leak(alpha, learn_alpha)
        equations.choose(nonlinearity, RATES)
        self.input_size, self.hidden_size, self.nonlinearity = input_size, hidden_size, nonlinearity
        self.U = nn.Parameter(torch.randn(hidden_size, input_size) / math.sqrt(input_size))
        self.b = nn.Parameter(torch.zeros(hidden_size))
        self._set_leak(alpha, learn_alpha)

    def _set_leak(self, alpha: float, learn_alpha: bool) -> None:
        logit = nn.Parameter(torch.full((self.hidden_size,), alpha).logit()) if learn_alpha else None
        self.register_parameter("alpha_logit", logit)
        # In float64 whatever the weights are: as a float32 buffer, 0.1 would stay 0.10000000149 after `cell.double()`.
        # A scalar tensor does not promote, so a float32 state stays float32.
        self.register_buffer("alpha", None if learn_alpha else torch.tensor(alpha, dtype=torch.float64))

    def recurrent(self, rates: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """The next state, [trial, hidden_size]."""
        leak = self.alpha if self.alpha_logit is None else torch.sigmoid(self.alpha_logit)
        return equations.leaky_step(h, x, self.recurrent(RATES[self.nonlinearity](h)), self.U, self.b, leak)

    def extra_repr(self) -> str:
        """The sizes and phi, as they stand in the printed module."""
        return f"{self.input_size}, {self.hidden_size}, nonlinearity={self.nonlinearity}"


class CTRNNCell(_LeakyCell):
    """Leaky-current RNN, one Euler step of tau h' = -h + W phi(h) + U x + b with a = dt / tau.

        h_t = (1 - a) h_{t-1} + a (W phi(h_{t-1}) + U x_t + b)

    The state is the current h, not the rate phi(h). W starts as N(0, gain^2 / hidden_size), U as
    N(0, 1 / input_size), b as 0.

    Args:
        input_size: width of x.
        hidden_size: number of units.
        alpha: the leak a = dt / tau, 0 < alpha <= 1; with `learn_alpha` the value it starts from, 0 < alpha < 1.
        learn_alpha: give each unit its own learnt time constant, a = sigmoid(alpha_logit). Without it, a is a buffer:
            never learnt, but saved with the weights.
        nonlinearity: phi, "tanh" or "relu".
        gain: g, the spectral radius of W at the start for many units.

    Shapes: x [trial, input_size], h [trial, hidden_size] -> [trial, hidden_size].

    Raises:
        ValueError: alpha outside its interval, or an unknown nonlinearity.

    Source: Sompolinsky, Crisanti, Sommers, Phys. Rev. Lett. 61, 259 (1988).

    Example:
        >>> cell = CTRNNCell(3, 128, alpha=0.2, gain=1.5)
        >>> cell(torch.zeros(10, 3), torch.ones(10, 128)).shape
        torch.Size([10, 128])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        alpha: float = 0.1,
        learn_alpha: bool = False,
        nonlinearity: str = "tanh",
        gain: float = 1.0,
    ) -> None:
        super().__init__(input_size, hidden_size, alpha, learn_alpha, nonlinearity)
        self.W = nn.Parameter(gain / math.sqrt(hidden_size) * torch.randn(hidden_size, hidden_size))

    def recurrent(self, rates: Tensor) -> Tensor:
        """W r for each row r of rates [trial, hidden_size]."""
        return rates @ self.W.T


class LowRankRNNCell(_LeakyCell):
    """Leaky-current RNN whose recurrent weight has low rank, W = m n^T / hidden_size.

        h_t = (1 - a) h_{t-1} + a (m n^T phi(h_{t-1}) / hidden_size + U x_t + b)

    m and n, [hidden_size, rank], start with N(0, 1) entries; W itself is never formed.

    Args:
        input_size: width of x.
        hidden_size: number of units.
        rank: columns of m and n, 1 <= rank <= hidden_size.
        alpha, learn_alpha, nonlinearity: as in `CTRNNCell`.

    Shapes: x [trial, input_size], h [trial, hidden_size] -> [trial, hidden_size].

    Raises:
        ValueError: as `CTRNNCell`, or a rank outside 1..hidden_size.

    Source: Mastrogiuseppe, Ostojic, Neuron 99, 609 (2018).

    Example:
        >>> LowRankRNNCell(3, 128, rank=2)(torch.zeros(10, 3), torch.ones(10, 128)).shape
        torch.Size([10, 128])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        rank: int = 1,
        alpha: float = 0.1,
        learn_alpha: bool = False,
        nonlinearity: str = "tanh",
    ) -> None:
        equations.check_rank(rank, hidden_size)
        super().__init__(input_size, hidden_size, alpha, learn_alpha, nonlinearity)
        self.m = nn.Parameter(torch.randn(hidden_size, rank))
        self.n = nn.Parameter(torch.randn(hidden_size, rank))

    def recurrent(self, rates: Tensor) -> Tensor:
        """W r = m (n^T r) / hidden_size for each row r of rates [trial, hidden_size]."""
        return equations.low_rank(self.m, self.n, rates)


def make(name: str, sizes: tuple[int, int, int], seed: int, dtype: str, options: dict[str, Any]) -> list[nn.Module]:
    """A cell by its name in `make_model`, and its readout; sizes are those of inputs, units and outputs."""
    kinds = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell, "ctrnn": CTRNNCell, "lowrank": LowRankRNNCell}
    inputs, units, outputs = sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kinds[name](inputs, units, **options), nn.Linear(units, outputs)
    return [module.to(getattr(torch, dtype)) for module in made]
