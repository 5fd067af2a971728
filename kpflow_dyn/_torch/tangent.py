"""The linearised recurrence of a torch step and its sweeps: P, P*, J, J* without a Jacobian of all times.

With z_t = Phi(z_{t-1}, x_t; theta), kicks a entering inside the step and weights W of the sites,

    forward:   s_t = A_t s_{t-1} + B_t a_t + q_t          a_t = V_t dW^T
    backward:  l_t = A_{t+1}^T l_{t+1} + q_t,  a_t = B_t^T l_t     dW = sum_t a_t^T V_t

Everything public is [probe, trial, time, width].
"""

import torch
from torch import Tensor

from kpflow_dyn._torch.linearised import ALL, outer
from kpflow_dyn._torch.sweeps import ADJOINT, FROM_CHANGES, FROM_STATES, KICK, KICK_ADJOINT, Sweeps


class Tangent(Sweeps):
    """The linear recurrence of the steps: operators on blocks of any number of probes.

    States are [probe, trial, time, unit], changes of the parameters [probe, p].
    """

    def propagate(self, q: Tensor) -> Tensor:
        """P q: s_t = A_t s_{t-1} + q_t."""
        return self._by_groups(q, torch.empty_like(q), lambda part, out: self._forward(part, None, out, FROM_STATES))

    def propagate_adjoint(self, q: Tensor) -> Tensor:
        """P* q: the costates l_t = A_{t+1}^T l_{t+1} + q_t."""

        def sweep(part: Tensor, out: Tensor) -> None:
            for span, _, costates in self._costates(part):
                out[:, :, span] = outer(costates)

        return self._by_groups(q, torch.empty_like(q), sweep)

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
        return self._moved(theta, FROM_CHANGES)

    def vjp(self, q: Tensor) -> Tensor:
        """J* q: backpropagation through time."""
        return self._gradients(q, ADJOINT)

    def kick(self, theta: Tensor) -> Tensor:
        """B V theta: how the parameters move each step on its own."""
        return self._moved(theta, KICK)

    def kick_adjoint(self, q: Tensor) -> Tensor:
        """Its transpose."""
        return self._gradients(q, KICK_ADJOINT)

    def step_jvp(self, theta: Tensor, dz: Tensor) -> Tensor:
        """Each step by itself, of the parameters and the state before it."""
        return self.kick(theta) + self.advance(dz)

    def step_vjp(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Its transpose."""
        return self.kick_adjoint(q), self.advance_adjoint(q)

    def jvp_apart(self, theta: Tensor) -> Tensor:
        """J_b theta_b for parameter changes of each trial's own [probe, trial, p]."""

        def sweep(part: Tensor, out: Tensor) -> None:
            each = zip(self._each_trial(), part.unbind(1), strict=True)
            self._forward(None, [(trial, self.changes(own)) for trial, own in each], out)

        return self._by_groups(theta, self._no_states(len(theta)), sweep)

    def vjp_apart(self, q: Tensor) -> Tensor:
        """The transpose: each trial's own gradient [probe, trial, p]."""

        def sweep(part: Tensor, out: Tensor) -> None:
            for trial, changes in self._gradient(part, self._each_trial()):
                out[:, trial] = self.parameters(changes, len(part))[:, None]  # [probe, 1, p]

        return self._by_groups(q, self.like.new_empty(len(q), self.trials, self.parameter_size), sweep)

    def gram(self, q: Tensor) -> Tensor:
        """J J* q: the gradient's weight changes sent forward; past the parameters where each weight is one."""

        def sweep(part: Tensor, out: Tensor) -> None:
            ((_, changes),) = self._gradient(part, [ALL])
            if not self.plain:
                changes = self.changes(self.parameters(changes, len(part)))
            self._forward(None, [(ALL, changes)], out)

        return self._by_groups(q, torch.empty_like(q), sweep)

    def _moved(self, theta: Tensor, program: str) -> Tensor:
        return self._by_groups(
            theta,
            self._no_states(len(theta)),
            lambda part, out: self._forward(None, [(ALL, self.changes(part))], out, program),
        )

    def _gradients(self, q: Tensor, program: str) -> Tensor:
        def sweep(part: Tensor, out: Tensor) -> None:
            ((_, changes),) = self._gradient(part, [ALL], program)
            out.copy_(self.parameters(changes, len(part)))

        return self._by_groups(q, self.like.new_empty(len(q), self.parameter_size), sweep)

    def _each_trial(self) -> list[slice]:
        return [slice(b, b + 1) for b in range(self.trials)]
