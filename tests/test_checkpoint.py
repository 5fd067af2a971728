import os
import pickle
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kpflow_dyn._checkpoint import CheckpointError, load_checkpoint
from kpflow_dyn._checkpoint.names import named, translated
from kpflow_dyn.models import CTRNNCell
from kpflow_dyn.tasks import make_task

pytestmark = pytest.mark.filterwarnings("ignore:the file holds weights that are not analysed")

NETWORKS = {
    "rnn": ("rnn", lambda: nn.RNN(3, 6, batch_first=True)),
    "rnn, 3 layers": ("rnn", lambda: nn.RNN(3, 6, num_layers=3, batch_first=True)),
    "rnn cell": ("rnn", lambda: nn.RNNCell(3, 6)),
    "gru": ("gru", lambda: nn.GRU(3, 6, batch_first=True)),
    "gru, 2 layers, no bias": ("gru", lambda: nn.GRU(3, 6, num_layers=2, bias=False, batch_first=True)),
    "gru cell": ("gru", lambda: nn.GRUCell(3, 6)),
    "gru of one unit": ("gru", lambda: nn.GRU(1, 1, batch_first=True)),
    "lstm": ("lstm", lambda: nn.LSTM(3, 6, batch_first=True)),
    "lstm cell, no bias": ("lstm", lambda: nn.LSTMCell(3, 6, bias=False)),
    "ctrnn": ("ctrnn", lambda: CTRNNCell(3, 6, alpha=0.3)),
    "ctrnn, learnt time constants": ("ctrnn", lambda: CTRNNCell(3, 6, learn_alpha=True)),
}


class Wrapped(nn.Module):
    """A network as people save it: the recurrent part and a readout under names of their own."""

    def __init__(self, rnn, **layers):
        super().__init__()
        self.rnn = rnn
        for name, layer in layers.items():
            self.add_module(name, layer)


def state(network, x):
    """What the network does with x [trial, input] from a state of zeros, as one tensor."""
    if isinstance(network, CTRNNCell):
        return network(x, torch.zeros(len(x), network.hidden_size, dtype=x.dtype))
    if isinstance(network, nn.RNNBase):
        return network(x[:, None].expand(-1, 4, -1))[0]
    out = network(x)
    return torch.cat(out) if isinstance(out, tuple) else out


def save(weights, folder, suffix=".pt"):
    path = folder / f"net{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    return path


def gru(**layers):
    torch.manual_seed(0)
    return Wrapped(nn.GRU(3, 6), **layers).state_dict()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("model", "build"), NETWORKS.values(), ids=NETWORKS)
def test_the_network_comes_back(tmp_path, model, build, dtype, suffix):
    torch.manual_seed(0)
    network = build().to(dtype)
    loaded = load_checkpoint(save(network.state_dict(), tmp_path, suffix), model)
    x = torch.randn(5, network.input_size, dtype=dtype)
    assert type(loaded.cell) is type(network)
    assert torch.equal(state(loaded.cell, x), state(network, x))
    assert {p.dtype for p in loaded.cell.parameters()} == {dtype}
    assert all(p.requires_grad for p in loaded.cell.parameters()) and not loaded.cell.training
    assert (loaded.readout, loaded.prefix, loaded.unused) == (None, "", ())


@pytest.mark.parametrize("name", ["readout", "fc", "out", "linear"])
@pytest.mark.parametrize("bias", [True, False])
def test_the_readout_comes_back(tmp_path, name, bias):
    layer = nn.Linear(6, 2, bias=bias)
    path = save(gru(**{name: layer, "encoder": nn.Linear(4, 3)}), tmp_path)
    loaded = load_checkpoint(path, "gru")
    state = torch.randn(5, 6)
    assert torch.equal(loaded.readout(state), layer(state))
    assert loaded.prefix == "rnn."
    assert loaded.unused == ("encoder.weight", "encoder.bias")


@pytest.mark.parametrize("other", ["encoder.weight", "norm.bias", "h0"])
def test_weights_that_are_not_analysed_are_warned_of(tmp_path, other):
    weights = {**gru(fc=nn.Linear(6, 2)), "steps": torch.tensor(5), other: torch.randn(4, 3)}
    with pytest.warns(UserWarning, match=rf"not analysed: '{other}'\. .*--module"):
        load_checkpoint(save(weights, tmp_path))


class Encoded(nn.Module):
    """A network behind an encoder, which is not analysed."""

    def __init__(self):
        super().__init__()
        self.encoder, self.rnn, self.fc = nn.Linear(4, 3), nn.GRU(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.rnn(self.encoder(x))[0])


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("kind", ["module", "module in a dict", "script"])
def test_weights_of_whole_modules_that_are_not_analysed_are_warned_of(tmp_path, kind):
    net, path = Encoded(), tmp_path / "net.pt"
    if kind == "script":
        torch.jit.script(net).save(path)
    else:
        torch.save(net if kind == "module" else {"net": net, "epoch": 3}, path)
    with pytest.warns(UserWarning, match=r"not analysed: '\S*encoder.weight', '\S*encoder.bias'\."):
        load_checkpoint(path)


class Own(nn.GRU):
    """A layer with a forward of its own."""

    def forward(self, x, h=None):
        return super().forward(3 * x, h)


def test_a_layer_of_a_class_of_its_own_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"is a \S*\.Own, whose code is not run: it is taken as a torch GRU"):
        load_checkpoint(save(nn.ModuleDict({"rnn": Own(3, 6)}), tmp_path))


def test_pickled_state_dicts_are_read(tmp_path):
    network = nn.GRU(3, 6, batch_first=True)
    weights = network.state_dict()
    (tmp_path / "net.pkl").write_bytes(pickle.dumps({**weights, "shared": weights["weight_hh_l0"][:2]}))
    loaded, x = load_checkpoint(tmp_path / "net.pkl"), torch.randn(5, 3)
    assert torch.equal(state(loaded.cell, x), state(network, x)) and loaded.unused == ("shared",)


@pytest.mark.parametrize("save", [torch.save, lambda weights, path: path.write_bytes(pickle.dumps(weights))])
def test_negative_conjugate_and_repeated_numbers_are_read(tmp_path, save):
    """Torch saves the first two as what they are the negative or the conjugate of, and a mark."""
    values = torch.randn(4, 4, dtype=torch.complex64)
    for name, weight in {"negative": values.conj().imag, "conjugate": values.conj()}.items():
        save({"weight": weight, "bias": torch.ones(1, dtype=weight.dtype).expand(4)}, tmp_path / name)
        filled = load_checkpoint(tmp_path / name, nn.Linear(4, 4, dtype=weight.dtype)).cell
        assert torch.equal(filled.weight, weight) and torch.equal(filled.bias, torch.ones(4, dtype=weight.dtype))


def test_numbers_of_one_byte_are_read(tmp_path):
    network = nn.RNN(3, 4, batch_first=True)
    short = {name: value.to(torch.float8_e4m3fn) for name, value in network.state_dict().items()}
    loaded = load_checkpoint(save(short, tmp_path)).cell
    assert all(torch.equal(value, short[name].float()) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.5, [0.1, 0.2]])
def test_a_leak_that_is_none_is_refused(tmp_path, alpha):
    path = save(change(CTRNNCell(3, 6).state_dict(), "alpha", torch.tensor(alpha)), tmp_path)
    with pytest.raises(CheckpointError, match=r"alpha must be one number in \(0, 1\], dt / tau, got"):
        load_checkpoint(path)


def test_names_of_thousands_of_cells_are_read_at_once():
    """In time that grows with their number: a second here, and minutes if each made a copy of all names."""
    cell = {"h": {"kernel": torch.ones(4, 4)}, "i": {"kernel": torch.ones(3, 4), "bias": torch.ones(4)}}
    names = translated(named({f"cell{place}": cell for place in range(3000)}))
    assert len(names.origins) == 3000


def test_a_layer_of_another_name_is_no_readout_unless_named(tmp_path):
    path = save(gru(probe=nn.Linear(6, 2)), tmp_path)
    assert load_checkpoint(path, "gru").readout is None
    assert load_checkpoint(path, "gru", readout="probe").readout.out_features == 2
    with pytest.raises(CheckpointError, match=r"no layer 'fc' with a weight \[out, 6\]; there are 'probe'"):
        load_checkpoint(path, "gru", readout="fc")


def test_two_possible_readouts_need_a_choice(tmp_path):
    path = save(gru(fc=nn.Linear(6, 2), head=nn.Linear(6, 1)), tmp_path)
    with pytest.raises(CheckpointError, match=r"'fc', 'head'; choose one with readout="):
        load_checkpoint(path, "gru")
    assert load_checkpoint(path, "gru", readout="head").readout.out_features == 1


def test_the_width_of_a_task_decides(tmp_path):
    path = save(gru(probe=nn.Linear(6, 2), encoder=nn.Linear(6, 4)), tmp_path)
    assert load_checkpoint(path, "gru", outputs=2).readout_name == "probe"
    assert load_checkpoint(path, "gru", outputs=3).readout is None
    path = save(gru(fc=nn.Linear(6, 2), head=nn.Linear(6, 1), probe=nn.Linear(6, 1)), tmp_path)
    assert load_checkpoint(path, "gru", outputs=1).readout_name == "head"
    path = save(gru(one=nn.Linear(6, 2), two=nn.Linear(6, 2)), tmp_path)
    assert load_checkpoint(path, "gru", outputs=2).readout is None


@pytest.mark.parametrize("container", ["state_dict", "model_state_dict"])
def test_nested_state_dicts_and_wrappers_are_found(tmp_path, container):
    weights = nn.DataParallel(Wrapped(nn.GRU(3, 6), fc=nn.Linear(6, 2))).state_dict()
    loaded = load_checkpoint(save({"epoch": 3, container: weights}, tmp_path), "gru")
    assert loaded.prefix == "module.rnn." and loaded.readout.out_features == 2


@pytest.fixture
def two_networks(tmp_path):
    weights = {f"a.{key}": value for key, value in nn.GRU(3, 6).state_dict().items()}
    weights |= {f"b.{key}": value for key, value in nn.GRU(3, 5).state_dict().items()}
    weights |= {f"c.{key}": value for key, value in nn.LSTM(3, 4).state_dict().items()}
    return save(weights, tmp_path)


@pytest.mark.parametrize("prefix", ["b.", "b"])
def test_a_prefix_chooses_the_network(two_networks, prefix):
    loaded = load_checkpoint(two_networks, "gru", prefix=prefix)
    assert loaded.cell.hidden_size == 5 and loaded.prefix == "b."


def test_only_networks_of_the_asked_kind_compete(two_networks):
    assert load_checkpoint(two_networks, "lstm").prefix == "c."
    with pytest.raises(CheckpointError, match=r"several gru networks, with prefixes 'a\.', 'b\.'; choose one"):
        load_checkpoint(two_networks, "gru")


def test_an_unknown_prefix_lists_the_known_ones(two_networks):
    with pytest.raises(CheckpointError, match=r"no recurrent weights with prefix 'd\.'; .* 'a\.', 'b\.', 'c\.'"):
        load_checkpoint(two_networks, "gru", prefix="d")
    with pytest.raises(CheckpointError, match="with prefix ''; there are some"):
        load_checkpoint(two_networks, "gru", prefix="")


@pytest.mark.parametrize("asked", ["rnn", "gru", "lstm", "ctrnn"])
@pytest.mark.parametrize(("model", "build"), NETWORKS.values(), ids=NETWORKS)
def test_another_architecture_is_recognised(tmp_path, model, build, asked):
    path = save(Wrapped(build()).state_dict(), tmp_path)
    if asked == model:
        assert load_checkpoint(path, asked).prefix == "rnn."
        return
    with pytest.raises(
        CheckpointError, match=rf"not a checkpoint of model {asked}, its model is {model}: rnn\..*model {model}"
    ):
        load_checkpoint(path, asked)


def test_an_unknown_architecture_is_described(tmp_path):
    path = save({"weight_hh": torch.zeros(12, 6), "weight_ih": torch.zeros(12, 3)}, tmp_path)
    with pytest.raises(CheckpointError, match=r"weight_hh has shape \[12, 6\].* 3 for a gru"):
        load_checkpoint(path, "gru")


def test_relu_is_the_callers_word(tmp_path):
    network = nn.RNN(3, 6, nonlinearity="relu", batch_first=True)
    path, x = save(network.state_dict(), tmp_path), torch.randn(5, 3)
    assert torch.equal(state(load_checkpoint(path, "rnn", nonlinearity="relu").cell, x), state(network, x))
    assert not torch.equal(state(load_checkpoint(path, "rnn").cell, x), state(network, x))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("transformer", {}, "one of rnn, gru, lstm, ctrnn, lowrank, got 'transformer'"),
        ("rnn", {"nonlinearity": "sin"}, "tanh or relu, got 'sin'"),
        ("gru", {"nonlinearity": "relu"}, "rnn, ctrnn, lowrank only; leave it out for gru"),
    ],
)
def test_bad_options_are_explained(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "net.pt", model, **options)


def change(weights, name, value):
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    return weights


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rnn.bias_hh_l0", None, r"prefix 'rnn\.' .* missing 'bias_hh_l0'; "),
        ("rnn.weight_ih_l0", None, "weight_hh_l0 needs a matrix weight_ih_l0 beside it"),
        ("rnn.bias_ih_l1", torch.zeros(18), ": left over 'bias_ih_l1'"),
        ("rnn.bias_ih_l0", torch.zeros(17), r"rnn\.bias_ih_l0 must be \[18\], got \[17\]"),
        ("rnn.weight_ih_l0", torch.zeros(12, 3), r"rnn\.weight_ih_l0 must be \[18, 3\], got \[12, 3\]"),
        ("rnn.weight_ih_l0", torch.tensor(1.0), "needs a matrix weight_ih_l0"),
        ("rnn.weight_hh_l0", torch.zeros(18), "not a checkpoint of model gru"),
        ("rnn.weight_hh_l0_reverse", torch.zeros(18, 6), "bidirectional networks are no recurrence .*--module"),
        ("rnn.weight_hr_l0", torch.zeros(4, 6), "an LSTM with proj_size .*--module"),
        ("rnn.bias_ih_l0", torch.zeros(18, dtype=torch.float64), "share one floating dtype"),
        ("rnn.bias_ih_l0", torch.zeros(18, dtype=torch.int64), "share one floating dtype"),
        ("fc.bias", torch.zeros(3), r"fc\.bias must be \[2\], got \[3\]"),
    ],
)
def test_weights_that_do_not_fit_are_explained(tmp_path, name, value, message):
    path = save(change(gru(fc=nn.Linear(6, 2)), name, value), tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, "gru")


def test_a_ctrnn_without_its_leak_is_explained(tmp_path):
    path = save(change(CTRNNCell(3, 6).state_dict(), "alpha", None), tmp_path)
    with pytest.raises(CheckpointError, match="missing 'alpha'"):
        load_checkpoint(path, "ctrnn")


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["rnn.weight_hh_l0", "fc.weight"])
def test_the_first_bad_weight_is_named(tmp_path, name, value):
    weights = gru(fc=nn.Linear(6, 2))
    weights[name][1, 2] = weights[name][1, 4] = value
    with pytest.raises(CheckpointError, match=rf"{name} has a NaN or infinity, first at \(1, 2\)"):
        load_checkpoint(save(weights, tmp_path), "gru")


def test_bad_numbers_in_unused_weights_do_no_harm(tmp_path):
    weights = gru(encoder=nn.Linear(4, 3))
    weights["encoder.weight"][:] = np.nan
    assert load_checkpoint(save(weights, tmp_path), "gru").cell.hidden_size == 6


def test_half_precision_is_widened(tmp_path):
    network = nn.GRU(3, 6)
    loaded = load_checkpoint(save(network.bfloat16().state_dict(), tmp_path), "gru")
    assert torch.equal(loaded.cell.weight_hh_l0, network.weight_hh_l0.float())


def test_loading_draws_no_random_numbers(tmp_path):
    path = save(gru(fc=nn.Linear(6, 2)), tmp_path)
    before = torch.get_rng_state()
    load_checkpoint(path, "gru")
    assert torch.equal(torch.get_rng_state(), before)


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    path = save({"weights": Intruder(tmp_path / "proof")}, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"Python objects \(.*mkdir\).*torch\.save\(model\.state_dict\(\), path\)"
    ):
        load_checkpoint(path, "gru")
    assert not (tmp_path / "proof").exists()


def test_the_weights_of_a_whole_saved_module_are_read(tmp_path):
    network = nn.RNN(3, 6, nonlinearity="relu", batch_first=True)
    loaded = load_checkpoint(save(Wrapped(network, fc=nn.Linear(6, 2)), tmp_path))
    x = torch.randn(5, 3)
    assert torch.equal(state(loaded.cell, x), state(network, x))
    assert loaded.readout_name == "fc" and loaded.found["nonlinearity"] == "relu, as the file says"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04 not a zip", b"\x80\x04}\x94."[:-1]])
def test_files_that_are_no_checkpoints_are_explained(tmp_path, suffix, content):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net\S* is not a (checkpoint|safetensors file)"):
        load_checkpoint(path, "gru")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "got one list without any; save one with"),
        ({"epoch": 3}, "got one dict without any"),
        ({"fc.weight": torch.zeros(2, 6)}, "no recurrent weights: .* got 'fc.weight'"),
        ({f"layer{i}": torch.zeros(1) for i in range(30)}, "'layer11' and 18 more"),
    ],
)
def test_checkpoints_of_something_else_are_explained(tmp_path, content, message):
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(save(content, tmp_path), "gru")


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint file {path}"):
            load_checkpoint(path, "gru")


@torch.no_grad()
def test_the_shipped_network_has_learnt_its_task():
    loaded = load_checkpoint(str(files("kpflow_dyn") / "data" / "demo.safetensors"), "gru")
    data = make_task("neurogym:PerceptualDecisionMaking-v0", trials=400, seed=12345)
    answer = loaded.readout(loaded.cell(torch.from_numpy(data.inputs).float())[0]).argmax(dim=-1).numpy()
    choice = data.labels["class"]
    assert loaded.unused == ()
    assert np.mean((answer == choice)[choice > 0]) > 0.84
    assert np.mean((answer == choice)[choice == 0]) > 0.99
