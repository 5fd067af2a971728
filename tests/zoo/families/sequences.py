"""Networks over sequences: ncps, minGRU-pytorch, xlstm, mambapy, s5-pytorch, lru-pytorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from LRU_pytorch import LRU
from mambapy.mamba import Mamba, MambaConfig
from minGRU_pytorch.minGRU import minGRU
from minGRU_pytorch.minLM import minLM
from minGRU_pytorch.minLSTM import minLSTM
from ncps.torch import LTC, CfC, CfCCell, LTCCell
from ncps.wirings import AutoNCP, FullyConnected
from s5 import S5, S5Block
from torch import Tensor, nn
from xlstm import (
    FeedForwardConfig,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)

import kpflow_dyn as kp

from ..member import Member

TRIALS, TIMES, INPUTS, UNITS = 2, 6, 3, 8
SEQUENCE = ("trial", "time", "unit")


def over(make: Callable[[], nn.Module], inputs: int = UNITS, state: str = "") -> Callable[[], kp.StaticProblem]:
    """A module that is called on whole sequences."""

    def problem() -> kp.StaticProblem:
        x = torch.randn(TRIALS, TIMES, inputs, dtype=torch.float64)
        return kp.StaticProblem(make().double().eval(), x, state=state, axes=SEQUENCE)

    return problem


def single(make: Callable[[], nn.Module], inputs: int = UNITS) -> Callable[[], kp.StaticProblem]:
    """A module with complex parameters, which `.double()` leaves in single precision."""
    return lambda: kp.StaticProblem(make().eval(), torch.randn(TRIALS, TIMES, inputs), state="", axes=SEQUENCE)


def words() -> kp.StaticProblem:
    """minGRU as a language model."""
    net = minLM(num_tokens=17, dim=UNITS, depth=2).double().eval()
    return kp.StaticProblem(net, torch.randint(17, (TRIALS, TIMES)), state="", axes=SEQUENCE)


class Step(nn.Module):
    """A cell of ncps, which gives what it shows and then its state."""

    def __init__(self, cell: nn.Module, units: int, *times: float) -> None:
        super().__init__()
        self.cell, self.hidden_size, self.times = cell, units, times

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.cell(x, z, *self.times)[1]


def steps(make: Callable[[], nn.Module]) -> Callable[[], kp.DiscreteProblem]:
    """A cell of ncps."""
    return lambda: kp.DiscreteProblem(make().double(), torch.randn(TRIALS, TIMES, INPUTS, dtype=torch.float64))


def xlstm(**blocks: Any) -> nn.Module:
    """A stack of xLSTM's blocks."""
    config = xLSTMBlockStackConfig(context_length=TIMES, num_blocks=2, embedding_dim=UNITS, **blocks)
    net = xLSTMBlockStack(config)
    net.reset_parameters()
    return net


MLSTM = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(conv1d_kernel_size=2, qkv_proj_blocksize=4, num_heads=2))
SLSTM = sLSTMBlockConfig(
    slstm=sLSTMLayerConfig(backend="vanilla", num_heads=2, conv1d_kernel_size=2),
    feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
)
MEMBERS = [
    Member("ncps: LTC", "ncps", over(lambda: LTC(INPUTS, UNITS, batch_first=True), INPUTS, "0")),
    Member("ncps: LTC, wired", "ncps", over(lambda: LTC(INPUTS, AutoNCP(UNITS, 3), batch_first=True), INPUTS, "0")),
    Member("ncps: CfC", "ncps", over(lambda: CfC(INPUTS, UNITS, batch_first=True), INPUTS, "0")),
    Member("ncps: CfC, wired", "ncps", over(lambda: CfC(INPUTS, AutoNCP(UNITS, 3), batch_first=True), INPUTS, "0")),
    Member(
        "ncps: CfC, without a gate",
        "ncps",
        over(lambda: CfC(INPUTS, UNITS, mode="no_gate", batch_first=True), INPUTS, "0"),
    ),
    Member("ncps: LTCCell", "ncps", steps(lambda: Step(LTCCell(FullyConnected(UNITS), INPUTS), UNITS)), Step),
    Member("ncps: CfCCell", "ncps", steps(lambda: Step(CfCCell(INPUTS, UNITS), UNITS, 1.0)), Step),
    Member("minGRU-pytorch: minGRU", "minGRU-pytorch", over(lambda: minGRU(UNITS))),
    Member("minGRU-pytorch: minLSTM", "minGRU-pytorch", over(lambda: minLSTM(UNITS))),
    Member("minGRU-pytorch: language model", "minGRU-pytorch", words),
    Member("xlstm: mLSTM", "xlstm", over(lambda: xlstm(mlstm_block=MLSTM))),
    Member("xlstm: sLSTM", "xlstm", over(lambda: xlstm(slstm_block=SLSTM))),
    Member("mambapy: Mamba", "mambapy", over(lambda: Mamba(MambaConfig(d_model=UNITS, n_layers=2, d_state=4)))),
    Member(
        "mambapy: Mamba, step by step",
        "mambapy",
        over(lambda: Mamba(MambaConfig(d_model=UNITS, n_layers=2, d_state=4, pscan=False))),
    ),
    Member("s5-pytorch: S5", "s5-pytorch", single(lambda: S5(UNITS, 4))),
    Member("s5-pytorch: block", "s5-pytorch", single(lambda: S5Block(UNITS, 4, bidir=False))),
    Member("lru-pytorch: LRU", "lru-pytorch", single(lambda: LRU(INPUTS, 4, UNITS), INPUTS)),
]
