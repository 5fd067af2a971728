"""What the commands say of the files that they read, and of numbers that are not known."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from typer.testing import CliRunner

import kpflow_dyn as kp
from kpflow_dyn._folder import new_folder, replaced
from kpflow_dyn._shown import plural, with_error
from kpflow_dyn.cli import _sources as sources
from kpflow_dyn.cli._app import app
from kpflow_dyn.cli._options import task_options
from kpflow_dyn.report._learning_charts import _plain

X = np.random.default_rng(0).standard_normal((3, 6, 2))


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def network(units: int = 5, cell: type[nn.Module] = nn.GRU, **options: str) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"rnn": cell(2, units, **options), "fc": nn.Linear(units, 4)})


@pytest.fixture
def task(tmp_path: Path) -> Path:
    np.savez(tmp_path / "trials.npz", inputs=X, targets=np.ones((3, 6, 4)))
    return tmp_path / "trials.npz"


def saved(folder: Path, name: str, module: nn.Module) -> Path:
    torch.save(module.state_dict(), folder / name)
    return folder / name


def test_a_comparison_says_where_trials_start_and_how_large_each_is(tmp_path: Path, task: Path, monkeypatch) -> None:
    files = [saved(tmp_path, "a.pt", network()), saved(tmp_path, "b.pt", network(4))]
    losses, load = [], sources.load
    monkeypatch.setattr("kpflow_dyn.cli._training.load", lambda *given: losses.append(given[2:]) or load(*given))
    call = ["compare", *files, "--task", task, "--out", tmp_path / "out", "--modes", 1, "--carry-state"]
    shown = run(*call, "--loss", "squared_error")
    assert shown.exit_code == 0, shown.output
    assert losses == [("squared_error",)] * 2  # it takes part in the choice of tanh or relu
    record = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))
    starts = [one["found"]["start"] for one in record["networks"].values()]
    assert starts == ["the end of the trial before"] * 2 and "start: zeros" not in shown.stdout
    assert "the end of the trial before" in (tmp_path / "out" / "index.html").read_text("utf-8")
    assert record["settings"]["trials"] == "3 x 6 times x 5 and 4 units"


def test_a_file_of_half_precision_and_its_trials(tmp_path: Path, task: Path) -> None:
    file = saved(tmp_path, "half.pt", network().half())
    shown = run("analyze", file, "--task", task, "--out", tmp_path / "out", "--modes", 1)
    assert shown.exit_code == 0, shown.output
    found = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))["found"]
    assert (found["dtype"]["value"], found["dtype"]["words"]) == ("float32", "float32 (float16 in the file)")
    assert (found["trials"]["value"], found["trials"]["how"]) == (3, "read")


def test_a_dead_network_has_a_page(tmp_path: Path, task: Path) -> None:
    dead = network(cell=nn.RNN, nonlinearity="relu")
    dead["rnn"].bias_ih_l0.data.fill_(-50.0)
    file = saved(tmp_path, "dead.pt", dead)
    call = ["analyze", file, "--nonlinearity", "relu", "--task", task, "--out", tmp_path / "out", "--modes", 2]
    shown = run(*call, "--verbose")
    assert shown.exit_code == 0, shown.output
    said = "the alignment of K and the NTK is not known"
    results = json.loads((tmp_path / "out" / "results.json").read_text("utf-8"))
    assert results["numbers"]["K_ntk_alignment"]["value"] is None and said in results["warnings"][0]
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert said in page and "The NTK is zero: gradient descent on these parameters changes no state" in page
    assert "nan" not in shown.stdout.lower().split() and "not known" in shown.stdout


def test_numbers_that_are_not_known() -> None:
    assert with_error(float("nan"), 0.1) == "not known"
    assert [_plain(value) for value in (1.0, float("nan"), float("inf"))] == [1.0, None, "inf"]
    assert (plural(1, "trial"), plural(1200, "step")) == ("1 trial", "1,200 steps")


def test_options_that_are_a_number_and_a_table() -> None:
    with pytest.raises(ValueError, match=r"--task-option timing\.a\.b is given twice"):
        task_options(["timing=5", "timing.a.b=3"])


@pytest.mark.parametrize("writing", [new_folder, replaced])
def test_a_full_disk_is_named(tmp_path: Path, writing) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=r"cannot write .*results \(No space left"), writing(tmp_path / "results"):
        raise full
    assert not (tmp_path / "results").exists()


def test_a_reader_that_leaves_ends_the_command_quietly(tmp_path: Path) -> None:
    code = (
        "import sys, typer\nfrom kpflow_dyn.cli._terminal import plain_errors\napp = typer.Typer()\n"
        "@app.command()\ndef main():\n    with plain_errors(False):\n        raise BrokenPipeError(32, 'Broken pipe')\n"
        "app()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 1 and done.stderr == ""


@pytest.mark.parametrize(
    ("units", "dtype", "advice"), [(5, torch.float64, "take one dtype"), (4, torch.float32, "give readouts with")]
)
def test_what_keeps_two_models_from_being_compared(units: int, dtype: torch.dtype, advice: str) -> None:
    x = torch.from_numpy(X)
    first = kp.DiscreteProblem(network()["rnn"], x.float().transpose(0, 1))
    second = kp.DiscreteProblem(network(units)["rnn"].to(dtype), x.to(dtype).transpose(0, 1))
    with pytest.raises(ValueError, match=advice):
        kp.compare(*(kp.linearize(kp.solve(problem)) for problem in (first, second)), k=1)


def test_lines_fit_a_narrow_terminal(tmp_path: Path, task: Path, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    file = saved(tmp_path, "net.pt", network())
    shown = run("analyze", file, "--task", task, "--out", tmp_path / "out", "--modes", 1, "--trials", 1, "--verbose")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("1 trial x 6 steps x 5 units, ")
    lines = [line for line in shown.stdout.splitlines() if " " in line.strip() and "The page:" not in line]
    assert max(map(len, lines)) <= 40


def test_a_track_begins_where_the_file_says(tmp_path: Path, task: Path) -> None:
    """A start that does not learn, as PsychRNN's, is that of each checkpoint."""
    run_dir = tmp_path / "run"
    rng, units = np.random.default_rng(1), 5
    weights = {"W_rec": (units, units), "W_in": (units, 2), "W_out": (4, units), "b_rec": (units,), "b_out": (4,)}
    arrays = {name: 0.3 * rng.standard_normal(shape) for name, shape in weights.items()}
    np.savez(task, inputs=X)
    start = rng.standard_normal((1, units))
    tensors = {name: torch.from_numpy(a) for name, a in (arrays | {"init_state": start}).items()}
    record = kp.Recorder(run_dir)
    holder = nn.ParameterDict({name: nn.Parameter(value) for name, value in tensors.items()})
    record(0, holder, loss=1.0)
    shown = run("track", run_dir, "--task", task, "--nonlinearity", "tanh")
    assert shown.exit_code == 0, shown.output
    found = xr.load_dataset(run_dir / "track" / "track.nc", engine="h5netcdf")
    weights = [tensors[name].clone().requires_grad_() for name in ("W_rec", "W_in", "b_rec")]
    z, states = torch.from_numpy(np.tile(start, (3, 1))), []
    for t in range(6):
        pushed = torch.tanh(z) @ weights[0].T + torch.from_numpy(X[:, t]) @ weights[1].T + weights[2]
        states.append(z := 0.9 * z + 0.1 * pushed)
    rows = (torch.autograd.grad(s, weights, retain_graph=True) for s in torch.stack(states).reshape(-1))
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    expected = float((J**2).sum() ** 2 / ((J @ J.T) ** 2).sum())
    assert found.attrs["found_start"].startswith("init_state")
    rank = found.effective_rank.sel(operator="NTK", kind="full")[0]
    assert float(rank) == pytest.approx(expected, rel=1e-5)
