"""Do networks that solve a task alike learn alike? Twelve networks of one task, compared by states and by kernels.

    python examples/studies/alike.py --out alike.png    # a few minutes
    python examples/studies/alike.py --quick            # small networks, a few steps, to see that it runs

Tanh networks and GRUs of two sizes, two gains and two seeds are trained on MemoryPro to the same loss. All pairs are
then compared on the same trials and times: by their states, by K (what the weights write), by P P* (how kicks last) and
by the NTK (how a step of training moves the states). A Mantel test says whether pairs that are near in one sense are
near in the other.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.models import Gaussian, make_model

TASK = kp.tasks.MemoryPro(fixation=2, stimulus=4, memory=8, response=6)
KINDS = {"RNN, g = 0.8": ("rnn", 0.8), "RNN, g = 1.5": ("rnn", 1.5), "GRU": ("gru", 1.0)}
SENSES = {"states": "states", "K": "K", "PP": "P P*", "ntk": "NTK"}
GOAL = 0.01  # of the loss


def network(kind: str, units: int, seed: int) -> tuple[nn.Module, nn.Linear]:
    name, gain = KINDS[kind]
    return make_model(name, 3, units, 3, init=Gaussian(gain), seed=seed, dtype="float64")


def loss_of(cell: nn.Module, readout: nn.Linear, x: Tensor, target: Tensor) -> Tensor:
    """The mean squared error, with a graph for training."""
    z, states = x.new_zeros(len(x), readout.in_features), []
    for now in x.unbind(1):
        z = cell(now, z)
        states.append(z)
    return (readout(torch.stack(states, 1)) - target).square().mean()


def trained(kind: str, units: int, seed: int, steps: int) -> tuple[nn.Module, int, float]:
    """The cell once its loss is at the goal, after how many steps of Adam, and the loss."""
    cell, readout = network(kind, units, seed)
    task = TASK.sample(trials=32, seed=0)
    x, target = torch.from_numpy(task.inputs), torch.from_numpy(task.targets)
    optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], lr=3e-3)
    done, loss = 0, loss_of(cell, readout, x, target)
    while loss > GOAL and done < steps:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        done, loss = done + 1, loss_of(cell, readout, x, target)
    return cell, done, loss.item()


def study(sizes: tuple[int, ...], seeds: int, steps: int, trials: int) -> dict[str, kp.Similarities]:
    """Trains all networks, and compares each pair in each sense."""
    x = torch.from_numpy(TASK.sample(trials=trials, seed=1).inputs)
    flows, names = [], []
    for kind, units, seed in product(KINDS, sizes, range(seeds)):
        cell, step, loss = trained(kind, units, seed, steps)
        names.append(f"{kind}, {units} units, seed {seed}")
        print(f"{names[-1]:32} loss {loss:.4f} after {step} steps of Adam", flush=True)
        flows.append(kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))))
    return {of: kp.similarities(flows, of=of, measure="cka", names=names, samples=60) for of in SENSES}


def of_the_same(found: kp.Similarities, part: int) -> tuple[float, float]:
    """Mean distances of pairs alike in a part of their names (0 the kind, -2 the size), and of other pairs."""
    split = [name.split(", ") for name in found.names]
    kinds = np.array([", ".join(one[:-2]) if part == 0 else one[part] for one in split])
    i, j = np.triu_indices(len(kinds), 1)
    same = kinds[i] == kinds[j]
    return float(found.distance[i, j][same].mean()), float(found.distance[i, j][~same].mean())


def drawn(found: dict[str, kp.Similarities]) -> Figure:
    """The distances in each sense, in the order of the states, and those of the NTK against those of the states."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    top = figure.subplots(2, 3).ravel()
    order = found["states"].order
    names = [found["states"].names[i].replace(" units", "").replace("seed ", "#") for i in order]
    for place, (of, panel) in enumerate(zip(found, top, strict=False)):
        image = panel.imshow(found[of].distance[np.ix_(order, order)], cmap="cividis_r", vmin=0)
        panel.set_title(f"{SENSES[of]}: 1 - CKA")
        panel.set_xticks([])
        panel.set_yticks(range(len(names)), names if place % 3 == 0 else [""] * len(names), fontsize=8)
        figure.colorbar(image, ax=panel, shrink=0.85)
    pairs = np.triu_indices(len(names), 1)
    for panel, of in zip(top[4:], ("ntk", "PP"), strict=True):
        test = found["states"].mantel(found[of])
        panel.plot(found["states"].distance[pairs], found[of].distance[pairs], "o", markersize=4, alpha=0.7)
        panel.set_xlabel("Distance of the states")
        panel.set_ylabel(f"Distance by the {SENSES[of]}" if of == "ntk" else f"Distance by {SENSES[of]}")
        panel.set_title(f"r = {test.correlation:.2f} ± {test.stderr:.2f}, p = {test.pvalue:.2g}")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    found = study((4, 6), 1, 3, 3) if given.quick else study((24, 48), 2, 3000, 12)
    for of, each in found.items():
        kind, size = of_the_same(each, 0), of_the_same(each, -2)
        print(f"{SENSES[of]:6} same kind {kind[0]:.3f}, others {kind[1]:.3f}")
        print(f"       same size {size[0]:.3f}, others {size[1]:.3f}")
        print(f"       largest standard error {each.stderr.max():.3f}, {each.method}")
    for first, second in (("states", "ntk"), ("states", "PP"), ("states", "K"), ("K", "ntk"), ("PP", "ntk")):
        print(f"{SENSES[first]} and {SENSES[second]}: {found[first].mantel(found[second])}")
    if given.out:
        matplotlib.use("Agg")
        drawn(found).savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
