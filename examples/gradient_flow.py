"""Gradient descent in tens of steps: the gradient flow, against descent itself. In torch; a quarter of an hour.

    python examples/gradient_flow.py --out flow.png    # RNNs on two tasks at four gains, a GRU, a neural ODE; a figure
    python examples/gradient_flow.py --quick           # one small RNN, into a temporary folder

Descent with learning rate eta follows the gradient flow for a time eta a step. It must keep eta below 2 / l_1, the
largest curvature on the way, whereas the slow part of learning lasts for many times 1 / l_k. `kp.gradient_flow` takes
steps that only accuracy limits. Descent runs here at a twentieth of the largest stable rate or less, so that its own
error is small, as far as a few thousand steps go. The table has the steps of the flow; those of descent at 2 / l_1 to
the same end, and those taken here; and by how much the flow's times to 50, 20 and 10 % of the initial loss, and its
loss at worst, differ from descent's, beside the flow's own estimate of its error at worst.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import MLPField

PARTS = (0.5, 0.2, 0.1)
HEADER = f"""\
{"":20s} kp.gradient_flow{"":14s} | descent{"":18s} | off by %
{"":20s}  steps  grads products seconds | at 2/l_1   steps seconds |  50 %   20 %   10 %   loss estimate"""
GRID = np.linspace(0.0, 2.0, 21)
ALG = kp.solvers.ExponentialRosenbrock()  # long steps that tell the curvature


class Readout(nn.Module):
    """The squared error of a linear readout, whose weights learn as well."""

    targets: Tensor

    def __init__(self, units: int, targets: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(units, targets.shape[-1], dtype=torch.float64)
        self.register_buffer("targets", targets)

    def forward(self, state: Tensor) -> Tensor:
        return ((self.linear(state) - self.targets) ** 2).mean()


@dataclass(frozen=True)
class Case:
    """A model and its loss, how long to flow, and the most steps of descent that are worth the wait."""

    problem: kp.DiscreteProblem | kp.ODEProblem
    loss: Callable[[Tensor], Tensor]
    span: float
    steps: int


def task(name: str) -> tuple[Tensor, Tensor]:
    if name == "integration":
        x = torch.randn(8, 30, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        return x, 0.2 * x.cumsum(1)
    short: dict[str, Any] = {
        "memorypro": {"fixation": 5, "stimulus": 10, "memory": 10, "response": 5},
        "flipflop": {"bits": 2, "steps": 30},
    }
    data = kp.tasks.make_task(name, trials=8, **short[name])
    return torch.from_numpy(data.inputs), torch.from_numpy(data.targets)


def recurrent(name: str, cell: Callable[..., nn.Module], units: int, gain: float, span: float, steps: int) -> Case:
    """A cell on a task, with recurrent weights of this gain."""
    torch.manual_seed(0)
    x, y = task(name)
    model: Any = cell(x.shape[-1], units, dtype=torch.float64)
    with torch.no_grad():
        model.weight_hh.copy_(gain * torch.randn_like(model.weight_hh) / units**0.5)
    return Case(kp.DiscreteProblem(model, x), Readout(units, y), span, steps)


def neural_ode(span: float, steps: int) -> Case:
    """A field that learns to shrink."""
    torch.manual_seed(0)
    field, start = MLPField(2, 16).double(), torch.randn(8, 2, dtype=torch.float64)
    target = start[:, None] * torch.exp(-torch.from_numpy(GRID)[:, None])
    return Case(kp.ODEProblem(field, start, GRID), lambda state: ((state - target) ** 2).mean(), span, steps)


def cases(quick: bool) -> dict[str, Case]:
    if quick:
        return {"RNN integration 0.9": recurrent("integration", nn.RNNCell, 8, 0.9, 5.0, 2_000)}
    found = {
        f"RNN {name} {gain}": recurrent(name, nn.RNNCell, 32, gain, 400.0, 4_000)
        for name in ("memorypro", "flipflop", "integration")
        for gain in (0.3, 0.9, 1.3, 1.8)
    }
    more = {"GRU flipflop": recurrent("flipflop", nn.GRUCell, 32, 0.9, 400.0, 4_000), "ODE": neural_ode(400.0, 4_000)}
    return more | found


def unrolled(case: Case) -> Callable[[], Tensor]:
    """The loss through the model itself, by Heun steps between the times of an ODE."""
    problem = case.problem
    if isinstance(problem, kp.DiscreteProblem):
        return lambda: case.loss(torch.stack(_states(problem), 1))
    return lambda: case.loss(torch.stack(_heun(problem), 1))


def _states(problem: kp.DiscreteProblem) -> list[Tensor]:
    z, states = problem.x.new_zeros(len(problem.x), problem.cell.hidden_size), []
    for x_t in problem.x.unbind(1):
        z = problem.cell(x_t, z)
        states.append(z)
    return states


def _heun(problem: kp.ODEProblem) -> list[Tensor]:
    states = [problem.z0]
    for t, h in zip(GRID[:-1], np.diff(GRID), strict=True):
        slope = problem.f(t, states[-1])
        states.append(states[-1] + h / 2 * (slope + problem.f(t + h, states[-1] + h * slope)))
    return states


def stable_steps(flow: kp.GradientFlow, tau: float) -> float:
    """Of descent to this time, at the largest rate 2 / l_1 that is stable all the way."""
    return tau / 2 * max(float(piece.ritz.max()) for piece, t in zip(flow.pieces, flow.time, strict=False) if t < tau)


def affordable(flow: kp.GradientFlow, steps: int) -> tuple[float, float]:
    """A twentieth of 2 / l_1 or less, up to the last part of the loss that descent reaches with it, and that part."""
    ends = {part: end for part in PARTS if np.isfinite(end := flow.time_to(part))}
    small = {part: end / max(20 * stable_steps(flow, end), 2_000) for part, end in ends.items()}
    within = [part for part, end in ends.items() if end / small[part] < steps]
    part = min(within, default=max(ends))
    return small[part], part


def descend(case: Case, rate: float, until: float) -> tuple[np.ndarray, np.ndarray]:
    """Plain descent until this part of the loss or the end of the budget: times and losses."""
    case = copy.deepcopy(case)
    model: nn.Module = case.problem.cell if isinstance(case.problem, kp.DiscreteProblem) else case.problem.f
    weights = [*model.parameters(), *(case.loss.parameters() if isinstance(case.loss, nn.Module) else ())]
    value, losses = unrolled(case), []
    while len(losses) < case.steps and not (losses and losses[-1] < until * losses[0]):
        loss = value()
        losses.append(loss.item())
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.sub_(rate * gradient)
    return rate * np.arange(len(losses)), np.array(losses)


def time_of(times: np.ndarray, losses: np.ndarray, part: float) -> float:
    """When the loss passes this part of the first, between two steps by its logarithm."""
    below = np.flatnonzero(losses <= part * losses[0])
    if not below.size:
        return np.nan
    pair = slice(below[0] - 1, below[0] + 1)
    return float(np.interp(-np.log(part * losses[0]), -np.log(losses[pair]), times[pair]))


def compare(name: str, case: Case) -> tuple[kp.GradientFlow, np.ndarray, np.ndarray]:
    began = time.perf_counter()
    flow = kp.gradient_flow(case.problem, case.loss, case.span, stop_below=0.9 * PARTS[-1], alg=ALG)
    middle = time.perf_counter()
    times, losses = descend(case, *affordable(flow, case.steps))
    ended = time.perf_counter()
    off = [flow.time_to(part) / time_of(times, losses, part) - 1 for part in PARTS]
    shared = times <= flow.time[-1]
    furthest = np.abs(flow(times[shared]) / losses[shared] - 1).max()
    print(
        f"{name:20s} {flow.linearisations:6d} {flow.gradients:6d} {flow.applications:8d} {middle - began:7.1f}"
        f" | {stable_steps(flow, flow.time[-1]):8.0f} {len(times):7d} {ended - middle:7.1f} | "
        + " ".join(f"{100 * number:+6.2f}" for number in off)
        + f" {100 * furthest:6.2f} {100 * flow.error.max():6.2f}",
        flush=True,
    )
    return flow, times, losses


def draw(path: Path, found: dict[str, tuple[kp.GradientFlow, np.ndarray, np.ndarray]]) -> None:
    """The losses of descent as lines, the steps of the flow as dots on them."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for (name, (flow, times, losses)), color in zip(found.items(), SERIES, strict=False):
        axes.plot(times[1:], losses[1:] / losses[0], color=color, label=f"{name}: {flow.linearisations} steps")
        axes.plot(flow.time[1:], flow.loss[1:] / flow.loss[0], ".", color=color)
    axes.set(xscale="log", yscale="log", xlabel="Time (learning rate x steps)", ylabel="Part of the initial loss")
    axes.legend(frameon=False, title="Lines: descent. Dots: the gradient flow")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Gradient flows against gradient descent.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default flow.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="one small network only, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "flow.png"

    print(HEADER)
    found = {name: compare(name, case) for name, case in cases(options.quick).items()}
    draw(out, dict(list(found.items())[:4]))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
