"""Linearise a solution: from a solved problem to the operators of its flow."""

import dataclasses
import warnings

from kpflow_dyn._arrays import eps_of, full_precision, to_numpy
from kpflow_dyn._flows.adjoints import DiscreteAdjoint, InterpolatingAdjoint
from kpflow_dyn._flows.flow import Flow, preconditioned
from kpflow_dyn._flows.metric import Metric
from kpflow_dyn._implicit.flows import flow_of_constraint
from kpflow_dyn._implicit.solutions import ConstraintSolution
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.measure import Measure, Weights
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution, Solution
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._recurrence.continuous import (
    flow_of_equations,
    flow_through_solver,
    flow_through_steps,
    tangent_of_accepted_steps,
)
from kpflow_dyn._recurrence.hybrid import flow_of_hybrid, tangent_between_nodes
from kpflow_dyn._recurrence.stepped import flow_of_steps, tangent_between_times, tangent_of_steps
from kpflow_dyn._recurrence.steps import Steps, started, tangent_of_cell
from kpflow_dyn._recurrence.tangent import Tangent
from kpflow_dyn._shown import type_name
from kpflow_dyn._solve import solve

LEAST_PRECISE = 1e-5  # the round-off of what is linearised as it is
ROUNDINGS = 30  # of states in half precision, on their way through a model

_SECOND_ROAD = (
    "the flow is taken from autograd through the model, as the model could not be traced: {}. J, P, K and ntk are "
    "exact. There are no weight sites, so no core of theirs and no truncation; and every application runs reverse mode "
    "through the model, once for each probe of an adjoint and twice for one of a forward map"
)


class UntracedWarning(UserWarning):
    """A flow is that of autograd alone, since its model could not be traced, or not as autograd differentiates it.

    Its message says what stopped the trace, what is missing, and what it costs; `flow.untraced` says the first again.
    The operators are those of the backward pass, J* q = q^T dS/dtheta, its transpose J, and ntk = J J*.

    Source: docs/theory.md, "One constraint, one kernel".

    >>> import warnings, kpflow_dyn as kp
    >>> warnings.simplefilter("error", kp.UntracedWarning)  # for whoever wants no such flow
    """


def linearize(
    sol: Solution,
    *,
    sensealg: DiscreteAdjoint | InterpolatingAdjoint | None = None,
    params: Choice = None,
    measure: Measure | None = None,
    metric: Metric | None = None,
) -> Flow:
    """The operators of a solution, J = dS/dtheta and ntk = J J* = P K P*; see `Flow`.

    The parameters are copied. Training the model afterwards does not change an existing flow. A model in half precision
    (float16, bfloat16) is solved again with its parameters and inputs in float32, the dtype of the operators.

    Args:
        sol: a solution of `solve`.
        sensealg: how sensitivities are computed: `DiscreteAdjoint()`, also when None, or for an ODE
            `InterpolatingAdjoint()`.
        params: which parameters learn. Give names, or a function that says whether a parameter learns; it is called
            with the name, or with (name, parameter). When None all learn (in torch: all that require a gradient).
        measure: how times and trials are weighted; `Measure()` when None.
        metric: the metric M of an optimiser theta' = -M^{-1} g: `LearningRates`, `KroneckerMetric` or
            `Reparametrization`. Then ntk = J M^{-1} J*. K and core also contain M^{-1}; J stays dS/dtheta. None is
            plain gradient descent.

    Raises:
        TypeError, ValueError: unknown names; no parameter that learns; a model without a derivative or a fixed meaning;
            steps of a solver that can neither be replayed nor (in JAX) differentiated; or a metric of other parameters.

    Warns:
        UntracedWarning: the model could not be traced. The operators then use autograd through it; see `flow.untraced`.
    Source: docs/theory.md, "One constraint, one kernel".

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(2, 5, 3))
    >>> flow = kp.linearize(kp.solve(problem))
    >>> flow.ntk.domain.shape
    (2, 5, 8)
    """
    if not isinstance(sol, Solution):
        raise TypeError(f"linearize takes the Solution that solve returns, got {type_name(sol)}")
    if not isinstance(sensealg, DiscreteAdjoint | InterpolatingAdjoint | None):
        raise TypeError(f"sensealg is {sensealg!r}, expected DiscreteAdjoint() or, for an ODE, InterpolatingAdjoint()")
    if not isinstance(measure, Measure | None):
        raise TypeError(f"measure is {measure!r}, expected kp.Measure(time=..., trial=...)")
    if not isinstance(metric, Metric | None):
        raise TypeError(f"metric is {metric!r}, expected kp.LearningRates(...), KroneckerMetric or Reparametrization")
    sol = _in_single(sol)
    problem = sol.problem
    with full_precision(sol.state), problem.backend.models.left_alone(problem.model):
        flow = _flow(sol, sensealg, params, (measure or Measure()).weights(sol))
        if flow.untraced:
            warnings.warn(UntracedWarning(_SECOND_ROAD.format(flow.untraced)), stacklevel=2)
        return flow if metric is None else preconditioned(flow, metric.preconditioner(flow.parameters))


def _in_single(sol: Solution) -> Solution:
    """That of the same model in float32, where it is in half precision: differences of its states are mere rounding."""
    if isinstance(sol, ODESolution | HybridSolution | SteppedSolution) or eps_of(sol.state) < LEAST_PRECISE:
        return sol
    problem, models = sol.problem, sol.problem.backend.models
    given = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem) if field.init}
    found = solve(problem.remake(**{name: models.in_single(part) for name, part in given.items()}))
    error = abs(to_numpy(found.state) - to_numpy(sol.state)).max() / max(1.0, abs(to_numpy(found.state)).max())
    if not error <= ROUNDINGS * eps_of(sol.state):
        raise ValueError(
            f"in {sol.state.dtype} the states are {error:.1e} of their size away from those of the same model in "
            "float32, whose linearisation would not be that of the model; solve in float32"
        )
    return found


def _flow(
    sol: Solution, sensealg: DiscreteAdjoint | InterpolatingAdjoint | None, params: Choice, weights: Weights
) -> Flow:
    if isinstance(sol, ODESolution):
        return _flow_of_ode(sol, sensealg, params, weights)
    if isinstance(sensealg, InterpolatingAdjoint):
        raise ValueError(
            f"InterpolatingAdjoint solves variational ODEs, and {_kind(sol)} has none; take DiscreteAdjoint()"
        )
    if isinstance(sol, HybridSolution):
        return flow_of_hybrid(sol, params, weights)
    if isinstance(sol, SteppedSolution):
        return flow_of_steps(sol, params, weights)
    if isinstance(sol, DiscreteSolution):
        return _steps(sol, params, weights)
    assert isinstance(sol, ConstraintSolution)
    return flow_of_constraint(sol, params, weights)


def _kind(sol: Solution) -> str:
    if isinstance(sol, HybridSolution):
        return "a hybrid model, whose sensitivities jump at events,"
    return f"a {type(sol.problem).__name__}"


def _steps(sol: DiscreteSolution, params: Choice, weights: Weights) -> Flow:
    _check_plant(sol)
    tangent, model = tangent_of_cell(sol, params, from_start=sol.problem.encoder is not None)
    return Steps(started(tangent, sol, model), sol, model.parameters, weights.both).flow()


def _check_plant(sol: DiscreteSolution) -> None:
    """Let the plant of a closed loop, where it can, look at its derivative at all states, before a number is given."""
    cell = sol.problem.cell
    loop, states = getattr(cell, "through_model", cell), sol.before
    if loop is not cell:  # with more states behind its own
        states = states[..., : cell.function.units]
    if (check := getattr(getattr(loop, "plant", None), "check_derivative", None)) is not None:
        trials, times = states.shape[:2]
        x, before = (rows.reshape((trials * times, rows.shape[-1])) for rows in (sol.problem.x, states))
        check(before[:, : loop.plant.state_size], loop.controls(x, before))


def _flow_of_ode(
    sol: ODESolution, sensealg: DiscreteAdjoint | InterpolatingAdjoint | None, params: Choice, weights: Weights
) -> Flow:
    if isinstance(sensealg, InterpolatingAdjoint):
        return flow_of_equations(sol, params, weights, sensealg)
    through = flow_through_solver if sol.steps is None else flow_through_steps
    return through(sol, params, weights)


def tangent_of_dynamics(
    sol: DiscreteSolution | ODESolution | HybridSolution | SteppedSolution,
    between_times: bool = False,
    parts: int = 1,
) -> Tangent:
    """The tangent of a solution's steps z_{t-1} -> z_t; of an ODE of the accepted ones, the first of length zero.

    What learns is no matter of the dynamics, so frozen parameters count too. Of an SDE or a DDE it is that of all
    steps, or from one time of the grid to the next. Steps of an ODE may be divided into a number of equal parts.
    """
    if isinstance(sol, SteppedSolution):
        return (tangent_between_times if between_times else tangent_of_steps)(sol, lambda _name: True)  # type: ignore
    if isinstance(sol, HybridSolution):
        return tangent_between_nodes(sol, lambda _name: True)[0]
    if isinstance(sol, ODESolution):
        return tangent_of_accepted_steps(sol, lambda _name: True, parts)
    return tangent_of_cell(sol, lambda _name: True, from_start=True)[0]
