"""The linearised recurrence of a torch step and its sweeps: P, P*, J, J* without a Jacobian of all times.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    forward:   s_t = A_t s_{t-1} + B_t a_t + q_t          a_t = V_t dW^T
    backward:  l_t = A_{t+1}^T l_{t+1} + q_t,  a_t = B_t^T l_t     dW = sum_t a_t^T V_t

Everything public is [probe, trial, time, width].
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kpflow_dyn._torch.linearised import ALL, Kicks, outer
from kpflow_dyn._torch.steps_apart import StepsApart
from kpflow_dyn._torch.sweeps import FROM_STATES


class Tangent(StepsApart):
    """The linear recurrence of the steps: operators on blocks of any number of probes.

    States are [probe, trial, time, unit], changes of the parameters [probe, p].
    """

    def propagate(self, q: Tensor) -> Tensor:
        """P q: s_t = A_t s_{t-1} + q_t."""
        return self._by_groups(lambda out, part: self._forward(part, None, out, FROM_STATES), torch.empty_like(q), q)

    def propagate_adjoint(self, q: Tensor) -> Tensor:
        """P* q: the costates l_t = A_{t+1}^T l_{t+1} + q_t."""

        def sweep(out: Tensor, part: Tensor) -> None:
            for span, _, costates in self._costates(part):
                out[:, :, span] = outer(costates[1:])

        return self._by_groups(sweep, torch.empty_like(q), q)

    def factorise(self, start: Tensor, interval: int) -> Tensor:
        """R [block, trial, k, k] of A_t ... A_{t-interval+1} Q = Q' R, block after block, the last maybe shorter.

        The first Q is `start` [k, trial, unit].
        """
        found, last = [], start.transpose(0, 1)  # [trial, k, unit]
        with self._work(len(start)) as work:
            for span, _, states in work.spans():
                states[0] = last
                states[1:] = 0
                step = work.step(span, FROM_STATES)
                for i, done in enumerate(range(span.start + 1, span.stop + 1)):
                    step(i)
                    if done % interval == 0 or done == self.times:
                        Q, R = torch.linalg.qr(states[i + 1].mT)  # of [trial, unit, k]
                        states[i + 1] = Q.mT
                        found.append(R)
                last = states[-1]
        return torch.stack(found)

    def jvp(self, theta: Tensor) -> Tensor:
        """J theta: how the states move with the parameters."""
        return self.jvp_from(theta, self._no_starts(len(theta)))

    def vjp(self, q: Tensor) -> Tensor:
        """J* q: backpropagation through time."""
        return self.vjp_from(q)[0]

    def jvp_from(self, theta: Tensor, start: Tensor) -> Tensor:
        """How they move with the parameters and with z_0 [probe, trial, unit]."""

        def sweep(out: Tensor, theta: Tensor, start: Tensor) -> None:
            self._forward(None, [(ALL, self.changes(theta))], out, start=start)

        return self._by_groups(sweep, self._no_states(len(theta)), theta, start)

    def vjp_from(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Its transpose."""
        starts = self._no_starts(len(q))

        def sweep(out: Tensor, start: Tensor, part: Tensor) -> None:
            def spans() -> Iterator[tuple[slice, Kicks, Tensor]]:
                for span, kicks, costates in self._costates(part):
                    if not span.start:
                        start.copy_(costates[0].swapaxes(0, 1))
                    yield span, kicks, costates

            ((_, changes),) = self._gradient(spans(), len(part), [ALL])
            out.copy_(self.parameters(changes, len(part)))

        return self._by_groups(sweep, self.like.new_empty(len(q), self.parameter_size), starts, q), starts

    def jvp_apart(self, theta: Tensor) -> Tensor:
        """J_b theta_b for parameter changes of each trial's own [probe, trial, p]."""

        def sweep(out: Tensor, part: Tensor) -> None:
            each = zip(self._each_trial(), part.unbind(1), strict=True)
            self._forward(None, [(trial, self.changes(own)) for trial, own in each], out)

        return self._by_groups(sweep, self._no_states(len(theta)), theta)

    def vjp_apart(self, q: Tensor) -> Tensor:
        """The transpose: each trial's own gradient [probe, trial, p]."""

        def sweep(out: Tensor, part: Tensor) -> None:
            for trial, changes in self._gradient(self._costates(part), len(part), self._each_trial()):
                out[:, trial] = self.parameters(changes, len(part))[:, None]  # [probe, 1, p]

        return self._by_groups(sweep, self.like.new_empty(len(q), self.trials, self.parameter_size), q)

    def gram(self, q: Tensor) -> Tensor:
        """J J* q: the gradient's weight changes sent forward; past the parameters where each weight is one."""

        def sweep(out: Tensor, part: Tensor) -> None:
            ((_, changes),) = self._gradient(self._costates(part), len(part), [ALL])
            if not self.plain:
                changes = self.changes(self.parameters(changes, len(part)))
            self._forward(None, [(ALL, changes)], out)

        return self._by_groups(sweep, torch.empty_like(q), q)

    def _no_starts(self, probes: int) -> Tensor:
        return self.like.new_zeros(probes, self.trials, self.units)

    def _each_trial(self) -> list[slice]:
        return [slice(b, b + 1) for b in range(self.trials)]
