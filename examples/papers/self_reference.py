"""Does gradient descent write along what a network does already? Real steps against controls. Two minutes.

    python examples/papers/self_reference.py --out bias.png

Expected (arXiv 2605.08746): a step of gradient descent changes the states along the leading modes over trials and times
of what the weights see, V = [hidden, input, 1]; the rank of the NTK is at most that of the core, sum of m rank(V).

Found: the bound holds, and lies far above the effective rank. At gains up to 0.9 nearly all of the change lies in ten
of these modes, and as much in ten cosines of time that know nothing of the network: activity is smooth, and so is the
change. At gains of 1.2 and more the modes hold up to five times what controls do on the flip-flop, and no more on
MemoryPro. Most of the change then lies elsewhere: the bias is exact for what weights write, and P carries it on.

Networks have 48 tanh units and recurrent weights N(0, g^2 / 48), other weights as torch draws them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

UNITS, TRIALS, MODES, STEPS = 48, 12, 10, (1, 10)
GAINS = (0.5, 0.9, 1.2, 1.5)
TASKS = {
    "MemoryPro": kp.tasks.MemoryPro(fixation=4, stimulus=8, memory=12, response=8),
    "flip-flop": kp.tasks.FlipFlop(bits=1, steps=30),
}


def measured(task: kp.tasks.TaskData, gain: float) -> tuple[kp.SelfReference, kp.RankBound]:
    """The shares of real steps, and the bound of the rank."""
    torch.manual_seed(0)
    x, target = torch.from_numpy(task.inputs), torch.from_numpy(task.targets)
    cell = nn.RNN(x.shape[2], UNITS, batch_first=True).double()
    nn.init.normal_(cell.get_parameter("weight_hh_l0"), std=gain / UNITS**0.5)
    readout = nn.Linear(UNITS, target.shape[2]).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    found = kp.self_reference(flow, target, readout=readout, mask=task.mask, steps=STEPS, k=MODES)
    return found, kp.rank_bound(flow, samples=60)


def draw(path: Path, gains: tuple[float, ...], shares: np.ndarray) -> None:
    """Shares [task, gain, change, basis]: core and NTK as lines, the best control dashed."""
    figure = Figure(figsize=(4 * len(TASKS), 3.4), layout="constrained")
    for axes, task, found in zip(figure.subplots(1, len(TASKS)), TASKS, shares, strict=True):
        for number, steps in enumerate(STEPS):
            style = {"marker": "os"[number], "markersize": 4}
            axes.plot(gains, found[:, number, 0], color=SERIES[0], label=f"core, {steps} steps", **style)
            axes.plot(gains, found[:, number, 1], color=SERIES[1], label=f"NTK, {steps} steps", **style)
            axes.plot(gains, found[:, number, 2:].max(1), "--", color="0.5", label=f"best control, {steps}", **style)
        axes.set(title=task, xlabel="Gain", ylim=(0, 1.05), ylabel=f"Share in {MODES} directions")
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="The self-referential bias of gradient descent, beside controls.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default bias.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="two gains, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "bias.png"
    gains = GAINS[1::2] if options.quick else GAINS

    shares = []
    for name, make in TASKS.items():
        task = make.sample(TRIALS, 0)
        print(f"{name}\ngain  change      core   NTK  best control   rank <=  er(NTK)  er(core)")
        for gain in gains:
            found, bound = measured(task, gain)
            shares.append(found.at_k)
            for change, row in zip(found.changes, found.at_k, strict=True):
                ranks = f"{bound.bound:8} {bound.ntk_effective_rank.value:8.1f} {bound.core_effective_rank.value:9.1f}"
                print(f"{gain:4} {change:10} {row[0]:6.2f} {row[1]:5.2f} {row[2:].max():13.2f} {ranks}")
            assert bound.ntk_effective_rank.value < bound.bound
    draw(out, gains, np.array(shares).reshape(len(TASKS), len(gains), len(STEPS), -1))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
