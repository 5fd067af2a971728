"""Idioms of published torch models: each is on the first road, and its operators are those of autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_wide_tracing_torch import N, Of, _in_double_precision, check_network  # noqa: F401
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint_sequential

TIMES = 5
IDIOMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {}


def vectors() -> Tensor:
    return torch.randn(3, N)


def sequences() -> Tensor:
    return torch.randn(3, TIMES, N)


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def idiom(x: Callable[[], Tensor], **parts: Any) -> Callable:
    """Add a function of a module `Of` and of inputs like these."""

    def add(function: Callable[..., Tensor]) -> Callable:
        IDIOMS[function.__name__] = (lambda: Of(function, **parts)), x
        return function

    return add


# Attention, and what came after it


@idiom(sequences, mask=torch.ones(TIMES, TIMES).tril().bool())
def masked_attention(m, x):
    q, k = x @ m.w, x @ m.v
    causal = F.scaled_dot_product_attention(q, k, x, is_causal=True)
    return causal + F.scaled_dot_product_attention(q[:, None], k[:, None], x[:, None], attn_mask=m.mask)[:, 0]


@idiom(sequences)
def grouped_queries(m, x):
    q = (x @ m.w).view(len(x), TIMES, 3, 2).transpose(1, 2)
    k = (x @ m.v)[..., :2].view(len(x), TIMES, 1, 2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


@idiom(sequences)
def rotary_with_alibi(m, x):
    angles = torch.arange(5.0)[:, None] * 10000 ** (-torch.arange(3.0) / 3)

    def turned(y: Tensor) -> Tensor:
        pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], 3, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    scores = turned(x @ m.w) @ turned(x @ m.v).mT - 0.5 * (angles[:, :1] - angles[:, :1].T).abs()
    return scores.masked_fill(torch.ones(TIMES, TIMES).triu(1).bool(), -1e9).softmax(-1) @ x


@idiom(sequences)
def relative_positions(m, x):
    scores = F.pad((x @ m.w) @ m.v[:TIMES].T, (1, 0)).view(len(x), TIMES + 1, TIMES)[:, 1:]
    return scores.reshape(len(x), TIMES, TIMES).softmax(-1) @ x


@idiom(sequences)
def linear_attention(m, x):
    q, k = F.elu(x @ m.w) + 1, F.elu(x @ m.v) + 1
    state = torch.einsum("btd,bte->btde", k, x * m.b).cumsum(1)
    return torch.einsum("btd,btde->bte", q, state) / torch.einsum("btd,btd->bt", q, k.cumsum(1))[..., None]


@idiom(sequences)
def retention(m, x):
    t = torch.arange(5.0)
    decay = torch.where(t[:, None] >= t, torch.sigmoid(m.b[0]) ** (t[:, None] - t).clamp(min=0), torch.zeros(()))
    out = ((x @ m.w) @ (x @ m.v).mT * decay) @ x
    return F.group_norm(out.flatten(0, 1), 2).view_as(x) * F.silu(x @ m.w)


@idiom(sequences, cell=lambda: nn.GRUCell(N, N), norm=lambda: nn.LayerNorm(N))
def slot_attention(m, x):
    x, slots = m.norm(x), m.w[:3].expand(len(x), -1, -1)
    for _ in range(2):
        shares = torch.einsum("bsd,btd->bst", m.norm(slots) @ m.v, x * m.b).softmax(1) + 1e-8
        update = torch.einsum("bst,btd->bsd", shares / shares.sum(-1, keepdim=True), x)
        slots = m.cell(update.reshape(-1, N), slots.reshape(-1, N)).view(len(x), 3, N)
    return slots


@idiom(sequences, control=lambda: nn.LSTMCell(N + 4, 5), heads=lambda: nn.Linear(5, 16))
def memory_of_a_turing_machine(m, x):
    memory, read = m.w[:, :4].expand(len(x), -1, -1), x.new_zeros(len(x), 4)
    h = x.new_zeros(len(x), 5), x.new_zeros(len(x), 5)
    weights, out = F.one_hot(torch.zeros(len(x), dtype=torch.long), N).to(x), []
    for x_t in x.unbind(1):
        h = m.control(torch.cat([x_t, read], 1), h)
        key, sharp, shift, erase, add = m.heads(h[0]).split([4, 1, 3, 4, 4], 1)
        weights = (F.softplus(sharp) * F.cosine_similarity(memory, key[:, None], -1) + weights).softmax(-1)
        weights = sum(shift.softmax(-1)[:, j : j + 1] * weights.roll(j - 1, 1) for j in range(3)) ** 1.5
        weights = weights / weights.sum(1, keepdim=True)
        memory = memory * (1 - weights[..., None] * torch.sigmoid(erase)[:, None]) + weights[..., None] * add[:, None]
        read = (weights[..., None] * memory).sum(1)
        out.append(torch.cat([h[0], read], 1))
    return torch.stack(out, 1)


# Mixtures and choices


@idiom(sequences)
def experts_by_gates(m, x):
    gates = (x @ m.w[:, :3]).softmax(-1)
    values, chosen = gates.topk(2, -1)
    gates = torch.zeros_like(gates).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
    hidden = F.gelu(torch.einsum("btd,deh->bteh", x, m.v.view(N, 3, 2)))
    return torch.einsum("bteh,bte,hd->btd", hidden, gates, m.u.T)


@idiom(sequences)
def experts_by_numbers(m, x):
    share, chosen = (x @ m.w[:, :3]).softmax(-1).max(-1)
    return share[..., None] * torch.tanh(torch.einsum("btd,btd->bt", x, m.v[chosen])[..., None] + m.u[chosen])


@idiom(vectors)
def hard_choices(m, x):
    h = x @ m.w
    soft = h.softmax(-1)
    hard = F.one_hot(h.argmax(-1), N).to(h)
    once = torch.zeros_like(soft).scatter_(-1, soft.max(-1, keepdim=True)[1], 1.0)
    rounded = h + (torch.round(4 * h) / 4 - h).detach()
    return rounded @ m.v + (hard - soft.detach() + soft) * m.b + (once - soft).detach() + soft


@idiom(vectors)
def sinkhorn(m, x):
    plan = x[:, :, None] * m.w
    for _ in range(4):
        plan = plan - plan.logsumexp(1, keepdim=True)
        plan = plan - plan.logsumexp(2, keepdim=True)
    return torch.einsum("bij,bj->bi", plan.exp(), x) @ m.v


# Orders, places and sums


@idiom(sequences)
def cumulative(m, x):
    largest = torch.cummax(x @ m.w, 1).values
    return (
        torch.cumsum(x @ m.w, 1) + torch.cumprod(torch.sigmoid(x @ m.v), 1) + torch.logcumsumexp(x * m.b, 1) + largest
    )


@idiom(vectors)
def ordered(m, x):
    h = x @ m.w
    values, order = h.sort(-1, descending=True)
    middle = h.median(1, keepdim=True).values + h.kthvalue(2, keepdim=True).values
    return values * m.b + h.gather(1, order.flip(1)) + torch.zeros_like(x).scatter_add(1, order, x * m.v[0]) + middle


@idiom(vectors)
def segments(m, x):
    h, part = torch.tanh(x @ m.w), torch.tensor([0, 0, 1, 2, 2, 1]).expand(len(x), -1)
    sums = torch.zeros(len(x), 3).scatter_add(1, part, h)
    largest = torch.full((len(x), 3), -9.0).scatter_reduce(1, part, h, "amax")
    return torch.cat([sums, largest, torch.zeros(len(x), 3).scatter_reduce(1, part, h, "mean", include_self=False)], 1)


@idiom(vectors)
def safe_from_nan(m, x):
    h = x @ m.w
    safe = torch.where(h > 0, h, torch.ones_like(h))
    kept = h.masked_fill(torch.tensor([0, 1, 0, 0, 1, 0]).bool(), float("-inf")).softmax(-1)
    return torch.where(h > 0, safe.log(), torch.zeros_like(h)) + torch.where(x == 0, 1.0, torch.sin(x) / x) * m.b + kept


@idiom(vectors)
def splines(m, x):
    knots = torch.linspace(-3, 3, N)
    after = torch.searchsorted(knots, x.contiguous()).clamp(1, N - 1)
    share = (x - knots[after - 1]) / (knots[after] - knots[after - 1])
    grid, y = torch.linspace(-2.5, 2.5, 9), x[..., None]
    basis = ((y >= grid[:-1]) & (y < grid[1:])).to(x)
    for k in range(1, 4):
        left = (y - grid[: -(k + 1)]) / (grid[k:-1] - grid[: -(k + 1)]) * basis[..., :-1]
        basis = left + (grid[k + 1 :] - y) / (grid[k + 1 :] - grid[1:-k]) * basis[..., 1:]
    return m.b[after - 1] * (1 - share) + m.b[after] * share + torch.einsum("bik,ik->bi", basis, m.w[:, :5])


# Linear algebra, also of data


@idiom(vectors)
def of_matrices_of_data(m, x):
    A = torch.tanh(x[:, :, None] * m.w)
    S = A @ A.mT + torch.eye(N)
    Q = torch.linalg.qr(A + 2 * torch.eye(N))[0]
    found = torch.linalg.solve(S, x[:, :, None])[..., 0] + torch.linalg.eigh(S)[0].log() + (Q * m.v).sum(1)
    return found + torch.linalg.inv(S)[:, 0] + torch.logdet(S)[:, None] + torch.linalg.cholesky(S)[:, :, 0]


@idiom(vectors)
def gaussian_process(m, x):
    kernel = torch.exp(-(torch.cdist(m.w, m.w) ** 2) / 2) + 0.1 * torch.eye(N)
    return torch.exp(-(torch.cdist(x, m.w) ** 2) / 2) @ torch.linalg.solve(kernel, m.v)


@idiom(vectors)
def likelihoods(m, x):
    """Which check their arguments."""
    D = torch.distributions
    normal = D.Normal(x @ m.w, F.softplus(m.b))
    joint = D.MultivariateNormal(m.b, m.w @ m.w.T + torch.eye(N)).log_prob(x)
    divergence = D.kl_divergence(normal, D.Normal(torch.zeros(N), torch.ones(N))).sum(-1)
    return torch.stack([normal.log_prob(x).sum(-1), joint, divergence, D.Categorical(logits=x @ m.v).entropy()], -1)


# Modules in modules


@idiom(vectors, make=lambda: nn.Linear(N, N * N))
def hypernetwork(m, x):
    return torch.bmm(x[:, None], torch.tanh(m.make(x)).view(-1, N, N))[:, 0] + x @ torch.tanh(m.make(m.b[None])).view(
        N, N
    )


@idiom(vectors, net=lambda: nn.Sequential(nn.Linear(N, 4), nn.Tanh(), nn.Linear(4, N)))
def called_with_other_weights(m, x):
    own = {name: 1.1 * p + m.b.mean() for name, p in m.net.named_parameters()}
    ensemble = vmap(lambda W: torch.tanh(x @ W))(torch.stack([m.w, m.v, m.w * m.b])).mean(0)
    return functional_call(m.net, own, (x,)) + checkpoint_sequential(m.net, 2, x, use_reentrant=False) + ensemble


@idiom(vectors, lists=lambda: nn.ParameterList([torch.randn(N, N), torch.randn(N)]))
def weights_in_lists(m, x):
    named = nn.ParameterDict({"a": m.lists[0], "b": m.lists[1]})
    return torch.tanh(x @ m.lists[0]) * named["b"] @ named["a"].T


@idiom(lambda: torch.randint(7, (3, TIMES)), table=lambda: nn.Embedding(7, N), layer=lambda: nn.Linear(N, N))
def tied(m, tokens):
    return F.linear(torch.tanh(m.layer(m.table(tokens)).cumsum(1)), m.table.weight)


@idiom(sequences, rnn=lambda: nn.LSTM(N, 3, num_layers=2, bidirectional=True, batch_first=True))
def packed(m, x):
    packed = rnn.pack_padded_sequence(x, torch.full((len(x),), 3), batch_first=True)
    return rnn.pad_packed_sequence(m.rnn(packed)[0], batch_first=True, total_length=TIMES)[0]


@idiom(sequences, rnn=lambda: nn.GRU(N, 4, batch_first=True))
def last_one_that_counts(m, x):
    lengths = (x[..., 0] > 0).sum(1).clamp(min=1)
    return m.rnn(x)[0][torch.arange(len(x)), lengths - 1]


class Tagged(Tensor):
    """A class of tensors."""


@idiom(vectors)
def of_another_class(m, x):
    return torch.tanh(x.as_subclass(Tagged) @ m.w).as_subclass(Tensor) * m.b


# Images and signals


@idiom(images, locate=lambda: nn.Linear(192, 6))
def spatial_transformer(m, x):
    theta = (0.1 * m.locate(x.flatten(1)) + torch.eye(2, 3).flatten()).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=True), align_corners=True)


@idiom(images, mix=lambda: nn.Linear(12, 12))
def patches(m, x):
    return F.fold(torch.tanh(m.mix(F.unfold(x, 2, stride=2).mT)).mT, (8, 8), 2, stride=2)


@idiom(images, convolution=lambda: nn.Conv2d(3, 2, 1))
def unpooled(m, x):
    values, places = F.max_pool2d(torch.tanh(m.convolution(x)), 2, return_indices=True)
    return F.max_unpool2d(values, places, [2, 2])


@idiom(images, kernel=lambda: nn.ParameterList([0.1 * torch.randn(3, 2, 4, 4, dtype=torch.complex128)]))
def spectral_convolution(m, x):
    found, out = torch.fft.rfft2(x), torch.zeros(len(x), 2, 8, 5, dtype=torch.complex128)
    out[:, :, :4, :4] = torch.einsum("bixy,ioxy->boxy", found[:, :, :4, :4], m.kernel[0])
    return torch.fft.irfft2(out, s=(8, 8))


def norms() -> nn.Module:
    groups = nn.Conv2d(3, 6, 3), nn.GroupNorm(3, 6), nn.InstanceNorm2d(6, affine=True), nn.LocalResponseNorm(3)
    return nn.Sequential(*groups, nn.BatchNorm2d(6), nn.LayerNorm([6, 6, 6]), nn.Flatten(), nn.RMSNorm(216)).eval()


def pools() -> nn.Module:
    first = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.AdaptiveAvgPool2d(5), nn.PReLU(4)
    return nn.Sequential(*first, nn.Conv2d(4, 4, 2), nn.AdaptiveMaxPool2d(3), nn.AvgPool2d(2, 1), nn.LPPool2d(2, 2, 1))


def resized() -> nn.Module:
    wider = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Upsample(size=(5, 5), mode="bicubic")
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.PixelShuffle(2), *wider, nn.ChannelShuffle(2))


def parametrized() -> nn.Module:
    layers = parametrizations.weight_norm(nn.Linear(N, 4)), nn.Tanh(), parametrizations.spectral_norm(nn.Linear(4, 4))
    return nn.Sequential(*layers, parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="householder")).eval()


IDIOMS |= {"norms": (norms, images), "pools": (pools, images), "resized": (resized, images)}
IDIOMS |= {"parametrized": (parametrized, vectors)}


@pytest.mark.filterwarnings("ignore:.*no forward mode", "ignore:There is a performance drop")
@pytest.mark.parametrize("name", IDIOMS)
def test_idioms(name: str) -> None:
    make, x = IDIOMS[name]
    torch.manual_seed(1)
    check_network(make, x())
