"""Training by a learning rule: its first step moves the states as the operator says."""

from __future__ import annotations

import copy

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
from test_train import some_task

import kpflow_dyn as kp
from kpflow_dyn import learning_rules as rules
from kpflow_dyn._arrays import like_numpy, to_numpy

pytestmark = pytest.mark.usefixtures("x64")

INPUTS, UNITS, OUT = 3, 4, 2

OPTIONS = {
    "bptt": {},
    "truncated_bptt": {"k": 2},
    "feedback_alignment": {},
    "functional_gradient_descent": {},
    "gauss_newton": {"damping": 0.5},
    "natural_gradient": {"damping": 0.5, "rank": 3},
    "shampoo": {},
    "muon": {"newton_schulz": 5},
    "eprop": {},
    "rflo": {"decay": 0.5},
    "rtrl": {},
    "snap": {"k": 1},
    "uoro": {"rank": 2},
    "duhamel": {"k": 1},
    "weight_mirror": {"samples": 50},
}


def pair(framework: str) -> tuple:
    torch.manual_seed(0)
    if framework == "torch":
        return torch.nn.GRUCell(INPUTS, UNITS).double(), torch.nn.Linear(UNITS, OUT).double()
    keys = jax.random.split(jax.random.key(0))
    return eqx.nn.GRUCell(INPUTS, UNITS, key=keys[0]), eqx.nn.Linear(UNITS, OUT, key=keys[1])


def states_of(model: object, task: kp.tasks.TaskData, framework: str) -> np.ndarray:
    x = torch.from_numpy(task.inputs) if framework == "torch" else jax.numpy.asarray(task.inputs)
    return to_numpy(kp.solve(kp.DiscreteProblem(model, x)).state)


def error_in_states(flow: kp.Flow, readout: object, task: kp.tasks.TaskData, B: np.ndarray | None) -> np.ndarray:
    """q on paper, of the mean squared error where the mask is on."""
    W, c = (np.asarray(part.tolist()) for part in (readout.weight, readout.bias))
    residual = (to_numpy(flow.solution.state) @ W.T + c - task.targets) * task.mask[..., None]
    return 2 / (task.mask.sum() * OUT) * residual @ (W if B is None else B.T)


def operator_of(name: str, flow: kp.Flow, q, readout: object) -> np.ndarray:
    """What the operator does to q; without a gradient, the part of it that weights reach."""
    options = dict(OPTIONS[name])
    if name in ("shampoo", "muon"):
        options["q"] = q
    if name == "natural_gradient":
        options["readout"] = readout
    if name in ("feedback_alignment", "uoro", "weight_mirror"):
        options["seed"] = int(np.random.default_rng([0, 0]).integers(2**31))
    moved = to_numpy(getattr(rules, name)(flow, **options).mv(q))
    if name != "functional_gradient_descent":
        return moved
    U, s, _ = np.linalg.svd(to_numpy(flow.J.dense()), full_matrices=False)
    U = U[:, s > 1e-10 * s[0]]
    return (U @ (U.T @ moved.reshape(-1))).reshape(moved.shape)


@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_first_step_moves_the_states_as_the_operator_says(name: str, framework: str) -> None:
    task = some_task()
    model, readout = pair(framework)
    before = states_of(model, task, framework)
    x = torch.from_numpy(task.inputs) if framework == "torch" else jax.numpy.asarray(task.inputs)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(model, x)))
    q = like_numpy(error_in_states(flow, readout, task, None), flow.solution.state)
    expected = operator_of(name, flow, q, readout)
    small = 1e-5 if name == "functional_gradient_descent" else 1e-2  # its weights move far for what is hard to reach
    rate, errors = small * np.abs(before).max() / np.abs(expected).max(), []
    for lr in (rate, rate / 2):
        cell, layer = copy.deepcopy((model, readout))
        trained = rules.train(name, cell, task, layer, steps=1, lr=lr, **OPTIONS[name])
        errors.append(np.linalg.norm(states_of(trained.model, task, framework) - before + lr * expected))
    assert errors[0] < 0.1 * rate * np.linalg.norm(expected)
    assert errors[1] / errors[0] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_backpropagation_is_stochastic_gradient_descent(framework: str) -> None:
    task = some_task()
    ours, theirs = pair(framework), pair(framework)
    found = rules.train(rules.bptt, ours[0], task, ours[1], steps=4, lr=0.3, batch=3, seed=2)
    expected = kp.train.fit(theirs[0], task, theirs[1], steps=4, lr=0.3, batch=3, seed=2, optimizer="sgd")
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
    before, after = (states_of(run.model, task, framework) for run in (found, expected))
    np.testing.assert_allclose(before, after, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("framework", ["torch", "jax"])
def test_feedback_takes_the_place_of_the_readout(framework: str) -> None:
    task = some_task()
    model, readout = pair(framework)
    B = np.random.default_rng(5).normal(size=(UNITS, OUT))
    before = states_of(model, task, framework)
    x = torch.from_numpy(task.inputs) if framework == "torch" else jax.numpy.asarray(task.inputs)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(model, x)))
    q = like_numpy(error_in_states(flow, readout, task, B), flow.solution.state)
    expected, lr = to_numpy(flow.ntk.mv(q)), 1e-4
    run = rules.train("bptt", *(copy.deepcopy(model), task, copy.deepcopy(readout)), steps=1, lr=lr, feedback=B)
    moved = states_of(run.model, task, framework) - before
    assert np.linalg.norm(moved + lr * expected) < 1e-3 * lr * np.linalg.norm(expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_rules_train(name: str) -> None:
    task = kp.tasks.FlipFlop(bits=1).sample(trials=6, seed=0)
    torch.manual_seed(0)
    cell, readout = torch.nn.RNNCell(1, 8), torch.nn.Linear(8, 1)
    lr = {"functional_gradient_descent": 0.02, "shampoo": 0.02, "muon": 0.03}.get(name, 0.2)
    options = OPTIONS[name] | ({"feedback": "random"} if name == "bptt" else {})
    run = rules.train(name, cell, task, readout, steps=15, lr=lr, **options)
    assert run.success and run.losses[-1] < 0.995 * run.losses[0]


def test_what_a_rule_takes_it_gets() -> None:
    """Each step gets its own seed and the result of the step before; feedback alignment keeps its matrices."""
    seen: list[tuple] = []

    def own(flow, q, seed, previous, strength):
        seen.append((tuple(q.shape), seed, previous, strength))
        return flow.ntk

    task = some_task()
    model, readout = pair("torch")
    rules.train(own, model, task, readout, steps=3, lr=0.1, batch=4, strength=7)
    assert [each[0] for each in seen] == [(4, 6, UNITS)] * 3
    assert len({each[1] for each in seen}) == 3
    assert seen[0][2] is None and isinstance(seen[1][2], kp.Operator)
    assert {each[3] for each in seen} == {7}


def test_a_start_and_a_loss_of_classes() -> None:
    """The natural gradient is that of the loss that is trained."""
    rng = np.random.default_rng(0)
    task = kp.tasks.TaskData(rng.normal(size=(5, 6, INPUTS)), rng.integers(0, OUT, (5, 6)))
    model, readout = pair("torch")
    z0 = torch.randn(5, UNITS).double()
    run = rules.train("natural_gradient", model, task, readout, steps=3, lr=0.5, damping=0.1, batch=3, z0=z0)
    assert run.success and run.accuracy is not None
    lstm = torch.nn.LSTMCell(INPUTS, UNITS).double()
    with pytest.raises(ValueError, match="z0 must be one array"):
        rules.train("bptt", lstm, task, readout, steps=1, lr=0.1, batch=3, z0=(z0, z0))


def test_bad_requests() -> None:
    task, (model, readout) = some_task(), pair("torch")

    def run(rule, **options):
        return rules.train(rule, model, task, readout, steps=1, lr=0.1, **options)

    with pytest.raises(ValueError, match="expected one of bptt, truncated_bptt"):
        run("backprop")
    with pytest.raises(ValueError, match=r"feedback has shape \(2, 4\), expected \[unit, out\] = \[4, 2\]"):
        run("bptt", feedback=np.ones((OUT, UNITS)))
    with pytest.raises(ValueError, match="feedback is 'fixed', expected 'random'"):
        run("bptt", feedback="fixed")
    with pytest.raises(TypeError, match="the rule gave"):
        run(lambda flow: None)
    with pytest.raises(TypeError, match="dampening"):
        run("gauss_newton", dampening=1.0)
    with pytest.raises(ValueError, match="lr must be a positive number"):
        rules.train("bptt", model, task, readout, steps=1, lr=0.0)


def test_feedback_alignment_keeps_its_first_matrices() -> None:
    task, (model, readout) = some_task(), pair("torch")
    made = []

    def watched(flow, seed, previous):
        made.append(rules.feedback_alignment(flow, seed, previous=previous))
        return made[-1]

    rules.train(watched, model, task, readout, steps=3, lr=0.1)
    assert all(torch.equal(one.matrices["weight_hh"], made[0].matrices["weight_hh"]) for one in made)
    assert not torch.equal(made[0].matrices["weight_hh"], model.weight_hh)


def test_a_readout_that_shares_a_weight_adds_its_own_gradient() -> None:
    task, runs = some_task(), []
    for fit in (lambda *given, **options: rules.train("bptt", *given, **options), kp.train.fit):
        torch.manual_seed(0)
        cell, readout = torch.nn.RNNCell(INPUTS, OUT).double(), torch.nn.Linear(OUT, OUT).double()
        readout.weight = cell.weight_hh
        extra = {} if fit is not kp.train.fit else {"optimizer": "sgd"}
        runs.append(fit(cell, task, readout, steps=4, lr=0.3, z0=torch.zeros(OUT).double(), batch=3, **extra).losses)
    np.testing.assert_allclose(*runs, rtol=1e-12)


def test_an_operator_that_is_no_gradient_is_followed_by_least_squares() -> None:
    """K is a Gram operator too, of the kicks: its factor says nothing of where the states go."""
    task, (model, readout) = some_task(), pair("torch")
    by_K, by_matrix = (
        rules.train(rule, copy.deepcopy(model), task, copy.deepcopy(readout), steps=1, lr=1e-3)
        for rule in (lambda flow: flow.K, lambda flow: kp.Operator(flow.K.domain, flow.K.domain, flow.K.mv, None))
    )
    np.testing.assert_allclose(by_K.losses, by_matrix.losses, rtol=1e-12)
