"""Which of its past inputs will a network learn to give back: soon, late or never? Half a minute.

    python examples/soon_late_never.py                       # the picture of the README
    python examples/soon_late_never.py --quick             # a small network, to see that it runs

The input is noise, the target is the input some steps ago. The answer comes from the kernel of the network before
training. Then each memory is trained, by plain gradient descent on the same trials. Learning changes the kernel, here
for the better, so that a forecast from the first kernel may be late; but it tells what comes soon, late or never.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

LAGS, TRIALS, TIMES, GAIN, LR = (1, 6, 20), 32, 40, 0.7, 0.01
SCORED = slice(20, None)  # the loss counts from here on, where all lags have a past to give back


def network(units: int) -> tuple[nn.RNN, nn.Linear]:
    torch.manual_seed(0)
    rnn, readout = nn.RNN(1, units, batch_first=True).double(), nn.Linear(units, 1).double()
    nn.init.normal_(rnn.get_parameter("weight_hh_l0"), std=GAIN / units**0.5)
    nn.init.normal_(readout.weight, std=units**-0.5)
    return rnn, readout


def past(x: torch.Tensor, lag: int) -> torch.Tensor:
    """The input `lag` steps ago, zero before the first."""
    return nn.functional.pad(x, (0, 0, lag, 0))[:, : x.shape[1]]


def train(rnn: nn.RNN, readout: nn.Linear, x: torch.Tensor, target: torch.Tensor, steps: int) -> np.ndarray:
    """The loss at each step of gradient descent, of a copy."""
    rnn, readout = copy.deepcopy(rnn), copy.deepcopy(readout)
    descent = torch.optim.SGD([*rnn.parameters(), *readout.parameters()], lr=LR)
    losses = []
    for _ in range(steps + 1):
        loss = nn.functional.mse_loss(readout(rnn(x)[0])[:, SCORED], target[:, SCORED])
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.item())
    return np.array(losses)


def after(step: float, steps: int) -> str:
    return f"after {step:.0f} steps" if step <= steps else f"not in {steps} steps"


def draw(found: dict[int, tuple[kp.Forecast, np.ndarray]], steps: int) -> Figure:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axes = figure.subplots()
    for (lag, (forecast, losses)), color in zip(found.items(), SERIES, strict=False):
        at = np.unique(np.geomspace(1, steps, 200).round())
        axes.plot(
            at, losses[at.astype(int)] / losses[0], color=color, linewidth=2.2, label=f"{lag} step{'s' * (lag > 1)} ago"
        )
        axes.plot(at, forecast.at(at) / forecast.at(0), color=color, linestyle=(0, (3, 2)), zorder=3)
    axes.plot([], [], color="0.4", linestyle=(0, (3, 2)), label="forecast before training, from the kernel")
    axes.plot([], [], color="0.4", linewidth=2.2, label="then seen in training")
    axes.set(xscale="log", xlim=(1, steps), ylim=(0, 1.05))
    axes.set(xlabel="Step of gradient descent", ylabel="Loss, of what it was")
    axes.set_title("Which of its past inputs will this RNN learn to give back?", loc="left")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.1))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("soon_late_never.png"))
    parser.add_argument("--quick", action="store_true", help="32 units, 50 steps")
    given = parser.parse_args()
    units, steps = (32, 50) if given.quick else (256, given.steps)

    rnn, readout = network(units)
    x = torch.randn(TRIALS, TIMES, 1, generator=torch.Generator().manual_seed(1)).double()
    counts = torch.zeros(TRIALS, TIMES)
    counts[:, SCORED] = 1
    y = kp.linearize(kp.solve(kp.DiscreteProblem(rnn, x))).where(counts > 0).output(readout, learn=True)

    found = {}
    for lag in LAGS:
        forecast = kp.forecast(y, past(x, lag), lr=LR, steps=steps)
        losses = train(rnn, readout, x, past(x, lag), steps)
        halved = np.flatnonzero(losses < losses[0] / 2)
        seen = float(halved[0]) if len(halved) else np.inf
        expected, seen = (after(step, steps) for step in (forecast.steps_to(0.5), seen))
        print(f"input {lag:2} steps ago: half of the loss is forecast {expected}, and seen {seen}")
        found[lag] = forecast, losses
    draw(found, steps).savefig(given.out, dpi=150)
    print(f"The picture: {given.out}")


if __name__ == "__main__":
    main()
