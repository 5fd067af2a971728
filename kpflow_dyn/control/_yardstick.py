"""A learnt policy at rest: its margins at the plant's input, and how far it is from the linear-quadratic regulator."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._backend import Values
from kpflow_dyn._problems.solutions import SolveError
from kpflow_dyn.control._costates import QuadraticCost
from kpflow_dyn.control._margins import disk_margins, gain_margins, stability_margins
from kpflow_dyn.control._modes import modes
from kpflow_dyn.control._opened import Opened, opened
from kpflow_dyn.control._regulators import Regulator
from kpflow_dyn.control._steered import Steered, steered
from kpflow_dyn.control._systems import LTI
from kpflow_dyn.dynamics._finding import fixed_points

SAME = 1e10  # condition of eigenvectors above which a loop has no modes of its own


@dataclass(frozen=True)
class Margins:
    """Of each input with the others closed [input], and of all at once; zeros and ones where the loop is unstable."""

    gain_low: np.ndarray  # the factor to which the gain may fall
    gain_high: np.ndarray  # and rise
    phase: np.ndarray  # degrees
    disk: float
    disk_gain: float  # dB
    disk_phase: float  # degrees


def is_stable(loop: Opened) -> bool:
    """Whether perturbations of the closed loop decay."""
    return not any(mode.lingers(loop.system.dt) for mode in modes(loop.closed))


def margins_of(rest: Opened) -> Margins:
    """The margins at the plant's input."""
    system, inputs = rest.system, len(rest.u)
    if not is_stable(rest):
        return Margins(np.ones(inputs), np.ones(inputs), np.zeros(inputs), 0.0, 0.0, 0.0)
    found = []
    for i in range(inputs):
        others = np.delete(np.arange(inputs), i)
        A = system.A + system.B[:, others] @ rest.F[others]
        one = LTI(A, system.B[:, [i]], -rest.F[[i]], dt=system.dt)
        gains = gain_margins(one)[0]
        low, high = max(gains[gains < 1], default=0.0), min(gains[gains > 1], default=np.inf)
        found.append((low, high, abs(stability_margins(one).phase)))
    low, high, phase = (np.array(values, float) for values in zip(*found, strict=True))
    return Margins(low, high, phase, *disk_margins(rest.loop))


def rest_of(loop: Steered, near: Any = None) -> Opened | None:
    """Where the loop rests under its last input, nearest to a state of the plant, or to where the trials end."""
    problem, ends = loop.resting()
    first = ends.mean(0)
    if near is not None:
        first = np.concatenate([to_numpy(near).astype(float), first[loop.units :]])
    x = None if loop.x is None else loop.x[0, -1]
    with warnings.catch_warnings(action="ignore"):  # of none found
        found = fixed_points(problem, x, like_numpy(np.concatenate([first[None], ends]), loop.sol.state))
    found = found[found.is_fixed]
    if not len(found):
        return None
    away = np.linalg.norm((found.xstar - first)[:, : loop.units], axis=1)
    row = loop.row_of_rest(found.xstar[away.argmin()])
    return opened(loop, like_numpy(row[None, None], loop.sol.state), None if x is None else x[None, None])[0][0]


def opened_loop(sol: Any, near: Any = None) -> LTI:
    """L of a closed loop at rest, opened at the plant's input: u = -L u, for `stability_margins` and `disk_margins`.

        s' = A s + B u (or the next s),  y = -F s         u = F s the policy, s = [plant, memory, controls that wait]

    It is the loop that `analyze` has its margins of. A sampled loop is taken from sample to sample, the plant under a
    held control exactly, with its delay.

    Args:
        sol: the solution of a `kp.models.ClosedLoop`, as `analyze` takes it.
        near: a state of the plant [unit]; the rest that is nearest to it is taken. None for where the trials end.

    Raises:
        TypeError: no such solution.
        ValueError: no closed loop, or no rest.
    Source: Astrom, Murray, "Feedback Systems" (2008), section 10.1.

    >>> import torch, kpflow_dyn as kp
    >>> policy = torch.nn.Linear(2, 1, bias=False).double()
    >>> with torch.no_grad():
    ...     _ = policy.weight.copy_(torch.tensor([[-1.0, -2.0]]))
    >>> loop = kp.models.ClosedLoop(kp.models.DoubleIntegrator(), policy, every=0.1)
    >>> sol = kp.solve(kp.ODEProblem(loop, torch.ones(1, 2).double(), [0.0, 0.1, 0.2]), "rk4")
    >>> L = kp.control.opened_loop(sol, near=[0.0, 0.0])
    >>> L.dt, L.C.round(3), bool(kp.control.stability_margins(L).phase > 60)
    (0.1, array([[1., 2.]]), True)
    """
    loop = steered(sol, None, None, None, "opened_loop")
    if near is not None and np.shape(near) != (loop.units,):
        raise ValueError(f"near has the shape {np.shape(near)}, expected a state of the plant [{loop.units}]")
    rest = rest_of(loop, near)
    if rest is None:
        raise ValueError("no rest of the loop was found; give near=, a state of the plant close to one, if it has any")
    return rest.loop


# The regulator


@dataclass(frozen=True, eq=False)
class Yardstick:
    """The linear-quadratic regulator about a cost's target."""

    regulator: Regulator
    weight: np.ndarray  # of an error of the control, per time or per step
    policy: Opened | None  # about the target; None where it has a memory

    @property
    def gain_distance(self) -> float:
        """|F + K| / |K|, zero where the policy is the regulator."""
        if self.policy is None:
            return np.nan
        return float(np.linalg.norm(self.policy.gain + self.regulator.K) / np.linalg.norm(self.regulator.K))


def yardstick(loop: Steered) -> Yardstick:
    """The regulator of a quadratic cost about its target; a ValueError says why there is none."""
    cost = loop.cost
    if not isinstance(cost, QuadraticCost) or cost.R is None:
        raise ValueError("a regulator needs a QuadraticCost(Q, R)")
    if len(cost.R) != loop.u.shape[-1]:
        raise ValueError(f"R is of {len(cost.R)} inputs, and the plant has {loop.u.shape[-1]}")
    assert cost.target is not None and cost.u_target is not None
    regulator, weight = loop.regulator(loop.target(cost), cost)
    if loop.memory:
        return Yardstick(regulator, weight, None)
    x = None if loop.x is None else loop.x[:1, -1:]
    row = loop.standing(like_numpy(cost.target, loop.sol.state), None if x is None else x[0, 0])
    at = opened(loop, row[None, None], x)
    return Yardstick(regulator, weight, at[0][0])


def regulated(loop: Steered, K: np.ndarray) -> np.ndarray:
    """The cost of the regulator on the plant itself, from the same starts [trial]; NaN where it has no solution."""
    cost: Any = loop.cost
    like, backend = loop.sol.state, loop.sol.problem.backend
    constants = {"target": cost.target, "u_target": cost.u_target}
    law = backend.models.with_arrays(
        _law, {"K": like_numpy(K, like)}, {name: like_numpy(np.asarray(a), like) for name, a in constants.items()}
    )
    try:
        return loop.with_policy(law).costates.cost.values
    except SolveError:
        return np.full(len(like), np.nan)


def _law(arrays: Values, seen: Array) -> Array:
    """u = u* - K (z - z*), of z with or without a reference behind it."""
    K = arrays["K"]
    return arrays["u_target"] - (seen[..., : K.shape[1]] - arrays["target"]) @ K.T


def excess_of_modes(found: Yardstick, policy: Opened, starts: np.ndarray) -> tuple[np.ndarray, ...]:
    """What the linearised policy costs more than the regulator, by the modes of its closed loop.

        J_F(z) - z^T X z = int |(F + K) z|_R^2 dt = z^T Y z,    A_F^T Y + Y A_F + (F + K)^T R (F + K) = 0

    In discrete time it is a sum with R + B^T X B in the place of R, and Y - A_F^T Y A_F stands before the equals sign.
    With z = sum_i c_i v_i mode i has Re(c_i* v_i* Y z), in the mean over starts; they add up to the whole.

    Returns:
        The poles [pole], the parts [pole], the shares of the states in each mode [pole, unit], largest parts first;
        NaN where the loop is unstable or defective.
    """
    units, dt, gap = len(policy.z), policy.system.dt, policy.gain + found.regulator.K
    closed = policy.closed[:units, :units]
    eigen: Any = np.linalg.eig(closed)
    values, vectors = (found.astype(complex) for found in eigen)
    shares = np.abs(vectors.T) ** 2
    shares /= shares.sum(1, keepdims=True)
    if any(mode.lingers(dt) for mode in modes(closed)) or np.linalg.cond(vectors) > SAME:
        order = np.argsort(-values.real if dt is None else -np.abs(values), kind="stable")
        return values[order], np.full(len(values), np.nan), shares[order]
    lost = gap.T @ found.weight @ gap
    Y = solve_continuous_lyapunov(closed.T, -lost) if dt is None else solve_discrete_lyapunov(closed.T, lost)
    coordinates = np.linalg.solve(vectors, starts.T.astype(complex))  # [pole, trial]
    parts = (coordinates.conj() * (vectors.conj().T @ Y @ starts.T)).real.mean(1)
    order = np.argsort(-np.abs(parts), kind="stable")
    return values[order], parts[order], shares[order]
