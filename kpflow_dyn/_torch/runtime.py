"""Torch in this process; see `kpflow_dyn._backend.Runtime`."""

import re

import torch
from torch import Tensor, nn

PACKAGES = ("torch", "torchdiffeq")


def limit_threads(count: int) -> bool:
    """Compute on so many threads from now on."""
    torch.set_num_threads(count)
    return True


def allow_double() -> None:
    """Nothing is to be done."""


def devices() -> list[str]:
    """What can be computed on."""
    return ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]


def settings() -> dict[str, str]:
    """How torch computes, in words."""
    library = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return {
        "default precision": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32 products": f"{torch.get_float32_matmul_precision()} (highest is without TF32)",
        "TF32 in cuDNN": "allowed" if torch.backends.cudnn.allow_tf32 else "not allowed",
        "threads": str(torch.get_num_threads()),
        "BLAS": library.group(1) if library else "unknown",
    }


def example(device: str, dtype: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A small cell, inputs [trial, time, input] and a start [trial, unit], on a device."""
    rng = torch.Generator().manual_seed(0)
    cell = nn.RNNCell(3, 8)
    for parameter in cell.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) / 3
    place = {"device": device, "dtype": getattr(torch, dtype)}
    x, start = (torch.randn(shape, generator=rng).to(**place) for shape in ((4, 6, 3), (4, 8)))
    return cell.to(**place), x, start
