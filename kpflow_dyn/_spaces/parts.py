"""Direct sums: which coordinates of a vector belong to which part."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device


@dataclass(frozen=True, eq=False)
class Parts:
    """Coordinates by parts of one size: those numbered `order` are of the first part, then of the second, and so on."""

    count: int
    order: np.ndarray

    @property
    def size(self) -> int:
        """The coordinates of a part."""
        return self.order.size // self.count

    @cached_property
    def back(self) -> np.ndarray:
        """Where each coordinate is in that order."""
        return np.argsort(self.order)

    def split(self, rows: Array) -> Array:
        """Rows [b, n] -> [part, b, coordinate]."""
        xp = array_namespace(rows)
        found = xp.take(rows, xp.asarray(self.order, device=device(rows)), axis=1)
        return xp.permute_dims(found.reshape((rows.shape[0], self.count, self.size)), (1, 0, 2))

    def join(self, blocks: Array) -> Array:
        """The inverse of `split`."""
        xp = array_namespace(blocks)
        rows = xp.permute_dims(blocks, (1, 0, 2)).reshape((blocks.shape[1], self.order.size))
        return xp.take(rows, xp.asarray(self.back, device=device(rows)), axis=1)


@dataclass(frozen=True, eq=False)
class DirectSum:
    """That L L* does not couple units: unit i is of part i mod `count`.

    Attributes:
        count: how many parts there are.
        of_domain: the parts of L's domain; None where they are not of one size.
    """

    count: int
    of_domain: Parts | None

    def of_rows(self, n: int) -> Parts:
        """The parts of rows [b, n] whose last axis is that of the units."""
        return Parts(self.count, np.arange(n).reshape(-1, self.count).T.reshape(-1))
