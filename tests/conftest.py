"""What all tests share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

MANY_MAPS = 20_000  # pieces of memory, of 65,530 that there may be; XLA takes several for a program

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many test processes as cores
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # the tests compile far more than they compute
# Then what XLA computes twice may differ in the last digit, and the gradient of a maximum, which asks v == max(v), lose
# terms, also that of plain JAX. Not without fused multiply-add.
FLAGS = ["--xla_cpu_max_isa=AVX", "--xla_cpu_parallel_codegen_split_count=1"]
if version("jaxlib").startswith("0.10."):  # XLA's older emitters compile twice as fast; a flag that it lost is an error
    FLAGS += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
gc.set_threshold(20_000, 10, 50)  # graphs and programs are many small objects, and few of them are garbage


def cases(names: Iterable[str], quick: Iterable[str]) -> list:
    """Parameters of a test: all names, those that are not quick behind the marker slow."""
    return [name if name in set(quick) else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Each test draws the same numbers each time, whichever ran before it, also where a page's example sets no seed."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_precision() -> Iterator[None]:
    """JAX's precision after a test is what it was before, also where the test runs a command or a page that sets it."""
    before = double_precision()
    yield
    if double_precision() != before:
        sys.modules["jax"].config.update("jax_enable_x64", before)


def double_precision() -> bool:
    """Whether JAX computes in double precision; without importing it, which takes a second."""
    return "jax" in sys.modules and bool(sys.modules["jax"].config.jax_enable_x64)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of the package are composed, but no image is made of them, which takes most of the time of a command."""
    from kpflow_dyn.figures._style import StyledFigure

    def blank(_: object, file: Any, **given: object) -> None:
        (file.write if hasattr(file, "write") else Path(file).write_bytes)(b"\x89PNG")

    monkeypatch.setattr(StyledFigure, "savefig", blank)


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forget what was compiled before a process has more pieces of memory than Linux allows."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MANY_MAPS:
        import equinox
        import jax

        from kpflow_dyn._jax.programs import PROGRAMS

        PROGRAMS.forget()
        jax.clear_caches()
        equinox.clear_caches()


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """JAX in double precision, for the tests of one module."""
    import jax

    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)
