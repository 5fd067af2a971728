"""A grammar of torch models: operations, ways to keep a weight, hooks and ways to call, put together at random."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from random_models import INPUTS, UNITS, Piece, Recipe
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

TOKENS = 3
SQUARE, VECTOR = (UNITS, UNITS), (UNITS,)


@dataclass(frozen=True)
class Operation:
    """h [row, unit] -> [row, unit] with parameters and modules of its own; `refused` where it has no derivative."""

    call: Callable[..., Tensor]
    parts: dict[str, Any] = field(default_factory=dict)
    refused: bool = False


OPERATIONS: dict[str, Operation] = {}


def operation(*, refused: bool = False, **parts: Any) -> Callable:
    """Add a function (p, h, x), with parameters of these shapes or modules that these functions make."""

    def to_registry(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        OPERATIONS[call.__name__.strip("_")] = Operation(call, parts, refused)
        return call

    return to_registry


def elementwise(name: str, call: Callable[[Tensor], Tensor]) -> None:
    OPERATIONS[name] = Operation(lambda p, h, x: call(h * p.scale + p.shift), {"scale": VECTOR, "shift": VECTOR})


for name, call in {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "logsigmoid": F.logsigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "hardtanh": lambda h: F.hardtanh(h, -0.4, 0.6),
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "threshold": lambda h: F.threshold(h, 0.1, 0.3),
    "softshrink": lambda h: F.softshrink(h, 0.1),
    "hardshrink": lambda h: F.hardshrink(h, 0.1),
    "abs": torch.abs,
    "sin": torch.sin,
    "exp_of_tanh": lambda h: torch.exp(torch.tanh(h)),
    "log1p": lambda h: torch.log1p(h * h),
    "sqrt": lambda h: torch.sqrt(1 + h * h),
    "rsqrt": lambda h: torch.rsqrt(1 + h * h),
    "atan2": lambda h: torch.atan2(h, 1 + h * h),
    "erf": torch.erf,
    "power": lambda h: (1 + h * h) ** -0.7,
    "xlogy": lambda h: torch.xlogy(h * h, 1 + h * h),
    "logaddexp": lambda h: torch.logaddexp(h, -h),
    "hypot": lambda h: torch.hypot(h, 1 + h),
    "sinc": torch.sinc,
    "clamp": lambda h: h.clamp(-0.5, 0.7),
    "round": lambda h: h + torch.round(3 * h),
    "floor_division": lambda h: h + torch.div(h, 0.3, rounding_mode="floor"),
    "remainder": lambda h: torch.remainder(h, 0.7),
    "sign": lambda h: h * torch.sign(h - 0.1),
    "nan_to_num": torch.nan_to_num,
    "where": lambda h: torch.where(h > 0.1, h, h * h),
    "maximum": lambda h: torch.maximum(h, 0.3 * h.flip(-1)),
    "minimum": lambda h: torch.minimum(h, h.roll(1, -1)),
    "roll": lambda h: h.roll(1, -1) * h,
    "flip": lambda h: h.flip(-1) * 0.5 + h,
    "cat": lambda h: torch.cat([h[:, 1:], h[:, :1].sin()], -1),
    "stack": lambda h: torch.stack([h, h.cos()], -1).sum(-1),
    "chunk": lambda h: torch.cat([a * b for a, b in zip(h.chunk(2, -1), h.flip(-1).chunk(2, -1), strict=True)], -1),
    "split": lambda h: torch.cat([part.cumsum(-1) for part in h.split([1, 3], -1)], -1),
    "unbind": lambda h: torch.stack([part * (n + 1) for n, part in enumerate(h.unbind(-1))], -1),
    "tensor_split": lambda h: torch.cat(h.tensor_split([1, 2], -1)[::-1], -1),
    "meshgrid": lambda h: (h[:, :, None] * h[:, None, :]).sum(-1),
    "outer": lambda h: torch.einsum("bi,bj->bij", h, h.tanh()).amax(-1),
    "gather": lambda h: h.gather(-1, h.argsort(-1)) * 0.5 + h,
    "take_along_dim": lambda h: h.take_along_dim(h.detach().argmax(-1, keepdim=True), -1) + h,
    "index_select": lambda h: h.index_select(-1, torch.tensor([3, 1, 1, 0])),
    "advanced_index": lambda h: h[:, [2, 0, 3, 3]],
    "index_add": lambda h: torch.zeros_like(h).index_add(-1, torch.tensor([0, 0, 2, 3]), h),
    "index_copy": lambda h: h.index_copy(-1, torch.tensor([1, 2]), h[:, :2].sin()),
    "scatter": lambda h: torch.zeros_like(h).scatter(-1, torch.tensor([[3, 2, 1, 0]]).expand_as(h), h.tanh()),
    "scatter_add": lambda h: h.scatter_add(-1, torch.tensor([[0, 0, 1]]).expand(len(h), 3), h[:, 1:]),
    "scatter_reduce": lambda h: h.scatter_reduce(-1, torch.tensor([[0, 0, 1, 3]]).expand_as(h), h.flip(-1), "amax"),
    "masked_fill": lambda h: h.masked_fill(h > 0.3, 0.3),
    "masked_scatter": lambda h: h.masked_scatter(h > 0.1, h.flip(-1).reshape(-1)),
    "cumsum": lambda h: h.cumsum(-1),
    "cumprod": lambda h: (1 + 0.3 * h.tanh()).cumprod(-1),
    "cummax": lambda h: h.cummax(-1).values + h,
    "logcumsumexp": lambda h: h.logcumsumexp(-1),
    "diff": lambda h: torch.diff(h, prepend=h[:, -1:]),
    "logsumexp": lambda h: h - h.logsumexp(-1, keepdim=True),
    "softmax": lambda h: h.softmax(-1),
    "log_softmax": lambda h: h.log_softmax(-1),
    "sort": lambda h: h.sort(-1).values,
    "topk": lambda h: h - h.topk(2, -1).values.sum(-1, keepdim=True),
    "kthvalue": lambda h: h - h.kthvalue(2, -1, keepdim=True).values,
    "median": lambda h: h * h.median(-1, keepdim=True).values,
    "max_along": lambda h: h * h.max(-1, keepdim=True).values,
    "amin": lambda h: h + h.amin(-1, keepdim=True),
    "norm": lambda h: h / (1 + h.norm(dim=-1, keepdim=True)),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "standardize": lambda h: (h - h.mean(-1, keepdim=True)) / (0.1 + h.std(-1, keepdim=True)),
    "layer_norm": lambda h: F.layer_norm(h, (UNITS,)),
    "rms_norm": lambda h: F.rms_norm(h, (UNITS,)),
    "group_norm": lambda h: F.group_norm(h, 2),
    "local_response_norm": lambda h: F.local_response_norm(h[:, :, None], 2)[..., 0],
    "cosine_similarity": lambda h: h * F.cosine_similarity(h, h.flip(-1) + 1, dim=-1)[:, None],
    "cdist": lambda h: torch.cdist(h[:, :, None], h[:, :, None] ** 2 + 1).sum(-1),
    "fft": lambda h: torch.fft.fft(h).abs(),
    "rfft": lambda h: torch.fft.irfft(torch.fft.rfft(h) * torch.tensor([1.0, 0.5j, -1.0]), n=UNITS),
    "complex": lambda h: (torch.complex(h, h.flip(-1)) ** 2).real,
    "view_as_complex": lambda h: torch.view_as_real(torch.view_as_complex(h.reshape(-1, 2, 2)) * 1j).flatten(1),
    "pad": lambda h: F.pad(h, (1, 1), mode="circular")[:, 1:-1] * F.pad(h, (1, 0))[:, :-1],
    "unfold": lambda h: F.pad(h, (1, 0)).unfold(-1, 2, 1).prod(-1),
    "avg_pool": lambda h: F.avg_pool1d(h[:, None], 2, 1, padding=0)[:, 0].repeat(1, 2)[:, :UNITS],
    "max_pool": lambda h: h + F.max_pool1d(h[:, None], 2).repeat_interleave(2, -1)[:, 0],
    "adaptive_pool": lambda h: h * F.adaptive_avg_pool1d(h[:, None], 2).repeat(1, 1, 2)[:, 0],
    "interpolate": lambda h: F.interpolate(h[:, None], 7, mode="linear", align_corners=True)[:, 0, :UNITS],
    "pixel_shuffle": lambda h: F.pixel_shuffle(h[:, :, None, None], 2).flatten(1),
    "tril": lambda h: (torch.tril(h[:, :, None] * h[:, None]) @ h[:, :, None])[..., 0],
    "diag_embed": lambda h: torch.diag_embed(h.tanh()).sum(-1) * h,
    "triangular_solve": lambda h: torch.linalg.solve_triangular(
        torch.diag_embed(2 + h.tanh()) + torch.tril(h[:, :, None] * 0.1, -1), h[:, :, None], upper=False
    )[..., 0],
    "expand_and_sum": lambda h: h[:, None].expand(-1, 3, -1).sum(1),
    "movedim": lambda h: h.reshape(-1, 2, 2).movedim(1, 2).reshape(-1, UNITS) * h,
    "as_strided": lambda h: h.contiguous().as_strided((len(h), 2), (UNITS, 2)).repeat(1, 2) + h,
    "tensordot": lambda h: torch.tensordot(h, torch.ones(UNITS, UNITS).tril(), 1),
    "cross": lambda h: torch.cat([torch.linalg.cross(h[:, :3], h[:, 1:].cos()), h[:, :1]], -1),
    "cov_of_a_row": lambda h: h * h.var(-1, keepdim=True),
    "prod": lambda h: h + h.prod(-1, keepdim=True),
    "bucketize": lambda h: h * (1 + torch.bucketize(h.detach(), torch.tensor([-0.5, 0.0, 0.5]))),
    "one_hot": lambda h: h * F.one_hot(h.detach().argmax(-1), UNITS),
    "detach": lambda h: h * h.detach().sigmoid(),
    "straight_through": lambda h: h + (torch.round(h) - h).detach(),
    "smooth_l1": lambda h: F.smooth_l1_loss(h, h.detach().flip(-1), reduction="none"),
    "cross_entropy": lambda h: h * F.cross_entropy(h, torch.zeros(len(h), dtype=torch.long), reduction="none")[:, None],
    "glu": lambda h: F.glu(torch.cat([h, h.flip(-1)], -1)),
    "special": lambda h: torch.special.i0e(h) + torch.special.ndtr(h),
    "digamma": lambda h: torch.digamma(1.5 + h.sigmoid()),
}.items():
    elementwise(name, call)


@operation(W=SQUARE)
def matmul(p, h, x):
    return h @ p.W


@operation(W=SQUARE, b=VECTOR)
def linear(p, h, x):
    return F.linear(h, p.W, p.b)


@operation(W=SQUARE, b=VECTOR)
def addmm(p, h, x):
    return torch.addmm(p.b, h, p.W.T, beta=0.5, alpha=2)


@operation(W=(UNITS, UNITS, INPUTS), b=VECTOR)
def bilinear(p, h, x):
    return F.bilinear(h, x, p.W, p.b)


@operation(W=SQUARE)
def einsum(p, h, x):
    return torch.einsum("oi,bi,bo->bo", p.W, h, h)


@operation(W=SQUARE)
def baddbmm(p, h, x):
    return torch.baddbmm(h[:, :, None], p.W.expand(len(h), -1, -1), h[:, :, None])[..., 0]


@operation(W=SQUARE)
def bmm(p, h, x):
    return torch.bmm((p.W * h[:, None]), h[:, :, None])[..., 0]


@operation(W=SQUARE, V=SQUARE)
def matrix_chain(p, h, x):
    return h @ torch.linalg.multi_dot([p.W, p.V, p.W.T])


@operation(W=(1, 1, 3), b=(1,))
def conv1d(p, h, x):
    return F.conv1d(h[:, None], p.W, p.b, padding=1)[:, 0]


@operation(W=(2, 1, 2))
def conv_transpose1d(p, h, x):
    return F.conv_transpose1d(h.reshape(-1, 2, 2), p.W, padding=0)[:, 0].repeat(1, 2)[:, :UNITS]


@operation(W=(2, 1, 3))
def grouped_conv1d(p, h, x):
    return F.conv1d(h.reshape(-1, 2, 2), p.W, padding=1, groups=2).flatten(1)


@operation(W=(1, 1, 2, 2))
def conv2d(p, h, x):
    return F.conv2d(F.pad(h.reshape(-1, 1, 2, 2), (1, 0, 1, 0)), p.W).flatten(1)


@operation(a=(1,))
def prelu(p, h, x):
    return F.prelu(h, p.a)


@operation(W=SQUARE)
def twice(p, h, x):
    return torch.tanh(h @ p.W.T) @ p.W


@operation(W=SQUARE)
def used_thrice_in_a_loop(p, h, x):
    for n in range(3):
        h = torch.tanh(h @ p.W.T / (n + 1))
    return h


@operation(W=(6, 6))
def sliced(p, h, x):
    return h @ p.W[1:5, 2:].T + p.W[0, :4]


@operation(W=SQUARE)
def squared(p, h, x):
    return h @ (p.W**2)


@operation(W=SQUARE)
def masked_by_its_size(p, h, x):
    return h @ (p.W * (p.W.abs() > 0.3)).T


@operation(W=SQUARE)
def divided_by_its_norm(p, h, x):
    return h @ (p.W / p.W.norm())


@operation(W=SQUARE)
def divided_by_its_detached_norm(p, h, x):
    return h @ (p.W / p.W.detach().norm())


@operation(W=SQUARE)
def rounded_straight_through(p, h, x):
    return h @ (p.W + (torch.round(2 * p.W) / 2 - p.W).detach())


@operation(W=SQUARE)
def partly_detached(p, h, x):
    return h @ torch.cat([p.W[:2], p.W[2:].detach()])


@operation(W=SQUARE)
def without_gradient_beside(p, h, x):
    with torch.no_grad():
        cut = torch.tanh(h @ p.W.T)
    return h @ p.W + cut


@operation(W=SQUARE, m=(UNITS, 1))
def low_rank(p, h, x):
    return h @ (p.W * 0.1 + p.m @ p.m.T)


@operation(W=SQUARE)
def solved(p, h, x):
    return torch.linalg.solve(p.W + 3 * torch.eye(UNITS), h.T).T


@operation(W=SQUARE)
def inverted(p, h, x):
    return h @ torch.linalg.inv(p.W + 3 * torch.eye(UNITS))


@operation(W=SQUARE)
def pseudo_inverted(p, h, x):
    return h @ torch.linalg.pinv(p.W + 3 * torch.eye(UNITS))


@operation(W=SQUARE)
def matrix_exponential(p, h, x):
    return h @ torch.linalg.matrix_exp(p.W - p.W.T)


@operation(W=SQUARE)
def cholesky(p, h, x):
    return h @ torch.linalg.cholesky(p.W @ p.W.T + torch.eye(UNITS))


@operation(W=SQUARE)
def determinant(p, h, x):
    return h * torch.linalg.det(p.W + 2 * torch.eye(UNITS)) / 10


@operation(W=SQUARE)
def log_determinant(p, h, x):
    return h * torch.logdet(p.W @ p.W.T + torch.eye(UNITS))


@operation(W=SQUARE)
def qr(p, h, x):
    return h @ torch.linalg.qr(p.W + 2 * torch.eye(UNITS)).Q


@operation(W=SQUARE)
def singular_values(p, h, x):
    return h * torch.linalg.svdvals(p.W)


@operation(W=SQUARE)
def eigenvalues(p, h, x):
    return h * torch.linalg.eigvalsh(p.W + p.W.T)


@operation(W=SQUARE)
def matrix_power(p, h, x):
    return h @ torch.linalg.matrix_power(p.W, 3)


@operation(W=SQUARE)
def kronecker(p, h, x):
    return h @ torch.kron(p.W[:2, :2], p.W[2:, 2:])


@operation(W=SQUARE)
def upper_triangle(p, h, x):
    return h @ torch.triu(p.W, 1) + h * p.W.diagonal()


@operation(W=SQUARE, V=SQUARE)
def complex_weight(p, h, x):
    return (h.to(torch.complex128) @ torch.complex(p.W, p.V)).abs()


@operation(W=(UNITS, 2))
def modulus(p, h, x):
    c = torch.view_as_complex(p.W)
    return ((c * h) * c.conj()).real + c.conj().imag * h.tanh()


@operation(W=VECTOR)
def filtered(p, h, x):
    return torch.fft.irfft(torch.fft.rfft(h) * torch.fft.rfft(p.W), n=UNITS)


@operation(q=SQUARE, k=SQUARE)
def attention_by_hand(p, h, x):
    tokens = torch.stack([h, h.flip(-1), h.sin()], 1)
    scores = (tokens @ p.q) @ (tokens @ p.k).mT
    return (scores.softmax(-1) @ tokens)[:, 0]


@operation(W=(UNITS, 3 * UNITS))
def fused_attention(p, h, x):
    q, k, v = (torch.stack([h, h.cos()], 1) @ p.W).chunk(3, -1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 1]


@operation(attention=lambda: nn.MultiheadAttention(2, 1, batch_first=True))
def multihead_attention(p, h, x):
    tokens = h.reshape(-1, 2, 2)
    return p.attention(tokens, tokens, tokens, need_weights=False)[0].flatten(1)


@operation(encoder=lambda: nn.TransformerEncoderLayer(2, 1, 3, 0.0, batch_first=True).eval())
def transformer_encoder_in_eval(p, h, x):
    return p.encoder(h.reshape(-1, 2, 2)).flatten(1)


@operation(table=lambda: nn.Embedding(5, UNITS, padding_idx=0))
def embedding_with_padding(p, h, x):
    return h + p.table((x[:, 0].abs() * 3).long().clamp(max=4))


def _of_bounded_norm(rows: int) -> nn.Embedding:
    """Each forward pass shortens the long rows that it reads; here all have been read once."""
    table = nn.Embedding(rows, UNITS, max_norm=1.0)
    table(torch.arange(rows))
    return table


@operation(table=lambda: _of_bounded_norm(5))
def embedding_with_a_largest_norm(p, h, x):
    return h + p.table((x[:, 0].abs() * 3).long().clamp(max=4))


@operation(table=lambda: nn.Embedding(5, UNITS, padding_idx=0))
def tied_embedding(p, h, x):
    return h + (p.table((x[:, 0].abs() * 3).long().clamp(max=4)) @ p.table.weight.T)[:, :UNITS]


@operation(bag=lambda: nn.EmbeddingBag(5, UNITS, mode="mean"))
def embedding_bag(p, h, x):
    return h * p.bag((x.abs() * 3).long().clamp(max=4))


@operation(bag=lambda: nn.EmbeddingBag(5, UNITS, mode="sum"), s=(INPUTS,))
def weighted_embedding_bag(p, h, x):
    return h + p.bag((x.abs() * 3).long().clamp(max=4), per_sample_weights=(x * p.s))


@operation(layer=lambda: nn.Linear(UNITS, UNITS))
def linear_layer(p, h, x):
    return p.layer(h)


@operation(stack=lambda: nn.Sequential(nn.Linear(UNITS, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, UNITS)))
def nested_modules(p, h, x):
    return p.stack(h)


@operation(inner=lambda: nn.GRUCell(INPUTS, UNITS))
def gru_cell_inside(p, h, x):
    return p.inner(x, h)


@operation(inner=lambda: nn.LSTM(2, 3, batch_first=True), out=(6, UNITS))
def lstm_inside(p, h, x):
    return p.inner(h.reshape(-1, 2, 2))[0].flatten(1) @ p.out


@operation(norm=lambda: nn.GroupNorm(2, UNITS))
def group_norm_layer(p, h, x):
    return p.norm(h)


@operation(norm=lambda: nn.RMSNorm(UNITS))
def rms_norm_layer(p, h, x):
    return p.norm(h)


@operation(norm=lambda: nn.InstanceNorm1d(2, affine=True))
def instance_norm_layer(p, h, x):
    return p.norm(h.reshape(-1, 2, 2)).flatten(1)


@operation(norm=lambda: nn.BatchNorm1d(UNITS).eval())
def batch_norm_in_eval(p, h, x):
    return p.norm(h)


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u > 0).to(u)

    @staticmethod
    def backward(ctx, g):
        s = torch.sigmoid(5 * ctx.saved_tensors[0])
        return g * 5 * s * (1 - s)


class ClampedStraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u):
        return u.clamp(-0.3, 0.3)

    @staticmethod
    def backward(ctx, g):
        return g


class ReversedGradient(torch.autograd.Function):
    """A linear layer with the new kind of context, whose backward is not its derivative."""

    @staticmethod
    def forward(h, w):
        return h @ w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        h, w = ctx.saved_tensors
        return -0.5 * g @ w.T, h.T @ g


class Cubed(torch.autograd.Function):
    """A right derivative by hand."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return u**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


@operation(W=SQUARE)
def spikes(p, h, x):
    return 0.5 * h + Spike.apply(h @ p.W)


@operation(W=SQUARE)
def clamped_straight_through(p, h, x):
    return ClampedStraightThrough.apply(h @ p.W)


@operation(W=SQUARE)
def reversed_gradient(p, h, x):
    return ReversedGradient.apply(h, p.W)


@operation(W=SQUARE)
def cubed(p, h, x):
    return Cubed.apply(torch.tanh(h @ p.W))


@operation(W=SQUARE)
def spikes_of_a_weight(p, h, x):
    return h @ Spike.apply(p.W)


@operation(b=VECTOR)
def written_into_slices(p, h, x):
    y = torch.zeros_like(h)
    y[:, 0] = h[:, 1] * p.b[0]
    y[:, 1:] = h[:, 1:].sin() + p.b[1:]
    return y


@operation(b=VECTOR)
def written_by_index(p, h, x):
    y = h.clone()
    y[:, torch.tensor([0, 2])] = y[:, [1, 3]] * p.b[:2]
    return y


@operation(b=VECTOR)
def in_place(p, h, x):
    y = h * p.b
    return y.add_(h).mul_(0.5).relu_()


@operation(b=VECTOR)
def masked_fill_in_place(p, h, x):
    y = h + p.b
    return y.masked_fill_(y > 0.2, 0.2)


@operation(b=VECTOR)
def index_put(p, h, x):
    y = h * 1
    return y.index_put_(
        (torch.arange(len(h)), torch.zeros(len(h), dtype=torch.long)), h[:, 3] * p.b[1], accumulate=True
    )


@operation(b=VECTOR)
def out_argument_of_a_buffer(p, h, x):
    y = torch.empty_like(h)
    y.copy_(h * p.b)
    return y


@operation(W=SQUARE)
def list_of_columns(p, h, x):
    columns = []
    for n in range(UNITS):
        columns.append(torch.tanh(h @ p.W[n] + (columns[-1] if columns else 0)))
    return torch.stack(columns, -1)


@operation(W=SQUARE, V=SQUARE)
def branch_of_a_row(p, h, x):
    return torch.stack([row @ p.W if row[0] > 0 else torch.tanh(row @ p.V) for row in h])


@operation(W=SQUARE, V=SQUARE)
def branch_of_all(p, h, x):
    return h @ p.W if float(x.detach().abs().max()) > 0 else h @ p.V  # the same for each trial and all together


@operation(experts=(3, UNITS, UNITS))
def mixture_of_experts(p, h, x):
    which, out = (x[:, 0].abs() * 5).long() % 3, torch.zeros_like(h)
    for n in range(3):
        rows = which == n
        if rows.any():
            out[rows] = torch.tanh(h[rows] @ p.experts[n])
    return out


@operation(W=SQUARE)
def number_read(p, h, x):
    return torch.stack([row @ p.W * (1 + round(row[0].item(), 1)) for row in h])


@operation(W=SQUARE)
def loop_until_small(p, h, x):
    rows = []
    for row in h:
        steps = 0
        while row.norm() > 0.5 and steps < 20:
            row, steps = 0.5 * torch.tanh(row @ p.W), steps + 1
        rows.append(row)
    return torch.stack(rows)


@operation(W=SQUARE)
def gradient_by_torch_func(p, h, x):
    return torch.func.grad(lambda y: torch.tanh(y @ p.W).pow(2).sum())(h)


@operation(W=SQUARE)
def gradient_by_autograd(p, h, x):
    with torch.enable_grad():
        y = h if h.requires_grad else h.detach().requires_grad_()
        return torch.autograd.grad(torch.tanh(y @ p.W).pow(2).sum(), y, create_graph=True)[0]


@operation(W=SQUARE)
def jacobian_inside(p, h, x):
    return torch.func.jvp(lambda y: torch.tanh(y @ p.W), (h,), (h.cos(),))[1]


@operation(W=SQUARE)
def vmap_inside(p, h, x):
    return torch.vmap(lambda row: torch.tanh(row @ p.W) * row.sum())(h)


@operation(W=SQUARE)
def gate_that_seldom_opens(p, h, x):
    return h + (x[:, :1] > 1.2) * torch.tanh(h @ p.W)


@operation(W=SQUARE)
def no_gradient_where_the_gate_opens(p, h, x):
    with torch.no_grad():
        cut = torch.tanh(h @ p.W)
    return h @ p.W + (x[:, :1] > 1.2) * cut


@operation(W=SQUARE, V=SQUARE)
def not_used(p, h, x):
    return h @ p.W


@operation(W=SQUARE)
def zero_weight(p, h, x):
    return h + 0 * (h @ p.W)


@operation(b=VECTOR)
def buffer_made_in_the_first_forward(p, h, x):
    if not hasattr(p.module, "positions"):
        p.module.register_buffer("positions", torch.arange(h.shape[-1], dtype=h.dtype))
    return h * p.b + p.module.positions


@operation(b=VECTOR)
def constant_kept_from_the_first_forward(p, h, x):
    if not hasattr(p.module, "kept"):
        p.module.kept = torch.linspace(0, 1, UNITS, dtype=h.dtype)
    return h * p.b + p.module.kept


@operation(b=VECTOR)
def calls_counted(p, h, x):
    p.module.calls = getattr(p.module, "calls", 0) + 1
    return h * p.b


@operation(b=VECTOR)
def last_value_kept(p, h, x):
    p.module.last = h.detach()
    return h * p.b


@operation(W=SQUARE)
def assertion_on_values(p, h, x):
    y = torch.tanh(h @ p.W)
    assert torch.isfinite(y).all() and y.abs().max() <= 1
    return y


@operation(W=SQUARE)
def numpy_of_the_inputs(p, h, x):
    weights = torch.from_numpy(x.detach().numpy().copy()).abs().sum(-1, keepdim=True)
    return h @ p.W * weights.tanh()


@operation(dropout=lambda: nn.Dropout(0.5), refused=True)
def dropout_that_is_active(p, h, x):
    return p.dropout(h)


@operation(refused=True)
def heaviside(p, h, x):
    return h * torch.heaviside(h, torch.zeros_like(h))


@operation(refused=True)
def noise(p, h, x):
    return h + torch.randn_like(h)


@operation(norm=lambda: nn.BatchNorm1d(UNITS), refused=True)
def batch_norm_in_training(p, h, x):
    return p.norm(h)


@operation(b=VECTOR, refused=True)
def count_that_matters(p, h, x):
    p.module.calls = getattr(p.module, "calls", 0) + 1
    return h * p.b + p.module.calls


@operation(dropout=lambda: nn.Dropout(0.5).eval())
def dropout_in_eval(p, h, x):
    return p.dropout(h)


# How a layer keeps its weight W: what is done with the layer once, and how W is read in each forward pass.


@dataclass(frozen=True)
class Keeping:
    dress: Callable[[nn.Module], Any] = lambda layer: None
    read: Callable[[nn.Module], Tensor] = lambda layer: layer.W


GLOBALS: dict[int, Tensor] = {}


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.mT) / 2 if w.shape[-1] == w.shape[-2] else w.tanh()


def _outside(layer: nn.Module) -> Callable[[], Tensor]:
    weight = layer.W
    return lambda: weight


def _quietly(dress: Callable, *args: Any, **kwargs: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dress(*args, **kwargs)


def _turn_grad(layer: nn.Module) -> None:
    layer.W.register_hook(lambda g: 0.5 * g)


def _scaled(weight: Tensor) -> Tensor:
    weight = weight * 1
    if weight.requires_grad:
        weight.register_hook(lambda g: 2 * g)
    return weight


KEEPING = {
    "plain": Keeping(),
    "in_a_list": Keeping(lambda layer: layer.__dict__.update(also=[layer.W]), lambda layer: layer.also[0]),
    "in_a_dict": Keeping(lambda layer: layer.__dict__.update(also={"w": layer.W}), lambda layer: layer.also["w"]),
    "in_a_closure": Keeping(lambda layer: layer.__dict__.update(also=_outside(layer)), lambda layer: layer.also()),
    "in_a_global": Keeping(lambda layer: GLOBALS.update({id(layer): layer.W}), lambda layer: GLOBALS[id(layer)]),
    "list_and_attribute": Keeping(
        lambda layer: layer.__dict__.update(also=[layer.W]), lambda layer: (layer.W + layer.also[0]) / 2
    ),
    "in_a_parameter_list": Keeping(
        lambda layer: setattr(layer, "ws", nn.ParameterList([layer.W])), lambda layer: layer.ws[0]
    ),
    "in_a_parameter_dict": Keeping(
        lambda layer: setattr(layer, "ws", nn.ParameterDict({"w": layer.W})), lambda layer: layer.ws["w"]
    ),
    "view_kept": Keeping(
        lambda layer: layer.__dict__.update(also=[layer.W.detach()]), lambda layer: layer.W + layer.also[0]
    ),
    "data": Keeping(read=lambda layer: layer.W + layer.W.data),
    "frozen": Keeping(lambda layer: layer.W.requires_grad_(False)),
    "parametrized": Keeping(lambda layer: parametrize.register_parametrization(layer, "W", Symmetric())),
    "weight_norm": Keeping(lambda layer: parametrizations.weight_norm(layer, "W")),
    "spectral_norm": Keeping(lambda layer: parametrizations.spectral_norm(layer, "W").eval()),
    "orthogonal": Keeping(lambda layer: parametrizations.orthogonal(layer, "W")),
    "old_weight_norm": Keeping(lambda layer: _quietly(nn.utils.weight_norm, layer, "W")),
    "old_spectral_norm": Keeping(lambda layer: (_quietly(nn.utils.spectral_norm, layer, "W"), layer.eval())),
    "pruned": Keeping(lambda layer: prune.random_unstructured(layer, "W", 0.4)),
    "gradient_hook": Keeping(_turn_grad),
    "hook_on_a_computed_weight": Keeping(read=lambda layer: _scaled(layer.W)),
    "cast": Keeping(read=lambda layer: layer.W.to(torch.float64).contiguous().requires_grad_()),
}


# What hangs on a layer.


def _only_tensors(scale: float) -> Callable:
    return lambda grads: tuple(None if g is None else scale * g for g in grads)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "none": lambda layer: None,
    "forward": lambda layer: layer.register_forward_hook(lambda m, args, out: 0.5 * out + torch.tanh(out)),
    "forward_that_detaches": lambda layer: layer.register_forward_hook(lambda m, args, out: 0.5 * (out + out.detach())),
    "forward_that_looks": lambda layer: layer.register_forward_hook(lambda m, args, out: None),
    "forward_that_uses_a_parameter": lambda layer: layer.register_forward_hook(
        lambda m, args, out: out * next(iter(m.parameters())).sum() if list(m.parameters()) else out
    ),
    "forward_with_a_tensor_hook": lambda layer: layer.register_forward_hook(
        lambda m, args, out: out.register_hook(lambda g: 0.5 * g) and None if out.requires_grad else None
    ),
    "pre": lambda layer: layer.register_forward_pre_hook(lambda m, args: (torch.sin(args[0]), *args[1:])),
    "pre_with_keywords": lambda layer: layer.register_forward_pre_hook(
        lambda m, args, kwargs: ((2 * args[0], *args[1:]), kwargs), with_kwargs=True
    ),
    "backward": lambda layer: layer.register_full_backward_hook(lambda m, into, out: _only_tensors(0.5)(into)),
    "backward_pre": lambda layer: layer.register_full_backward_pre_hook(lambda m, out: _only_tensors(2.0)(out)),
}


# How a layer is called.


def _row_by_row(layer: Callable, h: Tensor, x: Tensor) -> Tensor:
    return torch.cat([layer(h[n : n + 1], x[n : n + 1]) for n in range(len(h))])


def _residual_in_place(layer: Callable, h: Tensor, x: Tensor) -> Tensor:
    y = layer(h, x).clone()
    y += h
    return y


CALLS: dict[str, Callable[[Callable, Tensor, Tensor], Tensor]] = {
    "plain": lambda layer, h, x: layer(h, x),
    "residual": lambda layer, h, x: h + layer(h, x),
    "residual_in_place": _residual_in_place,
    "twice": lambda layer, h, x: layer(torch.tanh(layer(h, x)), x),
    "checkpoint": lambda layer, h, x: checkpoint(layer, h, x, use_reentrant=False),
    "row_by_row": _row_by_row,
    "gated": lambda layer, h, x: h + (x[:, 1:2] > 1) * layer(h, x),
    "half_detached": lambda layer, h, x: 0.5 * (layer(h, x) + layer(h.detach(), x)),
    "no_grad_beside": lambda layer, h, x: layer(h, x) + torch.no_grad()(layer)(h, x),
    "inner_only": lambda layer, h, x: layer(h.tanh(), x).tanh(),
}


class Layer(nn.Module):
    """One piece of a model."""

    def __init__(self, piece: Piece) -> None:
        super().__init__()
        self.operation = OPERATIONS[piece.operation]
        for name, part in self.operation.parts.items():
            setattr(self, name, nn.Parameter(0.6 * torch.randn(part)) if isinstance(part, tuple) else part())
        keeps = isinstance(getattr(self, "W", None), nn.Parameter) and suits(piece)
        self.keeping = KEEPING[piece.weight if keeps else "plain"]
        self.keeping.dress(self)
        HOOKS[piece.hook](self)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        names = self.operation.parts
        parts = {name: self.keeping.read(self) if name == "W" else getattr(self, name) for name in names}
        return self.operation.call(SimpleNamespace(module=self, **parts), h, x)


def suits(piece: Piece) -> bool:
    """Whether the weight can be kept so: some ways are for matrices."""
    shape = OPERATIONS[piece.operation].parts.get("W", ())
    return len(shape) > 1 or piece.weight not in ("parametrized", "weight_norm", "spectral_norm", "orthogonal")


class Body(nn.Module):
    """The layers one after another."""

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        super().__init__()
        self.layers, self.calls = nn.ModuleList(map(Layer, pieces)), tuple(CALLS[piece.call] for piece in pieces)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        for layer, call in zip(self.layers, self.calls, strict=True):
            h = call(layer, h, x)
        return h


EXITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "tanh": lambda h, z: torch.tanh(h),
    "leaky": lambda h, z: 0.5 * z + 0.5 * torch.tanh(h),
    "in_place": lambda h, z: (h * 1).add_(0.1 * z).tanh_(),
    "clamped": lambda h, z: (0.7 * z + h).clamp(-1, 1),
}


class Cell(nn.Module):
    """z' = exit(body(W z + U x + b))."""

    hidden_size = UNITS

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.z, self.x = nn.Linear(UNITS, UNITS), nn.Linear(INPUTS, UNITS, bias=False)
        self.body, self.entry, self.exit = Body(recipe.pieces), CELL_ENTRIES[recipe.entry], EXITS[recipe.exit]

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.exit(self.body(self.entry(self, x, z), x), z)


CELL_ENTRIES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "sum": lambda cell, x, z: cell.z(z) + cell.x(x),
    "product": lambda cell, x, z: cell.z(z) * cell.x(x).sigmoid(),
    "only_z": lambda cell, x, z: torch.tanh(cell.z(z)) + 0.1 * x.sum(-1, keepdim=True),
    "joined": lambda cell, x, z: torch.cat([z, x], -1) @ torch.cat([cell.z.weight, cell.x.weight], 1).T,
}


class PairCell(Cell):
    """A cell with the state (h, c)."""

    def forward(self, x: Tensor, z: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        slow = 0.9 * z[1] + 0.1 * z[0][:, :2]
        return super().forward(x, z[0]) * slow.sum(-1, keepdim=True).cos(), slow


class OwnCall(Cell):
    """A cell with a call of its own."""

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.9 * super().__call__(x, z)


class Caught(Cell):
    """A cell whose step is a method of another name, by which it is handed over."""

    def step(self, x: Tensor, z: Tensor) -> Tensor:
        return self(x, z)


CELL_FORMS: dict[str, type[Cell]] = {"module": Cell, "pair": PairCell, "own_call": OwnCall}


class Net(nn.Module):
    """x [trial, input], tokens [trial, token] or words [trial, token, input] -> [trial, unit]."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.entry = NET_ENTRIES[recipe.entry]()
        self.body, self.exit = Body(recipe.pieces), EXITS[recipe.exit]

    def forward(self, x: Tensor) -> Tensor:
        h = self.entry(x)
        h = h.sum(1) if h.ndim == 3 else h
        features = x.reshape(len(x), -1)[:, :INPUTS].to(h.dtype)
        return self.exit(self.body(h, features), h)


def _layer_with_tied_rows() -> nn.Module:
    table = nn.Embedding(6, UNITS, padding_idx=0)
    return nn.Sequential(table, nn.Tanh())


NET_ENTRIES: dict[str, Callable[[], nn.Module]] = {
    "sum": lambda: nn.Linear(INPUTS, UNITS),
    "tokens": lambda: nn.Embedding(6, UNITS),
    "padded_tokens": _layer_with_tied_rows,
    "tokens_of_bounded_norm": lambda: _of_bounded_norm(6),
    "bag_of_tokens": lambda: nn.EmbeddingBag(6, UNITS, mode="mean", padding_idx=0),
    "largest_of_a_bag": lambda: nn.EmbeddingBag(6, UNITS, mode="max"),
    "words": lambda: nn.Linear(INPUTS, UNITS),
    "convolved_words": lambda: nn.Sequential(nn.Conv1d(TOKENS, UNITS, INPUTS), nn.Flatten()),
}


class Field(nn.Module):
    """z' = body(W z + b, (cos t, t, 1)) - z."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.z, self.body, self.exit = nn.Linear(UNITS, UNITS), Body(recipe.pieces), EXITS[recipe.exit]

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        x = torch.stack([torch.cos(3 * t), t, torch.ones_like(t)]).expand(len(z), INPUTS)
        return self.exit(self.body(self.z(z), x), z) - z


def is_refused(recipe: Recipe) -> bool:
    """Whether the model has no derivative or no fixed meaning."""
    return any(OPERATIONS[piece.operation].refused for piece in recipe.pieces)
