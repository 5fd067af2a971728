"""Training by optimisers, and forecasts of it, beside trainings by hand."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import cases

import kpflow_dyn as kp
from kpflow_dyn._learning.descent import name_of
from kpflow_dyn.solvers import Multirate

pytestmark = pytest.mark.usefixtures("x64")


def task():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 12, 1, generator=generator, dtype=torch.float64)
    return x, x.cumsum(1) / 4


def network(kind=torch.nn.GRU, units=8):
    torch.manual_seed(2)
    return kind(1, units, batch_first=True).double(), torch.nn.Linear(units, 1).double()


def trained(make, steps, clip=None, batch=None, kind=torch.nn.GRU, seed=0):
    """The loss of all trials after each step of torch's own optimiser, and the parameters at the end."""
    (x, y), (cell, readout) = task(), network(kind)
    parameters, rng, losses = [*cell.parameters(), *readout.parameters()], np.random.default_rng(seed), []
    optimizer = make(parameters)
    for step in range(steps + 1):
        loss = ((readout(cell(x)[0]) - y) ** 2).mean()
        losses.append(loss.item())
        if step == steps:
            break
        if batch is not None:
            drawn = rng.choice(len(x), batch, replace=False)
            loss = ((readout(cell(x[drawn])[0]) - y[drawn]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return np.array(losses), dict(cell.named_parameters())


def posed(kind=torch.nn.GRU):
    (x, y), (cell, readout) = task(), network(kind)
    return kp.DiscreteProblem(cell, x), kp.squared_error(y, readout)


def step_below(losses, part):
    """The step at which the loss is this part of the first, linear between steps."""
    after = int(np.argmax(losses <= part * losses[0]))
    return after - (part * losses[0] - losses[after]) / (losses[after - 1] - losses[after])


OWN = {
    "adam": (torch.optim.Adam, 3e-3, None),
    "adam, clipped": (torch.optim.Adam, 3e-3, 0.05),
    "adamw": (partial(torch.optim.AdamW, weight_decay=0.1), 3e-3, None),
    "momentum": (partial(torch.optim.SGD, momentum=0.9), 0.02, None),
    "rmsprop": (torch.optim.RMSprop, 1e-3, None),
}


@pytest.mark.parametrize(("make", "lr", "clip"), OWN.values(), ids=OWN)
def test_steps_of_an_optimiser_one_by_one_are_those_of_training(make, lr, clip):
    losses, parameters = trained(lambda those: make(those, lr=lr), 30, clip)
    found = kp.gradient_flow(*posed(), 30, optimizer=make, lr=lr, clip=clip, alg=Multirate(longest=1))
    np.testing.assert_allclose(found(np.arange(31)), losses, rtol=1e-9)
    torch.testing.assert_close(found.parameters["weight_hh_l0"][-1], parameters["weight_hh_l0"].detach())
    assert found.own == 30 and found.interval_to(0.98)[1] == found.time_to(0.98) + 0.5


@pytest.mark.parametrize("kind", [torch.nn.GRU, partial(torch.nn.RNN, nonlinearity="relu")])
@pytest.mark.parametrize("name", cases(["adam", "adamw", "momentum"], {"adamw", "momentum"}))
def test_times_of_an_optimiser_are_those_of_training_for_fewer_gradients(name, kind):
    make, lr, _clip = OWN[name]
    lr = lr / 4
    losses, _ = trained(lambda those: make(those, lr=lr), 1500, kind=kind)
    problem, loss = posed(kind)
    found = kp.gradient_flow(problem, loss, 1500, optimizer=make, lr=lr, stop_below=0.2)
    for part in (0.5, 0.25):
        low, high = found.interval_to(part)
        true = step_below(losses, part)
        assert low <= true <= high
        assert abs(found.time_to(part) / true - 1) < 0.05
    assert found.cost < 0.75 * found.time[-1]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_where_the_clip_of_descent_binds_steps_are_its_own(momentum):
    make = partial(torch.optim.SGD, momentum=momentum)
    lr, clip = 0.2 * (1 - momentum), 0.05
    losses, _ = trained(lambda those: make(those, lr=lr), 120, clip)
    found = kp.gradient_flow(*posed(), 120, optimizer=make, lr=lr, clip=clip)
    np.testing.assert_allclose(found(np.arange(121)), losses[:121], rtol=1e-6)
    assert found.own == 120 and "training" in str(found)


def test_a_run_that_is_to_stop_at_a_loss_stops_where_it_dips_below():
    net, x = torch.nn.Linear(1, 1, bias=False).double(), torch.ones(1, 1).double()
    torch.nn.init.zeros_(net.weight)
    make = partial(torch.optim.SGD, momentum=0.997)  # it jumps from side to side, and each time elsewhere
    options = {"optimizer": make, "lr": 1.9, "stop_below": 1e-4}
    flow = kp.gradient_flow(kp.StaticProblem(net, x), lambda y: ((y - 1) ** 2).mean(), 3000, **options)
    assert flow.time_to(1e-4) > 200 and flow.time[-1] <= 1.02 * np.ceil(flow.time_to(1e-4)) + 1


def test_mini_batches_are_those_of_training():
    losses, _ = trained(lambda those: torch.optim.Adam(those, lr=3e-3), 60, batch=3, seed=5)
    found = kp.gradient_flow(*posed(), 60, optimizer="adam", lr=3e-3, batch=3, seed=5)
    np.testing.assert_allclose(found.loss, losses[found.time.astype(int)], rtol=1e-9)
    assert found.own == 60 and found.cost < 30


def test_plain_descent_is_followed_in_its_own_steps():
    losses, _ = trained(lambda those: torch.optim.SGD(those, lr=0.01), 2000)
    found = kp.gradient_flow(*posed(), 2000, optimizer="sgd", lr=0.01, stop_below=0.3)
    for part in (0.7, 0.5):
        assert abs(found.time_to(part) / step_below(losses, part) - 1) < 0.03
    assert found.cost < 0.5 * found.time[-1]


def test_an_optimiser_of_the_user_goes_on_and_is_left_alone():
    (x, y), (cell, readout) = task(), network()
    optimizer = torch.optim.Adam([*cell.parameters(), *readout.parameters()], lr=3e-3)
    for _ in range(5):
        optimizer.zero_grad()
        ((readout(cell(x)[0]) - y) ** 2).mean().backward()
        optimizer.step()
    losses, _ = trained(lambda those: torch.optim.Adam(those, lr=3e-3), 25)
    loss = kp.squared_error(y, readout)
    found = kp.gradient_flow(kp.DiscreteProblem(cell, x), loss, 20, optimizer=optimizer, alg=Multirate(longest=1))
    np.testing.assert_allclose(found(np.arange(21)), losses[5:], rtol=1e-9)
    assert all(state["step"] == 5 for state in optimizer.state.values())
    only = torch.optim.Adam(cell.parameters(), lr=3e-3)
    with pytest.raises(ValueError, match=r"without \['loss.weight', 'loss.bias'\]"):
        kp.gradient_flow(kp.DiscreteProblem(cell, x), loss, 20, optimizer=only)


@pytest.mark.parametrize(("mine", "theirs", "lr"), [("adam", "adam", 3e-3), ("sgd", "sgd", 0.01)])
def test_both_frameworks_agree(mine, theirs, lr):
    (x, y), readout = task(), network()[1]
    torch.manual_seed(3)
    cell = kp.models.CTRNNCell(1, 8).double()  # one bias in both frameworks
    twin = kp.models.to_jax(cell)
    linear = kp.models.to_jax(readout)
    x_jax, y_jax = jnp.asarray(x.numpy()), jnp.asarray(y.numpy())
    options = {"lr": lr, "alg": Multirate(longest=1) if mine == "adam" else None}
    first = kp.gradient_flow(kp.DiscreteProblem(cell, x), kp.squared_error(y, readout), 40, optimizer=mine, **options)
    second = kp.gradient_flow(
        kp.DiscreteProblem(twin, x_jax), kp.squared_error(y_jax, linear), 40, optimizer=theirs, **options
    )
    np.testing.assert_allclose(first(np.arange(41)), second(np.arange(41)), rtol=1e-7)
    drawn = [
        kp.gradient_flow(problem, loss, 20, optimizer="adam", lr=lr, batch=3)
        for problem, loss in (
            (kp.DiscreteProblem(cell, x), kp.squared_error(y, readout)),
            (kp.DiscreteProblem(twin, x_jax), kp.squared_error(y_jax, linear)),
        )
    ]
    np.testing.assert_allclose(drawn[0].loss, drawn[1].loss, rtol=1e-7)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.1}, "lr is for an optimizer"),
        ({"optimizer": "adm", "lr": 0.1}, "expected one of adam, adamw, rmsprop, sgd"),
        ({"optimizer": "adam", "lr": -1.0}, "expected a positive number"),
        ({"optimizer": "adam"}, "needs lr="),
        ({"optimizer": "adam", "lr": 0.1, "batch": 9}, "a number of trials from 1 to 8"),
        ({"optimizer": "adam", "lr": 0.1, "clip": -1.0}, "clip is -1.0, expected a positive number"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)]), "lr": 0.1}, "has its own learning rate; leave out lr"),
        ({"optimizer": "adam", "lr": 0.1, "span": 10.5}, "expected a whole number of the optimizer's steps"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        kp.gradient_flow(*posed(), **{"span": 10} | options)


def test_mini_batches_that_cannot_be_drawn_are_refused():
    problem, _loss = posed()
    with pytest.raises(ValueError, match=r"called as loss\(states of some trials, their numbers\)"):
        kp.gradient_flow(problem, lambda states: (states**2).mean(), 10, optimizer="adam", lr=0.1, batch=2)
    net, x, target = linear_network("torch")
    with pytest.raises(ValueError, match="mini-batches of trials are for a DiscreteProblem"):
        options = {"optimizer": "adam", "lr": 0.1, "batch": 2}
        kp.gradient_flow(kp.StaticProblem(net, x), kp.squared_error(target), 10, **options)


@pytest.mark.parametrize("given", [3, lambda parameters, lr=0.1: None, optax.adam(0.1)])
def test_what_is_no_optimiser_is_refused(given):
    with pytest.raises(TypeError, match=r"expected a name, one of torch\.optim, or what makes one"):
        kp.gradient_flow(*posed(), 10, optimizer=given)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("adam", "adam"),
        (torch.optim.SGD, "SGD"),
        (optax.adam(0.1), "your optimiser"),
        (lambda lr: None, "your optimiser"),
    ],
)
def test_an_optimiser_is_called_as_its_user_calls_it(given, name):
    assert name_of(given) == name


@pytest.mark.parametrize(("name", "lr", "batch"), [("sgd", 1e3, None), ("adam", 1e200, None), ("sgd", 1e3, 2)])
def test_training_that_diverges_says_so(name, lr, batch):
    with pytest.raises(RuntimeError, match="training diverges; take a smaller lr, or clip"):
        kp.gradient_flow(*posed(torch.nn.RNN), 300, optimizer=name, lr=lr, batch=batch)


def test_a_loss_at_its_least_stays_there():
    problem, _loss = posed()
    for options in ({}, {"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adam", "lr": 0.1}):
        found = kp.gradient_flow(problem, lambda states: (0 * states**2).sum(), 10, **options)
        assert (found.loss == 0).all() and found.time[-1] == 10
        assert str(found).startswith("the loss goes from 0 to 0")


def test_a_frozen_readout_does_not_learn():
    (x, y), (cell, readout) = task(), network()
    readout.bias.requires_grad_(False)
    loss = kp.squared_error(y, readout)
    found = kp.gradient_flow(kp.DiscreteProblem(cell, x), loss, 5, optimizer="adam", lr=0.1)
    assert "loss.weight" in found.parameters and "loss.bias" not in found.parameters


@pytest.mark.parametrize("options", [{"history": 0}, {"longest": 0}, {"calm": 0}])
def test_options_of_steps_below_one_are_refused(options):
    with pytest.raises(ValueError, match="expected options of at least one"):
        Multirate(**options)


# Under a frozen kernel


def linear_network(framework):
    """A network that is linear in its parameters, so that its kernel does not change."""
    generator = torch.Generator().manual_seed(4)
    x, target = (torch.randn(12, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    torch.manual_seed(5)
    net = torch.nn.Linear(5, 3).double()
    if framework == "torch":
        return net, x, target
    return kp.models.to_jax(net), jnp.asarray(x.numpy()), jnp.asarray(target.numpy())


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize(("name", "lr"), [("adam", 0.01), ("adamw", 0.01), ("rmsprop", 0.003)])
def test_a_forecast_of_a_linear_model_is_its_training(framework, name, lr):
    net, x, target = linear_network(framework)
    y = kp.linearize(kp.solve(kp.StaticProblem(net, x)))
    found = kp.forecast(y, target, optimizer=name, lr=lr, steps=200)
    options = {"optimizer": name, "lr": lr, "alg": Multirate(longest=1)}
    true = kp.gradient_flow(kp.StaticProblem(net, x), kp.squared_error(target), 200, **options)
    np.testing.assert_allclose(found.loss[:5], true(found.steps[:5]), rtol=1e-9)
    np.testing.assert_allclose(found.loss, true(found.steps), rtol=0.03)
    assert found.holds_until == np.inf and not np.isnan(found.interval_to(0.9)[0])


def test_a_readout_takes_its_part_in_a_forecast_by_an_optimiser():
    (x, y), (cell, readout) = task(), network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
    make = partial(torch.optim.AdamW, weight_decay=3.0)  # which knows the weights themselves
    found = kp.forecast(flow, y, optimizer=make, lr=1e-5, steps=5)
    losses, _ = trained(lambda those: make(those, lr=1e-5), 5)
    np.testing.assert_allclose(found.loss[0] - found.loss, losses[0] - losses, rtol=1e-3, atol=1e-12)


def test_a_forecast_goes_on_from_the_users_own_optimiser():
    (x, y), (cell, readout) = task(), network()
    optimizer = torch.optim.Adam([*readout.parameters(), *cell.parameters()], lr=1e-6)
    losses = []
    for _ in range(8):
        loss = ((readout(cell(x)[0]) - y) ** 2).mean()
        losses.append(loss.item())
        if len(losses) == 4:
            flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
            found = kp.forecast(flow, y, optimizer=optimizer, steps=4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(found.loss[0] - found.loss, losses[3] - np.array(losses[3:]), rtol=1e-3)
    assert np.isnan(found.lr)


def test_cross_entropy_by_adam():
    (x, _y), (cell, readout) = task(), (network()[0], torch.nn.Linear(8, 3).double())
    classes = torch.randint(0, 3, (8, 12))
    parameters, losses = [*cell.parameters(), *readout.parameters()], []
    problem, loss = kp.DiscreteProblem(cell, x), kp.cross_entropy(classes, readout)
    found = kp.gradient_flow(problem, loss, 60, optimizer="adam", lr=3e-3)
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(61):
        value = torch.nn.functional.cross_entropy(readout(cell(x)[0]).transpose(1, 2), classes)
        losses.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    np.testing.assert_allclose(losses[0] - found(np.arange(61)), losses[0] - np.array(losses), rtol=0.03)


def test_forecasts_by_an_optimiser_say_what_does_not_fit():
    (x, y), (cell, readout) = task(), network()
    solution = kp.solve(kp.DiscreteProblem(cell, x))
    flow = kp.linearize(solution).output(readout, learn=True)
    with pytest.raises(ValueError, match="the mean over batches is that of plain descent"):
        kp.forecast(flow, y, optimizer="adam", lr=0.1, steps=10, batch=2)
    slower = kp.linearize(solution, metric=kp.LearningRates(0.5)).output(readout)
    with pytest.raises(ValueError, match="has its own metric"):
        kp.forecast(slower, y, optimizer="adam", lr=0.1, steps=10)
    with pytest.raises(ValueError, match="lr is None"):
        kp.forecast(flow, y, steps=10)
    with pytest.raises(ValueError, match="clip is for an optimizer"):
        kp.forecast(flow, y, lr=0.1, steps=10, clip=1.0)


def test_a_forecast_of_some_parameters_by_an_optimiser():
    (x, y), (cell, readout) = task(), network()
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).only("bias_hh_l0").output(readout, learn=True)
    found = kp.forecast(flow, y, optimizer="adam", lr=1e-5, steps=4)
    options = {"params": ["bias_hh_l0", "loss.weight", "loss.bias"], "alg": Multirate(longest=1)}
    loss = kp.squared_error(y, readout)
    true = kp.gradient_flow(kp.DiscreteProblem(cell, x), loss, 4, optimizer="adam", lr=1e-5, **options)
    np.testing.assert_allclose(found.loss[0] - found.loss, true.loss[0] - true(found.steps), rtol=1e-3, atol=1e-12)


def test_the_first_time_below_is_found_where_the_loss_rises_again():
    (x, y), (cell, readout) = task(), network(partial(torch.nn.RNN, nonlinearity="tanh"))
    losses, _ = trained(lambda those: torch.optim.Adam(those, lr=0.1), 120, kind=partial(torch.nn.RNN))
    problem, loss = kp.DiscreteProblem(cell, x), kp.squared_error(y, readout)
    found = kp.gradient_flow(problem, loss, 120, optimizer="adam", lr=0.1)
    assert (np.diff(losses) > 0).sum() > 20
    for part in np.linspace(0.15, 0.9, 20):
        if (losses <= part * losses[0]).any():
            assert found.time_to(part) == pytest.approx(step_below(losses, part), rel=1e-6)


def linear_in_jax():
    """The task, and an equinox cell with a readout, as `posed`."""
    import equinox as eqx
    import jax

    x, y = (jnp.asarray(a.numpy()) for a in task())
    keys = jax.random.split(jax.random.key(0))
    return kp.DiscreteProblem(eqx.nn.GRUCell(1, 8, key=keys[0]), x), kp.squared_error(
        y, eqx.nn.Linear(8, 1, key=keys[1])
    )


@pytest.mark.parametrize(
    ("framework", "optimizer", "words"),
    [
        ("torch", torch.optim.LBFGS, "evaluates the loss itself"),
        ("torch", torch.optim.SparseAdam, "SparseAdam does not step by plain gradients alone"),
        ("torch", optax.adam, r"optimizer\(parameters, lr=lr\) fails"),
        ("jax", optax.lbfgs, "does not step by plain gradients alone"),
        ("jax", optax.polyak_sgd, "does not step by plain gradients alone"),
        ("jax", torch.optim.Adam, r"optimizer\(lr\) fails"),
    ],
)
def test_optimisers_that_want_more_than_a_gradient_are_refused(framework, optimizer, words):
    problem, loss = posed() if framework == "torch" else linear_in_jax()
    with pytest.raises(TypeError, match=words):
        kp.gradient_flow(problem, loss, 5, optimizer=optimizer, lr=0.1)


class Beside(torch.nn.Module):
    """A GRU beside a layer that nothing hangs on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.cell, self.unused = torch.nn.GRUCell(1, 8), torch.nn.Linear(2, 2)

    def forward(self, x, z):
        return self.cell(x, z)


def test_decay_leaves_what_the_loss_does_not_reach_alone():
    (x, y), model, readout = task(), Beside().double(), network()[1]
    make = partial(torch.optim.AdamW, weight_decay=5.0, lr=0.01)
    problem, loss = kp.DiscreteProblem(model, x, z0=torch.zeros(8).double()), kp.squared_error(y, readout)
    found = kp.gradient_flow(problem, loss, 6, optimizer=make, alg=Multirate(longest=1))
    output = kp.linearize(kp.solve(problem)).output(readout, learn=True)
    frozen = kp.forecast(output, y, steps=6, optimizer=make, check=False).frozen.flow
    optimizer = make([*model.parameters(), *readout.parameters()])
    for _ in range(6):
        z, states = torch.zeros(8, 8).double(), []
        for t in range(x.shape[1]):
            z = model(x[:, t], z)
            states.append(z)
        optimizer.zero_grad()
        ((readout(torch.stack(states, 1)) - y) ** 2).mean().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found.parameters[name][-1], parameter.detach())
    for run in (found, frozen):
        assert (run.parameters["unused.weight"][-1] == run.parameters["unused.weight"][0]).all()


@pytest.mark.parametrize("loss", ["masked", "classes", "own"])
def test_a_draw_without_a_target_says_so(loss):
    (x, y), (cell, readout) = task(), network()
    mask = torch.ones(8, 12).double()
    mask[2:] = 0
    right = torch.where(mask > 0, 0, -100)
    losses = {
        "masked": kp.squared_error(y, readout, mask),
        "classes": kp.cross_entropy(right, torch.nn.Linear(8, 2).double()),
        "own": lambda s, n=slice(None): (mask[n][..., None] * s**2).sum() / mask[n].sum(),
    }
    with pytest.raises(ValueError, match=r"the loss of the trials \[.*\] is nan, .*no target of these counts"):
        kp.gradient_flow(kp.DiscreteProblem(cell, x), losses[loss], 40, optimizer="adam", lr=1e-3, batch=2)


def test_fractions_may_be_an_array():
    problem, loss = posed()
    for found in (kp.gradient_flow(problem, loss, 5.0), kp.gradient_flow(problem, loss, 40, optimizer="adam", lr=0.01)):
        parts = [0.9, 0.8, 1e-9]
        np.testing.assert_array_equal(found.time_to(parts), [found.time_to(part) for part in parts])
        low, high = found.interval_to(np.array([parts]))
        np.testing.assert_array_equal(np.stack([low[0], high[0]], 1), [found.interval_to(part) for part in parts])
        for wrong in (1.5, [0.5, 1.0], "a", None):
            with pytest.raises(ValueError, match="expected 0 < fraction < 1"):
                found.time_to(wrong)


def test_numbers_of_numpy_are_numbers_here_too():
    problem, loss = posed()
    plain = {"span": 6, "lr": 0.125, "clip": 0.5, "batch": 2, "seed": 3}
    kinds = {"span": np.int64, "lr": np.float32, "clip": np.float32, "batch": np.int32, "seed": np.uint8}
    ours = {name: kinds[name](value) for name, value in plain.items()}
    runs = [kp.gradient_flow(problem, loss, optimizer="adam", **options) for options in (plain, ours)]
    np.testing.assert_array_equal(runs[0].loss, runs[1].loss)
    with pytest.raises(TypeError, match="seed is 'a', expected a whole number"):
        kp.gradient_flow(problem, loss, 5, optimizer="adam", lr=0.1, batch=2, seed="a")
