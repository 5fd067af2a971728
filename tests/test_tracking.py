"""Operators over training and side by side, against dense matrices; what is known is kept, and never mixed up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.linalg import subspace_angles
from torch import nn
from typer.testing import CliRunner

import kpflow_dyn as kp
import kpflow_dyn._learning.tracking
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._learning.tracking import target_components
from kpflow_dyn.cli._app import app
from kpflow_dyn.cli._checkpoints import checkpoints_in
from kpflow_dyn.figures._learning import target_over_training
from kpflow_dyn.report._track_charts import track_charts

STEPS = (0, 5, 10)


def make_cell() -> nn.GRUCell:
    return nn.GRUCell(2, 3).double()


def make_readout() -> nn.Linear:
    return nn.Linear(3, 2).double()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A recording of parameters that change a lot."""
    torch.manual_seed(0)
    cell, readout, record = make_cell(), make_readout(), kp.Recorder(tmp_path / "run")
    for step in STEPS:
        record(step, cell, loss=1.0, readout=readout)
        with torch.no_grad():
            for parameter in [*cell.parameters(), *readout.parameters()]:
                parameter += 0.5 * torch.randn_like(parameter)
    return tmp_path / "run"


X = np.random.default_rng(0).standard_normal((2, 4, 2))
TARGETS = np.random.default_rng(1).standard_normal((2, 4, 2))


def tracked(run: Path | kp.Recording, **options: object) -> xr.Dataset:
    given = {"make_readout": make_readout, "targets": TARGETS, "samples": None, "progress": False, **options}
    return kp.track(make_cell, run, torch.from_numpy(X), **given)


def effective_rank(matrix: np.ndarray) -> float:
    return np.trace(matrix) ** 2 / (matrix**2).sum()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_numbers_are_those_of_dense_operators(run: Path) -> None:
    found, recording = tracked(run), kp.Recorder.read(run)
    flows = [
        kp.linearize(kp.solve(kp.DiscreteProblem(recording.load(s, make_cell()), torch.from_numpy(X)))) for s in STEPS
    ]
    ntk = [to_numpy(flow.ntk.dense()) for flow in flows]
    P = [to_numpy(flow.P.dense()) for flow in flows]
    components, shares = target_components(TARGETS)
    assert components.sum(0) == pytest.approx(TARGETS) and shares.sum() == pytest.approx(1)
    for i, step in enumerate(STEPS):
        one = found.sel(step=step)
        tensor, square = ntk[i].reshape(2, 4, 3, 2, 4, 3), P[i] @ P[i].T
        for name, matrix in (("NTK", ntk[i]), ("P", square)):
            assert one.effective_rank.sel(operator=name, kind="full") == pytest.approx(effective_rank(matrix), rel=1e-9)
        temporal = effective_rank(np.einsum("btubsu->ts", tensor))
        assert one.effective_rank.sel(operator="NTK", kind="temporal") == pytest.approx(temporal, rel=1e-9)
        assert one.alignment_first.sel(operator="NTK") == pytest.approx(cosine(ntk[i], ntk[0]), rel=1e-9)
        assert one.alignment_last.sel(operator="P") == pytest.approx(cosine(P[i], P[-1]), rel=1e-9)
        y = flows[i].output(recording.load(step, make_readout(), part="readout"), learn=True)
        assert one.loss == pytest.approx(((to_numpy(y.values) - TARGETS) ** 2).mean(), rel=1e-9)
        outputs = np.einsum("cbto,bto->c", components, to_numpy(y.values)) / (components**2).sum((1, 2, 3))
        assert one.component_learnt.values == pytest.approx(outputs, rel=1e-9)
        kernel, c = to_numpy(y.ntk.dense()), components.reshape(len(components), -1)
        assert one.component_rayleigh.values == pytest.approx(np.diag(c @ kernel @ c.T) / (c**2).sum(1), rel=1e-9)
        assert one.component_alignment.values == pytest.approx([cosine(kernel @ v, v) for v in c], rel=1e-9)


def test_what_is_learnt_is_one_where_the_outputs_are_the_target(run: Path) -> None:
    recording = kp.Recorder.read(run)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(recording.load(5, make_cell()), torch.from_numpy(X))))
    y = to_numpy(flow.output(recording.load(5, make_readout(), part="readout")).values)
    mask = np.array([[1, 1, 0, 0.5], [0, 0.5, 1, 1]])
    unmasked = np.where(mask[..., None] > 0, y, 7.0)  # what is masked does not matter
    found = tracked(replace(recording, steps=np.array([5])), targets=unmasked, mask=mask).sel(step=5)
    assert found.component_learnt.values == pytest.approx([1, 1], rel=1e-9)
    assert found.loss == pytest.approx(0, abs=1e-20)


def test_what_is_known_is_kept_and_what_changed_is_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, kept = tracked(run), tmp_path / "kept"
    steps, really = [], kpflow_dyn._learning.tracking._numbers

    def interrupted(*args: object) -> xr.Dataset:
        steps.append(len(steps))
        if len(steps) == 3:
            raise KeyboardInterrupt
        return really(*args)

    monkeypatch.setattr(kpflow_dyn._learning.tracking, "_numbers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tracked(run, out=kept)
    assert len(list(kept.glob("*.nc"))) == 2
    xr.testing.assert_identical(tracked(run, out=kept), whole)
    assert len(steps) == 4  # the third checkpoint alone was left
    xr.testing.assert_identical(tracked(run, out=kept), whole)
    assert len(steps) == 4
    kp.Recorder(tmp_path / "other")(5, make_cell(), loss=1.0, readout=make_readout())
    (tmp_path / "other" / "step_00000005.safetensors").replace(run / "step_00000005.safetensors")
    changed = tracked(run, out=kept)
    assert len(steps) == 5
    assert not np.allclose(changed.effective_rank.sel(step=5), whole.effective_rank.sel(step=5))
    xr.testing.assert_identical(changed.sel(step=[0, 10]), whole.sel(step=[0, 10]))


def test_other_models_and_readouts_are_not_mixed_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kp.Recorder(tmp_path / "run")(0, nn.RNNCell(2, 3).double(), loss=1.0, readout=make_readout())

    def ranks(nonlinearity: str, **options: object) -> np.ndarray:
        def make() -> nn.RNNCell:
            return nn.RNNCell(2, 3, nonlinearity=nonlinearity).double()

        given = {"samples": None, "progress": False, "out": tmp_path / "kept", **options}
        found = kp.track(make, tmp_path / "run", torch.from_numpy(X), **given)
        return found.effective_rank.values if "loss" not in found else found.loss.values

    tanh, relu = ranks("tanh"), ranks("relu")
    assert abs(tanh - relu).max() > 1e-3
    states = np.zeros((2, 4, 3))
    with_readout = ranks("tanh", make_readout=make_readout, targets=states[..., :2])
    assert abs(with_readout - ranks("tanh", targets=states)).max() > 1e-6


def test_the_loss_of_a_mask_of_fractions(run: Path) -> None:
    mask = np.linspace(0.2, 1, 8).reshape(2, 4)
    found, recording = tracked(run, mask=mask).sel(step=0), kp.Recorder.read(run)
    state = kp.solve(kp.DiscreteProblem(recording.load(0, make_cell()), torch.from_numpy(X))).state
    loss = kp.squared_error(torch.from_numpy(TARGETS), recording.load(0, make_readout(), part="readout"), mask)
    assert float(found.loss) == pytest.approx(loss(state).item(), rel=1e-12)


def classes(seed: int = 3) -> np.ndarray:
    right = np.random.default_rng(seed).integers(0, 2, (2, 4))
    right[0, 0] = -100
    return right


def test_classes_over_training(run: Path) -> None:
    """Loss and accuracy as torch's own; the components are those of one-hot targets, and probabilities learn them."""
    right, recording = classes(), kp.Recorder.read(run)
    found = tracked(run, targets=right, loss="cross_entropy")
    assert (found.recorded_loss.values == recording.losses).all()
    for step in STEPS:
        state = kp.solve(kp.DiscreteProblem(recording.load(step, make_cell()), torch.from_numpy(X))).state
        y = recording.load(step, make_readout(), part="readout")(state).detach()
        expected = nn.functional.cross_entropy(y.reshape(8, 2), torch.from_numpy(right.reshape(8)))
        assert float(found.loss.sel(step=step)) == pytest.approx(expected.item(), rel=1e-10)
        on = right >= 0
        assert float(found.accuracy.sel(step=step)) == (y.numpy().argmax(-1) == right)[on].mean()
        c, _ = target_components(np.where(on[..., None], np.eye(2)[right % 2], 0.0))
        learnt = (c * on[..., None] * torch.softmax(y, -1).numpy()).sum((1, 2, 3)) / (c**2).sum((1, 2, 3))
        assert found.component_learnt.sel(step=step).values == pytest.approx(learnt, rel=1e-8)


def test_a_loss_of_ones_own_over_training(run: Path, tmp_path: Path) -> None:
    recording, huber = kp.Recorder.read(run), nn.functional.huber_loss
    first = tracked(run, loss=huber, out=tmp_path).loss.sel(step=0)
    state = kp.solve(kp.DiscreteProblem(recording.load(0, make_cell()), torch.from_numpy(X))).state
    y = recording.load(0, make_readout(), part="readout")(state)
    assert float(first) == pytest.approx(huber(y, torch.from_numpy(TARGETS)).item(), rel=1e-10)
    other = tracked(run, loss=lambda y, target: huber(y, target, delta=0.1), out=tmp_path).loss.sel(step=0)
    assert float(other) != float(first)  # numbers under a function are not kept
    alone = tracked(run, loss=lambda y: (y**2).mean(), targets=None)
    assert "component_share" not in alone and alone.loss.sizes == {"step": 3}


def test_a_neurogym_classification_from_training_to_page(tmp_path: Path) -> None:
    """Loss and accuracy are those of the training script's own lines."""
    task = kp.tasks.Neurogym("PerceptualDecisionMaking-v0").sample(trials=6, seed=0)
    torch.manual_seed(0)
    cell, readout = nn.GRU(3, 6, batch_first=True).double(), nn.Linear(6, 3).double()
    record, x, right = kp.Recorder(tmp_path / "run"), torch.from_numpy(task.inputs), np.argmax(task.targets, -1)
    right = torch.from_numpy(np.where(task.mask, right, -100))
    losses, hits = [], []

    def script(step: int, model: nn.Module, loss: float, readout: nn.Module) -> None:
        logits = readout(model(x)[0])
        losses.append(nn.functional.cross_entropy(logits.reshape(-1, 3), right.reshape(-1)).item())
        hits.append((logits.argmax(-1) == right)[right >= 0].double().mean().item())
        record(step, model, loss, readout=readout)

    training = kp.train.fit(cell, task, readout, steps=2, lr=0.05, loss="cross_entropy", record=script)
    make = {"make_readout": lambda: nn.Linear(6, 3).double(), "mask": task.mask, "samples": 40, "progress": False}
    found = kp.track(
        lambda: nn.GRU(3, 6, batch_first=True).double(), tmp_path / "run", x, targets=task.targets,
        loss="cross_entropy", **make,
    )  # fmt: skip
    for numbers in (training.losses, found.loss, found.recorded_loss):
        np.testing.assert_allclose(numbers, losses, rtol=1e-10)
    for numbers in (training.accuracy, found.accuracy):
        np.testing.assert_allclose(numbers, hits, rtol=1e-10)
    assert [chart.name for chart in track_charts(found)][2:] == ["loss", "accuracy", "target"]
    assert len(target_over_training(found).axes) == 5


@pytest.mark.slow
def test_estimates_have_error_bars_that_hold(run: Path) -> None:
    exact, found = tracked(run), tracked(run, samples=40)
    apart = abs(found.effective_rank - exact.effective_rank) / np.maximum(found.effective_rank_stderr, 1e-9)
    assert float((apart < 4).mean()) > 0.9


@pytest.mark.slow
def test_parameters_by_step_and_in_jax(x64: None) -> None:
    cells = {step: eqx.nn.GRUCell(2, 3, key=jax.random.key(step)) for step in (0, 7)}
    values = {step: dict(kp.linearize(kp.solve(kp.DiscreteProblem(c, X))).parameters) for step, c in cells.items()}
    found = kp.track(lambda: cells[0], values, X, samples=None, progress=False)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cells[7], X)))
    expected = kp.effective_rank(flow.ntk).value
    assert found.effective_rank.sel(step=7, operator="NTK", kind="full") == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="no checkpoints"):
        kp.track(lambda: cells[0], {}, X)


def test_a_readout_by_step_is_that_of_a_recording(run: Path) -> None:
    recording = kp.Recorder.read(run)
    parts = {
        step: (recording.load(step, make_cell()), recording.load(step, make_readout(), "readout")) for step in STEPS
    }
    values = {
        step: dict(cell.state_dict()) | {f"readout.{name}": value for name, value in readout.state_dict().items()}
        for step, (cell, readout) in parts.items()
    }
    xr.testing.assert_allclose(tracked(values), tracked(run).drop_vars("recorded_loss"))
    bare = {step: dict(cell.state_dict()) for step, (cell, _) in parts.items()}
    with pytest.raises(ValueError, match=r"no parameter begins with 'readout\.'.*'readout\.weight'"):
        tracked(bare)
    with pytest.raises(ValueError, match=r"model: left over 'readout\.bias', 'readout\.weight'; pass"):
        kp.track(make_cell, values, torch.from_numpy(X), progress=False)


def test_track_takes_the_files_of_ones_own_loop(tmp_path: Path) -> None:
    """With the same numbers as of a recording of the same steps; in the order of the numbers in the names."""
    torch.manual_seed(0)
    net, record = nn.ModuleDict({"rnn": nn.GRU(3, 4), "fc": nn.Linear(4, 3)}), kp.Recorder(tmp_path / "run")
    for step in (2, 10):
        record(step, net["rnn"], loss=1.0, readout=net["fc"])
        torch.save({"model": net.state_dict(), "epoch": step}, tmp_path / f"net1_{step}.pt")
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    files = [tmp_path / f"net1_{step}.pt" for step in (10, 2)]
    asked = ["--task", "memorypro", "--trials", "2", "--samples", "40", "--task-option", "memory=3"]
    for given in ([tmp_path / "run"], files):
        shown = CliRunner().invoke(app, ["track", *map(str, given), *asked])
        assert shown.exit_code == 0, shown.output
    whole, own = (
        xr.load_dataset(path / "track" / "track.nc", engine="h5netcdf") for path in (tmp_path / "run", tmp_path)
    )
    assert own.step.values.tolist() == [2, 10]
    xr.testing.assert_allclose(own, whole.drop_vars("recorded_loss"))
    assert own.attrs["steps_are"] == "the last number in the name of each file"
    shown = CliRunner().invoke(app, ["track", str(files[0]), *asked])
    assert shown.exit_code == 2 and "several different checkpoints" in " ".join(shown.output.split())


def test_files_without_numbers_are_steps_in_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("start.pt", "end.pt")]
    for path in paths:
        path.touch()
    found = checkpoints_in(paths)
    assert [found.file(step) for step in (0, 1)] == paths and "order" in found.numbered_by


def test_comparison_against_dense(run: Path) -> None:
    recording, x = kp.Recorder.read(run), torch.from_numpy(X)
    a, b = (kp.linearize(kp.solve(kp.DiscreteProblem(recording.load(s, make_cell()), x))) for s in (0, 10))
    found = kp.compare(a, b, k=4)
    dense = [to_numpy(flow.ntk.dense()) for flow in (a, b)]
    leading = [np.linalg.eigh(matrix)[1][:, -4:] for matrix in dense]
    assert found.angles == pytest.approx(np.sort(subspace_angles(*leading)), abs=1e-3)
    assert found.ntk.value == pytest.approx(cosine(*dense), rel=1e-9)
    assert found.P.value == pytest.approx(cosine(*(to_numpy(flow.P.dense()) for flow in (a, b))), rel=1e-9)
    same = kp.compare(a, a, k=3)
    assert same.ntk.value == pytest.approx(1) and same.angles.max() < 1e-6
    assert "principal angles of 4" in str(found)
    assert len(found.plot().axes) == 2
    other = kp.linearize(kp.solve(kp.DiscreteProblem(make_cell(), x[:1])))
    with pytest.raises(ValueError, match="the same inputs"):
        kp.compare(a, other)


def test_commands(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cell, readout, record = nn.GRU(3, 4), nn.Linear(4, 3), kp.Recorder(tmp_path / "run")
    task = kp.tasks.MemoryPro().sample(trials=4, seed=0)
    kp.train.fit(cell, task, readout, steps=2, lr=0.01, record=record)
    call = ["track", str(tmp_path / "run"), "--model", "gru", "--task", "memorypro", "--trials", "4"]
    shown = CliRunner().invoke(app, [*call, "--samples", "40"])
    assert shown.exit_code == 0, shown.output
    assert "er(NTK)" in shown.output
    found = xr.load_dataset(tmp_path / "run" / "track" / "track.nc", engine="h5netcdf")
    assert found.step.values.tolist() == [0, 1, 2]
    assert found.loss.values == pytest.approx(kp.Recorder.read(tmp_path / "run").losses, rel=1e-4)
    assert found.recorded_loss.values == pytest.approx(found.loss.values, rel=1e-4)
    assert {path.stem for path in (tmp_path / "run" / "track").glob("*.png")} == {"ranks", "alignment", "target"}
    record = json.loads((tmp_path / "run" / "track" / "track.json").read_text())
    assert [one["loss"] for one in record["steps"]] == found.loss.values.tolist()
    assert record["steps"][2]["alignment_first"]["P"]["value"] == float(found.alignment_first.sel(operator="P")[2])
    assert record["settings"]["trials"] == 4 and record["settings"]["seed"] == 0
    page = (tmp_path / "run" / "track" / "index.html").read_text("utf-8")
    said = ("GRU of 4 units over 3 checkpoints on memorypro", torch.__version__, kp.__version__, "GRU(3, 4")
    assert all(text in page for text in said) and "Over these 3 checkpoints the loss goes from" in page
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert shown.exit_code == 0 and (tmp_path / "run" / "report.html").exists()
    call = [*call, "--samples", "40", "--loss", "hinge", "--out", str(tmp_path / "hinge")]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 2 and "expected one of squared_error, cross_entropy" in shown.output.replace("\n", " ")
    files = [str(tmp_path / "run" / f"step_0000000{n}.safetensors") for n in (0, 2)]
    call = ["compare", *files, "--model", "gru", "--task", "memorypro", "--trials", "4", "--modes", "3"]
    shown = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "compared")])
    assert shown.exit_code == 0, shown.output
    assert "alignment of NTK" in shown.output and (tmp_path / "compared" / "comparison.png").exists()
    shown = CliRunner().invoke(app, ["track", str(tmp_path), "--model", "gru", "--task", "memorypro"])
    assert shown.exit_code == 2 and "no recorded steps" in shown.output


@pytest.mark.parametrize("carry", [[], ["--carry-state"]])
def test_a_session_of_trials_over_training(run: Path, tmp_path: Path, carry: list[str]) -> None:
    """`track` takes --carry-state and --dtype as `analyze` does, and does not mix up what it knows of either."""
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    np.savez(tmp_path / "task.npz", inputs=X, targets=TARGETS, mask=mask)
    call = ["track", str(run), "--task", str(tmp_path / "task.npz"), "--dtype", "float64", "--include-padding"]
    assert CliRunner().invoke(app, call).exit_code == 0
    shown = CliRunner().invoke(app, [*call, *carry])
    assert shown.exit_code == 0, shown.output
    found, recording = xr.load_dataset(run / "track" / "track.nc", engine="h5netcdf"), kp.Recorder.read(run)
    assert found.attrs["found_start"] == ("the end of the trial before" if carry else "zeros")
    for place, step in enumerate(STEPS):
        cell, readout = recording.load(step, make_cell()), recording.load(step, make_readout(), part="readout")
        z, rows = torch.zeros(3).double(), []
        for x, length in zip(torch.from_numpy(X), (2, 4), strict=True):
            z = z.detach() if carry else torch.zeros(3).double()
            states = [z := cell(u, z) for u in x]
            z, rows = states[length - 1], [*rows, *states]
        states, theta = torch.stack(rows), tuple(cell.parameters())
        gradients = [torch.autograd.grad(value, theta, retain_graph=True) for value in states.reshape(-1)]
        J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in gradients]).numpy()
        rank = found.effective_rank.sel(operator="NTK", kind="full")[place]
        assert float(rank) == pytest.approx(effective_rank(J @ J.T), rel=1e-6)
        missed = (readout(states).detach().numpy() - TARGETS.reshape(-1, 2))[mask.reshape(-1)]
        assert float(found.loss[place]) == pytest.approx((missed**2).mean())


def test_operators_of_what_counts(run: Path, tmp_path: Path) -> None:
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 1]], bool)
    flows = [kp.linearize(kp.solve(kp.DiscreteProblem(c, torch.from_numpy(X)))) for c in cells(run)]
    R = np.repeat(mask.reshape(-1), 3)[:, None]
    kernels = [R * flow.ntk.dense().detach().numpy() * R.T for flow in flows]
    found, whole = tracked(run, mask=mask, out=tmp_path), tracked(run, mask=mask, all_steps=True, out=tmp_path)
    ranks = found.effective_rank.sel(operator="NTK", kind="full")
    np.testing.assert_allclose(ranks, [effective_rank(kernel) for kernel in kernels], rtol=1e-9)
    cosine = (kernels[0] * kernels[-1]).sum() / np.linalg.norm(kernels[0]) / np.linalg.norm(kernels[-1])
    assert float(found.alignment_first.sel(operator="NTK")[-1]) == pytest.approx(cosine)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-12)
    np.testing.assert_allclose(whole.effective_rank, tracked(run).effective_rank, rtol=1e-12)
    assert found.attrs["steps"].endswith("left out (all_steps=True, or --all-steps, keeps them)")
    assert whole.attrs["steps"].endswith("analysed too") and "steps" not in tracked(run).attrs


def cells(run: Path) -> list[nn.GRUCell]:
    recording = kp.Recorder.read(run)
    return [recording.load(step, make_cell()) for step in STEPS]
