"""Flows of ODEs: J through the solver's steps or by equations of its own, K and core of the field at the nodes."""

from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, after, array_namespace, like_numpy, to_numpy
from kpflow_dyn._flows.adjoints import InterpolatingAdjoint
from kpflow_dyn._flows.flow import ODEFlow, RecurrentFlow
from kpflow_dyn._flows.referee import Answer, Probe, compare, drawn, sizes_of
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.inputs import input_width, inputs_at
from kpflow_dyn._problems.measure import Weights
from kpflow_dyn._problems.solutions import ODESolution, check_states
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau
from kpflow_dyn._recurrence.roads import tangent_of
from kpflow_dyn._recurrence.starts import StartedMaps, start_of
from kpflow_dyn._recurrence.steps import Steps, apart, gram_of, kicks, parameter_space, started, state_space
from kpflow_dyn._recurrence.tangent import FromStart, Propagation, StepsTangent, Tangent
from kpflow_dyn._spaces.operators import Apply, Operator, on_spaces
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.ode._discretise import Nodes, RungeKuttaStep, field_step
from kpflow_dyn.ode._replay import divided
from kpflow_dyn.ode._variational import Variational

TIGHT = {"float64": InterpolatingAdjoint(1e-10, 1e-12), "float32": InterpolatingAdjoint(1e-5, 1e-6)}


def flow_through_steps(sol: ODESolution, params: Choice, weights: Weights) -> ODEFlow:
    """Sensitivities of the accepted steps, read at the nodes."""
    assert sol.steps is not None
    model, taken = _model(sol, params), sol.steps
    steps = _filled_up(sol, taken)
    nodes = Nodes(steps, sol.nodes, sol.state, sol.problem.backend.transforms.compiled)
    tangent = started(_tangent_of_steps(sol, steps, model, nodes.with_stages), sol, model)
    state = state_space(sol, sol.state, weights.both)

    def at_nodes(jvp: Apply, vjp: Apply) -> tuple[Apply, Apply]:
        return lambda theta: nodes.read(jvp(theta)), lambda q: vjp(nodes.spread(q))

    J = on_spaces(parameter_space(tangent), state, *at_nodes(tangent.jvp, tangent.vjp))
    each = apart(tangent, state, *at_nodes(tangent.jvp_apart, tangent.vjp_apart))

    def of_steps() -> RecurrentFlow:  # without those that fill them up
        if steps is taken:
            return Steps(tangent, sol, model.parameters, None).flow()
        own = started(_tangent_of_steps(sol, taken, model, nodes.with_stages), sol, model)
        return Steps(own, sol, model.parameters, None).flow()

    field = _field_tangent(sol, model)
    along = tangent if nodes.identical else _nodes_tangent(sol, steps.tableau, model)
    return ODEFlow(
        P=propagator(along, state, weights.time),
        J=J,
        ntk=gram_of(J, lambda q: nodes.read(tangent.gram(nodes.spread(q))), each),
        solution=sol,
        parameters=model.parameters,
        of_steps=of_steps,
        untraced=tangent.untraced or field.untraced,
        **kicks(field, state),
    )


def _filled_up(sol: ODESolution, steps: AcceptedSteps) -> AcceptedSteps:
    """The steps, up to a number that another solve shares if both choose their own: programs are compiled for it."""
    chosen = sol.options["steps"] is None
    return steps.padded(sol.problem.backend.solving.rounded, sol.problem.z0) if chosen else steps


def flow_of_equations(sol: ODESolution, params: Choice, weights: Weights, alg: InterpolatingAdjoint) -> ODEFlow:
    """Sensitivities of the equation, by solves of their own."""
    model = _model(sol, params)
    field = _field_tangent(sol, model)
    return _flow_at_nodes(sol, model, weights, field, maps := _equations(sol, model, field, alg), maps)


def flow_through_solver(sol: ODESolution, params: Choice, weights: Weights) -> ODEFlow:
    """J through the solver itself, for steps that cannot be replayed; P from its equation."""
    tracing = sol.problem.backend.tracing
    if tracing.ThroughSolver is None:
        raise ValueError(
            f"the steps of {sol.alg!r} cannot be replayed one by one; solve with a Runge-Kutta method such as "
            "'dopri5', or give steps=, or linearize with sensealg=InterpolatingAdjoint()"
        )
    model = _model(sol, params)
    maps = tracing.ThroughSolver(sol, model)
    check_states(maps.state, sol.state, 10 * sol.options["rtol"])
    field = _field_tangent(sol, model)
    along = _equations(sol, model, field, TIGHT[str(sol.state.dtype)])
    return _flow_at_nodes(sol, model, weights, field, maps, along)


def _flow_at_nodes(
    sol: ODESolution, model: Any, weights: Weights, field: Tangent, maps: FromStart, along: Propagation
) -> ODEFlow:
    """The flow of maps between the nodes, which are no recurrence of steps."""
    state, start = state_space(sol, sol.state, weights.both), start_of(sol, model)
    whole = maps if start is None else StartedMaps(maps, start)
    J = on_spaces(parameter_space(field), state, whole.jvp, whole.vjp)
    return ODEFlow(
        P=propagator(along, state, weights.time),
        J=J,
        ntk=gram_of(J, whole.gram),
        solution=sol,
        parameters=model.parameters,
        untraced=field.untraced,
        **kicks(field, state),
    )


def _equations(sol: ODESolution, model: Any, field: Tangent, alg: InterpolatingAdjoint) -> Variational:
    """Equations that differentiate the field as autograd does at the nodes, where `field` is checked.

    By function transforms, which are fast; or else by reverse mode through the model itself.
    """
    (q,) = drawn([(1, *sol.state.shape)], sol.state)
    answer, reason = Answer(field.next_state, Probe(q, *field.step_vjp(q)), field.step_vjp), None
    for own in (False, True):
        try:
            found = Variational(sol, model, alg, own)
            compare(found.field_at(sol.state), answer, sizes_of(model.parameters))
            return found
        except Exception as error:  # function transforms refuse a field in many ways
            reason = error
    raise ValueError(
        f"variational equations do not have the derivative of f that autograd through it has: {reason}. Solve with a "
        "Runge-Kutta method, and linearize with sensealg=DiscreteAdjoint()"
    ) from reason


def tangent_of_accepted_steps(sol: ODESolution, params: Choice, parts: int = 1) -> Tangent:
    """The tangent of the steps that the solver took, the first one of length zero; or of equal parts of each."""
    assert sol.steps is not None
    model = _model(sol, params)
    if parts > 1:
        return _tangent_along(sol, sol.steps.tableau, model, *divided(sol.problem, sol.steps, parts))
    return _tangent_of_steps(sol, sol.steps, model, with_stages=False)


def _model(sol: ODESolution, params: Choice) -> Any:
    return sol.problem.backend.tracing.Model(sol.problem.model, params)


def _tangent_of_steps(sol: ODESolution, steps: AcceptedSteps, model: Any, with_stages: bool) -> StepsTangent:
    units = sol.state.shape[2]
    step = RungeKuttaStep(steps.tableau, units, input_width(sol.problem), with_stages)
    rows = step.rows(sol.problem, steps.dt, steps.stage_times, steps.before, steps.stages)
    # The stages of an implicit method are converged further than the solver's own.
    tolerance = 0.0 if steps.tableau.explicit else 10 * sol.options["rtol"]

    def check(after: Array, rounding: float) -> None:
        check_states(to_numpy(after)[..., :units], steps.after, max(tolerance, rounding))

    return tangent_of(model, sol.problem.backend.solving, step, rows, step.widen(steps.before), check)


def _nodes_tangent(sol: ODESolution, tableau: Tableau, model: Any) -> Tangent:
    """The recurrence from node to node, by one step of the method along the solution."""
    dt, every = np.diff(sol.nodes, prepend=sol.nodes[:1]), np.ones((len(sol.state), 1))
    before = after(sol.state[:, 0], sol.state)
    return _tangent_along(sol, tableau, model, every * (sol.nodes - dt), every * dt, before)


def _tangent_along(
    sol: ODESolution, tableau: Tableau, model: Any, start: np.ndarray, dt: np.ndarray, before: Array
) -> Tangent:
    """Steps of the method from states of the solution, at times `start` and of length dt [trial, step]."""
    step = RungeKuttaStep(tableau, sol.state.shape[2], input_width(sol.problem), False)
    rows = step.rows(sol.problem, dt, start[..., None] + tableau.c * dt[..., None], before)
    return tangent_of(model, sol.problem.backend.solving, step, rows, before)


def _field_tangent(sol: ODESolution, model: Any) -> Tangent:
    """The field at the nodes, as a step whose recurrence is not used."""
    trials, times = sol.state.shape[:2]
    every = np.broadcast_to(sol.nodes, (trials, times))
    rows, x = like_numpy(every[..., None].copy(), sol.state), inputs_at(sol.problem, every)
    if x is not None:
        rows = array_namespace(rows).concat([rows, x], axis=-1)
    step = field_step(input_width(sol.problem))
    return tangent_of(model, sol.problem.backend.solving, step, rows, sol.state, alone=True)


def propagator(tangent: Propagation, state: Space, time: Array) -> Operator:
    """P = (P_node - I/2) W in L^2: the integral up to t, where the node t itself counts by half."""

    def apply(q: Array) -> Array:
        return tangent.propagate(time * q) - time * q / 2

    def adjoint(q: Array) -> Array:
        return tangent.propagate_adjoint(time * q) - time * q / 2

    return Operator(state, state, apply, adjoint)
