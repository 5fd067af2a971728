"""What the analysis of a traced step needs of its framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from kpflow_dyn.arrays import Array

RowFunction = Callable[..., list[Array]]


class Framework(Protocol):
    """What the rows need of a framework: its function transforms, and a map over rows."""

    jvp: Callable[..., Any]
    vjp: Callable[..., Any]

    @staticmethod
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, compiled where the framework does so."""
        ...

    @staticmethod
    def each_row(function: RowFunction, *rows: Array) -> list[Array]:
        """A row function on [time, trial, ...] data -> its outputs as [time, trial, ...]."""
        ...

    @staticmethod
    def index(numbers: np.ndarray, like: Array) -> Any:
        """Element numbers as an index into arrays like this one."""
        ...
