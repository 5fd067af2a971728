"""Planted fixed points: fixed to round-off, and nothing else about the cell changed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kpflow_dyn.models import CTRNNCell, LowRankRNNCell, plant_fixed_points

POINTS, UNITS, INPUTS = 5, 12, 3
CELLS = {
    "ctrnn": lambda: CTRNNCell(INPUTS, UNITS, alpha=0.3),
    "ctrnn learnt leaks": lambda: CTRNNCell(INPUTS, UNITS, alpha=0.3, learn_alpha=True),
    "ctrnn relu": lambda: CTRNNCell(INPUTS, UNITS, nonlinearity="relu"),
    "rnn": lambda: nn.RNNCell(INPUTS, UNITS),
    "rnn relu": lambda: nn.RNNCell(INPUTS, UNITS, nonlinearity="relu"),
    "rnn without biases": lambda: nn.RNNCell(INPUTS, UNITS, bias=False),
}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[CTRNNCell | nn.RNNCell, Tensor, Tensor]:
    """A cell whose biases are not zero, states that it can reach, and what W multiplies at these."""
    torch.manual_seed(0)
    cell = CELLS[name]().to(dtype)
    for parameter in cell.parameters():
        nn.init.normal_(parameter, std=0.4)
    states = torch.randn(POINTS, UNITS, dtype=dtype)
    if isinstance(cell, nn.RNNCell):
        states = states.tanh() if cell.nonlinearity == "tanh" else states.abs()
        return cell, states, states
    return cell, states, states.tanh() if cell.nonlinearity == "tanh" else states.relu()


def recurrent(cell: CTRNNCell | nn.RNNCell) -> Tensor:
    return (cell.W if isinstance(cell, CTRNNCell) else cell.weight_hh).detach().clone()


@pytest.mark.parametrize("held", ["none", "one", "each"])
@pytest.mark.parametrize("name", CELLS)
def test_points_are_fixed_and_the_complement_is_as_before(name: str, held: str) -> None:
    cell, states, seen = made(name)
    before = {key: value.clone() for key, value in cell.state_dict().items()}
    W0 = recurrent(cell)
    given = {"none": None, "one": torch.randn(INPUTS).double(), "each": torch.randn(POINTS, INPUTS).double()}[held]
    assert plant_fixed_points(cell, states, given) is cell
    x = torch.zeros(INPUTS).double() if given is None else given
    torch.testing.assert_close(cell(x.expand(POINTS, -1), states), states, rtol=0, atol=1e-10)
    complement = torch.linalg.qr(seen.T, mode="complete").Q[:, POINTS:]
    torch.testing.assert_close(recurrent(cell) @ complement, W0 @ complement, rtol=0, atol=1e-10)
    assert (recurrent(cell) - W0).abs().max() > 0.1
    changed = [key for key, value in cell.state_dict().items() if not torch.equal(value, before[key])]
    assert changed == ["W" if isinstance(cell, CTRNNCell) else "weight_hh"]


def test_the_weight_of_a_float32_cell_is_rounded_once() -> None:
    (cell, states, _), (exact, *_) = made("ctrnn", torch.float32), made("ctrnn", torch.float32)
    plant_fixed_points(cell, states)
    plant_fixed_points(exact.double(), states.double())
    assert cell.W.dtype == torch.float32 and cell.W.requires_grad
    torch.testing.assert_close(cell.W, exact.W.float(), rtol=1e-6, atol=1e-7)


def test_as_many_points_as_units_and_no_more() -> None:
    cell, _, _ = made("ctrnn")
    states = torch.randn(UNITS + 1, UNITS).double()
    plant_fixed_points(cell, states[:UNITS])
    moved = cell(torch.zeros(UNITS, INPUTS).double(), states[:UNITS]) - states[:UNITS]
    assert moved.abs().max() < 1e-8
    with pytest.raises(ValueError, match="at the 13 states has the rank 12, of 12 units"):
        plant_fixed_points(cell, states)


@pytest.mark.parametrize("name", ["ctrnn", "rnn"])
def test_dependent_rates_are_refused_and_the_cell_stays(name: str) -> None:
    cell, states, _ = made(name)
    W0 = recurrent(cell)
    with pytest.raises(ValueError, match=r"at the 6 states has the rank 5.*leave points out"):
        plant_fixed_points(cell, torch.cat([states, states[:1]]))
    assert torch.equal(recurrent(cell), W0)


@pytest.mark.parametrize(("name", "interval"), [("rnn", "-1 < z < 1"), ("rnn relu", "z >= 0")])
def test_states_that_no_step_reaches_are_refused(name: str, interval: str) -> None:
    cell, states, _ = made(name)
    with pytest.raises(ValueError, match=f"expected {interval}"):
        plant_fixed_points(cell, states - 2)


@pytest.mark.parametrize(
    ("states", "x", "message"),
    [
        (torch.zeros(UNITS), None, r"states has the shape \(12,\), expected \[point, unit\]"),
        (torch.zeros(2, UNITS + 1), None, r"states has the shape \(2, 13\)"),
        (torch.full((2, UNITS), torch.nan), None, "states has a NaN"),
        (torch.eye(2, UNITS), torch.zeros(3, INPUTS), r"x has the shape \(3, 3\), expected \[input\] or"),
        (torch.eye(2, UNITS), torch.full((INPUTS,), torch.inf), "x has a NaN or infinity"),
    ],
)
def test_bad_arrays_are_explained(states: Tensor, x: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plant_fixed_points(CTRNNCell(INPUTS, UNITS), states, x)


def test_other_cells_are_refused() -> None:
    with pytest.raises(TypeError, match="LowRankRNNCell, expected a CTRNNCell"):
        plant_fixed_points(LowRankRNNCell(INPUTS, UNITS), torch.eye(2, UNITS))
