"""J of a traced torch network replays graphs of autograd; the oracle is the network itself under torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.profiler import ProfilerActivity, profile

import kpflow_dyn as kp

X = (3, 4, 8)  # [trial, channel, place]


class LogSum(nn.Module):
    """Its backward pass has a derivative that is NaN in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.logcumsumexp(self.layer(x), -1)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": lambda: nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.Tanh(), nn.Conv1d(6, 2, 3, stride=2)),
    "in groups": lambda: nn.Sequential(
        nn.Conv1d(4, 8, 3, groups=4, dilation=2), nn.Tanh(), nn.Conv1d(8, 8, 2, groups=8)
    ),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose1d(4, 3, 3, stride=2), nn.Tanh(), nn.Conv1d(3, 2, 3)),
    "hard sigmoid": lambda: nn.Sequential(nn.Linear(8, 6), nn.Hardsigmoid(), nn.Linear(6, 3), nn.Hardswish()),
    "without a second derivative": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), LogSum()),
    "one layer frozen": lambda: nn.Sequential(nn.Conv1d(4, 4, 3).requires_grad_(False), nn.Tanh(), nn.Conv1d(4, 2, 3)),
}


def problem(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name]().double(), torch.randn(X, dtype=torch.float64)


def learning(net: nn.Module) -> list[str]:
    return [name for name, parameter in net.named_parameters() if parameter.requires_grad]


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """[state, parameter] of the parameters that learn."""
    learnt = {name: net.get_parameter(name).detach() for name in learning(net)}
    found = jacrev(lambda values: functional_call(net, values, (x,)).reshape(-1))(learnt)
    return torch.cat([found[n].flatten(1) for n in learnt], 1)


def close(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_all_operators_of_one_probe_and_of_many(name: str) -> None:
    net, x = problem(name)
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")), params=learning(net))
    assert flow.untraced == ""
    J = jacobian(net, x)
    theta, q = torch.randn(2, J.shape[1], dtype=J.dtype), torch.randn(2, J.shape[0], dtype=J.dtype)
    q_in_shape = q.reshape(2, *flow.ntk.domain.shape)
    for found, expected in (
        (flow.J.mv(theta[0]), J @ theta[0]),
        (flow.J.mv(theta), theta @ J.T),
        (flow.J.T.mv(q_in_shape), q @ J),
        (flow.ntk.mv(q_in_shape), q @ J @ J.T),
        (flow.ntk.mv(q_in_shape[1]), q[1] @ J @ J.T),
        ((flow.P @ flow.K @ flow.P.T).mv(q_in_shape), q @ J @ J.T),
        ((flow.P @ flow.B @ flow.core @ flow.B.T @ flow.P.T).mv(q_in_shape[0]), q[0] @ J @ J.T),
    ):
        assert close(found.reshape(expected.shape), expected)


def test_the_first_application_may_be_of_many_probes() -> None:
    net, x = problem("convolutions")
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")))
    assert close(flow.J.dense(), jacobian(net, x))


def test_an_application_computes_no_value_anew() -> None:
    net, x = problem("convolutions")
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")))
    q = torch.randn(flow.ntk.domain.shape, dtype=torch.float64)
    flow.ntk.mv(q)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        flow.ntk.mv(q)
    calls: dict[str, Any] = {event.key: event.count for event in seen.key_averages()}
    assert "aten::tanh" not in calls
    assert calls["aten::convolution"] == 3  # w * v_x and x * v_w of the second, x * v_w of the first


@pytest.mark.parametrize("state", ["", "0"])
def test_made_in_inference_mode(state: str) -> None:
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(5, 3).double()
    expected = kp.linearize(kp.solve(kp.StaticProblem(net, x, state=state)))
    with torch.inference_mode():
        flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state=state)))
        inside = flow.ntk.dense()
    assert close(inside, expected.ntk.dense()) and close((flow.P @ flow.K @ flow.P.T).dense(), expected.ntk.dense())


def test_under_inference_mode_and_after_the_parameters_changed() -> None:
    net, x = problem("convolutions")
    J = jacobian(net, x)
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, state="")))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    with torch.inference_mode():
        q = torch.randn(flow.ntk.domain.shape, dtype=torch.float64)
        found = flow.ntk.mv(q)
    assert close(found.reshape(-1), q.reshape(-1) @ J @ J.T)
    assert all(parameter.grad is None for parameter in net.parameters())
