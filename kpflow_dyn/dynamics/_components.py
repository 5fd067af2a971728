"""Principal components of states over trials and times, and how many of them the states fill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, to_numpy
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._shown import Row, Shown, axes_sizes, shares, type_name
from kpflow_dyn.solvers import Estimate
from kpflow_dyn.solvers._orthogonalise import with_sign

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False, repr=False)
class PCA(Shown):
    """Principal components of states, the largest variance first; states = mean + scores @ components, if all are kept.

    Attributes:
        components: orthonormal directions [pc, unit], the largest entry of each positive.
        variance: of the states along them [pc].
        explained: the same as shares of the whole variance [pc].
        scores: the centred states along them [trial, time, pc].
        mean: of the states [unit].

    Example as `pca`.
    """

    components: np.ndarray
    variance: np.ndarray
    explained: np.ndarray
    scores: np.ndarray
    mean: np.ndarray

    def _shown(self) -> tuple[str, list[Row]]:
        rows: list[Row] = [("components", axes_sizes(("pc", "unit"), self.components.shape))]
        rows += [("scores", axes_sizes(("trial", "time", "pc"), self.scores.shape))]
        rows += [("of the variance", shares(self.explained))]
        return f"PCA of {len(self.components)} components", rows

    def project(self, states: Array) -> np.ndarray:
        """Scores [..., pc] of other states [..., unit]."""
        return (_double(states) - self.mean) @ self.components.T

    def to_xarray(self) -> xr.Dataset:
        """A dataset of the attributes, on "trial", "time", "unit" and "pc"."""
        import xarray as xr

        axes = {"components": ("pc", "unit"), "scores": ("trial", "time", "pc"), "mean": ("unit",)}
        names = ("components", "variance", "explained", "scores", "mean")
        return xr.Dataset({name: (axes.get(name, ("pc",)), getattr(self, name)) for name in names})

    def plot(self, dark: bool = False) -> Figure:
        """The share of the variance of each component, and the trials in the plane of the first two."""
        from kpflow_dyn.figures import _dynamics as figures

        return figures.components(self, dark=dark)


def pca(states: Array | Solution, k: int | None = None, *, weights: Any = None) -> PCA:
    """Principal component analysis of states, every trial and time a sample: the eigenvectors of their covariance.

        C = sum w (z - mean)(z - mean)^T / sum w        mean = sum w z / sum w

    Args:
        states: [trial, time, unit] of any array library, or a Solution, of an ODE with its quadrature weights.
        k: how many components; all when None.
        weights: how much each time [time], or trial and time [trial, time], counts; all alike when None.

    Raises:
        TypeError, ValueError: states of another rank or not finite, a k above the units, weights that are negative, all
            zero or of another shape.
    Source: Jolliffe, "Principal Component Analysis" (2002).

    >>> import numpy as np
    >>> line = np.linspace(0, 1, 50)[None, :, None] * np.array([3.0, 4.0])
    >>> found = pca(line, k=1)
    >>> found.components.round(2), found.explained.round(6)
    (array([[0.6, 0.8]]), array([1.]))
    """
    samples = _Samples(states, weights)
    units = samples.centred.shape[2]
    if k is not None and not (isinstance(k, int | np.integer) and 1 <= k <= units):
        raise ValueError(f"k is {k!r}, expected a number of components from 1 to the {units} units")
    values, vectors = np.linalg.eigh(samples.covariance)
    variance = np.maximum(values[::-1][:k], 0)
    components, total = with_sign(vectors.T[::-1][:k]), np.trace(samples.covariance)
    return PCA(components, variance, variance / (total or 1), samples.centred @ components.T, samples.mean)


def participation_ratio(states: Array | Solution, *, weights: Any = None) -> Estimate:
    """How many dimensions states fill, by the eigenvalues l of their covariance.

        PR = (sum l)^2 / sum l^2

    It is n where n principal components carry the same variance and the others none; 0 of states that do not vary. It
    is exact, so that its `stderr` is 0; `float(...)` is the number.

    Args and Raises as `pca`.

    Source: Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement" (2017).

    >>> import numpy as np
    >>> circle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    >>> states = np.stack([np.cos(circle), np.sin(circle), 0 * circle], -1)[None]
    >>> round(float(participation_ratio(states)), 6)
    2.0
    """
    samples = _Samples(states, weights)
    size = np.abs(samples.centred).max()
    covariance = samples.of(samples.centred / (size or 1.0))  # squares of small states may be zero
    square = (covariance**2).sum()
    return Estimate(float(np.trace(covariance) ** 2 / square) if square else 0.0, 0.0, 0, "exact")


class _Samples:
    """Centred states [trial, time, unit], and their covariance [unit, unit]."""

    def __init__(self, states: Array | Solution, weights: Any) -> None:
        if isinstance(states, Solution):
            weights = states.weights if weights is None else weights
            states = states.state
        array = _checked(states)
        shares = _shares(weights, array.shape[:2])[..., None]
        self.mean = (shares * array).sum((0, 1))
        self.centred = array - self.mean
        self._shares = shares

    @property
    def covariance(self) -> np.ndarray:
        """[unit, unit]."""
        return self.of(self.centred)

    def of(self, centred: np.ndarray) -> np.ndarray:
        """The covariance of centred states [trial, time, unit]."""
        rows = (np.sqrt(self._shares) * centred).reshape(-1, centred.shape[2])
        return rows.T @ rows


def _checked(states: Array) -> np.ndarray:
    try:
        array = _double(states)
    except TypeError as error:
        got = type_name(states)
        raise TypeError(f"states are {got}, expected an array [trial, time, unit], or a Solution") from error
    if array.ndim != 3 or 0 in array.shape:
        raise ValueError(f"states have shape {array.shape}, expected [trial, time, unit] with at least one of each")
    if not np.isfinite(array).all():
        raise ValueError("states hold NaN or inf; leave such trials out")
    return array


def _shares(weights: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Weights [trial, time] that sum to one."""
    array = np.ones(shape) if weights is None else _double(weights)
    if array.shape not in (shape, shape[1:]):
        raise ValueError(f"weights have shape {array.shape}, expected [time] = {shape[1:]} or [trial, time] = {shape}")
    if not (np.isfinite(array).all() and (array >= 0).all() and array.any()):
        raise ValueError("weights must be finite, not negative, and not all zero")
    full = np.broadcast_to(array, shape)
    return full / full.sum()


def _double(values: Array) -> np.ndarray:
    return to_numpy(values).astype(np.float64)
