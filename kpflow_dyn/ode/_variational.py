"""Sensitivities of an ODE as ODEs themselves, along its dense solution z(t).

With A = df/dz and F = df/dtheta along z(t), and nodes t_j,

    J theta     d' = A d + F theta,  d(t_0) = 0, read at the nodes
    J^T q       -l' = A^T l,  l += q_j at the nodes, from the last to the first;  g = int F^T l dt
    P_node q    s' = A s,  s += q_j at the nodes, read after that; its transpose is l, read after that

Each map is solved adaptively, by itself. It is linear, and one the transpose of the other, to the tolerances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy
from kpflow_dyn._flows.adjoints import InterpolatingAdjoint
from kpflow_dyn._problems.solutions import ODESolution, check_states
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau
from kpflow_dyn.ode._libraries import Options
from kpflow_dyn.ode._replay import increments
from kpflow_dyn.ode._solve import solve_ode

MAX_POWER = 8
MAX_STEPS = 4096  # from one node to the next


class Path(NamedTuple):
    """A dense solution: in step n of a trial, z(begin + theta length) = sum_p theta^p coefficients[p]."""

    trial: Array  # 0, 1, ... [trial].
    begin: Array  # when each step begins [trial, step]
    # how long it is [trial, step]; one where it is zero, as there the coefficients are those of a constant
    length: Array
    end: Array  # when it ends [trial, step]
    coefficients: Array  # [trial, step, power, unit]

    def __call__(self, t: Array) -> Array:
        """z(t) [trial, unit] at a 0-dim time, which may be traced; beyond the ends the first or last step goes on."""
        xp = array_namespace(self.end)
        step = self.trial, xp.clip(xp.sum(self.end < t, axis=1), 0, self.end.shape[1] - 1)
        along, powers = ((t - self.begin[step]) / self.length[step])[:, None], self.coefficients[step]
        state = powers[:, -1]
        for power in reversed(range(powers.shape[1] - 1)):
            state = along * state + powers[:, power]
        return state


State = tuple[Array, ...]
Rate = Callable[[Array, State], State]
Jump = Callable[[State, Any], State]


class System(Protocol):
    """An ODE along its solution, and how a framework solves linear equations that go with it.

    States are tuples of arrays [probe, ...], and the time of a rate is 0-dim.

    transforms   jvp, vjp and vmap of the framework, or by reverse mode alone.
    path         z(t).
    times        t_0 and the nodes.
    parameters   those that learn, in a form that the transforms take.
    size         how many numbers these are, p.
    field        f at a time, as a function of the states [trial, unit] and the parameters.
    split, join  changes of the parameters [probe, p] in the form of these, and back.
    each_node    function(t, *values) at every node, of values [time, ...] and back to such.
    sweep        from time to time in an order (t_0 is 0, the nodes follow), calling jump(state, node) after each
                 interval unless it is None: the last state, and the first array of all [time, probe, ...].
    solved       equation(self, block); RuntimeError by `solve_failed` where a solve does not reach its end.
    """

    transforms: Any
    path: Path
    times: Any
    parameters: Any
    size: int

    def field(self, t: Array) -> Callable[[Array, Any], Array]: ...
    def split(self, theta: Array) -> Any: ...
    def join(self, changes: Any) -> Array: ...
    def each_node(self, function: Callable[..., Array], *values: Array) -> Array: ...
    def sweep(self, rate: Rate, state: State, order: np.ndarray, jump: Jump | None) -> tuple[State, Array]: ...
    def solved(self, equation: Callable[..., Array], block: Array) -> Array: ...


def path_of(sol: ODESolution, alg: InterpolatingAdjoint) -> Path:
    """The dense output of a solution; of another solve, to the tolerances of `alg`, where its own is no polynomial."""
    steps = sol.steps if sol.steps is not None and polynomial(sol.steps.tableau) is not None else _solve_again(sol, alg)
    steps, weights = steps.padded(sol.problem.backend.solving.rounded, sol.problem.z0), polynomial(steps.tableau)
    assert weights is not None
    hk = increments(sol.problem, steps)
    xp, back = array_namespace(hk), like_numpy(weights, hk) @ hk  # [trial, step, power, unit]
    first = steps.after + back[:, :, 0]
    check_states(first, steps.before)
    begin, length, end = (like_numpy(a, hk) for a in (steps.t, np.where(steps.dt > 0, steps.dt, 1), steps.t + steps.dt))
    coefficients = xp.concat([first[:, :, None], back[:, :, 1:]], axis=2)
    return Path(xp.asarray(np.arange(len(hk)), device=device(hk)), begin, length, end, coefficients)


def _solve_again(sol: ODESolution, alg: InterpolatingAdjoint) -> AcceptedSteps:
    again = solve_ode(sol.problem, None, Options(alg.rtol, alg.atol, max_steps=2**16))
    assert isinstance(again, ODESolution) and again.steps is not None
    return again.steps


@lru_cache
def polynomial(tableau: Tableau) -> np.ndarray | None:
    """The dense output's weights as coefficients [power, stage] of a polynomial in theta; None where they are none."""
    points = _chebyshev(4 * MAX_POWER)
    expected = tableau.interpolation(points)
    scale = max(1.0, float(np.abs(expected).max()))
    for power in range(1, MAX_POWER + 1):
        nodes = _chebyshev(power + 1)
        found = np.linalg.solve(np.vander(nodes, increasing=True), tableau.interpolation(nodes))
        if np.abs(np.vander(points, power + 1, increasing=True) @ found - expected).max() <= 1e-11 * scale:
            return found
    return None


def _chebyshev(count: int) -> np.ndarray:
    """Chebyshev points in (0, 1)."""
    return (1 - np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2


@dataclass(frozen=True)
class FieldAtNodes:
    """The field that the equations differentiate, at the nodes; see `kpflow_dyn._flows.referee.Linearisation`."""

    system: System
    state: Array  # [time, trial, unit]

    @property
    def value(self) -> Array:
        system = self.system
        return self._by_trials(system.each_node(lambda t, z: system.field(t)(z, system.parameters), self.state), 1)

    def push(self, theta: Array, argument: Array) -> Array:
        system, changes = self.system, self.system.split(theta)

        def at(t: Array, z: Array, dz: Array) -> Array:
            jvp, f, point = system.transforms.jvp, system.field(t), (z, system.parameters)
            return system.transforms.vmap(lambda d, change: jvp(f, point, (d, change))[1])(dz, changes)

        return self._by_trials(system.each_node(at, self.state, self._by_times(argument)), 2)

    def pull(self, q: Array) -> tuple[Array, Array]:
        system, (_, trials, units) = self.system, self.state.shape

        def at(t: Array, z: Array, q: Array) -> Array:
            pull = system.transforms.vjp(system.field(t), z, system.parameters)[1]
            dz, changes = system.transforms.vmap(pull)(q)
            return array_namespace(q).concat([dz.reshape((len(q), -1)), system.join(changes)], axis=1)

        both = system.each_node(at, self.state, self._by_times(q))  # [time, probe, trial unit + p]
        rows = both[..., : trials * units].reshape((*both.shape[:2], trials, units))
        return both[..., trials * units :].sum(0), self._by_trials(rows, 2)

    def _by_times(self, block: Array) -> Array:
        return array_namespace(block).moveaxis(block, 2, 0)

    def _by_trials(self, values: Array, axis: int) -> Array:
        return array_namespace(values).moveaxis(values, 0, axis)


class Variational:
    """J, J^T, P_node and its transpose by adaptive solves, on blocks [probe, ...], all transposes plain."""

    def __init__(self, sol: ODESolution, model: Any, alg: InterpolatingAdjoint, own: bool = False) -> None:
        """With `own` derivatives by reverse mode alone, through the model itself."""
        self.path, system = path_of(sol, alg), sol.problem.backend.solving.variational_system
        times = np.append(sol.problem.t[0], sol.nodes)
        self._system: System = system(sol.problem, model, self.path, times, alg, own=own)

    def jvp(self, theta: Array) -> Array:
        """J theta [probe, trial, time, unit] of parameters [probe, p]."""
        return self.jvp_from(theta, _still(self._system, theta))

    def vjp(self, q: Array) -> Array:
        """J^T q [probe, p] of states [probe, trial, time, unit]."""
        return self.vjp_from(q)[0]

    def jvp_from(self, theta: Array, start: Array) -> Array:
        """How they move with the parameters and with z(t_0) [probe, trial, unit]."""
        both = array_namespace(theta).concat([theta, start.reshape((len(start), -1))], axis=1)
        return self._solved(_tangent, both)

    def vjp_from(self, q: Array) -> tuple[Array, Array]:
        """Its transpose."""
        both, size = self._solved(_gradient, q), self._system.size
        return both[:, :size], both[:, size:].reshape((*q.shape[:2], -1))

    def field_at(self, state: Array) -> FieldAtNodes:
        """The derivative of the field at the nodes, where the states are [trial, time, unit]."""
        return FieldAtNodes(self._system, array_namespace(state).moveaxis(state, 1, 0))

    def propagate(self, q: Array) -> Array:
        """P_node q, both [probe, trial, time, unit]."""
        return self._solved(_propagated, q)

    def propagate_adjoint(self, q: Array) -> Array:
        """P_node^T q, both [probe, trial, time, unit]."""
        return self._solved(_costates, q)

    def gram(self, q: Array) -> Array:
        """J J^T q."""
        return self.jvp(self.vjp(q))

    def _solved(self, equation: Callable[[System, Array], Array], block: Array) -> Array:
        """Each probe brought to a largest entry of one, as tolerances are absolute as well."""
        xp = array_namespace(block)
        size = xp.max(xp.abs(block), axis=tuple(range(1, block.ndim)))
        size = xp.where(size > 0, size, xp.ones_like(size))
        image = self._system.solved(equation, block / _probes(size, block.ndim))
        return _probes(size, image.ndim) * image


def _probes(size: Array, ndim: int) -> Array:
    return size.reshape((-1, *(1,) * (ndim - 1)))


def _tangent(system: System, both: Array) -> Array:
    """d' = A d + F theta, of theta and d(t_0) side by side [probe, p + trial unit]."""
    theta, start = both[:, : system.size], both[:, system.size :]
    changes, transforms = system.split(theta), system.transforms

    def rate(t: Array, state: State) -> State:
        f, at = system.field(t), (system.path(t), system.parameters)
        return (transforms.vmap(lambda d, change: transforms.jvp(f, at, (d, change))[1])(state[0], changes),)

    nodes, start = np.arange(len(system.times)), start.reshape(_still(system, theta).shape)
    _, states = system.sweep(rate, (start,), nodes, None)
    return array_namespace(states).moveaxis(states, 0, 2)


def _gradient(system: System, q: Array) -> Array:
    """-l' = A^T l and -g' = F^T l: g and l(t_0) side by side [probe, p + trial unit]."""

    def rate(t: Array, state: State) -> State:
        pull = system.transforms.vjp(system.field(t), system.path(t), system.parameters)[1]
        rates, changes = system.transforms.vmap(pull)(state[0])
        return -rates, -system.join(changes)

    def jump(state: State, node: Any) -> State:
        return state[0] + (node >= 0) * q[:, :, node], state[1]  # at t_0, whose number is -1, there is nothing to add

    zeros = array_namespace(q).zeros((len(q), system.size), dtype=q.dtype, device=device(q))
    (start, gradient), _ = system.sweep(rate, (q[:, :, -1], zeros), np.arange(len(system.times))[::-1], jump)
    return array_namespace(q).concat([gradient, start.reshape((len(q), -1))], axis=1)


def _propagated(system: System, q: Array) -> Array:
    """s' = A s."""
    jvp, vmap = system.transforms.jvp, system.transforms.vmap

    def rate(t: Array, state: State) -> State:
        f, z = system.field(t), system.path(t)
        return (vmap(lambda s: jvp(lambda z: f(z, system.parameters), (z,), (s,))[1])(state[0]),)

    return _kicked(system, rate, q, np.arange(1, len(system.times)))


def _costates(system: System, q: Array) -> Array:
    """-l' = A^T l."""

    def rate(t: Array, state: State) -> State:
        f = system.field(t)
        pull = system.transforms.vjp(lambda z: f(z, system.parameters), system.path(t))[1]
        return (-system.transforms.vmap(pull)(state[0])[0],)

    return _kicked(system, rate, q, np.arange(1, len(system.times))[::-1])


def _kicked(system: System, rate: Rate, q: Array, order: np.ndarray) -> Array:
    """The states at the nodes, going through them in this order and adding q at each."""
    xp, first = array_namespace(q), q[:, :, order[0] - 1]
    _, states = system.sweep(rate, (first,), order, lambda state, node: (state[0] + q[:, :, node],))
    states = xp.concat([first[None], states])
    return xp.moveaxis(states if order[0] == 1 else xp.flip(states, axis=0), 0, 2)


def _still(system: System, block: Array) -> Array:
    """Zero states [probe, trial, unit] for a block."""
    trials, _, _, units = system.path.coefficients.shape
    return array_namespace(block).zeros((len(block), trials, units), dtype=block.dtype, device=device(block))


def solve_failed(reason: str) -> RuntimeError:
    """The error of a variational or adjoint solve that did not reach its end."""
    return RuntimeError(
        f"a variational or adjoint equation was not solved: {reason}. Loosen rtol and atol of InterpolatingAdjoint; "
        "or, for a stiff problem above all, linearize with sensealg=DiscreteAdjoint() a solution by an implicit method "
        "(in JAX, diffrax.Kvaerno5())"
    )
