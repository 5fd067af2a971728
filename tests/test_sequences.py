"""Networks over whole sequences, whose states have times: against recurrences of the same model, and autograd."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from network_oracle import close, jacobian, linearized
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._implicit.traced import Traced

AXES = ("trial", "time", "unit")
TRIALS, TIMES, INPUTS, UNITS = 2, 5, 3, 4


def inputs(seed: int = 0) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).standard_normal((TRIALS, TIMES, INPUTS)))


@pytest.fixture(scope="module")
def gru() -> nn.GRU:
    torch.manual_seed(0)
    return nn.GRU(INPUTS, UNITS, batch_first=True).double()


@pytest.fixture(scope="module")
def rolled(gru: nn.GRU) -> kp.Flow:
    """The layer as a network over sequences."""
    return linearized(gru, inputs(), axes=AXES)


@pytest.fixture(scope="module")
def stepped(gru: nn.GRU) -> kp.Flow:
    """The same as a recurrence."""
    return kp.linearize(kp.solve(kp.DiscreteProblem(gru, inputs())))


def test_a_layer_over_a_sequence_is_its_recurrence(rolled: kp.Flow, stepped: kp.Flow) -> None:
    assert rolled.ntk.domain.matches(stepped.ntk.domain)
    assert rolled.solution.t.tolist() == stepped.solution.t.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    close(rolled.solution.state, stepped.solution.state, 1e-14)
    close(rolled.J.dense(), stepped.J.dense(), 1e-12)
    close(rolled.ntk.dense(), stepped.ntk.dense(), 1e-12)
    close(rolled.P.dense(), np.eye(rolled.P.domain.size))  # its only value is the output
    close(rolled.K.dense(), rolled.ntk.dense(), 1e-12)


class Loop(nn.Module):
    """A cell called step by step, whose states are stacked on an axis of times."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.cell, self.axis = nn.GRUCell(INPUTS, UNITS), axis

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), UNITS), []
        for x_t in x.unbind(1):
            states.append(h := self.cell(x_t, h))
        return torch.stack(states, self.axis)


@pytest.mark.parametrize("axes", [AXES, ("time", "trial", "unit")])
def test_the_calls_of_a_cell_are_the_times_of_its_recurrence(axes: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    net = Loop(axes.index("time")).double()
    stepped = kp.linearize(kp.solve(kp.DiscreteProblem(net.cell, inputs())))
    by_calls, whole = linearized(net, inputs(), state="cell", axes=axes), linearized(net, inputs(), axes=axes)
    for name in ("J", "P", "K", "ntk"):
        close(getattr(by_calls, name).dense(), getattr(stepped, name).dense(), 1e-12)
    close(whole.J.dense(), stepped.J.dense(), 1e-12)
    assert by_calls.solution.sites == ("cell",) * TIMES


def test_wrong_names_of_axes() -> None:
    net = Loop(0).double()
    with pytest.raises(
        ValueError, match=r"\[5, 1, 4\] for one trial and \[5, 2, 4\] for 2, which does not fit the axes"
    ):
        kp.solve(kp.StaticProblem(net, inputs(), axes=AXES))
    with pytest.raises(ValueError, match=r"names \['time', 'token', 'place', 'unit'\] besides the trials"):
        kp.solve(kp.StaticProblem(net, inputs(), axes=("time", "trial", "token", "place", "unit")))
    for axes in ("unit", ("trial", "time"), ("trial", "unit", "unit")):
        with pytest.raises(
            ValueError, match=r'axes is .*, expected distinct names of the axes of the state .*"unit" among'
        ):
            kp.StaticProblem(net, inputs(), axes=axes)


@pytest.mark.parametrize("state", [None, "cell"])
def test_an_axis_too_many_is_no_axis_of_calls(gru: nn.GRU, state: str | None) -> None:
    net = gru if state is None else Loop(1).double()
    with pytest.raises(ValueError, match=r"names \['time', 'head', 'unit'\] besides the trials, which does not fit"):
        kp.solve(kp.StaticProblem(net, inputs(), state=state, axes=("trial", "time", "head", "unit")))


class Turning(nn.GRU):
    """A layer with times in front that takes trials in front."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.transpose(0, 1))[0].transpose(0, 1)


@pytest.mark.parametrize("trials", [1, TRIALS])
def test_a_layer_with_a_forward_of_its_own_is_called_as_it_is(trials: int) -> None:
    torch.manual_seed(0)
    net, x = Turning(INPUTS, UNITS).double(), inputs()[:trials]
    flow = linearized(net, x, axes=AXES)
    close(flow.solution.state, net(x).detach())
    close(flow.J.dense(), jacobian(net, lambda call: call(x).flatten()))


class Folded(nn.Module):
    """A layer on the times of all trials at once, in front of a recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.rnn = nn.Linear(INPUTS, UNITS), nn.RNN(UNITS, UNITS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x.flatten(0, 1))).unflatten(0, x.shape[:2])
        return self.rnn(h)[0]


def test_times_of_all_trials_at_once_are_times() -> None:
    torch.manual_seed(0)
    net, x = Folded().double(), inputs()
    flow = linearized(net, x, state=["into", "rnn"], axes=AXES)
    assert tuple(flow.ntk.domain.shape) == (TRIALS, TIMES, 2 * UNITS)
    with torch.no_grad():
        close(flow.solution.state, torch.cat([net.into(x), net(x)], -1))
    expected = jacobian(net, lambda call: call(x).flatten())
    close(flow.J.dense().reshape(TRIALS, TIMES, 2 * UNITS, -1)[:, :, UNITS:].flatten(0, 2), expected)


class Memory(nn.Module):
    """A cell of two states, of which h is a function of c."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(INPUTS, UNITS)

    def forward(self, x: Tensor) -> Tensor:
        state, found = None, []
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
            found.append(state[0])
        return torch.stack(found, 1)


def test_two_parts_of_a_cell_are_its_state() -> None:
    torch.manual_seed(0)
    net = Memory().double()
    stepped = kp.linearize(kp.solve(kp.DiscreteProblem(net.cell, inputs())))
    both = linearized(net, inputs(), state=["cell:0", "cell:1"], axes=AXES)
    for name in ("J", "P", "K", "ntk"):
        close(getattr(both, name).dense(), getattr(stepped, name).dense(), 1e-12)
    assert linearized(net, inputs(), state="cell:1", axes=AXES).sites


class ReadOut(nn.Module):
    """A cell in a loop, and what is read out of all its states at once."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.loop, self.out = Loop(axis), nn.Linear(UNITS, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.loop(x))


@pytest.mark.parametrize("axes", [AXES, ("time", "trial", "unit")])
@pytest.mark.parametrize("times", [1, TIMES])
def test_calls_and_values_with_times_lie_side_by_side(axes: tuple[str, ...], times: int) -> None:
    torch.manual_seed(1)
    net, x = ReadOut(axes.index("time")).double(), inputs()[:, :times]
    flow = linearized(net, x, state=["loop.cell", ""], axes=axes)
    states = linearized(net, x, state="loop.cell", axes=axes).J.dense().reshape(TRIALS, times, UNITS, -1)
    outputs = linearized(net, x, axes=axes).J.dense().reshape(TRIALS, times, 2, -1)
    assert tuple(flow.ntk.domain.shape) == (TRIALS, times, UNITS + 2)
    close(flow.J.dense(), torch.cat([states, outputs], 2).flatten(0, 2))


class Causal(nn.Module):
    """Convolutions along time, channels first, behind a causal attention."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.mix = nn.Linear(INPUTS, UNITS), nn.Conv1d(UNITS, UNITS, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.into(x))
        h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True).transpose(1, 2)
        return h + torch.tanh(self.mix(nn.functional.pad(h, (2, 0))))


def test_convolutions_with_channels_first() -> None:
    torch.manual_seed(2)
    net, x = Causal().double(), inputs()
    flow = linearized(net, x, axes=("trial", "unit", "time"))
    close(flow.J.dense(), jacobian(net, lambda call: call(x).transpose(1, 2)))
    assert flow.ntk.domain.axes == AXES


def test_values_side_by_side_have_times_too() -> None:
    torch.manual_seed(2)
    net, x = nn.Sequential(nn.Linear(INPUTS, UNITS), nn.Tanh(), nn.Linear(UNITS, 2)).double(), inputs()
    flow = linearized(net, x, state=["0", "2"], axes=AXES)
    assert flow.ntk.domain.axes == AXES and flow.ntk.domain.shape == (TRIALS, TIMES, UNITS + 2)
    both = jacobian(net, lambda call: torch.cat([net[0](x), call(x)], -1))[:, -2 * (UNITS + 1) :]
    close(flow.J.dense()[:, -2 * (UNITS + 1) :], both)
    with pytest.raises(ValueError, match=r"axes names \['time', 'unit'\] .*the output \[4, 5\]"):
        kp.solve(kp.StaticProblem(Causal().double(), x, state=["into", ""], axes=AXES))


def test_numbers_of_times(rolled: kp.Flow, stepped: kp.Flow) -> None:
    """What needs times is the same as of the recurrence."""
    found, expected = (kp.analyze(flow, k=2, samples=40) for flow in (rolled, stepped))
    assert found.attrs["problem"] == "a network over sequences" and found.attrs["title"] == "Analysis of GRU"
    for name in ("ntk_eigenvalue", "temporal_eigenvalue", "spatial_effective_rank", "temporal_kernel", "pc_variance"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-8, atol=1e-10)
    close(kp.modes(rolled.ntk, axis="time").values, kp.modes(stepped.ntk, axis="time").values, 1e-8)
    assert kp.compare(rolled, stepped).ntk.value == pytest.approx(1)


def test_weights_of_times_and_masks(rolled: kp.Flow, stepped: kp.Flow) -> None:
    measure = kp.Measure(time=np.linspace(0.5, 2, TIMES), trial=np.array([1.0, 3.0]))
    weighted, expected = (kp.linearize(flow.solution, measure=measure) for flow in (rolled, stepped))
    close(weighted.ntk.dense(), expected.ntk.dense(), 1e-12)
    close((weighted.P @ weighted.B @ weighted.core @ weighted.B.T @ weighted.P.T).dense(), expected.ntk.dense(), 1e-12)
    mask = torch.ones(TRIALS, TIMES, dtype=torch.bool)
    mask[1, 3:] = False
    close(weighted.where(mask).ntk.dense(), expected.where(mask).ntk.dense(), 1e-12)
    image = linearized(nn.Linear(INPUTS, 2).double(), inputs())
    with pytest.raises(ValueError, match=r"has none; name the axes of its state, as in StaticProblem\(..., axes="):
        kp.linearize(image.solution, measure=measure)
    with pytest.raises(ValueError, match=r"take kp.summary, or name the axes of a sequence model"):
        kp.analyze(image)


def test_learning_of_sequences(rolled: kp.Flow, stepped: kp.Flow) -> None:
    torch.manual_seed(3)
    readout, target = nn.Linear(UNITS, 2).double(), torch.randn(TRIALS, TIMES, 2).double()
    found, expected = (
        kp.learnability(flow.output(readout), {"a": target, "b": target**2}).score for flow in (rolled, stepped)
    )
    close(found, expected, 1e-8)
    mask = torch.ones(TRIALS, TIMES).double()
    mask[0, 4] = 0
    options: dict[str, Any] = {"mask": mask, "lr": 0.1, "steps": 20}
    curves = [kp.forecast(flow.output(readout, learn=True), target, **options) for flow in (rolled, stepped)]
    np.testing.assert_allclose(curves[0].loss, curves[1].loss, rtol=1e-7)


# Diagonal linear recurrences


class Diagonal(nn.Module):
    """h_t = a h_{t-1} + W x_t, as a step."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.into = nn.Parameter(torch.randn(UNITS)), nn.Linear(INPUTS, UNITS)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.sigmoid(self.rate) * z + self.into(x)


class ByLoop(Diagonal):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        h, states = x.new_zeros(len(x), UNITS), []
        for u in self.into(x).unbind(1):
            states.append(h := torch.sigmoid(self.rate) * h + u)
        return torch.stack(states, 1)


class BySum(Diagonal):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        powers = torch.sigmoid(self.rate) ** torch.arange(x.shape[1])[:, None]
        return torch.cumsum(self.into(x) / powers, 1) * powers


class ByScan(Diagonal):
    """In log2 T rounds, each over all times."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        h = self.into(x)
        a, back = torch.sigmoid(self.rate).expand(h.shape), 1
        while back < x.shape[1]:
            h = torch.cat([h[:, :back], h[:, back:] + a[:, back:] * h[:, :-back]], 1)
            a = torch.cat([a[:, :back], a[:, back:] * a[:, :-back]], 1)
            back *= 2
        return h


class ByConvolution(Diagonal):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        kernel = torch.sigmoid(self.rate)[:, None] ** torch.arange(x.shape[1])
        padded = nn.functional.pad(self.into(x).transpose(1, 2), (x.shape[1] - 1, 0))
        return nn.functional.conv1d(padded, kernel.flip(1)[:, None], groups=UNITS).transpose(1, 2)


@pytest.mark.parametrize("kind", [ByLoop, BySum, ByScan, ByConvolution])
def test_linear_recurrences_however_they_are_computed(kind: type[Diagonal]) -> None:
    torch.manual_seed(6)
    net, cell, x = kind().double(), Diagonal().double(), inputs()
    cell.load_state_dict(net.state_dict())
    stepped = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x, torch.zeros(TRIALS, UNITS).double())))
    close(linearized(net, x, axes=AXES).ntk.dense(), stepped.ntk.dense(), 1e-10)


def test_where_sites_cannot_be_found_autograd_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_args: Any) -> list[Any]:
        raise RuntimeError("no variables")

    monkeypatch.setattr(Traced, "sites", fails)
    net, x = nn.Linear(INPUTS, 2).double(), inputs()
    with pytest.warns(kp.UntracedWarning, match="no variables"):
        flow = kp.linearize(kp.solve(kp.StaticProblem(net, x, axes=AXES)))
    close(flow.J.dense(), jacobian(net, lambda call: call(x)))


# One call, without trials


class Graph(nn.Module):
    """Two layers of messages along edges, their sums over neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(INPUTS, UNITS), nn.Linear(UNITS, 2)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            sent = torch.tanh(layer(x))
            x = torch.zeros_like(sent).index_add(0, edges[1], sent[edges[0]])
        return x


def test_a_graph_is_one_trial() -> None:
    torch.manual_seed(4)
    net, x, edges = Graph().double(), inputs()[0], torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
    flow = linearized(net, (x, edges), axes=("node", "unit"))
    assert flow.ntk.domain.axes == ("trial", "node", "unit") and flow.ntk.domain.shape == (1, 5, 2)
    close(flow.J.dense(), jacobian(net, lambda call: call(x, edges)))
    fixed = linearized(net, (x, edges), axes=("node", "unit"), shared=(1,))
    close(fixed.J.dense(), flow.J.dense(), 1e-12)


def test_an_unbatched_sequence_is_one_trial(gru: nn.GRU) -> None:
    x = inputs()[0]
    flow = linearized(gru, x, axes=("time", "unit"))
    close(flow.ntk.dense(), kp.linearize(kp.solve(kp.DiscreteProblem(gru, x[None]))).ntk.dense(), 1e-12)
    assert flow.ntk.domain.axes == AXES and flow.ntk.domain.shape == (1, TIMES, UNITS)


# JAX


class JaxLoop(eqx.Module):
    cell: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        def step(h: jax.Array, x_t: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (after := self.cell(x_t, h)), after

        return jax.lax.scan(step, jnp.zeros(UNITS), x)[1]


def test_the_same_in_jax(x64: None) -> None:
    torch.manual_seed(5)
    layer, one = nn.RNN(INPUTS, UNITS, batch_first=True).double(), nn.RNNCell(INPUTS, UNITS).double()
    one.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    net, x = JaxLoop(kp.models.to_jax(one)), jnp.asarray(to_numpy(inputs()))
    stepped = kp.linearize(kp.solve(kp.DiscreteProblem(net.cell, x)))
    whole = kp.solve(kp.StaticProblem(net, x, axes=AXES))
    assert whole.axes == AXES and whole.t.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    by_calls = linearized(net, x, state="cell", axes=("time", "trial", "unit"))
    for name in ("P", "K", "ntk"):
        close(getattr(by_calls, name).dense(), getattr(stepped, name).dense(), 1e-12)
    close(by_calls.ntk.dense(), linearized(layer, inputs(), axes=AXES).ntk.dense(), 1e-8)
    alone = linearized(net, x[0], axes=("time", "unit"))
    close(alone.ntk.dense(), to_numpy(stepped.ntk.dense())[: TIMES * UNITS, : TIMES * UNITS], 1e-12)
