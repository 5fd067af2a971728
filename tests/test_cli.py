"""The command line: what it writes, and one line with an exit status for everything that can go wrong."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
import xarray as xr
from rich.text import Text
from typer.testing import CliRunner

import kpflow_dyn as kp
from kpflow_dyn import _analyze as analysis
from kpflow_dyn._arrays import memory
from kpflow_dyn._checkpoint import load_checkpoint
from kpflow_dyn.cli import _app
from kpflow_dyn.cli._app import DEMO_TASK, FIGURE_NAMES, FILE_NAMES, LEARNING_NAMES, app
from kpflow_dyn.cli._cost import Work, cost_of
from kpflow_dyn.cli._options import task_options
from kpflow_dyn.cli._training import short_names
from kpflow_dyn.figures import FIGURES
from kpflow_dyn.figures._learning import OF_PARTS

pytestmark = pytest.mark.usefixtures("undrawn")  # but `finished` is drawn, before that holds, and what is `drawn`


@pytest.fixture
def drawn(undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("given")


@pytest.fixture(scope="module")
def cell() -> torch.nn.GRUCell:
    torch.manual_seed(0)
    return torch.nn.GRUCell(3, 6)


@pytest.fixture(scope="module")
def checkpoint(cell: torch.nn.GRUCell, folder: Path) -> Path:
    torch.save({f"rnn.{name}": value for name, value in cell.state_dict().items()}, folder / "net.pt")
    return folder / "net.pt"


@pytest.fixture(scope="module")
def task(folder: Path) -> Path:
    np.savez(folder / "<b>.npz", inputs=np.random.default_rng(0).standard_normal((4, 5, 3)))
    return folder / "<b>.npz"


@pytest.fixture(scope="module")
def finished(checkpoint: Path, task: Path, tmp_path_factory: pytest.TempPathFactory):
    """A run that went well, and the folder that it wrote."""
    out = tmp_path_factory.mktemp("results") / "run"
    return run(
        "analyze",
        checkpoint,
        "--model",
        "gru",
        "--task",
        task,
        "--out",
        out,
        "--dtype",
        "float64",
        "--modes",
        3,
        "--verbose",
    ), out


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "run"


def assert_refused(result, out: Path, message: str, status: int = 2) -> None:
    """One line on stderr that explains, and not a trace of the run on disk."""
    assert result.exit_code == status
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("kpflow-dyn: ")
    assert "Traceback" not in result.output
    assert not out.parent.is_dir() or not list(out.parent.iterdir())


def test_analyze_writes_a_complete_folder(finished) -> None:
    result, out = finished
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"The page: {out / 'index.html'}"
    assert {path.name for path in out.iterdir()} == FILE_NAMES
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    for name in FIGURE_NAMES:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_those_of_the_dense_ntk(finished, cell: torch.nn.GRUCell, task: Path) -> None:
    out = finished[1]
    x = torch.from_numpy(arrays_of(task)["inputs"])
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(copy.deepcopy(cell).double(), x)))
    ntk = flow.ntk.dense().numpy()
    numbers = json.loads((out / "results.json").read_text())["numbers"]
    assert numbers["ntk_trace"]["value"] == pytest.approx(np.trace(ntk), rel=1e-9)
    assert numbers["ntk_effective_rank"]["value"] == pytest.approx(np.trace(ntk) ** 2 / (ntk**2).sum(), rel=1e-9)
    assert numbers["ntk_trace"]["stderr"] == 0
    with xr.open_dataset(out / "results.nc", engine="h5netcdf") as dataset:
        np.testing.assert_allclose(dataset.ntk_eigenvalue, np.linalg.eigvalsh(ntk)[::-1][:3], rtol=1e-3)
        assert {name: float(dataset[name]) for name in numbers} == {name: n["value"] for name, n in numbers.items()}


def test_the_page_and_the_table_show_the_results(finished) -> None:
    result, out = finished
    page = (out / "index.html").read_text()
    assert "GRU of 6 units on &lt;b&gt;" in page and "<b>.npz" not in page
    numbers = json.loads((out / "results.json").read_text())["numbers"]
    assert all(number["text"] in page and number["text"] in result.stdout for number in numbers.values())


def test_overwrite_replaces_an_earlier_analysis(finished, checkpoint: Path, task: Path, out: Path) -> None:
    shutil.copytree(finished[1], out)
    (out / "results.json").write_text("old")
    arguments = ("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out)
    refused = run(*arguments)
    assert refused.exit_code == 2 and "is not empty; give --overwrite" in refused.stderr
    assert run(*arguments, "--overwrite", "--threads", torch.get_num_threads()).exit_code == 0
    assert {path.name for path in out.iterdir()} == FILE_NAMES
    assert (out / "results.json").read_text() != "old"
    assert [path.name for path in out.parent.iterdir()] == ["run"]


def test_overwrite_leaves_a_folder_with_other_files_alone(checkpoint: Path, task: Path, out: Path) -> None:
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out, "--overwrite")
    assert refused.exit_code == 2 and "'notes.txt'" in refused.stderr
    assert (out / "notes.txt").read_text() == "mine"


def test_missing_checkpoint(tmp_path: Path, task: Path, out: Path) -> None:
    missing = tmp_path / "none.pt"
    result = run("analyze", missing, "--model", "gru", "--task", task, "--out", out)
    assert_refused(result, out, f"no checkpoint file {missing}")


def test_checkpoint_of_another_architecture(checkpoint: Path, task: Path, out: Path) -> None:
    result = run("analyze", checkpoint, "--model", "lstm", "--task", task, "--out", out)
    assert_refused(result, out, "not a checkpoint of model lstm, its model is gru")


def test_unknown_model(checkpoint: Path, task: Path, out: Path) -> None:
    result = run("analyze", checkpoint, "--model", "gruu", "--task", task, "--out", out)
    assert_refused(result, out, "model must be one of rnn, gru, lstm, ctrnn, lowrank, got 'gruu'")


def test_nan_weights(cell, tmp_path: Path, task: Path, out: Path) -> None:
    state = {name: value.clone() for name, value in cell.state_dict().items()}
    state["weight_hh"][1, 2] = float("nan")
    torch.save(state, tmp_path / "nan.pt")
    result = run("analyze", tmp_path / "nan.pt", "--model", "gru", "--task", task, "--out", out)
    assert_refused(result, out, "weight_hh has a NaN or infinity, first at (1, 2)")


def test_unknown_task(checkpoint: Path, out: Path) -> None:
    result = run("analyze", checkpoint, "--model", "gru", "--task", "memorypri", "--out", out)
    assert_refused(result, out, "unknown task 'memorypri'. Nearest: memorypro")


def test_trials_that_no_memory_holds_are_refused(checkpoint: Path, task: Path, out: Path) -> None:
    arguments = ("analyze", checkpoint, "--model", "gru", "--out", out, "--trials", 1_000_000_000)
    assert_refused(run(*arguments, "--task", "memorypro"), out, "1e+09 trials with 270 inputs each take 4.02e+03 GiB")
    assert_refused(run(*arguments, "--task", task), out, "asked for 1000000000 trials, but")


def test_task_of_another_width(checkpoint: Path, tmp_path: Path, out: Path) -> None:
    np.savez(tmp_path / "wide.npz", inputs=np.zeros((4, 5, 7)))
    result = run("analyze", checkpoint, "--model", "gru", "--task", tmp_path / "wide.npz", "--out", out)
    assert_refused(result, out, "takes 3 inputs, but the task wide gives 7")


def test_unknown_dtype(checkpoint: Path, task: Path, out: Path) -> None:
    result = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out, "--dtype", "int8")
    assert_refused(result, out, "dtype must be float32 or float64, got 'int8'")


def test_folder_that_cannot_be_written_is_refused_before_any_work(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "run"
    result = run("analyze", tmp_path / "none.pt", "--model", "gru", "--task", task, "--out", below)
    assert_refused(result, below, "cannot write to")
    assert (tmp_path / "file").read_text() == "x"


def test_a_file_is_no_folder(checkpoint: Path, task: Path, tmp_path: Path) -> None:
    result = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", checkpoint)
    assert result.exit_code == 2 and "exists and is not a folder" in result.stderr


@pytest.fixture
def interruptible() -> Iterator[None]:
    """An interrupt raises KeyboardInterrupt, also where tests run in a job whose parent ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("where", "number", "status"), [("computing", signal.SIGINT, 130), ("writing", signal.SIGTERM, 143)]
)
def test_signals_leave_nothing(checkpoint, task, out: Path, monkeypatch, where: str, number: int, status: int) -> None:
    def interrupted(*args, **kwargs):
        signal.raise_signal(number)

    owner, name = (analysis, "analyze") if where == "computing" else (xr.Dataset, "to_netcdf")
    monkeypatch.setattr(owner, name, interrupted)
    result = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out, "--modes", 1)
    assert result.exit_code == status
    assert "Traceback" not in result.output
    assert not list(out.parent.iterdir())
    if number == signal.SIGINT:
        assert result.stderr == "kpflow-dyn: interrupted: nothing was written\n"


def test_unexpected_errors_are_one_line_and_debug_shows_all(checkpoint, task, out: Path, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(analysis, "analyze", fail)
    arguments = ("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out)
    assert_refused(run(*arguments), out, "RuntimeError: first second; see --debug", status=1)
    assert isinstance(run(*arguments, "--debug").exception, RuntimeError)
    assert not list(out.parent.iterdir())


def test_warnings_reach_the_user_and_the_page(finished, checkpoint, task, out: Path, monkeypatch) -> None:
    def warn(*args, **kwargs) -> xr.Dataset:
        warnings.warn_explicit("2 of 8 eigenpairs\ndid not converge", UserWarning, "kpflow_dyn/spectra.py", 1)
        warnings.warn_explicit("not ours", UserWarning, "elsewhere/module.py", 1)
        return xr.load_dataset(finished[1] / "results.nc", engine="h5netcdf")

    monkeypatch.setattr(analysis, "analyze", warn)
    result = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out)
    assert result.exit_code == 0
    assert result.stderr == "note: 2 of 8 eigenpairs did not converge\n"
    assert "2 of 8 eigenpairs did not converge" in (out / "index.html").read_text()
    assert json.loads((out / "results.json").read_text())["warnings"] == ["2 of 8 eigenpairs did not converge"]


# A problem out of the user's own code

CODE = """
import numpy as np
import torch
import kpflow_dyn as kp
from helper import START

class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.W = torch.nn.Parameter(torch.randn(2, 2, dtype=torch.float64))

    def forward(self, t, z):
        return torch.tanh(z @ self.W.T)

def ode():
    return kp.ODEProblem(Field(), START, np.array([0.0, 0.1, 0.4, 1.0]))

def solved():
    return kp.solve(ode(), "midpoint")

def discrete():
    torch.manual_seed(0)
    return kp.DiscreteProblem(torch.nn.GRUCell(3, 4), torch.ones(2, 3, 3))

def network():
    torch.manual_seed(0)
    x, steps = torch.randn(2, 5, 3).double(), torch.arange(5).double()
    return kp.StaticProblem(Sum().double(), {"x": x, "steps": steps}, axes=("time", "trial", "unit"))

class Sum(torch.nn.Linear):
    def __init__(self):
        super().__init__(3, 4)

    def forward(self, x, steps):
        return torch.tanh(super().forward(x) + steps[:, None]).cumsum(1).transpose(0, 1)

def fails():
    raise RuntimeError("no data\\nhere")

def ends():
    raise SystemExit(3)

def nothing():
    pass

def needs(x):
    return x

CONSTANT = 3.0
"""
HELPER = "import torch; START = torch.tensor([[1.0, 0.0], [0.5, -1.0]], dtype=torch.float64)"


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with modules."""
    folder = tmp_path_factory.mktemp("code")
    (folder / "mine.py").write_text(CODE)
    (folder / "helper.py").write_text(HELPER)
    (folder / "broken.py").write_text("import not_installed_at_all")
    return folder


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the command imported is forgotten at the end."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name in ("mine", "helper", "broken", "jaxed"):
        sys.modules.pop(name, None)


@pytest.fixture
def here(code: Path, forgetful: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(code)
    return code


@pytest.mark.parametrize("reference", ["mine:ode", "mine.py:solved", "mine:discrete", "mine:network"])
def test_analyze_a_problem_of_ones_own(here: Path, out: Path, reference: str) -> None:
    result = run("analyze", "--problem", reference, "--out", out, "--modes", 2, "--threads", torch.get_num_threads())
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} == FILE_NAMES
    found = json.loads((out / "results.json").read_text())
    assert found["settings"]["code"] == reference
    assert reference in (out / "index.html").read_text()
    problem = getattr(sys.modules["mine"], reference.rpartition(":")[2])()
    solution = problem if isinstance(problem, kp.Solution) else kp.solve(problem)
    truth = kp.trace(kp.linearize(solution).ntk).value
    assert found["numbers"]["ntk_trace"]["value"] == pytest.approx(truth, rel=1e-9)
    with xr.open_dataset(out / "results.nc", engine="h5netcdf", decode_times=False) as dataset:
        np.testing.assert_array_equal(dataset.time, solution.t)


def test_a_file_elsewhere_finds_the_modules_beside_it(code: Path, out: Path, forgetful: None) -> None:
    result = run("analyze", "--problem", f"{code / 'mine.py'}:ode", "--out", out, "--modes", 1)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine", "--problem is 'mine', expected module:function, or file.py:function"),
        ("mine:", "--problem is 'mine:', expected"),
        ("nowhere.sub:ode", "no module 'nowhere' in"),
        ("nowhere.py:ode", "no file nowhere.py; --problem takes module:function"),
        (
            "broken:ode",
            "broken raised ModuleNotFoundError: No module named 'not_installed_at_all'; --debug shows where",
        ),
        ("broken.py:ode", "broken.py raised ModuleNotFoundError: No module named 'not_installed_at_all'"),
        ("mine:od", "mine has no function 'od'; the nearest is ode"),
        ("mine:CONSTANT", "mine:CONSTANT is a float, expected a function without arguments that returns a problem"),
        ("mine:fails", "mine:fails raised RuntimeError: no data here; --debug shows where"),
        ("mine:needs", "mine:needs raised TypeError: needs() missing 1 required positional argument: 'x'"),
        ("mine:ends", "mine:ends raised SystemExit; keep what a script does under"),
        ("mine:nothing", "mine:nothing returned None, expected a problem (kp.DiscreteProblem"),
        ("mine:Field", "mine:Field returned a Field, expected a problem (kp.DiscreteProblem"),
    ],
)
def test_code_that_gives_no_problem(here: Path, out: Path, reference: str, message: str) -> None:
    assert_refused(run("analyze", "--problem", reference, "--out", out), out, message)


def test_debug_shows_where_code_failed(here: Path, out: Path) -> None:
    error = run("analyze", "--problem", "mine:fails", "--out", out, "--debug").exception
    assert isinstance(error, ValueError) and isinstance(error.__cause__, RuntimeError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no CHECKPOINT and no --task; give CHECKPOINT and --task (or --x), or --problem file.py:function alone"),
        (("net.pt", "--model", "gru"), "no --task; give CHECKPOINT"),
        (("--task", "memorypro"), "no CHECKPOINT; give CHECKPOINT"),
        (("--problem", "mine:ode", "net.pt", "--task", "x"), "CHECKPOINT, --task cannot be given with --problem"),
        (("--problem", "mine:ode", "--dtype", "float32", "--trials", 3), "--trials, --dtype cannot be given with"),
    ],
)
def test_either_a_checkpoint_or_a_problem(out: Path, arguments: tuple, message: str) -> None:
    assert_refused(run("analyze", *arguments, "--out", out), out, message)


def test_a_problem_in_jax_in_a_real_process(code: Path, forgetful: None) -> None:
    pytest.importorskip("jax")
    (code / "jaxed.py").write_text(
        "import jax, equinox as eqx, kpflow_dyn as kp\n"
        "def gru():\n"
        "    key = jax.random.key(0)\n"
        "    return kp.DiscreteProblem(eqx.nn.GRUCell(2, 3, key=key), jax.random.normal(key, (2, 3, 2)))\n"
    )
    refused = run("analyze", "--problem", f"{code / 'jaxed.py'}:gru", "--out", code / "jaxed", "--threads", "1")
    assert refused.exit_code == 2 and refused.stderr.startswith("kpflow-dyn: --threads has no effect on JAX")
    call = ("-W", "default", "-c", "from kpflow_dyn.cli import app; app()", "analyze", "--problem", "jaxed:gru")
    result = python(*call, "--out", "jaxed", "--modes", "2", cwd=code)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (code / "jaxed").iterdir()} == FILE_NAMES
    assert "jax" in json.loads((code / "jaxed" / "results.json").read_text())["versions"]


def test_version() -> None:
    assert run("--version").stdout == f"kpflow-dyn {kp.__version__}\n"


def test_figure_names() -> None:
    assert {f"{name}.png" for name in OF_PARTS} == LEARNING_NAMES
    assert tuple(FIGURES) == FIGURE_NAMES


def python(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(kp.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "100"}
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_help_texts_are_shown_whole() -> None:
    """Text in square brackets is no markup."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    texts = [text for one in commands.values() for text in (one.help, one.epilog, *(p.help for p in one.params))]
    assert len(texts) > 100
    for text in filter(None, texts):
        assert Text.from_markup(text).plain == text.replace("\\[", "["), text
    assert "of inputs [trial, time, channel]" in " ".join(run("analyze", "--help").output.replace("│", " ").split())


def test_start_up_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, kpflow_dyn.cli; print({'torch', 'matplotlib', 'xarray', 'scipy', 'numpy'} & set(sys.modules))"
    assert python("-c", code, cwd=tmp_path).stdout == "set()\n"


def test_a_real_process_that_fails(tmp_path: Path) -> None:
    code = "from kpflow_dyn.cli import app; app()"
    arguments = ("analyze", "none.pt", "--model", "gru", "--task", "memorypro", "--out", "run")
    result = python("-c", code, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "kpflow-dyn: no checkpoint file none.pt\n")
    assert not list(tmp_path.iterdir())


def test_the_demo_asks_for_nothing_that_analyze_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are those of `analyze` of the same file, whose options have these defaults."""
    ran: list[tuple] = []
    monkeypatch.setattr(_app, "_run", lambda *arguments: ran.append(arguments))
    path = str(files("kpflow_dyn").joinpath("data/demo.safetensors"))
    for arguments in (["demo"], ["analyze", path, "--task", DEMO_TASK, "--threads", "1"]):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    (demo, seed, asked, threads, _), (network, *others, _) = ran
    given = others[1]
    assert (seed, threads) == (others[0], others[2])
    assert asked == {name: given[name] for name in asked} and {given[name] for name in given.keys() - asked} <= {
        None,
        1000,
    }
    assert (demo.checkpoint, demo.task) == (network.checkpoint, network.task)
    assert load_checkpoint(path).model == demo.model


def test_a_demo_replaces_an_earlier_demo_and_nothing_else(monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
    ran: list[tuple] = []
    monkeypatch.setattr(_app, "_run", lambda *arguments: ran.append(arguments))
    out.mkdir()
    for checkpoint in (_app.DEMO, "net.pt"):
        content = {"settings": {"checkpoint": checkpoint, "task": DEMO_TASK}}
        (out / "results.json").write_text(json.dumps(content))
        assert run("demo", "--out", out).exit_code == 0
    assert [arguments[-1].overwrite for arguments in ran] == [True, False]


@pytest.mark.slow
def test_demo_in_a_real_process(tmp_path: Path) -> None:
    pytest.importorskip("neurogym")
    code = "from kpflow_dyn.cli import app; app()"
    result = python("-W", "default", "-c", code, "demo", "--trials", "6", "--modes", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "kpflow-demo"
    assert result.stdout.splitlines()[-1] == f"The page: {out / 'index.html'}"
    assert {path.name for path in out.iterdir()} == FILE_NAMES | LEARNING_NAMES
    assert "in time" in result.stdout and "Effective temporal rank" not in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["state"] == "6 trials x 22 times x 64 units"
    assert result.stdout.index("The loss is") < result.stdout.index("in time")
    network = load_checkpoint(str(files("kpflow_dyn").joinpath("data/demo.safetensors")), "gru")
    data = kp.tasks.make_task("neurogym:PerceptualDecisionMaking-v0", trials=6)
    assert network.readout is not None
    scores, choice = network.readout(network.cell(torch.from_numpy(data.inputs).float())[0]), data.labels["class"]
    each = torch.nn.functional.cross_entropy(scores.transpose(1, 2), torch.from_numpy(choice), reduction="none")
    assert results["numbers"]["loss"]["value"] == pytest.approx(each.mean().item(), rel=1e-4)
    right = (scores.argmax(-1) == torch.from_numpy(choice)).float()
    assert results["numbers"]["accuracy"]["value"] == pytest.approx(right.mean().item(), rel=1e-5)
    fixation = torch.from_numpy(choice == 0)
    accuracies = {part["part"]: part["accuracy"] for part in results["learning"]}
    assert accuracies["fixation"] == pytest.approx(right[fixation].mean().item(), rel=1e-5)


def test_report_of_an_analysis(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert found.exit_code == 2 and "holds no results; expected results.nc" in found.stderr
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(2, 4), torch.randn(2, 4, 2))))
    kp.analyze(flow, k=2).to_netcdf(tmp_path / "results.nc", engine="h5netcdf")
    for options, status in (([], 0), ([], 0), (["--out", str(tmp_path / "mine.html")], 2), (["--overwrite"], 0)):
        (tmp_path / "mine.html").write_text("<html>my own</html>")
        found = CliRunner().invoke(app, ["report", str(tmp_path), *options])
        assert found.exit_code == status
    assert (tmp_path / "mine.html").read_text() == "<html>my own</html>"
    assert "Temporal modes" in (tmp_path / "report.html").read_text("utf-8")


@pytest.mark.parametrize("command", ["analyze", "track", "compare"])
def test_options_of_the_task(checkpoint: Path, cell: torch.nn.GRUCell, out: Path, command: str) -> None:
    network = ("--task", "memorypro", "--trials", 3, "--task-option", "memory=2", "--task-option", "stimulus=3")
    record = kp.Recorder(out.parent / "recorded")
    record(0, cell, loss=1.0)
    files = {"analyze": [checkpoint], "track": [record.folder], "compare": [checkpoint, checkpoint]}[command]
    modes = [] if command == "track" else ["--modes", 1]
    shown = run(command, *files, *network, *modes, "--out", out)
    assert shown.exit_code == 0, shown.output
    if command == "analyze":
        results = json.loads((out / "results.json").read_text())
        assert results["settings"]["state"] == "3 trials x 35 times x 6 units"
        assert json.loads(results["settings"]["task_options"]) == {"memory": 2, "stimulus": 3}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["memory"], "--task-option is 'memory', expected NAME=VALUE"),
        (["wait=3"], "memorypro has no option wait; it has: fixation, stimulus, memory, response, noise, dt"),
        (["memory=3", "memory=4"], "--task-option memory is given twice"),
        (["memory=3", "memory.a=4"], "--task-option memory.a is given twice"),
        (["memory=long"], "memory must be a whole number, got 'long'"),
        (["seed=3"], "--task-option seed=3: give it as --seed"),
    ],
)
def test_bad_options_of_the_task(checkpoint: Path, out: Path, given: list[str], message: str) -> None:
    options = [part for text in given for part in ("--task-option", text)]
    assert_refused(run("analyze", checkpoint, "--task", "memorypro", *options, "--out", out), out, message)


def test_options_are_numbers_texts_and_nested() -> None:
    given = ["dt=20", "sigma=0.5", "kind=pro", "abort=True", "on=true", "cohs=[1, 2]", "timing.a.b=5", "timing.c=x"]
    nested = {"timing": {"a": {"b": 5}, "c": "x"}}
    plain = {"dt": 20, "sigma": 0.5, "kind": "pro", "abort": True, "on": True, "cohs": [1, 2]}
    assert task_options(given) == plain | nested and task_options([]) is None


@pytest.mark.parametrize("kept", [[], ["--all-steps"]])
def test_the_loss_of_a_masked_regression(learning, cell, masked: Path, out: Path, kept: list[str]) -> None:
    checkpoint, task, layer = learning
    arrays = arrays_of(task) | {"mask": arrays_of(masked)["mask"]}
    np.savez(task.parent / "both.npz", **arrays)
    network = (checkpoint, "--task", task.parent / "both.npz", "--dtype", "float64", "--modes", 1)
    shown = run("analyze", *network, "--out", out, *kept)
    assert shown.exit_code == 0, shown.output
    problem = kp.DiscreteProblem(copy.deepcopy(cell).double(), torch.from_numpy(arrays["inputs"]))
    y = copy.deepcopy(layer).double()(kp.solve(problem).state).detach().numpy()
    loss = ((y - arrays["targets"]) ** 2)[arrays["mask"]].mean()
    results = json.loads((out / "results.json").read_text())
    assert results["numbers"]["loss"]["value"] == pytest.approx(loss) and f"The loss is {loss:.3g}" in shown.stdout
    assert results["found"]["mask"]["how"] == ("given" if kept else "read")


def test_choices_say_how_they_came_about(learning, out: Path) -> None:
    checkpoint, task, _ = learning
    given = ("--readout", "probe", "--loss", "squared_error", "--trials", 3)
    shown = run("analyze", checkpoint, "--task", task, *given, "--modes", 1, "--out", out)
    assert shown.exit_code == 0, shown.output
    found = json.loads((out / "results.json").read_text())["found"]
    how = {name: (one["value"], one["how"], one["option"]) for name, one in found.items()}
    assert how["readout"] == ("probe", "given", "--readout") and how["trials"] == (3, "given", "--trials")
    assert how["loss"] == ("squared_error", "given", "--loss") and how["dtype"] == ("float32", "read", "--dtype")
    assert how["model"] == ("gru", "read", "--model") and how["start"] == ("zeros", "guessed", "--carry-state")


def test_the_summary_fits_a_narrow_terminal(learning, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, task, _ = learning
    monkeypatch.setenv("COLUMNS", "60")
    shown = run("analyze", checkpoint, "--task", task, "--modes", 1, "--out", out)
    lines = shown.stdout.splitlines()
    assert max(map(len, lines[1:-1])) <= 60 and "\x1b" not in shown.stdout
    results = xr.load_dataset(out / "results.nc", engine="h5netcdf")
    share = results.temporal_eigenvalue[0] / results.temporal_eigenvalue.sum()
    rank = f"{float(results.temporal_effective_rank):.3g} of 5 time courses"
    assert f"in time {rank}; the first temporal mode carries {float(share):.0%}" in " ".join(shown.stdout.split())


def test_a_dry_run_says_the_sizes_and_writes_nothing(checkpoint: Path, task: Path, out: Path) -> None:
    shown = run("analyze", checkpoint, "--task", task, "--dry-run", "--out", out)
    assert shown.exit_code == 0 and not out.exists()
    assert shown.stdout.startswith("4 trials x 5 steps x 6 units, 198 parameters: about ")
    assert len(shown.stdout.splitlines()) == 1


@pytest.mark.parametrize("given", ["checkpoint", "problem"])
def test_what_does_not_fit_is_refused_before_any_work(
    checkpoint: Path, task: Path, here: Path, out: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(memory, "available", lambda: 5e8)
    monkeypatch.setattr(kp, "solve", None)
    source = (checkpoint, "--task", task) if given == "checkpoint" else ("--problem", "mine:ode")
    message = "take about 0.6 GB to analyse, and 0.5 GB of memory are free; lower --trials, --modes or --samples"
    assert_refused(run("analyze", *source, "--out", out), out, message)


def test_the_memory_grows_with_what_is_asked(cell: torch.nn.GRUCell) -> None:
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.zeros(4, 5, 3))))
    asked = [Work(8, 40, False), Work(80, 40, False), Work(8, 400, False)]
    few, modes, samples = (cost_of(flow, work).bytes - 6e8 for work in asked)
    assert cost_of(flow, asked[0], spent=1e6).seconds > 1e6  # what the estimate itself took is a part of it
    assert few == pytest.approx(4 * 120 * (40 + 6.5 * 8 + 40)) and modes > 3 * few and samples > 3 * few


@pytest.fixture(scope="module")
def masked(folder: Path, task: Path) -> Path:
    """The task with a trial that ends early and a step without a target."""
    mask = np.ones((4, 5), bool)
    mask[0, 3:] = mask[1, 1] = False
    np.savez(folder / "masked.npz", inputs=arrays_of(task)["inputs"], mask=mask)
    return folder / "masked.npz"


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_a_session_of_trials(cell, checkpoint: Path, masked: Path, out: Path, command: str) -> None:
    files = [checkpoint] * (1 + (command == "compare"))
    call = (command, *files, "--task", masked, "--carry-state", "--dtype", "float64", "--modes", 1, "--out", out)
    shown = run(*call)
    assert shown.exit_code == 0, shown.output
    if command == "analyze":
        arrays, own, z, ends = arrays_of(masked), copy.deepcopy(cell).double(), None, []
        for x, counts in zip(torch.from_numpy(arrays["inputs"]), arrays["mask"], strict=True):
            for u in x[: 1 + np.flatnonzero(counts)[-1]]:
                z = own(u, z)
            ends.append(z.detach().numpy())
        with xr.open_dataset(out / "results.nc", engine="h5netcdf") as dataset:
            moved = dataset.pc_projection.values @ dataset.pc_direction.values
        last = np.array([rows[np.flatnonzero(on)[-1]] for rows, on in zip(moved, arrays["mask"], strict=True)])
        np.testing.assert_allclose(last - last[0], np.array(ends) - ends[0], atol=1e-10)


@pytest.mark.parametrize("kept", [[], ["--all-steps"], ["--include-padding"]])
def test_steps_without_a_target_are_left_out(cell, checkpoint: Path, masked: Path, out: Path, kept: list[str]) -> None:
    network = ("--model", "gru", "--task", masked, *kept)
    shown = run("analyze", checkpoint, *network, "--out", out, "--dtype", "float64", "--modes", 2)
    assert shown.exit_code == 0, shown.output
    said = "10% of the steps lie behind the last target of their trial and 5% of the steps lie before it and have no "
    said += f"target; they are {'analysed too' if kept else 'left out (all_steps=True, or --all-steps, keeps them)'}"
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["steps"] == said and f"{said}." in (out / "index.html").read_text()
    assert said in " ".join(shown.stdout.split())
    arrays = arrays_of(masked)
    problem = kp.DiscreteProblem(copy.deepcopy(cell).double(), torch.from_numpy(arrays["inputs"]))
    R = np.repeat(arrays["mask"].reshape(-1) | bool(kept), 6)
    trace = np.diag(kp.linearize(kp.solve(problem)).ntk.dense().numpy()) @ R
    assert results["numbers"]["ntk_trace"]["value"] == pytest.approx(trace)
    shown = run("compare", checkpoint, checkpoint, *network, "--modes", 2, "--out", out.parent / "compared")
    assert shown.exit_code == 0 and shown.stdout.splitlines()[-2] == said
    record = kp.Recorder(out.parent / "recorded")
    record(0, cell, loss=1.0)
    shown = run("track", record.folder, *network)
    assert shown.exit_code == 0 and said in shown.stdout
    with xr.open_dataset(record.folder / "track" / "track.nc", engine="h5netcdf") as dataset:
        assert dataset.attrs["steps"] == said


@pytest.fixture(scope="module")
def learning(folder: Path, task: Path, cell: torch.nn.GRUCell) -> tuple[Path, Path, torch.nn.Linear]:
    """A checkpoint with a layer of two outputs, a task with as many targets, and the layer."""
    torch.manual_seed(1)
    layer = torch.nn.Linear(6, 2)
    whole = {f"rnn.{name}": value for name, value in cell.state_dict().items()}
    torch.save(whole | {f"probe.{name}": value for name, value in layer.state_dict().items()}, folder / "read.pt")
    inputs = arrays_of(task)["inputs"]
    np.savez(folder / "read.npz", inputs=inputs, targets=np.stack([inputs[..., 0], inputs.sum(-1)], -1))
    return folder / "read.pt", folder / "read.npz", layer


@pytest.mark.usefixtures("drawn")
def test_the_only_layer_that_fits_is_the_readout(learning, cell: torch.nn.GRUCell, out: Path) -> None:
    checkpoint, task, layer = learning
    shown = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out, "--dtype", "float64")
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.stdout.split())
    assert "readout: the layer 'probe' [2, 6] (--readout sets it)" in said
    assert {path.name for path in out.iterdir()} == FILE_NAMES | LEARNING_NAMES
    arrays = arrays_of(task)
    states = kp.solve(kp.DiscreteProblem(copy.deepcopy(cell).double(), torch.from_numpy(arrays["inputs"]))).state
    loss = ((copy.deepcopy(layer).double()(states) - torch.from_numpy(arrays["targets"])) ** 2).mean().item()
    results = json.loads((out / "results.json").read_text())
    assert results["numbers"]["loss"]["value"] == pytest.approx(loss)
    assert [part["part"] for part in results["learning"]][:3] == ["everything", "output 0", "output 1"]
    assert results["settings"]["loss"] == "squared_error"


def test_the_times_of_an_optimizer(learning, cell: torch.nn.GRUCell, out: Path) -> None:
    checkpoint, task, layer = learning
    options = ("--optimizer", "adam", "--lr", 0.03, "--clip", 2, "--steps", 300, "--dtype", "float64", "--modes", 2)
    shown = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out, *options)
    assert shown.exit_code == 0, shown.output
    arrays = {name: torch.from_numpy(values) for name, values in arrays_of(task).items()}
    problem = kp.DiscreteProblem(copy.deepcopy(cell).double(), arrays["inputs"])
    loss = kp.squared_error(arrays["targets"], copy.deepcopy(layer).double())
    how = {"optimizer": "adam", "lr": 0.03, "clip": 2.0}
    flow = kp.gradient_flow(problem, loss, 300, **how, stop_below=0.05)
    found = json.loads((out / "results.json").read_text())["optimizer"]
    assert found["steps"][0] == pytest.approx(flow.time_to(0.5)) and found["fraction"] == [0.5, 0.2, 0.1]
    assert found["road"] == flow.road and found["optimizer"] == "adam (lr 0.03, clip 2)"
    said = " ".join(shown.stdout.split())
    low, high = flow.interval_to(0.5)
    assert f"Training by adam (lr 0.03, clip 2) first brings it to 50% after {flow.time_to(0.5):.3g} steps" in said
    assert f"({low:.3g} to {high:.3g})" in said and f"Found {flow.road}." in said
    page = (out / "index.html").read_text()
    assert page.count("Training by adam (lr 0.03, clip 2) first brings it to") >= 2  # at the top, and of the figure


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loss", "hinge"], "loss is 'hinge', expected one of squared_error, cross_entropy"),
        (["--readout", "wide"], "the readout 'wide' has 3 outputs, and the task 2"),
        (["--optimizer", "adam"], "the optimizer adam needs lr=, its learning rate"),
        (["--optimizer", "sgd", "--lr", 1e4], "gradient descent with lr = 1e+04 is unstable: the largest rate is"),
        (["--lr", 0.1], "lr is for an optimizer; say which, or leave it out"),
        (["--optimizer", "adam", "--lr", 0], "lr is 0.0, expected a positive number"),
        (["--optimizer", "adan", "--lr", 0.1], "optimizer is 'adan', expected one of adam, adamw, rmsprop, sgd"),
    ],
)
def test_readouts_and_losses_that_do_not_fit(learning, out: Path, options: list[str], message: str) -> None:
    checkpoint, task, _ = learning
    weights = torch.load(checkpoint) | {"wide.weight": torch.ones(3, 6)}
    torch.save(weights, checkpoint.parent / "wide.pt")
    result = run("analyze", checkpoint.parent / "wide.pt", "--model", "gru", "--task", task, "--out", out, *options)
    assert result.exit_code == 2 and message in result.stderr and not out.exists()


@pytest.mark.parametrize("command", ["analyze", "demo"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lr", 0.1], "lr is for an optimizer"),
        (["--optimizer", "adam"], "needs lr="),
        (["--optimizer", "adam", "--lr", "nan"], "lr is nan, expected a positive number"),
        (["--optimizer", "adan", "--lr", 1], "optimizer is 'adan', expected one of"),
    ],
)
def test_options_of_a_training_are_checked_first(command: str, options: list, message: str) -> None:
    files = ["no_such_file.pt", "--task", "no_such_task"] if command == "analyze" else []
    result = run(command, *files, *options, "--dry-run")
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("command", ["analyze", "track", "compare"])
def test_the_name_of_a_loss_is_checked_first(command: str) -> None:
    files = ["none.pt"] * (1 + (command == "compare"))
    result = run(command, *files, "--task", "no_such_task", "--loss", "hinge")
    assert result.exit_code == 2 and "loss is 'hinge', expected one of squared_error" in result.stderr


def test_a_readout_of_the_h_of_an_lstm_answers_too(task: Path, folder: Path, out: Path) -> None:
    network = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 6), "fc": torch.nn.Linear(6, 2)})
    torch.save(network.state_dict(), folder / "lstm.pt")
    inputs = arrays_of(task)["inputs"]
    np.savez(folder / "lstm.npz", inputs=inputs, targets=inputs[..., :2])
    shown = run("analyze", folder / "lstm.pt", "--model", "lstm", "--task", folder / "lstm.npz", "--out", out)
    assert shown.exit_code == 0, shown.output
    assert "readout: the layer 'fc' [2, 6] (--readout sets it)" in " ".join(shown.stdout.split())
    assert "learning" in json.loads((out / "results.json").read_text())


CHOICES = """
import numpy as np
from kpflow_dyn.tasks import TaskData

class Choices:
    def sample(self, trials, seed):
        inputs = np.random.default_rng(3).standard_normal((4, 5, 3))
        mask = np.ones((4, 5), bool)
        mask[0, 3:] = mask[1, 1] = False
        right = inputs.argmax(-1)
        return TaskData(inputs, np.eye(3)[right], mask, {"class": right}, "choices")
"""


@pytest.fixture
def of_classes(folder: Path, cell: torch.nn.GRUCell) -> tuple[list[Path], str]:
    """Two checkpoints of a cell with a layer of classes, and a task that knows the right ones."""
    torch.manual_seed(2)
    files = [folder / f"classes_{number}.pt" for number in range(2)]
    for number, file in enumerate(files):
        whole = {f"rnn.{name}": value + 0.3 * number for name, value in cell.state_dict().items()}
        torch.save(whole | {"head.weight": torch.randn(3, 6), "head.bias": torch.randn(3)}, file)
    (folder / "choices.py").write_text(CHOICES)
    return files, f"{folder / 'choices.py'}:Choices"


def now_by_hand(file: Path, cell: torch.nn.GRUCell) -> list[list[str]]:
    """Loss and accuracy of a checkpoint, as they are shown."""
    weights = {name: value.double() for name, value in torch.load(file).items()}
    rnn = {name.removeprefix("rnn."): value for name, value in weights.items() if name.startswith("rnn.")}
    own, scope = copy.deepcopy(cell).double(), {}
    own.load_state_dict(rnn)
    exec(CHOICES, scope)
    data = scope["Choices"]().sample(None, 0)
    states = kp.solve(kp.DiscreteProblem(own, torch.from_numpy(data.inputs))).state
    y = (states @ weights["head.weight"].T + weights["head.bias"])[torch.from_numpy(data.mask)]
    right = torch.from_numpy(data.targets).argmax(-1)[torch.from_numpy(data.mask)]
    loss, hits = torch.nn.functional.cross_entropy(y, right), (y.argmax(-1) == right).double().mean()
    return [f"{loss:.4g}", f"{hits:.4g}"]


@pytest.mark.parametrize("kept", [[], ["--all-steps"]])
def test_two_checkpoints_under_the_loss_of_their_task(of_classes, cell, out: Path, kept: list[str]) -> None:
    files, task = of_classes
    network = ("--model", "gru", "--task", task, "--out", out, "--dtype", "float64", "--modes", 2, *kept)
    shown = run("compare", *files, *network)
    assert shown.exit_code == 0, shown.output
    assert "The loss is cross_entropy; the layer 'head' [3, 6] is taken as the readout" in shown.stdout
    (loss, hits), (other_loss, other_hits) = (now_by_hand(file, cell) for file in files)
    lines = [line.split() for line in shown.stdout.splitlines()]
    names = [file.name for file in files]
    assert shown.stdout.count("Found in") == 1 and f"Found in {names[0]} and {names[1]}:" in shown.stdout
    assert lines[:3] == [names, ["loss", loss, other_loss], ["accuracy", hits, other_hits]]
    assert shown.stdout.splitlines()[:-1] == (out / "comparison.txt").read_text().splitlines()[1:]
    record = json.loads((out / "comparison.json").read_text())
    assert [f"{record['networks'][name]['accuracy']:.4g}" for name in names] == [hits, other_hits]
    assert record["networks"][names[0]]["found"]["cell"].startswith("gru: 3 inputs, 6 units")
    assert record["settings"]["loss"] == "cross_entropy" and record["settings"]["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    page = (out / "index.html").read_text("utf-8")
    assert all(text in page for text in (*names, loss, other_loss, "choices", "GRUCell(3, 6)", kp.__version__))
    assert run("report", out).exit_code == 0
    squares = run("compare", *files, *network, "--overwrite", "--loss", "squared_error", "--readout", "head")
    assert squares.exit_code == 0 and "The loss is squared_error" in squares.stdout
    assert "accuracy" not in squares.stdout


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("before.pt", "after.pt"), ("before.pt", "after.pt")),
        (("runs/1/net.pt", "runs/2/net.pt"), ("1/net.pt", "2/net.pt")),
        (("a/x/net.pt", "b/x/net.pt"), ("a/x/net.pt", "b/x/net.pt")),
        (("net.pt", "net.pt"), ("net.pt (A)", "net.pt (B)")),
    ],
)
def test_short_names_of_two_files(files: tuple[str, str], names: tuple[str, str]) -> None:
    assert short_names(*map(Path, files)) == names


def test_checkpoints_without_a_readout_are_compared_without_a_loss(of_classes, checkpoint: Path, out: Path) -> None:
    files, task = of_classes
    call = ("compare", files[0], checkpoint, "--model", "gru", "--task", task, "--modes", 2, "--out", out)
    shown = run(*call)
    assert (
        shown.exit_code == 0 and "On the loss: nothing is said, as the checkpoint has no single layer" in shown.stdout
    )
    assert "alignment of NTK" in shown.stdout and "under the loss" not in shown.stdout
    result = run(*call, "--loss", "cross_entropy", "--overwrite")
    assert result.exit_code == 2 and "--loss is that of a readout and its targets" in result.stderr


def test_a_loss_needs_a_readout(checkpoint: Path, task: Path, out: Path) -> None:
    result = run("analyze", checkpoint, "--model", "gru", "--task", task, "--out", out, "--loss", "squared_error")
    assert result.exit_code == 2 and "--loss is that of a readout and its targets" in result.stderr


@pytest.mark.parametrize("axis", [pytest.param(False, marks=pytest.mark.slow), True])
def test_class_indices_in_a_file(cell: torch.nn.GRUCell, task: Path, folder: Path, out: Path, axis: bool) -> None:
    """Integers [trial, time] are classes, whose loss is the cross-entropy unless something else is said."""
    torch.manual_seed(2)
    layer = torch.nn.Linear(6, 3)
    whole = {f"rnn.{name}": value for name, value in cell.state_dict().items()}
    torch.save(whole | {f"probe.{name}": value for name, value in layer.state_dict().items()}, folder / "classes.pt")
    inputs = arrays_of(task)["inputs"]
    right = np.random.default_rng(1).integers(0, 3, inputs.shape[:2])
    right[0, 0] = -100
    np.savez(folder / "classes.npz", inputs=inputs, targets=right[..., None] if axis else right)
    asked = ("--model", "gru", "--task", folder / "classes.npz")
    shown = run("analyze", folder / "classes.pt", *asked, "--out", out, "--dtype", "float64", "--modes", 2)
    assert shown.exit_code == 0, shown.output
    states = kp.solve(kp.DiscreteProblem(copy.deepcopy(cell).double(), torch.from_numpy(inputs))).state
    logits = copy.deepcopy(layer).double()(states).reshape(-1, 3)
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(right.reshape(-1))).item()
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["loss"] == "cross_entropy"
    assert results["numbers"]["loss"]["value"] == pytest.approx(loss)
    record = kp.Recorder(out.parent / "recorded")
    record(0, cell, loss=1.0, readout=layer)
    shown = run("track", record.folder, *asked)
    assert shown.exit_code == 0, shown.output
    with xr.open_dataset(record.folder / "track" / "track.nc", engine="h5netcdf") as dataset:
        assert float(dataset.loss[0]) == pytest.approx(loss, rel=1e-5) and "accuracy" in dataset


def test_a_missing_package_says_how_to_get_it() -> None:
    code = "import sys; sys.modules['torch'] = None; from kpflow_dyn.cli import app; app(['demo', '--dry-run'])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert "needs torch, which is not installed: pip install 'kpflow-dyn[torch]'" in found.stderr
