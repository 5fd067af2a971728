"""Sweeps of a linearised recurrence in torch: forward and backward over spans of times, one group of probes at once.

Products with V are formed for a span at once, in a block that stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from kpflow_dyn._arrays.memory import bytes_of, on_device, span_bytes
from kpflow_dyn._torch.linearised import ALL, Changes, Kicks, LinearisedSteps, inner, outer
from kpflow_dyn._torch.program import Run, Steps, bind, each_time

FROM_STATES, FROM_CHANGES, ADJOINT = "from kicks to the states", "from changes of the weights", "adjoint"
ROWS_TOGETHER = 160  # rows trial x probe of a step that keep a CPU's products in its second-level cache


class Sweeps(LinearisedSteps):
    """What all operators of a recurrence are made of; arrays are [probe, trial, time, unit] outside."""

    _idle: _Work | None = None

    @property
    def probes_together(self) -> int:
        """How many probes ride in one sweep; a large device takes any number."""
        return 2**30 if on_device(self.like) else max(1, ROWS_TOGETHER // self.trials)

    def _by_groups(self, sweep: Callable[..., None], out: Tensor, *given: Tensor) -> Tensor:
        """What sweep(out, *given) writes for each group of probes."""
        for parts in zip(*(block.split(self.probes_together) for block in (out, *given)), strict=True):
            sweep(*parts)
        return out

    def _no_states(self, probes: int) -> Tensor:
        return self.like.new_empty(probes, self.trials, self.times, self.units)

    def _forward(
        self,
        q: Tensor | None,
        changes: list[Changes] | None,
        out: Tensor,
        program: str = FROM_CHANGES,
        start: Tensor | None = None,
    ) -> None:
        """out: s_t = A_t s_{t-1} + B_t V_t dW^T + q_t for q, or for weight changes; from s_0 [probe, trial, unit]."""
        last = torch.zeros(()) if start is None else start.swapaxes(0, 1)
        with self._work(len(out)) as work:
            for span, kicks, states in work.spans():
                states[0] = last
                if q is not None:
                    states[1:] = inner(q[:, :, span])  # [time, trial, probe, unit]
                if changes is not None:
                    self._kick(changes, span, kicks)
                step = work.step(span, program)
                for i in range(span.stop - span.start):
                    step(i)
                out[:, :, span] = outer(states[1:])  # [probe, trial, time, unit]
                last = states[-1]

    def _gradient(
        self, spans: Iterable[tuple[slice, Kicks, Tensor]], probes: int, trials: list[slice]
    ) -> list[Changes]:
        """sum_t a_t^T V_t of every site, for the kicks a of all spans; summed over each of these cuts of the trials."""
        found = [(cut, [site.no_change(probes) for _, site in self.sites]) for cut in trials]
        for span, kicks, _ in spans:
            for cut, changes in found:
                for (name, site), change in zip(self.sites, changes, strict=True):
                    site.gather(kicks[name][:, cut], (span, cut), change)
        return found

    def _costates(self, q: Tensor) -> Iterator[tuple[slice, Kicks, Tensor]]:
        """From the last span to the first: B_t^T l_t by blocks, and l_t [1 + time, trial, probe, unit].

        With that before the span in front: all of it, or before the first span A_1^T l_1.
        """
        last = inner(q)[-1]  # [trial, probe, unit]
        with self._work(len(q)) as work:
            for span, kicks, costates in work.spans(backward=True):
                costates[0] = inner(q)[span.start - 1] if span.start else 0
                costates[1:-1] = inner(q[:, :, span])[:-1]
                costates[-1] = last
                step = work.step(span, ADJOINT)
                for i in reversed(range(span.stop - span.start)):
                    step(i)
                yield span, kicks, costates
                last = costates[0].clone()

    def _gradients(self, q: Tensor, spans: Callable[[Tensor], Iterator[tuple[slice, Kicks, Tensor]]]) -> Tensor:
        def sweep(out: Tensor, part: Tensor) -> None:
            ((_, changes),) = self._gradient(spans(part), len(part), [ALL])
            out.copy_(self.parameters(changes, len(part)))

        return self._by_groups(sweep, self.like.new_empty(len(q), self.parameter_size), q)

    @contextmanager
    def _work(self, probes: int) -> Iterator[_Work]:
        """Work blocks for this many probes: those of the last sweep, unless another thread has them."""
        work, self._idle = self._idle, None
        bytes_per_time = bytes_of(probes * self.trials * (self.kick_size + self.units), self.like)
        length = min(self.times, max(4, span_bytes() // bytes_per_time))  # times that stay in the cache
        if work is None or (work.tangent, work.probes, work.length) != (self, probes, length):
            work = _Work(self, probes, length)
        yield work
        self._idle = work


class _Work:
    """The blocks that a sweep of one group of probes works in, span by span, and the programs bound to them.

    They outlive the sweep, as making them anew costs as much as a tenth of it.
    """

    def __init__(self, tangent: Sweeps, probes: int, length: int) -> None:
        self.tangent, self.probes, self.length = tangent, probes, length
        self.kicks = tangent._kick_blocks(self.length, probes)
        self.states = tangent._empty(self.length + 1, probes, tangent.units)  # [time + 1, trial, probe, unit]
        self.operands = {name: tangent._empty(1, probes, size) for name, size in tangent.widths.items()}
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
            fresh = {"out"} if program is FROM_CHANGES else set(kicks)
            times = span.stop - span.start
            work = {name: block.expand(times, -1, -1, -1) for name, block in self.operands.items()}
            arrays = {"z": states[:-1], "out": states[1:], **kicks, **work}
            blocks, fresh = {name: Steps(values) for name, values in arrays.items()}, fresh | set(work)
            self.bound[span.start, program] = bind(
                self.tangent.updates, blocks, fresh, each_time(span), transposed=program is ADJOINT
            )
        return self.bound[span.start, program]
