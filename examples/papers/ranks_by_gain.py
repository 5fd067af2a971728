"""Effective ranks of K, P and the NTK of recurrent networks by the gain of their weights. A few minutes.

    python examples/papers/ranks_by_gain.py --out gains.png

Expected: K = B (V V^T (x) I) B* is known from a forward pass (arXiv 2605.08746); of a leaky-current network B is the
leak a alone, so that all eigenvalues of K are a^2 times those of V^T V, each once for every unit. K is of low rank, P
is not, and the NTK is bound by K (arXiv 2507.06381).

Found: the spectrum of K from V alone is right to round-off. The rest holds for small gains only, where P is near the
identity and the NTK's rank is K's. Towards chaos (RNN, g > 1; GRU, g > 2) the rank of K rises by an order of magnitude
and more, as V fills with the activity of all units, while that of P falls to that of a few exploding directions, 2 to
3: there P is the bottleneck. The NTK's rank never exceeds the smaller of the two, and falls throughout.

Networks have 256 units and recurrent weights N(0, g^2 / 256), other weights as torch draws them; they see 20 trials of
MemoryPro. Ranks are those of K and of the NTK on all trials, times and units, and of P P*.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import CTRNNCell

UNITS, SAMPLES, LEAK = 256, 40, 0.2
CELLS = {"RNN": (nn.RNNCell, np.linspace(0, 3, 13)), "GRU": (nn.GRUCell, np.linspace(0, 10, 11))}
NAMES = ("core", "K", "P", "NTK")


def linearized(cell: nn.Module, trials: int) -> kp.Flow:
    """In float64, since P grows exponentially with time at large gains."""
    x = torch.from_numpy(kp.tasks.make_task("memorypro", trials=trials).inputs)
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell.double(), x)))


def spectra(gain: float) -> tuple[np.ndarray, np.ndarray]:
    """All nonzero eigenvalues of K of a leaky-current network of 16 units: from V alone, and of K itself."""
    torch.manual_seed(0)
    flow = linearized(CTRNNCell(3, 16, alpha=LEAK, gain=gain), trials=4)
    known = np.sort(np.repeat(*flow.core.spectrum()))[::-1]
    return LEAK**2 * known, kp.eigenvalues(flow.K).numpy()[: len(known)]


def ranks(make: type[nn.Module], gain: float, trials: int) -> list[kp.Estimate]:
    """Effective ranks, exact from V alone for the core and estimated for K, P and the NTK."""
    torch.manual_seed(0)
    cell = make(3, UNITS)
    nn.init.normal_(cell.get_parameter("weight_hh"), 0, gain / UNITS**0.5)
    flow = linearized(cell, trials)
    estimates = [kp.effective_rank(op, samples=SAMPLES) for op in (flow.K, flow.P, flow.ntk)]
    return [kp.effective_rank(flow.core), *estimates]


def sweep(name: str, gains: np.ndarray, trials: int) -> np.ndarray:
    """Ranks [gain, name], printed."""
    found = []
    print(f"\n{name}: effective ranks (+- standard error)\ngain", *(f"{column:>16}" for column in NAMES))
    for gain in gains:
        each = ranks(CELLS[name][0], gain, trials)
        found.append([float(rank) for rank in each])
        print(f"{gain:4.2f}", *(f"{rank.value:10.1f} +- {rank.stderr:2.0f}" for rank in each), flush=True)
    return np.array(found)


def draw(path: Path, known: np.ndarray, found: np.ndarray, sweeps: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """The two spectra, and ranks [gain, name] of each network by gain."""
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    left, *panels = figure.subplots(1, 1 + len(sweeps))
    order = 1 + np.arange(len(known))
    left.plot(order, found, "o", color=SERIES[1], markersize=4, label="eigenvalues of K")
    left.plot(order, known, color="0.1", linewidth=1, label=r"$a^2$ eig $V^TV$, each 16 times")
    left.set(title="Leaky network, 16 units", yscale="log", xlabel="Rank of the eigenvalue", ylabel="Eigenvalue of K")
    left.legend(frameon=False)
    for axes, (name, (gains, table)) in zip(panels, sweeps.items(), strict=True):
        for values, label, color, style in zip(table.T, NAMES, ("0.5", *SERIES), (":", "o-", "s-", "^-"), strict=False):
            axes.plot(gains, values, style, color=color, markersize=4, label=label)
        axes.set(title=f"{name}, {UNITS} units", yscale="log", xlabel="Gain g", ylabel="Effective rank")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Effective ranks of K, P and the NTK by the gain of the weights.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default gains.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="the outermost gains and one trial, to see that it runs")
    parser.add_argument("--full", action="store_true", help="20 trials and twice as many gains, ten minutes")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "gains.png"

    known, found = spectra(1.5)
    print(f"all eigenvalues of K from V alone: expected to round-off, found to {np.abs(known / found - 1).max():.1e}")
    np.testing.assert_allclose(found, known, rtol=1e-8, atol=1e-12 * known[0])
    trials, every = (1, 10) if options.quick else (20, 1) if options.full else (8, 2)
    grids = {name: gains[::every] for name, (_, gains) in CELLS.items()}
    sweeps = {name: (gains, sweep(name, gains, trials)) for name, gains in grids.items()}
    for name, (_, table) in sweeps.items():
        low, high = table[0], table[-1]
        print(
            f"\n{name}: K {low[1]:.0f}, P {low[2]:.0f} at the smallest gain, as expected; {high[1]:.0f}, {high[2]:.0f}",
            end=" ",
        )
        print(f"at the largest; NTK at most {(table[:, 3] / table[:, 1:3].min(1)).max():.2f} of the smaller of the two")
        assert low[2] > low[1]
        assert (table[:, 3] < 1.05 * table[:, 1:3].min(1)).all()
    draw(out, known, found, sweeps)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
