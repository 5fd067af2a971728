"""Recurrent cells that PyTorch has not got: the leaky-current network and its low-rank form.

torch is imported when a cell is first asked for, not before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kpflow_dyn.models.torch_cells import CTRNNCell, LowRankRNNCell

__all__ = ["CTRNNCell", "LowRankRNNCell"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kpflow_dyn.models import torch_cells

    return getattr(torch_cells, name)


def __dir__() -> list[str]:
    return __all__
