"""What is recorded is what is read, to the bit, and whole whatever happens in between."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._checkpoint import load_checkpoint
from kpflow_dyn._problems.parameters import CheckpointError, parameters_of

pytestmark = pytest.mark.usefixtures("x64")


class Odd(nn.Module):
    """A scalar, a matrix that lies column by column, a tied and a frozen parameter."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.randn((), generator=generator).double())
        self.turned = nn.Parameter(torch.randn(3, 2, generator=generator).T)
        self.again = self.turned
        self.frozen = nn.Parameter(torch.randn(4, generator=generator).half(), requires_grad=False)


def of_seed(make, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make()


TORCH = {
    "gru": lambda seed: of_seed(lambda: nn.GRU(3, 4, num_layers=2), seed),
    "odd": Odd,
    "sequential": lambda seed: of_seed(lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), seed),
}
JAX = {
    "equinox": lambda key: eqx.nn.GRUCell(3, 4, key=key),
    "mlp": lambda key: eqx.nn.MLP(3, 2, 5, 1, key=key),
    "dict": lambda key: {"W": jax.random.normal(key, (2, 3)), "layers": [jax.random.normal(key, ()), 3, None]},
    "partial": lambda key: jax.tree_util.Partial(jnp.multiply, jax.random.normal(key, (3,), "float32")),
    "array": lambda key: jax.random.normal(key, (3,)),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_torch_module_comes_back_to_the_bit(tmp_path, name):
    model, other = TORCH[name](0), TORCH[name](1)
    kp.Recorder(tmp_path)(7, model, 0.1)
    run = kp.Recorder.read(tmp_path)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert run.load(7, other) is other
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)) and parameter.dtype == other.get_parameter(name).dtype
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in other.parameters()]


@pytest.mark.parametrize("name", JAX)
def test_a_jax_pytree_comes_back_to_the_bit(tmp_path, name):
    model, other = JAX[name](jax.random.key(0)), JAX[name](jax.random.key(1))
    kp.Recorder(tmp_path)(7, model, jnp.array(0.1))
    assert not eqx.tree_equal(model, other)
    assert eqx.tree_equal(kp.Recorder.read(tmp_path).load(7, other), model)
    assert not eqx.tree_equal(model, other), "the one that was given is as it was"


def test_names_are_those_of_a_flow(tmp_path):
    cell, x = nn.GRU(3, 4), torch.randn(2, 5, 3)
    twin = eqx.nn.GRUCell(3, 4, key=jax.random.key(0))
    for folder, model, inputs in (("torch", cell, x), ("jax", twin, jnp.asarray(x.double().numpy()))):
        kp.Recorder(tmp_path / folder)(0, model, 0.0)
        flow = kp.linearize(kp.solve(kp.DiscreteProblem(model, inputs)))
        saved = load_file(tmp_path / folder / "step_00000000.safetensors")
        assert set(saved) == set(flow.parameters)
        for name, value in flow.parameters.items():
            np.testing.assert_array_equal(saved[name], value)


def test_steps_and_losses_are_read_in_order(tmp_path):
    cell, record = nn.GRUCell(3, 4), kp.Recorder(tmp_path / "deep" / "er", every=5)
    losses = {10: torch.tensor(1 / 3, requires_grad=True), 5: 0.1, 7: 3.0, 123456785: float("nan"), 0: np.float64(2)}
    for step, loss in losses.items():
        record(step, cell, loss)
    run = kp.Recorder.read(tmp_path / "deep" / "er")
    np.testing.assert_array_equal(run.steps, [0, 5, 10, 123456785])
    np.testing.assert_array_equal(run.losses, [2, 0.1, np.float32(1 / 3), np.nan])


def test_parts_beside_the_model(tmp_path):
    cell, readout = nn.GRUCell(3, 4), nn.Linear(4, 2)
    kp.Recorder(tmp_path)(0, cell, 0.5, readout=readout)
    run = kp.Recorder.read(tmp_path)
    loaded = run.load(0, nn.GRUCell(3, 4)), run.load(0, nn.Linear(4, 2), part="readout")
    assert torch.equal(loaded[0].weight_hh, cell.weight_hh) and torch.equal(loaded[1].weight, readout.weight)
    with pytest.raises(ValueError, match=r"no part 'head' in .*; there are 'readout'"):
        run.load(0, readout, part="head")
    whole = nn.ModuleDict({"rnn": cell, "readout": readout})
    with pytest.raises(ValueError, match="the model has a 'readout' of its own"):
        kp.Recorder(tmp_path)(1, whole, 0.5, readout=readout)


def test_what_fit_records_is_what_it_trained(tmp_path):
    task = kp.tasks.FlipFlop(bits=1, steps=8).sample(trials=4, seed=0)
    torch.manual_seed(0)
    ours = nn.GRU(1, 4), nn.Linear(4, 1)
    keys = jax.random.split(jax.random.key(0))
    theirs = eqx.nn.GRUCell(1, 4, key=keys[0]), eqx.nn.Linear(4, 1, key=keys[1])
    for folder, (model, readout) in (("torch", ours), ("jax", theirs)):
        record = kp.Recorder(tmp_path / folder, every=2)
        training = kp.train.fit(model, task, readout, steps=4, lr=0.1, record=record)
        run = kp.Recorder.read(tmp_path / folder)
        np.testing.assert_array_equal(run.steps, [0, 2, 4])
        np.testing.assert_array_equal(run.losses, training.losses[::2])
        trained = {name: np.array(value.tolist()) for name, value in parameters_of(training.model).items()}
        for step, same in ((2, False), (4, True)):
            loaded = parameters_of(run.load(step, training.model))
            assert all(np.array_equal(loaded[name].tolist(), value) for name, value in trained.items()) is same
        again = kp.train.fit(run.load(2, training.model), task, run.load(2, training.readout, "readout"), steps=1)
        assert again.losses[0] == pytest.approx(training.losses[2], rel=1e-6)


def test_a_recorded_torch_layer_is_a_checkpoint_for_the_command_line(tmp_path):
    layer, readout = nn.GRU(3, 4), nn.Linear(4, 2)
    kp.Recorder(tmp_path)(3, layer, 0.5, readout=readout)
    loaded = load_checkpoint(tmp_path / "step_00000003.safetensors", "gru")
    assert torch.equal(loaded.cell.weight_hh_l0, layer.weight_hh_l0) and torch.equal(loaded.readout.bias, readout.bias)


ENDLESS = """
import itertools, sys, torch, kpflow_dyn as kp
record, cell = kp.Recorder(sys.argv[1]), torch.nn.GRUCell(64, 128)
for step in itertools.count():
    with torch.no_grad():
        cell.weight_hh.fill_(step)
    record(step, cell, float(step))
"""


def test_a_killed_run_leaves_whole_files(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "step_00000020.safetensors").exists():
        assert run.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    found = kp.Recorder.read(tmp_path)
    np.testing.assert_array_equal(found.steps, np.arange(len(found.steps)))
    np.testing.assert_array_equal(found.losses, found.steps)
    cell = nn.GRUCell(64, 128)
    for step in found.steps:
        assert (found.load(step, cell).weight_hh == step).all()


def test_what_was_in_flight_is_not_seen_and_can_be_written_again(tmp_path, monkeypatch):
    cell, record = nn.GRUCell(3, 4), kp.Recorder(tmp_path)
    record(0, cell, 1.0)
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            record(1, cell, 0.5)
    np.testing.assert_array_equal(kp.Recorder.read(tmp_path).steps, [0])
    record(1, cell, 0.5)
    np.testing.assert_array_equal(kp.Recorder.read(tmp_path).losses, [1.0, 0.5])


def test_two_runs_are_not_mixed(tmp_path):
    cell = nn.GRUCell(3, 4)
    kp.Recorder(tmp_path)(0, cell, 1.0)
    with pytest.raises(FileExistsError, match=r"has step_00000000\.safetensors already; take a new folder"):
        kp.Recorder(tmp_path)(0, cell, 2.0)
    np.testing.assert_array_equal(kp.Recorder.read(tmp_path).losses, [1.0])


@pytest.mark.parametrize(
    ("saved", "asked", "message"),
    [
        (nn.GRUCell(3, 4), nn.GRUCell(3, 4, bias=False), "model: left over 'bias_hh', 'bias_ih'; pass"),
        (nn.GRUCell(3, 4, bias=False), nn.GRUCell(3, 4), "missing 'bias_hh', 'bias_ih'; pass"),
        (nn.GRUCell(3, 4), nn.GRUCell(2, 4), r"weight_ih must be \[12, 2\], got \[12, 3\]"),
        (nn.GRUCell(3, 4).double(), nn.GRUCell(3, 4), "weight_ih is float64 in the file but float32 in the model"),
    ],
)
def test_parameters_that_do_not_match_are_named(tmp_path, saved, asked, message):
    kp.Recorder(tmp_path)(0, saved, 1.0)
    before = [p.clone() for p in asked.parameters()]
    with pytest.raises(CheckpointError, match=message):
        kp.Recorder.read(tmp_path).load(0, asked)
    assert all(torch.equal(p, q) for p, q in zip(before, asked.parameters(), strict=True))


def test_a_wider_model_takes_the_values_exactly(tmp_path):
    cell = nn.GRUCell(3, 4)
    kp.Recorder(tmp_path)(0, cell, 1.0)
    loaded = kp.Recorder.read(tmp_path).load(0, nn.GRUCell(3, 4).double())
    assert loaded.weight_hh.dtype == torch.float64 and torch.equal(loaded.weight_hh.float(), cell.weight_hh)


@pytest.mark.parametrize(
    ("step", "model", "kind", "message"),
    [
        (-1, nn.GRUCell(3, 4), ValueError, "step must be a whole number, at least 0, got -1"),
        (0.5, nn.GRUCell(3, 4), ValueError, r"got 0\.5"),
        (0, nn.Tanh(), TypeError, "Tanh has no parameters"),
        (0, {"W": 3}, TypeError, "dict has no parameters, expected a torch module or a pytree of jax arrays"),
        (0, nn.GRUCell(3, 4).bfloat16(), TypeError, "parameter weight_ih is bfloat16, expected float16"),
    ],
)
def test_what_cannot_be_recorded_is_explained(tmp_path, step, model, kind, message):
    with pytest.raises(kind, match=message):
        kp.Recorder(tmp_path)(step, model, 1.0)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="every must be a whole number, at least 1, got 0"):
        kp.Recorder(tmp_path, every=0)


def test_what_cannot_be_read_is_explained(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no recorded steps.*a kp\.Recorder writes them"):
        kp.Recorder.read(tmp_path / "nowhere")
    for step in (0, 5, 10):
        kp.Recorder(tmp_path)(step, nn.GRUCell(3, 4), 1.0)
    with pytest.raises(ValueError, match=r"no step 6 in .*; the nearest are 5, 10"):
        kp.Recorder.read(tmp_path).load(6, nn.GRUCell(3, 4))
    file = tmp_path / "step_00000005.safetensors"
    save_file({"W": np.ones(3)}, file)
    with pytest.raises(CheckpointError, match="a Recorder did not write it"):
        kp.Recorder.read(tmp_path)
    file.write_bytes(pickle.dumps({"weight_hh": 1}))
    with pytest.raises(CheckpointError, match="is not a safetensors file, or is damaged"):
        kp.Recorder.read(tmp_path)
