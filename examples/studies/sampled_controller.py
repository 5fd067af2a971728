"""What can a controller with memory still learn? A GRU steers a sampled quadrotor, at three times of its training.

    python examples/studies/sampled_controller.py --out sampled.png    # some minutes
    python examples/studies/sampled_controller.py --quick              # a few steps of training, to see that it runs

The policy sees the positions and the angle alone, every 50 ms, and must make the velocities up from its memory.
Between samples its two thrusts are held, and the plant moves by two Runge-Kutta steps. So the plant is one in
discrete time, and the loop the cell of a `DiscreteProblem` with the state [plant, memory]; `control.analyze` takes it
like any other. (`ClosedLoop(plant, policy, every=0.05)` is the same with a solver of a library in between.)
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import ClosedLoop, PlanarQuadrotor

PLANT = PlanarQuadrotor()
HOVER = PLANT.mass * PLANT.gravity / 2  # N, of each rotor
EVERY, SUBSTEPS, SAMPLES, MEMORY = 0.05, 2, 60, 16
RANGE = torch.tensor([0.5, 0.5, 0.2, 0.3, 0.3, 0.5]).double()  # of the starts
Q, R = np.diag([1.0, 1.0, 0.3, 0.2, 0.2, 0.02]), 0.1 * np.eye(2)
TRIALS = 4
STEPS, QUICK_STEPS = (0, 60, 600), (0, 1, 2)
COST = control.QuadraticCost(EVERY * Q, EVERY * R)


class SampledQuadrotor:
    """The plant from one sample to the next under held thrusts, beside those that make it hover."""

    dt, state_size, control_size, state_names = EVERY, 6, 2, PLANT.state_names

    def step(self, z: Tensor, u: Tensor) -> Tensor:
        for _ in range(SUBSTEPS):
            z = runge_kutta(z, HOVER + u, EVERY / SUBSTEPS)
        return z

    def observe(self, z: Tensor, _x: Tensor) -> Tensor:
        return z[..., :3]


def runge_kutta(z: Tensor, u: Tensor, h: float) -> Tensor:
    first = PLANT(z, u)
    second = PLANT(z + h / 2 * first, u)
    third = PLANT(z + h / 2 * second, u)
    return z + h / 6 * (first + 2 * second + 2 * third + PLANT(z + h * third, u))


def problem_of(loop: nn.Module, start: Tensor, samples: int = SAMPLES) -> Any:
    begin = torch.cat([start, torch.zeros(len(start), MEMORY)], -1)
    return kp.DiscreteProblem(loop, torch.zeros(len(start), samples, 0).double(), begin.double())


def starts(count: int, generator: torch.Generator) -> Tensor:
    return RANGE * (2 * torch.rand(count, 6, generator=generator, dtype=torch.float64) - 1)


def train(loop: Any, steps: tuple[int, ...]) -> dict[int, dict[str, Tensor]]:
    """The parameters at these steps of Adam on random starts, the horizon growing over the first half."""
    optimizer, generator = torch.optim.Adam(loop.parameters(), lr=5e-3), torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps[-1])
    kept = {}
    for step in range(steps[-1] + 1):
        if step in steps:
            kept[step] = {name: value.clone() for name, value in loop.state_dict().items()}
        problem = problem_of(loop, starts(32, generator), 20 + min(40, 80 * step // steps[-1]))
        optimizer.zero_grad()
        cost_of(problem).backward()
        nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return kept


def cost_of(problem: Any) -> Tensor:
    """For autograd."""
    with_control, loss = control.training_cost(problem, COST)
    state, states = with_control.z0, []
    for x in with_control.x.unbind(1):
        states.append(state := with_control.cell(x, state))
    return loss(torch.stack(states, 1))


def ask(loop: nn.Module) -> dict[str, Any]:
    problem = problem_of(loop, starts(TRIALS, torch.Generator().manual_seed(2)))
    found = control.analyze(kp.solve(problem), COST).data.drop_vars("note")
    with_control, loss = control.training_cost(problem, COST)
    flow, lr = kp.linearize(kp.solve(with_control)), rate_of(loop, problem)
    forecast = kp.forecast(flow, loss=loss, lr=lr, steps=20, check=False)
    parts = kp.contributions(flow)
    return {
        "found": found,
        "state": flow.solution.state.detach().numpy(),
        "forecast": float(forecast.loss[-1] / forecast.loss[0]),
        "lr": lr,
        "contributions": {name: part.value / parts.total.value for name, part in parts.items()},
    }


def rate_of(loop: nn.Module, problem: Any) -> float:
    """A learning rate of which twenty steps take off a tenth of the cost, to first order."""
    value = cost_of(problem)
    gradient = torch.autograd.grad(value, list(loop.parameters()))
    return 0.1 * value.item() / (20 * sum(float((g**2).sum()) for g in gradient))


def steps_of_descent(loop: nn.Module, lr: float) -> float:
    """The cost after 20 real steps of gradient descent over that before."""
    problem = problem_of(loop, starts(TRIALS, torch.Generator().manual_seed(2)))
    optimizer, values = torch.optim.SGD(loop.parameters(), lr), []
    for _ in range(21):
        value = cost_of(problem)
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return values[-1] / values[0]


def draw(path: Path, all_found: dict[int, dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 7), layout="constrained")
    (flights, costs), (sizes, shares) = figure.subplots(2, 2)
    time = EVERY * np.arange(1, SAMPLES + 1)
    for (step, asked), color in zip(all_found.items(), SERIES, strict=False):
        found = asked["found"].mean("trial")
        for number, trial in enumerate(asked["state"]):
            flights.plot(trial[:, 0], trial[:, 1], color=color, label=None if number else f"step {step}", linewidth=1.2)
        sizes.plot(time, found.learnable.sum("mode"), color=color, label=f"step {step}, learnable")
        sizes.plot(time, found.reachable.sum("mode"), ":", color=color, label=f"step {step}, reachable")
        shares.plot(time, 100 * found.learnable_reachable, color=color, label=f"step {step}")
    flights.set(xlabel="x (m)", ylabel="y (m)", xlim=(-1, 1), ylim=(-1, 1), title="Flights; all shall end at (0, 0)")
    flights.set(xticks=np.linspace(-1, 1, 5), yticks=np.linspace(-1, 1, 5))
    steps = [str(step) for step in all_found]
    data = [asked["found"] for asked in all_found.values()]
    costs.bar(steps, [float(found.cost.mean()) for found in data], 0.6, color=SERIES[: len(steps)])
    costs.axhline(
        float(data[0].regulator_cost.mean()), color="0.3", linestyle="--", label="regulator that sees all states"
    )
    costs.set(yscale="log", xlabel="Step of training", ylabel="Cost")
    sizes.set(yscale="log", xlabel="Time (s)", ylabel="Trace, mean of trials")
    shares.set(xlabel="Time (s)", ylabel="Learnable in the two most reachable (%)", ylim=(0, 105))
    for axes in (flights, costs, sizes, shares):
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a quadrotor's GRU can still learn.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default sampled.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="a few steps of training, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "sampled.png"

    torch.manual_seed(0)
    policy, readout = nn.GRUCell(3, MEMORY), nn.Linear(MEMORY, 2)
    loop, all_found = ClosedLoop(SampledQuadrotor(), policy, readout=readout).double(), {}
    for step, values in train(loop, QUICK_STEPS if options.quick else STEPS).items():
        loop.load_state_dict(values)
        all_found[step] = asked = ask(loop)
        found, last = asked["found"], asked["found"].isel(time=-1).mean("trial")
        if len(all_found) == 1:
            cost, pole = float(found.regulator_cost.mean()), abs(found.regulator_pole.values).max()
            print(f"regulator of the sampled plant: cost {cost:.3g}, largest pole {pole:.3f}")
        pole = abs(found.rest_pole.values[0])
        print(f"step {step}: cost {float(found.cost.mean()):.3g}, largest pole at rest {pole:.3f}")
        gain, phase = float(found.disk_gain_margin), float(found.disk_phase_margin)
        print(f"    disk margin {float(found.disk_margin):.2f}: {gain:.1f} dB and {phase:.0f} degrees in both thrusts")
        shares = asked["contributions"].items()
        print("    shares of the trace: " + ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares))
        size, inside = float(last.learnable.sum()), 100 * float(last.learnable_reachable)
        print(f"    learnable at the end {size:.3g}, {inside:.0f} % reachable soon")
        really, guess = steps_of_descent(loop, asked["lr"]), asked["forecast"]
        print(f"    20 steps of descent leave {100 * really:.2f} % of the cost, by forecast {100 * guess:.2f} %")
    draw(out, all_found)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
