"""How many applications of the NTK does its trace take? Errors and speed-ups of all estimators. Five minutes.

    python examples/papers/trace_speed.py --out traces.png

Expected (Hazelden, arXiv 2511.10796): random probes give the trace of the NTK orders of magnitude faster than all rows
of J, by one side of the factorisation J J* alone where samples are few, and by Hutch++ where they are many.

Found: on noise 8 to 32 applications give the trace to 1 %, hundreds to thousands of times faster than all rows of J,
and 128 to more than 512 to 0.1 %, 3 to 50 times faster. None reaches 0.001 % within 512. The error of probes is
sqrt(2 / (m er)) for m applications and an effective rank er, and while m is far below er no sketch helps: inputs that
are noise make the NTK flat, er in the thousands, and 0.001 % would take more than all rows of J. Inputs of few
dimensions have it the other way round: 1 % takes more, but for m > er sketches are up to 80 times better than
Hutchinson (XNysTrace: 0.004 % at 512, 0.0007 % at 1024). Hutch++ is never the best; one side alone, which the default
takes, is where samples are few.

Protocol: the exact trace is that of all rows of J, by automatic differentiation trial by trial; errors are medians over
independent seeds, and an estimator has reached a tolerance from the first number of applications on from which on the
median stays below it. An application is one of J and one of J*. Speed-ups are ratios of processor times, to the direct
trace trial by trial, and beside it of applications to all of the rows or columns of J, which is what a direct
trace takes that does not know that trials are independent.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kpflow_dyn as kp
from kpflow_dyn.figures import SERIES

GRU_UNITS = 48
TOLERANCES = (1e-2, 1e-3, 1e-5)
METHODS = {
    "Hutchinson": kp.solvers.Hutchinson(),
    "Hutch++": kp.solvers.HutchPlusPlus(),
    "XTrace": kp.solvers.XTrace(),
    "XNysTrace": kp.solvers.XNysTrace(),
    "default": None,
}
STYLES = dict(zip(METHODS, zip([*SERIES, "0.1"], "osD^x", strict=True), strict=True))
Problem = kp.StaticProblem | kp.DiscreteProblem


def mlp() -> Problem:
    """15 tanh layers of 64 units, 50 trials of 100 inputs; the state are all layers."""
    widths = (100, *15 * (64,))
    layers = [m for sizes in itertools.pairwise(widths) for m in (nn.Linear(*sizes), nn.Tanh())]
    return kp.StaticProblem(nn.Sequential(*layers), torch.randn(50, 100))


def gru(inputs: Callable[[], Tensor]) -> Problem:
    """A GRU of 14,544 parameters, on 10 trials of 50 steps of 51 inputs."""
    return kp.DiscreteProblem(nn.GRUCell(51, GRU_UNITS), inputs())


def noise() -> Tensor:
    return torch.randn(10, 50, 51)


def signals() -> Tensor:
    """The 51 channels of a linear system of 4 dimensions."""
    task = kp.tasks.LowRankForecast(channels=51, rank=4, steps=50).sample(trials=10)
    return torch.from_numpy(task.inputs).float()


MODELS = {"MLP on noise": mlp, "GRU on noise": lambda: gru(noise), "GRU on signals": lambda: gru(signals)}


class States(nn.Module):
    """The state of one trial [row, unit]: all layers' values, or the states at all times."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.net if isinstance(problem, kp.StaticProblem) else problem.cell

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.model, nn.Sequential):
            return torch.stack(list(itertools.accumulate(self.model, lambda h, layer: layer(h), initial=x))[1::2])
        z = itertools.accumulate(x, lambda z, x_t: self.model(x_t[None], z), initial=x.new_zeros(1, GRU_UNITS))
        return torch.cat(list(z)[1:])


def direct(problem: Problem) -> float:
    """|J|_F^2 from all rows of J, by automatic differentiation of one trial after another."""
    states = States(problem)
    parameters = {name: parameter.detach() for name, parameter in states.named_parameters()}
    rows = jacrev(lambda values, x: functional_call(states, values, (x,)), chunk_size=240)
    return sum(float(J.square().sum(dtype=torch.float64)) for x in problem.x for J in rows(parameters, x).values())


def measure(flow: kp.Flow, trace: float, counts: list[int], repeats: int) -> np.ndarray:
    """Applications, median of the relative error, and of the seconds: [method, count, 3]."""
    return np.array([[_median(flow, trace, alg, m, repeats) for m in counts] for alg in METHODS.values()])


def _median(flow: kp.Flow, trace: float, alg: object, samples: int, repeats: int) -> np.ndarray:
    runs = []
    for seed in range(repeats):
        start = time.process_time()
        found = kp.trace(flow.ntk, samples=samples, seed=seed, alg=alg)
        runs.append((found.applications, abs(found.value / trace - 1), time.process_time() - start))
    return np.median(runs, axis=0)


def reached(found: np.ndarray, tolerance: float) -> np.ndarray | None:
    """Of one method [count, 3]: the first row from which on errors stay below the tolerance."""
    above = np.flatnonzero(found[:, 1] > tolerance)
    first = above[-1] + 1 if above.size else 0
    return found[first] if first < len(found) else None


def report(found: np.ndarray, rows: int, seconds: float) -> None:
    print(f"{'':12}" + "".join(f"{f'to {100 * tolerance:g} %':>34}" for tolerance in TOLERANCES))
    print(f"{'':12}" + 3 * f"{'applications':>14}{'faster by':>10}{'rows by':>10}")
    for name, each in zip(METHODS, found, strict=True):
        cells = [_cell(reached(each, tolerance), each, rows, seconds) for tolerance in TOLERANCES]
        print(f"{name:12}" + "".join(cells))


def _cell(row: np.ndarray | None, each: np.ndarray, rows: int, seconds: float) -> str:
    if row is None:
        return f"{f'> {each[-1, 0]:.0f}':>14}{'':20}"
    return f"{row[0]:14.0f}{seconds / row[2]:9.1f}x{rows / 2 / row[0]:9.0f}x"


def draw(path: Path, results: dict[str, tuple[np.ndarray, float]]) -> None:
    """Errors against applications, [method, count, 3] of each model, beside those of independent probes."""
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    for axes, (model, (found, rank)) in zip(panels, results.items(), strict=True):
        for (name, (color, marker)), each in zip(STYLES.items(), found, strict=True):
            axes.plot(each[:, 0], 100 * each[:, 1], color=color, marker=marker, markersize=4.5, label=name)
        counts = np.unique(found[..., 0])
        axes.plot(counts, 67.4 * np.sqrt(2 / counts / rank), ":", color="0.5", label=r"$0.67\sqrt{2 / (m\,er)}$")
        for tolerance in TOLERANCES:
            axes.axhline(100 * tolerance, color="0.85", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", title=f"{model}, er = {rank:.0f}", xlabel="Applications of the NTK")
        axes.set_xticks([8, 32, 128, 512], ["8", "32", "128", "512"])
        axes.minorticks_off()
    panels[0].set(ylabel="Median error of the trace (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="Errors and speed-ups of estimators of the trace of the NTK.")
    parser.add_argument("--out", type=Path, help="PNG to write; by default traces.png in a new temporary folder")
    parser.add_argument("--quick", action="store_true", help="few applications of one model, to see that it runs")
    parser.add_argument("--full", action="store_true", help="up to 1024 applications and 15 seeds, half an hour")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp()) / "traces.png"
    counts, repeats = ([8, 16], 3) if options.quick else ([8, 32, 128, 512], 5)
    counts, repeats = ([*counts, 1024], 15) if options.full else (counts, repeats)

    results = {}
    for model, make in list(MODELS.items())[-1 if options.quick else 0 :]:
        torch.manual_seed(0)
        problem = make()
        problem = problem.remake(x=problem.x[:1]) if options.quick else problem
        start = time.process_time()
        trace, seconds = direct(problem), time.process_time() - start
        start = time.process_time()
        flow = kp.linearize(kp.solve(problem))
        linearising = time.process_time() - start
        print(f"\n{model}: {seconds:.1f} s for all rows of J, trial by trial; {linearising:.1f} s to linearise")
        rank, rows = kp.effective_rank(flow.ntk).value, min(flow.ntk.domain.size, flow.J.domain.size)
        print(
            f"trace {trace:.6g}, effective rank {rank:.0f}; median errors below a tolerance from which application on"
        )
        found = measure(flow, trace, counts, repeats)
        report(found, rows, seconds)
        results[model] = found, rank
        predicted = 0.674 * np.sqrt(2 / found[0, :, 0] / rank)
        assert 0.4 < np.exp(np.log(found[0, :, 1] / predicted).mean()) < 2.5
        assert reached(found[-1], TOLERANCES[0] * (10 if options.quick else 1)) is not None
    draw(out, results)
    print(f"\nwrote {out}")


if __name__ == "__main__":
    main()
