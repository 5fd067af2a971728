"""What the package needs of an array library beyond the array API standard: random numbers, and the way to numpy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import array_api_compat
import numpy as np
from array_api_compat import array_namespace, is_jax_array, is_torch_array

Array = Any
Rows = Callable[[Array], Array]
"""A map on blocks of rows [b, n] -> [b, m]."""

__all__ = [
    "Array",
    "Random",
    "Rows",
    "add_at",
    "array_namespace",
    "concretely",
    "device",
    "empty_row",
    "full_precision",
    "is_jax_array",
    "is_torch_array",
    "is_torch_module",
    "joined",
    "like_numpy",
    "placed",
    "products_in",
    "take_at",
    "to_numpy",
]


class Random:
    """A stream of random arrays, in the library and on the device of a given array.

    Args:
        seed: an int (the same int gives the same stream), or a `Random` to continue.
    """

    def __init__(self, seed: int | Random = 0) -> None:
        if not isinstance(seed, int | np.integer | Random):
            raise TypeError(f"seed must be an int or a Random, got {type(seed).__name__}")
        self._sequence = seed._sequence if isinstance(seed, Random) else np.random.SeedSequence(int(seed))

    def _next(self) -> int:
        return int(self._sequence.spawn(1)[0].generate_state(1, np.uint64)[0] >> np.uint64(1))

    def normal(self, shape: tuple[int, ...], like: Array) -> Array:
        """Independent standard normal numbers, with the library, dtype and device of `like`; sharded like its rows."""
        seed = self._next()
        if is_torch_array(like):
            import torch

            generator = torch.Generator(like.device).manual_seed(seed)
            return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        if is_jax_array(like):
            from kpflow_dyn._arrays.sharding import normal

            return normal(seed, shape, like)
        return np.random.default_rng(seed).standard_normal(shape).astype(like.dtype)


def is_torch_module(model: object) -> bool:
    """Whether a model is torch's, without importing torch."""
    return "torch" in sys.modules and isinstance(model, sys.modules["torch"].nn.Module)


def device(a: Array) -> Any:
    """The device of an array; of a sharded one, the placement of a copy on each of its devices."""
    if is_jax_array(a):
        from kpflow_dyn._arrays.sharding import shared_place

        return shared_place(a)
    return array_api_compat.device(a)


def empty_row(like: Array, of_trials: bool) -> Array:
    """An array [0] of the library, dtype and device of `like`, which may be sharded by trials, as rows then are."""
    if is_jax_array(like):
        from kpflow_dyn._arrays.sharding import empty_row

        return empty_row(like, of_trials)
    return like.reshape(-1)[:0]


def placed(values: Array, row: Array, axis: int) -> Array:
    """Values sharded by trials as `like` is; trials are on the axis, which is counted from the last."""
    if is_jax_array(row):
        from kpflow_dyn._arrays.sharding import placed

        return placed(values, row, axis)
    return values


def to_numpy(a: Array) -> np.ndarray:
    """A numpy copy or view of an array of any library, on any device."""
    return a.detach().cpu().numpy() if is_torch_array(a) else np.asarray(a)


def like_numpy(values: np.ndarray, like: Array) -> Array:
    """Numpy numbers as an array of the library, dtype and device of `like`."""
    return array_namespace(like).asarray(values, dtype=like.dtype, device=device(like))


def concretely(like: Array) -> AbstractContextManager[Any]:
    """Compute what does not depend on traced arrays at once, also inside a `jax.jit`."""
    if not is_jax_array(like):
        return nullcontext()
    import jax

    return jax.ensure_compile_time_eval()


def full_precision(like: Array) -> AbstractContextManager[Any]:
    """Products of float32 in float32: JAX takes fewer digits on accelerators, unless its configuration says more.

    Whoever sets `jax.default_matmul_precision` gets that. In torch float32 is the default already.
    """
    if is_jax_array(like):
        import jax

        if jax.config.values["jax_default_matmul_precision"] is None:
            return jax.default_matmul_precision("highest")
    return nullcontext()


PRECISIONS = {"tf32": ("high", "tensorfloat32"), "bf16": ("medium", "bfloat16")}  # as torch and JAX call them


@contextmanager
def products_in(precision: str | None, like: Array) -> Iterator[None]:
    """Products of float32 from as many digits as "tf32" or "bf16" have, where the device can; None changes nothing."""
    for_torch, for_jax = PRECISIONS.get(precision or "", (None, None))
    if for_torch is None:
        yield
    elif is_jax_array(like):
        import jax

        with jax.default_matmul_precision(for_jax):
            yield
    elif is_torch_array(like):
        import torch

        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(for_torch)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        yield


def joined(parts: Iterable[Array], count: int) -> Array:
    """Blocks with this total number of rows in one array; where arrays can change, each is written into its place."""
    parts = iter(parts)
    head = next(parts)
    if (at := head.shape[0]) == count:
        return head
    xp = array_namespace(head)
    if is_jax_array(head):
        return xp.concat([head, *parts], axis=0)
    out = xp.empty((count, *head.shape[1:]), dtype=head.dtype, device=device(head))
    out[:at] = head
    for rows in parts:
        out[at : at + rows.shape[0]] = rows
        at += rows.shape[0]
    return out


def take_at(values: Array, index: np.ndarray) -> Array:
    """The values [probe, trial, n, width] at the places index [trial, m]: [probe, trial, m, width]."""
    if is_jax_array(values):
        import jax  # a map over trials is seen to need nothing of other trials

        return jax.vmap(lambda own, places: own[:, places], (1, 0), 1)(values, index)
    places = np.arange(len(index))[:, None], index
    trials, places = (array_namespace(values).asarray(numbers, device=device(values)) for numbers in places)
    return values[:, trials, places]


def add_at(values: Array, index: np.ndarray, size: int) -> Array:
    """Add values [probe, trial, n, width] into zeros [probe, trial, size, width] at the places index [trial, n]."""
    xp = array_namespace(values)
    zeros = xp.zeros((*values.shape[:2], size, values.shape[3]), dtype=values.dtype, device=device(values))
    if is_jax_array(values):
        import jax

        return jax.vmap(lambda own, places, new: own.at[:, places].add(new), (1, 0, 1), 1)(zeros, index, values)
    rows, columns = (xp.asarray(numbers, device=device(values)) for numbers in (np.arange(len(index))[:, None], index))
    zeros.permute(1, 2, 0, 3).index_put_((rows, columns), values.permute(1, 2, 0, 3), accumulate=True)
    return zeros
