"""Start a recurrent cell from fixed points of one's choice."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from kpflow_dyn._arrays import Array, to_numpy
from kpflow_dyn._problems.parameters import changed, parameters_of
from kpflow_dyn._shown import type_name

Cell = TypeVar("Cell", bound=Any)

INDEPENDENT = 1e-8  # smallest singular value of S over the largest; the change of W grows as its inverse
RATES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"tanh": np.tanh, "relu": lambda z: np.maximum(z, 0)}
WEIGHTS = {
    **dict.fromkeys(["kpflow_dyn.models._torch_models.CTRNNCell", "kpflow_dyn.models.jax.CTRNNCell"], "W"),
    **dict.fromkeys(["torch.nn.modules.rnn.RNNCell", "kpflow_dyn.models.jax.RNNCell"], "weight_hh"),
}
"""The recurrent weight of each cell, by the cell's full name, for which no framework need be imported."""


def plant_fixed_points(cell: Cell, states: Array, x: Array | None = None) -> Cell:
    """Change the recurrent weight of a cell so that these states are fixed points under a constant input.

        W = D S^+ + W0 (I - S S^+)

    S [unit, point] is what W multiplies at the states z, and D [unit, point] what W S has to be: phi(z) and z - U x - b
    for a `CTRNNCell`, z and phi^-1(z) - W_ih x - b_ih - b_hh for an RNNCell. Of all weights with these fixed points
    W is the nearest to W0, and does what W0 did to all that is orthogonal to S. The points need not be stable.

    Args:
        cell: a CTRNNCell, nn.RNNCell, or one of these of `kpflow_dyn.models.jax`. In torch it is changed in place and
            returned; in JAX the result is a new one.
        states: z [point, unit]; for an RNNCell in the range of its nonlinearity.
        x: the input [input], or one for each point [point, input]; zeros when None.

    Raises:
        TypeError: another cell.
        ValueError: states or x of another shape or not finite, states out of that range, or linearly dependent columns
            of S, as more points than units always have.
    Source: after Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.

    >>> import torch
    >>> from kpflow_dyn.models import CTRNNCell
    >>> cell, states = CTRNNCell(3, 64).double(), torch.randn(5, 64, dtype=torch.float64)
    >>> cell = plant_fixed_points(cell, states)
    >>> bool((cell(torch.zeros(5, 3).double(), states) - states).abs().max() < 1e-8)
    True
    """
    return changed(cell, planted(cell, states, x))


def planted(cell: Any, states: Array, x: Array | None = None, start: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The recurrent weight that a cell needs, by its name; W0 is `start`, or the weight that the cell has."""
    name, inputs = recurrent_weight(cell), cell.input_size
    z = np.asarray(to_numpy(states), np.float64)  # rounded to the cell's dtype at the end alone
    held = np.zeros(inputs) if x is None else np.asarray(to_numpy(x), np.float64)
    _check("states", z, "point, unit", [(len(z), cell.hidden_size)])
    _check("x", held, "input] or [point, input", [(inputs,), (len(z), inputs)])
    weights = {key: np.asarray(to_numpy(value), np.float64) for key, value in parameters_of(cell).items()}
    S, D = (_of_ctrnn if name == "W" else _of_rnn)(weights, cell.nonlinearity, z, held)
    return {name: planted_weight(weights[name] if start is None else start, S, D)}


def recurrent_weight(cell: Any) -> str:
    """The name of the recurrent weight of a cell that can have planted fixed points; a TypeError for another cell."""
    bases = [f"{base.__module__}.{base.__qualname__}" for base in type(cell).__mro__]
    found = next((WEIGHTS[base] for base in bases if base in WEIGHTS), None)
    if found is None:
        raise TypeError(f"cell is {type_name(cell)}, expected a CTRNNCell or an RNNCell")
    return found


def planted_weight(W: np.ndarray, S: np.ndarray, D: np.ndarray) -> np.ndarray:
    """The nearest weight to W [unit, unit] that makes D of S, both [point, unit], whose rows are independent."""
    rank = int(np.linalg.matrix_rank(S, rtol=INDEPENDENT))
    if rank < len(S):
        raise ValueError(
            f"what W multiplies at the {len(S)} states has the rank {rank}, of {S.shape[1]} units, so that W cannot "
            "hold them all; leave points out, or move them apart"
        )
    return W + (D - S @ W.T).T @ np.linalg.pinv(S).T


def _of_ctrnn(weights: dict[str, np.ndarray], phi: str, z: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of S^T and D^T."""
    return RATES[phi](z), z - x @ weights["U"].T - weights["b"]


def _of_rnn(weights: dict[str, np.ndarray], phi: str, z: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    biases = weights.get("bias_ih", 0.0) + weights.get("bias_hh", 0.0)
    return z, _before(phi, z) - x @ weights["weight_ih"].T - biases


def _before(nonlinearity: str, z: np.ndarray) -> np.ndarray:
    """What phi makes z of."""
    inside, interval = (np.abs(z) < 1, "-1 < z < 1") if nonlinearity == "tanh" else (z >= 0, "z >= 0")
    if not inside.all():
        raise ValueError(f"no step of the {nonlinearity} cell ends in these states; expected {interval}")
    return np.arctanh(z) if nonlinearity == "tanh" else z


def _check(name: str, array: np.ndarray, axes: str, shapes: list[tuple[int, ...]]) -> None:
    if array.shape not in shapes:
        raise ValueError(f"{name} has the shape {array.shape}, expected [{axes}] = {shapes}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has a NaN or infinity")
