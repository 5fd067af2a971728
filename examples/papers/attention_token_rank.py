"""The input bottleneck of attention: in how many token patterns can learning change a transformer? Under a minute.

    python examples/papers/attention_token_rank.py --out tokens.png    # --full: the authors' sizes, minutes

Expected (arXiv 2605.08746): weights write only along what they multiply, so that inputs of few dimensions let gradient
descent act on few patterns over the tokens, however wide the model is. The effective token rank of the NTK rises with
the dimension of the inputs, and stays far below the number of tokens even where that of the inputs does not.

The model embeds inputs [trial, token, d] in 64 units, adds positions of a tenth of their size, and has one causal block
of attention and an MLP; its weights are as torch draws them. The state are the outputs of the attention and of the MLP.
Theirs: width 64, 4 heads, an MLP of three layers of 128, 50 tokens, inputs of 1 to 1000 dimensions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from study import Claim, begin
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

WIDTH, HEADS = 64, 4


@dataclass(frozen=True)
class Setting:
    trials: int
    tokens: int
    mlp: tuple[int, ...]
    dimensions: tuple[int, ...]
    seeds: int


QUICK = Setting(8, 32, (256,), (1, 4, 16), 1)
OURS = Setting(8, 32, (256,), (1, 2, 3, 4, 6, 8, 12, 16, 24, 32), 3)
AUTHORS = Setting(8, 50, (128, 128, 128), (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), 3)


class Transformer(nn.Module):
    """One causal block of attention and an MLP on embedded inputs."""

    def __init__(self, dimension: int, setting: Setting) -> None:
        super().__init__()
        self.embedding = nn.Linear(dimension, WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(setting.tokens, WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        hidden = [m for sizes in itertools.pairwise((WIDTH, *setting.mlp)) for m in (nn.Linear(*sizes), nn.GELU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(setting.mlp[-1], WIDTH))
        self.register_buffer("later", torch.ones(setting.tokens, setting.tokens, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x) + self.positions
        h = self.first(x)
        x = x + self.attention(h, h, h, attn_mask=self.later, need_weights=False)[0]
        return x + self.mlp(self.second(x))


def token_ranks(dimension: int, seed: int, setting: Setting) -> tuple[float, float]:
    """Effective token ranks of what the embedding multiplies, [x, 1], and of the NTK."""
    torch.manual_seed(seed)
    model, x = Transformer(dimension, setting), torch.randn(setting.trials, setting.tokens, dimension)
    flow = kp.linearize(kp.solve(kp.StaticProblem(model, x, state=["attention", "mlp"])))
    gram = (x @ x.transpose(1, 2) + 1).sum(0)
    of_inputs = float(gram.trace() ** 2 / (gram**2).sum())
    return of_inputs, kp.effective_rank(kp.partial_trace(flow.ntk, keep="token", seed=seed)).value


def draw(path: Path, setting: Setting, ranks: np.ndarray) -> None:
    """Ranks [dimension, seed, operator], their means as lines."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    for found, name, color in zip(np.moveaxis(ranks, 2, 0), ("inputs [x, 1]", "NTK"), SERIES, strict=False):
        axes.plot(setting.dimensions, found.mean(1), color=color, label=name)
        axes.plot(setting.dimensions, found, "o", color=color, markersize=3, alpha=0.6)
    axes.axhline(setting.tokens, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate(
        "all tokens", (setting.dimensions[0], setting.tokens), (0, -12), textcoords="offset points", color="0.4"
    )
    axes.set(xlabel="Dimension of the inputs", ylabel="Effective token rank", ylim=(0, 1.06 * setting.tokens))
    axes.set_xscale("log" if setting.dimensions[-1] > 100 else "linear")
    axes.legend(frameon=False, loc="center right")
    figure.savefig(path, dpi=150)


def main() -> None:
    study = begin("Token rank of a transformer's NTK.", "tokens.png", quick=QUICK, ours=OURS, authors=AUTHORS)
    setting = study.setting
    ranks = np.array([[token_ranks(d, seed, setting) for seed in range(setting.seeds)] for d in setting.dimensions])
    print(f"effective token ranks, of {setting.tokens}\ndimension inputs    NTK")
    for d, (inputs, ntk) in zip(setting.dimensions, ranks.mean(1), strict=True):
        print(f"{d:9} {inputs:6.2f} {ntk:6.2f}")
    first, last = ranks.mean(1)[[0, -1], 1]
    claims = [
        Claim(
            "the NTK's rank rises with the dimension of the inputs, by half at least",
            f"from {first:.2f} to {last:.2f}",
            bool(last > 1.5 * first),
        ),
        Claim(
            "it stays below half of the number of tokens, whatever the inputs",
            f"at most {ranks[..., 1].max():.2f} of {setting.tokens}",
            bool(ranks[..., 1].max() < setting.tokens / 2),
        ),
    ]
    draw(study.out, setting, ranks)
    study.finish(claims, {"dimensions": setting.dimensions, "inputs": ranks[..., 0], "ntk": ranks[..., 1]})


if __name__ == "__main__":
    main()
