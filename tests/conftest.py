"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many test processes as cores
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the tests compile far more than they compute


def cases(names: Iterable[str], quick: Iterable[str]) -> list:
    """Parameters of a test: all names, those that are not quick behind the marker slow."""
    return [name if name in set(quick) else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """JAX in double precision, for the tests of one module."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
