"""Solve a problem: the forward pass, with the whole state kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kpflow_dyn.arrays import Array
from kpflow_dyn.problems import DiscreteProblem


@dataclass(frozen=True)
class Solution:
    """A solved problem.

    Attributes:
        state: S [trial, time, unit].
        t: the times of the state's time axis; for a discrete problem the step numbers 1, ..., T.
        problem: what was solved.
        alg: the algorithm, None for a discrete problem.
        stats: counts of what was done.
        success: whether the solve reached the end.
        start: the state at t = 0 [trial, unit].
    """

    state: Array
    t: Array
    problem: DiscreteProblem
    alg: Any
    stats: dict[str, int]
    success: bool
    start: Array = field(repr=False)

    def __call__(self, t: float) -> Array:
        """The state at time t [trial, unit], linear between the steps.

        Raises:
            ValueError: outside of 0 <= t <= T.
        """
        last = self.state.shape[1]
        if not 0 <= t <= last:
            raise ValueError(f"t = {t} lies outside of the solved span [0, {last}]")
        before = min(int(t), last - 1)
        left = self.state[:, before - 1] if before else self.start
        return left + (t - before) * (self.state[:, before] - left)


def solve(prob: DiscreteProblem, alg: None = None) -> Solution:
    """Run the model forward and keep its whole state.

    Args:
        prob: the problem.
        alg: discrete problems need none.

    Raises:
        TypeError, ValueError: for a model, input or initial state that do not fit, a step that is random or changes its
            arguments, and a state that does not stay finite; each says what to do.
    """
    if not isinstance(prob, DiscreteProblem):
        raise TypeError(f"solve takes a problem such as DiscreteProblem(cell, x), got {type(prob).__name__}")
    if alg is not None:
        raise TypeError(f"a DiscreteProblem is solved by its own steps; alg must be None, got {alg!r}")
    import torch

    from kpflow_dyn.torch_backend.cells import as_step
    from kpflow_dyn.torch_backend.rollout import roll_out

    step, start = as_step(prob.cell, prob.x, prob.z0)
    state = roll_out(step, prob.x, start)
    times = torch.arange(1, state.shape[1] + 1, dtype=state.dtype)
    return Solution(state, times, prob, alg, {"steps": state.shape[1]}, True, start)
