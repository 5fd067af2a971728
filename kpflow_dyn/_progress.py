"""Bars on a terminal, for what takes a while."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from kpflow_dyn._shown import plural

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

MINUTE = 60.0
LONG = 10.0  # seconds of work of which nothing is said beforehand, and in lines

Piece = TypeVar("Piece")
QUIET: ContextVar[bool] = ContextVar("quiet", default=False)  # as the work is a part of another, which is shown or not

Progress = Callable[[str, float, float | None], None]
"""(stage, done, total) of a work, as it goes on; the total is None where it is not known."""


@contextmanager
def quietly() -> Iterator[None]:
    """Works within show nothing by themselves."""
    before = QUIET.set(True)
    try:
        yield
    finally:
        QUIET.reset(before)


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
        with quietly():
            yield progress
        return
    with bars(progress) as shown, quietly():
        known: dict[str, Any] = {}

        def show(stage: str, done: float, total: float | None) -> None:
            if stage not in known:
                for earlier in known.values():
                    shown.update(earlier, total=1, completed=1)
                known[stage] = shown.add_task(stage, total=total)
            shown.update(known[stage], completed=done, total=total)

        yield show


@contextmanager
def counting(what: str, total: int, known: int, parallel: int | None = 1, show: bool = True) -> Iterator[Count]:
    """Count many pieces of work, such as "points", of which some are known; `parallel` are done at once."""
    with bars(show) as shown, quietly():
        on_bar = shown.add_task("", total=total, completed=known)
        yield Count(
            what,
            total,
            known,
            parallel,
            (lambda words: shown.console.print(words, highlight=False, soft_wrap=True)) if show else _say_nothing,
            None if shown.disable else lambda words: shown.update(on_bar, advance=1, description=words),
        )


@contextmanager
def one_by_one(
    what: str, pieces: Sequence[Piece], clock: Callable[[], float] = time.perf_counter
) -> Iterator[Iterator[Piece]]:
    """Pieces of work one after another, counted once it is seen that those which are left take long.

    The first piece tells little, as it loads and compiles, unless it took a minute.
    """

    def each() -> Iterator[Piece]:
        count, total = None, len(pieces)
        for n, piece in enumerate(pieces, 1):
            begin = clock()
            yield piece
            seconds, left = clock() - begin, total - n
            if count is not None:
                count.landed(seconds)
            elif (n > 1 or seconds > MINUTE) and left * seconds > LONG and not QUIET.get():
                count = shown.enter_context(counting(what, total, n))
                count.price(seconds)

    with ExitStack() as shown:
        yield each()


class Count:
    """How far many pieces of work are: on a bar where there is one, else in lines, ever rarer ones.

    Once it knows, it says what all of them will take, if that is long. The first piece of each worker tells little, as
    it loads and compiles, unless it took a minute.
    """

    def __init__(
        self,
        what: str,
        total: int,
        known: int,
        parallel: int | None,
        say: Callable[[str], None],
        on_bar: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.what, self.total, self.known, self.parallel = what, total, known, parallel
        self.say, self.on_bar, self.clock = say, on_bar, clock
        self.done, self.failed, self.start, self.next = 0, 0, clock(), LONG
        self.priced, self.warm = False, math.inf  # whether it has said so; when each worker had done its first piece

    @property
    def left(self) -> int:
        """Pieces that are still to be done."""
        return self.total - self.known - self.done

    def landed(self, seconds: float, failed: bool = False) -> None:
        """One more piece has been done, in so many seconds."""
        self.done, self.failed, now = self.done + 1, self.failed + failed, self.clock() - self.start
        if self.done == self.first:
            self.warm = now
        if not self.priced and (seconds > MINUTE or self.done > self.first):
            self.price(seconds)
        if self.on_bar is not None:
            self.on_bar(self._words(now))
        elif now >= self.next and self.left and self.done > self.first:
            self.next = now + max(LONG, now / 2)
            self.say(self._words(now))

    @property
    def first(self) -> int:
        return self.parallel or 1

    def price(self, seconds: float) -> None:
        """Say what those that are left take, at so many seconds each, if that is long."""
        self.priced = True
        if self.parallel and math.isfinite(seconds) and self.left * seconds / self.parallel > LONG:
            on = f" on {self.parallel} workers" if self.parallel > 1 else ""
            whole = in_time(self.left * seconds / self.parallel)
            left = plural(self.left, self.what.removesuffix("s"))
            self.say(f"{left} left, about {in_time(seconds)} each{on}: about {whole}")

    def _words(self, now: float) -> str:
        done, warm = self.known + self.done - self.failed, self.done - self.first
        left = f", about {in_time((now - self.warm) * self.left / warm)} left" if warm > 0 else ""
        return f"{done} of {self.total} {self.what} done, {self.failed} failed{left}"


def in_time(seconds: float) -> str:
    """A time as one says it, to one or two digits.

    >>> in_time(0.42), in_time(75), in_time(7260), in_time(2e5)
    ('0.4 s', '75 s', '121 min', '2.3 days')
    """
    for unit, size, most in (("s", 1.0, 120), ("min", 60.0, 180), ("h", 3600.0, 48)):
        if seconds < most * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"


def _say_nothing(words: str) -> None: ...
