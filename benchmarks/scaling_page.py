"""The rows of scaling.py as a page of the documentation: figures, exponents, and larger machines on paper."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scaling import BASE, FACTORS, FRAMEWORKS, LAST, WORKS, Row, Size, key

from kpflow_dyn.figures._style import StyledFigure, muted, series, styled

Rows = dict[str, Row]
NAMES = {"torch": "torch", "jax": "JAX"}
INTRO = """\
# How cost grows

Time and peak memory of a GRU's NTK, over each size by itself, in torch and in JAX. The page and its figures are made by

```sh
python benchmarks/scaling.py            # measures what benchmarks/scaling.json lacks, and writes this page
python benchmarks/scaling.py --again    # measures all of it
```

Around one point, {base}, one size at a time goes over a factor of 32; the parameters do by the number of inputs, while
the state stays as it is. All is in float32, on one thread of a CPU that does {rate:.0f} Gflop/s in a large matrix
product, and each point has a process of its own. Seconds are CPU time.

- **linearize, first**: `kp.linearize` of a solution, the first time in a process, with whatever is traced or compiled.
- **linearize**: the same once more.
- **ntk.mv**: one application of `flow.ntk` to a block of probes.
- **eigs**, **summary**: `kp.eigs(flow.ntk, k)` and `kp.summary(flow, k)` with the defaults, where k is the number of
  probes; with what is compiled before. Small operators are solved exactly, so that their curves begin with a bend.

## Time

![Time over each size](images/scaling_time.png)

Dashed: the flop count at the rate of a large matrix product. Of `ntk.mv` it is four products for each recurrent weight
and two for those of the inputs; of `linearize` a forward and a backward pass of the model; of `eigs` and `summary` that
of their applications (the number is another at each point, as the spectrum changes).

Exponents p, cost ~ size^p, fitted over the largest factor of 8; the last row of each work is that of the flop count.
Where the time has a smaller one, something beside the products still counts: calls, compilation, or products that are
too small for the machine. The rate is the median of torch's over all points; JAX's own may be above it.

{times}

## Memory

![Peak memory over each size](images/scaling_memory.png)

How far the process grew, results included. Dashed: the vectors of states that come back, 4 bytes for each number; of
`linearize` one. The exponents as above; the last row of each work is that of these vectors. Where a
process takes up memory that it had let go before, its growth reads too small, as at some points of `ntk.mv` in JAX.

{memory}

## Smallest and largest points

Seconds, and MiB in brackets; for eigs and summary the number of applications, too.

{ends}
"""


def seconds(framework: str, work: str, rows: Rows) -> Callable[[Size], float | None]:
    return lambda size: _entry(rows, framework, size, "seconds", work)


def memory(framework: str, work: str, rows: Rows) -> Callable[[Size], float | None]:
    return lambda size: _entry(rows, framework, size, "MiB", work)


def _entry(rows: Rows, framework: str, size: Size, kind: str, work: str) -> float | None:
    return rows.get(key(framework, size), {}).get(kind, {}).get(work)


def floor(framework: str, work: str, rows: Rows) -> Callable[[Size], float | None]:
    """Seconds of the flop count."""

    def of(size: Size) -> float | None:
        row = rows.get(key(framework, size))
        return size.flops(work, row["applications"].get(work, 1)) / rate_of(rows) if row else None

    return of


def returned(_framework: str, work: str, _rows: Rows) -> Callable[[Size], float | None]:
    """MiB of the vectors that come back."""
    return lambda size: 4 * size.returned(work) / 2**20


def rate_of(rows: Rows) -> float:
    return statistics.median(row["rate"] for row in rows.values())


def along(axis: str, cost: Callable[[Size], float | None]) -> tuple[np.ndarray, np.ndarray]:
    """The values of an axis where the cost is known and positive, and the cost."""
    found = [(getattr(size, axis), cost(size)) for size in FACTORS[axis]]
    pairs = [(value, y) for value, y in found if y]
    return np.array([value for value, _ in pairs]), np.array([y for _, y in pairs])


def exponent(axis: str, cost: Callable[[Size], float | None]) -> float | None:
    """p of the fit cost ~ size^p over the last points, None where some are not known."""
    values, y = along(axis, cost)
    last = {getattr(size, axis) for size in FACTORS[axis][-LAST:]}
    chosen = np.isin(values, list(last))
    if chosen.sum() < LAST:
        return None
    return float(np.polyfit(np.log(values[chosen]), np.log(y[chosen]), 1)[0])


def table(head: list[str], lines: list[list[str]]) -> str:
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rules, *lines])


def exponents(rows: Rows, cost: Any, reference: Any, name: str, works: list[str]) -> str:
    lines = []
    for work in works:
        for framework in FRAMEWORKS:
            of = cost(framework, work, rows)
            lines.append([f"{work}, {NAMES[framework]}", *(_number(exponent(axis, of)) for axis in FACTORS)])
        of = reference(FRAMEWORKS[0], work, rows)
        lines.append([f"*{work}, {name}*", *(f"*{_number(exponent(axis, of))}*" for axis in FACTORS)])
    return table(["", *FACTORS], lines)


def _number(p: float | None) -> str:
    return "-" if p is None else f"{p:.2f}".replace("-0.00", "0.00")


def ends(rows: Rows) -> str:
    """What the smallest and the largest point of each axis cost."""
    sizes = {
        f"{axis} = {getattr(size, axis):,}": size
        for axis in FACTORS
        for size in FACTORS[axis][:: len(FACTORS[axis]) - 1]
    }
    lines = [
        [f"{name}, {NAMES[framework]}", *(_cell(rows.get(key(framework, size)), work) for work in WORKS)]
        for name, size in sizes.items()
        for framework in FRAMEWORKS
    ]
    return table(["", *WORKS], lines)


def _cell(row: Row | None, work: str) -> str:
    if row is None:
        return "not measured"
    text = f"{row['seconds'][work]:.2g}" if row["seconds"][work] < 10 else f"{row['seconds'][work]:.0f}"
    if work in row["MiB"]:
        text += f" ({row['MiB'][work]:.0f})"
    return f"{text}, {row['applications'][work]}" if work in ("eigs", "summary") else text


def grid(rows: Rows, cost: Any, reference: Any, works: list[str], label: str) -> Figure:
    """A panel for each work and axis: both frameworks, and the reference dashed."""
    figure = StyledFigure(figsize=(11, 1.9 * len(works) + 0.7), layout="constrained")
    axes = figure.subplots(len(works), len(FACTORS), sharex="col", sharey="row")
    for line, work in zip(axes, works, strict=True):
        for panel, axis in zip(line, FACTORS, strict=True):
            for i, framework in enumerate(FRAMEWORKS):
                panel.loglog(
                    *along(axis, cost(framework, work, rows)), "o-", ms=3, color=series()[i], label=NAMES[framework]
                )
            panel.loglog(*along(axis, reference(FRAMEWORKS[0], work, rows)), "--", color=muted(), label=label)
            values = [getattr(size, axis) for size in FACTORS[axis]]
            panel.set_xticks(values[::2], [_short(value) for value in values[::2]])
            panel.minorticks_off()
        line[0].set_ylabel(f"{work}\n{'seconds' if cost is seconds else 'MiB'}")
    for panel, axis in zip(axes[-1], FACTORS, strict=True):
        panel.set_xlabel(axis)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def _short(value: int) -> str:
    return str(value) if value < 10_000 else f"{value / 1000:.0f}k"


def write(rows: Rows, page: Path) -> None:
    """The page, and its figures in images/ beside it."""
    images = page.with_name("images")
    images.mkdir(parents=True, exist_ok=True)
    figures = {
        "time": lambda rows: grid(rows, seconds, floor, WORKS, "flop count at the rate of a large product"),
        "memory": lambda rows: grid(rows, memory, returned, WORKS[1:], "what comes back"),
    }
    for name, draw in figures.items():
        styled(draw)(rows).savefig(images / f"scaling_{name}.png", dpi=150)
    page.write_text(text(rows))


def text(rows: Rows) -> str:
    """The page."""
    shape = f"{BASE.trials} trials x {BASE.times} times x {BASE.units} units"
    measured = INTRO.format(
        base=f"{shape} with {BASE.inputs} inputs and {BASE.probes} probes",
        rate=rate_of(rows) / 1e9,
        times=exponents(rows, seconds, floor, "flops", WORKS),
        memory=exponents(rows, memory, returned, "vectors", WORKS[1:]),
        ends=ends(rows),
    )
    return measured + "\n" + on_paper()


# On paper


@dataclass(frozen=True)
class Machine:
    """Accelerators of a kind: flops a second in float32, and bytes a second of memory, to the host, to each other."""

    name: str
    count: int
    link: float
    flops: float = 67e12
    memory: float = 3.35e12
    host: float = 64e9
    room: float = 80e9


MACHINES = [
    Machine("one H100", 1, math.inf),
    Machine("8 GPUs (NVLink)", 8, 450e9),
    Machine("64 hosts of 8 (InfiniBand)", 512, 50e9),
]
TRIALS, TIMES, UNITS, SHARE, PAIRS_COST, BLOCK = 10**3, 10**4, 10**4, 0.8, 100, 16
MODELS = {"tanh RNN": (1, 2), "GRU": (3, 6)}  # matrices of units x units; kept states' worth of numbers
PAPER = """\
## On paper: 10,000 units x 10,000 steps x 1,000 trials

No GPU was measured. This is what the products and the exchanged bytes allow, with the data sheet of an H100 SXM: 67
Tflop/s in float32 (TF32 would lose the small eigenvalues), 3.35 TB/s to its 80 GB, 64 GB/s to the host (PCIe 5), 450
GB/s each way between the GPUs of a host (NVLink), 50 GB/s for each GPU between hosts (InfiniBand, 400 Gbit/s).

With B trials, T steps, n units, m matrices of n x n (1 of a tanh RNN, 3 of a GRU), b probes and p GPUs:

1. **Products.** One application of the NTK to one probe takes four products of 2 B T n^2 flops for each matrix: the
   recurrence backward and dW in J*, V dW^T and the recurrence forward in J. That is 8 m B T n^2 = {flops}. The time
   assumes {share:.0%} of the rate.
2. **Reading W.** Half of these flops are one step after another. Each step reads all of W again, 4 m n^2 = {weights},
   for the B b / p rows of a GPU. In both sweeps together that takes {reading}, however few the rows are; from {rows}
   rows on the products take longer. On 512 GPUs, with two trials each, that means {least} probes at once.
3. **Exchange.** Trials are sharded, and nothing but the gradient dW crosses GPUs: once in each application, between J*
   and J, 4 m n^2 bytes for each probe. A ring all-reduce sends 2 (p - 1) / p of them over each link.
4. **Memory.** A state is 4 B T n = {state}. A tanh RNN keeps two of them (V and phi'), a GRU six; q and the result are
   one each for each probe. On 64 hosts (41 TB) that fits. One GPU, or eight (0.64 TB), would have it in the memory of
   the host, take some trials at a time (J* of all of them first, then J), and move 2 x (kept + b) states over PCIe in
   each application, while it computes.

One application to a block of b probes takes max(products / 2, reading W) + products / 2 + exchange, or the traffic with
the host, if that takes longer:

{table}

Twenty eigenpairs take about {pairs} applications to one probe each. Their basis, 50 vectors of the parameters, is
{basis} on each GPU, or a share of that if it is sharded, too.

What stands in the way: each step of a sweep is a few kernels of some microseconds, so 2 T = 20,000 steps cost at least
0.1 to 0.4 s whatever the number of GPUs, about as much as the products of one probe on 512 of them. kpflow_dyn shards
trials in JAX ([several devices](guides/gpu.md#jax-over-several-devices)), and its compiled programs exchange nothing
but this sum of gradients. It does not stream trials from the memory of the host: one GPU, or eight, can do this size
only with a part of the trials. More probes at once make better use of many GPUs; more GPUs than trials are of no use.
"""


def application(machine: Machine, m: int, kept: int, probes: int) -> dict[str, float]:
    """Seconds of one application to a block of probes, and of its parts."""
    weights, state = 4 * m * UNITS**2, 4 * TRIALS * TIMES * UNITS
    products = 8 * m * TRIALS * TIMES * UNITS**2 * probes / (machine.count * SHARE * machine.flops)
    reading = 2 * TIMES * weights / machine.memory
    exchange = 2 * (machine.count - 1) / machine.count * weights * probes / machine.link
    held = (kept + 2 * probes) * state / machine.count
    host = 0.0 if held < machine.room else 2 * (kept + probes) * state / (machine.count * machine.host)
    total = max(max(products / 2, reading) + products / 2 + exchange, host)
    return {"products": products, "reading W": reading, "exchange": exchange, "host": host, "together": total}


def on_paper() -> str:
    """The last section of the page."""
    lines = []
    for model, (m, kept) in MODELS.items():
        for machine in MACHINES:
            for probes in (1, BLOCK):
                parts = application(machine, m, kept, probes)
                pairs = parts["together"] / probes * PAIRS_COST
                lines.append([f"{model}, {machine.name}", str(probes), *map(_time, parts.values()), _time(pairs)])
    rnn, _ = MODELS["tanh RNN"]
    rate, memory = SHARE * MACHINES[0].flops, MACHINES[0].memory
    rows = math.ceil(2 * rate / memory)
    weights = 4 * rnn * UNITS**2
    return PAPER.format(
        flops=f"8e15 m, so 8e15 / ({SHARE} x 67e12) = {8e15 / rate:.0f} s for a tanh RNN on one H100",
        share=SHARE,
        weights=f"{weights / 1e6:.0f} MB x m",
        reading=f"2 x {TIMES} x {weights:.0e} / 3.35e12 = {2 * TIMES * weights / memory:.1f} s x m",
        rows=rows,
        least=rows // 2,
        state=f"{4 * TRIALS * TIMES * UNITS / 1e9:.0f} GB",
        pairs=PAIRS_COST,
        basis=f"50 x {weights / 1e6:.0f} MB x m = {50 * weights / 1e9:.0f} GB x m",
        table=table(["", "probes", "products", "reading W", "exchange", "host", "together", "20 pairs"], lines),
    )


def _time(seconds: float) -> str:
    if seconds == 0:
        return "-"
    for unit, size in {"h": 3600, "min": 60}.items():
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
