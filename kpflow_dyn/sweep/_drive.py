"""Points handed to an executor, a few ahead of what its workers do, until every one is recorded.

A worker that dies takes the points in flight with it; nobody can tell which of them it was. They are submitted again.
A point that was in flight at too many deaths goes alone, and if its worker dies then, it is recorded as failed.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait

from kpflow_dyn.sweep._design import Point, labelled
from kpflow_dyn.sweep._executors import Engine, Given
from kpflow_dyn.sweep._store import Store
from kpflow_dyn.sweep._values import Record
from kpflow_dyn.sweep._work import Work, evaluate

DEATHS = {"KilledWorker", "UncompletedJobError"}
"""What dask and submitit raise for a worker that died, by name, so that they need not be imported."""


def drive(
    work: Work,
    points: Mapping[str, Point],
    engine: Engine,
    attempts: int,
    report: Callable[[str], None],
    deaths: int = 0,
) -> None:
    """Have every point, by key, computed and recorded; `report` is called with the key of each.

    A point may be in flight at `attempts` deaths of workers, at the last one alone; each was so at `deaths` already.
    A broken executor of the user's is raised, as it cannot be opened anew; the points that broke it are noted.
    """
    state = _Driver(work, points, attempts, report, deaths)
    while state.waiting:
        with engine.open() as executor:
            try:
                broken = state.submit_all(executor, engine.ahead)
            finally:
                if isinstance(engine, Given):  # others end with their points; loky fails at those it finds cancelled
                    state.cancel()
        if broken is not None and isinstance(engine, Given):
            for key in state.deaths.keys() & set(state.waiting):
                Store(work.folder).suspect(key)
            raise broken


class _Driver:
    """Which points wait, which are in flight, and at how many deaths each was there."""

    def __init__(
        self, work: Work, points: Mapping[str, Point], attempts: int, report: Callable[[str], None], deaths: int
    ) -> None:
        self.work, self.points, self.attempts, self.report = work, points, attempts, report
        self.waiting = deque(points)
        self.deaths = Counter(dict.fromkeys(points, deaths) if deaths else ())
        self.flight: dict[Future[None], str] = {}

    def submit_all(self, executor: Executor, ahead: int | None) -> BaseException | None:
        """Until all is done, or the executor is broken, whose error is returned."""
        try:
            while self.waiting or self.flight:
                self.fill(executor, ahead or len(self.points))
                done, _ = wait(self.flight, return_when=FIRST_COMPLETED)
                if broken := [error for future in done if (error := self.land(future))]:
                    raise broken[0]
        except BrokenExecutor as error:
            for future in wait(self.flight).done:
                self.land(future)
            return error
        return None

    def cancel(self) -> None:
        """Take back what no worker has begun."""
        for future in self.flight:
            future.cancel()

    def fill(self, executor: Executor, ahead: int) -> None:
        """Submit what may be in flight together; a point that is suspect is so alone."""
        while self.waiting and len(self.flight) < ahead:
            key = self.waiting[0]
            suspect = self.is_suspect(key)
            if self.flight and (suspect or any(map(self.is_suspect, self.flight.values()))):
                return
            self.flight[executor.submit(evaluate, self.work, key, self.points[key])] = key
            self.waiting.popleft()

    def is_suspect(self, key: str) -> bool:
        return self.deaths[key] >= self.attempts - 1

    def land(self, future: Future[None]) -> BrokenExecutor | None:
        """Take a point out of flight; a break of the executor is returned."""
        key, error = self.flight.pop(future), future.exception()
        if error is None:
            self.check(key)
        elif isinstance(error, BrokenExecutor) or type(error).__name__ in DEATHS or not isinstance(error, Exception):
            self.lost(key, error)
        else:
            raise error
        return error if isinstance(error, BrokenExecutor) else None

    def lost(self, key: str, error: BaseException) -> None:
        """A worker died, or was interrupted by a signal, while the point was in flight."""
        store, suspect = Store(self.work.folder), self.is_suspect(key)
        self.deaths[key] += 1
        if suspect and not store.has(key):
            store.write(key, Record("failed", _end(error, self.deaths[key]), point=labelled(self.points[key])))
        if store.has(key):
            self.report(key)
        else:
            self.waiting.append(key)

    def check(self, key: str) -> None:
        """The point must be on the disk that this process sees."""
        store = Store(self.work.folder)
        if not store.has(key):
            raise FileNotFoundError(
                f"a worker recorded a point that is not in {store.points}; workers on other machines need a "
                "folder that all of them see"
            )
        self.report(key)


def _end(error: BaseException, count: int) -> str:
    """How the process of a point ended, in words."""
    times = f"{count} times, the last time alone" if count > 1 else "once, alone"
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return f"a signal interrupted it in its worker process ({type(error).__name__}), {times}"
    code = re.search(r"\{(.+)\}", str(error))  # the exit codes, which loky knows
    shown = f" ({code[1]})" if code else ""
    return f"its worker process died, {times}{shown}: by os._exit, in a crash, or killed, as where memory is short"
