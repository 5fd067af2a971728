"""Linearise a solution: from a solved problem to the operators of its flow."""

from __future__ import annotations

from types import ModuleType
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision, is_jax_array, like_numpy, to_numpy
from kpflow_dyn._flows.flow import DiscreteAdjoint, Draw, Flow, InterpolatingAdjoint, Propagator, on_spaces
from kpflow_dyn._flows.metric import Metric
from kpflow_dyn._flows.preconditioner import preconditioned
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._implicit.solving import flow_of_constraint
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.inputs import input_width, inputs_at
from kpflow_dyn._problems.measure import Measure
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._problems.solutions import Solution, check_states
from kpflow_dyn._problems.steps import AcceptedSteps
from kpflow_dyn._spaces.operators import Apply, GramOperator, Operator
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.ode._discretise import Nodes, RungeKuttaStep, field_step

TIGHT = {"float64": InterpolatingAdjoint(1e-10, 1e-12), "float32": InterpolatingAdjoint(1e-5, 1e-6)}


def linearize(
    sol: Solution,
    *,
    sensealg: DiscreteAdjoint | InterpolatingAdjoint | None = None,
    params: Choice = None,
    measure: Measure | None = None,
    metric: Metric | None = None,
) -> Flow:
    """The operators of a solution, J = dS/dtheta and ntk = J J* = P K P*; see `Flow`.

    The parameters are copied: training the model afterwards changes nothing in an existing flow.

    Args:
        sol: a solution of `solve`.
        sensealg: how sensitivities are taken: `DiscreteAdjoint()`, also when None, or for an ODE
            `InterpolatingAdjoint()`.
        params: which parameters learn: names, or a function of the name, or of (name, parameter), that says whether;
            all (in torch: all that require a gradient) when None.
        measure: how times and trials are weighted; `Measure()` when None.
        metric: the metric M of an optimiser theta' = -M^{-1} g: `LearningRates`, `KroneckerMetric` or
            `Reparametrization`. Then ntk = J M^{-1} J*, K and core have M^{-1} as well, and J stays dS/dtheta. Plain
            gradient descent when None.

    Raises:
        TypeError, ValueError: unknown names, no parameter that learns, a step that cannot be traced, steps of a solver
            that can be neither replayed nor (in JAX) differentiated, or a metric of other parameters.

    Source: docs/theory.md, "One constraint, one kernel".

    Example:
        >>> import torch, kpflow_dyn as kp
        >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))
        >>> flow = kp.linearize(kp.solve(problem))
        >>> flow.ntk.domain.shape
        (2, 5, 8)
    """
    if not isinstance(sol, Solution):
        raise TypeError(f"linearize takes the Solution that solve returns, got {type(sol).__name__}")
    if not isinstance(sensealg, DiscreteAdjoint | InterpolatingAdjoint | None):
        raise TypeError(f"sensealg is {sensealg!r}, expected DiscreteAdjoint() or, for an ODE, InterpolatingAdjoint()")
    if not isinstance(measure, Measure | None):
        raise TypeError(f"measure is {measure!r}, expected kp.Measure(time=..., trial=...)")
    if not isinstance(metric, Metric | None):
        raise TypeError(f"metric is {metric!r}, expected kp.LearningRates(...), KroneckerMetric or Reparametrization")
    with full_precision(sol.state):
        flow = _flow(sol, sensealg, params, _Weighted(sol, measure or Measure()))
        return flow if metric is None else preconditioned(flow, metric.roots(flow.parameters))


def _flow(
    sol: Solution, sensealg: DiscreteAdjoint | InterpolatingAdjoint | None, params: Choice, weighted: _Weighted
) -> Flow:
    if isinstance(sensealg, InterpolatingAdjoint) and not isinstance(sol.problem, ODEProblem):
        raise ValueError(
            f"InterpolatingAdjoint solves variational ODEs, and a {type(sol.problem).__name__} has none; take "
            "DiscreteAdjoint()"
        )
    if isinstance(sol.problem, DiscreteProblem):
        return _discrete_flow(sol, params, weighted)
    if not isinstance(sol.problem, ODEProblem):
        return flow_of_constraint(sol, params, weighted.trial)
    if isinstance(sensealg, InterpolatingAdjoint):
        return _flow_of_equations(sol, params, weighted, sensealg)
    return _flow_through_solver(sol, params, weighted) if sol.steps is None else _ode_flow(sol, params, weighted)


class Tangent(Protocol):
    """The linear recurrence of a step, as both frameworks give it; all on blocks [probe, ...], all transposes plain."""

    sites: Any
    site_kicks: Any
    weights: Array
    parameter_size: int
    next_state: Array

    def propagate(self, q: Array) -> Array: ...
    def propagate_adjoint(self, q: Array) -> Array: ...
    def advance(self, dz: Array) -> Array: ...
    def factorise(self, start: Array, interval: int) -> Array: ...
    def unpropagate(self, s: Array) -> Array: ...
    def unpropagate_adjoint(self, q: Array) -> Array: ...
    def push_forward(self, theta: Array) -> Array: ...
    def pull_back(self, q: Array) -> Array: ...
    def descend(self, q: Array) -> Array: ...
    def push_forward_apart(self, theta: Array) -> Array: ...
    def pull_back_apart(self, q: Array) -> Array: ...
    def kick(self, theta: Array) -> Array: ...
    def kick_adjoint(self, q: Array) -> Array: ...
    def write(self, theta: Array) -> Array: ...
    def read(self, values: Array) -> Array: ...
    def enter(self, values: Array) -> Array: ...
    def enter_adjoint(self, q: Array) -> Array: ...
    def truncated(self, bases: list[Array | None]) -> Tangent: ...
    def fed_back(self, draw: Draw) -> Tangent: ...


class _Weighted:
    """The measure on a solution's trials and times, as arrays that multiply states."""

    def __init__(self, sol: Solution, measure: Measure) -> None:
        time, trial = measure.times(sol), measure.trials(sol)
        self.time = None if time is None else like_numpy(time[:, None], sol.state)
        self.trial = None if trial is None else like_numpy(trial[:, None, None], sol.state)

    @property
    def both(self) -> Array | None:
        """[trial, time, 1], with axes of length one where all weigh alike."""
        if self.time is None or self.trial is None:
            return self.time if self.trial is None else self.trial
        return self.time * self.trial


def _backend(like: Array) -> ModuleType:
    if is_jax_array(like):
        from kpflow_dyn._jax import linearise
    else:
        from kpflow_dyn._torch import linearise
    return linearise


def _discrete_flow(sol: Solution, params: Choice, weighted: _Weighted) -> Flow:
    tangent, parameters = tangent_of_steps(sol, params)
    return _flow_of_steps(tangent, sol, parameters, weighted.both)


def tangent_of_steps(sol: Solution, params: Choice) -> tuple[Tangent, dict[str, Array]]:
    """The tangent of a discrete problem's steps along its states, and the parameters that learn."""
    backend, problem = _backend(sol.state), sol.problem
    assert isinstance(problem, DiscreteProblem)
    model, x = backend.Model(problem.cell, params), problem.x
    before = array_namespace(x).concat([sol.start[:, None], sol.state[:, :-1]], axis=1)
    tangent = model.tangent(
        backend.discrete_step(problem), x, before, check=lambda after: check_states(after, sol.state)
    )
    return tangent, model.parameters


def tangent_of_dynamics(sol: Solution) -> Tangent:
    """The tangent of a solution's steps z_{t-1} -> z_t; of an ODE of the accepted ones, the first of length zero."""
    if isinstance(sol.problem, DiscreteProblem):
        return tangent_of_steps(sol, _every)[0]
    return _steps_tangent(sol, _backend(sol.state).Model(_equation(sol).f, _every), with_stages=False)


def _every(name: str) -> bool:
    """Frozen parameters too: the dynamics do not depend on which ones learn."""
    return True


def _flow_of_steps(tangent: Tangent, sol: Solution, parameters: dict[str, Array], measure: Array | None) -> Flow:
    """The flow whose times are the steps of one recurrence."""
    state = Space(("trial", "time", "unit"), tuple(tangent.next_state.shape), tangent.next_state, measure)
    J = _jacobian(tangent, state)
    return Flow(
        P=Propagator(
            on_spaces(state, state, tangent.propagate, tangent.propagate_adjoint),
            on_spaces(state, state, tangent.unpropagate, tangent.unpropagate_adjoint),
        ),
        J=J,
        ntk=_gram(J, tangent.descend, _apart(tangent, state, tangent.push_forward_apart, tangent.pull_back_apart)),
        solution=sol,
        parameters=parameters,
        with_bases=lambda bases: _flow_of_steps(tangent.truncated(bases), sol, parameters, measure),
        with_feedback=lambda draw: _jacobian(tangent.fed_back(draw), state).T,
        **_kicks(tangent, state),
    )


def _jacobian(tangent: Tangent, state: Space) -> Operator:
    return on_spaces(_parameter_space(tangent), state, tangent.push_forward, tangent.pull_back)


def _kicks(tangent: Tangent, state: Space) -> dict[str, Any]:
    """What the parameters can kick directly: the sites, V, B, core and K."""
    outputs = Space(("trial", "time", "site"), (*state.shape[:2], len(tangent.site_kicks)), state.like, state.measure)
    V = on_spaces(_parameter_space(tangent), outputs, tangent.write, tangent.read)
    B = on_spaces(outputs, state, tangent.enter, tangent.enter_adjoint)
    kick = on_spaces(_parameter_space(tangent), state, tangent.kick, tangent.kick_adjoint)
    sites = _weight_sites(tangent, state.measure)
    return {"sites": sites, "core": CoreOperator(V, sites), "B": B, "K": GramOperator(kick)}


def _gram(J: Operator, descend: Any, apart: Operator | None = None) -> GramOperator:
    """J J*, from the fused map J J^T."""
    weights = J.codomain.measure
    return GramOperator(J, descend if weights is None else lambda q: descend(weights * q), apart)


def _apart(tangent: Tangent, state: Space, forward: Apply, transpose: Apply) -> Operator:
    """Each trial's own J_b, as one operator from changes of the parameters that differ between trials."""
    shape = (state.shape[0], tangent.parameter_size)
    return on_spaces(Space(("trial", "parameter"), shape, state.like), state, forward, transpose)


def _parameter_space(tangent: Tangent) -> Space:
    return Space(("parameter",), (tangent.parameter_size,), tangent.next_state)


def _weight_sites(tangent: Tangent, measure: Array | None) -> list[WeightSite]:
    sites = []
    weights = to_numpy(tangent.weights)
    for _, site in tangent.sites:
        entries, inputs = to_numpy(site.entries), site.variables.swapaxes(0, 1)
        weight = like_numpy(weights[entries], tangent.weights)
        if site.kind == "matrix":
            inputs = inputs[:, :, 0] if inputs.shape[2] == 1 else inputs
            entries, weight = entries.T, weight.T
        sites.append(WeightSite(site.name, site.kind, weight, inputs, entries, measure))
    return sites


# Continuous time


def _ode_flow(sol: Solution, params: Choice, weighted: _Weighted) -> Flow:
    model = _backend(sol.state).Model(_equation(sol).f, params)
    nodes = Nodes(_accepted(sol), np.asarray(sol.t), sol.state)
    tangent = _steps_tangent(sol, model, nodes.with_stages)
    state = Space(("trial", "time", "unit"), tuple(sol.state.shape), sol.state, weighted.both)
    J = on_spaces(
        _parameter_space(tangent),
        state,
        lambda theta: nodes.read(tangent.push_forward(theta)),
        lambda q: tangent.pull_back(nodes.spread(q)),
    )
    apart = _apart(
        tangent,
        state,
        lambda theta: nodes.read(tangent.push_forward_apart(theta)),
        lambda q: tangent.pull_back_apart(nodes.spread(q)),
    )
    return Flow(
        P=_propagator(tangent if nodes.identical else _nodes_tangent(sol, model), state, weighted.time),
        J=J,
        ntk=_gram(J, lambda q: nodes.read(tangent.descend(nodes.spread(q))), apart),
        solution=sol,
        parameters=model.parameters,
        steps=_flow_of_steps(tangent, sol, model.parameters, None),
        **_kicks(_field_tangent(sol, model), state),
    )


def _flow_of_equations(sol: Solution, params: Choice, weighted: _Weighted, alg: InterpolatingAdjoint) -> Flow:
    """Sensitivities of the equation, by solves of their own."""
    backend = _backend(sol.state)
    model = backend.Model(_equation(sol).f, params)
    maps = backend.Variational(sol, model, alg)
    return _flow_at_nodes(sol, model, weighted, maps, maps)


def _flow_through_solver(sol: Solution, params: Choice, weighted: _Weighted) -> Flow:
    """J through the solver itself, for steps that cannot be replayed; P from its equation."""
    if not is_jax_array(sol.state):
        raise ValueError(
            f"the steps of {sol.alg!r} cannot be replayed; solve with a Runge-Kutta method, or linearize with "
            "sensealg=InterpolatingAdjoint()"
        )
    backend = _backend(sol.state)
    model = backend.Model(_equation(sol).f, params)
    maps = backend.ThroughSolver(sol, model)
    check_states(maps.state, sol.state, 10 * sol.options["rtol"])
    return _flow_at_nodes(sol, model, weighted, maps, backend.Variational(sol, model, TIGHT[str(sol.state.dtype)]))


class Sensitivity(Protocol):
    """J, its transpose and J J^T, on blocks [probe, ...]."""

    def push_forward(self, theta: Array) -> Array: ...
    def pull_back(self, q: Array) -> Array: ...
    def descend(self, q: Array) -> Array: ...


class Propagation(Protocol):
    """P_node and its transpose, on blocks [probe, ...]."""

    def propagate(self, q: Array) -> Array: ...
    def propagate_adjoint(self, q: Array) -> Array: ...


def _flow_at_nodes(sol: Solution, model: Any, weighted: _Weighted, maps: Sensitivity, kicks: Propagation) -> Flow:
    """The flow of maps between the nodes, which are no recurrence of steps."""
    field = _field_tangent(sol, model)
    state = Space(("trial", "time", "unit"), tuple(sol.state.shape), sol.state, weighted.both)
    J = on_spaces(_parameter_space(field), state, maps.push_forward, maps.pull_back)
    return Flow(
        P=_propagator(kicks, state, weighted.time),
        J=J,
        ntk=_gram(J, maps.descend),
        solution=sol,
        parameters=model.parameters,
        **_kicks(field, state),
    )


def _steps_tangent(sol: Solution, model: Any, with_stages: bool) -> Tangent:
    """The recurrence over the accepted steps."""
    steps, units = _accepted(sol), sol.state.shape[2]
    step = RungeKuttaStep(steps.tableau, units, input_width(_equation(sol)), with_stages)
    rows = step.rows(_equation(sol), steps.dt, steps.stage_times, steps.before, steps.stages)
    # The stages of an implicit method are converged further than the solver's own.
    tolerance = 0.0 if steps.tableau.explicit else 10 * sol.options["rtol"]

    def check(after: Array) -> None:
        check_states(after[..., :units], steps.after, tolerance)

    return model.tangent(step, rows, step.widen(steps.before), check)


def _nodes_tangent(sol: Solution, model: Any) -> Tangent:
    """The recurrence from node to node, by one step of the method along the solution."""
    times, tableau = np.asarray(sol.t, np.float64), _accepted(sol).tableau
    step = RungeKuttaStep(tableau, sol.state.shape[2], input_width(_equation(sol)), False)
    dt = np.diff(times, prepend=times[:1])
    start = times - dt
    stage_times = start[:, None] + tableau.c * dt[:, None]
    every = np.ones((len(sol.state), 1, 1))
    before = sol.state[:, [0, *range(len(times) - 1)]]
    rows = step.rows(_equation(sol), every[..., 0] * dt, every * stage_times, before)
    return model.tangent(step, rows, before)


def _field_tangent(sol: Solution, model: Any) -> Tangent:
    """The field at the nodes, as a step whose recurrence is not used."""
    trials, times = sol.state.shape[:2]
    every = np.broadcast_to(np.asarray(sol.t, np.float64), (trials, times))
    rows, x = like_numpy(every[..., None].copy(), sol.state), inputs_at(_equation(sol), every)
    if x is not None:
        rows = array_namespace(rows).concat([rows, x], axis=-1)
    return model.tangent(field_step(input_width(_equation(sol))), rows, sol.state)


def _equation(sol: Solution) -> ODEProblem:
    assert isinstance(sol.problem, ODEProblem)
    return sol.problem


def _accepted(sol: Solution) -> AcceptedSteps:
    assert sol.steps is not None
    return sol.steps


def _propagator(tangent: Propagation, state: Space, time: Array) -> Operator:
    """P = (P_node - I/2) W in L^2: the integral up to t, where the node t itself counts by half."""

    def apply(q: Array) -> Array:
        return tangent.propagate(time * q) - time * q / 2

    def adjoint(q: Array) -> Array:
        return tangent.propagate_adjoint(time * q) - time * q / 2

    return Operator(state, state, apply, adjoint)
