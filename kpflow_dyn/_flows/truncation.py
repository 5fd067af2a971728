"""Truncation of the Kronecker core, with a bound: each weight sees only the leading directions of its variables."""

from dataclasses import dataclass, field

import numpy as np

from kpflow_dyn._arrays import Array, Random, eps_of, like_numpy
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._shown import Shown
from kpflow_dyn._spaces.operators import Operator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn.solvers import BlockLanczos

ROUGHLY = BlockLanczos(block=4, tol=0.03)  # for norms


@dataclass(frozen=True, repr=False)
class Truncation(Shown):
    """How far the core of a flow was truncated.

    Attributes:
        ranks: for each site, how many directions of its variables are kept.
        bound: of |ntk - truncated ntk| / |ntk| in the operator norm.
        bases: for each site those directions [d, rank]; None where all are kept.
    """

    ranks: list[int]
    bound: float
    bases: list[Array | None] = field(repr=False)


def truncation(reach: Operator, J: Operator, core: CoreOperator, rtol: float, rng: Random) -> Truncation:
    """The fewest directions whose bound |P B|^2 max_i l_{r_i + 1}(V_i^T W V_i) is at most rtol |ntk|; reach = P B."""
    reached, most = _largest(reach, rng), _largest(J, rng)
    amplified = reached[0] * (1 + reached[1]) / most[0] if most[0] else 0.0
    ranks, bases, left_out = [], [], 0.0
    for site, separate in zip(core.sites, core.separate, strict=True):
        basis, rest = _leading(site, rtol / amplified) if separate and amplified else (None, 0.0)
        ranks.append(site.inputs.shape[-1] if basis is None else basis.shape[1])
        bases.append(basis)
        left_out = max(left_out, rest)
    return Truncation(ranks, amplified * left_out, bases)


def _largest(factor: Operator, rng: Random) -> tuple[float, float]:
    """|L L*| in the operator norm, and how far off it may be, relative to it."""
    if factor.domain.size > factor.codomain.size:
        factor = factor.T
    maps, n = (on_rows(factor), on_rows(factor.T)), factor.domain.size
    found = ROUGHLY.solve_product(*maps, n, 1, like=factor.domain.like, seed=rng, squared=True)
    return float(found.values[0]) ** 2, float(found.residuals[0])


def _leading(site: WeightSite, allowed: float) -> tuple[Array | None, float]:
    """Directions [d, r] outside of which |V^T W V| <= `allowed`, and its norm there; None where all are needed."""
    if site.kind != "matrix":
        return None, 0.0
    values, vectors = np.linalg.eigh(site.gram())
    beyond = np.append(values[::-1].clip(0), 0.0) + len(values) * eps_of(site.inputs) * values[-1]
    rank = max(1, int(np.argmax(beyond <= allowed))) if (beyond <= allowed).any() else len(values)
    if rank >= len(values):
        return None, 0.0
    return like_numpy(vectors[:, ::-1][:, :rank].copy(), site.inputs), float(beyond[rank])
