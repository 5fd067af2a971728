"""How time and peak memory of a GRU's NTK grow: over trials, times, units, probes, parameters, in torch and in JAX.

    python benchmarks/scaling.py            (all points that are not measured yet)
    python benchmarks/scaling.py --again    (all of them)

Says first what it will cost. Each point is a fresh process on one thread, and is written to benchmarks/scaling.json as
it ends, so that after a kill the same command goes on. Seconds are CPU time. The rows there make docs/scaling.md and
its figures; the page says what is measured, and what follows on paper for machines that are far larger.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "scaling.json"
LIMIT = 900.0  # seconds for one point
FRAMEWORKS = ["torch", "jax"]
WORKS = ["linearize, first", "linearize", "ntk.mv", "eigs", "summary"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Of one point; probes is also how many pairs eigs and summary look for."""

    trials: int = 16
    times: int = 64
    units: int = 64
    inputs: int = 14
    probes: int = 8

    @property
    def parameters(self) -> int:
        return 3 * self.units * (self.units + self.inputs + 2)

    @property
    def state(self) -> int:
        return self.trials * self.times * self.units

    def flops(self, work: str, applications: int = 1) -> float:
        """At least: of a probe's application four products for each recurrent weight and two for the others; of
        `linearize` half as many, a forward and a backward pass of the model without the gradients of its weights.
        """
        application = 2 * self.trials * self.times * 3 * self.units * (4 * self.units + 2 * (self.inputs + 2))
        return application * {"ntk.mv": self.probes, "eigs": applications, "summary": applications}.get(work, 0.5)

    def returned(self, work: str) -> int:
        """How many numbers a work hands back, at least: vectors of states, for `linearize` one."""
        return self.state * (1 if work.startswith("linearize") else self.probes)


BASE = Size()
FACTORS = {  # from the smallest to the largest it is a factor of 32
    "trials": [replace(BASE, trials=4 * 2**k) for k in range(6)],
    "times": [replace(BASE, times=16 * 2**k) for k in range(6)],
    "units": [replace(BASE, units=16 * 2**k) for k in range(6)],
    "probes": [replace(BASE, probes=2 * 2**k) for k in range(6)],
    "parameters": [replace(BASE, inputs=80 * 2**k - 66) for k in range(6)],
}
LAST = 4  # points, a factor of 8, of which an exponent is


def key(framework: str, size: Size) -> str:
    return " ".join([framework, *(f"{name}={value}" for name, value in asdict(size).items())])


def points() -> dict[str, tuple[str, Size]]:
    """By their names. The base point is on several axes, and is one point."""
    sizes = dict.fromkeys(size for sizes in FACTORS.values() for size in sizes)
    return {key(framework, size): (framework, size) for framework in FRAMEWORKS for size in sizes}


# One point, in a process of its own


def cell_in(framework: str, size: Size) -> tuple[Any, Any, Any]:
    """A GRU, its inputs and a block of probes."""
    shapes = (size.trials, size.times, size.inputs), (size.probes, size.trials, size.times, size.units)
    if framework == "torch":
        import torch

        torch.manual_seed(0)
        return torch.nn.GRUCell(size.inputs, size.units), *map(torch.randn, shapes)
    import equinox as eqx
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    return eqx.nn.GRUCell(size.inputs, size.units, key=keys[0]), *map(jax.random.normal, keys[1:], shapes)


def done(result: Any) -> Any:
    """The result, computed: JAX hands out promises."""
    wait = getattr(result, "block_until_ready", None)
    return wait() if wait else result


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Which a busy machine changes less than time on the clock; on one thread they are the same."""
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(run: Callable[[], Any]) -> tuple[float, float, float, Any]:
    """Seconds of the first call and of later ones, MiB by which the process grew in one of these, and the result."""
    from ntk_application import growth

    kept: list[Any] = []

    def call() -> None:
        kept[:] = [done(run())]

    first, later = cpu_seconds(call), []
    kept.clear()  # else the second result would take its place, unseen
    memory = growth(call)
    while not later or (sum(later) < 1 and len(later) < 9):
        later.append(cpu_seconds(call))
    return first, statistics.median(later), memory, kept[0]


def rate(rounds: int = 5) -> float:
    """Flops a second of a large product in float32."""
    import torch

    square = torch.randn(2048, 2048)
    return 2 * 2048**3 / statistics.median(cpu_seconds(lambda: square @ square) for _ in range(rounds))


def row_of(framework: str, size: Size) -> Row:
    """All works of one point, with the rate of a large product in float32."""
    import kpflow_dyn as kp

    cell, x, q = cell_in(framework, size)
    solution = kp.solve(kp.DiscreteProblem(cell, x))
    first, took, memory, flow = measured(lambda: kp.linearize(solution))
    seconds, MiB = {"linearize, first": first, "linearize": took}, {"linearize": memory}
    applications = {}
    works = {
        "ntk.mv": lambda: flow.ntk.mv(q),
        "eigs": lambda: kp.eigs(flow.ntk, size.probes),
        "summary": lambda: kp.summary(flow, size.probes),
    }
    for work, run in works.items():
        _, seconds[work], MiB[work], found = measured(run)
        applications[work] = getattr(found, "applications", size.probes)
    return {"seconds": seconds, "MiB": MiB, "applications": applications, "rate": rate()}


# The run


def expected(framework: str, size: Size) -> float:
    """Seconds that a point takes, roughly: to start and compile, and its works at half of 100 Gflop/s, some thrice."""
    start = {"torch": 6, "jax": 12}[framework]
    return start + 3 * size.flops("summary", 3 * (100 + 2 * size.probes)) / 50e9


def in_its_process(name: str) -> Row:
    """The row of a point.

    Raises:
        RuntimeError: the point failed, or took too long.
    """
    environment = os.environ | {"NPROC": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--point", name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"took more than {LIMIT:.0f} s") from error
    if ran.returncode:
        raise RuntimeError((ran.stderr.strip().splitlines() or [f"ended with {ran.returncode}"])[-1])
    return json.loads(ran.stdout.splitlines()[-1])


def keep(rows: dict[str, Row], file: Path) -> None:
    """Writes them whole, or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(rows, indent=1) + "\n")
    part.replace(file)


def run(wanted: Iterable[str], file: Path, again: bool) -> dict[str, Row]:
    """All rows in the file, after those that it lacks were measured."""
    known = points()
    rows: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    missing = [name for name in wanted if again or name not in rows]
    costs = {name: expected(*known[name]) for name in missing}
    print(
        f"{len(missing)} points to measure, about {math.ceil(sum(costs.values()) / 60)} minutes; {len(rows)} are known"
    )
    start, passed = time.perf_counter(), 0.0
    for i, name in enumerate(missing, 1):
        said = f"[{i}/{len(missing)}] {name:60}"
        try:
            rows[name] = in_its_process(name)
        except RuntimeError as error:
            print(f"{said} not measured: {error}", flush=True)
            continue
        keep(rows, file)
        passed += costs.pop(name)
        left = (time.perf_counter() - start) * sum(costs.values()) / passed / 60
        took = "  ".join(f"{work} {value:.3g} s" for work, value in rows[name]["seconds"].items())
        print(f"{said} {took}; {left:.0f} minutes left", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what is known as well")
    parser.add_argument("--only", default="", help="points whose names hold this, such as jax or units=128")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the file of results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "scaling.md")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(row_of(*points()[arguments.point])))
        return
    from scaling_page import write

    rows = run([name for name in points() if arguments.only in name], arguments.rows, arguments.again)
    write(rows, arguments.page)


if __name__ == "__main__":
    main()
