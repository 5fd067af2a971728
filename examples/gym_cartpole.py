"""Balance gymnasium's CartPole with a policy that was trained on a plant, and ask what its training could still change.

    python examples/gym_cartpole.py --out cartpole.png                    # trains for a minute, saves a figure
    python examples/gym_cartpole.py --quick                               # takes the weights that ship
    python examples/gym_cartpole.py --save kpflow_dyn/data/cartpole.safetensors    # how they were made

The policy, a small network, learns by differentiating through the ODE of the cart and its pole, with a force of any
size. gymnasium then integrates by Euler steps and takes the sign of the force alone, at 10 N. That works since the
training minimises a quadratic cost: a linear-quadratic regulator stays stable however much its gain grows, and the sign
is the limit. The NTK is that of the smooth loop: its state are position, angle and their velocities.
The same numbers as a page: kpflow-dyn analyze --problem examples/gym_cartpole.py:problem
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torchdiffeq import odeint

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import ClosedLoop

ENVIRONMENT, METHOD, STEPS, EPISODES = "CartPole-v1", "rk4", 150, 20
TIMES = np.linspace(0.0, 4.0, 81)  # seconds
START = torch.tensor([[0.05, 0.05, 0, 0], [-0.3, 0.1, 0, 0], [0.5, 0, 0.3, 0], [0, -0.1, 0, 0.4]], dtype=torch.float64)
RANGE = torch.tensor([0.5, 0.15, 0.5, 0.5], dtype=torch.float64)  # of starts in training
COST = torch.tensor([1.0, 10.0, 0.1, 0.1], dtype=torch.float64)  # of the squares of position, angle, their velocities


def untrained() -> Any:
    """The policy in closed loop with the environment's plant."""
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    return ClosedLoop(kp.gym.gym_plant(ENVIRONMENT), policy)


def shipped() -> Any:
    """The loop with the weights that ship, which were read without running any code of theirs."""
    loop = untrained()
    loop.policy.load_state_dict(load(files("kpflow_dyn").joinpath("data/cartpole.safetensors").read_bytes()))
    return loop


def solve(loop: nn.Module, start: Tensor, times: np.ndarray) -> Tensor:
    """The state [time, trial, unit] from the starts, by classical Runge-Kutta steps between the times."""
    found = odeint(loop, start, torch.from_numpy(times), method=METHOD)
    assert isinstance(found, Tensor)
    return found


def train(loop: Any, steps: int = STEPS) -> Any:
    """Bring new random starts to rest at the origin, the horizon growing over the first half of the steps."""
    optimizer, generator = torch.optim.Adam(loop.parameters(), lr=2e-2), torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        start = RANGE * (2 * torch.rand(32, 4, generator=generator, dtype=torch.float64) - 1)
        state = solve(loop, start, TIMES[: 11 + 2 * step * len(TIMES) // steps])
        loss = (COST * state.square()).sum(-1).mean() + 1e-3 * loop.policy(state).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(loop.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return loop


def problem() -> kp.Solution:
    """The shipped loop on its times, for the command line."""
    return solution_of(shipped())


def solution_of(loop: nn.Module) -> kp.Solution:
    return kp.solve(kp.ODEProblem(loop, START, TIMES), METHOD)


def draw(path: Path, episodes: dict[str, kp.gym.Episodes], flows: dict[str, kp.Flow]) -> None:
    """Above the angles in gymnasium, below the temporal modes of the NTK, of which the legend says the shares."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    rows = figure.subplots(2, 2, sharey="row")
    for when, angles, modes in zip(flows, *rows, strict=True):
        run, flow = episodes[when], flows[when]
        angles.set_title(f"{when} training: {run.lengths.mean():.0f} steps on average")
        angles.plot(run.states.time, run.states.sel(state="angle").T, color=SERIES[0], alpha=0.4, linewidth=0.8)
        angles.set(xlabel="Time in gymnasium (s)")
        found = kp.modes(flow.ntk, axis="time", k=3)
        for mode, share, color in zip(found.vectors, found.explained, SERIES, strict=False):
            modes.plot(TIMES, mode * mode[mode.abs().argmax()].sign(), color=color, label=f"{100 * float(share):.2g} %")
        modes.legend(title="Mode with its share of the trace", ncols=3, loc="upper left", frameon=False)
        modes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        modes.set(xlabel="Time on the plant (s)", xlim=(TIMES[0], TIMES[-1]))
    rows[0, 0].set(ylabel="Angle (rad), 0 is upright")
    rows[1, 0].set(ylabel="Temporal mode (s$^{-1/2}$)")
    low, high = rows[1, 0].get_ylim()
    rows[1, 0].set_ylim(low, high + 0.4 * (high - low))
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="A controller of gymnasium's CartPole, before and after training.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default cartpole.png in a new temporary folder")
    parser.add_argument("--save", type=Path, help="safetensors file to write the trained weights to")
    parser.add_argument("--quick", action="store_true", help="take the weights that ship and do not train")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "cartpole.png"

    loops = {"Before": untrained(), "After": shipped() if options.quick else train(untrained())}
    episodes, flows = {}, {}
    for when, loop in loops.items():
        episodes[when] = run = kp.gym.rollout(loop, ENVIRONMENT, EPISODES)
        flows[when] = flow = kp.linearize(solution_of(loop))
        rank = kp.effective_rank(kp.partial_trace(flow.ntk, keep="time"))
        print(f"{when} training: {run.lengths.min()} to {run.lengths.max()} steps of 500 in {EPISODES} episodes")
        print(f"    temporal effective rank {rank.value:.2f} of {len(TIMES)}, trace {kp.trace(flow.ntk).value:.3g}")
        print(f"    leading eigenvalues of the NTK: {kp.eigs(flow.ntk, k=4).values.numpy().round(4)}")
    assert (episodes["After"].lengths == 500).all() and not episodes["After"].terminated.any()
    if options.save:
        save_file(loops["After"].policy.state_dict(), options.save)
        print(f"wrote {options.save} ({options.save.stat().st_size / 1000:.1f} kB)")
    draw(out, episodes, flows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
