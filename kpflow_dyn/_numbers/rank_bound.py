"""How many directions learning can have at most: the rank of the Kronecker core, from a forward pass alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Random, to_numpy
from kpflow_dyn._flows.flow import Flow, ODEFlow
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._numbers.estimate import effective_rank
from kpflow_dyn._shown import ShownAsText, type_name
from kpflow_dyn.solvers import Estimate


@dataclass(frozen=True, repr=False)
class RankBound(ShownAsText):
    """The most that the rank of an NTK can be, and how much of it counts.

    Attributes:
        core: the sum of `by_weight`, at least the rank of the core; None where there are no weight sites.
        exact: whether `core` is the rank of the core itself, as where every weight is a parameter that is used once.
        by_weight: by the names of a site's parameters, m rank(V); of weights that are used in several ways together
            at most their number.
        parameters: how many numbers learn.
        states: how many numbers the state has.
        ntk_effective_rank, core_effective_rank: how many directions carry most of each.

    Example as `rank_bound`.
    """

    core: int | None
    exact: bool
    by_weight: dict[str, int]
    parameters: int
    states: int
    ntk_effective_rank: Estimate
    core_effective_rank: Estimate | None

    @property
    def bound(self) -> int:
        """The smallest of core, parameters and states: rank(NTK) is at most this."""
        most = min(self.parameters, self.states)
        return most if self.core is None else min(most, self.core)

    def __str__(self) -> str:
        sizes = f"{self.parameters} parameters and {self.states} states"
        if self.core is None:
            return f"rank(NTK) <= {self.bound}, of {sizes}; effective rank {self.ntk_effective_rank.value:.4g}"
        sign = "=" if self.exact else "<="
        lines = [f"rank(NTK) <= {self.bound}; rank(core) {sign} {self.core}, beside {sizes}"]
        assert self.core_effective_rank is not None
        lines += [f"  {rank:8} {name}" for name, rank in self.by_weight.items()]
        found = f"{self.ntk_effective_rank.value:.4g} of the NTK, {self.core_effective_rank.value:.4g} of the core"
        return "\n".join([*lines, f"effective rank: {found}"])


def rank_bound(flow: Flow, samples: int | None = None, seed: int | Random = 0) -> RankBound:
    """The bound of the NTK's rank by the core, from what the weights see in a forward pass.

        rank(NTK) <= rank(core) = sum over weights m rank(V),    and <= parameters, <= states

    V [rows, d] are all the data that a weight [m, d] multiplies: NTK = (P B) core (P B)*, and core = V V^T (x) I.
    Weights that are shared in other ways than by rows, or are computed, are counted together, and no more often than
    there are of them. Ranks are those to round-off; effective ranks say how many directions carry most of the kernels.

    Args:
        flow: what `linearize` gives; of an ODE the core is that of its solver's steps, `flow.nodal`.
        samples: applications to spend on each effective rank; None for exact values where these are cheap.
        seed: an int, or a `Random` to continue.

    Raises:
        TypeError: what is no flow of states, such as `flow.output(C)`.
    Source: Hazelden, Driscoll, Shlizerman, Shea-Brown, arXiv 2605.08746.

    >>> import torch, kpflow_dyn as kp
    >>> x = torch.ones(4, 20, 1)  # the same in all trials
    >>> flow = kp.linearize(kp.solve(kp.DiscreteProblem(torch.nn.RNNCell(1, 30, bias=False), x)))
    >>> found = kp.rank_bound(flow)
    >>> found.bound <= 20 * 30 < found.states
    True
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"got {type_name(flow)}, expected a Flow, whose states' kernel the core bounds")
    rng, steps = Random(seed), _with_core(flow)
    sizes = {"parameters": flow.ntk.factor.domain.size, "states": flow.ntk.domain.dimension}
    of_ntk = effective_rank(flow.ntk, samples, rng)
    if steps is None:
        return RankBound(None, False, {}, ntk_effective_rank=of_ntk, core_effective_rank=None, **sizes)
    by_weight = {"; ".join(dict.fromkeys(site.name for site in sites)): _most(sites) for sites in _sharing(steps.sites)}
    of_core, exact = effective_rank(steps.core, samples, rng), all(steps.core.separate)
    return RankBound(
        sum(by_weight.values()), exact, by_weight, **sizes, ntk_effective_rank=of_ntk, core_effective_rank=of_core
    )


def _with_core(flow: Flow) -> Flow | None:
    """The flow whose core bounds the ntk; None where there is none."""
    if isinstance(flow, ODEFlow):
        return None if flow.steps is None or flow.steps.untraced else flow.steps
    return None if flow.untraced else flow


def _sharing(sites: list[WeightSite]) -> list[list[WeightSite]]:
    """The sites in groups that have no weight in common."""
    groups: list[tuple[set[int], list[WeightSite]]] = []
    for site in sites:
        used, together = set(np.unique(site.entries).tolist()), [site]
        apart = []
        for other, members in groups:
            if used & other:
                used, together = used | other, [*members, *together]
            else:
                apart.append((other, members))
        groups = [*apart, (used, together)]
    return [members for _used, members in groups]


def _most(sites: list[WeightSite]) -> int:
    """The most that the rank of their part of the core is: the sum over the ways of use, and the number of weights."""
    used = np.unique(np.concatenate([site.entries.ravel() for site in sites]))
    return min(used.size, sum(map(_rank_of_rows, _by_entries(sites))))


def _by_entries(sites: Iterable[WeightSite]) -> list[list[WeightSite]]:
    """The sites whose matrices are the same weights in the same places."""
    found: dict[tuple, list[WeightSite]] = {}
    for site in sites:
        found.setdefault((site.kind, site.entries.shape, site.entries.tobytes()), []).append(site)
    return list(found.values())


def _rank_of_rows(sites: list[WeightSite]) -> int:
    """m rank(V), V being the rows of all these sites; of a scale the number of weights that any data meet."""
    first = sites[0]
    if first.kind == "opaque":
        return np.unique(first.entries).size
    if first.kind == "lookup":
        looked_up = np.unique(np.concatenate([np.unique(to_numpy(site.inputs)) for site in sites]))
        return np.unique(first.entries.ravel()[looked_up[looked_up > 0] - 1]).size
    rows = np.concatenate([to_numpy(site.inputs).reshape(-1, site.inputs.shape[-1]) for site in sites])
    if first.kind == "scale":
        return np.unique(first.entries[rows.any(0)]).size
    return first.multiplicity * _matrix_rank(rows.astype(np.float64))


def _matrix_rank(rows: np.ndarray) -> int:
    """The rank of V [rows, d] to round-off of what it was computed in."""
    if not rows.size:
        return 0
    return int(np.linalg.matrix_rank(np.linalg.qr(rows)[1] if len(rows) > rows.shape[1] else rows))
