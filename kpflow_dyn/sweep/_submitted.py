"""The jobs of submitit behind the interface of `concurrent.futures.Executor`."""

import threading
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

PERIOD = 0.2  # seconds between two looks at the jobs
MOST = 1000  # jobs of one array, SLURM's own limit unless a site has set another


class Arrays(Executor):
    """Submits what has gathered as one array to an executor of submitit, and passes on what its jobs return."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.gathered: list[tuple[Future[Any], Any]] = []
        self.jobs: list[tuple[Future[Any], Any]] = []
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """The same as of any executor."""
        future: Future[Any] = Future()
        with self.lock:
            self.gathered.append((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Cancel the jobs that have not ended."""
        self.closed.set()
        self.watcher.join()
        for _future, job in self.jobs:
            job.cancel()

    def _watch(self) -> None:
        while not self.closed.wait(PERIOD):
            self._send()
            self.jobs = [(future, job) for future, job in self.jobs if not _passed_on(future, job)]

    def _send(self) -> None:
        with self.lock:
            sent, self.gathered = self.gathered[:MOST], self.gathered[MOST:]
        if sent:
            try:
                with self.executor.batch():
                    jobs = [self.executor.submit(call) for _future, call in sent]
            except Exception as error:
                for future, _call in sent:
                    future.set_exception(error)
                return
            self.jobs += [(future, job) for (future, _call), job in zip(sent, jobs, strict=True)]


def _passed_on(future: Future[Any], job: Any) -> bool:
    """Whether a job has ended, in which case its future knows."""
    if not job.done():
        return False
    try:
        future.set_result(job.result())
    except Exception as error:
        future.set_exception(error)
    return True
