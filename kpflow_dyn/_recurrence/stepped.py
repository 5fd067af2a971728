"""Flows of equations that are solved by steps of our own: with noise, and with delays."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy, side_by_side
from kpflow_dyn._flows.flow import Flow, ODEFlow, RecurrentFlow
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.delayed import DDEProblem
from kpflow_dyn._problems.measure import Weights
from kpflow_dyn._problems.solutions import check_states
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._recurrence.continuous import propagator
from kpflow_dyn._recurrence.roads import tangent_of
from kpflow_dyn._recurrence.seen import AtGrid, LookedUp, OfLine
from kpflow_dyn._recurrence.steps import Steps, apart, gram_of, jacobian, kicks, started, state_space
from kpflow_dyn._recurrence.tangent import Tangent
from kpflow_dyn._stepping.delayed import at_nodes


def flow_of_steps(sol: SteppedSolution, params: Choice, weights: Weights) -> Flow:
    """The flow of a solution by steps of our own."""
    model = _model(sol, params)
    tangent = _tangent(sol, model, sol.step, sol.rows)
    of = _with_delays if isinstance(sol.problem, DDEProblem) else _between_times
    return of(sol, model, tangent, weights)


def tangent_of_steps(sol: SteppedSolution, params: Choice) -> Tangent:
    """The tangent of all steps that were taken, of whatever they begin with, the first one of length zero."""
    return _tangent(sol, _model(sol, params), sol.step, sol.rows)


def tangent_between_times(sol: SteppedSolution, params: Choice) -> AtGrid:
    """The same from one time of the grid to the next."""
    return _at_grid(sol, _model(sol, params), tangent_of_steps(sol, params))


def _model(sol: SteppedSolution, params: Choice) -> Any:
    return sol.problem.backend.tracing.Model(sol.model, params)


def _tangent(sol: SteppedSolution, model: Any, step: Callable[..., Array], rows: Array) -> Tangent:
    def check(after: Array, rounding: float) -> None:
        check_states(after, sol.steps_state, rounding)

    return started(tangent_of(model, sol.problem.backend.solving, step, rows, sol.before, check), sol, model)


def _between_times(sol: SteppedSolution, model: Any, tangent: Tangent, weights: Weights) -> RecurrentFlow:
    """Steps from one time of the grid to the next, for which P K P* = ntk is exact."""
    seen: Any = tangent if len(sol.places) == len(sol.ends) else _at_grid(sol, model, tangent)
    return Steps(seen, sol, model.parameters, weights.both).flow()


def _at_grid(sol: SteppedSolution, model: Any, tangent: Tangent) -> AtGrid:
    return AtGrid(tangent, sol.places, lambda: _tangent(sol, model, *_restarting(sol)))


@dataclass(frozen=True)
class _Restarting:
    """A step that begins at the states behind the row, and not at z, where the last number of the row is one.

    That at t_0 begins at the start, whose changes count as kicks there.
    """

    step: Callable[..., Array]

    def __call__(self, model: Any, row: Array, z: Array) -> Array:
        width, known = z.shape[-1], row[..., -1:]
        return self.step(model, row[..., : -1 - width], known * row[..., -1 - width : -1] + (1 - known) * z)


def _restarting(sol: SteppedSolution) -> tuple[_Restarting, Array]:
    first = np.zeros((*sol.steps_state.shape[:2], 1))
    first[:, sol.places[:-1] + 1] = 1
    return _Restarting(sol.step), side_by_side([sol.rows, sol.before, like_numpy(first, sol.state)], axes=2)


def _with_delays(sol: SteppedSolution, model: Any, tangent: Tangent, weights: Weights) -> ODEFlow:
    """At the times of the user as of an ODE; the flow of the steps has the states without those that they look up."""
    units, measure = sol.state.shape[2], weights.both
    state = state_space(sol, sol.state, measure)
    field, rows = at_nodes(sol)
    solving = sol.problem.backend.solving
    of_field = tangent_of(model, solving, field, rows, sol.state, alone=True)
    seen = LookedUp(tangent, None if len(sol.places) == len(sol.ends) else sol.places, units)
    J = jacobian(seen, state)  # type: ignore[arg-type]
    return ODEFlow(
        P=propagator(seen, state, weights.time),
        J=J,
        ntk=gram_of(J, seen.gram, apart(seen, state, seen.jvp_apart, seen.vjp_apart)),  # type: ignore[arg-type]
        solution=sol,
        parameters=model.parameters,
        of_steps=lambda: Steps(OfLine(tangent, units), sol, model.parameters, None).flow(),  # type: ignore[arg-type]
        untraced=tangent.untraced or of_field.untraced,
        **kicks(of_field, state),
    )
