"""Propagators along other paths than the model's own, and the rules that send errors back along these.

With the steps' Jacobians A_t, a path has other matrices D_t in their place: P_D q is s_t = D_t s_{t-1} + q_t.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, eps_of, like_numpy, to_numpy
from kpflow_dyn._arrays.memory import bytes_of
from kpflow_dyn._flows.flow import Flow, RecurrentFlow
from kpflow_dyn._flows.propagator import Propagator
from kpflow_dyn._spaces.operators import DENSE_BYTES, Operator, on_spaces
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.learning_rules._rule import Rule

LOOKED_AT = 8  # units whose own path is looked at


def check_count(given: object, name: str, of: str, least: int) -> None:
    """Raise unless it is a whole number, and not less."""
    if not isinstance(given, int | np.integer) or isinstance(given, bool) or given < least:
        raise ValueError(f"{name} is {given!r}, expected a number of {of}, {least} or more")


def steps_of(flow: Flow) -> RecurrentFlow:
    """The flow itself, if it is one of steps."""
    if not isinstance(flow, RecurrentFlow):
        raise ValueError("only steps of a recurrence can be counted, and this flow has none; of an ODE take flow.nodal")
    return flow


def rule_along(flow: RecurrentFlow, path: Operator) -> Rule:
    """P K P_D*: the errors of `flow` go back along a path of all its steps."""
    return Rule(flow.ntk.factor, flow.gradient(flow.recurrence.flow().K.factor.T @ path.T))


def own_path(flow: RecurrentFlow) -> Propagator:
    """P_D with zeros in the place of each parameter of two axes or more: what goes from step to step by no weight."""
    path = flow.recurrence.propagator(lambda _, W: 0 * W)
    trials, times, units = path.domain.shape
    some = np.unique(np.linspace(0, units - 1, LOOKED_AT).astype(int))
    unit = np.broadcast_to(np.eye(units)[some][:, None, None], (len(some), trials, times, units))
    moved = moved_by(path, unit)
    if not np.isfinite(moved).all():
        raise ValueError(
            "the units' own paths are not finite with zeros in the place of the weights, as where a weight is divided "
            "by its norm; give the paths: duhamel(flow, 0, base=...)"
        )
    reached, own = int((moved != 0).any((1, 2)).sum(1).max()), flow.solution.state.shape[-1]
    if reached * own > max(2, own // 2) * units:  # behind the states of an ODE's steps their stages may be units
        warnings.warn(
            f"the own path of a unit reaches {reached} units of {units}: values meet without a weight, as in a "
            "normalisation, or at a matrix that is no parameter, such as a buffer; make such a matrix a parameter and "
            "leave it out of the learning by params=",
            stacklevel=3,
        )
    return path


def own_decay(flow: RecurrentFlow) -> float:
    """The number d of own paths D_t = d that are one for all units, trials and times, by random states."""
    path = own_path(flow)
    q = np.random.default_rng(0).standard_normal((1, *path.domain.shape))
    before, after = q[:, :, :-1], moved_by(path, q)[:, :, 1:]
    decay = float((before * after).sum() / (before**2).sum()) if before.size else 0.0
    off = np.abs(after - decay * before).max(initial=0.0)
    if off > 1e3 * eps_of(path.domain.like) * max(1.0, abs(decay)):
        raise ValueError(
            "the units' own paths are not one constant decay, as of gates or steps of several lengths; give decay=, or "
            "take eprop, which has the own path of each unit"
        )
    return decay


def moved_by(P: Propagator, q: np.ndarray) -> np.ndarray:
    """D_t q_{t-1} [probe, trial, time, unit]."""
    return q - to_numpy(P.inv.mv(like_numpy(np.array(q), P.domain.like)))


def jacobians(P: Propagator) -> np.ndarray:
    """The matrices A_t [trial, time, unit, unit] of s_t = A_t s_{t-1} + q_t, with zeros for the first step."""
    trials, times, units = P.domain.shape
    check_fits(trials * times * units**2, P.domain.like, f"the Jacobians of {trials * times} steps")
    unit = np.broadcast_to(np.eye(units)[:, None, None], (units, trials, times, units))
    A = np.moveaxis(moved_by(P, unit), 0, -1)
    q = np.random.default_rng(0).standard_normal((1, trials, times, units))
    found, by_one = moved_by(P, q)[0, :, 1:], np.einsum("btij,btj->bti", A[:, 1:], q[0, :, :-1])
    if np.abs(found - by_one).max(initial=0.0) > eps_of(P.domain.like) ** 0.5 * max(1.0, np.abs(A).max()):
        raise ValueError("the steps look up states of several times, as with delays; take eprop, rflo or duhamel")
    return A


def check_fits(entries: int, like: Array, what: str) -> None:
    """Raise where arrays of this many entries are beyond reach."""
    if (needed := bytes_of(entries, like)) > DENSE_BYTES:
        raise ValueError(
            f"{what} take {needed / 2**30:.1f} GiB, more than {DENSE_BYTES / 2**30:.0f} GiB; take fewer trials or "
            "times, a smaller network, or a rule such as eprop, which needs no such arrays"
        )


def along(space: Space, matrix: Any) -> Operator:
    """P_D on states [trial, time, unit] for one number, or one matrix [unit, unit], at all steps.

    P_D = (1 - N)^{-1} = (1 + N) (1 + N^2) (1 + N^4) ..., where N shifts by one step and multiplies.
    """
    powers: list[tuple[int, Any]] = []
    lag: int = 1
    power: Any = matrix
    while lag < space.shape[1]:
        powers.append((lag, power))
        power, lag = (power * power if isinstance(power, float) else power @ power), 2 * lag

    def times(s: Array, factor: Any, transposed: bool) -> Array:
        if isinstance(factor, float):
            return factor * s
        return s @ (factor if transposed else factor.T)

    def forward(q: Array) -> Array:
        concat, zeros = array_namespace(q).concat, array_namespace(q).zeros_like
        for lag, factor in powers:
            q = q + concat([zeros(q[:, :, :lag]), times(q[:, :, :-lag], factor, False)], axis=2)
        return q

    def transpose(q: Array) -> Array:
        concat, zeros = array_namespace(q).concat, array_namespace(q).zeros_like
        for lag, factor in powers:
            q = q + concat([times(q[:, :, lag:], factor, True), zeros(q[:, :, :lag])], axis=2)
        return q

    return on_spaces(space, space, forward, transpose)


def neumann(P: Propagator, path: Operator, k: int) -> Operator:
    """P_k = sum_{j <= k} (P_0 M)^j P_0 with M = A - A_0, which is 1 - P_0 P^{-1} behind a P_0."""

    def summed(base: Operator, inverse: Operator) -> Callable[[Array], Array]:
        def apply(q: Array) -> Array:
            s = base.mv(q)
            for _ in range(k):
                s = s + base.mv(q - inverse.mv(s))
            return s

        return apply

    return Operator(P.domain, P.codomain, summed(path, P.inv), summed(path.T, P.inv.T))
