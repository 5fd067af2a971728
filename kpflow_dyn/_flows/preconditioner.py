"""The R of flows whose parameters move by theta' = -R R* g: of an optimiser's metric, or of a choice of parameters.

    K = (B V R)(B V R)*      core = (V R)(V R)*      ntk = (J R)(J R)*

R has one block for each parameter. An elementwise block scales the columns of V, so that V still gives the spectrum of
the core; a column of zeros is a weight that does not learn.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, device, like_numpy, to_numpy
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._spaces.operators import Apply, Operator
from kpflow_dyn._spaces.space import Space


@dataclass(frozen=True)
class Block:
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


def elementwise(scale: np.ndarray, like: Array) -> Block:
    """The block that multiplies each entry, for numbers in the shape of the parameter `like`."""
    numbers = like_numpy(scale.reshape(-1), like)
    return Block(scale.size, lambda q: numbers * q, lambda q: numbers * q, scale.reshape(-1))


def identity(size: int) -> Block:
    """The block of a parameter that moves by its gradient."""
    return Block(size, lambda q: q, lambda q: q, np.ones(size))


def frozen(size: int) -> Block:
    """The block of a parameter that does not move."""

    def zeros(q: Array) -> Array:
        return array_namespace(q).zeros((q.shape[0], size), dtype=q.dtype, device=device(q))

    return Block(0, zeros, lambda q: q[:, :0], np.zeros(size))


def block_diagonal(blocks: Sequence[Block], codomain: Space) -> Operator:
    """R, from the coordinates of all blocks, one after another, to a space of parameters."""
    domain = Space(codomain.axes, (sum(block.size for block in blocks),), codomain.like)
    ins, outs = slices([block.size for block in blocks]), slices([block.scale.size for block in blocks])

    def side(parts: list[slice], maps: list[Apply]) -> Apply:
        pairs, concat = list(zip(maps, parts, strict=True)), codomain.xp.concat
        return lambda q: concat([apply(q[:, part]) for apply, part in pairs], axis=-1)

    forward, transpose = side(ins, [block.apply for block in blocks]), side(outs, [block.transpose for block in blocks])
    return Operator(domain, codomain, forward, transpose)


def chosen_block(size: int, learns: bool, mask: np.ndarray | None, like: Array) -> Block:
    """The block of a parameter that learns or not, or of the entries that a mask picks."""
    if not learns:
        return frozen(size)
    if mask is None:
        return identity(size)
    if mask.size != size:
        raise ValueError("a metric whose factors mix the entries of a parameter cannot have a part of them; take all")
    return elementwise(mask.astype(float), like)


def for_each_trial(apart: Operator, R: Operator) -> Operator:
    """J_b R for changes of each trial's own."""
    domain = Space(apart.domain.axes, (apart.domain.shape[0], R.domain.size), apart.domain.like)
    return apart @ Operator(domain, apart.domain, R.mv, R.T.mv)


def slices(sizes: Sequence[int]) -> list[slice]:
    """The places of parts of these sizes, one after another."""
    ends = np.cumsum([0, *sizes]).tolist()
    return [slice(*ends[i : i + 2]) for i in range(len(sizes))]


def seen_through(blocks: Sequence[Block], sites: list[WeightSite]) -> list[WeightSite]:
    """The sites with V R in the place of V, of the weights that R moves.

    Weights that R scales have the numbers of its coordinates; the others count as computed.
    """
    size = sum(block.size for block in blocks)
    most = max((int(site.entries.max(initial=0)) for site in sites), default=0) + 1
    scale = np.concatenate([*(block.scale for block in blocks), np.full(most, np.nan)])
    numbers, start, first = size + np.arange(len(scale)), 0, 0
    for block in blocks:
        if block.size == block.scale.size:
            numbers[first : first + block.size] = start + np.arange(block.size)
        start, first = start + block.size, first + block.scale.size
    found = [_seen_site(site, scale[site.entries], numbers, size) for site in sites]
    return [site for site in found if site is not None]


def _seen_site(site: WeightSite, scale: np.ndarray, numbers: np.ndarray, size: int) -> WeightSite | None:
    """One site, by the scale of each of its weights; None where none moves."""
    if not (scale != 0).any():
        return None
    rows = scale if site.kind == "matrix" else scale[None]
    alike = np.isfinite(rows[0]) & (rows == rows[0]).all(0)  # [d]: one number for all weights of a column
    entries = np.where(alike, numbers[site.entries], size + site.entries)
    if site.kind in ("opaque", "lookup"):
        kind = site.kind if (scale == 1).all() else "opaque"  # the elements of a table count alike
        return dataclasses.replace(site, kind=kind, entries=entries)
    (kept,) = (rows != 0).any(0).nonzero()
    xp, factor = array_namespace(site.inputs), np.where(alike, rows[0], 1.0)[kept]
    index = xp.asarray(kept, device=device(site.inputs))
    inputs = site.inputs if len(kept) == len(alike) else xp.take(site.inputs, index, axis=-1)
    weight = like_numpy(to_numpy(site.weight)[..., kept], site.weight)
    scaled = inputs if (factor == 1).all() else inputs * like_numpy(factor, inputs)
    return dataclasses.replace(site, inputs=scaled, weight=weight, entries=entries[..., kept])
