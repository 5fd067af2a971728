"""Whether what learning can change lies in what the input can reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from scipy.linalg import subspace_angles

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._numbers.spectra import Modes
from kpflow_dyn._shown import Row, Shown, labelled, number
from kpflow_dyn.control._gramians import Gramian

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class ReachableAngles(Shown):
    """Learning modes beside the leading directions of a Gramian.

    Attributes:
        angles: principal angles between the two spans, ascending, in radians [trial, time, angle]: 0 for a direction
            that they share. NaN where the Gramian or the NTK is zero, which has no directions.
        share: which part of each mode lies in the span of the Gramian's directions, its squared projection
            [trial, time, mode]; NaN as the angles.

    Example as `reachable_angles`.
    """

    angles: xr.DataArray
    share: xr.DataArray

    def _shown(self) -> tuple[str, list[Row]]:
        least, most = (number(f(np.degrees(self.angles.values))) for f in (np.nanmin, np.nanmax))
        rows: list[Row] = [("angles", f"{labelled(self.angles)}, {least} to {most} degrees")]
        return "ReachableAngles", [*rows, ("share", f"{labelled(self.share)}, {number(self.share.mean())} in the mean")]

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `angles` and `share`."""
        import xarray as xr

        return xr.Dataset({name: getattr(self, name) for name in ("angles", "share")})

    def plot(self, dark: bool = False) -> Figure:
        """The angles, and the share of each mode, over time."""
        from kpflow_dyn.figures import _control as figures

        return figures.angles(self, dark=dark)


def reachable_angles(modes: Modes, gram: Gramian, rank: int | None = None) -> ReachableAngles:
    """The principal angles between spatial modes of the NTK and the leading directions of a Gramian, at each time.

        cos(angles) = the singular values of V^T U        share = |U^T v|^2 for each mode v

    V being spatial modes, patterns over units in which gradient descent changes the states most, and U the leading
    eigenvectors of the Gramian, in which the input moves them most. (Which weights the changes come from,
    `kp.contributions(flow)` tells.)

    Args:
        modes: `kp.modes(flow.ntk, axis="unit", k=...)`, or other modes over units.
        gram: what `gram` gives along the same trajectories.
        rank: how many directions of the Gramian to take; as many as there are modes when None.

    Raises:
        TypeError, ValueError: modes of another space, another number of units, or a rank out of range.
    Source: Bjorck, Golub, Math. Comp. 27, 579 (1973), by `scipy.linalg.subspace_angles`.

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> sol = kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(3, 8).double(), torch.randn(2, 5, 3).double()))
    >>> learning = kp.modes(kp.linearize(sol).ntk, axis="unit", k=2)
    >>> found = kp.control.reachable_angles(learning, kp.control.gram(sol, "c"))
    >>> found.angles.sizes["angle"], bool((found.share <= 1 + 1e-12).all())
    (2, True)
    """
    if not isinstance(modes, Modes) or modes.space.axes != ("unit",):
        raise TypeError("modes must be Modes over units, as kp.modes(flow.ntk, axis='unit', k=...) gives them")
    directions = gram.directions
    units, most = directions.sizes["unit"], directions.sizes["mode"]
    if modes.space.shape != (units,):
        raise ValueError(f"the modes have {modes.space.shape[0]} units, and the Gramian {units}; take the same model")
    rank = len(modes.values) if rank is None else rank
    if not 1 <= rank <= most:
        raise ValueError(f"rank is {rank!r}, expected a number of the Gramian's directions between 1 and {most}")
    patterns = to_numpy(modes.space.to_euclidean(modes.vectors)).astype(float).T
    leading = directions.isel(mode=slice(rank))
    lead = leading.dims[:-2]
    flat = leading.values.reshape((-1, units, rank))
    angles = np.stack([subspace_angles(patterns, span)[::-1] for span in flat])
    share = ((np.swapaxes(flat, 1, 2) @ patterns) ** 2).sum(1)
    none = (gram.eigenvalues.values <= 0).all(-1).reshape((-1, 1)) | (to_numpy(modes.values) <= 0).all()
    angles, share = (np.where(none, np.nan, found) for found in (angles, share))
    coords = {name: leading.coords[name] for name in lead if name in leading.coords}
    shape = leading.shape[:-2]
    return ReachableAngles(
        xr.DataArray(angles.reshape((*shape, -1)), coords, (*lead, "angle")),
        xr.DataArray(share.reshape((*shape, -1)), coords, (*lead, "mode")),
    )
