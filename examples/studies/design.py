"""Does a start that the forecast chose learn sooner? Designed starts beside torch's, orthogonal and searched ones.

    python examples/studies/design.py --out design.png --data design.csv    # ten minutes on one core
    python examples/studies/design.py --quick                               # small, to see that it runs

For each of three tasks `kp.models.design` chooses among laws of weights, gains, leaks and planted points by forecasts
alone. Then Adam trains: the designed start, torch's own RNNCell, the same with orthogonal weights, and the best of a
random search, which trains as many random members of the family as the design had candidates. Each is trained from ten
seeds that neither the design nor the search has seen. All candidates are trained too, to see whether the forecast puts
them in the right order.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.stats import spearmanr

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import Gaussian, Model, Orthogonal, Planted, design, make_model

TASKS = {
    "MemoryPro": kp.tasks.MemoryPro(fixation=3, stimulus=4, memory=12, response=5),
    "FlipFlop": kp.tasks.FlipFlop(bits=2, steps=25),
    "EvidenceIntegration": kp.tasks.EvidenceIntegration(fixation=3, stimulus=20, response=5),
}
LAWS = [Gaussian(0.5), Gaussian(1.0), Gaussian(1.5), Gaussian(2.0), Orthogonal(1.0), Planted(4, g=1.0)]
LEAKS = [0.1, 0.3, 1.0]
FRESH = 100  # the first seed of the comparison


@dataclass(frozen=True)
class Setting:
    units: int = 32
    trials: int = 24
    forecast_steps: int = 300
    most: int = 1500  # steps of a training
    lr: float = 3e-3
    goal: float = 0.1
    seeds: int = 10
    design_seeds: int = 3


QUICK = Setting(units=8, trials=4, forecast_steps=5, most=40, goal=0.8, seeds=2, design_seeds=1)


def zero_loss(data: kp.tasks.TaskData) -> float:
    """The loss of an output of zero."""
    mask = np.ones(data.inputs.shape[:2]) if data.mask is None else data.mask
    return float((mask[..., None] * data.targets**2).sum() / (mask.sum() * data.targets.shape[2]))


def steps_of(start: Model, data: kp.tasks.TaskData, setting: Setting) -> int:
    """Steps of Adam until the loss is at the goal; `most` where it is not there by then."""
    goal = setting.goal * zero_loss(data)
    losses = kp.train.fit(start.cell, data, start.readout, steps=setting.most, lr=setting.lr, stop_below=goal).losses
    reached = np.flatnonzero(losses <= goal)
    return int(reached[0]) if reached.size else setting.most


def searched(make: Callable[..., Model], count: int, data: kp.tasks.TaskData, setting: Setting) -> Callable:
    """The best of `count` random members of the family, each trained once."""
    rng, tried = np.random.default_rng(0), []
    for number in range(count):
        g, alpha = rng.uniform(0.5, 2.0), float(np.exp(rng.uniform(np.log(0.1), 0.0)))
        law = [Gaussian(g), Orthogonal(g), Planted(int(rng.integers(1, 9)), g=g)][rng.integers(3)]
        tried.append((steps_of(make("ctrnn", seed=number, init=law, alpha=alpha), data, setting), number, law, alpha))
    _, _, law, alpha = min(tried, key=lambda one: one[:2])
    print(f"    random search: {law}, alpha = {alpha:.2f}; all tried: {sorted(one[0] for one in tried)}")
    return lambda seed: make("ctrnn", seed=seed, init=law, alpha=alpha)


def study(name: str, setting: Setting, laws: list, leaks: list) -> tuple[dict[str, list[int]], np.ndarray]:
    """Steps of training by start, and forecast and real steps of all candidates [candidate, 3]."""
    data = TASKS[name].sample(setting.trials, seed=0)
    inputs, outputs = data.inputs.shape[2], data.targets.shape[2]
    family = {"units": setting.units, "laws": laws, "options": {"alpha": leaks}, "goal": setting.goal}
    began = time.perf_counter()
    found = design(data, lr=setting.lr, steps=setting.forecast_steps, seeds=setting.design_seeds, **family)
    took = time.perf_counter() - began
    print(f"{name}: designed {found.best} in {took:.0f} s")

    def make(cell: str, seed: int, **options: Any) -> Model:
        return make_model(cell, inputs, setting.units, outputs, seed=seed, **options)

    began = time.perf_counter()
    count = len(found.candidates)
    starts = {
        "designed": found.model,
        "random search": searched(make, count, data, setting),
        "torch's default": lambda seed: make("rnn", seed),
        "orthogonal": lambda seed: make("rnn", seed, init=Orthogonal(1.0)),
    }
    print(f"    the search took {time.perf_counter() - began:.0f} s")
    seeds = range(FRESH, FRESH + setting.seeds)
    steps = {start: [steps_of(of(seed), data, setting) for seed in seeds] for start, of in starts.items()}
    for start, values in steps.items():
        late = sum(one == setting.most for one in values)
        print(f"    {start:16} {told(values)} steps{f', {late} not there in {setting.most}' if late else ''}")
    real = [
        np.mean([steps_of(found.make(one, FRESH + seed), data, setting) for seed in range(setting.design_seeds)])
        for one in found.candidates
    ]
    frozen, left = np.median(found.steps, axis=1), found.left.mean(axis=1)
    rank = np.empty(count)
    rank[np.lexsort((left, frozen))] = np.arange(count)
    print(f"    Spearman of the frozen forecast's order and that of real training: {spearmanr(rank, real)[0]:.2f}")
    return steps, np.stack([frozen, left, real], axis=1)


def told(values: list[int]) -> str:
    return f"{np.mean(values):.0f} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.0f}"


def draw(path: Path, found: dict[str, tuple[dict[str, list[int]], np.ndarray]], setting: Setting) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    rows = figure.subplots(2, len(found), squeeze=False)
    for (points, cloud), (name, (steps, candidates)) in zip(rows.T, found.items(), strict=True):
        for place, (values, color) in enumerate(zip(steps.values(), SERIES, strict=False)):
            error = np.std(values, ddof=1) / np.sqrt(len(values))
            at = place + np.linspace(-0.25, 0.25, len(values))
            points.plot(at, values, ".", color=color, alpha=0.6)
            points.errorbar(place, np.mean(values), error, fmt="_", color="0.2", markersize=16, capsize=4)
        points.set_xticks(range(len(steps)), [start.replace(" ", "\n") for start in steps], fontsize=7)
        points.set(title=name, yscale="log", xlim=(-0.6, len(steps) - 0.4))
        forecast = np.where(np.isfinite(candidates[:, 0]), candidates[:, 0], 1.5 * setting.forecast_steps)
        late = ~np.isfinite(candidates[:, 0])
        for which, face in ((~late, SERIES[0]), (late, "none")):
            cloud.plot(
                np.maximum(forecast[which], 1), np.maximum(candidates[which, 2], 1), "o", color=SERIES[0],
                markerfacecolor=face, markersize=5,
            )  # fmt: skip
        cloud.set(xscale="log", yscale="log", xlabel="Frozen kernel (hollow: later)")
        for axis in (points.yaxis, cloud.xaxis, cloud.yaxis):
            axis.set_minor_formatter(NullFormatter())
    rows[0, 0].set_ylabel("Steps of Adam to the goal")
    rows[1, 0].set_ylabel("Steps of Adam, each candidate")
    figure.savefig(path, dpi=150)


def save(path: Path, found: dict[str, tuple[dict[str, list[int]], np.ndarray]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "start", "seed", "steps"])
        for name, (steps, _) in found.items():
            for start, values in steps.items():
                writer.writerows((name, start, FRESH + number, value) for number, value in enumerate(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small network and few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="where to save the figure")
    parser.add_argument("--data", type=Path, help="where to save the steps of each training")
    options = parser.parse_args()
    setting = QUICK if options.quick else Setting()
    laws, leaks = (LAWS[1:2] + LAWS[-1:], LEAKS[:1]) if options.quick else (LAWS, LEAKS)
    names = list(TASKS)[:1] if options.quick else list(TASKS)
    found = {name: study(name, setting, laws, leaks) for name in names}
    if options.out:
        draw(options.out, found, setting)
    if options.data:
        save(options.data, found)


if __name__ == "__main__":
    main()
