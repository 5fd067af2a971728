"""Flows of hybrid models: the steps from jump to jump as one recurrence, and what is between two times of the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kpflow_dyn._arrays import (
    Array,
    like_numpy,
    side_by_side,
    to_numpy,
)
from kpflow_dyn._flows.flow import RecurrentFlow
from kpflow_dyn._flows.places import zeroed
from kpflow_dyn._flows.referee import drawn
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.hybrid import HybridSolution, HybridSteps
from kpflow_dyn._problems.measure import Weights
from kpflow_dyn._problems.solutions import check_states
from kpflow_dyn._recurrence.roads import tangent_of
from kpflow_dyn._recurrence.seen import AtGrid
from kpflow_dyn._recurrence.steps import Steps, started
from kpflow_dyn._recurrence.tangent import StepsTangent, Tangent
from kpflow_dyn.ode._jumps import JumpingStep, before_of, of_states, rows_with_rates


def flow_of_hybrid(sol: HybridSolution, params: Choice, weights: Weights) -> RecurrentFlow:
    """The recurrence from one time of the grid to the next one."""
    tangent, parameters = tangent_between_nodes(sol, params)
    return Steps(tangent, sol, parameters, weights.both).flow()


def tangent_between_nodes(sol: HybridSolution, params: Choice) -> tuple[Any, dict[str, Array]]:
    """The tangent of that recurrence, and the parameters that learn."""
    model = sol.problem.backend.tracing.Model(sol.problem.model, params)
    step, rows = rows_with_rates(sol, model)

    def within() -> Tangent:
        return started(_tangent(sol, model, *_cut_at_nodes(sol.steps, step, rows)), sol, model)

    whole = started(_tangent(sol, model, step, rows), sol, model)
    return BetweenNodes(whole, sol.steps.nodes, within, sol.state.shape[2]), model.parameters


def _cut_at_nodes(steps: HybridSteps, step: JumpingStep, rows: Array) -> tuple[JumpingStep, Array]:
    """The same steps, each interval of the grid by itself: the first step in it begins at the known state.

    That at t_0 begins at the start, whose changes count as kicks there.
    """
    counts = np.ones((*steps.t.shape, 1))
    for trial, nodes in enumerate(steps.nodes):
        counts[trial, nodes[:-1] + 1] = 0
    cut = JumpingStep(step.step, step.of_step, step.events, step.conditions, step.moving, cut=True)
    return cut, side_by_side([rows, like_numpy(counts, rows), before_of(steps, step)], axes=2)


def _tangent(sol: HybridSolution, model: Any, step: JumpingStep, rows: Array) -> StepsTangent:
    steps, units = sol.steps, sol.state.shape[2]
    tolerance = 0.0 if steps.tableau.explicit else 10 * sol.options["rtol"]

    def check(after: Array, rounding: float) -> None:
        check_states(to_numpy(after)[..., :units], steps.after, max(tolerance, rounding))

    step_of_model = of_states(sol, step)
    return tangent_of(model, sol.problem.backend.solving, step_of_model, rows, before_of(steps, step), check)


class BetweenNodes(AtGrid):
    """The recurrence from node to node, of that of the steps; see `kpflow_dyn._recurrence.tangent.Tangent`.

    Weight sites are those of the steps. Where one cannot change the state, as in a reset that does not happen, its
    inputs count as zeros.

    Args: as `AtGrid`.
    """

    def __init__(self, steps: Any, places: np.ndarray, within: Callable[[], Tangent], units: int | None = None) -> None:
        super().__init__(steps, places, within, units)
        if len(steps.sites):
            acts, parts = self._where_sites_act()
            self.inputs = [zeroed(inputs, act) for inputs, act in zip(steps.inputs, parts, strict=True)]
            self.write, self.read = lambda theta: acts * steps.write(theta), lambda values: steps.read(acts * values)

    def _where_sites_act(self) -> tuple[Array, list[np.ndarray]]:
        """Whether each site's outputs reach the state: of all outputs [trial, step, kick], and site by site."""
        like = self.steps.next_state
        (q,) = drawn([(1, *like.shape)], like)
        reaches, parts, start = to_numpy(self.steps.enter_adjoint(q))[0] != 0, [], 0
        for _, site in self.steps.sites:
            width = int(np.prod(site.kicks.shape))
            parts.append(reaches[..., start : start + width].any(-1))
            reaches[..., start : start + width] = parts[-1][..., None]
            start += width
        return like_numpy(reaches.astype(np.float64), like), parts

    def factorise(self, start: Array, interval: int) -> Array:
        raise ValueError("exponents of a hybrid model are not known")
