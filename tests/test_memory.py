"""A memory budget is kept, changes no result beyond its tolerance, and says what does not fit."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

import kpflow_dyn as kp
from kpflow_dyn._arrays import memory
from kpflow_dyn.solvers import BlockLanczos

MIB = 2**20

PEAK = """
import sys
from pathlib import Path
import torch
import kpflow_dyn as kp
from kpflow_dyn.solvers import BlockLanczos

def status(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if field in line)

torch.set_num_threads(1)
torch.manual_seed(0)
flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 128), torch.randn(20, 200, 3))))
work = {
    "eigs": lambda: kp.eigs(flow.ntk, 10, alg=BlockLanczos(block=2)),
    "rank": lambda: kp.effective_rank(flow.ntk),
    "kernel": lambda: kp.partial_trace(flow.ntk, "time"),
}[sys.argv[1]]
kp.trace(flow.K, samples=8)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
with kp.memory_budget(float(sys.argv[2])):
    work()
print((status("VmHWM") - before) * 1024)
"""


def flow() -> kp.Flow:
    torch.manual_seed(0)
    return kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 20), torch.randn(5, 30, 3))))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("what", ["eigs", "rank", "kernel"])
def test_the_peak_stays_below_the_budget(what: str) -> None:
    """One vector of this state takes 2 MiB, so that 120 probes of a trace would take 240 MiB at once."""
    size = 100 * MIB
    run = subprocess.run([sys.executable, "-c", PEAK, what, str(size)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < size


def test_results_stay_what_they_are() -> None:
    analysed = flow()
    ntk, alg = analysed.ntk, BlockLanczos(block=2)
    expected = kp.eigs(ntk, 5, alg=alg), kp.effective_rank(ntk, samples=40), kp.partial_trace(ntk, "time").matrix
    with kp.memory_budget(0.5 * MIB):
        found = kp.eigs(ntk, 5, alg=alg), kp.effective_rank(ntk, samples=40), kp.partial_trace(ntk, "time").matrix
        changed = analysed.J.mv(torch.ones(3, analysed.J.domain.size))
    np.testing.assert_allclose(found[0].values, expected[0].values, rtol=1e-5)
    assert abs(found[1].value - expected[1].value) < 4 * (found[1].stderr + expected[1].stderr) + 1e-3
    np.testing.assert_allclose(found[2], expected[2], rtol=0.2, atol=0.05 * float(abs(expected[2]).max()))
    np.testing.assert_allclose(changed, analysed.J.mv(torch.ones(3, analysed.J.domain.size)), rtol=1e-5, atol=1e-6)


def test_what_cannot_fit_says_by_how_much() -> None:
    ntk = flow().ntk
    needed = 4 * 10 * ntk.domain.size
    with kp.memory_budget(needed - 2**14), pytest.raises(MemoryError, match=r"1\.53e-05 GiB more than the budget"):
        kp.eigs(ntk, 10, alg=BlockLanczos(block=2))
    with kp.memory_budget(needed + 2**14), pytest.raises(MemoryError, match="k = 10 pairs with block = 2"):
        kp.eigs(ntk, 10, alg=BlockLanczos(block=2))


def test_budgets_nest_and_end() -> None:
    with kp.memory_budget(100), kp.memory_budget(1000):
        assert memory.budget() == 100
    assert memory.budget() is None
    with pytest.raises(ValueError, match="positive"), kp.memory_budget(0):
        pass


def test_blocks_are_of_one_length() -> None:
    rows, lengths = np.arange(10.0)[:, None], []

    def twice(block: np.ndarray) -> np.ndarray:
        lengths.append(len(block))
        return 2 * block

    entries = memory.BLOCK_BYTES // (4 * rows.itemsize)  # four rows at once
    assert (memory.in_blocks(twice, entries, rows)(rows) == 2 * rows).all()
    assert lengths == [4, 4, 4]
