"""What others do meanwhile changes no flow: refilled batches, other threads; and no cell sees strides of its own."""

from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kpflow_dyn as kp


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()


POSED: dict[str, Callable[[Tensor], Any]] = {
    "network": lambda x: kp.StaticProblem(network(), x, state=""),
    "several arguments": lambda x: kp.StaticProblem(Two(), {"x": x, "y": x[:, :1]}, state=""),
    "fixed point": lambda x: kp.FixedPointProblem(nn.RNNCell(2, 3).double(), x),
    "cell": lambda x: kp.DiscreteProblem(nn.RNNCell(2, 3).double(), x[:, None]),
    "free form": lambda x: kp.ImplicitProblem(
        lambda s, p, x: s - torch.tanh(x @ p["w"]), torch.zeros(5, 3).double(), {"w": torch.randn(2, 3).double()}, x
    ),
}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(2, 3).double()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.w(x)) * y


@pytest.mark.parametrize("name", POSED)
def test_a_batch_that_is_filled_anew_changes_no_flow(name: str) -> None:
    x = torch.randn(5, 2).double()
    flow = kp.linearize(kp.solve(POSED[name](x)))
    q = torch.randn(flow.ntk.domain.shape).double()
    before = flow.ntk.mv(q), flow.J.T.mv(q), flow.core.dense() if flow.sites else q
    x.mul_(2)
    after = flow.ntk.mv(q), flow.J.T.mv(q), flow.core.dense() if flow.sites else q
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_flows_of_several_threads_are_as_of_one() -> None:
    """torch counts the levels of forward mode for the whole process."""
    flows = [kp.linearize(kp.solve(POSED["network"](torch.randn(5, 2).double()))) for _ in range(3)]
    q = torch.randn(flows[0].ntk.domain.shape).double()
    expected, wrong = [flow.ntk.mv(q) for flow in flows], []

    def apply(number: int) -> None:
        for _ in range(50):
            try:
                wrong.extend([number] * (not torch.allclose(flows[number].ntk.mv(q), expected[number])))
            except RuntimeError as error:
                wrong.append(error)

    in_threads(apply, 3)
    assert not wrong


def test_several_threads_ask_for_parts_of_one_network() -> None:
    """Nothing that one hears is another's."""
    net, x = nn.Sequential(network(), nn.Tanh(), nn.Linear(3, 2).double()), torch.randn(3, 2).double()
    states, found = [["0", "2"], ["2"], ["0.0"], ["0", "0.1"]], [list[Tensor]() for _ in range(4)]

    def make(number: int) -> Tensor:
        return kp.linearize(kp.solve(kp.StaticProblem(net, x, state=states[number]))).ntk.dense()

    expected = [make(number) for number in range(4)]
    threads = [Thread(target=lambda n=n: found[n].extend(make(n) for _ in range(5))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(each) == 5 for each in found)
    assert all(torch.allclose(one, first) for each, first in zip(found, expected, strict=True) for one in each)


def test_several_threads_trace_at_once() -> None:
    untraced: list[str] = []

    def linearize(number: int) -> None:
        flow = kp.linearize(kp.solve(kp.DiscreteProblem(Kernels(number + 1), torch.randn(2, 3, 2).double())))
        untraced.append(flow.untraced)

    in_threads(linearize, 4)
    assert untraced == [""] * 4


def in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Kernels(nn.Module):
    """A kernel for each trial, by the usual trick: trials as groups of one convolution, which views z as one row."""

    hidden_size = 8

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.kernel, self.scale = nn.Linear(2, 12).double(), scale

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        kernels = self.scale * self.kernel(x).view(-1, 2, 3)
        return torch.tanh(functional.conv1d(z.view(1, -1, 4), kernels, padding=1, groups=len(z))).reshape(len(z), 8)


def test_a_cell_may_view_its_trials_as_one_row() -> None:
    cell, x = Kernels(), torch.randn(3, 4, 2).double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))
    z, states = torch.zeros(3, 8).double(), []
    for row in x.unbind(1):
        states.append(z := cell(row, z))
    q = torch.randn(3, 4, 8).double()
    (torch.stack(states, 1) * q).sum().backward()
    found = flow.as_parameters(flow.J.T.mv(q))
    for name, parameter in cell.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_an_array_of_numpy_in_a_module_of_jax_may_change_afterwards(x64: None) -> None:
    equinox = pytest.importorskip("equinox")
    import jax
    import jax.numpy as jnp
    import numpy as np

    class Masked(equinox.Module):
        w: Any
        mask: Any

        def __call__(self, x: Any) -> Any:
            start = self.mask * jnp.tanh(self.w @ x)

            def step(given: Any) -> Any:
                return given[0] + 1, jnp.tanh(self.w @ given[1] + start)

            return jax.lax.while_loop(lambda given: given[0] < 2, step, (0, start))[1]

    net = Masked(jnp.asarray(np.random.default_rng(0).standard_normal((3, 3))), np.array([1, 0, 2]))
    with pytest.warns(kp.UntracedWarning):
        flow = kp.linearize(kp.solve(kp.StaticProblem(net, jnp.ones((2, 3)) / 3, state="")))
    q = jnp.ones(flow.ntk.domain.shape)
    before = flow.ntk.mv(q)
    net.mask[...] = 5
    for after in (flow.ntk.mv(q), flow.P.mv(flow.K.mv(flow.P.T.mv(q)))):
        np.testing.assert_allclose(after, before, rtol=1e-9)
