"""What the analysis of a traced step needs of its framework."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Rows

RowFunction = Callable[..., list[Array]]


@dataclass(frozen=True)
class Framework:
    """What the rows need of a framework: its function transforms, and a map over rows.

    Attributes:
        jvp, vjp: the transforms of torch.func or JAX.
        compiled: the same function, compiled where the framework does so.
        each_row: (row function, *rows [time, trial, ...]) -> its outputs [time, trial, ...].
        index: (element numbers, array) -> an index into arrays like this one.
        vmap: the map over a leading axis, with its in_dims.
        linearised: (compiled function, point) -> the derivative there and its transpose, on blocks [probe, ...].
    """

    jvp: Callable[..., Any]
    vjp: Callable[..., Any]
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]]
    each_row: Callable[..., list[Array]]
    index: Callable[[np.ndarray, Array], Any]
    vmap: Callable[..., Callable[..., Any]]
    linearised: Callable[..., tuple[Rows, Rows]]
