"""Where do trained residual MLPs stretch their inputs, and do kernels keep what representations keep? A minute.

    python examples/papers/residual_mlps.py --out residual.png

Expected (scripts of arXiv 2605.08746, p_operator_greens_fcn): networks that tell whether a point of the plane lies in
the unit circle stretch inputs most about that circle: there the finite-time Lyapunov exponent, log of the largest
singular value of d h_last / d x over depth - 1, is largest. And the more the states after training are those before
(representation alignment), the more the NTK is that before (kernel alignment).

Theirs: widths 10, 50, 100, 200; depths 2, 6, 8, 12; gains 0.8 to 1.1 of torch's weights, biases 0; h + tanh(W h + b);
Adam 1e-3 on batches of 1000 of 10,000 points, until an accuracy of 0.95 or 1000 epochs; a grid of 50 x 50 points; one
seed; 50 samples for each kernel alignment. Their representation alignment is the root of the cosine; ours the cosine,
which puts networks in the same order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from study import Claim, begin
from torch import Tensor, nn
from torch.func import jacrev, vmap

import kpflow_dyn as kp

SIDE = (2 * np.pi) ** 0.5  # so that the unit circle has half of the square's area


@dataclass(frozen=True)
class Setting:
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    gains: tuple[float, ...]
    points: int
    batch: int
    epochs: int
    grid: int
    samples: int


QUICK = Setting((10, 20), (2, 4), (1.0,), 500, 250, 30, 8, 10)
OURS = Setting((10, 50), (2, 6, 12), (0.8, 1.1), 4000, 500, 200, 20, 30)
AUTHORS = Setting((10, 50, 100, 200), (2, 6, 8, 12), (0.8, 0.9, 1.0, 1.1), 10_000, 1000, 1000, 50, 50)


class Layer(nn.Module):
    """h + tanh(W h + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(h).tanh()


def network(width: int, depth: int, gain: float) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [Layer(width) for _ in range(depth - 1)]
    net = nn.Sequential(nn.Sequential(nn.Linear(2, width), nn.Tanh()), *layers, nn.Linear(width, 1))
    for name, parameter in net.named_parameters():
        parameter.data *= gain if name.endswith("weight") else 0
    return net


def inside(x: Tensor) -> Tensor:
    """1 in the unit circle and -1 outside, [point, 1]."""
    return 1 - 2 * (x.norm(dim=1, keepdim=True) > 1).float()


def train(net: nn.Sequential, setting: Setting) -> float:
    """Adam until an accuracy of 0.95 on other points; the accuracy."""
    x, test = (SIDE * (torch.rand(n, 2) - 0.5) for n in (setting.points, 5000))
    optimizer, accuracy = torch.optim.Adam(net.parameters(), lr=1e-3), 0.0
    for epoch in range(setting.epochs):
        for batch in x[torch.randperm(len(x))].split(setting.batch):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(batch), inside(batch)).backward()
            optimizer.step()
        if epoch % 10 == 9:
            with torch.no_grad():
                accuracy = float((net(test).sign() == inside(test)).float().mean())
            if accuracy > 0.95:
                break
    return accuracy


def exponents(net: nn.Sequential, x: Tensor) -> np.ndarray:
    """Finite-time Lyapunov exponents [point], from the inputs to the last hidden layer."""
    jacobians = vmap(jacrev(net[:-1]))(x).detach()
    return (torch.linalg.svdvals(jacobians)[:, 0].log() / (len(net) - 2)).numpy()


def hidden(net: nn.Sequential, x: Tensor) -> tuple[Tensor, kp.Operator]:
    """The states of all hidden layers, and their NTK."""
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state=[str(i) for i in range(len(net) - 1)])))
    with torch.no_grad():
        states = itertools.accumulate(list(net)[:-1], lambda h, layer: layer(h), initial=x)
        return torch.cat([h.flatten() for h in states][1:]), flow.ntk


def study_of(width: int, depth: int, gain: float, x: Tensor, setting: Setting) -> dict[str, Any]:
    net = network(width, depth, gain)
    before, ntk_before = hidden(network(width, depth, gain), x)
    accuracy = train(net, setting)
    (after, ntk_after), stretched = hidden(net, x), exponents(net, x)
    radius = x.norm(dim=1).numpy()
    near = np.abs(radius - 1) < 0.2
    return {
        "width": width,
        "depth": depth,
        "gain": gain,
        "accuracy": accuracy,
        "representation": float(nn.functional.cosine_similarity(before, after, dim=0)),
        "kernel": kp.alignment(ntk_after, ntk_before, samples=setting.samples).value,
        "near": float(stretched[near].mean()),
        "far": float(stretched[~near].mean()),
        "exponents": stretched,
    }


def draw(path: Path, found: list[dict[str, Any]], grid: int) -> None:
    """Alignments, and exponents of the widest network of each depth."""
    shown = [one for one in found if one["gain"] == found[-1]["gain"] and one["width"] == found[-1]["width"]]
    figure = Figure(figsize=(4 + 2.4 * len(shown), 3.8), layout="constrained")
    left, *maps = figure.subplots(1, 1 + len(shown), width_ratios=[1.6, *len(shown) * [1]])
    points = left.scatter(
        [one["representation"] for one in found],
        [one["kernel"] for one in found],
        c=[one["depth"] for one in found],
        cmap="cividis",
    )
    figure.colorbar(points, ax=left, label="Depth")
    left.set(xlabel="Representation alignment", ylabel="Kernel alignment")
    for axes, one in zip(maps, shown, strict=True):
        extent = (-SIDE / 2, SIDE / 2, -SIDE / 2, SIDE / 2)
        image = axes.imshow(one["exponents"].reshape(grid, grid), origin="lower", extent=extent, cmap="viridis")
        angle = np.linspace(0, 2 * np.pi)
        axes.plot(np.cos(angle), np.sin(angle), "w:", linewidth=1)
        axes.set(title=f"{one['depth']} layers of {one['width']}", xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, orientation="horizontal", label="Exponent")
    figure.savefig(path, dpi=150)


def main() -> None:
    study = begin(
        "Stretching and alignments of residual MLPs.", "residual.png", quick=QUICK, ours=OURS, authors=AUTHORS
    )
    setting, line = study.setting, torch.linspace(-SIDE / 2, SIDE / 2, study.setting.grid)
    x = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    found = []
    columns = ("width", "depth", "gain", "accuracy", "representation", "kernel", "near", "far")
    print(*(f"{column:>14}" for column in columns))
    for sizes in itertools.product(setting.widths, setting.depths, setting.gains):
        found.append(study_of(*sizes, x, setting))
        print(*(f"{found[-1][column]:14.3g}" for column in columns), flush=True)

    stretched = sum(one["near"] > one["far"] for one in found)
    order: Any = spearmanr([one["representation"] for one in found], [one["kernel"] for one in found])
    claims = [
        Claim(
            "inputs are stretched most about the circle",
            f"mean exponent within 0.2 of it larger than elsewhere in {stretched} of {len(found)} networks",
            stretched == len(found),
        ),
        Claim(
            "kernel alignment rises with representation alignment",
            f"Spearman {order.statistic:.2f} over {len(found)} networks",
            bool(order.statistic > 0.5),
        ),
    ]
    draw(study.out, found, setting.grid)
    study.finish(claims, {"networks": [{column: one[column] for column in columns} for one in found]})


if __name__ == "__main__":
    main()
