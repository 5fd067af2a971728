"""The steps of a linearised recurrence in torch, each on its own: all times of a span at once, without a sweep."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from kpflow_dyn._torch.linearised import ALL, Kicks, inner, outer
from kpflow_dyn._torch.program import AllTimes, all_times, bind
from kpflow_dyn._torch.sweeps import Sweeps

Fill = Callable[[slice, Kicks], None]  # writes the kicks of a span


class StepsApart(Sweeps):
    """A_t and B_t V_t of each step by itself, and their transposes, on blocks [probe, trial, time, width]."""

    def kick(self, theta: Tensor) -> Tensor:
        """B V theta: how the parameters move each step."""

        def sweep(out: Tensor, part: Tensor) -> None:
            self._steps_apart(None, self._kicked_by(part), out)

        return self._by_groups(sweep, self._no_states(len(theta)), theta)

    def kick_adjoint(self, q: Tensor) -> Tensor:
        """Its transpose."""
        return self._gradients(q, lambda part: self._steps_apart_adjoint(part, moving=False))

    def advance(self, dz: Tensor) -> Tensor:
        """A_t dz_t."""
        return self._by_groups(lambda out, part: self._steps_apart(part, _no_kicks, out), self._no_states(len(dz)), dz)

    def advance_adjoint(self, q: Tensor) -> Tensor:
        """A_t^T q_t."""

        def sweep(out: Tensor, part: Tensor) -> None:
            for span, _, before in self._steps_apart_adjoint(part, moving=True):
                out[:, :, span] = outer(before)

        return self._by_groups(sweep, self._no_states(len(q)), q)

    def step_jvp(self, theta: Tensor, dz: Tensor) -> Tensor:
        """A_t dz_t + B_t V_t theta: of the parameters and the state before it."""

        def sweep(out: Tensor, theta: Tensor, dz: Tensor) -> None:
            self._steps_apart(dz, self._kicked_by(theta), out)

        return self._by_groups(sweep, self._no_states(len(dz)), theta, dz)

    def step_vjp(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Its transpose."""
        moved = self._no_states(len(q))

        def sweep(out: Tensor, moved: Tensor, part: Tensor) -> None:
            def spans() -> Iterator[tuple[slice, Kicks, Tensor]]:
                for span, kicks, before in self._steps_apart_adjoint(part, moving=True):
                    moved[:, :, span] = outer(before)
                    yield span, kicks, before

            ((_, changes),) = self._gradient(spans(), len(part), [ALL])
            out.copy_(self.parameters(changes, len(part)))

        return self._by_groups(sweep, self.like.new_empty(len(q), self.parameter_size), moved, q), moved

    def enter(self, values: Tensor) -> Tensor:
        """B: site values -> state."""

        def sweep(out: Tensor, part: Tensor) -> None:
            self._steps_apart(None, partial(self._kicked_at_sites, part), out)

        return self._by_groups(sweep, self._no_states(len(values)), values)

    def enter_adjoint(self, q: Tensor) -> Tensor:
        """B*: state -> site values."""

        def sweep(out: Tensor, part: Tensor) -> None:
            for span, kicks, _ in self._steps_apart_adjoint(part, moving=False):
                none = self._empty(span.stop - span.start, len(part), 0)
                out[:, :, span] = outer(torch.cat([none, *kicks.values()], -1)[..., self.site_kicks])

        out = self.like.new_empty(len(q), self.trials, self.times, len(self.site_kicks))
        return self._by_groups(sweep, out, q)

    def _kicked_by(self, theta: Tensor) -> Fill:
        changes = self.changes(theta)
        return lambda span, kicks: self._kick([(ALL, changes)], span, kicks)

    def _kicked_at_sites(self, values: Tensor, span: slice, kicks: Kicks) -> None:
        here = inner(values[:, :, span])  # [time, trial, probe, site]
        whole = here.new_zeros(*here.shape[:-1], self.kick_size).index_add_(-1, self.site_kicks, here)
        for block in self.blocks:
            kicks[block.name][:] = whole[..., block.start : block.stop]

    def _steps_apart(self, dz: Tensor | None, fill: Fill, out: Tensor) -> None:
        """out: A_t dz_t + B_t a_t of each step on its own, with the kicks a that `fill` writes."""
        for span, kicks, before, after, run in self._apart(len(out), dz is not None):
            before[:] = 0 if dz is None else inner(dz[:, :, span])
            fill(span, kicks)
            run()
            out[:, :, span] = outer(after)

    def _steps_apart_adjoint(self, q: Tensor, moving: bool) -> Iterator[tuple[slice, Kicks, Tensor]]:
        """B_t^T q_t by blocks and, where these are `moving`, A_t^T q_t [time, trial, probe, unit], for each span."""
        for span, kicks, before, after, run in self._apart(len(q), moving, transposed=True):
            after[:] = inner(q[:, :, span])
            run()
            yield span, kicks, before

    def _apart(
        self, probes: int, moving: bool, transposed: bool = False
    ) -> Iterator[tuple[slice, Kicks, Tensor, Tensor, Callable[[], object]]]:
        """For each span: kicks, states before and after its steps, and the program between them, of all at once."""
        updates = self.updates if moving else self.kick_updates
        with self._work(probes) as work:
            whole = {name: self._empty(work.length, probes, width) for name, width in self.widths.items()}
            states = self._empty(work.length, probes, self.units)
            for span, kicks, after in work.spans():
                times = span.stop - span.start
                operands = {name: values[:times] for name, values in whole.items()}
                arrays = {"z": states[:times], "out": after[1:], **kicks, **operands}
                blocks = {name: AllTimes(values) for name, values in arrays.items()}
                fresh = {"z", *kicks, *operands} if transposed else {"out", *operands}
                program = bind(updates, blocks, fresh, all_times(span), transposed=transposed)
                yield span, kicks, states[:times], after[1:], partial(program, 0)


def _no_kicks(_: slice, kicks: Kicks) -> None:
    for values in kicks.values():
        values.zero_()
