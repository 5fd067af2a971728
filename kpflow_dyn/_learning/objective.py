"""A loss of a problem's states as a function of the parameters that learn, with its gradient and its Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace, is_torch_array, to_numpy
from kpflow_dyn._implicit.solving import states_of_network
from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem, StaticProblem
from kpflow_dyn._problems.solutions import Solution, SolveError, solve
from kpflow_dyn.solvers._rosenbrock import Point
from kpflow_dyn.tracing._rows import split

LOSS = "loss."  # prefix of the names of the loss's own parameters

Values = dict[str, Array]


class Objective:
    """The loss about any theta [n].

    Args:
        solution: the solved problem.
        loss: of the states; its own parameters learn as well.
        params: which parameters learn.

    Attributes:
        start: theta of the model and of the loss as they are.
    """

    def __init__(self, solution: Solution, loss: Callable[[Array], Array], params: Choice) -> None:
        self._backend = backend = backend_of(solution.state)
        model = getattr(solution.problem, field_of_model(solution))
        of_model, of_loss = backend.parameters_of(model), backend.parameters_of(loss)
        known = _apart(of_model, {LOSS + name: value for name, value in of_loss.items()})
        _check_loss(loss, solution.state)
        names = choose(known, params)
        self._like = {name: known[name] for name in names}
        self.start = self.theta(self._like)
        self._model, self._loss_model = backend.copied(model), backend.copied(loss)
        self._solution, self._of_model = solution, [name for name in names if name in of_model]
        self._states = self._states_of(solution)
        self._derivatives = backend.Derivatives(self._value)

    def __call__(self, theta: Array) -> Point:
        """The loss there; NaN where an ODE has no solution."""
        try:
            scheme = self._scheme(theta)
        except SolveError:
            return Point(theta, math.nan, theta, lambda rows: rows, lambda theta: theta)
        loss, gradient, hessian = self._derivatives.both(theta, scheme)
        return Point(theta, loss, gradient, hessian, lambda theta: self._derivatives.gradient(theta, scheme))

    def theta(self, values: Mapping[str, Array]) -> Array:
        """The parameters [n] that have these values, copied."""
        flat = [values[name].reshape(-1) for name in self._like]
        return self._backend.snapshot(array_namespace(flat[0]).concat(flat, axis=0))

    def values(self, theta: Array) -> Values:
        """The parameters by name."""
        return dict(zip(self._like, split(theta, list(self._like.values())), strict=True))

    def _value(self, theta: Array, scheme: Any) -> Array:
        values = self.values(theta)
        of_loss = {name.removeprefix(LOSS): value for name, value in values.items() if name not in self._of_model}
        state = self._states({name: values[name] for name in self._of_model}, scheme)
        return self._backend.call(lambda loss, state: loss(state), self._loss_model, of_loss, state)

    def _states_of(self, solution: Solution) -> Callable[[Values, Any], Array]:
        """(parameters, scheme) -> the states."""
        backend, problem = self._backend, solution.problem
        if isinstance(problem, StaticProblem):
            network = states_of_network(solution.traced, self._of_model)
            return lambda values, _scheme: network(values)
        if isinstance(problem, DiscreteProblem):
            run = backend.rollout(problem)
        else:
            assert solution.steps is not None
            run = backend.replay(problem, solution.steps.tableau)
        return lambda values, scheme: backend.call(run, self._model, values, scheme)

    def _scheme(self, theta: Array) -> Any:
        """The steps that the solver takes of an ODE with these parameters."""
        problem, sol = self._solution.problem, self._solution
        if not isinstance(problem, ODEProblem):
            return None
        values = self.values(theta)
        field = self._backend.with_values(self._model, {name: values[name] for name in self._of_model})
        return self._backend.scheme(solve(problem.remake(f=field), sol.alg, **sol.options))


def field_of_model(solution: Solution) -> str:
    """The name of the field of the problem that is the model; raise where its states cannot be differentiated twice."""
    problem, steps = solution.problem, solution.steps
    if isinstance(problem, DiscreteProblem):
        return "cell"
    if isinstance(problem, StaticProblem):
        return "net"
    if not isinstance(problem, ODEProblem):
        raise TypeError(
            f"a gradient flow takes a DiscreteProblem, an ODEProblem or a StaticProblem, got {type(problem).__name__}"
        )
    if problem.is_span:
        raise ValueError("a loss of states needs times that stay: give the ODEProblem a grid t instead of a span")
    if steps is None or not steps.tableau.explicit:
        raise ValueError(
            f"the steps of {solution.alg!r} cannot be differentiated twice; solve with an explicit Runge-Kutta method"
        )
    return "f"


def _apart(of_model: Values, of_loss: Values) -> Values:
    """All parameters; raise where model and loss share some."""
    ours = {id(value) for value in of_model.values()}
    if shared := [name for name, value in of_loss.items() if id(value) in ours or name in of_model]:
        raise ValueError(f"the parameters {shared} belong to the model and to the loss; they must be different ones")
    return of_model | of_loss


def _check_loss(loss: Any, state: Array) -> None:
    if not callable(loss):
        raise TypeError(f"loss is {type(loss).__name__}, expected a function of the states {tuple(state.shape)}")
    value: Any = loss(state)
    shape = getattr(value, "shape", None)
    if is_torch_array(value) != is_torch_array(state) or shape is None or tuple(shape) != ():
        got = type(value).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"the loss gave {got}, expected one number of shape (), such as ((state - y) ** 2).mean()")
    if not math.isfinite(number := float(to_numpy(value))):
        raise ValueError(f"the loss is {number} at the start; look at the targets and the weights")


def backend_of(like: Array) -> Any:
    """What the framework of an array does with models and losses."""
    if is_torch_array(like):
        from kpflow_dyn._torch import objectives as objective
    else:
        from kpflow_dyn._jax import objectives as objective
    return objective
