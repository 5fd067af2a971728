"""What kp.train.fit does to a model is what gradient descent does by hand, the same in both frameworks."""

from __future__ import annotations

import dataclasses
import functools
import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from conftest import cases
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn.models import CTRNNCell
from kpflow_dyn.tasks import TaskData

pytestmark = pytest.mark.usefixtures("x64")

TRIALS, TIMES, INPUTS, UNITS, OUT = 5, 6, 3, 4, 2


def some_task() -> TaskData:
    rng = np.random.default_rng(0)
    mask = rng.random((TRIALS, TIMES)) < 0.7
    mask[:, 0] = True
    return TaskData(rng.normal(size=(TRIALS, TIMES, INPUTS)), rng.normal(size=(TRIALS, TIMES, OUT)), mask)


TORCH = {
    "rnn": (lambda: nn.RNN(INPUTS, UNITS), slice(None)),
    "gru_batch_first": (lambda: nn.GRU(INPUTS, UNITS, batch_first=True), slice(None)),
    "gru_of_two_layers": (lambda: nn.GRU(INPUTS, UNITS, num_layers=2), slice(4, 8)),
    "gru_of_two_layers_read_whole": (lambda: nn.GRU(INPUTS, UNITS, num_layers=2), slice(0, 8)),
    "lstm_of_two_layers": (lambda: nn.LSTM(INPUTS, UNITS, num_layers=2), slice(4, 8)),
    "gru_cell": (lambda: nn.GRUCell(INPUTS, UNITS), slice(None)),
    "lstm_cell": (lambda: nn.LSTMCell(INPUTS, UNITS), slice(0, 4)),
    "lstm_cell_read_whole": (lambda: nn.LSTMCell(INPUTS, UNITS), slice(0, 8)),
    "ctrnn": (lambda: CTRNNCell(INPUTS, UNITS), slice(None)),
}


def torch_models(name: str) -> tuple[nn.Module, nn.Linear, slice]:
    torch.manual_seed(0)
    make, read = TORCH[name]
    width = UNITS if read.stop is None else read.stop - read.start
    return make().double(), nn.Linear(width, OUT).double(), read


def jax_models(name: str) -> tuple[eqx.Module, eqx.nn.Linear]:
    keys, make = jax.random.split(jax.random.key(0)), {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}[name]
    return make(INPUTS, UNITS, key=keys[0]), eqx.nn.Linear(UNITS, OUT, key=keys[1])


def descent(model, readout, read: slice, task: TaskData, x) -> tuple[float, dict, np.ndarray, np.ndarray]:
    """The loss, and its gradients: of the model by the adjoint operator J*, of W and c in y = W s + c on paper."""
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(model, x)))
    state, W = np.asarray(flow.solution.state), np.asarray(readout.weight.tolist())
    residual = (state[..., read] @ W.T + np.asarray(readout.bias.tolist()) - task.targets) * task.mask[..., None]
    scale = 2 / (task.mask.sum() * OUT)
    kick = np.zeros_like(state)
    kick[..., read] = scale * residual @ W
    gradient = flow.J.T.mv(flow.ntk.domain.xp.asarray(kick)[None])[0]
    of_W = scale * np.einsum("bto,btu->ou", residual, state[..., read])
    named = {name: np.asarray(g) for name, g in flow.as_parameters(gradient).items()}
    return float(scale / 2 * (residual**2).sum()), named, of_W, scale * residual.sum((0, 1))


@pytest.mark.parametrize("name", cases(TORCH, ["rnn", "gru_of_two_layers", "lstm_cell", "ctrnn"]))
def test_a_first_step_in_torch_is_minus_lr_times_the_gradient(name):
    task = some_task()
    model, readout, read = torch_models(name)
    before = {key: p.detach().numpy().copy() for key, p in model.named_parameters()}
    W, c = (p.detach().numpy().copy() for p in (readout.weight, readout.bias))
    loss, gradient, of_W, of_c = descent(model, readout, read, task, torch.from_numpy(task.inputs))
    training = kp.train.fit(model, task, readout, steps=1, lr=0.3, optimizer="sgd")
    assert training.model is model and training.readout is readout and training.success
    assert training.losses[0] == pytest.approx(loss, rel=1e-12)
    for key, p in model.named_parameters():
        np.testing.assert_allclose(p.detach(), before[key] - 0.3 * gradient[key], rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(readout.weight.detach(), W - 0.3 * of_W, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(readout.bias.detach(), c - 0.3 * of_c, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", cases(["gru", "lstm"], ["gru"]))
def test_a_first_step_in_jax_is_minus_lr_times_the_gradient(name):
    task = some_task()
    model, readout = jax_models(name)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def by_hand(models):
        cell, read = models
        z = jnp.zeros((TRIALS, UNITS))
        z, total = (z, z) if name == "lstm" else z, 0.0
        for t in range(TIMES):
            z = jax.vmap(cell)(task.inputs[:, t], z)
            wrong = jax.vmap(read)(z[0] if name == "lstm" else z) - task.targets[:, t]
            total += (wrong**2 * task.mask[:, t, None]).sum()
        return total / (task.mask.sum() * OUT)

    loss, gradient = by_hand((model, readout))
    training = kp.train.fit(model, task, readout, steps=1, lr=0.3, optimizer="sgd")
    assert training.losses[0] == pytest.approx(float(loss), rel=1e-12)
    assert eqx.tree_equal((model, readout), jax_models(name)), "the models given are as they were"
    expected = jax.tree.map(
        lambda p, g: p - 0.3 * g, *(eqx.filter(m, eqx.is_array) for m in ((model, readout), gradient))
    )
    found = eqx.filter((training.model, training.readout), eqx.is_array)
    assert eqx.tree_equal(found, expected, rtol=1e-12, atol=1e-14)


def twins(kind: str) -> tuple:
    """A torch cell and an equinox one (which has other biases, so without any) with the same weights, and readouts."""
    torch.manual_seed(1)
    ours, theirs = {"gru": (nn.GRUCell, eqx.nn.GRUCell), "lstm": (nn.LSTMCell, eqx.nn.LSTMCell)}[kind]
    cell, readout = ours(INPUTS, UNITS, bias=False).double(), nn.Linear(UNITS, OUT).double()
    copies = (
        theirs(INPUTS, UNITS, use_bias=False, key=jax.random.key(0)),
        eqx.nn.Linear(UNITS, OUT, key=jax.random.key(0)),
    )
    where = lambda m: (m[0].weight_ih, m[0].weight_hh, m[1].weight, m[1].bias)  # noqa: E731
    values = [jnp.asarray(p.detach().numpy().copy()) for p in where((cell, readout))]  # torch trains its own in place
    return (cell, readout), eqx.tree_at(where, copies, values)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gru", {"optimizer": "adam", "lr": 0.01, "batch": 3, "seed": 4}), ("lstm", {"optimizer": "sgd", "lr": 0.5})],
)
def test_both_frameworks_train_alike(kind, options):
    task = some_task()
    (cell, readout), (twin, twin_readout) = twins(kind)
    ours = kp.train.fit(cell, task, readout, steps=8, **options)
    theirs = kp.train.fit(twin, task, twin_readout, steps=8, **options)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-10)
    for name in ("weight_ih", "weight_hh"):
        np.testing.assert_allclose(
            getattr(ours.model, name).detach(), getattr(theirs.model, name), rtol=1e-8, atol=1e-10
        )


def test_a_layer_and_its_cell_train_alike():
    task = some_task()
    torch.manual_seed(0)
    cell, layer = nn.GRUCell(INPUTS, UNITS).double(), nn.GRU(INPUTS, UNITS).double()
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    readouts = [nn.Linear(UNITS, OUT).double() for _ in range(2)]
    readouts[1].load_state_dict(readouts[0].state_dict())
    z0 = torch.randn(TRIALS, UNITS).double()
    pairs = zip((cell, layer), readouts, strict=True)
    losses = [kp.train.fit(model, task, readout, steps=5, lr=0.05, z0=z0).losses for model, readout in pairs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-12)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_clipping_bounds_the_gradient_of_all_parameters_together(framework):
    task, index = some_task(), ["torch", "jax"].index(framework)
    lengths = {}
    for clip in (None, 1e-3, 1e3):
        before, (model, readout) = twins("gru")[index], twins("gru")[index]
        kp_training = kp.train.fit(model, task, readout, steps=1, lr=0.5, optimizer="sgd", clip=clip)
        after = (kp_training.model, kp_training.readout)
        lengths[clip] = np.sqrt(sum(np.sum((a - b) ** 2) for a, b in zip(arrays(after), arrays(before), strict=True)))
    assert lengths[1e-3] == pytest.approx(0.5 * 1e-3, rel=1e-5)  # torch divides by the norm + 1e-6
    assert lengths[1e3] == lengths[None] > 0.01


def arrays(models: tuple) -> list[np.ndarray]:
    where = lambda m: (m[0].weight_ih, m[0].weight_hh, m[1].weight, m[1].bias)  # noqa: E731
    return [np.asarray(p.detach() if isinstance(p, torch.Tensor) else p) for p in where(models)]


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_training_stops_at_the_first_model_that_is_good_enough(framework):
    task, index = some_task(), ["torch", "jax"].index(framework)
    train = functools.partial(kp.train.fit, task=task, lr=0.05)
    model, readout = twins("gru")[index]
    whole = train(model, readout=readout, steps=12).losses
    assert (np.diff(whole) < 0).all()
    model, readout = twins("gru")[index]
    short = train(model, readout=readout, steps=12, stop_below=float(whole[7:9].mean()))
    np.testing.assert_array_equal(short.losses, whole[:9])
    again = train(short.model, readout=short.readout, steps=1)
    assert again.losses[0] == pytest.approx(whole[8], rel=1e-14)


def test_a_batch_is_drawn_from_the_seed_without_repetition():
    task = some_task()
    losses = []
    for seed in (3, 3, 5):
        (cell, readout), _ = twins("gru")
        losses.append(kp.train.fit(cell, task, readout, steps=3, lr=1e-12, batch=2, seed=seed).losses)
    np.testing.assert_array_equal(losses[0], losses[1])
    assert not np.allclose(losses[0], losses[2])
    (cell, readout), _ = twins("gru")
    rng = np.random.default_rng(3)
    for loss in losses[0]:
        trials = rng.choice(TRIALS, 2, replace=False)
        part = dataclasses.replace(
            task, inputs=task.inputs[trials], targets=task.targets[trials], mask=task.mask[trials]
        )
        expected = descent(cell, readout, slice(None), part, torch.from_numpy(part.inputs))[0]
        assert loss == pytest.approx(expected, rel=1e-8)  # lr = 1e-12 moves it by less


def test_own_records_see_the_model_after_each_step():
    task, seen = some_task(), []
    (cell, readout), _ = twins("gru")

    def record(step, model, loss, readout):
        found = descent(model, readout, slice(None), task, torch.from_numpy(task.inputs))[0]
        seen.append((step, loss, found))

    training = kp.train.fit(cell, task, readout, steps=3, lr=0.1, record=record)
    steps, losses, found = zip(*seen, strict=True)
    assert steps == (0, 1, 2, 3)
    np.testing.assert_array_equal(losses, training.losses)
    np.testing.assert_allclose(found, training.losses, rtol=1e-12)


def test_frozen_parameters_stay():
    (cell, readout), _ = twins("gru")
    cell.weight_hh.requires_grad_(False)
    before = cell.weight_hh.clone(), cell.weight_ih.clone()
    kp.train.fit(cell, some_task(), readout, steps=2)
    assert torch.equal(cell.weight_hh, before[0]) and not torch.equal(cell.weight_ih, before[1])


def test_other_optimisers_come_as_what_makes_them():
    task = some_task()
    (cell, readout), (twin, twin_readout) = twins("gru")
    ours = functools.partial(torch.optim.SGD, momentum=0.9)
    theirs = functools.partial(optax.sgd, momentum=0.9)
    first = kp.train.fit(cell, task, readout, steps=5, lr=0.1, optimizer=ours).losses
    second = kp.train.fit(twin, task, twin_readout, steps=5, lr=0.1, optimizer=theirs).losses
    np.testing.assert_allclose(first, second, rtol=1e-10)


def test_data_take_the_dtype_of_the_model():
    training = kp.train.fit(nn.GRU(INPUTS, UNITS), some_task(), nn.Linear(UNITS, OUT), steps=1)
    assert training.readout.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flipflop", "contextintegration"])
def test_tasks_can_be_learnt(name):
    task = kp.tasks.make_task(name, trials=64, seed=0)
    torch.manual_seed(0)
    model, readout = nn.GRU(task.inputs.shape[2], 48), nn.Linear(48, task.targets.shape[2])
    training = kp.train.fit(model, task, readout, steps=600, lr=5e-3, clip=1.0)
    assert training.steps_to(0.25) is not None


def test_steps_to_is_the_first_step_at_or_below():
    training = kp.train.Training(None, None, np.array([8.0, 5.0, 4.0, 6.0, 1.0]), True)
    assert (training.steps_to(0.5), training.steps_to(0.49), training.steps_to(0.1)) == (2, 4, None)
    with pytest.raises(ValueError, match="between 0 and 1, got 2"):
        training.steps_to(2)


def test_a_loss_that_explodes_is_flagged():
    cell = nn.RNN(INPUTS, UNITS, nonlinearity="relu")
    with pytest.warns(UserWarning, match=r"the loss was (inf|nan) after \d+ steps; take a smaller lr"):
        training = kp.train.fit(cell, some_task(), nn.Linear(UNITS, OUT), steps=50, lr=1e6, optimizer="sgd")
    assert not training.success and len(training.losses) < 51 and np.isfinite(training.losses[:-1]).all()


def test_progress_shows_the_loss_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (cell, readout), _ = twins("gru")
    training = kp.train.fit(cell, some_task(), readout, steps=2, progress=True)
    assert f"loss {training.losses[-1]:.3g}" in capsys.readouterr().err
    kp.train.fit(cell, some_task(), readout, steps=2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"task": kp.tasks.FlipFlop()}, TypeError, r"task is FlipFlop, expected a TaskData; pass task\.sample"),
        ({"task": dataclasses.replace(some_task(), targets=None)}, ValueError, "has no targets"),
        (
            {"task": dataclasses.replace(some_task(), mask=np.arange(5)[:, None] + np.zeros(6) > 0)},
            ValueError,
            "no target of trial 0 counts",
        ),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"lr": -1.0}, ValueError, r"lr must be a positive number, got -1\.0"),
        ({"clip": 0.0}, ValueError, "clip must be a positive number"),
        ({"batch": 6}, ValueError, "batch is 6, but the task has 5 trials"),
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"optimizer": "sdg"}, ValueError, "optimizer is 'sdg', expected one of adam, adamw, rmsprop, sgd"),
        ({"readout": nn.Linear(UNITS + 1, OUT).double()}, ValueError, "the readout takes 5 units, expected one of 4"),
        ({"readout": nn.Linear(UNITS, 1).double()}, ValueError, r"the readout gives \(5, 6, 1\).*expected \(5, 6, 2\)"),
        ({"readout": nn.Linear(UNITS, OUT)}, TypeError, r"is torch\.float32"),
        (
            {"readout": jax_models("gru")[1]},
            TypeError,
            "the model is torch.nn.GRUCell and the readout equinox",
        ),
        ({"model": nn.GRUCell(2, UNITS).double()}, ValueError, "x has 3 input channels, but the cell takes 2"),
        (
            {"model": nn.LSTMCell(INPUTS, 3).double()},
            ValueError,
            r"expected one of 3 units \(the last layer's h\) or 6",
        ),
    ],
)
def test_bad_input_is_explained(changes, kind, message):
    (cell, readout), _ = twins("gru")
    with pytest.raises(kind, match=message):
        kp.train.fit(**({"model": cell, "task": some_task(), "readout": readout, "steps": 1} | changes))


def test_bad_input_in_jax_is_explained():
    model, readout = jax_models("gru")
    with pytest.raises(ValueError, match="the readout takes 5 units, expected one of 4 units"):
        kp.train.fit(model, some_task(), eqx.nn.Linear(5, OUT, key=jax.random.key(0)))
    with pytest.raises(ValueError, match=r"the readout gives \(5, 6, 1\)"):
        kp.train.fit(model, some_task(), eqx.nn.Linear(UNITS, 1, key=jax.random.key(0)))
    with pytest.raises(TypeError, match="holds no arrays"):
        kp.train.fit(lambda x, z: z, some_task(), readout)


def classes() -> tuple[TaskData, np.ndarray]:
    """A task of class indices, of which some are left out, and its targets as torch takes them."""
    task = some_task()
    right = np.random.default_rng(1).integers(0, OUT, (TRIALS, TIMES, 1))
    right[0, 1] = -100
    return dataclasses.replace(task, targets=right), np.where(task.mask, right[..., 0], -100)


@pytest.mark.parametrize("targets", ["indices", "one_hot"])
def test_cross_entropy_in_torch_is_that_of_a_script(targets):
    (task, expected), (model, readout, _) = classes(), torch_models("gru_batch_first")
    if targets == "one_hot":
        task = dataclasses.replace(task, targets=np.eye(OUT)[expected % OUT], mask=expected >= 0)
    (theirs, their_readout, _), y = torch_models("gru_batch_first"), torch.from_numpy(expected)
    optimizer, losses, hits = torch.optim.Adam([*theirs.parameters(), *their_readout.parameters()], lr=0.05), [], []
    for _ in range(4):
        logits = their_readout(theirs(torch.from_numpy(task.inputs))[0])
        loss = nn.functional.cross_entropy(logits.reshape(-1, OUT), y.reshape(-1))
        losses.append(loss.item())
        hits.append((logits.argmax(-1) == y)[y >= 0].double().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    training = kp.train.fit(model, task, readout, steps=3, lr=0.05, loss="cross_entropy")
    np.testing.assert_allclose(training.losses, losses, rtol=1e-10)
    np.testing.assert_allclose(training.accuracy, hits, rtol=1e-12)


@pytest.mark.parametrize("batch", [None, 2])
def test_cross_entropy_in_jax_is_that_in_torch(batch):
    (task, _), options = classes(), {"steps": 3, "lr": 0.05, "loss": "cross_entropy", "batch": batch}
    ours, theirs = (kp.train.fit(cell, task, readout, **options) for cell, readout in twins("gru"))
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-8)
    np.testing.assert_allclose(ours.accuracy, theirs.accuracy, rtol=1e-12)


def test_a_loss_of_ones_own():
    task = dataclasses.replace(some_task(), mask=None)
    (cell, readout), (jax_cell, jax_readout) = twins("gru")
    expected = nn.functional.huber_loss(
        readout(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(task.inputs))).state), torch.from_numpy(task.targets)
    ).item()
    ours = kp.train.fit(cell, task, readout, steps=2, loss=nn.functional.huber_loss)
    theirs = kp.train.fit(
        jax_cell, task, jax_readout, steps=2, loss=lambda y, target: optax.huber_loss(y, target).mean()
    )
    assert ours.losses[0] == pytest.approx(expected, rel=1e-12) and ours.accuracy is None
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=1e-8)
    with pytest.raises(ValueError, match="a mask does not reach into a loss of your own"):
        kp.train.fit(cell, some_task(), readout, loss=nn.functional.huber_loss)


def test_the_module_is_not_shadowed():
    assert kp.train is importlib.import_module("kpflow_dyn.train")


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("axis", [False, True])
def test_class_indices_train_by_the_cross_entropy(framework, axis):
    """A task of integers [trial, time], or [trial, time, 1], without a word on the loss."""
    task, index = some_task(), ["torch", "jax"].index(framework)
    right = np.random.default_rng(5).integers(0, OUT, (TRIALS, TIMES))
    right[0, 1] = -100
    model, readout = twins("gru")[0]
    x, z, logits = torch.from_numpy(task.inputs), torch.zeros(TRIALS, UNITS).double(), []
    for t in range(TIMES):
        z = model(x[:, t], z)
        logits.append(readout(z))
    counts = torch.from_numpy(task.mask & (right >= 0))
    expected = nn.functional.cross_entropy(torch.stack(logits, 1)[counts], torch.from_numpy(right)[counts]).item()
    classes = dataclasses.replace(task, targets=right[..., None] if axis else right)
    model, readout = twins("gru")[index]
    training = kp.train.fit(model, classes, readout, steps=2, lr=0.01)
    assert training.losses[0] == pytest.approx(expected, rel=1e-12) and training.accuracy is not None


@pytest.mark.parametrize(
    ("framework", "optimizer"),
    [
        ("torch", torch.optim.LBFGS),
        ("torch", torch.optim.SparseAdam),
        ("torch", optax.adam),
        ("jax", optax.lbfgs),
        ("jax", optax.polyak_sgd),
        ("jax", torch.optim.Adam),
    ],
)
def test_optimisers_that_want_more_than_a_gradient_are_refused(framework, optimizer):
    model, readout = twins("gru")[["torch", "jax"].index(framework)]
    with pytest.raises(TypeError, match=r"take another optimiser|steps by one gradient|fails .*expected a name"):
        kp.train.fit(model, some_task(), readout, steps=2, optimizer=optimizer, lr=0.1)


def test_numbers_of_numpy_are_numbers():
    losses = []
    for lr, steps, batch in ((0.125, 3, 2), (np.float32(0.125), np.int64(3), np.int32(2))):
        (model, readout), _ = twins("gru")
        losses.append(kp.train.fit(model, some_task(), readout, steps=steps, lr=lr, batch=batch).losses)
    np.testing.assert_array_equal(*losses)
    with pytest.raises(TypeError, match="seed is 'a', expected a whole number"):
        kp.train.fit(model, some_task(), readout, seed="a")
    with pytest.raises(ValueError, match="one number between 0 and 1"):
        kp.train.fit(model, some_task(), readout, steps=1).steps_to([0.5, 0.1])
