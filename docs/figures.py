"""The figures of the documentation, and what its tutorials print. Six minutes for all.

python docs/figures.py                          # all of them, into docs/images
python docs/figures.py learning                 # one figure of the page on theory
python docs/figures.py gallery.md               # the figures of a page, made by the code above each of them
python docs/figures.py demo                     # two figures of the command
python docs/figures.py sweep_g                  # a part of the page of examples/sweep_g.toml; needs Chromium
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.figures._style import StyledFigure, muted, series, styled
from kpflow_dyn.models import MLPField

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
UNITS, TRIALS = 48, 12


def tanh_network(gain: float, channels: int, seed: int = 0) -> nn.RNN:
    """A tanh network with recurrent weights N(0, gain^2 / units)."""
    torch.manual_seed(seed)
    cell = nn.RNN(channels, UNITS, batch_first=True).double()
    nn.init.normal_(cell.get_parameter("weight_hh_l0"), std=gain / math.sqrt(UNITS))
    return cell


def memory_flow(gain: float) -> kp.Flow:
    """Such a network on trials of MemoryPro."""
    x = torch.from_numpy(memory().inputs)
    return kp.linearize(kp.solve(kp.DiscreteProblem(tanh_network(gain, x.shape[2]), x)))


def memory() -> kp.tasks.TaskData:
    """Trials of MemoryPro, short ones."""
    return kp.tasks.MemoryPro(fixation=4, stimulus=8, memory=12, response=8).sample(TRIALS, 0)


def panels(columns: int, height: float = 2.9, **shared: Any) -> tuple[Figure, Any]:
    """Axes side by side, for a page."""
    figure = StyledFigure(figsize=(3.1 * columns, height), layout="constrained")
    return figure, figure.subplots(1, columns, **shared)


@styled
def constraint(_: Any) -> Figure:
    """A step of gradient descent against -eta NTK grad_S L: their difference falls as eta."""
    flow, rates = memory_flow(1.0), np.logspace(-9, -4, 11)
    state, cell = flow.solution.state, flow.solution.problem.cell
    target = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = flow.as_parameters(flow.J.T.mv(target - state))
    defects = []
    for eta in rates:
        moved = states_after(cell, {name: eta * change for name, change in step.items()}, flow) - state
        predicted = eta * flow.ntk.mv(target - state)
        defects.append(float((moved - predicted).norm() / moved.norm()))
    figure, axes = panels(1, 3.0)
    figure.set_figwidth(4.8)
    axes.plot(rates, defects, "o-", markersize=4, label="measured")
    axes.plot(rates, defects[0] * rates / rates[0], color=muted(), linewidth=0.9, zorder=0, label="slope 1")
    axes.set(xscale="log", yscale="log", xlabel="Learning rate", ylabel="|moved - predicted| / |moved|")
    axes.legend()
    return figure


def states_after(cell: nn.Module, step: dict[str, torch.Tensor], flow: kp.Flow) -> torch.Tensor:
    """The states once the parameters have moved; they are put back."""
    before = {name: parameter.clone() for name, parameter in cell.state_dict().items()}
    cell.load_state_dict({name: value + step[name] for name, value in before.items()})
    states = kp.solve(flow.solution.problem).state
    cell.load_state_dict(before)
    return states


@styled
def core(_: Any) -> Figure:
    """V V^T over the times of two trials, and the eigenvalues of V^T V."""
    figure, (gram, spectrum) = panels(2)
    flow = memory_flow(1.0)
    V = flow.sites[0].inputs[:2].reshape(-1, flow.sites[0].inputs.shape[-1])
    image = gram.imshow((V @ V.T).numpy(), cmap="cividis", interpolation="none")
    gram.set(xlabel="Times of trial 1, then of trial 2", ylabel="The same", title="V V$^T$")
    gram.grid(visible=False)
    figure.colorbar(image, ax=gram)
    for gain, color in zip((0.5, 1.0, 1.5), series(), strict=False):
        values = memory_flow(gain).sites[0].gram_eigenvalues()
        spectrum.plot(1 + np.arange(len(values)), np.maximum(values, 1e-8), color=color, label=f"gain {gain}")
    spectrum.set(yscale="log", ylim=(1e-7, None), xlabel="Rank", title="Eigenvalues of V$^T$V")
    spectrum.legend()
    return figure


@styled
def propagator(_: Any) -> Figure:
    """|P[t, s]|, how a kick at s reaches t, in three networks."""
    gains = (0.5, 1.0, 1.5)
    figure, axes = panels(len(gains), 3.1, sharey=True)
    for gain, part in zip(gains, axes, strict=True):
        norms = kick_norms(memory_flow(gain).P)
        image = part.imshow(np.log10(np.maximum(norms, 1e-4)), cmap="cividis", vmin=-3, vmax=1, interpolation="none")
        part.set(xlabel="Time of the kick", title=f"gain {gain}")
        part.grid(visible=False)
    axes[0].set_ylabel("Time of the response")
    figure.colorbar(image, ax=axes, label="log$_{10}$ |P[t, s]|")
    return figure


def kick_norms(P: kp.Operator, kicks: int = 20) -> np.ndarray:
    """|P[t, s]|_F / sqrt(units) of the first trial, from random kicks at one time each."""
    _, times, units = P.domain.shape
    found = np.zeros((times, times))
    generator = torch.Generator().manual_seed(0)
    for s in range(times):
        q = torch.zeros(kicks, *P.domain.shape, dtype=torch.float64)
        q[:, 0, s] = torch.randn(kicks, units, generator=generator, dtype=torch.float64)
        found[:, s] = P.mv(q)[:, 0].square().sum((0, 2)).div(kicks * units).sqrt().numpy()
    return found


@styled
def modes(_: Any) -> Figure:
    """The leading temporal, spatial and trial modes of a network that has learnt MemoryPro."""
    flow, task = trained_flow(), memory()
    figure, (time, unit, trial) = panels(3)
    angles = np.argsort(task.labels["angle"])
    for axis, part in (("time", time), ("unit", unit), ("trial", trial)):
        found = kp.modes(flow.ntk, axis=axis, k=3)
        order = {"time": slice(None), "unit": found.vectors[0].argsort(), "trial": angles}[axis]
        style = "-" if axis == "time" else "o"
        for vector, share in zip(found.vectors.numpy(), found.explained, strict=True):
            part.plot(vector[order], style, label=f"{100 * float(share):.0f} %", linewidth=1.4, markersize=2.5)
        part.axhline(0, color=muted(), linewidth=0.8, zorder=0)
        part.set_ylim(top=1.4 * float(found.vectors.max()))
        part.legend(fontsize=8, ncols=3, loc="upper center", handlelength=1, columnspacing=1)
    time.set(title="Temporal modes", xlabel="Time step")
    unit.set(title="Spatial modes", xlabel="Unit, sorted by mode 1")
    trial.set(title="Trial modes", xlabel="Trial, by its angle", xticks=range(0, TRIALS, 3))
    return figure


def trained_flow() -> kp.Flow:
    """A GRU after 300 steps of Adam on MemoryPro."""
    task = memory()
    torch.manual_seed(0)
    cell, readout = nn.GRU(task.inputs.shape[2], UNITS).double(), nn.Linear(UNITS, task.targets.shape[2]).double()
    kp.train.fit(cell, task, readout, steps=300, lr=5e-3, clip=1.0)
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(task.inputs))))


@styled
def reductions(_: Any) -> Figure:
    """The spectrum of the partial trace over trials and units, and of the marginal on time."""
    figure, axes = panels(1, 3.0)
    figure.set_figwidth(4.8)
    x = torch.randn(TRIALS, 60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(tanh_network(0.9, 3), x)))
    trace, view = kp.partial_trace(flow.ntk, keep="time"), kp.marginal(flow.ntk, keep="time")
    for name, operator, marker in (("partial trace", trace, "o"), ("marginal", view, "s")):
        values, rank = np.asarray(kp.eigenvalues(operator)), kp.effective_rank(operator)
        label = f"{name}: effective rank {rank.value:.2f}"
        axes.plot(1 + np.arange(len(values)), values / values.sum(), marker=marker, markersize=4, label=label)
    axes.set(yscale="log", ylim=(1e-6, 2), xlabel="Rank", ylabel="Eigenvalue / trace")
    axes.legend()
    return figure


@styled
def measure(_: Any) -> Figure:
    """The largest eigenvalue of the NTK of a neural ODE by the number of steps, weighted and not."""
    figure, axes = panels(1, 3.0)
    figure.set_figwidth(4.8)
    torch.manual_seed(0)
    field, start = MLPField(2, hidden=16).double(), torch.randn(4, 2, dtype=torch.float64)
    steps, found = [8, 16, 32, 64, 128], []
    for count in steps:
        flow = kp.linearize(kp.solve(kp.ODEProblem(field, start, np.linspace(0, 2, count + 1)), "rk4"))
        found.append([float(kp.eigs(one.ntk, 1).values[0]) for one in (flow.nodal, flow)])
    for values, label in zip(np.transpose(found), ("each step counts as one", "integral over time"), strict=True):
        axes.plot(steps, values, "o-", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xticks=steps, xlabel="Steps on the same span", ylabel="Largest eigenvalue")
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    axes.legend()
    return figure


@styled
def learning(_: Any) -> Figure:
    """The forecast of a frozen kernel, the gradient flow, and descent itself."""
    torch.manual_seed(0)
    task = kp.tasks.FlipFlop(bits=1, steps=30).sample(TRIALS, 0)
    cell = tanh_network(0.9, task.inputs.shape[2])
    readout = nn.Linear(UNITS, task.targets.shape[2]).double()
    x, target = torch.from_numpy(task.inputs), torch.from_numpy(task.targets)
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
    found = kp.forecast(y, target, lr=0.0025, steps=2400)
    flow = kp.gradient_flow(kp.DiscreteProblem(cell, x), kp.squared_error(target, readout), span=6.0)
    descent = kp.train.fit(cell, task, readout, steps=2400, lr=0.0025, optimizer="sgd").losses
    figure, axes = panels(1, 3.0)
    figure.set_figwidth(4.8)
    axes.plot(descent, color=muted(), linewidth=4, alpha=0.5, label="gradient descent")
    axes.plot(found.steps, found.loss, label="frozen kernel")
    axes.plot(flow.time / 0.0025, flow.loss, "o:", markersize=4, linewidth=1, label="gradient flow, its steps")
    axes.axvline(found.holds_until, color=muted(), linewidth=0.8)
    axes.annotate("holds_until", (found.holds_until, descent[0]), (4, 0), textcoords="offset points", fontsize=8)
    axes.set(xlabel="Step of gradient descent", ylabel="Loss", yscale="log")
    axes.legend()
    return figure


DRAWN = {draw.__name__: draw for draw in (constraint, core, propagator, modes, reductions, measure, learning)}


SHOWN = re.compile(
    r"```python\n(?P<code>.*?)```\n"
    r'(?P<output>\n```text title="Output"\n.*?```\n)?'
    r"(?:\n!\[[^]]*\]\((?P<image>[^)]+)\))?",
    re.DOTALL,
)
"""A block of code, and what a page shows of it: what it prints, and the `figure` that it leaves."""
PAGES = [
    "gallery.md",
    "guides/features.md",
    "guides/learning_rules.md",
    *sorted(f"tutorials/{page.name}" for page in DOCS.glob("tutorials/*.md")),
]


def draw(page: Path) -> None:
    """Run the code of a page, and put what it prints and draws where the page shows it."""
    names: dict[str, Any] = {"__name__": "page"}

    def shown(block: re.Match[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(block["code"], names)  # our own
        if block["image"]:
            names["figure"].savefig(page.parent / block["image"], dpi=115)
        if not block["output"]:
            return block[0]
        return block[0].replace(block["output"], f'\n```text title="Output"\n{printed.getvalue()}```\n')

    text = SHOWN.sub(shown, page.read_text("utf-8"))
    page.write_text(text, "utf-8")


def photograph(page: Path, names: tuple[str, str], path: Path) -> None:
    """A picture of two figures of a page that stand side by side, as Chromium shows them."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        tab = browser.new_page(viewport={"width": 1110, "height": 900})
        tab.goto(page.as_uri())
        tab.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 0")
        tab.add_style_tag(content=".tools, .numbers { display: none !important }")
        left, right = (tab.locator(f"#{name}").bounding_box() or {} for name in names)
        width = right["x"] + right["width"] - left["x"]
        frame = {"x": left["x"], "y": left["y"], "width": width, "height": left["height"]}
        tab.screenshot(path=path, clip=frame, full_page=True)
        browser.close()


def command(*arguments: object, cwd: str) -> None:
    """Run kpflow-dyn in a folder."""
    called = [sys.executable, "-c", "from kpflow_dyn.cli import app; app()", *map(str, arguments)]
    subprocess.run(called, cwd=cwd, check=True)


def demo() -> None:
    """The temporal modes and the predicted losses of the demo's network."""
    with tempfile.TemporaryDirectory() as folder:
        command("demo", "--out", "demo", cwd=folder)
        for name in ("temporal_modes", "predicted_loss"):
            shutil.copy(Path(folder, "demo", f"{name}.png"), IMAGES / f"demo_{name}.png")


def sweep_g() -> None:
    """The figures along one axis and over two axes, of an example."""
    from kpflow_dyn.report import write_report

    example = DOCS.parent / "examples" / "sweep_g.toml"
    with tempfile.TemporaryDirectory() as folder:
        command("sweep", example, cwd=folder)
        page = Path(folder, "page.html")
        write_report(Path(folder, "runs", "sweep_g"), page)
        photograph(page, ("lines", "maps"), IMAGES / "sweep_g.png")


COMMANDS = {draw.__name__: draw for draw in (demo, sweep_g)}


def main() -> None:
    """Draw what the command line names, or all."""
    everything = [*DRAWN, *PAGES, *COMMANDS]
    parser = argparse.ArgumentParser(description="The figures of the documentation.")
    parser.add_argument("names", nargs="*", default=everything, help=f"of {', '.join(everything)}")
    for name in parser.parse_args().names:
        if name.endswith(".md"):
            draw(DOCS / name)
        elif name in COMMANDS:
            COMMANDS[name]()
        else:
            DRAWN[name](None).savefig(IMAGES / f"theory_{name}.png", dpi=115)


if __name__ == "__main__":
    main()
