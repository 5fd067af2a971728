"""Do planted fixed points, or Shampoo, let a noisy memory task be learnt? Two minutes.

    python examples/papers/noisy_starts.py --out starts.png    # --full: theirs, hours on a CPU

Expected (arXiv 2605.08746, mem_pro_init_example): the joint modes over trials and times of the NTK show what a start
can learn. With no planted points they hold no memory of the direction, and plain descent stalls with the third mode of
the target not learnt; five planted points learn more, and Shampoo more than plain descent from the same start.

Theirs: z' = 0.3 z + 0.7 (W tanh(z) + U x), 256 units, no bias, torch's weights (g = 1); 0, 5 and 30 planted points
N(0, 1), one after the other, of which the last is exact and the others nearly; MemoryPro of 3 x 30 steps, the stimulus
on from the start, noise of 0.14; batches of 500 of 5,000 trials, SGD and Shampoo at 0.01 (a folder's name; the default
is 0.001), up to 10,000 steps or a loss of 1e-3, no clipping; 0 and 5 points trained. Joint modes of 40 trials without
noise; parts |u_i^T y| / s_i of the target's modes, target = sum s_i u_i v_i^T. That
norm also counts what outputs other than v_i do, and is not 0 at a planted start. Claims here are of u_i^T y v_i / s_i,
which is 1 once a mode is learnt and may be negative; theirs is saved beside it.
Here all planted points are exact, and Shampoo is that of its paper without momentum, 1e-4 added to its factors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from study import Claim, begin
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

PLANTED, TRAINED = (0, 5, 30), (0, 5)


@dataclass(frozen=True)
class Setting:
    units: int
    pool: int
    batch: int
    lr: float
    steps: int
    every: int
    trials: int


QUICK = Setting(32, 8, 4, 0.01, 2, 1, 3)
OURS = Setting(64, 500, 50, 0.01, 500, 50, 12)
AUTHORS = Setting(256, 5000, 500, 0.01, 10_000, 100, 40)


class Shampoo(torch.optim.Optimizer):
    """W' = -lr L^(-1/4) G R^(-1/4) with L, R the sums of G G^T and G^T G (Gupta, Koren, Singer, arXiv 1802.09568)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if closure is not None:
            raise TypeError("this Shampoo takes no closure")
        for group in self.param_groups:
            for parameter in (one for one in group["params"] if one.grad is not None):
                self._move(parameter, group["lr"])

    def _move(self, parameter: nn.Parameter, lr: float) -> None:
        assert parameter.grad is not None
        gradient, state = parameter.grad.reshape(len(parameter), -1), self.state[parameter]
        for name, factor in (("left", gradient @ gradient.T), ("right", gradient.T @ gradient)):
            state[name] = state.get(name, 1e-4 * torch.eye(len(factor), dtype=factor.dtype)) + factor
        step = root(state["left"]) @ gradient @ root(state["right"])
        parameter.sub_(lr * step.reshape(parameter.shape))


def root(factor: Tensor) -> Tensor:
    """factor^(-1/4) of a positive matrix."""
    values, vectors = torch.linalg.eigh(factor)
    return vectors * values.clamp_min(1e-12) ** -0.25 @ vectors.T


OPTIMISERS = {"sgd": "sgd", "Shampoo": Shampoo}


class Cell(nn.Module):
    """z' = (1 - dt) z + dt (W tanh(z) + U x)."""

    def __init__(self, units: int, dt: float = 0.7) -> None:
        super().__init__()
        self.W, self.U, self.dt = nn.Linear(units, units, bias=False), nn.Linear(3, units, bias=False), dt

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (1 - self.dt) * z + self.dt * (self.W(z.tanh()) + self.U(x))


def start(units: int, points: int) -> tuple[Cell, nn.Linear]:
    """Weights of torch's nn.Linear but for what W tanh(z) = z at the planted points asks for."""
    torch.manual_seed(0)
    cell, readout = Cell(units), nn.Linear(units, 3)
    if points:
        z = torch.randn(units, points)
        with torch.no_grad():
            cell.W.weight += (z - cell.W(z.tanh().T).T) @ torch.linalg.pinv(z.tanh())
        assert (cell.W(z.tanh().T).T - z).abs().max() < 1e-3
    return cell, readout


def task(noise: float) -> kp.tasks.MemoryPro:
    return kp.tasks.MemoryPro(fixation=0, stimulus=30, memory=30, response=30, noise=noise)


def ended(cell: Cell, x: Tensor) -> Tensor:
    """States [trial, time, unit] from zero."""
    return kp.solve(kp.DiscreteProblem(cell, x, torch.zeros(len(x), cell.W.in_features))).state


def joint_modes(cell: Cell, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the trace, and the three leading modes [mode, trial, time] of the NTK over trials and times."""
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, torch.zeros(len(x), cell.W.in_features))))
    traced = kp.partial_trace(flow.ntk, keep=("trial", "time"), samples=40)
    found = kp.eigs(traced, k=3)
    return found.values.numpy() / float(kp.trace(traced)), found.vectors.numpy().reshape(3, *x.shape[:2])


def learnt(cell: Cell, readout: nn.Linear, test: kp.tasks.TaskData) -> dict[str, np.ndarray]:
    """u_i^T y v_i / s_i of the three modes of the target over trials and times, and the authors' |u_i^T y| / s_i."""
    modes, sizes, outputs = np.linalg.svd(test.targets.reshape(-1, 3), full_matrices=False)
    with torch.no_grad():
        y = readout(ended(cell, torch.from_numpy(test.inputs).float())).numpy().reshape(-1, 3)
    parts = modes.T @ y / sizes[:, None]
    return {"learnt": (parts * outputs).sum(1), "norm": np.linalg.norm(parts, axis=1)}


def trained(points: int, optimiser: str, data: Any, test: Any, setting: Setting) -> dict[str, list[Any]]:
    """Steps, losses of the batches and learnt parts along the training."""
    found: dict[str, list[Any]] = {"step": [], "loss": [], "learnt": [], "norm": []}

    def record(step: int, cell: Any, loss: float, readout: Any) -> None:
        if step % setting.every == 0:
            for name, value in {"step": step, "loss": float(loss), **learnt(cell, readout, test)}.items():
                found[name].append(value)

    cell, readout = start(setting.units, points)
    kp.train.fit(
        cell,
        data,
        readout,
        steps=setting.steps,
        lr=setting.lr,
        optimizer=OPTIMISERS[optimiser],
        batch=setting.batch,
        stop_below=1e-3,
        record=record,
        z0=torch.zeros(setting.units),
        progress=True,
    )
    return found


def draw(path: Path, modes: dict[int, tuple[np.ndarray, np.ndarray]], runs: dict[tuple[int, str], Any]) -> None:
    """Above joint modes of each start, one line for each trial; below losses and the learnt part of the third mode."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = (part.subplots(1, n) for part, n in zip(figure.subfigures(2, 1), (3, 2), strict=True))
    for axes, (points, (shares, found)) in zip(above, modes.items(), strict=True):
        for mode, color, share in zip(found, SERIES, shares, strict=False):
            axes.plot(mode.T, color=color, linewidth=0.7)
            axes.plot([], [], color=color, label=f"{100 * share:.2g} %")
        axes.set(
            title=f"{points} planted points", xlabel="Time step", ylabel="Joint mode of the NTK" if points == 0 else ""
        )
        axes.legend(frameon=False, ncols=3, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    for (points, optimiser), run in runs.items():
        style = {"color": SERIES[list(OPTIMISERS).index(optimiser)], "linestyle": "-" if points else "--"}
        below[0].plot(run["step"], run["loss"], label=f"{optimiser}, {points} points", **style)
        below[1].plot(run["step"], np.array(run["learnt"])[:, 2], **style)
    below[0].set(xlabel="Step", ylabel="Loss", yscale="log")
    below[1].set(xlabel="Step", ylabel="Learnt part of the third mode")
    below[0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    study = begin("Planted starts on noisy trials.", "starts.png", quick=QUICK, ours=OURS, authors=AUTHORS)
    setting, modes = study.setting, {}
    test = task(noise=0.0).sample(setting.trials, seed=0)
    for points in PLANTED:
        modes[points] = joint_modes(start(setting.units, points)[0], torch.from_numpy(test.inputs).float())
        print(f"{points:2} planted points: shares of the joint modes", *(f"{share:.3f}" for share in modes[points][0]))
    data = task(noise=0.1 * 2**0.5).sample(setting.pool, seed=1)
    runs = {(n, name): trained(n, name, data, test, setting) for n in TRAINED for name in OPTIMISERS}
    for (points, name), run in runs.items():
        parts = " ".join(f"{part:.2f}" for part in run["learnt"][-1])
        print(f"{points} points, {name}: loss {run['loss'][0]:.4f} to {run['loss'][-1]:.4f}; learnt {parts}")

    third = {case: run["learnt"][-1][2] for case, run in runs.items()}
    plain, planted = third[0, "sgd"], third[5, "sgd"]
    claims = [
        Claim(
            "plain descent without planted points leaves the third mode of the target: below 0.2",
            f"{plain:.2f}",
            plain < 0.2,
        ),
        Claim("five planted points learn more of it", f"{planted:.2f} beside {plain:.2f}", planted > plain),
        Claim(
            "Shampoo learns more of it than plain descent from the same start",
            ", ".join(f"{n} points: {third[n, 'Shampoo']:.2f} beside {third[n, 'sgd']:.2f}" for n in TRAINED),
            all(third[n, "Shampoo"] > third[n, "sgd"] for n in TRAINED),
        ),
    ]
    draw(study.out, modes, runs)
    shares = {str(n): found[0] for n, found in modes.items()}
    study.finish(claims, {"shares": shares, "runs": {f"{n} {name}": run for (n, name), run in runs.items()}})


if __name__ == "__main__":
    main()
