"""A sweep: what runs, over which points, and where its results are."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kpflow_dyn._problems.versions import versions_of
from kpflow_dyn._progress import counting
from kpflow_dyn._shown import Row, Shown, type_name
from kpflow_dyn.sweep._code import Code, changes, name_of
from kpflow_dyn.sweep._design import Point, design
from kpflow_dyn.sweep._drive import drive
from kpflow_dyn.sweep._executors import Engine, Processes, engine_of
from kpflow_dyn.sweep._lock import locked
from kpflow_dyn.sweep._store import Store, key_of
from kpflow_dyn.sweep._values import STATUSES, Record
from kpflow_dyn.sweep._work import Work, here
from kpflow_dyn.tasks._data import check_count

if TYPE_CHECKING:
    import xarray as xr

FAILURES = ("failed", "timed out")
FRAMEWORKS = ("torch", "jax")


@dataclass(frozen=True)
class Status:
    """How many points came to what.

    Attributes:
        done: computed, all of their numbers finite.
        not_finite: computed, with a NaN or infinity among their numbers; kept.
        failed: `run` raised, or killed its process.
        timed_out: took longer than their time.
        missing: not computed yet.

    Example as `Sweep`.
    """

    done: int
    not_finite: int
    failed: int
    timed_out: int
    missing: int

    @property
    def total(self) -> int:
        """All points."""
        return self.done + self.not_finite + self.failed + self.timed_out + self.missing

    def __str__(self) -> str:
        counts = {name: getattr(self, name.replace(" ", "_")) for name in STATUSES}
        return f"{self.total} points: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n or name == "done")


@dataclass(frozen=True)
class Failure:
    """A point without a result.

    Attributes:
        point: its arguments.
        status: "failed" or "timed out".
        error: what went wrong, in a line.
        trace: the traceback, where there is one.

    Example as `Sweep`.
    """

    point: Point
    status: str
    error: str
    trace: str


class Sweep(Shown):
    """Runs a function at many points. Each point is computed once, and has its own file.

    The folder `out` holds sweep.json and points/*.npz: arrays and JSON, no pickles. Each file is there whole or not at
    all. A run that is killed loses only the points in flight; running again computes the missing points. Points belong
    to the code of `run`, to all code that it uses, and to the versions of this package and of Python. If one of them
    has changed, running is refused. This code is functions, classes and modules outside of Python and of installed
    packages, and values of globals, closures, defaults and attributes; not files that `run` reads. Changes that points
    make themselves, such as filling a list, count only in a new `Sweep`.

    A worker keeps `run` from point to point, so jax.jit compiles once for all points of the same shapes.

    Args:
        run: called as run(**point), in worker processes unless the executor is the default. Returns a dict of numbers,
            strings, real arrays, xr.DataArrays or Estimates (which give name and name_stderr), or a Dataset. A point
            that raises, also by sys.exit, is recorded as failed; one with a NaN is kept and flagged. In worker
            processes a point that ends its process (os._exit, a crash) is recorded as failed. In this process it ends
            the sweep too; the next run computes it last, in a process of its own.
        over: a dict of axes is a grid. A list of dicts is a list of points, as from `sweep.zipped`, `sweep.random` and
            `sweep.sobol`. Values are numbers, strings, bools or frozen dataclasses.
        out: the folder; created if it does not exist.
        attrs: facts for its dataset and its page, by name: the model, the task, its title.

    Raises:
        TypeError, ValueError: a run that is not a function, or a value that cannot name a point.

    >>> import tempfile, kpflow_dyn as kp
    >>> def run(g, seed):
    ...     return {"gain": 2 * g + seed}
    >>> sweep = kp.Sweep(run, over={"g": [0.5, 1.5], "seed": range(3)}, out=tempfile.mkdtemp())
    >>> print(sweep.run())
    6 points: 6 done
    >>> sweep.collect().gain.sel(g=1.5).values
    array([3., 4., 5.])
    """

    def __init__(
        self,
        run: Callable[..., Any],
        over: Mapping[str, Iterable[Any]] | Iterable[Mapping[str, Any]],
        out: str | Path,
        attrs: Mapping[str, str | float] | None = None,
    ) -> None:
        if not callable(run):
            raise TypeError(f"run is a {type_name(run)}, expected a function that is called as run(**point)")
        self.function: Any = run
        self.design = design(over)
        self.store = Store(Path(out).absolute())
        self.attrs = dict(attrs or {})

    def _shown(self) -> tuple[str, list[Row]]:
        return "Sweep", _rows(self)

    def run(
        self,
        executor: Engine | Any = None,
        timeout: float | None = None,
        retry_failed: bool = False,
        fresh: bool = False,
        attempts: int = 3,
        progress: bool = True,
    ) -> Status:
        """Compute the points that are missing.

        Args:
            executor: `sweep.executor("local" | "process" | "dask" | "slurm", workers=...)` or its name; a
                `concurrent.futures.Executor`; a dask `Client`. By default points run in this process. `run` reaches
                other processes through cloudpickle, and what it imports must be importable there.
            timeout: seconds that a point may take. It is interrupted then, and after another second its process is
                killed (not this one: here code that Python cannot interrupt ends by itself). Then it is "timed out".
                An import is waited for, and the time begins anew after it. Tracing and compiling count: leave time for
                them, as the first point of each process takes longer.
            retry_failed: compute anew what failed or timed out.
            fresh: delete the points that are there, and begin anew.
            attempts: how many deaths of worker processes a point may be in flight at. Before the last one it runs
                alone, so that no point is given up for what another one does.
            progress: show a bar on a terminal; elsewhere, as in a log, a line now and then if it takes long.

        Raises:
            ValueError: the folder holds points of other code (it says what changed); a timeout that is not positive.
            BlockingIOError: another process runs a sweep in this folder (it says which).
            OSError: the folder cannot be written; what was recorded is kept.
            KeyboardInterrupt: Ctrl-C, after the workers were stopped; it says how many points came to what.
            ModuleNotFoundError: an executor whose package is not installed.
        """
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout} s, expected a positive number, or None for no limit")
        check_count("attempts", attempts, 1)
        engine, store, code = engine_of(executor), self.store, self._code.now()
        points = _by_key(self.design.points, code)
        if opaque := self._code.opaque:
            warnings.warn(
                f"run reaches what cannot be compared, so no change is noticed of {', '.join(opaque)}", stacklevel=2
            )
        try:
            store.folder.mkdir(parents=True, exist_ok=True)
            with locked(store.folder):
                store.begin(code, fresh, over=self.design.labelled(), attrs=_attrs(self))
                missing = _missing(points, store, retry_failed)
                _drive(self, missing, engine, timeout, attempts, progress)
        except KeyboardInterrupt as error:
            raise _stopped(error, store, points, fresh) from None
        except BlockingIOError:
            raise
        except OSError as error:
            raise _stuck(error, store) from error
        finally:
            self._code.called(code)
        return self.status()

    def status(self) -> Status:
        """How many points came to what, by the files that are there; warns where these are of other code than `run`."""
        counts = _counts(_known(self), self.store)
        return Status(**{name.replace(" ", "_"): n for name, n in counts.items()})

    def failures(self) -> list[Failure]:
        """The points that failed or timed out, and why; warns where they are of other code than `run` is now."""
        records = [(point, self.store.read(key, values=False)) for key, point in _known(self).items()]
        return [Failure(point, r.status, r.error, r.trace) for point, r in records if r.status in FAILURES]

    def collect(self) -> xr.Dataset:
        """All results as one dataset.

        The dimensions of a grid are its axes; of a list of points there is one, `point`, with the arguments along it.
        Points without a result are NaN (texts are empty). Beside the results there are

            done        whether there is a result
            status      "done", "not finite" (a NaN or infinity among the numbers), "failed", "timed out" or "missing"
            error       what went wrong
            seconds     what the point took

        Arrays of other sizes at other points are filled up with NaN; a coordinate that is another one at other points
        becomes a variable.

        Raises:
            ValueError: a variable whose dimensions differ from point to point, or a damaged file.

        Warns:
            UserWarning: the points come of other code than `run` is now.
        """
        from kpflow_dyn.sweep._collect import dataset_of

        records: list[Record] = [self.store.read(key) for key in _known(self)]
        return dataset_of(self.design, records, (self.store.about() or {}).get("attrs", _attrs(self)))

    @cached_property
    def _code(self) -> Code:
        return Code(self.function)


def _attrs(sweep: Sweep) -> dict[str, Any]:
    """What files and datasets say of it."""
    return {"run": name_of(sweep.function), **sweep.attrs, **versions_of(FRAMEWORKS)}


def _known(sweep: Sweep) -> dict[str, Point]:
    """The points by the keys that they have in the folder, with a warning where these are of other code."""
    now = sweep._code.now()
    code = sweep.store.code() or now
    if differ := changes(code, now):
        warnings.warn(
            f"the points in {sweep.store.folder} are of other code: {', '.join(differ)} changed since", stacklevel=3
        )
    return _by_key(sweep.design.points, code)


def _counts(points: Iterable[str], store: Store) -> dict[str, int]:
    """How many points came to what."""
    counts = Counter(store.read(key, values=False).status for key in points)
    return {name: counts[name] for name in STATUSES}


def _stopped(error: KeyboardInterrupt, store: Store, points: Collection[str], fresh: bool) -> KeyboardInterrupt:
    """The interrupt, saying what is kept and how to go on; where it came tells nothing."""
    again = "run again without fresh" if fresh else "run again"
    counts = _counts(points, store)
    came = ", ".join(f"{n} {name}" for name, n in counts.items() if name != "missing" and (n or name == "done"))
    recorded = sum(counts.values()) - counts["missing"]
    error.args = (f"{recorded} of {len(points)} points are recorded ({came}); {again} to resume",)
    return error.with_traceback(None)


def _stuck(error: OSError, store: Store) -> OSError:
    why = f"cannot go on in {store.folder} ({error.strerror or error}); what is recorded there is kept, and "
    return OSError(error.errno, f"{why}running again computes the rest")


def _rows(sweep: Sweep) -> list[Row]:
    """What a sweep prints of itself: how many points have a file, which is quicker to see than what came of each."""
    over = " x ".join(f"{name} {len(values)}" for name, values in (sweep.design.axes or {}).items())
    points = _by_key(sweep.design.points, sweep.store.code() or {})
    done = sum(map(sweep.store.has, points))
    rows: list[Row] = [("run", name_of(sweep.function)), ("over", over or "a list of points")]
    rows.append(("points", f"{len(points)}, of which {done} computed, {len(points) - done} missing"))
    return [*rows, ("out", str(sweep.store.folder))]


def _by_key(points: Iterable[Point], code: Mapping[str, str]) -> dict[str, Point]:
    return {key_of(point, code): point for point in points}


def _missing(points: dict[str, Point], store: Store, retry_failed: bool) -> dict[str, Point]:
    for key in points if retry_failed else ():
        if store.is_suspect(key) or store.read(key, values=False).status in FAILURES:
            store.forget(key)
    return {key: point for key, point in points.items() if not store.has(key)}


def _sent(function: Callable[..., Any], engine: Engine) -> Any:
    """`run` as it goes to the workers: pickled once."""
    if not engine.apart:
        return function
    try:
        import cloudpickle
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this executor needs cloudpickle: pip install 'kpflow-dyn[sweep]'") from error
    try:
        return cloudpickle.dumps(function)
    except Exception as error:
        raise TypeError(
            f"run cannot be sent to a worker process ({type(error).__name__}: {error}); make what it holds inside of "
            "run, or compute in this process, where retry_failed=True also takes the points that a process died of"
        ) from error


def _drive(
    sweep: Sweep, missing: dict[str, Point], engine: Engine, timeout: float | None, attempts: int, progress: bool
) -> None:
    """Compute what is missing; last and apart the points at which a process died before, as it may have been of them.

    That process was this sweep's own, or one of an executor that broke.
    """
    store, total = sweep.store, len(sweep.design.points)
    suspects = {key: point for key, point in missing.items() if store.is_suspect(key)}
    others = {key: point for key, point in missing.items() if key not in suspects}
    with counting("points", total, total - len(missing), engine.parallel, progress) as count:

        def report(key: str) -> None:
            record = store.read(key, values=False)
            count.landed(record.seconds, record.status in FAILURES)

        def compute(points: dict[str, Point], engine: Engine, attempts: int, deaths: int = 0) -> None:
            if points:
                work = Work(_sent(sweep.function, engine), store.folder, timeout, here())
                drive(work, points, engine, attempts, report, deaths)

        compute(others, engine, attempts)
        compute(suspects, Processes(1), attempts=2, deaths=1)
        for key in suspects:
            store.clear(key)
