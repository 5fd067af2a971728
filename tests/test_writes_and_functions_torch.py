"""Writes through views of any kind, and Functions of the user under any name: traced, and as autograd has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_wide_tracing_torch import N, Of, _in_double_precision, check_cell, check_network  # noqa: F401
from torch import Tensor, nn

import kpflow_dyn as kp


def hidden(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(x @ m.w)


def into_a_transpose(m, x):
    y = hidden(m, x)[:, :, None] * m.b  # [trial, unit, unit]
    y.transpose(1, 2)[:, 1:3] = (x @ m.v)[:, None]
    y.transpose(1, 2).mT[:, 0].mul_(3)
    y.permute(2, 0, 1)[0].copy_(y[..., 1].clone() ** 2)
    return y.sum(1)


def into_a_diagonal(m, x):
    y, w = hidden(m, x)[:, :, None] * m.b, m.v * 1
    y.diagonal(0, 1, 2).copy_(x @ m.v)
    w.fill_diagonal_(0.2)
    w.diagonal(1).zero_()
    return y.mean(2) @ w


def into_windows(m, x):
    y = hidden(m, x) * 1
    windows = y.unfold(1, 2, 2)
    windows[:, 1].sub_(1)
    windows.transpose(1, 2)[:, 0, 2] = 2 * x[:, 0]
    y.as_strided((len(x), 2), (N, 2)).neg_()
    return y


def into_pieces(m, x):
    y = hidden(m, x) * 1
    a, b, c = y[:, :2], y.narrow(1, 2, 2), y[..., 4:]
    a.mul_(b.clone())
    b[:, 0] = c[:, 1].clone()
    c.select(1, 0).add_(1).sin_()
    y.view(-1).view(y.shape)[:, 3:].view(len(x), 3).pow_(2)
    return y


def into_views_that_are_read(m, x):
    y = hidden(m, x) * 1
    before, after = y.view(-1, 2, 3).flip(1), y.view(-1, 2, 3)
    after.swapaxes(1, 2)[:, :2].relu_()
    return y + before.reshape(y.shape) * after.reshape(y.shape)


def into_complex_parts(m, x):
    c = torch.complex(hidden(m, x), x @ m.v)
    c.real.mul_(2)
    c.imag[:, 1] = 3.0
    c.conj()[:, 2] = c[:, 0].clone() * 1j
    torch.view_as_real(c)[:, 3, 0] = x[:, 0]
    return (c * c).real + (c * c).imag


def without_gradients(m, x):
    y, z = hidden(m, x) * 1, torch.zeros_like(x)
    with torch.no_grad():
        y[:, 1] = 0.5
        z[:, 1] = y[:, 2]
        y.clamp_(-0.3, 0.3)
    z[:, 2] = y[:, 2]
    return y @ m.v + z @ m.w


def through_data(m, x):
    y = hidden(m, x) * 1
    y.data.clamp_(-0.3, 0.3)
    y.detach()[:, 1] = 0.3
    return y @ m.v


WRITES: dict[str, Callable[..., Tensor]] = {f.__name__: f for f in (
    into_a_transpose, into_a_diagonal, into_windows, into_pieces, into_views_that_are_read, into_complex_parts,
    without_gradients, through_data,
)}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    check_network(lambda: Of(WRITES[name]), torch.randn(3, N))


# Masks of data


def each_by_its_sign(m, x):
    y = x @ m.w
    positive = y > 0
    y[positive] = torch.log(y[positive])
    y[~positive] = -torch.exp(y[~positive]) * m.b.mean()
    return y @ m.v


def some_trials(m, x):
    y, chosen = x @ m.w, x[:, 0] > 0
    y[chosen] = torch.tanh(y[chosen] @ m.v) + m.b
    y[~chosen] += 1
    return y


def experts(m, x):
    """Each token by the expert that it chooses."""
    share, number = (x @ m.u).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for n, W in enumerate((m.w, m.v)):
        here = number == n
        out[here] += F.layer_norm(F.linear(x[here], W, m.b), (N,)) * share[here][:, None]
    return out


@pytest.mark.parametrize("function", [each_by_its_sign, some_trials, experts])
def test_what_masks_of_data_choose(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    check_network(lambda: Of(function), torch.randn(4, 5, N) if function is experts else torch.randn(4, N))


def rescued(m, x, z):
    h = x @ m.u.T + z @ m.w.T
    large = h.abs() > 0.5
    h[large] = torch.tanh(h[large])
    return h


def test_masks_of_the_state_of_a_cell() -> None:
    check_cell(lambda: Of(rescued))


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return (v > 0).to(v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g / (1 + ctx.saved_tensors[0].abs()) ** 2


class Sharper(Spike):
    """Another derivative of the same, in the form that torch.func takes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor, slope: float = 2.0) -> Tensor:  # type: ignore[override]
        return (v > 0).to(v)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.slope = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        return g / (1 + ctx.slope * ctx.saved_tensors[0].abs()), None


class Reversed(torch.autograd.Function):
    """It gives back what it was given."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return -0.5 * g


class Scan(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t on the last axis, with writes into what its backward pass was given."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        h = x.clone().transpose(0, 1)
        for t in range(1, len(h)):
            h[t].add_(a[:, t] * h[t - 1])
        ctx.save_for_backward(a, h)
        return h.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        a, h = ctx.saved_tensors
        g = g.clone().transpose(0, 1)
        for t in reversed(range(1, len(g))):
            g[t - 1].add_(a[:, t] * g[t])
        of_a = torch.zeros_like(h)
        of_a[1:].add_(g[1:] * h[:-1])
        return of_a.transpose(0, 1), g.transpose(0, 1)


spike, sharper, reversed_gradient, scan = Spike.apply, Sharper.apply, Reversed.apply, Scan.apply


def spiking(m, x, z):
    s = spike(z - 0.1)
    return 0.9 * z * (1 - s.detach()) + x @ m.u.T + s @ m.w.T + sharper(z, 3.0) @ m.v.T


def turned_round(m, x):
    return torch.tanh(reversed_gradient(x @ m.w)) @ m.v + torch.vmap(lambda v: sharper(v, 3.0) * v)(x @ m.v)


def scanned(m, x):
    return scan(torch.sigmoid(x * m.b), x @ m.w)


def test_functions_under_other_names() -> None:
    check_cell(lambda: Of(spiking))
    check_network(lambda: Of(turned_round), torch.randn(3, N))
    check_network(lambda: Of(scanned), torch.randn(3, N))


def test_a_network_that_answers_in_single_precision() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(5, 3)
    net[2].register_forward_hook(lambda m, args, out: out.float())
    flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, "")))
    assert not flow.untraced
    q = torch.randn(5, 2).float()
    expected = torch.autograd.grad(net(x), list(net.parameters()), q)
    for found, own in zip(flow.as_parameters(flow.J.T.mv(q)).values(), expected, strict=True):
        assert found.dtype == own.dtype
        assert torch.allclose(found, own, rtol=1e-12)
    assert torch.allclose((flow.P @ flow.K @ flow.P.T).mv(q), flow.ntk.mv(q), rtol=1e-5)
    assert torch.allclose((flow.B @ flow.core @ flow.B.T).mv(q), flow.K.mv(q), rtol=1e-5)


def test_products_in_single_precision_on_the_way() -> None:
    """Kicks meet them in their precision."""

    def forward(m, x):
        h = torch.tanh(x @ m.w).float()
        return (h[:, :, None] @ (x @ m.v).float()[:, None]).sum(1).double() @ m.w

    torch.manual_seed(0)
    flow = kp.linearize(kp.solve(kp.StaticProblem(Of(forward), torch.randn(3, N), "")))
    assert not flow.untraced
    q = torch.randn(3, N)
    assert torch.allclose((flow.P @ flow.K @ flow.P.T).mv(q), flow.ntk.mv(q), rtol=1e-4, atol=1e-4)
