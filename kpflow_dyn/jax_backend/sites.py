"""Weight sites on data in JAX: how a weight's change kicks the step. The transposes are JAX's own.

A change of a site's weights has a layout of its own, which `take` makes of all weights' changes [weight].
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn.rows import Rows
from kpflow_dyn.structure import MatrixSite, ScaleSite, Site

Kick = Callable[[jax.Array, list[jax.Array]], jax.Array]
KINDS = {"MatrixSite": "matrix", "ScaleSite": "scale", "OpaqueSite": "opaque"}


class SiteData:
    """A weight site with its data at all rows [time, trial, ...]; `entries` number its weights, `kicks` its outputs.

    The data go on behind the last of the times, up to whole spans.
    """

    def __init__(self, site: Site, rows: Rows, data: list[jax.Array], times: int) -> None:
        self.name, self.kind = site.name, KINDS[type(site).__name__]
        self.entries, self.kicks = site.entries, site.kicks
        self.data, self.times = data, times
        self.kick = _kick(site, rows)

    def take(self, weights: jax.Array) -> jax.Array:
        """All weights' changes [weight] -> those of this site."""
        return weights[self.entries]

    @property
    def variables(self) -> jax.Array:
        """The weight-site variables [time, trial, ...]."""
        found = [d[: self.times] for d in self.data]
        lead = found[0].shape[:2]
        return found[0] if len(found) == 1 else jnp.concatenate([d.reshape(*lead, -1) for d in found], -1)


def _kick(site: Site, rows: Rows) -> Kick:
    """(change, data [time, trial, ...]) -> outputs [time, trial, kick], linear in the change."""
    if isinstance(site, MatrixSite):
        return lambda change, data: (data[0] @ change).reshape(*data[0].shape[:2], -1)
    if isinstance(site, ScaleSite):
        return lambda change, data: data[0] * change
    push, _pull = rows.opaque(site)
    return lambda change, data: jax.vmap(jax.vmap(lambda *row: push(change, *row)))(*data)


def place(values: jax.Array, pairs: list[tuple[int, int, int]], size: int) -> jax.Array:
    """Runs (source, target, length) of a vector, added into zeros [size]."""
    runs = [values[source : source + length] for source, _, length in pairs]
    padded = [jnp.pad(run, (at, size - at - len(run))) for run, (_, at, _) in zip(runs, pairs, strict=True)]
    return sum(padded[1:], padded[0])


def runs(sources: np.ndarray, targets: np.ndarray) -> list[tuple[int, int, int]]:
    """Pairs of positions as runs (source, target, length) along which both go up by one."""
    breaks = np.flatnonzero((np.diff(sources) != 1) | (np.diff(targets) != 1)) + 1
    starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(sources)]
    return [(int(sources[a]), int(targets[a]), b - a) for a, b in zip(starts, stops, strict=True) if b > a]
