"""Does the NTK at initialisation tell which students will learn their teacher? A few minutes.

    python examples/papers/teacher_student.py --out students.png

Expected (arXiv 2605.08746): the dynamics at initialisation bias the NTK, and with it what can be learnt; so ranks of
the NTK, and how it is aligned with the error, should put the students in the order of their losses after training.

Found: the speed does (Spearman -0.89 over 35 students, and -0.68 to -1 among those with inputs of one rank), which
knows how strong the NTK is along the error. So does the spatial rank, the lower the better (0.93), though it varies by
5 % only: it falls where the recurrence amplifies. The alignment relative to the NTK's own size does for gains up to 1.2
(-0.83), but not for chaotic students (g = 1.5), which it puts last and which learn well, so that over all it is weak
(-0.42). The temporal rank hardly does (0.46, without the chaotic 0.33). One seed; `--full` has three.

Teacher and students are z' = tanh(W z + U x) with 64 units and a readout of one number; W is g times a random
orthogonal matrix, with g = 1.2 for the teacher. Inputs are noise in r of 16 dimensions, of the same power for all r.
Students have the U and the readout of their teacher, and learn W by gradient descent on all trials. Measures at
initialisation are exact or estimated to about a percent:
- temporal and spatial rank: effective ranks of the NTK's partial traces;
- alignment <e, A e> / (|e|^2 l_1) of the error e with the NTK A of the output, between 0 and 1;
- speed <e, A e> / |e|^2, by which the loss falls at first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

import kpflow_dyn as kp

UNITS, INPUTS, STEPS, TRIALS, TEACHER = 64, 16, 40, 32, 1.2
GAINS, RANKS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5), (1, 2, 4, 8, 16)
QUICK = (0.4, 1.0), (1, 16)
MEASURES = ("temporal rank", "spatial rank", "alignment", "speed")


def network(gain: float, U: Tensor | None = None) -> nn.RNN:
    """W is gain times orthogonal, and learns alone; U is given or drawn."""
    rnn = nn.RNN(INPUTS, UNITS, bias=False, batch_first=True)
    nn.init.orthogonal_(rnn.get_parameter("weight_hh_l0"), gain)
    own = rnn.get_parameter("weight_ih_l0").requires_grad_(False)
    nn.init.xavier_normal_(own) if U is None else own.copy_(U)
    return rnn


def lesson(rank: int) -> tuple[kp.tasks.TaskData, Tensor, nn.Linear]:
    """What a teacher says on inputs of this rank, its U and its readout."""
    teacher, readout = network(TEACHER), nn.Linear(UNITS, 1).requires_grad_(False)
    basis = torch.linalg.qr(torch.randn(INPUTS, rank))[0]
    x = torch.randn(TRIALS, STEPS, rank) / rank**0.5 @ basis.T
    with torch.no_grad():
        y = readout(teacher(x)[0])
    return kp.tasks.TaskData(x.numpy(), y.numpy()), teacher.get_parameter("weight_ih_l0"), readout


def measures(student: nn.RNN, task: kp.tasks.TaskData, readout: nn.Linear) -> list[float]:
    """`MEASURES`, before training."""
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(student, torch.from_numpy(task.inputs))))
    ranks = [kp.effective_rank(kp.partial_trace(flow.ntk, keep=axis)).value for axis in ("time", "unit")]
    y = flow.output(readout)
    speed = kp.rayleigh(y.ntk, y.values - torch.from_numpy(task.targets)).value
    return [*ranks, speed / float(kp.eigs(y.ntk, k=1).values[0]), speed]


def study(gain: float, rank: int, steps: int, seed: int) -> list[float]:
    """The measures, and the loss before and after training, in units of the target's variance."""
    torch.manual_seed(seed)
    task, U, readout = lesson(rank)
    student = network(gain, U)
    found = measures(student, task, readout)
    losses = kp.train.fit(student, task, readout, steps=steps, lr=0.1, optimizer="sgd").losses / task.targets.var()
    return [*found, losses[0], losses[-1]]


def order(values: np.ndarray, found: np.ndarray) -> float:
    """Spearman's correlation of a measure with the loss after training."""
    result: Any = spearmanr(values, found[:, -1])  # a class that scipy's types do not tell
    return result.statistic


def draw(path: Path, setups: np.ndarray, found: np.ndarray) -> None:
    """The loss after training against each measure; setups [student, 2] are gains and ranks."""
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True)
    points = [scatter(axes, setups, values, found) for axes, values in zip(panels, found.T, strict=False)]
    for axes, name in zip(panels, MEASURES, strict=True):
        axes.set(xlabel=name.capitalize(), xscale="log" if name in MEASURES[2:] else "linear", yscale="log")
    panels[0].set(ylabel="Loss after training / variance")
    panels[0].set_yticks([0.2, 0.5, 1], ["0.2", "0.5", "1"])
    panels[0].yaxis.set_minor_formatter("")
    figure.colorbar(points[0], ax=panels, label="Gain g", pad=0.01)
    handles, _ = points[0].legend_elements("sizes", num=[14 + 5 * rank for rank in RANKS], color="0.5")
    figure.legend(
        handles,
        [str(rank) for rank in RANKS],
        title="Rank of inputs",
        loc="outside lower center",
        ncols=5,
        frameon=False,
    )
    figure.savefig(path, dpi=150)


def scatter(axes: Axes, setups: np.ndarray, values: np.ndarray, found: np.ndarray) -> PathCollection:
    axes.set_title(f"Spearman {order(values, found):.2f}", fontsize=10)
    return axes.scatter(
        values, found[:, -1], 14 + 5 * setups[:, 1], setups[:, 0], cmap="cividis", edgecolor="w", linewidth=0.5
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures of the NTK at initialisation against losses after training.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default students.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="four students and 20 steps, to see that it runs")
    parser.add_argument("--full", action="store_true", help="three seeds and 3000 steps, about an hour")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "students.png"
    gains, ranks = QUICK if options.quick else (GAINS, RANKS)
    steps, seeds = (20, 1) if options.quick else (3000, 3) if options.full else (300, 1)

    setups = [(gain, rank, seed) for gain in gains for rank in ranks for seed in range(seeds)]
    names, found = (*MEASURES, "loss before", "loss after"), []
    print("gain inputs", *(f"{name:>14}" for name in names))
    for gain, rank, seed in setups:
        found.append(study(gain, rank, steps, seed))
        print(f"{gain:4} {rank:6}", *(f"{value:14.4g}" for value in found[-1]), flush=True)
    table = np.array(found)
    tame = np.array(setups)[:, 0] <= TEACHER
    print(f"\nSpearman's correlation with the loss after training, of all students and of those with g <= {TEACHER}")
    for name, values in zip(names[:-1], table.T, strict=False):
        print(f"{name:14} {order(values, table):6.2f} {order(values[tame], table[tame]):6.2f}")
    assert (table[:, -1] < table[:, -2]).all()
    assert order(table[:, 3], table) < -0.7
    draw(out, np.array(setups)[:, :2], table)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
