"""The two sets of model classes, and the one place that chooses between them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

CELLS = {"torch": "_torch_cells", "jax": "_jax_cells"}
FIELDS = {"torch": "_torch_fields", "jax": "jax"}


def cells_of(framework: str) -> Any:
    """The module with a framework's recurrent cells; its `make` gives one of them, or of the framework's own."""
    return import_module(f"kpflow_dyn.models.{CELLS[framework]}")


def fields_of(framework: str) -> Any:
    """The module with a framework's fields."""
    return import_module(f"kpflow_dyn.models.{FIELDS[framework]}")
