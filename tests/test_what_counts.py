"""Which steps of a task count, and how much: the same in the loss, the kernel, the carried starts and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from typer.testing import CliRunner

import kpflow_dyn as kp
from kpflow_dyn.cli._app import app
from kpflow_dyn.tasks import TaskData, make_task

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 6, 2))
MASK = np.arange(6) < np.array([[4], [5], [6]])
WEIGHTS = MASK * RNG.uniform(0.1, 3, MASK.shape)
TARGETS = RNG.standard_normal((3, 6, 4))
CLASSES = RNG.integers(0, 4, (3, 6))
PADDED = np.where(MASK, CLASSES, -100)


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "trials.npz", inputs=X, **arrays)
    return folder / "trials.npz"


@pytest.fixture(scope="module")
def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"rnn": nn.GRU(2, 5, batch_first=True), "fc": nn.Linear(5, 4)}).double()


@pytest.fixture(scope="module")
def checkpoint(network: nn.ModuleDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.save(network.state_dict(), path := tmp_path_factory.mktemp("network") / "gru.pt")
    return path


def squares_of(states: torch.Tensor, module: nn.Module) -> float:
    """The trace of the NTK of these states, by plain autograd."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    rows = (torch.autograd.grad(s, parameters, retain_graph=True) for s in states.reshape(-1))
    return sum(float((part**2).sum()) for row in rows for part in row)


def weighted_loss(network: nn.ModuleDict) -> float:
    y = network["fc"](network["rnn"](torch.from_numpy(X))[0]).detach().numpy()
    return float((WEIGHTS[..., None] * (y - TARGETS) ** 2).sum() / (4 * WEIGHTS.sum()))


def test_the_mask_of_a_file_may_hold_weights(tmp_path: Path) -> None:
    task = make_task(str(saved(tmp_path, targets=TARGETS, mask=WEIGHTS)))
    np.testing.assert_array_equal(task.mask, WEIGHTS)
    assert "weights from" in str(task)
    ones = make_task(str(saved(tmp_path, targets=TARGETS, mask=MASK.astype(int))))
    np.testing.assert_array_equal(ones.mask, MASK)
    assert ones.mask.dtype == bool and "weights" not in str(ones)


@pytest.mark.parametrize("command", ["analyze", "compare", "track"])
def test_weights_are_those_of_the_loss(network, checkpoint: Path, tmp_path: Path, command: str) -> None:
    task, out = saved(tmp_path, targets=TARGETS, mask=WEIGHTS), tmp_path / "out"
    source = [checkpoint] * (1 + (command == "compare"))
    if command == "track":
        record = kp.Recorder(tmp_path / "run")
        record(0, network["rnn"], loss=1.0, readout=network["fc"])
        source = [record.folder]
    shown = run(command, *source, "--task", task, "--out", out, *(["--modes", 1] * (command != "track")))
    assert shown.exit_code == 0, shown.output
    kind = {"analyze": "results", "compare": "comparison", "track": "track"}[command]
    found = xr.load_dataset(out / f"{kind}.nc", engine="h5netcdf")
    np.testing.assert_allclose(found.loss, weighted_loss(network), rtol=1e-12)
    least, most, mean = (f(WEIGHTS[MASK]) for f in (np.min, np.max, np.mean))
    said = f"Steps weigh differently in loss and accuracy: {least:.4g} to {most:.4g}, {mean:.4g} in the mean"
    assert said == found.attrs["weights"] and said in (out / "index.html").read_text("utf-8")
    assert said in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.where(MASK, 1.0, np.nan), "mask in .* has a NaN or infinity"),
        (np.where(MASK, 1.0, -1.0), r"mask in .* is negative, first at \(0, 4\)"),
        (0.0 * MASK, "no step of the task trials counts"),
    ],
)
def test_a_mask_that_says_nothing_is_refused(tmp_path: Path, checkpoint: Path, mask: np.ndarray, message: str) -> None:
    task = saved(tmp_path, targets=TARGETS, mask=mask)
    with pytest.raises(ValueError, match=message):
        make_task(str(task))
    with pytest.raises(ValueError, match=message.replace("trials", "task")):
        TaskData(X, TARGETS, mask)
    assert run("analyze", checkpoint, "--task", task, "--dry-run").exit_code == 2


def test_negative_classes_count_nowhere(network: nn.ModuleDict) -> None:
    masked, padded = TaskData(X, CLASSES, MASK), TaskData(X, PADDED)
    np.testing.assert_array_equal(padded.mask, MASK)
    np.testing.assert_array_equal(TaskData(X, PADDED[..., None]).mask, MASK)
    np.testing.assert_array_equal(TaskData(X, PADDED, WEIGHTS + 1).mask, MASK * (WEIGHTS + 1))
    problem = kp.DiscreteProblem(network["rnn"], torch.from_numpy(X))
    flow = kp.linearize(kp.solve(problem))
    one, other = (kp.analyze(flow, k=1, task=task, readout=network["fc"]) for task in (masked, padded))
    states = network["rnn"](torch.from_numpy(X))[0][torch.from_numpy(MASK)]
    assert float(other.ntk_trace) == pytest.approx(squares_of(states, network["rnn"]), rel=0.05)
    xr.testing.assert_identical(one, other)
    assert "left out" in other.attrs["steps"]
    starts = [kp.carry_state(problem, task.mask).z0 for task in (masked, padded)]
    assert torch.equal(*starts) and not torch.equal(starts[0], kp.carry_state(problem).z0)


def test_negative_classes_count_nowhere_over_training(network: nn.ModuleDict) -> None:
    kwargs = {"progress": False, "samples": None}
    values = {0: {name: p.detach().numpy() for name, p in network["rnn"].named_parameters()}}
    classes = np.where(MASK, RNG.integers(0, 5, MASK.shape), -100)

    def make() -> nn.GRU:
        return nn.GRU(2, 5, batch_first=True).double()

    x = torch.from_numpy(X)
    padded = kp.track(make, values, x, targets=classes, **kwargs)
    masked = kp.track(make, values, x, targets=classes, mask=MASK, **kwargs)
    xr.testing.assert_identical(padded, masked)
    assert "left out" in padded.attrs["steps"]


def test_a_loss_of_ones_own_sees_negative_classes_itself(network: nn.ModuleDict) -> None:
    def own(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(y.reshape(-1, 4), target.reshape(-1))

    def trained(loss) -> np.ndarray:
        torch.manual_seed(1)
        cell, readout = nn.GRU(2, 5, batch_first=True), nn.Linear(5, 4)
        return kp.train.fit(cell, TaskData(X, PADDED), readout, loss=loss, steps=2).losses

    np.testing.assert_allclose(trained(own), trained("cross_entropy"), rtol=1e-5)
    with pytest.raises(ValueError, match="a mask does not reach into a loss of your own"):
        task = TaskData(X, PADDED, np.arange(6) < np.array([[4], [4], [4]]))
        kp.train.fit(nn.GRU(2, 5, batch_first=True), task, nn.Linear(5, 4), loss=own, steps=2)


def test_whole_numbers_below_zero_may_be_targets() -> None:
    """[trial, time, 1] with -1 is numbers for one output; for classes it would be left out of the loss alone."""
    signs = np.where(MASK, 1, -1)[..., None]
    task = TaskData(X, signs)
    assert task.mask is None
    torch.manual_seed(0)
    cell = nn.GRU(2, 5, batch_first=True).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X))))
    readout = nn.Linear(5, 1).double()
    y = readout(cell(torch.from_numpy(X))[0]).detach().numpy()
    assert float(kp.analyze(flow, k=1, task=task, readout=readout).loss) == pytest.approx(((y - signs) ** 2).mean())
    with pytest.raises(ValueError, match=r"hold -1: to leave such places out, give them as \[trial, time\]"):
        kp.analyze(flow, k=1, task=task, readout=nn.Linear(5, 2).double())


MODULE = """
import torch

class Both(torch.nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.rnn = torch.nn.GRU(2, 3, batch_first=True, bidirectional=True)
        self.stride = stride

    def forward(self, x):
        return self.rnn(x)[0][:, :: self.stride]

def all_steps():
    return Both()

def every_other():
    return Both(2)
"""


def test_a_module_over_whole_sequences_keeps_the_mask(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(MODULE)
    exec(MODULE, scope := {})
    torch.manual_seed(0)
    module = scope["Both"]().double()
    torch.save(module.state_dict(), tmp_path / "both.pt")
    task, out = saved(tmp_path, targets=TARGETS, mask=MASK), tmp_path / "out"
    call = ["analyze", tmp_path / "both.pt", "--modes", 1, "--out", out]
    shown = run(*call, "--task", task, "--module", f"{tmp_path / 'own.py'}:all_steps")
    assert shown.exit_code == 0, shown.output
    results = json.loads((out / "results.json").read_text("utf-8"))
    expected = squares_of(module(torch.from_numpy(X))[torch.from_numpy(MASK)], module)
    assert results["numbers"]["ntk_trace"]["value"] == pytest.approx(expected, rel=0.05)
    assert results["settings"]["task"] == results["found"]["task"]["value"] == "trials"
    assert results["found"]["trials"]["value"] == 3 and "left out" in results["settings"]["steps"]
    shown = run(*call, "--overwrite", "--task", task, "--module", f"{tmp_path / 'own.py'}:every_other")
    assert shown.exit_code == 2 and "the task has [trial, time] (3, 6), expected those of the flow" in shown.stderr
    task = saved(tmp_path, targets=TARGETS)
    shown = run(*call, "--overwrite", "--task", task, "--module", f"{tmp_path / 'own.py'}:every_other")
    assert shown.exit_code == 0, shown.output
