"""Memory for results that are too large for the C library to use again."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from kpflow_dyn.memory import bytes_of, on_device

RECYCLED = 2**25  # up to this size glibc may keep what is freed for the next block


def empty_block(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor; on Linux a large one lies in huge pages.

    A large block is new memory each time, which the system hands out page by page as it is first written to: in pages
    of 4 KiB that takes as long as a tenth of a sweep that fills it.
    """
    size = bytes_of(math.prod(shape), like)
    if size <= RECYCLED or on_device(like) or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # from a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype).view(shape)
