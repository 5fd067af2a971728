"""Every member of the zoo that is installed: pytest -m zoo tests/zoo."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import kpflow_dyn as kp

from .measure import measure
from .member import Member, members

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of the packages
    MEMBERS = {member.name: member for _, member in members()[0].values()}


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_what_autograd_says(name: str) -> None:
    member = MEMBERS[name]
    row = measure(member)
    assert row["outcome"] == ("refused" if member.refused else "right"), row
    assert member.refused in row["sentence"]


@pytest.mark.parametrize(("scale", "outcome"), [(1.0, "right"), (1.0001, "wrong")])
def test_an_operator_that_is_not_autograds_is_called_wrong(
    scale: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    problem = kp.StaticProblem(net, torch.randn(2, 3, dtype=torch.float64), state="")
    linearize = kp.linearize
    monkeypatch.setattr(kp, "linearize", lambda solution: _scaled(linearize(solution), scale))
    row = measure(Member("MLP", "torch", lambda: problem))
    assert row["outcome"] == outcome and row["road"] == "first"
    assert [name for name, error in row["errors"].items() if error > 1e-12] == (["J", "J*"] if scale != 1 else [])


def _scaled(flow: kp.Flow, scale: float) -> kp.Flow:
    return dataclasses.replace(flow, J=scale * flow.J)
