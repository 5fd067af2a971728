"""The rows of the zoo in words: on the terminal, and as a page of the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path("docs/zoo.md")


def line(row: dict[str, Any]) -> str:
    """One row on the terminal."""
    if "errors" not in row:
        return f"{row['name']:45} {row['outcome']}: {row['sentence']}"
    worst = max(row["errors"].values())
    text = (
        f"{row['name']:45} {row['outcome']:6} {worst:8.1e} {row['road']:6} road {row['sites']:4} sites "
        f"{row['seconds']:6.1f} s  ntk {row['ratio']:6.2f} of vjp + jvp  {row['MiB']:6.0f} MiB"
    )
    return f"{text}  {row['sentence']}" if row["sentence"] else text


def summary(rows: list[dict[str, Any]], seconds: float) -> str:
    right = [row for row in rows if row["outcome"] == "right"]
    first = [row for row in right if row["road"] == "first"]
    return f"{len(rows)} members, {len(right)} right, {len(first)} on the first road, {seconds:.0f} s"


def page(rows: list[dict[str, Any]], seconds: float) -> str:
    return summary(rows, seconds)
