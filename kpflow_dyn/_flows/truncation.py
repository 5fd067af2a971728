"""Truncation of the Kronecker core, with a bound: each weight sees only the leading directions of its variables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from kpflow_dyn._arrays import Array, Random, array_namespace, like_numpy
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._numbers.spectra import eigs
from kpflow_dyn._spaces.operators import GramOperator
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
    reach = eigs(GramOperator(flow.P @ flow.B), 1, ROUGHLY, rng)
    largest = float(eigs(flow.ntk, 1, ROUGHLY, rng).values[0])
    amplified = float(reach.values[0]) * (1 + float(reach.residuals[0])) / largest if largest else 0.0
    ranks, bases, left_out = [], [], 0.0
    for site, separate in zip(flow.sites, flow.core.separate, strict=True):
        basis, rest = _leading(site, rtol / amplified) if separate and amplified else (None, 0.0)
        ranks.append(site.inputs.shape[-1] if basis is None else basis.shape[1])
        bases.append(basis)
        left_out = max(left_out, rest)
    return Truncation(ranks, amplified * left_out, bases)


def _leading(site: WeightSite, allowed: float) -> tuple[Array | None, float]:
    """Directions [d, r] outside of which |V^T W V| <= `allowed`, and its norm there; None where all are needed."""
    if site.kind != "matrix":
        return None, 0.0
    values, vectors = np.linalg.eigh(site.gram())
    precision = float(array_namespace(site.inputs).finfo(site.inputs.dtype).eps)
    beyond = np.append(values[::-1].clip(0), 0.0) + len(values) * precision * values[-1]
    rank = max(1, int(np.argmax(beyond <= allowed))) if (beyond <= allowed).any() else len(values)
    if rank >= len(values):
        return None, 0.0
    return like_numpy(vectors[:, ::-1][:, :rank].copy(), site.inputs), float(beyond[rank])
