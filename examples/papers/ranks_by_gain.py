"""Effective ranks of K, P and the NTK of recurrent networks by the gain of their weights. A few minutes.

    python examples/papers/ranks_by_gain.py --out gains.png    # --full: the authors' sizes, half an hour

Expected: K = B (V V^T (x) I) B* is known from a forward pass (arXiv 2605.08746); of a leaky-current network B is the
leak a alone, so that all eigenvalues of K are a^2 times those of V^T V, each once for every unit. K is of low rank, P
is not, and the NTK is bound by K (arXiv 2507.06381).

Found: the spectrum of K from V alone is right to round-off. The rest holds for small gains only, where P is near the
identity and the NTK's rank is K's. Towards chaos (RNN, g > 1; GRU, g > 2) the rank of K rises by an order of magnitude
and more, as V fills with the activity of all units, while that of P falls to that of a few exploding directions, 2 to
3: there P is the bottleneck. The NTK's rank never exceeds the smaller of the two, and falls throughout.

Networks have 256 units and recurrent weights N(0, g^2 / 256), other weights as torch draws them; they see 20 trials of
MemoryPro. Ranks are those of K and of the NTK on all trials, times and units, and of P P*.
Theirs (effrank_verify_math, simplicity_bias): 256 units, torch's recurrent weights U(-1/16, 1/16) times 0 to 3 for
nn.RNN (20 values) and 0 to 10 for nn.GRU (10 values), 20 trials of 90 steps, 100 samples. `--full` takes all of these;
g is then the standard deviation of their weights times 16, 0.58 of the factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from study import Claim, begin
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES
from kpflow_dyn.models import CTRNNCell

UNITS, LEAK = 256, 0.2
CELLS = {"RNN": nn.RNNCell, "GRU": nn.GRUCell}
NAMES = ("core", "K", "P", "NTK")
UNIFORM = 3**-0.5  # the standard deviation of torch's weights, times the root of the number of units


@dataclass(frozen=True)
class Setting:
    """Gains [cell], and whether weights are uniform or normal; both have the variance g^2 / units."""

    trials: int
    samples: int
    gains: tuple[tuple[float, ...], tuple[float, ...]]
    uniform: bool


def even(last: float, count: int) -> tuple[float, ...]:
    return tuple(np.linspace(0, last, count).tolist())


QUICK = Setting(1, 40, (even(2.5, 2), even(10, 2)), uniform=False)
OURS = Setting(8, 40, (even(3, 7), even(10, 6)), uniform=False)
AUTHORS = Setting(20, 100, (even(3 * UNIFORM, 20), even(10 * UNIFORM, 10)), uniform=True)


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


def ranks(make: type[nn.Module], gain: float, setting: Setting) -> list[kp.Estimate]:
    """Effective ranks, exact from V alone for the core and estimated for K, P and the NTK."""
    torch.manual_seed(0)
    cell = make(3, UNITS)
    weights, size = cell.get_parameter("weight_hh"), gain / UNITS**0.5
    if setting.uniform:
        nn.init.uniform_(weights, -size / UNIFORM, size / UNIFORM)
    else:
        nn.init.normal_(weights, 0, size)
    flow = linearized(cell, setting.trials)
    estimates = [kp.effective_rank(op, samples=setting.samples) for op in (flow.K, flow.P, flow.ntk)]
    return [kp.effective_rank(flow.core), *estimates]


def sweep(name: str, gains: tuple[float, ...], setting: Setting) -> np.ndarray:
    """Ranks [gain, name], printed."""
    found = []
    print(f"\n{name}: effective ranks (+- standard error)\ngain", *(f"{column:>16}" for column in NAMES))
    for gain in gains:
        each = ranks(CELLS[name], gain, setting)
        found.append([float(rank) for rank in each])
        print(f"{gain:4.2f}", *(f"{rank.value:10.1f} +- {rank.stderr:2.0f}" for rank in each), flush=True)
    return np.array(found)


def draw(
    path: Path, known: np.ndarray, found: np.ndarray, sweeps: dict[str, tuple[tuple[float, ...], np.ndarray]]
) -> None:
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


def claims_of(name: str, table: np.ndarray) -> list[Claim]:
    """Of ranks [gain, name]."""
    (_, low_k, low_p, _), (_, high_k, high_p, _) = table[[0, -1]]
    above = (table[:, 3] / table[:, 1:3].min(1)).max()
    return [
        Claim(
            f"{name}: K is of lower rank than P, at all gains",
            f"K {low_k:.0f}, P {low_p:.0f} at the smallest gain; K {high_k:.0f}, P {high_p:.0f} at the largest",
            bool((table[:, 1] < table[:, 2]).all()),
        ),
        Claim(
            f"{name}: the NTK's rank is at most that of K",
            f"at most {(table[:, 3] / table[:, 1]).max():.2f} of it, and {above:.2f} of the smaller of K and P",
            bool((table[:, 3] < 1.05 * table[:, 1]).all()),
        ),
    ]


def main() -> None:
    study = begin("Effective ranks of K, P and the NTK by gain.", "gains.png", quick=QUICK, ours=OURS, authors=AUTHORS)
    setting = study.setting
    known, found = spectra(1.5)
    off = float(np.abs(known / found - 1).max())
    claims = [Claim("all eigenvalues of K follow from V alone, to 1e-8", f"to {off:.1e}", off < 1e-8)]
    sweeps = {n: (gains, sweep(n, gains, setting)) for n, gains in zip(CELLS, setting.gains, strict=True)}
    claims += [claim for name, (_, table) in sweeps.items() for claim in claims_of(name, table)]
    draw(study.out, known, found, sweeps)
    numbers = {name: {"gains": gains, "ranks": table} for name, (gains, table) in sweeps.items()}
    study.finish(claims, {"operators": NAMES, **numbers})


if __name__ == "__main__":
    main()
