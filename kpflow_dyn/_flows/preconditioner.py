"""Flows whose parameters move by theta' = -R R* g for a root R: that of a metric, or a choice of some parameters.

    K = (B V R)(B V R)*      core = (V R)(V R)*      ntk = (J R)(J R)*

R has one block for each parameter. An elementwise block scales the columns of V, so that V still gives the spectrum of
the core; a column of zeros is a weight that does not learn.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy, to_numpy
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._spaces.operators import Apply, GramOperator, Operator
from kpflow_dyn._spaces.space import Space

if TYPE_CHECKING:
    from kpflow_dyn._flows.flow import Flow


@dataclass(frozen=True)
class Root:
    """The block of R of one parameter, on flat blocks of vectors.

    Attributes:
        size: how many coordinates it takes.
        apply: [probe, size] -> [probe, length of the parameter].
        transpose: the transpose of `apply`.
        scale: where R is elementwise, the factor of each entry [length of the parameter]; NaN elsewhere.
    """

    size: int
    apply: Apply
    transpose: Apply
    scale: np.ndarray


def elementwise(scale: np.ndarray, like: Array) -> Root:
    """The root that multiplies each entry, for numbers in the shape of the parameter `like`."""
    numbers = like_numpy(scale.reshape(-1), like)
    return Root(scale.size, lambda q: numbers * q, lambda q: numbers * q, scale.reshape(-1))


def identity(size: int) -> Root:
    """The root of a parameter that moves by its gradient."""
    return Root(size, lambda q: q, lambda q: q, np.ones(size))


def frozen(size: int) -> Root:
    """The root of a parameter that does not move."""

    def zeros(q: Array) -> Array:
        return array_namespace(q).zeros((q.shape[0], size), dtype=q.dtype, device=device(q))

    return Root(0, zeros, lambda q: q[:, :0], np.zeros(size))


def block_diagonal(roots: Sequence[Root], codomain: Space) -> Operator:
    """R, from the coordinates of all roots, one after another, to a space of parameters."""
    domain = Space(codomain.axes, (sum(root.size for root in roots),), codomain.like)
    ins, outs = _slices([root.size for root in roots]), _slices([root.scale.size for root in roots])

    def blocks(parts: list[slice], maps: list[Apply]) -> Apply:
        def apply(q: Array) -> Array:
            return array_namespace(q).concat([f(q[:, part]) for f, part in zip(maps, parts, strict=True)], axis=-1)

        return apply

    forward, transpose = [root.apply for root in roots], [root.transpose for root in roots]
    return Operator(domain, codomain, blocks(ins, forward), blocks(outs, transpose))


def preconditioned(flow: Flow, roots: Sequence[Root]) -> Flow:
    """The flow whose parameters move by theta' = -R R* g; J stays the derivative in the parameters."""
    steps = None if flow.steps is None else preconditioned(flow.steps, roots)
    return dataclasses.replace(_through(flow, roots), roots=tuple(roots), steps=steps)


def restricted(flow: Flow, names: Sequence[str], masks: Mapping[str, np.ndarray]) -> Flow:
    """The flow of some parameters, in its order, or of the entries that their masks pick."""

    def chosen(sizes: dict[str, int]) -> list[Root]:
        return [
            _kept(size, masks.get(name), flow.P.domain.like) if name in names else frozen(size)
            for name, size in sizes.items()
        ]

    of_parameters = chosen({name: math.prod(value.shape) for name, value in flow.parameters.items()})
    dropped = [name for name in flow.parameters if name not in names]
    roots = flow.roots or (of_parameters if masks else ())
    return dataclasses.replace(
        _through(flow, chosen(flow.parts)),
        sites=[dataclasses.replace(s, name=_without(s.name, dropped)) for s in _seen(flow.sites, of_parameters)],
        J=flow.J @ block_diagonal(of_parameters, flow.J.domain),
        parameters={name: flow.parameters[name] for name in names},
        roots=tuple(root for root, name in zip(roots, flow.parameters, strict=False) if name in names),
        steps=None if flow.steps is None else restricted(flow.steps, names, masks),
    )


def _kept(size: int, mask: np.ndarray | None, like: Array) -> Root:
    """The root of the entries of a parameter that a mask picks."""
    if mask is None:
        return identity(size)
    if mask.size != size:
        raise ValueError("a metric whose factors mix the entries of a parameter cannot have a part of them; take all")
    return elementwise(mask.astype(float), like)


def _through(flow: Flow, roots: Sequence[Root]) -> Flow:
    """The flow with R behind the factors of its operators."""
    R, ntk, feedback = block_diagonal(roots, flow.ntk.factor.domain), flow.ntk, flow.with_feedback
    return dataclasses.replace(
        flow,
        K=GramOperator(flow.K.factor @ R),
        core=CoreOperator(flow.core.factor @ R, _seen(flow.core.sites, roots)),
        ntk=GramOperator(ntk.factor @ R, None, None if ntk.apart is None else _for_each_trial(ntk.apart, R)),
        with_feedback=None if feedback is None else lambda draw: R.T @ feedback(draw),
        with_bases=None,
    )


def _for_each_trial(apart: Operator, R: Operator) -> Operator:
    """J_b R for changes of each trial's own."""
    domain = Space(apart.domain.axes, (apart.domain.shape[0], R.domain.size), apart.domain.like)
    return apart @ Operator(domain, apart.domain, R.mv, R.T.mv)


def _slices(sizes: Sequence[int]) -> list[slice]:
    ends = np.cumsum([0, *sizes]).tolist()
    return [slice(*ends[i : i + 2]) for i in range(len(sizes))]


def _without(name: str, dropped: list[str]) -> str:
    """A site's name without the parameters that do not learn."""
    parts = name.split(" + ")
    gone = [any(part == other or part.startswith(f"{other}[") for other in dropped) for part in parts]
    return " + ".join(part for part, out in zip(parts, gone, strict=True) if not out)


# Sites seen through R


def _seen(sites: list[WeightSite], roots: Sequence[Root]) -> list[WeightSite]:
    """The sites with V R in the place of V, of the weights that R moves.

    Weights that R scales have the numbers of its coordinates; the others count as computed.
    """
    size = sum(root.size for root in roots)
    most = max((int(site.entries.max(initial=0)) for site in sites), default=0) + 1
    scale = np.concatenate([*(root.scale for root in roots), np.full(most, np.nan)])
    numbers, start, first = size + np.arange(len(scale)), 0, 0
    for root in roots:
        if root.size == root.scale.size:
            numbers[first : first + root.size] = start + np.arange(root.size)
        start, first = start + root.size, first + root.scale.size
    found = [_seen_site(site, scale[site.entries], numbers, size) for site in sites]
    return [site for site in found if site is not None]


def _seen_site(site: WeightSite, scale: np.ndarray, numbers: np.ndarray, size: int) -> WeightSite | None:
    """One site, by the scale of each of its weights; None where none moves."""
    if not (scale != 0).any():
        return None
    rows = scale if site.kind == "matrix" else scale[None]
    alike = np.isfinite(rows[0]) & (rows == rows[0]).all(0)  # [d]: one number for all weights of a column
    entries = np.where(alike, numbers[site.entries], size + site.entries)
    if site.kind == "opaque":
        return dataclasses.replace(site, entries=entries)
    (kept,) = (rows != 0).any(0).nonzero()
    xp, factor = array_namespace(site.inputs), np.where(alike, rows[0], 1.0)[kept]
    index = xp.asarray(kept, device=device(site.inputs))
    inputs = site.inputs if len(kept) == len(alike) else xp.take(site.inputs, index, axis=-1)
    weight = like_numpy(to_numpy(site.weight)[..., kept], site.weight)
    scaled = inputs if (factor == 1).all() else inputs * like_numpy(factor, inputs)
    return dataclasses.replace(site, inputs=scaled, weight=weight, entries=entries[..., kept])
