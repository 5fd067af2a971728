"""How many rows block Lanczos gives an operator at once: by a rule, or by timing it."""

import time
from dataclasses import dataclass, field

from kpflow_dyn._arrays import Array, Random, Rows, device
from kpflow_dyn._arrays.dots import row_norms
from kpflow_dyn._arrays.memory import budget, bytes_of, on_device, within_budget

BLOCKS = (2, 4, 16, 64)
FILLED = 2**15  # entries of a block from which on a row more takes as long as the first ones on a CPU
ON_DEVICE = 16  # rows, where a call costs much and a row little
HELD = 8  # blocks of rows that an iteration holds at least
FASTER = 1.25  # how much faster than a smaller block a larger one must promise to be


def block_for(n: int, like: Array) -> tuple[int, int]:
    """With how many rows to begin for vectors of length n, and how many ride in a call; the same in every process.

    A block of b rows needs about 25 + 2.6 k + 10 b applications for k pairs to 1e-6, as was measured on the kernels of
    recurrent networks. So blocks are as small as those whose calls take no longer for their rows, 2 to 16; and where a
    single row fills a call, the two take turns.
    """
    wanted = ON_DEVICE if on_device(like) else min(ON_DEVICE, FILLED // n)
    block = max(b for b in (2, 4, 8, 16) if b == 2 or (b <= wanted and within_budget(bytes_of(HELD * b * n, like))))
    return block, 1 if wanted < 2 else block


@dataclass(frozen=True, eq=False)
class FastestBlock:
    """The block that promises the shortest run of `BlockLanczos`, by timing calls with 2, 4, 16 and 64 rows.

    Larger blocks are tried for as long as they promise a run at least 1.25 times faster. The answer is kept in this
    object for operators of the same size, so that it gives the same results twice; another process may time otherwise,
    and results then differ within the tolerance.

    >>> import numpy as np
    >>> from kpflow_dyn.solvers import BlockLanczos
    >>> alg = BlockLanczos(block=FastestBlock())
    >>> alg.solve(lambda rows: rows / np.arange(1, 1001) ** 2, 1000, 3, like=np.zeros(1)).values.round(4)
    array([1.    , 0.25  , 0.1111])
    """

    answers: dict[tuple, int] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, apply: Rows, n: int, k: int, like: Array) -> int:
        """The block for k pairs of an operator on rows [b, n]."""
        case = (n, k, str(like.dtype), str(device(like)), budget())
        if case not in self.answers:
            self.answers[case] = _fastest(apply, n, k, like)
        return self.answers[case]


def _fastest(apply: Rows, n: int, k: int, like: Array) -> int:
    best, shortest = BLOCKS[0], float("inf")
    for block in (b for b in BLOCKS if b == BLOCKS[0] or within_budget(bytes_of(HELD * b * n, like))):
        promised = (25 + 2.6 * k + 10 * block) / block * _seconds(apply, n, block, like)
        if promised * FASTER > shortest:
            break
        best, shortest = block, promised
    return best


def _seconds(apply: Rows, n: int, block: int, like: Array) -> float:
    """Of the second call with so many rows; the first may compile."""
    rows, times = Random(0).normal((block, n), like), []
    for _ in range(2):
        start = time.perf_counter()
        float(row_norms(apply(rows)).max())  # waits for the device
        times.append(time.perf_counter() - start)
    return times[-1]
