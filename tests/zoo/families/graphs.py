"""Networks on graphs (torch_geometric), equivariant ones (e3nn) and operators on grids (neuraloperator)."""

from __future__ import annotations

from collections.abc import Callable

import e3nn.o3
import torch
import torch_geometric.nn as pyg
from e3nn.nn import FullyConnectedNet, Gate
from neuralop.models import FNO
from torch import Tensor, nn

import kpflow_dyn as kp

from ..member import Member

EDGES = torch.tensor([[0, 1, 1, 2, 3, 4, 4, 0], [1, 0, 2, 3, 4, 0, 2, 4]])
NODES, FEATURES = 5, 3


def graph(make: Callable[[], nn.Module], *further: Tensor) -> Callable[[], kp.StaticProblem]:
    """A network on one graph: features of the nodes, and edges."""

    def problem() -> kp.StaticProblem:
        x = torch.randn(NODES, FEATURES, dtype=torch.float64)
        return kp.StaticProblem(make().double().eval(), (x, EDGES, *further), state="", axes=("node", "unit"))

    return problem


def irreps(make: Callable[[], nn.Module], *inputs: str) -> Callable[[], kp.StaticProblem]:
    """An equivariant network on features of these representations."""

    def problem() -> kp.StaticProblem:
        x = tuple(torch.randn(2, e3nn.o3.Irreps(one).dim, dtype=torch.float64) for one in inputs)
        return kp.StaticProblem(make().double().eval(), x if len(x) > 1 else x[0], state="")

    return problem


def gated() -> nn.Module:
    """A linear layer and a gate behind it."""
    gate = Gate("4x0e", [torch.tanh], "2x0e", [torch.sigmoid], "2x1o")
    return nn.Sequential(e3nn.o3.Linear("3x0e + 2x1o", gate.irreps_in), gate)


def fno() -> kp.StaticProblem:
    """A Fourier neural operator on a grid, whose complex weights are in single precision."""
    net = FNO(n_modes=(4, 4), in_channels=2, out_channels=1, hidden_channels=4, n_layers=2).eval()
    return kp.StaticProblem(net, torch.randn(2, 2, 8, 8), state="")


def two(layer: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """Two layers with a nonlinearity between, as torch_geometric writes it."""
    return lambda: pyg.Sequential("x, edge_index", [
        (layer(FEATURES, 6), "x, edge_index -> x"), nn.Tanh(), (layer(6, 2), "x, edge_index -> x"),
    ])  # fmt: skip


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


MEMBERS = [
    Member("torch_geometric: GCN", "torch_geometric", graph(two(pyg.GCNConv))),
    Member("torch_geometric: GAT", "torch_geometric", graph(two(pyg.GATConv))),
    Member("torch_geometric: GATv2", "torch_geometric", graph(two(pyg.GATv2Conv))),
    Member("torch_geometric: GraphSAGE", "torch_geometric", graph(two(pyg.SAGEConv))),
    Member(
        "torch_geometric: GIN", "torch_geometric", graph(lambda: pyg.GINConv(perceptron(FEATURES, 2), train_eps=True))
    ),
    Member("torch_geometric: Chebyshev", "torch_geometric", graph(lambda: pyg.ChebConv(FEATURES, 4, K=3))),
    Member("torch_geometric: gated graph", "torch_geometric", graph(lambda: pyg.GatedGraphConv(6, 2))),
    Member("torch_geometric: transformer", "torch_geometric", graph(two(pyg.TransformerConv))),
    Member("e3nn: linear", "e3nn", irreps(lambda: e3nn.o3.Linear("3x0e + 2x1o", "2x0e + 2x1o"), "3x0e + 2x1o")),
    Member("e3nn: gate", "e3nn", irreps(gated, "3x0e + 2x1o")),
    Member(
        "e3nn: tensor product",
        "e3nn",
        irreps(
            lambda: e3nn.o3.FullyConnectedTensorProduct("2x0e + 1x1o", "1x0e + 1x1o", "2x0e + 1x1o"),
            "2x0e + 1x1o",
            "1x0e + 1x1o",
        ),
    ),
    Member("e3nn: radial network", "e3nn", irreps(lambda: FullyConnectedNet([4, 8, 3], torch.tanh), "4x0e")),
    Member("neuraloperator: FNO", "neuraloperator", fno),
]
