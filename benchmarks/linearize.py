"""What `kp.linearize` costs: time over one application of the NTK to one probe, and peak memory in states.

    python benchmarks/linearize.py                       (or some, as in: GRU:64x300x1024 MLP:40x90x256)
    python benchmarks/linearize.py --jax                 the same in JAX

One thread, float32, CPU time. Of each model the second linearisation is timed, as the first one also traces it. Memory
is what the process grew meanwhile at most, and how much of it was still there afterwards, over the size of the state.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["NPROC"] = "1"  # the size of XLA's thread pool, which its flags do not bound

import numpy as np
import torch
from torch import Tensor, nn

import kpflow_dyn as kp

CELLS = {"RNN": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}
SETTINGS = ["RNN:40x90x256", "GRU:40x90x256", "LSTM:40x90x256", "MLP:40x90x256", "GRU:64x300x512"]
SETTINGS_IN_JAX = ["RNN:40x90x256", "GRU:40x90x256", "MLP:40x90x256"]


class Field(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(units, units), nn.Linear(units, units)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(z)))


def solved(name: str, trials: int, times: int, units: int) -> kp.Solution:
    torch.manual_seed(0)
    if name == "MLP":
        t = 0.05 * torch.arange(times + 1)
        return kp.solve(kp.ODEProblem(Field(units), torch.randn(trials, units), t), "heun2")
    return kp.solve(kp.DiscreteProblem(CELLS[name](3, units), torch.randn(trials, times, 3)))


def solved_in_jax(name: str, trials: int, times: int, units: int) -> kp.Solution:
    import diffrax
    import equinox as eqx
    import jax

    from kpflow_dyn.models import jax as models

    keys = jax.random.split(jax.random.key(0), 2)
    if name == "MLP":
        t = 0.05 * np.arange(times + 1)
        problem = kp.ODEProblem(
            models.MLPField(units, units, key=keys[0]), jax.random.normal(keys[1], (trials, units)), t
        )
        return kp.solve(problem, diffrax.Heun(), steps=t)
    make = {"RNN": models.RNNCell, "GRU": eqx.nn.GRUCell}[name]
    return kp.solve(kp.DiscreteProblem(make(3, units, key=keys[0]), jax.random.normal(keys[1], (trials, times, 3))))


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def done(q: Any) -> Any:
    """Computed: JAX may be at it still."""
    return q.block_until_ready() if hasattr(q, "block_until_ready") else q


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def growth(run: Callable[[], Any]) -> tuple[Any, int, int]:
    """What it gives, and by how many bytes the process grew at most, and for good (Linux with glibc)."""
    trim()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    found, peak = run(), resident("VmHWM")
    trim()
    return found, peak - before, resident("VmRSS") - before


def trim() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def measure(setting: str, in_jax: bool) -> None:
    name, sizes = setting.split(":")
    sol = (solved_in_jax if in_jax else solved)(name, *map(int, sizes.split("x")))
    kp.linearize(sol)
    flow, peak, kept = growth(lambda: kp.linearize(sol))
    ntk, size = flow.nodal.ntk if name == "MLP" else flow.ntk, sol.state.nbytes
    q = ntk.domain.xp.asarray(np.random.default_rng(0).standard_normal((1, *ntk.domain.shape), np.float32))
    done(ntk.mv(q))
    ratios = [seconds(lambda: kp.linearize(sol)) / seconds(lambda: done(ntk.mv(q))) for _ in range(3)]
    print(
        f"{setting:16}  linearize takes {sorted(ratios)[1]:4.1f} applications; {kept / size:5.1f} states are kept, and "
        f"{(peak - kept) / size:5.1f} more at the peak",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--jax", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for setting in given.settings or (SETTINGS_IN_JAX if given.jax else SETTINGS):
        measure(setting, given.jax)


if __name__ == "__main__":
    main()
