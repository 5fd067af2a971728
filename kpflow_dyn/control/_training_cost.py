"""The cost of a control problem as a loss of states, for all that forecasts, trains or tracks by such a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy
from kpflow_dyn._backend import Backend
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem, OverTimes
from kpflow_dyn._shown import type_name
from kpflow_dyn.control._beside import with_control
from kpflow_dyn.control._costates import Cost, QuadraticCost, check_costs, control_size
from kpflow_dyn.control._loops import is_closed_loop, is_stepped_loop, loop_of_field
from kpflow_dyn.models._closed_loop import models_of


class TrainingCost(NamedTuple):
    """What `training_cost` gives.

    Attributes:
        problem: whose state is [z, int u dt] where there is a policy, or [z, u] in discrete time; its
            parameters are those of the loop.
        loss: of that problem's states [trial, time, unit].

    Example as `training_cost`.
    """

    problem: Any
    loss: Callable[[Array], Array]


@dataclass(frozen=True, eq=False)
class CostOfStates:
    """The mean cost of trials, from states that have the control, or its integral, among their entries."""

    cost: Cost | None
    terminal: Cost | None
    steps: np.ndarray  # between the times [time - 1]; empty in discrete time
    units: int  # of z
    control: slice | None  # where it is in the state
    is_integral: bool  # whether that is its integral, and not what is held from there on
    backend: Backend = field(repr=False)

    def __call__(self, state: Array) -> Array:
        """A number of shape ()."""
        z = state[..., : self.units]
        total = 0 if self.terminal is None else _on_rows(self.backend, self.terminal, z[:, -1:])[:, 0]
        if self.cost is not None:
            total = total + (self._over_time(state, z) if len(self.steps) else self._over_steps(state, z))
        return array_namespace(state).mean(total)

    def _over_steps(self, state: Array, z: Array) -> Array:
        u = () if self.control is None else (state[..., self.control],)
        return array_namespace(z).sum(_on_rows(self.backend, self.cost, z, *u), axis=-1)

    def _over_time(self, state: Array, z: Array) -> Array:
        """By the trapezoidal rule in z, and u as it is held, or its mean, over each interval."""
        xp, h = array_namespace(state), like_numpy(self.steps, state)
        held = ()
        if self.control is not None:
            u = state[..., self.control]
            held = ((u[:, 1:] - u[:, :-1]) / h[:, None],) if self.is_integral else (u[:, :-1],)
        ends = [_on_rows(self.backend, self.cost, part, *held) for part in (z[:, :-1], z[:, 1:])]
        return xp.sum((ends[0] + ends[1]) * h / 2, axis=-1)


def _on_rows(backend: Backend, cost: Any, *rows: Array) -> Array:
    """The cost of each row [trial, time]."""
    if isinstance(cost, QuadraticCost):
        return cost(*rows)
    return backend.transforms.vmap(backend.transforms.vmap(cost))(*rows)


def training_cost(problem: Any, cost: Cost | None, terminal: Cost | None = None) -> TrainingCost:
    """A problem and a loss of its states that is the cost which a policy is trained for.

        L = mean over trials of sum_k h_k [L(z_k, u_k) + L(z_{k+1}, u_k)] / 2 + M(z(T)),    u_k = mean of u over step k

    over the times t_k of the problem: the integral of the cost to second order in these. The control depends on the
    parameters by itself, not by the states alone; so the problem gets the integral of u as further states, whose
    differences are h_k u_k, and the whole loss is one of states. Its derivatives are those of that number, exactly.
    It is quadratic in them where the cost is, so that a forecast by the frozen kernel is that of Gauss and Newton.

        problem, loss = control.training_cost(problem, cost)
        kp.gradient_flow(kp.solve(problem, alg), loss, span=...)
        kp.forecast(kp.linearize(kp.solve(problem, alg)), loss=loss, lr=..., steps=...)

    Of a sampled loop the held control is a part of the state already, and u_k the control that is held behind t_k; take
    the sampling times as the grid, with those at which a control acts late. In discrete time the loss is

        L = mean over trials of sum_t L(z_t, u_t) + M(z_T)

    with the control u_t of the step that made z_t, which the state of the problem has behind it.

    Args:
        problem: an `ODEProblem` on a grid of times, or a `DiscreteProblem`; of a `kp.models.ClosedLoop` where the cost
            has the control. An `SDEProblem` or a `DDEProblem` has a cost of states alone; trials are the paths of
            trials there.
        cost: L(z, u) of a closed loop, with the plant's state and its control, else L(z), as `adjoint` takes it; or
            None.
        terminal: M(z) at the last time; or None.

    Raises:
        TypeError: another problem, or a cost that is no function of these.
        ValueError: no cost at all, one of another width than the state and the control, or a span (t0, t1) in the
            place of a grid.
    Source: Bryson, Ho, "Applied Optimal Control" (1975), chapter 2; Chen et al., arXiv:1806.07366, for the running cost
        as a state.

    >>> import torch, kpflow_dyn as kp
    >>> loop = kp.models.ClosedLoop(kp.models.DoubleIntegrator(), torch.nn.Linear(2, 1).double())
    >>> posed = kp.ODEProblem(loop, torch.ones(3, 2, dtype=torch.float64), [0.0, 0.5, 1.0])
    >>> problem, loss = kp.control.training_cost(posed, kp.control.QuadraticCost([[1.0, 0.0], [0.0, 1.0]], [[0.1]]))
    >>> flow = kp.linearize(kp.solve(problem, "rk4"))
    >>> forecast = kp.forecast(flow, loss=loss, lr=0.01, steps=20)
    >>> flow.ntk.domain.shape, bool(forecast.loss[-1] < forecast.loss[0])
    ((3, 3, 3), True)
    """
    if cost is None and terminal is None:
        raise ValueError("training_cost needs a running cost, a terminal one, or both")
    if isinstance(problem, DiscreteProblem):
        return _over_steps(problem, cost, terminal)
    if not isinstance(problem, OverTimes):
        raise TypeError(f"training_cost takes an ODEProblem or a DiscreteProblem, got {type_name(problem)}")
    if problem.is_span:
        raise ValueError(
            f"the problem has a span {tuple(problem.t.tolist())}; give it a grid of times, "
            "problem.remake(t=np.linspace(...)), fine enough for the cost"
        )
    if problem.form.backward:
        raise ValueError("the times decrease; a cost is an integral forward in time, so pose the problem forward")
    steps, units, backend = np.diff(problem.t), int(problem.z0.shape[-1]), problem.backend
    if not isinstance(problem, ODEProblem):
        check_costs(cost, terminal, units)
        return TrainingCost(problem, CostOfStates(cost, terminal, steps, units, None, False, backend))
    if hasattr(problem.f, "sampling"):
        sampling = problem.f.sampling
        check_costs(cost, terminal, sampling.state, sampling.control, True)
        return TrainingCost(
            problem, CostOfStates(cost, terminal, steps, sampling.state, sampling.of_held, False, backend)
        )
    has_control = is_closed_loop(problem.f)
    check_costs(cost, terminal, units, control_size(problem.f), has_control)
    integral = slice(units, None) if has_control else None
    loss = CostOfStates(cost, terminal, steps, units, integral, True, backend)
    return TrainingCost(_with_control(problem) if has_control else problem, loss)


def _over_steps(problem: DiscreteProblem, cost: Cost | None, terminal: Cost | None) -> TrainingCost:
    if is_stepped_loop(problem.cell):
        if problem.encoder is not None:
            raise ValueError("the start of the problem is an encoder's; a cost of the control needs a given one, z0")
        whole, width = with_control(problem)
        units, control = int(problem.cell.plant.state_size), slice(width, None)
        check_costs(cost, terminal, units, int(whole.z0.shape[-1]) - width, True)
        return TrainingCost(whole, CostOfStates(cost, terminal, np.zeros(0), units, control, False, problem.backend))
    units = int(problem.backend.tracing.discrete_step(problem)[1].shape[-1])
    check_costs(cost, terminal, units)
    return TrainingCost(problem, CostOfStates(cost, terminal, np.zeros(0), units, None, False, problem.backend))


def _with_control(problem: ODEProblem) -> ODEProblem:
    """The same loop with the integral of u as further states."""
    if problem.encodes:
        raise ValueError("the start of the problem is an encoder's; a cost of the control needs a given one, z0")
    z0 = problem.z0
    width = _control_width(problem)
    xp = array_namespace(z0)
    start = xp.concat([z0, xp.zeros((len(z0), width), dtype=z0.dtype, device=device(z0))], axis=-1)
    field = models_of(problem.backend.name).BesideControl(problem.f, z0.shape[-1])
    return problem.remake(f=field, z0=start)


def _control_width(problem: ODEProblem) -> int:
    loop = loop_of_field(problem.f, problem.backend, "control", "closed", problem.x is not None)
    x = inputs_at(problem, np.broadcast_to(problem.t[:1], (len(problem.z0), 1)))
    return loop.width(problem.z0[0], *(() if x is None else (x[0, 0],)))
