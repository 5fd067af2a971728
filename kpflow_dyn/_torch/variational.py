"""Variational and adjoint equations of an ODE in torch, solved by torchdiffeq's dopri5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap
from torchdiffeq import odeint

from kpflow_dyn._flows.adjoints import InterpolatingAdjoint
from kpflow_dyn._problems.inputs import input_function
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._torch.model import Model
from kpflow_dyn.ode._variational import MAX_STEPS, at_unit_size, path_of, solve_failed

Parameters = dict[str, Tensor]
State = tuple[Tensor, ...]


class Variational:
    """J, J^T, P_node and its transpose by adaptive solves, on blocks [probe, ...], all transposes plain.

    Args:
        sol: a solution of an ODE.
        model: its field, and which parameters learn.
        alg: the tolerances.
    """

    @torch.no_grad()
    def __init__(self, sol: Solution, model: Model, alg: InterpolatingAdjoint) -> None:
        problem = sol.problem
        assert isinstance(problem, ODEProblem)
        self.alg, self.nodes, self.start = alg, np.asarray(sol.t, np.float64), float(problem.t[0])
        self.path = path_of(sol, alg)
        self.parameters = model.parameters
        everything = dict(problem.f.named_parameters()) | dict(problem.f.named_buffers())
        others = {name: v.detach().clone() for name, v in everything.items() if name not in model.parameters}
        self._x, self._call = (
            input_function(problem),
            lambda values, t: functional_call(problem.f, {**others, **values}, t),
        )

    def field(self, t: Tensor) -> Callable[[Parameters, Tensor], Tensor]:
        """f at this time, of the parameters that learn and the states [trial, unit]."""
        x = () if self._x is None else (self._x(t),)
        return lambda values, z: self._call(values, (t, z, *x))

    @torch.no_grad()
    @at_unit_size
    def jvp(self, theta: Tensor) -> Tensor:
        """J theta [probe, trial, time, unit] of parameters [probe, p]."""
        changes = self._split(theta)

        def rate(t: Tensor, d: State) -> State:
            f, z = self.field(t), self.path(t)
            return (vmap(lambda *change: jvp(f, (self.parameters, z), change)[1])(changes, d[0]),)

        times = np.unique(np.append(self.start, self.nodes))
        (states,) = self._solve(rate, (self._still(theta),), times)
        return states[-len(self.nodes) :].movedim(0, 2)

    @torch.no_grad()
    @at_unit_size
    def vjp(self, q: Tensor) -> Tensor:
        """J^T q [probe, p] of states [probe, trial, time, unit]."""

        def rate(t: Tensor, state: State) -> State:
            pull = vjp(self.field(t), self.parameters, self.path(t))[1]
            changes, rates = vmap(pull)(state[0])
            return -rates, -self._join(changes)

        size = sum(value.numel() for value in self.parameters.values())
        state = self._still(q), q.new_zeros(len(q), size)
        for n in reversed(range(len(self.nodes))):
            before = self.nodes[n - 1] if n else self.start
            state = self._advance(rate, (state[0] + q[:, :, n], state[1]), self.nodes[n], before)
        return state[1]

    @torch.no_grad()
    @at_unit_size
    def propagate(self, q: Tensor) -> Tensor:
        """P_node q, both [probe, trial, time, unit]."""

        def rate(t: Tensor, state: State) -> State:
            f, z = self.field(t), self.path(t)
            along = lambda s: jvp(lambda z: f(self.parameters, z), (z,), (s,))[1]  # noqa: E731
            return (vmap(along)(state[0]),)

        return self._sweep(rate, q, range(len(self.nodes)))

    @torch.no_grad()
    @at_unit_size
    def propagate_adjoint(self, q: Tensor) -> Tensor:
        """P_node^T q, both [probe, trial, time, unit]."""

        def rate(t: Tensor, state: State) -> State:
            f = self.field(t)
            pull = vjp(lambda z: f(self.parameters, z), self.path(t))[1]
            return (-vmap(pull)(state[0])[0],)

        return self._sweep(rate, q, range(len(self.nodes))[::-1])

    def gram(self, q: Tensor) -> Tensor:
        """J J^T q."""
        return self.jvp(self.vjp(q))

    def _sweep(self, rate: Callable[[Tensor, State], State], q: Tensor, order: range) -> Tensor:
        """From node to node in this order, adding q at each."""
        out, state = torch.empty_like(q), self._still(q)
        for n, previous in zip(order, [order[0], *order], strict=False):
            (state,) = self._advance(rate, (state,), self.nodes[previous], self.nodes[n])
            state = state + q[:, :, n]
            out[:, :, n] = state
        return out

    def _advance(self, rate: Callable[[Tensor, State], State], state: State, start: float, end: float) -> State:
        """The state at the end, in one step if that is good enough."""
        if start == end:
            return state
        found = self._solve(rate, state, np.array([start, end]), first_step=2 * abs(end - start))
        return tuple(values[-1] for values in found)

    def _solve(self, rate: Callable[[Tensor, State], State], state: State, times: np.ndarray, **options: Any) -> State:
        """The states at these times, with a time axis in front, each at the end of a step."""
        like = state[0]
        t = torch.as_tensor(times, dtype=torch.float64, device=like.device)
        # What torchdiffeq reads inside of a step is less accurate than its ends.
        options = {"step_t": t[1:], "norm": _norm, "max_num_steps": MAX_STEPS, **options}
        try:
            found = odeint(rate, state, t, rtol=self.alg.rtol, atol=self.alg.atol, method="dopri5", options=options)
        except AssertionError as error:
            raise solve_failed(f"between t = {times[0]:.6g} and {times[-1]:.6g}, {error}") from error
        return cast("State", found)

    def _still(self, block: Tensor) -> Tensor:
        trials, _, _, units = self.path.coefficients.shape
        return block.new_zeros(len(block), trials, units)

    def _split(self, theta: Tensor) -> Parameters:
        """Parameters [probe, p] by name."""
        parts = theta.split([value.numel() for value in self.parameters.values()], 1)
        return {
            name: part.reshape(len(theta), *value.shape)
            for (name, value), part in zip(self.parameters.items(), parts, strict=True)
        }

    def _join(self, changes: Parameters) -> Tensor:
        """The inverse of `_split`."""
        return torch.cat([changes[name].flatten(1) for name in self.parameters], 1)


def _norm(parts: State) -> Tensor:
    """The largest root mean square of a probe's part."""
    return torch.stack([part.flatten(1).square().mean(1).max() for part in parts]).max().sqrt()
