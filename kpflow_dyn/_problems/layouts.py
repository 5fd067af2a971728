"""States of several arrays, of any shape, laid side by side on one axis of units, and taken apart again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace, is_array, split_into
from kpflow_dyn._arrays.complex_numbers import in_halves, is_complex, of_halves


@dataclass(frozen=True)
class Layout:
    """How the arrays of a state, a pytree, lie side by side.

    Attributes:
        structure: the pytree without its arrays, as the framework describes it.
        shapes: of each array of one trial.
        complexes: which arrays are complex, and so have all real parts first, then all imaginary ones.
    """

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    complexes: tuple[bool, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many units each array has."""
        sizes = zip(self.shapes, self.complexes, strict=True)
        return tuple(math.prod(shape) * (1 + is_complex) for shape, is_complex in sizes)

    @property
    def is_plain(self) -> bool:
        """Whether a state [..., unit] is one real array of that shape itself."""
        alone = len(self.shapes) == 1 and len(self.shapes[0]) == 1 and not self.complexes[0]
        return alone and self.structure.num_nodes == 1

    def split(self, z: Array) -> Any:
        """The pytree of arrays [..., *shape] of a state [..., unit]."""
        if z.shape[-1] != sum(self.sizes):
            raise ValueError(f"the state has {z.shape[-1]} units, expected {sum(self.sizes)}, of {self}")
        parts = zip(split_into(z, self.sizes), self.complexes, strict=True)
        numbers = [of_halves(part) if halves else _together(part) for part, halves in parts]
        leaves = [a.reshape((*a.shape[:-1], *shape)) for a, shape in zip(numbers, self.shapes, strict=True)]
        return self.structure.unflatten(leaves)

    def join(self, tree: Any, what: str = "the state") -> Array:
        """The state [..., unit] of a pytree of arrays [..., *shape].

        Raises:
            ValueError: a pytree of another structure, or arrays of other shapes.
        """
        leaves = zip(self._leaves(tree, what), self.shapes, self.complexes, strict=True)
        parts = [in_halves(_flat(leaf, shape, halves, what, self)) for leaf, shape, halves in leaves]
        return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts, axis=-1)

    def join_noise(self, tree: Any, lead: int, what: str = "what g returns") -> Array:
        """Of a pytree of arrays [..., *shape] [..., unit], or of arrays [..., *shape, noise] [..., unit, noise].

        Args:
            lead: how many axes there are in front.
        """
        leaves = self._leaves(tree, what)
        if any(getattr(leaf, "ndim", 0) <= lead + len(shape) for leaf, shape in zip(leaves, self.shapes, strict=True)):
            return self.join(tree, what)
        xp = array_namespace(leaves[0])
        noise_first = self.structure.unflatten([xp.moveaxis(leaf, -1, 0) for leaf in leaves])
        return xp.moveaxis(self.join(noise_first, what), 0, -1)

    def _leaves(self, tree: Any, what: str) -> list[Any]:
        try:
            return self.structure.flatten_up_to(tree)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{what} is of another structure than z0: expected {self}") from error

    def __str__(self) -> str:
        shapes = [f"{list(s)}{' complex' * c}" for s, c in zip(self.shapes, self.complexes, strict=True)]
        return f"{self.structure} with arrays {', '.join(shapes)} of a trial"


def _flat(leaf: Any, shape: tuple[int, ...], halves: bool, what: str, layout: Layout) -> Array:
    """An array [..., *shape] as [..., n]."""
    lead = getattr(leaf, "ndim", -1) - len(shape)
    if lead < 0 or tuple(leaf.shape[lead:]) != shape or is_complex(leaf) != halves:
        got = f"{leaf.dtype} {list(leaf.shape)}" if hasattr(leaf, "shape") else repr(leaf)
        raise ValueError(f"{what} has {got} where z0 has {list(shape)}{' complex' * halves} of a trial: {layout}")
    return leaf.reshape((*leaf.shape[:lead], math.prod(shape)))


def _together(part: Array) -> Array:
    """What views of torch need: rows that lie side by side in memory."""
    return part.contiguous() if hasattr(part, "contiguous") else part


def is_plain_start(z0: Any) -> bool:
    """Whether the start of a cell is one real array, [trial, unit] or [unit]."""
    return is_array(z0) and z0.ndim < 3 and not is_complex(z0)


def start_of(
    z0: Any, trials: int, flattened: Callable[[Any], tuple[list[Array], Any]], as_part: Callable[[Any], Array]
) -> tuple[Layout, Array]:
    """The same of the start of a cell, whose parts may be [unit], for all trials, or torch's [layer, trial, unit]."""

    def of_trials(leaf: Any) -> Array:
        part = as_part(leaf)
        if part.ndim == 1:
            return array_namespace(part).broadcast_to(part, (trials, *part.shape))
        if part.ndim == 3 and part.shape[1] == trials != part.shape[0]:
            return array_namespace(part).concat([*part], axis=-1)
        return part

    return layout_of(z0, flattened, of_trials)


def layout_of(
    tree: Any, flattened: Callable[[Any], tuple[list[Array], Any]], as_part: Callable[[Any], Array]
) -> tuple[Layout, Array]:
    """The layout of a state, a pytree of arrays [trial, ...], and the state [trial, unit] itself.

    Raises:
        TypeError, ValueError: what `as_part` refuses; arrays of other numbers of trials.
    """
    leaves, structure = flattened(tree)
    parts = [as_part(leaf) for leaf in leaves]
    if not parts:
        raise ValueError("z0 has no arrays, expected a pytree of arrays [trial, ...]")
    if any(part.ndim == 0 for part in parts) or len({part.shape[0] for part in parts}) > 1:
        shapes = [tuple(part.shape) for part in parts]
        raise ValueError(f"the parts of z0 have shapes {shapes}, expected [trial, ...] with the same trials first")
    layout = Layout(structure, tuple(tuple(part.shape[1:]) for part in parts), tuple(map(is_complex, parts)))
    return layout, layout.join(structure.unflatten(parts))
