"""What runs the points: engines that exist, behind the interface of `concurrent.futures.Executor`."""

import importlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, Protocol

from kpflow_dyn._shown import type_name
from kpflow_dyn.tasks._data import check_count, nearest

AHEAD = 2  # points in flight for each worker, so that none waits for the next one
LEAK = "2e9"  # bytes that a worker may gain before loky replaces it; its own 3e8 are less than a second framework takes
PERIOD = 1.0  # seconds between two looks whether the parent is alive


class Engine(Protocol):
    """What a sweep needs of an engine.

    Attributes:
        ahead: how many points to have in flight, or None for all that there are.
        apart: whether points run in other processes, to which `run` has to be sent.
        parallel: how many points run at once, or None where that is not known.
    """

    @property
    def ahead(self) -> int | None: ...
    @property
    def apart(self) -> bool: ...
    @property
    def parallel(self) -> int | None: ...
    def open(self) -> AbstractContextManager[Executor]:
        """A new pool of workers, closed at the end; after an error or an interrupt its workers are stopped."""
        ...


@dataclass(frozen=True)
class Local:
    """Points one after the other in this process.

    >>> with Local().open() as pool:
    ...     pool.submit(max, 1, 2).result()
    2
    """

    ahead: int | None = field(default=1, init=False)
    apart: bool = field(default=False, init=False)
    parallel: int | None = field(default=1, init=False)

    def open(self) -> AbstractContextManager[Executor]:
        """A pool of no workers."""
        return _Inline()


@dataclass(frozen=True)
class Processes:
    """Points in worker processes of this machine, by loky.

    GPUs take one process each, which sees its own alone: with one device that is `Processes(1)`. The workers of a pool
    share their environment, so for several devices take `Slurm(options={"gpus_per_node": 1})`, or start one dask worker
    for each, `CUDA_VISIBLE_DEVICES=0 dask worker tcp://host:8786 --nthreads 1` and so on, and give `Dask(address=...)`.

    Args:
        workers: how many; by default as many as there are cores that this process may use.
        threads: of torch, BLAS and XLA in each worker; one, unless workers are fewer than cores.

    Raises:
        TypeError, ValueError: workers or threads that are no whole number, or below 1.

    >>> Processes(workers=2).ahead  # points in flight
    4
    """

    workers: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        _check(self.workers, self.threads)

    @property
    def ahead(self) -> int:
        """Points in flight."""
        return AHEAD * self.parallel

    apart = True

    @property
    def parallel(self) -> int:
        """Workers."""
        return self.workers or cores()

    @contextmanager
    def open(self) -> Iterator[Executor]:
        """A pool of loky."""
        loky = _imported("loky", "sweep")
        environment = threads_environment(self.threads) | {"LOKY_MAX_MEMORY_LEAK_SIZE": LEAK}
        with _deaf_to_ctrl_c():
            pool = loky.ProcessPoolExecutor(
                self.parallel, initializer=end_with, initargs=(os.getpid(),), env=environment
            )
            pool.submit(os.getpid)  # starts them
        try:
            yield pool
        except BaseException:
            pool.shutdown(kill_workers=True)
            raise
        pool.shutdown()


@dataclass(frozen=True)
class Dask:
    """Points on the workers of dask.distributed: a cluster of this machine's, or one that runs at an address.

    Args:
        workers: worker processes of a cluster of this machine's; by default one for each core.
        threads: of torch, BLAS and XLA in each.
        address: of a scheduler that runs, "tcp://host:8786"; its workers must see the folder of the sweep.

    Raises and Example as `Processes`.
    """

    workers: int | None = None
    threads: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        _check(self.workers, self.threads)
        _check_kind("address", self.address, (str, type(None)), "tcp://host:8786")

    ahead = None
    apart = True

    @property
    def parallel(self) -> int | None:
        """Workers of a cluster of this machine's."""
        return self.workers or (cores() if self.address is None else None)

    @contextmanager
    def open(self) -> Iterator[Executor]:
        """The executor of a dask client."""
        distributed = _imported("distributed", "cluster")
        with self._cluster(distributed) as cluster, distributed.Client(cluster) as client:
            yield client.get_executor(pure=False)

    def _cluster(self, distributed: Any) -> AbstractContextManager[Any]:
        if self.address is not None:
            return nullcontext(self.address)
        with _deaf_to_ctrl_c():
            return distributed.LocalCluster(
                n_workers=self.parallel,
                threads_per_worker=1,
                dashboard_address=None,
                silence_logs=50,
                env=threads_environment(self.threads),
            )


@dataclass(frozen=True)
class Slurm:
    """Points as the jobs of SLURM arrays, by submitit.

    Args:
        workers: how many jobs run at once.
        folder: where submitit keeps its scripts, logs and pickles; on a disk that the nodes see, and not the folder of
            the sweep, which nothing unpickles.
        options: of submitit, such as {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 60}.
        cluster: "slurm"; "local" runs the jobs as processes of this machine.

    Raises and Example as `executor`.
    """

    workers: int | None = None
    folder: str | Path = "slurm_jobs"
    options: Mapping[str, Any] = field(default_factory=dict)
    cluster: str = "slurm"

    def __post_init__(self) -> None:
        _check(self.workers)
        _check_kind("folder", self.folder, (str, Path), "the name of one")
        _check_kind("options", self.options, (Mapping,), "a table of submitit's")
        _check_kind("cluster", self.cluster, (str,), '"slurm" or "local"')

    apart = True

    @property
    def ahead(self) -> int | None:
        """All points: they are the jobs of an array."""
        return None if self.cluster == "slurm" else self.workers or cores()

    @property
    def parallel(self) -> int | None:
        """Jobs at once, where it was asked for so many."""
        return self.workers

    @contextmanager
    def open(self) -> Iterator[Executor]:
        """The executor of submitit, behind the standard interface."""
        submitit = _imported("submitit", "cluster")
        from kpflow_dyn.sweep._submitted import Arrays

        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster)
        parallel = {"slurm_array_parallelism": self.workers} if self.workers else {}
        executor.update_parameters(**parallel, **self.options)
        with Arrays(executor) as pool:
            yield pool


@dataclass(frozen=True)
class Given:
    """An executor of the user's, which is neither opened nor closed here."""

    executor: Executor
    apart: bool = field(default=True, init=False)

    @property
    def ahead(self) -> int | None:
        """A few for each worker, where their number is known."""
        return self.parallel and AHEAD * self.parallel

    @property
    def parallel(self) -> int | None:
        """Workers, where their number is known."""
        return getattr(self.executor, "_max_workers", None)

    def open(self) -> AbstractContextManager[Executor]:
        """The executor itself."""
        return nullcontext(self.executor)


ENGINES = {"local": Local, "process": Processes, "dask": Dask, "slurm": Slurm}


def executor(name: str, workers: int | None = None, **options: Any) -> Engine:
    """An engine by its name, as the command line gives it.

    Args:
        name: "local" (this process), "process" (`Processes`), "dask" (`Dask`) or "slurm" (`Slurm`).
        workers: how many, where there are any.
        options: the other fields of that class.

    Raises:
        ValueError: another name, or workers < 1.
        TypeError: an option that the engine has not got.

    >>> executor("process", workers=2, threads=1)
    Processes(workers=2, threads=1)
    """
    if name not in ENGINES:
        raise ValueError(f"unknown executor {name!r}.{nearest(name, list(ENGINES))} Known: {', '.join(ENGINES)}.")
    if name == "local" and workers not in (None, 1):
        raise ValueError(f'the executor "local" is this process, got workers = {workers}; take "process"')
    return ENGINES[name](**({} if workers is None or name == "local" else {"workers": workers}), **options)


def engine_of(given: Any) -> Engine:
    """What `Sweep.run` was given, as an engine."""
    if given is None:
        return Local()
    if isinstance(given, str):
        return executor(given)
    if isinstance(given, Executor):
        return Given(given)
    if hasattr(given, "get_executor"):
        return Given(given.get_executor(pure=False))
    if isinstance(given, Local | Processes | Dask | Slurm):
        return given
    raise TypeError(
        f"executor is a {type_name(given)}, expected a name ({', '.join(ENGINES)}), what sweep.executor gives, a "
        "concurrent.futures.Executor or a dask Client"
    )


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_environment(threads: int) -> dict[str, str]:
    """Environment variables that hold torch, BLAS and XLA to so many threads; they count before a process starts."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC")
    return dict.fromkeys(names, str(threads))


class _Inline(Executor):
    """Does what it is given at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Workers that start inside do not hear it: a terminal sends it to all, and the process of the sweep ends them."""
    resource_tracker.ensure_running()  # of multiprocessing, whose start lets SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int) -> None:
    """Have this worker end when the process that started it does: loky's wait for more to do, for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PERIOD)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _imported(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this executor needs {package}: pip install 'kpflow-dyn[{extra}]'") from error


def _check(workers: int | None, threads: int = 1) -> None:
    if workers is not None:
        check_count("workers", workers, 1)
    check_count("threads", threads, 1)


def _check_kind(name: str, value: object, kinds: tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kinds):
        raise TypeError(f"{name} is {value!r}, expected {expected}")
