"""How much memory operators and solvers use: the sizes of their blocks of vectors, and a budget for all of it."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from kpflow_dyn._arrays import Array, Rows, joined, library_of

BLOCK_BYTES = 2**24  # of the vectors in one application on a CPU, where more is no faster
DEVICE_BLOCK_BYTES = 2**30
SPAN_BYTES = 40 * 2**20  # of kicks and states that a sweep keeps in the cache
SHARE = 16  # a few such blocks are held at once, so each may take 1 / SHARE of the budget
GIB = 2**30
MATRIX_BYTES = 4 * GIB

_budget: ContextVar[int | None] = ContextVar("memory_budget", default=None)


@contextmanager
def memory_budget(size: float) -> Iterator[None]:
    """Limit the memory that operators and solvers allocate on top of the flow itself.

    Blocks of probes and, in torch, spans of times become shorter, Krylov bases smaller, and the default trace
    estimators keep fewer vectors; results are the same up to their tolerances and error bars. Results count too: k
    modes take k vectors. Not counted are the interpreter and its libraries, what JAX compiles, and estimators and
    solvers that the caller picked by name and that hold all their vectors, or the matrix.

    Args:
        size: the limit in bytes, such as 2 * 2**30.

    Raises:
        ValueError: a size that is not positive.
        MemoryError: inside the block, where a request cannot fit; it says by how much.

    >>> import torch, kpflow_dyn as kp
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 20), torch.randn(8, 50, 3))))
    >>> with kp.memory_budget(2**20):
    ...     modes = kp.eigs(flow.ntk, 3)
    >>> modes.values.shape
    torch.Size([3])
    """
    if not size > 0:
        raise ValueError(f"a memory budget of {size!r} bytes was given, expected a positive number")
    token = _budget.set(int(min(size, left)) if (left := _budget.get()) is not None else int(size))
    try:
        yield
    finally:
        _budget.reset(token)


def budget() -> int | None:
    """The limit in bytes; None without one."""
    return _budget.get()


def bytes_of(entries: int, like: Array) -> int:
    """The size in bytes of this number of entries."""
    return entries * like.dtype.itemsize


def rows_at_once(entries: int, like: Array) -> int:
    """How many vectors of this length make a block."""
    whole = DEVICE_BLOCK_BYTES if on_device(like) else BLOCK_BYTES
    return max(1, _within(whole) // max(1, bytes_of(entries, like)))


def in_blocks(function: Rows, entries: int, like: Array) -> Rows:
    """The function on as many rows at a time as make a block of vectors with this number of entries.

    All blocks have one length, as a program is compiled for each: the last takes a few rows of the one before.
    """

    def apply(rows: Array) -> Array:
        blocks = max(1, math.ceil(len(rows) / rows_at_once(entries, like)))
        if blocks == 1:
            return function(rows)
        length = math.ceil(len(rows) / blocks)

        def block(number: int) -> Array:
            start = min(number * length, len(rows) - length)
            found, known = function(rows[start : start + length]), number * length - start
            return found[known:] if known else found

        return joined(map(block, range(blocks)), len(rows))

    return apply


def span_bytes() -> int:
    """How many bytes a sweep over time may keep of one span of times."""
    return _within(SPAN_BYTES)


def on_device(a: Array) -> bool:
    """Whether an array lies on an accelerator."""
    return library_of(a).on_device(a)


def within_budget(needed: int) -> bool:
    """Whether the budget has room for this many bytes."""
    left = _budget.get()
    return left is None or needed <= left


def require(needed: int, what: str, advice: str) -> None:
    """Raise a MemoryError where this does not fit into the budget; it says how much is missing."""
    left = _budget.get()
    if left is not None and needed > left:
        raise MemoryError(
            f"{what} take {needed / GIB:.3g} GiB, {(needed - left) / GIB:.3g} GiB more than the budget of "
            f"{left / GIB:.3g} GiB; {advice}"
        )


def require_matrix(rows: int, columns: int, like: Array, why: str, advice: str) -> None:
    """Raise where the matrix of a model's derivative, in the place of a mode that it lacks, is beyond reach."""
    needed = bytes_of(rows * columns, like)
    what = f"{why}, and the {rows} x {columns} entries of its matrix"
    require(needed, what, advice)
    if needed > MATRIX_BYTES:
        raise ValueError(f"{what} take {needed / GIB:.3g} GiB; {advice}")


def require_machine(needed: int, what: str, advice: str) -> None:
    """Raise a MemoryError for what the memory of this machine could never hold."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > most:
        raise MemoryError(f"{what} take {needed / GIB:.3g} GiB, this machine has {most / GIB:.3g} GiB; {advice}")


def _within(whole: int) -> int:
    left = _budget.get()
    return whole if left is None else min(whole, left // SHARE)


def available() -> int:
    """How many bytes this process may still take: what the machine has free, or the limit of its container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    with suppress(OSError, ValueError):  # "max" where there is none
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free
