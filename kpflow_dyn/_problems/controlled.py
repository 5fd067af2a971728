"""Controlled differential equations: a field that a path drives, dz = f(t, z) dX."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.interpolate import CubicSpline

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, to_numpy
from kpflow_dyn._arrays.complex_numbers import is_complex
from kpflow_dyn._backend import Backend, backend_for
from kpflow_dyn._problems.checks import check_inputs
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._shown import type_name

INTERPOLATIONS = ("linear", "hermite", "natural")


@dataclass(frozen=True, repr=False)
class CDEProblem(ODEProblem):
    """A controlled differential equation dz = f(t, z) dX from z(t_0) = z0, a neural CDE, along a path X(t).

    It is the `ODEProblem` z' = f(t, z) X'(t), whose input is X'; all methods of the libraries for ODEs solve it, and
    their steps end where X bends.

    Args:
        f: the field. In torch an nn.Module called on all trials at once, f(t, z [trial, unit]), giving
            [trial, unit, channel], or [trial, unit channel] with the channels innermost; in JAX a callable pytree,
            called on one trial.
        z0, t, encoder: as those of an `ODEProblem`. Where the first sample gives the start, it is z0, the data.
        path: X: samples [trial, time, channel] on the grid t; or a pair (times [n], samples [trial, n, channel]) whose
            times cover those of t; or an interpolation of torchcde or diffrax (of all trials, as jax.vmap makes it), or
            any other object with a method `derivative(t)` that gives X'(t) [trial, channel], or [channel] for all
            trials. Time is a channel only if you make it one.
        interpolation: of samples: "linear"; "hermite", cubic with backward differences as slopes, as diffrax's
            backward_hermite_coefficients; "natural", the natural cubic spline.

    Raises:
        TypeError, ValueError: a start, times or a path of a wrong type, or that do not fit together; a complex start.
    Source: Kidger, Morrill, Foster, Lyons, "Neural controlled differential equations", arXiv:2005.08926; torchcde.

    >>> import torch, kpflow_dyn as kp
    >>> class Field(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.layer = torch.nn.Linear(4, 4 * 2)
    ...     def forward(self, t, z):
    ...         return torch.tanh(self.layer(z)).reshape(-1, 4, 2)
    >>> t = torch.linspace(0, 1, 5)
    >>> path = torch.stack([t.expand(3, 5), torch.randn(3, 5)], -1)
    >>> kp.solve(kp.CDEProblem(Field(), torch.zeros(3, 4), t, path)).state.shape
    torch.Size([3, 5, 4])
    """

    f: Any
    z0: Array
    t: Any
    x: Any = field(init=False, repr=False, default=None)
    args: Any = field(init=False, repr=False, default=None)
    order: int = field(init=False, repr=False, default=1)
    path: Any = None
    interpolation: str = "linear"
    instead_of_jumps = (
        "pose kp.ODEProblem(hybrid, z0, t, x) with X'(t) as its input x and a flow(t, z, x_t) that multiplies f by it"
    )

    def __post_init__(self) -> None:
        backend = backend_for(self.z0, "z0", "[trial, unit]", self.f)
        if is_complex(self.z0):
            raise TypeError("z0 is complex; give a CDE its real and imaginary parts side by side on the units")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
        self._set(x=None, f=backend.models.controlled(self.f))
        super().__post_init__()
        if not self.form.is_plain:
            raise ValueError(
                "a CDE has a start z0 [trial, unit] and increasing times; turn the path round, or flatten z0"
            )
        self._set(x=_rate_of(self.path, self.interpolation, self.z0, self.t, backend))

    def remake(self, **changes: Any) -> "CDEProblem":
        if "x" in changes:  # of some of the trials
            changes["path"] = _Known(changes.pop("x"))
        return super().remake(**changes)

    def _given(self, changes: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in super()._given(changes).items() if name != "x"}


@dataclass(frozen=True, eq=False)
class _Known:
    """A path of which the derivative is known."""

    derivative: Any

    @property
    def jumps(self) -> np.ndarray:
        return self.derivative.jumps


@dataclass(frozen=True, eq=False)
class Polynomials:
    """X'(t) [trial, channel] of a path of polynomials: sum_k coefficients[k] (t - t_i)^k after each time t_i.

    At a time t_i it is that before it. It jumps at `jumps`.
    """

    times: Array
    coefficients: tuple[Array, ...]  # [trial, n - 1, channel] each
    jumps: np.ndarray

    def __call__(self, t: Array) -> Array:
        xp = array_namespace(self.times)
        left = xp.clip(xp.searchsorted(self.times, t, side="left") - 1, 0, self.times.shape[0] - 2)
        along = t - self.times[left]
        first, *others = (part[:, left] for part in self.coefficients)
        return sum((part * along ** (k + 1) for k, part in enumerate(others)), start=first)


@dataclass(frozen=True, eq=False)
class Derivative:
    """X'(t) of an object that has a method for it; `apart` where it is a pytree of one path for each trial."""

    path: Any
    jumps: np.ndarray
    apart: Any = None

    def __call__(self, t: Array) -> Array:
        return self.path.derivative(t) if self.apart is None else self.apart(lambda path: path.derivative(t))(self.path)


def _rate_of(path: Any, interpolation: str, z0: Array, t: np.ndarray, backend: Backend) -> Any:
    """X'(t) as the input of an ODE."""
    if hasattr(path, "derivative"):
        return _of_object(path, backend, t)
    if path is None or callable(path):
        raise TypeError(
            f"path is {type_name(path)}, expected samples [trial, time, channel], a pair (times, samples), or an "
            "object with a method derivative(t), as interpolations of torchcde and diffrax have"
        )
    samples = check_inputs(path, z0, t, backend)
    times, samples = samples if isinstance(samples, tuple) else (t, samples)
    x = to_numpy(samples).astype(np.float64)
    h = np.diff(times)[:, None]
    slopes = np.diff(x, axis=1) / h
    parts: list[np.ndarray] = [slopes]
    if interpolation == "hermite":
        before = np.concatenate([slopes[:, :1], slopes[:, :-1]], 1)
        parts = [before, 4 * (slopes - before) / h, 3 * (before - slopes) / h**2]
    if interpolation == "natural":
        c = CubicSpline(times, x, axis=1, bc_type="natural").c  # [power, n - 1, trial, channel]
        parts = [k * np.moveaxis(c[3 - k], 0, 1) for k in (1, 2, 3)]
    jumps = times[1:-1] if interpolation == "linear" else np.zeros(0)
    return Polynomials(like_numpy(times, z0), tuple(like_numpy(np.ascontiguousarray(p), z0) for p in parts), jumps)


def _check_covered(times: Any, t: np.ndarray) -> None:
    """Raise where a path ends before the times do, which interpolations go on from without a word."""
    if times is None:
        return
    known = to_numpy(times).astype(np.float64)
    low, high, same = known.min(-1).max(), known.max(-1).min(), 1e-6 * np.abs(t).max()
    if t[0] < low - same or t[-1] > high + same:
        raise ValueError(
            f"the path is known from {low:.6g} to {high:.6g}, expected all of t, from {t[0]:.6g} to {t[-1]:.6g}"
        )


def _of_object(path: Any, backend: Backend, t: np.ndarray) -> Derivative:
    """X'(t) of an interpolation: linear ones, by their name, jump at their samples."""
    times = getattr(path, "grid_points", getattr(path, "ts", None))
    _check_covered(times, t)
    jumps = getattr(path, "jumps", np.zeros(0))
    apart = times is not None and getattr(times, "ndim", 1) == 2
    if times is not None and type(path).__name__.startswith("Linear"):
        jumps = np.unique(to_numpy(times))[1:-1]
    return Derivative(path, jumps, backend.transforms.vmap if apart else None)
