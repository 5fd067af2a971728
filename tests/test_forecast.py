"""Forecasts and learnability against powers of dense kernels, and against real gradient descent."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import cases
from torch import Tensor, nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy

LR = 0.02


class Problem:
    """A network, its readout, inputs, and a target of the readout, with real gradient descent."""

    def __init__(self, cell: nn.Module, units: int, scale: float = 1.0) -> None:
        torch.manual_seed(0)
        self.cell, self.readout = cell.double(), nn.Linear(units, 1).double()
        self.x = torch.randn(4, 8, 2, dtype=torch.float64)
        self.target = scale * torch.sin(torch.cumsum(self.x, 1)[..., :1])
        self.mask = torch.ones(4, 8, dtype=torch.float64)
        self.mask[:, :2] = 0

    def kernel(self, learn: bool = True) -> kp.Output:
        flow = kp.linearize(kp.solve(kp.DiscreteProblem(self.cell, self.x)))
        return flow.output(self.readout, learn=learn)

    def loss(self) -> Tensor:
        z, states = torch.zeros(4, self.readout.in_features, dtype=torch.float64), []
        for x_t in self.x.unbind(1):
            z = self.cell(x_t, z)
            states.append(z)
        error = self.readout(torch.stack(states, 1)) - self.target
        return (self.mask[..., None] * error**2).sum() / self.mask.sum()

    def descend(self, steps: int, lr: float) -> np.ndarray:
        parameters, losses = [*self.cell.parameters(), *self.readout.parameters()], []
        for _ in range(steps + 1):
            losses.append(loss := self.loss())
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= lr * gradient
        return np.array([loss.item() for loss in losses])


def test_the_curve_is_that_of_powers_of_the_dense_kernel() -> None:
    problem = Problem(nn.GRUCell(2, 6), 6)
    y = problem.kernel()
    found = kp.forecast(y, problem.target, lr=LR, steps=3000, mask=problem.mask, check=False)
    A, m = y.ntk.dense().numpy(), problem.mask[..., None].expand(4, 8, 1).reshape(-1).numpy()
    e = to_numpy(y.values - problem.target).reshape(-1)
    step = np.eye(len(e)) - LR * 2 / m.sum() * A * m
    for s in (0, 1, 10, 100, 1000, 3000):
        expected = (m * (np.linalg.matrix_power(step, s) @ e) ** 2).sum() / m.sum()
        assert found.at(s) == pytest.approx(expected, rel=2e-3)
        assert found.loss[np.searchsorted(found.steps, s)] == pytest.approx(expected, rel=2e-3)
    half = found.steps_to(0.8)
    assert found.at(half) == pytest.approx(0.8 * found.at(0), rel=1e-9)
    assert np.isnan(found.holds_until)


def test_what_is_printed_of_times_beyond_the_steps_does_not_contradict_itself() -> None:
    class Known:  # of half of the loss alone
        def steps_to(self, fraction: float) -> float:
            return 216.9 if fraction == 0.5 else np.nan

    problem = Problem(nn.RNNCell(2, 6), 6)
    found = kp.forecast(problem.kernel(), problem.target, lr=LR, steps=100, mask=problem.mask, check=False)
    half, fifth, _, how = str(replace(found, frozen=Known())).splitlines()
    assert half == " 50 % of the loss after 217 steps" and fifth == " 20 % of the loss after more than 217 steps"
    assert how == "under the kernel as it is; not compared with training"


def test_the_first_step_is_that_of_gradient_descent() -> None:
    problem = Problem(nn.RNNCell(2, 6), 6)
    found = kp.forecast(problem.kernel(), problem.target, lr=1e-5, steps=1, mask=problem.mask, check=False)
    real = problem.descend(1, 1e-5)
    assert found.at(0) == pytest.approx(real[0], rel=1e-12)
    assert found.at(1) - found.at(0) == pytest.approx(real[1] - real[0], rel=1e-4)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell])
def test_lazy_networks_follow_it(cell: type) -> None:
    """A small target is learnt before the kernel changes: 2 % over the first fifth of the decay, and beyond."""
    problem = Problem(cell(2, 40), 40, scale=0.03)
    with torch.no_grad():
        problem.readout.weight *= 0.03
        problem.readout.bias.zero_()
    found = kp.forecast(problem.kernel(), problem.target, lr=LR, steps=200, mask=problem.mask)
    real = problem.descend(200, LR)
    fifth = int(np.flatnonzero(real < real[0] - 0.2 * (real[0] - real[-1]))[0])
    predicted = found.at(np.arange(201))
    assert abs(predicted[: fifth + 1] / real[: fifth + 1] - 1).max() < 0.02
    assert found.holds_until == np.inf or found.holds_until > fifth


def test_it_says_where_it_stops_to_hold() -> None:
    problem = Problem(nn.RNNCell(2, 24), 24)
    found = kp.forecast(problem.kernel(), problem.target, lr=LR, steps=1500, mask=problem.mask)
    real = problem.descend(1500, LR)
    apart = abs(found.at(np.arange(1501)) / real - 1)
    late = np.array([abs(found.steps_to(real[step] / real[0]) / step - 1) for step in range(1, 300)])
    first = 1 + int(np.flatnonzero((apart[1:300] > 0.1) | ((apart[1:300] > 0.01) & (late > 0.1)))[0])
    assert 0.8 < found.holds_until / first < 1.25
    assert apart[-1] > 0.3


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_it_claims_nothing_beyond_the_steps_that_were_followed(optimizer: str | None) -> None:
    """The kernel changes, later than in the steps that were asked for."""
    problem = Problem(nn.RNNCell(2, 24), 24)
    given = {"lr": LR, "mask": problem.mask, "optimizer": optimizer}
    few = kp.forecast(problem.kernel(), problem.target, steps=3, **given)
    many = kp.forecast(problem.kernel(), problem.target, steps=300, **given)
    assert few.holds_until == np.inf and many.holds_until < 300
    low, high = few.interval_to(0.3)
    assert low == pytest.approx(3 / 1.1) and high == np.inf
    *_, how, call = str(few).splitlines()
    assert how == "under the kernel as it is; holds for all the 3 steps that were followed" and "inf" not in str(few)
    assert f"ask kp.gradient_flow(...{', optimizer=...' if optimizer else ''}) when it gets there" in call
    assert few.interval_to(0.3)[0] > 2 and "(training: later than 2)" in str(few)  # steps are whole
    assert f"holds for {int(many.holds_until)} steps, then training differs by a tenth" in str(many)
    at_once = str(replace(many, holds_until=0.4, flow_steps=np.array([0, 0.4]), flow_loss=np.array([1, 0.9])))
    assert "does not hold: training differs by a tenth within the first step" in at_once and "later" not in at_once


@pytest.mark.parametrize(("optimizer", "name"), [(None, ""), ("adam", "adam"), (torch.optim.Adam, "Adam")])
def test_its_figure_names_the_optimizer(optimizer: Any, name: str) -> None:
    problem = Problem(nn.RNNCell(2, 6), 6)
    found = kp.forecast(problem.kernel(), problem.target, lr=1e-3, steps=5, optimizer=optimizer)
    (axes,) = found.plot().axes
    curves = [text.get_text() for text in axes.get_legend().get_texts()]
    assert found.optimizer == name and axes.get_xlabel() == f"Step of {name or 'gradient descent'}"
    assert curves == ([f"{name}, frozen kernel", name] if name else ["frozen kernel", "gradient flow"])


class Field(nn.Module):
    """z' = -z + tanh(W z + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(12, 12)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.W(z)) - z


def test_a_neural_ode_in_its_quadrature_weights() -> None:
    torch.manual_seed(0)
    field, start = Field().double(), torch.randn(3, 12, dtype=torch.float64)
    times = torch.linspace(0, 2, 9, dtype=torch.float64)
    problem = kp.ODEProblem(field, start, times)
    flow = kp.linearize(kp.solve(problem, "rk4", steps=0.25))
    target = flow.solution.state + 0.01 * torch.randn_like(flow.solution.state)
    found = kp.forecast(flow, target, lr=LR, steps=60)
    w = torch.from_numpy(flow.solution.weights)[:, None]
    losses = []
    for _ in range(61):
        from torchdiffeq import odeint

        state = odeint(field, start, times, method="rk4", options={"step_size": 0.25}).transpose(0, 1)
        losses.append(loss := (w * (state - target) ** 2).sum() / (w.sum() * 36))
        gradients = torch.autograd.grad(loss, list(field.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(field.parameters(), gradients, strict=True):
                parameter -= LR * gradient
    real = np.array([loss.item() for loss in losses])
    assert found.loss == pytest.approx(real, rel=0.02)
    assert found.holds_until == np.inf


def test_in_jax(x64: None) -> None:
    cell, readout = eqx.nn.GRUCell(2, 6, key=jax.random.key(0)), eqx.nn.Linear(6, 1, key=jax.random.key(1))
    x, target = jax.random.normal(jax.random.key(2), (3, 5, 2)), jnp.ones((3, 5, 1))
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
    found = kp.forecast(y, target, lr=LR, steps=100)
    A, e = to_numpy(y.ntk.dense()), to_numpy(y.values - target).reshape(-1)
    expected = ((np.linalg.matrix_power(np.eye(15) - LR * 2 / 15 * A, 100) @ e) ** 2).mean()
    assert found.at(100) == pytest.approx(expected, rel=2e-3)
    assert found.holds_until > 0 and found.flow_loss[0] == pytest.approx(found.loss[0])


@pytest.mark.slow
def test_a_span_is_checked_by_training_too(x64: None) -> None:
    class Decay(eqx.Module):
        rate: jax.Array

        def __call__(self, t: jax.Array, z: jax.Array) -> jax.Array:
            return -self.rate * z

    problem = kp.ODEProblem(Decay(jnp.ones(1)), jnp.ones((2, 1)), (0.0, 1.0))
    flow = kp.linearize(kp.solve(problem, diffrax.Tsit5()))
    found = kp.forecast(flow, 0 * flow.solution.state, lr=LR, steps=5)
    assert found.holds_until == np.inf and found.flow_loss[-1] == pytest.approx(found.loss[-1], rel=1e-3)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_mini_batches_in_the_mean(batch: int) -> None:
    problem = Problem(nn.GRUCell(2, 6), 6)
    y, steps, runs = problem.kernel(), 40, 4000
    lr = 0.3
    found = kp.forecast(y, problem.target, lr=lr, steps=steps, batch=batch, check=False)
    H = 2 / 32 * y.ntk.dense().numpy()
    e = np.tile(to_numpy(y.values - problem.target).reshape(-1), (runs, 1))
    rng = np.random.default_rng(0)
    for _ in range(steps):
        drawn = rng.permuted(np.tile(np.arange(4) < batch, (runs, 1)), axis=1)
        e = e - lr * 4 / batch * (np.repeat(drawn, 8, 1) * e) @ H
    losses = (e**2).mean(1)
    assert abs(found.mean_loss[-1] - losses.mean()) < 4 * losses.std() / runs**0.5 + 1e-3 * losses.mean()
    assert found.mean_loss[0] == pytest.approx(found.loss[0])
    if batch == 4:
        assert found.mean_loss == pytest.approx(found.loss, rel=1e-6)
    else:
        assert found.mean_loss[-1] > 1.02 * found.loss[-1]


def test_learnability_against_dense_eigenvectors() -> None:
    problem = Problem(nn.GRUCell(2, 6), 6)
    y = problem.kernel()
    values, vectors = torch.linalg.eigh(y.ntk.dense())
    modes = {f"mode {i}": vectors[:, -1 - i].reshape(4, 8, 1) for i in (0, 3)}
    both = modes["mode 0"] + 2 * modes["mode 3"]
    found = kp.learnability(y, modes | {"both": both}, errors=True)
    rates = 2 / 32 * values.flip(0)[[0, 3]].numpy()
    assert found.score == pytest.approx([1, rates[1] / rates[0], (rates[0] + 4 * rates[1]) / rates[0] / 5], rel=1e-6)
    assert found.half[:2] == pytest.approx(np.log(2) / rates / 2, rel=1e-6)  # of the loss, which is |e|^2
    assert found.tenth[:2] == pytest.approx(np.log(10) / rates / 2, rel=1e-6)
    assert found.unreached == pytest.approx(0, abs=1e-9)
    assert (found.to_xarray().score.values == found.score).all() and "mode 3" in str(found)


def test_what_the_kernel_cannot_reach_is_called_unreached() -> None:
    problem = Problem(nn.RNNCell(2, 6, bias=False), 6)
    x = problem.x.clone()
    x[0] = 0  # the states of this trial stay zero, whatever the weights are
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(problem.cell, x)))
    target = torch.zeros(4, 8, 6, dtype=torch.float64)
    target[0] = 1
    for table in (kp.learnability(flow, [target]), kp.core_learnability(flow, [target], errors=True)):
        assert table.half[0] == np.inf or table.unreached[0] > 0.2
    alone = kp.learnability(flow, [target], errors=True)
    assert alone.unreached[0] == pytest.approx(1) and alone.half[0] == np.inf


def test_what_is_unreached_is_known_to_a_hundredth() -> None:
    """Against the dense kernel by autograd through the user's own model."""
    torch.manual_seed(4)
    x, cell, readout = (
        torch.randn(6, 12, 2).double(),
        nn.RNN(2, 24, batch_first=True).double(),
        nn.Linear(24, 2).double(),
    )
    target = torch.randn(6, 12, 2).double()
    entries = readout(cell(x)[0]).reshape(-1)
    learnt = [*cell.parameters(), *readout.parameters()]
    rows = [torch.autograd.grad(entry, learnt, retain_graph=True) for entry in entries]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()
    rates, modes = np.linalg.eigh(J @ J.T)
    parts = (modes.T @ (entries.detach() - target.reshape(-1)).numpy()) ** 2
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
    found = kp.learnability(y, {"noise": target})
    assert found.unreached[0] == pytest.approx(parts[rates < 1e-6 * rates.max()].sum() / parts.sum(), abs=1e-2)
    _, row, under, unreached, *_later = str(found).splitlines()
    assert row.endswith(f"{found.unreached[0]:.2f}") and under.startswith("under the kernel as it is; half and tenth")
    assert unreached.startswith("unreached: part of the loss in directions of eigenvalues below 1e-06 of the largest")


@pytest.mark.parametrize("framework", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_learnability_of_classes(framework: str, x64: None) -> None:
    """Against the dense Gauss-Newton matrix, and the times against the forecast."""
    problem = Classes(framework, scale=1.0)
    y, constant = problem.flow.output(problem.readout, learn=True), np.zeros((6, 5), int)
    found = kp.learnability(y, {"right": problem.right, "constant": constant}, loss="cross_entropy")
    A, p = to_numpy(y.ntk.dense()), jax.nn.softmax(jnp.asarray(to_numpy(y.values)), -1)
    for i, target in enumerate((problem.right, constant)):
        w = np.repeat((target >= 0) / (target >= 0).sum(), 3)
        e = w * np.asarray(p - jax.nn.one_hot(target, 3)).reshape(-1)
        H = np.kron(np.eye(30), np.ones((3, 3))) * -np.outer(p, p) + np.diag(np.asarray(p).reshape(-1))
        values, vectors = np.linalg.eigh(H * w)
        kept = values > 1e-12
        root, inverse = ((vectors * kept * np.maximum(values, 1e-12) ** s) @ vectors.T for s in (0.5, -0.5))
        f, kernel = inverse @ e, root @ A @ root
        rates = np.linalg.eigvalsh(kernel)
        assert found.score[i] == pytest.approx(f @ kernel @ f / (f @ f) / rates[-1], rel=1e-3)
        forecast = kp.forecast(y, target, lr=0.01, steps=20000, loss="cross_entropy", check=False)
        assert found.half[i] == pytest.approx(0.01 * forecast.steps_to(0.5), rel=1e-2)
        tenth = forecast.steps_to(0.1)
        assert found.tenth[i] > 200 if np.isnan(tenth) else found.tenth[i] == pytest.approx(0.01 * tenth, rel=1e-2)
        reached = np.linalg.eigh(kernel)[1][:, rates > 1e-6 * rates[-1]]
        assert found.unreached[i] == pytest.approx(1 - ((reached.T @ f) ** 2).sum() / (f @ f), abs=1e-2)
        part = kp.learnability(y, [e.reshape(6, 5, 3)], loss="cross_entropy", errors=True)
        assert i == 0 or part.score[0] == pytest.approx(found.score[i], rel=1e-3)


def test_learnability_of_losses_of_ones_own() -> None:
    problem = Classes("torch", scale=1.0)
    y, target = problem.flow.output(problem.readout), torch.zeros(6, 5, 3, dtype=torch.float64)
    squares = kp.learnability(y, [target])
    ours = kp.learnability(y, [target], loss=nn.functional.mse_loss)
    for name in ("score", "half", "tenth"):
        assert getattr(ours, name) == pytest.approx(getattr(squares, name), rel=5e-3)
    coupled = kp.learnability(y, [target], loss=lambda y, target: (y - target).mean() ** 2)
    rate = 2 * float(y.ntk.dense().mean())  # the only one
    assert coupled.score == pytest.approx(1) and coupled.half == pytest.approx(np.log(2) / 2 / rate, rel=1e-2)
    with pytest.raises(ValueError, match="not convex"):
        kp.learnability(y, [target], loss=lambda y, target: torch.cos(y - target - 1).mean())
    with pytest.raises(ValueError, match="hangs on its target"):
        kp.learnability(y, [target], loss=nn.functional.mse_loss, errors=True)


def test_scores_of_the_forward_pass_are_those_of_the_variables() -> None:
    problem = Problem(nn.RNNCell(2, 5), 5)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(problem.cell, problem.x)))
    target = torch.randn(4, 8, 5, dtype=torch.float64)
    h = torch.cat([torch.zeros(4, 1, 5, dtype=torch.float64), flow.solution.state[:, :-1]], 1)
    ones = torch.ones(4, 8, 1, dtype=torch.float64)
    V = torch.cat([h, problem.x, ones, ones], -1).reshape(32, -1)  # two biases
    G, E = V @ V.T, target.reshape(32, 5)
    expected = float((E * (G @ E)).sum() / (E**2).sum() / torch.linalg.eigvalsh(G)[-1])
    assert kp.core_learnability(flow, [target], errors=True).score[0] == pytest.approx(expected, rel=1e-6)


def test_the_squared_error() -> None:
    torch.manual_seed(0)
    state, readout = torch.randn(3, 4, 5).double(), nn.Linear(5, 2).double()
    target, mask = torch.randn(3, 4, 2).double(), torch.rand(3, 4).double()
    expected = (mask[..., None] * (readout(state) - target) ** 2).sum() / (2 * mask.sum())
    assert kp.squared_error(target, readout, mask)(state).item() == pytest.approx(expected.item(), rel=1e-12)
    assert list(kp.squared_error(target, readout, mask, learn=False).parameters()) == []
    for wrong in (torch.ones(4, 3), torch.zeros(3, 4), -mask, mask * np.nan):
        with pytest.raises(ValueError, match="the mask has shape"):
            kp.squared_error(target, readout, wrong)


def test_losses_that_are_called_in_another_way_are_refused_in_words() -> None:
    problem = Problem(nn.RNNCell(2, 6), 6)
    for make in (kp.squared_error, kp.cross_entropy):
        with pytest.raises(TypeError, match=r"the target comes first.*\(target, readout\); got torch.nn.Linear"):
            make(problem.readout, problem.target)
    posed = kp.DiscreteProblem(problem.cell, problem.x)
    for loss in (nn.functional.mse_loss, nn.MSELoss()):
        with pytest.raises(TypeError, match=r"needs input, target; give kp.squared_error\(target, readout\)"):
            kp.gradient_flow(posed, loss, 1.0)


class Tanh(eqx.Module):
    """h' = tanh(W h + U x)."""

    weight_ih: jax.Array
    weight_hh: jax.Array

    def __call__(self, x: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.tanh(self.weight_hh @ h + self.weight_ih @ x)

    @property
    def hidden_size(self) -> int:
        return self.weight_hh.shape[0]


class Classes:
    """Logits of three classes, the difference of two copies of a network, many times as large: zero at first, and lazy.

    Source: Chizat, Oyallon, Bach, "On lazy training in differentiable programming" (2019).
    """

    def __init__(self, framework: str, scale: float = 8.0) -> None:
        rng, n = np.random.default_rng(0), 12
        x = rng.standard_normal((6, 5, 2))
        self.right = np.digitize(x[..., 0], (-0.5, 0.5))
        self.right[0, :2] = -100
        W, U, R = (rng.standard_normal(shape) / n**0.5 for shape in ((n, n), (n, 2), (3, n)))
        values = np.kron(np.eye(2), W), np.concatenate([U, U]), scale * np.concatenate([R, -R], 1)
        self.framework, self.lr = framework, 0.05 / scale**2
        if framework == "torch":
            cell, readout = nn.RNNCell(2, 2 * n, bias=False).double(), nn.Linear(2 * n, 3, bias=False).double()
            for parameter, value in zip((cell.weight_hh, cell.weight_ih, readout.weight), values, strict=True):
                parameter.data = torch.from_numpy(value)
            x = torch.from_numpy(x)
        else:
            W, U, R, x = map(jnp.asarray, (*values, x))
            blank = eqx.nn.Linear(2 * n, 3, use_bias=False, key=jax.random.key(0))
            cell, readout = Tanh(U, W), eqx.tree_at(lambda linear: linear.weight, blank, R)
        self.cell, self.readout, self.x = cell, readout, x
        self.flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))

    def descend(self, steps: int) -> np.ndarray:
        """Losses of real gradient descent on copies."""
        task = kp.tasks.TaskData(np.asarray(self.x.tolist()), self.right[..., None])
        models = (self.cell, self.readout)
        models = tuple(map(deepcopy, models)) if self.framework == "torch" else models
        options = {"steps": steps, "lr": self.lr, "optimizer": "sgd", "loss": "cross_entropy"}
        return kp.train.fit(models[0], task, models[1], **options).losses


@pytest.mark.parametrize("framework", cases(["torch", "jax"], {"torch"}))
def test_cross_entropy_in_lazy_networks(framework: str, x64: None) -> None:
    """2 % over the first fifth of the decay."""
    problem = Classes(framework)
    y = problem.flow.output(problem.readout, learn=True)
    found = kp.forecast(y, problem.right, lr=problem.lr, steps=200, loss="cross_entropy")
    real = problem.descend(200)
    fifth = int(np.flatnonzero(real < real[0] - 0.2 * (real[0] - real[-1]))[0])
    predicted = found.at(np.arange(201))
    assert found.at(0) == pytest.approx(real[0], rel=1e-10)
    assert abs(predicted[: fifth + 1] / real[: fifth + 1] - 1).max() < 0.02
    assert found.holds_until > fifth > 3 and real[-1] < 0.7 * real[0]
    with pytest.raises(ValueError, match="for the squared error alone"):
        kp.forecast(y, problem.right, lr=LR, steps=9, loss="cross_entropy", batch=2)


def test_other_losses_are_those_of_the_linearised_model(x64: None) -> None:
    """Small steps of descent on L(y + J delta), J being dense."""
    problem = Classes("torch", scale=1.0)
    y = problem.flow.output(problem.readout, learn=True)
    J, right = y.ntk.factor.dense(), torch.from_numpy(problem.right)
    huber = lambda y, target: nn.functional.smooth_l1_loss(y, target, beta=0.3)  # noqa: E731
    for loss, target in (("cross_entropy", right), (huber, torch.ones_like(y.values))):
        of = kp.cross_entropy(right) if loss == "cross_entropy" else (lambda y, t=target: huber(y, t))
        found = kp.forecast(y, target, lr=0.05, steps=200, loss=loss, check=False)
        delta, losses = torch.zeros(J.shape[1], dtype=torch.float64), []
        for step in range(4001):  # each is a twentieth of a step
            if step % 20 == 0:
                losses.append(of(y.values + (J @ delta).reshape(y.values.shape)).item())
            rows = (y.values + (J @ delta).reshape(y.values.shape)).requires_grad_()
            delta = delta - 0.0025 * J.T @ torch.autograd.grad(of(rows), rows)[0].reshape(-1)
        assert found.at(np.arange(201)) == pytest.approx(np.array(losses), rel=5e-3)
        goal = losses[100] / losses[0]
        assert found.steps_to(goal) == pytest.approx(100, rel=0.02)
        assert np.isnan(found.steps_to(0.5 * losses[-1] / losses[0])) and np.isnan(found.at(201))


def test_rates_of_the_cross_entropy_are_those_of_the_gauss_newton_matrix(x64: None) -> None:
    problem = Classes("torch", scale=1.0)
    y, right = problem.flow.output(problem.readout, learn=True), torch.from_numpy(problem.right)
    found = kp.forecast(y, right, lr=LR, steps=3, loss="cross_entropy", check=False)
    loss, rows = kp.cross_entropy(right), y.values.reshape(-1)
    H = torch.func.hessian(lambda rows: loss(rows.reshape(y.values.shape)))(rows)
    J = y.ntk.factor.dense()
    assert found.rates.max() == pytest.approx(torch.linalg.eigvalsh(J.T @ H @ J)[-1].item(), rel=1e-3)


def test_no_step_is_given_that_is_not_known() -> None:
    """Beyond what was asked for, the number is right or NaN: the slow modes were not resolved."""
    torch.manual_seed(3)
    x = torch.randn(16, 20, 1, dtype=torch.float64)
    cell, readout, target = nn.GRU(1, 24, batch_first=True).double(), nn.Linear(24, 1).double(), x.cumsum(1) / 5
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
    rates, vectors = np.linalg.eigh(2 / 320 * to_numpy(y.ntk.dense()))
    energies = (vectors.T @ to_numpy(y.values - target).reshape(-1)) ** 2 / 320
    for steps in (50, 20000):
        found, known = kp.forecast(y, target, lr=LR, steps=steps, check=False), 0
        for fraction in (0.9, 0.5, 0.3, 0.2, 0.1, 0.03):
            step = found.steps_to(fraction)
            if np.isfinite(step):
                left = np.abs(1 - LR * np.maximum(rates, 0)) ** (2 * step) @ energies
                assert left == pytest.approx(fraction * energies.sum(), rel=0.01)
                known += 1
        assert known >= 2
        every = np.geomspace(1, 1e7, 40)
        at, expected = found.at(every), np.abs(1 - LR * np.maximum(rates, 0)) ** (2 * every[:, None]) @ energies
        assert at[~np.isnan(at)] == pytest.approx(expected[~np.isnan(at)], rel=0.02)
        assert not np.isnan(at[every <= steps]).any()


def test_bad_requests() -> None:
    problem = Problem(nn.RNNCell(2, 5), 5)
    y = problem.kernel()
    with pytest.raises(ValueError, match=r"the target has shape \(4, 8\), expected finite numbers"):
        kp.forecast(y, problem.target[..., 0], lr=LR, steps=3)
    with pytest.raises(ValueError, match=r"unstable: the largest rate is .* so lr must stay below"):
        kp.forecast(y, problem.target, lr=1e3, steps=1000)
    assert kp.forecast(y, y.values, lr=LR, steps=3).loss.tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="a positive integer"):
        kp.forecast(y, problem.target, lr=LR, steps=0)
    with pytest.raises(ValueError, match=r"the mask has shape \(3,\)"):
        kp.forecast(y, problem.target, lr=LR, steps=3, mask=torch.ones(3))
    with pytest.raises(ValueError, match="a number of trials from 1 to 4"):
        kp.forecast(y, problem.target, lr=LR, steps=3, batch=5)
    with pytest.raises(ValueError, match="no targets given"):
        kp.learnability(y, {})
    with pytest.raises(TypeError, match=r"expected a Flow, as kp.linearize makes it, or flow\.output"):
        kp.forecast(y.ntk, problem.target, lr=LR, steps=3)  # pyright: ignore


def test_a_mask_and_a_flow_of_what_it_counts_agree() -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(2, 6).double(), torch.randn(3, 7, 2, dtype=torch.float64)
    flow, readout = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))), nn.Linear(6, 2).double()
    task = kp.tasks.EvidenceIntegration(fixation=2, stimulus=3, response=2).sample(3).mask
    mask = task & (np.arange(7) < np.array([[7], [6], [2]]))
    target = torch.randn(3, 7, 2, dtype=torch.float64).masked_fill(~torch.from_numpy(mask)[..., None], float("nan"))
    whole, part = (one.output(readout, learn=True) for one in (flow, flow.where(mask)))
    given = {"lr": 0.01, "steps": 40, "check": False}
    a, b = kp.forecast(whole, target, mask=mask, **given), kp.forecast(part, target, **given)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-9)
    kept = np.flatnonzero(np.repeat(mask.reshape(-1), 2))
    e = (whole.values - target).detach().numpy().reshape(-1)[kept]
    step = np.eye(len(kept)) - 0.01 * 2 / len(kept) * whole.ntk.dense().detach().numpy()[np.ix_(kept, kept)]
    curve = [np.mean((np.linalg.matrix_power(step, s) @ e) ** 2) for s in b.steps.astype(int)]
    np.testing.assert_allclose(b.loss, curve, rtol=1e-6)
    targets = {"all": target, "none": 0 * torch.nan_to_num(target)}
    for score in (kp.learnability, kp.core_learnability):
        one, other = score(whole, targets, mask=mask), score(part, targets)
        for name in ("score", "half", "tenth", "unreached"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-9)


def test_classes_of_what_counts() -> None:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(2, 6).double(), torch.randn(3, 5, 2, dtype=torch.float64)
    flow, readout = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))), nn.Linear(6, 3).double()
    mask = np.arange(5) < np.array([[5], [2], [4]])
    classes = torch.randint(3, (3, 5))
    whole, part = (one.output(readout, learn=True) for one in (flow, flow.where(mask)))
    given = {"lr": 0.01, "steps": 20, "check": False, "loss": "cross_entropy"}
    a, b = kp.forecast(whole, classes, mask=mask, **given), kp.forecast(part, classes, **given)
    truth = nn.functional.cross_entropy(whole.values.detach()[torch.from_numpy(mask)], classes[torch.from_numpy(mask)])
    assert float(b.loss[0]) == pytest.approx(float(truth), rel=1e-9)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_what_a_readout_keeps_frozen_does_not_learn(frozen: tuple[str, ...], optimizer: str | None) -> None:
    """The kernel is J J* of what torch gives a gradient, and the training beside it that of the gradient flow."""
    problem = Problem(nn.GRUCell(2, 6), 6)
    for name in frozen:
        getattr(problem.readout, name).requires_grad_(False)
    y = problem.kernel()
    learnt = [v for v in (*problem.cell.parameters(), *problem.readout.parameters()) if v.requires_grad]
    z, states = torch.zeros(4, 6).double(), []
    for x_t in problem.x.unbind(1):
        z = problem.cell(x_t, z)
        states.append(z)
    entries = problem.readout(torch.stack(states, 1)).reshape(-1)
    rows = [torch.autograd.grad(entry, learnt, retain_graph=True) for entry in entries]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    torch.testing.assert_close(y.ntk.dense().reshape(32, 32), J @ J.T)
    loss = kp.squared_error(problem.target, problem.readout)
    options = {"optimizer": optimizer, "lr": 0.01 if optimizer else None}
    span = 4 if optimizer else 0.04
    trained = kp.gradient_flow(kp.DiscreteProblem(problem.cell, problem.x), loss, span, **options)
    found = kp.forecast(y, problem.target, lr=0.01, steps=4, optimizer=optimizer)
    assert found.flow_loss[-1] == pytest.approx(trained(trained.time[-1]).item(), rel=1e-3)
    assert found.loss[4] == pytest.approx(trained.loss[-1], rel=0.05)
    assert not any(f"readout.{name}" in y.parts for name in frozen)


def test_a_frozen_readout_in_jax(x64: None) -> None:
    """Arrays of numpy are constants, in the kernel as in the gradient flow."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    cell, readout = eqx.nn.GRUCell(2, 4, key=jax.random.key(1)), eqx.nn.Linear(4, 1, key=jax.random.key(2))
    fixed = eqx.tree_at(lambda layer: layer.weight, readout, np.asarray(readout.weight))
    problem = kp.DiscreteProblem(cell, x)
    y = kp.linearize(kp.solve(problem)).output(fixed, learn=True)
    trained = kp.gradient_flow(problem, kp.squared_error(jnp.ones((3, 5, 1)), fixed), 0.1)
    assert y.learnt == ("bias",) and [name for name in trained.parameters if "loss" in name] == ["loss.bias"]


@pytest.mark.parametrize("optimizer", [None, "adam"])
def test_losses_without_parts_are_printed(optimizer: str | None) -> None:
    """A loss that is negative, or zero, has no half."""
    y = Problem(nn.GRUCell(2, 6), 6).kernel()
    given = {"lr": 0.01, "steps": 3, "optimizer": optimizer}
    below = kp.forecast(y, 0 * y.values.detach(), loss=lambda y, t: ((y - t) ** 2).mean() - 5.0, **given)
    assert str(below).startswith("the loss goes from -4.") and "in 3 steps" in str(below)
    with pytest.raises(ValueError, match="it has fractions where it is positive"):
        below.steps_to(0.5)
    none = kp.forecast(y, y.values.detach(), **given)
    assert str(none).startswith("the loss goes from 0 to 0 in 3 steps")


def test_steps_to_many_fractions() -> None:
    problem = Problem(nn.GRUCell(2, 6), 6)
    found = kp.forecast(problem.kernel(), problem.target, lr=np.float32(LR), steps=np.int64(300), batch=np.int64(2))
    parts = np.array([[0.9, 0.5], [0.3, 1e-3]])
    each = [[found.steps_to(part) for part in row] for row in parts]
    np.testing.assert_array_equal(found.steps_to(parts), each)
    low, high = found.interval_to([0.9, 0.5])
    np.testing.assert_array_equal(np.stack([low, high], 1), [found.interval_to(part) for part in (0.9, 0.5)])
    with pytest.raises(ValueError, match="expected 0 < fraction < 1"):
        found.steps_to([0.5, 2])


@pytest.mark.parametrize(("lr", "optimizer"), [(0.1, "sgd"), (0.1, None), (0.02, "sgd")])
def test_an_interval_holds_the_training_on_a_plateau(lr: float, optimizer: str | None) -> None:
    """Where the loss hardly falls, its times part long before it does."""
    torch.manual_seed(0)
    x, target = torch.randn(5, 7, 2).double(), 0.1 * torch.randn(5, 7, 1).double()
    cell, readout = nn.RNN(2, 12, batch_first=True).double(), nn.Linear(12, 1).double()
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
    found = kp.forecast(y, target, lr=lr, steps=round(10 / lr), optimizer=optimizer)
    descent, losses = torch.optim.SGD([*cell.parameters(), *readout.parameters()], lr=lr), []
    for _ in range(round(10 / lr)):
        descent.zero_grad()
        (loss := ((readout(cell(x)[0]) - target) ** 2).mean()).backward()
        losses.append(loss.item())
        descent.step()
    for part in (0.9, 0.7, 0.6, 0.5, 0.45):
        low, high = found.interval_to(part)
        below = int(np.argmax(np.array(losses) <= part * losses[0]))
        assert low <= below and below - 1 <= high


def no_curvature(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).abs().mean()


def detached(y: Tensor, target: Tensor) -> Tensor:
    return ((y.detach() - target) ** 2).mean()


def whole(y: Tensor, target: Tensor) -> Tensor:
    return ((y - target) ** 2).mean().round().long()


def test_losses_without_rates_or_gradients_are_refused_in_words() -> None:
    problem = Problem(nn.GRUCell(2, 6), 6)
    y = problem.kernel()
    says = {no_curvature: "no curvature.*have no rates", detached: "no curvature", whole: "expected a real floating"}
    for loss, words in says.items():
        with pytest.raises(ValueError, match=words):
            kp.learnability(y, {"target": problem.target}, loss=loss)
    found = kp.forecast(y, problem.target, lr=1e-3, steps=20, loss=no_curvature)
    assert found.loss[-1] < found.loss[0]
    with pytest.warns(UserWarning, match="hangs on none of the parameters"):
        kp.forecast(y, problem.target, lr=1e-3, steps=20, loss=detached)
