"""When can a neural ODE learn? The temporal modes of its NTK before and after training. Runs in seconds.

    python examples/torch_neural_ode.py --out neural_ode.png    # trains for ten seconds, saves a figure
    python examples/torch_neural_ode.py --quick                 # a few steps, into a temporary folder

The field is a multilayer perceptron, and the target the limit cycle of van der Pol's oscillator from several starts.
Inner products are integrals over time: the modes are functions, and the loss is L = 1/2 int |z - target|^2 dt.
The same numbers as a page: kpflow-dyn analyze --problem examples/torch_neural_ode.py:problem
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import MLPField, VanDerPol

METHOD, STEPS, QUICK_STEPS = "rk4", 250, 10
TIMES = np.linspace(0.0, 7.0, 57)  # a little more than one period
START = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.3, 0.0], [0.5, -2.5]], dtype=torch.float64)


def solve(f: Callable[[Tensor, Tensor], Tensor], t: np.ndarray = TIMES) -> Tensor:
    """The state [trial, time, unit] from the starts, by classical Runge-Kutta steps between the times."""
    found = odeint(f, START, torch.from_numpy(t), method=METHOD)
    assert isinstance(found, Tensor)
    return found.transpose(0, 1)


def target() -> Tensor:
    """Van der Pol's oscillator on the times [trial, time, unit]."""
    plant, fine = VanDerPol(), np.linspace(TIMES[0], TIMES[-1], 8 * (len(TIMES) - 1) + 1)
    return solve(lambda t, z: plant(z, z[:, :1] * 0), fine)[:, ::8]


def untrained() -> MLPField:
    torch.manual_seed(0)
    return MLPField(2, hidden=24).double()


def train(field: MLPField, steps: int) -> MLPField:
    """Fit the field to the target, the horizon growing to its full length over the first half of the steps."""
    wanted, optimizer = target(), torch.optim.Adam(field.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        times = min(len(TIMES), 8 + 2 * step * len(TIMES) // steps)
        loss = (solve(field, TIMES[:times]) - wanted[:, :times]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return field


def problem(steps: int = STEPS) -> kp.Solution:
    """The trained field on its times, for the command line."""
    return solution_of(train(untrained(), steps))


def solution_of(field: MLPField) -> kp.Solution:
    return kp.solve(kp.ODEProblem(field, START, TIMES), METHOD)


def check_a_step(flow: kp.Flow, field: MLPField, eta: float = 1e-7) -> float:
    """Take a real step of gradient descent on L; how far the state moves otherwise than by -eta ntk grad_S L."""
    gradient = flow.solution.state - target()  # in the inner product of the flow, an integral over time
    step = flow.as_parameters(-eta * flow.J.T.mv(gradient))
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            parameter += step[name]
    moved, predicted = solve(field).detach() - flow.solution.state, -eta * flow.ntk.mv(gradient)
    return float((moved - predicted).norm() / moved.norm())


def draw(path: Path, flows: dict[str, kp.Flow]) -> None:
    """Above the positions, below the temporal modes, of which the legend says the shares."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    rows = figure.subplots(2, 2, sharex=True, sharey="row")
    wanted = target()
    for (when, flow), trajectories, modes in zip(flows.items(), *rows, strict=True):
        trajectories.set_title(f"{when} training")
        for found, goal, color in zip(flow.solution.state, wanted, SERIES, strict=True):
            trajectories.plot(TIMES, goal[:, 0], color=color, linestyle=":", linewidth=1.5)
            trajectories.plot(TIMES, found[:, 0], color=color)
        found = kp.modes(flow.ntk, axis="time", k=3)
        for mode, share, color in zip(found.vectors, found.explained, SERIES, strict=False):
            modes.plot(TIMES, mode * mode[mode.abs().argmax()].sign(), color=color, label=f"{100 * float(share):.2g} %")
        modes.legend(title="Mode with its share of the trace", ncols=3, loc="upper left", frameon=False)
        modes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        modes.set(xlabel="Time (dimensionless)", xlim=(TIMES[0], TIMES[-1]))
    rows[0, 0].set(ylabel="Position\n(dotted: target)")
    rows[1, 0].set(ylabel="Temporal mode of the NTK", ylim=(-0.85, 1.3))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Temporal modes of a neural ODE before and after training.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default neural_ode.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "neural_ode.png"

    field, flows = untrained(), {}
    flows["Before"] = kp.linearize(solution_of(field))
    train(field, QUICK_STEPS if options.quick else STEPS)
    flows["After"] = kp.linearize(solution_of(field))
    for when, flow in flows.items():
        loss = float(flow.ntk.domain.inner(error := flow.solution.state - target(), error)) / 2
        rank = kp.effective_rank(kp.partial_trace(flow.ntk, keep="time"))
        values = kp.eigs(flow.ntk, k=4).values
        print(f"{when} training: loss {loss:.4f}, temporal effective rank {rank.value:.2f} of {len(TIMES)}")
        print(f"    leading eigenvalues of the NTK: {values.numpy().round(1)}")
    defect = check_a_step(flows["After"], field)
    print(f"a step of gradient descent, against its prediction: {defect:.1e}")
    assert defect < 1e-3
    draw(out, flows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
