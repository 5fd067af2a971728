"""The linearised recurrence of a torch step and its sweeps: P, P*, J, J* without a Jacobian of all times.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    forward:   s_t = A_t s_{t-1} + B_t a_t + q_t          a_t = V_t dW^T
    backward:  l_t = A_{t+1}^T l_{t+1} + q_t,  a_t = B_t^T l_t     dW = sum_t a_t^T V_t

Both run over spans of times: products with V are formed for a span at once, in a block that stays in the cache. Blocks
are laid out [time, trial, probe, width] inside; everything public is [probe, trial, time, width].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kpflow_dyn.structure import Structure
from kpflow_dyn.torch_backend.plan import plan_updates
from kpflow_dyn.torch_backend.program import AllTimes, Run, Same, Steps, bind
from kpflow_dyn.torch_backend.rows import Rows, each_row
from kpflow_dyn.torch_backend.sites import SiteData, site_data

SPAN_BYTES = 20 * 2**20


class Tangent:
    """The linear recurrence of one step along the states z_prev -> z under inputs x.

    Args:
        structure: the analysed step.
        x: inputs [trial, time, input].
        z_prev: the states that the step started from [trial, time, unit].
    """

    def __init__(self, structure: Structure, x: Tensor, z_prev: Tensor) -> None:
        rows, x, z = Rows(structure), x.transpose(0, 1).contiguous(), z_prev.transpose(0, 1).contiguous()
        self.times, self.trials, self.units = z.shape
        self.kick_size, self.like = structure.kick_size, z[:0]
        *hubs, next_state = each_row(rows.values([*structure.replaced, structure.graph.output]), x, z)
        self.next_state = next_state.reshape(z.shape).transpose(0, 1)
        kicks = z.new_zeros(self.times, self.trials, self.kick_size)
        for index, value in zip(structure.replaced.values(), hubs, strict=True):
            here = rows.index(index >= 0)
            kicks[..., rows.index(index)[here]] = value.reshape(*kicks.shape[:2], -1)[..., here]
        self.updates, self.widths = plan_updates(structure, rows, x, z, kicks)
        self.sites: list[SiteData] = [site_data(site, rows, x, z) for site in structure.sites]
        self.site_kicks = torch.cat([site.kicks.reshape(-1) for site in self.sites])
        self.fresh, self.unkicked = self._first_kicks()
        self.weights, self.push, self.pull = rows.weights()
        self.parameter_size = sum(rows.fixed[node].numel() for node in structure.parameters)
        used = torch.cat([site.entries.reshape(-1) for site in self.sites])
        self.plain = not structure.derived and len(used.unique()) == len(used)

    def _first_kicks(self) -> tuple[list[bool], Tensor]:
        """Which sites are the first at all of their kicks, so that they may overwrite; and all other kicks."""
        fresh, covered = [], torch.zeros(self.kick_size, dtype=torch.bool, device=self.like.device)
        for site in self.sites:
            numbers = site.kicks.reshape(-1)
            fresh.append(not bool(covered[numbers].any()) and len(numbers.unique()) == len(numbers))
            covered[numbers] |= fresh[-1]
        return fresh, (~covered).nonzero().reshape(-1)

    # Between parameters [probe, p] and the changes of each site's weights, in the site's own layout

    def changes(self, theta: Tensor) -> list[Tensor]:
        """Parameter changes -> weight changes."""
        weights = self.push(theta)
        return [site.take(weights) for site in self.sites]

    def parameters(self, changes: list[Tensor], probes: int) -> Tensor:
        """The transpose of `changes`."""
        weights = self.like.new_zeros(probes, len(self.weights))
        for site, change in zip(self.sites, changes, strict=True):
            site.put(change, weights)
        return self.pull(weights)

    # Sweeps: [probe, trial, time, unit]

    def forward(self, q: Tensor | None, changes: list[Tensor] | None, probes: int) -> Tensor:
        """s_t = A_t s_{t-1} + B_t V_t dW^T + q_t for q, weight changes, or both."""
        out, last = self.like.new_empty(probes, self.trials, self.times, self.units), torch.zeros(())
        fresh = {name for name, given in (("out", q), ("a", changes)) if given is None}
        for span, kicks, states in self._spans(probes):
            states[0] = last
            if q is not None:
                states[1:] = _inner(q[:, :, span])
            if changes is not None:
                self._kick(changes, span, kicks)
            step = self._bind(states, kicks, fresh, span)
            for i in range(span.stop - span.start):
                step(i)
            out[:, :, span] = _outer(states[1:])
            last = states[-1]
        return out

    def backward(self, q: Tensor) -> Tensor:
        """The costates l_t = A_{t+1}^T l_{t+1} + q_t."""
        out = torch.empty_like(q)
        for span, _, costates in self._costates(q):
            out[:, :, span] = _outer(costates)
        return out

    def gradient(self, q: Tensor) -> list[Tensor]:
        """sum_t (B_t^T l_t)^T V_t for every site, l the costates of `backward`, which are not kept."""
        changes = [site.no_change(len(q)) for site in self.sites]
        for span, kicks, _ in self._costates(q):
            for site, change in zip(self.sites, changes, strict=True):
                site.gather(kicks, span, change)
        return changes

    def descent(self, q: Tensor) -> Tensor:
        """J J* q: the gradient's weight changes sent forward; past the parameters where each weight is one."""
        changes = self.gradient(q)
        if not self.plain:
            changes = self.changes(self.parameters(changes, len(q)))
        return self.forward(None, changes, len(q))

    def _costates(self, q: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """From the last span to the first: B_t^T l_t [time, trial, probe, kick] and l_t [time, trial, probe, unit]."""
        last = _inner(q)[-1]
        for span, kicks, costates in self._spans(len(q), backward=True):
            before = max(span.start - 1, 0)  # the first span sends a costate to z0, which nobody reads
            costates[0] = _inner(q)[before]
            costates[1:-1] = _inner(q[:, :, span])[:-1]
            costates[-1] = last
            step = self._bind(costates, kicks, {"a"}, span, transposed=True)
            for i in reversed(range(span.stop - span.start)):
                step(i)
            yield span, kicks, costates[1:]
            last = costates[0].clone()

    def _bind(self, states: Tensor, kicks: Tensor, fresh: set[str], span: slice, transposed: bool = False) -> Run:
        probes, times = states.shape[2], span.stop - span.start
        work = {name: Same(self._empty(1, probes, width)[0], times) for name, width in self.widths.items()}
        blocks = {"z": Steps(states[:-1]), "a": Steps(kicks), "out": Steps(states[1:]), **work}
        return bind(self.updates, blocks, fresh | set(work), span, transposed=transposed)

    def _kick(self, changes: list[Tensor], span: slice, kicks: Tensor) -> None:
        kicks[..., self.unkicked] = 0
        for site, change, fresh in zip(self.sites, changes, self.fresh, strict=True):
            site.kick(change, span, kicks, fresh)

    def _spans(self, probes: int, backward: bool = False) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Spans of times, with work blocks that fit the cache: the kicks, and the states with one more before them."""
        bytes_per_time = probes * self.trials * (self.kick_size + self.units) * self.like.element_size()
        length = min(self.times, max(4, SPAN_BYTES // bytes_per_time))
        starts = range(0, self.times, length)
        kicks, states = self._empty(length, probes, self.kick_size), self._empty(length + 1, probes, self.units)
        for start in reversed(starts) if backward else starts:
            times = min(length, self.times - start)
            yield slice(start, start + times), kicks[:times], states[: times + 1]

    # Maps at all times at once, without the recurrence. Site values are all sites' outputs, side by side.

    def write(self, changes: list[Tensor], probes: int) -> Tensor:
        """V dW^T of every site."""
        kicks = self._empty(self.times, probes, self.kick_size)
        values = []
        for site, change in zip(self.sites, changes, strict=True):
            site.kick(change, slice(None), kicks, True)
            values.append(kicks[..., site.kicks.reshape(-1)])
        return _outer(torch.cat(values, -1))

    def read(self, values: Tensor) -> list[Tensor]:
        """The transpose of `write`."""
        kicks = self._empty(self.times, len(values), self.kick_size)
        changes = [site.no_change(len(values)) for site in self.sites]
        parts = _inner(values).split([site.kicks.numel() for site in self.sites], -1)
        for site, part, change in zip(self.sites, parts, changes, strict=True):
            site.gather(kicks.zero_().index_add_(-1, site.kicks.reshape(-1), part), slice(None), change)
        return changes

    def enter(self, values: Tensor) -> Tensor:
        """B: site values -> state, each step on its own."""
        kicks = self._empty(self.times, len(values), self.kick_size).zero_()
        kicks.index_add_(-1, self.site_kicks, _inner(values))
        return _outer(self._each_step(self._empty(self.times, len(values), self.units).zero_(), kicks))

    def enter_adjoint(self, q: Tensor) -> Tensor:
        """B*: state -> site values."""
        return _outer(self._each_step_adjoint(_inner(q).contiguous())[1][..., self.site_kicks])

    def unpropagate(self, s: Tensor) -> Tensor:
        """P^{-1}: s_t - A_t s_{t-1}."""
        previous = self._empty(self.times, len(s), self.units).zero_()
        previous[1:] = _inner(s)[:-1]
        return s - _outer(self._each_step(previous, self._empty(self.times, len(s), self.kick_size).zero_()))

    def unpropagate_adjoint(self, q: Tensor) -> Tensor:
        """P^{-*}: q_t - A_{t+1}^T q_{t+1}."""
        out = q.clone()
        out[:, :, :-1] -= _outer(self._each_step_adjoint(_inner(q).contiguous())[0][1:])
        return out

    def _each_step(self, z: Tensor, kicks: Tensor) -> Tensor:
        out = torch.empty_like(z)
        self._bind_all(z, kicks, out, {"out"})(0)
        return out

    def _each_step_adjoint(self, q: Tensor) -> tuple[Tensor, Tensor]:
        z, kicks = torch.empty_like(q), self._empty(self.times, q.shape[2], self.kick_size)
        self._bind_all(z, kicks, q, {"a", "z"}, transposed=True)(0)
        return z, kicks

    def _bind_all(self, z: Tensor, a: Tensor, out: Tensor, fresh: set[str], transposed: bool = False) -> Run:
        work = {name: self._empty(self.times, z.shape[2], width) for name, width in self.widths.items()}
        blocks = {name: AllTimes(v) for name, v in {"z": z, "a": a, "out": out, **work}.items()}
        return bind(self.updates, blocks, fresh | set(work), None, transposed=transposed)

    def _empty(self, times: int, probes: int, width: int) -> Tensor:
        return self.like.new_empty(times, self.trials, probes, width)


def _inner(values: Tensor) -> Tensor:
    """[probe, trial, time, width] as [time, trial, probe, width]; its own inverse."""
    return values.permute(2, 1, 0, 3)


_outer = _inner
