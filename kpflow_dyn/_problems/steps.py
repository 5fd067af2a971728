"""Runge-Kutta steps as data: the tableau, the steps that a solver accepted, and one step from both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, empty_row, eps_of, like_numpy, placed, taken, to_numpy
from kpflow_dyn._backend import backend_of
from kpflow_dyn._shown import Shown

Field = Callable[[Any, Array, Any], Array]


@dataclass(frozen=True, eq=False)
class Tableau:
    """A Runge-Kutta method: k_i = f(t + c_i h, y + h sum_j a_ij k_j), y_1 = y + h sum_i b_i k_i.

    Attributes:
        a: [stage, stage].
        b: [stage].
        c: [stage].
        interpolation: the dense output as weights, w = interpolation(theta) [..., stage] for theta [...] in [0, 1],
            with y(t + theta h) = y_1 + h sum_i w_i(theta) k_i, so w(1) = 0 and w(0) = -b.

    Example as `Library`.
    """

    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    interpolation: Callable[[np.ndarray], np.ndarray]

    @property
    def explicit(self) -> bool:
        """Whether each stage needs only those before it."""
        return not np.triu(self.a).any()


@dataclass(frozen=True, eq=False, repr=False)
class AcceptedSteps(Shown):
    """The steps of a solve, trial by trial, which a linearisation replays.

    Step 0 of every trial has length zero (t = t0, before = after = z0), so that t0 is the end of a step like every
    other time. Trials with fewer steps than others are padded at the end with dt = 0, at the final time and state.

    Attributes:
        tableau: the method.
        t: where each step begins [trial, step], float64 numpy.
        dt: its length [trial, step], float64 numpy.
        before: the state where it begins [trial, step, unit].
        after: the state where it ends [trial, step, unit].
        stage_times: when each stage is evaluated [trial, step, stage], float64 numpy: t + c dt; torchdiffeq, which
            avoids the ends of its steps, differs from this by round-off.
        stages: the stage derivatives k [trial, step, stage, unit] of an implicit method; None where they are explicit
            and are evaluated again.
        rounding: by how much a step that is taken again may differ, from round-off [trial]; `solve` sets it.

    Raises:
        ValueError: steps of an implicit method without their stages.

    Example as `Library`.
    """

    tableau: Tableau
    t: np.ndarray
    dt: np.ndarray
    before: Array
    after: Array
    stage_times: np.ndarray = None  # type: ignore[assignment]
    stages: Array | None = None
    rounding: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.stage_times is None:
            object.__setattr__(self, "stage_times", self.t[..., None] + self.tableau.c * self.dt[..., None])
        if self.stages is None and not self.tableau.explicit:
            raise ValueError("the steps of an implicit method need their stages [trial, step, stage, unit], got None")

    @classmethod
    def between(
        cls,
        tableau: Tableau,
        times: np.ndarray,
        states: Array,
        stages: Array | None = None,
        stage_times: np.ndarray | None = None,
        begins: np.ndarray | None = None,
    ) -> Self:
        """The steps between times [step + 1] that all trials share, or [trial, step + 1] of each, and what is there.

        Args:
            times: t0 and the end of each step.
            states: z0 and the state at the end of each step [trial, step + 1, unit].
            stages: of an implicit method, after zeros for the step of length zero [trial, step + 1, stage, unit].
            stage_times: where they are not t + c dt [trial, step + 1, stage].
            begins: where steps begin, if that is not where the ones before ended [trial, step + 1]: after a jump of
                the inputs.
        """
        ends = np.broadcast_to(np.asarray(times, np.float64), states.shape[:2])
        begins = np.concatenate([ends[:, :1], ends[:, :-1]], 1) if begins is None else begins.astype(np.float64)
        if stage_times is None:  # the end exactly, as a jump may come right after it
            c = tableau.c
            stage_times = np.where(c == 1, ends[..., None], begins[..., None] + c * (ends - begins)[..., None])
        before = taken(states, np.tile(np.maximum(np.arange(states.shape[1]) - 1, 0), (len(states), 1)))
        return cls(tableau, begins, ends - begins, before, states, stage_times, stages)  # type: ignore[arg-type]

    def take(self, places: np.ndarray) -> AcceptedSteps:
        """The steps at these places [trial, n], as a collection that may have them in any order, or more than once."""
        t, dt, stage_times = (a[np.arange(len(places))[:, None], places] for a in (self.t, self.dt, self.stage_times))
        before, after = taken(self.before, places), taken(self.after, places)
        k = None if self.stages is None else taken(self.stages, places)
        return AcceptedSteps(self.tableau, t, dt, before, after, stage_times, k, self.rounding)

    def padded(self, rounded: Callable[[int], int], z0: Array) -> AcceptedSteps:
        """The same with steps of length zero at t0, up to a number that solves of similar length share.

        There the field had to have values; at the end it may have none.
        """
        count = self.dt.shape[1]
        more = rounded(count) - count
        if not more:
            return self

        def filled(values: Any, first: Any) -> Any:
            return np.concatenate([np.repeat(first, more, 1), values], 1)

        def states(values: Any, first: Any) -> Array:  # by numpy: a framework may compile this for each number of steps
            return placed(like_numpy(filled(to_numpy(values), first), z0), empty_row(z0, of_trials=True), -values.ndim)

        t0, first = self.t[:, :1], to_numpy(self.before)[:, :1]
        return AcceptedSteps(
            self.tableau,
            filled(self.t, t0),
            filled(self.dt, 0 * t0),
            states(self.before, first),
            states(self.after, first),
            filled(self.stage_times, t0[..., None] + 0 * self.stage_times[:, :1]),
            None if self.stages is None else states(self.stages, 0 * to_numpy(self.stages)[:, :1]),
            self.rounding,
        )

    def locate(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The step [trial, time] that each time lies in, and how far along it is: theta [trial, time] in [0, 1].

        A time that is the end of a step (to round-off) is the end of exactly that step, theta = 1; t0 is step 0.
        """
        times = np.atleast_1d(np.asarray(times, np.float64))
        ends = self.t + self.dt
        tolerance = 4 * eps_of(self.after) * max(np.abs(ends).max(), np.finfo(float).tiny)
        low, high = ends[0, 0], ends[:, -1].min()
        outside = ~((times >= low - tolerance) & (times <= high + tolerance))
        if outside.any():
            raise ValueError(f"t = {times[outside][0]} lies outside of the solved span [{low}, {high}]")
        rows = [self._locate_row(row, times, tolerance) for row in range(len(ends))]
        return np.stack([step for step, _ in rows]), np.stack([theta for _, theta in rows])

    def _locate_row(self, row: int, times: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        t, dt = self.t[row], self.dt[row]
        ends = t + dt
        step = np.minimum(np.searchsorted(ends, times), len(ends) - 1)
        earlier = np.maximum(step - 1, 0)
        ends_here = np.abs(times - ends[step]) <= tolerance
        ends_earlier = ~ends_here & (np.abs(times - ends[earlier]) <= tolerance)
        step = np.where(ends_earlier, earlier, step)
        exact = ends_here | ends_earlier | (dt[step] == 0)
        along = (times - t[step]) / np.where(exact, 1.0, dt[step])
        return step, np.where(exact, 1.0, np.clip(along, 0.0, 1.0))


def own_times(row: Array, count: int) -> list[Array]:
    """The first entries of a row; of rows [trial, ...], which torch has, one [trial] for each where trials differ."""
    first = row if row.ndim == 1 else row[0]
    if row.ndim == 1 or len(row) == 1 or not bool((row[:, :count] != first[:count]).any()):
        return [first[i] for i in range(count)]
    return [row[:, i] for i in range(count)]


def call_field(field: Callable[..., Array], t: Array, y: Array, x: Array | None) -> Array:
    """f(t, y) or f(t, y, x), where t may have a time for each trial, t [trial]; see `_of_trials`.

    A field whose `takes_times` is true takes such times itself.
    """
    if getattr(t, "ndim", 0) == 0 or getattr(field, "takes_times", False):
        return field(t, y) if x is None else field(t, y, x)
    return _of_trials(field, t, y, *([] if x is None else [x]))


def _of_trials(field: Callable[..., Array], t: Array, *rows: Array) -> Array:
    """A field of one time, of trials [trial, ...] that each have their own: mapped over these, or one by one."""
    backend = backend_of(t)
    assert backend is not None
    try:
        return backend.transforms.vmap(lambda t, *row: field(t, *(part[None] for part in row))[0])(t, *rows)
    except Exception:  # of a field that cannot be mapped, as it branches on values
        each = [field(time, *(row[n : n + 1] for row in rows)) for n, time in enumerate(t)]
        return array_namespace(t).concat(each, axis=0)


def stages(field: Field, tableau: Tableau, t: Sequence[Any], h: Any, y: Array, inputs: Sequence[Any]) -> list[Array]:
    """The stage derivatives k_i = field(t_i, y + h sum_j a_ij k_j, x_i) of an explicit method; h multiplies y."""
    k: list[Array] = []
    for row, t_i, x_i in zip(tableau.a.tolist(), t, inputs, strict=True):
        k.append(field(t_i, _advance(y, h, row[: len(k)], k), x_i))
    return k


def step(tableau: Tableau, h: Any, y: Array, k: Sequence[Array]) -> Array:
    """The state after the step, y + h sum_i b_i k_i."""
    return _advance(y, h, tableau.b.tolist(), k)


def _advance(y: Array, h: Any, weights: Sequence[float], k: Sequence[Array]) -> Array:
    terms = [weight * k_i for weight, k_i in zip(weights, k, strict=True) if weight]
    return y + h * sum(terms[1:], terms[0]) if terms else y


def quartic(b: np.ndarray, mid: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The interpolation through y_0, y_0 + h sum_i mid_i k_i (half way) and y_1, with slopes k_first and k_last."""

    def weights(theta: np.ndarray) -> np.ndarray:
        x = np.asarray(theta, np.float64)[..., None]
        start = 1 + x**2 * (-11 + x * (18 - 8 * x))
        middle = x**2 * (16 + x * (-32 + 16 * x))
        w = -(start + middle) * b + middle * mid
        w[..., 0] += (x * (1 + x * (-4 + x * (5 - 2 * x))))[..., 0]
        w[..., -1] += (x**2 * (1 + x * (-3 + 2 * x)))[..., 0]
        return w

    return weights


def hermite(b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The dense output of a tableau: the cubic through y_0 and y_1 whose slopes at the ends are k_first and k_last.

    With theta the part of the step, y = (1 - u) y_0 + u y_1 + h (theta (1 - theta)^2 k_first + theta^2 (theta - 1)
    k_last), where u = theta^2 (3 - 2 theta). The last stage must be f at the end of the step, with weight 0 if need be.

    Args:
        b: of the tableau [stage].
    Source: Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, 1993, section II.6.

    >>> import numpy as np
    >>> from kpflow_dyn import ode
    >>> ode.hermite(np.array([0.5, 0.5]))(np.array([0.0, 1.0])).tolist() == [[-0.5, -0.5], [0.0, 0.0]]
    True
    """

    def weights(theta: np.ndarray) -> np.ndarray:
        x = np.asarray(theta, np.float64)[..., None]
        w = -(1 + 2 * x) * (1 - x) ** 2 * b
        w[..., 0] += (x * (1 - x) ** 2)[..., 0]
        w[..., -1] += (x**2 * (x - 1))[..., 0]
        return w

    return weights
