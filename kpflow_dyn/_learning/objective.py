"""A loss of a problem's states as a function of the parameters that learn, with its gradient and its Hessian."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._backend import Values, backend_of
from kpflow_dyn._flows.referee import Derivative, Mismatch, ask, compare_gradients
from kpflow_dyn._implicit.roads import states_of_network
from kpflow_dyn._implicit.solutions import NetworkSolution
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
        self._backend, self._models = backend, (models := backend.models)
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
        if not self._of_model:
            return lambda _values, _scheme: solution.state
        if isinstance(solution, NetworkSolution):
            by_name, like, own = states_of_network(solution, self._of_model, self._called)
            self._check_called(by_name, like, own)
            return lambda values, _scheme: by_name(values)
        if isinstance(solution, ODESolution) and solution.steps is not None:
            run, now = replay(solution.problem, solution.steps.tableau), scheme(solution)
        else:
            run, now = _steps_of(solution.problem), None
        model = solution.problem.backend.tracing.Model(solution.problem.model, self._of_model)
        own = model.derivative(lambda call, _nothing: run(call, now), solution.state.reshape(-1)[:0])
        self._check_called(lambda values: self._called(run, values, now), model.parameters, own)
        return lambda values, scheme: self._called(run, values, scheme)

    def _called(self, function: Callable[..., Array], values: Values, *args: Any) -> Array:
        return self._models.call(function, self._model, values, *args)

    def _check_called(self, states: Callable[[Values], Array], like: Values, own: Derivative | None) -> None:
        """Raise where a call with other parameters is not the model, as where an alias does not follow a name."""
        if own is None:
            return
        q, expected, _ = ask(own).probe
        theta = array_namespace(q).concat([value.reshape(-1) for value in like.values()])

        def seen(theta: Array, _scheme: None) -> Array:
            return (q[0] * states(dict(zip(like, split(theta, list(like.values())), strict=True)))).sum()

        found = self._backend.objectives.Derivatives(seen).gradient(self._models.snapshot(theta), None)
        try:
            compare_gradients(to_numpy(found), to_numpy(expected[0]), {n: math.prod(v.shape) for n, v in like.items()})
        except Mismatch as error:
            raise ValueError(
                f"a call of the model with other parameters is not the model: {error}; write it without what reaches a "
                "parameter by another way than its name"
            ) from error

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
    value: Any = loss(state)
    shape = getattr(value, "shape", None)
    if backend_of(value) is not backend_of(state) or shape is None or tuple(shape) != ():
        got = type(value).__name__ if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"the loss gave {got}, expected one number of shape (), such as ((state - y) ** 2).mean()")
    if not math.isfinite(number := float(to_numpy(value))):
        raise ValueError(f"the loss is {number} at the start; look at the targets and the weights")
