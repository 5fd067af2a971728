"""Changes of a model's states: those of real steps of gradient descent, and those between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kpflow_dyn._arrays import Array, is_array, like_numpy, to_numpy
from kpflow_dyn._arrays.dots import row_norms
from kpflow_dyn._flows.flow import Flow, Output
from kpflow_dyn._learning.forecasting import objective_of, states_of
from kpflow_dyn._learning.losses import OutputLoss
from kpflow_dyn._learning.objective import check_twice
from kpflow_dyn._learning.recorder import Recorder, Recording
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.solutions import ODESolution, Solution
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._solve import solve

POWER_STEPS = 20


def given_changes(flow: Flow, change: Any) -> dict[str, Array]:
    """By name, from whatever a user may give; see `self_reference`."""
    if isinstance(change, Mapping):
        return {str(name): _change(flow, one) for name, one in change.items()}
    if isinstance(change, str | Path):
        change = Recorder.read(change)
    if isinstance(change, Recording):
        return {f"step {step}": _change(flow, _recorded(flow, change, step)) for step in change.steps[1:].tolist()}
    return {"change": _change(flow, change)}


def _recorded(flow: Flow, run: Recording, step: int) -> Any:
    """The model at a step of a recording."""
    problem = flow.solution.problem
    return run.load(step, problem.backend.models.copied(problem.model))


def _change(flow: Flow, what: Any) -> Array:
    """The change itself, or the difference to the states of a flow, of a solution, or of a model."""
    before = flow.solution
    if is_array(what):
        found = like_numpy(to_numpy(what), before.state)
    else:
        what = what.solution if isinstance(what, Flow) else what
        found = (what if isinstance(what, Solution) else _solved(before, what)).state
        if tuple(found.shape) == tuple(before.state.shape):
            found = found - before.state
    flow.ntk.domain.check(found, "a change of the states")
    return found


def _solved(before: Solution, model: Any) -> Solution:
    """The solution of the same problem for another model."""
    changed = before.problem.with_model(model)
    return (
        solve(changed, before.alg, **before.options)
        if isinstance(before, ODESolution | HybridSolution | SteppedSolution)
        else solve(changed)
    )


class Descent:
    """Gradient descent of a loss of outputs from where a flow was linearised, on a copy of the model.

    Args:
        flow: of the states, which are the outputs; or of a readout, which may learn too.
        loss: of the outputs.
    """

    def __init__(self, flow: Flow | Output, loss: OutputLoss) -> None:
        if states_of(flow).preconditioner:
            raise ValueError(
                "these steps are those of plain gradient descent, and the flow has a metric, or entries of "
                "parameters alone; give the change itself by change="
            )
        _check_steps(states_of(flow).solution)
        self._objective, values = objective_of(flow, loss)
        self._theta = self._objective.theta(values)

    def changes(self, steps: Sequence[int], lr: float | None) -> tuple[dict[str, Array], float]:
        """The change of the states after each number of steps; and the learning rate."""
        objective, theta, found = self._objective, self._theta, {}
        rate = 0.5 / self._curvature() if lr is None else lr
        before = objective.states(theta)
        for step in range(1, max(steps) + 1):
            theta = theta - rate * objective.gradient(theta)
            if step in steps:
                found[f"{step} step{'s' if step > 1 else ''}"] = objective.states(theta) - before
        return found, rate

    def _curvature(self) -> float:
        """About the largest curvature of the loss in size, by powers of the Hessian that begin with the gradient."""
        point = self._objective(self._theta)
        row, size = point.gradient[None], 0.0
        assert point.hessian is not None
        for _ in range(POWER_STEPS):
            row = row / max(float(row_norms(row)[0]), 1e-300)
            row = point.hessian(row)
            size = float(row_norms(row)[0])
        if not size > 0:
            raise ValueError("the loss has no gradient here, so that no step changes anything")
        return size


def _check_steps(solution: Solution) -> None:
    """Raise where there is no loss of the states to descend."""
    try:
        check_twice(solution)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error}; or give the change itself by change=") from None
