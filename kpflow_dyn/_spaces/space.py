"""Spaces: what the vectors of an operator are, by named axes, and how their inner product is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from kpflow_dyn._arrays import Array, Random, array_namespace, device, empty_row, placed
from kpflow_dyn._shown import type_name


@dataclass(frozen=True, eq=False)
class Space:
    """Arrays with named axes and the inner product <a, b> = sum(measure * a * b).

    Args:
        axes: a name for each axis, such as ("trial", "time", "unit").
        shape: the length of each axis.
        like: any array [...] of the wanted library, dtype and device; its values are not used.
        measure: quadrature weights, positive and broadcastable to `shape`; None counts every entry as one.
        mask: booleans, broadcastable to `shape`: vectors are zero where it is False. None leaves no entry out.
        units: what the entries of the axis "unit" are called, () where they are numbered.
        times: those of the axis "time" [time], None where they are not known.

    Raises:
        ValueError: axes that are empty, or without distinct names.
    Source: docs/theory.md, "Continuous time and measures".

    >>> import numpy as np, kpflow_dyn as kp
    >>> kp.Space(("time", "unit"), (2, 3), np.zeros(1)).inner(np.ones((2, 3)), np.ones((2, 3)))
    np.float64(6.0)
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    like: Array
    measure: Array | None = None
    mask: Array | None = None
    units: tuple[str, ...] = ()
    times: Any = None

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"a Space needs one distinct name per axis, got {self.axes} for the shape {self.shape}")
        if any(n < 1 for n in self.shape):
            raise ValueError(f"a Space has no empty axis, got {dict(zip(self.axes, self.shape, strict=True))}")
        object.__setattr__(self, "like", empty_row(self.like, self.axes[:1] == ("trial",)))

    @property
    def size(self) -> int:
        """How many entries a vector has: the product of the axis lengths."""
        return math.prod(self.shape)

    @cached_property
    def dimension(self) -> int:
        """How many entries may differ from zero: all, or those where the mask is True."""
        return self.size if self.mask is None else int(self.xp.sum(self.xp.broadcast_to(self.mask, self.shape)))

    @property
    def xp(self):
        """The array namespace (array API standard) of the vectors."""
        return array_namespace(self.like)

    @property
    def dtype(self):
        """The dtype of the vectors."""
        return self.like.dtype

    def __repr__(self) -> str:
        axes = ", ".join(f"{name}: {n}" for name, n in zip(self.axes, self.shape, strict=True))
        weighted = "" if self.measure is None else ", weighted"
        counted = "" if self.mask is None else f", {self.dimension} of {self.size} entries count"
        return f"Space({axes}; {self.dtype}{weighted}{counted})"

    def matches(self, other: Space) -> bool:
        """Whether vectors of one space are vectors of the other (axes, shape, dtype and library)."""
        return (self.axes, self.shape, self.dtype) == (other.axes, other.shape, other.dtype) and self.xp is other.xp

    def check(self, q: Array, what: str = "q") -> None:
        """Raise unless `q` is a vector of this space, or a block of them along leading probe axes."""
        if tuple(q.shape[q.ndim - len(self.shape) :]) != self.shape or q.ndim < len(self.shape):
            raise ValueError(
                f"{what} has shape {tuple(q.shape)}, expected [..., {', '.join(self.axes)}] = [..., "
                f"{', '.join(map(str, self.shape))}]; leading axes are probes"
            )
        if array_namespace(q) is not self.xp or q.dtype != self.dtype:
            raise TypeError(f"{what} is {type_name(q)} of {q.dtype}, expected {type_name(self.like)} of {self.dtype}")
        place, here = device(q), device(self.like)
        if None not in (place, here) and place != here:  # None: JAX may still choose
            raise ValueError(f"{what} lies on {place}, expected {here}; move it there first")

    def with_tokens(self, q: Array) -> Array:
        """Vectors whose tokens lie on several axes, as the positions of an image do, with these on one."""
        end = q.ndim
        for axis, n in zip(reversed(self.axes), reversed(self.shape), strict=True):
            start = end - 1
            while axis == "token" and start > 0 and math.prod(q.shape[start:end]) < n:
                start -= 1
            if start < 0 or math.prod(q.shape[start:end]) != n:
                return q
            end = start
        return q.reshape((*q.shape[:end], *self.shape))

    def placed(self, q: Array) -> Array:
        """Vectors or blocks of them where those of this space lie: sharded by trials if these are."""
        return placed(q, self.like, -len(self.shape)) if self.shape else q

    def normal(self, probes: int, rng: Random) -> Array:
        """A block [probe, *shape] of vectors with independent standard normal coordinates in the inner product."""
        return self.counted(
            self.from_euclidean(rng.normal((probes, self.size), self.like).reshape((probes, *self.shape)))
        )

    def counted(self, q: Array) -> Array:
        """Vectors with zeros where the mask is False, whatever stood there."""
        return q if self.mask is None else self.xp.where(self.mask, q, self.xp.zeros_like(q))

    def inner(self, a: Array, b: Array) -> Array:
        """<a, b> of two blocks with the same leading probe axes -> [probe...]."""
        product = a * b if self.measure is None else self.measure * a * b
        return self.xp.sum(product, axis=tuple(range(-len(self.shape), 0)))

    def to_euclidean(self, q: Array) -> Array:
        """sqrt(measure) * q: coordinates in which the inner product is the plain one."""
        return q if self.measure is None else self.xp.sqrt(self.measure) * q

    def from_euclidean(self, q: Array) -> Array:
        """The inverse of `to_euclidean`."""
        return q if self.measure is None else q / self.xp.sqrt(self.measure)

    def keep(self, names: tuple[str, ...]) -> Space:
        """The space of the named axes alone, in their order here.

        The measure is averaged over the other axes, and left out where it then counts all entries alike. The mask is
        True where it is anywhere on the other axes.
        """
        kept = self.positions(names)
        axes, shape = tuple(self.axes[i] for i in kept), tuple(self.shape[i] for i in kept)
        dropped = tuple(i for i in range(len(self.shape)) if i not in kept)

        def reduced(weights: Array | None, over: Callable[..., Array]) -> Array | None:
            if weights is None or not dropped:
                return weights
            found = over(weights.reshape((1,) * (len(self.shape) - weights.ndim) + tuple(weights.shape)), axis=dropped)
            return found if math.prod(found.shape) > 1 else None

        weights, mask = reduced(self.measure, self.xp.mean), reduced(self.mask, self.xp.any)
        units, times = self.units if "unit" in axes else (), self.times if "time" in axes else None
        return Space(axes, shape, self.like, weights, mask, units, times)

    def positions(self, names: tuple[str, ...]) -> tuple[int, ...]:
        """Where the named axes stand, in order; an unknown or repeated name is an error that lists the axes."""
        unknown = [name for name in names if name not in self.axes]
        if unknown or len(set(names)) != len(names):
            raise ValueError(f"axes {names} asked for, expected distinct names out of {self.axes}")
        return tuple(i for i, name in enumerate(self.axes) if name in names)
