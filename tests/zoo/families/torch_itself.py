"""torch's own layers, modules of Lightning and compiled ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kpflow_dyn as kp

from ..member import Member

TRIALS, TIMES, INPUTS, UNITS = 2, 5, 3, 8
SEQUENCE = ("trial", "time", "unit")
LAYER = {"d_model": UNITS, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "batch_first": True}


def on(shape: tuple[int, ...], make: Callable[[], nn.Module], **options: Any) -> Callable[[], kp.StaticProblem]:
    """The problem of a network on inputs of this shape for each trial."""
    options = {"state": ""} | options
    return lambda: kp.StaticProblem(make().double().eval(), normal(*shape), **options)


def recurrent(make: Callable[[], nn.Module]) -> Callable[[], kp.DiscreteProblem]:
    """The problem of a layer or cell as steps."""
    return lambda: kp.DiscreteProblem(make().double(), normal(TIMES, INPUTS))


def normal(*shape: int) -> Tensor:
    return torch.randn(TRIALS, *shape, dtype=torch.float64)


def translation() -> kp.StaticProblem:
    """nn.Transformer on a source and a target."""
    net = nn.Transformer(UNITS, 2, 1, 1, 12, 0.0, batch_first=True).double().eval()
    return kp.StaticProblem(net, (normal(TIMES, UNITS), normal(4, UNITS)), state="", axes=SEQUENCE)


def decoding() -> kp.StaticProblem:
    """nn.TransformerDecoder on targets and what an encoder remembers."""
    net = nn.TransformerDecoder(nn.TransformerDecoderLayer(**LAYER), 2).double().eval()
    return kp.StaticProblem(net, {"tgt": normal(4, UNITS), "memory": normal(TIMES, UNITS)}, state="", axes=SEQUENCE)


def self_attention() -> kp.StaticProblem:
    """nn.MultiheadAttention with a query, a key and a value."""
    net = nn.MultiheadAttention(UNITS, 2, batch_first=True).double()
    given = {"query": normal(4, UNITS), "key": normal(TIMES, UNITS), "value": normal(TIMES, UNITS)}
    return kp.StaticProblem(net, given | {"need_weights": False}, state="0", axes=SEQUENCE)


def bags() -> kp.StaticProblem:
    """Words of which only the mean counts."""
    net = nn.Sequential(nn.EmbeddingBag(11, UNITS), nn.Tanh(), nn.Linear(UNITS, 3)).double()
    return kp.StaticProblem(net, torch.randint(11, (TRIALS, TIMES)), state="")


class ScaledGRU(nn.GRU):
    """A layer of the user's own, derived from torch's."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().forward(torch.tanh(input), hx)


class Regressor(lightning.LightningModule):
    """A module with its training inside."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(INPUTS, UNITS), nn.GELU(), nn.Linear(UNITS, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Classifier(lightning.LightningModule):
    """A layer over time and a readout of its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.readout = nn.LSTM(INPUTS, UNITS, batch_first=True), nn.Linear(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.layer(x)[0][:, -1])


def normed() -> nn.Module:
    """Convolutions with the norms that there are."""
    norms = nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.BatchNorm2d(4)
    return nn.Sequential(*[layer for norm in norms for layer in (nn.Conv2d(4, 4, 3, padding=1), norm, nn.SiLU())])


def parametrized() -> nn.Module:
    """Weights that are computed from others."""
    layers = nn.Linear(UNITS, UNITS), nn.Linear(UNITS, UNITS), nn.Linear(UNITS, 2)
    parametrizations.weight_norm(layers[0])
    parametrizations.orthogonal(layers[1])
    parametrizations.spectral_norm(layers[2])
    return nn.Sequential(nn.Linear(INPUTS, UNITS), layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, UNITS), nn.Tanh(), nn.Linear(UNITS, 2))


PROBLEMS = {
    "RNN, 2 layers": recurrent(lambda: nn.RNN(INPUTS, UNITS, 2, batch_first=True)),
    "GRU": recurrent(lambda: nn.GRU(INPUTS, UNITS)),
    "GRU, a subclass": recurrent(lambda: ScaledGRU(INPUTS, UNITS, batch_first=True)),
    "LSTM, 2 layers": recurrent(lambda: nn.LSTM(INPUTS, UNITS, 2)),
    "LSTMCell": recurrent(lambda: nn.LSTMCell(INPUTS, UNITS)),
    "LSTM, both ways": on(
        (TIMES, INPUTS), lambda: nn.LSTM(INPUTS, 4, bidirectional=True, batch_first=True), state="0", axes=SEQUENCE
    ),
    "LSTM, projected": on(
        (TIMES, INPUTS), lambda: nn.LSTM(INPUTS, UNITS, proj_size=4, batch_first=True), state="0", axes=SEQUENCE
    ),
    "TransformerEncoder": on(
        (TIMES, UNITS), lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**LAYER), 2), axes=SEQUENCE
    ),
    "TransformerDecoder": decoding,
    "Transformer": translation,
    "MultiheadAttention": self_attention,
    "EmbeddingBag": bags,
    "norms": on((4, 6, 6), normed),
    "parametrizations": on((INPUTS,), parametrized),
    "Conv1d, dilated": on(
        (INPUTS, 12), lambda: nn.Sequential(nn.Conv1d(INPUTS, 6, 3, dilation=2), nn.GELU(), nn.ConvTranspose1d(6, 4, 3))
    ),
    "GLU": on((INPUTS,), lambda: nn.Sequential(nn.Linear(INPUTS, 4), nn.Softplus(), nn.Linear(4, 4), nn.GLU())),
    "compiled": on((INPUTS,), lambda: torch.compile(mlp(), backend="aot_eager")),
}
MEMBERS = [Member(f"torch: {name}", "torch", problem) for name, problem in PROBLEMS.items()] + [
    Member("lightning: regressor", "lightning", on((INPUTS,), Regressor)),
    Member("lightning: LSTM classifier", "lightning", on((TIMES, INPUTS), Classifier)),
]
