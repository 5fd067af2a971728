"""Python that stands in Markdown files of this repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def python_blocks(page: Path) -> list[str]:
    """Its fenced blocks of Python, in their order."""
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def run(*blocks: str) -> dict[str, Any]:
    """The names that they leave, one after another in one namespace."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(block, names)  # our own
    return names
