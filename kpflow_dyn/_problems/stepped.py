"""Solutions by steps of our own on a grid of times: of equations with noise, and with delays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, after, like_numpy
from kpflow_dyn._problems.solutions import Solution, times_within


@dataclass(frozen=True, kw_only=True, repr=False)
class SteppedSolution(Solution):
    """The states of an SDE, a DDE or a pair (q, v) at its times, t_0 among them, and the steps that lead there.

    Attributes:
        start: what the first step begins with [trial, width].
        step: (model, row, z) -> z, on all trials in torch and on one in JAX.
        model: what the step calls.
        rows: the data of each step [trial, step, ...]; the first one is of length zero, at t_0.
        steps_state: what each step gives [trial, step, width]; the first units are the state.
        ends: the times at which the steps end [step].
        places: the numbers of the steps that end at the times of the state [time].
        options: what the solve was given.
        between: times [n] -> the weights [n, step] of the states of the steps there.
    """

    start: Array
    step: Callable[..., Array]
    model: Any
    rows: Array
    steps_state: Array
    ends: np.ndarray
    places: np.ndarray
    options: dict[str, Any]
    between: Callable[[np.ndarray], np.ndarray]

    @property
    def before(self) -> Array:
        """What each step begins with [trial, step, width]."""
        return after(self.start, self.steps_state)

    @property
    def leads_to(self) -> np.ndarray:
        """The number of the time of the state that each step leads to [step]."""
        return np.searchsorted(self.places, np.arange(len(self.ends)))

    def leading_to(self, places: np.ndarray) -> np.ndarray:
        """Which steps lead to these times of the state [trial, time]: [trial, step]."""
        return places[:, self.leads_to]

    def __call__(self, t: Any) -> Array:
        times = times_within(t, self.ends[0], self.ends[-1])
        weights = like_numpy(self.between(np.atleast_1d(times)), self.state)
        state = weights @ self.steps_state[..., : self.state.shape[2]]
        return state if times.ndim else state[:, 0]
