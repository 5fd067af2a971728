"""`kp.models.design`: constraints hold, forecasts are those of the very starts, known answers are found."""

import numpy as np
import pytest
import torch

import kpflow_dyn as kp
from kpflow_dyn.models import (
    Constrained,
    Dale,
    Gaussian,
    MaxRadius,
    Orthogonal,
    Planted,
    Signs,
    Sparse,
    TorchDefault,
    design,
    make_model,
)

TASK = kp.tasks.FlipFlop(bits=2, steps=8).sample(trials=4, seed=0)
SMALL = {"units": 10, "laws": [Gaussian(1.0)], "options": {"alpha": [0.5]}, "lr": 0.01, "steps": 20, "seeds": 1}


@pytest.mark.parametrize("law", [Gaussian(2.0), Orthogonal(1.3), TorchDefault(3.0), Dale(1.5)])
def test_drawn_weights_keep_all_constraints(law):
    given = [MaxRadius(0.8), Sparse(0.3), Signs(0.7)]
    for seed in range(3):
        W = Constrained(law, given).matrix(20, seed)
        assert np.count_nonzero(W) == 120
        assert (W[:, :14] >= 0).all() and (W[:, 14:] <= 0).all()
        assert abs(np.linalg.eigvals(W)).max() <= 0.8 * (1 + 1e-12)


def test_weights_that_keep_a_constraint_stay():
    W = Gaussian(0.5).matrix(20)
    assert (Constrained(Gaussian(0.5), [MaxRadius(2.0), Sparse(1.0)]).matrix(20) == W).all()
    assert (Constrained(Dale(1.0, 0.7), [Signs(0.7)]).matrix(20) == Dale(1.0, 0.7).matrix(20)).all()


def test_the_model_keeps_the_constraints():
    found = design(
        TASK, **SMALL | {"laws": [Gaussian(2.0)]}, constraints=[Sparse(0.2), MaxRadius(0.9)], dtype="float64"
    )
    W = found.model(0).cell.W.detach().numpy()
    assert np.count_nonzero(W) == 20
    assert abs(np.linalg.eigvals(W)).max() <= 0.9 * (1 + 1e-12)


@pytest.mark.parametrize("optimizer", ["adam", None])
def test_the_forecast_is_that_of_the_very_start(optimizer):
    found = design(TASK, **SMALL | {"dtype": "float64", "goal": 0.7, "optimizer": optimizer, "steps": 200})
    cell, readout = make_model("ctrnn", 2, 10, 2, init=Gaussian(1.0), alpha=0.5, seed=0, dtype="float64")
    assert torch.equal(cell.W, found.model(0).cell.W)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(cell, torch.from_numpy(TASK.inputs))))
    output, target = flow.output(readout, learn=True), torch.from_numpy(TASK.targets)
    own = kp.forecast(output, target, lr=0.01, steps=200, optimizer=optimizer, check=False)
    expected = own.steps_to(0.7 / own.loss[0])  # the targets are +-1, so an output of zero has the loss 1
    assert 0 < expected < 200
    np.testing.assert_allclose(found.steps, [[expected]], rtol=1e-9)
    np.testing.assert_allclose(found.left, [[own.loss[-1]]], rtol=1e-9)


def test_refined_steps_are_those_of_training():
    found = design(TASK, **SMALL | {"steps": 100, "goal": 0.3})
    cell, readout = found.model(0)
    losses = kp.train.fit(cell, TASK, readout, steps=100, lr=0.01).losses
    assert abs(found.trained[0, 0] - np.flatnonzero(losses <= 0.3)[0]) <= 2


def test_the_leak_that_fits_the_delay_is_found():
    """A unit of leak 1 without recurrence forgets at once, one of leak 0.1 still holds the input after eight steps."""
    task = kp.tasks.Lag(lag=8, steps=20).sample(trials=6, seed=0)
    family = {"laws": [Gaussian(0.0)], "options": {"alpha": [1.0, 0.1]}}
    found = design(task, **SMALL | family | {"steps": 60}, refine=0)
    assert found.best.options == {"alpha": 0.1}


def test_components_choose_what_counts():
    task = kp.tasks.TaskData(
        TASK.inputs, np.stack([TASK.inputs[..., 0], np.full((4, 8), np.e)], -1), outputs=("a", "b")
    )
    by_name, by_number = (design(task, **SMALL, components=[one], refine=0) for one in ("a", 0))
    assert (by_name.left == by_number.left).all()
    assert (by_name.left != design(task, **SMALL, components=["b"], refine=0).left).all()


def test_results_have_labels_and_order(undrawn):
    found = design(TASK, **SMALL | {"options": {"alpha": [0.1, 1.0]}, "seeds": 2}, refine=1)
    assert found.to_xarray().steps.dims == ("candidate", "seed")
    assert found.table.candidate[0] == str(found.best)
    assert np.isnan(found.trained).sum() == 2
    assert "alpha = 1.0" in str(found)
    found.plot()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"laws": []}, "family is empty"),
        ({"options": {"alpha": 0.1}}, "list of values"),
        ({"goal": 1.5}, "goal is 1.5"),
        ({"seeds": 0}, "seeds is 0"),
        ({"refine": -1}, "refine is -1"),
        ({"lr": 0}, "lr is 0"),
        ({"components": ["bit 9"]}, "no output 'bit 9'"),
        ({"components": []}, "no output counts"),
        ({"cell": "lowrank", "constraints": [Sparse()]}, "low-rank"),
        ({"laws": [None], "constraints": [Sparse()]}, "the cell's own"),
        ({"laws": [Planted(2)], "constraints": [Sparse()]}, "leave one of them"),
        ({"constraints": [0.5]}, "expected Signs, Sparse or MaxRadius"),
    ],
)
def test_bad_options_are_refused_in_words(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        design(TASK, **SMALL | change)


@pytest.mark.parametrize(("make", "option"), [(Signs, 1.0), (Signs, 0), (Sparse, 1.5), (Sparse, 0), (MaxRadius, -1)])
def test_bad_constraints_are_refused(make, option):
    with pytest.raises(ValueError):
        make(option)


def test_a_task_must_have_numbers_as_targets():
    with pytest.raises(TypeError, match="pass task"):
        design(kp.tasks.FlipFlop())
    with pytest.raises(ValueError, match="one-hot"):
        design(kp.tasks.TaskData(TASK.inputs, np.zeros((4, 8), int)))
    with pytest.raises(ValueError, match="at the goal already"):
        design(kp.tasks.TaskData(TASK.inputs, np.zeros((4, 8, 1))))


def test_zeros_of_the_law_count_among_those_of_sparse() -> None:
    W = Constrained(Gaussian(1.0), [Sparse(0.5), Sparse(0.3)]).matrix(20)
    assert np.count_nonzero(W) == 120
