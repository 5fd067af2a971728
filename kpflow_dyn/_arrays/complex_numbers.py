"""Complex numbers as real ones: in pairs on a last axis, as torch.view_as_real has them, or in two halves of an axis.

The real inner product of pairs, Re a conj(b), is that of the package; a gradient is Re + i Im then, as in torch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from kpflow_dyn._arrays import Array, array_namespace, library_of, split_into


def is_complex(a: Array) -> bool:
    """Whether an array, or what stands for one, has complex numbers."""
    return "complex" in str(a.dtype)


def complex_of(real: Array, imaginary: Array) -> Array:
    """real + i imaginary."""
    return library_of(real).complex_of(real, imaginary)


def in_pairs(z: Array) -> Array:
    """[...] -> [..., 2]; what is real already stays as it is."""
    return array_namespace(z).stack([z.real, z.imag], axis=-1) if is_complex(z) else z


def of_pairs(pairs: Array) -> Array:
    """The inverse, of complex numbers."""
    return complex_of(pairs[..., 0], pairs[..., 1])


def in_halves(z: Array, axis: int = -1) -> Array:
    """All real parts, then all imaginary parts, along an axis; what is real already stays as it is."""
    return array_namespace(z).concat([z.real, z.imag], axis=axis) if is_complex(z) else z


def of_halves(halves: Array, axis: int = -1) -> Array:
    """The inverse, of complex numbers."""
    behind = (slice(None),) * (-1 - axis)
    half = halves.shape[axis] // 2
    return complex_of(halves[(..., slice(half), *behind)], halves[(..., slice(half, None), *behind)])


def count(value: Array) -> int:
    """How many real numbers an array has."""
    return math.prod(value.shape) * (2 if is_complex(value) else 1)


def flat(value: Array) -> Array:
    """[n], the pairs of complex numbers one after another."""
    return in_pairs(value).reshape(-1)


def as_flat(numbers: Array, like: Array) -> Array:
    """Real numbers [..., n] in the form of `like`, [..., *shape]: the inverse of `flat`, of blocks too."""
    lead = numbers.shape[:-1]
    if is_complex(like):
        return of_pairs(numbers.reshape((*lead, *like.shape, 2)))
    return numbers.reshape((*lead, *like.shape))


def vector_of(values: Iterable[Array]) -> Array:
    """[n]: the real numbers of some arrays, one array after the other."""
    parts = [*map(flat, values)]
    return array_namespace(parts[0]).concat(parts, axis=0)


def split(numbers: Array, like: Sequence[Array]) -> list[Array]:
    """The inverse: real numbers [..., n] in the forms of `like`, [..., *shape]."""
    parts = split_into(numbers, [*map(count, like)])
    return [as_flat(part, value) for part, value in zip(parts, like, strict=True)]


def by_name(numbers: Array, like: Mapping[str, Array]) -> dict[str, Array]:
    """The same by name."""
    return dict(zip(like, split(numbers, [*like.values()]), strict=True))
