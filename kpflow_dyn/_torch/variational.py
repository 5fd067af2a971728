"""Variational and adjoint equations of an ODE in torch, solved by torchdiffeq's dopri5."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchdiffeq import odeint

from kpflow_dyn._arrays.complex_numbers import as_flat, count, in_pairs
from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._flows.adjoints import InterpolatingAdjoint
from kpflow_dyn._problems.inputs import input_function, jumps_within, stops_of
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._torch import reverse
from kpflow_dyn._torch.called import called
from kpflow_dyn._torch.left_alone import left_alone
from kpflow_dyn._torch.model import Model
from kpflow_dyn._torch.torchdiffeq_library import between_jumps, step_beyond
from kpflow_dyn.ode._variational import MAX_STEPS, Jump, Path, Rate, State, solve_failed

Parameters = dict[str, Tensor]


class System:
    """See `kpflow_dyn.ode._variational.System`; the parameters are by name."""

    transforms: Any = BACKENDS["torch"].transforms

    def __init__(
        self, problem: ODEProblem, model: Model, path: Path, times: np.ndarray, alg: InterpolatingAdjoint
    ) -> None:
        self.path, self.times, self.alg = path, times, alg
        self.stops, self.jumps = stops_of(problem), jumps_within(problem)
        self.parameters, self._f, self._x = model.parameters, model.call, input_function(problem)
        self.size = sum(map(count, self.parameters.values()))
        everything = dict(model.call.named_parameters()) | dict(model.call.named_buffers())
        self._others = {name: v.detach().clone() for name, v in everything.items() if name not in model.parameters}

    def field(self, t: Tensor) -> Callable[[Tensor, Parameters], Tensor]:
        """f at this time, of the states [trial, unit] and the parameters that learn."""
        x = () if self._x is None else (self._x(t),)
        return lambda z, values: called(self._f, {**self._others, **values}, t, z, *x)

    def split(self, theta: Tensor) -> Parameters:
        """Parameters [probe, p] by name."""
        parts = theta.split([*map(count, self.parameters.values())], 1)
        return {name: as_flat(part, value) for (name, value), part in zip(self.parameters.items(), parts, strict=True)}

    def join(self, changes: Parameters) -> Tensor:
        """[probe, p]."""
        parts = [in_pairs(changes[name]) for name in self.parameters]
        return torch.cat([part.reshape(len(part), -1) for part in parts], 1)  # of a parameter that is a number, too

    @torch.no_grad()
    def solved(self, equation: Callable[..., Tensor], block: Tensor) -> Tensor:
        """The equation solved at once."""
        return equation(self, block)

    @torch.no_grad()
    def each_node(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        """One node after another."""
        times = torch.as_tensor(self.times[1:], dtype=values[0].dtype, device=values[0].device)
        return torch.stack([function(*node) for node in zip(times, *values, strict=True)])

    def sweep(self, rate: Rate, state: State, order: np.ndarray, jump: Jump | None) -> tuple[State, Tensor]:
        """From time to time in this order, as one solve where nothing happens at these."""
        times = self.times[order]
        if jump is None:
            found = self._solve(rate, state, np.unique(times))
            return tuple(values[-1] for values in found), found[0][1 - len(order) :]
        kept = []
        for start, end, node in zip(times[:-1], times[1:], order[1:] - 1, strict=True):
            state = jump(self._advance(rate, state, start, end), int(node))
            kept.append(state[0])
        return state, torch.stack(kept) if kept else state[0].new_zeros(0, *state[0].shape)

    def _advance(self, rate: Rate, state: State, start: float, end: float) -> State:
        """The state at the end, in one step if that is good enough."""
        if start == end:
            return state
        found = self._solve(rate, state, np.array([start, end]), first_step=2 * abs(end - start))
        return tuple(values[-1] for values in found)

    def _solve(self, rate: Rate, state: State, times: np.ndarray, **options: Any) -> State:
        """The states at these times, with a time axis in front, each at the end of a step."""
        times = between_jumps(times, self.jumps, state[0])
        t = torch.as_tensor(times, dtype=torch.float64, device=state[0].device)
        # What torchdiffeq reads inside of a step is less accurate than its ends.
        stops = np.union1d(times[1:], self.stops)
        where = {"step_t": torch.as_tensor(np.setdiff1d(stops, self.jumps)), "jump_t": torch.as_tensor(self.jumps)}
        options = {**where, "norm": _norm, "max_num_steps": MAX_STEPS + len(self.stops), **options}
        rate = _Stopping(rate, stops, 1 if times[-1] > times[0] else -1)
        try:
            found = odeint(rate, state, t, rtol=self.alg.rtol, atol=self.alg.atol, method="dopri5", options=options)
        except AssertionError as error:
            raise solve_failed(f"between t = {times[0]:.6g} and {times[-1]:.6g}, {error}") from error
        return cast("State", found)


class OwnSystem(System):
    """The same by autograd through the module itself, with the parameters and buffers as they were."""

    transforms = reverse

    def __init__(self, problem: ODEProblem, model: Model, *how: Any) -> None:
        super().__init__(problem, model, *how)
        self._kept = self.parameters | self._others
        self.parameters = dict(model.learning)

    def field(self, t: Tensor) -> Callable[[Tensor, Parameters], Tensor]:
        x = () if self._x is None else (self._x(t),)
        return lambda z, _values: self._f(t, z, *x)

    def solved(self, equation: Callable[..., Tensor], block: Tensor) -> Tensor:
        with self._as_they_were():
            return super().solved(equation, block)

    def each_node(self, function: Callable[..., Tensor], *values: Tensor) -> Tensor:
        with self._as_they_were():
            return super().each_node(function, *values)

    @contextmanager
    def _as_they_were(self) -> Iterator[None]:
        live = dict(self._f.named_parameters()) | dict(self._f.named_buffers())
        now = {name: tensor.data for name, tensor in live.items()}
        with left_alone(self._f, values=False):
            try:
                for name, tensor in live.items():
                    tensor.data = self._kept[name]
                for parameter in self.parameters.values():
                    parameter.requires_grad_(True)
                yield
            finally:
                for name, tensor in live.items():
                    tensor.data = now[name]


class _Stopping:
    """A rate as torchdiffeq calls it, which counts time upward also where it runs backward."""

    def __init__(self, rate: Rate, stops: np.ndarray, direction: int) -> None:
        self.rate, self.stops, self.direction = rate, set((direction * stops).tolist()), direction

    def __call__(self, t: Tensor, state: State) -> State:
        return self.rate(t, state)

    def callback_step(self, t: Tensor, state: State, dt: Tensor) -> None:
        """See `step_beyond`."""
        step_beyond(self.stops, self.direction * t, dt)


def _norm(parts: State) -> Tensor:
    """The largest root mean square of a probe's part."""
    return torch.stack([part.flatten(1).square().mean(1).max() for part in parts]).max().sqrt()
