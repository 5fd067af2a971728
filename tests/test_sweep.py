"""Sweeps in this process: designs, what is recorded and collected, what resumes, and what is refused."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from sweep_points import LEAVING, Law, brief, large, leaves, noted, numbers, troubled

import kpflow_dyn as kp
from kpflow_dyn._progress import Count
from kpflow_dyn.sweep import random, sobol, zipped
from kpflow_dyn.sweep._code import changes, code_of
from kpflow_dyn.sweep._lock import locked

GRID = {"g": [0.5, 1.5], "seed": range(3)}


def test_values_of_every_point(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, GRID, tmp_path)
    sweep.run()
    found = sweep.collect()
    assert found.gain.dims == ("g", "seed")
    assert found.line.dims == ("g", "seed", "line_0")
    for g in GRID["g"]:
        for seed in GRID["seed"]:
            point = found.sel(g=g, seed=seed)
            assert point.gain == g + 10 * seed
            np.testing.assert_array_equal(point.line, g * np.arange(3.0))
    assert bool(found.done.all())


def test_a_list_of_points_has_one_dimension(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, zipped({"g": [0.5, 1.5], "seed": [3, 4]}), tmp_path)
    assert sweep.run().done == 2
    found = sweep.collect()
    assert found.gain.dims == ("point",)
    np.testing.assert_array_equal(found.gain, [30.5, 41.5])
    np.testing.assert_array_equal(found.seed, [3, 4])


@pytest.mark.parametrize("draw", [random, sobol])
def test_random_designs(draw) -> None:
    points = draw({"g": (1.0, 3.0), "cell": ["rnn", "gru", "lstm"]}, 64, seed=1)
    assert points == draw({"g": (1.0, 3.0), "cell": ["rnn", "gru", "lstm"]}, 64, seed=1)
    assert points[:5] == draw({"g": (1.0, 3.0), "cell": ["rnn", "gru", "lstm"]}, 5, seed=1)
    assert points != draw({"g": (1.0, 3.0), "cell": ["rnn", "gru", "lstm"]}, 64, seed=2)
    g = np.array([point["g"] for point in points])
    assert ((g >= 1) & (g <= 3)).all()
    assert {point["cell"] for point in points} == {"rnn", "gru", "lstm"}


def test_sobol_points_are_even() -> None:
    """Each of 64 intervals holds one of 64 points, which random ones would not."""
    points = sobol({"g": (0.0, 64.0), "h": (0.0, 64.0)}, 64)
    for name in "gh":
        assert sorted(int(point[name]) for point in points) == list(range(64))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"g": []}, "no points"),
        ({"g": [1, 1]}, "twice"),
        ({"g": 1.0}, "expected a list"),
        ({"g": "abc"}, "expected a list"),
        ({"g": [float("nan")]}, "NaN"),
        ({"g": [[1]]}, "frozen dataclass"),
        ({"g": [None]}, "frozen dataclass"),
        ([{"g": 1}, {"h": 1}], "all need the same"),
    ],
)
def test_bad_designs(over, message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kp.Sweep(numbers, over, tmp_path)
    with pytest.raises(ValueError, match="lengths"):
        zipped({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="range of g"):
        random({"g": 3.0}, 4)


def test_axes_of_every_kind(tmp_path: Path) -> None:
    axes = {"law": [Law(0.5), Law(1.5)], "cell": ["rnn", "gru"], "on": [True, False], "n": np.arange(2)}
    sweep = kp.Sweep(lambda law, cell, on, n: {"x": law.g + n + on, "cell_is": cell}, axes, tmp_path / "a")
    assert sweep.run().done == 16
    found = sweep.collect()
    assert found.sel(law="Law(g=1.5)", cell="gru", on=True, n=1).x == 3.5
    assert found.sel(law="Law(g=1.5)", cell="gru", on=True, n=1).cell_is == "gru"
    found.to_netcdf(tmp_path / "all.nc", engine="h5netcdf")
    xr.testing.assert_equal(xr.load_dataset(tmp_path / "all.nc", engine="h5netcdf").x, found.x)


def test_labelled_results_keep_their_labels(tmp_path: Path) -> None:
    def run(g):
        time = xr.DataArray([g, 2 * g], dims="time", coords={"time": [0.0, 0.5]}, attrs={"units": "Hz"})
        return xr.Dataset({"rate": time, "rank": ((), 1, {"stderr": 0.1})})

    sweep = kp.Sweep(run, {"g": [1.0, 2.0]}, tmp_path)
    sweep.run()
    found = sweep.collect()
    assert found.rate.sel(g=2.0, time=0.5) == 4
    assert found.rate.attrs["units"] == "Hz"
    assert found["rank"].attrs["stderr"] == 0.1


def test_estimates_bring_their_errors(tmp_path: Path) -> None:
    sweep = kp.Sweep(lambda g: {"rank": kp.Estimate(g, 0.1, 3, "exact")}, {"g": [1.0, 2.0]}, tmp_path)
    sweep.run()
    found = sweep.collect()
    np.testing.assert_array_equal(found["rank"], [1, 2])
    np.testing.assert_array_equal(found.rank_stderr, [0.1, 0.1])


def test_tensors_of_both_frameworks(tmp_path: Path) -> None:
    import jax.numpy as jnp

    sweep = kp.Sweep(lambda n: {"a": torch.ones(2), "b": jnp.ones(2)}, {"n": [0]}, tmp_path)
    sweep.run()
    assert float(sweep.collect().a.sum() + sweep.collect().b.sum()) == 4


def test_arrays_of_other_sizes_and_coordinates_are_filled_up(tmp_path: Path) -> None:
    def run(n):
        return {"x": xr.DataArray(np.ones(n), dims="unit", coords={"unit": np.arange(n)})}

    sweep = kp.Sweep(run, {"n": [2, 3]}, tmp_path)
    sweep.run()
    found = sweep.collect()
    np.testing.assert_array_equal(found.x, [[1, 1, np.nan], [1, 1, 1]])
    assert found.unit.dims == ("n", "unit_index") or found.unit.ndim == 2


def test_other_dimensions_at_other_points_are_an_error(tmp_path: Path) -> None:
    sweep = kp.Sweep(lambda n: {"x": np.ones((2,) * n)}, {"n": [1, 2]}, tmp_path)
    sweep.run()
    with pytest.raises(ValueError, match="x has dimensions"):
        sweep.collect()


def test_points_that_raise_or_are_not_finite(tmp_path: Path) -> None:
    sweep = kp.Sweep(troubled, {"kind": ["fine", "raises", "nan"]}, tmp_path)
    status = sweep.run()
    assert (status.done, status.failed, status.not_finite) == (1, 1, 1)
    (failure,) = sweep.failures()
    assert failure.point == {"kind": "raises"}
    assert failure.error == "ArithmeticError: no number"
    assert "in troubled" in failure.trace
    found = sweep.collect()
    assert found.done.values.tolist() == [True, False, True]
    assert found.status.values.tolist() == ["done", "failed", "not finite"]
    assert str(found.error.sel(kind="raises").item()) == "ArithmeticError: no number"
    assert np.isnan(found.value.sel(kind="raises"))


DOORS = ["exit 0", *LEAVING]


def assert_only_doors_failed(sweep: kp.Sweep) -> None:
    errors = {failure.point["kind"]: failure.error for failure in sweep.failures()}
    assert set(errors) == set(DOORS)
    assert errors["exit 0"] == "SystemExit: run called sys.exit(0)"
    assert errors["KeyboardInterrupt"].startswith("KeyboardInterrupt: run raised it")
    assert sweep.collect().done.sel(kind=["first", "last"]).all()


def test_points_that_leave_python_by_another_door(tmp_path: Path) -> None:
    sweep = kp.Sweep(leaves, {"kind": ["first", *DOORS, "last"]}, tmp_path / "here")
    assert str(sweep.run()) == "7 points: 2 done, 5 failed"
    assert_only_doors_failed(sweep)
    threads = kp.Sweep(leaves, {"kind": ["first", *DOORS, "last"]}, tmp_path / "threads")
    with ThreadPoolExecutor(2) as pool:
        assert threads.run(pool).failed == 5
    assert_only_doors_failed(threads)


def test_an_error_without_words_is_recorded(tmp_path: Path) -> None:
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError

    def run(n):
        raise Mute

    sweep = kp.Sweep(run, {"n": [0]}, tmp_path)
    assert sweep.run().failed == 1
    assert sweep.failures()[0].error.startswith("Mute: ")


@pytest.mark.parametrize("caught", [False, True])
@pytest.mark.parametrize(("number", "ends"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_to_the_driver_stops_the_sweep(number, ends, caught: bool, tmp_path: Path) -> None:
    """The point under way is not recorded, even where it swallows the interrupt."""

    def run(n):
        if n == 1 and not (tmp_path / "mark").exists():
            try:
                signal.raise_signal(number)
            except BaseException:
                if not caught:
                    raise
        return {"x": n}

    def handler(number, frame):
        raise ends

    before = signal.signal(number, handler)
    try:
        sweep = kp.Sweep(run, {"n": range(3)}, tmp_path / "out")
        with pytest.raises(ends) as caught_here:
            sweep.run()
        if ends is KeyboardInterrupt:
            assert str(caught_here.value) == "1 of 3 points are recorded (1 done); run again to resume"
            assert "3, of which 1 computed, 2 missing" in repr(sweep)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert str(sweep.status()) == "3 points: 1 done, 2 missing"
    assert not list((tmp_path / "out" / "points").glob("*.suspect"))
    (tmp_path / "mark").touch()
    assert sweep.run().done == 3


def test_a_sweep_says_how_long_it_takes_in_lines_ever_rarer() -> None:
    """On a clock of its own: 40 of 41 points, three seconds each, two at once; the second fails."""
    now, said = [0.0], []
    count = Count("points", 41, 1, 2, said.append, clock=lambda: now[0])
    for place in range(40):
        now[0] += 1.5
        count.landed(3.0, failed=place == 1)
    assert said == [
        "37 points left, about 3.0 s each on 2 workers: about 56 s",
        "7 of 41 points done, 1 failed, about 50 s left",
        "14 of 41 points done, 1 failed, about 39 s left",
        "21 of 41 points done, 1 failed, about 28 s left",
        "32 of 41 points done, 1 failed, about 12 s left",
    ]
    brief = Count("points", 3, 0, 1, said.append, clock=lambda: now[0])
    brief.landed(0.1)
    brief.landed(0.1)
    assert len(said) == 5
    Count("points", 3, 0, 1, said.append, clock=lambda: now[0]).landed(600.0)
    assert said[5] == "2 points left, about 10 min each: about 20 min"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (3.0, "TypeError: run returned float"),
        ({"x": object()}, "TypeError: run returned x of type object"),
        ({"x": 1j}, "TypeError: run returned x"),
        ({"x": [object()]}, "TypeError: run returned x"),
        ({"n": 1}, "ValueError: run returned 'n', which the sweep itself uses"),
        ({"status": 1}, "ValueError: run returned 'status'"),
    ],
)
def test_results_of_other_kinds_are_failures(result, message: str, tmp_path: Path) -> None:
    sweep = kp.Sweep(lambda n: result, {"n": [0]}, tmp_path)
    assert sweep.run().failed == 1
    assert sweep.failures()[0].error.startswith(message)


def test_running_again_computes_what_is_missing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    run = functools.partial(noted, str(log))
    kp.Sweep(run, {"seed": range(2)}, tmp_path / "out").run()
    sweep = kp.Sweep(run, {"seed": range(4)}, tmp_path / "out")
    assert sweep.status().missing == 2
    assert np.isnan(sweep.collect().square.sel(seed=3))
    assert sweep.run().done == 4
    assert log.read_text().split() == ["0", "1", "2", "3"]


def test_failures_are_computed_again_when_asked(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    def run(n):
        if not mark.exists():
            raise FileNotFoundError("not yet")
        return {"n2": n}

    sweep = kp.Sweep(run, {"n": [1]}, tmp_path / "out")
    assert sweep.run().failed == 1
    mark.touch()
    assert sweep.run().failed == 1
    assert sweep.run(retry_failed=True).done == 1


def made(text: str):
    """A function from source, as an edited script gives it."""
    module = types.ModuleType("edited")
    exec(text, module.__dict__)
    for value in vars(module).values():
        if isinstance(value, types.FunctionType):
            value.__module__ = "edited"
    return module.__dict__["run"]


SOURCE = "N = 3\ndef helper(g):\n    return g * N\ndef run(g):\n    return {'x': helper(g)}\n"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (("{'x': helper(g)}", "{'x': helper(g) + 1}"), "run"),
        (("g * N", "g + N"), "helper"),
        (("N = 3", "N = 4"), "N"),
    ],
)
def test_a_change_of_the_code_is_noticed(edit, named: str, tmp_path: Path) -> None:
    before, after = made(SOURCE), made(SOURCE.replace(*edit))
    kp.Sweep(before, {"g": [1.0]}, tmp_path).run()
    changed = kp.Sweep(after, {"g": [1.0]}, tmp_path)
    with pytest.raises(ValueError, match=rf"other code: {named} changed.*another folder.*fresh=True"):
        changed.run()
    with pytest.warns(UserWarning, match=f"{named} changed since"):
        assert changed.collect().x == 3
    assert changed.run(fresh=True).done == 1
    assert changed.collect().x == after(1.0)["x"]
    assert kp.Sweep(made(SOURCE.replace(*edit)), {"g": [1.0]}, tmp_path).run().done == 1


def test_a_change_of_the_version_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = kp.Sweep(numbers, GRID, tmp_path)
    sweep.run()
    monkeypatch.setattr(kp, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"kpflow_dyn .* -> 9.9.9 changed"):
        kp.Sweep(numbers, GRID, tmp_path).run()


def test_what_a_function_holds_belongs_to_its_code() -> None:
    def with_gain(gain):
        return lambda g: {"x": gain * g}

    assert changes(code_of(with_gain(1.0)), code_of(with_gain(2.0))) != []
    assert changes(code_of(with_gain(1.0)), code_of(with_gain(1.0))) == []
    assert changes(code_of(functools.partial(numbers, 1)), code_of(functools.partial(numbers, 2))) != []
    assert changes(code_of(Law(1.0)), code_of(Law(2.0))) != []
    assert changes(code_of(Law(1.0).times), code_of(Law(2.0).times)) == ["g of the object of Law.times"]
    a = np.zeros(3)
    assert changes(code_of(with_gain(a)), code_of(with_gain(a + 1))) != []


REACHING = """
import dataclasses, functools
import numpy as np
import torch
import jax.numpy as jnp
import own_helpers
from own_helpers import Kind, scaled

TENSOR = torch.ones(3)
HALF = torch.ones(3, dtype=torch.bfloat16)
ARRAY = np.ones(3)
JAX = jnp.ones(3)
NESTED = {"a": [torch.ones(2), {"b": np.ones(2)}], "set": {"x", "y", "z"}}

@dataclasses.dataclass
class Config:
    rate: float = 0.1
    inner: object = None

CONFIG = Config(inner=Config(rate=0.2))
OBJECT = Kind(3.0)
LINEAR = torch.nn.Linear(2, 2)
torch.nn.init.constant_(LINEAR.weight, 1.0)
torch.nn.init.constant_(LINEAR.bias, 0.0)

def made(gain):
    return lambda x: gain * x

CLOSURES = [made(1.0), made(2.0)]
PARTIAL = functools.partial(scaled, by=2.0)

@functools.lru_cache
def cached(x):
    return x + 1

def run(g, power=2):
    import own_lazy
    held = [TENSOR, HALF, ARRAY, JAX, NESTED, CONFIG, OBJECT, LINEAR, CLOSURES, PARTIAL]
    return {"x": own_helpers.inner(g) + own_lazy.late(g) + cached(g) + Kind.of_class() + (g in {"q", "r"}) + len(held)}
"""
HELPERS = """
FACTOR = 3
class Base:
    def shared(self):
        return 1
class Kind(Base):
    scale = 2.0
    def __init__(self, a):
        self.a = a
    @property
    def doubled(self):
        return 2 * self.a
    @classmethod
    def of_class(cls):
        return cls.scale
def inner(x):
    return x * FACTOR
def scaled(x, by):
    return by * x
"""
LAZY = "OFFSET = 1\ndef late(x):\n    return x + OFFSET\n"


def written(folder: Path, before: str = "", after: str = ""):
    """The function of a package of the user's own in three modules, with one edit in one of them."""
    for name, text in (("own_run", REACHING), ("own_helpers", HELPERS), ("own_lazy", LAZY)):
        (folder / f"{name}.py").write_text(text.replace(before, after) if before else text)
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    return importlib.import_module("own_run").run


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits in one second would share it
    yield tmp_path
    for name in ("own_run", "own_helpers", "own_lazy"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("TENSOR = torch.ones(3)", "TENSOR = torch.zeros(3)", "TENSOR"),
        ("HALF = torch.ones", "HALF = 2 * torch.ones", "HALF"),
        ("ARRAY = np.ones(3)", "ARRAY = np.ones((3, 1))", "ARRAY"),
        ("JAX = jnp.ones(3)", "JAX = jnp.zeros(3)", "JAX"),
        ("[torch.ones(2)", "[torch.zeros(2)", "NESTED"),
        ('{"b": np.ones(2)}', '{"b": np.zeros(2)}', "NESTED"),
        ('"z"}', '"w"}', "NESTED"),
        ("Config(rate=0.2)", "Config(rate=0.3)", "rate of inner of CONFIG"),
        ("Kind(3.0)", "Kind(4.0)", "OBJECT"),
        ("LINEAR.weight, 1.0", "LINEAR.weight, 2.0", "LINEAR"),
        ("made(2.0)]", "made(3.0)]", "CLOSURES"),
        ("gain * x", "gain + x", "made.<locals>.<lambda>"),
        ("by=2.0", "by=3.0", "arguments of PARTIAL"),
        ("x + 1\n", "x + 2\n", "cached"),
        ("power=2", "power=3", "defaults of run"),
        ('{"q", "r"}', '{"q", "s"}', "run"),
        ("FACTOR = 3", "FACTOR = 4", "own_helpers.FACTOR"),
        ("x * FACTOR", "x - FACTOR", "own_helpers.inner"),
        ("by * x", "by + x", "PARTIAL"),
        ("scale = 2.0", "scale = 3.0", "Kind.scale"),
        ("2 * self.a", "3 * self.a", "Kind"),
        ("return cls.scale", "return 2 * cls.scale", "Kind"),
        ("        return 1", "        return 2", "Base"),
        ("x + OFFSET", "x - OFFSET", "own_lazy.late"),
        ("OFFSET = 1", "OFFSET = 2", "own_lazy.OFFSET"),
    ],
)
def test_whatever_run_reaches_is_its_code(own_code: Path, before: str, after: str, named: str) -> None:
    known = code_of(written(own_code))
    assert changes(known, code_of(written(own_code))) == []
    assert named in changes(known, code_of(written(own_code, before, after)))


def test_comments_and_layout_are_no_code(own_code: Path) -> None:
    known = code_of(written(own_code))
    assert changes(known, code_of(written(own_code, "return x * FACTOR", "# a comment\n    return (x * FACTOR)"))) == []


def test_every_process_sees_the_same_code(own_code: Path) -> None:
    known = code_of(written(own_code))
    script = "import json, own_run; from kpflow_dyn.sweep._code import code_of; print(json.dumps(code_of(own_run.run)))"
    paths = os.pathsep.join([str(own_code), str(Path(kp.__file__).parents[1])])
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": paths}  # which is another one here
    found = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    assert changes(known, json.loads(found.stdout)) == []


def test_a_change_between_two_runs_of_one_sweep(tmp_path: Path) -> None:
    """What the points themselves change, here a list, is none."""
    gain, calls = torch.ones(1), []

    def run(n):
        calls.append(n)
        return {"x": float(gain) * n}

    sweep = kp.Sweep(run, {"n": range(3)}, tmp_path)
    assert sweep.run().done == sweep.run().done == 3
    assert calls == [0, 1, 2]
    gain.mul_(2)
    with pytest.warns(UserWarning, match="other code: gain in .* changed since"):
        sweep.collect()
    with pytest.raises(ValueError, match=r"other code: gain in .* changed\. Take another folder"):
        sweep.run()
    assert sweep.run(fresh=True).done == 3
    assert sweep.collect().x.sum() == 6


def test_what_cannot_be_compared_is_told(tmp_path: Path) -> None:
    lock = threading.Lock()
    sweep = kp.Sweep(lambda n: {"locked": lock.locked()}, {"n": [0]}, tmp_path)
    with pytest.warns(UserWarning, match=r"no change is noticed of lock in .* \(lock\)"):
        assert sweep.run().done == 1


def test_nothing_on_disk_is_a_pickle(tmp_path: Path) -> None:
    kp.Sweep(numbers, GRID, tmp_path).run()
    for path in (tmp_path / "points").iterdir():
        with np.load(path, allow_pickle=False) as file:
            assert all(file[name].dtype != object for name in file.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "points", "sweep.json"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, GRID, tmp_path)
    sweep.run()
    damaged = next((tmp_path / "points").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{damaged.name} is damaged.*delete it"):
        sweep.collect()
    damaged.unlink()
    assert sweep.run().done == 6


def test_a_point_that_takes_too_long_is_interrupted(tmp_path: Path) -> None:
    sweep = kp.Sweep(troubled, {"kind": ["fine", "sleeps", "other"]}, tmp_path)
    status = sweep.run(timeout=0.2)
    assert (status.done, status.timed_out) == (2, 1)
    assert sweep.failures()[0].error == "took longer than 0.2 s"
    with pytest.raises(ValueError, match="positive"):
        sweep.run(timeout=0.0)


def test_a_time_limit_waits_for_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a module does not stay behind; the point's own time counts from then on."""
    (tmp_path / "takes_a_while.py").write_text("import time\ntime.sleep(0.5)\nVALUE = 7\n")
    monkeypatch.syspath_prepend(tmp_path)

    def run(wait):
        from takes_a_while import VALUE  # pyright: ignore[reportMissingImports]

        time.sleep(wait)
        return {"x": VALUE}

    sweep = kp.Sweep(run, {"wait": [0.0, 30.0, 0.001]}, tmp_path / "out")
    assert str(sweep.run(timeout=0.2)) == "3 points: 2 done, 1 timed out"
    assert sweep.collect().status.values.tolist() == ["done", "timed out", "done"]


def test_a_time_limit_in_a_thread_of_this_process_is_refused(tmp_path: Path) -> None:
    caught = []

    def body():
        try:
            kp.Sweep(brief, {"seed": [0]}, tmp_path).run(timeout=1.0)
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    """The limit on the size of files raises EFBIG in the place of ENOSPC, and in the same calls."""
    resource = pytest.importorskip("resource")
    sweep = kp.Sweep(large, {"size": [10, 20, 1_000_000, 30]}, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot go on .*File too large.*recorded there is kept") as caught:
            sweep.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert sweep.status().done == 2
    assert not list((tmp_path / "points").glob(".*"))
    assert sweep.run().done == 4


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder to which every user finds the way."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_that_cannot_be_written(open_folder: Path) -> None:
    """As another user than root, whom no permission stops."""
    tmp_path = open_folder
    sweep = kp.Sweep(numbers, GRID, tmp_path)
    sweep.run()
    (tmp_path / "points").chmod(0o555)
    more = kp.Sweep(numbers, {**GRID, "g": [0.5, 1.5, 2.5]}, tmp_path)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        with pytest.raises(OSError, match=r"cannot go on in .*ermission denied"):
            more.run()
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / "points").chmod(0o755)
    assert more.status().done == 6
    assert more.run().done == 9


def test_two_sweeps_in_one_folder_refuse_each_other(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, GRID, tmp_path)
    with locked(tmp_path), pytest.raises(BlockingIOError, match=rf"in use by a sweep with pid {os.getpid()} on "):
        sweep.run()
    assert sweep.run().done == 6


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kpflow_dyn.sweep._lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        sweep = kp.Sweep(numbers, GRID, tmp_path)
        with pytest.raises(BlockingIOError, match=f"pid {holder.pid}"):
            sweep.run()
        holder.kill()
    assert sweep.run().done == 6


def test_a_sweep_keeps_no_half_written_file(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, GRID, tmp_path)
    sweep.run()
    (tmp_path / "points" / ".abc.npz.0").write_bytes(b"half")
    sweep.run()
    assert not list((tmp_path / "points").glob(".*"))


@pytest.mark.slow
def test_ten_thousand_points_are_collected_in_half_a_minute(tmp_path: Path) -> None:
    sweep = kp.Sweep(numbers, {"g": np.arange(100.0), "seed": range(100)}, tmp_path)
    sweep.run()
    start = time.perf_counter()
    found = sweep.collect()
    assert time.perf_counter() - start < 30
    np.testing.assert_array_equal(found.gain, found.g.values[:, None] + 10 * found.seed.values)


def test_other_runs_and_executors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="run is a int"):
        kp.Sweep(3, GRID, tmp_path)  # type: ignore[arg-type]
    sweep = kp.Sweep(numbers, GRID, tmp_path)
    with pytest.raises(TypeError, match="executor is a int"):
        sweep.run(3)
    with pytest.raises(ValueError, match=r"unknown executor 'proces'. Nearest: process"):
        sweep.run("proces")
    with pytest.raises(ValueError, match='take "process"'):
        kp.sweep.executor("local", workers=2)
    with pytest.raises(ValueError, match="workers must be at least 1"):
        kp.sweep.executor("process", workers=0)
    with pytest.raises(TypeError, match="address is 3, expected tcp://host:8786"):
        kp.sweep.executor("dask", address=3)
    with pytest.raises(TypeError, match="options is 3, expected a table"):
        kp.sweep.executor("slurm", options=3)
    with pytest.raises(ValueError, match="attempts"):
        sweep.run(attempts=0)
