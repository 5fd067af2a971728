"""How much each trial and each time counts in the inner product of the state space."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._shown import Shown


@dataclass(frozen=True)
class Weights:
    """How much times [time, 1] and trials [trial, 1, 1] count, to multiply states; None where all are alike."""

    time: Array | None
    trial: Array | None

    @property
    def both(self) -> Array | None:
        """[trial, time, 1], with axes of length one where all weigh alike."""
        if self.time is None or self.trial is None:
            return self.time if self.trial is None else self.trial
        return self.time * self.trial

    def on(self, axes: Sequence[str]) -> Array | None:
        """The same on states with these axes, of which trials are the first."""
        places = {0: self.trial, **({axes.index("time"): self.time} if "time" in axes else {})}
        found = [
            weights.reshape([-1 if axis == place else 1 for axis in range(len(axes))])
            for place, weights in places.items()
            if weights is not None
        ]
        return math.prod(found[1:], start=found[0]) if found else None


@dataclass(frozen=True, repr=False)
class Measure(Shown):
    """The inner product <a, b> = sum over trials b, times n and units of trial_b time_n a b.

    With quadrature weights on the times, states are functions of time in L^2, and spectra do not depend on the mesh.

    Args:
        time: weights [time], positive; None takes those that fit the problem: the trapezoid rule on a grid of times,
            Gauss weights on a span, and a count of one for each step of a discrete problem.
        trial: "sum" counts each trial as one, "mean" as one over their number; or weights [trial], positive.

    Raises:
        ValueError: weights that are not positive and finite, or of another length (when they are used).
    Source: docs/theory.md, "Continuous time and measures".

    >>> import torch, kpflow_dyn as kp
    >>> solution = kp.solve(kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(4, 5, 3)))
    >>> total = kp.trace(kp.linearize(solution).ntk).value
    >>> mean = kp.trace(kp.linearize(solution, measure=kp.Measure(trial="mean")).ntk).value
    >>> round(total / mean)
    4
    """

    time: Any = None
    trial: Any = "sum"

    def weights(self, solution: Solution) -> Weights:
        """Those of the times and of the trials, like the solution's states."""
        state, time, trial = solution.state, solution.weights, None
        if self.time is not None and solution.t is None:
            raise ValueError(
                f"the measure has weights of times, and the solution of a {type(solution.problem).__name__} has none; "
                'name the axes of its state, as in StaticProblem(..., axes=("trial", "time", "unit"))'
            )
        if self.time is not None:
            time = _checked(self.time, state.shape[1], "time")
        if not isinstance(self.trial, str):
            trial = _checked(self.trial, len(state), "trial")
        elif self.trial == "mean":
            trial = np.full(len(state), 1 / len(state))
        elif self.trial != "sum":
            raise ValueError(f"trial is {self.trial!r}, expected 'sum', 'mean' or weights [trial]")
        time = None if time is None else like_numpy(time[:, None], state)
        return Weights(time, None if trial is None else like_numpy(trial[:, None, None], state))


def _checked(weights: Any, count: int, axis: str) -> np.ndarray:
    array = np.asarray(weights, np.float64)
    if array.shape != (count,):
        raise ValueError(f"the measure has {axis} weights of shape {array.shape}, expected [{axis}] = ({count},)")
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"the measure's {axis} weights must be positive and finite")
    return array


def trapezoid(t: np.ndarray) -> np.ndarray:
    """Weights w [time] with sum_n w_n g(t_n) ~ integral of g over [t_0, t_N], of second order."""
    half = np.diff(np.asarray(t, np.float64)) / 2
    return np.append(half, 0.0) + np.append(0.0, half)


def gauss_points(edges: np.ndarray, points: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights inside each interval between edges [step + 1], both [step * points].

    Exact for polynomials up to degree 2 points - 1 on each interval.
    """
    edges = np.asarray(edges, np.float64)
    x, w = np.polynomial.legendre.leggauss(points)
    middle, half = (edges[1:] + edges[:-1]) / 2, np.diff(edges) / 2
    return (middle[:, None] + half[:, None] * x).ravel(), (half[:, None] * w).ravel()
