"""Solved problems: the whole state, and what a linearisation needs of the solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, after, array_namespace, eps_of, like_numpy, take_at, to_numpy
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem, Problem, StartedProblem
from kpflow_dyn._problems.steps import AcceptedSteps
from kpflow_dyn._problems.unit_names import names_of_state
from kpflow_dyn._shown import Row, Shown, described, number, sizes, span

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, repr=False)
class Solution(Shown):
    """A solved problem. `solve` returns one of its subclasses, one for each kind of problem.

    Attributes:
        problem: the problem that was solved.
        state: S, [trial, time, unit] if there is time.
        t: the times of the state's time axis; None if there is none.
        alg: the algorithm; None if there is no choice.
        stats: counts of the work done, such as steps.
        success: whether the solve reached the end.
        weights: quadrature weights [time] of an integral over the time axis; None where each step counts as one.

    Example as `solve`.
    """

    problem: Problem
    state: Array
    t: Any = None
    alg: Any = None
    stats: dict[str, Any] = field(default_factory=dict)
    success: bool = True
    weights: np.ndarray | None = field(default=None, repr=False)

    def to_xarray(self) -> xr.Dataset:
        """A dataset of `state` on `axes`, with the times `t`, and the names of units that a plant tells."""
        import xarray as xr

        state = to_numpy(self.state)
        names = names_of_state(self.problem, state.shape[-1]) if "unit" in self.axes else ()
        coords: dict[str, Any] = {"unit": list(names)} if names else {}
        coords |= {"time": to_numpy(self.t)} if self.t is not None and "time" in self.axes else {}
        attrs = {"problem": type(self.problem).__name__, "success": int(self.success)}
        return xr.Dataset({"state": (self.axes, state)}, coords, attrs)

    def plot(self, dark: bool = False) -> Figure:
        """The states of the trials over time; those of more than six units in the plane of two principal components."""
        from kpflow_dyn.figures import _results as figures

        return figures.solution(self, dark=dark)

    def __call__(self, t: Any) -> Array:
        """The state at a time t [trial, unit], or at times t [n] as [trial, n, unit].

        Of an ODE this is the solver's own dense output; between the steps of a discrete problem it is linear. Outside
        of the solved times, or where the state is no function of time, it is a ValueError.
        """
        raise ValueError(f"the solution of a {type(self.problem).__name__} is no function of time; read .state")

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the state's axes."""
        return ("trial", "time", "unit")

    def _shown(self) -> tuple[str, list[Row]]:
        problem = self.problem
        model = problem.of_states if isinstance(problem, StartedProblem) else problem.model
        rows: list[Row] = [("problem", f"{type(problem).__name__} of {described(model)}")]
        rows += [("state", sizes(self.axes, self.state))]
        rows += [] if self.t is None else [("t", span(self.t))]
        rows += [] if self.alg is None else [("alg", described(self.alg))]
        counts = [f"{name} {number(count)}" for name, count in self.stats.items() if np.ndim(count) == 0]
        rows += [("stats", ", ".join(counts))] if counts else []
        rows += [] if self.success else [("success", "no: it did not reach the end")]
        return type(self).__name__, rows


@dataclass(frozen=True, kw_only=True, repr=False)
class DiscreteSolution(Solution):
    """The states of a `DiscreteProblem` at the step numbers t = 1, ..., T.

    Attributes:
        start: the state at t = 0 [trial, unit].
    """

    problem: DiscreteProblem
    start: Array = field(repr=False)

    @property
    def before(self) -> Array:
        """The state before each step [trial, time, unit]."""
        return after(self.start, self.state)

    def __call__(self, t: Any) -> Array:
        times, last = times_within(t, 0, self.state.shape[1]), self.state.shape[1]
        whole = array_namespace(self.state).concat([self.start[:, None], self.state], axis=1)
        before = np.minimum(np.atleast_1d(times).astype(int), last - 1)
        along = like_numpy((np.atleast_1d(times) - before)[:, None], self.state)
        left, right = (take_at(whole[None], np.tile(n, (len(whole), 1)))[0] for n in (before, before + 1))
        state = left + along * (right - left)
        return state if times.ndim else state[:, 0]


@dataclass(frozen=True, kw_only=True, repr=False)
class ContinuousSolution(Solution):
    """The states of an `ODEProblem` at float64 numpy times t: its grid, or three Gauss points inside each step.

    Attributes:
        start: the state at the first time [trial, unit].
        options: the options that the solve used.
        dense_output: times [n] -> the state there [trial, n, unit].
    """

    problem: ODEProblem
    start: Array = field(repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    dense_output: Callable[[np.ndarray], Array] = field(repr=False)

    @property
    def nodes(self) -> np.ndarray:
        """The times as the solver counts them, which increase: -t where time runs backward."""
        return self.problem.form.time(np.asarray(self.t, np.float64))

    def __call__(self, t: Any) -> Array:
        time = self.problem.form.time
        low, high = sorted(time(self.problem.t[[0, -1]]))
        times = times_within(t, low, high)
        state = self.dense_output(np.atleast_1d(time(times)))
        return state if times.ndim else state[:, 0]


@dataclass(frozen=True, kw_only=True, repr=False)
class ODESolution(ContinuousSolution):
    """A `ContinuousSolution` of a field without jumps.

    Attributes:
        steps: the steps that the solver accepted; None for methods that are no Runge-Kutta steps, which cannot be
            replayed.
    """

    steps: AcceptedSteps | None = field(default=None, repr=False)


def times_within(t: Any, low: float, high: float) -> np.ndarray:
    """A number or times [n], in float64; raise outside of the solved span."""
    times = np.asarray(to_numpy(t), np.float64)
    outside = ~((times >= low) & (times <= high))
    if times.ndim > 1 or times.size == 0:
        raise ValueError(f"t has shape {times.shape}, expected a number or times [n]")
    if outside.any():
        raise ValueError(f"t = {times[outside][0]} lies outside of the solved span [{low}, {high}]")
    return times


def check_states(traced: Array, state: Array, tolerance: float = 0.0) -> None:
    """Raise when the traced step does not give the solved states, to round-off or to a tolerance above it."""
    tolerance, (traced, state) = max(tolerance, 1e3 * eps_of(state)), map(to_numpy, (traced, state))
    apart, size = traced - state, max(state.max(), -state.min(), np.finfo(state.dtype).tiny)
    error = np.maximum(apart.max((0, 2)), -apart.min((0, 2))) / size
    if not error.max() <= tolerance:
        raise ValueError(
            f"the traced step differs from the solved states by {error.max():.1e} of their size (step "
            f"{int(error.argmax())}). Either the parameters changed after solve (solve again), or a step depends on "
            "other trials, on the time, or on something outside of x_t and z"
        )


class SolveError(ValueError):
    """A solve in which some trials failed; the message names them, the times and what to do.

    Attributes:
        trials: the numbers of the trials that failed.
        solution: the Solution of the other trials, in their order; None where there is none.

    >>> import torch, kpflow_dyn as kp
    >>> try:
    ...     kp.solve(kp.ODEProblem(kp.models.CTRNNField(8), torch.randn(2, 8), (0.0, 9.0)), max_steps=2)
    ... except kp.SolveError as error:
    ...     error.trials
    [0, 1]
    """

    def __init__(self, message: str, trials: list[int], solution: Solution | None) -> None:
        super().__init__(message)
        self.trials, self.solution = trials, solution
