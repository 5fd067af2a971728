"""What the package asks of an array library beyond the array API standard, as numpy does it; the others differ."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat
import numpy as np
from array_api_compat import array_namespace

Array = Any

PRECISIONS = {"tf32": ("high", "tensorfloat32"), "bf16": ("medium", "bfloat16")}  # as torch and JAX call them
CHUNK = 2**22  # entries of a vector block that are widened to float64 at a time
ADDED_UP = 2**12  # entries that a float32 product adds up before the sum goes on in float64


class Library:
    """numpy, and what torch shares with it; the functions of `_arrays` of the same names say what each method does."""

    def normal(self, seed: int, shape: tuple[int, ...], like: Array) -> Array:
        return np.random.default_rng(seed).standard_normal(shape).astype(like.dtype)

    def device(self, a: Array) -> Any:
        return array_api_compat.device(a)

    def on_device(self, a: Array) -> bool:
        return False

    def empty_row(self, like: Array, of_trials: bool) -> Array:
        nothing = like[like.ndim * (slice(0, 0),)].reshape(-1)[:0]
        return array_namespace(like).zeros_like(nothing)  # which keeps no memory of `like`

    def like_numpy(self, values: np.ndarray, like: Array) -> Array:
        return array_namespace(like).asarray(values, dtype=like.dtype, device=self.device(like))

    def is_finite(self, a: Array) -> bool:
        xp = array_namespace(a)
        return bool(xp.all(xp.isfinite(a)))

    def finite_rows(self, a: Array) -> np.ndarray:
        xp = array_namespace(a)
        return self.to_numpy(xp.all(xp.isfinite(a), axis=-1))

    def widened(self, a: Array, width: int) -> Array:
        zeros = array_namespace(a).zeros((*a.shape[:-1], width), dtype=a.dtype, device=self.device(a))
        return array_namespace(a).concat([a, zeros], axis=-1)

    def side_by_side(self, parts: Sequence[Array], axes: int) -> Array:
        flat = [part.reshape((*part.shape[:axes], -1)) for part in parts]
        return array_namespace(flat[0]).concat(flat, axis=-1)

    def after(self, first: Array, values: Array) -> Array:
        return array_namespace(values).concat([first[:, None], values[:, :-1]], axis=1)

    def placed(self, values: Array, row: Array, axis: int) -> Array:
        return values

    def to_numpy(self, a: Array) -> np.ndarray:
        return np.asarray(a)

    def complex_of(self, real: Array, imaginary: Array) -> Array:
        return real + 1j * imaginary

    def concretely(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def full_precision(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def products_in(self, precision: str) -> AbstractContextManager[Any]:
        return nullcontext()

    def reshaped(self, a: Array, shape: tuple[int, ...]) -> Array:
        return a.reshape(shape)

    def joined(self, head: Array, rest: Iterator[Array], count: int) -> Array:
        out = array_namespace(head).empty((count, *head.shape[1:]), dtype=head.dtype, device=self.device(head))
        at = head.shape[0]
        out[:at] = head
        for rows in rest:
            out[at : at + rows.shape[0]] = rows
            at += rows.shape[0]
        return out

    def split_into(self, values: Array, sizes: Sequence[int], axis: int) -> list[Array]:
        ends: Any = np.cumsum(sizes)[:-1].tolist()
        return np.split(values, ends, axis)

    def take_at(self, values: Array, index: np.ndarray) -> Array:
        return values[:, np.arange(len(index))[:, None], index]

    def taken(self, values: Array, places: np.ndarray) -> Array:
        flat = self.take_at(values.reshape((1, *values.shape[:2], -1)), places)[0]  # [trial, n, width]
        return flat.reshape((*places.shape, *values.shape[2:]))

    def add_at(self, zeros: Array, values: Array, index: np.ndarray) -> Array:
        places: Any = (slice(None), np.arange(len(index))[:, None], index)
        np.add.at(zeros, places, values)
        return zeros

    def to_double(self, a: Array) -> Array:
        xp = array_namespace(a)
        return xp.astype(a, xp.float64)

    def gram(self, a: Array, b: Array) -> Array:
        if a.dtype == array_namespace(a).float64:
            return a @ b.T
        step = max(1, CHUNK // max(1, a.shape[0], b.shape[0]))
        chunks = [(a[:, i : i + step], b[:, i : i + step]) for i in range(0, a.shape[1], step)]
        total = self.to_double(chunks[0][0]) @ self.to_double(chunks[0][1]).T
        for left, right in chunks[1:]:
            total = total + self.to_double(left) @ self.to_double(right).T
        return total

    def row_dots(self, a: Array, b: Array) -> Array:
        step = max(1, CHUNK // max(1, a.shape[0]))
        parts = ((a[:, i : i + step], b[:, i : i + step]) for i in range(0, max(1, a.shape[1]), step))
        with np.errstate(over="ignore", under="ignore"):
            return sum(array_namespace(a).sum(self.to_double(x) * self.to_double(y), axis=1) for x, y in parts)

    def dots(self, a: Array, b: Array) -> Array:
        xp = array_namespace(a)
        if a.dtype == xp.float64:
            return a @ b.T
        whole = a.shape[1] // ADDED_UP * ADDED_UP
        left, right = (rows[:, :whole].reshape((rows.shape[0], whole // ADDED_UP, ADDED_UP)) for rows in (a, b))
        parts = xp.matmul(xp.permute_dims(left, (1, 0, 2)), xp.permute_dims(right, (1, 2, 0)))
        parts = xp.concat([parts, (a[:, whole:] @ b[:, whole:].T)[None]], axis=0)
        return xp.sum(self.to_double(parts), axis=0)

    def linear_solvers(self) -> Any:
        return None


NUMPY = Library()
