"""What torch does otherwise than numpy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from kpflow_dyn._arrays.of_numpy import PRECISIONS, Library


class Torch(Library):
    """torch, on any device."""

    def normal(self, seed: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    def on_device(self, a: Tensor) -> bool:
        return a.device.type != "cpu"

    def to_numpy(self, a: Tensor) -> np.ndarray:
        a = a.detach().cpu()
        return (a.float() if a.dtype is torch.bfloat16 else a).numpy()  # numpy has no bfloat16

    def complex_of(self, real: Tensor, imaginary: Tensor) -> Tensor:
        return torch.complex(real, imaginary)

    @contextmanager
    def products_in(self, precision: str) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(PRECISIONS[precision][0])
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def split_into(self, values: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
        return list(values.split(list(sizes), axis))

    def take_at(self, values: Tensor, index: np.ndarray) -> Tensor:
        return values[:, *_places(index, values)]

    def add_at(self, zeros: Tensor, values: Tensor, index: np.ndarray) -> Tensor:
        # [probe, trial, n, width] -> [trial, n, probe, width], so that the indexed axes come first
        zeros.permute(1, 2, 0, 3).index_put_(_places(index, zeros), values.permute(1, 2, 0, 3), accumulate=True)
        return zeros


def _places(index: np.ndarray, like: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of trials [trial, 1], and of places in them [trial, n]."""
    trials = torch.arange(len(index), device=like.device)[:, None]
    return trials, torch.as_tensor(index, device=like.device)


TORCH = Torch()
