"""The order in which a hundred starts are learnt: `kp.forecast_starts` beside training all of them, and what both cost.

    python benchmarks/starts.py                   # all tasks, several minutes of CPU time
    python benchmarks/starts.py lag --cells tanh  # some

The starts have 24 units: tanh RNNs with gains g from 0.5 to 1.5, and GRUs with torch's own start, whose recurrent
weights are multiplied by 2 g. All are trained together, by one batched matrix product for each step in time. Each has

    descent     the largest rate 2^-k at which its loss never rises and takes 20 steps or more to half of its first
                value; times are tau = rate x steps, and a start that is not there within the budget has none
    Adam        torch's, with a rate of 0.003; its times are steps

The tables have the Spearman correlation of forecast and time for each number of applications ("default" is what the
forecast takes by itself), and of two cheaper orders: "|grad|" is the first application, L / |grad L|^2, and "|grad|_1"
is L / sum |grad L|, which is how fast a sign, as in Adam's first step, lowers the loss. Costs are of the forecast
divided by those of the training, in CPU seconds of one thread; "gradients" are those of a start in training, in the
mean, and "one rate" is what they would be if all had the smallest of the rates.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from learning_pairs import TASKS
from scipy.stats import spearmanr
from torch import Tensor, nn

import kpflow_dyn as kp

STARTS, UNITS, TRIALS, BUDGET, RATE = 100, 24, 16, 1000, 3e-3
FINE = 20  # steps to half of the loss, at least, of a descent by small steps
MODULES = {"tanh": nn.RNN, "gru": nn.GRU}
CHOSEN = ("flip-flop", "lag", "integration", "memory")
APPLICATIONS = (2, 3, 4, 6)
Weights = dict[str, Tensor]  # [start, ...]


def start(cell: str, inputs: int, outputs: int, number: int) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(number)
    gain = 0.5 + number / (STARTS - 1)
    made = MODULES[cell](inputs, UNITS, batch_first=True)
    if cell == "tanh":
        nn.init.normal_(made.weight_hh_l0, std=gain / math.sqrt(UNITS))
    else:
        made.weight_hh_l0.data *= 2 * gain
    return made.double(), nn.Linear(UNITS, outputs).double()


class Training:
    """All starts of one cell, on one task."""

    def __init__(self, task: str, cell: str) -> None:
        data = TASKS[task].sample(TRIALS, 0)
        assert data.targets is not None
        self.inputs, self.target = torch.from_numpy(data.inputs), torch.from_numpy(data.targets)
        mask = torch.ones(self.inputs.shape[:2]) if data.mask is None else torch.from_numpy(data.mask)
        self.mask = mask.to(self.inputs)
        sizes = self.inputs.shape[2], self.target.shape[2]
        self.cell, self.starts = cell, [start(cell, *sizes, number) for number in range(STARTS)]
        both = [dict(nn.ModuleList(pair).named_parameters()) for pair in self.starts]
        self.weights = {name: torch.stack([one[name].detach() for one in both]) for name in both[0]}

    def forecast(self, applications: int | None = None) -> kp.Starts:
        problem = kp.DiscreteProblem(self.starts[0][0], self.inputs)
        return kp.forecast_starts(problem, self.starts, self.target, mask=self.mask, applications=applications)

    def losses(self, weights: Weights) -> Tensor:
        """[start]."""
        W, U, b, c, C, d = weights.values()
        x = self.inputs.movedim(1, 0)  # [time, trial, input]
        driven = (x.flatten(0, 1) @ W.mT + b[:, None]).unflatten(1, x.shape[:2])  # [start, time, trial, gate]
        h = x.new_zeros(len(C), x.shape[1], UNITS)
        states = []
        for drive in driven.unbind(1):
            h = self.step(drive, torch.baddbmm(c[:, None], h, U.mT), h)
            states.append(h)
        y = torch.stack(states, 1) @ C.mT[:, None] + d[:, None, None]
        counted = self.mask.T[..., None] / (self.mask.sum() * y.shape[-1])
        return (counted * (y - self.target.movedim(1, 0)) ** 2).sum((1, 2, 3))

    def step(self, drive: Tensor, fed: Tensor, h: Tensor) -> Tensor:
        if self.cell == "tanh":
            return torch.tanh(drive + fed)
        r, z = torch.sigmoid(drive[..., : 2 * UNITS] + fed[..., : 2 * UNITS]).chunk(2, -1)
        return torch.lerp(torch.tanh(drive[..., 2 * UNITS :] + r * fed[..., 2 * UNITS :]), h, z)

    def gradient(self, weights: Weights) -> tuple[Tensor, Weights]:
        """The losses [start] and their gradients."""
        values = {name: value.detach().requires_grad_() for name, value in weights.items()}
        losses = self.losses(values)
        return losses.detach(), dict(zip(values, torch.autograd.grad(losses.sum(), [*values.values()]), strict=True))


# Training


class Descent:
    def __init__(self, rates: Tensor) -> None:
        self.rates = rates

    def keep(self, kept: Tensor) -> None:
        self.rates = self.rates[kept]

    def __call__(self, name: str, gradient: Tensor, number: int) -> Tensor:
        return -self.rates.reshape(-1, *[1] * (gradient.ndim - 1)) * gradient


class Adam:
    def __init__(self) -> None:
        self.moments: dict[str, tuple[Any, Any]] = {}

    def keep(self, kept: Tensor) -> None:
        self.moments = {name: (m[kept], v[kept]) for name, (m, v) in self.moments.items()}

    def __call__(self, name: str, gradient: Tensor, number: int) -> Tensor:
        m, v = self.moments.get(name, (0, 0))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        self.moments[name] = m, v
        return -RATE * (m / (1 - 0.9**number)) / ((v / (1 - 0.999**number)).sqrt() + 1e-8)


def train(training: Training, rule: Descent | Adam, starts: Tensor, rise: bool = True) -> tuple[Tensor, int]:
    """Steps to half of the loss of these starts, and gradients of all; inf after the budget, and NaN where the loss
    rises and must not. Starts that are done leave the batch."""
    weights = {name: value[starts] for name, value in training.weights.items()}
    live, found, gradients = torch.arange(len(starts)), torch.full((len(starts),), math.inf).double(), 0
    first = before = training.losses(weights)
    for number in range(1, BUDGET + 2):
        losses, gradient = training.gradient(weights)
        gradients += len(live)
        rose = (losses > before * (1 + 1e-12)) & (not rise)
        there = (losses <= first / 2) & ~rose
        found[live[rose]] = math.nan
        found[live[there]] = (number - 2 + (2 * before / first).log() / (before / losses).log())[there]
        kept = ~(rose | there)
        live, first, before = live[kept], first[kept], losses[kept]
        if not len(live):
            break
        rule.keep(kept)
        weights = {name: v[kept] + rule(name, gradient[name][kept], number) for name, v in weights.items()}
    return found, gradients


def descent_rates(training: Training) -> Tensor:
    """Halved until the loss falls slowly and at each step."""
    rates, rising = torch.ones(STARTS).double(), torch.arange(STARTS)
    while len(rising):
        found = train(training, Descent(rates[rising]), rising, rise=False)[0]
        rising = rising[~(found >= FINE)]
        rates[rising] /= 2
    return rates


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and CPU seconds."""
    began = time.process_time()
    return function(), time.process_time() - began


# Tables


def orders(training: Training) -> tuple[dict[str, tuple[Tensor, float]], int]:
    """Forecasts of time to half [start] by name, with the seconds of each; and the applications that were enough."""
    training.forecast()  # imports and compiles
    found, seconds = timed(training.forecast)
    table = {"default": (torch.from_numpy(found.half), seconds)}
    for number in APPLICATIONS:
        given, seconds = timed(lambda number=number: training.forecast(number))
        table[str(number)] = torch.from_numpy(given.half), seconds
    (losses, gradient), seconds = timed(lambda: training.gradient(training.weights))
    flat = torch.cat([g.flatten(1) for g in gradient.values()], 1)
    table["|grad|"] = losses / (flat**2).sum(1), seconds
    table["|grad|_1"] = losses / flat.abs().sum(1), seconds
    return table, found.applications


def compare(task: str, cell: str) -> None:
    training, every = Training(task, cell), torch.arange(STARTS)
    forecasts, applications = orders(training)
    rates = descent_rates(training)
    for kind, rule, scale in (("descent", Descent(rates), rates), ("Adam", Adam(), torch.ones(STARTS))):
        (steps, gradients), seconds = timed(lambda rule=rule: train(training, rule, every))
        known = steps.isfinite()
        ranks = {name: rank(half[known], (scale * steps)[known]) for name, (half, _) in forecasts.items()}
        costs = f"{forecasts['default'][1] / seconds:8.1%} {forecasts[str(APPLICATIONS[-1])][1] / seconds:8.1%}"
        same = (scale * steps)[known].mean() / scale.min()
        trained = f"{int(known.sum()):4} {gradients / STARTS:9.0f} {same:8.0f} {seconds:8.2f}"
        row = f"{task:12} {cell:5} {kind:8} {trained} {applications:8} {costs}"
        print(row, *(f"{ranks[name]:8.2f}" for name in forecasts), flush=True)


def rank(a: Tensor, b: Tensor) -> float:
    found: Any = spearmanr(a, b)
    return found.statistic


def main() -> None:
    parser = argparse.ArgumentParser(description="The order of many starts beside that of their training.")
    parser.add_argument("tasks", nargs="*", default=CHOSEN, help=f"of {', '.join(CHOSEN)}")
    parser.add_argument("--cells", nargs="+", choices=list(MODULES), default=list(MODULES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["default", *map(str, APPLICATIONS), "|grad|", "|grad|_1"]
    print(
        f"{'task':12} {'cell':5} {'training':8} {'half':>4} gradients one rate  seconds    taken     cost  cost, 6",
        end=" ",
    )
    print(*(f"{name:>8}" for name in names))
    for task in options.tasks:
        for cell in options.cells:
            compare(task, cell)


if __name__ == "__main__":
    main()
