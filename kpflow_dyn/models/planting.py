"""Start a recurrent cell from fixed points of one's choice."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kpflow_dyn.models.torch_cells import RATES, CTRNNCell

Cell = TypeVar("Cell", CTRNNCell, nn.RNNCell)

INDEPENDENT = 1e-8  # smallest singular value of S over the largest; the change of W grows as its inverse


@torch.no_grad()
def plant_fixed_points(cell: Cell, states: Tensor, x: Tensor | None = None) -> Cell:
    """Change the recurrent weight of a cell so that these states are fixed points under a constant input.

        W = D S^+ + W0 (I - S S^+)

    S [unit, point] is what W multiplies at the states z, and D [unit, point] what W S has to be: phi(z) and z - U x - b
    for a `CTRNNCell`, z and phi^-1(z) - W_ih x - b_ih - b_hh for an nn.RNNCell. Of all weights with these fixed points
    W is the nearest to W0, and does what W0 did to all that is orthogonal to S. The points need not be stable.

    Args:
        cell: a CTRNNCell or nn.RNNCell, changed in place.
        states: z [point, unit]; for an nn.RNNCell in the range of its nonlinearity.
        x: the input [input], or one for each point [point, input]; zeros when None.

    Returns:
        The cell.

    Raises:
        TypeError: another cell.
        ValueError: states or x of another shape or not finite, states out of that range, or linearly dependent columns
            of S, as more points than units always have.

    Example:
        >>> cell, states = CTRNNCell(3, 64).double(), torch.randn(5, 64, dtype=torch.float64)
        >>> cell = plant_fixed_points(cell, states)
        >>> bool((cell(torch.zeros(5, 3).double(), states) - states).abs().max() < 1e-8)
        True

    Source: after Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.
    """
    if not isinstance(cell, CTRNNCell | nn.RNNCell):
        raise TypeError(f"cell is {type(cell).__name__}, expected a CTRNNCell or an nn.RNNCell")
    x = states.new_zeros(cell.input_size) if x is None else x
    _check("states", states, "point, unit", [(len(states), cell.hidden_size)])
    _check("x", x, "input] or [point, input", [(cell.input_size,), (len(states), cell.input_size)])
    z, x = states.double(), x.double()  # rounded to the cell's dtype at the end alone
    W, S, D = _of_ctrnn(cell, z, x) if isinstance(cell, CTRNNCell) else _of_rnn(cell, z, x)
    _check_independent(S)
    W += (D - S @ W.double().T).T @ torch.linalg.pinv(S).T
    return cell


def _of_ctrnn(cell: CTRNNCell, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W, and the rows of S^T and D^T."""
    return cell.W, RATES[cell.nonlinearity](z), z - linear(x, cell.U.double(), cell.b.double())


def _of_rnn(cell: nn.RNNCell, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    biases = cell.bias_ih.double() + cell.bias_hh.double() if cell.bias else None
    return cell.weight_hh, z, _before(cell.nonlinearity, z) - linear(x, cell.weight_ih.double(), biases)


def _before(nonlinearity: str, z: Tensor) -> Tensor:
    """What phi makes z of."""
    inside, interval = (z.abs() < 1, "-1 < z < 1") if nonlinearity == "tanh" else (z >= 0, "z >= 0")
    if not inside.all():
        raise ValueError(f"no step of the {nonlinearity} cell ends in these states; expected {interval}")
    return z.atanh() if nonlinearity == "tanh" else z


def _check(name: str, array: Tensor, axes: str, shapes: list[tuple[int, ...]]) -> None:
    if tuple(array.shape) not in shapes:
        raise ValueError(f"{name} has the shape {tuple(array.shape)}, expected [{axes}] = {shapes}")
    if not array.isfinite().all():
        raise ValueError(f"{name} has a NaN or infinity")


def _check_independent(S: Tensor) -> None:
    rank = int(torch.linalg.matrix_rank(S, rtol=INDEPENDENT))
    if rank < len(S):
        raise ValueError(
            f"what W multiplies at the {len(S)} states has the rank {rank}, of {S.shape[1]} units, so that W cannot "
            "hold them all; leave points out, or move them apart"
        )
