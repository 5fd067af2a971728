"""Does the NTK at initialisation tell which students will learn their teacher? A few minutes.

    python examples/papers/teacher_student.py --out students.png

Expected (arXiv 2605.08746): the dynamics at initialisation bias the NTK, and with it what can be learnt; so ranks of
the NTK, and how it is aligned with the error, should put the students in the order of their losses after training.

Found: the speed does (Spearman -0.89 over 35 students, and -0.68 to -1 among those with inputs of one rank), which
knows how strong the NTK is along the error. So does the spatial rank, the lower the better (0.93), though it varies by
5 % only: it falls where the recurrence amplifies. The alignment relative to the NTK's own size does for gains up to 1.2
(-0.83), but not for chaotic students (g = 1.5), which it puts last and which learn well, so that over all it is weak
(-0.42). The temporal rank hardly does (0.46, without the chaotic 0.33). One seed.

Teacher and students are z' = tanh(W z + U x) with 64 units and a readout of one number; W is g times a random
orthogonal matrix, with g = 1.2 for the teacher. Inputs are noise in r of 16 dimensions, of the same power for all r.
Students have the U and the readout of their teacher, and learn W by gradient descent on all trials. Measures at
initialisation are exact or estimated to about a percent:
- temporal and spatial rank: effective ranks of the NTK's partial traces;
- alignment <e, A e> / (|e|^2 l_1) of the error e with the NTK A of the output, between 0 and 1;
- speed <e, A e> / |e|^2, by which the loss falls at first.

Theirs: the same sizes, descent with a rate of 0.01 on batches of 128, and students that learn W, U or both. `--full`
takes that rate and 128 trials, the same in each step, and learns W alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from study import Claim, begin
from torch import Tensor, nn

import kpflow_dyn as kp

UNITS, INPUTS, STEPS, TEACHER = 64, 16, 40, 1.2
GAINS, RANKS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.5), (1, 2, 4, 8, 16)
MEASURES = ("temporal rank", "spatial rank", "alignment", "speed")


@dataclass(frozen=True)
class Setting:
    trials: int
    lr: float
    steps: int
    seeds: int
    gains: tuple[float, ...] = GAINS
    ranks: tuple[int, ...] = RANKS


QUICK, OURS, AUTHORS = (
    Setting(32, 0.1, 20, 1, (0.4, 1.0), (1, 16)),
    Setting(32, 0.1, 300, 1),
    Setting(128, 0.01, 3000, 3),
)


def network(gain: float, U: Tensor | None = None) -> nn.RNN:
    """W is gain times orthogonal, and learns alone; U is given or drawn."""
    rnn = nn.RNN(INPUTS, UNITS, bias=False, batch_first=True)
    nn.init.orthogonal_(rnn.get_parameter("weight_hh_l0"), gain)
    own = rnn.get_parameter("weight_ih_l0").requires_grad_(False)
    nn.init.xavier_normal_(own) if U is None else own.copy_(U)
    return rnn


def lesson(rank: int, trials: int) -> tuple[kp.tasks.TaskData, Tensor, nn.Linear]:
    """What a teacher says on inputs of this rank, its U and its readout."""
    teacher, readout = network(TEACHER), nn.Linear(UNITS, 1).requires_grad_(False)
    basis = torch.linalg.qr(torch.randn(INPUTS, rank))[0]
    x = torch.randn(trials, STEPS, rank) / rank**0.5 @ basis.T
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


def learnt(gain: float, rank: int, seed: int, setting: Setting) -> list[float]:
    """The measures, and the loss before and after training, in units of the target's variance."""
    torch.manual_seed(seed)
    task, U, readout = lesson(rank, setting.trials)
    student = network(gain, U)
    found = measures(student, task, readout)
    run = kp.train.fit(student, task, readout, steps=setting.steps, lr=setting.lr, optimizer="sgd")
    losses = run.losses / task.targets.var()
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
    study = begin("Measures of the NTK against losses.", "students.png", quick=QUICK, ours=OURS, authors=AUTHORS)
    setting = study.setting
    setups = [(g, rank, seed) for g in setting.gains for rank in setting.ranks for seed in range(setting.seeds)]
    names, found = (*MEASURES, "loss before", "loss after"), []
    print("gain inputs", *(f"{name:>14}" for name in names))
    for gain, rank, seed in setups:
        found.append(learnt(gain, rank, seed, setting))
        print(f"{gain:4} {rank:6}", *(f"{value:14.4g}" for value in found[-1]), flush=True)
    table = np.array(found)
    tame = np.array(setups)[:, 0] <= TEACHER
    print(f"\nSpearman's correlation with the loss after training, of all students and of those with g <= {TEACHER}")
    orders = {n: (order(v, table), order(v[tame], table[tame])) for n, v in zip(MEASURES, table.T, strict=False)}
    for name, both in orders.items():
        print(f"{name:14} {both[0]:6.2f} {both[1]:6.2f}")
    assert (table[:, -1] < table[:, -2]).all()
    claims = [
        Claim(f"the {name} orders students by their losses: |Spearman| above 0.7", f"{both[0]:.2f}", abs(both[0]) > 0.7)
        for name, both in orders.items()
    ]
    draw(study.out, np.array(setups)[:, :2], table)
    study.finish(claims, {"students": setups, "columns": names, "found": table, "Spearman": orders})


if __name__ == "__main__":
    main()
