"""The operators of a flow at the places that count: trials and times where a mask is True.

With the 0/1 mask R of what counts, and E that of the places from which something that counts can be reached,

    J: R J      ntk: R ntk R      P: R P E      K: E K E      core: E core E

In a recurrence kicks travel forwards in time, so that E holds the places up to the last one that counts of each trial,
and R P = R P E: the kernel is still P K P*. Where there is no recurrence, E holds all places.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy, to_numpy
from kpflow_dyn._flows.propagator import Propagator
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._problems.steps import AcceptedSteps
from kpflow_dyn._shown import number
from kpflow_dyn._spaces.operators import GramOperator, Operator, restriction
from kpflow_dyn._spaces.space import Space


class Operators(Protocol):
    """The operators of a `Flow`."""

    @property
    def P(self) -> Operator: ...
    @property
    def K(self) -> GramOperator: ...
    @property
    def core(self) -> CoreOperator: ...
    @property
    def B(self) -> Operator: ...
    @property
    def J(self) -> Operator: ...
    @property
    def ntk(self) -> GramOperator: ...
    @property
    def sites(self) -> list[WeightSite]: ...


def checked_places(mask: Any, space: Space, known: np.ndarray | None) -> np.ndarray:
    """A mask, and what is known already, as booleans on all axes but that of the units, such as [trial, time]."""
    axes = [i for i, name in enumerate(space.axes) if name != "unit"]
    shape, given = tuple(space.shape[i] for i in axes), to_numpy(mask)
    fits = given.dtype.kind in "buif" and given.shape == shape and np.isin(given, (0, 1)).all()
    places = given.astype(bool) if not fits or known is None else given.astype(bool) & known
    if not fits or not places.any():
        names = ", ".join(space.axes[i] for i in axes)
        raise ValueError(
            f"the mask is {given.dtype}{list(given.shape)}, expected booleans [{names}] = {list(shape)}, True somewhere"
        )
    return places


def places_of(space: Space) -> np.ndarray | None:
    """The mask of a space of states, on all axes but that of the units."""
    return None if space.mask is None else to_numpy(space.mask).squeeze(space.axes.index("unit"))


def reaching(places: np.ndarray) -> np.ndarray:
    """The trials and times from which one of these can be reached in a recurrence [trial, time]."""
    return np.logical_or.accumulate(places[:, ::-1], axis=1)[:, ::-1].copy()


def said_of_targets(mask: np.ndarray | None, left_out: bool) -> dict[str, str]:
    """How many steps have no target in a mask [trial, time], and whether they are left out, as an attribute; nothing
    where all have one.
    """
    if mask is None or mask.all():
        return {}
    places: np.ndarray = mask != 0
    behind, before = 1 - reaching(places).mean(), (reaching(places) & ~places).mean()
    shares = [f"{behind:.0%} of the steps lie behind the last target of their trial"] if behind else []
    shares += [f"{before:.0%} of the steps{' lie before it and' if behind else ''} have no target"] if before else []
    done = "left out (all_steps=True, or --all-steps, keeps them)" if left_out else "analysed too"
    return {"steps": f"{' and '.join(shares)}; they are {done}"}


def said_of_weights(mask: Any) -> dict[str, str]:
    """How much the places that count weigh in the loss, as an attribute; nothing where all weigh the same."""
    span = span_of_weights(mask)
    return {"weights": f"Steps weigh differently in loss and accuracy: {span}"} if span else {}


def said_in(attrs: Mapping[str, Any]) -> list[str]:
    """What the two above said, among attributes."""
    return [attrs[name] for name in ("steps", "weights") if name in attrs]


def span_of_weights(mask: Any) -> str:
    """The least and the largest weight of a mask, and their mean; "" where what counts, counts alike."""
    weights = np.ones(1) if mask is None else to_numpy(mask).astype(float)
    weights = weights[weights != 0]
    if not weights.size or weights.min() == weights.max():
        return ""
    return f"{number(weights.min())} to {number(weights.max())}, {number(weights.mean())} in the mean"


def places_of_steps(places: np.ndarray, t: np.ndarray, steps: AcceptedSteps) -> np.ndarray:
    """Which steps of a solver count [trial, step], those that lead to a time t that does."""
    tolerance = 1e-9 * (t[-1] - t[0])
    begins, ends = (np.broadcast_to(a, (len(places), a.shape[1])) for a in (steps.t, steps.t + steps.dt))
    after, until = np.searchsorted(t, begins + tolerance, "right"), np.searchsorted(t, ends - tolerance, "left")
    return np.take_along_axis(places, np.minimum(np.minimum(after, until), len(t) - 1), axis=1)


def at_places(
    flow: Operators, places: np.ndarray, reach: np.ndarray | None, of_sites: np.ndarray | None = None
) -> dict[str, Any]:
    """What differs in the flow at these places, if kicks elsewhere than at `reach` are left out; None for no kicks.

    Where there are several steps from time to time, which have sites, `of_sites` says which count [trial, step].
    """
    R = _onto(flow.ntk.domain, places)
    found: dict[str, Any] = {"J": R @ flow.J, "ntk": _both_sides(R, flow.ntk)}
    if reach is None or reach.all():
        return found | {"P": _propagator(flow.P, R, None)}
    of_sites = reach if of_sites is None else of_sites
    core, E, outputs = flow.core, _onto(flow.P.domain, reach), _onto(flow.core.domain, of_sites)
    return found | {
        "P": _propagator(flow.P, R, E),
        "K": GramOperator(E @ flow.K.factor, direct_sum=lambda: flow.K.direct_sum),
        "B": E @ flow.B @ outputs,
        "core": CoreOperator(outputs @ core.factor, _sites_at(core.sites, of_sites), core.untraced),
        "sites": _sites_at(flow.sites, of_sites),
    }


def _onto(space: Space, places: np.ndarray) -> Operator:
    """The restriction to places on the axes of the space other than those of units or sites."""
    apart = [i for i, name in enumerate(space.axes) if name in ("unit", "site")]
    weights = np.expand_dims(places.astype(float), tuple(apart))
    return restriction(space, like_numpy(weights, space.like) > 0)


def _propagator(P: Operator, R: Operator, E: Operator | None) -> Operator:
    """R P E, with the inverse of E P E, of which it is the part that counts."""
    forward = R @ P if E is None else R @ P @ E
    if not isinstance(P, Propagator):
        return forward
    return Propagator(forward, P.inv if E is None else E @ P.inv @ E)


def _both_sides(R: Operator, op: GramOperator) -> GramOperator:
    """R A R, with the fused action of A."""
    return GramOperator(R @ op.factor, lambda q: R.mv(op.mv(R.mv(q))), None if op.apart is None else R @ op.apart)


def _sites_at(sites: list[WeightSite], reach: np.ndarray) -> list[WeightSite]:
    """The sites with zeros in the place of the variables elsewhere, which then add nothing to the core."""
    return [dataclasses.replace(site, inputs=zeroed(site.inputs, reach)) for site in sites]


def zeroed(inputs: Array, reach: np.ndarray) -> Array:
    """Inputs [trial, time, ...], zeros where these places are not [trial, time]."""
    xp, weights = array_namespace(inputs), reach.astype(float).reshape(reach.shape + (1,) * (inputs.ndim - reach.ndim))
    return xp.where(like_numpy(weights, inputs) > 0, inputs, xp.zeros_like(inputs))
