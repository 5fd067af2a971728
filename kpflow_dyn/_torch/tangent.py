"""The linearised recurrence of a torch step and its sweeps: P, P*, J, J* without a Jacobian of all times.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    forward:   s_t = A_t s_{t-1} + B_t a_t + q_t          a_t = V_t dW^T
    backward:  l_t = A_{t+1}^T l_{t+1} + q_t,  a_t = B_t^T l_t     dW = sum_t a_t^T V_t

Both run over spans of times: products with V are formed for a span at once, in a block that stays in the cache. Blocks
are laid out [time, trial, probe, width] inside; everything public is [probe, trial, time, width].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.func import vmap

from kpflow_dyn._arrays.memory import bytes_of, on_device, span_bytes
from kpflow_dyn._torch.checks import check_finite
from kpflow_dyn._torch.glue import find_glue
from kpflow_dyn._torch.plan import kick_blocks, plan_updates, products_of
from kpflow_dyn._torch.program import (
    AllTimes,
    LinearUpdate,
    MatrixUpdate,
    Range,
    Run,
    ScatteredUpdate,
    Steps,
    bind,
    reached,
)
from kpflow_dyn._torch.rows import TORCH, each_row
from kpflow_dyn._torch.sites import site_data
from kpflow_dyn.tracing._rows import RowFunctions
from kpflow_dyn.tracing._steps import AnalysedStep

Kicks = dict[str, Tensor]  # by block, [time, trial, probe, kick]
Changes = tuple[slice, list[Tensor]]  # of every site's weights, for a cut of the trials
ALL = slice(None)

FROM_STATES, FROM_CHANGES, ADJOINT = "from kicks to the states", "from changes of the weights", "adjoint"
KICK, KICK_ADJOINT = "from changes of the weights, each step on its own", "its adjoint"
ROWS_TOGETHER = 160  # rows trial x probe of a step that keep a CPU's products in its second-level cache


class Tangent:
    """The linear recurrence of one step along the states z_prev -> z under inputs x.

    Args:
        step: the analysed step.
        x: inputs [trial, time, input].
        z_prev: the states that the step started from [trial, time, unit].
    """

    def __init__(self, step: AnalysedStep, x: Tensor, z_prev: Tensor) -> None:
        rows, glue = RowFunctions(step, TORCH), find_glue(step)
        x, z = x.transpose(0, 1).contiguous(), z_prev.transpose(0, 1).contiguous()
        self.times, self.trials, self.units = z.shape
        self.kick_size, self.like = step.kicks.size, z[:0]
        *hubs, next_state = each_row(rows.values([*step.kicks.replaced, step.graph.output]), x, z)
        self.next_state = next_state.reshape(z.shape).transpose(0, 1)
        kicks = z.new_zeros(self.times, self.trials, self.kick_size)
        for index, value in zip(step.kicks.replaced.values(), hubs, strict=True):
            here = rows.index(index >= 0)
            kicks[..., rows.index(index)[here]] = value.reshape(*kicks.shape[:2], -1)[..., here]
        self.rows, self.products = rows, glue.products
        self.blocks = kick_blocks(step, glue)
        self.updates, self.widths = plan_updates(glue, rows, self.blocks, x, z, kicks)
        self.kick_updates = reached(self.updates, {block.name for block in self.blocks})
        self.weights, *derivatives = rows.weights()
        self.push, self.pull = (vmap(derivative) for derivative in derivatives)
        self.parameter_size = sum(value.numel() for value in rows.parameter_values())
        homes = [next(b for b in self.blocks if site.kicks.min() in range(b.start, b.stop)) for site in step.sites]
        self.sites = [
            (home.name, site_data(site, home.start, rows, x, z)) for home, site in zip(homes, step.sites, strict=True)
        ]
        self.site_kicks = rows.index(np.concatenate([site.kicks.ravel() for site in step.sites]))
        self.fresh, self.unkicked = self._first_kicks()
        used = torch.cat([site.entries.reshape(-1) for _, site in self.sites])
        self._idle: _Work | None = None
        self._check(rows, x, z)
        self.plain = not step.computed and len(used.unique()) == len(used)

    def _first_kicks(self) -> tuple[list[bool], dict[str, Tensor]]:
        """Which sites are the first at all of their kicks, so that they may overwrite; and each block's other kicks."""
        fresh = []
        covered = {b.name: torch.zeros(b.stop - b.start, dtype=torch.bool) for b in self.blocks}
        touched = {name: mask.clone() for name, mask in covered.items()}
        for name, site in self.sites:
            numbers = site.kicks.reshape(-1).cpu()
            fresh.append(not bool(touched[name][numbers].any()) and len(numbers.unique()) == len(numbers))
            covered[name][numbers] |= fresh[-1]
            touched[name][numbers] = True
        others = {name: (~mask).nonzero().reshape(-1) for name, mask in covered.items()}
        return fresh, {name: numbers.to(self.like.device) for name, numbers in others.items() if len(numbers)}

    def _check(self, rows: RowFunctions, x: Tensor, z: Tensor) -> None:
        """Compare every row with forward mode through the whole step, in one random direction."""
        generator = torch.Generator(z.device).manual_seed(0)
        dz, dtheta = (
            torch.randn(shape, generator=generator, dtype=z.dtype, device=z.device)
            for shape in (z.shape, (self.parameter_size,))
        )
        (expected,) = each_row(rows.tangent(dtheta), x, z, dz)
        check_finite(expected.transpose(0, 1), "the derivative of the step")
        found = self.derivative(dz, dtheta)
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(z.dtype).tiny))
        if not error <= 1e4 * torch.finfo(z.dtype).eps:
            raise RuntimeError(
                f"the linearised step is off by {error:.1e} of its size from forward mode through it; please report "
                "this cell, and write it with simpler operations meanwhile"
            )

    def derivative(self, dz: Tensor, dtheta: Tensor) -> Tensor:
        """Every step by itself: how its result moves along dz [time, trial, unit] and dtheta [p]."""
        kicks = self._kick_blocks(self.times, 1)
        self._kick([(ALL, self.changes(dtheta[None]))], ALL, kicks)
        return self._each_step(dz.contiguous()[:, :, None], kicks)[:, :, 0]

    def truncated(self, bases: list[Tensor | None]) -> Tangent:
        """The same with each site's variables cut to V Q Q^T, for orthonormal columns Q [d, r]; None for all of V."""
        cut = copy(self)
        cut.sites = [
            (name, site if basis is None else site.truncated(basis))
            for (name, site), basis in zip(self.sites, bases, strict=True)
        ]
        cut._idle = None
        return cut

    def fed_back(self, draw: Callable[[str, Tensor], Tensor]) -> Tangent:
        """The same gates, but what moves is multiplied by draw(name, W) in the place of each matrix W.

        Matrices that are computed from such parameters are computed anew.
        """
        rows = self.rows.with_matrices(draw)
        drawn = [u for p in self.products for u in products_of(p, Range("z", 0, 0), self.blocks, rows)]
        turned, following = copy(self), iter(drawn)
        turned.updates = [
            replace(next(following), sink=u.sink, source=u.source)
            if isinstance(u, MatrixUpdate | ScatteredUpdate | LinearUpdate)
            else u
            for u in self.updates
        ]
        turned._idle = None
        return turned

    @property
    def probes_together(self) -> int:
        """How many probes ride in one sweep; a large device takes any number."""
        return 2**30 if on_device(self.like) else max(1, ROWS_TOGETHER // self.trials)

    # Between parameters [probe, p] and the changes of each site's weights, in the site's own layout

    def changes(self, theta: Tensor) -> list[Tensor]:
        """Parameter changes -> weight changes."""
        weights = self.push(theta)
        return [site.take(weights) for _, site in self.sites]

    def parameters(self, changes: list[Tensor], probes: int) -> Tensor:
        """The transpose of `changes`."""
        weights = self.like.new_zeros(probes, len(self.weights))
        for (_, site), change in zip(self.sites, changes, strict=True):
            site.put(change, weights)
        return self.pull(weights)

    # Operators on blocks of any number of probes, [probe, trial, time, unit] and [probe, p]

    def propagate(self, q: Tensor) -> Tensor:
        """P q: s_t = A_t s_{t-1} + q_t."""
        out = torch.empty_like(q)
        for part, target in self._groups(q, out):
            self._forward(part, None, target, FROM_STATES)
        return out

    def propagate_adjoint(self, q: Tensor) -> Tensor:
        """P* q: the costates l_t = A_{t+1}^T l_{t+1} + q_t."""
        out = torch.empty_like(q)
        for part, target in self._groups(q, out):
            for span, _, costates in self._costates(part):
                target[:, :, span] = _outer(costates)
        return out

    def factorise(self, start: Tensor, interval: int) -> Tensor:
        """R [block, trial, k, k] of A_t ... A_{t-interval+1} Q = Q' R, block after block, the last maybe shorter.

        The first Q is `start` [k, trial, unit].
        """
        found, last = [], start.transpose(0, 1)
        with self._work(len(start)) as work:
            for span, _, states in work.spans():
                states[0] = last
                states[1:] = 0
                step = work.step(span, FROM_STATES)
                for i, done in enumerate(range(span.start + 1, span.stop + 1)):
                    step(i)
                    if done % interval == 0 or done == self.times:
                        Q, R = torch.linalg.qr(states[i + 1].mT)
                        states[i + 1] = Q.mT
                        found.append(R)
                last = states[-1]
        return torch.stack(found)

    def jvp(self, theta: Tensor) -> Tensor:
        """J theta: how the states move with the parameters."""
        out = self.like.new_empty(len(theta), self.trials, self.times, self.units)
        for part, target in self._groups(theta, out):
            self._forward(None, [(ALL, self.changes(part))], target)
        return out

    def vjp(self, q: Tensor) -> Tensor:
        """J* q: backpropagation through time."""
        out = self.like.new_empty(len(q), self.parameter_size)
        for part, target in self._groups(q, out):
            ((_, changes),) = self._gradient(part, [ALL])
            target.copy_(self.parameters(changes, len(part)))
        return out

    def kick(self, theta: Tensor) -> Tensor:
        """B V theta: how the parameters move each step on its own."""
        out = self.like.new_empty(len(theta), self.trials, self.times, self.units)
        for part, target in self._groups(theta, out):
            self._forward(None, [(ALL, self.changes(part))], target, KICK)
        return out

    def kick_adjoint(self, q: Tensor) -> Tensor:
        """Its transpose."""
        out = self.like.new_empty(len(q), self.parameter_size)
        for part, target in self._groups(q, out):
            ((_, changes),) = self._gradient(part, [ALL], KICK_ADJOINT)
            target.copy_(self.parameters(changes, len(part)))
        return out

    def jvp_apart(self, theta: Tensor) -> Tensor:
        """J_b theta_b for parameter changes of each trial's own [probe, trial, p]."""
        out = self.like.new_empty(len(theta), self.trials, self.times, self.units)
        for part, target in self._groups(theta, out):
            each = zip(self._each_trial(), part.unbind(1), strict=True)
            self._forward(None, [(trial, self.changes(own)) for trial, own in each], target)
        return out

    def vjp_apart(self, q: Tensor) -> Tensor:
        """The transpose: each trial's own gradient [probe, trial, p]."""
        out = self.like.new_empty(len(q), self.trials, self.parameter_size)
        for part, target in self._groups(q, out):
            for trial, changes in self._gradient(part, self._each_trial()):
                target[:, trial] = self.parameters(changes, len(part))[:, None]
        return out

    def _each_trial(self) -> list[slice]:
        return [slice(b, b + 1) for b in range(self.trials)]

    def gram(self, q: Tensor) -> Tensor:
        """J J* q: the gradient's weight changes sent forward; past the parameters where each weight is one."""
        out = torch.empty_like(q)
        for part, target in self._groups(q, out):
            ((_, changes),) = self._gradient(part, [ALL])
            if not self.plain:
                changes = self.changes(self.parameters(changes, len(part)))
            self._forward(None, [(ALL, changes)], target)
        return out

    def _groups(self, given: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(given.split(self.probes_together), out.split(self.probes_together), strict=True)

    # Sweeps of one group of probes

    def _forward(
        self, q: Tensor | None, changes: list[Changes] | None, out: Tensor, program: str = FROM_CHANGES
    ) -> None:
        """out: s_t = A_t s_{t-1} + B_t V_t dW^T + q_t for q, or for weight changes."""
        last = torch.zeros(())
        with self._work(len(out)) as work:
            work.still.zero_()
            for span, kicks, states in work.spans():
                states[0] = last
                if q is not None:
                    states[1:] = _inner(q[:, :, span])
                if changes is not None:
                    self._kick(changes, span, kicks)
                step = work.step(span, program)
                for i in range(span.stop - span.start):
                    step(i)
                out[:, :, span] = _outer(states[1:])
                last = states[-1]

    def _gradient(self, q: Tensor, trials: list[slice], program: str = ADJOINT) -> list[Changes]:
        """sum_t (B_t^T l_t)^T V_t for every site, l the costates of q; summed over each of these cuts of the trials."""
        found = [(cut, [site.no_change(len(q)) for _, site in self.sites]) for cut in trials]
        for span, kicks, _ in self._costates(q, program):
            for cut, changes in found:
                for (name, site), change in zip(self.sites, changes, strict=True):
                    site.gather(kicks[name][:, cut], (span, cut), change)
        return found

    def _costates(self, q: Tensor, program: str = ADJOINT) -> Iterator[tuple[slice, Kicks, Tensor]]:
        """From the last span to the first: B_t^T l_t by blocks, and l_t [time, trial, probe, unit]."""
        last = _inner(q)[-1]
        with self._work(len(q)) as work:
            for span, kicks, costates in work.spans(backward=True):
                before = max(span.start - 1, 0)  # the first span sends a costate to z0, which nobody reads
                costates[0] = _inner(q)[before]
                costates[1:-1] = _inner(q[:, :, span])[:-1]
                costates[-1] = last
                step = work.step(span, program)
                for i in reversed(range(span.stop - span.start)):
                    step(i)
                yield span, kicks, costates[1:]
                last = costates[0].clone()

    def _kick(self, changes: list[Changes], span: slice, kicks: Kicks) -> None:
        for name, others in self.unkicked.items():
            kicks[name][..., others] = 0
        for cut, those in changes:
            for (name, site), change, fresh in zip(self.sites, those, self.fresh, strict=True):
                site.kick(change, (span, cut), kicks[name][:, cut], fresh)

    @contextmanager
    def _work(self, probes: int) -> Iterator[_Work]:
        """Work blocks for so many probes: those of the last sweep, unless another thread has them."""
        work, self._idle = self._idle, None
        length = self._span(probes)
        if work is None or (work.probes, work.length) != (probes, length):
            work = _Work(self, probes, length)
        yield work
        self._idle = work

    def _span(self, probes: int) -> int:
        """How many times stay in the cache."""
        bytes_per_time = bytes_of(probes * self.trials * (self.kick_size + self.units), self.like)
        return min(self.times, max(4, span_bytes() // bytes_per_time))

    # Maps at all times at once, without the recurrence. Site values are all sites' outputs, side by side.

    def write(self, theta: Tensor) -> Tensor:
        """V dW^T of every site."""
        images = [s.image(c, (ALL, ALL)) for (_, s), c in zip(self.sites, self.changes(theta), strict=True)]
        return _outer(torch.cat(images, -1))

    def read(self, values: Tensor) -> Tensor:
        """The transpose of `write`."""
        changes = [site.no_change(len(values)) for _, site in self.sites]
        parts = _inner(values).split([site.kicks.numel() for _, site in self.sites], -1)
        for (_, site), part, change in zip(self.sites, parts, changes, strict=True):
            site.collect(part, (ALL, ALL), change)
        return self.parameters(changes, len(values))

    def enter(self, values: Tensor) -> Tensor:
        """B: site values -> state, each step on its own."""
        kicks = self._empty(self.times, len(values), self.kick_size).zero_()
        kicks.index_add_(-1, self.site_kicks, _inner(values))
        blocks = {block.name: kicks[..., block.start : block.stop].contiguous() for block in self.blocks}
        return _outer(self._each_step(self._empty(self.times, len(values), self.units).zero_(), blocks))

    def enter_adjoint(self, q: Tensor) -> Tensor:
        """B*: state -> site values."""
        _, kicks = self._each_step_adjoint(q)
        return _outer(torch.cat(list(kicks.values()), -1)[..., self.site_kicks])

    def advance(self, dz: Tensor) -> Tensor:
        """A_t dz_t, each step on its own."""
        kicks = {name: values.zero_() for name, values in self._kick_blocks(self.times, len(dz)).items()}
        return _outer(self._each_step(_inner(dz).contiguous(), kicks))

    def unpropagate(self, s: Tensor) -> Tensor:
        """P^{-1}: s_t - A_t s_{t-1}."""
        previous = self._empty(self.times, len(s), self.units).zero_()
        previous[1:] = _inner(s)[:-1]
        return s - self.advance(_outer(previous))

    def unpropagate_adjoint(self, q: Tensor) -> Tensor:
        """P^{-*}: q_t - A_{t+1}^T q_{t+1}."""
        out = q.clone()
        out[:, :, :-1] -= _outer(self._each_step_adjoint(q)[0][1:])
        return out

    def _each_step(self, z: Tensor, kicks: Kicks) -> Tensor:
        out = torch.empty_like(z)
        self._bind_all(z, kicks, out, {"out"})(0)
        return out

    def _each_step_adjoint(self, q: Tensor) -> tuple[Tensor, Kicks]:
        z, kicks = self._empty(self.times, len(q), self.units), self._kick_blocks(self.times, len(q))
        self._bind_all(z, kicks, _inner(q).contiguous(), {"z", *kicks}, transposed=True)(0)
        return z, kicks

    def _bind_all(self, z: Tensor, kicks: Kicks, out: Tensor, fresh: set[str], transposed: bool = False) -> Run:
        work = {name: self._empty(self.times, z.shape[2], width) for name, width in self.widths.items()}
        blocks = {name: AllTimes(v) for name, v in {"z": z, "out": out, **kicks, **work}.items()}
        return bind(self.updates, blocks, fresh | set(work), None, transposed=transposed)

    def _kick_blocks(self, times: int, probes: int) -> Kicks:
        return {block.name: self._empty(times, probes, block.stop - block.start) for block in self.blocks}

    def _empty(self, times: int, probes: int, width: int) -> Tensor:
        return self.like.new_empty(times, self.trials, probes, width)


class _Work:
    """The blocks that a sweep of one group of probes works in, span by span, and the programs bound to them.

    They outlive the sweep, as making them anew costs as much as a tenth of it.
    """

    def __init__(self, tangent: Tangent, probes: int, length: int) -> None:
        self.tangent, self.probes, self.length = tangent, probes, length
        self.kicks = tangent._kick_blocks(self.length, probes)
        self.states = tangent._empty(self.length + 1, probes, tangent.units)
        self.operands = {name: tangent._empty(1, probes, size) for name, size in tangent.widths.items()}
        self.still = tangent._empty(1, probes, tangent.units).zero_()
        self.bound: dict[tuple[int, str], Run] = {}

    def spans(self, backward: bool = False) -> Iterator[tuple[slice, Kicks, Tensor]]:
        """Spans of times, each with its kicks, and its states after the one before them."""
        starts = range(0, self.tangent.times, self.length)
        for start in reversed(starts) if backward else starts:
            span = slice(start, min(start + self.length, self.tangent.times))
            yield span, *self.blocks(span)

    def blocks(self, span: slice) -> tuple[Kicks, Tensor]:
        times = span.stop - span.start
        return {name: kicks[:times] for name, kicks in self.kicks.items()}, self.states[: times + 1]

    def step(self, span: slice, program: str) -> Run:
        """The program of one step in a span, bound to the blocks."""
        if (span.start, program) not in self.bound:
            kicks, states = self.blocks(span)
            fresh = {"out"} if program in (FROM_CHANGES, KICK) else set(kicks)
            times = span.stop - span.start
            work = {name: block.expand(times, -1, -1, -1) for name, block in self.operands.items()}
            alone = program in (KICK, KICK_ADJOINT)
            before = self.still.expand(times, -1, -1, -1) if alone else states[:-1]
            arrays = {"z": before, "out": states[1:], **kicks, **work}
            blocks = {name: Steps(values) for name, values in arrays.items()}
            updates = self.tangent.kick_updates if alone else self.tangent.updates
            transposed = program in (ADJOINT, KICK_ADJOINT)
            self.bound[span.start, program] = bind(updates, blocks, fresh | set(work), span, transposed=transposed)
        return self.bound[span.start, program]


def _inner(values: Tensor) -> Tensor:
    """[probe, trial, time, width] as [time, trial, probe, width]; its own inverse."""
    return values.permute(2, 1, 0, 3)


_outer = _inner
