"""Kernels of networks and recordings on the places that they have in common, and numbers of all pairs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._flows.flow import Flow, Output
from kpflow_dyn._learning.forecasting import outputs, states_of
from kpflow_dyn._learning.measures import Measure
from kpflow_dyn._numbers.reductions import PartialTrace, partial_trace
from kpflow_dyn._shown import described
from kpflow_dyn._spaces.operators import GramOperator
from kpflow_dyn._spaces.rows import euclidean_matrix
from kpflow_dyn.solvers._moments import student

Axes = tuple[str, ...]
Trials = np.ndarray | None  # their numbers; None for all
OPERATORS: dict[str, Callable[[Any], GramOperator]] = {
    "ntk": lambda flow: flow.ntk,
    "K": lambda flow: flow.K,
    "PP": lambda flow: GramOperator(flow.P),
}
RECORDED = ("trial", "time", "unit")


# Kernels of one item


@dataclass(frozen=True, eq=False)
class Item:
    """One network or recording on its places, which are all axes but that of the units.

    Attributes:
        names: of these axes.
        weights: [*places], how much each place counts: the quadrature weights of an ODE's times, else 1; 0 where not.
        kernel: A on the axes kept: of some trials or all, and of all groups of probes or without one.
        probes: the number of groups of probes; 0 where exact.
        applications: what it took.
    """

    names: tuple[str, ...]
    weights: np.ndarray
    kernel: Callable[[Trials, int | None], np.ndarray]
    probes: int = 0
    applications: int = 0

    @property
    def trials(self) -> int:
        """How many there are."""
        return self.weights.shape[self.names.index("trial")]

    def kept(self, axes: Axes, trials: Trials = None) -> np.ndarray:
        """The weights on the axes kept [*kept], 0 where nothing counts."""
        weights = self.weights if trials is None else self.weights.take(trials, self.names.index("trial"))
        return np.asarray(weights.sum(tuple(i for i, name in enumerate(self.names) if name not in axes)))

    def where_it_counts(self, axes: Axes, trials: Trials, probe: int | None) -> tuple[np.ndarray, np.ndarray]:
        """A at the places that count, as a matrix, and the roots of their weights."""
        weights = self.kept(axes, trials).ravel()
        counts = weights > 0
        return self.kernel(trials, probe)[np.ix_(counts, counts)], np.sqrt(weights[counts])


def _of_states(S: np.ndarray, names: tuple[str, ...], axes: Axes, weights: np.ndarray) -> Item:
    """S S^T of the states [*places, unit] less their mean, with the roots of the weights on both sides."""
    if not np.isfinite(S[weights > 0]).all():
        raise ValueError("states hold NaN or inf; leave out these units, or these places by flow.where")
    S = np.where(weights[..., None] > 0, S, 0.0)
    kept = [i for i, name in enumerate(names) if name in axes]

    def kernel(trials: Trials, _probe: int | None) -> np.ndarray:
        taken = slice(None) if trials is None else trials
        here, of_here = S[taken], weights[taken][..., None]
        places = tuple(range(here.ndim - 1))
        rest = (here - (of_here * here).sum(places) / of_here.sum()) * np.sqrt(of_here)
        rows = np.moveaxis(rest, kept, range(len(kept)))
        rows = rows.reshape((int(np.prod(rows.shape[: len(kept)])), -1))
        return rows @ rows.T

    return Item(names, weights, kernel)


def _of_operator(found: PartialTrace, names: tuple[str, ...], axes: Axes, weights: np.ndarray) -> Item:
    """The kernel of an operator, from its partial trace on the axes kept, or on these and the trials."""
    known, shape = found.domain.axes, found.domain.shape
    groups = [to_numpy(group).astype(float) for group in found.groups]
    mean = np.asarray(sum(groups) / len(groups) if groups else to_numpy(euclidean_matrix(found)), float)

    def kernel(trials: Trials, probe: int | None) -> np.ndarray:
        A = mean if probe is None or not groups else (len(groups) * mean - groups[probe]) / (len(groups) - 1)
        if known == axes and trials is None:
            return A
        A, at = A.reshape(shape + shape), known.index("trial")
        if trials is not None:
            A = A.take(trials, at).take(trials, at + len(shape))
        if "trial" not in axes:
            A = np.trace(A, axis1=at, axis2=at + len(shape))
        return A.reshape((math.isqrt(A.size), -1))

    return Item(names, weights, kernel, len(groups), found.applications if groups else 0)


def _item(
    given: Any, of: str, axes: Axes, by_trials: bool, samples: int | None, seed: Any, known: Sequence[np.ndarray]
) -> Item:
    """One of those that were given; recordings have the weights of the flows."""
    if not isinstance(given, Flow | Output):
        return _recording(given, of, axes, known)
    flow = given if of in ("ntk", "states") else states_of(given)
    space = flow.ntk.domain
    names = space.axes[:-1]
    _check_axes(axes, names)
    weights = _weights_of(given)
    if of == "states":
        return _of_states(states_in(flow), names, axes, weights)
    keep = [name for name in names if name in axes or (by_trials and name == "trial")]
    return _of_operator(partial_trace(OPERATORS[of](flow), keep, samples, seed), names, axes, weights)


def _weights_of(given: Flow | Output) -> np.ndarray:
    """How much each place counts [*places]."""
    states = states_of(given)
    space = states.ntk.domain
    measure = np.ones(1) if space.measure is None else to_numpy(space.measure)[..., 0].astype(float)
    return np.broadcast_to(measure, space.shape[:-1]) * (1.0 if states.mask is None else states.mask)


def _recording(given: Any, of: str, axes: Axes, known: Sequence[np.ndarray]) -> Item:
    S = states_in(given)
    if of != "states":
        raise ValueError(f"a recording has states alone, and no {of}: take of='states'")
    _check_axes(axes, RECORDED[:-1])
    weights = next((one for one in known if one.shape == S.shape[:-1]), np.ones(S.shape[:-1]))
    return _of_states(S, RECORDED[:-1], axes, weights)


def states_in(given: Any) -> np.ndarray:
    """The states of a flow, or a recording [trial, time, unit]."""
    if isinstance(given, Flow | Output):
        return to_numpy(outputs(given)).astype(float)
    expected = "expected a flow, a readout of one, or an array [trial, time, unit]"
    try:
        S = np.asarray(to_numpy(given))
        S = S if np.iscomplexobj(S) else S.astype(float)
    except (TypeError, ValueError, AttributeError) as error:
        raise TypeError(f"{expected}, got {given!r}") from error
    if np.iscomplexobj(S):
        raise ValueError("a recording is complex; give its real and imaginary parts as units of their own")
    if S.ndim != len(RECORDED):
        raise TypeError(f"{expected}, got {described(given)}")
    return S


def _check_axes(axes: Axes, names: tuple[str, ...]) -> None:
    if not axes or not set(axes) <= set(names):
        raise ValueError(f"axes is {axes}, expected one or more of {names}: those that two networks have in common")


def _check_common(items: Sequence[Item], axes: Axes, by_trials: bool) -> None:
    first = items[0]
    for item in items[1:]:
        if first.kept(axes).shape != item.kept(axes).shape:
            sizes = " and ".join(str(list(one.kept(axes).shape)) for one in (first, item))
            raise ValueError(f"kernels on {axes} of sizes {sizes}; compare on the same inputs, trials and times")
        if not np.array_equal(first.kept(axes) > 0, item.kept(axes) > 0):
            raise ValueError("items leave out different places; give all flows one mask, flow.where(mask)")
    if by_trials and len({item.trials for item in items}) > 1:
        raise ValueError("over='trials' leaves out one trial of all items at a time: they must be the same trials")


# Pairs


@dataclass(frozen=True, eq=False)
class Pairs:
    """The numbers of all pairs [item, item], with standard errors, and what they took."""

    values: np.ndarray
    stderr: np.ndarray
    method: str
    applications: int


def all_pairs(given: Sequence[Any], of: str, measure: Measure, axes: Axes, over: str, samples: Any, seed: Any) -> Pairs:
    """The measure of all pairs: jackknifed over groups of probes, where there are any, and over trials if asked for."""
    if over not in ("probes", "trials"):
        raise ValueError(f"over is {over!r}, expected 'probes' or 'trials'")
    if of not in (*OPERATORS, "states"):
        raise ValueError(f"of is {of!r}, expected one of {', '.join([*OPERATORS, 'states'])}")
    by_trials = over == "trials"
    known = [_weights_of(one) for one in given if isinstance(one, Flow | Output)]
    items = [_item(one, of, axes, by_trials, samples, seed, known) for one in given]
    _check_common(items, axes, by_trials)
    values, variance, methods = _values(items, measure, axes, None, None), 0.0, []
    if probes := max(item.probes for item in items):
        without = np.array([_values(items, measure, axes, None, probe) for probe in range(probes)])
        values, variance = probes * values - (probes - 1) * without.mean(0), jackknifed(without)
        methods = [f"{probes} groups of probes"]
    if by_trials:
        everyone = np.flatnonzero(items[0].kept(("trial",)))
        if len(everyone) < 2:
            raise ValueError(f"over='trials' needs two trials that count, got {len(everyone)}; take over='probes'")
        without = np.array([_values(items, measure, axes, everyone[everyone != b], None) for b in everyone])
        variance, methods = variance + jackknifed(without), [f"{len(everyone)} trials", *methods]
    stderr = np.sqrt(variance + 0 * values)
    method = f"jackknife over {' and '.join(methods)}" if methods else "exact"
    return Pairs(values, stderr, method, sum(item.applications for item in items))


def _values(items: Sequence[Item], measure: Measure, axes: Axes, trials: Trials, probe: int | None) -> np.ndarray:
    """The measure of all pairs [item, item], of some trials and groups of probes."""
    prepared = [measure.prepare(*item.where_it_counts(axes, trials, probe)) for item in items]
    values = np.full((len(items), len(items)), measure.same)
    for i, j in combinations(range(len(items)), 2):
        values[i, j] = values[j, i] = measure.pair(prepared[i], prepared[j])
    return values


def jackknifed(without: np.ndarray) -> np.ndarray:
    """Of a number, from its values without each part [part, ...]; widened for few parts."""
    count = len(without)
    return (count - 1) * without.var(0) * student(count) ** 2
