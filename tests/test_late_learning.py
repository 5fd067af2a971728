"""Losses that are halved very late, or never: against the flow of each trial in closed form, and dense kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch.nn.functional import one_hot

import kpflow_dyn as kp
from kpflow_dyn._learning import linearised
from kpflow_dyn._learning.losses import output_loss
from kpflow_dyn._learning.parts import Parts, parts_of
from kpflow_dyn.report import page_of
from kpflow_dyn.report._learning_charts import _halved
from kpflow_dyn.report._numbers import words
from kpflow_dyn.tasks import TaskData

CLASSES = torch.tensor([[0], [1], [2], [0]])


class Direct(torch.nn.Module):
    """Each trial has a weight of its own for each output: the model is linear in them, and its kernel is diagonal."""

    hidden_size = 3

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def output(*scales: float, dtype: torch.dtype = torch.float64) -> kp.Output:
    x, start = torch.diag(torch.tensor(scales, dtype=dtype))[:, None], torch.zeros(4, 3, dtype=dtype)
    flow = kp.linearize(kp.solve(kp.DiscreteProblem(Direct().to(dtype), x, start)))
    return flow.output(torch.eye(3, dtype=dtype))


def found_of(y: kp.Output, loss: str, target: Any) -> Parts:
    return parts_of(y, output_loss(loss, target, None, y.values))


def cross_entropies(tau: float, scales: tuple[float, ...]) -> np.ndarray:
    """Of each trial: the logit of its class is u above the others, and 3 s^2 tau / 4 = exp(u) - 1 + 2 u."""
    u = [brentq(lambda u, z=0.75 * s * s * tau: np.expm1(u) + 2 * u - z, 0, 60) for s in scales]
    return np.log1p(2 * np.exp(-np.array(u)))


def time_to(part: float, scales: tuple[float, ...]) -> float:
    def over(log: float) -> float:
        return float(cross_entropies(np.exp(log), scales).sum() - part * 4 * np.log(3))

    return float(np.exp(brentq(over, 0, 45)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_half_far_behind_a_million_times_of_the_fastest_direction(dtype: torch.dtype) -> None:
    scales = (1.0, 1e-4, 1e-4, 1e-4)
    half, tenth = (time_to(part, scales) for part in (0.5, 0.1))
    y = output(*scales, dtype=dtype)
    assert half > 1e8
    table, parts = kp.learnability(y, [CLASSES], loss="cross_entropy"), found_of(y, "cross_entropy", CLASSES)
    np.testing.assert_allclose([table.half[0], table.tenth[0]], [half, tenth], rtol=2e-2)
    np.testing.assert_allclose([parts.half[0], parts.tenth[0]], [half, tenth], rtol=2e-2)
    assert table.unreached[0] == pytest.approx(0.75, abs=1e-2)  # which is learnt, late
    assert "its error lies in directions that the kernel hardly moves" in parts.words[0]
    forecast = kp.forecast(y, CLASSES, lr=1.0, steps=int(2 * half), loss="cross_entropy", check=False)
    assert forecast.steps_to(0.5) == pytest.approx(table.half[0], rel=2e-2)


@pytest.mark.parametrize(("slow", "dtype"), [(0.0, torch.float64), (1e-7, torch.float32)])  # below 1e-12: no rate
def test_never_is_said_of_what_stays(slow: float, dtype: torch.dtype) -> None:
    y = output(slow, 0.3, slow, slow, dtype=dtype)
    table, parts = kp.learnability(y, [CLASSES], loss="cross_entropy"), found_of(y, "cross_entropy", CLASSES)
    assert np.isinf([table.half[0], table.tenth[0], parts.half[0], parts.tenth[0]]).all()
    by_name = dict(zip(parts.names, parts.half, strict=True))
    assert np.isinf(by_name["class 2"]) and np.isfinite(by_name["class 1"])


def test_where_nearly_all_is_learnt_and_a_trial_never_is() -> None:
    """Its gradients become so small that rows of the basis are within round-off of each other."""
    scales = (1.0, 1e-2, 1e-5, 0.0)
    table = kp.learnability(output(*scales), [CLASSES], loss="cross_entropy")
    assert table.half[0] == pytest.approx(time_to(0.5, scales), rel=5e-2) and np.isinf(table.tenth[0])


def test_squared_errors_that_are_late_or_never_done() -> None:
    target = one_hot(CLASSES, 3).double()
    late, never = (kp.learnability(output(1.0, s, s, s), [target]) for s in (1e-4, 0.0))
    assert late.half[0] == pytest.approx(3 * np.log(1.5) * 1e8, rel=1e-2) and np.isinf(never.half[0])  # 3/4 decay
    single = kp.learnability(output(1.0, 1e-4, 1e-4, 1e-4, dtype=torch.float32), [target.float()])
    assert np.isnan(single.half[0]) and 1e5 < single.followed[0] < late.half[0]  # rates below its round-off
    *_, row, _, _, later = str(single).splitlines()
    assert row.count(f"> {single.followed[0]:.3g}") == 2 and later.startswith("> 20: later than tau = 20")


def test_what_was_not_followed_to_its_end_is_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearised, "MOST", 60)
    scales = (1.0, 1e-4, 1e-4, 1e-4)
    y = output(*scales)
    table, parts = kp.learnability(y, [CLASSES], loss="cross_entropy"), found_of(y, "cross_entropy", CLASSES)
    for half, followed in ((table.half[0], table.followed[0]), (parts.half[0], parts.course.followed)):
        assert np.isnan(half) and 1 < followed < time_to(0.5, scales)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_one_largest_rate_and_the_limit_of_descent(loss: str) -> None:
    """Against the dense kernel, the forecast, and descent of the linearised model just above the limit and below."""
    torch.manual_seed(0)
    cell, readout, x = torch.nn.GRUCell(2, 8).double(), torch.nn.Linear(8, 3).double(), torch.randn(4, 6, 2).double()
    readout.weight.data *= 8
    y = kp.linearize(kp.solve(kp.DiscreteProblem(cell, x))).output(readout, learn=True)
    classes = torch.randint(0, 3, (4, 6))
    target = classes if loss == "cross_entropy" else one_hot(classes, 3).double()
    of_outputs = output_loss(loss, target, None, y.values)
    A, flat = y.ntk.dense(), y.values.detach().reshape(-1)
    H = torch.autograd.functional.hessian(lambda v: of_outputs(v.reshape(4, 6, 3)), flat)
    largest = float(torch.linalg.eigvals(A @ H).real.max())
    parts = parts_of(y, of_outputs)
    assert parts.largest_rate == pytest.approx(largest, rel=2e-3)
    forecast = kp.forecast(y, target, lr=1.9 / largest, steps=5, loss=loss, check=False)
    assert parts.largest_rate == pytest.approx(forecast.rates.max(), rel=2e-3)
    with pytest.raises(ValueError, match="unstable"):
        kp.forecast(y, target, lr=2.1 / parts.largest_rate, steps=5, loss=loss, check=False)


def test_the_page_says_later_than_and_what_descent_is_stable_below(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearised, "MOST", 60)
    y = output(1.0, 1e-4, 1e-4, 1e-4)
    task = TaskData(y.flow.solution.problem.x.numpy(), targets=CLASSES.numpy())
    found = kp.analyze(y.flow, task=task, readout=torch.nn.Linear(3, 3).double(), loss="cross_entropy", k=2, samples=40)
    page = page_of(found)
    table = page.tables[0]
    assert np.isnan(found.part_half[0]) and table.rows[0][table.header.index("Half at tau")].startswith("> ")
    assert "later than tau = " in " ".join(page.lead) and table.rows[0][-1] != "-"
    assert "stable below a learning rate of 2 / this" in words("largest_rate") and page.settings["largest_rate"] > 0
    assert "later" not in _halved(np.inf, 3.0)
