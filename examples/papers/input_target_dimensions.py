"""Who sets the dimension of what gradient descent changes, the inputs or the targets? A map over both. Two minutes.

    python examples/papers/input_target_dimensions.py --out dimensions.png

Expected (scripts of arXiv 2507.06381, simplicity_bias): gradient descent is biased to low dimensions, since the state
changes dS = NTK e by no more patterns than the inputs and the states have. So the effective dimension of dS follows
that of the inputs, falls below that of the error, and hardly follows that of the targets.

Theirs: nn.GRU or nn.RNN of 256 units with torch's recurrent weights times 8; 20 trials of 30 steps of a rotating
latent state in 10 dimensions, seen through 100 numbers; inputs and targets are sines of 1 to 500 random combinations of
them, on a grid of 20 x 20 dimensions. Here a GRU, whose weights are also taken as torch draws them. Dimensions are
effective ranks of the covariance; e is the gradient in the states.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from study import Claim, begin
from torch import nn

import kpflow_dyn as kp

LATENT, SEEN = 10, 100


@dataclass(frozen=True)
class Setting:
    units: int
    trials: int
    steps: int
    scales: tuple[float, ...]
    dimensions: tuple[int, ...]


QUICK = Setting(16, 4, 6, (1.0, 8.0), (1, 20))
OURS = Setting(64, 20, 30, (1.0, 8.0), (1, 2, 4, 8, 16, 64, 500))
AUTHORS = Setting(256, 20, 30, (1.0, 8.0), tuple(np.linspace(1, 500, 20).astype(int).tolist()))
MEASURES = ("inputs", "targets", "states", "error", "change")


def trials(inputs: int, targets: int, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next values [trial, time, channel] of the same hidden rotation."""
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((LATENT, LATENT)))[0]
    z, seen = [rng.standard_normal((setting.trials, LATENT))], rng.standard_normal((LATENT, SEEN))
    for _ in range(setting.steps):
        z.append(0.8 * z[-1] + 0.2 * z[-1] @ rotation.T)
    x = np.stack(z, axis=1) @ seen
    both = zip((x[:, :-1], x[:, 1:]), (inputs, targets), strict=True)
    x, y = (np.sin(part @ rng.standard_normal((SEEN, n)) + rng.standard_normal(n)) for part, n in both)
    return x, y


def dimension(values: Any) -> float:
    """The effective rank of the covariance of [trial, time, channel] over its channels."""
    rows = np.asarray(values).reshape(-1, np.shape(values)[-1])
    variances = np.linalg.svd(rows - rows.mean(0), compute_uv=False) ** 2
    return float(variances.sum() ** 2 / (variances**2).sum())


def measured(scale: float, inputs: int, targets: int, setting: Setting) -> list[float]:
    """`MEASURES` of a network at its start."""
    x, y = trials(inputs, targets, setting)
    torch.manual_seed(0)
    gru, readout = nn.GRU(inputs, setting.units, batch_first=True).double(), nn.Linear(setting.units, targets).double()
    gru.get_parameter("weight_hh_l0").data *= scale
    problem = kp.DiscreteProblem(gru, torch.from_numpy(x))
    with torch.no_grad():
        states = gru(problem.x)[0]
        error = (readout(states) - torch.from_numpy(y)) @ readout.weight
        change = kp.linearize(kp.solve(problem)).ntk.mv(error)
    return [dimension(values) for values in (x, y, states, error, change)]


def draw(path: Path, setting: Setting, found: np.ndarray) -> None:
    """Of [scale, input, target, measure]: maps of the change's dimension, and it against the error's."""
    figure = Figure(figsize=(4.2 * len(setting.scales), 6.6), layout="constrained")
    ticks = np.linspace(0, len(setting.dimensions) - 1, min(7, len(setting.dimensions))).astype(int)
    labels = [str(setting.dimensions[tick]) for tick in ticks]
    for (above, below), scale, table in zip(
        figure.subplots(2, len(setting.scales)).T, setting.scales, found, strict=True
    ):
        image = above.imshow(table[..., 4].T, origin="lower", cmap="viridis")
        above.set(title=f"Weights times {scale:g}", xlabel="Channels of the inputs", ylabel="Channels of the targets")
        above.set_xticks(ticks, labels)
        above.set_yticks(ticks, labels)
        figure.colorbar(image, ax=above, label="Dimension of the change")
        points = below.scatter(table[..., 3], table[..., 4], c=table[..., 0], s=14, cmap="cividis")
        below.axline((1, 1), slope=1, color="0.6", linewidth=0.8)
        below.set(xlabel="Dimension of the error", ylabel="Dimension of the change")
        figure.colorbar(points, ax=below, label="Dimension of the inputs")
    figure.savefig(path, dpi=150)


def order(a: np.ndarray, b: np.ndarray) -> float:
    result: Any = spearmanr(a.ravel(), b.ravel())
    return float(result.statistic)


def sweep(scale: float, setting: Setting) -> list[list[list[float]]]:
    """[input, target, measure], printed."""
    print(f"weights times {scale:g}: channels of inputs, of targets; effective dimensions of", ", ".join(MEASURES))
    rows = []
    for inputs in setting.dimensions:
        rows.append([measured(scale, inputs, targets, setting) for targets in setting.dimensions])
        for targets, row in zip(setting.dimensions, rows[-1], strict=True):
            print(f"{inputs:6} {targets:6}  ", *(f"{value:7.2f}" for value in row), flush=True)
    return rows


def claims_of(scale: float, table: np.ndarray) -> list[Claim]:
    """Of [input, target, measure] at this scale."""
    change, error = table[..., 4], table[..., 3]
    by_inputs, by_targets = order(change, table[..., 0]), order(change, table[..., 1])
    below = float((change < error).mean())
    return [
        Claim(
            f"weights times {scale:g}: the change's dimension follows that of the inputs, by 0.1 more than the targets",
            f"Spearman {by_inputs:.2f} and {by_targets:.2f}",
            by_inputs > max(by_targets, 0) + 0.1,
        ),
        Claim(
            f"weights times {scale:g}: the change has a lower dimension than the error",
            f"in {100 * below:.0f} % of {change.size} pairs; medians {np.median(change):.2f}, {np.median(error):.2f}",
            below > 0.9,
        ),
    ]


def main() -> None:
    study = begin(
        "Dimensions of state changes by those of inputs and targets.",
        "dimensions.png",
        quick=QUICK,
        ours=OURS,
        authors=AUTHORS,
    )
    setting = study.setting
    found = np.array([sweep(scale, setting) for scale in setting.scales])
    claims = [claim for scale, table in zip(setting.scales, found, strict=True) for claim in claims_of(scale, table)]
    draw(study.out, setting, found)
    study.finish(claims, {"channels": setting.dimensions, "measures": MEASURES, "dimensions": found.round(4)})


if __name__ == "__main__":
    main()
