"""Estimates, modes and summaries say in print and in figures what was estimated; messages for what is no operator."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kpflow_dyn as kp
from kpflow_dyn._arrays import to_numpy
from kpflow_dyn.figures import FIGURES

GRID = np.linspace(0.0, 2.0, 9)


class Decay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Linear(4, 4).double()

    def forward(self, t: Any, z: Any) -> Any:
        return torch.tanh(self.W(z)) - z


@cache
def flow() -> Any:
    torch.manual_seed(0)
    cell, x = nn.GRUCell(2, 16).double(), torch.randn(4, 12, 2, dtype=torch.float64)
    return kp.linearize(kp.solve(kp.DiscreteProblem(cell, x)))


@cache
def ode_flow() -> Any:
    torch.manual_seed(0)
    return kp.linearize(kp.solve(kp.ODEProblem(Decay(), torch.randn(3, 4).double(), GRID), "rk4"))


@cache
def estimated() -> kp.Modes:
    return kp.modes(flow().ntk, k=5, samples=40)


def test_estimated_modes_say_so_with_their_errors() -> None:
    text = str(estimated())
    first = float(estimated().values[0]), float(estimated().stderr[0])  # type: ignore[index]
    shown = re.search(r"values +(\S+) ± (\S+),", text)
    assert shown and [float(part) for part in shown.groups()] == pytest.approx(first, rel=0.1)
    assert "estimated, ± one standard error; values of modes that the samples do not resolve lie low" in text
    assert "converged" not in text and len(estimated()) == 5
    space = flow().ntk.domain
    exact = str(kp.modes(kp.MatrixOperator(flow().ntk.dense(), space, space, symmetric=True)))
    assert "±" not in exact and "estimated" not in exact and "converged" in exact


def test_bars_of_estimated_modes_have_errors_and_every_mode_a_line() -> None:
    bars, lines = estimated().plot().axes
    (errors,) = bars.containers[1:] if len(bars.containers) > 1 else (None,)
    assert errors is not None
    (segments,) = (line.get_segments() for line in errors.lines[2])
    stderr = 100 * to_numpy(estimated().stderr) / estimated().total
    np.testing.assert_allclose([end[1] - begin[1] for begin, end in segments], 4 * stderr)
    assert [text.get_text() for text in lines.get_legend().get_texts()] == [f"mode {i}" for i in range(1, 6)]


@pytest.mark.parametrize("given", ["discrete", "ode", "nodal", "readout"])
def test_modes_over_time_have_the_times_of_the_solution(given: str) -> None:
    flows: dict[str, Callable[[], Any]] = {
        "discrete": flow,
        "ode": ode_flow,
        "nodal": lambda: ode_flow().nodal,
        "readout": lambda: ode_flow().output(nn.Linear(4, 2).double()),
    }
    found = kp.modes(flows[given]().ntk, k=2)
    data = found.to_xarray()
    np.testing.assert_allclose(data.explained, to_numpy(found.explained))
    if given == "nodal":  # the steps of the solver
        assert "time" not in data.coords
    else:
        np.testing.assert_allclose(data.time, np.arange(1, 13) if given == "discrete" else GRID)
        line = found.plot().axes[1].lines[1]
        np.testing.assert_allclose(line.get_xdata(), data.time)
    assert found.plot().axes[1].get_xlabel() == "Time"
    assert kp.eigs(flows[given]().ntk, 2).to_xarray().sizes["time"] == data.sizes["time"]


def test_the_sign_of_a_mode_is_that_of_analyze() -> None:
    dataset = kp.analyze(flow())
    for axis, name in (("time", "temporal_mode"), ("unit", "spatial_mode"), ("trial", "trial_mode")):
        for rows in (to_numpy(kp.modes(flow().ntk, axis, k=2).vectors), dataset[name].values):
            assert (rows.max(1) >= -rows.min(1)).all()
    assert FIGURES["temporal_modes"](dataset).axes[1].get_legend()


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (kp.Estimate(35.78190783540293, 0.0625, 120, "probes"), "35.782 ± 0.062 (120 applications, probes)"),
        (kp.Estimate(35.78190783540293, 0.0, 9, "exact: matrix"), "35.78, exact"),
        (kp.Estimate(0.0, 3.0, 9, "probes"), "0.0 ± 3.0 (9 applications, probes)"),
        (kp.Estimate(0.0, 0.0, 9, "all columns"), "0 (9 applications, all columns)"),
    ],
)
def test_an_estimate_is_printed_to_the_digits_of_its_error(estimate: kp.Estimate, text: str) -> None:
    assert repr(estimate) == str(estimate) == f"{estimate}" == text
    assert f"{estimate:.2f}" == f"{estimate.value:.2f}" and float(estimate) == estimate.value
    assert text in estimate._repr_html_()


def test_a_summary_gives_what_it_prints_by_name() -> None:
    found = kp.summary(flow(), k=2)
    for name, number in found.numbers().items():
        assert found[name] is not None and found[name].value == number.value and name in str(found)
    for line in repr(found).splitlines()[1:]:
        found_at = found
        for part in line.split()[0].split("."):
            found_at = getattr(found_at, part)
    with pytest.raises(KeyError, match="'ntk_rank' is no scalar of this summary; it has core_trace, "):
        found["ntk_rank"]


TAKERS: dict[str, Callable[[Any], Any]] = {
    "eigs": lambda op: kp.eigs(op, 3),
    "svds": lambda op: kp.svds(op, 3),
    "modes": kp.modes,
    "eigenvalues": kp.eigenvalues,
    "trace": kp.trace,
    "frobenius_norm": kp.frobenius_norm,
    "effective_rank": kp.effective_rank,
    "alignment": lambda op: kp.alignment(flow().K, op),
    "rayleigh": lambda op: kp.rayleigh(op, torch.zeros(1)),
    "partial_trace": lambda op: kp.partial_trace(op, "time"),
    "marginal": lambda op: kp.marginal(op, "time"),
    "schmidt_rank": lambda op: kp.schmidt_rank(op, "time"),
    "spectral_density": kp.spectral_density,
    "check_adjoint": kp.check_adjoint,
}


@pytest.mark.parametrize("name", TAKERS)
def test_a_flow_in_the_place_of_an_operator_is_answered_by_what_to_pass(name: str) -> None:
    solution = flow().solution
    for given in (flow(), solution, solution.problem, np.eye(3)):
        with pytest.raises(TypeError, match=r"got .*, expected an operator: pass flow\.ntk \(or flow\.K, flow\.P\)"):
            TAKERS[name](given)


def test_problems_name_the_axes_of_their_inputs() -> None:
    problem = flow().solution.problem
    assert "x     [trial 4, time 12, input 2] float64 on cpu" in repr(problem)
    assert "[trial 3, unit 4]" in repr(ode_flow().solution.problem)


def test_trials_in_the_plane_have_colours_and_starts() -> None:
    solution = flow().solution
    axes = solution.plot().axes[0]
    lines, starts = axes.lines[:4], axes.collections[0].get_offsets()
    assert len({line.get_color() for line in lines}) == 4
    np.testing.assert_allclose(starts, [[line.get_xdata()[0], line.get_ydata()[0]] for line in lines])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["start"]
