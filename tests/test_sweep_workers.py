"""Sweeps in worker processes: loky, dask and submitit, workers and drivers that are killed, points that hang."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from sweep_points import brief, dies_once, ends, leaves, noted, numbers, troubled

import kpflow_dyn as kp
from kpflow_dyn.sweep import Dask, Processes, Slurm
from kpflow_dyn.sweep._sweep import _known

pytest.importorskip("loky")
HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])


def recorded(folder: Path) -> int:
    return len(list((folder / "points").glob("*.npz")))


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def client() -> Iterator:
    """Two workers of dask."""
    distributed = pytest.importorskip("distributed")
    with Dask(2)._cluster(distributed) as cluster, distributed.Client(cluster) as found:
        yield found


def assert_same(a: xr.Dataset, b: xr.Dataset) -> None:
    xr.testing.assert_identical(a.drop_vars("seconds"), b.drop_vars("seconds"))


def test_processes_find_what_this_process_does(tmp_path: Path) -> None:
    sweeps = [kp.Sweep(numbers, {"g": [0.5, 1.5], "seed": range(10)}, tmp_path / name) for name in ("here", "apart")]
    sweeps[0].run()
    sweeps[1].run(kp.sweep.executor("process", workers=2))
    assert_same(sweeps[0].collect(), sweeps[1].collect())


def test_closures_reach_the_workers(tmp_path: Path) -> None:
    gain = 3.0
    sweep = kp.Sweep(lambda g: {"x": gain * g, "pid": os.getpid()}, {"g": [1.0, 2.0]}, tmp_path)
    sweep.run(Processes(1))
    np.testing.assert_array_equal(sweep.collect().x, [3, 6])
    assert os.getpid() not in sweep.collect().pid


def test_workers_have_the_threads_asked_for() -> None:
    with Processes(1, threads=1).open() as pool:
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
        assert pool.submit(os.getenv, "NPROC").result() == "1"


def test_a_killed_worker_does_not_end_the_sweep(tmp_path: Path) -> None:
    sweep = kp.Sweep(functools.partial(dies_once, str(tmp_path)), {"seed": range(20)}, tmp_path / "out")
    assert sweep.run(Processes(2)).done == 20
    np.testing.assert_array_equal(sweep.collect().square, np.arange(20) ** 2)
    assert recorded(tmp_path / "out") == 20


def test_every_kind_of_trouble_leaves_the_rest_done(tmp_path: Path) -> None:
    """A point that raises, is NaN, sleeps, ignores its interruption, kills its worker; and good ones beside them."""
    kinds = ["ignores", "dies", "raises", "nan", "sleeps", *(f"fine {i}" for i in range(10))]
    sweep = kp.Sweep(troubled, {"kind": kinds}, tmp_path)
    status = sweep.run(Processes(2), timeout=0.5, attempts=2)
    assert str(status) == "15 points: 10 done, 1 not finite, 2 failed, 2 timed out"
    errors = {failure.point["kind"]: failure.error for failure in sweep.failures()}
    assert errors["sleeps"] == errors["ignores"] == "took longer than 0.5 s"
    assert "worker process died, 2 times, the last time alone" in errors["dies"]
    assert sweep.run(Processes(2)) == status


def test_a_time_limit_leaves_no_half_imported_module_in_a_worker(tmp_path: Path) -> None:
    (tmp_path / "takes_long.py").write_text("import time\ntime.sleep(1.8)\nVALUE = 7\n")  # longer than limit and grace

    def run(n):
        sys.path.insert(0, str(tmp_path))
        import takes_long  # pyright: ignore[reportMissingImports]

        return {"x": takes_long.VALUE * n, "pid": os.getpid()}

    sweep = kp.Sweep(run, {"n": range(3)}, tmp_path / "out")
    assert sweep.run(Processes(1), timeout=0.5).done == 3
    assert len(set(sweep.collect().pid.values)) == 1  # it was not killed either


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Workers that hear SIGINT, also where the tests were started as a job that ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_points_that_leave_or_end_their_worker(tmp_path: Path) -> None:
    doors = kp.Sweep(leaves, {"kind": ["first", "exit 0", "KeyboardInterrupt", "Stop", "last"]}, tmp_path / "doors")
    assert str(doors.run(Processes(2))) == "5 points: 2 done, 3 failed"
    sweep = kp.Sweep(ends, {"kind": ["first", "_exit", "crash", "last"]}, tmp_path / "ends")
    assert str(sweep.run(Processes(2), attempts=1)) == "4 points: 2 done, 2 failed"
    errors = {failure.point["kind"]: failure.error for failure in sweep.failures()}
    assert errors["_exit"].startswith("its worker process died, once, alone (EXIT(0)): by os._exit")
    assert "(SIGABRT(-6))" in errors["crash"]


@pytest.mark.usefixtures("_interruptible")
def test_a_worker_of_the_user_s_that_is_interrupted(tmp_path: Path) -> None:
    """Our own workers do not hear SIGINT, which a terminal sends to all processes."""
    import loky

    sweep = kp.Sweep(ends, {"kind": ["first", "SIGINT", "last"]}, tmp_path)
    with loky.ProcessPoolExecutor(1) as pool:
        assert str(sweep.run(pool, attempts=1)) == "3 points: 2 done, 1 failed"
    (failure,) = sweep.failures()
    assert failure.error == "a signal interrupted it in its worker process (KeyboardInterrupt), once, alone"
    with Processes(1).open() as ours:
        assert ours.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result() == {signal.SIGINT}


ALONE = """
import sys
import kpflow_dyn as kp
from sweep_points import ends
if __name__ == "__main__":
    print(kp.Sweep(ends, {"kind": ["first", "_exit", "last"]}, sys.argv[1]).run(progress=False))
"""


def test_a_point_that_ends_the_process_of_the_sweep(tmp_path: Path) -> None:
    """The next run does the rest, and that point last and apart, which shows that it was to blame."""
    (tmp_path / "alone.py").write_text(ALONE)
    command = [sys.executable, str(tmp_path / "alone.py"), str(tmp_path / "out")]
    first, second, third = (
        subprocess.run(command, env=os.environ | {"PYTHONPATH": PATH}, capture_output=True, text=True, check=False)
        for _ in range(3)
    )
    assert first.stdout == ""
    assert second.stdout == third.stdout == "3 points: 2 done, 1 failed\n"
    sweep = kp.Sweep(ends, {"kind": ["first", "_exit", "last"]}, tmp_path / "out")
    assert "its worker process died, 2 times, the last time alone (EXIT(0))" in sweep.failures()[0].error


def test_a_point_under_way_when_its_process_is_killed_is_not_to_blame(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, {"g": [0.5], "seed": range(3)}, tmp_path)
    sweep.store.points.mkdir()
    sweep.store.suspect(next(iter(_known(sweep))))
    assert sweep.run().done == 3
    assert not list(sweep.store.points.glob("*.suspect"))


def test_what_broke_the_user_s_executor_is_computed_apart(tmp_path: Path) -> None:
    from concurrent.futures import BrokenExecutor

    import loky

    sweep = kp.Sweep(ends, {"kind": ["first", "_exit", "last"]}, tmp_path)
    with loky.ProcessPoolExecutor(1) as pool, pytest.raises(BrokenExecutor):
        sweep.run(pool)
    assert str(sweep.run()) == "3 points: 2 done, 1 failed"


def test_a_run_that_cannot_be_sent(tmp_path: Path) -> None:
    lock = threading.Lock()
    sweep = kp.Sweep(lambda n: {"x": n, "locked": lock.locked()}, {"n": [0]}, tmp_path)
    with pytest.warns(UserWarning, match="no change is noticed of lock"):
        with pytest.raises(TypeError, match=r"run cannot be sent to a worker process .*make what it holds inside"):
            sweep.run(Processes(1))
        assert sweep.run().done == 1


def test_the_user_s_own_executor_and_its_end(tmp_path: Path) -> None:
    from concurrent.futures import BrokenExecutor

    import loky

    with loky.ProcessPoolExecutor(1) as pool:
        sweep = kp.Sweep(functools.partial(dies_once, str(tmp_path)), {"seed": range(6)}, tmp_path / "out")
        with pytest.raises(BrokenExecutor):
            sweep.run(pool)
    assert sweep.run().done == 6


DRIVER = """
import functools, signal, sys
import kpflow_dyn as kp
from sweep_points import noted
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    log, out, name = sys.argv[1:]
    kp.Sweep(functools.partial(noted, log), {"seed": range(40)}, out).run(kp.sweep.executor(name, workers=2))
"""


def driver(tmp_path: Path, executor: str = "process") -> subprocess.Popen:
    """A sweep in a session of its own, as that of a terminal is."""
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "log"), str(tmp_path / "out"), executor]
    environment = os.environ | {"PYTHONPATH": PATH}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def test_a_killed_driver_resumes(tmp_path: Path) -> None:
    """What was recorded is not computed again; at most the points in flight are."""
    with driver(tmp_path) as running:
        until(lambda: recorded(tmp_path / "out") >= 10)
        running.kill()
    time.sleep(1.5)  # its workers notice, and end
    before = recorded(tmp_path / "out")
    sweep = kp.Sweep(functools.partial(noted, str(tmp_path / "log")), {"seed": range(40)}, tmp_path / "out")
    assert sweep.status().done == before < 40
    assert sweep.run().done == 40
    times = Counter((tmp_path / "log").read_text().split())
    assert len(times) == 40
    assert sum(times.values()) - 40 <= 2
    np.testing.assert_array_equal(sweep.collect().square, np.arange(40) ** 2)


@pytest.mark.parametrize("executor", ["process", "dask"])
def test_an_interrupted_driver_resumes(executor: str, tmp_path: Path) -> None:
    """Ctrl-C, which all processes of a terminal hear: a short traceback, no worker left, and the rest is done next."""
    pytest.importorskip("distributed")
    with driver(tmp_path, executor) as running:
        until(lambda: recorded(tmp_path / "out") >= 5)
        os.killpg(running.pid, signal.SIGINT)
        said = running.communicate(timeout=30)[1]
    assert running.returncode == -signal.SIGINT
    done = recorded(tmp_path / "out")
    assert 5 <= done < 40
    assert said.count("Traceback") == 1 and len(said.splitlines()) < 12, said
    assert f"KeyboardInterrupt: {done} of 40 points are recorded ({done} done); run again to resume" in said
    until(lambda: not alive(running.pid))
    sweep = kp.Sweep(functools.partial(noted, str(tmp_path / "log")), {"seed": range(40)}, tmp_path / "out")
    assert sweep.status().done == done
    assert sweep.run().done == 40


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def kill_workers(client, folder: Path, at: list[int]) -> None:
    """Kill a random worker process each time that so many points are recorded."""
    chance = random.Random(0)
    for count in at:
        until(lambda count=count: recorded(folder) >= count)
        pids = list(client.run(os.getpid).values())
        os.kill(chance.choice(pids), signal.SIGKILL)


@pytest.mark.parametrize(("points", "kills"), [(60, [20]), pytest.param(200, [20, 80, 140], marks=pytest.mark.slow)])
def test_dask_workers_killed_at_random(client, tmp_path: Path, points: int, kills: list[int]) -> None:
    """Each point is there once, and the same as in this process."""
    sweeps = [kp.Sweep(brief, {"seed": range(points)}, tmp_path / name) for name in ("here", "apart")]
    (tmp_path / "apart" / "points").mkdir(parents=True)
    killer = threading.Thread(target=kill_workers, args=(client, tmp_path / "apart", kills))
    killer.start()
    assert sweeps[1].run(client).done == points
    killer.join()
    assert recorded(tmp_path / "apart") == points
    sweeps[0].run()
    assert_same(sweeps[0].collect(), sweeps[1].collect())


def test_dask_points_that_hang_or_kill_their_worker(client, tmp_path: Path) -> None:
    kinds = ["sleeps", "raises", *(f"fine {i}" for i in range(6))]
    sweep = kp.Sweep(troubled, {"kind": kinds}, tmp_path / "troubled")
    assert str(sweep.run(client, timeout=1.0)) == "8 points: 6 done, 1 failed, 1 timed out"
    doors = kp.Sweep(leaves, {"kind": ["first", "exit 0", "KeyboardInterrupt", "last"]}, tmp_path / "doors")
    assert str(doors.run(client)) == "4 points: 2 done, 2 failed"


@pytest.mark.slow
def test_dask_points_that_end_their_worker(client, tmp_path: Path) -> None:
    sweep = kp.Sweep(ends, {"kind": ["first", "_exit", "last"]}, tmp_path)
    assert str(sweep.run(client, attempts=1)) == "3 points: 2 done, 1 failed"


def test_jobs_of_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PYTHONPATH", PATH)
    engine = Slurm(2, tmp_path / "jobs", {"timeout_min": 1}, cluster="local")
    sweep = kp.Sweep(brief, {"seed": range(3)}, tmp_path / "out")
    assert sweep.run(engine).done == 3
    leaving = kp.Sweep(leaves, {"kind": ["first", "exit 0"]}, tmp_path / "leaving")
    assert str(leaving.run(engine)) == "2 points: 1 done, 1 failed"
    np.testing.assert_array_equal(sweep.collect().square, [0, 1, 4])


@pytest.mark.slow
def test_overhead_of_a_thousand_points(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, {"g": np.arange(100.0), "seed": range(10)}, tmp_path)
    start = time.perf_counter()
    sweep.run(Processes(2))
    assert (time.perf_counter() - start) / 1000 < 0.02
