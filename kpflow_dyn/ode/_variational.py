"""Sensitivities of an ODE as ODEs themselves, along its dense solution z(t): what both frameworks share.

With A = df/dz and F = df/dtheta along z(t), and nodes t_j,

    J theta     d' = A d + F theta,  d(t_0) = 0, read at the nodes
    J^T q       -l' = A^T l,  l += q_j at the nodes, from the last to the first;  g = int F^T l dt
    P_node q    s' = A s,  s += q_j at the nodes, read after that; its transpose is l, read after that

Each map is solved adaptively, by itself. It is linear, and one the transpose of the other, to the tolerances.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy
from kpflow_dyn._flows.adjoints import InterpolatingAdjoint
from kpflow_dyn._problems.solutions import ODESolution, check_states
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau
from kpflow_dyn.ode._libraries import Options
from kpflow_dyn.ode._replay import increments
from kpflow_dyn.ode._solve import solve_ode

MAX_POWER = 8
MAX_STEPS = 4096
"""So many steps from one node to the next."""


class Path(NamedTuple):
    """A dense solution: in step n of a trial, z(begin + theta length) = sum_p theta^p coefficients[p].

    Attributes:
        trial: 0, 1, ... [trial].
        begin: when each step begins [trial, step].
        length: how long it is [trial, step]; one where it is zero, as there the coefficients are those of a constant.
        end: when it ends [trial, step].
        coefficients: [trial, step, power, unit].
    """

    trial: Array
    begin: Array
    length: Array
    end: Array
    coefficients: Array

    def __call__(self, t: Array) -> Array:
        """z(t) [trial, unit] at a 0-dim time, which may be traced; beyond the ends the first or last step goes on."""
        xp = array_namespace(self.end)
        step = self.trial, xp.clip(xp.sum(self.end < t, axis=1), 0, self.end.shape[1] - 1)
        along, powers = ((t - self.begin[step]) / self.length[step])[:, None], self.coefficients[step]
        state = powers[:, -1]
        for power in reversed(range(powers.shape[1] - 1)):
            state = along * state + powers[:, power]
        return state


def path_of(sol: ODESolution, alg: InterpolatingAdjoint) -> Path:
    """The dense output of a solution; of another solve, to the tolerances of `alg`, where its own is no polynomial."""
    steps = sol.steps if sol.steps is not None and polynomial(sol.steps.tableau) is not None else _solve_again(sol, alg)
    weights = polynomial(steps.tableau)
    assert weights is not None
    hk = increments(sol.problem, steps)
    xp, back = array_namespace(hk), like_numpy(weights, hk) @ hk  # [trial, step, power, unit]
    first = steps.after + back[:, :, 0]
    check_states(first, steps.before)
    begin, length, end = (like_numpy(a, hk) for a in (steps.t, np.where(steps.dt > 0, steps.dt, 1), steps.t + steps.dt))
    coefficients = xp.concat([first[:, :, None], back[:, :, 1:]], axis=2)
    return Path(xp.asarray(np.arange(len(hk)), device=device(hk)), begin, length, end, coefficients)


def _solve_again(sol: ODESolution, alg: InterpolatingAdjoint) -> AcceptedSteps:
    steps = solve_ode(sol.problem, None, Options(alg.rtol, alg.atol, max_steps=2**16)).steps
    assert steps is not None
    return steps


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


def at_unit_size(sweep: Callable[[Any, Array], Array]) -> Callable[[Any, Array], Array]:
    """The sweep of a block, each probe of it brought to a largest entry of one: tolerances are absolute as well."""

    @wraps(sweep)
    def scaled(self: Any, block: Array) -> Array:
        xp = array_namespace(block)
        size = xp.max(xp.abs(block), axis=tuple(range(1, block.ndim)))
        size = xp.where(size > 0, size, xp.ones_like(size))
        image = sweep(self, block / _probes(size, block.ndim))
        return _probes(size, image.ndim) * image

    return scaled


def _probes(size: Array, ndim: int) -> Array:
    return size.reshape((-1, *(1,) * (ndim - 1)))


def solve_failed(reason: str) -> RuntimeError:
    """The error of a variational or adjoint solve that did not reach its end."""
    return RuntimeError(
        f"a variational or adjoint equation was not solved: {reason}. Loosen rtol and atol of InterpolatingAdjoint; "
        "or, for a stiff problem above all, linearize with sensealg=DiscreteAdjoint() a solution by an implicit method "
        "(in JAX, diffrax.Kvaerno5())"
    )
