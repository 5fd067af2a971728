"""Which parts of a memory task does the start of a network let it learn? Three minutes.

    python examples/papers/planted_fixed_points.py --out planted.png    # --full: 256 units, more trials, a longer run

Expected (arXiv 2605.08746): the dynamics at the start shape the NTK. Fixed points at 0, 5 or 30 random states N(0, 1)
change its leading temporal modes, and what the NTK passes over of the target of MemoryPro is learnt late or never: of
its three components (fixation, and two of the direction), the third stalls.

Found after 1200 steps, with the seeds 0, 1 and 2: without planted points, what the stimulus did fades in the memory
period, and both components of the direction stall, at 0.09 and 0.03 or 0.04. Five points raise the Rayleigh quotient of
the third a hundred times, and more is learnt: 0.27 and 0.66, 0.27 and 0.14, 0.68 and 0.30. One of the two stays behind,
but for seed 0 that is the second. It is always the one whose cos(c, NTK c) is lower on average over the run. What that
is at the start does not tell: 0.57 and 0.03 for seed 0. The kernel of planted networks changes within the first steps,
which are too large for its leading eigenvalue.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import CTRNNCell, plant_fixed_points

POINTS = (0, 5, 30)
STYLES = {0: "--", 5: "-"}  # of the runs that are trained
TASK = kp.tasks.MemoryPro()
CURVES = {
    "loss": "Loss",
    "component_learnt": "Learnt part of the component",
    "component_alignment": "cos(c, NTK c)",
    "component_rayleigh": "<c, NTK c> / <c, c>",
}


@dataclass(frozen=True)
class Setting:
    units: int = 128
    trials: int = 20
    steps: int = 1200
    every: int = 100


QUICK, FULL = Setting(32, 2, 2, 2), Setting(256, 40, 6000, 500)


def make(units: int) -> tuple[CTRNNCell, nn.Linear]:
    """A cell and its readout."""
    return CTRNNCell(3, units, alpha=0.7).double(), nn.Linear(units, 3).double()


def start(units: int, points: int, seed: int) -> tuple[CTRNNCell, nn.Linear]:
    """The cell with the weights of torch's nn.RNN but for what the fixed points ask for."""
    torch.manual_seed(seed)
    cell, readout = make(units)
    for parameter in cell.parameters():
        nn.init.uniform_(parameter, -(units**-0.5), units**-0.5)
    if points:
        states = torch.randn(points, units, dtype=torch.float64)
        plant_fixed_points(cell, states)
        assert (cell(torch.zeros(points, 3).double(), states) - states).abs().max() < 1e-8
    return cell, readout


def temporal_modes(cell: CTRNNCell, x: torch.Tensor) -> tuple[float, kp.Modes]:
    """The temporal rank of the NTK, and its leading temporal modes."""
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    traced = kp.partial_trace(flow.ntk, keep="time", samples=40)
    return kp.effective_rank(traced).value, kp.modes(traced, k=3)


def trained(cell: CTRNNCell, readout: nn.Linear, data: kp.tasks.TaskData, setting: Setting) -> Any:
    """`kp.track` along plain gradient descent."""
    x, targets = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    with tempfile.TemporaryDirectory() as folder:
        record = kp.Recorder(folder, setting.every)
        kp.train.fit(cell, data, readout, steps=setting.steps, lr=0.01, optimizer="sgd", record=record, progress=True)
        return kp.track(
            lambda: make(setting.units)[0],
            folder,
            x,
            make_readout=lambda: make(setting.units)[1],
            targets=targets,
            samples=10,
        )


def show(points: int, run: Any) -> None:
    print(f"\n{points} planted fixed points; components c with shares {run.component_share[0].values.round(2)}")
    print(f"{'step':>5} {'loss':>7}   {'learnt':18} {'cos(c, NTK c)':18} <c, NTK c> / <c, c>")
    for step in run.step.values:
        one = run.sel(step=step)
        learnt, aligned = (" ".join(f"{v:5.2f}" for v in one[f"component_{n}"].values) for n in ("learnt", "alignment"))
        rates = " ".join(f"{v:8.3g}" for v in one.component_rayleigh.values)
        print(f"{step:5} {float(one.loss):7.4f}  {learnt}  {aligned}  {rates}")


def draw(path: Path, modes: dict[int, kp.Modes], runs: dict[int, Any]) -> None:
    """Above the temporal modes at the start, below what becomes of the target."""
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    above, below = (part.subplots(1, n) for part, n in zip(figure.subfigures(2, 1), (3, 4), strict=True))
    for axes, (points, found) in zip(above, modes.items(), strict=True):
        draw_modes(axes, found)
        axes.set_title(f"{points} planted fixed points", fontsize=10)
    above[0].set_ylabel("Temporal mode of the NTK")
    for axes, (name, label) in zip(below, CURVES.items(), strict=True):
        draw_runs(axes, runs, name)
        axes.set(xlabel="Step of gradient descent", ylabel=label)
    for axes, title in zip(below, ("Planted", "Component c"), strict=False):
        axes.legend(title=title, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), columnspacing=1)
    below[3].set_yscale("log")
    figure.savefig(path, dpi=150)


def draw_modes(axes: Axes, found: kp.Modes) -> None:
    times = np.arange(found.vectors.shape[1]) * TASK.dt / 1000
    for mode, share, color in zip(found.vectors, found.explained, SERIES, strict=False):
        axes.plot(times, mode * mode[mode.abs().argmax()].sign(), color=color, label=f"{100 * float(share):.2g} %")
    for onset in np.cumsum([TASK.fixation, TASK.stimulus, TASK.memory]):
        axes.axvline(onset * TASK.dt / 1000, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xlabel="Time (s); dotted: stimulus on, off, go", ylim=(-0.4, 0.65))
    axes.legend(title="Mode with its share of the trace", frameon=False, ncols=3, fontsize=8, title_fontsize=8)


def draw_runs(axes: Axes, runs: dict[int, Any], name: str) -> None:
    """Components in colours, numbers of planted points as styles of lines."""
    for points, run in runs.items():
        columns = run[name].values.reshape(len(run.step), -1).T
        for number, (values, color) in enumerate(
            zip(columns, SERIES if len(columns) > 1 else ["0.3"], strict=False), 1
        ):
            label = str(points) if len(columns) == 1 else str(number) if points else None
            axes.plot(run.step, values, color=color, linestyle=STYLES[points], label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description="NTK and learning of a memory task from planted fixed points.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default planted.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="a few steps of a small network, to see that it runs")
    parser.add_argument("--full", action="store_true", help="256 units, 40 trials, 6000 steps")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the planted states")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "planted.png"
    setting = QUICK if options.quick else FULL if options.full else Setting()

    data, modes = TASK.sample(setting.trials, seed=0), {}
    for points in POINTS:
        cell, _ = start(setting.units, points, options.seed)
        rank, modes[points] = temporal_modes(cell, torch.from_numpy(data.inputs))
        shares = ", ".join(f"{share:.3f}" for share in modes[points].explained)
        print(f"{points:2} planted fixed points: temporal rank {rank:.2f}, shares of the leading modes {shares}")
    runs = {points: trained(*start(setting.units, points, options.seed), data, setting) for points in STYLES}
    for points, run in runs.items():
        show(points, run)
    print("\nexpected: the third is learnt least, and what is learnt is what the NTK is aligned with")
    for points, run in runs.items():
        learnt, aligned = run.component_learnt[-1].values, run.component_alignment.mean("step").values
        print(f"found for {points} points: learnt {learnt.round(2)}, alignment on average {aligned.round(2)}")
        assert options.quick or (np.argsort(learnt) == np.argsort(aligned)).all()
    draw(out, modes, runs)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
