"""Solve a problem: the forward pass, with the whole state kept."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, full_precision, is_torch_array, like_numpy, take_at, to_numpy
from kpflow_dyn._problems.problems import DiscreteProblem, ImplicitProblem, ODEProblem, Problem
from kpflow_dyn._problems.steps import AcceptedSteps


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A solved problem; `solve` gives one of the kinds below it, by the kind of problem.

    Attributes:
        problem: what was solved.
        state: S, [trial, time, unit] where there is time.
        t: the times of the state's time axis, None where there is none.
        alg: the algorithm, None where there is no choice of one.
        stats: counts of what was done.
        success: whether the solve reached the end.
        weights: quadrature weights [time] of an integral over the time axis; None where each step counts as one.

    Example as `solve`.
    """

    problem: Problem
    state: Array
    t: Any = None
    alg: Any = None
    stats: dict[str, Any] = field(default_factory=dict)
    success: bool = True
    weights: np.ndarray | None = field(default=None, repr=False)

    def __call__(self, t: Any) -> Array:
        """The state at a time t [trial, unit], or at times t [n] as [trial, n, unit].

        Of an ODE this is the solver's own dense output; between the steps of a discrete problem it is linear.

        Raises:
            ValueError: outside of the solved times, or where the state is no function of time.
        """
        raise ValueError(f"the solution of a {type(self.problem).__name__} is no function of time; read .state")


@dataclass(frozen=True, kw_only=True)
class DiscreteSolution(Solution):
    """The states of a `DiscreteProblem` at the step numbers t = 1, ..., T.

    Attributes:
        start: the state at t = 0 [trial, unit].
    """

    problem: DiscreteProblem
    start: Array = field(repr=False)

    def __call__(self, t: Any) -> Array:
        times, last = times_within(t, 0, self.state.shape[1]), self.state.shape[1]
        xp = array_namespace(self.state)
        whole = xp.concat([self.start[:, None], self.state], axis=1)
        before = np.minimum(np.atleast_1d(times).astype(int), last - 1)
        along = like_numpy((np.atleast_1d(times) - before)[:, None], self.state)
        left, right = (take_at(whole[None], np.tile(n, (len(whole), 1)))[0] for n in (before, before + 1))
        state = left + along * (right - left)
        return state if times.ndim else state[:, 0]


@dataclass(frozen=True, kw_only=True)
class ODESolution(Solution):
    """The states of an `ODEProblem` at float64 numpy times t: its grid, or three Gauss points inside each step.

    Attributes:
        start: the state at the first time [trial, unit].
        steps: the steps that the solver accepted; None for methods that are no Runge-Kutta steps, which cannot be
            replayed.
        options: the options that the solve used.
    """

    problem: ODEProblem
    start: Array = field(repr=False)
    steps: AcceptedSteps | None = field(default=None, repr=False)
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, t: Any) -> Array:
        times = times_within(t, self.problem.t[0], self.problem.t[-1])
        state = _ode_backend(self.problem).evaluate(self, np.atleast_1d(times))
        return state if times.ndim else state[:, 0]


def times_within(t: Any, low: float, high: float) -> np.ndarray:
    """A number or times [n], in float64; raise outside of the solved span."""
    times = np.asarray(to_numpy(t), np.float64)
    outside = ~((times >= low) & (times <= high))
    if times.ndim > 1 or times.size == 0:
        raise ValueError(f"t has shape {times.shape}, expected a number or times [n]")
    if outside.any():
        raise ValueError(f"t = {times[outside][0]} lies outside of the solved span [{low}, {high}]")
    return times


def check_states(traced: Array, state: Array, tolerance: float = 0.0) -> None:
    """Raise when the traced step does not give the solved states, to round-off or to a tolerance above it."""
    xp = array_namespace(state)
    limits = xp.finfo(state.dtype)
    tolerance = max(tolerance, 1e3 * float(limits.eps))
    error = to_numpy(xp.max(abs(traced - state), axis=(0, 2))) / max(float(abs(state).max()), float(limits.tiny))
    if not error.max() <= tolerance:
        raise ValueError(
            f"the traced step differs from the solved states by {error.max():.1e} of their size (step "
            f"{int(error.argmax())}). Either the parameters changed after solve (solve again), or a step depends on "
            "other trials, on the time, or on something outside of x_t and z"
        )


class SolveError(ValueError):
    """A solve in which some trials failed; the message names them, the times and what to do.

    Attributes:
        trials: the numbers of the trials that failed.
        solution: the Solution of the other trials, in their order; None where there is none.

    Example:
        >>> import torch, kpflow_dyn as kp
        >>> try:
        ...     kp.solve(kp.ODEProblem(kp.models.CTRNNField(8), torch.randn(2, 8), (0.0, 9.0)), max_steps=2)
        ... except kp.SolveError as error:
        ...     error.trials
        [0, 1]
    """

    def __init__(self, message: str, trials: list[int], solution: Solution | None) -> None:
        super().__init__(message)
        self.trials, self.solution = trials, solution


def solve_error(failures: dict[int, tuple[str, float]], solution: Solution | None) -> SolveError:
    """The error of the trials that failed, each with its reason and time."""
    named = [f"trial {trial} {reason} at t = {time:.6g}" for trial, (reason, time) in failures.items()]
    listed = ", ".join(named[:5]) + (f", and {len(named) - 5} more" if len(named) > 5 else "")
    advice = [text for word, text in _ADVICE.items() if any(word in reason for reason, _ in failures.values())]
    rest = "" if solution is None else ". The solution of the other trials is the error's .solution"
    return SolveError(f"{listed}; {'; '.join(advice)}{rest}", list(failures), solution)


_ADVICE = {
    "finite": "look at f near there, solve up to an earlier time, or take shorter steps where they are given",
    "max_steps": (
        "raise max_steps, loosen rtol and atol, take a method of higher order, or for a stiff problem an implicit one "
        "(in JAX, diffrax.Kvaerno5())"
    ),
    "implicit": "take shorter steps, or leave steps=None so that the method chooses them",
}


@dataclass(frozen=True)
class Options:
    """What steers the solve of an ODE: tolerances, the number of steps at most, and the steps themselves."""

    rtol: float
    atol: float
    max_steps: int
    steps: Any


def solve(prob: Problem, alg: Any = None, **common: Any) -> Solution:
    """Find the state S with F(S, theta; x) = 0; keep it, and of an ODE the accepted steps, for a linearisation.

    Recurrences and networks are run forward. A fixed point is found by z <- f(x, z), and by Newton's method where that
    is slow; a free form by Newton's method.

    Args:
        prob: the problem.
        alg: how an ODE is solved. In torch the name of a method of torchdiffeq, "dopri5" when None; in JAX a solver of
            diffrax, own subclasses of AbstractERK included, diffrax.Tsit5() when None. Discrete problems need none.
        **common: for an ODE, `rtol` and `atol`, the tolerances (1e-6 and 1e-8 for a float64 state, 1e-4 and 1e-6 for
            float32); `max_steps`, how many steps may be tried (4096); `steps`, None for the method's own choice (one
            step for each interval of the grid where it makes none), a number for steps of this length (the last one
            shorter if need be), or increasing times from t0 to the end for steps between exactly these.

    On a grid t the library gives the state; in JAX each trial has steps of its own, in torch all share them. On a span
    all trials share the steps, and the state is read from the dense output at three Gauss points inside each. With
    torchdiffeq's adaptive_heun and fehlberg2 (unless the steps are given), its Adams and scipy methods, and diffrax's
    methods with memory, a step depends on those before it, and `solution.steps` is None. The dense output of
    torchdiffeq's bosh3, dopri8 and second-order methods is far less accurate than their steps: on a span, or with a
    grid inside the steps, take "dopri5".

    Raises:
        TypeError, ValueError: a model, input or initial state that do not fit, a step that is random or changes its
            arguments, and a state that does not stay finite; each says what to do.
        SolveError: some trials of an ODE failed; it names them, and holds the solution of the others.

    Source: torchdiffeq (Chen et al., arXiv:1806.07366); diffrax (Kidger, arXiv:2202.02435).

    Example:
        >>> import torch, kpflow_dyn as kp
        >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.zeros(2, 5, 3))
        >>> kp.solve(problem).stats
        {'steps': 5}
    """
    if isinstance(prob, ODEProblem):
        with full_precision(prob.z0):
            return _ode_backend(prob).solve_ode(prob, alg, _options(prob, common))
    if not isinstance(prob, Problem):
        raise TypeError(
            f"solve takes a problem such as DiscreteProblem(cell, x) or ODEProblem(f, z0, t), got {type(prob).__name__}"
        )
    if alg is not None or common:
        raise TypeError(
            f"a {type(prob).__name__} is solved in one way; alg must be None, got {alg!r}, without options, got "
            f"{sorted(common)}"
        )
    with full_precision(prob.state if isinstance(prob, ImplicitProblem) else prob.x):
        if isinstance(prob, DiscreteProblem):
            return _solve_discrete(prob)
        from kpflow_dyn._implicit.solving import solve_implicit

        return solve_implicit(prob)


def _solve_discrete(prob: DiscreteProblem) -> Solution:
    if is_torch_array(prob.x):
        from kpflow_dyn._torch.rollout import roll_out
    else:
        from kpflow_dyn._jax.rollout import roll_out
    state, start = roll_out(prob)
    times = like_numpy(np.arange(1, state.shape[1] + 1), state)
    return DiscreteSolution(problem=prob, state=state, t=times, stats={"steps": state.shape[1]}, start=start)


def _ode_backend(prob: ODEProblem) -> Any:
    """The module that solves ODEs in the framework of z0."""
    if is_torch_array(prob.z0):
        from kpflow_dyn._torch import odeint
    else:
        from kpflow_dyn._jax import odeint
    return odeint


def _options(prob: ODEProblem, common: dict[str, Any]) -> Options:
    known = [field.name for field in dataclasses.fields(Options)]
    if unknown := set(common) - set(known):
        raise TypeError(f"solve got the unknown options {sorted(unknown)}, expected some of {', '.join(known)}")
    double = str(prob.z0.dtype).endswith("float64")
    defaults = {"rtol": 1e-6 if double else 1e-4, "atol": 1e-8 if double else 1e-6, "max_steps": 4096, "steps": None}
    options = Options(**{**defaults, **common})
    for name in ("rtol", "atol"):
        value = getattr(options, name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value!r}, expected a positive number; the default is {defaults[name]}")
    if not isinstance(options.max_steps, int) or isinstance(options.max_steps, bool) or options.max_steps < 1:
        raise ValueError(f"max_steps is {options.max_steps!r}, expected a positive integer; the default is 4096")
    return options
