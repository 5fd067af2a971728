"""Solve an ODE with torchdiffeq, keeping the steps that it accepted.

All trials are one system for torchdiffeq, so they share the steps. Each step is replayed by its tableau, and what that
gives is compared with what torchdiffeq gave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from kpflow_dyn._problems.inputs import check_called_input, input_at, sampled, step_times, take_trials
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.quadrature import gauss_points, trapezoid
from kpflow_dyn._problems.solutions import ODESolution, Options, SolveError, solve_error
from kpflow_dyn._problems.steps import AcceptedSteps, check_replay_error, replay_error, stages, step
from kpflow_dyn._torch.checks import check_module
from kpflow_dyn._torch.methods import Method, method_named


@torch.no_grad()
def solve_ode(problem: ODEProblem, alg: Any, options: Options) -> ODESolution:
    """The solution of an ODE by a method of torchdiffeq; see `kpflow_dyn.solve`."""
    run = _run(problem, "dopri5" if alg is None else alg, options)
    _check_field(problem)
    try:
        return _solve(problem, run)
    except _Failure as failure:
        raise _blame(problem, run, failure) from failure


@torch.no_grad()
def evaluate(solution: ODESolution, times: np.ndarray) -> Tensor:
    """The solution at times [n], [trial, n, unit], by the dense output of its method."""
    problem, steps = solution.problem, solution.steps
    if steps is None:
        return _evaluate_again(problem, solution, times)
    index, theta = (rows[0] for rows in steps.locate(times))
    states = steps.after[:, torch.as_tensor(index)]
    inside = np.unique(index[theta < 1])
    for n, k in zip(inside, _replay(problem, steps, inside), strict=True):
        _check_step(steps, n, k)
        here = np.flatnonzero((index == n) & (theta < 1))
        states[:, here] = _dense(steps, n, k, theta[here])
    return states


def _evaluate_again(problem: ODEProblem, solution: ODESolution, times: np.ndarray) -> Tensor:
    """The solution at times, where no steps can be replayed; its last state is compared with what it was."""
    run = _run(problem, solution.alg, Options(**solution.options))
    states, last = _solve_at(problem, run, np.append(times, solution.t[-1])), solution.state[:, -1]
    error = replay_error(states[:, -1], last, last, 0.0, [])
    check_replay_error(float(error), last.dtype, problem.t[0])
    return states[:, :-1]


@dataclasses.dataclass(frozen=True)
class _Run:
    """How to solve: the method, the times to step to (None: its own choice), and the options."""

    method: Method
    times: np.ndarray | None
    options: Options

    @property
    def replayable(self) -> bool:
        """Whether each step depends on its start alone."""
        return self.method.tableau is not None and (self.method.fsal or self.times is not None)


def _run(problem: ODEProblem, alg: Any, options: Options) -> _Run:
    method = method_named(alg)
    if method.name == "scipy_solver" and (problem.is_span or options.steps is not None):
        raise ValueError("scipy_solver neither tells its steps nor takes given ones; give a grid t and steps=None")
    return _Run(method, step_times(problem, options.steps, method.adaptive, options.max_steps, alg), options)


class _Failure(Exception):
    """A solve that stopped: why, and at what time."""

    def __init__(self, reason: str, time: float) -> None:
        super().__init__(reason)
        self.reason, self.time = reason, time


def _check_field(problem: ODEProblem) -> None:
    """Raise unless f is a module that maps t, z [trial, unit] (and x_t) to z' [trial, unit], and does nothing else."""
    z0, f = problem.z0.detach(), problem.f
    _check_parameters(f, z0)
    t = torch.tensor(problem.t[0], dtype=z0.dtype, device=z0.device)
    if callable(problem.x):
        check_called_input(problem.x(t), z0)
    x = _inputs(problem)
    arguments = (t, z0.clone()) if x is None else (t, z0.clone(), x(t).clone())
    kept = [argument.clone() for argument in arguments]
    rate = _try(f, arguments)
    if not isinstance(rate, Tensor) or rate.shape != z0.shape or rate.dtype != z0.dtype:
        got = f"{tuple(rate.shape)} of {rate.dtype}" if isinstance(rate, Tensor) else type(rate).__name__
        raise ValueError(f"f returned {got}, expected z' {tuple(z0.shape)} of {z0.dtype}, like z0 [trial, unit]")
    if not all(map(torch.equal, arguments, kept)):
        raise ValueError("f writes to its arguments in place; work on copies (z = z + ..., not z += ...)")
    if not torch.allclose(rate, _try(f, arguments), rtol=0, atol=0, equal_nan=True):
        raise ValueError("f gave two results for the same arguments; make it deterministic (f.eval(), fixed noise)")


def _check_parameters(f: Any, z0: Tensor) -> None:
    if not isinstance(f, nn.Module):
        raise TypeError(
            f"f is {type(f).__name__}, expected an nn.Module as z0 is a torch tensor: a plain function does not name "
            "its parameters"
        )
    parameters = dict(f.named_parameters())
    if not parameters:
        raise ValueError("f has no parameters, so there is nothing to learn; make its constants nn.Parameter")
    for name, tensor in parameters.items():
        if tensor.dtype != z0.dtype and not tensor.is_complex():
            raise TypeError(
                f"parameter {name} is {tensor.dtype} but z0 is {z0.dtype}; use f.to(z0.dtype) or z0.to(...)"
            )
    check_module(f, z0)


def _try(f: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    try:
        return f(*arguments)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        given = ", ".join(f"{name} {tuple(a.shape)}" for name, a in zip(("t", "z", "x_t"), arguments, strict=False))
        raise ValueError(
            f"f failed on {given}: {error}. A field is called as f(t, z [trial, unit]), or f(t, z, x_t [trial, input]) "
            "where the problem has inputs x"
        ) from error


def _inputs(problem: ODEProblem) -> Callable[[Tensor], Tensor] | None:
    """x(t) [trial, input] of a 0-dim t; None for a problem without inputs."""
    if problem.x is None:
        return None
    if callable(problem.x):
        return lambda t: problem.x(t).expand(problem.z0.shape[0], -1)
    known, samples = sampled(problem) or (None, None)
    assert samples is not None
    known = torch.as_tensor(known, dtype=samples.dtype, device=samples.device)
    return lambda t: input_at(known, samples, t)


class _Watched:
    """f as torchdiffeq calls it, noting evaluations and steps, and stopping when they are too many."""

    def __init__(self, problem: ODEProblem, run: _Run) -> None:
        self.f, self.x, self.max_steps = problem.f, _inputs(problem), run.options.max_steps
        self.evaluations = self.tried = 0
        self.time, self.last = float(problem.t[0]), problem.z0
        self.steps: list[tuple[float, float, Tensor]] = []
        if run.method.embedded:
            self.callback_step, self.callback_accept_step = self._try_step, self._keep
        elif run.method.name != "scipy_solver":
            self.callback_step = self._keep

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        self.evaluations += 1
        self.last = z
        try:
            return self.f(t, z) if self.x is None else self.f(t, z, self.x(t))
        except AssertionError as error:  # not to be taken for one of torchdiffeq's own
            raise RuntimeError(f"f failed at t = {float(t):.6g}: {error}") from error

    def _try_step(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.time = float(t)
        if self.tried == self.max_steps:
            raise _Failure(f"reached max_steps = {self.max_steps}", self.time)
        self.tried += 1

    def _keep(self, t: Tensor, z: Tensor, dt: Tensor) -> None:
        self.steps.append((float(t), float(dt), z))

    @property
    def stats(self) -> dict[str, int]:
        """What was done."""
        counts = {"steps": len(self.steps), "rejected": max(self.tried - len(self.steps), 0)}
        return {**(counts if self.steps else {}), "evaluations": self.evaluations}


def _integrate(problem: ODEProblem, run: _Run, nodes: np.ndarray) -> tuple[Tensor, _Watched]:
    """The state at nodes [trial, time, unit] (the first is t0), and what was noted on the way."""
    watched, settings = _Watched(problem, run), _settings(problem, run, nodes)
    t = torch.as_tensor(nodes, dtype=torch.float64, device=problem.z0.device)
    try:
        state: Any = odeint(watched, problem.z0.detach(), t, method=run.method.name, **settings)
    except AssertionError as error:  # the steps shrank to nothing, or the state is not finite
        raise _Failure("left the finite numbers", watched.time) from error
    _check_finite(state, watched, nodes)
    return state.transpose(0, 1), watched


def _settings(problem: ODEProblem, run: _Run, nodes: np.ndarray) -> dict[str, Any]:
    """The arguments of odeint that make it take the wanted steps."""
    options, times = run.options, run.times
    settings: dict[str, Any] = {"rtol": options.rtol, "atol": options.atol}
    if times is None:
        # On a span the last step ends at the end of it; on a grid torchdiffeq reads the end from a step beyond it.
        exact = problem.is_span and run.method.embedded
        return settings | {"options": {"step_t": torch.as_tensor(problem.t[1:])} if exact else {}}
    given = torch.as_tensor(times, device=problem.z0.device)
    if not run.method.adaptive:
        interpolation = "linear" if np.isin(nodes, times).all() else "cubic"
        return settings | {"options": {"grid_constructor": lambda *_: given, "interp": interpolation}}
    # No error is too large, and each step would reach beyond the end were it not for the next given time. As the inner
    # ones are "jumps", f is evaluated again after each, on its own side of a discontinuity.
    far = 4 * (times[-1] - times[0])
    growth = {"first_step": far, "ifactor": far / np.diff(times).min()}
    return settings | {"atol": torch.inf, "options": {"jump_t": given[1:-1], "step_t": given[-1:], **growth}}


def _check_finite(state: Tensor, watched: _Watched, nodes: np.ndarray) -> None:
    """Raise at the first time where the state is not finite, or that the solver did not reach."""
    for time, _, before in watched.steps:
        if not torch.isfinite(before).all():
            raise _Failure("left the finite numbers", time)
    bad = (~torch.isfinite(state).flatten(1).all(1)).nonzero()
    if len(bad) or len(state) < len(nodes):
        raise _Failure("left the finite numbers", float(nodes[int(bad[0]) if len(bad) else len(state)]))


def _solve(problem: ODEProblem, run: _Run) -> ODESolution:
    state, watched = _integrate(problem, run, problem.t)
    steps = _accepted(problem, run, watched, state[:, -1]) if run.replayable else None
    nodes, weights = problem.t, trapezoid(problem.t)
    if problem.is_span:
        nodes, weights = gauss_points(np.append([t for t, _, _ in watched.steps], problem.t[-1]))
    if steps is not None:
        inside = _check_replay(problem, steps, nodes if problem.is_span else nodes[:0])
        state = inside if problem.is_span else state
    elif problem.is_span:
        state = _solve_at(problem, run, nodes)
    return ODESolution(
        problem=problem,
        state=state,
        t=nodes,
        alg=run.method.name,
        stats=watched.stats,
        start=problem.z0.detach().clone(),
        weights=weights,
        steps=steps,
        options=dataclasses.asdict(run.options),
    )


def _accepted(problem: ODEProblem, run: _Run, watched: _Watched, final: Tensor) -> AcceptedSteps:
    """The steps that torchdiffeq took, after one of length zero at t0."""
    tableau, start = run.method.tableau, problem.z0.detach().clone()
    assert tableau is not None
    t, dt, before = zip((float(problem.t[0]), 0.0, start), *watched.steps, strict=True)
    t, dt = np.array(t), np.array(dt)
    times = t[:, None] + tableau.c * dt[:, None]
    if run.method.adaptive:
        final = watched.last if run.method.fsal else final  # where its last stage is evaluated, which may be later
        times = _adaptive_stage_times(tableau.c, t, dt, _numpy_dtype(start), jumps=run.times is not None)
    after = torch.stack([start, *before[2:], final], 1)
    shared = [np.repeat(values[None], len(start), 0) for values in (t, dt, times)]
    return AcceptedSteps(tableau, shared[0], shared[1], torch.stack(before, 1), after, shared[2])


def _adaptive_stage_times(c: np.ndarray, t: np.ndarray, dt: np.ndarray, dtype: Any, jumps: bool) -> np.ndarray:
    """When torchdiffeq's adaptive methods evaluate f: in the dtype of the state, and never at the end of a step."""
    times = t.astype(dtype)[:, None] + c.astype(dtype) * dt.astype(dtype)[:, None]
    ends = (t + dt).astype(dtype)
    times[:, c == 1] = np.nextafter(ends, dtype(-np.inf))[:, None]
    times[2:, 0] = np.nextafter(ends[1:-1], dtype(np.inf)) if jumps else times[1:-1, -1]
    times[0] = t[0]
    return times.astype(np.float64)


def _numpy_dtype(z: Tensor) -> Any:
    return np.float32 if z.dtype == torch.float32 else np.float64


def _replay(problem: ODEProblem, steps: AcceptedSteps, which: Iterable[int]) -> Iterator[list[Tensor]]:
    """The stage derivatives of some of the steps."""
    x = _inputs(problem)
    times = torch.as_tensor(steps.stage_times[0], dtype=steps.after.dtype, device=steps.after.device)
    lengths = torch.as_tensor(steps.dt[0], dtype=steps.after.dtype, device=steps.after.device)

    def field(t: Tensor, z: Tensor, x_t: Tensor | None) -> Tensor:
        return problem.f(t, z) if x_t is None else problem.f(t, z, x_t)

    for n in which:
        inputs = [None if x is None else x(t) for t in times[n]]
        yield stages(field, steps.tableau, times[n].unbind(), lengths[n], steps.before[:, n], inputs)


def _dense(steps: AcceptedSteps, n: int, k: list[Tensor], theta: np.ndarray) -> Tensor:
    """The state within a step, at theta [n] of it: [trial, n, unit]."""
    weights = torch.as_tensor(steps.tableau.interpolation(theta), dtype=k[0].dtype, device=k[0].device)
    back = torch.einsum("ns,sbu->bnu", weights, torch.stack(k))
    return steps.after[:, n, None] + float(steps.dt[0, n]) * back


def _check_step(steps: AcceptedSteps, n: int, k: list[Tensor]) -> None:
    """Raise where the stage derivatives do not give the step that was taken."""
    before, after, h = steps.before[:, n], steps.after[:, n], float(steps.dt[0, n])
    error = replay_error(step(steps.tableau, h, before, k), before, after, h, k)
    check_replay_error(float(error), after.dtype, steps.t[0, n])


def _check_replay(problem: ODEProblem, steps: AcceptedSteps, nodes: np.ndarray) -> Tensor:
    """Replay all steps, compare with what the solver gave, and read the state at nodes inside of them."""
    index, theta = (rows[0] for rows in steps.locate(nodes))
    which, states = range(1, steps.dt.shape[1]), []
    for n, k in zip(which, _replay(problem, steps, which), strict=True):
        _check_step(steps, n, k)
        if (index == n).any():
            states.append(_dense(steps, n, k, theta[index == n]))
    return torch.cat(states, 1) if states else steps.after[:, :0]


def _solve_at(problem: ODEProblem, run: _Run, times: np.ndarray) -> Tensor:
    """The state at times, where no steps can be replayed: the solve once more, with its output there."""
    order = np.unique(np.concatenate([problem.t[:1], times, problem.t[-1:]]))
    state, _ = _integrate(problem, run, order)
    return state[:, torch.as_tensor(np.searchsorted(order, times))]


def _blame(problem: ODEProblem, run: _Run, failure: _Failure) -> SolveError:
    """Which trials fail, found by solving each alone, and the solution of the others."""
    trials = np.arange(problem.z0.shape[0])
    failures = {int(trial): reason for trial in trials if (reason := _failure_alone(problem, run, trial, failure))}
    rest, solution = np.setdiff1d(trials, list(failures)), None
    if failures and len(rest):
        try:
            solution = _solve(take_trials(problem, rest), run)
        except _Failure:
            solution = None
    return solve_error(failures or dict.fromkeys(trials.tolist(), (failure.reason, failure.time)), solution)


def _failure_alone(problem: ODEProblem, run: _Run, trial: int, failure: _Failure) -> tuple[str, float] | None:
    if problem.z0.shape[0] == 1:
        return failure.reason, failure.time
    try:
        _integrate(take_trials(problem, np.array([trial])), run, problem.t)
    except _Failure as alone:
        return alone.reason, alone.time
    return None
