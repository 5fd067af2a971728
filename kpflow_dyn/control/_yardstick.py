"""A learnt policy at rest: its margins at the plant's input, and how far it is from the linear-quadratic regulator."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import solve_continuous_lyapunov

from kpflow_dyn._arrays import Array, full_precision, like_numpy, to_numpy
from kpflow_dyn._backend import Values
from kpflow_dyn._problems.solutions import ODESolution, SolveError
from kpflow_dyn._solve import solve
from kpflow_dyn.control._costates import Cost, QuadraticCost, adjoint
from kpflow_dyn.control._linearisation import linearize_lti
from kpflow_dyn.control._loops import derivatives, loop_of_field
from kpflow_dyn.control._margins import disk_margins, gain_margins, stability_margins
from kpflow_dyn.control._modes import modes
from kpflow_dyn.control._regulators import Regulator, lqr
from kpflow_dyn.control._systems import LTI
from kpflow_dyn.dynamics._points import fixed_points
from kpflow_dyn.models._closed_loop import ClosedLoop

SAME = 1e10  # condition of eigenvectors above which a loop has no modes of its own


@dataclass(frozen=True, eq=False)
class Rest:
    """A closed loop at rest: z, u, the plant about it and the gain of the policy, du = F dz."""

    z: np.ndarray
    u: np.ndarray
    plant: LTI
    F: np.ndarray

    @property
    def closed(self) -> np.ndarray:
        """A + B F."""
        return self.plant.A + self.plant.B @ self.F

    @property
    def loop(self) -> LTI:
        """What returns to the plant's input where it is opened there: u = -L u."""
        return LTI(self.plant.A, self.plant.B, -self.F)

    @property
    def is_stable(self) -> bool:
        """Whether perturbations decay."""
        return not any(mode.lingers(None) for mode in modes(self.closed))


@dataclass(frozen=True)
class Margins:
    """Of each input with the others closed [input], and of all at once; zeros and ones where the loop is unstable."""

    gain_low: np.ndarray  # the factor to which the gain may fall
    gain_high: np.ndarray  # and rise
    phase: np.ndarray  # degrees
    disk: float
    disk_gain: float  # dB
    disk_phase: float  # degrees


def margins_of(rest: Rest) -> Margins:
    """The margins at the plant's input."""
    inputs = rest.plant.B.shape[1]
    if not rest.is_stable:
        return Margins(np.ones(inputs), np.ones(inputs), np.zeros(inputs), 0.0, 0.0, 0.0)
    found = []
    for i in range(inputs):
        others = np.delete(np.arange(inputs), i)
        A = rest.plant.A + rest.plant.B[:, others] @ rest.F[others]
        one = LTI(A, rest.plant.B[:, [i]], -rest.F[[i]])
        gains = gain_margins(one)[0]
        low, high = max(gains[gains < 1], default=0.0), min(gains[gains > 1], default=np.inf)
        found.append((low, high, abs(stability_margins(one).phase)))
    low, high, phase = (np.array(values, float) for values in zip(*found, strict=True))
    return Margins(low, high, phase, *disk_margins(rest.loop))


def rest_near(sol: ODESolution, starts: np.ndarray, x: Array | None) -> Rest | None:
    """Where the loop rests under an input x [input], found from starts [n, unit], nearest to the first."""
    with warnings.catch_warnings(action="ignore"):  # of none found
        found = fixed_points(sol.problem, x, like_numpy(starts, sol.problem.z0))
    found = found[found.is_fixed]
    if not len(found):
        return None
    nearest = found.xstar[np.linalg.norm(found.xstar - starts[0], axis=1).argmin()]
    return rests_of(sol, like_numpy(nearest[None, None], sol.problem.z0), None if x is None else x[None, None])[0][0]


def rests_of(sol: ODESolution, z: Array, x: Array | None) -> list[list[Rest]]:
    """The loop linearised at states and inputs [trial, time, ...], at rest or not."""
    problem = sol.problem
    loop = loop_of_field(problem.f, problem.backend, "control", "open", x is not None)
    A, B = derivatives(loop, np.zeros(z.shape[1]), z, x)
    u, F = controls(sol, z, x)
    states = to_numpy(z).astype(float)
    return [
        [Rest(states[i, k], u[i, k], LTI(A[i, k], B[i, k], names=loop.names), F[i, k]) for k in range(z.shape[1])]
        for i in range(len(states))
    ]


def controls(sol: ODESolution, z: Array, x: Array | None) -> tuple[np.ndarray, np.ndarray]:
    """u [trial, time, input] and its derivative in z [trial, time, input, unit], at states and inputs of these rows."""
    problem = sol.problem
    loop = loop_of_field(problem.f, problem.backend, "control", "closed", x is not None)
    of = problem.backend.transforms

    def row(z: Array, *x: Array) -> list[Array]:
        u, pull = of.vjp(lambda z: loop.control(z, z, x[0] if x else None), z)[:2]
        return [u, of.vmap(pull)(like_numpy(np.eye(len(u)), z))[0]]

    with full_precision(z):
        u, F = of.each_row(row, z, *(() if x is None else (x,)))
    return to_numpy(u).astype(float), to_numpy(F).astype(float)


# The regulator


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The linear-quadratic regulator about a cost's target."""

    target: Rest  # the plant there, with the policy's gain
    regulator: Regulator

    @property
    def gain_distance(self) -> float:
        """|F + K| / |K|, zero where the policy is the regulator."""
        return float(np.linalg.norm(self.target.F + self.regulator.K) / np.linalg.norm(self.regulator.K))


def yardstick(sol: ODESolution, cost: Any, x: Array | None) -> Yardstick:
    """The regulator of a quadratic cost about its target; a ValueError says why there is none."""
    if not isinstance(cost, QuadraticCost) or cost.R is None:
        raise ValueError("a regulator needs a QuadraticCost(Q, R)")
    assert cost.target is not None and cost.u_target is not None
    like, plant = sol.problem.z0, sol.problem.f.plant
    z, u = (like_numpy(a, like) for a in (cost.target, cost.u_target))
    if not hasattr(plant, "control_size"):
        raise ValueError("the plant does not say its control_size")
    system = linearize_lti(plant, z, u)
    at = rests_of(sol, z[None, None], None if x is None else x[None, None])[0][0]
    return Yardstick(Rest(at.z, at.u, LTI(system.A, system.B, names=system.names), at.F), lqr(system, cost.Q, cost.R))


def regulated(sol: ODESolution, cost: QuadraticCost, terminal: Cost | None, K: np.ndarray) -> np.ndarray:
    """The cost of the regulator on the plant itself, from the same starts [trial]; NaN where it has no solution."""
    problem = sol.problem
    arrays = {"K": like_numpy(K, problem.z0)}
    constants = {"target": cost.target, "u_target": cost.u_target}
    law = problem.backend.models.with_arrays(
        _law, arrays, {name: like_numpy(np.asarray(a), problem.z0) for name, a in constants.items()}
    )
    try:
        found: Any = solve(problem.remake(f=ClosedLoop(problem.f.plant, law)), sol.alg, **sol.options)
        return adjoint(found, cost, terminal).cost.values
    except SolveError:
        return np.full(len(sol.state), np.nan)


def _law(arrays: Values, seen: Array) -> Array:
    """u = u* - K (z - z*), of z with or without a reference behind it."""
    K = arrays["K"]
    return arrays["u_target"] - (seen[..., : K.shape[1]] - arrays["target"]) @ K.T


def excess_of_modes(found: Yardstick, R: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the linearised policy costs more than the regulator, by the modes of its closed loop.

        J_F(z) - z^T X z = int |(F + K) z|_R^2 dt = z^T Y z,    A_F^T Y + Y A_F + (F + K)^T R (F + K) = 0

    With z = sum_i c_i v_i mode i has Re(c_i* v_i* Y z), in the mean over starts; they add up to the whole.

    Returns:
        The poles [pole], the parts [pole], the shares of the states in each mode [pole, unit], largest parts first;
        NaN where the loop is unstable or defective.
    """
    closed, gap = found.target.closed, found.target.F + found.regulator.K
    eigen: Any = np.linalg.eig(closed)
    values, vectors = (found.astype(complex) for found in eigen)
    shares = np.abs(vectors.T) ** 2
    shares /= shares.sum(1, keepdims=True)
    if not found.target.is_stable or np.linalg.cond(vectors) > SAME:
        order = np.argsort(-values.real, kind="stable")
        return values[order], np.full(len(values), np.nan), shares[order]
    Y = solve_continuous_lyapunov(closed.T, -gap.T @ R @ gap)
    coordinates = np.linalg.solve(vectors, starts.T.astype(complex))  # [pole, trial]
    parts = (coordinates.conj() * (vectors.conj().T @ Y @ starts.T)).real.mean(1)
    order = np.argsort(-np.abs(parts), kind="stable")
    return values[order], parts[order], shares[order]
