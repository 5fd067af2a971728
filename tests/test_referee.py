"""Autograd through the user's own torch module decides: what a trace loses is noticed, and answered all the same."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import kpflow_dyn as kp
from kpflow_dyn._torch.model import TRACES

TRIALS, TIMES, UNITS, INPUTS = 3, 6, 4, 2
BY_NAME: dict[str, Tensor] = {}


class Base(nn.Module):
    """Weights for a cell."""

    hidden_size = UNITS

    def __init__(self) -> None:
        super().__init__()
        self.w, self.i = nn.Linear(UNITS, UNITS), nn.Linear(INPUTS, UNITS)


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        ctx.save_for_backward(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx, g):
        return g * torch.sigmoid(ctx.saved_tensors[0])


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.clamp(-1, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 0.7 * g


class InNumpy(torch.autograd.Function):
    """Its backward is no operation of torch."""

    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(2.0 * g.detach().numpy())


def spike(m, x, z):
    return 0.9 * z + m.w(z) + m.i(x) - Spike.apply(z)


def once(m, x, z):
    return Once.apply(m.w(z) + m.i(x))


def in_numpy(m, x, z):
    return torch.tanh(InNumpy.apply(m.w(z)) + m.i(x))


def listed(m, x, z):
    return torch.tanh(z @ m.again[0].T + m.i(x) + 0.1 * m.w(z))


def viewed(m, x, z):
    return torch.tanh(m.w(z) + m.i(x)) + torch.nn.functional.pad(z @ m.part.T, (0, 2))


def by_global(m, x, z):
    return torch.tanh(z @ BY_NAME["w"].T + m.i(x))


def clamped_in_place(m, x, z):
    m.w.weight.data.clamp_(-0.1, 0.1)
    return torch.tanh(m.w(z) + m.i(x))


def counted(m, x, z):
    m.count += 1
    return torch.tanh(m.w(z) + m.i(x))


def cached(m, x, z):
    if not hasattr(m, "square"):
        m.square = m.w.weight @ m.w.weight.T
    return torch.tanh(z @ m.square + m.i(x))


def with_buffer_made_at_first(m, x, z):
    if not hasattr(m, "late"):
        m.register_buffer("late", torch.full((UNITS,), 0.3, dtype=z.dtype))
    return torch.tanh(m.w(z) * m.late + m.i(x))


def experts(m, x, z):
    return torch.stack([torch.tanh(m.w(row)) if row.sum() > 0 else 0.5 * m.w(row) for row in z]) + m.i(x)


def read_as_number(m, x, z):
    return torch.tanh(m.w(z) * float(z.abs().max().item() > 0.1) + m.i(x))


def half_in_numpy(m, x, z):
    return torch.tanh(m.w(z) + torch.from_numpy(np.sin(z.detach().numpy())) + m.i(x))


def of_an_energy(m, x, z):
    z = z.clone().requires_grad_(True)
    energy = torch.tanh(m.w(z)).pow(2).sum()
    return z - 0.1 * torch.autograd.grad(energy, z, create_graph=True)[0] + m.i(x)


def of_a_function(m, x, z):
    gradient = torch.func.vmap(torch.func.grad(lambda y: torch.tanh(m.w(y)).sum()))(z)
    return torch.tanh(m.w(z) + m.i(x)) - 0.1 * gradient


def of_a_tangent(m, x, z):
    return torch.tanh(m.w(z) + m.i(x)) + torch.func.jvp(lambda y: torch.sin(m.w(y)), (z,), (z,))[1]


def in_slices(m, x, z):
    y = torch.zeros_like(z)
    y[:, 0], y[:, 1:] = z[:, 1], x[:, :1] - z[:, :3]
    return torch.tanh(m.w(y))


def by_fourier(m, x, z):
    return torch.tanh(torch.fft.ifft(torch.fft.fft(m.w(z)) * torch.fft.fft(m.w.bias)).real + m.i(x))


def at_one_step(m, x, z):
    with torch.no_grad():
        cut = torch.tanh(m.w(z))
    return torch.tanh(0.2 * m.w(z) + m.i(x)) + (x[:, :1] > 1.5) * cut


def rechecked(m, x, z):
    return checkpoint(lambda z: torch.tanh(m.w(z)), z, use_reentrant=False) + m.i(x)


CELLS: dict[str, tuple[Callable, Callable | None]] = {f.__name__: (f, None) for f in (
    spike, once, in_numpy, experts, read_as_number, half_in_numpy, of_an_energy, of_a_function, of_a_tangent, in_slices,
    by_fourier, at_one_step, rechecked, cached, with_buffer_made_at_first,
)}  # fmt: skip


def plain(m, x, z):
    return torch.tanh(m.w(z) + m.i(x))


def _gradient_hook(m):
    m.w.weight.register_hook(lambda g: g * torch.tril(torch.ones(UNITS, UNITS, dtype=g.dtype)))


def _backward_hook(m):
    m.w.register_full_backward_hook(lambda _m, given, _out: tuple(None if g is None else 0.5 * g for g in given))


def _forward_hook(m):
    m.w.register_forward_hook(lambda _m, _args, out: out * torch.sigmoid(m.i.bias))


def _pre_hook(m):
    m.w.register_forward_pre_hook(lambda _m, args: (torch.sin(args[0]),))


CELLS |= {
    "aliases in a list": (listed, lambda m: setattr(m, "again", [m.w.weight])),
    "a view": (viewed, lambda m: setattr(m, "part", m.w.weight[:2])),
    "a global": (by_global, lambda m: BY_NAME.update(w=m.w.weight)),
    "clamped in place": (clamped_in_place, lambda m: m.w.weight.data.clamp_(-0.1, 0.1)),
    "a counter": (counted, lambda m: m.register_buffer("count", torch.zeros(()))),
    "a gradient hook": (plain, _gradient_hook),
    "a backward hook": (plain, _backward_hook),
    "a forward hook": (plain, _forward_hook),
    "a pre-hook": (plain, _pre_hook),
    "pruned": (plain, lambda m: prune.random_unstructured(m.w, "weight", 0.5)),
    "old weight norm": (plain, lambda m: nn.utils.weight_norm(m.w)),
    "old spectral norm": (plain, lambda m: nn.utils.spectral_norm(m.w).eval()),
    "weight norm": (plain, lambda m: parametrizations.weight_norm(m.w)),
    "orthogonal": (plain, lambda m: parametrizations.orthogonal(m.w)),
}


def make(name: str) -> nn.Module:
    forward, change = CELLS[name]
    torch.manual_seed(0)
    cell = type("Cell", (Base,), {"forward": lambda self, x, z: forward(self, x, z)})().double()
    if change is not None:
        change(cell)
    return cell.eval()


def inputs() -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(TRIALS, TIMES, INPUTS, dtype=torch.float64)
    x[..., 0] = 0.1 * x[..., 0]
    x[1, 2, 0] = 2.0  # what opens at one step of one trial
    return x


def states(cell: nn.Module, x: Tensor) -> Tensor:
    z, found = torch.zeros(len(x), UNITS, dtype=x.dtype), []
    for x_t in x.unbind(1):
        z = cell(x_t, z)
        found.append(z)
    return torch.stack(found, 1)


def dense(state: Tensor, cell: nn.Module) -> Tensor:
    """dS/dtheta [state, p] by reverse mode through the module as it is called."""
    parameters = list(cell.parameters())
    rows = [
        torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for one in state.reshape(-1)
    ]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def linearized(cell: nn.Module, x: Tensor) -> kp.Flow:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kp.UntracedWarning)
        return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning", "ignore:Full backward hook:UserWarning")
@pytest.mark.parametrize("name", CELLS)
def test_the_flow_is_that_of_autograd_through_the_module(name: str) -> None:
    cell, x = make(name), inputs()
    flow = linearized(cell, x)
    J = dense(states(cell, x), cell)
    scale = float(J.abs().max())
    size = J.shape[0]
    assert float((flow.J.dense().reshape(J.shape) - J).abs().max()) < 1e-10 * scale
    assert float((flow.ntk.dense().reshape(size, size) - J @ J.T).abs().max()) < 1e-10 * scale**2 * J.shape[1]
    product = (flow.P @ flow.K @ flow.P.T).dense().reshape(size, size)
    assert float((product - J @ J.T).abs().max()) < 1e-10 * scale**2 * J.shape[1]
    assert kp.check_adjoint(flow.P) < 1e-12 and kp.check_adjoint(flow.J) < 1e-12


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", CELLS)
def test_the_module_is_left_as_it_was(name: str) -> None:
    cell, x = make(name), inputs()
    before, random = copy.deepcopy(cell.state_dict()), torch.get_rng_state()
    attributes = {n: set(vars(m)) for n, m in cell.named_modules()}
    linearized(cell, x)
    after = cell.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    assert {n: set(vars(m)) for n, m in cell.named_modules()} == attributes
    assert all(type(t) in (Tensor, nn.Parameter) for t in after.values() if t is not None)
    assert all(p.grad is None and p.requires_grad for p in cell.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert type(cell(x[:, 0], torch.zeros(TRIALS, UNITS, dtype=x.dtype))) is Tensor


@pytest.mark.parametrize("name", ["spike", "in_numpy", "experts", "a gradient hook", "of_an_energy"])
def test_training_afterwards_changes_nothing(name: str) -> None:
    cell, x = make(name), inputs()
    flow, q = linearized(cell, x), torch.randn(1, TRIALS, TIMES, UNITS, dtype=torch.float64)
    before = [flow.ntk.mv(q), flow.P.mv(q), flow.K.mv(q)]
    with torch.no_grad():
        for parameter in cell.parameters():
            parameter.add_(1.0)
            parameter.requires_grad_(False)
    assert all(map(torch.equal, before, [flow.ntk.mv(q), flow.P.mv(q), flow.K.mv(q)]))


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("in_numpy", r"the trace is not the model.*autograd.Function InNumpy"),
        ("experts", r"could not be traced.*test_referee.py, line \d+"),
        ("a backward hook", r"gradient in the state is off by .*a backward hook of w"),
        ("a counter", r"writes to its own count"),
    ],
)
def test_one_warning_says_what_stopped_the_trace(name: str, says: str) -> None:
    solution = kp.solve(kp.DiscreteProblem(make(name), inputs()))
    with pytest.warns(kp.UntracedWarning, match=says) as caught:
        flow = kp.linearize(solution)
    assert len(caught) == 1 and "no weight sites" in str(caught[0].message)
    assert flow.sites == [] and flow.untraced in str(caught[0].message) and "autograd alone" in repr(flow)
    with pytest.raises(ValueError, match="cannot be truncated"):
        flow.truncate()


@pytest.mark.parametrize("Layer", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("change", ["prune", "old weight norm", "weight norm", "pre-hook"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_layers_that_hooks_complete(Layer: type[nn.RNNBase], change: str, layers: int) -> None:
    torch.manual_seed(0)
    layer, x = Layer(INPUTS, UNITS, layers, batch_first=True).double(), inputs()
    name = f"weight_hh_l{layers - 1}"
    if change == "prune":
        prune.random_unstructured(layer, name, 0.5)
    elif change == "old weight norm":
        nn.utils.weight_norm(layer, name)
    elif change == "weight norm":
        parametrizations.weight_norm(layer, name)
    else:
        layer.register_forward_pre_hook(lambda m, args: (torch.sin(args[0]), *args[1:]))
    flow = linearized(layer, x)
    q = torch.zeros(1, *flow.ntk.domain.shape, dtype=torch.float64)
    here = slice((layers - 1) * UNITS, layers * UNITS)
    q[..., here] = torch.randn(1, TRIALS, TIMES, UNITS, dtype=torch.float64)
    (layer(x)[0] * q[0, ..., here]).sum().backward()
    found = flow.as_parameters(flow.J.T.mv(q))
    for parameter_name, parameter in layer.named_parameters():
        expected = parameter.grad
        assert float((found[parameter_name][0] - expected).abs().max()) < 1e-11 * float(expected.abs().max() + 1)


def test_a_kept_trace_is_not_used_where_its_outcome_differs() -> None:
    """Hooks on a tensor of the module's are no part of what traces are known by."""
    TRACES.forget()
    x, errors = inputs(), []
    for hooked in (False, True, False):
        torch.manual_seed(0)
        cell = nn.GRUCell(INPUTS, UNITS).double()
        if hooked:
            cell.weight_hh.register_hook(lambda g: 2 * g)
        flow = linearized(cell, x)
        J = dense(states(cell, x), cell)
        errors.append(float((flow.J.dense().reshape(J.shape) - J).abs().max()))
        assert not flow.untraced
    assert max(errors) < 1e-12


def test_a_backward_pass_that_is_not_linear_is_refused() -> None:
    def clipped(m, x, z):
        h = m.w(z)
        if h.requires_grad:
            h.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return torch.tanh(h + m.i(x))

    cell = type("Cell", (Base,), {"forward": clipped})().double()
    flow = linearized(cell, inputs())
    with pytest.raises(ValueError, match="backward pass is not linear"):
        flow.ntk.mv(torch.randn(1, TRIALS, TIMES, UNITS, dtype=torch.float64))


def test_what_has_no_fixed_meaning_is_refused() -> None:
    def noisy(m, x, z):
        return torch.tanh(m.w(z) + m.i(x)) + 0.1 * torch.randn_like(z)

    def remembering(m, x, z):
        m.trace = 0.9 * getattr(m, "trace", 0) + z.detach().mean(0)
        return torch.tanh(m.w(z) + m.i(x) + m.trace)

    def coupled(m, x, z):
        h = m.w(z) + m.i(x)
        return torch.tanh(h - h.mean(0))

    for forward, says in ((noisy, "two results"), (remembering, "two results"), (coupled, "trials influence")):
        cell = type("Cell", (Base,), {"forward": forward})().double()
        z0 = torch.rand(TRIALS, UNITS, dtype=torch.float64)
        with pytest.raises(ValueError, match=says):
            kp.linearize(kp.solve(kp.DiscreteProblem(cell, inputs(), z0)))


@pytest.mark.parametrize("name", ["aliases in a list", "a global"])
def test_a_gradient_flow_does_not_move_half_of_a_parameter(name: str) -> None:
    solution = kp.solve(kp.DiscreteProblem(make(name), inputs()))
    loss = kp.squared_error(torch.zeros(TRIALS, TIMES, UNITS, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"w.weight is off by .* by another way than its name"):
        kp.gradient_flow(solution, loss, 1.0)


def test_a_layer_with_a_forward_of_its_own() -> None:
    class Squashed(nn.GRU):
        def forward(self, x, h=None):
            out, h = super().forward(x, h)
            return torch.tanh(out), h

    layer = Squashed(INPUTS, UNITS, batch_first=True).double()
    with pytest.raises(ValueError, match=r"Squashed gives something else than its hidden state.*StaticProblem"):
        linearized(layer, inputs())


class Field(Base):
    """A field with a weight that it reaches through a list."""

    def __init__(self, forward: Callable) -> None:
        super().__init__()
        self.again, self._forward = [self.w.weight], forward

    def forward(self, t, z):
        return self._forward(self, t, z)


FIELDS = {
    "alias": lambda m, t, z: torch.tanh(m.w(z)) - z @ m.again[0].T * torch.cos(t),
    "surrogate": lambda m, t, z: Spike.apply(m.w(z)) - z,
    "branch on time": lambda m, t, z: torch.tanh(m.w(z)) if t < 0.5 else m.w(z) - z,
    "gate": lambda m, t, z: torch.tanh(m.w(z)) + (t > 0.7) * m.w(z).detach(),
    "experts": lambda m, t, z: torch.stack([torch.tanh(m.w(r)) if r.sum() > 0 else m.w(r) for r in z]),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_those_of_autograd_through_the_solver(name: str) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    torch.manual_seed(0)
    field = Field(FIELDS[name]).double()
    z0, t = torch.randn(TRIALS, UNITS, dtype=torch.float64), torch.linspace(0, 1, 6, dtype=torch.float64)
    solution = kp.solve(kp.ODEProblem(field, z0, t.numpy()), "rk4")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", kp.UntracedWarning)
        flow = kp.linearize(solution)
    q = torch.randn(1, TRIALS, 6, UNITS, dtype=torch.float64)
    state = torchdiffeq.odeint(field, z0, t, method="rk4").transpose(0, 1)
    parameters = list(field.parameters())
    own = torch.autograd.grad(state, parameters, q[0], allow_unused=True, materialize_grads=True)
    own = torch.cat([g.reshape(-1) for g in own])
    weights = torch.as_tensor(solution.weights)[:, None]
    assert float((flow.J.T.mv(q / weights)[0] - own).abs().max()) < 1e-10 * float(own.abs().max())
    nodal = flow.nodal
    assert float(((nodal.P @ nodal.K @ nodal.P.T).dense() - nodal.ntk.dense()).abs().max()) < 1e-10
