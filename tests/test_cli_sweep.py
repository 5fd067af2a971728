"""Sweeps that a TOML file names, on the command line."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from sweep_points import Law
from typer.testing import CliRunner

import kpflow_dyn as kp
from kpflow_dyn.cli._app import app
from kpflow_dyn.report import page_of, read_results
from kpflow_dyn.sweep._collect import dataset_of
from kpflow_dyn.sweep._configured import QUANTITIES, Setup, read_sweep
from kpflow_dyn.sweep._design import design
from kpflow_dyn.sweep._values import Record, Variable

TOML = """
out = "{out}"
[model]
name = "rnn"
units = 6
[init]
law = "gaussian"
[task]
name = "flipflop"
bits = 2
trials = 3
steps = 8
[grid]
init.g = {{ start = 0.5, stop = 1.5, num = 2 }}
model.seed = [0, 1]
[analysis]
quantities = ["ntk_effective_rank", "K_trace", "state_effective_rank", "loss"]
"""
EXAMPLE = Path(__file__).parents[1] / "examples" / "sweep_g.toml"


def run(*arguments: object):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments), "--executor", "local"])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "a.toml").write_text(TOML.format(out=tmp_path / "out"))
    return tmp_path / "a.toml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    """A run that went well, and its folder."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "a.toml").write_text(TOML.format(out=folder / "out"))
    return run(folder / "a.toml"), folder / "out"


@pytest.fixture
def known(file: Path, finished) -> Path:
    """A file whose sweep is finished."""
    shutil.copytree(finished[1], file.parent / "out")
    return file


def edited(file: Path, before: str, after: str) -> Path:
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    return file


def test_a_sweep_and_what_it_writes(finished) -> None:
    result, out = finished
    assert result.exit_code == 0, result.output
    assert "4 points: 4 done" in result.output
    found = xr.load_dataset(out / "results.nc", engine="h5netcdf")
    assert dict(found.ntk_effective_rank.sizes) == {"g": 2, "seed": 2}
    assert json.loads(found.attrs["init"]) == {"law": "gaussian"}
    task = kp.tasks.make_task("flipflop", bits=2, trials=3, steps=8)
    law = kp.models.make_init("gaussian", g=1.5)
    cell, readout = kp.models.make_model("rnn", 2, 6, 2, init=law, seed=1, dtype="float64")
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(task.inputs))))
    point, dataset = found.sel(g=1.5, seed=1), kp.analyze(flow, k=1, samples=40)
    np.testing.assert_allclose(point.K_trace, kp.trace(flow.K).value, rtol=1e-10)
    np.testing.assert_allclose(point.state_effective_rank, dataset.state_effective_rank, rtol=1e-10)
    assert task.targets is not None
    target = torch.from_numpy(task.targets)
    loss = kp.squared_error(target, readout, task.mask)(flow.solution.state)
    np.testing.assert_allclose(point.loss, loss.item(), rtol=1e-10)
    exact = kp.effective_rank(kp.MatrixOperator(flow.ntk.dense(), flow.ntk.domain, flow.ntk.domain)).value
    assert abs(point.ntk_effective_rank - exact) < 4 * point.ntk_effective_rank_stderr + 1e-6 * exact


@pytest.mark.parametrize("loss", [None, "squared_error"])
def test_the_loss_of_a_sweep_is_that_of_the_task(tmp_path: Path, loss: str | None) -> None:
    """Of right classes the cross-entropy, as `analyze` takes it, unless another one is asked for."""
    inputs, right = np.random.default_rng(0).normal(size=(3, 5, 2)), np.arange(15).reshape(3, 5) % 3
    np.savez(tmp_path / "trials.npz", inputs=inputs, targets=right if loss is None else np.eye(3)[right])
    file = tmp_path / "a.toml"
    asked = 'quantities = ["loss", "accuracy"]' if loss is None else f'quantities = ["loss"]\nloss = "{loss}"'
    file.write_text(
        f'out = "{tmp_path}/out"\n[model]\nname = "rnn"\nunits = 4\n[task]\nname = "{tmp_path}/trials.npz"\n'
        f"[grid]\nmodel.seed = [0, 1]\n[analysis]\n{asked}\n"
    )
    assert run(file).exit_code == 0
    found = xr.load_dataset(tmp_path / "out" / "results.nc", engine="h5netcdf")
    cell, readout = kp.models.make_model("rnn", 2, 4, 3, seed=1, dtype="float64")
    y = readout(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(inputs))).state).detach()
    if loss is None:
        expected = torch.nn.functional.cross_entropy(y.flatten(0, 1), torch.from_numpy(right).flatten())
        accuracy = (y.argmax(-1).numpy() == right).mean()
        np.testing.assert_allclose(found.accuracy.sel(seed=1), accuracy)
    else:
        expected = kp.squared_error(torch.from_numpy(np.eye(3)[right]))(y)
    np.testing.assert_allclose(found.loss.sel(seed=1), expected.item(), rtol=1e-10)
    assert found.loss.attrs["kind"] == (loss or "cross_entropy")
    page = page_of(found)
    assert f"The loss is the {(loss or 'cross-entropy').replace('_', ' ')}." in page.lead
    assert page.settings["run"] == "a.toml" and "None" not in str(page.settings["samples"])
    assert "third axis" not in page.to_html()


def test_accuracy_needs_right_classes(file: Path) -> None:
    result = run(edited(file, '"loss"]', '"loss", "accuracy"]'))
    assert result.exit_code == 2
    assert "the loss is squared_error, so there is no accuracy" in " ".join(result.stderr.split())


def test_the_kinds_of_a_loss_are_all_said() -> None:
    records = [Record("done", variables={"loss": Variable((), np.ones(()), {"kind": kind})}) for kind in "ab"]
    assert dataset_of(design({"g": [0, 1]}), records, {}).loss.attrs["kind"] == "a or b"


def test_all_that_is_wrong_with_a_file_is_said_at_once(file: Path) -> None:
    edited(edited(file, "units", "unit"), '"K_trace"', '"K_tracy"')
    said = " ".join(run(edited(file, "[analysis]", "[analysis]\nsample = 3")).stderr.split())
    for message in ("(1) [model]", "has no units", "(2) unknown key 'sample'", "(3) unknown quantity 'K_tracy'"):
        assert message in said
    edited(edited(edited(file, "unit ", "units "), '"K_tracy"', '"K_trace"'), "\nsample = 3", "")
    said = " ".join(run(edited(edited(file, "trials = 3", "trials = 0"), "units = 6", "units = -6")).stderr.split())
    assert "(1) [model]" in said and "(2) [task]" in said


def test_running_again_goes_on(known: Path) -> None:
    file = known
    assert "4 points: 4 done" in run(file, "--status").output
    more = run(edited(file, "[0, 1]", "[0, 1, 2]"), "--status")
    assert "6 points: 4 done, 2 missing" in more.output
    assert "6 points: 6 done" in run(file).output
    assert "6 points: 6 done" in run(file, "--resume").output  # as scripts for earlier versions say


def test_a_changed_file_is_noticed(known: Path) -> None:
    changed = run(edited(known, "trials = 3", "trials = 4"), "--resume")
    assert changed.exit_code == 2
    assert re.search(r"other code: task of the Setup changed", " ".join(changed.stderr.split()))
    assert "1 done" in run(edited(edited(known, "num = 2", "num = 1"), "[0, 1]", "[0]"), "--fresh").output


def test_failures_are_told(file: Path) -> None:
    edited(file, "init.g = { start = 0.5, stop = 1.5, num = 2 }", "init.points = [2, 9]")
    edited(file, "[0, 1]", "[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]")
    result = run(edited(file, 'law = "gaussian"', 'law = "planted"'))
    assert result.exit_code == 1
    assert "22 points: 11 done, 11 failed" in result.output
    assert (file.parent / "out" / "results.nc").exists()
    assert "failed at points = 9, seed = 0: ValueError: " in result.stderr
    assert result.stderr.count("failed at") == 10
    assert f"and 1 more; all of them on a page: kpflow-dyn report {file.parent / 'out'}; compute" in result.stderr
    assert run(file, "--status").exit_code == 0


@pytest.fixture
def interruptible():
    """SIGINT raises, also where tests run in a job whose parent ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_says_what_is_kept(file: Path, monkeypatch, number: int, status: int) -> None:
    whole, calls = Setup.__call__, []

    def interrupted(self, **point):
        calls.append(point)
        if len(calls) == 3:
            signal.raise_signal(number)
        return whole(self, **point)

    monkeypatch.setattr(Setup, "__call__", interrupted)
    result = run(file)
    assert result.exit_code == status
    assert result.stderr.endswith("kpflow-dyn: interrupted: 2 of 4 points are recorded (2 done); run again to resume\n")
    assert "4 points: 4 done" in run(file).output and len(calls) == 5


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[init]", "[inti]", r"unknown key 'inti'.* Nearest: init"),
        ("quantities", "quantites", r"no quantities"),
        ("loss", "los", r"unknown quantity 'los' .* Nearest: loss"),
        ("model.seed", "modl.seed", r"unknown axis 'modl.seed'.* Nearest: model.seed"),
        ("init.g = { start = 0.5, stop = 1.5, num = 2 }", "init.g = 3.0", "axis g is 3.0"),
        ("num = 2", "nun = 2", "axis g is"),
        ('name = "flipflop"', "", "has no name"),
        ('law = "gaussian"', "", "has no law"),
        ("units = 6", "units == 6", "is no TOML"),
    ],
)
def test_mistakes_in_a_file(file: Path, before: str, after: str, message: str) -> None:
    result = run(edited(file, before, after))
    assert result.exit_code == 2
    assert re.search(message, " ".join(result.stderr.split()))
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (file.parent / "out").exists()


TYPES = [
    ("units = 6", "units = -3", "[model] in FILE: units must be at least 1, got -3"),
    ("units = 6", 'units = "6"', "[model] in FILE: units must be a whole number, got '6'"),
    ("units = 6", "units = 2.5", "units must be a whole number, got 2.5"),
    ("units = 6", "units = true", "units must be a whole number, got True"),
    ("units = 6", "units = 1000000000", "weights of 1000000000 units take"),
    ("units = 6", "units = 6\ngain = 1.0", "rnn has no option gain; it has: bias, nonlinearity"),
    ("units = 6", "units = 6\ninputs = 2", "unknown key inputs; the task and [init] decide that"),
    ("units = 6", 'units = 6\nbias = "no"', "bias must be true or false, got 'no'"),
    ("units = 6", 'units = 6\nnonlinearity = "sin"', "nonlinearity must be tanh or relu, got 'sin'"),
    ("units = 6", 'units = 6\ndtype = "int8"', "dtype must be float32 or float64, got 'int8'"),
    ("units = 6", 'units = 6\nframework = "numpy"', "framework must be torch or jax, got 'numpy'"),
    ('name = "rnn"', 'name = "rn"', "unknown model 'rn'. Nearest: rnn"),
    ('name = "rnn"', "name = 3", "unknown model 3"),
    ('name = "rnn"', 'name = "ctrnn"\nalpha = 2.0', "0 < alpha <= 1, got 2.0"),
    ('name = "rnn"', 'name = "ctrnn"\ngain = nan', "gain must be finite, got nan"),
    ('name = "rnn"', 'name = "lowrank"\nrank = 7', "rank must be between 1 and hidden_size = 6, got 7"),
    ("[0, 1]", "[0, -1]", "[model] in FILE with seed = -1: seed must be at least 0, got -1"),
    ("[0, 1]", '[0, "1"]', "with seed = '1': seed must be a whole number, got '1'"),
    ("[0, 1]", "[]", "axis seed is [], expected a list of values"),
    ('law = "gaussian"', 'law = "gausian"', "[init] in FILE: unknown law 'gausian'. Nearest: gaussian"),
    ('law = "gaussian"', "law = 1", "the law is 1, expected its name"),
    ('law = "gaussian"', 'law = "gaussian"\nrho = 1.0', "gaussian has no option rho; it has: g"),
    ("start = 0.5", "start = -0.5", "[init] in FILE with g = -0.5: g must be a finite number >= 0, got -0.5"),
    ("start = 0.5", 'start = "0.5"', "start of axis g must be a number, got '0.5'"),
    ("num = 2", "num = -2", "num of axis g must be at least 1, got -2"),
    ("num = 2", "num = 2.0", "num of axis g must be a whole number, got 2.0"),
    ("{ start = 0.5, stop = 1.5, num = 2 }", "[nan, 1.0]", "g is NaN"),
    ("{ start = 0.5, stop = 1.5, num = 2 }", '[0.5, "a"]', "with g = 'a': g is str, expected a real number"),
    ('name = "flipflop"', 'name = "flipflob"', "[task] in FILE: unknown task 'flipflob'. Nearest: flipflop"),
    ('name = "flipflop"', "name = 1", "name must be the name of a task, got 1"),
    ("bits = 2", "bit = 2", "flipflop has no option bit; it has: bits"),
    ("bits = 2", "bits = 0", "bits must be at least 1, got 0"),
    ("bits = 2", 'bits = 2\nrate = "often"', "rate must be a number, got 'often'"),
    ("bits = 2", "bits = 2\ndt = -1.0", "dt must be a time of a step in ms, more than 0, got -1.0"),
    ("trials = 3", 'trials = "3"', "trials must be a whole number, got '3'"),
    ("trials = 3", "trials = 0", "trials must be at least 1, got 0"),
    ("trials = 3", "trials = 1000000000000", "1e+12 trials with 16 inputs each take"),
    ("steps = 8", "steps = 1000000000000", "3 trials with 2e+12 inputs each take"),
    ("[analysis]", '[analysis]\nsamples = "40"', "[analysis] samples must be a whole number, got '40'"),
    ("[analysis]", "[analysis]\nsamples = -1", "[analysis] samples must be at least 8, got -1"),
    ("[analysis]", "[analysis]\nseed = 0.5", "[analysis] seed must be a whole number, got 0.5"),
    ("[analysis]", "[analysis]\ntimeout = 0", "[analysis] timeout must be a positive number of seconds, got 0"),
    ("[analysis]", '[analysis]\ntimeout = "60"', "[analysis] timeout must be a number, got '60'"),
    ("[analysis]", "[executor]\nthreads = 2\n[analysis]", "[executor] does not fit --executor local"),
    ('["ntk_effective_rank", "K_trace", "state_effective_rank", "loss"]', "[]", "quantities in FILE is []"),
    ('"loss"]', '"K_trace"]', "expected a list of different names"),
    ('"loss"]', '"loss", 3]', "unknown quantity 3"),
    ("[model]", "model = 3\n[modl]", "unknown key 'modl'"),
]


@pytest.mark.parametrize(("before", "after", "message"), TYPES)
def test_what_would_fail_at_every_point_is_refused_before_the_first(file: Path, before, after, message: str) -> None:
    result = run(edited(file, before, after))
    said = " ".join(result.stderr.split())
    assert result.exit_code == 2, result.output
    assert message.replace("FILE", str(file)) in said
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (file.parent / "out").exists()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'law = "gaussian"',
            'law = "planted"\npoints = 9',
            "every point of the sweep would fail, the first one with: ",
        ),
        ('name = "flipflop"\nbits = 2\ntrials = 3\nsteps = 8', 'name = "TASK"', "has no targets, so there is no loss"),
        ('name = "flipflop"\nbits = 2\ntrials = 3\nsteps = 8', 'name = "none.npz"', "no file none.npz"),
    ],
)
def test_what_shows_when_a_model_meets_its_task(file: Path, before: str, after: str, message: str) -> None:
    np.savez(file.parent / "trials.npz", inputs=np.zeros((2, 3, 2)))
    result = run(edited(file, before, after.replace("TASK", str(file.parent / "trials.npz"))))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (file.parent / "out").exists()


def test_a_point_that_only_some_values_spoil_is_left_to_the_sweep(file: Path) -> None:
    """A lag of 9 fits 20 steps but not 8."""
    edited(file, 'name = "flipflop"\nbits = 2', 'name = "lag"')
    edited(file, "steps = 8", "")
    result = run(edited(file, "model.seed = [0, 1]", "task.lag = [2, 9]\ntask.steps = [8, 20]"))
    assert result.exit_code == 1
    assert "8 points: 6 done, 2 failed" in result.output


def test_trials_and_code_that_a_file_names_are_noticed(file: Path) -> None:
    """A change of a file of trials, or of a law of one's own."""
    rng = np.random.default_rng(0)
    trials, law = file.parent / "trials.npz", file.parent / "my_law.py"
    np.savez(trials, inputs=rng.standard_normal((2, 3, 2)), targets=np.zeros((2, 3, 1)))
    law.write_text("import numpy as np\nclass Mine:\n    def matrix(self, n, seed):\n        return np.eye(n)\n")
    edited(file, 'name = "flipflop"\nbits = 2\ntrials = 3\nsteps = 8', f'name = "{trials}"')
    edited(file, "init.g = { start = 0.5, stop = 1.5, num = 2 }", "")
    assert run(edited(file, 'law = "gaussian"', f'law = "{law}:Mine"')).exit_code == 0
    assert run(file, "--resume").exit_code == 0
    np.savez(trials, inputs=rng.standard_normal((2, 3, 2)), targets=np.zeros((2, 3, 1)))
    changed = run(file, "--resume")
    assert changed.exit_code == 2 and "other code: code of the Setup changed" in " ".join(changed.stderr.split())
    assert run(file, "--fresh").exit_code == 0
    law.write_text(law.read_text().replace("np.eye(n)", "-np.eye(n)"))
    assert run(file, "--resume").exit_code == 2


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no file" in run(tmp_path / "b.toml").stderr


def test_all_quantities_are_finite() -> None:
    task = {"name": "flipflop", "bits": 1, "trials": 3, "steps": 6}
    for names in ([name for name in QUANTITIES if name != "accuracy"], ("P_effective_rank", "core_norm")):
        found = Setup({"name": "gru", "units": 4}, {}, task, names)()
        assert set(found) == set(names)
        assert all(np.isfinite(float(value)) for value in found.values())


def test_axes_of_the_same_key_keep_their_tables(file: Path) -> None:
    sweep, _timeout, _options = read_sweep(edited(file, "model.seed = [0, 1]", "model.seed = [0]\ntask.seed = [1]"))
    assert list(sweep.design.axes or {}) == ["g", "model_seed", "task_seed"]
    sweep, _timeout, _options = read_sweep(edited(file, "task.seed = [1]", 'model.name = ["rnn", "gru"]'))
    assert list(sweep.design.axes or {}) == ["g", "seed", "model"]


def test_the_example(tmp_path: Path) -> None:
    """Smaller and on few gains: the rank of the NTK falls with the gain, as the file says."""
    text = EXAMPLE.read_text()
    small = {"units = 64": "units = 16", "trials = 8": "trials = 2", "num = 15": "num = 2", "[0, 1, 2]": "[0]"}
    for before, after in {**small, "runs/sweep_g": str(tmp_path / "out"), "samples = 60": "samples = 40"}.items():
        assert before in text
        text = text.replace(before, after)
    (tmp_path / "small.toml").write_text(text)
    assert "4 points: 4 done" in run(tmp_path / "small.toml").output
    found = xr.load_dataset(tmp_path / "out" / "results.nc", engine="h5netcdf")
    assert (found.ntk_effective_rank.sel(g=3.0) < found.ntk_effective_rank.sel(g=0.2)).all()


def at_gain(g: float, law: Law) -> dict[str, float]:
    if g == 2.0:
        raise ArithmeticError("no number")
    return {"rank": law.g * g}


def test_a_page_of_a_sweep_in_python(tmp_path: Path) -> None:
    """From its folder alone: the same dataset as `collect`, with what is missing or failed, and what the user says."""
    about = {"title": "Ranks by gain", "model": "RNN of 8 units"}
    over = {"g": [1.0, 2.0, 3.0], "law": [Law(0.5), Law(1.5)]}
    sweep = kp.Sweep(at_gain, over, tmp_path / "out", attrs=about)
    sweep.run(progress=False)
    next(iter(sweep.store.points.glob("*.npz"))).unlink()
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    xr.testing.assert_identical(read_results(tmp_path / "out"), sweep.collect())
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert all(text in page for text in ("Ranks by gain", "RNN of 8 units", "no number", kp.__version__, "missing"))
    points = kp.Sweep(at_gain, [{"g": 1.0, "law": Law(2.0)}], tmp_path / "points")
    points.run(progress=False)
    xr.testing.assert_identical(read_results(tmp_path / "points"), points.collect())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "does not exist; give the folder of an analysis, track, comparison or sweep"),
        ("step_00000000.safetensors", "holds the checkpoints of a training, not results; first: kpflow-dyn track"),
        ("numbers_00000000.nc", "holds a track that has not come to its end; run the same kpflow-dyn track again"),
        ("sweep.json", "holds a sweep of which no point is done yet"),
        ("net.pt", "holds no results, but net.pt; first: kpflow-dyn analyze"),
        ("notes.txt", "holds no results; expected results.nc, track.nc, comparison.nc or the points of a sweep"),
        ("net.pt itself", "is a checkpoint, not a result; first: kpflow-dyn analyze"),
        ("gains.toml itself", "says what to sweep, and is no result; first: kpflow-dyn sweep"),
        ("notes.txt itself", "cannot be read as a NetCDF file"),
    ],
)
def test_a_report_of_something_else_says_what_to_do(tmp_path: Path, name: str, message: str) -> None:
    file, _, itself = name.partition(" ")
    if file != "nothing":
        (tmp_path / file).write_text("some")
    path = tmp_path / file if itself or file == "nothing" else tmp_path
    shown = CliRunner().invoke(app, ["report", str(path)])
    assert shown.exit_code == 2 and message in shown.stderr
    assert len(shown.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rnn", "gru", "lstm", "ctrnn", "lowrank"])
def test_every_model_in_jax(name: str) -> None:
    task = {"name": "flipflop", "bits": 1, "trials": 2, "steps": 5}
    setup = Setup({"name": name, "units": 4, "framework": "jax"}, {"law": "gaussian"}, task, ("K_trace", "loss"))
    assert all(np.isfinite(float(value)) for value in setup().values())


@pytest.mark.parametrize("command", ["track", "compare", "report", "sweep"])
def test_help_is_grouped_and_ends_with_an_example(command: str) -> None:
    shown = CliRunner(env={"COLUMNS": "100", "TERM": "dumb"}).invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert "─ Output ─" in shown.stdout
    assert shown.stdout.strip().splitlines()[-1].strip().startswith(f"Example: kpflow-dyn {command} ")
