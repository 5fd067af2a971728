"""Flows of steps: their operators are sweeps over the linear recurrence of one tangent."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, to_numpy
from kpflow_dyn._flows.flow import Draw, RecurrentFlow
from kpflow_dyn._flows.propagator import Propagator
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.solutions import DiscreteSolution, Solution, check_states
from kpflow_dyn._problems.starts import OfStates
from kpflow_dyn._problems.unit_names import names_of_state
from kpflow_dyn._recurrence.roads import check_as_called, tangent_of
from kpflow_dyn._recurrence.starts import StartedTangent, start_of
from kpflow_dyn._recurrence.tangent import StepsTangent, Tangent
from kpflow_dyn._spaces.direct_sums import unit_by_unit
from kpflow_dyn._spaces.operators import Apply, GramOperator, Operator, on_spaces
from kpflow_dyn._spaces.space import Space

AXES = ("trial", "time", "unit")


@dataclass(frozen=True, eq=False)
class Steps:
    """A linearised solution whose times are the steps of one recurrence, with the parameters that learn."""

    tangent: Tangent
    solution: Solution
    parameters: dict[str, Array]
    measure: Array | None

    def flow(self) -> RecurrentFlow:
        tangent, state = self.tangent, self._space()
        J = jacobian(tangent, state)
        return RecurrentFlow(
            P=_propagator(tangent, state),
            J=J,
            ntk=gram_of(J, tangent.gram, apart(tangent, state, tangent.jvp_apart, tangent.vjp_apart)),
            solution=self.solution,
            parameters=self.parameters,
            recurrence=self,
            untraced=tangent.untraced,
            **kicks(tangent, state),
        )

    def truncated(self, bases: list[Array | None]) -> RecurrentFlow:
        return replace(self, tangent=self.tangent.truncated(bases)).flow()

    def fed_back(self, draw: Draw) -> Operator:
        return jacobian(self.tangent.fed_back(draw), self._space()).T

    def propagator(self, draw: Draw) -> Propagator:
        return _propagator(self.tangent.fed_back(draw), self._space())

    def _space(self) -> Space:
        return state_space(self.solution, self.tangent.next_state, self.measure)


def state_space(sol: Solution, state: Array, measure: Array | None) -> Space:
    """The space of states [trial, time, unit], with the names of their units where the model tells these.

    It has the times of the solution where they are those of its states and of all trials. The steps of an ODE, which
    have no measure, have other times.
    """
    names = names_of_state(sol.problem, state.shape[2])
    of_solution = measure is not None or isinstance(sol, DiscreteSolution)
    times = sol.t if of_solution and np.shape(sol.t) == state.shape[1:2] else None
    return Space(AXES, tuple(state.shape), state, measure, units=names, times=times)


def tangent_of_cell(sol: DiscreteSolution, params: Choice, from_start: bool = False) -> tuple[StepsTangent, Any]:
    """The tangent of a discrete problem's steps along its states, and the model, with the parameters that learn.

    With the derivative of the first step in z0, or only where there is one: no operator of a flow needs it.
    """
    problem, tracing = sol.problem, sol.problem.backend.tracing
    model, (step, _) = tracing.Model(problem.model, params), tracing.discrete_step(problem)
    step = step if problem.encoder is None else OfStates(step)
    check = lambda after, rounding: check_states(after, sol.state, rounding)  # noqa: E731
    solving = problem.backend.solving
    tangent = tangent_of(model, solving, step, problem.x, sol.before, check, from_start=from_start)
    if (called := tracing.as_called(problem)) is not None:
        check_as_called(model, tangent, *called)
    return tangent, model


def started(tangent: StepsTangent, sol: Solution, model: Any) -> Tangent:
    """The tangent of the steps; where parameters of the model move the start, with these."""
    start = start_of(sol, model)
    return tangent if start is None else StartedTangent(tangent, start)


# Operators that flows of all kinds make of a tangent


def jacobian(tangent: Tangent, state: Space) -> Operator:
    """J."""
    return on_spaces(parameter_space(tangent), state, tangent.jvp, tangent.vjp)


def _propagator(tangent: Tangent, state: Space) -> Propagator:
    """P."""
    P = on_spaces(state, state, tangent.propagate, tangent.propagate_adjoint)
    return Propagator(P, inverse(tangent, state))


def inverse(tangent: Tangent, state: Space) -> Operator:
    """P^{-1}: s_t - A_t s_{t-1}; its transpose is q_t - A_{t+1}^T q_{t+1}."""
    concat, zeros = array_namespace(state.like).concat, array_namespace(state.like).zeros_like

    def forward(s: Array) -> Array:
        return s - tangent.advance(concat([zeros(s[:, :, :1]), s[:, :, :-1]], axis=2))

    def adjoint(q: Array) -> Array:
        return q - concat([tangent.advance_adjoint(q)[:, :, 1:], zeros(q[:, :, :1])], axis=2)

    return on_spaces(state, state, forward, adjoint)


def kicks(tangent: Tangent, state: Space) -> dict[str, Any]:
    """The sites, V, B, core and K: the parts of a flow that say where parameters enter a step."""
    steps, measure = getattr(tangent, "steps", tangent).next_state.shape[1], state.measure
    if steps != state.shape[1]:  # more than are seen
        measure = tangent.measure_of_steps(measure)  # type: ignore[attr-defined]
    write, read, enter, enter_adjoint = tangent.write, tangent.read, tangent.enter, tangent.enter_adjoint
    if (width := len(tangent.site_kicks)) == 0:  # only the start learns: then the states stand for the outputs of none
        write, read, width = tangent.kick, tangent.kick_adjoint, state.shape[2]
        enter = enter_adjoint = lambda values: values
    outputs = Space(("trial", "time", "site"), (state.shape[0], steps, width), state.like, measure)
    V = on_spaces(parameter_space(tangent), outputs, write, read)
    B = on_spaces(outputs, state, enter, enter_adjoint)
    kick = on_spaces(parameter_space(tangent), state, tangent.kick, tangent.kick_adjoint)
    sites = _weight_sites(tangent, measure)
    K = GramOperator(kick, direct_sum=lambda: unit_by_unit(kick))
    return {"sites": sites, "core": CoreOperator(V, sites, tangent.untraced), "B": B, "K": K}


def gram_of(J: Operator, gram: Apply, apart: Operator | None = None) -> GramOperator:
    """J J*, from the fused map J J^T."""
    weights = J.codomain.measure
    return GramOperator(J, gram if weights is None else lambda q: gram(weights * q), apart)


def apart(tangent: Tangent, state: Space, forward: Apply, transpose: Apply) -> Operator:
    """Each trial's own J_b, as one operator from changes of the parameters that differ between trials."""
    shape = (state.shape[0], tangent.parameter_size)
    return on_spaces(Space(("trial", "parameter"), shape, state.like), state, forward, transpose)


def parameter_space(tangent: Tangent) -> Space:
    """The space of changes of the parameters."""
    return Space(("parameter",), (tangent.parameter_size,), tangent.next_state)


def _weight_sites(tangent: Tangent, measure: Array | None) -> list[WeightSite]:
    sites, weights = [], to_numpy(tangent.weights)
    for (_, site), inputs in zip(tangent.sites, tangent.inputs, strict=True):
        entries = to_numpy(site.entries)
        entries = entries.T if site.kind == "matrix" else entries
        weight = like_numpy(weights[entries], tangent.weights)
        sites.append(WeightSite(site.name, site.kind, weight, inputs, entries, measure))
    return sites
