"""Which memories can this network learn? Four starts of one network on MemoryPro, before, during and after training.

    python examples/studies/memories.py --out memories.png    # two minutes
    python examples/studies/memories.py --quick               # a small network, a few steps, to see that it runs

A direction is shown for a moment, must be kept while nothing tells it, and is then answered; all the while a fixation
output is to be held. Four laws of the recurrent weights start the same tanh network, which Adam then trains. Before it
does, the dynamics (spectral radius, exponents, dimension) and the kernel of the outputs (which part of the target is
learnt soon, late or never) are asked what will come. After it, the fixed points under the input of the memory period
tell how the network remembers, and the temporal modes of its NTK when it could still change.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.dynamics import FixedPoints
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import Gaussian, Orthogonal, TorchDefault, make_model
from kpflow_dyn.models._laws import Law

LAWS: dict[str, Law] = {
    "torch's default": TorchDefault(1.0),
    "Gaussian, g = 0.9": Gaussian(0.9),
    "Gaussian, g = 1.6": Gaussian(1.6),
    "orthogonal": Orthogonal(1.0),
}
TASK = kp.tasks.MemoryPro(fixation=4, stimulus=6, memory=20, response=8)
MEMORY = slice(TASK.fixation + TASK.stimulus, TASK.fixation + TASK.stimulus + TASK.memory)
WAITING = np.array([1.0, 0.0, 0.0])  # the input of the memory period
NEVER_TAU = 1e9  # where a forecast of never is drawn
PARTS = {"fixation": [0], "direction": [1, 2]}  # channels of the target


@dataclass(frozen=True)
class Setting:
    units: int = 64
    trials: int = 24
    steps: int = 1500
    every: int = 10


@dataclass
class Run:
    """A network from one law: what was asked before training, how it went, and what came of it."""

    cell: Any
    readout: nn.Linear
    before: dict[str, Any] = field(default_factory=dict)
    learnt: dict[int, dict[str, float]] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)


def flow_of(cell: nn.Module, data: kp.tasks.TaskData) -> kp.Flow:
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(data.inputs))))


def parts_of(data: kp.tasks.TaskData) -> dict[str, Tensor]:
    """The target's parts, each zero in all other channels."""
    targets = torch.from_numpy(data.targets)
    found = {name: torch.zeros_like(targets) for name in PARTS}
    for name, channels in PARTS.items():
        found[name][..., channels] = targets[..., channels]
    return found


def ask_before(run: Run, data: kp.tasks.TaskData) -> None:
    """Dynamics and kernel at the start."""
    flow = flow_of(run.cell, data)
    exponents = kp.dynamics.finite_time_exponents(flow.solution).exponents
    parts = parts_of(data)
    run.before = {
        "flow": flow,
        "exponent": float(exponents[:, -1, 0].mean()),  # [trial, time, exponent]
        "dimension": kp.dynamics.participation_ratio(flow.solution).value,
        "temporal rank": kp.effective_rank(kp.partial_trace(flow.ntk, keep="time")).value,
        "forecast": kp.learnability(flow.output(run.readout, learn=True), parts, mask=data.mask, errors=True),
    }


def train(run: Run, data: kp.tasks.TaskData, setting: Setting) -> None:
    """By Adam, with a note of how much of each part is learnt."""
    x, parts = torch.from_numpy(data.inputs), parts_of(data)

    def note(step: int, cell: nn.Module, _loss: float, readout: nn.Linear) -> None:
        if step % setting.every == 0:
            y = readout(kp.solve(kp.DiscreteProblem(cell, x)).state).detach()
            run.learnt[step] = {name: float((c * y).sum() / (c * c).sum()) for name, c in parts.items()}

    kp.train.fit(run.cell, data, run.readout, steps=setting.steps, lr=1e-3, clip=1.0, record=note)


def ask_after(run: Run, data: kp.tasks.TaskData) -> None:
    """Fixed points while it waits, and the kernel."""
    flow = flow_of(run.cell, data)
    run.after = {
        "flow": flow,
        "points": kp.dynamics.fixed_points(flow.solution, WAITING, starts=256),
        "error": memory_error(run, TASK.sample(200, seed=9)),
    }


def memory_error(run: Run, new: kp.tasks.TaskData) -> float:
    """The median angle between answer and direction on trials that it has not seen, in degrees."""
    state = kp.solve(kp.DiscreteProblem(run.cell, torch.from_numpy(new.inputs))).state
    answer = run.readout(state)[:, -1, 1:].detach().numpy()
    turned = np.angle((answer[:, 0] + 1j * answer[:, 1]) * np.exp(-1j * new.labels["angle"]))
    return float(np.degrees(np.median(np.abs(turned))))


def steps_to_half(run: Run, part: str) -> float:
    """The first step at which half of a part was learnt; infinite where it never was."""
    return min((step for step, learnt in run.learnt.items() if learnt[part] >= 0.5), default=np.inf)


def tell(name: str, law: Law, run: Run) -> None:
    points, forecast = run.after["points"], run.before["forecast"]
    print(f"{name}: {law.describe()}")
    print(
        f"    at the start: largest exponent {run.before['exponent']:+.3f} a step, dimension of the states "
        f"{run.before['dimension']:.2f}, temporal rank of the NTK {run.before['temporal rank']:.2f}"
    )
    for part, half in zip(forecast.names, forecast.half, strict=True):
        print(f"    {part}: forecast tau to half loss {half:.3g}, half learnt in {steps_to_half(run, part):g} steps")
    print(
        f"    after: error {run.after['error']:.1f} degrees; while it waits {int(points.is_fixed.sum())} fixed points "
        f"({int((points.is_fixed & points.is_stable).sum())} stable) and {int((~points.is_fixed).sum())} slow ones"
    )


def draw(path: Path, runs: dict[str, Run], data: kp.tasks.TaskData) -> None:
    figure = Figure(figsize=(9, 7), layout="constrained")
    (curves, forecasts), (plane, modes) = figure.subplots(2, 2)
    steps = list(next(iter(runs.values())).learnt)
    for (name, run), color in zip(runs.items(), SERIES, strict=False):
        curves.plot(steps, [run.learnt[step]["direction"] for step in steps], color=color, label=name)
        curves.plot(steps, [run.learnt[step]["fixation"] for step in steps], color=color, linestyle=":")
        tau = dict(zip(run.before["forecast"].names, run.before["forecast"].half, strict=True))
        for part, marker in (("fixation", "s"), ("direction", "o")):
            place = min(tau[part], NEVER_TAU), min(steps_to_half(run, part), 2 * max(steps))
            forecasts.plot(*place, marker, color=color, markersize=8)
    for axis, never in ((forecasts.axvline, NEVER_TAU), (forecasts.axhline, 2 * max(steps))):
        axis(never, color="0.6", linewidth=0.8, linestyle=":")
    forecasts.annotate("never", (NEVER_TAU, 2 * max(steps)), (-4, -4), textcoords="offset points", ha="right", va="top")
    curves.set(xlabel="Step of training", ylabel="Learnt part of the target", ylim=(-0.1, 1.15))
    curves.legend(title="solid: direction, dotted: fixation", fontsize=8, title_fontsize=8, frameon=False)
    forecasts.set(
        xscale="log", yscale="log", xlabel="Forecast at the start: tau to half loss", ylabel="Steps of Adam to half",
        title="squares: fixation, discs: direction",
    )  # fmt: skip
    best = min(runs, key=lambda name: runs[name].after["error"])
    draw_plane(plane, runs[best], data)
    plane.set_title(f"{best}: what it has kept, colour is direction")
    draw_modes(modes, runs[best])
    figure.savefig(path, dpi=150)


def draw_plane(axes: Axes, run: Run, data: kp.tasks.TaskData) -> None:
    """States at the end of the memory period in their two components, coloured by direction, and the fixed points."""
    states = run.after["flow"].solution.state[:, MEMORY].detach().numpy()
    found = kp.dynamics.pca(states[:, -1:], k=2)
    hues = matplotlib.colormaps["hsv"](data.labels["angle"] % (2 * np.pi) / (2 * np.pi))
    for trial, hue in zip(found.project(states), hues, strict=True):
        axes.plot(*trial[-4:].T, color=hue, linewidth=0.6, alpha=0.5)
    axes.scatter(*found.scores[:, 0].T, color=hues, s=30)
    points: FixedPoints = run.after["points"]
    placed, fixed, stable = found.project(points.xstar), points.is_fixed, points.is_stable
    for chosen, style, label in (
        (~fixed, {"color": "0.5", "marker": ".", "s": 12}, "slow"),
        (fixed & ~stable, {"facecolors": "none", "edgecolors": "k", "s": 40}, "unstable"),
        (fixed & stable, {"color": "k", "s": 40}, "stable"),
    ):
        axes.scatter(*placed[chosen].T, label=f"{label} ({int(chosen.sum())})", zorder=3, **style)
    axes.set(xlabel="First component of its states at the end", ylabel="Second component")
    axes.legend(title="fixed points", fontsize=8, title_fontsize=8, frameon=False)


def draw_modes(axes: Axes, run: Run) -> None:
    for when, style in (("before", "--"), ("after", "-")):
        found = kp.modes(getattr(run, when)["flow"].ntk, axis="time", k=2)
        for mode, share, color in zip(found.vectors, found.explained, SERIES, strict=False):
            label = f"{when}: {100 * float(share):.2g} %"
            axes.plot(mode * mode[mode.abs().argmax()].sign(), style, color=color, label=label)
    axes.axvspan(MEMORY.start, MEMORY.stop - 1, color="0.93", zorder=0)
    axes.set(xlabel="Step of the trial (memory period shaded)", ylabel="Temporal mode of the NTK")
    axes.legend(fontsize=8, frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which memories can a network learn?")
    parser.add_argument("--out", type=Path, help="PNG to write; by default memories.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="a small network and a few steps, to see that it runs")
    options = parser.parse_args()
    setting = Setting(12, 4, 20, 10) if options.quick else Setting()
    out = options.out or Path(tempfile.mkdtemp()) / "memories.png"

    data = TASK.sample(setting.trials, seed=0)
    runs = {}
    for name, law in list(LAWS.items())[: 2 if options.quick else None]:
        cell, readout = make_model("rnn", 3, setting.units, 3, init=law, seed=1, dtype="float64")
        runs[name] = run = Run(cell, readout)
        ask_before(run, data)
        train(run, data, setting)
        ask_after(run, data)
        tell(name, law, run)
    draw(out, runs, data)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
