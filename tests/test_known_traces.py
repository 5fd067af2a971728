"""Traces are used again for steps like those that were traced before, and only for these."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._torch import kept_traces
from kpflow_dyn._torch.model import TRACES

SLOPE = 1.0


class Scaled(nn.Module):
    """A cell with a number as an attribute, and one outside of it."""

    hidden_size = 4

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.W = scale, nn.Parameter(0.5 * torch.randn(4, 4, dtype=torch.float64))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.scale * SLOPE * z @ self.W.T + x)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was traced, from none that is known."""
    made: list[object] = []
    outline = kept_traces.outline
    TRACES.forget()
    monkeypatch.setattr(kept_traces, "outline", lambda *given: made.append(given) or outline(*given))
    return made


def error(cell: nn.Module) -> float:
    """How far J is from reverse mode through the cell itself."""
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))

    def states(*values: Tensor) -> Tensor:
        z, named = torch.zeros(2, 4, dtype=torch.float64), dict(zip(flow.parameters, values, strict=True))
        found = []
        for x_t in x.unbind(1):
            z = torch.func.functional_call(cell, named, (x_t, z))
            found.append(z)
        return torch.stack(found, 1)

    dense = torch.autograd.functional.jacobian(states, tuple(flow.parameters.values()))
    expected = torch.cat([part.reshape(40, -1) for part in dense], 1)
    return float((flow.J.dense() - expected).abs().max())


def test_a_second_network_of_its_kind_is_not_traced(traces: list[object]) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        assert error(nn.GRUCell(4, 4).double()) < 1e-12
    assert len(traces) == 1
    assert error(nn.GRUCell(4, 4, bias=False).double()) < 1e-12
    assert len(traces) == 2


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_second_layer_of_its_kind_is_not_traced(layer: type[nn.RNNBase], traces: list[object]) -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    for seed in range(2):
        torch.manual_seed(seed)
        flow = kp.linearize(kp.solve(kp.DiscreteProblem(own := layer(3, 4, batch_first=True).double(), x)))
        q = torch.randn_like(flow.solution.state)
        q[..., 4:] = 0  # the c of an LSTM, which the layer does not give
        expected = torch.autograd.grad(own(x)[0], list(own.parameters()), q[..., :4])
        found = flow.J.T.mv(q[None])[0]
        torch.testing.assert_close(found, torch.cat([g.reshape(-1) for g in expected]), rtol=1e-10, atol=1e-12)
    assert len(traces) == 1


def test_a_layer_that_shares_weights_is_told_apart(traces: list[object]) -> None:
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    own, shared = nn.RNN(4, 4, batch_first=True).double(), nn.RNN(4, 4, batch_first=True).double()
    shared.weight_hh_l0 = shared.weight_ih_l0
    for layer in (own, shared):
        kp.linearize(kp.solve(kp.DiscreteProblem(layer, x)))
    assert len(traces) == 2


def test_an_attribute_tells_two_networks_apart(traces: list[object]) -> None:
    for scale in (1.0, 2.0, 1.0):
        assert error(Scaled(scale)) < 1e-12
    assert len(traces) == 2


def test_what_lies_outside_is_found_out(traces: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    for slope in (1.0, 0.5):
        monkeypatch.setattr("test_known_traces.SLOPE", slope)
        assert error(Scaled(1.0)) < 1e-12
    assert len(traces) == 2


def test_shared_parameters_tell_two_networks_apart(traces: list[object]) -> None:
    class Two(nn.Module):
        hidden_size = 4

        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4).double()
            self.b = self.a if shared else nn.Linear(4, 4).double()

        def forward(self, x: Tensor, z: Tensor) -> Tensor:
            return torch.tanh(self.a(z) + self.b(x))

    assert max(error(Two(shared)) for shared in (False, True, False)) < 1e-12
    assert len(traces) == 2


def test_an_attribute_that_may_change_unseen_is_traced_anew(traces: list[object]) -> None:
    for factor in (1.0, 2.0):
        cell = Scaled(1.0)
        cell.options = {"factor": factor}
        assert error(cell) < 1e-12
    assert len(traces) == 2


class Permuted(nn.Module):
    """A cell that reads its state in an order that a buffer says."""

    hidden_size = 4

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.W = nn.Parameter(0.5 * torch.randn(4, 4, dtype=torch.float64))
        self.register_buffer("order", torch.tensor(order))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(z[:, self.order] @ self.W.T + x)


def test_an_analysis_is_kept_with_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the parameters that learn, and the indices, that it is of."""
    made: list[object] = []
    analyse = kept_traces.analyse
    TRACES.forget()
    monkeypatch.setattr(kept_traces, "analyse", lambda *given: made.append(given) or analyse(*given))
    for orders, expected in ([[3, 2, 1, 0]], 1), ([[3, 2, 1, 0], [1, 0, 3, 2], [1, 0, 3, 2]], 2):
        for order in orders:
            assert error(Permuted(order)) < 1e-12
        assert len(made) == expected
    solution = kp.solve(kp.DiscreteProblem(nn.RNNCell(3, 4), torch.randn(2, 5, 3)))
    for choice in (None, "bias_hh", None, "bias_hh"):
        kp.linearize(solution, params=choice)
    assert len(made) == 4


def test_analyses_that_are_kept_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the last choices of what learns; none of many weights."""
    TRACES.forget()
    solution = kp.solve(kp.DiscreteProblem(nn.GRUCell(3, 4), torch.randn(2, 5, 3)))
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    for choice in [*names, *([a, b] for a in names for b in names if a < b)]:
        kp.linearize(solution, params=choice)
    (kept,) = TRACES._traces.values()
    assert len(kept.analyses) == kept_traces.CHOICES
    monkeypatch.setattr(kept_traces, "LARGE", 10)
    TRACES.forget()
    kp.linearize(solution)
    (kept,) = TRACES._traces.values()
    assert not kept.analyses
