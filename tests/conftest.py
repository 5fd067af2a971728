"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the tests compile far more than they compute


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """JAX in double precision, for the tests of one module."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
