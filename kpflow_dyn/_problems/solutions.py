"""Solved problems: the whole state, and what a linearisation needs of the solve."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem, Problem
from kpflow_dyn._problems.steps import AcceptedSteps


@dataclass(frozen=True)
class Solution:
    """A solved problem.

    Attributes:
        state: S [trial, time, unit].
        t: the times of the state's time axis; for a discrete problem the step numbers 1, ..., T, for an ODE float64
            numpy times: its grid, or on a span three Gauss points inside each step.
        problem: what was solved.
        alg: the algorithm, None for a discrete problem.
        stats: counts of what was done.
        success: whether the solve reached the end.
        start: the state at t = 0 [trial, unit]; where the search for a fixed point or free form began; None of a
            network.
        weights: quadrature weights [time] of an integral over the time axis; None for a discrete problem.
        steps: the steps that the solver accepted; None for a discrete problem, and for methods that are no Runge-Kutta
            steps, which cannot be replayed.
        options: the options that the solve used.
        sites: of a network, the names of the values that make the state; else ().
        dense_output: of an ODE, times [n] -> the state there [trial, n, unit]; None of others.

    Of networks, fixed points and free forms `t` is None; a fixed point's `stats` have the spectral radius of D_z f and
    the condition number of 1 - D_z f.
    """

    state: Array
    t: Array
    problem: Problem
    alg: Any
    stats: dict[str, Any]
    success: bool
    start: Array = field(repr=False)
    weights: np.ndarray | None = field(default=None, repr=False)
    steps: AcceptedSteps | None = field(default=None, repr=False)
    options: dict[str, Any] = field(default_factory=dict)
    sites: tuple[str, ...] = ()
    traced: Any = field(default=None, repr=False)
    inverse: Any = field(default=None, repr=False)
    dense_output: Any = field(default=None, repr=False)

    def __call__(self, t: Any) -> Array:
        """The state at a time t [trial, unit], or at times t [n] as [trial, n, unit].

        Of an ODE this is the solver's own dense output; between the steps of a discrete problem it is linear.

        Raises:
            ValueError: outside of the solved times.
        """
        if isinstance(self.problem, DiscreteProblem):
            return self._between_steps(t)
        if not isinstance(self.problem, ODEProblem):
            raise ValueError(f"the solution of a {type(self.problem).__name__} is no function of time; read .state")
        times = np.asarray(t, np.float64)
        low, high = self.problem.t[0], self.problem.t[-1]
        outside = ~((times >= low) & (times <= high))
        if times.ndim > 1 or times.size == 0:
            raise ValueError(f"t has shape {times.shape}, expected a number or times [n]")
        if outside.any():
            raise ValueError(f"t = {times[outside][0]} lies outside of the solved span [{low}, {high}]")
        state = self.dense_output(np.atleast_1d(times))
        return state if times.ndim else state[:, 0]

    def _between_steps(self, t: float) -> Array:
        last = self.state.shape[1]
        if not 0 <= t <= last:
            raise ValueError(f"t = {t} lies outside of the solved span [0, {last}]")
        before = min(int(t), last - 1)
        left = self.state[:, before - 1] if before else self.start
        return left + (t - before) * (self.state[:, before] - left)


def check_states(traced: Array, state: Array, tolerance: float = 0.0) -> None:
    """Raise when the traced step does not give the solved states, to round-off or to a tolerance above it."""
    xp = array_namespace(state)
    limits = xp.finfo(state.dtype)
    tolerance = max(tolerance, 1e3 * float(limits.eps))
    error = to_numpy(xp.max(abs(traced - state), axis=(0, 2))) / max(float(abs(state).max()), float(limits.tiny))
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

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> class Square(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        ...     def forward(self, t, z):
        ...         return self.a * z**2
        >>> start = torch.tensor([[0.1], [0.8]], dtype=torch.float64)
        >>> try:
        ...     kp.solve(kp.ODEProblem(Square(), start, (0.0, 2.0)))
        ... except kp.SolveError as error:
        ...     print(str(error).partition(";")[0], error.trials, tuple(error.solution.state.shape[::2]))
        trial 1 left the finite numbers at t = 1.25 [1] (1, 1)
    """

    def __init__(self, message: str, trials: list[int], solution: Solution | None) -> None:
        super().__init__(message)
        self.trials, self.solution = trials, solution
