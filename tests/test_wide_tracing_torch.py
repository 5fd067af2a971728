"""Networks, cells and fields of torch that people write: each is traced, and its J* is that of backward()."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import kpflow_dyn as kp

odeint = pytest.importorskip("torchdiffeq").odeint
N = 6
EDGES = torch.tensor([[0, 1, 2, 2, 4, 5], [1, 2, 2, 3, 0, 4]])
EYE = torch.eye(N, dtype=torch.float64)


class Of(nn.Module):
    """A function of a module with weights w and v [6, 6], u [6, 2] and b [6], some buffers and other modules."""

    hidden_size = N

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, shape in {"w": (N, N), "v": (N, N), "u": (N, 2), "b": (N,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / math.sqrt(shape[-1])))
        for name, part in parts.items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part())
        self.function: Callable[..., Tensor] = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def cases(of: dict[str, Any], quick: set[str]) -> list[Any]:
    """Names, all but the quick ones marked as slow."""
    assert quick <= set(of)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in of]


def check(module: nn.Module, outputs: Tensor, flow: kp.Flow) -> None:
    """A flow on the first road whose J* is that of backward()."""
    q = torch.randn(outputs.shape, dtype=torch.float64)
    (outputs * q).sum().backward()
    assert flow.untraced == "" and flow.sites
    found = flow.as_parameters(flow.J.T.mv(q.reshape(tuple(flow.ntk.domain.shape))))
    expected = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    size = max(float(g.abs().max()) for g in expected.values())
    assert max(float((found[name] - g).abs().max()) for name, g in expected.items()) < 1e-10 * size
    v = torch.randn(tuple(flow.ntk.domain.shape), dtype=torch.float64)
    kernel = flow.ntk.mv(v)
    assert float(((flow.P @ flow.K @ flow.P.T).mv(v) - kernel).abs().max()) < 1e-10 * float(kernel.abs().max())
    assert kp.check_adjoint(flow.J) < 1e-11


def check_network(make: Callable[[], nn.Module], x: Tensor) -> None:
    torch.manual_seed(0)
    net = make().double()
    x = x.double() if x.is_floating_point() else x
    check(net, net(x), kp.linearize(kp.solve(kp.StaticProblem(net, x, ""))))


def check_cell(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    cell, x = make().double(), torch.randn(3, 4, 2, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    z, states = torch.zeros(3, cell.hidden_size, dtype=torch.float64), []
    for x_t in x.unbind(1):
        z = cell(x_t, z)
        states.append(z)
    check(cell, torch.stack(states, 1), flow)


def check_field(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    field, z0, times = make().double(), torch.randn(3, N, dtype=torch.float64), torch.linspace(0, 1, 4).double()
    flow = kp.linearize(kp.solve(kp.ODEProblem(field, z0, times.numpy()), "rk4"))
    check(field, odeint(field, z0, times, method="rk4").transpose(0, 1), flow.nodal)


def before(m: Any, x: Tensor, z: Tensor) -> Tensor:
    return z @ m.w.T + x @ m.u.T + m.b


# Writes in place


def by_slices(m, x, z):
    y = torch.zeros_like(z)
    y[:, 0] = z[:, 1]
    y[:, 1:3] = x - z[:, :2]
    return torch.tanh(y @ m.w.T + x @ m.u.T)


def gates_in_place(m, x, z):
    y = before(m, x, z)
    y[:, ::2] = torch.tanh(y[:, ::2])
    y[:, 1::2].sigmoid_()
    return y


def by_mask(m, x, z):
    y = before(m, x, z)
    y[y > 0] = 0.1
    y.masked_fill_(y < -1, -1.0)
    return torch.tanh(y)


def by_fixed_mask(m, x, z):
    y = before(m, x, z)
    y[:, m.mask] = torch.tanh(z[:, m.mask])
    return y


def by_list(m, x, z):
    y = torch.zeros(len(z), N)
    y[:, [0, 2, 4]] = z[:, [1, 3, 5]]
    y[:, 1::2] += x[:, :1]
    return torch.tanh(before(m, x, y))


def added_at(m, x, z):
    new = torch.tanh(before(m, x, z))
    y = torch.zeros_like(z)
    y.index_add_(1, torch.tensor([0, 0, 3]), new[:, :3])
    y.scatter_(1, torch.tensor([[5, 1]]).expand(len(z), -1), new[:, 3:5])
    y.index_copy_(1, torch.tensor([2]), z[:, :1])
    return y


def out_of_a_loop(m, x):
    h, out = x.new_zeros(len(x), N), x.new_empty(len(x), 3, N)
    for t in range(3):
        h = torch.tanh(h @ m.w.T + x[:, t] @ m.u.T)
        out[:, t] = h
    return out


def weight_in_parts(m, x):
    W = torch.zeros(N, N)
    W[:3, :3] = m.w[:3, :3]
    W[3:, 3:] = m.w[:3, 3:].exp() / 9
    i, j = torch.triu_indices(N, N, 1)
    W[j, i] += m.v[i, j]
    W.fill_diagonal_(0)
    return torch.tanh(x @ W.T)


def velocity_in_parts(m, t, z):
    d = torch.empty_like(z)
    d[..., :3] = z[..., 3:]
    d[..., 3:] = torch.tanh(z @ m.w.T)[..., 3:]
    d[:, 3] -= z[:, 0] ** 2
    return d


# Constants of weights, indices of buffers


def pruned(m, x):
    return x @ (m.w * (m.w.abs() > 0.3)).T + x @ m.v[m.v[:, 0].argsort()]


def normed(m, x):
    with torch.no_grad():
        size = m.v.norm()
    v = m.w.sum(1)
    return x * (v / v.detach().norm()) + x @ m.v / size


def quantised(m, x):
    return x @ (m.w + (torch.round(m.w) - m.w).detach()).T


def convolved_on_a_graph(m, x):
    loops = torch.arange(N)
    edges = torch.cat([m.edges[:, m.edges[0] != m.edges[1]], torch.stack([loops, loops])], 1)
    degree = torch.zeros(N).scatter_add_(0, edges[1], torch.ones(edges.shape[1])) ** -0.5
    scale = degree[edges[0]] * degree[edges[1]]
    return torch.zeros_like(x).index_add_(1, edges[1], (x @ m.w)[:, edges[0]] * scale)


def attended_on_a_graph(m, x):
    source, target = m.edges[:, m.edges[0] != m.edges[1]]
    h = x.unsqueeze(-1) * m.b  # [trial, node, feature]
    logits = F.leaky_relu((h @ m.w[0])[:, source] + (h @ m.w[1])[:, target])
    weights = logits.exp()
    total = torch.zeros(len(x), N).index_add(1, target, weights)
    return torch.zeros_like(h).index_add(1, target, (weights / total[:, target])[..., None] * h[:, source])


def by_numbers_of_buffers(m, x):
    n, sizes = int(m.count), m.sizes.tolist()
    group, inverse = torch.unique(m.group, return_inverse=True)
    y = torch.zeros(len(x), len(group)).index_add(1, inverse, x @ m.w)
    y = y / torch.bincount(m.group)[group]
    a, b = (x[:, torch.arange(n)] @ m.v[:n]).split(sizes, 1)
    return torch.cat([y, torch.tanh(a) if m.flag else a, b, x[:, m.flags], x.repeat_interleave(m.sizes[0], 1)], 1)


BUFFERS = {"count": torch.tensor(3), "sizes": torch.tensor([2, 4]), "group": torch.tensor([3, 1, 3, 1, 2, 2])}
BUFFERS |= {"flag": torch.tensor(True), "flags": torch.tensor([1, 0, 1, 1, 0, 1]).bool()}


def several_results(m, x):
    values, chosen = torch.topk(x @ m.w, 2)
    gates = torch.zeros_like(x).scatter(1, chosen, values.softmax(-1))
    variance, mean = torch.var_mean(x @ m.v, 1, keepdim=True)
    return gates * (x @ m.w.T) + variance * mean + torch.sort(x @ m.v).values + (x @ m.w).max(1, keepdim=True).values


def of_matrices(m, x):
    U, S, V = torch.linalg.svd(m.w)
    return torch.tanh(x @ (U * torch.tanh(S)) @ V) * torch.linalg.slogdet(m.v)[1] + torch.cdist(x, m.v)


def without_a_forward_mode(m, x):
    grid = torch.tanh(m.w[:2, :4]).reshape(1, 2, 2, 2).expand(len(x), -1, -1, -1)
    picked = F.grid_sample(x[:, None, :, None].expand(-1, 1, N, N), grid, align_corners=False)
    return picked.flatten(1) @ torch.fake_quantize_per_tensor_affine(m.v[:4], 0.1, 0, -128, 127)


# Checks


def solved(m, x):
    A = m.w - m.w.T
    y = torch.linalg.solve(m.v + 9 * EYE, x.T).T @ torch.linalg.solve(EYE + A, EYE - A)
    torch._assert((y.abs() < 1e6).all(), "large")
    return y @ torch.linalg.cholesky(m.v @ m.v.T + EYE) + torch.linalg.inv(m.w + 9 * EYE)[0]


def factored(m, x):
    factors, pivots = torch.linalg.lu_factor(m.w + 9 * EYE)
    x = torch.linalg.lu_solve(factors, pivots, x.T).T @ torch.matrix_exp(m.v - m.v.T)
    return torch.linalg.lstsq(m.v + 9 * EYE, x.T).solution.T


def implicit_step(m, x, z):
    J = EYE - 0.1 * torch.diag_embed(1 - torch.tanh(z) ** 2) @ m.w
    return torch.linalg.solve(J, torch.tanh(z) + x @ m.u.T)


# Derivatives inside


def energy(m, z):
    return (m.net(z) ** 2).sum()


def perceptron(outputs: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(N, 5), nn.Tanh(), nn.Linear(5, outputs))


def hamiltonian(m, t, z):
    g = grad(lambda y: energy(m, y))(z)
    return torch.cat([g[:, 3:], -g[:, :3]], 1)


def by_autograd(m, t, z):
    with torch.enable_grad():
        z = z.clone().requires_grad_()
        return torch.autograd.grad(energy(m, z), z, create_graph=True)[0] @ (m.w - m.w.T)


def with_divergence(m, t, z):
    J = vmap(jacrev(m.net))(z)
    return m.net(z) - z * J.diagonal(0, 1, 2).sum(1, keepdim=True)


def with_estimated_divergence(m, t, z):
    velocity, pull = vjp(m.net, z)
    return velocity - z * (pull(m.probe.expand_as(z))[0] * m.probe).sum(1, keepdim=True)


def along(m, t, z):
    return jvp(m.net, (z,), (torch.tanh(z),))[1] - z


def projected_by_lyapunov(m, t, z):
    g, f = vmap(grad(lambda y: energy(m, y) + (y**2).sum() / 9))(z), torch.tanh(z @ m.w) - z
    excess = F.relu((g * f).sum(1, keepdim=True) + 0.1 * (z**2).sum(1, keepdim=True))
    return f - g * excess / (g**2).sum(1, keepdim=True).clamp(min=1e-6)


def curvature(m, x):
    return vmap(hessian(lambda y: energy(m, y)))(x).flatten(1)


def after_one_step_of_learning(m, x):
    theta = dict(m.net.named_parameters())

    def learn(y: Tensor) -> Tensor:
        g = grad(lambda p: (functional_call(m.net, p, (y,)) ** 2).sum())(theta)
        return functional_call(m.net, {name: p - 0.1 * g[name] for name, p in theta.items()}, (y,))

    return vmap(learn)(x)


def downhill(m, x, z):
    return z - 0.1 * grad(lambda y: (torch.tanh(before(m, x, y)) ** 2).sum())(z)


# Lookups by time


def from_a_table(m, t, z):
    return torch.tanh(z @ m.w.T + m.table[(t * 10).long()]) - z


def interpolated(m, t, z):
    after = torch.searchsorted(m.times, t.reshape(1)).clamp(1, 10)
    share = ((t - m.times[after - 1]) / (m.times[after] - m.times[after - 1]))[:, None]
    return torch.tanh(z @ m.w.T + (1 - share) * m.table[after - 1] + share * m.table[after]) - z


def learnt_table(m, t, z):
    return torch.tanh(z @ m.w.T + m.v[torch.bucketize(t, m.times[::2].contiguous()).clamp(max=5)]) - z


def hypernetwork(m, t, z):
    W = m.make(t.reshape(1))
    return torch.tanh(z @ W.view(N, N).T) - z


TABLE = {"table": torch.randn(11, N, generator=torch.Generator().manual_seed(0)), "times": torch.linspace(0, 1, 11)}


# Functions of the user


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        ctx.slope = slope
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g / (1 + ctx.slope * ctx.saved_tensors[0].abs()) ** 2, None


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return torch.round(4 * w) / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g


class Both(torch.autograd.Function):
    """A product whose first result has its derivative, and a comparison with that of a difference."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:  # type: ignore[override]
        a, b = ctx.saved_tensors
        return g * b + h, g * a - h

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b)
        return a * b, (a > b).to(a)


@torch.library.custom_op("kpflow_wide::soft", mutates_args=())
def soft(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x * w / (1 + x.abs()), torch.sin(x)


soft.register_fake(lambda x, w: (torch.empty_like(x), torch.empty_like(x)))
soft.register_autograd(
    lambda ctx, g, h: (
        g * ctx.saved_tensors[1] / (1 + ctx.saved_tensors[0].abs()) ** 2 + h * torch.cos(ctx.saved_tensors[0]),
        (g * ctx.saved_tensors[0] / (1 + ctx.saved_tensors[0].abs())).sum(0),
    ),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


SLOPE = torch.tensor(3.0, dtype=torch.float64)  # which a Function takes, but only its backward pass reads


def spiking(m, x, z):
    spikes = Spike.apply(z - 0.1, SLOPE)
    return 0.9 * z * (1 - spikes.detach()) + x @ m.u.T + spikes @ Rounded.apply(m.w).T


def two_results(m, x):
    a, b = Both.apply(x @ m.w, torch.tanh(x))
    return a + b * m.b


def of_torch_library(m, x):
    a, b = soft(x @ m.w, m.b)
    return a * b


# Gradient hooks


def hooked_on_the_way(m, x, z):
    h, w = before(m, x, z), m.v * 1
    for part, scale in ((h, 0.5), (w, 3.0)):
        if part.requires_grad:
            part.register_hook(lambda g, scale=scale: scale * g.flip(-1))
            part.register_hook(lambda g: g * torch.arange(N))
    return torch.tanh(h) @ w


def hooked_around_writes(m, x, z):
    h = before(m, x, z) * 1
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    h.mul_(m.v[0])
    if h.requires_grad:
        h.register_hook(lambda g: 3 * g.flip(-1))
        h.register_hook(lambda g: g * torch.arange(N))
    return torch.tanh(h) + torch.sin(h)


# Attention over parts of a state


class Slots(nn.Module):
    """Three slots of four units that attend to each other."""

    hidden_size = 12

    def __init__(self, function: Callable[..., Tensor], attend: Callable[[], nn.Module] = nn.Identity) -> None:
        super().__init__()
        self.function, self.attend, self.read = function, attend(), nn.Linear(2, 12)
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.function(self, z.unflatten(1, (3, 4))).flatten(1) + self.read(x))


def multihead(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options)


def causal(m, s):
    return m.attend(s, s, s, attn_mask=nn.Transformer.generate_square_subsequent_mask(3), is_causal=True)[0]


def by_hand(m, s):
    scores = (m.q(s) @ m.k(s).mT / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ m.v(s)


SLOTS: dict[str, tuple[Callable[..., Tensor], Callable[[], nn.Module]]] = {
    "multihead": (lambda m, s: m.attend(s, s, s)[0], multihead()),
    "causal": (causal, multihead(bias=False)),
    "dot_product": (lambda m, s: F.scaled_dot_product_attention(m.q(s), m.k(s), m.v(s), is_causal=True), nn.Identity),
    "by_hand": (by_hand, nn.Identity),
    "encoder": (lambda m, s: m.attend(s), lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)),
}
NETWORKS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "weight_in_parts": (weight_in_parts, {}),
    "pruned": (pruned, {}),
    "normed": (normed, {}),
    "quantised": (quantised, {}),
    "convolved_on_a_graph": (convolved_on_a_graph, {"edges": EDGES}),
    "attended_on_a_graph": (attended_on_a_graph, {"edges": EDGES}),
    "by_numbers_of_buffers": (by_numbers_of_buffers, BUFFERS),
    "several_results": (several_results, {}),
    "of_matrices": (of_matrices, {}),
    "without_a_forward_mode": (without_a_forward_mode, {}),
    "solved": (solved, {}),
    "factored": (factored, {}),
    "curvature": (curvature, {"net": perceptron(2)}),
    "after_one_step_of_learning": (after_one_step_of_learning, {"net": perceptron(3)}),
    "two_results": (two_results, {}),
    "of_torch_library": (of_torch_library, {}),
    "checkpointed": (lambda m, x: checkpoint(lambda y: torch.tanh(y @ m.w), x, use_reentrant=False) @ m.v, {}),
}
CELLS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "by_slices": (by_slices, {}),
    "gates_in_place": (gates_in_place, {}),
    "by_mask": (by_mask, {}),
    "by_fixed_mask": (by_fixed_mask, {"mask": torch.tensor([1, 0, 1, 1, 0, 0]).bool()}),
    "by_list": (by_list, {}),
    "added_at": (added_at, {}),
    "implicit_step": (implicit_step, {}),
    "downhill": (downhill, {}),
    "spiking": (spiking, {}),
    "hooked_on_the_way": (hooked_on_the_way, {}),
    "hooked_around_writes": (hooked_around_writes, {}),
}
FIELDS: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "velocity_in_parts": (velocity_in_parts, {}),
    "hamiltonian": (hamiltonian, {"net": perceptron(1)}),
    "by_autograd": (by_autograd, {"net": perceptron(1)}),
    "with_divergence": (with_divergence, {"net": perceptron(N)}),
    "with_estimated_divergence": (with_estimated_divergence, {"net": perceptron(N), "probe": torch.ones(N)}),
    "along": (along, {"net": perceptron(N)}),
    "projected_by_lyapunov": (projected_by_lyapunov, {"net": perceptron(3)}),
    "from_a_table": (from_a_table, TABLE),
    "interpolated": (interpolated, TABLE),
    "learnt_table": (learnt_table, TABLE),
    "hypernetwork": (hypernetwork, {"make": lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, N * N))}),
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "sum_of_rows": (lambda: nn.EmbeddingBag(7, 4, mode="sum"), torch.tensor([[1, 2, 2], [0, 3, 6]])),
    "mean_of_rows": (lambda: nn.EmbeddingBag(7, 4, padding_idx=0), torch.tensor([[1, 2, 2], [0, 3, 6]])),
    "largest_of_rows": (lambda: nn.EmbeddingBag(7, 4, mode="max"), torch.tensor([[1, 2, 2], [0, 3, 6]])),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), torch.randn(3, 4)),
    "circular": (lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), torch.randn(2, 2, 5)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, groups=4, dilation=2), torch.randn(2, 4, 6)),
    "group_norm": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.GroupNorm(2, 4)), torch.randn(2, 4, 3)),
    "script": (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.Tanh())), torch.randn(3, 4)),
    "compiled": (lambda: torch.compile(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), backend="eager"), torch.randn(3, 4)),
    "one_hot": (lambda: Of(lambda m, x: F.one_hot(x, N).to(m.w) @ m.w), torch.tensor([[1, 2, 2], [0, 3, 5]])),
    "loop": (lambda: Of(out_of_a_loop), torch.randn(2, 3, 2)),
}


@pytest.fixture(autouse=True)
def _in_double_precision() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


QUICK_NETWORKS = {"weight_in_parts", "normed", "convolved_on_a_graph", "by_numbers_of_buffers", "several_results"}
QUICK_NETWORKS |= {"without_a_forward_mode", "solved", "two_results", "of_torch_library"}
QUICK_CELLS = {
    "by_slices",
    "by_mask",
    "by_fixed_mask",
    "spiking",
    "downhill",
    "hooked_on_the_way",
    "hooked_around_writes",
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", cases(NETWORKS, QUICK_NETWORKS))
def test_networks(name: str) -> None:
    function, parts = NETWORKS[name]
    check_network(lambda: Of(function, **parts), torch.randn(3, N))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", cases(LAYERS, {"mean_of_rows", "largest_of_rows", "circular", "script", "loop"}))
def test_layers(name: str) -> None:
    check_network(*LAYERS[name])


@pytest.mark.parametrize("name", cases(CELLS, QUICK_CELLS))
def test_cells(name: str) -> None:
    function, parts = CELLS[name]
    check_cell(lambda: Of(function, **parts))


@pytest.mark.parametrize("name", cases(FIELDS, {"velocity_in_parts", "by_autograd", "from_a_table"}))
def test_fields(name: str) -> None:
    function, parts = FIELDS[name]
    check_field(lambda: Of(function, **parts))


@pytest.mark.parametrize("name", cases(SLOTS, {"multihead"}))
def test_attention_over_parts_of_a_state(name: str) -> None:
    check_cell(lambda: Slots(*SLOTS[name]))


def test_a_trace_that_hangs_on_a_buffer_is_not_taken_for_another() -> None:
    class Marked(nn.Module):
        hidden_size = N

        def __init__(self, mask: Tensor) -> None:
            super().__init__()
            self.layer = nn.Linear(N, N)
            self.register_buffer("mask", mask)

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            y = self.layer(z)
            y[:, self.mask] = x[:, :1]
            return torch.tanh(y)

    for mask in ([1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]):
        check_cell(lambda mask=mask: Marked(torch.tensor(mask).bool()))


def test_gradient_hooks_of_parameters() -> None:
    """A mask on one weight, as norse takes away what neurons learn to tell themselves, and nothing on another."""
    off_diagonal = 1 - torch.eye(N)

    def make() -> nn.Module:
        cell = Of(lambda m, x, z: torch.tanh(before(m, x, z) + z @ m.v))
        cell.w.register_hook(lambda g: g.clone().fill_diagonal_(0.0))
        cell.v.register_hook(lambda g: None)
        cell.v.register_hook(lambda g: 2 * g * off_diagonal)
        cell.v.register_hook(lambda g: g.flip(0))
        return cell

    check_cell(make)


def test_what_is_detached_inside_of_a_derivative_stays_so() -> None:
    def step(m: Any, x: Tensor, z: Tensor) -> Tensor:
        return grad(lambda y: (torch.tanh(y @ m.w.T) * torch.sin(y.detach())).sum())(z) + torch.tanh(x @ m.u.T).data

    check_cell(lambda: Of(step))


def test_one_value_per_row_of_a_mask() -> None:
    def step(m: Any, x: Tensor, z: Tensor) -> Tensor:
        y = before(m, x, z)
        y[x[:, 0] > 0] = 0.5
        return torch.tanh(y)

    check_cell(lambda: Of(step))


NOT_FOLLOWED: dict[str, tuple[Callable[..., Tensor], dict[str, Any], str]] = {
    "branch": (lambda m, x: torch.stack([r @ m.w if r[0] > 0 else r @ m.v for r in x]), {}, "torch.where"),
    "number": (lambda m, x: torch.stack([r @ m.w * float(r.max()) for r in x]), {}, "torch.where"),
    "indices": (lambda m, x: torch.stack([(r @ m.w)[r > 0].sum()[None] for r in x]), {}, "torch.where"),
    "sparse": (lambda m, x: torch.sparse.mm(m.edges, (x @ m.w).T).T, {"edges": EYE.to_sparse()}, "sparse"),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_is_not_followed_is_said(name: str) -> None:
    function, parts, says = NOT_FOLLOWED[name]
    torch.manual_seed(0)
    net, x = Of(function, **parts).double(), torch.randn(3, N)
    with pytest.warns(kp.UntracedWarning, match=f"could not be traced.*{says}"):
        assert kp.linearize(kp.solve(kp.StaticProblem(net, x, ""))).sites == []


def checked(m, x):
    """Which asks values, as checks do, branches on weights, and iterates until it has converged."""
    assert torch.isfinite(x).all()
    if x.isnan().any() or m.w.abs().max() > 1e6:
        raise ValueError("not healthy")
    h = torch.zeros_like(x)
    with torch.no_grad():
        while (change := (torch.tanh(0.1 * h @ m.w + x @ m.v) - h)).abs().max() > 1e-14:
            h = h + change
    h = torch.tanh(0.1 * h @ m.w + x @ m.v)[:, : int((m.w > -1e6).sum()) // N]
    return torch.distributions.Normal(h @ m.w, F.softplus(m.b)).log_prob(x) + (h if m.b.sum() > -99 else x)


def test_what_all_trials_decide_alike() -> None:
    check_network(lambda: Of(checked), torch.randn(3, N))
    values_on_the_way = kp.solve(kp.StaticProblem(Of(checked), torch.randn(3, N), None))  # which only the trace knows
    assert re.search("could not be traced.*torch.where.*name modules", values_on_the_way.untraced)
