"""Bars on a terminal, for what takes a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

Progress = Callable[[str, float, float | None], None]
"""(stage, done, total) of a work, as it goes on; the total is None where it is not known."""


def bars(show: bool = True) -> Bars:
    """Progress bars on stderr, removed at the end; none where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal))


@contextmanager
def stages(progress: bool | Progress = True) -> Iterator[Progress]:
    """A line for each stage, with a bar where the amount of work is known; or a function of the user's own."""
    if not isinstance(progress, bool):
        yield progress
        return
    with bars(progress) as shown:
        known: dict[str, Any] = {}

        def show(stage: str, done: float, total: float | None) -> None:
            if stage not in known:
                for earlier in known.values():
                    shown.update(earlier, total=1, completed=1)
                known[stage] = shown.add_task(stage, total=total)
            shown.update(known[stage], completed=done, total=total)

        yield show
