"""How many rows to give an operator at once: by timing it."""

from __future__ import annotations

import time

from kpflow_dyn._arrays import Array, Random, Rows, device
from kpflow_dyn._arrays.dots import row_norms
from kpflow_dyn._arrays.memory import budget, bytes_of, within_budget

BLOCKS = (2, 4, 16, 64)
HELD = 8  # blocks of rows that an iteration holds at least
FASTER = 1.25  # how much faster than a smaller block a larger one must promise to be
_answers: dict[tuple, int] = {}  # of this process, so that the same call gives the same result


def fastest_block(apply: Rows, n: int, k: int, like: Array) -> int:
    """The block of Lanczos' iteration that promises the shortest run; the answer is kept for operators of this size.

    A block of b rows needs about 25 + 2.6 k + 10 b applications for k pairs to 1e-6, measured on the kernels of
    recurrent networks. Larger blocks are tried as long as they promise to be faster.
    """
    case = (n, k, str(like.dtype), str(device(like)), budget())
    if case not in _answers:
        best, shortest = BLOCKS[0], float("inf")
        for block in (b for b in BLOCKS if b == BLOCKS[0] or within_budget(bytes_of(HELD * b * n, like))):
            promised = (25 + 2.6 * k + 10 * block) / block * _seconds(apply, n, block, like)
            if promised * FASTER > shortest:
                break
            best, shortest = block, promised
        _answers[case] = best
    return _answers[case]


def _seconds(apply: Rows, n: int, block: int, like: Array) -> float:
    """Of the second call with this number of rows; the first may compile."""
    rows, times = Random(0).normal((block, n), like), []
    for _ in range(2):
        start = time.perf_counter()
        float(row_norms(apply(rows)).max())  # waits for the device
        times.append(time.perf_counter() - start)
    return times[-1]
