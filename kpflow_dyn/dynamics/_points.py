"""Fixed and slow points of a recurrent network or a field under a constant input."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, full_precision, like_numpy, to_numpy
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._shown import Row, Shown, axes_sizes, number, numbers
from kpflow_dyn.dynamics._levenberg import minimise
from kpflow_dyn.dynamics._starts import constant_inputs, posed

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

STARTS, OUTLIER, POLISH = 256, 10.0, 6
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
}


@dataclass(frozen=True, eq=False, repr=False)
class FixedPoints(Shown):
    """Fixed and slow points, those that most starts led to first; names are those of the package fixed-point-finder.

    `points[mask]` are some of them, as `points[points.is_stable]`; `len(points)` says how many there are.

    Attributes:
        xstar: the points z* [n, unit].
        x_init: a start that led there [n, unit].
        F_xstar: F(z*) [n, unit], of a field f(z*).
        qstar: 1/2 |F(z*) - z*|^2 [n], of a field 1/2 |f(z*)|^2.
        dq: by how much the last step changed it [n].
        J_xstar: dF/dz, of a field df/dz [n, unit, unit].
        eigval_J_xstar: its eigenvalues [n, unit], the slowest to decay first: the largest in magnitude, of a field in
            real part.
        eigvec_J_xstar: its eigenvectors as columns [n, unit, unit].
        is_stable: whether all eigenvalues have |l| < 1, of a field Re l < 0 [n].
        is_fixed: whether the point is fixed to round-off, rather than slow [n].
        inputs: x [n, input].
        starts: how many starts led there [n].
        continuous: whether they are those of a field.
        states: where they were looked for [trial, time, unit]: the states of the solution, or the starts.

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
    states: np.ndarray = field(repr=False, kw_only=True)

    def _shown(self) -> tuple[str, list[Row]]:
        fixed, kind = self.is_fixed, "field" if self.continuous else "map"
        stable, unstable = (int((fixed & which).sum()) for which in (self.is_stable, ~self.is_stable))
        rows: list[Row] = [("xstar", axes_sizes(("point", "unit"), self.xstar.shape))]
        rows += [("fixed", f"{stable} stable, {unstable} unstable; their indices sum to {self.index[fixed].sum()}")]
        rows += [("slow", f"{(~fixed).sum()}")]
        if len(self):
            rows += [("q", f"at most {number(self.qstar.max())}"), ("starts", f"{numbers(self.starts)} led to each")]
        return f"{len(self)} fixed and slow points of a {kind}", rows

    def __len__(self) -> int:
        return len(self.xstar)

    def __getitem__(self, which: Any) -> FixedPoints:
        rows = np.atleast_1d(np.arange(len(self))[which])
        return replace(self, **{name: getattr(self, name)[rows] for name in AXES})

    @property
    def index(self) -> np.ndarray:
        """sign det(1 - dF/dz), of a field sign det(-df/dz) [n]: 1 where an even number of real eigenvalues is unstable.

        Of dynamics that map some ball into itself the indices of all fixed points sum to one, if none is degenerate
        (Lefschetz, Poincare, Hopf): another sum over those that `is_fixed` says that some were not found.
        """
        J = -self.J_xstar if self.continuous else np.eye(self.xstar.shape[1]) - self.J_xstar
        return np.linalg.slogdet(J).sign.astype(int)

    def to_xarray(self) -> xr.Dataset:
        """A dataset of all attributes but `states`; "unit_before" is the axis of z in dF/dz."""
        import xarray as xr

        data = {name: (axes, getattr(self, name)) for name, axes in AXES.items()}
        return xr.Dataset(data, attrs={"continuous": int(self.continuous)})

    def plot(self, dark: bool = False) -> Figure:
        """States and points in the plane of the states' first two principal components, the stable ones filled."""
        from kpflow_dyn.figures import _dynamics as figures

        return figures.fixed_points(self, dark=dark)


def fixed_points(
    model: Any,
    x: Any = None,
    starts: Any = STARTS,
    *,
    noise: float = 0.1,
    slow: float = 1e-8,
    unique: float = 1e-3,
    iterations: int = 300,
    seed: int = 0,
) -> FixedPoints:
    """Find the states that a constant input x holds still, or almost.

        q(z) = 1/2 |F(z, x) - z|^2,  of a field 1/2 |f(t_0, z, x)|^2

    is minimised from many starts at once by the method of Levenberg and Marquardt, with exact Jacobians. What comes to
    q <= slow is kept but for repetitions and what ran away (beyond ten times the largest start, or ten times a state of
    ones), and polished by Newton's method. A continuum, as of a line attractor, gives as many points as starts lead to
    different places of it. Unstable points are led to by few starts; more starts and noise find more of them, and
    `FixedPoints.index` tells whether some are missing.

    Args:
        model: a DiscreteProblem, an ODEProblem or a Solution of either; or a cell as a DiscreteProblem takes it, with
            `starts` given.
        x: the constant input [input], or one for each start [n, input]; zeros when None.
        starts: where to start: states [n, unit], or how many to draw: of the solution's states, and of means of two,
            four and eight of them, as what is unstable lies between what the states go to.
        noise: the standard deviation of the noise on starts that are drawn, over that of the states themselves.
        slow: up to which q points are kept; a local minimum of q above it is none.
        unique: points nearer to each other than this are one; states and inputs both count.
        iterations: how many steps at most.
        seed: of the draw of starts and their noise.

    Raises:
        TypeError: of a problem without dynamics.
        ValueError: starts or inputs of another width or not finite, a start at which the Jacobian is NaN or inf, or
            options that are not positive.

    Warns:
        UserWarning: when no start came to a point; the result is empty.
    Source: Sussillo, Barak, Neural Computation 25, 626 (2013); Golub, Sussillo, "FixedPointFinder", JOSS 3, 1003
    (2018).

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> cell = torch.nn.RNNCell(1, 1, bias=False).double()
    >>> _ = cell.weight_hh.data.fill_(2.0)  # z = tanh(2 z)
    >>> found = kp.dynamics.fixed_points(cell, starts=torch.linspace(-1, 1, 20)[:, None].double())
    >>> [(round(float(z[0]), 4), bool(stable)) for z, stable in sorted(zip(found.xstar, found.is_stable))]
    [(-0.9575, True), (0.0, False), (0.9575, True)]
    """
    for name, value in {"slow": slow, "unique": unique, "iterations": iterations}.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} is {value!r}, expected a positive number")
    problem, z, states = posed(model, x, starts, noise, seed)
    inputs = like_numpy(constant_inputs(problem, x, len(z)), z)
    with full_precision(z), problem.backend.models.left_alone(problem.model):
        search = _Search(problem, inputs, z)
        search.check_starts()
        ends = minimise(search.residual, z, iterations, problem.backend.transforms.compiled)
        numbers, counts = search.distinct(ends, slow, unique)
        if not len(numbers):
            warnings.warn(
                f"none of {len(z)} starts came to a point with q <= {slow:g} (the least was "
                f"{search.q(ends).min():.1e}) without running away; start elsewhere, allow more iterations, or raise "
                "slow",
                stacklevel=2,
            )
        return search.points(ends, numbers, counts, unique, states)


class _Search:
    """The model, its inputs [n, input] and the starts [n, unit]."""

    def __init__(self, problem: DiscreteProblem | ODEProblem, x: Array, z: Array) -> None:
        self.x, self.start, self.continuous = x, z, isinstance(problem, ODEProblem)
        self.dynamics = problem.backend.dynamics.Dynamics(problem, x, z)
        self.rounded = problem.backend.solving.rounded
        self.eps = float(np.finfo(to_numpy(z[:0]).dtype).eps)

    def residual(self, numbers: np.ndarray, z: Array) -> tuple[Array, Array]:
        """F(z) - z and its Jacobian, or f and its own, of these rows."""
        xp = array_namespace(self.x)
        F, J = self.dynamics(xp.take(self.x, xp.asarray(numbers, device=device(self.x)), axis=0), z)
        return (F, J) if self.continuous else (F - z, J - like_numpy(np.eye(z.shape[1]), z))

    def in_numpy(self, numbers: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`residual` in float64; rows are repeated up to a number for which a framework may have compiled it."""
        count = len(numbers)
        filled = np.minimum(np.arange(self.rounded(count)), count - 1)
        r, J = self.residual(numbers[filled], like_numpy(z[filled], self.start))
        return to_numpy(r)[:count].astype(np.float64), to_numpy(J)[:count].astype(np.float64)

    def check_starts(self) -> None:
        """Raise where F is a number at a start and its Jacobian is not."""
        r, J = self.in_numpy(np.arange(len(self.start)), to_numpy(self.start))
        for n in np.flatnonzero(np.isfinite(r).all(1) & ~np.isfinite(J).all((1, 2)))[:1]:
            raise ValueError(
                f"the Jacobian at start {n}, z = {np.array2string(to_numpy(self.start)[n], threshold=8)}, holds NaN or "
                "inf, though the model gives numbers there; where and sqrt pass on derivatives of what they leave out, "
                "so keep the argument of sqrt or a division away from zero, or start elsewhere"
            )

    def distinct(self, z: np.ndarray, slow: float, unique: float) -> tuple[np.ndarray, np.ndarray]:
        """Which ends are points, each once, and how many starts led there; the most visited first."""
        q = self.q(z)
        largest = float(np.linalg.norm(to_numpy(self.start), axis=1).max())
        near = np.linalg.norm(z, axis=1) <= OUTLIER * max(largest, z.shape[1] ** 0.5)
        rows = np.concatenate([z, to_numpy(self.x)], 1).astype(np.float64)
        left = [n for n in np.argsort(q, kind="stable") if q[n] <= slow and near[n]]
        found: list[tuple[int, int]] = []
        while left:
            same = np.linalg.norm(rows[left] - rows[left[0]], axis=1) <= unique
            found.append((left[0], int(same.sum())))
            left = [n for n, again in zip(left, same, strict=True) if not again]
        found.sort(key=lambda point: -point[1])
        numbers, counts = np.array(found, int).reshape(-1, 2).T
        return numbers, counts

    def q(self, z: np.ndarray) -> np.ndarray:
        """Of all starts' states."""
        r, _ = self.in_numpy(np.arange(len(z)), z)
        return np.where(np.isfinite(r).all(1), (r**2).sum(1) / 2, np.inf)

    def points(
        self, ends: np.ndarray, numbers: np.ndarray, counts: np.ndarray, unique: float, states: np.ndarray
    ) -> FixedPoints:
        """The result."""
        z, r, J, dq = self._polished(ends[numbers].astype(np.float64), numbers, unique)
        if not self.continuous:
            J = J + np.eye(z.shape[1])
        values, vectors = (found.astype(complex) for found in np.linalg.eig(J))
        speed = np.real(values) if self.continuous else np.abs(values)
        order = np.argsort(-speed, axis=1, kind="stable")
        return FixedPoints(
            xstar=z,
            x_init=to_numpy(self.start)[numbers].astype(np.float64),
            F_xstar=r if self.continuous else r + z,
            qstar=(r**2).sum(1) / 2,
            dq=dq,
            J_xstar=J,
            eigval_J_xstar=np.take_along_axis(values, order, 1),
            eigvec_J_xstar=np.take_along_axis(vectors, order[:, None], 2),
            is_stable=speed[np.arange(len(z)), order[:, 0]] < (0 if self.continuous else 1),
            is_fixed=np.linalg.norm(r, axis=1) <= 1e5 * self.eps * (1 + np.linalg.norm(z, axis=1)),
            inputs=to_numpy(self.x)[numbers].astype(np.float64),
            starts=counts,
            continuous=self.continuous,
            states=states,
        )

    def _polished(
        self, z: np.ndarray, numbers: np.ndarray, unique: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """z, r, J and the change of q after Newton steps that lower it and do not leave the point."""
        dq = np.zeros(len(z))
        if not len(z):
            return z, z, np.zeros((0, z.shape[1], z.shape[1])), dq
        r, J = self.in_numpy(numbers, z)
        for _ in range(POLISH):
            step = (np.linalg.pinv(J, rcond=1e-8) @ r[..., None])[..., 0]
            candidate = to_numpy(like_numpy(z - step, self.start)).astype(np.float64)
            r_next, J_next = self.in_numpy(numbers, candidate)
            change = ((r**2).sum(1) - (r_next**2).sum(1)) / 2
            better = (change > 0) & (np.linalg.norm(step, axis=1) <= unique) & np.isfinite(J_next).all((1, 2))
            if not better.any():
                break
            dq = np.where(better, change, dq)
            z, r = (np.where(better[:, None], new, old) for new, old in ((candidate, z), (r_next, r)))
            J = np.where(better[:, None, None], J_next, J)
        return z, r, J, dq
