"""The parts of a loss, and when each is learnt: against dense kernels, autograd and descent of the linearised model."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import xarray as xr
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline
from scipy.special import log_softmax, softmax
from test_forecast import Classes
from torch.nn.functional import cross_entropy

import kpflow_dyn as kp
from kpflow_dyn._learning.courses import _between
from kpflow_dyn._learning.losses import output_loss
from kpflow_dyn._learning.parts import Parts, parts_of
from kpflow_dyn._learning.projections import EVERYTHING
from kpflow_dyn.models import to_jax
from kpflow_dyn.report import page_of
from kpflow_dyn.tasks import TaskData

TRIALS, TIMES, OUTPUTS = 4, 6, 3
RNG = np.random.default_rng(0)
X, TARGET = RNG.standard_normal((TRIALS, TIMES, 2)), RNG.standard_normal((TRIALS, TIMES, OUTPUTS))
CLASSES = RNG.integers(0, OUTPUTS, (TRIALS, TIMES))
MASK = np.arange(TIMES)[None] < np.array([[6], [5], [4], [3]])


def network(units: int = 8) -> tuple[torch.nn.GRUCell, torch.nn.Linear]:
    torch.manual_seed(0)
    return torch.nn.GRUCell(2, units).double(), torch.nn.Linear(units, OUTPUTS).double()


@pytest.fixture(scope="module")
def output() -> kp.Output:
    cell, readout = network()
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X)))).output(readout, learn=True)


@pytest.fixture(scope="module")
def kernel(output: kp.Output) -> np.ndarray:
    return output.ntk.dense().numpy()


def parts(output: kp.Output, loss: Any, target: Any, mask: Any = None, names: tuple[str, ...] = ()) -> Parts:
    return parts_of(output, output_loss(loss, target, mask, output.values), names)


def first_below(tau: np.ndarray, losses: np.ndarray, part: float) -> float:
    below = np.flatnonzero(losses <= part * losses[0])
    return float(tau[below[0]]) if below.size else np.inf


@pytest.mark.parametrize("mask", [None, MASK])
def test_squared_errors_decay_as_by_the_dense_kernel(output, kernel, mask) -> None:
    found = parts(output, "squared_error", TARGET, mask, ("a", "b", "c"))
    m = np.broadcast_to(np.ones((TRIALS, TIMES)) if mask is None else mask, (TRIALS, TIMES))[..., None] * np.ones(
        OUTPUTS
    )
    root = (2 * m / m.sum()).ravel() ** 0.5
    values, vectors = np.linalg.eigh(root[:, None] * kernel * root)
    f = root * (output.values.detach().numpy() - TARGET).ravel()
    assert found.names[:4] == (EVERYTHING, "a", "b", "c")
    assert found.largest_rate == pytest.approx(values[-1], rel=1e-6)

    def at(tau: float) -> np.ndarray:
        moved = (vectors * np.exp(-values * tau)) @ vectors.T @ f
        return (moved.reshape(-1, OUTPUTS) ** 2 / 2).sum(0)

    start = at(0.0)
    np.testing.assert_allclose(found.loss[:4], [start.sum(), *start], rtol=1e-10)
    shown = found.course.shown
    for tau, curve in zip(shown.time[::20], shown.curve.T[::20], strict=True):
        np.testing.assert_allclose(curve[:4], [at(tau).sum() / start.sum(), *(at(tau) / start)], rtol=1e-2, atol=1e-5)
    grid = np.geomspace(1e-4, 1e6, 20000)
    lines = np.array([at(tau) for tau in grid]).T
    for i, line in enumerate([lines.sum(0), *lines]):
        if np.isfinite(found.half[i]):
            assert found.half[i] == pytest.approx(first_below(grid, line, 0.5), rel=1e-2)


def test_a_part_alone_is_learnt_as_learnability_says(output) -> None:
    found = parts(output, "squared_error", TARGET)
    error = output.values.detach().numpy() - TARGET
    alone = kp.learnability(output, {str(i): error * np.eye(OUTPUTS)[i] for i in range(OUTPUTS)}, errors=True)
    np.testing.assert_allclose(found.unreached[1:4], alone.unreached, atol=1e-2)
    order = np.argsort(found.alone[1:4])
    assert (order == np.argsort(alone.half)).all()


def test_parts_of_classes_are_the_users_own_loss(output) -> None:
    found = parts(output, "cross_entropy", CLASSES, MASK, ("fixation", "left", "right"))
    y, mask = output.values.detach(), torch.from_numpy(MASK)
    target = torch.from_numpy(CLASSES)
    each = cross_entropy(y.flatten(0, 1), target.flatten(), reduction="none").reshape(TRIALS, TIMES)
    right = y.argmax(-1) == target
    np.testing.assert_allclose(found.loss[0], each[mask].mean(), rtol=1e-10)
    for number in range(OUTPUTS):
        here = mask & (target == number)
        np.testing.assert_allclose(found.loss[1 + number], each[here].sum() / mask.sum(), rtol=1e-10)
        assert found.accuracy[1 + number] == pytest.approx(right[here].double().mean().item())
    assert found.names[:4] == (EVERYTHING, "fixation", "left", "right")
    np.testing.assert_allclose(found.share[1:4].sum(), 1)
    np.testing.assert_allclose(found.share[4:].sum(), 1)  # so do principal components


@pytest.mark.parametrize(("loss", "target"), [("squared_error", TARGET), ("cross_entropy", CLASSES)])
def test_the_error_of_everything_is_the_gradient(output, kernel, loss: str, target: np.ndarray) -> None:
    y = output.values.detach().requires_grad_()
    (g,) = torch.autograd.grad(output_loss(loss, target, MASK, y)(y), y)
    g = g.numpy().ravel()
    found = parts(output, loss, target, MASK)
    assert found.obstacles.rate[0] == pytest.approx(g @ kernel @ g / (g @ g), rel=1e-10)
    np.testing.assert_allclose(found.reach.sum((1, 2)), found.obstacles.rate, rtol=1e-10)
    by_place = (g * (kernel @ g) / (g @ g)).reshape(TRIALS, TIMES, OUTPUTS).sum(-1)
    np.testing.assert_allclose(found.reach[0], by_place, rtol=1e-8, atol=1e-12)


def test_cross_entropy_of_the_linearised_model(output, kernel) -> None:
    """The gradient flow of y' = -ntk grad L itself, beside the halves of each class."""
    found = parts(output, "cross_entropy", CLASSES)
    one_hot, start = np.eye(OUTPUTS)[CLASSES.ravel()], output.values.detach().numpy().ravel()

    def slope(_tau: float, y: np.ndarray) -> np.ndarray:
        p = softmax(y.reshape(-1, OUTPUTS), 1)
        return -kernel @ ((p - one_hot) / len(p)).ravel()

    tau = np.append(0, np.geomspace(1e-2, 1e6, 2000) / found.largest_rate)
    path = solve_ivp(slope, (0, tau[-1]), start, "LSODA", tau, rtol=1e-6).y.T.reshape((len(tau), -1, OUTPUTS))
    losses = -(one_hot * log_softmax(path, -1)).sum(-1)
    by_class = [losses.sum(1), *(losses[:, CLASSES.ravel() == number].sum(1) for number in range(OUTPUTS))]
    for part, times in ((0.5, found.half), (0.1, found.tenth)):
        measured = np.array([first_below(tau, line, part) for line in by_class])
        assert np.isfinite(measured).all()
        np.testing.assert_allclose(times[:4], measured, rtol=2e-2)
    of_components = [np.interp(measured[0], found.course.time, curve) for curve in found.course.curve[4:]]
    assert of_components @ found.share[4:] == pytest.approx(0.1, rel=2e-2)  # they add up to the whole, at any time
    forecast = kp.forecast(output, CLASSES, lr=1.0, steps=int(1.1 * found.tenth[0]), loss="cross_entropy", check=False)
    np.testing.assert_allclose([found.half[0], found.tenth[0]], [forecast.steps_to(p) for p in (0.5, 0.1)], rtol=1e-2)


def test_a_function_of_ones_own(output) -> None:
    target = torch.from_numpy(TARGET)
    own = parts(output, lambda y, target: ((y - target) ** 2).mean(), target)
    known = parts(output, "squared_error", TARGET)
    np.testing.assert_allclose(own.loss, known.loss, rtol=1e-10)
    np.testing.assert_allclose(own.half, known.half, rtol=1e-2)  # by a flow, where the squared error has its modes
    with pytest.raises(ValueError, match="it must be positive"):
        parts(output, lambda y, target: -(y**2).mean(), target)


def test_places_that_do_not_count_have_no_part() -> None:
    cell, readout = network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X))))
    target = np.where(MASK[..., None], TARGET, np.nan)
    whole, masked = (
        parts(f.output(readout, learn=True), "squared_error", target, MASK) for f in (flow, flow.where(MASK))
    )
    np.testing.assert_allclose(masked.half, whole.half, rtol=1e-6)
    assert np.isnan(masked.reach[:, ~MASK]).all() and (whole.reach[:, ~MASK] == 0).all()
    np.testing.assert_allclose(masked.reach[:, MASK], whole.reach[:, MASK], rtol=1e-8, atol=1e-12)


def test_one_output_has_components_over_times() -> None:
    cell, _ = network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X))))
    found = parts(flow.output(torch.ones(1, 8).double() / 3), "squared_error", TARGET[..., :1])
    assert found.names == (EVERYTHING, *(f"error PC {i + 1}" for i in range(4)))
    error = flow.solution.state.detach().numpy().sum(-1) / 3 - TARGET[..., 0]
    s = np.linalg.svd(error, compute_uv=False)
    np.testing.assert_allclose(found.share[1:], s**2 / (s**2).sum(), rtol=1e-8)


def test_nothing_is_left_to_be_learnt(output) -> None:
    with pytest.raises(ValueError, match="at its least already"):
        parts(output, "squared_error", output.values.detach().numpy())


def test_lazy_networks_take_these_times() -> None:
    """Steps of real descent on the cross-entropy to half of the whole."""
    lazy = Classes("torch")
    y = lazy.flow.output(lazy.readout, learn=True)
    found = parts(y, "cross_entropy", lazy.right)
    steps = int(1.3 * found.half[0] / lazy.lr)
    losses = lazy.descend(steps)
    half = int(np.flatnonzero(losses <= 0.5 * losses[0])[0])
    assert found.loss[0] == pytest.approx(losses[0], rel=1e-10)
    assert found.half[0] / lazy.lr == pytest.approx(half, rel=0.05) and half > 30


def test_soft_targets_have_a_least_loss(output) -> None:
    """The whole is the loss itself, as it is reported; its parts are what is above its least."""
    soft = 0.8 * np.eye(OUTPUTS)[CLASSES] + 0.2 / OUTPUTS
    found = parts(output, "cross_entropy", soft)
    least = -(soft[0, 0] * np.log(soft[0, 0])).sum()
    whole = float(output_loss("cross_entropy", soft, None, output.values)(output.values))
    np.testing.assert_allclose(found.loss[1:4].sum(), whole - least, rtol=1e-8)
    np.testing.assert_allclose(
        found.course.curve[0], (least + found.course.curve[1:4].T @ found.loss[1:4]) / whole, rtol=2e-3
    )


def task(**changes: Any) -> TaskData:
    given = {"inputs": X, "targets": TARGET, "outputs": ("left", "right", "up"), "dt": 20.0} | changes
    return TaskData(**given)


@pytest.fixture(scope="module")
def dataset() -> xr.Dataset:
    cell, readout = network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X))))
    return kp.analyze(flow, k=2, samples=40, task=task(mask=MASK), readout=readout)


def test_the_dataset_answers_first(dataset, output) -> None:
    expected = parts(output, "squared_error", TARGET, MASK, ("left", "right", "up"))
    assert next(iter(dataset.data_vars)) == "loss" and dataset.attrs["loss"] == "squared_error"
    assert dataset.part.values.tolist()[:4] == [EVERYTHING, "left", "right", "up"]
    assert float(dataset.loss) == pytest.approx(expected.loss[0])
    np.testing.assert_allclose(dataset.part_half, expected.half, rtol=1e-6)
    assert dataset.part_reach.dims == ("part", "trial", "time")


def test_the_page_shows_it_first(dataset, tmp_path) -> None:
    page = page_of(dataset)
    assert page.lead[0].startswith(f"The loss is {float(dataset.loss):.3g} (squared error)")
    table = page.tables[0]
    assert table.title == "What will be learnt" and [row[0] for row in table.rows] == dataset.part.values.tolist()
    predicted, reach = table.charts
    (everything, *_) = predicted.views[(0,)].data
    np.testing.assert_allclose(everything.y, dataset.part_curve.values[0], rtol=1e-6)
    np.testing.assert_allclose(reach.views[0, 1].data[0].y, np.nansum(dataset.part_reach.values[0], 0), rtol=1e-5)
    html = page.to_html()
    assert html.index("What will be learnt") < html.index('id="predicted_loss"') < html.index('id="numbers"')
    dataset.to_netcdf(tmp_path / "results.nc", engine="h5netcdf")
    again = xr.open_dataset(tmp_path / "results.nc", engine="h5netcdf")
    assert again.part_words.values.tolist() == dataset.part_words.values.tolist()


def test_the_loss_is_that_of_the_task() -> None:
    cell, readout = network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X))))
    of_classes = task(targets=np.eye(OUTPUTS)[CLASSES], labels={"class": CLASSES})
    found = kp.analyze(flow, k=2, samples=40, task=of_classes, readout=readout)
    y = readout(flow.solution.state).detach()
    target = torch.from_numpy(CLASSES)
    assert float(found.loss) == pytest.approx(cross_entropy(y.flatten(0, 1), target.flatten()).item())
    assert float(found.accuracy) == pytest.approx((y.argmax(-1) == target).double().mean().item())
    assert "accuracy" in page_of(found).lead[0]
    plain = kp.analyze(flow, k=2, samples=40, task=of_classes, readout=readout, loss="squared_error")
    assert float(plain.loss) == pytest.approx(((y - torch.from_numpy(np.eye(OUTPUTS)[CLASSES])) ** 2).mean().item())


@pytest.mark.parametrize("given", [{"readout": network()[1]}, {"loss": "squared_error", "task": task()}])
def test_half_of_what_is_needed_is_refused(given: dict[str, Any]) -> None:
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(network()[0], torch.from_numpy(X))))
    with pytest.raises(ValueError, match="needs both a readout and a task with targets"):
        kp.analyze(flow, k=2, samples=40, **given)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("loss", "target"), [pytest.param("squared_error", TARGET, marks=pytest.mark.slow), ("cross_entropy", CLASSES)]
)
def test_jax_gives_the_same(loss: str, target: np.ndarray) -> None:
    cell, readout = torch.nn.RNNCell(2, 8, bias=False).double(), network()[1]
    problems = kp.DiscreteProblem(cell, torch.from_numpy(X)), kp.DiscreteProblem(to_jax(cell), jnp.asarray(X))
    layers = readout, to_jax(readout)
    flows = [kp.linearize(kp.solve(problem)) for problem in problems]
    outputs = [flow.output(layer, learn=True) for flow, layer in zip(flows, layers, strict=True)]
    options = {"training": {"optimizer": "adam", "lr": 1e-2, "steps": 200, "progress": False}}
    ours, found = (parts_of(one, output_loss(loss, target, MASK, one.values), **options) for one in outputs)
    assert ours.names == found.names
    variables = ours.variables(), found.variables()
    for name in ("optimizer_steps", "optimizer_latest", "optimizer_half"):
        theirs, these = (np.array(one[name][1]) for one in variables)
        np.testing.assert_allclose(these, theirs, rtol=1e-3)
        assert np.isfinite(these[0])
    for name in ("loss", "alone", "reach"):
        np.testing.assert_allclose(getattr(found, name), getattr(ours, name), rtol=1e-6, atol=1e-10)
    # times on a flow that is followed to 1%, whose step lengths in its stiff part hang on round-off
    np.testing.assert_allclose(found.half, ours.half, rtol=1e-3)


class Field(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 3).double()

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(z))


def test_of_an_ode_losses_are_integrals() -> None:
    torch.manual_seed(0)
    field, z0, t = Field(), torch.randn(2, 3).double(), np.linspace(0, 1, 9)
    problem = kp.ODEProblem(field, z0, t)
    given = TaskData(np.zeros((2, 9, 1)), targets=np.ones((2, 9, 2)))
    readout = torch.nn.Linear(3, 2).double()
    flow = kp.linearize(kp.solve(problem))
    found = kp.analyze(flow, k=2, samples=40, task=given, readout=readout)
    error = (readout(flow.solution.state).detach().numpy() - 1) ** 2
    assert float(found.loss) == pytest.approx(np.trapezoid(error, t, axis=1).mean(), rel=1e-10)
    assert float(found.part_half[0]) > 0


# Training by an optimiser


def of_classes() -> TaskData:
    return task(targets=np.eye(OUTPUTS)[CLASSES], labels={"class": CLASSES}, mask=MASK)


def trained(lr: float, steps: int, make: Any = torch.optim.Adam) -> np.ndarray:
    """Losses [step, 1 + class] of everything and at the places of each class, by torch's own optimiser."""
    cell, readout = network()
    parameters, losses, target = [*cell.parameters(), *readout.parameters()], [], torch.from_numpy(CLASSES)
    optimizer, mask, x = make(parameters, lr=lr), torch.from_numpy(MASK), torch.from_numpy(X)
    for _ in range(steps + 1):
        z, states = torch.zeros(TRIALS, 8).double(), []
        for t in range(TIMES):
            z = cell(x[:, t], z)
            states.append(z)
        y = readout(torch.stack(states, 1))
        each = cross_entropy(y.flatten(0, 1), target.flatten(), reduction="none").reshape(TRIALS, TIMES) * mask
        losses.append([each.sum().item(), *(each[target == number].sum().item() for number in range(OUTPUTS))])
        optimizer.zero_grad()
        each.sum().div(mask.sum()).backward()
        optimizer.step()
    return np.array(losses)


def analyzed(**given: Any) -> xr.Dataset:
    cell, readout = network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X))))
    return kp.analyze(flow, k=2, samples=40, task=of_classes(), readout=readout, **given)


@pytest.fixture(scope="module")
def by_adam() -> xr.Dataset:
    return analyzed(optimizer="adam", lr=1e-2)


def test_steps_of_adam_are_those_of_torch(by_adam) -> None:
    losses = trained(1e-2, 300)
    ratio = losses / losses[0]
    for fraction in (0.5, 0.2, 0.1):
        found = by_adam.sel(fraction=fraction)
        steps = np.flatnonzero(ratio[:, 0] <= fraction)[0]
        assert float(found.optimizer_earliest) < steps < float(found.optimizer_latest)
        assert float(found.optimizer_steps) == pytest.approx(steps, rel=0.05)
    known = by_adam.step.values.astype(int)
    np.testing.assert_allclose(by_adam.optimizer_curve[:4], ratio[known].T, atol=0.02)
    from_half_on = [1 + np.flatnonzero(line[: known[-1] + 1] > 0.5)[-1] for line in ratio.T]
    np.testing.assert_allclose(by_adam.optimizer_half[:4], from_half_on, rtol=0.05)
    whole = by_adam.part_share[1:4].values @ by_adam.optimizer_curve[1:4].values
    np.testing.assert_allclose(whole, by_adam.optimizer_curve[0], rtol=1e-6)  # the classes add up to it at any step


def test_they_are_those_of_gradient_flow(by_adam) -> None:
    cell, readout = network()
    loss = kp.cross_entropy(torch.from_numpy(CLASSES), readout, torch.from_numpy(MASK))
    problem = kp.DiscreteProblem(cell, torch.from_numpy(X))
    flow = kp.gradient_flow(problem, loss, 1000, optimizer="adam", lr=1e-2, stop_below=0.05)
    fractions = by_adam.fraction.values
    np.testing.assert_allclose(by_adam.optimizer_steps, [flow.time_to(part) for part in fractions], rtol=1e-6)
    bounds = np.array([flow.interval_to(part) for part in fractions])
    np.testing.assert_allclose(by_adam.optimizer_earliest, bounds[:, 0], rtol=1e-6)
    np.testing.assert_allclose(by_adam.optimizer_latest, bounds[:, 1], rtol=1e-6)
    assert by_adam.attrs["optimizer_road"] == flow.road and by_adam.attrs["optimizer"] == "adam (lr 0.01)"
    assert float(by_adam.optimizer_half[0]) == pytest.approx(flow.time_to(0.5), rel=1e-3)  # it does not rise again


def test_a_training_says_that_it_is_one() -> None:
    """At a rate at which the loss rises all steps are Adam's own."""
    found = analyzed(optimizer=torch.optim.Adam, lr=0.3, steps=40)
    ratio = trained(0.3, 40)[:, 0]
    assert "this is a training, no forecast" in found.attrs["optimizer_road"]
    assert found.attrs["optimizer"] == "Adam (lr 0.3)"
    steps = found.step.values.astype(int)
    np.testing.assert_allclose(found.optimizer_curve[0], ratio[steps] / ratio[0], rtol=1e-8)


def test_what_takes_more_steps_is_said_so(by_adam) -> None:
    found = analyzed(optimizer="adam", lr=1e-2, clip=1.0, steps=60)
    assert np.isfinite(found.optimizer_steps[0]) and np.isnan(found.optimizer_steps[1:]).all()
    page = page_of(found)
    assert "20% and 10% not within 60 steps" in page.lead[0] and "adam (lr 0.01, clip 1)" in page.lead[0]
    assert page.tables[0].rows[0][page.tables[0].header.index("Tenth for good, steps of adam")] == "> 60"
    assert f"50% after {float(found.optimizer_steps[0]):.3g} steps" in page.lead[0]
    assert found.attrs["optimizer_road"] in page.lead[0] and "under the kernel as it is" in page.lead[1]
    (chart, _) = page_of(by_adam).tables[0].charts
    assert chart.choices[0].options[0] == "adam (lr 0.01)"
    np.testing.assert_allclose(chart.views[0, 0].data[0].y, by_adam.optimizer_curve[0], rtol=1e-6)
    np.testing.assert_allclose(chart.views[1, 0].data[0].y, by_adam.part_curve[0], rtol=1e-6)


def test_the_price_is_said_beforehand() -> None:
    said: list[tuple[str, float]] = []
    found = analyzed(optimizer="adam", lr=1e-2, progress=lambda stage, done, total: said.append((stage, done)))
    (stage, *_) = [stage for stage, done in said if stage.startswith("adam") and done == 0]
    assert stage == "adam, at most 1102 gradients, where training takes 1000"
    assert max(done for name, done in said if name == stage) == found.step[-1]


def test_without_an_optimizer_a_line_says_how_to_ask(dataset) -> None:
    assert "--optimizer adam --lr 1e-3" in page_of(dataset).lead[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 0.1}, "lr is for an optimizer"),
        ({"optimizer": "adam"}, "needs lr="),
        ({"optimizer": "adan", "lr": 0.1}, "expected one of"),
        ({"optimizer": "adam", "lr": 0.1, "steps": 0}, "span is 0"),
    ],
)
def test_what_does_not_fit_an_optimizer_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyzed(**given)


def test_an_optimizer_needs_a_task_and_no_metric() -> None:
    cell, readout = network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(X))))
    with pytest.raises(ValueError, match="needs both a readout and a task with targets"):
        kp.analyze(flow, k=2, samples=40, optimizer="adam", lr=0.1)
    rates = kp.LearningRates({name: 0.5 for name in flow.parameters})
    weighted = kp.linearize(flow.solution, metric=rates)
    with pytest.raises(ValueError, match="has its own metric"):
        kp.analyze(weighted, k=2, samples=40, task=task(), readout=readout, optimizer="adam", lr=0.1)


@pytest.mark.parametrize("t", [np.linspace(0, 1, 9), (0.0, 1.0)])
def test_an_ode_trains_by_an_optimizer(t: Any) -> None:
    torch.manual_seed(0)
    flow = kp.linearize(kp.solve(kp.ODEProblem(Field(), torch.randn(2, 3).double(), t)))
    times, readout = flow.solution.state.shape[1], torch.nn.Linear(3, 2).double()
    given = TaskData(np.zeros((2, times, 1)), targets=np.ones((2, times, 2)))
    found = kp.analyze(flow, k=2, samples=40, task=given, readout=readout, optimizer="sgd", lr=0.1)
    assert float(found.optimizer_steps[0]) * 0.1 == pytest.approx(float(found.part_half[0]), rel=0.3)


def test_shares_between_looks_add_up_and_stay_positive() -> None:
    """Also where a part jumps, so that a spline would swing below zero."""
    one = np.array([0.3, 0.31, 0.02, 0.9, 0.01, 0.3, 0.33, 0.35, 0.36])
    shares, places = np.stack([one, 1 - one], 1), np.log(np.arange(1.0, 10))
    at = np.log(np.linspace(1, 9, 200))
    assert CubicSpline(places, one)(at).min() < 0
    found = _between(at, places, shares)
    assert found.min() >= 0
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(_between(places, places, shares), shares, atol=1e-12)
    fine = _between(np.linspace(0, places[-1], 20000), places, shares)
    assert np.abs(np.diff(fine, axis=0)).max() < 0.01  # a line changes to a spline at a look alone
    smooth = np.exp(-places)[:, None]
    np.testing.assert_allclose(_between(at, places, smooth), np.exp(-at)[:, None], rtol=5e-3)
