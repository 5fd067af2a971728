"""Linear systems: time-invariant at an equilibrium, and time-varying along trajectories.

    continuous    z' = A z + B u                    y = C z + D u
    discrete      z_t = A_t z_{t-1} + B_t u_t       y_t = C z_t       along a recurrent model
                  z_{t+1} = A z_t + B u_t           y_t = C z_t + D u_t    as LTI

The two discrete forms number their inputs differently, u_t being what makes z_t or what follows it; the states, and
with them Gramians and gains, are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._problems.checks import check_times

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DIMS = {"A": ("unit", "from_unit"), "B": ("unit", "input"), "C": ("output", "unit"), "D": ("output", "input")}


@dataclass(frozen=True, eq=False)
class LTI:
    """A linear time-invariant system, with z' = A z + B u or z_{t+1} = A z_t + B u_t, and y = C z + D u.

    Args:
        A: [unit, unit].
        B: [unit, input].
        C: [output, unit]; the identity when None.
        D: [output, input]; zeros when None.
        dt: None in continuous time, else the length of a step, as python-control has it.
        names: of the entries of z; their numbers when ().

    Raises:
        ValueError: matrices that are not finite or do not fit together, a dt that is not positive.
    Source: Astrom, Murray, "Feedback Systems" (2008), chapter 5.

    >>> from kpflow_dyn import control
    >>> system = control.LTI([[0.0, 1.0], [0.0, -0.5]], [[0.0], [1.0]])
    >>> system.poles.real.tolist(), system.is_stable
    ([0.0, -0.5], False)
    """

    A: np.ndarray
    B: np.ndarray
    C: Any = None
    D: Any = None
    dt: float | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        A, B = square(self.A, "A"), as_matrix(self.B, "B", (None, None))
        as_matrix(B, "B", (len(A), B.shape[1]))
        C = output_matrix(self.C, len(A))
        shape = (len(C), B.shape[1])
        D = np.zeros(shape) if self.D is None else as_matrix(self.D, "D", shape)
        if self.dt is not None and not 0 < self.dt < np.inf:
            raise ValueError(f"dt is {self.dt!r}, expected None for continuous time or the length of a step")
        for name, value in {"A": A, "B": B, "C": C, "D": D}.items():
            object.__setattr__(self, name, value)

    @property
    def poles(self) -> np.ndarray:
        """The eigenvalues of A [unit]."""
        return np.linalg.eigvals(self.A).astype(complex)

    @property
    def is_stable(self) -> bool:
        """Whether each pole has a negative real part, or in discrete time lies inside of the unit circle."""
        return bool((self.poles.real < 0).all() if self.dt is None else (abs(self.poles) < 1).all())

    def along(self, t: Any) -> LTV:
        """The same system as one trial that begins at rest.

        Args:
            t: in continuous time increasing times [time], the first of which is the start; in discrete time how many
                steps.

        Raises:
            ValueError: times that do not increase, or a number of steps that is not positive.
        """
        if self.dt is None:
            times = check_times(t)
            points = (1, len(times) - 1, 3)
            A, B = (np.broadcast_to(M, (*points, *M.shape)) for M in (self.A, self.B))
            return ltv_of(times, self.A, self.B, self.C, self.D, self.names, Mesh(times, np.arange(len(times)), A, B))
        if not isinstance(t, int | np.integer) or t < 1:
            raise ValueError(f"t is {t!r}, expected the number of steps of this discrete system, at least 1")
        return ltv_of(self.dt * np.arange(1, t + 1), self.A, self.B, self.C, self.D, self.names, dt=self.dt)

    def to_control(self) -> Any:
        """The system as `control.ss` of python-control.

        Raises:
            ModuleNotFoundError: where python-control is not installed.
        """
        try:
            import control
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "to_control needs python-control, which is not installed; pip install 'kpflow-dyn[control]'"
            ) from error
        return control.ss(self.A, self.B, self.C, self.D, *(() if self.dt is None else (self.dt,)))

    def to_xarray(self) -> xr.Dataset:
        """A dataset of A [unit, from_unit], B [unit, input], C [output, unit], D [output, input]."""
        coords = coordinates(self.names, "unit", "from_unit")
        return xr.Dataset(
            {name: (dims, getattr(self, name)) for name, dims in DIMS.items()}, coords, {"dt": str(self.dt)}
        )

    def plot(self, dark: bool = False) -> Figure:
        """The poles in the complex plane, beside the boundary of stability."""
        from kpflow_dyn.figures import _control as figures

        return figures.poles(self, dark=dark)


@dataclass(frozen=True, eq=False)
class Mesh:
    """A linear system in continuous time, at three Gauss points of each interval of a mesh."""

    edges: np.ndarray  # the ends of the intervals [step + 1]
    at: np.ndarray  # which of them the times of the system are [time]
    A: np.ndarray  # [trial, step, 3, unit, unit]
    B: np.ndarray  # [trial, step, 3, unit, input]


@dataclass(frozen=True, eq=False)
class LTV:
    """A linear system along each trial: z' = A(t) z + B(t) u, or z_t = A_t z_{t-1} + B_t u_t; y = C(t) z + D(t) u.

    Attributes:
        A: [trial, time, unit, from_unit].
        B: [trial, time, unit, input].
        C: [trial, time, output, unit].
        D: [trial, time, output, input].
        dt: None in continuous time, else the length of a step.
        mesh: in continuous time A and B between the times as well.

    Example as `linearize_ltv`.
    """

    A: xr.DataArray
    B: xr.DataArray
    C: xr.DataArray
    D: xr.DataArray
    dt: float | None
    mesh: Mesh | None = field(default=None, repr=False)

    @property
    def time(self) -> np.ndarray:
        """The times [time]."""
        return self.A.time.values

    @property
    def names(self) -> tuple[str, ...]:
        """What the units are called, () where they are numbered."""
        return tuple(self.A.unit.values.tolist()) if "unit" in self.A.coords else ()

    def to_xarray(self) -> xr.Dataset:
        """A dataset of the four."""
        return xr.Dataset({name: getattr(self, name) for name in "ABCD"})

    def plot(self, dark: bool = False) -> Figure:
        """The largest growth rate of A along each trial: the real part, or in discrete time the size, of its poles."""
        from kpflow_dyn.figures import _control as figures

        return figures.growth(self, dark=dark)


def ltv_of(
    time: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    names: tuple[str, ...],
    mesh: Mesh | None = None,
    dt: float | None = None,
) -> LTV:
    """An LTV of arrays [trial, time, ...], or of matrices that are the same at each trial and time."""
    lead = (1 if A.ndim == 2 else len(A), len(time))
    coords = {"time": time, **coordinates(names, "unit", "from_unit")}
    arrays = [
        xr.DataArray(np.broadcast_to(M, (*lead, *M.shape[-2:])), dims=("trial", "time", *dims))
        for M, dims in zip((A, B, C, D), DIMS.values(), strict=True)
    ]
    labelled = [a.assign_coords({key: value for key, value in coords.items() if key in a.dims}) for a in arrays]
    return LTV(*labelled, dt=dt, mesh=mesh)


def coordinates(names: tuple[str, ...], *axes: str) -> dict[str, Any]:
    """The coordinates of axes that run over the units."""
    return {axis: (axis, list(names)) for axis in axes} if names else {}


def as_matrix(values: Any, what: str, shape: tuple[int | None, int | None]) -> np.ndarray:
    """A finite float64 matrix of this shape, None standing for any length; raise for another."""
    matrix = np.array(to_numpy(values), np.float64)
    fits = matrix.ndim == 2 and all(n in (None, m) for n, m in zip(shape, matrix.shape, strict=True)) and matrix.size
    if not fits:
        expected = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{what} has shape {matrix.shape}, expected a matrix [{expected}]")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{what} holds NaN or inf")
    return matrix


def square(values: Any, what: str) -> np.ndarray:
    """A finite float64 matrix [n, n]."""
    matrix = as_matrix(values, what, (None, None))
    return as_matrix(matrix, what, (len(matrix), len(matrix)))


def output_matrix(C: Any, units: int) -> np.ndarray:
    """C [output, unit], given as such or as a Linear layer; the identity when None."""
    return np.eye(units) if C is None else as_matrix(getattr(C, "weight", C), "C", (None, units))
