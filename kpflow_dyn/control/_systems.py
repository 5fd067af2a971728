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

from kpflow_dyn._problems.checks import check_times
from kpflow_dyn._shown import ShownAsRepr, type_name
from kpflow_dyn.control._forms import Parts, is_system, parts_of, real

if TYPE_CHECKING:
    from matplotlib.figure import Figure


DIMS = {"A": ("unit", "from_unit"), "B": ("unit", "input"), "C": ("output", "unit"), "D": ("output", "input")}


@dataclass(frozen=True, eq=False)
class LTI(ShownAsRepr):
    """A linear time-invariant system, with z' = A z + B u or z_{t+1} = A z_t + B u_t, and y = C z + D u.

    `LTI(system)` takes what others have: a state space or transfer function of python-control or scipy.signal, or a
    tuple (A, B, C, D), (A, B, C, D, dt). All functions of this module that take an LTI take these as well.

    Args:
        A: [unit, unit]; a number of a system with one state. Or a whole system, as above.
        B: [unit, input], or [unit] of one input.
        C: [output, unit], or [unit] of one output; the identity when None.
        D: [output, input]; zeros when None or 0.
        dt: None or 0 in continuous time, else the length of a step; True for steps of unknown length, which count as
            one. As python-control has it.
        names: of the entries of z; their numbers when ().

    Raises:
        TypeError: no system.
        ValueError: matrices that are not finite or do not fit together, a dt that is not positive, names of another
            number, a transfer function with more zeros than poles.
    Source: Astrom, Murray, "Feedback Systems" (2008), chapter 5.

    >>> from kpflow_dyn import control
    >>> system = control.LTI([[0.0, 1.0], [0.0, -0.5]], [[0.0], [1.0]])
    >>> system.poles.real.tolist(), system.is_stable
    ([0.0, -0.5], False)
    >>> from scipy import signal
    >>> control.LTI(signal.TransferFunction([1.0], [1.0, 2.0])).A
    array([[-2.]])
    """

    A: Any
    B: Any = None
    C: Any = None
    D: Any = None
    dt: float | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = self._whole() if self.B is None else Parts(self.A, self.B, self.C, self.D, self.dt, self.names)
        A = square(given.A, "A")
        B, C = input_matrix(given.B, len(A)), output_matrix(given.C, len(A))
        shape = (len(C), B.shape[1])
        no_feedthrough = given.D is None or (np.ndim(given.D) == 0 and not given.D)
        D = np.zeros(shape) if no_feedthrough else as_matrix(given.D, "D", shape)
        dt = given.dt or None
        if dt is not None and not 0 < dt < np.inf:
            raise ValueError(
                f"dt is {dt!r}, expected None or 0 for continuous time, or the length of a step; that of a solution "
                "with unequal steps is NaN, so take an even grid of times"
            )
        if len(given.names) not in (0, len(A)):
            raise ValueError(f"names are {given.names}, expected one for each of the {len(A)} states, or ()")
        for name, value in Parts(A, B, C, D, dt, tuple(given.names))._asdict().items():
            object.__setattr__(self, name, value)

    def _whole(self) -> Parts:
        """What a system given in the place of A is made of; dt and names may be added to it."""
        if self.C is not None or self.D is not None:
            raise ValueError("B is missing, expected LTI(A, B, C, D), or LTI(system) alone")
        parts = parts_of(self.A)
        return parts._replace(dt=self.dt or parts.dt, names=self.names or parts.names)

    def __repr__(self) -> str:
        units, inputs = self.B.shape
        return f"LTI({_sizes(units, inputs, len(self.C), self.dt, self.names)}, poles {leading(self.poles)})"

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
        names = {"states": list(self.names)} if self.names else {}
        return control.ss(self.A, self.B, self.C, self.D, *(() if self.dt is None else (self.dt,)), **names)

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


SHOWN = 6  # names or numbers in a line


def _sizes(units: int, inputs: int, outputs: int, dt: float | None, names: tuple[str, ...]) -> str:
    named = "" if not names else f" ({', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)})"
    time = "continuous time" if dt is None else f"dt = {dt:.6g}"
    return f"{units} states{named}, {inputs} inputs, {outputs} outputs, {time}"


def leading(values: np.ndarray) -> str:
    """The first few numbers, in a line."""
    numbers = [f"{v.real:.4g}" if not np.imag(v) else f"{v:.4g}" for v in np.asarray(values).ravel()[:SHOWN]]
    return f"[{', '.join(numbers)}{', ...' * (np.size(values) > SHOWN)}]"


def as_system(system: Any) -> LTI:
    """An LTI of a system of any known form."""
    return system if isinstance(system, LTI) else LTI(*parts_of(system))


def bound(
    function: str,
    matrices: tuple[str, ...],
    others: tuple[str, ...],
    args: tuple[Any, ...],
    named: dict[str, Any],
    discrete: bool = False,
) -> tuple[Any, ...]:
    """The system and the other arguments of function(system, ...) or function(A, B, ...), the last one optional.

    Raise where they are too few, too many, or the system is none of discrete time where one is needed.
    """
    whole = "system" in named or (bool(args) and is_system(args[0]))
    names = ("system", *others) if whole else (*matrices, *others)
    found = {**dict(zip(names, args, strict=False)), **named}
    unfit = len(args) > len(names) or set(named) - set(names[len(args) :]) or set(names[:-1]) - set(found)
    if unfit:
        forms = " or ".join(f"{function}({', '.join((*first, *others[:-1]))}[, {others[-1]}])"
                            for first in (("system",), matrices))  # fmt: skip
        got = ", ".join([type_name(a) for a in args] + [f"{name}=" for name in named])
        raise TypeError(f"{function} got ({got}), expected {forms}")
    rest = tuple(found.get(name) for name in others)
    if not whole:
        A, B, C = found["A"], found.get("G", found.get("B")), found.get("C")
        return LTI(A, B, C, dt=1.0 if discrete else None), *rest
    system = as_system(found["system"])
    if discrete and system.dt is None:
        raise ValueError(
            f"{function} takes a system in discrete time, got one with dt = None; give its dt, or {function[1:]}"
        )
    return system, *rest


@dataclass(frozen=True, eq=False)
class Mesh:
    """A linear system in continuous time, at three Gauss points of each interval of a mesh."""

    edges: np.ndarray  # the ends of the intervals [step + 1]
    at: np.ndarray  # which of them the times of the system are [time]
    A: np.ndarray  # [trial, step, 3, unit, unit]
    B: np.ndarray  # [trial, step, 3, unit, input]


@dataclass(frozen=True, eq=False)
class LTV(ShownAsRepr):
    """A linear system along each trial: z' = A(t) z + B(t) u, or z_t = A_t z_{t-1} + B_t u_t; y = C(t) z + D(t) u.

    Attributes:
        A: [trial, time, unit, from_unit].
        B: [trial, time, unit, input].
        C: [trial, time, output, unit].
        D: [trial, time, output, input].
        dt: None in continuous time, else the length of a step; NaN where they are unequal.
        mesh: in continuous time A and B between the times as well.

    Example as `linearize_ltv`.
    """

    A: xr.DataArray
    B: xr.DataArray
    C: xr.DataArray
    D: xr.DataArray
    dt: float | None
    mesh: Mesh | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        trials, times, units, inputs = self.B.shape
        t = self.time
        sizes = _sizes(units, inputs, self.C.shape[2], self.dt, self.names)
        return f"LTV({trials} trials, {times} times from {t[0]:.6g} to {t[-1]:.6g}, {sizes})"

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
    """A finite float64 matrix of this shape, None standing for any length; raise for another. A number is 1 x 1."""
    matrix = real(values, what)
    matrix = matrix.reshape(1, 1) if matrix.ndim == 0 else matrix
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


def input_matrix(B: Any, units: int, what: str = "B") -> np.ndarray:
    """B [unit, input], or of one input [unit]."""
    given = real(B, what)
    return as_matrix(given[:, None] if np.ndim(given) == 1 else given, what, (units, None))


def output_matrix(C: Any, units: int) -> np.ndarray:
    """C [output, unit], or of one output [unit], or a Linear layer; the identity when None."""
    if C is None:
        return np.eye(units)
    given = real(getattr(C, "weight", C), "C")
    return as_matrix(given[None] if np.ndim(given) == 1 else given, "C", (None, units))
