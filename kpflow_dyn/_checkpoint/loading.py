"""Recurrent networks, or modules of your own, out of checkpoint files."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kpflow_dyn._checkpoint.cells import Cell, cell_of, constrain, is_dale
from kpflow_dyn._checkpoint.files import in_words, read
from kpflow_dyn._checkpoint.modules import fill
from kpflow_dyn._checkpoint.names import Names, named, translated
from kpflow_dyn._checkpoint.networks import (
    LEAKY,
    MODELS,
    UNNAMED_PHI,
    Found,
    around,
    build_readout,
    check_numbers,
    choose,
    find_readout,
    linear_of,
)
from kpflow_dyn._checkpoint.nonlinearity import CHOICES, from_task, loss_on
from kpflow_dyn._checkpoint.objects import CLASS, Skipped
from kpflow_dyn._problems.parameters import CheckpointError, listing
from kpflow_dyn._shown import Row, Shown, described, plural
from kpflow_dyn.tasks import TaskData


@dataclass(frozen=True, repr=False)
class Checkpoint(Shown):
    """What a checkpoint file held.

    Attributes:
        model: "rnn", "gru", "lstm", "ctrnn" or "lowrank"; of a module that was given, the name of its class.
        cell: the network, in eval mode: nn.RNN, nn.GRU or nn.LSTM (batch_first), their Cells, `models.CTRNNCell` or
            `models.LowRankRNNCell`; or the module that was given to be filled.
        readout: the linear layer on its state, or None where the file has none; of PsychRNN the nonlinearity and the
            layer on it.
        prefix: what stands before the recurrent weights' names in the file, such as "rnn.".
        unused: names in the file that belong to neither, such as an encoder in front of the network.
        readout_name: the readout's name in the file, such as "fc", or None.
        start: the state at the start [unit] that the file has, or None.
        found: what was found in the file and what was assumed, by subject, in words.
    Example as `load_checkpoint`.
    """

    model: str
    cell: Any
    readout: nn.Module | None
    prefix: str
    unused: tuple[str, ...]
    readout_name: str | None
    start: Tensor | None = None
    found: Mapping[str, str] = field(default_factory=dict)

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [("cell", described(self.cell))]
        rows += [] if self.readout is None else [("readout", described(self.readout))]
        return f"Checkpoint of {self.model}", [*rows, *self.found.items()]


def load_checkpoint(
    path: str | Path,
    model: Any = None,
    prefix: str | None = None,
    readout: str | None = None,
    nonlinearity: str | None = None,
    outputs: int | Callable[[int], bool] | None = None,
    *,
    key: str | None = None,
    alpha: float | None = None,
    task: TaskData | None = None,
    loss: str | None = None,
) -> Checkpoint:
    """Read a recurrent network, and its readout if there is one, from a file; or fill a module of your own.

    The file may come from torch.save (a state dict or a whole module, alone or nested), safetensors, numpy's npz,
    Lightning, stable-baselines3, flax (msgpack, orbax), Keras or PsychRNN, or be a pickle of dictionaries of arrays. No
    object that it names is created, and no function is called. Of classes that are not tensors only the names are read.
    The network gets the sizes and the dtype of the file.

    Args:
        path: the file, or the folder of orbax.
        model: "rnn", "gru", "lstm", "ctrnn" (a saved `CTRNNCell`, or a network of PsychRNN), "lowrank", or None for the
            only network in the file. Or a torch module or a pytree of JAX, whose weights are all replaced by those of
            the file. A file of equinox (.eqx) has no names, so it needs the module.
        prefix: the text before the recurrent weights' names ("rnn." in rnn.weight_hh_l0; you may leave out the dot). By
            default the only one that fits.
        readout: the readout layer's name. By default it is the one layer whose last component is a usual name ("fc",
            "out", ...) and whose weight is [out, hidden]; or else the only layer with a weight [outputs, hidden].
        nonlinearity: "tanh" or "relu", for rnn and ctrnn, whose files usually do not say. By default: the file's own
            entry, if there is one; or else the one with the clearly lower loss on the task; or else tanh (PsychRNN:
            relu).
        outputs: the number of the readout's outputs, if known; or a function that says whether a number fits.
        key: the mapping in the file that holds the network, such as "model" or "ema", if there are several.
        alpha: the leak dt / tau of a leaky network, if its file does not have it; 0.1 by default for PsychRNN.
        task: the task on which the network was trained, such as a sample of `kp.tasks`.
        loss: the loss of the task, as in `kp.analyze`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that cannot be used, or that was made to do harm. The message says why.
        ModuleNotFoundError: a file of flax without msgpack, or of orbax without orbax.

    >>> import tempfile, torch, kpflow_dyn as kp
    >>> path = f"{tempfile.mkdtemp()}/net.pt"
    >>> net = torch.nn.ModuleDict({"rnn": torch.nn.GRU(3, 8), "fc": torch.nn.Linear(8, 2)})
    >>> torch.save({"model": net.state_dict(), "epoch": 7}, path)
    >>> loaded = kp.load_checkpoint(path)
    >>> loaded.cell, loaded.readout_name, loaded.found["key"]
    (GRU(3, 8, batch_first=True), 'fc', 'model')
    """
    if model is not None and not isinstance(model, str):
        _check_alone({"prefix": prefix, "readout": readout, "nonlinearity": nonlinearity, "alpha": alpha})
        return Checkpoint(**fill(Path(path), model, key))
    _check_options(model, nonlinearity, alpha)
    content = read(Path(path))
    with in_words(Path(path), "cannot be used"):
        names = named(content.tree)
        names = translated(names if key is None else _under(names, key))
        _check_any(names, content.tree)
        network = choose(names, model, prefix)
        check_numbers({network.whole + short: value for short, value in network.weights(names).items()})
        loading = _Loading(names, network, readout, task.fits if task else outputs, alpha)
        loading.build("tanh")  # what fails here is the file
        check_numbers({each: names.tensors[each] for each in loading.used})
    _check_choices(network.model, nonlinearity, alpha)
    phi, on_phi = loading.nonlinearity(nonlinearity, task, loss)
    return loading.checkpoint(phi, {"file": content.kind}, on_phi)


@dataclass(frozen=True)
class _Loading:
    """A network among the names of a file, that can be made with either nonlinearity."""

    names: Names
    network: Found
    asked: str | None
    outputs: Any
    alpha: float | None

    def cell(self, phi: str) -> Cell:
        found = self.network
        return cell_of(found.weights(self.names), found.model, found.prefix, phi, self.alpha)

    @property
    def of_psychrnn(self) -> bool:
        return self.network.anchor == "W_rec"

    @cached_property
    def hidden(self) -> int:
        return self.cell("tanh").hidden_size

    @cached_property
    def readout_name(self) -> str | None:
        """In the file."""
        if self.of_psychrnn:
            name = f"{self.network.whole}W_out"
            return name if name in self.names.tensors else None
        return find_readout(self.names, self.network, self.hidden, self.asked, self.outputs)

    def readout(self, name: str | None, phi: str) -> nn.Module | None:
        if name is None:
            return None
        return (
            _readout_of_psychrnn(self.names, self.network, phi) if self.of_psychrnn else build_readout(self.names, name)
        )

    @cached_property
    def start(self) -> Tensor | None:
        """The state before the first step, of a file of PsychRNN."""
        start = self.names.tensors.get(f"{self.network.whole}init_state")
        return start.reshape(-1) if self.of_psychrnn and start is not None and start.numel() == self.hidden else None

    def nonlinearity(self, asked: str | None, task: TaskData | None, loss: str | None) -> tuple[str, str]:
        """The nonlinearity, and how it was found, in words; "" where the network has a fixed one."""
        usual = "relu" if self.of_psychrnn else "tanh"
        if self.network.model not in UNNAMED_PHI:
            return usual, ""
        if asked is not None:
            return asked, f"{asked}, as asked for"
        if (said := self.names.words.get(f"{self.network.whole}nonlinearity")) in CHOICES:
            return said, f"{said}, as the file says"
        name = self.readout_name
        if task is not None and task.targets is not None and name is not None:
            layer = self.readout(name, "tanh")
            width = self.names.tensors[f"{name}.weight" if not self.of_psychrnn else name].shape[0]
            if layer is not None and task.fits(width) and self.cell("tanh").input_size == task.inputs.shape[2]:
                return from_task(lambda phi: self.loss(task, name, phi, loss), usual, task.name)
        default = "PsychRNN's own" if self.of_psychrnn else "torch's own"
        return usual, f"{usual}, assumed ({default} default), as the file does not say; --nonlinearity sets it"

    def loss(self, task: TaskData, name: str, phi: str, loss: str | None) -> float:
        layer = self.readout(name, phi)
        assert layer is not None
        return loss_on(task, self.cell(phi), layer, self.start, loss)

    @property
    def used(self) -> list[str]:
        """The names of the tensors that are numbers of the network and of its readout."""
        name, network = self.readout_name, self.network
        found = [network.whole + short for short in network.weights(self.names)]
        found += [each for each in (name, f"{name}.weight", f"{name}.bias") if each in self.names.tensors]
        return found + ([f"{network.whole}init_state"] if self.start is not None else [])

    def build(self, phi: str) -> tuple[Cell, nn.Module | None]:
        """The network and its readout, with this nonlinearity."""
        return self.cell(phi), self.readout(self.readout_name, phi)

    def checkpoint(self, phi: str, found: dict[str, str], on_phi: str) -> Checkpoint:
        """The network with this nonlinearity."""
        network, name, start = self.network, self.readout_name, self.start
        cell, layer = self.build(phi)
        used = self.used
        if self.of_psychrnn:
            own = ("b_out", "output_connectivity", "Dale_out", "Dale_rec", "dale_ratio")
            used = [*used, *(network.whole + short for short in own)]
        head = next(head for head in around(network.key) if (name or network.whole).startswith(head))
        others = [each for each in self.names.tensors if each not in used]
        _warn_of({each: self.names.tensors[each] for each in others if each.startswith(head)})
        if own_class := self.names.words.get(f"{network.whole}{CLASS}"):
            warnings.warn(
                f"the network in the file is a {own_class}, whose code is not run: it is taken as a torch "
                f"{type(cell).__name__} of the same weights. If it computes anything else, fill your own module: "
                "load_checkpoint(path, module), or --module on the command line",
                stacklevel=3,
            )
        unused = tuple(each.removeprefix(head) for each in others)
        short = name if name is None else name.removeprefix(head)
        found |= _described(self, cell, layer, short, on_phi, start, unused)
        return Checkpoint(network.model, cell, layer, network.prefix, unused, short, start, found)


def _described(
    loading: _Loading,
    cell: Cell,
    layer: nn.Module | None,
    readout: str | None,
    on_phi: str,
    start: Tensor | None,
    unused: tuple[str, ...],
) -> dict[str, str]:
    network = loading.network
    origin = loading.names.origins.get(network.whole, "")
    sizes = f"{cell.input_size} inputs, {cell.hidden_size} units, {plural(getattr(cell, 'num_layers', 1), 'layer')}"
    sizes += {"gru": ", gates r, z, n", "lstm": ", gates i, f, g, o"}.get(network.model, "")
    said = {
        "key": network.key,
        "prefix": network.prefix,
        "cell": f"{network.model}: {sizes}" + (f"; from {origin}" if origin else ""),
        "nonlinearity": on_phi,
        "readout": "none found" if layer is None else f"the layer {readout!r}",
        "start": "zeros" if start is None else "init_state of the file, which does not learn here",
        "left out": f"{plural(len(unused), 'tensor')}: {', '.join(unused[:6])}{', ...' if len(unused) > 6 else ''}"
        if unused
        else "",
    }
    if network.model in LEAKY:
        said["leak"] = _on_leak(loading, cell)
    if loading.of_psychrnn:
        said["cell"] += "; from PsychRNN" + (", Dale's law kept" if is_dale(network.weights(loading.names)) else "")
    if loading.names.short:
        said["precision"] = f"{' and '.join(loading.names.short)} in the file, float32 here"
    if loading.names.skipped:
        said["not made"] = "Python objects: " + listing(loading.names.skipped)
    return {subject: words for subject, words in said.items() if words or subject in ("key", "prefix")}


def _warn_of(others: dict[str, Tensor]) -> None:
    """Warn of weights beside those that are taken."""
    if weights := [name for name, tensor in others.items() if tensor.is_floating_point() and tensor.numel() > 1]:
        warnings.warn(
            f"the file holds weights that are not analysed: {listing(weights)}. If they stand between the inputs, this "
            "network and its outputs (an encoder, a norm, a head of several layers, a learnt start), this is not your "
            "whole network; fill your own module: load_checkpoint(path, module), or --module on the command line",
            stacklevel=4,
        )


def _on_leak(loading: _Loading, cell: Any) -> str:
    if cell.alpha is None:
        return "learnt, one for each unit, as in the file"
    value = f"alpha = dt / tau = {float(cell.alpha):.6g}"
    if loading.alpha is not None:
        return f"{value}, as asked for"
    return (
        f"{value}, assumed, as the file does not say; --alpha sets it"
        if loading.of_psychrnn
        else f"{value}, in the file"
    )


def _readout_of_psychrnn(names: Names, network: Found, phi: str) -> nn.Module:
    """W_out phi(h) + b_out, with what is fixed of W_out."""
    own = {name: names.tensors.get(network.whole + name) for name in ("W_out", "b_out", "output_connectivity")}
    weights = network.weights(names)
    dale, signs, weight = is_dale(weights), names.tensors.get(f"{network.whole}Dale_out"), own["W_out"]
    assert weight is not None
    values = {"weight": weight, "bias": own["b_out"]}
    layer = linear_of({name: value for name, value in values.items() if value is not None}, network.whole)
    kept = signs.diagonal() if dale and signs is not None else None
    constrain(layer, "weight", own["output_connectivity"], kept, dale, weight.dtype)
    return nn.Sequential({"tanh": nn.Tanh, "relu": nn.ReLU}[phi](), layer)


def _under(names: Names, key: str) -> Names:
    kept = names.under(key)
    if not kept.tensors:
        tops = dict.fromkeys(name.split(".")[0] for name in names.tensors)
        raise CheckpointError(
            f"nothing under the key {key!r}; the file has {', '.join(map(repr, tops)) or 'no tensors'}"
        )
    return kept


def _check_any(names: Names, tree: Any) -> None:
    if not names.tensors:
        objects = (
            f" but with Python objects ({', '.join(names.skipped)}), which are never made" if names.skipped else ""
        )
        got = "one Python object" if isinstance(tree, Skipped) else f"one {type(tree).__name__}"
        raise CheckpointError(
            f"expected a state dict, names with tensors, got {got} without any{objects}; "
            "save one with torch.save(model.state_dict(), path)"
        )


def _check_options(model: str | None, nonlinearity: str | None, alpha: float | None) -> None:
    if model is not None and model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if nonlinearity not in (None, *CHOICES):
        raise ValueError(f"nonlinearity must be tanh or relu, got {nonlinearity!r}")
    if model is not None:
        _check_choices(model, nonlinearity, alpha)
    if alpha is not None and not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], the step over the time constant, got {alpha}")


def _check_alone(options: Mapping[str, Any]) -> None:
    """Raise for what is a choice for networks that are found, beside a module that is filled."""
    if given := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{listing(given)} cannot be given with a module to be filled, which says so itself")


def _check_choices(model: str, nonlinearity: str | None, alpha: float | None) -> None:
    """Raise for a choice that this kind of network does not have."""
    for name, value, models in (("nonlinearity", nonlinearity, UNNAMED_PHI), ("alpha", alpha, LEAKY)):
        if value is not None and model not in models:
            raise ValueError(f"{name} is a choice for {', '.join(models)} only; leave it out for {model}")
