"""Which tasks will gradient descent learn, and how soon? Forecasts before training against training. Some minutes.

    python examples/learnability.py --out learnability.png    # 24 pairs of a task and a gain
    python examples/learnability.py --quick                   # three pairs, to see that it runs

Tanh networks of 32 units with recurrent weights N(0, g^2 / 32) and a readout, all weights learning, on six tasks. Three
forecasts of the time tau = learning rate x steps at which the loss has fallen to half:

    forward     core_learnability: what the weights multiply, from one forward pass
    frozen      learnability: the kernel at the start
    flow        gradient_flow: the parameters' own flow, in few large steps

against plain gradient descent on all trials with a small learning rate. Times that are not reached are shown as >.
"""

from __future__ import annotations

import argparse
import itertools
import math
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

UNITS, TRIALS, GAINS = 32, 8, (0.3, 0.9, 1.3, 1.8)
SPAN, LR = 400.0, 0.01  # of tau at most; of descent, lowered where it would be unstable
TASKS = {
    "memory-pro": kp.tasks.MemoryPro(fixation=2, stimulus=5, memory=8, response=5),
    "integration": kp.tasks.EvidenceIntegration(fixation=4, stimulus=20, response=6),
    "flip-flop": kp.tasks.FlipFlop(bits=2, steps=30),
    "lag": kp.tasks.Lag(lag=5, steps=30),
    "sine": kp.tasks.Sine(steps=40),
    "decision": kp.tasks.Neurogym("PerceptualDecisionMaking-v0"),
}
NAMES = ("forward", "frozen", "flow")


def network(channels: int, outputs: int, g: float, seed: int) -> tuple[nn.RNN, nn.Linear]:
    torch.manual_seed(seed)
    cell, readout = nn.RNN(channels, UNITS, batch_first=True).double(), nn.Linear(UNITS, outputs).double()
    nn.init.normal_(cell.get_parameter("weight_hh_l0"), std=g / math.sqrt(UNITS))
    return cell, readout


def forecasts(cell: nn.RNN, readout: nn.Linear, data: kp.tasks.TaskData) -> tuple[list[float], float]:
    """tau of half the loss: forward, frozen, flow; and the cost of the flow in gradients."""
    x, target = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
    problem = kp.DiscreteProblem(cell, x)
    y = kp.linearize(kp.solve(problem)).output(readout, learn=True)
    tables = [of(y, [target], mask=data.mask) for of in (kp.core_learnability, kp.learnability)]
    with warnings.catch_warnings(action="ignore"):  # of a flow that is stopped
        flow = kp.gradient_flow(
            problem, kp.squared_error(target, readout, data.mask), span=SPAN, stop_below=0.5, rtol=3e-2
        )
    return [*(float(table.half[0]) for table in tables), flow.time_to(0.5)], flow.cost


def descent(cell: nn.RNN, readout: nn.Linear, data: kp.tasks.TaskData, lr: float) -> tuple[float, int]:
    """tau of half the loss, NaN where it is not reached; and the steps."""
    loss = kp.squared_error(torch.from_numpy(data.targets), None, data.mask)
    x, parameters = torch.from_numpy(data.inputs), [*cell.parameters(), *readout.parameters()]
    first = None
    for step in range(int(SPAN / lr)):
        value = loss(readout(cell(x)[0]))
        first = value.item() if first is None else first
        if value.item() < 0.5 * first:
            return step * lr, step
        gradients = torch.autograd.grad(value, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= lr * gradient
    return math.nan, int(SPAN / lr)


def stable_rate(cell: nn.RNN, readout: nn.Linear, data: kp.tasks.TaskData) -> float:
    """Less than a tenth of the largest stable learning rate at the start, if that is below LR."""
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(data.inputs)))).output(readout, learn=True)
    entries = data.targets[..., 0].size if data.mask is None else data.mask.sum()
    largest = 2 * float(kp.eigs(y.ntk, k=1).values[0]) / (entries * data.targets.shape[-1])
    return min(LR, 0.15 / largest)


def bounded(taus: np.ndarray) -> np.ndarray:
    """Times that were not reached rank last, all alike."""
    return np.where(np.isfinite(taus) & (taus < SPAN), taus, SPAN)


def rank_correlation(found: np.ndarray, measured: np.ndarray) -> float:
    result: Any = spearmanr(bounded(found), bounded(measured))
    return float(result.statistic)


def draw(path: Path, taus: np.ndarray, tasks: list[str]) -> None:
    """Forecast against measured times [pair, what]."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels, colors = figure.subplots(1, 3, sharex=True, sharey=True), [*SERIES, "#56B4E9", "#999999"]
    for axes, name, found in zip(panels, NAMES, taus[:, :3].T, strict=True):
        for task, color in zip(dict.fromkeys(tasks), colors, strict=False):
            here = [i for i, other in enumerate(tasks) if other == task]
            axes.plot(bounded(taus[here, 3]), bounded(found[here]), "o", color=color, label=task, markersize=5)
        axes.axline((1, 1), (10, 10), color="0.6", linewidth=0.8)
        rank = rank_correlation(found, taus[:, 3])
        axes.set(xscale="log", yscale="log", title=f"{name}: Spearman {rank:.2f}", xlabel="tau of descent")
    panels[0].set(ylabel="Forecast of tau at half of the loss")
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Forecasts of learning times against gradient descent.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default learnability.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="three pairs only, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "learnability.png"
    pairs = (
        [("lag", 0.9), ("flip-flop", 0.9), ("memory-pro", 1.3)] if options.quick else itertools.product(TASKS, GAINS)
    )

    rows, tasks = [], []
    print(
        f"{'task':12} {'g':>4} {'forward':>9} {'frozen':>9} {'flow':>9} {'descent':>9} {'flow cost':>10} {'steps':>7}"
    )
    for name, g in pairs:
        data = TASKS[name].sample(TRIALS, 0)
        model = network(data.inputs.shape[2], data.targets.shape[2], g, seed=1)
        found, cost = forecasts(*model, data)
        tau, steps = descent(*model, data, stable_rate(*model, data))
        rows.append([*found, tau])
        tasks.append(name)
        shown = " ".join(f"{t:9.3g}" if np.isfinite(t) and t < SPAN else f"{'>' + str(int(SPAN)):>9}" for t in rows[-1])
        print(f"{name:12} {g:4} {shown} {cost:10.0f} {steps:7}", flush=True)
    taus = np.array(rows)
    for name, column in zip(NAMES, taus.T, strict=False):
        rank = rank_correlation(column, taus[:, 3])
        print(f"Spearman with descent, {name}: {rank:.3f}")
    assert options.quick or rank_correlation(taus[:, 2], taus[:, 3]) >= 0.95
    draw(out, taus, tasks)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
