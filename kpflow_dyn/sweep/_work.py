"""What is done with one point, in whatever process: call, watch the time, record."""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

from kpflow_dyn._progress import quietly
from kpflow_dyn.sweep._design import Point, labelled
from kpflow_dyn.sweep._store import Store
from kpflow_dyn.sweep._values import Record, is_finite, variables_of

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)  # that end a program, or a point
GRACE = 1.0  # seconds that a point has to end by itself after its time was up
LONGEST_IMPORTS = 600.0  # seconds after which also an import is interrupted


@dataclass(frozen=True)
class Work:
    """What all points of a sweep share."""

    run: Callable[..., Any] | bytes  # the function, or what cloudpickle made of it
    folder: Path
    timeout: float | None  # seconds that a point may take
    driver: tuple[str, int]  # host and pid of the process that submits the points, which must not be killed


def here() -> tuple[str, int]:
    """Host and pid of this process."""
    return socket.gethostname(), os.getpid()


def evaluate(work: Work, key: str, point: Point) -> None:
    """Compute a point unless it is there, and record what came of it."""
    store = Store(work.folder)
    if store.has(key):  # this call is a repetition: its first worker died after it had recorded the point
        return
    run, start = _loaded(work.run) if isinstance(work.run, bytes) else work.run, time.perf_counter()
    ours = here() == work.driver

    def record(found: Record) -> None:
        store.write(key, replace(found, seconds=time.perf_counter() - start, point=labelled(point)))

    late = Record("timed out", f"took longer than {work.timeout} s")
    try:
        with quietly(), store.suspected(key) if ours else nullcontext(), _limited(work, lambda: record(late)):
            found = _outcome(run, point)
    except _TimeIsUp:
        found = late
    record(found)


class _TimeIsUp(BaseException):
    """Raised inside of a point that takes too long; no Exception, so that run does not take it for one of its own."""


@lru_cache(maxsize=4)
def _loaded(run: bytes) -> Callable[..., Any]:
    """One function object for all points of a process, so that what it compiles is compiled once."""
    import cloudpickle

    return cloudpickle.loads(run)


def _outcome(run: Callable[..., Any], point: Point) -> Record:
    """What came of a point, whatever it raised itself; what the handler of a signal raised is not the point's."""
    with _noted_signals() as raised:
        found = _result(run, point)
    if raised:
        raise raised[0]
    return found


def _result(run: Callable[..., Any], point: Point) -> Record:
    try:
        variables = variables_of(run(**point), point)
    except BaseException as error:
        return Record("failed", _words(error), traceback.format_exc())
    return Record("done" if is_finite(variables) else "not finite", variables=variables)


def _words(error: BaseException) -> str:
    """The kind of an error and its text, also where making that fails."""
    text = str(traceback.TracebackException.from_exception(error))
    if isinstance(error, SystemExit):
        text = f"run called sys.exit({error.code!r})"
    if isinstance(error, KeyboardInterrupt):
        text = text or "run raised it; nobody interrupted the sweep"
    return f"{type(error).__name__}: {text}"


@contextmanager
def _noted_signals() -> Iterator[list[BaseException]]:
    """What handlers of signals raise inside: Ctrl-C, kill, the time limit. These are meant for this process."""
    raised: list[BaseException] = []

    def noting(handler: Callable[..., Any]) -> Callable[..., None]:
        def handle(number: int, frame: Any) -> None:
            try:
                handler(number, frame)
            except BaseException as error:
                raised.append(error)
                raise

        return handle

    inside = threading.current_thread() is threading.main_thread()  # elsewhere no handler runs
    handlers = {number: signal.getsignal(number) for number in SIGNALS} if inside else {}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number, handler in before.items():
        signal.signal(number, noting(handler))
    try:
        yield raised
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _limited(work: Work, give_up: Callable[[], None]) -> Iterator[None]:
    """Interrupt what runs inside when its time is up; kill a worker process where that does not help."""
    if work.timeout is None:
        yield
        return
    inside, ours = threading.current_thread() is threading.main_thread(), here() == work.driver
    if ours and not inside:
        raise ValueError(
            "timeout= cannot be kept in threads of the process that runs the sweep; use worker processes, as of "
            'sweep.executor("process"), or call run from the main thread'
        )
    clock = _Clock(work.timeout)
    with _watched(clock, inside * GRACE, give_up, not ours), _alarm(clock, inside):
        yield


class _Clock:
    """When the time of a point is up. It begins anew after an import, which every process has to make once.

    No import is interrupted: half a module would stay in the process, and fail all of its later points.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begun = seconds, time.monotonic()
        self.end = self.begun + seconds

    def left(self, grace: float = 0.0) -> float:
        """Seconds, more than none."""
        return max(self.end + grace - time.monotonic(), 1e-3)

    def is_up(self, frame: FrameType | None, grace: float = 0.0) -> bool:
        """Whether the point, which is at this frame, is to be interrupted now."""
        now = time.monotonic()
        if now < self.end + grace:
            return False
        if now > self.begun + LONGEST_IMPORTS or not _imports(frame):
            return True
        self.end = now + self.seconds
        return False


def _imports(frame: FrameType | None) -> bool:
    """Whether a point is importing something, of its own or deeper down."""
    while frame is not None and frame.f_code is not _result.__code__:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def _alarm(clock: _Clock, inside: bool) -> Iterator[None]:
    """Raise in the main thread when its time is up; elsewhere Python has no way to."""
    if not inside:
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        if clock.is_up(frame):
            raise _TimeIsUp
        signal.setitimer(signal.ITIMER_REAL, clock.left())

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, clock.left())
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _watched(clock: _Clock, grace: float, give_up: Callable[[], None], killable: bool) -> Iterator[None]:
    """So many seconds after its time was up, record that and end this process."""
    if not killable:
        yield
        return
    done, over, thread = threading.Event(), threading.Lock(), threading.get_ident()

    def watch() -> None:
        while not done.wait(clock.left(grace)):
            if clock.is_up(sys._current_frames().get(thread), grace) and over.acquire(blocking=False):
                try:
                    give_up()
                finally:
                    os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        over.acquire()  # waits for nothing, unless this process is about to end
