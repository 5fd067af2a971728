"""Delay differential equations by the method of steps: Runge-Kutta steps that look up what is behind them.

A step is no longer than the shortest delay, so that delayed states lie between states that are known. They are read
off these by polynomials, whose weights are data. Derivatives of the solution jump at t0 and at sums of delays after
it: steps end there, and no polynomial goes across.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, side_by_side
from kpflow_dyn._arrays.memory import bytes_of, require
from kpflow_dyn._problems.delayed import DDEProblem
from kpflow_dyn._problems.forms import called_as
from kpflow_dyn._problems.inputs import input_width, inputs_at, stops_of
from kpflow_dyn._problems.starts import OfStates
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._stepping.grid import MOST_STEPS, ROUND_OFF, given_steps, inputs_at_start, merged, run_steps, step_times


@dataclass(frozen=True)
class Method:
    """An explicit Runge-Kutta method, and how many states a polynomial goes through that is of its order."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    points: int

    @property
    def behind(self) -> int:
        """Into how many steps the shortest delay is cut at least: then polynomials find their points behind a step."""
        return max(1, self.points - 1 + (self.points > 2))


METHODS = {
    "euler": Method(((),), (1.0,), (0.0,), 1, 2),
    "heun": Method(((), (1.0,)), (0.5, 0.5), (0.0, 1.0), 2, 2),
    "rk4": Method(((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0), 4, 4),
}


@dataclass(frozen=True)
class DelayedStep:
    """(f, row, line) -> line, with line = [z_n, z_{n-1}, ..., z_{n-L}] the states that later steps look up.

    A row is [h, t_1, ..., t_s], then of each stage and delay the weights of the states of the line and what history
    adds, then the inputs of each stage. In torch, where f takes all trials at once, they share all but the last two.
    """

    method: Method
    units: int
    delays: int
    length: int  # how many states the line has
    inputs: int | None

    def __call__(self, f: Any, row: Array, line: Array) -> Array:
        """The step of f on this row."""
        xp, stages = array_namespace(line), len(self.method.b)
        first = row if row.ndim == 1 else row[0]  # all trials of torch have the times of the first
        h, z = first[0], line[..., : self.units]
        states, k = line.reshape((*line.shape[:-1], self.length, self.units)), []
        for i, a in enumerate(self.method.a):
            delayed = tuple(self._delayed(first, row, states, i * self.delays + d) for d in range(self.delays))
            at = 1 + stages * (1 + self.delays * (self.length + self.units)) + i * (self.inputs or 0)
            x = () if self.inputs is None else (row[..., at : at + self.inputs],)
            k.append(f(first[1 + i], _advanced(z, h, a, k), delayed, *x))
        return xp.concat([_advanced(z, h, self.method.b, k), line[..., : -self.units]], axis=-1)

    def _delayed(self, first: Array, row: Array, states: Array, number: int) -> Array:
        at = 1 + len(self.method.b) + number * (self.length + self.units)
        weights, history = first[at : at + self.length], row[..., at + self.length : at + self.length + self.units]
        return array_namespace(states).matmul(weights, states) + history


def _advanced(z: Array, h: Array, weights: tuple[float, ...], k: list[Array]) -> Array:
    terms = [weight * k_i for weight, k_i in zip(weights, k, strict=True) if weight]
    return z + h * sum(terms[1:], terms[0]) if terms else z


@dataclass(frozen=True)
class Field:
    """f at known delayed states, as a step on rows [t, delayed, x]."""

    units: int
    delays: int
    inputs: int | None

    def __call__(self, f: Any, row: Array, z: Array) -> Array:
        """z' there."""
        first = row if row.ndim == 1 else row[0]
        delayed = tuple(row[..., 1 + d * self.units : 1 + (d + 1) * self.units] for d in range(self.delays))
        x = () if self.inputs is None else (row[..., 1 + self.delays * self.units :],)
        return f(first[0], z, delayed, *x)


@dataclass(frozen=True)
class Mesh:
    """The ends of steps [step + 1], and the numbers of those at which derivatives of the solution may jump."""

    ends: np.ndarray
    edges: np.ndarray
    points: int

    def polynomial(self, time: float, known: int) -> tuple[int, np.ndarray]:
        """The first of the states that give the one at a time, and their weights; of the first `known` + 1 states."""
        same = ROUND_OFF * max(abs(self.ends[0]), abs(self.ends[-1]))
        right = int(np.searchsorted(self.ends, time - same))
        if abs(self.ends[right] - time) <= same:
            return right, np.ones(1)
        left = right - 1
        segment = int(np.searchsorted(self.edges, left, side="right")) - 1
        low, high = int(self.edges[segment]), min(int(self.edges[segment + 1]), known)
        start = max(low, min(left - (self.points // 2 - 1), high - self.points + 1))
        nodes = self.ends[start : min(start + self.points, high + 1)]
        return start, _lagrange(nodes, time)

    def weights(self, times: np.ndarray) -> np.ndarray:
        """Of all states, for each of the times [n, step + 1]."""
        found = np.zeros((len(times), len(self.ends)))
        for row, time in zip(found, times, strict=True):
            start, weights = self.polynomial(time, len(self.ends) - 1)
            row[start : start + len(weights)] = weights
        return found


def _lagrange(nodes: np.ndarray, time: float) -> np.ndarray:
    others = ~np.eye(len(nodes), dtype=bool)
    differences = np.where(others, nodes[:, None] - nodes, 1.0)
    return np.where(others, time - nodes, 1.0).prod(1) / differences.prod(1)


def solve_dde(problem: DDEProblem, alg: Any, options: dict[str, Any]) -> SteppedSolution:
    """The solution of a DDE by the method of steps; see `kpflow_dyn.solve`."""
    name = "rk4" if alg is None else alg if isinstance(alg, str) else type(alg).__name__.lower()
    if name not in METHODS:
        raise ValueError(
            f"{alg!r} is no method for a DDE here; take one of {', '.join(map(repr, METHODS))} with steps=, which are "
            "those that are taken, as by Julia's MethodOfSteps with adaptive=false"
        )
    method = METHODS[name]
    mesh = mesh_of(problem, method, given_steps(problem, options))
    with problem.backend.solving.without_gradients():
        _check_field(problem)
        step, rows = _rows(problem, method, mesh)
        z0 = problem.backend.models.snapshot(problem.z0)
        start = array_namespace(z0).concat([z0] * step.length, axis=-1)
        return run_steps(problem, name, step, rows, start, mesh.ends, options, mesh.weights)


def mesh_of(problem: DDEProblem, method: Method, steps: Any) -> Mesh:
    """Steps that end at all times of the problem and where derivatives up to the order of the method jump."""
    given, shortest = step_times(problem, steps), min(problem.delays)
    given = merged(given, stops_of(problem)) if steps is None else given
    span = given[-1] - given[0]
    if span * method.behind / shortest > MOST_STEPS:
        raise ValueError(
            f"the delay {shortest} is so short that more than {MOST_STEPS} steps fit into {span}; leave it out"
        )
    jumps = _jumps(given[0], given[-1], problem.delays, method.order)
    ends = merged(given, jumps)
    edges = np.unique([0, *(int(np.argmin(abs(ends - time))) for time in jumps), len(ends) - 1])
    fine = [ends[:1]]
    for low, high in pairwise(edges):
        several = -(-(method.points - 1) // (high - low))
        for left, right in pairwise(ends[low : high + 1]):
            count = max(several, int(np.ceil((right - left) * method.behind / shortest - 1e-9)))
            fine.append(np.append(left + (right - left) * np.arange(1, count) / count, right))
    found = np.concatenate(fine)
    return Mesh(found, np.searchsorted(found, ends[edges]), method.points)


def _jumps(t0: float, end: float, delays: tuple[float, ...], order: int) -> np.ndarray:
    """The times t0 + tau_i + tau_j + ..., sums of as many delays as the order at most, before the end."""
    level, found = np.array([t0]), np.zeros(0)
    for _ in range(order):
        level = np.unique(np.add.outer(level, delays))
        level = level[level < end]
        apart = np.diff(level, prepend=-np.inf) > ROUND_OFF * max(abs(t0), abs(end))
        level = level[apart]
        found = np.concatenate([found, level])
    found = np.unique(found)
    return found[np.diff(found, prepend=-np.inf) > ROUND_OFF * max(abs(t0), abs(end))]


def _rows(problem: DDEProblem, method: Method, mesh: Mesh) -> tuple[DelayedStep, Array]:
    """The step, and the rows [trial, step, ...], the first of length zero at t0."""
    begins = np.concatenate([mesh.ends[:1], mesh.ends[:-1]])
    h = mesh.ends - begins
    times = begins[:, None] + np.asarray(method.c) * h[:, None]  # [step, stage]
    weights, history = _looked_up(problem, mesh, times[:, :, None] - np.asarray(problem.delays))
    trials, steps, length, width = len(problem.z0), len(h), weights.shape[-1], input_width(problem)
    step = DelayedStep(method, problem.z0.shape[1], len(problem.delays), length, width)
    require(
        bytes_of(trials * steps * length * step.units, problem.z0),
        f"{length} states behind each of {steps} steps",
        "take longer steps=",
    )
    numbers = np.concatenate([h[:, None], times], -1)
    behind = np.concatenate([np.broadcast_to(weights, (trials, *weights.shape)), history], -1)
    each = [np.broadcast_to(numbers, (trials, *numbers.shape)), behind.reshape(trials, steps, -1)]
    parts = [like_numpy(np.concatenate(each, -1), problem.z0)]
    if width is not None:
        x: Any = inputs_at(problem, np.broadcast_to(times.reshape(-1), (trials, times.size)))
        parts.append(x.reshape((trials, steps, -1)))
    return step, parts[0] if width is None else side_by_side(parts, axes=2)


def _looked_up(problem: DDEProblem, mesh: Mesh, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The weights of the states behind each step [..., length], and what history adds [trial, ..., unit].

    Both for the times that are wanted [step, stage, delay]. The first of the states is the one that a step begins with.
    A history that learns is the state at t0. One that is data is read on the steps up to t0 + delay, whose last stage
    too: there a kick of z(t0) does not act yet.
    """
    middle = (np.concatenate([mesh.ends[:1], mesh.ends[:-1]]) + mesh.ends) / 2
    past = _in_history(problem, middle[:, None, None] - np.asarray(problem.delays), mesh.ends)
    past = np.broadcast_to(past, wanted.shape)
    found = {}
    for n, *place in np.argwhere(~past).tolist():
        start, values = mesh.polynomial(max(float(wanted[(n, *place)]), mesh.ends[0]), n - 1)
        found[(n, *place)] = np.maximum(n - 1 - start - np.arange(len(values)), 0), values  # at t0 all are z0
    weights = np.zeros((*wanted.shape, 1 + max((int(behind[0]) for behind, _ in found.values()), default=0)))
    for place, (behind, values) in found.items():
        weights[place][behind] = values
    history = np.zeros((len(problem.z0), *wanted.shape, problem.z0.shape[1]))
    history[:, past] = problem.before(wanted[past])
    return weights, history


def _in_history(problem: DDEProblem, times: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether a history that is data, and does not learn, says the states at these times."""
    return (times < ends[0] - ROUND_OFF * abs(ends).max()) & (problem.encoder is None)


def _check_field(problem: DDEProblem) -> None:
    """Raise unless f maps the state and delayed ones to z'."""
    t0 = problem.t[0]
    delayed = tuple(problem.z0 for _ in problem.delays)
    x = inputs_at_start(problem)
    form = called_as(["t", "z", "(z(t - tau_1), ...)", *["x_t"] * len(x)], problem.args is not None)
    found = problem.backend.solving.check_called("f", problem.model, "", t0, (problem.z0, delayed, *x), form)
    if found != (units := (problem.z0.shape[1],)):
        raise ValueError(f"f gives {list(found)} for each trial, expected z' {list(units)}, like the history [unit]")


def at_nodes(sol: SteppedSolution) -> tuple[Field | OfStates, Array]:
    """The field as a step on the states of a solution, and its rows [trial, time, ...]."""
    problem: Any = sol.problem
    t, (trials, count, units) = np.asarray(sol.t), sol.state.shape
    parts = [like_numpy(np.broadcast_to(t[:, None], (trials, count, 1)).copy(), sol.state)]
    for delay in problem.delays:
        past = _in_history(problem, t - delay, sol.ends)
        states = like_numpy(sol.between(np.maximum(t - delay, t[0])), sol.state) @ sol.steps_state[..., :units]
        known = np.zeros((trials, count, units))
        known[:, past] = problem.before((t - delay)[past])
        parts.append(like_numpy(~past[:, None] * 1.0, sol.state) * states + like_numpy(known, sol.state))
    width = input_width(problem)
    if width is not None:
        x: Any = inputs_at(problem, np.broadcast_to(t, (trials, count)))
        parts.append(x)
    field = Field(units, len(problem.delays), width)
    return field if problem.encoder is None else OfStates(field), side_by_side(parts, axes=2)
