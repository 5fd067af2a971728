"""Diffrax as a library that solves ODEs, keeping the steps that it accepts; its solvers as tableaus.

On a grid each trial is solved by itself, with its own steps; on a span all trials are one system, so that they share
the steps and with them the nodes.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from kpflow_dyn._arrays import finite_rows
from kpflow_dyn._arrays.sharding import empty_row, like_numpy, placed
from kpflow_dyn._arrays.sooner_jax import FEW, filter_jit
from kpflow_dyn._jax.complex_parts import real_leaves
from kpflow_dyn._jax.field import Field
from kpflow_dyn._problems.inputs import jumps_within, stops_of
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau
from kpflow_dyn._problems.translations import method_here
from kpflow_dyn.ode._libraries import Failed, Options, Solved

_CHUNK = 256
"""So many weights at once: one compilation serves any number of them."""

_STEPS = 256
"""Of a solve that takes long."""

_ROOM = 2**22
"""Numbers of a state's steps that there is room for at first: 32 MiB in float64."""


class Diffrax:
    """The solvers of diffrax, and subclasses of these."""

    name, framework = "diffrax", "jax"

    def accepts(self, alg: Any) -> bool:
        """Whether it is a solver."""
        return isinstance(alg, diffrax.AbstractSolver)

    def chooses_steps(self, alg: Any) -> bool:
        """Whether the solver estimates its error, and so can choose its steps; raises as `check_solver`."""
        solver = check_solver(alg)
        tableau = getattr(solver, "tableau", None)
        return isinstance(solver, diffrax.AbstractAdaptiveSolver) and (tableau is None or bool(tableau.b_error.any()))

    def solve(self, problem: ODEProblem, alg: diffrax.AbstractSolver, times: np.ndarray, options: Options) -> Solved:
        """See `kpflow_dyn.ode.Library`."""
        dtype = problem.z0.dtype
        for what, values in (("t", times), ("steps", options.steps)):
            if values is not None and (np.diff(values.astype(dtype)) <= 0).any():
                raise ValueError(f"{what} holds times closer than {dtype} can tell apart, which is the dtype of z0")
        alone, tableau = not problem.is_span or options.steps is not None, tableau_of(alg)
        record = _integrate(problem, alg, times, options, alone)
        if reasons := _reasons(problem, alg, options, record):
            raise Failed(reasons, apart=alone)
        stats = {"steps": np.asarray(record.accepted).max(), "rejected": np.asarray(record.rejected).max()}
        stats = {name: int(count) for name, count in stats.items()}
        edges = np.append(problem.t[0], np.asarray(record.t, np.float64)[0, : stats["steps"]])
        return Solved(tableau and _accepted(problem, tableau, record), record.state, stats, edges)


DIFFRAX = Diffrax()


def controller_of(
    problem: ODEProblem, solver: diffrax.AbstractSolver, options: Options
) -> diffrax.AbstractStepSizeController:
    """What chooses the steps, with its numbers as arrays, which are no reason to compile again."""
    dtype, jumps = problem.z0.dtype, jumps_within(problem)
    rtol, atol = jnp.asarray(options.rtol, dtype), jnp.asarray(options.atol, dtype)
    how: dict[str, Any] = {
        field.name: getattr(options.controller, field.name) for field in _FIELDS if options.controller
    }
    how |= {"rtol": rtol, "atol": atol}
    chosen = ChosenSteps(**how)
    if options.steps is None:
        return stopping(chosen, problem)
    given = diffrax.StepTo(jnp.asarray(options.steps, dtype))
    if len(jumps) or isinstance(solver, diffrax.AbstractImplicitSolver):
        adaptive = GivenSteps(steps=given, rtol=rtol, atol=atol, norm=chosen.norm)
        return stopping(adaptive, problem) if len(jumps) else adaptive
    return given


def stopping(
    controller: diffrax.AbstractAdaptiveStepSizeController, problem: ODEProblem
) -> diffrax.AbstractAdaptiveStepSizeController:
    """A controller whose steps stop where the inputs bend, and just before and after where they jump."""
    stops, dtype = stops_of(problem), problem.z0.dtype
    if not len(stops):
        return controller
    which: Any = {"jump_ts" if callable(problem.x) else "step_ts": jnp.asarray(stops, dtype)}
    return diffrax.ClipStepSizeController(controller, **which)


_FIELDS = dataclasses.fields(diffrax.PIDController)


def understood_controller(given: dict[str, Any]) -> dict[str, Any]:
    """Options with a stepsize_controller of diffrax, and its dt0, in the terms of the package."""
    rest = {name: value for name, value in given.items() if name not in ("stepsize_controller", "dt0")}
    controller, dt0 = given["stepsize_controller"], given.get("dt0")
    if isinstance(controller, diffrax.ConstantStepSize) and dt0 is not None:
        return rest | {"steps": float(dt0)}
    if isinstance(controller, diffrax.StepTo):
        return rest | {"steps": np.asarray(controller.ts)}
    if isinstance(controller, diffrax.PIDController) and dt0 is None:
        tolerances = {name: _tolerance(controller, name) for name in ("rtol", "atol")}
        if other := [name for name, value in tolerances.items() if given.get(name, value) != value]:
            raise TypeError(f"stepsize_controller has {', '.join(other)} of its own; give one of the two")
        return rest | tolerances | {"controller": controller}
    ways = {
        diffrax.ConstantStepSize: "needs dt0=; or give steps=dt0",
        diffrax.PIDController: "chooses the first step itself; leave dt0 out",
        diffrax.ClipStepSizeController: (
            "has jump_ts or step_ts, which here are the jumps of a callable input, x.jumps = times, and the samples of "
            "x, at which steps end by themselves; give its inner controller, and the times so"
        ),
    }
    way = next((way for kind, way in ways.items() if isinstance(controller, kind)), "is not known; give rtol=, atol=")
    raise TypeError(f"stepsize_controller, a {type(controller).__name__}, {way}, or steps= for steps of your own")


def _tolerance(controller: diffrax.PIDController, name: str) -> float:
    value = np.asarray(getattr(controller, name))
    if value.ndim:
        raise TypeError(f"{name} of stepsize_controller has shape {value.shape}, expected one number for all units")
    return float(value)


class _Record(eqx.Module):
    """What a solve gave; M is the number of steps there is room for, those not taken end at inf."""

    state: jax.Array  # at the times asked for [trial, time, unit]
    t: jax.Array  # the end of each step [trial, M]
    after: jax.Array  # the state there [trial, M, unit]
    hk: jax.Array | None  # of an implicit method whose stages diffrax keeps: h times these [trial, M, stage, unit]
    accepted: jax.Array  # the number of steps [trial]
    rejected: jax.Array
    exhausted: jax.Array  # whether there were too many [trial]


def _integrate(
    problem: ODEProblem, solver: diffrax.AbstractSolver, times: np.ndarray, options: Options, alone: bool
) -> _Record:
    """Solve, with room for more and more steps until they suffice: room takes memory, and time to clear it."""
    most = options.max_steps if options.steps is None else len(options.steps) - 1
    room = most if options.steps is not None else min(max(_ROOM // problem.z0.size, 64), most)
    controller, wanted = controller_of(problem, solver, options), jnp.asarray(times, problem.z0.dtype)
    while True:
        solve = filter_jit(_solve, _STEPS * problem.z0.size <= FEW)
        record = solve(Field(problem), problem.z0, wanted, solver, controller, room, alone)
        if room == most or not record.exhausted.any():
            return record
        room = min(8 * room, most)


def _solve(
    field: Field,
    z0: jax.Array,
    times: jax.Array,
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    room: int,
    alone: bool,
) -> _Record:
    """Solve each trial alone, or all as one system."""
    tableau, subs = tableau_of(solver), {"steps": diffrax.SubSaveAt(steps=True), "state": diffrax.SubSaveAt(ts=times)}
    keeps_k = tableau is not None and not tableau.explicit and hasattr(solver, "tableau")
    saveat, ends = diffrax.SaveAt(subs=subs, dense=keeps_k), (times[0], times[-1])
    solved = integrate(field, z0, ends, solver, controller, room, alone, saveat)
    counts = solved.stats["num_accepted_steps"], solved.stats["num_rejected_steps"]
    exhausted = solved.result == diffrax.RESULTS.max_steps_reached
    hk = solved.interpolation.infos["k"] if keeps_k else None
    record = _Record(solved.ys["state"], solved.ts["steps"], solved.ys["steps"], hk, *counts, exhausted)
    return record if alone else _by_trial(record, len(z0))


def integrate(
    field: Field,
    z0: jax.Array,
    ends: tuple[jax.Array, jax.Array],
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    max_steps: int,
    alone: bool,
    saveat: diffrax.SaveAt,
    **options: Any,
) -> Any:
    """The diffrax solution of each trial, with a trial axis in front, or that of all as one system."""

    leaves, restored = real_leaves(field)  # diffrax warns of complex numbers, as parameters too

    def rate(t: Any, z: jax.Array, args: tuple[list[Any], jax.Array]) -> jax.Array:
        field, trial = restored(args[0]), args[1]
        return field(t, z, trial) if z.ndim == 1 else jax.vmap(field, (None, 0, 0))(t, z, trial)

    def solve(z: jax.Array, trial: jax.Array) -> Any:
        settings = {"saveat": saveat, "stepsize_controller": controller, "max_steps": max_steps, **options}
        return diffrax.diffeqsolve(
            diffrax.ODETerm(rate), solver, *ends, None, z, (leaves, trial), throw=False, **settings
        )

    trials = jnp.arange(len(z0))
    return jax.vmap(solve)(z0, trials) if alone else solve(z0, trials)


def _by_trial(record: _Record, trials: int) -> _Record:
    """What the solve of one system gave, with a trial axis in front as if each had been solved alone."""
    shared = (record.t, record.accepted, record.rejected, record.exhausted)
    t, *counts = (jnp.broadcast_to(value, (trials, *value.shape)) for value in shared)
    hk = None if record.hk is None else jnp.moveaxis(record.hk, 2, 0)
    return _Record(record.state.swapaxes(0, 1), t, record.after.swapaxes(0, 1), hk, *counts)


def _reasons(
    problem: ODEProblem, solver: diffrax.AbstractSolver, options: Options, record: _Record
) -> dict[int, tuple[str, float]]:
    """Why and when each trial failed."""
    finite, ends = finite_rows(record.after), np.asarray(record.t)
    taken, end = np.isfinite(ends), problem.t[-1].astype(ends.dtype)
    last = np.where(taken, ends, problem.t[0]).max(1)
    reasons = {}
    for trial in range(len(ends)):
        bad = np.flatnonzero(taken[trial] & ~finite[trial])
        if len(bad):
            reasons[trial] = "left the finite numbers", float(ends[trial, bad[0]])
        elif last[trial] != end:
            reasons[trial] = _why_stopped(solver, options, bool(record.exhausted[trial])), float(last[trial])
    return reasons


def _why_stopped(solver: diffrax.AbstractSolver, options: Options, exhausted: bool) -> str:
    if exhausted:
        return f"reached max_steps = {options.max_steps}"
    given_and_implicit = options.steps is not None and isinstance(solver, diffrax.AbstractImplicitSolver)
    return "did not converge in an implicit step" if given_and_implicit else "left the finite numbers"


def _accepted(problem: ODEProblem, tableau: Tableau, record: _Record) -> AcceptedSteps:
    """The steps that diffrax took, after one of length zero at t0 and padded at the end."""
    count = int(np.asarray(record.accepted).max())
    ends = np.asarray(record.t)[:, :count]
    ends = np.where(np.isfinite(ends), ends, ends[np.isfinite(ends)].max())
    times = np.concatenate([np.full((len(ends), 1), problem.t[0], ends.dtype), ends], 1)
    row = empty_row(problem.z0, of_trials=True)
    found = _of_steps(record, np.asarray(problem.z0), times, count, tableau.explicit)
    states, stages = (None if a is None else placed(like_numpy(a, problem.z0), row, -a.ndim) for a in found)
    begins = np.concatenate([times[:, :1], times[:, :-1]], 1)
    return AcceptedSteps.between(tableau, _before_jumps(times, jumps_within(problem)), states, stages, begins=begins)


def _before_jumps(times: np.ndarray, jumps: np.ndarray) -> np.ndarray:
    """Where steps ended, of times where the next ones begin: at a jump diffrax tells the time just after it."""
    jumps = jumps.astype(times.dtype)
    before, after = beside(jumps, jumps, -np.inf), beside(jumps, jumps, np.inf)
    where = np.minimum(np.searchsorted(after, times), len(jumps) - 1)
    return np.where(np.isin(times, after), before[where], times) if len(jumps) else times


def beside(times: np.ndarray, jumps: np.ndarray, direction: float) -> np.ndarray:
    """Times, those that are jumps moved to the next number up (inf) or down (-inf), as diffrax does.

    The one beside zero is not denormal, as XLA takes such numbers for zero.
    """
    smallest = np.copysign(np.finfo(times.dtype).tiny, direction)
    moved = np.where(times == 0, smallest, np.nextafter(times, times.dtype.type(direction)))
    return np.where(np.isin(times, jumps), moved, times)


def _of_steps(
    record: _Record, z0: np.ndarray, times: np.ndarray, count: int, is_explicit: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """z0 and the state after each step [trial, 1 + count, unit], and the stages of an implicit method, zeros first.

    By numpy, as JAX compiles it for each number of steps.
    """
    accepted, after = np.asarray(record.accepted), np.asarray(record.after)[:, :count]
    taken, last = np.arange(count) < accepted[:, None], after[np.arange(len(after)), accepted - 1]
    states = np.concatenate([z0[:, None], np.where(taken[..., None], after, last[:, None])], 1)
    if is_explicit:
        return states, None
    # Of one stage where diffrax does not keep it.
    hk = np.diff(states, axis=1)[:, :, None] if record.hk is None else np.asarray(record.hk)[:, :count]
    h = np.where(taken, np.diff(times, axis=1), 1)
    k = np.where(taken[..., None, None], hk / h[..., None, None], 0)
    return states, np.concatenate([np.zeros_like(k[:, :1]), k], 1)


def check_solver(solver: Any) -> diffrax.AbstractSolver:
    """Raise unless this is an instance of a diffrax solver for a field of one term."""
    if inspect.isclass(solver) and issubclass(solver, diffrax.AbstractSolver):
        raise TypeError(f"alg is the class {solver.__name__}, expected an instance: diffrax.{solver.__name__}()")
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(
            f"alg is {solver!r}; z0 is a jax array, so diffrax solves, expected one of its solvers, diffrax.Tsit5()"
            f"{method_here(solver, 'jax')}"
        )
    structure = typing.get_origin(solver.term_structure) or solver.term_structure
    if not (inspect.isclass(structure) and issubclass(diffrax.ODETerm, structure)):
        raise TypeError(
            f"{type(solver).__name__} solves fields that are split into several terms, and here f is their sum; take "
            "diffrax.Tsit5(), diffrax.Kvaerno5() for a stiff problem; 'leapfrog' or SemiImplicitEuler() of a pair"
        )
    return solver


def tableau_of(solver: diffrax.AbstractSolver) -> Tableau | None:
    """The tableau of a Runge-Kutta solver; None for others, whose steps depend on those before them."""
    return _tableau(type(solver))


@lru_cache
def _tableau(solver: type[diffrax.AbstractSolver]) -> Tableau | None:
    interpolation: Any = solver.interpolation_cls
    known = getattr(solver, "tableau", None)
    if isinstance(known, diffrax.ButcherTableau):
        a = np.zeros((known.num_stages, known.num_stages))
        for row, values in enumerate(known.a_lower, 1):
            a[row, :row] = values
        a += 0 if known.a_diagonal is None else np.diag(known.a_diagonal)
        return Tableau(a, known.b_sol, np.append(known.c1, known.c), _weights(interpolation, known.b_sol))
    if solver in (diffrax.Euler, diffrax.ImplicitEuler):
        implicit = float(solver is diffrax.ImplicitEuler)
        weights = _weights(lambda k, **rest: interpolation(**rest), np.ones(1))
        return Tableau(np.full((1, 1), implicit), np.ones(1), np.full(1, implicit), weights)
    return None


def _weights(interpolation: Callable[..., Any], b: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What diffrax's interpolation, which is linear, makes of unit stages: y_1 = 0, so y_0 = -sum_i b_i k_i."""

    @jax.jit
    def of_chunk(theta: jax.Array) -> jax.Array:
        start, end = jnp.asarray(-b, theta.dtype), jnp.zeros(len(b), theta.dtype)
        k = jnp.eye(len(b), dtype=theta.dtype)
        local = interpolation(t0=jnp.zeros((), theta.dtype), t1=jnp.ones((), theta.dtype), y0=start, y1=end, k=k)
        return jax.vmap(local.evaluate)(theta)

    def weights(theta: np.ndarray) -> np.ndarray:
        theta = np.asarray(theta, np.float64)
        padded = np.pad(theta.ravel(), (0, -theta.size % _CHUNK)).reshape(-1, _CHUNK)
        with jax.enable_x64(True):
            w = np.array([of_chunk(chunk) for chunk in padded]).reshape(-1, len(b))[: theta.size]
        return np.where(theta[..., None] == 1, 0.0, w.reshape(*theta.shape, len(b)))

    return weights


class GivenSteps(diffrax.AbstractAdaptiveStepSizeController):
    """Steps to given times, with tolerances for the root finder of an implicit method."""

    steps: diffrax.StepTo
    rtol: Any
    atol: Any
    norm: Callable[..., Any]

    def wrap(self, direction: Any) -> GivenSteps:
        return dataclasses.replace(self, steps=self.steps.wrap(direction))

    def init(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.init(*args, **kwargs)

    def adapt_step_size(self, *args: Any, **kwargs: Any) -> Any:
        return self.steps.adapt_step_size(*args, **kwargs)


class ChosenSteps(diffrax.PIDController):
    """Steps by diffrax's controller, ending the solve where they shrink to the round-off of the time."""

    def adapt_step_size(self, *args: Any, **kwargs: Any) -> Any:
        chosen: Any = super().adapt_step_size(*args, **kwargs)
        kept, t0, t1, *_, result = chosen
        # A step may be as short after one that ended at a stop.
        vanished = ~kept & (t1 - t0 <= 4 * jnp.finfo(t0.dtype).eps * jnp.abs(t0))
        return (*chosen[:-1], diffrax.RESULTS.where(vanished, diffrax.RESULTS.dt_min_reached, result))
