"""Gradient descent in the limit of small steps: the loss and the parameters along the gradient flow."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision
from kpflow_dyn._learning.linearised import LinearisedObjective
from kpflow_dyn._learning.objective import Objective
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.problems import Problem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._solve import solve
from kpflow_dyn.solvers._rosenbrock import ExponentialRosenbrock, Integration, Piece

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class GradientFlow:
    """The gradient flow d theta / d tau = -grad L(theta), at the steps that were taken; step 0 is the start.

    A step of gradient descent with learning rate eta is a time eta, so tau = eta times the number of steps.

    Attributes:
        time: tau [step].
        loss: L [step].
        gradient_norm: |grad L| [step].
        error: the estimated relative error of the loss [step], |dL/dtau| / L times the error in time so far: that of a
            solution of one order less. Errors that the flow itself amplifies are not seen.
        parameters: by name, [step, ...] in their own shapes; names of the loss's own begin with "loss.".
        linearisations: how many Hessians were used, one for each step.
        gradients: how many gradients.
        applications: how many products of a Hessian with a vector.
        reached: whether the flow came to the end of the span, or below the loss where it was to stop.
        pieces: the loss between the steps.

    Example as `gradient_flow`.
    """

    time: np.ndarray
    loss: np.ndarray
    gradient_norm: np.ndarray
    error: np.ndarray
    parameters: dict[str, Array] = field(repr=False)
    linearisations: int
    gradients: int
    applications: int
    reached: bool
    pieces: list[Piece] = field(repr=False)

    def __call__(self, tau: Any) -> np.ndarray:
        """The loss at times [n], or at one time.

        Between steps it is that of the quadratic model about the earlier one, plus a cubic that meets loss and slope at
        the later one.

        Raises:
            ValueError: outside of the times that were reached.
        """
        times = np.asarray(tau, np.float64)
        if not ((times >= 0) & (times <= self.time[-1])).all():
            raise ValueError(f"tau = {tau} lies outside of the times [0, {self.time[-1]:.6g}] that were reached")
        found = [self._loss_at(float(t)) for t in times.reshape(-1)]
        return np.array(found).reshape(times.shape)

    def time_to(self, fraction: float) -> float:
        """The first time at which the loss is this part of what it was at the start; NaN where it never is.

        Raises:
            ValueError: a fraction outside of (0, 1), or a loss that is not positive at the start.
        """
        if not 0 < fraction < 1 or self.loss[0] <= 0:
            raise ValueError(f"expected 0 < fraction < 1 and a positive loss, got {fraction!r} of {self.loss[0]:.6g}")
        from scipy.optimize import root_scalar

        wanted = fraction * self.loss[0]
        below = np.flatnonzero(self.loss <= wanted)
        if not below.size:
            return math.nan
        ends = self.time[below[0] - 1 : below[0] + 1]
        return float(root_scalar(lambda tau: self._loss_at(tau) - wanted, bracket=ends, xtol=1e-12 * ends[1]).root)

    def plot(self, dark: bool = False) -> Figure:
        """The loss and the norm of the gradient over time, a dot at each step."""
        from kpflow_dyn.figures import _learning as figures

        return figures.gradient_flow(self, dark=dark)

    def _loss_at(self, tau: float) -> float:
        step = min(int(np.searchsorted(self.time, tau, side="right")) - 1, len(self.pieces) - 1)
        return self.pieces[step](tau - self.time[step])


def gradient_flow(
    problem: Problem | Solution,
    loss: Callable[[Array], Array],
    span: float,
    *,
    params: Choice = None,
    alg: ExponentialRosenbrock | None = None,
    rtol: float = 1e-2,
    stop_below: float | None = None,
) -> GradientFlow:
    """Train a model by gradient descent with very small steps, in few large ones.

        d theta / d tau = -grad L(S(theta)),        theta(0) as in the model

    Explicit descent is stable only for learning rates below 2 / l_1, with l_1 the largest eigenvalue of the Hessian, so
    that a slow direction of eigenvalue l_k takes about l_1 / l_k steps. Here each step solves the flow of the quadratic
    model exactly, by functions of the Hessian, and is as long as its error allows. The parameters are copied.

    Args:
        problem: a DiscreteProblem, a StaticProblem, or an ODEProblem on a grid of times; or its Solution, whose solver
            and tolerances are then those of every later solve. An ODE is differentiated on the steps that its solver
            took, and solved again after each step of the flow.
        loss: from the states [trial, time, unit] to a number of shape (). If it has parameters, such as those of a
            readout, they learn too: an nn.Module, or in JAX a callable pytree, whose jax arrays are parameters and
            whose numpy arrays are constants.
        span: how long to flow, in tau = learning rate times steps.
        params: which parameters learn, names or a function of the name, as in `linearize`; all when None.
        alg: the options of the integrator; `ExponentialRosenbrock()` when None.
        rtol: the error of a step, relative to what it does: in time to its length, in the parameters to the distance.
        stop_below: end as soon as the loss is below this part of what it was at the start.

    Raises:
        TypeError, ValueError: for a problem that cannot be differentiated twice, a loss that is no finite number, or
            options out of range.
        RuntimeError: where no step is short enough, for a loss that is not smooth.

    Warns:
        UserWarning: after alg.max_linearisations; the flow up to there is returned with `reached` False.

    Source as `solvers.ExponentialRosenbrock`.

    >>> import torch, kpflow_dyn as kp
    >>> net, x = torch.nn.Linear(2, 1, bias=False).double(), torch.tensor([[1.0, 0.0], [0.0, 30.0]]).double()
    >>> flow = kp.gradient_flow(kp.StaticProblem(net, x), lambda y: ((y - 1) ** 2).sum() / 2, span=14.0)
    >>> flow.reached, flow.linearisations < 5  # where descent takes 6300 steps, as the curvatures are 1 and 900
    (True, True)
    >>> flow.parameters["weight"][-1]
    tensor([[1.0000, 0.0333]], dtype=torch.float64)
    """
    alg = ExponentialRosenbrock() if alg is None else alg
    _check(span, alg, rtol, stop_below)
    solution = problem if isinstance(problem, Solution) else solve(problem)
    with full_precision(solution.state):
        objective = Objective(solution, loss, params)
        run = Integration(objective, objective.start, float(span), alg, rtol)
        return along(run, objective, stop_below)


def along(run: Integration, objective: Objective | LinearisedObjective, stop_below: float | None) -> GradientFlow:
    """Step after step until the end, or until there were too many."""
    lowest = -math.inf if stop_below is None else stop_below * run.point.loss
    rows, thetas, pieces = [_row(run)], [run.point.theta], []
    while not (reached := run.finished or run.point.loss < lowest) and not run.exhausted:
        pieces.append(run.advance())
        rows.append(_row(run))
        thetas.append(run.point.theta)
    if not reached:
        warnings.warn(
            f"the gradient flow stopped at tau = {run.time:.4g} of {run.span:.4g} after max_linearisations = "
            f"{run.linearisations}; raise it, raise rtol, or ask for a shorter span",
            stacklevel=3,
        )
    values = [objective.values(theta) for theta in thetas]
    stack = array_namespace(thetas[0]).stack
    return GradientFlow(
        *np.array(rows).T,
        parameters={name: stack([value[name] for value in values]) for name in values[0]},
        linearisations=run.linearisations,
        gradients=run.gradients,
        applications=run.applications,
        reached=reached,
        pieces=pieces,
    )


def _row(run: Integration) -> tuple[float, float, float, float]:
    return run.time, run.point.loss, math.sqrt(-run.slope), run.error


def _check(span: Any, alg: Any, rtol: Any, stop_below: Any) -> None:
    if not isinstance(alg, ExponentialRosenbrock):
        raise TypeError(f"alg is {alg!r}, expected kp.solvers.ExponentialRosenbrock(order=..., columns=...)")
    if not _is_number(span) or not 0 < span < math.inf:
        raise ValueError(f"span is {span!r}, expected a positive number: learning rate times steps")
    if not _is_number(rtol) or not 0 < rtol < 1:
        raise ValueError(f"rtol is {rtol!r}, expected a number between 0 and 1")
    if stop_below is not None and not (_is_number(stop_below) and 0 < stop_below < 1):
        raise ValueError(f"stop_below is {stop_below!r}, expected a part of the loss at the start, between 0 and 1")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
