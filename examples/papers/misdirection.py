"""Does gradient descent move the states as functional descent would? By gain, and over training. Two minutes.

    python examples/papers/misdirection.py --out misdirection.png

Expected (arXiv 2507.06381): functional gradient descent would move the states by P P*; gradient descent of weights
moves them by P K P*, and the more the two differ, the more it is misled. The authors' scripts follow cos(P K P*, P P*)
over gains g that multiply torch's recurrent weights, and look closely at g = 1.6 to 2: torch draws weights of spectral
radius 0.58, which is 1 at g = 1.73. So it should change most there.

Theirs (paper_experiment_1): nn.GRU or nn.RNN of 256 units; MemoryPro of 90 steps; Adam 1e-3 on batches of 500, 10,000
steps, a record every 100; ten gains from 1e-5 to 5 in even ratios, and a closer look at 1.6 to 2 (nine gains here; they
do not say how many); 50 trials without noise, 30 samples for each trace. This script trains three of the gains only.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from study import Claim, begin
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

CHAOS = 3**0.5  # the gain at which torch's recurrent weights U(-n^(-1/2), n^(-1/2)) have the spectral radius 1
FOLLOWED = (1.0, 1.7, 2.0)  # gains of the networks that are trained


@dataclass(frozen=True)
class Setting:
    units: int
    trials: int
    batch: int
    steps: int
    every: int
    gains: tuple[float, ...]
    samples: int


QUICK = Setting(12, 2, 4, 2, 2, (0.5, 1.75, 3.0), 8)
OURS = Setting(64, 8, 64, 200, 50, (0.25, 0.5, 1.0, 1.25, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.25, 2.5, 3.0), 30)
AUTHORS = Setting(256, 50, 500, 10_000, 100, (*np.geomspace(1e-5, 5, 10), *np.linspace(1.6, 2, 9)), 30)


def task(noise: float) -> kp.tasks.MemoryPro:
    """90 steps in three equal periods; the stimulus is there from the start."""
    return kp.tasks.MemoryPro(fixation=0, stimulus=30, memory=30, response=30, dt=1, noise=noise)


def network(gain: float, units: int) -> tuple[nn.RNN, nn.Linear]:
    torch.manual_seed(0)
    rnn, readout = nn.RNN(3, units, batch_first=True).double(), nn.Linear(units, 3).double()
    with torch.no_grad():
        rnn.get_parameter("weight_hh_l0").mul_(gain)
    return rnn, readout


def aligned(rnn: nn.RNN, x: torch.Tensor, samples: int) -> kp.Estimate:
    """cos(P K P*, P P*) on all trials, times and units."""
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(rnn, x)))
    return kp.alignment(flow.ntk, flow.P @ flow.P.T, samples=samples)


def over_training(gain: float, x: torch.Tensor, setting: Setting) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, losses and alignments [record]."""
    rnn, readout = network(gain, setting.units)
    data = task(noise=0.1 * 2**0.5).sample(10 * setting.batch, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        record = kp.Recorder(folder, setting.every)
        kp.train.fit(rnn, data, readout, steps=setting.steps, batch=setting.batch, record=record, progress=True)
        run = kp.Recorder.read(folder)
        found = [aligned(run.load(step, rnn), x, setting.samples).value for step in run.steps.tolist()]
    return run.steps, run.losses, np.array(found)


def draw(path: Path, gains: np.ndarray, found: np.ndarray, runs: dict[float, tuple[np.ndarray, ...]]) -> None:
    """Estimates with errors [gain, 2] at the start, and alignments over training."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.errorbar(gains, found[:, 0], 2 * found[:, 1], fmt="o-", color=SERIES[0], markersize=4, capsize=2)
    left.axvspan(1.6, 2, color="0.92", zorder=0)
    left.axvline(CHAOS, color="0.5", linewidth=0.8, linestyle=":")
    left.set(xlabel="Gain g of torch's weights", ylabel=r"cos(P K P*, P P*) at the start", ylim=(0, None))
    for (gain, (steps, _, values)), color in zip(runs.items(), SERIES, strict=False):
        right.plot(steps, values, "o-", color=color, markersize=3, label=f"g = {gain:g}")
    right.set(xlabel="Step of Adam", ylabel=r"cos(P K P*, P P*)", ylim=(0, None))
    right.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    study = begin("Alignment of P K P* with P P*.", "misdirection.png", quick=QUICK, ours=OURS, authors=AUTHORS)
    setting, x = study.setting, torch.from_numpy(task(noise=0.0).sample(study.setting.trials, seed=0).inputs)
    gains, found = np.unique(setting.gains), []
    print("gain  cos(P K P*, P P*) at the start")
    for gain in gains:
        estimate = aligned(network(gain, setting.units)[0], x, setting.samples)
        found.append((estimate.value, estimate.stderr))
        print(f"{gain:4.2f}  {estimate.value:.3f} +- {estimate.stderr:.3f}", flush=True)
    table = np.array(found)
    runs = {gain: over_training(gain, x, setting) for gain in FOLLOWED}
    for gain, (_, losses, values) in runs.items():
        print(f"g = {gain:g}: loss {losses[0]:.3f} to {losses[-1]:.3f}, cos {values[0]:.3f} to {values[-1]:.3f}")

    slopes = np.abs(np.diff(table[:, 0]) / np.diff(gains))
    low, high = gains[slopes.argmax()], gains[slopes.argmax() + 1]
    steepest = Claim(
        "cos(P K P*, P P*) at the start changes most at gains of 1.6 to 2",
        f"most between {low:g} and {high:g}, by {slopes.max():.2f} per unit of gain",
        bool(low >= 1.5 and high <= 2.1),
    )
    draw(study.out, gains, table, runs)
    trained = {str(gain): {"steps": s, "losses": losses, "cos": v} for gain, (s, losses, v) in runs.items()}
    study.finish([steepest], {"gains": gains, "cos": table[:, 0], "stderr": table[:, 1], "training": trained})


if __name__ == "__main__":
    main()
