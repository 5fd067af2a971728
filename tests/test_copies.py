"""Flows and solutions can be copied, backends and their parts pickled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._backend import BACKENDS

NET = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
X, START = torch.randn(4, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
PROBLEMS = {
    "cell": lambda: kp.DiscreteProblem(nn.GRUCell(3, 5).double(), X[None]),
    "ODE": lambda: kp.ODEProblem(kp.models.MLPField(3, 8).double(), START, [0.0, 0.5, 1.0]),
    "network": lambda: kp.StaticProblem(NET, X),
    "fixed point": lambda: kp.FixedPointProblem(nn.RNNCell(3, 5).double(), X),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_copied_flow_has_the_same_kernel(name: str) -> None:
    flow = kp.linearize(kp.solve(PROBLEMS[name]()))
    copied, q = copy.deepcopy(flow), torch.randn(1, *flow.ntk.domain.shape, dtype=torch.float64)
    torch.testing.assert_close(copied.ntk.mv(q), flow.ntk.mv(q), rtol=0, atol=0)
    assert copied.solution.problem.backend is flow.solution.problem.backend


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_and_their_parts_are_pickled_by_name(name: str) -> None:
    backend = BACKENDS[name]
    assert pickle.loads(pickle.dumps(backend)) is backend
    assert pickle.loads(pickle.dumps(backend.transforms)).jvp is backend.transforms.jvp
    with pytest.raises(AttributeError, match="has no part 'nonsense', expected one of data, models"):
        backend.nonsense  # noqa: B018
