"""Do tasks that share structure share what learning can change? Over the training on four tasks; some minutes.

    python examples/papers/four_tasks.py --out four_tasks.png

Expected (arXiv 2507.06381): the operators of single tasks, within one network that learns them all, measure how these
align. Tasks that share structure align more than those that do not, and training changes by how much.

A GRU learns MemoryPro, MemoryAnti, DelayPro and DelayAnti, told apart by a rule input. All four have the same angles
and times, so that their NTKs act on one space [trial, time, unit], where cos(A, B) = tr(A B) / (|A| |B|) compares them.
 Two tasks share the periods (Memory or Delay), the answer (Pro or Anti), or neither.

Found: untrained networks hear their inputs alone, all pairs align by 0.97 to 1.00, and sharing the answer makes no
difference. As the tasks are learnt their NTKs part, to 0.16 for pairs that share neither. Pairs with the same periods
keep 0.24 and those with the same answer 0.32 on average, more than neither in each of three networks. Not every pair
does: MemoryPro and MemoryAnti, which begin at 1.00, fall to 0.17.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.tasks import DelayAnti, DelayPro, MemoryAnti, MemoryPro

TASKS = {"MemoryPro": MemoryPro(), "MemoryAnti": MemoryAnti(), "DelayPro": DelayPro(), "DelayAnti": DelayAnti()}
SHORT = ("MP", "MA", "DP", "DA")
PAIRS = {"same periods": [(0, 1), (2, 3)], "same answer": [(0, 2), (1, 3)], "neither": [(0, 3), (1, 2)]}
COLORS = (*SERIES[:2], "0.5")


@dataclass(frozen=True)
class Setting:
    seeds: int = 3
    units: int = 48
    trials: int = 32
    steps: int = 400
    every: int = 50


QUICK, FULL = Setting(1, 16, 8, 4, 4), Setting(5, 128, 128, 2000, 200)


def inputs_of_tasks(trials: int = 6) -> list[Tensor]:
    """[trial, time, channel] of each task, at the same angles."""
    rules = np.eye(len(TASKS))
    given = [task.sample(trials, seed=1).inputs for task in TASKS.values()]
    told = [np.broadcast_to(rule, (*x.shape[:2], len(rules))) for rule, x in zip(rules, given, strict=True)]
    return [torch.from_numpy(np.concatenate(both, axis=-1)).float() for both in zip(given, told, strict=True)]


def alignments(cell: nn.GRU, inputs: list[Tensor]) -> np.ndarray:
    """cos [task, task] of the NTKs of the tasks."""
    ntk = [kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).ntk for x in inputs]
    found = np.eye(len(ntk))
    for i, j in combinations(range(len(ntk)), 2):
        found[i, j] = found[j, i] = kp.alignment(ntk[i], ntk[j], samples=20).value
    return found


def over_training(seed: int, setting: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps [record], losses [record] and alignments [record, task, task]."""
    torch.manual_seed(seed)
    cell, readout = nn.GRU(7, setting.units), nn.Linear(setting.units, 3)
    data, inputs = kp.tasks.FourTasks().sample(setting.trials, seed=seed), inputs_of_tasks()
    with tempfile.TemporaryDirectory() as folder:
        record = kp.Recorder(folder, setting.every)
        kp.train.fit(cell, data, readout, steps=setting.steps, lr=5e-3, clip=1.0, record=record, progress=True)
        run = kp.Recorder.read(folder)
        found = np.stack([alignments(run.load(step, cell), inputs) for step in run.steps.tolist()])
    return run.steps, run.losses, found


def show(steps: np.ndarray, losses: np.ndarray, found: np.ndarray) -> None:
    """A table of the means over seeds, of losses [seed, record] and alignments [seed, record, task, task]."""
    pairs = [(name, pair) for name, pairs in PAIRS.items() for pair in pairs]
    print(f"{'':13}", *(f"{name:>14}" for name, _ in pairs))
    print(f"{'step':>5} {'loss':>7}", *(f"{f'{SHORT[i]}-{SHORT[j]}':>14}" for _, (i, j) in pairs))
    for step, loss, matrix in zip(steps, losses.mean(0), found.mean(0), strict=True):
        print(f"{step:5} {loss:7.4f}", *(f"{matrix[pair]:14.3f}" for _, pair in pairs))


def of_pairs(found: np.ndarray) -> dict[str, np.ndarray]:
    """[seed], the mean of the pairs with the same structure, of [seed, task, task]."""
    return {name: np.mean([found[:, i, j] for i, j in pairs], axis=0) for name, pairs in PAIRS.items()}


def report(when: str, of: dict[str, np.ndarray]) -> None:
    print(f"{when}, expected: more than {of['neither'].mean():.3f}, which is that of pairs that share neither; found:")
    for name in ("same periods", "same answer"):
        more = (of[name] > of["neither"]).sum()
        print(f"    {name}: {of[name].mean():.3f} on average, and more in {more} of {len(of[name])} networks")


def draw(path: Path, steps: np.ndarray, found: np.ndarray) -> None:
    """Of the mean alignments [record, task, task]."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    *matrices, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    for axes, matrix, when in zip(matrices, found[[0, -1]], ("Before", "After"), strict=True):
        draw_matrix(axes, matrix)
        axes.set_title(f"{when} training", fontsize=10)
    for (name, pairs), color in zip(PAIRS.items(), COLORS, strict=True):
        for (i, j), style in zip(pairs, ("-", "--"), strict=True):
            curves.plot(steps, found[:, i, j], style, color=color, label=f"{SHORT[i]}-{SHORT[j]}, {name}")
    curves.set(xlabel="Step of training", ylabel="Alignment of the NTKs", ylim=(0, 1.03))
    curves.legend(frameon=False, fontsize=8, title="M: Memory, D: Delay, P: Pro, A: Anti", title_fontsize=8)
    figure.savefig(path, dpi=150)


def draw_matrix(axes: Axes, matrix: np.ndarray) -> None:
    axes.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for (i, j), value in np.ndenumerate(matrix):
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.6 else "black")
    axes.set(xticks=range(len(TASKS)), yticks=range(len(TASKS)), yticklabels=TASKS)
    axes.set_xticklabels(TASKS, rotation=30, ha="right")


def main() -> None:
    parser = argparse.ArgumentParser(description="Alignment of the NTKs of four tasks over training.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default four_tasks.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="a few steps of one small network, to see that it runs")
    parser.add_argument("--full", action="store_true", help="five networks of 128 units, 2000 steps")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "four_tasks.png"
    setting = QUICK if options.quick else FULL if options.full else Setting()

    runs = [over_training(seed, setting) for seed in range(setting.seeds)]
    steps, losses, found = runs[0][0], *(np.stack(each) for each in list(zip(*runs, strict=True))[1:])
    print(f"NTK alignment, mean of {setting.seeds} networks")
    show(steps, losses, found)
    before, after = (of_pairs(found[:, place]) for place in (0, -1))
    report("before training", before)
    report("after training", after)
    assert options.quick or all(after[name].mean() < before[name].mean() - 0.3 for name in PAIRS)
    assert options.quick or min(after["same periods"].mean(), after["same answer"].mean()) > after["neither"].mean()
    draw(out, steps, found.mean(0))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
