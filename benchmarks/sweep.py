"""What a sweep costs beside its points, and what worker processes and a leading model axis gain.

    python benchmarks/sweep.py

- overhead: a thousand points that compute nothing, in this process and in two worker processes.
- collect: ten thousand points as one dataset.
- efficiency: analyses of networks of 64 units by one worker process and by two, which were warm; t_1 / (2 t_2).
- repeated: effective ranks of the NTKs of GRUs of that size, one after another, in CPU time: linearised in torch, with
  a trace made anew or the one that is kept.
- model axis: the same by one compiled function of the weights in JAX, for one network after another and along a leading
  axis of networks, over the number of units, with the time that compiling took.

Some of these alone: python benchmarks/sweep.py repeated "model axis". Run it on a machine that does nothing else; CPU
times bear company better than the others.
"""

from __future__ import annotations

import os

os.environ |= {"NPROC": "1", "OMP_NUM_THREADS": "1"}

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import kpflow_dyn as kp
from kpflow_dyn.sweep import Processes

UNITS, TRIALS, PROBES, MODELS = 64, 2, 40, 8
SIZES = [8, 16, 32, 64, 128, 256]


def nothing(i: int, j: int) -> dict[str, int]:
    return {"sum": i + j}


def analysis(g: float, seed: int) -> dict[str, Any]:
    """Effective ranks of a vanilla network on MemoryPro."""
    import torch

    start = time.process_time()
    torch.manual_seed(seed)
    cell = torch.nn.RNNCell(3, UNITS).double()
    torch.nn.init.normal_(cell.weight_hh, 0, g / UNITS**0.5)
    x = torch.from_numpy(kp.tasks.make_task("memorypro", trials=TRIALS).inputs)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    return {"ntk": kp.effective_rank(flow.ntk, PROBES), "cpu": time.process_time() - start}


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def overhead(folder: Path) -> None:
    over = {"i": range(100), "j": range(10)}
    for name, engine in {"in this process": None, "in two workers": Processes(2)}.items():
        took = seconds(lambda name=name, engine=engine: kp.Sweep(nothing, over, folder / name).run(engine))
        print(f"overhead {name}: {took:.2f} ms a point")


def collected(folder: Path) -> None:
    sweep = kp.Sweep(nothing, {"i": range(100), "j": range(100)}, folder / "many")
    sweep.run(Processes(2))
    print(f"collect of 10,000 points: {seconds(sweep.collect):.1f} s")


def efficiency(folder: Path) -> None:
    took = {}
    for workers in (1, 2):
        with Processes(workers).open() as pool:
            kp.Sweep(analysis, {"g": [1.0], "seed": range(6)}, folder / f"warm {workers}").run(pool)
            sweep = kp.Sweep(analysis, {"g": np.linspace(0.5, 2, 8), "seed": range(6)}, folder / f"timed {workers}")
            took[workers] = seconds(lambda sweep=sweep, pool=pool: sweep.run(pool))
            cpu = float(sweep.collect().cpu.mean())
            print(f"{workers} workers: {48 / took[workers]:.2f} analyses a second, {1e3 * cpu:.0f} ms of CPU time each")
    print(f"parallel efficiency: {took[1] / (2 * took[2]):.2f}")


def repeated(_folder: Path) -> None:
    for anew in (True, False):
        took = cpu_seconds(lambda anew=anew: [linearize_torch(seed, anew) for seed in range(MODELS)]) / MODELS
        print(f"linearised in torch, {'traced anew' if anew else 'with the trace kept'}: {1e3 * took:.1f} ms")


def linearize_torch(seed: int, anew: bool) -> float:
    import torch

    from kpflow_dyn._torch.model import TRACES

    if anew:
        TRACES.forget()
    torch.manual_seed(seed)
    x = torch.from_numpy(kp.tasks.make_task("memorypro", trials=TRIALS).inputs)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, UNITS).double(), x)))
    return kp.effective_rank(flow.ntk, PROBES).value


def model_axis(_folder: Path) -> None:
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    x = jnp.asarray(kp.tasks.make_task("memorypro", trials=TRIALS).inputs)

    def rank(cell: eqx.nn.GRUCell) -> jax.Array:
        return kp.regularizers.effective_rank(kp.DiscreteProblem(cell, x), PROBES)

    def timed(run: Callable[[], Any]) -> tuple[float, float]:
        """CPU seconds of the first call, which compiles, and the least of the others."""
        first, *others = [cpu_seconds(run) for _ in range(4)]
        return first, min(others)

    print(f"effective rank of {MODELS} GRUs in JAX, milliseconds of CPU time for each, and seconds to compile")
    for units in SIZES:
        cells = [eqx.nn.GRUCell(3, units, key=jax.random.key(seed)) for seed in range(MODELS)]
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cells)
        one, many = jax.jit(rank), jax.jit(jax.vmap(rank))
        alone = timed(lambda one=one, cells=cells: [one(cell).block_until_ready() for cell in cells])
        batched = timed(lambda many=many, together=together: many(together).block_until_ready())
        each, axis = 1e3 * alone[1] / MODELS, 1e3 * batched[1] / MODELS
        print(
            f"{units:4} units: one by one {each:7.1f} ms ({alone[0] - alone[1]:4.1f} s)  along an axis {axis:7.1f} ms "
            f"({batched[0] - batched[1]:4.1f} s)  one by one / axis {each / axis:5.2f}",
            flush=True,
        )


def cpu_seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


PARTS = {
    "overhead": overhead,
    "collect": collected,
    "efficiency": efficiency,
    "repeated": repeated,
    "model axis": model_axis,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), choices=PARTS)
    for part in parser.parse_args().parts:
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder))


if __name__ == "__main__":
    main()
