"""Forecasts of learning times beside true ones, and what both cost.

    python benchmarks/learning.py                        # the kernel at the start and the gradient flow, on all pairs
    python benchmarks/learning.py lag "sine gru"         # pairs whose name begins like this
    python benchmarks/learning.py --roads kernel         # one road only

The truths are those of `learning_pairs.py`. For each kind of training, and each road to a forecast of the time to half
of the loss, the last table has

    answers      pairs with a time, of those that trained to half
    Spearman     the rank correlation with the true times
    off by       the median relative error
    cover        the share of intervals that hold the true time, where the road gives intervals
    gradients    the cost divided by that of the training, in the median
    seconds      the same in CPU time

The cost is counted in gradients of the loss on all trials: an application of the kernel (J and J*) counts as one, a
product of the Hessian with a vector as two, and a step on a mini-batch as its share of the trials. Linearising is in
the seconds alone.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from learning_pairs import BATCH, KINDS, PAIRS, Pair, Training, read
from scipy.stats import spearmanr

import kpflow_dyn as kp

TRAINED = 0.9  # part of the steps taken one by one from which on an answer is a training
SPAN = 1e3  # of tau at most


@dataclass(frozen=True)
class Answer:
    """A time to half of the loss, between two others, in tau or in steps; and what it cost."""

    half: float = math.nan
    interval: tuple[float, float] | None = None
    gradients: float = math.nan
    seconds: float = math.nan
    own: float = 0.0  # the part of the steps that were the optimiser's own, as in training
    why_not: str = ""


def kernel(pair: Pair, kind: str) -> Answer:
    """The kernel at the start."""
    cell, readout = pair.model()
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, pair.inputs))).output(readout, learn=True)
    lr = 1e-4 if kind == "sgd" else float(kind.split()[1])
    options = _loss(pair) | _optimizer(kind)
    found = kp.forecast(
        y, pair.target, lr=lr, steps=round(SPAN / lr), mask=pair.mask[..., None], check=False, **options
    )
    return Answer(found.steps_to(0.5) * (lr if kind == "sgd" else 1), _interval(found), found.applications)


def flow(pair: Pair, kind: str) -> Answer:
    """The gradient flow, or that of an optimiser."""
    cell, readout = pair.model()
    make: Any = getattr(kp, pair.loss)
    loss = make(pair.target, readout, pair.mask)
    problem = kp.DiscreteProblem(cell, pair.inputs)
    found = kp.gradient_flow(problem, loss, SPAN, stop_below=0.5, **_optimizer(kind))
    return Answer(found.time_to(0.5), found.interval_to(0.5), found.cost, own=found.own / found.time[-1])


def _interval(found: Any) -> tuple[float, float] | None:
    return found.interval_to(0.5) if hasattr(found, "interval_to") else None


def _loss(pair: Pair) -> dict[str, Any]:
    return {} if pair.loss == "squared_error" else {"loss": pair.loss}


def _optimizer(kind: str) -> dict[str, Any]:
    """The options of a kind of training, such as "adam 0.003 batch 4"."""
    name, *words = kind.split()
    batch = {"batch": int(words[2])} if len(words) > 1 else {}
    return {} if kind == "sgd" else {"optimizer": name, "lr": float(words[0])} | batch


ROADS: dict[str, Callable[[Pair, str], Answer]] = {"kernel": kernel, "flow": flow}


def ask(road: str, pair: Pair, kind: str) -> Answer:
    began = time.process_time()
    try:
        with warnings.catch_warnings(action="ignore"):  # of a flow that is stopped
            found = ROADS[road](pair, kind)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return Answer(why_not=f"{type(error).__name__}: {str(error)[:70]}")
    return replace(found, seconds=time.process_time() - began)


def trained(pair: Pair, kind: str) -> Answer:
    """The true time, with what the training cost: here on one machine with the forecasts, from the time of a step."""
    truth = read().get(str(pair), {}).get(kind, {})
    if truth.get("half") is None:
        return Answer(why_not="not known" if not truth else f"not within {truth.get('steps', 'the')} steps")
    share = BATCH / pair.trials if "batch" in kind else 1.0
    gradients = share * truth.get("steps", truth["half"])
    return Answer(truth["half"], None, gradients, gradients * _seconds_of_gradient(pair))


def _seconds_of_gradient(pair: Pair, repeats: int = 3) -> float:
    """The shortest of some."""
    training, took = Training(pair), []
    for _ in range(repeats):
        began = time.process_time()
        torch.autograd.grad(training.loss(), training.parameters)
        took.append(time.process_time() - began)
    return min(took)


# Tables

COLUMNS = f"{'pair':34} {'kind':18} {'road':8} {'half':>9} {'truth':>9} {'own':>5} "
COLUMNS += f"{'gradients':>9} {'truth':>7} {'seconds':>7} {'truth':>7}"


def row(pair: Pair, kind: str, road: str, found: Answer, truth: Answer) -> str:
    numbers = f"{found.half:9.4g} {truth.half:9.4g} {found.own:5.2f} {found.gradients:9.0f} {truth.gradients:7.0f}"
    return f"{pair!s:34} {kind:18} {road:8} {numbers} {found.seconds:7.2f} {truth.seconds:7.2f} {found.why_not}"


def summary(kind: str, road: str, answers: list[tuple[Answer, Answer]]) -> str:
    """A line of the last table, from pairs of forecast and truth."""
    trainable = [(found, truth) for found, truth in answers if math.isfinite(truth.half)]
    both = [(found, truth) for found, truth in trainable if math.isfinite(found.half)]
    if len(both) < 3:
        return f"{kind:18} {road:8} {len(both):3}/{len(trainable):<3}"
    halves = np.array([(found.half, truth.half) for found, truth in both])
    rank: Any = spearmanr(*halves.T)
    covers = [found.interval[0] <= truth.half <= found.interval[1] for found, truth in both if found.interval]
    cover = f"{np.mean(covers):6.2f}" if covers else f"{'-':>6}"
    error = np.median(np.abs(halves[:, 0] / halves[:, 1] - 1))
    costs = [np.median([getattr(f, what) / getattr(t, what) for f, t in both]) for what in ("gradients", "seconds")]
    counts = f"{len(both):3}/{len(trainable):<3}"
    return f"{kind:18} {road:8} {counts} {rank.statistic:8.3f} {error:7.1%} {cover} {costs[0]:9.2f} {costs[1]:8.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Forecasts of learning times beside true ones.")
    parser.add_argument("pairs", nargs="*", default=[""], help="what the names of the pairs begin with")
    parser.add_argument("--roads", nargs="+", choices=list(ROADS), default=list(ROADS))
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    answers: dict[tuple[str, str], list[tuple[Answer, Answer]]] = {}
    print(COLUMNS)
    for pair in PAIRS:
        if str(pair).startswith(tuple(options.pairs)) and str(pair) in read():
            for kind in options.kinds:
                truth = trained(pair, kind)
                for road in options.roads:
                    found = ask(road, pair, kind)
                    answers.setdefault((kind, road), []).append((found, truth))
                    print(row(pair, kind, road, found, truth), flush=True)
    for (kind, road), found in list(answers.items()):
        own = [(one, truth) for one, truth in found if one.own > TRAINED]
        if road == "flow" and own:  # what was got by training is no forecast
            answers[kind, "leaps"] = [pair for pair in found if pair not in own]
            answers[kind, "trained"] = own
    print(f"\n{'kind':18} {'road':8} answers Spearman  off by  cover gradients  seconds")
    for (kind, road), found in answers.items():
        print(summary(kind, road, found))


if __name__ == "__main__":
    main()
