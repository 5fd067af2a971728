"""Files that other packages wrote (tests/data/checkpoints/make.py), against these packages' own forward passes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import kpflow_dyn as kp
from kpflow_dyn._checkpoint import CheckpointError, load_checkpoint
from kpflow_dyn._checkpoint.modules import problem_of
from kpflow_dyn._checkpoint.nonlinearity import states
from kpflow_dyn.cli import app
from kpflow_dyn.tasks import TaskData

pytestmark = [
    pytest.mark.filterwarnings("ignore:the file holds weights that are not analysed"),
    pytest.mark.usefixtures("undrawn"),
]

SLOW = pytest.mark.slow
FOLDER = Path(__file__).parent / "data" / "checkpoints"
OPTIONS = {
    "ema.pt": {"key": "net"},
    "recurrent_ppo.zip": {"prefix": "lstm_actor", "readout": "action_net"},
    **{f"psychrnn_{name}.npz": {"alpha": 0.2} for name in ("dale", "plain", "sparse")},
}
FOUND = {
    "arrays.npz": ("npz", "gru", "", "rnn."),
    "arrays.pkl": ("pickle", "gru", "", "rnn."),
    "compiled.pth": ("torch.save", "rnn", "", "_orig_mod.module.rnn."),
    "ema.pt": ("torch.save", "rnn", "net", "rnn."),
    "equinox.pkl": ("pickle", "gru", "cell", ""),
    "keras_gru.keras": ("Keras", "gru", "layers.gru.cell", ""),
    "keras_lstm.h5": ("HDF5", "lstm", "model_weights.lstm.lstm.lstm_cell", ""),
    "keras_simple.weights.h5": ("HDF5", "rnn", "layers.simple_rnn.cell", ""),
    "lightning.ckpt": ("torch.save", "gru", "state_dict", "rnn."),
    "linen_GRUCell.msgpack": ("flax msgpack", "gru", "params.GRUCell_0", ""),
    "linen_LSTMCell.msgpack": ("flax msgpack", "lstm", "params.LSTMCell_0", ""),
    "linen_OptimizedLSTMCell.msgpack": ("flax msgpack", "lstm", "params.OptimizedLSTMCell_0", ""),
    "linen_SimpleCell.msgpack": ("flax msgpack", "rnn", "params.SimpleCell_0", ""),
    "nested.pt": ("torch.save", "lstm", "model", "rnn."),
    "nnx_GRUCell.msgpack": ("flax msgpack", "gru", "rnn.cell", ""),
    "nnx_LSTMCell.msgpack": ("flax msgpack", "lstm", "rnn.cell", ""),
    "nnx_OptimizedLSTMCell.msgpack": ("flax msgpack", "lstm", "rnn.cell", ""),
    "nnx_SimpleCell.msgpack": ("flax msgpack", "rnn", "rnn.cell", ""),
    "old_format.pt": ("torch.save before torch 1.6", "gru", "", "rnn."),
    "orbax_nnx": ("orbax", "gru", "rnn.cell", ""),
    "orbax_steps": ("orbax", "gru", "params.rnn.cell", ""),
    "parts.pt": ("torch.save", "gru", "rnn", ""),
    "psychrnn_dale.npz": ("npz", "ctrnn", "", ""),
    "psychrnn_plain.npz": ("npz", "ctrnn", "", ""),
    "psychrnn_sparse.npz": ("npz", "ctrnn", "", ""),
    "recurrent_ppo.zip": ("stable-baselines3", "lstm", "policy", "lstm_actor."),
    "scripted.pt": ("torch.save", "gru", "rnn", ""),
    "whole_module.pt": ("torch.save", "rnn", "rnn", ""),
}


def needs(name):
    """The package that reads the file, where torch and numpy do not."""
    if name.endswith("msgpack"):
        pytest.importorskip("msgpack")
    if name.startswith("orbax"):
        pytest.importorskip("orbax.checkpoint")


def expected(name):
    with np.load(FOLDER / f"{name}.expected.npz") as arrays:
        return dict(arrays)


def task_of(name):
    """The inputs of the file's network, and its outputs as targets."""
    arrays = expected(name)
    targets = arrays["outputs"].astype(float) if "outputs" in arrays else None
    return TaskData(arrays["x"].astype(float), targets)


def in_float64(loaded, x):
    """States [trial, time, unit] and the start that they have."""
    start = None if loaded.start is None else loaded.start.double()
    solution = kp.solve(kp.DiscreteProblem(loaded.cell.double(), torch.from_numpy(x).double(), start))
    return solution, solution.state[..., : loaded.cell.hidden_size]


@pytest.mark.parametrize("name", FOUND)
def test_the_network_does_what_its_own_package_makes_it_do(name):
    needs(name)
    loaded = load_checkpoint(FOLDER / name, task=task_of(name), **OPTIONS.get(name, {}))
    found, arrays = loaded.found, expected(name)
    assert (found["file"], loaded.model, found["key"], found["prefix"]) == FOUND[name]
    solution, found_states = in_float64(loaded, arrays["x"])
    tolerance = 1e-12 if arrays["states"].dtype == np.float64 else 1e-6
    np.testing.assert_allclose(found_states.detach(), arrays["states"], atol=tolerance)
    if "outputs" in arrays:
        outputs = loaded.readout.double()(found_states)
        np.testing.assert_allclose(outputs.detach(), arrays["outputs"], atol=tolerance)
    assert not kp.linearize(solution).untraced


def parameters(name):
    needs(name)
    loaded = load_checkpoint(FOLDER / name, **OPTIONS.get(name, {}))
    flow = kp.linearize(in_float64(loaded, expected(name)["x"])[0])
    return {name: tuple(value.shape) for name, value in flow.parameters.items()}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linen_GRUCell.msgpack", 3 * (2 * 4 + 4 * 4 + 4) + 4),
        ("linen_LSTMCell.msgpack", 4 * (2 * 4 + 4 * 4 + 4)),
        ("linen_SimpleCell.msgpack", 2 * 4 + 4 * 4 + 4),
        ("nnx_GRUCell.msgpack", 3 * (2 * 4 + 4 * 4 + 4)),
        ("keras_gru.keras", 3 * (2 * 4 + 4 * 4 + 2 * 4)),
        ("keras_lstm.h5", 4 * (2 * 4 + 4 * 4 + 4)),
    ],
)
def test_as_many_parameters_learn_as_the_cell_had(name, count):
    """A second bias, which torch's cells have, would count in the NTK."""
    assert sum(int(np.prod(shape)) for shape in parameters(name).values()) == count


def test_what_psychrnn_fixes_stays_fixed():
    mask = np.load(FOLDER / "psychrnn_sparse.npz")["rec_connectivity"]
    cell = load_checkpoint(FOLDER / "psychrnn_sparse.npz", alpha=0.2).cell
    cell(torch.ones(1, 2), torch.ones(1, 4)).sum().backward()
    assert (mask == 0).any() and (cell.parametrizations.W.original.grad.numpy()[mask == 0] == 0).all()
    signs = np.load(FOLDER / "psychrnn_dale.npz")["Dale_rec"].diagonal()
    cell = load_checkpoint(FOLDER / "psychrnn_dale.npz", alpha=0.2).cell
    with torch.no_grad():
        cell.parametrizations.W.original.copy_(torch.randn(4, 4))
    assert set(signs) == {-1, 1} and (cell.W.detach().numpy() * signs >= 0).all()


def test_a_leak_that_the_file_does_not_have_is_assumed_aloud():
    loaded = load_checkpoint(FOLDER / "psychrnn_plain.npz")
    assert loaded.found["leak"].startswith("alpha = dt / tau = 0.1, assumed")
    assert loaded.found["nonlinearity"].startswith("relu, assumed (PsychRNN's own default)")
    asked = load_checkpoint(FOLDER / "psychrnn_plain.npz", alpha=0.3)
    assert float(asked.cell.alpha) == 0.3 and "as asked for" in asked.found["leak"]


def test_several_networks_are_listed_with_how_to_choose():
    with pytest.raises(CheckpointError, match=r"several rnn networks, under the keys 'net', 'ema' .*--key"):
        load_checkpoint(FOLDER / "ema.pt")
    with pytest.raises(CheckpointError, match=r"several lstm networks, .*'lstm_actor\.', 'lstm_critic\.'.*--prefix"):
        load_checkpoint(FOLDER / "recurrent_ppo.zip")
    with pytest.raises(CheckpointError, match=r"nothing under the key 'model'; the file has 'net', 'ema'"):
        load_checkpoint(FOLDER / "ema.pt", key="model")
    average = load_checkpoint(FOLDER / "ema.pt", key="ema")
    assert (average.prefix, average.readout_name) == ("module.rnn.", "module.fc")
    critic = load_checkpoint(FOLDER / "recurrent_ppo.zip", prefix="policy.lstm_critic", readout="value_net")
    assert critic.readout.out_features == 1


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "params", "policy", "whatever"])
@pytest.mark.parametrize("around", [(), ("run",), ("run", "last")])
def test_any_mapping_may_hold_the_weights(tmp_path, key, around):
    torch.manual_seed(0)
    net = nn.ModuleDict({"encoder": nn.Linear(5, 3), "rnn": nn.LSTM(3, 6), "fc": nn.Linear(6, 2)})
    content = {key: net.state_dict(), "epoch": 3, "history": [0.5] * 1000}
    for name in around:
        content = {name: content, "note": "text"}
    torch.save(content, tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt")
    assert loaded.found["key"] == ".".join([*reversed(around), key])
    assert loaded.readout_name == "fc" and torch.equal(loaded.readout.weight, net["fc"].weight)
    assert loaded.unused == ("encoder.weight", "encoder.bias")


def trained(nonlinearity, cell=False):
    """A network on inputs, with what it makes of them as the task."""
    torch.manual_seed(0)
    kind = nn.RNNCell if cell else nn.RNN
    net = nn.ModuleDict({"rnn": kind(2, 8, nonlinearity=nonlinearity), "fc": nn.Linear(8, 2)}).double()
    x = torch.randn(6, 9, 2).double()
    if not cell:
        net["rnn"].batch_first = True
    with torch.no_grad():
        y = net["fc"](states(net["rnn"], x, None))
    return net, TaskData(x.numpy(), (y + 0.05 * torch.randn_like(y)).numpy(), name="own")


@pytest.mark.parametrize("cell", [True, False])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_the_task_tells_the_nonlinearity(tmp_path, nonlinearity, cell):
    net, task = trained(nonlinearity, cell)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    loaded = load_checkpoint(tmp_path / "net.pt", task=task)
    said = loaded.found["nonlinearity"]
    assert loaded.cell.nonlinearity == nonlinearity
    assert said.startswith(f"{nonlinearity}, taken from the task, as the file does not say: the loss on own is 0.00")
    other = {"tanh": "relu", "relu": "tanh"}[nonlinearity]
    asked = load_checkpoint(tmp_path / "net.pt", task=task, nonlinearity=other)
    assert asked.cell.nonlinearity == other and asked.found["nonlinearity"] == f"{other}, as asked for"


def test_an_unclear_nonlinearity_is_assumed_aloud(tmp_path):
    net, task = trained("relu")
    torch.save(net.state_dict(), tmp_path / "net.pt")
    alone = load_checkpoint(tmp_path / "net.pt")
    assert alone.cell.nonlinearity == "tanh" and alone.found["nonlinearity"].startswith("tanh, assumed (torch's own")
    far = TaskData(task.inputs, task.targets + 100.0, name="far")
    unclear = load_checkpoint(tmp_path / "net.pt", task=far)
    assert (
        unclear.cell.nonlinearity == "tanh"
        and "assumed, as neither the file nor the task" in unclear.found["nonlinearity"]
    )
    untold = load_checkpoint(tmp_path / "net.pt", task=TaskData(task.inputs, name="inputs alone"))
    assert "as the file does not say" in untold.found["nonlinearity"]


class Sequence(nn.Module):
    """A module whose weights lie in a file under other prefixes."""

    def __init__(self):
        super().__init__()
        self.rnn, self.fc = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.tied = self.fc.weight

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "net._orig_mod.", "module.model."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_module_of_ones_own_is_filled(tmp_path, prefix, suffix):
    torch.manual_seed(0)
    saved, path = Sequence().double(), tmp_path / f"net{suffix}"
    weights = {prefix + name: value.clone() for name, value in saved.state_dict().items()}
    save_file(weights, path) if suffix == ".safetensors" else torch.save({"state_dict": weights, "epoch": 1}, path)
    filled = load_checkpoint(path, Sequence())
    x = torch.randn(5, 7, 3).double()
    assert torch.equal(filled.cell(x), saved(x)) and not filled.cell.training
    assert filled.cell.tied is filled.cell.fc.weight
    assert (filled.model, filled.readout) == ("Sequence", None)
    assert filled.found["prefix"].endswith(prefix.replace("_orig_mod.", ""))


def test_a_module_that_is_not_the_saved_one_is_explained(tmp_path):
    path = tmp_path / "net.pt"
    weights = Sequence().state_dict()
    torch.save({"state_dict": {"old.weight": torch.ones(2)} | weights | {"new.bias": torch.ones(1)}}, path)
    with pytest.raises(CheckpointError, match=r"left over under 'state_dict\.' 'old.weight', 'new.bias'"):
        load_checkpoint(path, Sequence())
    del weights["fc.bias"]
    torch.save(weights, path)
    with pytest.raises(CheckpointError, match=r"does not fill the Sequence: missing 'fc.bias'; make"):
        load_checkpoint(path, Sequence())
    torch.save(nn.GRU(3, 5).state_dict() | {"x": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"missing 'weight_ih_l0_reverse'.* left over 'x'"):
        load_checkpoint(path, nn.GRU(3, 5, bidirectional=True))
    torch.save(nn.GRU(3, 5).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"weight_ih_l0 must be float \[18, 3\], got float \[15, 3\]"):
        load_checkpoint(path, nn.GRU(3, 6))


@pytest.mark.parametrize(
    ("weights", "module", "message"),
    [
        (
            {"weight": torch.ones(2, 3, dtype=torch.int64)},
            nn.Linear(3, 2, bias=False),
            r"float \[2, 3\], got int \[2, 3\]",
        ),
        ({"weight": torch.ones(2, 3)}, nn.Tanh(), "does not fill the Tanh: a Tanh has no weights"),
    ],
)
def test_what_cannot_fill_a_module_is_explained(tmp_path, weights, module, message):
    torch.save(weights, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "net.pt", module)


def test_choices_for_found_networks_are_refused_with_a_module(tmp_path):
    torch.save(nn.GRU(3, 4).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="'prefix', 'alpha' cannot be given with a module"):
        load_checkpoint(tmp_path / "net.pt", nn.GRU(3, 4), prefix="rnn.", alpha=0.1)


class Tied(nn.Module):
    """Two layers of one weight, with batch statistics."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.other.weight = self.one.weight
        self.norm = nn.BatchNorm1d(3)


def test_a_weight_of_two_names_may_be_saved_under_one(tmp_path):
    saved, path = Tied(), tmp_path / "net.pt"
    torch.save(dict(saved.named_parameters()) | {f"norm.running_{n}": torch.ones(3) for n in ("mean", "var")}, path)
    filled = load_checkpoint(path, Tied()).cell
    assert filled.other.weight is filled.one.weight and torch.equal(filled.one.weight, saved.one.weight)
    torch.save(saved.state_dict() | {"other.weight": torch.zeros(3, 3)}, path)
    with pytest.raises(CheckpointError, match="differs from another name of the same weight"):
        load_checkpoint(path, Tied())


def test_a_filled_module_has_one_dtype(tmp_path):
    weights = nn.Linear(3, 2).state_dict()
    torch.save(weights | {"bias": weights["bias"].double()}, tmp_path / "net.pt")
    filled = load_checkpoint(tmp_path / "net.pt", nn.Linear(3, 2)).cell
    assert {parameter.dtype for parameter in filled.parameters()} == {torch.float64}


@pytest.mark.parametrize("module", [nn.LazyLinear(2), nn.Linear(3, 2, device="meta")])
def test_modules_without_values_cannot_be_filled(tmp_path, module):
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match="'weight', 'bias' of the module have no values yet"):
        load_checkpoint(tmp_path / "net.pt", module)


@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
def test_half_precision_fills_a_pytree(tmp_path, kept):
    jnp = pytest.importorskip("jax.numpy")
    values = torch.randn(2, 3).bfloat16()
    torch.save({"weight": values}, tmp_path / "net.pt")
    filled = load_checkpoint(tmp_path / "net.pt", {"weight": jnp.zeros((2, 3), kept)}).cell["weight"]
    assert filled.dtype == kept
    np.testing.assert_array_equal(np.asarray(filled, "float32"), values.float().numpy())


def test_of_two_sets_of_weights_one_is_chosen(tmp_path):
    torch.manual_seed(0)
    nets = {name: Sequence() for name in ("model", "ema")}
    torch.save({name: net.state_dict() for name, net in nets.items()}, tmp_path / "net.pt")
    with pytest.raises(
        CheckpointError, match=r"several sets of weights fit the Sequence, under 'model\.', 'ema\.'.*--key"
    ):
        load_checkpoint(tmp_path / "net.pt", Sequence())
    x = torch.randn(1, 2, 3)
    for name, net in nets.items():
        assert torch.equal(load_checkpoint(tmp_path / "net.pt", Sequence(), key=name).cell(x), net(x))


@pytest.mark.parametrize("name", ["cell.eqx", "cell_behind_options.eqx", "equinox.pkl"])
def test_a_file_of_equinox_fills_its_module(name):
    equinox = pytest.importorskip("equinox")
    import jax

    template = equinox.nn.GRUCell(2, 4, key=jax.random.key(0))
    filled = load_checkpoint(FOLDER / name, template).cell
    arrays, state = expected(name), np.zeros((3, 4), "float32")
    for time in range(5):
        state = jax.vmap(filled)(arrays["x"][:, time], state)
        np.testing.assert_allclose(state, arrays["states"][:, time], atol=1e-6)
    with pytest.raises(CheckpointError, match=r"is float32\[12, 2\] in the file and|must be float \[15, 2\]"):
        load_checkpoint(FOLDER / name, equinox.nn.GRUCell(2, 5, key=jax.random.key(0)))


def test_a_file_of_equinox_needs_a_module():
    with pytest.raises(
        CheckpointError, match="give a module of your own to be filled, on the command line by --module"
    ):
        load_checkpoint(FOLDER / "cell.eqx")


MINE = """
import torch
import xarray as xr
from torch import nn


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.GRUCell(3, 4)

    def forward(self, x, h):
        return self.inner(x, h)


def gru():
    return nn.GRU(3, 4)


def number():
    return 3


def equinox_cell():
    import equinox, jax

    class Own(equinox.Module):
        cell: equinox.nn.GRUCell

        def __call__(self, x, h):
            return self.cell(x, h)

    return Own(equinox.nn.GRUCell(2, 4, key=jax.random.key(0)))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with modules of a user, inputs and files of weights."""
    monkeypatch.chdir(tmp_path)
    Path("loaders_mine.py").write_text(MINE)
    rng = np.random.default_rng(0)
    np.save("x.npy", rng.standard_normal((2, 5, 3)))
    np.savez("two.npz", x=rng.standard_normal((2, 5, 2)), other=np.ones(3))
    torch.manual_seed(0)
    torch.save({"model": {f"inner.{name}": value for name, value in nn.GRUCell(3, 4).state_dict().items()}}, "cell.pt")
    torch.save(nn.GRU(3, 4).state_dict(), "gru.pt")
    torch.save(torch.ones(3), "tensor.pt")
    Path("list.json").write_text('{\n "x": [1]\n}')
    return tmp_path


def run(*arguments):
    fast = ("--modes", "2", "--samples", "40", "--out", "out", "--overwrite")
    return CliRunner().invoke(app, ["analyze", *map(str, arguments), *fast])


@pytest.mark.parametrize(
    "arguments",
    [
        ("cell.pt", "--module", "loaders_mine.py:Cell", "--x", "x.npy"),
        pytest.param(("gru.pt", "--module", "loaders_mine:gru", "--x", "x.npy", "--dtype", "float64"), marks=SLOW),
        pytest.param((FOLDER / "cell.eqx", "--module", "loaders_mine.py:equinox_cell", "--x", "two.npz"), marks=SLOW),
        ("gru.pt", "--x", "x.npy"),
    ],
)
def test_the_command_line_fills_modules(here, arguments):
    if "eqx" in str(arguments[0]):
        pytest.importorskip("equinox")
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    found = json.loads(Path("out/results.json").read_text())["found"]
    assert found["file"]["value"] in ("torch.save", "equinox")
    network = found["module"] if "--module" in arguments else found["model"]
    assert network["how"] == ("given" if "--module" in arguments else "read")
    assert "filled with" in network["words"] or "gru" in network["words"]
    said = " ".join(shown.stdout.split())
    assert f"file: {Path(arguments[0]).name}" in said and network["words"] in said
    assert network["words"] in Path("out/index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("cell.pt", "--module", "loaders_mine:number", "--x", "x.npy"), "made an int, expected a torch module or a"),
        (
            ("cell.pt", "--module", "loaders_mine:Cell", "--x", "x.npy", "--model", "gru"),
            "--model is for networks that",
        ),
        (("gru.pt", "--x", "x.npy", "--task", "memorypro"), "--task and --x are both inputs"),
        (("gru.pt", "--x", "two.npz"), "takes 3 inputs, but the task two gives 2"),
        (("gru.pt", "--x", "x.npy", "--trials", "0"), "trials must be at least 1, got 0"),
        (
            ("gru.pt", "--x", "x.npy", "--alpha", "0.5"),
            "alpha is a choice for ctrnn, lowrank only; leave it out for gru",
        ),
        (("gru.pt", "--x", "list.json"), "list.json"),
        (("gru.pt", "--x", "tensor.pt"), "expected one named x [trial, ...]"),
        (("gru.pt",), "no --task; give CHECKPOINT and --task (or --x)"),
    ],
)
def test_what_does_not_go_together(here, arguments, message):
    shown = run(*arguments)
    assert shown.exit_code == 2 and message in shown.stderr and len(shown.stderr.splitlines()) == 1


def test_what_was_assumed_is_on_terminal_page_and_in_json(here):
    net, task = trained("relu")
    torch.save(net.state_dict(), "relu.pt")
    np.savez("own.npz", inputs=task.inputs, targets=task.targets)
    shown = run("relu.pt", "--task", "own.npz")
    assert shown.exit_code == 0, shown.output
    said = json.loads(Path("out/results.json").read_text())["found"]["nonlinearity"]
    assert (said["value"], said["how"], said["option"]) == ("relu", "guessed", "--nonlinearity")
    assert said["words"].startswith("relu, taken from the task")
    assert f"nonlinearity: {said['words']}" in " ".join(shown.stdout.split())
    assert "relu, taken from the task" in Path("out/index.html").read_text()
    assert run("relu.pt", "--x", "own.npz", "--nonlinearity", "relu").exit_code == 0
    assert json.loads(Path("out/results.json").read_text())["found"]["nonlinearity"]["how"] == "given"


def dense(net, x):
    """J J* of a torch module's outputs on x, flattened, by autograd alone."""
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}
    found = torch.func.jacrev(lambda values: torch.func.functional_call(net, values, (x,)).flatten())(values)
    J = torch.cat([block.flatten(1) for block in found.values()], 1)
    return (J @ J.T).numpy()


@pytest.mark.parametrize(
    ("net", "shape", "times"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (5, 3), 1),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh()), (3, 1, 5, 5), 1),
        (Sequence(), (3, 4, 3), 4),
        (nn.Sequential(nn.Linear(3, 4), nn.Tanh()), (2, 5, 3), 5),
        (nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 2)), (2, 5), 5),
    ],
)
def test_any_module_is_analysed_as_what_it_gives(net, shape, times):
    torch.manual_seed(0)
    tokens = isinstance(next(iter(net.children())), nn.Embedding)
    net, x = net.double(), torch.randint(7, shape) if tokens else torch.randn(shape).double()
    flow = kp.linearize(kp.solve(problem_of(net, x.numpy())))
    assert flow.ntk.domain.axes == ("trial", "time", "unit") and flow.ntk.domain.shape[1] == times
    np.testing.assert_allclose(flow.ntk.dense().reshape(dense(net, x).shape), dense(net, x), rtol=1e-9, atol=1e-12)
    assert not flow.untraced


def test_layers_and_cells_are_analysed_step_by_step():
    x = np.zeros((2, 4, 3))
    for module in (nn.GRU(3, 5), nn.LSTMCell(3, 5), kp.models.LowRankRNNCell(3, 5)):
        assert isinstance(problem_of(module.double(), x), kp.DiscreteProblem)
    assert isinstance(problem_of(Sequence().double(), x), kp.StaticProblem)
    assert isinstance(problem_of(nn.GRU(3, 5).double(), x, axes=("trial", "time", "unit")), kp.StaticProblem)


def test_a_training_is_followed_with_the_nonlinearity_that_it_ends_with(tmp_path):
    net, task = trained("relu")
    np.savez(tmp_path / "own.npz", inputs=task.inputs, targets=task.targets)
    record = kp.Recorder(tmp_path / "run")
    torch.manual_seed(1)
    record(0, nn.RNN(2, 8, batch_first=True).double(), loss=1.0, readout=nn.Linear(8, 2).double())
    record(1, net["rnn"], loss=0.1, readout=net["fc"])
    call = ["track", str(record.folder), "--task", str(tmp_path / "own.npz"), "--samples", "40"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    with xr.open_dataset(record.folder / "track" / "track.nc", engine="h5netcdf") as dataset:
        losses = dataset.loss.values
    first = load_checkpoint(kp.Recorder.read(record.folder).file(0), nonlinearity="relu")
    with torch.no_grad():
        y = first.readout(states(first.cell, torch.from_numpy(task.inputs), None))
    assert losses[0] == pytest.approx(float(((y - torch.from_numpy(task.targets)) ** 2).mean()), rel=1e-6)
    assert losses[1] < 0.01
