"""Solve an ODE with diffrax, keeping the steps that it accepted.

On a grid each trial is solved by itself, with its own steps; on a span all trials are one system, so that they share
the steps and with them the nodes. Each step of an explicit method is replayed by its tableau, and what that gives is
compared with what diffrax gave.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kpflow_dyn._arrays import take_at
from kpflow_dyn._jax.checks import check_parameters
from kpflow_dyn._jax.methods import ChosenSteps, GivenSteps, check_solver, is_adaptive, tableau_of
from kpflow_dyn._problems.inputs import check_called_input, input_at, input_row, sampled, step_times, take_trials
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.quadrature import gauss_points, trapezoid
from kpflow_dyn._problems.solutions import ODESolution, Options, solve_error
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau, check_replay_error, replay_error, stages, step

_POINTS = 3
"""Gauss points in each step."""

_ROOM = 2**22
"""Numbers of a state's steps that there is room for at first: 32 MiB in float64."""


def solve_ode(problem: ODEProblem, alg: Any, options: Options) -> ODESolution:
    """The solution of an ODE by a solver of diffrax; see `kpflow_dyn.solve`."""
    run = _run(problem, check_solver(diffrax.Tsit5() if alg is None else alg), options)
    _check_field(problem)
    record = _integrate(problem, run)
    failures = _failures(problem, run, record)
    if not failures:
        return _solution(problem, run, record)
    rest, solution = np.setdiff1d(np.arange(len(problem.z0)), list(failures)), None
    if len(rest):
        solution = _solution_of_rest(take_trials(problem, rest), run, record, rest)
    raise solve_error(failures, solution)


def evaluate(solution: ODESolution, times: np.ndarray) -> jax.Array:
    """The solution at times [n], [trial, n, unit], by the dense output of its method."""
    problem, steps = solution.problem, solution.steps
    if steps is None:
        run = _run(problem, solution.alg, Options(**solution.options))
        order = np.unique(np.concatenate([problem.t[:1], times, problem.t[-1:]]))
        return _at_nodes(problem, run, order)[:, np.searchsorted(order, times)]
    index, theta = steps.locate(times)
    weights = steps.tableau.interpolation(theta)
    dt, at, weights = (jnp.asarray(values, problem.z0.dtype) for values in (steps.dt, steps.stage_times, weights))
    return _read(
        _Field(problem), steps.tableau, jnp.asarray(index), dt, at, weights, steps.before, steps.after, steps.stages
    )


@dataclass(frozen=True)
class _Run:
    """How to solve: the solver, its tableau if it has one, the times to step to (None: its own choice), the options."""

    solver: diffrax.AbstractSolver
    tableau: Tableau | None
    times: np.ndarray | None
    options: Options

    def controller(self, dtype: Any) -> tuple[diffrax.AbstractStepSizeController, int]:
        """What chooses the steps, and how many there may be at most."""
        # As arrays, which are no reason to compile again.
        rtol, atol = jnp.asarray(self.options.rtol, dtype), jnp.asarray(self.options.atol, dtype)
        chosen = ChosenSteps(rtol, atol)
        if self.times is None:
            return chosen, self.options.max_steps
        given = diffrax.StepTo(jnp.asarray(self.times, dtype))
        if isinstance(self.solver, diffrax.AbstractImplicitSolver):
            return GivenSteps(steps=given, rtol=rtol, atol=atol, norm=chosen.norm), len(self.times) - 1
        return given, len(self.times) - 1


def _run(problem: ODEProblem, solver: diffrax.AbstractSolver, options: Options) -> _Run:
    name, dtype = type(solver).__name__, problem.z0.dtype
    times = step_times(problem, options.steps, is_adaptive(solver), options.max_steps, name)
    for what, values in (("t", problem.t), ("steps", times)):
        if values is not None and (np.diff(values.astype(dtype)) <= 0).any():
            raise ValueError(f"{what} holds times closer than {dtype} can tell apart, which is the dtype of z0")
    return _Run(solver, tableau_of(solver), times, options)


class _Field(eqx.Module):
    """f of one trial with its inputs: field(t, z [unit], trial)."""

    f: Any
    x: Any
    times: jax.Array | None
    samples: jax.Array | None

    def __init__(self, problem: ODEProblem) -> None:
        known = sampled(problem)
        self.f = problem.f
        self.x = problem.x if callable(problem.x) else None
        self.times, self.samples = (None, None) if known is None else (jnp.asarray(known[0], known[1].dtype), known[1])

    def __call__(self, t: jax.Array, z: jax.Array, trial: Any) -> jax.Array:
        x = self.input(t, trial)
        return self.f(t, z) if x is None else self.f(t, z, x)

    def input(self, t: jax.Array, trial: Any) -> jax.Array | None:
        """x(t) [input]."""
        if self.x is not None:
            return input_row(self.x(t), trial)
        return None if self.samples is None else input_at(self.times, self.samples, t, trial)


def _check_field(problem: ODEProblem) -> None:
    """Raise unless f holds parameters and maps t, z [unit] (and x_t) to z' [unit]."""
    z0, f = problem.z0, problem.f
    check_parameters(f, z0)
    for path, leaf in jax.tree_util.tree_flatten_with_path(f)[0]:
        if isinstance(leaf, np.ndarray):
            raise TypeError(f"{jax.tree_util.keystr(path)} of f is a numpy array, expected a jax one: jnp.asarray(...)")
    t = jnp.asarray(problem.t[0], z0.dtype)
    if callable(problem.x):
        check_called_input(problem.x(t), z0)
    field = _Field(problem)
    x = field.input(t, 0)
    arguments = (t, z0[0]) if x is None else (t, z0[0], x)
    try:
        rate = eqx.filter_eval_shape(f, *arguments)
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        given = ", ".join(f"{name} {a.shape}" for name, a in zip(("t", "z", "x_t"), arguments, strict=False))
        raise ValueError(
            f"f failed on {given}: {error}. A field in JAX is called on one trial, as f(t, z [unit]), or f(t, z, x_t "
            "[input]) where the problem has inputs x"
        ) from error
    if not eqx.is_array(rate) and not isinstance(rate, jax.ShapeDtypeStruct):
        raise ValueError(f"f returned {type(rate).__name__}, expected z' {z0.shape[1:]} of {z0.dtype}")
    if rate.shape != z0.shape[1:] or rate.dtype != z0.dtype:
        raise ValueError(
            f"f returned {rate.shape} of {rate.dtype}, expected z' {z0.shape[1:]} of {z0.dtype}, like z0[0]"
        )


class _Record(eqx.Module):
    """What a solve gave; M is the number of steps there is room for, those not taken end at inf.

    Attributes:
        nodes: the state at the times asked for [trial, time, unit].
        t: the end of each step [trial, M].
        after: the state there [trial, M, unit].
        k: the stage derivatives [trial, M, stage, unit] of an implicit method.
        inside: the state at the Gauss points of each step [trial, M, point, unit].
        errors: how far the replay of each step is from it [trial, M].
        accepted, rejected: the numbers of steps [trial].
        exhausted: whether there were too many [trial].
    """

    nodes: jax.Array | None
    t: jax.Array
    after: jax.Array
    k: jax.Array | None
    inside: jax.Array | None
    errors: jax.Array | None
    accepted: jax.Array
    rejected: jax.Array
    exhausted: jax.Array


def _integrate(problem: ODEProblem, run: _Run, nodes: np.ndarray | None = None, alone: bool = False) -> _Record:
    """Solve, with room for more and more steps until they suffice: room takes memory, and time to clear it."""
    dtype, (controller, most) = problem.z0.dtype, run.controller(problem.z0.dtype)
    nodes = problem.t if nodes is None and not problem.is_span else nodes
    alone = alone or not problem.is_span or run.times is not None
    weights = None
    if run.tableau is not None and problem.is_span:
        weights = jnp.asarray(run.tableau.interpolation(gauss_points(np.array([0.0, 1.0]), _POINTS)[0]), dtype)
    t0, t1 = jnp.asarray(problem.t[0], dtype), jnp.asarray(problem.t[-1], dtype)
    wanted = None if nodes is None else jnp.asarray(nodes, dtype)
    room = most if run.times is not None else min(max(_ROOM // problem.z0.size, 64), most)
    while True:
        record = _compiled(
            _Field(problem), problem.z0, t0, t1, wanted, run.solver, run.tableau, controller, weights, room, alone
        )
        if room == most or not record.exhausted.any():
            return record
        room = min(8 * room, most)


def _at_nodes(problem: ODEProblem, run: _Run, times: np.ndarray) -> jax.Array:
    state = _integrate(problem, run, times).nodes
    assert state is not None
    return state


@eqx.filter_jit
def _compiled(
    field: _Field,
    z0: jax.Array,
    t0: jax.Array,
    t1: jax.Array,
    nodes: jax.Array | None,
    solver: diffrax.AbstractSolver,
    tableau: Tableau | None,
    controller: diffrax.AbstractStepSizeController,
    weights: jax.Array | None,
    room: int,
    alone: bool,
) -> _Record:
    """Solve each trial alone, or all as one system, and replay the steps."""
    implicit = tableau is not None and not tableau.explicit
    wanted = {"steps": diffrax.SubSaveAt(steps=True)}
    wanted |= {} if nodes is None else {"nodes": diffrax.SubSaveAt(ts=nodes)}
    saveat = diffrax.SaveAt(subs=wanted, dense=implicit and hasattr(solver, "tableau"))

    def solve(z: jax.Array, trial: jax.Array) -> dict[str, Any]:
        rate: Any = field if z.ndim == 1 else jax.vmap(field, (None, 0, 0))
        solved: Any = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, trial: rate(t, y, trial)),
            solver,
            t0,
            t1,
            None,
            z,
            trial,
            saveat=saveat,
            stepsize_controller=controller,
            max_steps=room,
            throw=False,
        )
        return {
            "t": solved.ts["steps"],
            "state": solved.ys,
            "k": solved.interpolation.infos["k"] if saveat.dense else None,
            "accepted": solved.stats["num_accepted_steps"],
            "rejected": solved.stats["num_rejected_steps"],
            "exhausted": solved.result == diffrax.RESULTS.max_steps_reached,
        }

    trials = jnp.arange(len(z0))
    out = jax.vmap(solve)(z0, trials) if alone else _by_trial(solve(z0, trials), len(z0))
    return _replay(field, tableau, z0, t0, weights, out)


def _by_trial(out: dict[str, Any], trials: int) -> dict[str, Any]:
    """What the solve of one system gave, with a trial axis in front as if each had been solved alone."""
    shared = {key: jnp.broadcast_to(value, (trials, *value.shape)) for key, value in out.items() if _is_shared(key)}
    state = {key: value.swapaxes(0, 1) for key, value in out["state"].items()}
    return shared | {"state": state, "k": None if out["k"] is None else jnp.moveaxis(out["k"], 2, 0)}


def _is_shared(key: str) -> bool:
    return key not in ("state", "k")


def _replay(
    field: _Field, tableau: Tableau | None, z0: jax.Array, t0: jax.Array, weights: jax.Array | None, out: dict[str, Any]
) -> _Record:
    """Compare each step with its replay, and read the state inside of it."""
    taken, after = jnp.isfinite(out["t"]), out["state"]["steps"]
    begin = jnp.concatenate([jnp.broadcast_to(t0, (len(z0), 1)), out["t"][:, :-1]], 1)
    h = jnp.where(taken, out["t"] - begin, 0)
    before = jnp.concatenate([z0[:, None], after[:, :-1]], 1)
    k, errors, inside = out["k"], None, None
    if tableau is not None and tableau.explicit:
        taken_steps = (begin, out["t"], h, before, after)
        errors, inside = _replay_explicit(field, tableau, taken_steps, weights, out["accepted"])
        errors = jnp.where(taken, errors, 0)
    elif tableau is not None:
        k = (after - before)[:, :, None] if k is None else k  # of one stage
        inside = None if weights is None else after[:, :, None] + jnp.einsum("ps,tnsu->tnpu", weights, k)
        k = k / jnp.where(h > 0, h, 1)[..., None, None]
    nodes, counts = out["state"].get("nodes"), {key: out[key] for key in ("accepted", "rejected", "exhausted")}
    return _Record(nodes=nodes, t=out["t"], after=after, k=k, inside=inside, errors=errors, **counts)


def _replay_explicit(
    field: _Field, tableau: Tableau, steps: tuple[Any, ...], weights: jax.Array | None, accepted: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    trials = jnp.arange(len(accepted))

    def replayed(begin: Any, end: Any, h: Any, before: Any, after: Any, trial: Any) -> tuple[Any, Any]:
        times = [end if c == 1 else begin + c * h for c in tableau.c.tolist()]
        k = _stages(field, tableau, times, h, before, trial)
        read = None if weights is None else after + h * (weights @ jnp.stack(k))
        return replay_error(step(tableau, h, before, k), before, after, h, k), read

    def body(n: Any, found: tuple[Any, Any]) -> tuple[Any, Any]:
        begin, end, h, before, after = (values[:, n] for values in steps)
        new = jax.vmap(replayed)(begin, end, h, before, after, trials)
        return jax.tree.map(lambda all_steps, here: all_steps.at[:, n].set(here), found, new)

    after = steps[-1]
    inside = None if weights is None else jnp.zeros((*after.shape[:2], len(weights), after.shape[2]), after.dtype)
    return lax.fori_loop(0, accepted.max(), body, (jnp.zeros(after.shape[:2], after.dtype), inside))


def _stages(field: _Field, tableau: Tableau, times: list[Any], h: Any, y: jax.Array, trial: Any) -> list[jax.Array]:
    return stages(lambda t, z, _: field(t, z, trial), tableau, times, h, y, [None] * len(times))


@eqx.filter_jit
def _read(
    field: _Field,
    tableau: Tableau,
    index: jax.Array,
    dt: jax.Array,
    times: jax.Array,
    weights: jax.Array,
    before: jax.Array,
    after: jax.Array,
    k: jax.Array | None,
) -> jax.Array:
    """The dense output y_1 + h sum_i w_i k_i [trial, n, unit] of steps index [trial, n], weights [trial, n, stage]."""

    def one(n: Any, weights: jax.Array, steps: tuple[Any, ...], trial: Any) -> jax.Array:
        h, times, before, after, k = jax.tree.map(lambda values: values[n], steps)
        k = jnp.stack(_stages(field, tableau, list(times), h, before, trial)) if k is None else k
        return after + h * (weights @ k)

    def at(place: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jax.vmap(one)(*place, (dt, times, before, after, k), jnp.arange(len(dt)))

    return lax.map(at, (index.T, weights.swapaxes(0, 1))).swapaxes(0, 1)


def _failures(problem: ODEProblem, run: _Run, record: _Record) -> dict[int, tuple[str, float]]:
    """Why and when each trial failed; where all were one system, which of them fail alone."""
    reasons = _reasons(problem, run, record)
    if reasons and problem.is_span and run.times is None and len(problem.z0) > 1:
        return _reasons(problem, run, _integrate(problem, run, alone=True)) or reasons
    return reasons


def _reasons(problem: ODEProblem, run: _Run, record: _Record) -> dict[int, tuple[str, float]]:
    finite, ends = np.asarray(jnp.isfinite(record.after).all(-1)), np.asarray(record.t)
    taken, end = np.isfinite(ends), problem.t[-1].astype(ends.dtype)
    last = np.where(taken, ends, problem.t[0]).max(1)
    reasons = {}
    for trial in range(len(ends)):
        bad = np.flatnonzero(taken[trial] & ~finite[trial])
        if len(bad):
            reasons[trial] = "left the finite numbers", float(ends[trial, bad[0]])
        elif last[trial] != end:
            reasons[trial] = _why_stopped(run, bool(record.exhausted[trial])), float(last[trial])
    return reasons


def _why_stopped(run: _Run, exhausted: bool) -> str:
    if exhausted:
        return f"reached max_steps = {run.options.max_steps}"
    given_and_implicit = run.times is not None and isinstance(run.solver, diffrax.AbstractImplicitSolver)
    return "did not converge in an implicit step" if given_and_implicit else "left the finite numbers"


def _solution_of_rest(problem: ODEProblem, run: _Run, record: _Record, rest: np.ndarray) -> ODESolution | None:
    """The solution of the trials that did not fail."""
    if problem.is_span:
        record = _integrate(problem, run)
        return None if _failures(problem, run, record) else _solution(problem, run, record)
    return _solution(problem, run, jax.tree.map(lambda values: values[rest], record))


def _solution(problem: ODEProblem, run: _Run, record: _Record) -> ODESolution:
    steps = None if run.tableau is None else _accepted(problem, run.tableau, record)
    state, nodes, weights = record.nodes, problem.t, trapezoid(problem.t)
    if problem.is_span:
        count = int(record.accepted[0])
        edges = np.append(problem.t[0], np.asarray(record.t[0, :count], np.float64))
        nodes, weights = gauss_points(edges, _POINTS)
        if record.inside is None:
            state = _at_nodes(problem, run, nodes)
        else:
            state = record.inside[:, :count].reshape((len(problem.z0), len(nodes), -1))
    stats = {"steps": int(record.accepted.max()), "rejected": int(record.rejected.max())}
    options = dataclasses.asdict(run.options)
    return ODESolution(
        problem=problem,
        state=state,
        t=nodes,
        alg=run.solver,
        stats=stats,
        start=problem.z0,
        weights=weights,
        steps=steps,
        options=options,
    )


def _accepted(problem: ODEProblem, tableau: Tableau, record: _Record) -> AcceptedSteps:
    """The steps that diffrax took, after one of length zero at t0 and padded at the end."""
    count, z0 = int(record.accepted.max()), problem.z0
    ends, after = np.asarray(record.t[:, :count]), record.after[:, :count]
    taken, first = np.isfinite(ends), np.full((len(z0), 1), problem.t[0], ends.dtype)
    _check_replay(record, first, ends)
    final = take_at(after[None], np.asarray(record.accepted)[:, None] - 1)[0]
    after = jnp.concatenate([z0[:, None], jnp.where(taken[..., None], after, final)], 1)
    ends = np.concatenate([first, np.where(taken, ends, ends[taken].max())], 1)
    begins = np.concatenate([first, ends[:, :-1]], 1)
    before = jnp.concatenate([z0[:, None], after[:, :-1]], 1)
    k = None
    if record.k is not None:
        k = jnp.where(taken[..., None, None], record.k[:, :count], 0)
        k = jnp.concatenate([jnp.zeros_like(k[:, :1]), k], 1)
    t, dt = begins.astype(np.float64), (ends - begins).astype(np.float64)
    return AcceptedSteps(tableau, t, dt, before, after, stages=k)


def _check_replay(record: _Record, first: np.ndarray, ends: np.ndarray) -> None:
    if record.errors is None:
        return
    errors = np.asarray(record.errors)[:, : ends.shape[1]]
    trial, worst = np.unravel_index(np.argmax(np.where(np.isnan(errors), np.inf, errors)), errors.shape)
    begin = float(np.concatenate([first, ends], 1)[trial, worst])
    check_replay_error(float(errors[trial, worst]), errors.dtype, begin)
