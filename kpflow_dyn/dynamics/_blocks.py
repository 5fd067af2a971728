"""The steps of a solution, some at a time: when they begin and end, and their triangular factors."""

import warnings

import numpy as np

from kpflow_dyn._arrays import Array, eps_of, full_precision, to_numpy
from kpflow_dyn._linearize import tangent_of_dynamics
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution
from kpflow_dyn._problems.stepped import SteppedSolution

Stepwise = DiscreteSolution | ODESolution | SteppedSolution


class Blocks:
    """Blocks of `interval` steps, the last maybe shorter; without a first step of length zero.

    The trials begin at `start`, and each block reaches from `begin` to `end` [trial, block].
    """

    def __init__(self, sol: Stepwise, interval: int) -> None:
        if not (is_whole(interval) and interval >= 1):
            raise ValueError(f"interval is {interval!r}, expected a number of steps, 1 or more")
        self.sol, self.interval = sol, int(interval)
        self.start, ends = _step_ends(sol)
        steps = ends.shape[1]
        end = ends[:, [min(i + self.interval, steps) - 1 for i in range(0, steps, self.interval)]]
        self.moved = (end > self.start).all(0)
        self.end = end[:, self.moved]
        self.begin = np.concatenate([np.full_like(self.end[:, :1], self.start), self.end[:, :-1]], 1)

    @property
    def length(self) -> float:
        """Of a trial."""
        return float(self.end[:, -1].min() - self.start)

    def after(self, transient: float) -> np.ndarray:
        """How long each block counts [trial, block]: not at all where it begins within the transient."""
        if not 0 <= transient < self.length:
            raise ValueError(f"transient is {transient!r}, expected less than the length {self.length:g} of the trials")
        counts = self.begin >= self.start + transient
        lengths = np.where(counts, self.end - self.begin, 0.0)
        if not (lengths.sum(1) > 0).all():
            raise ValueError(f"nothing is left after a transient of {transient:g}; shorten it, or the interval")
        return lengths

    def until(self, horizon: float | None) -> int:
        """How many blocks end by then in every trial."""
        if horizon is None:
            return self.end.shape[1]
        if not 0 < horizon <= self.length * (1 + 1e-12):
            raise ValueError(f"horizon is {horizon!r}, expected at most the length {self.length:g} of the trials")
        last = int((self.end <= self.start + horizon * (1 + 1e-12)).all(0).sum())
        if not last:
            raise ValueError(f"no step ends within a horizon of {horizon:g}; the first ends at {self.end.max(0)[0]:g}")
        return last

    def factors(self, directions: Array) -> np.ndarray:
        """R [trial, block, k, k] of A_t ... A_{t-interval+1} Q = Q' R, from Q = directions [k, trial, unit]."""
        with full_precision(directions):
            found = to_numpy(tangent_of_dynamics(self.sol).factorise(directions, self.interval)).astype(np.float64)
        R = found.swapaxes(0, 1)[:, self.moved]
        if not np.isfinite(R).all():
            raise ValueError(
                f"the directions left the finite numbers within {self.interval} steps; take a shorter interval"
            )
        _warn_of_lost_digits(np.abs(np.diagonal(R, axis1=2, axis2=3)), eps_of(directions))
        return R


def is_whole(value: object) -> bool:
    """Whether it is an integer."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _step_ends(sol: Stepwise) -> tuple[float, np.ndarray]:
    """When the trials start, and the ends of their steps [trial, step]."""
    if isinstance(sol, ODESolution):
        assert sol.steps is not None
        return float(sol.problem.t[0]), sol.steps.t + sol.steps.dt
    trials, times, _ = sol.state.shape
    if isinstance(sol, SteppedSolution):
        return float(sol.ends[0]), np.broadcast_to(sol.ends, (trials, len(sol.ends)))
    return 0.0, np.broadcast_to(np.arange(1.0, times + 1), (trials, times))


def _warn_of_lost_digits(diagonal: np.ndarray, eps: float) -> None:
    """A block keeps what it makes smaller by no more than its digits; what is exactly zero is right as well."""
    ratio = diagonal / diagonal.max(2, keepdims=True, initial=np.finfo(float).tiny)
    lost = ((ratio > 0) & (ratio < diagonal.shape[2] * eps)).any((0, 1))
    if lost.any():
        warnings.warn(
            f"from rank {1 + int(np.argmax(lost))} on the exponents are round-off, as some direction shrinks beside "
            "others by more than the digits of a number within one block; take a shorter interval, fewer exponents, or "
            "float64",
            stacklevel=4,
        )
