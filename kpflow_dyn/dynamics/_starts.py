"""What the search for fixed points is given: the problem, where it starts, and its constant inputs."""

from typing import Any, NamedTuple

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._backend import backend_of
from kpflow_dyn._problems.delayed import DDEProblem
from kpflow_dyn._problems.events import refuse_hybrid
from kpflow_dyn._problems.inputs import input_width
from kpflow_dyn._problems.parameters import parameters_of
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem, StaticProblem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._problems.stochastic import SDEProblem
from kpflow_dyn._shown import type_name
from kpflow_dyn._solve import solve

AVERAGED = (1, 2, 4, 8)  # how many states a start is the mean of, in turn
WIDER, NEAR = 1.5, 0.3  # standard deviations, over those of the states


class Posed(NamedTuple):
    """The problem, its starts [n, unit] or None where they are to be drawn, the states [trial, time, unit] to draw
    them among, and an array like those of the model."""

    problem: Any
    starts: np.ndarray | None
    states: np.ndarray
    like: Array


def posed(model: Any, x: Any, starts: Any) -> Posed:
    """What is given, checked; states are solved for where starts are to be drawn."""
    sol = model if isinstance(model, Solution) else None
    problem = sol.problem if sol is not None else model
    drawn = isinstance(starts, str) or (isinstance(starts, int | np.integer) and not isinstance(starts, bool))
    _check_autonomous(problem)
    if not isinstance(problem, DiscreteProblem | ODEProblem):
        problem = _of_cell(problem, x, starts, drawn)
    if isinstance(problem, ODEProblem):
        refuse_hybrid(problem.f, "fixed points are not searched of", "give the field between its jumps, with starts")
    if drawn:
        sol = solve(problem) if sol is None else sol
        return Posed(problem, None, to_numpy(sol.state), sol.state)
    like = problem.x if isinstance(problem, DiscreteProblem) else problem.z0
    z0 = problem.z0 if isinstance(problem, ODEProblem) else problem.backend.tracing.discrete_step(problem)[1]
    z = _matrix(starts, "starts", z0.shape[-1], "unit")
    return Posed(problem, z, z[None] if sol is None else to_numpy(sol.state), like)


def _check_autonomous(problem: Any) -> None:
    """Raise for equations that noise drives, or that look back."""
    if isinstance(problem, SDEProblem):
        raise TypeError("noise leaves no state of an SDE at rest; those of its drift are found in ODEProblem(f, z0, t)")
    if isinstance(problem, DDEProblem):
        raise TypeError(
            "a DDE rests where f(t, z, (z, z, ...)) = 0: give a field that passes z for each delayed state, as "
            "ODEProblem(field, z0, t). Whether these points are stable hangs on the delays, and is_stable is that of "
            "the field; kp.dynamics.lyapunov_spectrum of a solution at rest says it"
        )


def _of_cell(cell: Any, x: Any, starts: Any, drawn: bool) -> DiscreteProblem:
    """A bare cell as a problem."""
    if isinstance(cell, StaticProblem) or not callable(cell):
        raise TypeError(
            f"a {type_name(cell)} has no dynamics; expected a cell, a DiscreteProblem, an ODEProblem or a Solution"
        )
    if drawn:
        raise ValueError("a cell alone has no states to start from; pass starts [n, unit], or a DiscreteProblem")
    z = starts if backend_of(starts) else like_numpy(np.asarray(starts), next(iter(parameters_of(cell).values())))
    width = getattr(cell, "input_size", None) if x is None else np.shape(to_numpy(x))[-1]
    if width is None:
        raise ValueError("the cell has no input_size attribute, so the width of its input is unknown; pass x [input]")
    inputs = like_numpy(np.zeros((1, 1, width)), z)
    return DiscreteProblem(cell, inputs, None if hasattr(cell, "hidden_size") else z[:1])


class Draw:
    """Starts of several kinds, around the states [trial, time, unit]."""

    def __init__(self, states: np.ndarray, noise: float, seed: int) -> None:
        if not 0 <= noise < np.inf:
            raise ValueError(f"noise is {noise!r}, expected noise >= 0")
        self.rng, self.rows = np.random.default_rng(seed), states.reshape(-1, states.shape[2])
        self.noise = noise

    def visited(self, count: int) -> np.ndarray:
        """States and means of a few of them, with noise [n, unit]."""
        numbers = np.resize(AVERAGED, count)
        means = np.stack([self.rows[self.rng.integers(len(self.rows), size=n)].mean(0) for n in numbers])
        return self._noisy(means, self.noise * _deviation(self.rows))

    def around(self, count: int) -> np.ndarray:
        """Of a Gaussian with the mean of the states and a wider covariance."""
        covariance = np.atleast_2d(np.cov(self.rows.T, bias=True))
        return self.rng.multivariate_normal(self.rows.mean(0), WIDER**2 * covariance, count, method="eigh")

    def inside(self, count: int, box: np.ndarray) -> np.ndarray:
        """Anywhere in a box with corners [2, unit], however near to each other the states are."""
        return self.rng.uniform(box[0], box[1], (count, box.shape[1]))

    def deviation(self, points: np.ndarray) -> float:
        """The standard deviation of the states or, where it is larger, of the points: the states may be at rest."""
        return max(_deviation(self.rows), _deviation(points))

    def combined(self, count: int, points: np.ndarray) -> np.ndarray:
        """z_i + z_j - z_k of points: the fourth corners of parallelograms, or where z_j = z_k, points."""
        i, j, k = self.rng.integers(len(points), size=(3, count))
        return self._noisy(points[i] + points[j] - points[k], self.noise * self.deviation(points))

    def near(self, count: int, points: np.ndarray) -> np.ndarray:
        """Around points."""
        return self._noisy(points[self.rng.integers(len(points), size=count)], NEAR * self.deviation(points))

    def _noisy(self, z: np.ndarray, size: float) -> np.ndarray:
        return z + size * self.rng.standard_normal(z.shape)


def _deviation(rows: np.ndarray) -> float:
    return float(np.sqrt(((rows - rows.mean(0)) ** 2).mean()))


def constant_inputs(problem: DiscreteProblem | ODEProblem, x: Any, count: int) -> np.ndarray:
    """x [n, input]."""
    width = problem.x.shape[2] if isinstance(problem, DiscreteProblem) else input_width(problem) or 0
    array = np.zeros(width) if x is None else np.asarray(to_numpy(x), np.float64)
    array = np.broadcast_to(array, (count, *array.shape)) if array.ndim == 1 else array
    if len(array) != count:
        raise ValueError(f"x has shape {array.shape} for {count} starts, expected [input], or [n, input] with one each")
    return _matrix(array, "x", width, "input").copy()


def _matrix(given: Any, what: str, width: int, axis: str) -> np.ndarray:
    array = np.asarray(to_numpy(given))
    if array.ndim != 2 or array.shape[1] != width or not len(array):
        raise ValueError(
            f"{what} has shape {array.shape}, expected [n, {axis}] with {axis} = {width}, as the model has"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{what} holds NaN or inf, first in row {int(np.argmin(np.isfinite(array).all(1)))}")
    return array
