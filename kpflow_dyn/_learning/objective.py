"""A loss of a problem's states as a function of the parameters that learn, with its gradient and its Hessian."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace
from kpflow_dyn._backend import Values, backend_of
from kpflow_dyn._implicit.roads import check_call, states_of_network
from kpflow_dyn._implicit.solutions import NetworkSolution
from kpflow_dyn._learning.losses import check_number
from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution, Solution, SolveError
from kpflow_dyn._solve import solve
from kpflow_dyn.ode._replay import replay, scheme
from kpflow_dyn.solvers._rosenbrock import Point
from kpflow_dyn.tracing._rows import split

LOSS = "loss."  # prefix of the names of the loss's own parameters


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
        backend, model = solution.problem.backend, getattr(solution.problem, field_of_model(solution))
        self._models = models = backend.models
        of_model, of_loss = (_variables(models.parameters_of(part)) for part in (model, loss))
        known = _apart(of_model, {LOSS + name: value for name, value in of_loss.items()})
        _check_loss(loss, solution.state)
        names = choose(known, params)
        self._like = {name: known[name] for name in names}
        self.start = self.theta(self._like)
        self._model, self._loss_model = models.copied(model), models.copied(loss)
        self._solution, self._of_model = solution, [name for name in names if name in of_model]
        self._states = self._states_of(solution)
        self._derivatives = backend.objectives.Derivatives(self._value)

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
        return self._models.snapshot(array_namespace(flat[0]).concat(flat, axis=0))

    def values(self, theta: Array) -> Values:
        """The parameters by name."""
        return dict(zip(self._like, split(theta, list(self._like.values())), strict=True))

    def _value(self, theta: Array, scheme: Any) -> Array:
        values = self.values(theta)
        of_loss = {name.removeprefix(LOSS): value for name, value in values.items() if name not in self._of_model}
        state = self._states({name: values[name] for name in self._of_model}, scheme)
        return self._models.call(lambda loss, state: loss(state), self._loss_model, of_loss, state)

    def _states_of(self, solution: Solution) -> Callable[[Values, Any], Array]:
        """(parameters, scheme) -> the states."""
        if isinstance(solution, NetworkSolution):
            return self._states_of_network(solution)
        if isinstance(solution, ODESolution) and solution.steps is not None:
            run = replay(solution.problem, solution.steps.tableau)
        else:
            run = _steps_of(solution.problem)
        if self._of_model:
            self._check_call(solution, run)
        return lambda values, scheme: self._called(run, values, scheme)

    def _check_call(self, solution: Solution, run: Callable[[Any, Any], Array]) -> None:
        """Raise where the model reaches a parameter by another way than its name, so that only its copy would move."""
        problem, at = solution.problem, scheme(solution) if isinstance(solution, ODESolution) else None
        model = problem.backend.tracing.Model(getattr(problem, field_of_model(solution)), self._of_model)
        own = model.derivative(lambda call, _nothing: run(call, at), solution.state[:, 0, :0])
        check_call(own, lambda values: self._called(run, values, at), model.parameters, self._gradient)

    def _states_of_network(self, solution: NetworkSolution) -> Callable[[Values, Any], Array]:
        states = states_of_network(solution, self._of_model, self._called, self._gradient)
        return lambda values, _scheme: states(values)

    def _called(self, function: Callable[..., Array], values: Values, *args: Any) -> Array:
        return self._models.call(function, self._model, values, *args)

    def _gradient(self, function: Callable[[Array], Array], theta: Array) -> Array:
        derivatives = self._solution.problem.backend.objectives.Derivatives(lambda theta, _scheme: function(theta))
        return derivatives.gradient(theta, None)

    def _scheme(self, theta: Array) -> Any:
        """The steps that the solver takes of an ODE with these parameters."""
        sol = self._solution
        if not isinstance(sol, ODESolution):
            return None
        values = self.values(theta)
        field = self._models.changed(self._model, {name: values[name] for name in self._of_model})
        again: Any = solve(sol.problem.remake(f=field), sol.alg, **sol.options)
        return scheme(again)


def _steps_of(problem: Any) -> Callable[[Any, Any], Array]:
    """(cell, None) -> the states."""
    step, z0 = problem.backend.tracing.discrete_step(problem)
    return lambda cell, _scheme: problem.backend.solving.run(step, cell, problem.x, z0)


def field_of_model(solution: Solution) -> str:
    """The name of the field of the problem that is the model; raise where its states cannot be differentiated twice."""
    if isinstance(solution, DiscreteSolution):
        return "cell"
    if isinstance(solution, NetworkSolution):
        return "net"
    if not isinstance(solution, ODESolution):
        raise TypeError(
            f"a gradient flow takes a DiscreteProblem, an ODEProblem or a StaticProblem, got "
            f"{type(solution.problem).__name__}"
        )
    if solution.problem.is_span:
        raise ValueError("a loss of states needs times that stay: give the ODEProblem a grid t instead of a span")
    if solution.steps is None or not solution.steps.tableau.explicit:
        raise ValueError(
            f"the steps of {solution.alg!r} cannot be differentiated twice; solve with an explicit Runge-Kutta method"
        )
    return "f"


def _variables(parameters: Values) -> Values:
    """Those of a framework; arrays of numpy in a pytree are constants."""
    return {name: value for name, value in parameters.items() if backend_of(value) is not None}


def _apart(of_model: Values, of_loss: Values) -> Values:
    """All parameters; raise where model and loss share some."""
    ours = {id(value) for value in of_model.values()}
    if shared := [name for name, value in of_loss.items() if id(value) in ours or name in of_model]:
        raise ValueError(f"the parameters {shared} belong to the model and to the loss; they must be different ones")
    return of_model | of_loss


def _check_loss(loss: Any, state: Array) -> None:
    if not callable(loss):
        raise TypeError(f"loss is {type(loss).__name__}, expected a function of the states {tuple(state.shape)}")
    check_number(loss(state), state)
