"""Torch in this process; see `kpflow_dyn._backend.Runtime`."""

import torch

PACKAGES = ("torch", "torchdiffeq")


def limit_threads(count: int) -> bool:
    """Compute on so many threads from now on."""
    torch.set_num_threads(count)
    return True


def allow_double() -> None:
    """Nothing is to be done."""
