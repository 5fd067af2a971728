"""What can a controller with memory still learn? A GRU steers a sampled quadrotor, at three times of its training.

    python examples/studies/sampled_controller.py --out sampled.png    # some minutes
    python examples/studies/sampled_controller.py --quick              # a few steps of training, to see that it runs

The policy sees the positions and the angle alone, every 50 ms, and must make the velocities up from its memory.
Between samples its two thrusts are held, and the plant moves by two Runge-Kutta steps. A step of this loop is a cell,
whose state is [plant, memory, held thrusts], so that all of it is a `DiscreteProblem`. Its input is added to the
thrusts: by it one asks what any control could reach, and how robust the loop is, opened at the plant's input.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.linalg import block_diag
from scipy.signal import cont2discrete
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import PlanarQuadrotor

PLANT = PlanarQuadrotor()
HOVER = PLANT.mass * PLANT.gravity / 2  # N, of each rotor
EVERY, SUBSTEPS, SAMPLES, MEMORY = 0.05, 2, 60, 16
RANGE = torch.tensor([0.5, 0.5, 0.2, 0.3, 0.3, 0.5]).double()  # of the starts
Q, R = np.diag([1.0, 1.0, 0.3, 0.2, 0.2, 0.02]), 0.1 * np.eye(2)
TRIALS, PROBES = 4, 200  # random changes of the parameters
STEPS, QUICK_STEPS = (0, 60, 600), (0, 1, 2)
COST = control.QuadraticCost(
    EVERY * block_diag(Q, np.zeros((MEMORY, MEMORY)), R), target=np.r_[np.zeros(6 + MEMORY), HOVER, HOVER]
)


class SampledLoop(nn.Module):
    """[plant, memory, held thrusts] from one sample to the next; x is added to the thrusts."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.thrusts = nn.GRUCell(3, MEMORY), nn.Linear(MEMORY, 2)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        plant, memory, _ = state.split([6, MEMORY, 2], -1)
        memory = self.memory(plant[..., :3], memory)
        held = HOVER + self.thrusts(memory) + x
        for _ in range(SUBSTEPS):
            plant = runge_kutta(plant, held, EVERY / SUBSTEPS)
        return torch.cat([plant, memory, held], -1)


def runge_kutta(z: Tensor, u: Tensor, h: float) -> Tensor:
    first = PLANT(z, u)
    second = PLANT(z + h / 2 * first, u)
    third = PLANT(z + h / 2 * second, u)
    return z + h / 6 * (first + 2 * second + 2 * third + PLANT(z + h * third, u))


def problem_of(loop: nn.Module, start: Tensor, samples: int = SAMPLES) -> Any:
    begin = torch.cat([start, torch.zeros(len(start), MEMORY), torch.full((len(start), 2), HOVER)], -1)
    return kp.DiscreteProblem(loop, torch.zeros(len(start), samples, 2).double(), begin.double())


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
        state, total = problem.z0, torch.zeros((), dtype=torch.float64)
        for x in problem.x.unbind(1):
            state = loop(x, state)
            total = total + COST(state).mean()
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return kept


def regulator() -> tuple[control.Regulator, float]:
    """That of the sampled plant, which sees all states, and its cost from the starts of `ask`."""
    rest, thrust = torch.zeros(6).double(), torch.full((2,), HOVER).double()
    plant = control.linearize_lti(PLANT, rest, thrust)
    A, B, *_ = cont2discrete((plant.A, plant.B, np.eye(6), np.zeros((6, 2))), EVERY)
    best = control.dlqr((A, B, np.eye(6), 0, EVERY), EVERY * Q, EVERY * R)
    z, total = starts(TRIALS, torch.Generator().manual_seed(2)), 0.0
    for _ in range(SAMPLES):
        u = HOVER - z @ torch.from_numpy(best.K).T
        for _ in range(SUBSTEPS):
            z = runge_kutta(z, u, EVERY / SUBSTEPS)
        total += float(COST(torch.cat([z, torch.zeros(TRIALS, MEMORY).double(), u], -1)).mean())
    return best, total


def at_rest(sol: Any) -> tuple[float, control.DiskMargins]:
    """The largest pole of the loop where it rests near the origin, and its margins at the plant's input.

    An input added there gives S = 1 / (1 + L) from it to what the plant gets, the thrusts after the step:
    u_k = C z_{k+1} = C A z_k + C B x_k with C B = 1. So L = 1 / S - 1 is z' = (A - B C A) z + B u, y = -C A z.
    """
    near = torch.cat([sol.problem.z0[:1] * 0, sol.state[:, -1].detach()])
    near[0, -2:] = HOVER
    found = kp.dynamics.fixed_points(sol.problem, starts=near.numpy())
    found = found[found.is_fixed]
    if not len(found):
        return np.nan, control.DiskMargins(np.nan, np.nan, np.nan)
    rest = torch.from_numpy(found.xstar[np.abs(found.xstar[:, :6]).max(1).argmin()])
    loop = control.linearize_lti(sol.problem.cell, rest, torch.zeros(2).double(), dt=EVERY)
    size = float(abs(loop.poles).max())
    seen = loop.A[-2:]
    opened = control.LTI(loop.A - loop.B @ seen, loop.B, -seen, dt=EVERY)
    return size, control.disk_margins(opened) if size < 1 else control.DiskMargins(0.0, 0.0, 0.0)


def ask(loop: nn.Module) -> dict[str, Any]:
    problem, loss = control.training_cost(problem_of(loop, starts(TRIALS, torch.Generator().manual_seed(2))), COST)
    sol = kp.solve(problem)
    flow = kp.linearize(sol)
    pole, margins = at_rest(sol)
    reach = control.gram(sol, "c", inputs="x").W.values[:, :, :6, :6]
    changes = torch.randn(PROBES, flow.J.domain.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moved = flow.J.mv(changes)[..., :6].detach().numpy()
    learnt = np.einsum("pbtu,pbtv->btuv", moved, moved) / PROBES
    leading = np.linalg.eigh(reach)[1][..., -2:]
    inside = np.einsum("btuk,btuv,btvk->bt", leading, learnt, leading) / np.trace(learnt, axis1=2, axis2=3)
    lr = rate_of(loop, problem, loss)
    forecast = kp.forecast(flow, loss=loss, lr=lr, steps=20, check=False)
    parts = kp.contributions(flow)
    return {
        "cost": float(loss(sol.state)),
        "pole": pole,
        "margins": margins,
        "state": sol.state.detach().numpy(),
        "learnable": np.trace(learnt, axis1=2, axis2=3).mean(0),
        "reachable": np.trace(reach, axis1=2, axis2=3).mean(0),
        "inside": inside.mean(0),
        "forecast": float(forecast.loss[-1] / forecast.loss[0]),
        "lr": lr,
        "contributions": {name: part.value / parts.total.value for name, part in parts.items()},
    }


def unrolled(loop: nn.Module, problem: Any) -> Tensor:
    """The states [trial, time, unit], for autograd."""
    state, states = problem.z0, []
    for x in problem.x.unbind(1):
        states.append(state := loop(x, state))
    return torch.stack(states, 1)


def rate_of(loop: nn.Module, problem: Any, loss: Any) -> float:
    """A learning rate of which twenty steps take off a tenth of the cost, to first order."""
    value = loss(unrolled(loop, problem))
    gradient = torch.autograd.grad(value, list(loop.parameters()))
    return 0.1 * value.item() / (20 * sum(float((g**2).sum()) for g in gradient))


def steps_of_descent(loop: nn.Module, lr: float) -> float:
    """The cost after 20 real steps of gradient descent over that before."""
    problem, loss = control.training_cost(problem_of(loop, starts(TRIALS, torch.Generator().manual_seed(2))), COST)
    optimizer, values = torch.optim.SGD(loop.parameters(), lr), []
    for _ in range(21):
        value = loss(unrolled(loop, problem))
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return values[-1] / values[0]


def draw(path: Path, all_found: dict[int, dict[str, Any]], best: float) -> None:
    figure = Figure(figsize=(9, 7), layout="constrained")
    (flights, costs), (sizes, shares) = figure.subplots(2, 2)
    time = EVERY * np.arange(1, SAMPLES + 1)
    for (step, found), color in zip(all_found.items(), SERIES, strict=False):
        for number, trial in enumerate(found["state"][:4]):
            flights.plot(trial[:, 0], trial[:, 1], color=color, label=None if number else f"step {step}", linewidth=1.2)
        sizes.plot(time, found["learnable"], color=color, label=f"step {step}, learnable")
        sizes.plot(time, found["reachable"], ":", color=color, label=f"step {step}, reachable")
        shares.plot(time, 100 * found["inside"], color=color, label=f"step {step}")
    flights.set(xlabel="x (m)", ylabel="y (m)", xlim=(-1, 1), ylim=(-1, 1), title="Flights; all shall end at (0, 0)")
    steps = [str(step) for step in all_found]
    costs.bar(steps, [found["cost"] for found in all_found.values()], 0.6, color=SERIES[: len(steps)])
    costs.axhline(best, color="0.3", linestyle="--", label="regulator that sees all states")
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
    loop, all_found = SampledLoop().double(), {}
    best, cost = regulator()
    print(f"regulator of the sampled plant: cost {cost:.3g}, largest pole {abs(best.eigenvalues).max():.3f}")
    for step, values in train(loop, QUICK_STEPS if options.quick else STEPS).items():
        loop.load_state_dict(values)
        all_found[step] = found = ask(loop)
        margin, gain, phase = found["margins"]
        print(f"step {step}: cost {found['cost']:.3g}, largest pole at rest {found['pole']:.3f}")
        print(f"    disk margin {margin:.2f}: {gain:.1f} dB and {phase:.0f} degrees in both thrusts at once")
        print(
            "    shares of the trace: " + ", ".join(f"{n} {100 * s:.1f} %" for n, s in found["contributions"].items())
        )
        print(
            f"    learnable at the end {found['learnable'][-1]:.3g}, {100 * found['inside'][-1]:.0f} % reachable soon"
        )
        really = steps_of_descent(loop, found["lr"])
        guess = found["forecast"]
        print(f"    20 steps of descent leave {100 * really:.2f} % of the cost, by forecast {100 * guess:.2f} %")
    draw(out, all_found, cost)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
