"""The linearised recurrence of a torch step and its sweeps: P, P*, J, J* without a Jacobian of all times.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    forward:   s_t = A_t s_{t-1} + B_t a_t + q_t          a_t = V_t dW^T
    backward:  l_t = A_{t+1}^T l_{t+1} + q_t,  a_t = B_t^T l_t     dW = sum_t a_t^T V_t

Both run over spans of times: products with V are formed for a span at once, in a buffer that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from kpflow_dyn.structure import Structure
from kpflow_dyn.torch_backend.plan import plan_updates
from kpflow_dyn.torch_backend.program import AllTimes, Run, Same, Steps, Views, bind
from kpflow_dyn.torch_backend.rows import Rows, each_row
from kpflow_dyn.torch_backend.sites import SiteData, site_data

SPAN_BYTES = 20 * 2**20


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
        *hubs, next_state = each_row(rows.values([*structure.replaced, structure.graph.output]), x, z_prev)
        self.next_state = next_state.reshape(z_prev.shape)
        kicks = z_prev.new_zeros(self.trials, self.times, self.kick_size)
        for index, value in zip(structure.replaced.values(), hubs, strict=True):
            here = rows.index(index >= 0)
            kicks[..., rows.index(index)[here]] = value.reshape(*kicks.shape[:2], -1)[..., here]
        self.updates, self.widths = plan_updates(structure, rows, x, z_prev, kicks)
        self.sites: list[SiteData] = [site_data(site, rows, x, z_prev) for site in structure.sites]
        self.site_kicks = torch.cat([site.kicks.reshape(-1) for site in self.sites])
        self.weights, self.push, self.pull = rows.weights()
        self.parameter_size = sum(rows.fixed[node].numel() for node in structure.parameters)

    # Between parameters and the weights of each site

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

    # Sweeps

    def forward(self, q: Tensor | None, changes: list[Tensor] | None) -> Tensor:
        """s_t = A_t s_{t-1} + B_t V_t dW^T + q_t for q [probe, trial, time, unit], weight changes, or both."""
        probes = len(q if q is not None else changes[0] if changes is not None else ())
        out = self._empty(probes, self.times, self.units)
        before = self._zeros(probes, self.units)
        for span, kicks in self._spans(probes):
            if changes is not None:
                self._kick(changes, span, kicks)
            z, s = _delayed(out, before, span), Steps(out[:, :, span])
            starts: dict[str, Views | None] = {"out": None if q is None else Steps(q[:, :, span])}
            if changes is None:
                starts["a"] = None
            step = self._bind(z, Steps(kicks), s, starts, span)
            for i in range(span.stop - span.start):
                step(i)
        return out

    def backward(self, q: Tensor) -> Tensor:
        """The costates l_t = A_{t+1}^T l_{t+1} + q_t [probe, trial, time, unit]."""
        out, probes = torch.empty_like(q), len(q)
        out[:, :, -1] = q[:, :, -1]
        before = self._zeros(probes, self.units)
        for span, kicks in self._spans(probes, backward=True):
            z, s = _delayed(out, before, span), Steps(out[:, :, span])
            starts = {"a": None, "z": _delayed(q, before, span)}
            step = self._bind(z, Steps(kicks), s, starts, span, transposed=True)
            for i in reversed(range(span.stop - span.start)):
                step(i)
        return out

    def gradient(self, q: Tensor) -> list[Tensor]:
        """sum_t (B_t^T l_t)^T V_t for every site, l the costates of `backward`, which are not kept."""
        probes, changes = len(q), self.no_changes(len(q))
        before, last = self._zeros(probes, self.units), q[:, :, -1]
        for span, kicks in self._spans(probes, backward=True):
            length = span.stop - span.start
            costates = self._empty(probes, length + 1, self.units)
            costates[:, :, -1] = last
            starts = {"a": None, "z": _delayed(q, before, span)}
            z, s = Steps(costates[:, :, :-1]), Steps(costates[:, :, 1:])
            step = self._bind(z, Steps(kicks), s, starts, span, transposed=True)
            for i in reversed(range(length)):
                step(i)
            for site, change in zip(self.sites, changes, strict=True):
                site.gather(kicks, span, change)
            last = costates[:, :, 0]
        return changes

    def _bind(
        self, z: Views, a: Steps, out: Views, starts: Mapping[str, Views | None], span: slice, transposed: bool = False
    ) -> Run:
        probes, times = a.values.shape[0], span.stop - span.start
        work = {name: Same(self._empty(probes, width), times) for name, width in self.widths.items()}
        return bind(
            self.updates,
            {"z": z, "a": a, "out": out, **work},
            {**dict.fromkeys(work), **starts},
            span,
            transposed=transposed,
        )

    def _kick(self, changes: list[Tensor], span: slice, kicks: Tensor) -> None:
        kicks.zero_()
        for site, change in zip(self.sites, changes, strict=True):
            site.kick(change, span, kicks)

    def _spans(self, probes: int, backward: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """Spans of times, each with a buffer of kicks [probe, trial, span, kick] that fits the cache."""
        bytes_per_time = probes * self.trials * self.kick_size * self.like.element_size()
        length = min(self.times, max(4, SPAN_BYTES // bytes_per_time))
        buffer = self._empty(probes, length, self.kick_size).view(-1)
        starts = range(0, self.times, length)
        for start in reversed(starts) if backward else starts:
            span = slice(start, min(start + length, self.times))
            shape = (probes, self.trials, span.stop - start, self.kick_size)
            yield span, buffer[: torch.Size(shape).numel()].view(shape)

    # Maps at all times at once, without the recurrence. A site value is [probe, trial, time, all sites' outputs].

    def write(self, changes: list[Tensor]) -> Tensor:
        """V dW^T of every site, side by side."""
        kicks = self._empty(len(changes[0]), self.times, self.kick_size)
        values = []
        for site, change in zip(self.sites, changes, strict=True):
            site.kick(change, slice(None), kicks.zero_())
            values.append(kicks[..., site.kicks.reshape(-1)])
        return torch.cat(values, -1)

    def read(self, values: Tensor) -> list[Tensor]:
        """The transpose of `write`."""
        kicks, changes = self._empty(len(values), self.times, self.kick_size), self.no_changes(len(values))
        parts = values.split([site.kicks.numel() for site in self.sites], -1)
        for site, part, change in zip(self.sites, parts, changes, strict=True):
            site.gather(kicks.zero_().index_add_(-1, site.kicks.reshape(-1), part), slice(None), change)
        return changes

    def enter(self, values: Tensor) -> Tensor:
        """B: site values -> state [probe, trial, time, unit], each step on its own."""
        kicks = self._zeros(len(values), self.times, self.kick_size).index_add_(-1, self.site_kicks, values)
        return self._each_step(self._zeros(len(values), self.times, self.units), kicks)

    def enter_adjoint(self, q: Tensor) -> Tensor:
        """B*: state -> site values."""
        return self._each_step_adjoint(q)[1][..., self.site_kicks]

    def unpropagate(self, s: Tensor) -> Tensor:
        """P^{-1}: s_t - A_t s_{t-1}."""
        previous = torch.zeros_like(s)
        previous[:, :, 1:] = s[:, :, :-1]
        return s - self._each_step(previous, self._zeros(len(s), self.times, self.kick_size))

    def unpropagate_adjoint(self, q: Tensor) -> Tensor:
        """P^{-*}: q_t - A_{t+1}^T q_{t+1}."""
        out = q.clone()
        out[:, :, :-1] -= self._each_step_adjoint(q)[0][:, :, 1:]
        return out

    def _each_step(self, z: Tensor, kicks: Tensor) -> Tensor:
        out = torch.empty_like(z)
        self._bind_all(z, kicks, out, {"out": None})(0)
        return out

    def _each_step_adjoint(self, q: Tensor) -> tuple[Tensor, Tensor]:
        z, kicks = torch.empty_like(q), self._empty(len(q), self.times, self.kick_size)
        self._bind_all(z, kicks, q, {"a": None, "z": None}, transposed=True)(0)
        return z, kicks

    def _bind_all(
        self, z: Tensor, a: Tensor, out: Tensor, starts: Mapping[str, Views | None], transposed: bool = False
    ) -> Run:
        work = {name: self._empty(len(z), self.times, width) for name, width in self.widths.items()}
        blocks = {name: AllTimes(v.contiguous()) for name, v in {"z": z, "a": a, "out": out, **work}.items()}
        return bind(self.updates, blocks, {**dict.fromkeys(work), **starts}, None, transposed=transposed)

    def _empty(self, probes: int, *shape: int) -> Tensor:
        return self.like.new_empty(probes, self.trials, *shape)

    def _zeros(self, probes: int, *shape: int) -> Tensor:
        return self.like.new_zeros(probes, self.trials, *shape)


def _delayed(values: Tensor, before: Tensor, span: slice) -> Steps:
    """The values of one step earlier, over a span."""
    if span.start:
        return Steps(values[:, :, span.start - 1 : span.stop - 1])
    return Steps(values[:, :, : span.stop - 1], before)
