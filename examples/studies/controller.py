"""What can this controller still learn? A quadrotor's policy before, during and after training.

    python examples/studies/controller.py --out controller.png    # two minutes
    python examples/studies/controller.py --quick                 # a few steps of training, to see that it runs

A small network gives the thrusts of a planar quadrotor, which shall come to hover at the origin. At three times of its
training the loop is asked: where does it hover, and is that stable (fixed points and poles, beside those of the
linear-quadratic regulator); how much it costs and how robust it is (`control.analyze`: cost-to-go, margins, the modes
that carry what it costs more than the regulator); what the weights can still change beside what any input could (the
NTK of the flight and the Gramian of the plant); what descent on the cost does next; and how soon it would learn four
wishes, each a change of the flight. They are asked again of a loop whose
biases do not learn: what a weight multiplies fades where the quadrotor hovers, so that it is the biases that soon tell
it to hover elsewhere. The wishes that are learnt soon are then learnt in earnest, by the gradient flow itself.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.interpolate import CubicSpline
from torch import Tensor, nn
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn import control
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import ClosedLoop, PlanarQuadrotor

PLANT = PlanarQuadrotor()
HOVER = PLANT.mass * PLANT.gravity / 2  # N, of each rotor
TIMES, METHOD = np.linspace(0.0, 4.0, 81), "rk4"
START = torch.tensor(
    [[1, 0, 0, 0, 0, 0], [-0.5, 0.8, 0, 0, 0, 0], [0, -1, 0.3, 0, 0, 0], [0.3, 0, 0, 0, 1, -2]]
).double()
RANGE = torch.tensor([1, 1, 0.3, 0.5, 0.5, 1]).double()  # of the starts in training
Q, R = np.diag([1.0, 1.0, 0.3, 0.2, 0.2, 0.02]), 0.1 * np.eye(2)
COST = control.QuadraticCost(Q, R, u_target=[HOVER, HOVER])
SPAN = 100.0  # of tau, for a wish that is learnt in earnest
DESCENT = 20  # steps of gradient descent, whose effect on the cost is forecast
STEPS, QUICK_STEPS = (0, 60, 600), (0, 2, 6)
LATER = torch.from_numpy(np.clip(TIMES / 2.0, 0, 1) ** 3)  # a change that comes on over two seconds
SEEN = np.eye(6)[:3]  # x, y and the angle


class Policy(nn.Module):
    """u = hover + W_2 tanh(W_1 z + b_1) + b_2, in N."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 32), nn.Linear(32, 2)

    def forward(self, z: Tensor) -> Tensor:
        return HOVER + self.outer(torch.tanh(self.inner(z)))


@dataclass
class Found:
    """What was asked of a loop at one time of its training."""

    solution: kp.Solution
    cost: float
    hover: np.ndarray | None
    slowest: float
    contributions: dict[str, float]
    loop: control.LoopAnalysis
    forecast: tuple[float, float]
    wishes: kp.Learnability
    without_bias: kp.Learnability


def untrained() -> Any:
    torch.manual_seed(0)
    return ClosedLoop(PLANT, Policy().double())


def solve(loop: nn.Module, start: Tensor, times: np.ndarray) -> Tensor:
    """The state [time, trial, unit]."""
    found = odeint(loop, start, torch.from_numpy(times), method=METHOD)
    assert isinstance(found, Tensor)
    return found


def cost_rate(state: Tensor, thrust: Tensor) -> Tensor:
    q, r = torch.from_numpy(np.diag(Q).copy()), torch.from_numpy(np.diag(R).copy())
    return (q * state**2).sum(-1) + (r * (thrust - HOVER) ** 2).sum(-1)


def train(loop: Any, steps: tuple[int, ...]) -> dict[int, dict[str, Tensor]]:
    """The parameters at these steps of Adam on random starts, the horizon growing over the first half."""
    optimizer, generator = torch.optim.Adam(loop.parameters(), lr=1e-2), torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps[-1])
    kept = {}
    for step in range(steps[-1] + 1):
        if step in steps:
            kept[step] = {name: value.clone() for name, value in loop.state_dict().items()}
        start = RANGE * (2 * torch.rand(32, 6, generator=generator, dtype=torch.float64) - 1)
        state = solve(loop, start, TIMES[: 21 + min(60, 120 * step // steps[-1])])
        loss = cost_rate(state, loop.policy(state)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return kept


def ask(loop: Any) -> Found:
    problem = kp.ODEProblem(loop, START, TIMES)
    solution = kp.solve(problem, METHOD)
    flow = kp.linearize(solution)
    hover, slowest = hovering(problem)
    analysis = control.analyze(solution, COST, rank=3)
    parts = kp.contributions(flow)
    return Found(
        solution=solution,
        cost=float(analysis["cost"].mean()),
        hover=hover,
        slowest=slowest,
        contributions={name: part.value / parts.total.value for name, part in parts.items()},
        loop=analysis,
        forecast=descent(loop),
        wishes=learnt_soon(flow),
        without_bias=learnt_soon(flow.only(lambda name: "bias" not in name)),
    )


def descent(loop: Any) -> tuple[float, float]:
    """What 20 steps of gradient descent leave of the cost: by the frozen kernel, and really.

    The learning rate is such that they take off a tenth to first order.
    """
    problem, loss = control.training_cost(kp.ODEProblem(loop, START, TIMES), COST)
    trained = copy.deepcopy(problem.f)
    values, lr = [], 0.0
    for _ in range(DESCENT + 1):
        value = loss(solve(trained, problem.z0, TIMES).transpose(0, 1))
        gradient = torch.autograd.grad(value, list(trained.parameters()))
        lr = lr or 0.1 * value.item() / (DESCENT * sum(float((g**2).sum()) for g in gradient))
        values.append(value.item())
        with torch.no_grad():
            for parameter, slope in zip(trained.parameters(), gradient, strict=True):
                parameter -= lr * slope
    flow = kp.linearize(kp.solve(problem, METHOD))
    found = kp.forecast(flow, loss=loss, lr=lr, steps=DESCENT, check=False)
    return float(found.loss[-1] / found.loss[0]), values[-1] / values[0]


def learnt_soon(flow: kp.Flow) -> kp.Learnability:
    seen = flow.output(SEEN)
    return kp.learnability(seen, wishes(seen.values), errors=True)


def hovering(problem: kp.ODEProblem) -> tuple[np.ndarray | None, float]:
    """Where the loop rests near the origin, and the slowest pole there: its largest real part."""
    found = kp.dynamics.fixed_points(problem, starts=0.3 * np.random.default_rng(0).standard_normal((64, 6)))
    near = found[found.is_fixed]
    if not len(near):
        return None, np.nan
    rest = near.xstar[np.abs(near.xstar).max(1).argmin()]
    return rest, float(control.linearize_lti(problem.f, torch.from_numpy(rest)).poles.real.max())


def wishes(y: Tensor) -> dict[str, Tensor]:
    """Changes of the flight's x, y and angle [trial, time, out]: what is to be taken off."""
    aside, higher, level, sooner = (torch.zeros_like(y) for _ in range(4))
    aside[..., 0], higher[..., 1] = LATER, LATER
    level[..., 2] = LATER * y[..., 2]
    sooner[..., :2] = y[..., :2] - quicker(y[..., :2])
    return {"hover to the side": aside, "hover higher": higher, "come sooner": sooner, "stay level": level}


def quicker(y: Tensor, factor: float = 1.1) -> Tensor:
    """The same flight, a tenth faster: y(1.1 t), up to the end of the times."""
    then = np.minimum(factor * TIMES, TIMES[-1])
    found = CubicSpline(TIMES, y.detach().numpy(), axis=1)(then)
    return torch.from_numpy(found)


def really(loop: Any, found: Found, name: str) -> float:
    """tau at which the gradient flow of the parameters themselves has halved a wish; infinite if later than SPAN."""
    state = found.solution.state.detach()
    error = torch.zeros_like(state)
    error[..., :3] = wishes(state[..., :3])[name]
    weights = np.ones(state.shape) * np.asarray(found.solution.weights)[:, None] * (np.arange(6) < 3)
    loss = kp.squared_error(state - error, mask=weights)
    with warnings.catch_warnings(action="ignore"):  # of a flow that is stopped
        flow = kp.gradient_flow(found.solution, loss, span=SPAN, stop_below=0.5, rtol=3e-2)
    return flow.time_to(0.5)


def regulator() -> tuple[float, np.ndarray]:
    """The cost of the linear-quadratic regulator from the same starts, and its poles."""
    rest, thrust = torch.zeros(6, dtype=torch.float64), torch.full((2,), HOVER, dtype=torch.float64)
    plant = control.linearize_lti(PLANT, rest, thrust)
    assert np.linalg.matrix_rank(control.ctrb(plant.A, plant.B)) == 6
    best = control.lqr(plant.A, plant.B, Q, R)
    law = nn.Linear(6, 2).double()
    with torch.no_grad():
        law.weight.copy_(torch.from_numpy(-best.K))
        law.bias.fill_(HOVER)
    solution = kp.solve(kp.ODEProblem(ClosedLoop(PLANT, law), START, TIMES), METHOD)
    return float(control.adjoint(solution, COST).cost.mean()), best.eigenvalues


def tell(step: int, found: Found) -> None:
    rest = "nowhere near" if found.hover is None else f"at {np.abs(found.hover[:2]).max():.2g} m off"
    print(f"step {step}: cost {found.cost:.3g}, hovers {rest}, slowest pole {found.slowest:+.2f} 1/s")
    print("    shares of the trace: " + ", ".join(f"{n} {100 * s:.1f} %" for n, s in found.contributions.items()))
    print("    " + str(found.loop).replace("\n", "\n    "))
    gain = found.loop["gain_margin_low"].values.round(2), found.loop["gain_margin_high"].values.round(2)
    print(f"    gains of the thrusts may fall to {gain[0]} and rise to {gain[1]}")
    print(f"    excess by mode: {found.loop['excess'].values.round(4)} at {found.loop['excess_pole'].values.round(2)}")
    predicted, real = found.forecast
    print(f"    20 steps of descent leave {100 * real:.2f} % of the cost, by forecast {100 * predicted:.2f} %")
    for name, half, still in zip(found.wishes.names, found.wishes.half, found.without_bias.half, strict=True):
        print(f"    {name:18} tau to half {half:9.3g}, with the biases fixed {still:9.3g}")


def draw(path: Path, all_found: dict[int, Found], best: float) -> None:
    figure = Figure(figsize=(9, 10), layout="constrained")
    (flights, costs), (learnt, shares), (margins, times) = figure.subplots(3, 2)
    for (step, found), color in zip(all_found.items(), SERIES, strict=False):
        data = found.loop.data
        inside = 100 * data.learnable_reachable.mean("trial")
        learnt.plot(data.time, inside, color=color, label=f"step {step}")
        along = data.disk_margin_along.mean("trial").dropna("time")
        margins.plot(along.time, along, "o-", color=color, markersize=4, label=f"step {step}")
    learnt.set(xlabel="Time (s)", ylabel="Learnable in the three\nmost reachable (%)", ylim=(0, 105))
    margins.set(xlabel="Time (s)", ylabel="Disk margin of the loop\nlinearised there", ylim=(0, None))
    for axes in (learnt, margins):
        axes.legend(fontsize=8, frameon=False)
    for (step, found), color in zip(all_found.items(), SERIES, strict=False):
        for number, trial in enumerate(found.solution.state.detach().numpy()):
            label = f"step {step}" if number == 0 else None
            flights.plot(trial[:, 0], trial[:, 1], color=color, linewidth=1.2, label=label)
            flights.plot(*trial[0, :2], "o", color=color, markersize=4)
    flights.set(xlabel="x (m)", ylabel="y (m)", xlim=(-2, 2), ylim=(-2, 2), title="Flights; all shall end at (0, 0)")
    flights.legend(fontsize=8, frameon=False)
    steps = [str(step) for step in all_found]
    costs.bar(steps, [found.cost for found in all_found.values()], width=0.6, color=SERIES[: len(steps)])
    costs.axhline(best, color="0.3", linestyle="--", label="linear-quadratic regulator")
    costs.set(yscale="log", xlabel="Step of training", ylabel="Cost")
    costs.legend(fontsize=8, frameon=False)
    bottom = np.zeros(len(steps))
    for name, color in zip(next(iter(all_found.values())).contributions, [*SERIES, "0.6"], strict=False):
        part = np.array([100 * found.contributions[name] for found in all_found.values()])
        shares.bar(steps, part, 0.6, bottom=bottom, color=color, label=name.removeprefix("policy."))
        bottom += part
    shares.set(xlabel="Step of training", ylabel="Share of the trace of the NTK (%)", ylim=(0, 135))
    shares.legend(fontsize=8, frameon=False, ncols=2)
    names = next(iter(all_found.values())).wishes.names
    for place, ((step, found), color) in enumerate(zip(all_found.items(), SERIES, strict=False)):
        rows = np.arange(len(names)) + 0.25 * (place - 1)
        times.plot(found.wishes.half, rows, "o", color=color, label=f"step {step}")
        times.plot(found.without_bias.half, rows, "o", color=color, fillstyle="none")
    times.set_yticks(range(len(names)), names)
    times.set_ylim(-0.5, len(names) - 0.5)
    times.set(
        xscale="log", xlabel="tau to half of a wish", title="discs: all weights learn, rings: no biases"
    )  # a wish that is never learnt has no mark
    times.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a quadrotor's controller can still learn.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default controller.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="a few steps of training, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "controller.png"

    best, poles = regulator()
    print(f"linear-quadratic regulator: cost {best:.3g}, slowest pole {poles.real.max():+.2f} 1/s")
    loop, all_found = untrained(), {}
    for step, values in train(loop, QUICK_STEPS if options.quick else STEPS).items():
        loop.load_state_dict(values)
        all_found[step] = found = ask(loop)
        tell(step, found)
    last = all_found[max(all_found)]
    for name, half in zip(last.wishes.names, last.wishes.half, strict=True):
        if half < SPAN and not options.quick:
            in_earnest = really(loop, last, name)
            print(f"{name}: forecast tau to half {half:.3g}, by the gradient flow itself {in_earnest:.3g}")
    draw(out, all_found, best)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
