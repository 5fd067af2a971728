"""The linearised recurrence of a torch step and its sweeps: P, P*, J, J* without a Jacobian of all times.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    forward:   s_t = A_t s_{t-1} + B_t a_t + q_t          a_t = V_t dW^T
    backward:  l_t = A_{t+1}^T l_{t+1} + q_t,  a_t = B_t^T l_t     dW = sum_t a_t^T V_t

Both run over spans of times: products with V are formed for a span at once, into a buffer that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kpflow_dyn.structure import Product, Structure
from kpflow_dyn.torch_backend.glue import SegmentGlue, make_glue
from kpflow_dyn.torch_backend.rows import Rows, each_row
from kpflow_dyn.torch_backend.sites import SiteData, site_data

SPAN_BYTES = 20 * 2**20


@dataclass
class Recurrent:
    """A product inside the step: its matrix [d, m] and transpose, the kicks that it feeds, and its operand.

    `whole` is (from_state, range) when the operand is a range of z or of the kicks; `fresh` says that no product
    before it feeds the same kicks.
    """

    matrix: Tensor
    transposed: Tensor
    kicks: Tensor | slice
    inner_rows: int
    operand_size: int
    whole: tuple[bool, slice] | None
    fresh: bool


class Tangent:
    """The linear recurrence of one step along the states z_prev -> z [trial, time, unit] under inputs x.

    Args:
        structure: the analysed step.
        x: inputs [trial, time, input].
        z_prev: the states that the step started from [trial, time, unit].
    """

    def __init__(self, structure: Structure, x: Tensor, z_prev: Tensor) -> None:
        rows = Rows(structure)
        self.trials, self.times, self.units = z_prev.shape
        self.kick_size, self.like = structure.kick_size, z_prev[:0]
        nodes = [*structure.replaced, structure.graph.output]
        *values, self.next_state = each_row(rows.values(nodes), x, z_prev)
        self.next_state = self.next_state.reshape(z_prev.shape)
        kicks = z_prev.new_zeros(self.trials, self.times, self.kick_size)
        for (_, index), value in zip(structure.replaced.items(), values, strict=True):
            here = rows.index(index >= 0)
            kicks[..., rows.index(index)[here]] = value.reshape(*kicks.shape[:2], -1)[..., here]
        self.glue = make_glue(rows.glue(), structure.stages, structure.colouring, x, z_prev, kicks)
        self.products = list(self._recurrent(structure, rows))
        self.sites: list[SiteData] = [site_data(site, rows, x, z_prev) for site in structure.sites]
        self.weights, self.push, self.pull = rows.weights()
        self.parameter_size = sum(rows.fixed[node].numel() for node in structure.parameters)
        self.derived = bool(structure.derived)
        self.site_kicks = torch.cat([site.kicks.reshape(-1) for site in self.sites])

    def _recurrent(self, structure: Structure, rows: Rows) -> Iterator[Recurrent]:
        fed: set[int] = set()
        for k, product in enumerate(structure.products):
            matrix, numbers = rows.matrix(product), set(product.kicks.ravel().tolist())
            yield Recurrent(
                matrix,
                matrix.T.contiguous(),
                _range(product) or rows.index(product.kicks.ravel()),
                product.kicks.shape[0],
                product.positions.size,
                self._whole(k),
                not (fed & numbers),
            )
            fed |= numbers

    def _whole(self, k: int) -> tuple[bool, slice] | None:
        segment = self.glue.whole(k) if isinstance(self.glue, SegmentGlue) else None
        return segment and (segment.from_state, slice(segment.source, segment.source + segment.length))

    # Maps between parameters, weights, kicks and states

    def changes(self, theta: Tensor) -> list[Tensor]:
        """Parameter changes [probe, p] -> each site's weight changes [probe, *entries]."""
        weights = self.push(theta)
        return [weights[:, site.entries.reshape(-1)].reshape(-1, *site.entries.shape) for site in self.sites]

    def parameters(self, changes: list[Tensor]) -> Tensor:
        """The transpose of `changes`."""
        weights = changes[0].new_zeros(len(changes[0]), len(self.weights))
        for site, change in zip(self.sites, changes, strict=True):
            weights.index_add_(1, site.entries.reshape(-1), change.reshape(len(change), -1))
        return self.pull(weights)

    def no_changes(self, probes: int) -> list[Tensor]:
        """Zero changes of every site's weights."""
        return [self.like.new_zeros(probes, *site.entries.shape) for site in self.sites]

    # One step, or all steps at once

    def step(self, t: int | slice, dz: Tensor, da: Tensor, out: Tensor, *, kicked: bool, fresh: bool) -> None:
        """out (+)= A dz + B da; da is completed in place by what the products add to the kicks.

        kicked: da holds kicks already; else what the first products write is written over it.
        """
        for k, product in enumerate(self.products):
            self._feed(da, self._operand(k, product, t, dz, da), product, overwrite=product.fresh and not kicked)
        self.glue.forward(len(self.products), t, dz, da, out, fresh)

    def _operand(self, k: int, product: Recurrent, t: int | slice, dz: Tensor, da: Tensor) -> Tensor:
        if product.whole:
            from_state, columns = product.whole
            return (dz if from_state else da)[..., columns]
        operand = dz.new_empty(*dz.shape[:-1], product.operand_size)
        self.glue.forward(k, t, dz, da, operand, True)
        return operand

    def _feed(self, da: Tensor, operand: Tensor, product: Recurrent, overwrite: bool) -> None:
        if isinstance(product.kicks, slice) and product.inner_rows == 1:
            target = da.view(-1, da.shape[-1])[:, product.kicks]
            target.addmm_(operand.reshape(-1, operand.shape[-1]), product.matrix, beta=0 if overwrite else 1)
            return
        image = operand.reshape(*operand.shape[:-1], product.inner_rows, -1) @ product.matrix
        if overwrite:
            da[..., product.kicks] = 0
        _add_at(da, product.kicks, image.flatten(-2))

    def step_adjoint(self, t: int | slice, cotangent: Tensor, z_bar: Tensor, a_bar: Tensor) -> None:
        """z_bar += A^T cotangent, a_bar = B^T cotangent."""
        a_bar.zero_()
        self.glue.adjoint(len(self.products), t, cotangent, z_bar, a_bar)
        for k in reversed(range(len(self.products))):
            self._feed_adjoint(k, self.products[k], t, z_bar, a_bar)

    def _feed_adjoint(self, k: int, product: Recurrent, t: int | slice, z_bar: Tensor, a_bar: Tensor) -> None:
        sent = a_bar[..., product.kicks]
        if product.whole and product.inner_rows == 1:
            from_state, columns = product.whole
            target = z_bar if from_state else a_bar
            target.view(-1, target.shape[-1])[:, columns].addmm_(sent.reshape(-1, sent.shape[-1]), product.transposed)
            return
        sent = sent.reshape(*sent.shape[:-1], product.inner_rows, -1) @ product.transposed
        self.glue.adjoint(k, t, sent.flatten(-2), z_bar, a_bar)

    # Sweeps

    def forward(self, q: Tensor | None, changes: list[Tensor] | None) -> Tensor:
        """s_t = A_t s_{t-1} + B_t V_t dW^T + q_t for q [probe, trial, time, unit], weight changes, or both."""
        probes = len(changes[0]) if q is None else len(q)
        out = q.clone() if q is not None else self.like.new_empty(probes, self.trials, self.times, self.units)
        states = out.unbind(2)
        previous = self.like.new_zeros(probes, self.trials, self.units)
        for span, kicks in self._spans(probes):
            if changes is not None:
                self._kick(changes, span, kicks)
            for t, da in zip(range(span.start, span.stop), kicks.unbind(2), strict=True):
                self.step(t, previous, da, states[t], kicked=changes is not None, fresh=q is None)
                previous = states[t]
        return out

    def backward(self, q: Tensor, changes: list[Tensor] | None) -> Tensor | None:
        """l_t = A_{t+1}^T l_{t+1} + q_t: the costates [probe, trial, time, unit], or, when given weight changes to add
        to, sum_t (B_t^T l_t)^T V_t there, without keeping the costates."""
        probes = len(q)
        keep = q.clone() if changes is None else None
        sources = q.unbind(2)
        costates = keep.unbind(2) if keep is not None else _alternate(q[:, :, -1].clone(), self.times)
        before = q.new_zeros(probes, self.trials, self.units)
        for span, kicks in self._spans(probes, backward=True):
            steps = kicks.unbind(2)
            for t in reversed(range(span.start, span.stop)):
                target = costates[t - 1] if t else before
                if keep is None and t:
                    target.copy_(sources[t - 1])
                self.step_adjoint(t, costates[t], target, steps[t - span.start])
            if changes is not None:
                for site, change in zip(self.sites, changes, strict=True):
                    site.gather(kicks, span, change)
        return keep

    def _kick(self, changes: list[Tensor], span: slice, kicks: Tensor) -> None:
        kicks.zero_()
        for site, change in zip(self.sites, changes, strict=True):
            site.kick(change, span, kicks)

    def _spans(self, probes: int, backward: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Spans of times and a zeroed buffer of kicks [probe, trial, span, kick] that fits the cache."""
        bytes_per_time = probes * self.trials * self.kick_size * self.like.element_size()
        length = min(self.times, max(4, SPAN_BYTES // bytes_per_time))
        buffer = self.like.new_zeros(probes * self.trials * length * self.kick_size)
        starts = range(0, self.times, length)
        for start in reversed(starts) if backward else starts:
            span = slice(start, min(start + length, self.times))
            shape = (probes, self.trials, span.stop - start, self.kick_size)
            yield span, buffer[: probes * self.trials * shape[2] * self.kick_size].view(shape)

    # Maps at all times at once, without the recurrence. A site value is [probe, trial, time, all sites' outputs].

    def write(self, changes: list[Tensor]) -> Tensor:
        """V dW^T of every site, side by side."""
        kicks = self.like.new_zeros(len(changes[0]), self.trials, self.times, self.kick_size)
        values = []
        for site, change in zip(self.sites, changes, strict=True):
            site.kick(change, slice(None), kicks.zero_())
            values.append(kicks[..., site.kicks.reshape(-1)])
        return torch.cat(values, -1)

    def read(self, values: Tensor) -> list[Tensor]:
        """The transpose of `write`."""
        kicks, changes = values.new_zeros(*values.shape[:3], self.kick_size), self.no_changes(len(values))
        parts = values.split([site.kicks.numel() for site in self.sites], -1)
        for site, part, change in zip(self.sites, parts, changes, strict=True):
            site.gather(kicks.zero_().index_add_(-1, site.kicks.reshape(-1), part), slice(None), change)
        return changes

    def enter(self, values: Tensor) -> Tensor:
        """B: site values -> state [probe, trial, time, unit], each step on its own."""
        kicks = values.new_zeros(*values.shape[:3], self.kick_size).index_add_(-1, self.site_kicks, values)
        out = values.new_empty(*values.shape[:3], self.units)
        self.step(slice(None), torch.zeros_like(out), kicks, out, kicked=True, fresh=True)
        return out

    def enter_adjoint(self, q: Tensor) -> Tensor:
        """B*: state -> site values."""
        kicks = q.new_empty(*q.shape[:3], self.kick_size)
        self.step_adjoint(slice(None), q, torch.zeros_like(q), kicks)
        return kicks[..., self.site_kicks]

    def unpropagate(self, s: Tensor) -> Tensor:
        """P^{-1}: s_t - A_t s_{t-1}."""
        previous, out = torch.zeros_like(s), torch.empty_like(s)
        previous[:, :, 1:] = s[:, :, :-1]
        kicks = s.new_zeros(*s.shape[:3], self.kick_size)
        self.step(slice(None), previous, kicks, out, kicked=True, fresh=True)
        return s - out

    def unpropagate_adjoint(self, q: Tensor) -> Tensor:
        """P^{-*}: q_t - A_{t+1}^T q_{t+1}."""
        shifted, kicks = torch.zeros_like(q), q.new_empty(*q.shape[:3], self.kick_size)
        self.step_adjoint(slice(None), q, shifted, kicks)
        out = q.clone()
        out[:, :, :-1] -= shifted[:, :, 1:]
        return out


def _range(product: Product) -> slice | None:
    numbers = product.kicks.ravel()
    first, size = int(numbers[0]), numbers.size
    return slice(first, first + size) if numbers.tolist() == list(range(first, first + size)) else None


def _add_at(target: Tensor, index: Tensor | slice, image: Tensor) -> None:
    if isinstance(index, slice):
        target[..., index] += image
    else:
        target.index_add_(-1, index, image)


def _alternate(first: Tensor, times: int) -> list[Tensor]:
    """Two buffers in turn, for costates that nobody keeps."""
    pair = (first, torch.empty_like(first))
    return [pair[(times - 1 - t) % 2] for t in range(times)]
