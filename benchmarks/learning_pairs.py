"""Pairs of a task and a network at its start, and how long each takes to train: the truth that forecasts are held to.

    python benchmarks/learning_pairs.py          # adds the truths that learning_truth.json lacks; minutes a pair
    python benchmarks/learning_pairs.py --all    # trains all pairs anew

- SGD: descent on all trials whose loss never rises, with the rate halved until the time to half of the loss moves by
  less than 3 %. Times are tau = rate x steps.
- Adam: torch's own, at three rates, on all trials and on four trials drawn anew for each step (the median of five seeds
  of the draws). Times are steps.

Times are those at which the loss on all trials is first below a half and a fifth of its first value, interpolated
within the step by its logarithm; null where the budget ends before. Everything is in float64 on one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.models import CTRNNCell, LowRankRNNCell

TRUTH = Path(__file__).with_name("learning_truth.json")
PARTS = (0.5, 0.2)
RATES, BATCH, SEEDS = (1e-3, 3e-3, 1e-2), 4, 5  # of Adam, its mini-batches, and seeds of their draws
MOVED = 0.03  # how far the time of descent may still move when its rate is halved
DESCENT, ADAM = 40_000, 3_000  # the most steps

TASKS = {
    "flip-flop": kp.tasks.FlipFlop(bits=2, steps=30),
    "memory": kp.tasks.MemoryPro(fixation=4, stimulus=6, memory=12, response=8),
    "integration": kp.tasks.EvidenceIntegration(fixation=4, stimulus=20, response=6, coherence=0.5),
    "comparison": kp.tasks.Romo(fixation=3, first=6, delay=12, second=6, response=6),
    "lag": kp.tasks.Lag(lag=4, steps=30),
    "sine": kp.tasks.Sine(steps=60),
    "system": kp.tasks.LowRankForecast(channels=6, rank=4, steps=40),
    "match": kp.tasks.Neurogym("DelayMatchSample-v0"),  # a classification, as is the next, whose trials are padded
    "context": kp.tasks.Neurogym("ContextDecisionMaking-v0"),
}
CLASSES = ("match", "context")
MODULES = {"tanh": nn.RNN, "relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
CELLS = {"ctrnn": CTRNNCell, "lowrank": LowRankRNNCell}


@dataclass(frozen=True)
class Pair:
    """A task, and a network with a linear readout at its start.

    `gain` is g of recurrent weights N(0, g^2 / units), or multiplies m of a low rank; inputs are multiplied by `scale`.
    """

    task: str
    cell: str
    gain: float
    seed: int = 0
    units: int = 24
    trials: int = 16
    scale: float = 1.0

    def __str__(self) -> str:
        more = [f"n={self.units}"] * (self.units != 24) + [f"x{self.scale:g}"] * (self.scale != 1)
        return " ".join([self.task, self.cell, f"g={self.gain:g}", f"seed={self.seed}", *more])

    @cached_property
    def data(self) -> kp.tasks.TaskData:
        return TASKS[self.task].sample(self.trials, self.seed)

    @property
    def inputs(self) -> Tensor:
        return self.scale * torch.from_numpy(self.data.inputs)

    @property
    def target(self) -> Tensor:
        """Values [trial, time, out], or classes [trial, time]."""
        if self.task in CLASSES:
            return torch.from_numpy(self.data.labels["class"]).long()
        targets = self.data.targets
        assert targets is not None
        return torch.from_numpy(targets)

    @property
    def mask(self) -> Tensor:
        """m [trial, time]."""
        mask = self.data.mask
        return torch.ones(self.inputs.shape[:2]).double() if mask is None else torch.from_numpy(mask).double()

    @property
    def loss(self) -> str:
        return "cross_entropy" if self.task in CLASSES else "squared_error"

    def model(self) -> tuple[nn.Module, nn.Linear]:
        """A torch module, or a cell, and its readout, made anew."""
        torch.manual_seed(self.seed)
        targets = self.data.targets
        assert targets is not None
        sizes = self.inputs.shape[2], self.units
        if self.cell in MODULES:
            options = {"nonlinearity": self.cell} if MODULES[self.cell] is nn.RNN else {}
            cell = MODULES[self.cell](*sizes, batch_first=True, **options)
            nn.init.normal_(cell.get_parameter("weight_hh_l0"), std=self.gain / math.sqrt(self.units))
        elif self.cell == "ctrnn":
            cell = CTRNNCell(*sizes, alpha=0.2, gain=self.gain)
        else:
            cell = LowRankRNNCell(*sizes, rank=2, alpha=0.2)
            cell.m.data *= self.gain
        return cell.double(), nn.Linear(self.units, targets.shape[2]).double()


PAIRS = [
    Pair("flip-flop", "tanh", 0.9),
    Pair("flip-flop", "gru", 1.0),
    Pair("sine", "relu", 0.9),
    Pair("memory", "lstm", 1.0),
    Pair("integration", "tanh", 1.4),
    Pair("integration", "lowrank", 1.0),
    Pair("comparison", "ctrnn", 1.3),
    Pair("comparison", "lstm", 1.0),
    Pair("lag", "tanh", 0.9),
    Pair("lag", "gru", 1.0),
    Pair("sine", "ctrnn", 1.3),
    Pair("sine", "gru", 1.0),
    Pair("system", "relu", 1.0),
    Pair("lag", "lowrank", 1.0),
    Pair("match", "tanh", 0.9),
    Pair("context", "gru", 1.0),
    Pair("flip-flop", "ctrnn", 0.7),
    Pair("flip-flop", "lstm", 0.7),
    Pair("memory", "tanh", 1.3),
    Pair("sine", "lowrank", 1.0),
    Pair("integration", "gru", 1.3),
    Pair("integration", "lstm", 1.0),
    Pair("comparison", "relu", 1.0),
    Pair("comparison", "gru", 0.8),
    Pair("lag", "relu", 0.8),
    Pair("lag", "lstm", 1.3),
    Pair("sine", "tanh", 0.8),
    Pair("sine", "lstm", 1.0),
    Pair("system", "tanh", 1.2),
    Pair("system", "gru", 0.6),
    Pair("match", "lstm", 1.0),
    Pair("match", "relu", 0.9),
    Pair("match", "ctrnn", 0.7),
    Pair("context", "tanh", 0.7),
    Pair("context", "lstm", 1.4),
    Pair("flip-flop", "lowrank", 1.0),
    Pair("memory", "relu", 1.0),
    Pair("memory", "lowrank", 1.0),
    Pair("system", "lowrank", 1.0),
    Pair("context", "lowrank", 1.0),
    # Slow directions beside fast ones: large inputs.
    Pair("flip-flop", "tanh", 0.9, scale=5.0),
    Pair("lag", "gru", 1.0, scale=5.0),
    Pair("sine", "tanh", 1.2, scale=4.0),
    Pair("flip-flop", "lstm", 0.7, scale=5.0),
    Pair("lag", "lstm", 1.3, scale=4.0),
    Pair("sine", "ctrnn", 1.3, scale=3.0),
    # Many units.
    Pair("flip-flop", "gru", 1.0, units=128),
    Pair("lag", "tanh", 0.9, units=128),
    Pair("sine", "ctrnn", 1.3, units=128),
    Pair("flip-flop", "tanh", 0.9, units=128),
    Pair("lag", "gru", 1.0, units=128),
    Pair("flip-flop", "lstm", 0.7, units=128),
    Pair("lag", "lstm", 1.3, units=128),
    Pair("integration", "tanh", 1.4, units=128),
]


# Training


class Training:
    """A network of a pair in training."""

    def __init__(self, pair: Pair) -> None:
        self.cell, self.readout = pair.model()
        self.parameters = [*self.cell.parameters(), *self.readout.parameters()]
        self.inputs, self.target, self.mask, self.classes = pair.inputs, pair.target, pair.mask, pair.task in CLASSES

    def outputs(self, x: Tensor) -> Tensor:
        """y [trial, time, out] for inputs x."""
        if isinstance(self.cell, nn.RNNBase):
            return self.readout(self.cell(x)[0])
        states = [x.new_zeros(len(x), self.readout.in_features)]
        for x_t in x.unbind(1):
            states.append(self.cell(x_t, states[-1]))
        return self.readout(torch.stack(states[1:], 1))

    def loss(self, trials: Any = slice(None)) -> Tensor:
        """On these trials: the mean of what the mask counts."""
        y, target, mask = self.outputs(self.inputs[trials]), self.target[trials], self.mask[trials]
        if self.classes:
            each = nn.functional.cross_entropy(y.movedim(2, 1), target, reduction="none")
            return (mask * each).sum() / mask.sum()
        return (mask[..., None] * (y - target) ** 2).sum() / (mask.sum() * y.shape[2])

    def descent(self, rate: float) -> Iterator[float]:
        """The loss before each step of plain descent."""
        while True:
            loss = self.loss()
            yield loss.item()
            with torch.no_grad():
                for value, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
                    value -= rate * gradient

    def adam(self, rate: float, seed: int | None = None) -> Iterator[float]:
        """The loss on all trials before each step of Adam, on mini-batches with a seed of their draws."""
        adam = torch.optim.Adam(self.parameters, lr=rate)
        rng = np.random.default_rng(seed)
        while True:
            with torch.set_grad_enabled(seed is None):
                loss = self.loss()
            yield loss.item()
            if seed is not None:
                loss = self.loss(torch.from_numpy(rng.permutation(len(self.inputs))[:BATCH]))
            adam.zero_grad()
            loss.backward()
            adam.step()


def times_to(parts: Sequence[float], losses: Iterator[float], budget: int, rise: bool = True) -> list[float] | None:
    """The steps, interpolated, at which the loss passes these parts of the first; NaN where the budget ends before, and
    None where the loss rises and must not."""
    first = before = next(losses)
    found: list[float] = []
    for step, loss in zip(range(1, budget + 1), losses, strict=False):
        if not rise and not loss <= before * (1 + 1e-12):
            return None
        for part in parts[len(found) :]:
            if loss <= part * first:
                found.append(step - 1 + math.log(before / (part * first)) / math.log(before / loss))
        before = loss
        if len(found) == len(parts):
            return found
    return found + [math.nan] * (len(parts) - len(found))


# Truths


def descent(pair: Pair) -> dict[str, Any]:
    """tau to half, with the rate and steps of the last run, and of the first whose time it confirmed."""
    rate, before = 2.0, None
    while rate > 1e-9:
        rate /= 2
        found = times_to(PARTS[:1], Training(pair).descent(rate), DESCENT, rise=False)
        if found is None:
            continue
        if not math.isfinite(found[0]):
            return {"half": None, "rate": rate, "steps": DESCENT}
        now = {"half": rate * found[0], "rate": rate, "steps": math.ceil(found[0])}
        if before and abs(before["half"] / now["half"] - 1) < MOVED:
            return now | {"coarse_rate": before["rate"], "coarse_steps": before["steps"]}
        before = now
    raise AssertionError(f"{pair}: no rate is small enough")


def adam(pair: Pair, rate: float) -> dict[str, Any]:
    found = times_to(PARTS, Training(pair).adam(rate), ADAM)
    return dict(zip(("half", "fifth"), (t if math.isfinite(t) else None for t in found or []), strict=True))


def batches(pair: Pair, rate: float) -> dict[str, Any]:
    """The median over the seeds, of which those that do not get there are the last."""
    found = [times_to(PARTS[:1], Training(pair).adam(rate, seed), ADAM) for seed in range(SEEDS)]
    late = [times[0] if times and math.isfinite(times[0]) else math.inf for times in found]
    half = statistics.median(late)
    return {"half": half if math.isfinite(half) else None, "halves": [t if math.isfinite(t) else None for t in late]}


KINDS: dict[str, Callable[[Pair], dict[str, Any]]] = {
    "sgd": descent,
    **{f"adam {rate:g}": lambda pair, rate=rate: adam(pair, rate) for rate in RATES},
    **{f"adam {rate:g} batch {BATCH}": lambda pair, rate=rate: batches(pair, rate) for rate in RATES},
}


def read() -> dict[str, dict[str, Any]]:
    """The truths by pair and kind."""
    return json.loads(TRUTH.read_text()) if TRUTH.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains pairs, for the truth that forecasts are held to.")
    parser.add_argument("pairs", nargs="*", default=[""], help="what the names of the pairs begin with")
    parser.add_argument("--all", action="store_true", help="anew also those whose truth is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for pair in PAIRS:
        if str(pair).startswith(tuple(options.pairs)):
            known = {} if options.all else read().get(str(pair), {})
            found = known | {kind: timed(truth, pair, kind) for kind, truth in KINDS.items() if kind not in known}
            TRUTH.write_text(json.dumps(read() | {str(pair): found}, indent=1) + "\n")


def timed(truth: Callable[[Pair], dict[str, Any]], pair: Pair, kind: str) -> dict[str, Any]:
    began = time.perf_counter()
    found = truth(pair) | {"seconds": round(time.perf_counter() - began, 2)}
    print(f"{pair!s:32} {kind:18} {found}", flush=True)
    return found


if __name__ == "__main__":
    main()
