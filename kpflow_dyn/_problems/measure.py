"""How much each trial and each time counts in the inner product of the state space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy
from kpflow_dyn._problems.solutions import Solution


@dataclass(frozen=True)
class Weights:
    """How much times and trials count, as arrays that multiply states [trial, time, unit]; None where all are alike.

    Attributes:
        time: [time, 1].
        trial: [trial, 1, 1].
    """

    time: Array | None
    trial: Array | None

    @property
    def both(self) -> Array | None:
        """[trial, time, 1], with axes of length one where all weigh alike."""
        if self.time is None or self.trial is None:
            return self.time if self.trial is None else self.trial
        return self.time * self.trial


@dataclass(frozen=True)
class Measure:
    """The inner product <a, b> = sum over trials b, times n and units of trial_b time_n a b.

    With quadrature weights on the times, states are functions of time in L^2, and spectra do not depend on the mesh.

    Args:
        time: weights [time], positive; None takes those that fit the problem: the trapezoid rule on a grid of times,
            Gauss weights on a span, and a count of one for each step of a discrete problem.
        trial: "sum" counts each trial as one, "mean" as one over their number; or weights [trial], positive.

    Raises:
        ValueError: weights that are not positive and finite, or of another length (when they are used).

    Source: docs/theory.md, "Continuous time and measures".

    Example:
        >>> import torch, kpflow_dyn as kp
        >>> solution = kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(4, 5, 3)))
        >>> total = kp.trace(kp.linearize(solution).ntk).value
        >>> mean = kp.trace(kp.linearize(solution, measure=kp.Measure(trial="mean")).ntk).value
        >>> round(total / mean)
        4
    """

    time: Any = None
    trial: Any = "sum"

    def times(self, solution: Solution) -> np.ndarray | None:
        """The weights of the solution's times; None where each counts as one."""
        if self.time is None:
            return solution.weights
        return _checked(self.time, solution.state.shape[1], "time")

    def trials(self, solution: Solution) -> np.ndarray | None:
        """The weights of its trials; None where each counts as one."""
        count = solution.state.shape[0]
        if isinstance(self.trial, str):
            if self.trial not in ("sum", "mean"):
                raise ValueError(f"trial is {self.trial!r}, expected 'sum', 'mean' or weights [trial]")
            return None if self.trial == "sum" else np.full(count, 1 / count)
        return _checked(self.trial, count, "trial")

    def weights(self, solution: Solution) -> Weights:
        """Both, like the solution's states."""
        time, trial = self.times(solution), self.trials(solution)
        return Weights(
            None if time is None else like_numpy(time[:, None], solution.state),
            None if trial is None else like_numpy(trial[:, None, None], solution.state),
        )


def _checked(weights: Any, count: int, axis: str) -> np.ndarray:
    array = np.asarray(weights, np.float64)
    if array.shape != (count,):
        raise ValueError(f"the measure has {axis} weights of shape {array.shape}, expected [{axis}] = ({count},)")
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"the measure's {axis} weights must be positive and finite")
    return array
