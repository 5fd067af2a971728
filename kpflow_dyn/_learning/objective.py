"""A loss of a problem's states as a function of the parameters that learn, with its gradient and its Hessian."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, to_numpy
from kpflow_dyn._arrays.complex_numbers import by_name, vector_of
from kpflow_dyn._backend import Values, backend_of
from kpflow_dyn._implicit.roads import check_call, states_of_network
from kpflow_dyn._implicit.solutions import NetworkSolution
from kpflow_dyn._learning.losses import OfStates, check_number, has_states_for_logits
from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution, Solution, SolveError
from kpflow_dyn._problems.starts import start_map
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._problems.units import hidden_of, units_read, width_of
from kpflow_dyn._shown import type_name
from kpflow_dyn._solve import solve
from kpflow_dyn.ode._replay import replay, scheme
from kpflow_dyn.solvers._landscape import NoSecondDerivative, Point

SOLVED = (ODESolution, HybridSolution)  # by steps that are replayed
LOSS = "loss."  # prefix of the names of the loss's own parameters


class Objective:
    """The loss about any theta [n].

    Args:
        solution: the solved problem.
        loss: of the states; its own parameters learn as well.
        params: which parameters learn.

    Attributes:
        start: theta of the model and of the loss as they are.
        unreached: the parameters that an optimiser leaves alone, as the loss does not hang on them.
        stopped: why there is no loss where it was asked for last, or nothing.
    """

    def __init__(self, solution: Solution, loss: Callable[[Array], Array], params: Choice) -> None:
        solution, self._times = _on_its_nodes(solution)
        check_twice(solution)
        backend, model, self.stopped = solution.problem.backend, solution.problem.model, ""
        self._models = models = backend.models
        of_model, of_loss = (_variables(models.parameters_of(part)) for part in (model, loss))
        known = _apart(of_model, {LOSS + name: value for name, value in of_loss.items()})
        self._read = _units_of(loss, model, solution.state)
        if has_states_for_logits(loss):
            check_logits(solution)
        _check_loss(loss, self._seen(solution.state))
        names = choose(known, params)
        self._like = {name: known[name] for name in names}
        self.start = self.theta(self._like)
        self._model, self._loss_model = models.copied(model), models.copied(loss)
        self._solution, self._of_model = solution, [name for name in names if name in of_model]
        self._states = self._states_of(solution)
        self._derivatives = backend.objectives.Derivatives(lambda theta, scheme: self._of(self.values(theta), scheme))
        self.unreached = self._unreached()
        if len(self.unreached) == len(names):
            raise ValueError(
                "the loss hangs on none of the parameters that learn; look for a detach(), or numpy, in it"
            )

    def __call__(self, theta: Array) -> Point:
        """The loss there; NaN where an ODE has no solution."""
        try:
            scheme, self.stopped = self._scheme(theta), ""
        except SolveError as error:
            self.stopped = str(error)
            return Point(theta, math.nan, theta, lambda rows: rows, lambda theta: (math.nan, theta))

        def around(other: Array) -> tuple[float, Array]:
            return self._derivatives.gradient(other, scheme)

        return Point(theta, *around(theta), _Hessian(self._derivatives, theta, scheme), around)

    def on(self, trials: Any, theta: Array) -> tuple[float, Array]:
        """The loss of some trials alone, by their numbers, and its gradient there."""
        if not isinstance(self._solution, DiscreteSolution):
            raise ValueError("mini-batches of trials are for a DiscreteProblem; leave out batch")
        try:
            loss, gradient = self._derivatives.gradient(theta, trials)
        except TypeError as error:
            raise ValueError(
                "with batch the loss is called as loss(states of some trials, their numbers); take kp.squared_error, "
                f"kp.cross_entropy, or a function of both: {error}"
            ) from error
        if math.isnan(loss) and math.isfinite(self.loss(theta)):
            raise ValueError(_nothing_counts(trials))
        return loss, gradient

    def loss(self, theta: Array) -> float:
        """The loss alone."""
        return self._derivatives.value(theta, self._scheme(theta))

    def rule(self, optimizer: Any, lr: float | None, clip: float | None) -> Any:
        """An optimiser of these parameters as a function of its state."""
        backend = self._solution.problem.backend
        return backend.training.Rule(optimizer, lr, clip, self._like, self.unreached)

    def _unreached(self) -> Sequence[str]:
        at = scheme(self._solution) if isinstance(self._solution, SOLVED) else None
        return self._solution.problem.backend.objectives.unreached(lambda values: self._of(values, at), self._like)

    def gradient(self, theta: Array) -> Array:
        """grad L there [n]."""
        return self._derivatives.gradient(theta, self._scheme(theta))[1]

    def states(self, theta: Array) -> Array:
        """The states there, as those of the solution."""
        values = self.values(theta)
        return self._models.snapshot(self._states({name: values[name] for name in self._of_model}, self._scheme(theta)))

    def seen(self, theta: Array) -> Array:
        """What of the states there the loss is given."""
        return self._seen(self.states(theta))

    def theta(self, values: Mapping[str, Array]) -> Array:
        """The parameters [n] that have these values, copied."""
        return self._models.snapshot(vector_of(values[name] for name in self._like))

    def values(self, theta: Array) -> Values:
        """The parameters by name."""
        return by_name(theta, self._like)

    def _of(self, values: Values, scheme: Any) -> Array:
        of_loss = {name.removeprefix(LOSS): value for name, value in values.items() if name not in self._of_model}
        state = self._states({name: values[name] for name in self._of_model}, scheme)
        of_some = (scheme,) if scheme is not None and isinstance(self._solution, DiscreteSolution) else ()
        call = self._models.call
        return call(lambda loss, *args: loss(*args), self._loss_model, of_loss, self._seen(state), *of_some)

    def _seen(self, state: Array) -> Array:
        """What of the states the loss is given."""
        return (state[:, self._times] if state.ndim > 2 else state)[..., self._read]

    def _states_of(self, solution: Solution) -> Callable[[Values, Any], Array]:
        """(parameters, scheme) -> the states."""
        if isinstance(solution, NetworkSolution):
            return self._states_of_network(solution)
        if isinstance(solution, SOLVED) and solution.steps is not None:
            run = replay(solution)
        elif isinstance(solution, SteppedSolution):
            run = _given_steps_of(solution)
        else:
            run = _steps_of(solution.problem)
        if self._of_model:
            self._check_call(solution, run)
        return lambda values, scheme: self._called(run, values, scheme)

    def _check_call(self, solution: Solution, run: Callable[[Any, Any], Array]) -> None:
        """Raise where the model reaches a parameter by another way than its name, so that only its copy would move."""
        problem, at = solution.problem, scheme(solution) if isinstance(solution, SOLVED) else None
        model = problem.backend.tracing.Model(problem.model, self._of_model)
        own = model.derivative(lambda call, _nothing: run(call, at), solution.state[:, 0, :0])
        check_call(own, lambda values: self._called(run, values, at), model.parameters, self._gradient)

    def _states_of_network(self, solution: NetworkSolution) -> Callable[[Values, Any], Array]:
        states = states_of_network(solution, self._of_model, self._called, self._gradient)
        return lambda values, _scheme: states(values)

    def _called(self, function: Callable[..., Array], values: Values, *args: Any) -> Array:
        return self._models.call(function, self._model, values, *args)

    def _gradient(self, function: Callable[[Array], Array], theta: Array) -> Array:
        derivatives = self._solution.problem.backend.objectives.Derivatives(lambda theta, _scheme: function(theta))
        return derivatives.gradient(theta, None)[1]

    def _scheme(self, theta: Array) -> Any:
        """The steps that the solver takes of an ODE with these parameters."""
        if not isinstance(self._solution, SOLVED):
            return None
        values = self.values(theta)
        model = self._models.changed(self._model, {name: values[name] for name in self._of_model})
        return _scheme_of(self._solution, model)


def _scheme_of(before: Any, model: Any) -> Any:
    """The steps that the solver takes with another model."""
    after: Any = solve(before.problem.with_model(model), before.alg, **before.options)
    if isinstance(before, HybridSolution):
        _check_same_events(before, after)
    return scheme(after)


def _check_same_events(before: HybridSolution, after: HybridSolution) -> None:
    """Raise where other events happen than before, as the states may jump there."""
    for trial, (old, new) in enumerate(zip(before.events, after.events, strict=True)):
        numbers, others = ([event for _, event in events] for events in (old, new))
        if numbers != others:
            now = "other events" if len(numbers) == len(others) else f"{len(others)} events where it had {len(numbers)}"
            raise SolveError(
                f"trial {trial} has {now}, and a loss is smooth only as long as the same ones happen in the same "
                "order. Solve again with the parameters that are reached and go on from there, or end before the event "
                "that comes or goes",
                [trial],
                None,
            )


def _nothing_counts(trials: Array) -> str:
    return (
        f"the loss of the trials {to_numpy(trials).tolist()} is nan, and that of all trials is not: no target of these "
        "counts, as all are masked or of negative class; leave such trials out, or take a larger batch"
    )


class _Hessian:
    """Products with the Hessian of a loss on rows [b, n]; what they need is computed for the first of them."""

    def __init__(self, derivatives: Any, *at: Any) -> None:
        self._derivatives, self._at, self._products = derivatives, at, None

    def __call__(self, rows: Array) -> Array:
        try:
            self._products = self._products or self._derivatives.hessian(*self._at)
            return self._products(rows)
        except Exception as error:  # whatever a backward pass raises that has no derivative
            raise NoSecondDerivative(str(error)) from error


def _steps_of(problem: Any) -> Callable[[Any, Any], Array]:
    """(model, the numbers of some trials, or None for all) -> the states."""
    step, z0 = problem.backend.tracing.discrete_step(problem)
    start = start_map(problem)

    def states(model: Any, trials: Any) -> Array:
        x, first = (problem.x, z0) if trials is None else (problem.x[trials], z0[trials])
        first = first if start is None else start(model, trials)
        return problem.backend.objectives.run(step, problem.backend.models.parts_of(model)[0], x, first)

    return states


def _given_steps_of(solution: SteppedSolution) -> Callable[[Any, Any], Array]:
    """(model, nothing) -> the states, by the steps that were taken."""
    step, rows, places, problem = solution.step, solution.rows, solution.places, solution.problem
    run, units, start = problem.backend.solving.run, solution.state.shape[2], start_map(problem)
    trials, concat = getattr(problem, "trials", slice(None)), array_namespace(solution.start).concat

    def states(model: Any, _nothing: Any) -> Array:
        before = solution.start
        if start is not None:  # what a step keeps behind its units is not looked at before it is written
            before = concat([start(model)[trials], before[:, units:]], axis=-1)
        return run(step, model, rows, before)[:, places, :units]

    return states


def _on_its_nodes(solution: Solution) -> tuple[Solution, slice]:
    """A solution at times that stay, and which of these the loss is given: a span's own nodes, behind its start."""
    if not (isinstance(solution, SOLVED) and solution.problem.is_span):
        return solution, slice(None)
    check_twice(solution)
    times = np.concatenate([solution.problem.t[:1], solution.nodes])
    return solve(solution.problem.with_parts(t=times), solution.alg, **solution.options), slice(1, None)


def check_twice(solution: Solution) -> None:
    """Raise where its states cannot be differentiated twice in the parameters."""
    if isinstance(solution, DiscreteSolution | NetworkSolution | SteppedSolution):
        return
    if not isinstance(solution, SOLVED):
        raise TypeError(
            f"a gradient flow takes a DiscreteProblem, an ODEProblem or a StaticProblem, got "
            f"{type(solution.problem).__name__}"
        )
    if solution.steps is None or not solution.steps.tableau.explicit:
        raise ValueError(
            f"the steps of {solution.alg!r} cannot be differentiated twice; solve with an explicit Runge-Kutta method"
        )


def _variables(parameters: Values) -> Values:
    """Those of a framework; arrays of numpy in a pytree are constants."""
    return {name: value for name, value in parameters.items() if backend_of(value) is not None}


def _apart(of_model: Values, of_loss: Values) -> Values:
    """All parameters; raise where model and loss share some."""
    ours = {id(value) for value in of_model.values()}
    if shared := [name for name, value in of_loss.items() if id(value) in ours or name in of_model]:
        raise ValueError(f"the parameters {shared} belong to the model and to the loss; they must be different ones")
    return of_model | of_loss


def _units_of(loss: Any, model: Any, state: Array) -> slice:
    """What of the state a loss is given: the h of the last layer where the loss has a readout of that width."""
    units, ours = state.shape[-1], isinstance(getattr(loss, "function", None), OfStates)
    reads = ours or width_of(loss, units) == hidden_of(model, units)
    return units_read(model, loss, units) if reads else slice(None)


def check_logits(solution: Solution) -> None:
    """Raise where states that are to be logits of classes are several values side by side."""
    units = solution.state.shape[-1]
    if isinstance(solution, NetworkSolution) and len(solution.sites) > 1:
        several = ", ".join(solution.sites)
        way = 'pose kp.StaticProblem(..., state="") for the outputs alone, or give a readout'
    elif isinstance(solution, DiscreteSolution) and hidden_of(solution.problem.cell, units) != units:
        several, way = "h of each layer, and c where there is one", "give a readout, which may read the last h alone"
    else:
        return
    raise ValueError(
        f"the states are several values side by side ({several}), and all {units} units would be taken for logits of "
        f"classes; {way}"
    )


def _check_loss(loss: Any, state: Array) -> None:
    if not callable(loss):
        raise TypeError(f"loss is {type_name(loss)}, expected a function of the states {tuple(state.shape)}")
    check_number(loss(state), state)
