"""The input bottleneck of attention: in how many token patterns can learning change a transformer? Under a minute.

    python examples/papers/attention_token_rank.py --out tokens.png

Expected (arXiv 2605.08746): weights write only along what they multiply, so that inputs of few dimensions let gradient
descent act on few patterns over the tokens, however wide the model is. The effective token rank of the NTK rises with
the dimension of the inputs, and stays far below the number of tokens even where that of the inputs does not.

The model embeds inputs [trial, token, d] in 64 units, adds positions of a tenth of their size, and has one causal block
of attention and an MLP; its weights are as torch draws them. The state are the outputs of the attention and of the MLP.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

TRIALS, TOKENS, WIDTH, HEADS = 8, 32, 64, 4
DIMENSIONS, SEEDS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 3
QUICK = (1, 4, 16)


class Transformer(nn.Module):
    """One causal block of attention and an MLP on embedded inputs."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Linear(dimension, WIDTH), nn.Parameter(0.1 * torch.randn(TOKENS, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.register_buffer("later", torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.positions
        h = self.first(x)
        x = x + self.attention(h, h, h, attn_mask=self.later, need_weights=False)[0]
        return x + self.mlp(self.second(x))


def token_ranks(dimension: int, seed: int) -> tuple[float, float]:
    """Effective token ranks of what the embedding multiplies, [x, 1], and of the NTK."""
    torch.manual_seed(seed)
    model, x = Transformer(dimension), torch.randn(TRIALS, TOKENS, dimension)
    flow = kp.linearize(kp.solve(kp.StaticProblem(model, x, state=["attention", "mlp"])))
    gram = (x @ x.transpose(1, 2) + 1).sum(0)
    of_inputs = float(gram.trace() ** 2 / (gram**2).sum())
    return of_inputs, kp.effective_rank(kp.partial_trace(flow.ntk, keep="token", seed=seed)).value


def draw(path: Path, dimensions: tuple[int, ...], ranks: np.ndarray) -> None:
    """Ranks [dimension, seed, operator], their means as lines."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for found, name, color in zip(np.moveaxis(ranks, 2, 0), ("inputs [x, 1]", "NTK"), SERIES, strict=False):
        axes.plot(dimensions, found.mean(1), color=color, label=name)
        axes.plot(dimensions, found, "o", color=color, markersize=3, alpha=0.6)
    axes.axhline(TOKENS, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate("all tokens", (dimensions[0], TOKENS), (0, -12), textcoords="offset points", color="0.4")
    axes.set(xlabel="Dimension of the inputs", ylabel="Effective token rank", ylim=(0, 1.06 * TOKENS))
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Effective token rank of a transformer's NTK by input dimension.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default tokens.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="few dimensions and one seed, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "tokens.png"
    dimensions, seeds = (QUICK, 1) if options.quick else (DIMENSIONS, SEEDS)

    ranks = np.array([[token_ranks(d, seed) for seed in range(seeds)] for d in dimensions])
    print(f"effective token ranks, of {TOKENS}\ndimension inputs    NTK")
    for d, (inputs, ntk) in zip(dimensions, ranks.mean(1), strict=True):
        print(f"{d:9} {inputs:6.2f} {ntk:6.2f}")
    first, last = ranks.mean(1)[[0, -1], 1]
    print(f"expected: the NTK's rises with the dimension of the inputs; found: from {first:.2f} to {last:.2f}")
    assert last > 1.5 * first
    draw(out, dimensions, ranks)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
