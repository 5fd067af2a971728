"""Function transforms; see `kpflow_dyn._backend.Transforms`."""

from __future__ import annotations

from kpflow_dyn._torch.rows import TORCH

jvp, vjp, vmap, compiled = TORCH.jvp, TORCH.vjp, TORCH.vmap, TORCH.compiled
each_row, index, linearised = TORCH.each_row, TORCH.index, TORCH.linearised
