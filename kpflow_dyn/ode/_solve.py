"""Solve an ODE by the library of an algorithm: what is the same for all libraries."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, full_precision, like_numpy, to_numpy
from kpflow_dyn._problems.checks import refuse_foreign_event
from kpflow_dyn._problems.events import is_hybrid
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.inputs import take_trials
from kpflow_dyn._problems.measure import gauss_points, trapezoid
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.solutions import ODESolution, Solution, SolveError
from kpflow_dyn._problems.steps import AcceptedSteps
from kpflow_dyn._shown import type_name
from kpflow_dyn.ode._hybrid import Method
from kpflow_dyn.ode._hybrid_solution import check_events, hybrid_solution
from kpflow_dyn.ode._libraries import Failed, Library, Options, Solved, library_of
from kpflow_dyn.ode._options import with_steps
from kpflow_dyn.ode._replay import check_replay, check_same, read_states, rounding_of


def solve_ode(problem: ODEProblem, alg: Any, options: Options) -> ODESolution | HybridSolution:
    """The solution of an ODE; see `kpflow_dyn.solve`."""
    solving = problem.backend.solving
    refuse_foreign_event(alg)
    alg = solving.default_algorithm() if alg is None else alg
    library = library_of(alg, problem.backend)
    problem = getattr(library, "posed", lambda posed: posed)(problem)
    solver = _Solver(library, alg, options, with_steps(problem, library, alg, options))
    with solving.without_gradients():
        _check_called_input(problem)
        solving.check_field(problem)
        if is_hybrid(problem.f):
            check_events(problem)
        try:
            return _solution(problem, solver)
        except Failed as failure:
            raise _blame(problem, solver, failure) from failure


@dataclass(frozen=True)
class _Solver:
    """An algorithm of a library, with the options that were given and what they mean for the problem."""

    library: Library
    alg: Any
    given: Options
    options: Options

    def __call__(self, problem: ODEProblem, times: np.ndarray) -> Solved:
        return self.library.solve(problem, self.alg, times, self.options)

    def at(self, problem: ODEProblem, times: np.ndarray) -> Array:
        """The state at any times [trial, n, unit], by another solve with its output there."""
        order = np.unique(np.concatenate([problem.t[:1], times, problem.t[-1:]]))
        state = self(problem, order).state
        assert state is not None
        return state[:, np.searchsorted(order, times)]


def _solution(problem: ODEProblem, solver: _Solver) -> ODESolution | HybridSolution:
    if is_hybrid(problem.f):
        method = Method(solver.library, solver.alg, solver.options, solver.options.steps)
        return hybrid_solution(problem, method, solver.given.given())
    solved, nodes, weights = solver(problem, problem.t), problem.t, trapezoid(problem.t)
    steps, state = solved.steps, solved.state
    if steps is not None:
        steps = replace(steps, rounding=rounding_of(steps, solver.options.atol))
    if problem.is_span:
        nodes, weights = gauss_points(_edges(solved))
        state = solver.at(problem, nodes) if steps is None else read_states(problem, steps, nodes)
    elif steps is not None:
        check_replay(problem, steps)
        state = read_states(problem, steps, nodes) if state is None else state
    return ODESolution(
        problem=problem,
        state=state,
        t=problem.form.time(nodes),
        alg=solver.alg,
        stats=solved.stats or {},
        start=problem.backend.models.snapshot(problem.z0),
        weights=weights,
        steps=steps,
        options=solver.given.given(),
        dense_output=DenseOutput(problem, solver, steps, nodes, state),
    )


def _edges(solved: Solved) -> np.ndarray:
    """Between which times all trials stepped; where each has steps of its own, one that took the most."""
    if solved.steps is None:
        assert solved.edges is not None
        return solved.edges
    taken = solved.steps.dt > 0
    trial = taken.sum(1).argmax()
    return np.append(solved.steps.t[trial, 0], (solved.steps.t + solved.steps.dt)[trial, taken[trial]])


@dataclass(frozen=True)
class DenseOutput:
    """z(t) [trial, n, unit] at times [n] of the solved span, by the dense output of the method."""

    problem: ODEProblem
    solver: _Solver
    steps: AcceptedSteps | None
    nodes: np.ndarray
    state: Array

    def __call__(self, times: np.ndarray) -> Array:
        with full_precision(self.state), self.problem.backend.solving.without_gradients():
            if self.steps is not None:
                return read_states(self.problem, self.steps, times)
            state = self.solver.at(self.problem, np.append(times, self.nodes[-1]))
            end, last = to_numpy(state[:, -1:]), to_numpy(self.state[:, -1:])
            check_same(abs(end - last).max(-1), abs(last).max(-1), self.problem.t[:1])
            return state[:, :-1]


def _check_called_input(problem: ODEProblem) -> None:
    """Raise unless what a callable x gives at t0 is [trial, input] or [input], finite, in the dtype of z0."""
    if not callable(problem.x):
        return
    z0 = problem.z0
    t0 = like_numpy(np.asarray(problem.t[0]), z0)
    x: Any = problem.x(t0)
    if not problem.backend.data.is_own(x):
        raise TypeError(f"x(t) is {type_name(x)}, expected {type_name(z0)} [trial, input] or [input]")
    if tuple(x.shape[:-1]) not in ((), (z0.shape[0],)) or x.ndim == 0 or 0 in x.shape:
        raise ValueError(
            f"x(t) has shape {tuple(x.shape)}, expected [trial, input] of {z0.shape[0]} trials, or [input] for all"
        )
    if x.dtype != z0.dtype:
        raise TypeError(f"x(t) is {x.dtype} but z0 is {z0.dtype}; they must agree")
    if not np.isfinite(to_numpy(x)).all():
        raise ValueError("x(t) holds NaN or inf at t0; look at its values")
    if not np.array_equal(to_numpy(x), to_numpy(problem.x(t0))):
        raise ValueError(
            "x(t) gives other values when it is called at the same time again; draw noise once, as samples of x"
        )


def _blame(problem: ODEProblem, solver: _Solver, failure: Failed) -> SolveError:
    """Which trials fail, where all were one system found by solving each alone; and the solution of the others."""
    trials = np.arange(len(problem.z0))
    failures = failure.trials
    if not failure.apart and len(trials) > 1:
        failures = {i: why for i in trials.tolist() if (why := _failure_alone(problem, solver, i))} or failures
    rest = np.setdiff1d(trials, list(failures))
    failures = {trial: (why, problem.form.time(time)) for trial, (why, time) in failures.items()}
    return solve_error(failures, _solution_of_rest(take_trials(problem, rest), solver) if len(rest) else None)


def _failure_alone(problem: ODEProblem, solver: _Solver, trial: int) -> tuple[str, float] | None:
    alone = take_trials(problem, np.array([trial]))
    try:
        _solution(alone, solver) if is_hybrid(problem.f) else solver(alone, problem.t)
    except Failed as alone:
        return alone.trials[0]
    return None


def _solution_of_rest(problem: ODEProblem, solver: _Solver) -> ODESolution | HybridSolution | None:
    try:
        return _solution(problem, solver)
    except Failed:
        return None


def solve_error(failures: dict[int, tuple[str, float]], solution: Solution | None) -> SolveError:
    """The error of the trials that failed, each with its reason and time."""
    named = [f"trial {trial} {reason} at t = {time:.6g}" for trial, (reason, time) in failures.items()]
    listed = ", ".join(named[:5]) + (f", and {len(named) - 5} more" if len(named) > 5 else "")
    fits = (next((text for word, text in _ADVICE.items() if word in reason), None) for reason, _ in failures.values())
    advice = [text for text in dict.fromkeys(fits) if text]
    rest = "" if solution is None else ". The solution of the other trials is the error's .solution"
    return SolveError(f"{listed}; {'; '.join(advice)}{rest}", list(failures), solution)


_ADVICE = {  # the first of them that fits
    "jumps": (
        "conditions are continuous along the flow, and flows across surfaces: name the times at which x jumps "
        "(x.jumps), give an event that comes at a known time as Event(reset=..., at=...), and let a flow that changes "
        "behind a surface read that from a number of the state that the reset sets, not from the side"
    ),
    "slides": (
        "behind that it moves along the surface, by neither side's flow, and solvers chatter: end before; give the "
        "switch hysteresis (two surfaces, and the side as a number of the state that resets change); or replace "
        "sign(c) in the flow by tanh(c / width)"
    ),
    "pile up": (
        "infinitely many events in a finite time (Zeno) have no solution behind, and derivatives grow without bound: "
        "end before, let a reset bring a trial to rest that is slow enough, or make contact a force of the flow"
    ),
    "max_events": (
        "raise max_events of kp.models.Hybrid where so many are meant; a trial that chatters between two surfaces "
        "needs these further apart, or a smooth flow in their place"
    ),
    "finite": (
        "look at f near there, or at the reset that is named, solve up to an earlier time, or take shorter steps where "
        "they are given"
    ),
    "max_steps": (
        "raise max_steps, loosen rtol and atol, take a method of higher order, or for a stiff problem an implicit one "
        "(in JAX, diffrax.Kvaerno5())"
    ),
    "event": (
        "a trial whose events pile up, or that rests on a surface or only touches it, has no derivative there: end "
        "before that, begin elsewhere, give the event a direction, or make contact a force of the flow"
    ),
    "implicit": "take shorter steps, or leave steps=None so that the method chooses them",
}
