"""The state NTK of a stack of GPT-2 small's shape: trace and effective rank within 1 %, their time and memory.

    python benchmarks/transformer.py --layers 12 --threads 2

Width 768, 12 heads, 128 tokens, 4 trials, 50,257 words, random weights (0.02 N(0, 1), as GPT-2 starts), float32. The
state are the outputs of the blocks.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._numbers.estimate import scalars

WORDS, WIDTH, HEADS, TOKENS, TRIALS = 50257, 768, 12, 128, 4


class Block(nn.Module):
    """Causal attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.qkv, self.mix = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.second = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.second(x))


class GPT(nn.Module):
    """Words and positions in, blocks, scores of words by the embedding turned."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(layers)), nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.words.weight.T


def timed(what: str, compute: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    found = compute()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what:34} {time.perf_counter() - start:7.1f} s   peak {memory:5.2f} GiB", flush=True)
    return found


def floor(net: GPT) -> float:
    """Seconds of J and J* at the rate of matrix products: two for each weight in each, 2 m d for each token."""
    weights = sum(p.numel() for name, p in net.named_parameters() if p.ndim == 2 and not name.startswith("words"))
    a, b = torch.randn(512, 3072), torch.randn(3072, 3072)
    rate = max(_rate(a, b) for _ in range(5))
    return 2 * 2 * 2 * weights * TRIALS * TOKENS / rate


def _rate(a: Tensor, b: Tensor) -> float:
    start = time.perf_counter()
    a @ b
    return 2 * a.shape[0] * b.numel() / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description="The state NTK of a transformer: time and memory.")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--samples", type=int, default=100, help="applications, which both numbers share")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    net = GPT(options.layers)
    tokens = torch.randint(WORDS, (TRIALS, TOKENS))
    blocks = [f"blocks.{n}" for n in range(options.layers)]
    print(f"{options.layers} layers, {sum(p.numel() for p in net.parameters()):,} parameters")
    solution = timed("solve (with tracing)", lambda: kp.solve(kp.StaticProblem(net, tokens, state=blocks)))
    flow = timed("linearize", lambda: kp.linearize(solution))
    theta = timed("J*", lambda: flow.J.T.mv(flow.solution.state))
    timed("J", lambda: flow.J.mv(theta))
    print(f"floor of J and J* {floor(net):.2f} s")
    found = timed("trace and effective rank", partial(scalars, flow.ntk, options.samples))
    for name, number in (("trace", found.trace), ("effective rank", found.effective_rank)):
        bar = number.stderr / number.value
        print(f"{name}: {number.value:.5g} +- {bar:.2%} from {options.samples} applications by {number.method}")


if __name__ == "__main__":
    main()
