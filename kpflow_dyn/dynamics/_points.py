"""Fixed and slow points of a recurrent network or a field under a constant input."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._shown import Row, Shown, axes_sizes

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

AXES = {
    "xstar": ("point", "unit"),
    "x_init": ("point", "unit"),
    "F_xstar": ("point", "unit"),
    "qstar": ("point",),
    "dq": ("point",),
    "J_xstar": ("point", "unit", "unit_before"),
    "eigval_J_xstar": ("point", "eigenvalue"),
    "eigvec_J_xstar": ("point", "unit", "eigenvalue"),
    "is_stable": ("point",),
    "is_fixed": ("point",),
    "inputs": ("point", "input"),
    "starts": ("point",),
    "is_neutral": ("point", "eigenvalue"),
    "is_degenerate": ("point",),
}
DERIVED = {
    "index": ("point",),
    "is_marginal": ("point",),
    "unstable": ("point",),
    "time_constants": ("point", "eigenvalue"),
}
SHOWN = 12


@dataclass(frozen=True, eq=False, repr=False)
class FixedPoints(Shown):
    """Fixed and slow points, most frequently found ones first; names are those of the package fixed-point-finder.

    `points[mask]` selects some of them, as in `points[points.is_stable]`; `len(points)` is their number.

    Attributes:
        xstar: the points z* [n, unit].
        x_init: a start that led there [n, unit].
        F_xstar: F(z*) [n, unit]; for a field f(z*).
        qstar: 1/2 |F(z*) - z*|^2 [n]; for a field 1/2 |f(z*)|^2.
        dq: how much the last step changed q [n].
        J_xstar: dF/dz; for a field df/dz [n, unit, unit].
        eigval_J_xstar: its eigenvalues [n, unit], the slowest to decay first. These have the largest magnitude; for a
            field the largest real part.
        eigvec_J_xstar: its eigenvectors as columns [n, unit, unit].
        is_stable: whether all eigenvalues have |l| < 1; for a field Re l < 0 [n]. False where round-off hides it.
        is_fixed: whether the point is fixed to round-off, rather than slow [n].
        inputs: x [n, input].
        starts: how many starts led there [n].
        is_neutral: which eigenvalues have |l| = 1, or of a field Re l = 0, to round-off of the model's dtype [n, unit].
        is_degenerate: whether dF/dz - 1, or df/dz, is singular to half the digits [n], so that the point may be one of
            a line or ring, or several points.
        continuous: whether they are points of a field.
        states: where the search looked [trial, time, unit]: the states of the solution, or the starts.
        tried: how many starts were made in all.
        complete: whether all fixed points seem to be found. True: at the end starts of all kinds found nothing new, and
            the index sum is right. This is no proof: two points of opposite index may still be missing. False: points
            are known or likely to be missing. None: neither can be said.
        missing: the reason, in words. A selection of the points has complete None.

    Example as `fixed_points`.
    """

    xstar: np.ndarray
    x_init: np.ndarray
    F_xstar: np.ndarray
    qstar: np.ndarray
    dq: np.ndarray
    J_xstar: np.ndarray
    eigval_J_xstar: np.ndarray
    eigvec_J_xstar: np.ndarray
    is_stable: np.ndarray
    is_fixed: np.ndarray
    inputs: np.ndarray
    starts: np.ndarray
    continuous: bool = False
    is_neutral: np.ndarray = field(kw_only=True)
    is_degenerate: np.ndarray = field(kw_only=True)
    states: np.ndarray = field(kw_only=True)
    tried: int = field(kw_only=True)
    complete: bool | None = field(kw_only=True)
    missing: str = field(kw_only=True)

    def _shown(self) -> tuple[str, list[Row]]:
        fixed, kind = self.is_fixed, "field" if self.continuous else "map"
        counts = [(name, int((fixed & which).sum())) for name, which in self._kinds().items()]
        kinds = ", ".join(f"{count} {name}" for name, count in counts if count or name != "marginal")
        sums = f"their indices sum to {self.index[fixed].sum()}"
        told = "no index sum, as some are degenerate" if self.is_degenerate[fixed].any() else sums
        known = {True: "yes, as far as can be seen", False: "no", None: "unknown"}[self.complete]
        rows: list[Row] = [("xstar", axes_sizes(("point", "unit"), self.xstar.shape))]
        rows += [("fixed", f"{kinds}; {told}")]
        rows += [("slow", f"{(~fixed).sum()}"), ("complete", f"{known}, from {self.tried} starts")]
        rows += [("", reason) for reason in self.missing.split("; ") if reason]
        return f"{len(self)} fixed and slow points of a {kind}", rows

    def __len__(self) -> int:
        return len(self.xstar)

    def __getitem__(self, which: Any) -> FixedPoints:
        rows = np.atleast_1d(np.arange(len(self))[which])
        words = f"a selection of {len(rows)} of the {len(self)} points"
        return replace(self, complete=None, missing=words, **{name: getattr(self, name)[rows] for name in AXES})

    @property
    def index(self) -> np.ndarray:
        """sign det(1 - dF/dz), of a field sign det(-df/dz) [n]: 1 where an even number of real eigenvalues is unstable.

        Of dynamics that map some ball into itself the indices of all fixed points sum to one, if none is degenerate
        (Lefschetz, Poincare, Hopf): another sum over those that `is_fixed` says that some were not found. 0 of
        degenerate points, whose index is not known.
        """
        J = -self.J_xstar if self.continuous else np.eye(self.xstar.shape[1]) - self.J_xstar
        return np.where(self.is_degenerate, 0, np.linalg.slogdet(J).sign).astype(int)

    @property
    def unstable(self) -> np.ndarray:
        """How many directions grow away from each point [n]: eigenvalues with |l| > 1, of a field Re l > 0."""
        return (self._rates > 0).sum(1)

    @property
    def is_marginal(self) -> np.ndarray:
        """Whether no direction grows, but some neither grow nor decay, to round-off [n]. So neither is known."""
        return (self.unstable == 0) & self.is_neutral.any(1)

    def _kinds(self) -> dict[str, np.ndarray]:
        """Of which kind each point is [n]."""
        return {"stable": self.is_stable, "unstable": self.unstable > 0, "marginal": self.is_marginal}

    @property
    def time_constants(self) -> np.ndarray:
        """In how long each eigenvector's part shrinks by e [n, unit]: -1 / log |l| steps, of a field -1 / Re l.

        Negative where it grows by e instead, infinite where it does neither.
        """
        with np.errstate(divide="ignore"):
            return np.where(self._rates == 0, np.inf, -1 / self._rates)

    @property
    def _rates(self) -> np.ndarray:
        """At which the eigenvectors' parts grow [n, unit], per step or unit of time; 0 where they are neutral."""
        with np.errstate(divide="ignore"):
            rates = self.eigval_J_xstar.real if self.continuous else np.log(np.abs(self.eigval_J_xstar))
        return np.where(self.is_neutral, 0.0, rates)

    def table(self, most: int = SHOWN) -> str:
        """A line for each of the first points: its kind, unstable directions, slowest time constant, starts and q."""
        unit = "time" if self.continuous else "steps"
        lines = [
            f"{'point':>5}  {'kind':8}  {'unstable directions':>19}  {'slowest (' + unit + ')':>15}  starts        q"
        ]
        kinds = np.select([~self.is_fixed, *self._kinds().values()], ["slow", *self._kinds()], "")
        for n in range(min(most, len(self))):
            slowest = self.time_constants[n][np.abs(self._rates[n]).argmin()]
            lines.append(
                f"{n:5}  {kinds[n]:8}  {self.unstable[n]:19}  {slowest:15.3g}  {self.starts[n]:6}  {self.qstar[n]:7.1e}"
            )
        return "\n".join(lines + [f"and {len(self) - most} more"] * (len(self) > most))

    def to_xarray(self) -> xr.Dataset:
        """A dataset of all of these but `states`; "unit_before" is the axis of z in dF/dz."""
        import xarray as xr

        data = {name: (axes, getattr(self, name)) for name, axes in {**AXES, **DERIVED}.items()}
        complete = {True: "yes", False: "no", None: "unknown"}[self.complete]
        about = {"tried": self.tried, "complete": complete, "missing": self.missing}
        return xr.Dataset(data, attrs={"continuous": int(self.continuous), **about})

    def plot(self, dark: bool = False) -> Figure:
        """States and points in the plane of the states' first two principal components, the stable ones filled."""
        from kpflow_dyn.figures import _dynamics as figures

        return figures.fixed_points(self, dark=dark)
