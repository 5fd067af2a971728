"""The steps of a solution, some at a time: when they begin and end, and their triangular factors."""

import warnings

import numpy as np

from kpflow_dyn._arrays import Array, eps_of, full_precision, to_numpy
from kpflow_dyn._linearize import tangent_of_dynamics
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution
from kpflow_dyn._problems.stepped import SteppedSolution

MOST_PARTS = 64  # of a step of a solver
AGREE = 0.01  # by which part of their size exponents may change when steps are halved

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

    def factors(self, directions: Array, counted: np.ndarray) -> np.ndarray:
        """R [trial, block, k, k] of A_t ... A_{t-interval+1} Q = Q' R, from Q = directions [k, trial, unit].

        For an ODE each step is divided along the dense output, into twice as many parts until the exponents agree. Near
        rest a solver takes steps up to the edge of stability, and one such step contracts by less than the flow.
        `counted` is for how long each block counts [trial, block].
        """
        R = self._factors(directions, 1)
        if isinstance(self.sol, ODESolution):
            R = self._converged(R, directions, counted)
        _warn_of_lost_digits(np.abs(np.diagonal(R, axis1=2, axis2=3)), eps_of(directions))
        return R

    def _converged(self, R: np.ndarray, directions: Array, counted: np.ndarray) -> np.ndarray:
        parts, before, apart = 1, _exponents(R, counted), np.full(R.shape[2], np.inf)
        while parts < MOST_PARTS and (apart > AGREE).any():
            R = self._factors(directions, parts := 2 * parts)
            apart, before = _apart(before, found := _exponents(R, counted)), found
        if (apart > AGREE).any():
            rank = int(np.argmax(apart > AGREE))
            warnings.warn(
                f"from rank {1 + rank} on the exponents are not accurate: the one of that rank still changes by "
                f"{100 * apart[rank]:.2g} % when each step of the solver is divided into {parts} parts in the place of "
                f"{parts // 2}; solve with shorter steps (steps=), or ask for fewer exponents",
                stacklevel=4,
            )
        return R

    def _factors(self, directions: Array, parts: int) -> np.ndarray:
        with full_precision(directions):
            tangent = tangent_of_dynamics(self.sol, parts=parts)
            found = to_numpy(tangent.factorise(directions, parts * self.interval)).astype(np.float64)
        R = found.swapaxes(0, 1)[:, self.moved]
        if not np.isfinite(R).all():
            raise ValueError(
                f"the directions left the finite numbers within {self.interval} steps; take a shorter interval"
            )
        return R


def _exponents(R: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """The mean over trials [k]."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.abs(np.diagonal(R, axis1=2, axis2=3)))
    return (np.where(counted[..., None] > 0, logs, 0).sum(1) / counted.sum(1)[:, None]).mean(0)


def _apart(before: np.ndarray, found: np.ndarray) -> np.ndarray:
    """By which part of their size exponents changed [k]; those near zero beside a tenth of the largest."""
    finite = np.isfinite(found) & np.isfinite(before)
    size = np.abs(np.where(finite, found, 0))
    change = np.abs(np.where(finite, found, 0) - np.where(finite, before, 0))
    return change / np.maximum(np.maximum(size, size.max() / 10), np.finfo(float).tiny)


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
