"""The states of a torch problem as its user computes them, and their derivatives by autograd."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.attention import SDPBackend, sdpa_kernel

import kpflow_dyn as kp
from kpflow_dyn._torch.causes import rounding_of

ITERATIONS = 100  # of a fixed point, whose maps contract by a half or more


class Oracle:
    """J and its transpose by reverse mode through the model."""

    def __init__(self, problem: Any, solution: Any) -> None:
        self.states = States(problem, solution)
        self.parameters = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}

    @property
    def value(self) -> Tensor:
        return self.states().detach()

    @property
    def rounding(self) -> float:
        """That of the least precise numbers in the network."""
        return rounding_of(self.states())

    def vjp(self, q: Tensor) -> dict[str, Tensor]:
        """J* q, by name."""
        with sdpa_kernel(SDPBackend.MATH):
            return self._pulled(self.states(), q)

    def jvp(self, theta: Mapping[str, Tensor]) -> Tensor:
        """J theta, by reverse mode through reverse mode, or where that fails row by row."""
        with suppress(NotImplementedError, RuntimeError):
            pushed = self._twice(theta)
            if pushed.isfinite().all():  # that of logcumsumexp is not
                return pushed
        rows = torch.eye(self.value.numel()).to(self.value).reshape(-1, *self.value.shape)
        pulled = [sum((g * theta[name]).sum() for name, g in self.vjp(row).items()) for row in rows]
        return torch.stack(pulled)

    def _twice(self, theta: Mapping[str, Tensor]) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            states = self.states()
            q = torch.zeros_like(states, requires_grad=True)
            pulled = self._pulled(states, q, create_graph=True)
            pairs = [(g, theta[name]) for name, g in pulled.items() if g.requires_grad]
            (pushed,) = grad([g for g, _ in pairs], q, [change for _, change in pairs])
            return pushed

    def transformed(self, q: Tensor) -> Tensor:
        """J J* q by torch.func."""
        values = {f"model.{name}": p.detach() for name, p in self.parameters.items()}

        def states(values: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.states, values, ())

        with sdpa_kernel(SDPBackend.MATH):
            (pulled,) = torch.func.vjp(states, values)[1](q)
            return torch.func.jvp(states, (values,), (pulled,))[1]

    def product(self, q: Tensor) -> Tensor:
        """J J* q by reverse mode alone."""
        return self.jvp(self.vjp(q))

    def _pulled(self, states: Tensor, q: Tensor, **options: Any) -> dict[str, Tensor]:
        found = grad(states, list(self.parameters.values()), q, materialize_grads=True, **options)
        return dict(zip(self.parameters, found, strict=True))


class States(nn.Module):
    """() -> the states of a problem [trial, ...], complex ones as real parts and then imaginary parts."""

    def __init__(self, problem: Any, solution: Any) -> None:
        super().__init__()
        self.model, self.problem, self.solution = problem.model, problem, solution

    def forward(self) -> Tensor:
        states = states_of(self.problem, self.model, self.solution)
        return torch.cat([states.real, states.imag], -1) if states.is_complex() else states


@singledispatch
def states_of(problem: kp.StaticProblem, net: Any, _solution: Any) -> Tensor:
    """What the network gives, trials first."""
    value = value_of(net, problem.x, problem.state)
    axes = getattr(problem, "axes", None) or ("trial",)
    return value.movedim(axes.index("trial"), 0) if "trial" in axes else value[None]


def value_of(net: nn.Module, x: Any, state: Any) -> Tensor:
    """What the user named: the output of a module, or a part of what the network gives."""
    (name,), heard = state, []
    modules = dict(net.named_modules())
    if not name or name not in modules:
        return picked(called(net, x), name)
    with modules[name].register_forward_hook(lambda _module, _given, out: heard.append(out)):
        called(net, x)
    return heard[0]


def called(net: Any, x: Any) -> Any:
    """The network on its argument, on several, or on named ones."""
    if isinstance(x, Mapping):
        return net(**x)
    return net(*x) if isinstance(x, tuple) else net(x)


def picked(given: Any, state: str) -> Any:
    """The part of what a network gives that its user named."""
    for key in filter(None, state.split(".")):
        if key.isdigit():
            given = given[int(key)]
            continue
        given = given[key] if isinstance(given, Mapping) else getattr(given, key)
    return given


@states_of.register
def _(problem: kp.DiscreteProblem, cell: Any, solution: Any) -> Tensor:
    states, z, x = [], problem.z0, problem.x
    if z is None:
        z = torch.zeros_like(solution.start)
        z = z.chunk(2, -1) if isinstance(cell, nn.LSTMCell) else z
    if isinstance(cell, nn.RNNBase):
        return _of_layer(cell, x)
    for x_t in x.unbind(1):
        z = cell(x_t, z)
        states.append(torch.cat(list(z), -1) if isinstance(z, tuple | list) else z)
    return torch.stack(states, 1)


def _of_layer(layer: nn.RNNBase, x: Tensor) -> Tensor:
    """The layer called on one step after another, all layers' h beside each other, then all c."""
    states, z = [], None
    for x_t in x.unbind(1):
        z = layer(x_t[:, None] if layer.batch_first else x_t[None], z)[1]
        both = torch.cat(z) if isinstance(z, tuple) else z
        states.append(torch.cat(list(both), -1))
    return torch.stack(states, 1)


@states_of.register
def _(problem: kp.ODEProblem, field: Any, solution: Any) -> Tensor:
    from torchdiffeq import odeint

    t = torch.as_tensor(problem.t).to(problem.z0)
    inputs = (lambda t: ()) if problem.x is None else (lambda t: (problem.x(t),))
    return odeint(lambda t, z: field(t, z, *inputs(t)), problem.z0, t, method=solution.alg).transpose(0, 1)


@states_of.register
def _(problem: kp.FixedPointProblem, f: Any, solution: Any) -> Tensor:
    z = solution.state.detach()
    for _ in range(ITERATIONS):
        z = f(problem.x, z)
    return z
