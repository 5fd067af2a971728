"""The tangent of steps of which nothing is known but what autograd says of them."""

from collections.abc import Callable

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy
from kpflow_dyn._arrays.complex_numbers import vector_of
from kpflow_dyn._flows.flow import Draw
from kpflow_dyn._flows.referee import Derivative


class AutodiffTangent:
    """See `kpflow_dyn._recurrence.tangent.Tangent`; each step is one site, whose outputs are the next state.

    Args:
        apart: each step by itself, in the parameters and the states before it.
        whole: all states, in the parameters and in kicks that are added to each; None where it is not asked for.
        parameters: those that learn, by name.
        untraced: why there is no trace.
    """

    sites = inputs = ()

    def __init__(
        self, apart: Derivative, whole: Derivative | None, parameters: dict[str, Array], untraced: str
    ) -> None:
        self._apart, self._whole, self.untraced = apart, whole, untraced
        self.next_state = apart.value
        self.weights = vector_of(parameters.values())
        self.parameter_size, self.site_kicks = len(self.weights), np.arange(self.next_state.shape[-1])

    # Each step by itself

    def step_jvp(self, theta: Array, dz: Array) -> Array:
        return self._apart.push(theta, dz)

    def step_vjp(self, q: Array) -> tuple[Array, Array]:
        return self._apart.pull(q)

    def kick(self, theta: Array) -> Array:
        return self._apart.push(theta, None)

    def kick_adjoint(self, q: Array) -> Array:
        return self._apart.pull(q)[0]

    write = kick

    def read(self, values: Array) -> Array:
        return self.kick_adjoint(values)

    def enter(self, values: Array) -> Array:
        return values

    def enter_adjoint(self, q: Array) -> Array:
        return q

    def advance(self, dz: Array) -> Array:
        return self._apart.push(None, dz)

    def advance_adjoint(self, q: Array) -> Array:
        return self._apart.pull(q)[1]

    # All steps

    @property
    def _steps(self) -> Derivative:
        assert self._whole is not None, "these steps were asked for one by one"
        return self._whole

    def propagate(self, q: Array) -> Array:
        return self._steps.push(None, q)

    def propagate_adjoint(self, q: Array) -> Array:
        return self._steps.pull(q)[1]

    def jvp(self, theta: Array) -> Array:
        return self._steps.push(theta, None)

    def vjp(self, q: Array) -> Array:
        return self._steps.pull(q)[0]

    def jvp_from(self, theta: Array, start: Array) -> Array:
        first = first_of_times(
            self.advance(first_of_times(start[:, :, None], self.next_state))[:, :, :1], self.next_state
        )
        return self._steps.push(theta, first)

    def vjp_from(self, q: Array) -> tuple[Array, Array]:
        theta, kicks = self._steps.pull(q)
        return theta, self.advance_adjoint(first_of_times(kicks[:, :, :1], self.next_state))[:, :, 0]

    def gram(self, q: Array) -> Array:
        return self.jvp(self.vjp(q))

    def jvp_apart(self, theta: Array) -> Array:
        return pushed_apart(self.jvp, theta)

    def vjp_apart(self, q: Array) -> Array:
        return pulled_apart(self.vjp, q)

    def factorise(self, start: Array, interval: int) -> Array:
        """R [block, trial, k, k] of A_t ... A_{t-interval+1} Q = Q' R, from the matrices of all A_t."""
        xp, (trials, times, units) = array_namespace(start), self.next_state.shape
        unit = like_numpy(np.eye(units)[:, None, None], start)
        images = self.advance(xp.broadcast_to(unit, (units, trials, times, units)))  # [in, trial, time, out]
        A = xp.permute_dims(images, (2, 1, 3, 0))  # [time, trial, out, in]
        Q, found = xp.permute_dims(start, (1, 2, 0)), []  # [trial, unit, k]
        for done in range(1, times + 1):
            Q = A[done - 1] @ Q
            if done % interval == 0 or done == times:
                Q, R = xp.linalg.qr(Q)
                found.append(R)
        return xp.stack(found)

    # What needs weight sites

    def truncated(self, bases: list[Array | None]) -> "AutodiffTangent":
        raise ValueError(f"a flow without weight sites cannot be truncated; the model was not traced: {self.untraced}")

    def fed_back(self, draw: Callable[[str, Array], Array] | Draw) -> "AutodiffTangent":
        raise ValueError(
            f"errors go back through other matrices at weight sites, and the model was not traced: {self.untraced}"
        )


def pushed_apart(jvp: Callable[[Array], Array], theta: Array) -> Array:
    """J_b theta_b [probe, trial, ...] for changes [probe, trial, p] of each trial's own."""
    return array_namespace(theta).stack([jvp(theta[:, b])[:, b] for b in range(theta.shape[1])], axis=1)


def pulled_apart(vjp: Callable[[Array], Array], q: Array) -> Array:
    """The transpose: of blocks [probe, trial, ...] in which one trial alone is not zero."""
    masks = like_numpy(np.eye(q.shape[1]).reshape((q.shape[1], 1, q.shape[1], *(1,) * (q.ndim - 2))), q)
    return array_namespace(q).stack([vjp(mask * q) for mask in masks], axis=1)


def first_of_times(values: Array, like: Array) -> Array:
    """Values [probe, trial, 1, unit] at the first of the times of states [trial, time, unit], with zeros after it."""
    later = like_numpy(np.zeros((*values.shape[:2], like.shape[1] - 1, values.shape[3])), like)
    return array_namespace(like).concat([values, later], axis=2)
