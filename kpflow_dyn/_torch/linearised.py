"""The steps of a traced recurrence in torch, linearised along its states, each by itself.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    dz_t = A_t dz_{t-1} + B_t a_t        a_t = V_t dW^T

Blocks are laid out [time, trial, probe, width] inside; everything public is [probe, trial, time, width].
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._torch.glue import Glue
from kpflow_dyn._torch.plan import KickBlock, kick_blocks, plan_updates, products_of
from kpflow_dyn._torch.program import LinearUpdate, MatrixUpdate, Range, ScatteredUpdate, reached
from kpflow_dyn._torch.sites import SiteData, sites_data
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._steps import AnalysedStep

Kicks = dict[str, Tensor]  # by block, [time, trial, probe, kick]
Changes = tuple[slice, list[Tensor]]  # of every site's weights, for a cut of the trials
Sites = list[tuple[str, SiteData]]  # each with the block of its kicks
ALL = slice(None)
PRODUCTS = MatrixUpdate | ScatteredUpdate | LinearUpdate


class LinearisedSteps:
    """The steps from states z_prev [trial, time, unit] under inputs x [trial, time, input]."""

    untraced = ""

    def __init__(self, step: AnalysedStep, glue: Glue, x: Tensor, z_prev: Tensor) -> None:
        rows = RowFunctions(step, BACKENDS["torch"].transforms)
        x, z = x.transpose(0, 1).contiguous(), z_prev.transpose(0, 1).contiguous()  # [time, trial, ...]
        self.times, self.trials, self.units = z.shape
        self.kick_size, self.like = step.kicks.size, z.new_empty(0)
        self.rows, self.products = rows, glue.products
        self.blocks = kick_blocks(step, glue)
        self.updates, self.widths, after = plan_updates(glue, rows, self.blocks, x, z)
        self.next_state = after.transpose(0, 1)  # [trial, time, unit]
        self.kick_updates = reached(self.updates, {block.name for block in self.blocks})
        self.weights, *derivatives = rows.weights()
        self.push, self.pull = (vmap(derivative) for derivative in derivatives)
        self.parameter_size = sum(value.numel() for value in rows.parameter_values())
        homes = [next(b for b in self.blocks if site.kicks.min() in range(b.start, b.stop)) for site in step.sites]
        data = sites_data(step.sites, [home.start for home in homes], rows, x, z)
        self.sites = [(home.name, site) for home, site in zip(homes, data, strict=True)]
        none = np.zeros(0, int)
        self.site_kicks = rows.index(np.concatenate([none, *(site.kicks.ravel() for site in step.sites)]))
        self.fresh, self.unkicked = _first_kicks(self.sites, self.blocks, self.like.device)
        used = torch.cat([rows.index(none), *(site.entries.reshape(-1) for _, site in self.sites)])
        self.plain = not step.computed and len(used.unique()) == len(used)

    @property
    def inputs(self) -> list[Tensor]:
        """What the weights of each site multiply [trial, time, ...]."""
        found = [(site.kind, site.variables.swapaxes(0, 1)) for _, site in self.sites]
        return [V[:, :, 0] if kind == "matrix" and V.shape[2] == 1 else V for kind, V in found]

    def truncated(self, bases: list[Tensor | None]) -> Self:
        """The same with each site's variables cut to V Q Q^T, for orthonormal columns Q [d, r]; None for all of V."""
        cut = copy(self)
        cut.sites = [
            (name, site if basis is None else site.truncated(basis))
            for (name, site), basis in zip(self.sites, bases, strict=True)
        ]
        return cut

    def fed_back(self, draw: Callable[[str, Tensor], Tensor]) -> Self:
        """The same gates, but what moves is multiplied by draw(name, W) in the place of each matrix W.

        Matrices that are computed from such parameters are computed anew.
        """
        rows = self.rows.with_matrices(draw)
        drawn = [u for p in self.products for u in products_of(p, Range("z", 0, 0), self.blocks, rows)]
        turned, following = copy(self), iter(drawn)
        turned.updates = [
            replace(next(following), sink=u.sink, source=u.source) if isinstance(u, PRODUCTS) else u
            for u in self.updates
        ]
        return turned

    def changes(self, theta: Tensor) -> list[Tensor]:
        """Changes of the parameters [probe, p] -> of each site's weights, in the site's own layout."""
        weights = self.push(theta)
        return [site.take(weights) for _, site in self.sites]

    def parameters(self, changes: list[Tensor], probes: int) -> Tensor:
        """The transpose of `changes`."""
        weights = self.like.new_zeros(probes, len(self.weights))
        for (_, site), change in zip(self.sites, changes, strict=True):
            site.put(change, weights)
        return self.pull(weights)

    # Maps at all times at once, without the recurrence. Site values are all sites' outputs, side by side.

    def write(self, theta: Tensor) -> Tensor:
        """V dW^T of every site."""
        # [time, trial, probe, site]
        images = [s.image(c, (ALL, ALL)) for (_, s), c in zip(self.sites, self.changes(theta), strict=True)]
        return outer(torch.cat([self._empty(self.times, len(theta), 0), *images], -1))

    def read(self, values: Tensor) -> Tensor:
        """The transpose of `write`."""
        changes = [site.no_change(len(values)) for _, site in self.sites]
        # of each site [time, trial, probe, output]
        parts = inner(values).split([site.kicks.numel() for _, site in self.sites], -1)
        for (_, site), part, change in zip(self.sites, parts, changes, strict=True):
            site.collect(part, (ALL, ALL), change)
        return self.parameters(changes, len(values))

    def _kick(self, changes: list[Changes], span: slice, kicks: Kicks) -> None:
        for name, others in self.unkicked.items():
            kicks[name][..., others] = 0
        for cut, those in changes:
            for (name, site), change, fresh in zip(self.sites, those, self.fresh, strict=True):
                site.kick(change, (span, cut), kicks[name][:, cut], fresh)

    def _kick_blocks(self, times: int, probes: int) -> Kicks:
        return {block.name: self._empty(times, probes, block.stop - block.start) for block in self.blocks}

    def _empty(self, times: int, probes: int, width: int) -> Tensor:
        return self.like.new_empty(times, self.trials, probes, width)


def _first_kicks(
    sites: Sites, blocks: Sequence[KickBlock], device: torch.device
) -> tuple[list[bool], dict[str, Tensor]]:
    """Which sites are the first at all of their kicks, so that they may overwrite; and each block's other kicks."""
    fresh = []
    covered = {b.name: torch.zeros(b.stop - b.start, dtype=torch.bool) for b in blocks}
    touched = {name: mask.clone() for name, mask in covered.items()}
    for name, site in sites:
        numbers = site.kicks.reshape(-1).cpu()
        fresh.append(not bool(touched[name][numbers].any()) and len(numbers.unique()) == len(numbers))
        covered[name][numbers] |= fresh[-1]
        touched[name][numbers] = True
    others = {name: (~mask).nonzero().reshape(-1) for name, mask in covered.items()}
    return fresh, {name: numbers.to(device) for name, numbers in others.items() if len(numbers)}


def inner(values: Tensor) -> Tensor:
    """[probe, trial, time, width] as [time, trial, probe, width]; its own inverse."""
    return values.permute(2, 1, 0, 3)


outer = inner
