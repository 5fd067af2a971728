"""Weight sites on data: how a weight's change kicks the step, and the transpose, for a span of times at once.

Buffers of kicks are [probe, trial, span, kick], changes of a site's weights [probe, ...] in the shape of its entries.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from kpflow_dyn.structure import MatrixSite, OpaqueSite, ScaleSite, Site
from kpflow_dyn.torch_backend.rows import Rows, each_row


class SiteData(Protocol):
    """A weight site with its variables at all rows."""

    kind: str
    name: str
    entries: Tensor
    kicks: Tensor

    @property
    def variables(self) -> Tensor:
        """The weight-site variables [trial, time, ...]."""
        ...

    def kick(self, dw: Tensor, span: slice, out: Tensor) -> None:
        """Add V dW^T of these times to out."""

    def gather(self, kicks: Tensor, span: slice, dw: Tensor) -> None:
        """Add V^T kicks of these times to dw."""


def site_data(site: Site, rows: Rows, x: Tensor, z: Tensor) -> SiteData:
    """The site with its variables, evaluated on the rows x, z [trial, time, ...]."""
    if isinstance(site, MatrixSite):
        return MatrixData(site, rows, x, z)
    return ScaleData(site, rows, x, z) if isinstance(site, ScaleSite) else OpaqueData(site, rows, x, z)


class MatrixData:
    """q = W v: V [trial, time, r, d], entries [d, m], kicks [r, m]."""

    kind = "matrix"

    def __init__(self, site: MatrixSite, rows: Rows, x: Tensor, z: Tensor) -> None:
        self.name = site.name
        self.entries, self.kicks = rows.index(site.entries), rows.index(site.kicks)
        self.variables = _variables(site, rows, x, z)
        self.columns = _as_slice(site.kicks)

    def kick(self, dw: Tensor, span: slice, out: Tensor) -> None:
        v = self.rows_of(span)
        for change, buffer in zip(dw, out, strict=True):
            if self.columns is not None:
                buffer.reshape(-1, out.shape[-1])[:, self.columns].addmm_(v, change)
            else:
                image = (v @ change).reshape(*buffer.shape[:2], -1)
                buffer.index_add_(-1, self.kicks.reshape(-1), image)

    def gather(self, kicks: Tensor, span: slice, dw: Tensor) -> None:
        v = self.rows_of(span).T
        for change, buffer in zip(dw, kicks, strict=True):
            if self.columns is not None:
                change.addmm_(v, buffer.reshape(-1, kicks.shape[-1])[:, self.columns])
            else:
                change.addmm_(v, buffer[..., self.kicks.reshape(-1)].reshape(v.shape[1], -1))

    def rows_of(self, span: slice) -> Tensor:
        return self.variables[:, span].reshape(-1, self.variables.shape[-1])


class ScaleData:
    """q[e] = c[e] w[entries[e]]: C [trial, time, e]."""

    kind = "scale"

    def __init__(self, site: ScaleSite, rows: Rows, x: Tensor, z: Tensor) -> None:
        self.name = site.name
        self.entries, self.kicks = rows.index(site.entries), rows.index(site.kicks)
        if site.operand is None:
            self.variables = x.new_ones(1, 1, len(site.kicks)).expand(*x.shape[:2], -1)
        else:
            (found,) = each_row(rows.derivative_in_weight(site.node, site.operand), x, z)
            self.variables = found.reshape(*x.shape[:2], -1)

    def kick(self, dw: Tensor, span: slice, out: Tensor) -> None:
        out.index_add_(-1, self.kicks, self.variables[:, span] * dw[:, None, None])

    def gather(self, kicks: Tensor, span: slice, dw: Tensor) -> None:
        dw.add_((kicks[..., self.kicks] * self.variables[:, span]).sum((1, 2)))


class OpaqueData:
    """q = D_w f(v, w) dw, by the operation's own derivatives at the stored operands."""

    kind = "opaque"

    def __init__(self, site: OpaqueSite, rows: Rows, x: Tensor, z: Tensor) -> None:
        self.name = site.name
        self.entries, self.kicks = rows.index(site.entries), rows.index(site.kicks)
        operands, push, pull = rows.opaque(site.node, site.operand)
        self.data = each_row(rows.values(operands), x, z)
        axes = (0,) * len(self.data)
        self.push = vmap(vmap(vmap(push, (None, *axes)), (None, *axes)), (0, *(None,) * len(axes)))
        self.pull = vmap(vmap(vmap(pull)), (0, *(None,) * len(axes)))

    @property
    def variables(self) -> Tensor:
        """The operation's data operands, flattened and side by side [trial, time, ...]."""
        return torch.cat([d.reshape(*d.shape[:2], -1) for d in self.data], -1)

    def kick(self, dw: Tensor, span: slice, out: Tensor) -> None:
        out.index_add_(-1, self.kicks, self.push(dw, *(d[:, span] for d in self.data)))

    def gather(self, kicks: Tensor, span: slice, dw: Tensor) -> None:
        dw.add_(self.pull(kicks[..., self.kicks], *(d[:, span] for d in self.data)).sum((1, 2)))


def _variables(site: MatrixSite, rows: Rows, x: Tensor, z: Tensor) -> Tensor:
    nodes = list(dict.fromkeys(node for block in site.blocks for node, _ in block if node is not None))
    values = dict(zip(nodes, each_row(rows.values(nodes), x, z) if nodes else [], strict=True))
    blocks = []
    for block in site.blocks:
        pieces = []
        for node, positions in block:
            if node is None:
                pieces.append(x.new_ones(*x.shape[:2], *positions.shape))
            else:
                flat = values[node].reshape(*x.shape[:2], -1)
                pieces.append(flat[..., rows.index(positions.ravel())].reshape(*x.shape[:2], *positions.shape))
        blocks.append(torch.cat(pieces, -1))
    return torch.cat(blocks, 2).contiguous()


def _as_slice(kicks: np.ndarray) -> slice | None:
    """The kicks [r, m] as a range, where there is one inner row and they are one."""
    first = int(kicks.flat[0])
    if kicks.shape[0] == 1 and (kicks[0] == np.arange(first, first + kicks.shape[1])).all():
        return slice(first, first + kicks.shape[1])
    return None
