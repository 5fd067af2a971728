"""Torchdiffeq as a library that solves ODEs, keeping the steps that it accepts; its methods as tableaus.

All trials are one system for torchdiffeq, so they share the steps.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from kpflow_dyn._problems.inputs import jumps_within, stops_of
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau, hermite, quartic
from kpflow_dyn._problems.translations import method_here
from kpflow_dyn.ode._libraries import Failed, Options, Solved, rate_of


class Torchdiffeq:
    """The methods of torchdiffeq, by their names."""

    name, framework = "torchdiffeq", "torch"

    def accepts(self, alg: Any) -> bool:
        """Whether it is a name."""
        return isinstance(alg, str)

    def chooses_steps(self, alg: Any) -> bool:
        """Whether the method does; raises as `method_named`."""
        return method_named(alg).adaptive

    def solve(self, problem: ODEProblem, alg: str, times: np.ndarray, options: Options) -> Solved:
        """See `kpflow_dyn.ode.Library`."""
        method = method_named(alg)
        if method.name == "scipy_solver" and (problem.is_span or options.steps is not None):
            raise ValueError(
                "scipy_solver neither tells its steps nor takes given ones; give a grid t and steps=None, and for a "
                "model with jumps a Runge-Kutta method such as 'dopri5'"
            )
        watched = _Watched(problem, method, options.max_steps)
        settings = _settings(problem, method, times, options)
        if method.name == "scipy_solver":
            state = _from_stop_to_stop(problem, method, times, settings, watched)
        else:
            state = _integrate(problem.z0, method, times, settings, watched)
        edges = np.append([t for t, _, _ in watched.steps], problem.t[-1])
        replayable = method.tableau is not None and (method.fsal or options.steps is not None)
        steps = _accepted(problem, method, watched, state[:, -1], options) if replayable else None
        # The cubic of the other methods takes f from the wrong side of a jump.
        right = method.adaptive or steps is None or not len(jumps_within(problem))
        return Solved(steps, state if right else None, watched.stats, edges)


TORCHDIFFEQ = Torchdiffeq()


# The rows of a, then b and c, of the methods that take the steps they are given; torchdiffeq's "rk4" is the 3/8 rule.
_FIXED = {
    "euler": ([[]], [1.0], [0.0]),
    "midpoint": ([[], [1 / 2]], [0.0, 1.0], [0.0, 1 / 2]),
    "heun2": ([[], [1.0]], [1 / 2, 1 / 2], [0.0, 1.0]),
    "heun3": ([[], [1 / 3], [0.0, 2 / 3]], [1 / 4, 0.0, 3 / 4], [0.0, 1 / 3, 2 / 3]),
    "rk4": ([[], [1 / 3], [-1 / 3, 1.0], [1.0, -1.0, 1.0]], [1 / 8, 3 / 8, 3 / 8, 1 / 8], [0.0, 1 / 3, 2 / 3, 1.0]),
}


@dataclass(frozen=True)
class Method:
    """A method of torchdiffeq."""

    name: str  # what torchdiffeq calls it
    tableau: Tableau | None  # its tableau, None for methods that are not Runge-Kutta
    adaptive: bool  # whether it chooses its steps
    # whether its last stage is f at the end of the step. torchdiffeq takes the last stage of an adaptive method for the
    # first one of the next step even where it is not, and such steps cannot be replayed one by one.
    fsal: bool

    @property
    def embedded(self) -> bool:
        """Whether it is one of torchdiffeq's adaptive Runge-Kutta methods."""
        return self.adaptive and self.tableau is not None


def method_named(name: Any) -> Method:
    """The method of this name; a TypeError or ValueError that lists the names for anything else."""
    if not isinstance(name, str) or name not in SOLVERS:
        raise (ValueError if isinstance(name, str) else TypeError)(
            f"alg is {name!r}; z0 is a torch tensor, so torchdiffeq solves, expected one of {', '.join(SOLVERS)}"
            f"{method_here(name, 'torch')}"
        )
    return _known(name)


@lru_cache
def _known(name: str) -> Method:
    solver = SOLVERS[name]
    if issubclass(solver, RKAdaptiveStepsizeODESolver):
        tableau = _adaptive_tableau(solver)
        return Method(name, tableau, adaptive=True, fsal=bool((tableau.a[-1] == tableau.b).all()))
    if name in _FIXED:
        return Method(name, _fixed_tableau(*_FIXED[name]), adaptive=False, fsal=True)
    return Method(name, None, adaptive=name == "scipy_solver", fsal=False)


def _adaptive_tableau(solver: type[RKAdaptiveStepsizeODESolver]) -> Tableau:
    """With torchdiffeq's quartic interpolation."""
    alpha, beta, b, _ = (values for values in solver.tableau)
    b = b.double().numpy()
    a = _lower([[], *(row.double().tolist() for row in beta)])
    return Tableau(a, b, np.append(0.0, alpha.double().numpy()), quartic(b, solver.mid.double().numpy()))


def _fixed_tableau(rows: list[list[float]], b: list[float], c: list[float]) -> Tableau:
    """With torchdiffeq's "cubic", which needs f at the end of the step: one more stage, of weight zero."""
    weights = np.append(b, 0.0)
    return Tableau(_lower([*rows, b]), weights, np.append(c, 1.0), hermite(weights))


def _lower(rows: list[list[float]]) -> np.ndarray:
    return np.array([row + [0.0] * (len(rows) - len(row)) for row in rows])


class _Watched:
    """f as torchdiffeq calls it, noting evaluations and steps, and stopping when they are too many."""

    def __init__(self, problem: ODEProblem, method: Method, max_steps: int) -> None:
        self.rate, self.max_steps = rate_of(problem), max_steps
        self.evaluations = self.tried = 0
        self.time, self.last = float(problem.t[0]), problem.z0
        self.stops = {*stops_of(problem).tolist(), float(problem.t[-1])}
        self.steps: list[tuple[float, float, Tensor]] = []
        if method.embedded:
            self.callback_step, self.callback_accept_step = self._try_step, self._keep
        elif method.name != "scipy_solver":
            self.callback_step = self._keep

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        self.last = z
        try:
            return self.rate(t, z)
        except AssertionError as error:  # not to be taken for one of torchdiffeq's own
            raise RuntimeError(f"f failed at t = {float(t):.6g}: {error}") from error

    def _try_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.time = float(t)
        if self.tried == self.max_steps:
            raise self.failed(f"reached max_steps = {self.max_steps}", self.time)
        self.tried += 1
        step_beyond(self.stops, t, dt)

    def _keep(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.steps.append((float(t), float(dt), z))

    def failed(self, reason: str, time: float) -> Failed:
        """The error of a solve that stopped."""
        return Failed(dict.fromkeys(range(len(self.last)), (reason, time)), apart=False)

    @property
    def stats(self) -> dict[str, int]:
        """What was done."""
        counts = {"steps": len(self.steps), "rejected": max(self.tried - len(self.steps), 0)}
        return {**(counts if self.steps else {}), "evaluations": self.evaluations}


def step_beyond(stops: set[float], t: Tensor, dt: Tensor) -> None:
    """Lengthen a step that would end exactly at a stop: torchdiffeq sees neither this one then nor any after it."""
    if float(t + dt) in stops:
        dt *= 2  # which torchdiffeq cuts at the stop


def _integrate(z0: Tensor, method: Method, times: np.ndarray, settings: dict[str, Any], watched: _Watched) -> Tensor:
    """The state at times [trial, time, unit]."""
    t = torch.as_tensor(times, dtype=torch.float64, device=z0.device)
    try:
        state: Any = odeint(watched, z0.detach(), t, method=method.name, **settings)
    except AssertionError as error:  # the steps shrank to nothing, or the state is not finite
        raise watched.failed("left the finite numbers", watched.time) from error
    _check_finite(state, watched, times)
    return state.transpose(0, 1)


def _from_stop_to_stop(
    problem: ODEProblem, method: Method, times: np.ndarray, settings: dict[str, Any], watched: _Watched
) -> Tensor:
    """The state at times [trial, time, unit] by one solve after another, for a method that cannot be told its stops."""
    found, jumps = [problem.z0[:, None]], jumps_within(problem)
    state = found[0]
    for begin, end in pairwise([problem.t[0], *stops_of(problem), problem.t[-1]]):
        t = np.array([begin, *times[(times > begin) & (times < end)], end])
        state = _integrate(state[:, -1], method, between_jumps(t, jumps, state), settings, watched)
        found.append(state[:, 1:][:, torch.from_numpy(np.isin(t[1:], times))])
    return torch.cat(found, 1)


def between_jumps(t: np.ndarray, jumps: np.ndarray, like: Tensor) -> np.ndarray:
    """Times t in order; the first and the last, where they are jumps, moved inwards by the round-off of the dtype."""
    dtype, t = _numpy_dtype(like), t.astype(np.float64)
    if t[0] in jumps:
        t[0] = np.nextafter(dtype(t[0]), dtype(t[-1]))
    if t[-1] in jumps:
        t[-1] = np.nextafter(dtype(t[-1]), dtype(t[0]))
    return t


def _settings(problem: ODEProblem, method: Method, times: np.ndarray, options: Options) -> dict[str, Any]:
    """The arguments of odeint that make it take the wanted steps."""
    settings: dict[str, Any] = {"rtol": options.rtol, "atol": options.atol}
    if options.steps is None:
        return settings | {"options": _stopping(problem) if method.embedded else {}}
    given = torch.as_tensor(options.steps, device=problem.z0.device)
    if not method.adaptive:
        interpolation = "linear" if np.isin(times, options.steps).all() else "cubic"
        sides = {"perturb": True} if len(jumps_within(problem)) else {}
        return settings | {"options": {"grid_constructor": lambda *_: given, "interp": interpolation, **sides}}
    # No error is too large, and each step would reach beyond the end were it not for the next given time. As the inner
    # ones are "jumps", f is evaluated again after each, on its own side of a discontinuity.
    far = 4 * (options.steps[-1] - options.steps[0])
    growth = {"first_step": far, "ifactor": far / np.diff(options.steps).min()}
    return settings | {"atol": torch.inf, "options": {"jump_t": given[1:-1], "step_t": given[-1:], **growth}}


def _stopping(problem: ODEProblem) -> dict[str, Any]:
    """The times at which steps must end; on a grid without inputs torchdiffeq reads the end from a step beyond it."""
    if problem.x is None and not problem.is_span:
        return {}
    jumps, stops = jumps_within(problem), np.append(stops_of(problem), problem.t[-1])
    return {"jump_t": torch.as_tensor(jumps), "step_t": torch.as_tensor(np.setdiff1d(stops, jumps))}


def _check_finite(state: Tensor, watched: _Watched, nodes: np.ndarray) -> None:
    """Raise at the first time where the state is not finite, or that the solver did not reach."""
    for time, _, before in watched.steps:
        if not torch.isfinite(before).all():
            raise watched.failed("left the finite numbers", time)
    bad = (~torch.isfinite(state).flatten(1).all(1)).nonzero()
    if len(bad) or len(state) < len(nodes):
        raise watched.failed("left the finite numbers", float(nodes[int(bad[0]) if len(bad) else len(state)]))


def _accepted(problem: ODEProblem, method: Method, watched: _Watched, final: Tensor, options: Options) -> AcceptedSteps:
    """The steps that torchdiffeq took, after one of length zero at t0."""
    assert method.tableau is not None
    t, dt, before = (list(values) for values in zip(*watched.steps, strict=True))
    ends, stage_times = np.array([*t, t[-1] + dt[-1]]), None
    if method.adaptive:
        final = watched.last if method.fsal else final  # where its last stage is evaluated, which may be later
    if method.adaptive or len(jumps_within(problem)):
        anew = _evaluated_anew(problem, method, ends, options)
        stage_times = _stage_times(method.tableau.c, ends, _numpy_dtype(final), anew)
        stage_times = np.repeat(stage_times[None], len(final), 0)
    states = torch.stack([problem.z0.detach(), *before[1:], final], 1)
    steps = AcceptedSteps.between(method.tableau, ends, states, stage_times=stage_times)
    # Its own lengths, which differences of late times do not give to all digits.
    return replace(steps, dt=np.tile([0.0, *dt], (len(final), 1)))


def _evaluated_anew(problem: ODEProblem, method: Method, ends: np.ndarray, options: Options) -> np.ndarray:
    """Whether the first stage of each step is evaluated anew rather than the last stage of the step before it."""
    if method.adaptive and options.steps is None:
        return np.isin(ends[:-1], jumps_within(problem))
    return np.arange(len(ends) - 1) > 0 if method.adaptive else np.full(len(ends) - 1, True)


def _stage_times(c: np.ndarray, ends: np.ndarray, dtype: Any, anew: np.ndarray) -> np.ndarray:
    """When torchdiffeq evaluates f to be on the right side of jumps: in the dtype of the state, just before the end of
    a step, and just after it begins where that is done anew.
    """
    t = np.append(ends[:1], ends[:-1])
    times = t.astype(dtype)[:, None] + c.astype(dtype) * (ends - t).astype(dtype)[:, None]
    ends = ends.astype(dtype)
    times[:, c == 1] = np.nextafter(ends, dtype(-np.inf))[:, None]
    times[0] = ends[0]
    times[1:, 0] = np.where(anew, np.nextafter(ends[:-1], dtype(np.inf)), times[:-1, -1])
    return times.astype(np.float64)


def _numpy_dtype(z: Tensor) -> Any:
    return np.float32 if z.dtype == torch.float32 else np.float64
