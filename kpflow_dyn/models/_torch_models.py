"""The models of `kpflow_dyn.models` as torch modules on batches of trials.

Cells are leaky-current ones, h' = (1 - a) h + a (W phi(h) + U x + b); fields are z' = f(t, z) or f(t, z, x_t).
"""

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from kpflow_dyn.models import _equations as equations
from kpflow_dyn.models._hodgkin_huxley import SQUID_AXON, SquidAxon

Times = float | Sequence[float]
RATES: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}
PHI = RATES | {"silu": nn.functional.silu}


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
        logit = nn.Parameter(torch.full((hidden_size,), alpha).logit()) if learn_alpha else None
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


class _Field(nn.Module):
    """The sizes and phi of a field."""

    def __init__(self, units: int, inputs: int, nonlinearity: str) -> None:
        super().__init__()
        self.units, self.inputs, self.nonlinearity = units, inputs, nonlinearity
        self.phi = equations.choose(nonlinearity, PHI)

    def extra_repr(self) -> str:
        """The sizes and phi, as they stand in the printed module."""
        return f"{self.units}, inputs={self.inputs}, nonlinearity={self.nonlinearity}"


class MLPField(_Field):
    """A multilayer perceptron as the field of a neural ODE, autonomous in t.

        f(t, z, x_t) = W_out phi(... phi(W_1 [z, x_t] + b_1) ...) + b_out

    The layers are `layers.0`, ..., `layers.{depth}`, each an nn.Linear with its usual start.

    Args:
        units: width of z.
        hidden: width of each hidden layer.
        inputs: width of x_t, 0 for none.
        depth: number of hidden layers.
        nonlinearity: phi, "tanh", "silu" or "relu".

    Shapes: t [], z [trial, units], x_t [trial, inputs] -> [trial, units].

    Raises:
        ValueError: a size that is too small, an unknown nonlinearity, or (when called) z or x_t of another width.
    Source: Chen, Rubanova, Bettencourt, Duvenaud, NeurIPS (2018).

    >>> field = MLPField(4, hidden=16, inputs=2)
    >>> field(torch.tensor(0.0), torch.zeros(10, 4), torch.ones(10, 2)).shape
    torch.Size([10, 4])
    """

    def __init__(self, units: int, hidden: int, inputs: int = 0, depth: int = 1, nonlinearity: str = "tanh") -> None:
        equations.check_sizes(inputs, units=units, hidden=hidden, depth=depth)
        super().__init__(units, inputs, nonlinearity)
        widths = [units + inputs, *[hidden] * depth, units]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, t: Tensor, z: Tensor, x_t: Tensor | None = None) -> Tensor:
        """z' [trial, units]."""
        equations.check_widths(self.units, self.inputs, z, x_t)
        return equations.mlp(self.layers, self.phi, z, x_t)


class CTRNNField(_Field):
    """Leaky-current recurrent network in continuous time: tau z' = -z + W phi(z) + U x_t + b.

    The state is the current z, not the rate phi(z). An Euler step of dt is `CTRNNCell` with alpha = dt / tau. W starts
    as N(0, gain^2 / units), U as N(0, 1 / inputs), b as 0.

    Args:
        units: number of units.
        inputs: width of x_t, 0 for none (then U is None).
        tau: time constant, in the unit of t: one number or one for each unit. Fixed: a buffer.
        gain: g, the spectral radius of W at the start for many units.
        nonlinearity: phi, "tanh", "silu" or "relu".

    Shapes: t [], z [trial, units], x_t [trial, inputs] -> [trial, units].

    Raises:
        ValueError: a size that is too small, tau of another shape or not positive, an unknown nonlinearity, or (when
            called) z or x_t of another width.
    Source: Sompolinsky, Crisanti, Sommers, Phys. Rev. Lett. 61, 259 (1988).

    >>> CTRNNField(64, inputs=3, tau=0.1)(torch.tensor(0.0), torch.ones(10, 64), torch.zeros(10, 3)).shape
    torch.Size([10, 64])
    """

    tau: Tensor
    U: nn.Parameter | None

    def __init__(
        self, units: int, inputs: int = 0, tau: Times = 1.0, gain: float = 1.0, nonlinearity: str = "tanh"
    ) -> None:
        equations.check_sizes(inputs, units=units)
        super().__init__(units, inputs, nonlinearity)
        # In float64 whatever the weights are, and cast when used: 0.1 in float32 would be off after `field.double()`.
        self.register_buffer("tau", torch.from_numpy(equations.time_constants(tau, units)))
        self.W = nn.Parameter(gain / math.sqrt(units) * torch.randn(units, units))
        self.register_parameter("U", _input_weight(units, inputs))
        self.b = nn.Parameter(torch.zeros(units))

    def forward(self, t: Tensor, z: Tensor, x_t: Tensor | None = None) -> Tensor:
        """z' [trial, units]."""
        equations.check_widths(self.units, self.inputs, z, x_t)
        return equations.ctrnn(self.W, self.U, self.b, self.tau.to(z.dtype), self.phi, z, x_t)


class HodgkinHuxleyField(nn.Module):
    """A network of Hodgkin-Huxley neurons with learnt synaptic weights.

        C V_i' = sum_j W_ij s_j (E_syn - V_i) + (U x_t)_i - I_Na - I_K - I_L

    with the gates m, h, n and the synapses s of `SquidAxon`, where all equations and units are. Only W
    [mS/cm^2] and U [uA/cm^2 for each unit of x_t] learn. W starts uniform between 0 and 2 conductance / neurons, so
    that a neuron sees about `conductance` when all synapses are open; U starts as N(0, 1 / inputs).

    Args:
        neurons: how many.
        inputs: width of x_t, 0 for none (then U is None).
        conductance: of all synapses of a neuron at the start [mS/cm^2].
        axon: the fixed constants.

    Shapes: t [] in ms, z [trial, 5 neurons], x_t [trial, inputs] -> [trial, 5 neurons]; z holds V [mV] of all neurons,
    then all m, all h, all n, all s.

    Raises:
        ValueError: a size that is too small, or (when called) z or x_t of another width.

    Source as `SquidAxon`.

    >>> _ = torch.manual_seed(0)
    >>> field = HodgkinHuxleyField(3, inputs=1)
    >>> field(torch.tensor(0.0), field.resting_state(trials=2), torch.zeros(2, 1)).abs().max() < 1e-4
    tensor(True)
    """

    U: nn.Parameter | None

    def __init__(self, neurons: int, inputs: int = 0, conductance: float = 0.1, axon: SquidAxon = SQUID_AXON) -> None:
        super().__init__()
        equations.check_sizes(inputs, neurons=neurons)
        self.neurons, self.inputs, self.axon = neurons, inputs, axon
        self.W = nn.Parameter(2 * conductance / neurons * torch.rand(neurons, neurons))
        self.register_parameter("U", _input_weight(neurons, inputs))

    def forward(self, t: Tensor, z: Tensor, x_t: Tensor | None = None) -> Tensor:
        """z' [trial, 5 neurons], per ms."""
        equations.check_widths(5 * self.neurons, self.inputs, z, x_t)
        return self.axon.velocity(z, self.W, equations.drive(self.U, x_t))

    def extra_repr(self) -> str:
        """The sizes and constants, as they stand in the printed module."""
        return f"{self.neurons}, inputs={self.inputs}, axon={self.axon}"

    def resting_state(self, trials: int = 1) -> Tensor:
        """[trial, 5 neurons], where each neuron would rest alone: at rest the synapses are all but shut."""
        rest = torch.from_numpy(self.axon.resting_state()).to(self.W)
        return rest.repeat_interleave(self.neurons).repeat(trials, 1)


class ClosedLoop(nn.Module):
    """What `kpflow_dyn.models.ClosedLoop` returns for a torch policy."""

    def __init__(self, plant: Any, policy: nn.Module) -> None:
        super().__init__()
        self.plant = with_buffers(plant) if isinstance(plant, nn.Module) else plant
        self.policy = policy

    def forward(self, t: Tensor, z: Tensor, x_t: Tensor | None = None) -> Tensor:
        """z' [trial, state]."""
        return equations.closed_loop(self.plant, self.policy, z, x_t)

    def extra_repr(self) -> str:
        """The plant, where it is not a module and so printed anyway."""
        return "" if isinstance(self.plant, nn.Module) else f"plant={self.plant}"


class BesideControl(nn.Module):
    """A closed loop beside whose state stands the integral of its control: s = [z, int u dt]; its parameters."""

    def __init__(self, loop: ClosedLoop, units: int) -> None:
        super().__init__()
        self.plant, self.policy, self.units = loop.plant, loop.policy, units

    def forward(self, t: Tensor, s: Tensor, x_t: Tensor | None = None) -> Tensor:
        """s' [trial, state + control]."""
        return equations.beside_control(self.plant, self.policy, self.units, s, x_t)


def _input_weight(units: int, inputs: int) -> nn.Parameter | None:
    return nn.Parameter(torch.randn(units, inputs) / math.sqrt(inputs)) if inputs else None


def with_buffers(plant: nn.Module) -> nn.Module:
    """A copy whose parameters are buffers: moved, cast and saved with the module, but never learnt."""
    plant = copy.deepcopy(plant)
    for module in plant.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return plant


def make(name: str, sizes: tuple[int, int, int], seed: int, dtype: str, options: dict[str, Any]) -> list[nn.Module]:
    """A cell by its name in `make_model`, and its readout; sizes are those of inputs, units and outputs."""
    kinds = {"rnn": nn.RNNCell, "gru": nn.GRUCell, "lstm": nn.LSTMCell, "ctrnn": CTRNNCell, "lowrank": LowRankRNNCell}
    inputs, units, outputs = sizes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = kinds[name](inputs, units, **options), nn.Linear(units, outputs)
    return [module.to(getattr(torch, dtype)) for module in made]
