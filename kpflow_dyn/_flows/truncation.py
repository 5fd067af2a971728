"""Certified truncation of the Kronecker core: what each weight multiplies, along its leading directions only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kpflow_dyn._arrays import Array, Random, eps_of, like_numpy
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._spaces.operators import GramOperator
from kpflow_dyn._spaces.rows import on_rows
from kpflow_dyn.solvers import BlockLanczos

if TYPE_CHECKING:
    from kpflow_dyn._flows.flow import Flow

ROUGHLY = BlockLanczos(block=4, tol=0.03)  # for norms


@dataclass(frozen=True)
class Truncation:
    """How far the core of a flow was truncated.

    Attributes:
        ranks: for each site, how many directions of its variables are kept.
        bound: of |ntk - truncated ntk| / |ntk| in the operator norm.
        bases: for each site those directions [d, rank]; None where all are kept.
    """

    ranks: list[int]
    bound: float
    bases: list[Array | None] = field(repr=False)


def truncation(flow: Flow, rtol: float, rng: Random) -> Truncation:
    """The fewest directions whose bound |P B|^2 max_i l_{r_i + 1}(V_i^T W V_i) is below rtol |ntk|."""
    reach, off = _largest(GramOperator(flow.P @ flow.B), rng)
    largest, _off = _largest(flow.ntk, rng)
    amplified = reach * (1 + off) / largest if largest else 0.0
    ranks, bases, left_out = [], [], 0.0
    for site, separate in zip(flow.sites, flow.core.separate, strict=True):
        basis, rest = _leading(site, rtol / amplified) if separate and amplified else (None, 0.0)
        ranks.append(site.inputs.shape[-1] if basis is None else basis.shape[1])
        bases.append(basis)
        left_out = max(left_out, rest)
    return Truncation(ranks, amplified * left_out, bases)


def _largest(op: GramOperator, rng: Random) -> tuple[float, float]:
    """The largest eigenvalue of J J*, found on the smaller side, and its relative residual."""
    J, space = op.factor, op.domain
    if J.domain.size < space.size:
        sides, like = (on_rows(J), on_rows(J.T)), J.domain.like
        triplet = ROUGHLY.solve_product(*sides, J.domain.size, 1, like=like, seed=rng, squared=True)
        return float(triplet.values[0]) ** 2, float(triplet.residuals[0])
    pair = ROUGHLY.solve(on_rows(op), space.size, 1, like=space.like, seed=rng)
    return float(pair.values[0]), float(pair.residuals[0])


def _leading(site: WeightSite, allowed: float) -> tuple[Array | None, float]:
    """The directions [d, r] outside of which V^T W V is at most `allowed`, and what it is there; None for all."""
    if site.kind != "matrix":
        return None, 0.0
    values, vectors = np.linalg.eigh(site.gram())
    beyond = np.append(values[::-1].clip(0), 0.0) + len(values) * eps_of(site.inputs) * values[-1]
    rank = max(1, int(np.argmax(beyond <= allowed))) if (beyond <= allowed).any() else len(values)
    if rank >= len(values):
        return None, 0.0
    return like_numpy(vectors[:, ::-1][:, :rank].copy(), site.inputs), float(beyond[rank])
