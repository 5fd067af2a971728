"""The Hankel operator: from past inputs, through the state at one time, to future outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.linalg import expm

from kpflow_dyn._problems.solutions import ODESolution, Solution
from kpflow_dyn._shown import ShownAsRepr, type_name
from kpflow_dyn.control._gramians import System, as_ltv, gram, root
from kpflow_dyn.control._linearisation import check_forward, mesh_edges
from kpflow_dyn.control._magnus import magnus, transposed
from kpflow_dyn.control._systems import LTV, as_system, coordinates, leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NULL = 1e-7  # Hankel singular values below this part of the first have modes of round-off only


@dataclass(frozen=True, eq=False)
class Hankel(ShownAsRepr):
    """The singular value decomposition of a Hankel operator, y = H u, at a split time.

    Modes whose value is below 1e-7 of the first are zeros.

    Attributes:
        split: the time between past and future.
        values: Hankel singular values, descending [trial, mode].
        inputs: the past inputs of each mode, of norm one in L^2 [trial, mode, time, input].
        states: the state at the split that such an input brings about [trial, mode, unit].
        outputs: the future outputs of each mode, of norm one in L^2 [trial, mode, time, output].

    Example as `hankel`.
    """

    split: float
    values: xr.DataArray
    inputs: xr.DataArray
    states: xr.DataArray
    outputs: xr.DataArray

    def __repr__(self) -> str:
        trials, modes = self.values.shape
        sizes = f"{trials} trials, {modes} modes, {self.inputs.shape[-1]} inputs, {self.outputs.shape[-1]} outputs"
        return f"Hankel(split at {self.split:.6g}, {sizes}; values {leading(self.values.values[0])} of trial 0)"

    def to_xarray(self) -> xr.Dataset:
        """A dataset of all attributes, where the times before the split are "past" and those behind it "future"."""
        import xarray as xr

        sides = {"inputs": self.inputs.rename(time="past"), "outputs": self.outputs.rename(time="future")}
        return xr.Dataset({"values": self.values, "states": self.states} | sides, attrs={"split": self.split})

    def plot(self, dark: bool = False) -> Figure:
        """The singular values, and the leading mode's input and output of each channel in the first trial."""
        from kpflow_dyn.figures import _control as figures

        return figures.hankel(self, dark=dark)


def hankel(system: System, split: float, *, t: Any = None, **options: Any) -> Hankel:
    """Which past inputs do most for future outputs, along each trial.

    With Wc(split) = R R^T and Wo(split) = O O^T, the values are the singular values of O^T R, the square roots of the
    eigenvalues of Wc Wo. Past inputs are those up to the split, future outputs those from it on.

    Args:
        system: a solution, an `LTV`, an `LTI` or what `LTI` takes.
        split: the time between past and future, inside of the trial. One of the times of an LTV, and the number of a
            step of a discrete problem; any time of the solution of an ODE without jumps, and a time of the grid of a
            sampled loop, a hybrid model, an SDE or a DDE.
        t: of an LTI its horizon, as `LTI.along` takes it. Of an ODE's solution the times.
        **options: of `linearize_ltv`, where a solution is given: `loop`, `inputs`, `C`.

    Raises:
        ValueError: a split that is no such time.
    Source: Moore, IEEE Trans. Automatic Control 26, 17 (1981); Glover, Int. J. Control 39, 1115 (1984).

    >>> import numpy as np
    >>> from kpflow_dyn import control
    >>> decay = control.LTI([[-1.0]], [[1.0]])
    >>> control.hankel(decay, 10.0, t=np.linspace(0, 20, 41)).values.values.round(6)
    array([[0.5]])
    """
    if isinstance(system, ODESolution):
        t = _times_with(split, system, t)
    ltv = as_ltv(system, t, options)
    at = _place(split, ltv)
    R = root(gram(ltv, "c").W.values[:, at])
    O = root(gram(ltv, "o").W.values[:, at])  # noqa: E741
    left, values, right = np.linalg.svd(transposed(O) @ R)
    reached = values > NULL * values[:, :1]
    scale = np.where(reached, 1 / np.where(reached, values, 1), 0)[:, None]
    starts, costs = R @ transposed(right) * reached[:, None], O @ left * scale  # costs = R^{-T} right
    return _labelled(ltv, at, values, _inputs(ltv, at, costs), starts, _outputs(ltv, at, starts * scale))


def _times_with(split: float, sol: ODESolution, t: Any) -> np.ndarray:
    check_forward(sol)
    times = np.asarray(sol.problem.t if t is None else t, np.float64)
    if not times[0] < split < times[-1]:
        ends = f"from {times[0]:.6g} to {times[-1]:.6g}"
        raise ValueError(f"split is {split}, expected a time inside of the trial, {ends}")
    if t is None and len(times) == 2:
        times = mesh_edges(sol)[1]
    return np.union1d(times, split)


def _place(split: float, ltv: LTV) -> int:
    time = ltv.time
    near = np.flatnonzero(np.abs(time - split) <= 1e-9 * np.abs(time).max())
    inner = time[:-1] if ltv.mesh is None else time[1:-1]
    if not len(near) or time[near[0]] not in inner:
        raise ValueError(
            f"split is {split}, expected one of the times inside of the trial, {len(inner)} from "
            f"{inner[:1]} to {inner[-1:]}"
        )
    return int(near[0])


def _inputs(ltv: LTV, at: int, costs: np.ndarray) -> np.ndarray:
    """u(s) = B(s)^T Phi(split, s)^T costs [trial, time up to the split, input, mode]."""
    phi, found = transitions(ltv), []
    for k in range(at, -1, -1):
        found.append(transposed(ltv.B.values[:, k]) @ costs)
        costs = transposed(phi[:, k]) @ costs
    return np.stack(found[::-1], 1)


def _outputs(ltv: LTV, at: int, starts: np.ndarray) -> np.ndarray:
    """y(s) = C(s) Phi(s, split) starts [trial, time from the split, output, mode]."""
    phi, found = transitions(ltv), [ltv.C.values[:, at] @ starts]
    for k in range(at + 1, len(ltv.time)):
        starts = phi[:, k] @ starts
        found.append(ltv.C.values[:, k] @ starts)
    return np.stack(found, 1)


def transitions(ltv: LTV) -> np.ndarray:
    """Phi from the time before to each time [trial, time, unit, unit]; to the first one, from the start."""
    if ltv.mesh is None:
        return ltv.A.values
    mesh = ltv.mesh
    steps = expm(magnus(mesh.A, np.diff(mesh.edges)))
    phi = np.broadcast_to(np.eye(steps.shape[-1]), steps[:, 0].shape)
    found, last = [], 0
    for place in mesh.at:
        here = phi
        for k in range(last, place):
            here = steps[:, k] @ here
        found.append(here)
        last = int(place)
    return np.stack(found, 1)


def _labelled(
    ltv: LTV, at: int, values: np.ndarray, inputs: np.ndarray, states: np.ndarray, outputs: np.ndarray
) -> Hankel:
    def of_modes(array: np.ndarray, axis: str, time: np.ndarray) -> xr.DataArray:
        return xr.DataArray(np.moveaxis(array, -1, 1), {"time": time}, ("trial", "mode", "time", axis))

    return Hankel(
        float(ltv.time[at]),
        xr.DataArray(values, dims=("trial", "mode")),
        of_modes(inputs, "input", ltv.time[: at + 1]),
        xr.DataArray(transposed(states), coordinates(ltv.names, "unit"), ("trial", "mode", "unit")),
        of_modes(outputs, "output", ltv.time[at:]),
    )


def hsvd(system: Any) -> np.ndarray:
    """The Hankel singular values of a stable LTI over infinite time, descending.

        s_i = sqrt(the eigenvalues of Wc Wo)

    Args:
        system: a stable `LTI`, or what `LTI` takes.

    Raises:
        TypeError, ValueError: something else, or one that is not stable.
    Source: Glover, Int. J. Control 39, 1115 (1984).

    >>> from kpflow_dyn import control
    >>> control.hsvd(control.LTI([[-1.0]], [[1.0]]))
    array([0.5])
    """
    if isinstance(system, Solution | LTV):
        raise TypeError(f"hsvd takes an LTI, got {type_name(system)}; hankel(system, split) takes trajectories")
    system = as_system(system)
    R, O = (root(gram(system, kind).W.values) for kind in ("c", "o"))  # noqa: E741
    return np.linalg.svd(O.T @ R, compute_uv=False)
