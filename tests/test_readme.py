"""What the README shows must run as it stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from code_blocks import ROOT, python_blocks, run

import kpflow_dyn as kp

BLOCKS = python_blocks(ROOT / "README.md")


def test_the_network_of_ones_own() -> None:
    names = run(BLOCKS[0])
    torch.testing.assert_close(names["moved"][0], names["flow"].ntk.mv(names["q"][0]))
    assert 1 <= names["rank"].value <= names["temporal"].space.size
    assert bool(names["leading"].converged.all())


def test_the_controller() -> None:
    names = run(BLOCKS[1])
    t, temporal = names["flow"].solution.t, names["temporal"]
    assert 0 < t[0] < t[-1] < 3
    weights, modes = names["flow"].solution.weights, np.asarray(temporal.vectors)
    np.testing.assert_allclose(modes * weights @ modes.T, np.eye(3), atol=1e-4)


def test_the_network_without_recurrence() -> None:
    names = run(BLOCKS[2])
    flow = names["flow"]
    assert flow.ntk.domain.axes == ("trial", "site", "token", "unit")
    assert 1 <= names["tokens"].value <= 10
    q = torch.randn(1, *flow.ntk.domain.shape, dtype=torch.float64)
    torch.testing.assert_close((flow.P @ flow.K @ flow.P.T).mv(q), flow.ntk.mv(q))


def test_optimisers_and_rules() -> None:
    names = run(BLOCKS[3])
    flow, shares = names["flow"], names["shares"]
    assert sum(part.value for part in shares.values()) == pytest.approx(shares.total.value)
    assert set(names["biases"].parameters) == {"bias_ih", "bias_hh"}
    assert names["likeness"].value < 1
    assert names["outputs"].domain.shape == (4, 10, 2)
    plain = kp.linearize(names["solution"])
    q = torch.randn(1, *flow.ntk.domain.shape)
    torch.testing.assert_close(flow.ntk.mv(q), 1e-3 * plain.ntk.mv(q))


def test_what_will_be_learnt() -> None:
    names = run(BLOCKS[5])
    assert names["half"] > 0 and names["trusted"] > 0 and names["table"].names == ("target", "constant")
    assert names["flow"].reached and 0 < names["tenth"] < 50
    assert set(names["trained"]) >= {"weight_hh", "loss.weight"}


def test_there_is_no_other_example() -> None:
    assert len(BLOCKS) == 8


def test_dynamics_and_control() -> None:
    names = run(BLOCKS[6])
    assert names["points"].is_stable.any() and names["spectrum"].mean.shape == (4,)
    assert (names["poles"].real < 0).all() and 1 <= names["dimension"].value <= 16
    assert names["angles"].share.shape == (1, 21, 2)


def test_sweeps() -> None:
    ranks = run(BLOCKS[7])["ranks"]
    assert ranks.dims == ("g",) and (ranks > 1).all()


def test_tasks_training_and_checkpoints() -> None:
    names = run(BLOCKS[4])
    assert names["run"].steps.tolist() == [0, 10, 20, 30]
    np.testing.assert_array_equal(names["run"].losses, names["training"].losses[::10])
    assert not torch.equal(names["before"].weight_hh_l0, names["cell"].weight_hh_l0)
