"""Weight sites on data: how a weight's change kicks the step, and the transpose, for a cut of times and trials at once.

Every site kicks within one block of kicks [time, trial, probe, kick], whose first is `start`. It keeps changes of its
weights in a layout of its own, which `take` makes of all weights' changes [probe, weight] and `put` adds back to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._sites import LookupSite, MatrixSite, OpaqueSite, ScaleSite, Site

Cut = tuple[slice, slice]  # of times and of trials
FILLED = 8
FEW_ROWS = 16  # inner rows, as the stages of an ODE's step, whose products are taken one by one


class SiteData(Protocol):
    """A weight site with its variables at all rows; `entries` number its weights, `kicks` its outputs.

    variables  The weight-site variables [time, trial, ...].
    truncated  The same along the columns of an orthonormal basis of its variables, where it is a matrix.
    no_change  No change of its weights.
    take       All weights' changes [probe, weight] -> those of this site.
    put        The transpose of `take`, added to weights.
    image      V dW^T of the rows of a cut: the site's own outputs [time, trial, probe, output], each by itself.
    collect    The transpose of `image`, added to the change.
    kick       Add V dW^T of these rows to out; where `fresh`, out holds nothing yet at this site's kicks.
    gather     Add V^T kicks of these rows to the change.
    """

    kind: str
    name: str
    entries: Tensor
    kicks: Tensor

    @property
    def variables(self) -> Tensor: ...
    def truncated(self, basis: Tensor) -> SiteData: ...
    def no_change(self, probes: int) -> Tensor: ...
    def take(self, weights: Tensor) -> Tensor: ...
    def put(self, change: Tensor, weights: Tensor) -> None: ...
    def image(self, change: Tensor, cut: Cut) -> Tensor: ...
    def collect(self, values: Tensor, cut: Cut, change: Tensor) -> None: ...
    def kick(self, change: Tensor, cut: Cut, out: Tensor, fresh: bool) -> None: ...
    def gather(self, kicks: Tensor, cut: Cut, change: Tensor) -> None: ...


def sites_data(
    sites: Sequence[Site], starts: Sequence[int], rows: RowFunctions, x: Tensor, z: Tensor
) -> list[SiteData]:
    """The sites with their variables, evaluated on the rows x, z [time, trial, ...]."""
    variables = rows.variables(sites, x, z, FILLED)
    return [_data_of(site)(site, start, rows, V) for site, start, V in zip(sites, starts, variables, strict=True)]


def _data_of(site: Site) -> Callable[..., SiteData]:
    if isinstance(site, MatrixSite):
        return MatrixData
    if isinstance(site, LookupSite):
        return LookupData
    return ScaleData if isinstance(site, ScaleSite) else OpaqueData


class MatrixData:
    """q = W v: V [time, trial, r, d], entries [d, m], kicks [r, m], changes [d', probe, m].

    d' is d filled up with zeros to a multiple of `FILLED`, which the products like. With a basis Q [d, r], V is
    V Q Q^T, and its coordinates V Q stand in its place.
    """

    kind = "matrix"
    basis: Tensor | None = None

    def __init__(self, site: MatrixSite, start: int, rows: RowFunctions, variables: list[Tensor]) -> None:
        self.name = site.name
        self.entries, self.kicks = rows.index(site.entries), rows.index(site.kicks - start)
        self.width, (self.padded,) = len(site.entries), variables
        self.columns = _as_slices(site.kicks - start)

    def truncated(self, basis: Tensor) -> MatrixData:
        cut = copy(self)
        cut.basis = basis
        cut.width = basis.shape[1]
        cut.padded = torch.nn.functional.pad(self.variables @ basis, (0, -cut.width % FILLED))
        return cut

    def no_change(self, probes: int) -> Tensor:
        return self.padded.new_zeros(self.padded.shape[-1], probes, self.entries.shape[1])

    def take(self, weights: Tensor) -> Tensor:
        change = self.no_change(len(weights))
        own = weights[:, self.entries].transpose(0, 1)  # [d, probe, m]
        change[: self.width] = own if self.basis is None else torch.tensordot(self.basis.T, own, 1)
        return change

    def put(self, change: Tensor, weights: Tensor) -> None:
        own = change[: self.width] if self.basis is None else torch.tensordot(self.basis, change[: self.width], 1)
        change = own.transpose(0, 1)  # [probe, d, m]
        weights.index_add_(1, self.entries.reshape(-1), change.reshape(len(weights), -1))

    def image(self, change: Tensor, cut: Cut) -> Tensor:
        return torch.einsum("tbrd,dpm->tbprm", self.padded[cut], change).flatten(-2)  # [time, trial, probe, r * m]

    def collect(self, values: Tensor, cut: Cut, change: Tensor) -> None:
        parts = values.unflatten(-1, tuple(self.kicks.shape))  # [time, trial, probe, r, m]
        change.add_(torch.einsum("tbrd,tbprm->dpm", self.padded[cut], parts))

    def kick(self, change: Tensor, cut: Cut, out: Tensor, fresh: bool) -> None:
        if self.columns is None:
            _add_at(out, self.kicks.reshape(-1), self.image(change, cut), fresh)
            return
        beta = 0 if fresh else 1
        for rows, target, dw in self.products(out, cut, change):
            target.addmm_(rows, dw, beta=beta)

    def gather(self, kicks: Tensor, cut: Cut, change: Tensor) -> None:
        if self.columns is None:
            self.collect(kicks[..., self.kicks.reshape(-1)], cut, change)
            return
        for rows, source, dw in self.products(kicks, cut, change):
            dw.addmm_(rows.T, source)

    def products(self, kicks: Tensor, cut: Cut, change: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """V [time * trial, d] of each inner row, with the kicks [time * trial, m] and change [d, m] of each probe.

        Of all probes at once where all kicks are ours.
        """
        flat = kicks.view(-1, *kicks.shape[2:])  # [time * trial, probe, kick]
        for inner, columns in enumerate(self.columns or ()):
            rows = self.padded[cut][:, :, inner].reshape(-1, self.padded.shape[-1])  # [time * trial, d]
            if columns == slice(0, kicks.shape[-1]):
                yield rows, flat.flatten(1), change.flatten(1)  # [time * trial, probe * m], [d, probe * m]
                continue
            for values, dw in zip(flat[..., columns].unbind(1), change.unbind(1), strict=True):
                yield rows, values, dw

    @property
    def variables(self) -> Tensor:
        """V, without the filling."""
        coordinates = self.padded[..., : self.width]
        return coordinates if self.basis is None else coordinates @ self.basis.T


class _Listed:
    """Changes of a list of weights as they are, [probe, e] for entries [e]."""

    entries: Tensor

    def __init__(self, site: ScaleSite | LookupSite | OpaqueSite, start: int, rows: RowFunctions) -> None:
        self.name, self.like = site.name, rows.like
        self.entries, self.kicks = rows.index(site.entries), rows.index(site.kicks - start)

    def no_change(self, probes: int) -> Tensor:
        return self.like.new_zeros(probes, len(self.entries))

    def take(self, weights: Tensor) -> Tensor:
        return weights[:, self.entries]

    def put(self, change: Tensor, weights: Tensor) -> None:
        weights.index_add_(1, self.entries, change)

    def truncated(self, basis: Tensor) -> SiteData:
        raise NotImplementedError

    def image(self, change: Tensor, cut: Cut) -> Tensor:
        raise NotImplementedError

    def collect(self, values: Tensor, cut: Cut, change: Tensor) -> None:
        raise NotImplementedError

    def kick(self, change: Tensor, cut: Cut, out: Tensor, fresh: bool) -> None:
        _add_at(out, self.kicks, self.image(change, cut), fresh)

    def gather(self, kicks: Tensor, cut: Cut, change: Tensor) -> None:
        self.collect(kicks[..., self.kicks], cut, change)


class ScaleData(_Listed):
    """q[e] = c[e] w[entries[e]]: C [time, trial, e], changes [probe, e]."""

    kind = "scale"

    def __init__(self, site: ScaleSite, start: int, rows: RowFunctions, variables: list[Tensor]) -> None:
        super().__init__(site, start, rows)
        (self.variables,) = variables

    def image(self, change: Tensor, cut: Cut) -> Tensor:
        return self.variables[cut][:, :, None] * change  # [time, trial, 1, e] * [probe, e]

    def collect(self, values: Tensor, cut: Cut, change: Tensor) -> None:
        change.add_((values * self.variables[cut][:, :, None]).sum((0, 1)))  # [time, trial, probe, e] -> [probe, e]


class LookupData(_Listed):
    """q[e] = w[entries[n[e] - 1]], or no weight where n is 0: n [time, trial, e], changes [probe, 1 + weight]."""

    kind = "lookup"

    def __init__(self, site: LookupSite, start: int, rows: RowFunctions, variables: list[Tensor]) -> None:
        super().__init__(site, start, rows)
        (self.variables,) = variables

    def no_change(self, probes: int) -> Tensor:
        return self.like.new_zeros(probes, 1 + len(self.entries))

    def take(self, weights: Tensor) -> Tensor:
        return torch.nn.functional.pad(super().take(weights), (1, 0))

    def put(self, change: Tensor, weights: Tensor) -> None:
        super().put(change[:, 1:], weights)

    def image(self, change: Tensor, cut: Cut) -> Tensor:
        return change[:, self.variables[cut]].movedim(0, 2)

    def collect(self, values: Tensor, cut: Cut, change: Tensor) -> None:
        change.index_add_(1, self.variables[cut].reshape(-1), values.movedim(2, 0).flatten(1))


class OpaqueData(_Listed):
    """q = D_w f(v, w) dw, by the operation's own derivatives at the stored operands; changes [probe, w]."""

    kind = "opaque"

    def __init__(self, site: OpaqueSite, start: int, rows: RowFunctions, variables: list[Tensor]) -> None:
        super().__init__(site, start, rows)
        self.push, self.pull = rows.opaque(site)
        self.data = variables

    @property
    def variables(self) -> Tensor:
        """The operation's data operands, flattened and side by side [time, trial, ...]."""
        return torch.cat([d.reshape(*d.shape[:2], -1) for d in self.data], -1)

    def image(self, change: Tensor, cut: Cut) -> Tensor:
        return self.push(change, *(d[cut] for d in self.data))

    def collect(self, values: Tensor, cut: Cut, change: Tensor) -> None:
        change.add_(self.pull(values, *(d[cut] for d in self.data)))


def _as_slices(kicks: np.ndarray) -> list[slice] | None:
    """The kicks [r, m] of each inner row as a range, where there are few rows and each is one."""
    first = kicks[:, :1]
    if len(kicks) > FEW_ROWS or (kicks != first + np.arange(kicks.shape[1])).any():
        return None
    return [slice(start, start + kicks.shape[1]) for start in first[:, 0].tolist()]


def _add_at(out: Tensor, kicks: Tensor, image: Tensor, fresh: bool) -> None:
    if fresh:
        out[..., kicks] = 0
    out.index_add_(-1, kicks, image)
