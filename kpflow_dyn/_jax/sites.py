"""Weight sites on data in JAX: how weight changes kick the step, and how kicks gather to gradients of the weights.

A block of changes of a site's weights has a layout of its own, which `take` makes of changes of all weights. Kicks are
blocks [time, trial, inner, probe, m], as the products V dW^T have them, [inner, d] x [d, m] at each row; sites of other
kinds have one inner row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._sites import LookupSite, MatrixSite, OpaqueSite, ScaleSite, Site

Map = Callable[[jax.Array, list[jax.Array]], jax.Array]


class SiteMaps:
    """The maps of a weight site on rows of its data, which may be cut to V Q, for orthonormal columns Q = `basis`."""

    kick: Map  # (change, data of some rows) -> outputs [time, trial, inner, probe, m]
    gather: Map  # the transpose, (kicks, data) -> change

    def __init__(self, site: Site, rows: RowFunctions, basis: jax.Array | None) -> None:
        self._kind, self._entries, self._basis = site.kind, site.entries, basis
        self.shape = kicks_shape(site)
        self.kick, self.gather = _maps(site, rows)

    def no_kicks(self, times: int, trials: int, probes: int, dtype: Any) -> jax.Array:
        """Of so many rows."""
        inner, m = self.shape
        return jnp.zeros((times, trials, inner, probes, m), dtype)

    def as_kicks(self, values: jax.Array) -> jax.Array:
        """Outputs side by side [time, trial, probe, kick] -> kicks."""
        return values.reshape(*values.shape[:3], *self.shape).swapaxes(2, 3)

    def take(self, weights: jax.Array) -> jax.Array:
        """All weights' changes [probe, weight] -> those of this site: [d, probe, m] of a matrix, else [probe, e]."""
        taken = weights[:, self._entries]
        if self._kind != "matrix":
            return taken
        own = taken.swapaxes(0, 1)  # [d, probe, m]
        return own if self._basis is None else jnp.tensordot(self._basis.T, own, 1)


@partial(jax.jit, static_argnums=2)
def inputs_of(data: list[list[jax.Array]], bases: list[jax.Array | None], kinds: tuple[str, ...]) -> list[jax.Array]:
    """What each site's weights multiply [trial, time, ...], of its data [time, trial, ...].

    The data of a matrix that is cut to V Q Q^T are V Q, where its basis is Q [d, r].
    """
    return [_inputs(*site) for site in zip(data, bases, kinds, strict=True)]


def _inputs(data: list[jax.Array], basis: jax.Array | None, kind: str) -> jax.Array:
    lead = data[0].shape[:2]
    whole = data[0] if len(data) == 1 else jnp.concatenate([d.reshape(*lead, -1) for d in data], -1)
    by_trial = (whole if basis is None else whole @ basis.T).swapaxes(0, 1)
    return by_trial[:, :, 0] if kind == "matrix" and by_trial.shape[2] == 1 else by_trial


def kicks_shape(site: Site) -> tuple[int, int]:
    """How many inner rows a site has, and outputs of each."""
    inner, m = site.kicks.shape if isinstance(site, MatrixSite) else (1, site.kicks.size)
    return inner, m


def side_by_side(kicks: jax.Array) -> jax.Array:
    """Kicks -> outputs side by side [time, trial, probe, kick]."""
    times, trials, _, probes, _ = kicks.shape
    return kicks.swapaxes(2, 3).reshape(times, trials, probes, -1)


def _maps(site: Site, rows: RowFunctions) -> tuple[Map, Map]:
    if isinstance(site, MatrixSite):
        return _matrix_kick, _matrix_gather
    kick, gather = _other_maps(site, rows)
    return (lambda change, data: kick(change, data)[:, :, None]), (lambda kicks, data: gather(kicks[:, :, 0], data))


def _other_maps(site: ScaleSite | LookupSite | OpaqueSite, rows: RowFunctions) -> tuple[Map, Map]:
    if isinstance(site, ScaleSite):
        return (
            lambda change, data: data[0][:, :, None] * change,
            lambda kicks, data: jnp.einsum("tbe,tbpe->pe", data[0], kicks),
        )
    if isinstance(site, LookupSite):
        return _lookup_kick, partial(_lookup_gather, len(site.entries))
    push, pull = rows.opaque(site)
    return (lambda change, data: push(change, *data)), (lambda kicks, data: pull(kicks, *data))


def _lookup_kick(change: jax.Array, data: list[jax.Array]) -> jax.Array:
    """The elements [probe, e] that data [time, trial, ...] choose, counted from 1; 0 is none of them."""
    (numbers,) = data
    return jnp.moveaxis(jnp.where(numbers > 0, change[:, numbers - 1], 0), 0, 2)


def _lookup_gather(size: int, kicks: jax.Array, data: list[jax.Array]) -> jax.Array:
    (numbers,) = data
    places = jnp.where(numbers > 0, numbers - 1, size)  # beyond the last one: dropped
    change = jnp.zeros((kicks.shape[2], size), kicks.dtype)
    return change.at[:, places].add(jnp.moveaxis(kicks, 2, 0), mode="drop")


def _matrix_kick(change: jax.Array, data: list[jax.Array]) -> jax.Array:
    """V [time, trial, inner, d] times dW^T [d, probe, m]."""
    return jnp.tensordot(data[0], change, 1)


def _matrix_gather(kicks: jax.Array, data: list[jax.Array]) -> jax.Array:
    rows = (0, 1, 2)
    return jnp.tensordot(data[0], kicks, (rows, rows))
