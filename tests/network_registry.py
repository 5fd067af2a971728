"""The networks and fixed points that every identity is tested on, in both frameworks, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn

import kpflow_dyn as kp

TRIALS, TOKENS, WIDTH = 2, 3, 4


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


class Residual(nn.Module):
    """Two blocks x + W2 tanh(W1 norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))
        self.second = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 5), nn.GELU(), nn.Linear(5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


class GPT(nn.Module):
    """A causal transformer block by hand, with positions and an unembedding that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(6, WIDTH), nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.norm, self.qkv, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return (x + self.mlp(x)) @ self.embedding.weight.T


class LowRank(nn.Module):
    """A weight m n^T and one that its norm divides."""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.n = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.randn(WIDTH, 2))
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x @ (self.m @ self.n.T).T))


class Mixture(nn.Module):
    """Each token goes to one of three experts, by a number in the data."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.Parameter(torch.randn(3, WIDTH, WIDTH)), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        which = x[..., 0].abs().mul(10).long() % 3
        share = torch.softmax(self.gate(x), -1).gather(-1, which[..., None])
        return torch.tanh(share * torch.einsum("btij,btj->bti", self.experts[which], x))


class Autoencoder(nn.Module):
    """The decoder is the encoder turned."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.bias = nn.Parameter(torch.randn(3, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.W.T) @ self.W + self.bias


class Equilibrium(nn.Module):
    """z = tanh(W z + U x + b) / 2."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(WIDTH, WIDTH), nn.Linear(3, WIDTH, bias=False)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(z) + self.U(x)) / 2


@dataclass(frozen=True)
class Case:
    """A network, the shape of a trial's input (integers below `tokens` where that is given), and modules to look at."""

    make: Callable[..., Any]
    shape: tuple[int, ...]
    state: tuple[str, ...]
    tokens: int = 0

    def torch_problem(self, state: tuple[str, ...] | None) -> kp.StaticProblem:
        torch.manual_seed(0)
        net = self.make().double()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_()
                net.eval()
        lead = (TRIALS, *self.shape)
        x = torch.randint(self.tokens, lead) if self.tokens else torch.randn(lead, dtype=torch.float64)
        return kp.StaticProblem(net, x, state)

    def jax_problem(self, state: tuple[str, ...] | None) -> kp.StaticProblem:
        key, other = jax.random.split(jax.random.key(0))
        lead = (TRIALS, *self.shape)
        x = jax.random.randint(other, lead, 0, self.tokens) if self.tokens else jax.random.normal(other, lead)
        return kp.StaticProblem(self.make(key), x, state)


WORDS = (TOKENS, WIDTH)
ENCODER = {"d_model": WIDTH, "nhead": 2, "dim_feedforward": 5, "dropout": 0.0, "batch_first": True}
TORCH = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 2)), (3,), ("0", "4")
    ),
    "residual": Case(Residual, WORDS, ("first", "second")),
    "convolution": Case(
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2, stride=2), nn.Flatten(),
            nn.Linear(8, 2),
        ),
        (2, 4, 4),
        ("3",),
    ),
    "groups": Case(lambda: nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.Tanh(), nn.Conv1d(4, 2, 2)), (4, 5), ("0",)),
    "batch_norm": Case(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()), (3,), ("1",)),
    "gpt": Case(GPT, (TOKENS,), ("mix", "mlp"), tokens=6),
    "attention": Case(lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True), WORDS, ()),
    "encoder": Case(lambda: nn.TransformerEncoderLayer(**ENCODER), WORDS, ("self_attn", "linear2")),
    "encoder_eval": Case(lambda: nn.TransformerEncoderLayer(**ENCODER).eval(), WORDS, ("linear1",)),
    "bidirectional": Case(lambda: nn.LSTM(WIDTH, 2, bidirectional=True), WORDS, ()),
    "unrolled": Case(lambda: nn.GRU(WIDTH, 3, num_layers=2, batch_first=True), WORDS, ()),
    "low_rank": Case(LowRank, (WIDTH,), ("out",)),
    "mixture": Case(Mixture, WORDS, ("gate",)),
    "tied": Case(Autoencoder, (WIDTH,), ()),
}  # fmt: skip


class Block(eqx.Module):
    """A causal transformer block."""

    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.attention, self.norm = eqx.nn.MultiheadAttention(2, WIDTH, key=first), eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 5, 1, key=second)

    def __call__(self, x: jax.Array) -> jax.Array:
        h, mask = jax.vmap(self.norm)(x), jnp.tril(jnp.ones((len(x), len(x)), bool))
        x = x + self.attention(h, h, h, mask=mask)
        return x + jax.vmap(self.mlp)(x)


class TiedEmbedding(eqx.Module):
    """Tokens in, scores of tokens out, by one matrix."""

    embedding: eqx.nn.Embedding
    inner: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.embedding = eqx.nn.Embedding(6, WIDTH, key=first)
        self.inner = eqx.nn.Linear(WIDTH, WIDTH, key=second)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = jax.vmap(self.embedding)(tokens)
        return jnp.tanh(jax.vmap(self.inner)(x)) @ self.embedding.weight.T


class Convolution(eqx.Module):
    """Two convolutions and a readout."""

    first: eqx.nn.Conv2d
    second: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array) -> None:
        a, b, c = jax.random.split(key, 3)
        self.first = eqx.nn.Conv2d(1, 3, 3, padding=1, key=a)
        self.second, self.out = eqx.nn.Conv2d(3, 2, 2, stride=2, key=b), eqx.nn.Linear(8, 2, key=c)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(self.second(jax.nn.relu(self.first(x))).ravel())


class Normed(eqx.Module):
    """A weight divided by its norm, a low-rank one, and experts picked by the data."""

    weight: jax.Array
    m: jax.Array
    experts: jax.Array

    def __init__(self, key: jax.Array) -> None:
        a, b, c = jax.random.split(key, 3)
        self.weight, self.m = jax.random.normal(a, (WIDTH, WIDTH)), jax.random.normal(b, (WIDTH, 2))
        self.experts = jax.random.normal(c, (3, WIDTH, WIDTH))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.weight / jnp.linalg.norm(self.weight) @ x)
        expert = self.experts[(abs(x[0]) * 10).astype(int) % 3]
        return jnp.tanh(self.m @ (self.m.T @ x)) + expert @ x


JAX = {
    "mlp": Case(lambda key: eqx.nn.MLP(3, 2, 5, 2, key=key), (3,), ("layers[0]", "layers[1]")),
    "block": Case(Block, WORDS, ("attention", "mlp")),
    "tied_embedding": Case(TiedEmbedding, (TOKENS,), ("inner",), tokens=6),
    "convolution": Case(Convolution, (1, 4, 4), ("second",)),
    "normed": Case(Normed, (WIDTH,), ()),
}
