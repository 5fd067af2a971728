"""Starts z_0 that learn, as a parameter or by an encoder of data, against dense Jacobians of autograd."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from synthetic import assert_close
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kpflow_dyn as kp
from kpflow_dyn._arrays import like_numpy

TIMES = np.array([0.0, 0.3, 0.5, 1.0])


class Recurrent(nn.Module):
    """An encoder of sequences, as of a latent ODE."""

    def __init__(self, units: int = 2) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(2, 3, batch_first=True), nn.Linear(3, units)

    def forward(self, data: Tensor) -> Tensor:
        return self.out(self.gru(data)[1][-1])


class Field(nn.Module):
    def __init__(self, units: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(units, 5), nn.Linear(5, units)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(z))) * (1 + 0.1 * t)


class Driven(nn.Module):
    """The field of a neural CDE, driven by the slope of its path."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 4)

    def forward(self, _t: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        return torch.einsum("bui,bi->bu", torch.tanh(self.a(z)).reshape(-1, 2, 2), slope)


class Slopes(nn.Module):
    """The same as a CDE has it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 4)

    def forward(self, _t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.a(z)).reshape(-1, 2, 2)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in module.named_parameters()}


def three_eighths(field: Callable[..., Tensor], z: Tensor, times: np.ndarray = TIMES) -> Tensor:
    """The states of torchdiffeq's rk4, one step from time to time."""
    states = [z]
    for t, end in pairwise(torch.as_tensor(times)):
        h = end - t
        k1 = field(t, z)
        k2 = field(t + h / 3, z + h * k1 / 3)
        k3 = field(t + h * 2 / 3, z + h * (k2 - k1 / 3))
        k4 = field(end, z + h * (k1 - k2 + k3))
        z = z + h * (k1 + 3 * (k2 + k3) + k4) / 8
        states.append(z)
    return torch.stack(states, 1)


def over_time(cell: Callable[..., Tensor], x: Tensor, z: Tensor) -> Tensor:
    states = []
    for x_t in x.unbind(1):
        z = cell(x_t, z)
        states.append(z)
    return torch.stack(states, 1)


def dense(states: Callable[..., Tensor], *points: Any) -> Tensor:
    """J in all numbers of some points: dicts of tensors, or tensors."""
    size = states(*points).numel()
    parts = jacrev(states, tuple(range(len(points))))(*points)
    leaves = [leaf for part in parts for leaf in (part.values() if isinstance(part, dict) else [part])]
    return torch.cat([leaf.reshape(size, -1) for leaf in leaves], 1)


def assert_exact(flow: Any, J: Any) -> None:
    """All operators of a flow whose states and kicks are those of steps."""
    assert_close(flow.J.dense(), J)
    assert_close(flow.ntk.dense(), J @ J.T)
    assert_close((flow.P @ flow.K @ flow.P.T).dense(), J @ J.T)
    assert_close((flow.B @ flow.core @ flow.B.T).dense(), flow.K.dense())
    for operator in (flow.J, flow.B, flow.P, flow.core.factor, flow.K.factor):
        assert kp.check_adjoint(operator) < 1e-12
    assert_close(np.array(kp.trace(flow.core).value), np.trace(np.asarray(flow.core.dense())))
    each = flow.ntk.apart  # J of each trial, for changes of its own
    changes = like_numpy(np.random.default_rng(0).normal(size=(2, *each.domain.shape)), each.domain.like)
    for trial in range(len(changes[0])):
        assert_close(each.mv(changes)[:, trial], flow.J.mv(changes[:, trial])[:, trial])
    assert kp.check_adjoint(each) < 1e-12


# Recurrences


@pytest.fixture(scope="module")
def encoded() -> tuple[kp.Solution, Tensor, dict[str, slice]]:
    """A recurrent network that starts where an encoder says, its J, and whose columns are whose."""
    torch.manual_seed(1)
    cell, encoder, x, data = nn.GRUCell(2, 4).double(), Recurrent(4).double(), drawn(3, 5, 2), drawn(3, 6, 2)

    def states(of_cell: dict, of_encoder: dict) -> Tensor:
        start = functional_call(encoder, of_encoder, (data,))
        return over_time(lambda x, z: functional_call(cell, of_cell, (x, z)), x, start)

    J = dense(states, values_of(cell), values_of(encoder))
    count = sum(value.numel() for value in cell.parameters())
    solution = kp.solve(kp.DiscreteProblem(cell, x, data, encoder=encoder))
    assert_close(solution.state, states(values_of(cell), values_of(encoder)))
    return solution, J, {"cell": slice(count), "encoder": slice(count, None), "": slice(None)}


@pytest.mark.parametrize("part", ["", "cell", "encoder"])
def test_an_encoder_beside_a_cell(encoded: Any, part: str) -> None:
    solution, J, columns = encoded
    flow = kp.linearize(solution, params=lambda name: name.startswith(part))
    assert not flow.untraced
    assert {name.split(".")[0] for name in flow.parameters} == {part} if part else {"cell", "encoder"}
    assert_exact(flow, J[:, columns[part]])
    assert [site.kind for site in flow.sites if "encoder" in site.name] == ([] if part == "cell" else ["opaque"])


def test_what_else_takes_an_encoder(encoded: Any) -> None:
    solution, J, _ = encoded
    flow = kp.linearize(solution)
    rates = {name: 0.5 if name.startswith("encoder") else 1.0 for name in flow.parameters}
    scale = torch.cat([torch.full_like(v, rates[name]).reshape(-1) for name, v in flow.parameters.items()])
    assert_close(kp.linearize(solution, metric=kp.LearningRates(rates)).ntk.dense(), (J * scale) @ J.T)
    alone = flow.only("encoder.out.weight")
    assert_close(alone.ntk.dense(), kp.linearize(solution, params="encoder.out.weight").ntk.dense())
    found = kp.regularizers.trace(solution.problem, probes=None)
    assert_close(found.detach(), torch.trace(J @ J.T))
    found.backward()
    encoder = solution.problem.encoder
    assert float(encoder.out.weight.grad.abs().max()) > 0
    encoder.zero_grad(), solution.problem.cell.zero_grad()
    assert flow.truncate(rtol=1e-2).truncation.bound <= 1e-2
    with pytest.raises(ValueError, match="through the encoder"):
        kp.learning_rules.feedback_alignment(flow)
    with pytest.raises(ValueError, match="fixed z0"):
        kp.forecast_starts(solution.problem, [(nn.GRUCell(2, 4), nn.Linear(4, 1))], drawn(3, 5, 1))


def test_a_start_as_a_parameter_is_a_site() -> None:
    cell, x, z0 = nn.RNNCell(2, 3).double(), drawn(3, 4, 2), drawn(3)
    problem = kp.DiscreteProblem(cell, x, z0).learn_start()
    assert problem.cell is cell and problem.x.shape == x.shape
    flow = kp.linearize(kp.solve(problem))

    def states(z0: Tensor, of_cell: dict) -> Tensor:
        return over_time(lambda x, z: functional_call(cell, of_cell, (x, z)), x, z0.expand(3, -1))

    J = dense(states, z0, values_of(cell))
    assert_exact(flow, J)
    assert (flow.sites[-1].name, flow.sites[-1].kind) == ("z0", "scale")
    assert flow.sites[-1].gram_eigenvalues().tolist() == [3.0] * 3  # the trials that share it
    assert_exact(kp.linearize(kp.solve(problem), params="z0"), J[:, :3])
    kp.learning_rules.feedback_alignment(flow)
    assert_close(problem.remake(z0=2 * z0).encoder.detach(), 2 * z0)
    assert_close(problem.remake(x=2 * x).encoder.detach(), z0)


def test_encoders_of_states_in_several_parts() -> None:
    layers, x, data = nn.LSTM(2, 3).double(), drawn(3, 4, 2), drawn(3, 2)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h, self.c = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
            return self.h(data), self.c(data)

    encoder = Both().double()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(layers, x, data, encoder=encoder)))

    def outputs(of_encoder: dict) -> Tensor:
        h, c = functional_call(encoder, of_encoder, (data,))
        return layers(x.transpose(0, 1), (h[None], c[None]))[0].transpose(0, 1)

    J = dense(outputs, values_of(encoder))
    found = flow.J.dense().reshape(3, 4, 6, -1)[:, :, :3, -J.shape[1] :]
    assert_close(found.reshape(J.shape), J)
    assert flow.output(nn.Linear(3, 2).double()).values.shape == (3, 4, 2)  # of h alone


def test_by_autograd_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, encoder, x, data = nn.RNNCell(2, 3).double(), nn.Linear(2, 3).double(), drawn(2, 3, 2), drawn(2, 2)
    solution = kp.solve(kp.DiscreteProblem(cell, x, data, encoder=encoder))
    traced = kp.linearize(solution)

    def fails(*_: Any) -> Any:
        raise ValueError("no trace")

    monkeypatch.setattr("kpflow_dyn._torch.model.Model.tangents", fails)
    with pytest.warns(kp.UntracedWarning):
        flow = kp.linearize(solution)
    assert flow.sites == []
    assert_close(flow.J.dense(), traced.J.dense())
    assert_close((flow.P @ flow.K @ flow.P.T).dense(), traced.ntk.dense())
    assert_close((flow.B @ flow.core @ flow.B.T).dense(), traced.K.dense())


# ODEs


@pytest.fixture(scope="module")
def latent() -> tuple[kp.ODEProblem, Tensor, dict[str, slice]]:
    """A latent ODE, J of its rk4 on its grid, and whose columns are whose."""
    torch.manual_seed(1)
    f, encoder, data = Field().double(), Recurrent().double(), drawn(3, 4, 2)

    def states(of_field: dict, of_encoder: dict) -> Tensor:
        start = functional_call(encoder, of_encoder, (data,))
        return three_eighths(lambda t, z: functional_call(f, of_field, (t, z)), start)

    count = sum(value.numel() for value in f.parameters())
    J = dense(states, values_of(f), values_of(encoder))
    problem = kp.ODEProblem(f, data, TIMES, encoder=encoder)
    assert_close(kp.solve(problem, "rk4").state, states(values_of(f), values_of(encoder)))
    return problem, J, {"f": slice(count), "encoder": slice(count, None), "": slice(None)}


@pytest.mark.parametrize("part", ["", "f", "encoder"])
def test_a_latent_ode(latent: Any, part: str) -> None:
    problem, J, columns = latent
    flow = kp.linearize(kp.solve(problem, "rk4"), params=lambda name: name.startswith(part))
    assert not flow.untraced
    assert_close(flow.J.dense(), J[:, columns[part]])
    assert_exact(flow.nodal, J[:, columns[part]])
    assert kp.check_adjoint(flow.J) < 1e-12 and kp.check_adjoint(flow.core.factor) < 1e-12
    if part == "encoder":  # a kick at one time is no function of time
        assert not flow.sites and float(flow.K.dense().abs().max()) == 0


@pytest.mark.parametrize("t", [TIMES, (0.0, 1.0)], ids=["grid", "span"])
def test_through_the_equations(latent: Any, t: Any) -> None:
    solution = kp.solve(latent[0].remake(t=t), rtol=1e-10, atol=1e-12)
    through, own = kp.linearize(solution), kp.linearize(solution, sensealg=kp.InterpolatingAdjoint(1e-10, 1e-12))
    changes = drawn(2, through.J.domain.size)
    expected = through.J.mv(changes)
    assert float((own.J.mv(changes) - expected).abs().max()) < 1e-8 * float(expected.abs().max())
    assert kp.check_adjoint(own.J) < 1e-9
    assert_close(
        (through.nodal.P @ through.nodal.K @ through.nodal.P.T).dense(), through.nodal.ntk.dense()
    )  # stages beside the states on a span


def test_a_start_of_an_ode_as_a_parameter() -> None:
    f, z0 = Field().double(), drawn(2)
    problem = kp.ODEProblem(f, z0.expand(3, -1), TIMES).learn_start()
    flow = kp.linearize(kp.solve(problem, "rk4"))
    assert list(flow.parameters)[:2] == ["z0", "f.a.weight"]

    def states(z0: Tensor, of_field: dict) -> Tensor:
        return three_eighths(lambda t, z: functional_call(f, of_field, (t, z)), z0.expand(3, -1))

    assert_exact(flow.nodal, dense(states, z0, values_of(f)))
    assert_close(problem.remake(t=2 * TIMES).encoder.detach(), z0)
    assert_close(problem.remake(z0=torch.ones(3, 2).double()).z0, torch.ones(3, 2))


def test_of_a_field_that_has_nothing_to_learn() -> None:
    class Decay(nn.Module):
        def forward(self, _t: Tensor, z: Tensor) -> Tensor:
            return -z

    flow = kp.linearize(kp.solve(kp.ODEProblem(Decay(), torch.ones(3, 2).double(), TIMES).learn_start(), "rk4"))
    J = dense(lambda z0: three_eighths(lambda _t, z: -z, z0.expand(3, -1)), torch.ones(2).double())
    assert not flow.untraced
    assert_exact(flow.nodal, J)


def test_a_neural_cde_starts_by_its_first_sample() -> None:
    f, encoder, path = Driven().double(), nn.Linear(2, 2).double(), drawn(3, 4, 2)
    slopes = torch.as_tensor(np.diff(TIMES))[:, None] ** -1 * path.diff(dim=1)
    slopes = torch.cat([slopes, slopes[:, -1:]], 1)
    problem = kp.ODEProblem(f, path[:, 0], TIMES, slopes, encoder=encoder)
    flow = kp.linearize(kp.solve(problem, "rk4", steps=TIMES))

    def states(of_field: dict, of_encoder: dict) -> Tensor:
        def field(t: Tensor, z: Tensor) -> Tensor:
            n = min(int(np.searchsorted(TIMES, float(t), side="right")) - 1, 2)
            along = (float(t) - TIMES[n]) / (TIMES[n + 1] - TIMES[n])
            slope = slopes[:, n] + along * (slopes[:, n + 1] - slopes[:, n])
            return functional_call(f, of_field, (t, z, slope))

        return three_eighths(field, functional_call(encoder, of_encoder, (path[:, 0],)))

    assert_close(flow.J.dense(), dense(states, values_of(f), values_of(encoder)))


def test_a_cde_problem_with_an_encoder() -> None:
    f, encoder, path = Slopes().double(), nn.Linear(2, 2).double(), drawn(3, 4, 2)
    flow = kp.linearize(kp.solve(kp.CDEProblem(f, path[:, 0], TIMES, path, encoder=encoder), "rk4", steps=TIMES))

    def states(of_field: dict, of_encoder: dict) -> Tensor:
        found = [functional_call(encoder, of_encoder, (path[:, 0],))]
        for n, ends in enumerate(pairwise(TIMES)):
            slope = (path[:, n + 1] - path[:, n]) / (ends[1] - ends[0])
            rate = lambda t, z: torch.einsum("bui,bi->bu", functional_call(f, of_field, (t, z)), slope)  # noqa: B023, E731
            found.append(three_eighths(rate, found[-1], np.array(ends))[:, -1])
        return torch.stack(found, 1)

    assert_exact(flow.nodal, dense(states, values_of(f), values_of(encoder)))
    assert list(flow.parameters) == ["f.a.weight", "f.a.bias", "encoder.weight", "encoder.bias"]


def test_a_start_of_several_parts_backward_in_time() -> None:
    class Springs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, _t: Tensor, state: tuple[Tensor, Tensor], damping: float) -> tuple[Tensor, Tensor]:
            return state[1], self.layer(state[0]) - damping * state[1]

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, data: Tensor) -> tuple[Tensor, Tensor]:
            return self.layer(data).split(2, -1)

    f, encoder, data, times = Springs().double(), Encoder().double(), drawn(2, 3), TIMES[::-1].copy()
    flow = kp.linearize(kp.solve(kp.ODEProblem(f, data, times, args=0.3, encoder=encoder), "rk4"))

    def states(of_field: dict, of_encoder: dict) -> Tensor:
        def rate(t: Tensor, z: Tensor) -> Tensor:
            return torch.cat(functional_call(f, of_field, (t, z.split(2, -1), 0.3)), -1)

        start = torch.cat(functional_call(encoder, of_encoder, (data,)), -1)
        return three_eighths(rate, start, times)

    assert_close(flow.solution.state, states(values_of(f), values_of(encoder)))
    assert_close(flow.J.dense(), dense(states, values_of(f), values_of(encoder)))


def test_the_start_of_a_hybrid_model() -> None:
    """A ball that bounces: J in z_0 through the times of the events, against finite differences."""

    class Bounce(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept = nn.Parameter(torch.tensor(0.8).double())

        def forward(self, _t: Tensor, z: Tensor) -> Tensor:
            return torch.stack([z[:, 0], -self.kept * z[:, 1]], -1)

    def fall(_t: Tensor, z: Tensor) -> Tensor:
        return torch.stack([z[:, 1], 0 * z[:, 1] - 9.81], -1)

    ground = kp.models.Event(lambda _t, z: z[:, 0], Bounce(), direction=-1)
    model, encoder, data = kp.models.Hybrid(fall, ground), nn.Linear(3, 2, bias=False).double(), drawn(2, 3)
    encoder.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.3, 0.0]]).double()
    data[:, :2] = 1
    how = {"alg": "rk4", "steps": 0.1}
    solution = kp.solve(kp.ODEProblem(model, data, 2 * TIMES, encoder=encoder), **how)
    flow = kp.linearize(solution)
    assert list(flow.parameters) == ["f.events.0.reset.kept", "encoder.weight"] and solution.events[0]

    def states(start: Tensor) -> Tensor:
        return kp.solve(kp.ODEProblem(model, start, 2 * TIMES), **how).state.reshape(-1)

    change, step = drawn(2, 3), 1e-6
    moved = [states(data @ (encoder.weight.detach() + sign * step * change).T) for sign in (1, -1)]
    expected = (moved[0] - moved[1]) / (2 * step)
    theta = torch.cat([torch.zeros(1).double(), change.reshape(-1)])
    found = flow.J.mv(theta[None]).reshape(-1)
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert_close((flow.P @ flow.K @ flow.P.T).dense(), flow.ntk.dense())
    assert_close((flow.B @ flow.core @ flow.B.T).dense(), flow.K.dense())


def test_weights_that_field_and_encoder_share() -> None:
    class Tied(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Tensor) -> Tensor:
            return torch.tanh(self.layer(args[-1]))

    layer, data = nn.Linear(3, 3).double(), drawn(2, 3)
    f, encoder = Tied(layer), Tied(layer)
    solution = kp.solve(kp.ODEProblem(f, data, TIMES, encoder=encoder), "rk4")

    def states(values: dict) -> Tensor:
        apply = lambda z: torch.tanh(functional_call(layer, values, (z,)))  # noqa: E731
        return three_eighths(lambda _t, z: apply(z), apply(data))

    flow, J = kp.linearize(solution), dense(states, values_of(layer))
    assert list(flow.parameters) == ["f.layer.weight", "f.layer.bias"]
    assert_exact(flow.nodal, J)
    loss = kp.squared_error(torch.zeros(2, 4, 3).double())
    assert kp.gradient_flow(solution, loss, 0.1).loss[-1] < float(loss(solution.state))
    own = kp.linearize(solution, sensealg=kp.InterpolatingAdjoint())
    own.J.mv(torch.ones(1, 12).double())
    assert isinstance(layer.weight, nn.Parameter)  # the modules are as they were


def test_a_complex_start() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 2, dtype=torch.complex128))

        def forward(self, _t: Tensor, z: Tensor) -> Tensor:
            return z @ self.w

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, data: Tensor) -> Tensor:
            return torch.complex(*self.layer(data).split(2, -1))

    f, encoder, data = Field(), Encoder().double(), drawn(2, 3)
    flow = kp.linearize(kp.solve(kp.ODEProblem(f, data, TIMES, encoder=encoder), "rk4"))

    def states(values: dict) -> Tensor:
        found = three_eighths(lambda _t, z: z @ f.w.detach(), functional_call(encoder, values, (data,)))
        return torch.cat([found.real, found.imag], -1)

    J = dense(states, values_of(encoder))
    assert_close(flow.J.dense()[:, -J.shape[1] :], J)


def test_training_follows_the_encoder(latent: Any) -> None:
    """The gradient flow is that of small steps of descent, whose start moves as well."""
    problem = latent[0]
    target = torch.full((3, 4, 2), 0.2, dtype=torch.float64)
    solution, loss, steps = kp.solve(problem, "rk4"), kp.squared_error(target), 200
    found = kp.gradient_flow(solution, loss, 1.0, rtol=1e-3)
    f, encoder = copy.deepcopy(problem.f), copy.deepcopy(problem.encoder)
    parameters = [*f.parameters(), *encoder.parameters()]
    for _ in range(steps):
        value = loss(three_eighths(f, encoder(problem.encoded)))
        for parameter, slope in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            parameter.data -= slope / steps
    after = {
        **{f"f.{n}": v for n, v in f.named_parameters()},
        **{f"encoder.{n}": v for n, v in encoder.named_parameters()},
    }
    assert found.parameters.keys() == after.keys()
    for name, value in after.items():
        assert float((found.parameters[name][-1] - value.detach()).abs().max()) < 5e-3
    frozen = kp.gradient_flow(solution, loss, 1.0, params=lambda name: name.startswith("f."))
    assert frozen.loss[-1] > found.loss[-1]
    flow = kp.linearize(solution)
    assert kp.forecast(flow, target, lr=0.01, steps=5).loss[-1] < found.loss[0]
    assert kp.learnability(flow, {"a": target}).half.shape == (1,)
    adam = kp.gradient_flow(solution, loss, 5, optimizer="adam", lr=0.01)
    assert adam.loss[-1] < adam.loss[0]


def test_mini_batches_take_the_data_of_their_trials() -> None:
    cell, encoder = nn.RNNCell(2, 3).double(), nn.Linear(4, 3).double()
    problem = kp.DiscreteProblem(cell, drawn(6, 3, 2), drawn(6, 4), encoder=encoder)
    loss = kp.squared_error(torch.zeros(6, 3, 3).double())
    found = kp.gradient_flow(problem, loss, 3, optimizer="sgd", lr=0.1, batch=2, seed=1)
    rng, parameters = np.random.default_rng(1), [*cell.parameters(), *encoder.parameters()]
    for _ in range(3):
        trials = rng.choice(6, 2, replace=False)
        states = over_time(cell, problem.x[trials], encoder(problem.z0[trials]))
        gradients = torch.autograd.grad((states**2).mean(), parameters)
        for parameter, slope in zip(parameters, gradients, strict=True):
            parameter.data -= 0.1 * slope
    assert_close(found.parameters["encoder.weight"][-1], encoder.weight.detach())


def test_a_later_solve_takes_the_encoder_as_it_is_then() -> None:
    encoder = nn.Linear(3, 2).double()
    problem = kp.ODEProblem(Field().double(), drawn(2, 3), TIMES, encoder=encoder)
    before = kp.solve(problem)
    encoder.weight.data *= 2
    assert_close(kp.solve(problem).state[:, 0], encoder(problem.encoded).detach())
    with pytest.raises(ValueError, match="changed after solve"):
        kp.linearize(before)


def test_tracking_a_latent_ode(tmp_path: Any) -> None:
    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.encoder = Field().double(), nn.Linear(3, 2).double()

    net, record, data = Latent(), kp.Recorder(tmp_path), drawn(2, 3)
    for step in range(2):
        record(step, net, loss=1.0)
        net.encoder.weight.data += 1

    def pose(net: Any, data: Tensor) -> kp.ODEProblem:
        return kp.ODEProblem(net.f, data, TIMES, encoder=net.encoder)

    found = kp.track(Latent, tmp_path, data, pose=pose, progress=False, samples=None)
    ntk = found.alignment_first.sel(operator="NTK").values
    assert ntk[0] == pytest.approx(1) and ntk[1] < 1 - 1e-6


# What is said aloud


@pytest.mark.parametrize("kind", ["leaf", "computed", "parts", "data"])
def test_a_start_with_a_gradient_is_said_once(kind: str) -> None:
    layer, data, x = nn.Linear(3, 2).double(), drawn(2, 3), drawn(2, 4, 2)
    problem: Any = {
        "leaf": lambda: kp.ODEProblem(Field().double(), drawn(2, 2).requires_grad_(), TIMES),
        "computed": lambda: kp.DiscreteProblem(nn.RNNCell(2, 2).double(), x, layer(data)),
        "parts": lambda: kp.DiscreteProblem(nn.LSTMCell(2, 2).double(), x, (layer(data), drawn(2, 2))),
        "data": lambda: kp.ODEProblem(Field().double(), data.requires_grad_(), TIMES, encoder=layer),
    }[kind]()
    with pytest.warns(kp.StartWarning, match="encoder=") as said:
        solution = kp.solve(problem)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow = kp.linearize(solution)
        kp.gradient_flow(solution, kp.squared_error(torch.zeros_like(solution.state)), 0.1)
    assert not any("z0" in name for name in flow.parameters)


class Along(nn.Module):
    """A field of any problem."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2).double()

    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return torch.tanh(self.layer(z)) + sum(x)


class AlongPath(Along):
    def forward(self, t: Tensor, z: Tensor, *x: Tensor) -> Tensor:
        return torch.tanh(self.layer(z))[..., None].expand(-1, -1, 2)


@pytest.mark.parametrize("kind", ["cell", "samples", "pair", "callable", "backward", "path", "brownian", "net"])
def test_inputs_with_a_gradient_are_said_once(kind: str) -> None:
    x, z0, later = nn.Embedding(5, 2).double()(torch.arange(8).reshape(2, 4) % 5), drawn(2, 2), [0, 0.1, 0.2, 0.3]
    problem: Any = {
        "cell": lambda: kp.DiscreteProblem(nn.RNNCell(2, 2).double(), x),
        "samples": lambda: kp.ODEProblem(Along(), z0, later, x),
        "pair": lambda: kp.ODEProblem(Along(), z0, later[:2], (later, x)),
        "callable": lambda: kp.ODEProblem(Along(), z0, later, lambda t: x[:, 0] * t + x[:, 1]),
        "backward": lambda: kp.ODEProblem(Along(), z0, later[::-1], x),
        "path": lambda: kp.CDEProblem(AlongPath(), z0, later, x),
        "brownian": lambda: kp.SDEProblem(Along(), Along(), z0, later, brownian=x[:, :3]),
        "net": lambda: kp.StaticProblem(nn.Linear(2, 2).double(), x[:, 0]),
    }[kind]()
    name = kind if kind in ("path", "brownian") else "x"
    with pytest.warns(kp.StartWarning, match=f"^{name} carries a gradient, and what computed it") as said:
        solution = kp.solve(problem)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kp.linearize(solution)
        assert kind == "callable" or not kp.solve(solution.problem).state.requires_grad


def test_a_start_that_learns_is_not_said() -> None:
    start = nn.Parameter(torch.ones(3, 2).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "z0" in kp.linearize(kp.solve(kp.ODEProblem(Field().double(), start, TIMES).learn_start())).parameters
    task = kp.tasks.FlipFlop(bits=1).sample(trials=2, seed=0)
    with pytest.warns(kp.StartWarning, match="fit trains"):
        kp.train.fit(nn.RNN(1, 4), task, nn.Linear(4, 1), steps=1, z0=torch.ones(4).requires_grad_())


class Shifted(nn.Module):
    """An encoder with something amiss."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what = nn.Linear(3, 2), what

    def forward(self, data: Tensor) -> Any:
        found = self.layer(data)
        return {
            "coupled": lambda: found - found.mean(0),
            "random": lambda: found + torch.randn_like(found),
            "tuple": lambda: (found, found),
            "one": lambda: found.mean(0),
            "nan": lambda: found / 0,
            "cut": lambda: found.detach(),
        }[self.what]()


@pytest.mark.parametrize(
    ("encoder", "error"),
    [
        (lambda: nn.GRU(3, 2), "h_n"),
        (lambda: Shifted("tuple"), "the start that the encoder gives"),
        (lambda: Shifted("coupled"), "influence each other"),
        (lambda: Shifted("random"), "as a part of its data"),
        (lambda: Shifted("one"), r"does not fit.*h_n\[-1\]"),
        (lambda: Shifted("nan"), "z0 holds NaN"),
        (lambda: Shifted("cut"), "z_0 has no derivative"),
        (lambda: nn.Linear(4, 2), r"failed on z0 \(2, 3\)"),
        (lambda: nn.Linear(3, 5), "the start that the encoder gives"),
        (lambda: nn.Sequential(nn.Dropout(), nn.Linear(3, 2)), "drops out"),
        (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), "couples the trials"),
        (lambda: lambda data: data[:, :2], "expected an nn.Module"),
    ],
)
def test_encoders_that_do_not_fit(encoder: Any, error: str) -> None:
    made = encoder()
    made = made.double() if isinstance(made, nn.Module) else made
    with pytest.raises((ValueError, TypeError), match=error):
        kp.linearize(kp.solve(kp.ODEProblem(Field().double(), drawn(2, 3), TIMES, encoder=made)))


def test_problems_that_do_not_fit() -> None:
    f, cell, x = Field().double(), nn.RNNCell(2, 3).double(), drawn(2, 4, 2)
    with pytest.raises(ValueError, match="differs between trials"):
        kp.ODEProblem(f, drawn(3, 2), TIMES).learn_start()
    with pytest.raises(ValueError, match="learns already"):
        kp.ODEProblem(f, drawn(3, 3), TIMES, encoder=nn.Linear(3, 2).double()).learn_start()
    with pytest.raises(ValueError, match="3 trials, but x has 2"):
        kp.DiscreteProblem(cell, x, drawn(3, 3), encoder=nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="the encoder does not fit"):
        kp.solve(kp.DiscreteProblem(cell, x, drawn(2, 3), encoder=nn.Linear(3, 4).double()))
    with pytest.raises(ValueError, match="holds NaN"):
        kp.ODEProblem(f, drawn(3, 3) * np.nan, TIMES, encoder=nn.Linear(3, 2).double())
    fixed = kp.ODEProblem(f, drawn(3, 3), TIMES, encoder=nn.Linear(3, 2).double()).remake(encoder=None)
    assert fixed.z0.shape == (3, 2) and fixed.model is fixed.f


# JAX


class JaxField(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
        return jnp.tanh(self.layer(z)) * (1 + 0.1 * t)


class JaxEncoder(eqx.Module):
    layer: eqx.nn.Linear

    def __call__(self, data: jax.Array) -> jax.Array:
        return jnp.tanh(self.layer(data.reshape(-1)))


class TorchField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.layer(z)) * (1 + 0.1 * t)


def in_jax(layer: nn.Linear) -> eqx.nn.Linear:
    made = eqx.nn.Linear(layer.in_features, layer.out_features, key=jax.random.key(0))
    values = jnp.asarray(layer.weight.detach().numpy()), jnp.asarray(layer.bias.detach().numpy())
    return eqx.tree_at(lambda made: (made.weight, made.bias), made, values)


@pytest.fixture(scope="module")
def both(x64: None) -> tuple[kp.ODEProblem, kp.ODEProblem]:
    """The same latent ODE in torch and in JAX."""
    torch.manual_seed(1)
    f, encoder, data = (
        TorchField().double(),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Tanh()).double(),
        drawn(3, 2, 2),
    )
    models = JaxField(in_jax(f.layer)), JaxEncoder(in_jax(encoder[1]))
    ours = kp.ODEProblem(models[0], jnp.asarray(data.numpy()), TIMES, encoder=models[1])
    return kp.ODEProblem(f, data, TIMES, encoder=encoder), ours


@pytest.fixture(scope="module")
def solved(both: Any) -> Any:
    """The flow in JAX."""
    return kp.linearize(kp.solve(both[1], rtol=1e-11, atol=1e-13))


def test_torch_and_jax_agree(both: Any, solved: Any) -> None:
    flow = kp.linearize(kp.solve(both[0], "dopri5", rtol=1e-11, atol=1e-13))
    assert list(solved.parameters) == ["encoder.layer.bias", "encoder.layer.weight", "f.layer.bias", "f.layer.weight"]
    of_torch, of_jax = (np.asarray(flow.ntk.dense()) for flow in (flow, solved))
    np.testing.assert_allclose(of_jax, of_torch, rtol=0, atol=1e-8 * abs(of_torch).max())


@pytest.mark.parametrize("way", cases(["equations", "implicit", "through"], ["equations"]))
def test_other_ways_in_jax(both: Any, solved: Any, way: str) -> None:
    problem = both[1]
    if way == "equations":
        flow = kp.linearize(solved.solution, sensealg=kp.InterpolatingAdjoint(1e-10, 1e-12))
    elif way == "implicit":
        flow = kp.linearize(kp.solve(problem, diffrax.Kvaerno5(), rtol=1e-10, atol=1e-12))
    else:
        flow = kp.linearize(kp.solve(problem, diffrax.LeapfrogMidpoint(), steps=0.01))
    change = jax.random.normal(jax.random.key(0), (1, flow.J.domain.size))
    expected, tolerance = solved.J.mv(change), 1e-4 if way == "through" else 1e-8  # 1e-4 of the method itself
    assert float(jnp.abs(flow.J.mv(change) - expected).max()) < tolerance * float(jnp.abs(expected).max())
    assert kp.check_adjoint(flow.J) < (1e-9 if way == "equations" else 1e-12)


@pytest.mark.slow
def test_own_steps_in_jax(both: Any) -> None:
    problem = both[1]
    solution = kp.solve(problem, diffrax.Tsit5(), steps=TIMES)
    flow = kp.linearize(solution)

    def states(f: Any, encoder: Any) -> jax.Array:
        def one(data: jax.Array) -> jax.Array:
            term, times = diffrax.ODETerm(lambda t, z, _: f(t, z)), jnp.asarray(TIMES)
            save, steps = diffrax.SaveAt(ts=times), diffrax.StepTo(times)
            solved = diffrax.diffeqsolve(
                term, diffrax.Tsit5(), 0.0, 1.0, None, encoder(data), saveat=save, stepsize_controller=steps
            )
            return solved.ys

        return jax.vmap(one)(problem.encoded)

    found = jax.jacrev(lambda models: states(*models))((problem.f, problem.encoder))
    leaves = [found[i].layer for i in (1, 0)]
    J = jnp.concatenate([v.reshape(24, -1) for layer in leaves for v in (layer.bias, layer.weight)], 1)
    assert_close(flow.J.dense(), J)
    loss = kp.squared_error(jnp.zeros((3, 4, 2)))
    assert kp.gradient_flow(solution, loss, 0.1).loss[-1] < float(loss(solution.state))


def test_recurrences_in_jax(x64: None) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    cell, encoder = eqx.nn.GRUCell(2, 3, key=keys[0]), eqx.nn.Linear(2, 3, key=keys[1])
    x, data = jax.random.normal(keys[2], (2, 3, 2)), jax.random.normal(keys[3], (2, 2))
    solution = kp.solve(kp.DiscreteProblem(cell, x, data, encoder=encoder))

    def states(encoder: Any, cell: Any = cell) -> jax.Array:
        z, found = jax.vmap(encoder)(data), []
        for t in range(3):
            z = jax.vmap(cell)(x[:, t], z)
            found.append(z)
        return jnp.stack(found, 1)

    slopes = jax.jacrev(states)(encoder)
    J = jnp.concatenate([slopes.bias.reshape(18, -1), slopes.weight.reshape(18, -1)], 1)
    flow = kp.linearize(solution)
    assert_close(flow.J.dense()[:, -J.shape[1] :], J)
    assert_close((flow.P @ flow.K @ flow.P.T).dense(), flow.ntk.dense())
    alone = kp.linearize(solution, params=lambda name: name.startswith("encoder"))
    assert not alone.untraced
    assert_close(alone.J.dense(), J)
    assert_close((alone.P @ alone.K @ alone.P.T).dense(), J @ J.T)
    assert kp.check_adjoint(alone.ntk.apart) < 1e-12 and kp.check_adjoint(alone.B) < 1e-12

    def penalty(encoder: Any) -> jax.Array:
        return kp.regularizers.trace(kp.DiscreteProblem(cell, x, data, encoder=encoder), probes=None)

    value, gradient = eqx.filter_value_and_grad(penalty)(encoder)
    assert_close(value, np.trace(np.asarray(flow.ntk.dense())))
    assert float(jnp.abs(gradient.weight).max()) > 0


def test_encoders_that_do_not_fit_in_jax(both: Any) -> None:
    problem = both[1]
    with pytest.raises(ValueError, match="data of one trial"):
        problem.remake(encoder=eqx.nn.Linear(3, 2, key=jax.random.key(0)))
    with pytest.raises(ValueError, match="h_n"):
        problem.remake(encoder=jax.tree_util.Partial(lambda w, d: (w * d).sum(), jnp.ones(())))
    with pytest.raises(ValueError, match="the encoder gives"):
        kp.solve(problem.remake(encoder=eqx.nn.Linear(2, 5, key=jax.random.key(0)), z0=jnp.ones((3, 2))))
    named = problem.remake(encoder=jax.tree_util.Partial(lambda w, d: w @ d.reshape(-1), jnp.ones((2, 4))))
    assert "encoder[0]" in kp.linearize(kp.solve(named)).parameters


@pytest.mark.parametrize("kind", ["ode", "discrete"])
def test_inputs_are_what_an_encoder_takes_where_no_other_data_are_given(kind: str) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    x, others = torch.randn(2, 4, 2).double(), torch.randn(2, 4, 2).double()
    if kind == "ode":
        field = kp.models.MLPField(3, 4, inputs=2).double()
        problem = kp.ODEProblem(field, None, np.linspace(0.0, 1.0, 4), x, encoder=encoder)
        given = kp.ODEProblem(field, others, np.linspace(0.0, 1.0, 4), others, encoder=encoder)
    else:
        cell = nn.GRUCell(2, 3).double()
        problem = kp.DiscreteProblem(cell, x, encoder=encoder)
        given = kp.DiscreteProblem(cell, others, others, encoder=encoder)
    torch.testing.assert_close(kp.solve(problem).start, encoder(x).detach())
    torch.testing.assert_close(kp.solve(problem.remake(x=others)).state, kp.solve(given).state)
    with pytest.raises((TypeError, ValueError), match="encoder"):
        kp.ODEProblem(kp.models.MLPField(3, 4).double(), None, (0.0, 1.0), encoder=encoder)
