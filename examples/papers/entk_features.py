"""Do the leading eigenvectors of a trained network's NTK hold the features it has learnt? Two minutes.

    python examples/papers/entk_features.py --out features.png

Expected (Lin, arXiv 2510.00468): the eigenvalues of the empirical NTK fall off sharply behind as many as there are
features, and the eigenvectors before this cliff are the features. Layer by layer it says where they are.

Found (means over 3 seeds; a share is that of a feature in the first k eigenvectors, `kp.feature_shares`):
- Modular addition. The first layer's kernel falls off by 12 behind its first 57 eigenvectors, which hold the Fourier
  modes of a and of b (share 0.97). So it does before training (8, and 0.97): this is the one-hot input, not learnt.
- What is learnt are the modes of a + b, in the last layer: their share in 57 eigenvectors of its kernel grows from 0.03
  to 0.96 (first layer: 0.00 and 0.00; all weights: 0.01 and 0.85; by chance 0.07). That of a - b, which the task does
  not use but squares make as well, grows to 0.53. No cliff stands at 57 in these two kernels (a fall of 1.0); the
  spectrum falls steeply behind the first eigenvector, the constant, by about 22 (15 before training).
- It comes later than generalisation: at step 100 the accuracy on unseen pairs is 0.99 and the share (all weights) 0.12.
- All frequencies are used by these networks, so that they cannot tell used frequencies from others.
- Superposition. The share of a learnt feature in 20 eigenvectors grows from 0.18 to 0.49 (6 hidden units, 90 % zeros),
  from 0.23 to 0.62 (16, 90 %), and from 0.61 to 0.69 (16, 30 %); by chance 0.002. No single eigenvector is a feature in
  superposition: the best has 0.29 of it (0.52 and 0.36 with 16 units). A cliff at the number of inputs is sharp after
  training only with 16 units and 30 % zeros (6.0; before 1.4). In the other two it is sharper before training (2.3 and
  1.9) than after it (1.3 and 1.2).

Modular addition: a + b mod 29 of all pairs, one-hot, y = V (W x)^2 with 128 hidden units, squared error, AdamW, trained
on 70 % of the pairs. The kernel is summed over the 29 outputs, which leaves functions of the 841 pairs. Families: the
Fourier modes of a and of b (56 dimensions), those of a + b (28), and those of a - b (28); k = 57 is the constant
and 56 more.

Superposition (Elhage et al., arXiv 2209.10652): y = relu(W^T W x + b) for 20 inputs of 6 or 16 hidden units, each zero
with probability 0.9 or 0.3, else uniform; input i has importance 0.9^i. The kernel is on trials x outputs. Feature i is
input i in output i, and counts as learnt where |W_i|^2 > 1/2; k = 20. "one": its share in the best single eigenvector.
The paper has 50 inputs, importance 0.8^i, and rescales eigenvectors by importance, which is left out here.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

INPUTS, TRIALS = 20, 500
SETTINGS = ((6, 0.9), (16, 0.9), (16, 0.3))  # hidden units, and how often an input is zero
LAYERS = {"all": None, "first": ["first.weight"], "last": ["last.weight"]}
LOOKS = (0, 20, 40, 60, 80, 100, 150, 200, 300, 500, 1000)


class Superposition(nn.Module):
    """Many inputs through few hidden units and back."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(hidden, INPUTS) / math.sqrt(INPUTS))
        self.b = nn.Parameter(torch.zeros(INPUTS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.W.T @ self.W + self.b)


class Addition(nn.Module):
    """a and b, one-hot side by side, through squares of hidden units."""

    def __init__(self, p: int, hidden: int = 128) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2 * p, hidden, bias=False), nn.Linear(hidden, p, bias=False)
        nn.init.normal_(self.first.weight, std=1 / math.sqrt(2 * p))
        nn.init.normal_(self.last.weight, std=1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) ** 2)


class Found(NamedTuple):
    """Eigenvalues, and the shares of the features."""

    values: np.ndarray
    shares: kp.FeatureShares


def sparse(trials: int, zero: float, generator: torch.Generator) -> Tensor:
    """Inputs [trial, input] that are zero with this probability, else uniform."""
    x = torch.rand(trials, INPUTS, generator=generator, dtype=torch.float64)
    return x * (torch.rand(x.shape, generator=generator) > zero)


def of_superposition(net: Superposition, x: Tensor) -> Found:
    """The eigenvectors on trials x outputs, beside input i in output i."""
    modes = kp.eigs(kp.linearize(kp.solve(kp.StaticProblem(net, x, state=""))).ntk, k=2 * INPUTS)
    each = torch.eye(INPUTS, dtype=torch.float64)
    shares = kp.feature_shares(modes, {str(i): x[:, i, None] * each[i] for i in range(INPUTS)})
    return Found(modes.values.numpy(), shares)


def superposition(hidden: int, zero: float, seed: int, steps: int) -> tuple[Found, Found, np.ndarray]:
    """Before training, after it, and which features have been learnt."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net, x = Superposition(hidden).double(), sparse(TRIALS, zero, torch.Generator().manual_seed(1000 + seed))
    before = of_superposition(net, x)
    importance, optimizer = 0.9 ** torch.arange(INPUTS), torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = sparse(256, zero, generator)
        loss = (importance * (net(batch) - batch) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, of_superposition(net, x), (net.W.detach().square().sum(0) > 0.5).numpy()


def families(p: int) -> dict[str, np.ndarray]:
    """Fourier modes of all frequencies as functions of the pairs [mode, pair]."""
    a, b = np.divmod(np.arange(p * p), p)
    angles = 2 * np.pi / p * np.arange(1, p // 2 + 1)[:, None]

    def waves(numbers: np.ndarray) -> np.ndarray:
        return np.concatenate([np.cos(angles * numbers), np.sin(angles * numbers)])

    return {"a, b": np.concatenate([waves(a), waves(b)]), "a + b": waves(a + b), "a - b": waves(a - b)}


def of_addition(net: Addition, x: Tensor, p: int, layer: str) -> Found:
    """The eigenvectors on pairs, of the kernel summed over outputs, when this layer learns."""
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")), params=LAYERS[layer])
    modes = kp.modes(flow.ntk, axis="trial", k=5 * p)
    return Found(modes.values.numpy(), kp.feature_shares(modes, families(p)))


def addition(p: int, seed: int, looks: tuple[int, ...]) -> Iterator[tuple[Addition, Tensor, float]]:
    """The network, the pairs, and the accuracy on unseen pairs, at these steps of training."""
    torch.manual_seed(seed)
    each = torch.eye(p, dtype=torch.float64)
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    x, number = torch.cat([each[a], each[b]], 1), (a + b) % p
    seen, unseen = torch.randperm(p * p).split([int(0.7 * p * p), p * p - int(0.7 * p * p)])
    net = Addition(p).double()
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=1.0)
    for step in range(looks[-1] + 1):
        if step in looks:
            with torch.no_grad():
                accuracy = (net(x[unseen]).argmax(1) == number[unseen]).double().mean()
            yield net, x, float(accuracy)
        loss = (net(x[seen]) - each[number[seen]]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fall(values: np.ndarray, k: int) -> float:
    """How many times the k-th eigenvalue is the next one."""
    return float(values[k - 1] / values[k])


def run_addition(p: int, seeds: int, looks: tuple[int, ...]) -> tuple[dict, np.ndarray]:
    """By (step, layer) the findings of all seeds; and accuracy and share of a + b [seed, look, 2]."""
    found: dict[tuple[int, str], list[Found]] = {}
    course = np.zeros((seeds, len(looks), 2))
    for seed in range(seeds):
        for i, (net, x, accuracy) in enumerate(addition(p, seed, looks)):
            layers = LAYERS if looks[i] in (looks[0], looks[-1]) else ["all"]
            for layer in layers:
                found.setdefault((looks[i], layer), []).append(of_addition(net, x, p, layer))
            course[seed, i] = accuracy, found[looks[i], "all"][-1].shares.in_leading[2 * p - 2, 1]
    k = 4 * (p // 2) + 1
    chance = found[0, "all"][0].shares.chance[k - 1]
    print(f"a + b mod {p}: shares in the first k = {k} eigenvectors, by chance {chance:.2f}")
    print("weights  step   a, b  a + b  a - b  l_1/l_2  l_k/l_k+1")
    for (step, layer), runs in found.items():
        if step in (looks[0], looks[-1]):
            shares = np.mean([one.shares.in_leading[k - 1] for one in runs], 0)
            first, cliff = (np.mean([fall(one.values, j) for one in runs]) for j in (1, k))
            print(f"{layer:7} {step:5} " + " ".join(f"{s:6.2f}" for s in shares) + f" {first:8.1f} {cliff:10.1f}")
    print("step      " + " ".join(f"{step:5}" for step in looks))
    for name, line in zip(("accuracy", "a + b"), course.mean(0).T, strict=True):
        print(f"{name:9} " + " ".join(f"{value:5.2f}" for value in line))
    return found, course


def run_superposition(seeds: int, steps: int) -> dict:
    """By setting the findings before and after, and which features have been learnt, of all seeds."""
    found = {setting: [superposition(*setting, seed, steps) for seed in range(seeds)] for setting in SETTINGS}
    print(f"superposition: shares of learnt features in the first {INPUTS} eigenvectors, and in the best one")
    print("hidden zeros learnt     before one   after  one  l_20/l_21 before after")
    for (hidden, zero), runs in found.items():
        learnt = np.mean([run[2].sum() for run in runs])
        stages = [[run[0] for run in runs], [run[1] for run in runs]]
        kept = [run[2] for run in runs]
        columns = [np.mean(list(map(shares_of, stage, kept)), 0) for stage in stages]
        cliffs = [np.mean([fall(one.values, INPUTS) for one in stage]) for stage in stages]
        (all_before, one_before), (all_after, one_after) = columns
        print(
            f"{hidden:6} {zero:5} {learnt:6.1f}     {all_before:6.2f} {one_before:.2f} {all_after:7.2f} {one_after:.2f}"
            f"  {cliffs[0]:16.1f} {cliffs[1]:5.1f}"
        )
    return found


def shares_of(found: Found, learnt: np.ndarray) -> tuple[float, float]:
    """Mean over learnt features of their share in as many eigenvectors as inputs, and in the best one of these."""
    shares = found.shares
    return float(shares.in_leading[INPUTS - 1, learnt].mean()), float(shares.of_modes[:INPUTS, learnt].max(0).mean())


def draw(path: Path, added: dict, course: np.ndarray, looks: tuple[int, ...], sparse_ones: dict) -> None:
    """Modular addition: spectra, shares by k, shares over steps; superposition: features beside eigenvectors."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    (spectra, by_k, over_steps), below = figure.subplots(2, 3)
    for layer, color in zip(LAYERS, SERIES, strict=False):
        for step, line in ((looks[0], ":"), (looks[-1], "-")):
            values = added[step, layer][0].values
            label = f"{layer} weights" if line == "-" else None
            spectra.plot(1 + np.arange(len(values)), values / values[0], line, color=color, label=label)
    spectra.set(yscale="log", ylim=(1e-6, 2), title="Addition: eigenvalues\n(dotted: before training)", xlabel="Rank")
    shares = added[looks[-1], "all"][0].shares
    for index, color in enumerate(SERIES[:3]):
        for step, line in ((looks[0], ":"), (looks[-1], "-")):
            shares = added[step, "all"][0].shares
            label = f"Fourier, {shares.names[index]}" if line == "-" else None
            by_k.plot(1 + np.arange(len(shares.chance)), shares.in_leading[:, index], line, color=color, label=label)
    by_k.plot(1 + np.arange(len(shares.chance)), shares.chance, color="0.6", linewidth=0.8, label="chance")
    by_k.set(title="Share in the first k eigenvectors\n(dotted: before training)", xlabel="k", ylim=(0, 1.02))
    for index, (name, color) in enumerate((("accuracy, unseen pairs", SERIES[3]), ("share of a + b", SERIES[1]))):
        over_steps.plot(looks, course[:, :, index].T, color=color, alpha=0.35, linewidth=0.8)
        over_steps.plot(looks, course[:, :, index].mean(0), color=color, label=name)
    over_steps.set(title="Along the training", xlabel="Step", ylim=(0, 1.02))
    over_steps.set_xscale("symlog", linthresh=20)
    over_steps.set_xlim(0, looks[-1])
    for axes in (spectra, by_k, over_steps):
        axes.legend(frameon=False, fontsize=8)
    image = None
    for axes, ((hidden, zero), runs) in zip(below, sparse_ones.items(), strict=True):
        image = axes.imshow(runs[0][1].shares.of_modes[:INPUTS].T, cmap="cividis", vmin=0, vmax=1)
        axes.set(title=f"Superposition: {hidden} hidden,\n{zero:.0%} zeros", xlabel="Eigenvector")
        axes.set(xticks=[0, 9, 19], yticks=[0, 9, 19], xticklabels=[1, 10, 20], yticklabels=[1, 10, 20])
    below[0].set_ylabel("Feature")
    assert image is not None
    figure.colorbar(image, ax=below, label="Share of the feature")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Features in the leading eigenvectors of the empirical NTK.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default features.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="small and short, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "features.png"
    p, seeds, looks, steps = (11, 1, (0, 1000), 500) if options.quick else (29, 3, LOOKS, 6000)

    added, course = run_addition(p, seeds, looks)
    sparse_ones = run_superposition(seeds, steps)
    k = 4 * (p // 2) + 1
    before, after = (added[step, "all"][0].shares.in_leading[k - 1, 1] for step in (looks[0], looks[-1]))
    print(f"expected: a + b comes into the leading eigenvectors; found: from {before:.2f} to {after:.2f}")
    assert after > 2 * before
    draw(out, added, course, looks, sparse_ones)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
