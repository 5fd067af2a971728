"""What gradient descent can do near a bifurcation: the effective rank of the NTK falls to that of the normal form.

    python examples/papers/rank_at_bifurcation.py --out bifurcations.png

Expected (Hazelden, Shea-Brown, arXiv 2605.12763; the operators are those of 2605.08746): near a bifurcation P amplifies
the critical directions alone, so that of all parameters those of the normal form are left. At a fold that is one, which
shifts the fixed point: rank 1. At a Neimark-Sacker bifurcation, the Hopf bifurcation of maps, it is a complex one, the
growth rate and the frequency of an oscillation in a plane: rank 2.

The model is z' = tanh(W z + b) with a fixed point z* planted at it, whose Jacobian A = diag(1 - z*^2) W has critical
eigenvalues 1 - d, or (1 - d) exp(+-0.6 i), and all others within [-1/2, 1/2], in random orthogonal directions.
- Fold: trials rest near z*, W and b learn. Then state changes are (1 - A)^{-1} of what W and b change at z*, which
  gives the rank in closed form (for many more steps than 1 / d).
- Neimark-Sacker: trials ring down to z* = 0 from small states of any phase, W learns. Two more cases limit the claim.
  On the cycle beyond the bifurcation, amplitudes are held and phases are not: rank 1, of changes in a plane still. And
  a bias that learns as well shifts the fixed point, which no resonance amplifies but which lasts: rank 2 then needs
  oscillations that are large beside d.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

UNITS, TRIALS, STEPS, ANGLE = 10, 3, 1000, 0.6
DISTANCES, QUICK = np.geomspace(0.3, 3e-3, 7), np.array([0.03])
COLUMNS = ("fold, NTK", "units", "in closed form", "ringing, NTK", "units", "and bias", "cycle, NTK", "units")


def network(critical: Tensor, fixed: Tensor, seed: int = 0) -> nn.RNNCell:
    """A cell with this fixed point, whose Jacobian there has this block and smaller eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(UNITS, UNITS, generator=generator, dtype=torch.float64))[0]
    spectrum = torch.diag(torch.rand(UNITS, generator=generator, dtype=torch.float64) - 0.5)
    spectrum[: len(critical), : len(critical)] = critical
    W = basis @ spectrum @ basis.T / (1 - fixed**2)[:, None]
    cell = nn.RNNCell(1, UNITS).double()
    for parameter, value in zip(
        cell.parameters(), (torch.zeros(UNITS, 1), W, 0, fixed.atanh() - W @ fixed), strict=True
    ):
        parameter.data[:] = torch.as_tensor(value)
    return cell


def run(cell: nn.RNNCell, start: Tensor, steps: int) -> kp.Solution:
    return kp.solve(kp.DiscreteProblem(cell, torch.zeros(len(start), steps, 1, dtype=torch.float64), start))


def ranks(solution: kp.Solution, params: list[str]) -> tuple[float, float]:
    """Effective ranks of the NTK, and of its partial trace on the units; exact, as J has few columns."""
    ntk = kp.linearize(solution, params=params).ntk
    return kp.effective_rank(ntk).value, kp.effective_rank(kp.partial_trace(ntk, keep="unit")).value


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def fold(distance: float) -> tuple[float, float, float]:
    """The two ranks at rest near the fixed point, and what (1 - A)^{-1} says of them."""
    fixed = torch.tanh(normal(UNITS))
    cell = network(torch.full((1, 1), 1 - distance, dtype=torch.float64), fixed)
    slope = torch.diag(1 - fixed**2)
    response = torch.linalg.solve(torch.eye(UNITS) - slope @ cell.weight_hh.detach(), slope)
    squares = torch.linalg.svdvals(response) ** 2
    solution = run(cell, fixed + 0.05 * distance * normal(TRIALS, UNITS), STEPS)
    return *ranks(solution, ["weight_hh", "bias_hh"]), float(squares.sum() ** 2 / (squares**2).sum())


def turning(radius: float) -> nn.RNNCell:
    cos, sin = np.cos(ANGLE), np.sin(ANGLE)
    return network(radius * torch.tensor([[cos, -sin], [sin, cos]]), torch.zeros(UNITS, dtype=torch.float64))


def neimark_sacker(distance: float) -> tuple[float, ...]:
    """The two ranks while ringing down before the bifurcation, that with a bias, and the two on the cycle beyond."""
    start = 0.05 * normal(TRIALS, UNITS)
    ringing, beyond = run(turning(1 - distance), start, STEPS), turning(1 + distance)
    cycle = run(beyond, run(beyond, start, int(10 / distance)).state[:, -1], STEPS)
    with_bias = ranks(ringing, ["weight_hh", "bias_hh"])[0]
    return *ranks(ringing, ["weight_hh"]), with_bias, *ranks(cycle, ["weight_hh"])


def draw(path: Path, distances: np.ndarray, found: np.ndarray) -> None:
    """Ranks [distance, column] on both sides."""
    figure = Figure(figsize=(8, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    curves = (
        (left, 0, SERIES[0], "o-", "NTK"),
        (left, 2, "0.3", "x", "in closed form"),
        (right, 5, "0.6", "s:", "ringing, a bias learns too"),
        (right, 3, SERIES[0], "o-", "ringing: NTK"),
        (right, 4, SERIES[2], "^--", "ringing: units"),
        (right, 6, SERIES[1], "D-", "on the cycle: NTK"),
    )
    for axes, column, color, style, label in curves:
        axes.plot(distances, found[:, column], style, color=color, label=label, markersize=4.5)
    for axes, title, limit in ((left, "Fold", 1), (right, "Neimark-Sacker", 2)):
        axes.axhline(limit, color="0.6", linewidth=0.8, zorder=0)
        axes.set(title=title, xscale="log", yscale="log", xlabel=r"Distance $|1 - |\lambda||$ to the bifurcation")
        axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.minorticks_off()
        axes.legend(frameon=False)
    left.set(ylabel="Effective rank")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Effective rank of the NTK near a fold and a Neimark-Sacker bifurcation."
    )
    parser.add_argument("--out", type=Path, help="PNG to write; by default bifurcations.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="one distance, to see that it runs")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "bifurcations.png"
    distances = QUICK if options.quick else DISTANCES

    print("effective ranks\ndistance", *(f"{name:>14}" for name in COLUMNS))
    found = np.zeros((0, len(COLUMNS)))
    for distance in distances:
        found = np.vstack([found, [*fold(distance), *neimark_sacker(distance)]])
        print(f"{distance:8.3g}", *(f"{rank:14.3f}" for rank in found[-1]))
    print(f"expected towards the bifurcation: 1 at a fold, found {found[-1, 0]:.3f}; 2 before a cycle, found", end=" ")
    print(f"{found[-1, 3]:.3f} (changes of the units: {found[-1, 4]:.3f}); on the cycle 1, found {found[-1, 6]:.3f}")
    np.testing.assert_allclose(found[-1, [0, 3, 4, 6]], [1, 2, 2, 1], rtol=0.25)
    np.testing.assert_allclose(found[:, 0], found[:, 2], rtol=0.02)
    draw(out, distances, found)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
