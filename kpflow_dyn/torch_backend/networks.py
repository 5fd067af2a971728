"""Trace torch models that are no steps: networks, fixed points and free-form constraints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kpflow_dyn.constraint import FIXED_POINT, FREE, NETWORK, Constraint, Traced, network_of
from kpflow_dyn.graph import Graph, Node, Role
from kpflow_dyn.layout import Layout
from kpflow_dyn.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn.torch_backend.checks import check_module
from kpflow_dyn.torch_backend.rows import TORCH
from kpflow_dyn.torch_backend.trace import trace


def network(problem: StaticProblem) -> Traced:
    """A feed-forward network, traced on its first trial."""
    net, x = problem.net, problem.x
    _check(net, x)
    names = None if problem.state is None else _known(net, problem.state)
    calls: list[str] = []
    graph = _named(trace(_Watched(net, names or (), calls.append), (Role.INPUT, x[:1])))
    graph.named = _by_name(calls, graph.further)
    graph.named[""] = [graph.output]
    parts = None if names is None else [(name, node) for name in names for node in graph.named.get(name, [])]
    traced = network_of(graph, dict(net.named_parameters()), TORCH, x, parts, _of_one_trial)
    _check_network(traced, net, x)
    return traced


def fixed_point(problem: FixedPointProblem, swapped: bool) -> Traced:
    """A map f(x, z) -> z."""
    f, x = problem.f, problem.x
    _check(f, x)
    z0 = _start(problem)
    module = _Called(f, (lambda f, x, z: f(z, x)) if swapped else (lambda f, x, z: f(x, z)))
    try:
        out = module(x, z0)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"f failed on x {tuple(x.shape)} and z {tuple(z0.shape)}: {error}; it is called as f(x, z), or as f(z, x) "
            "where its parameters are called z and x"
        ) from error
    if tuple(out.shape) != tuple(z0.shape):
        raise ValueError(f"f gave {tuple(out.shape)} for z {tuple(z0.shape)}; it must give the next z")
    graph = _named(trace(module, (Role.INPUT, x[:1]), (Role.STATE, z0[:1])))
    known = dict(f.named_parameters())
    return Traced(graph, FIXED_POINT, [graph.output], None, TORCH, known, [x], z0)


def free_form(problem: ImplicitProblem) -> Traced:
    """F(S, params, x) on the whole state."""
    params = problem.params if isinstance(problem.params, nn.Module) else _Tensors(problem.params)
    like = problem.state
    if not like.is_floating_point():
        raise TypeError(f"the state is {like.dtype}, expected float32 or float64")
    given = problem.params if isinstance(problem.params, nn.Module) else None
    x = [] if problem.x is None else [problem.x]
    module = _Called(params, lambda p, s, *x: problem.F(s, given if given is not None else p.by_name(), *x))
    rows = [(Role.STATE, like), *((Role.INPUT, value) for value in x)]
    graph = _named(trace(module, *rows))
    if graph.output.shape != tuple(like.shape):
        raise ValueError(f"F gave {graph.output.shape} for the state {tuple(like.shape)}; it must have its form")
    known = dict(params.named_parameters())
    known = {name.removeprefix("tensors."): value for name, value in known.items()}
    return Traced(graph, FREE, [graph.output], None, TORCH, known, x, like)


class _Called(nn.Module):
    """A function of a module and tensors, as a module."""

    def __init__(self, call: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.call, self.function = call, function
        self.training = call.training

    def forward(self, *rows: Tensor) -> Any:
        return self.function(self.call, *rows)


class _Watched(_Called):
    """A network that also gives the outputs of some of its submodules, one for each call."""

    def __init__(self, call: nn.Module, names: Sequence[str], note: Callable[[str], None]) -> None:
        super().__init__(call, _calling(call))
        self.names, self.note = list(names), note

    def forward(self, *rows: Tensor) -> Any:
        outputs = []
        with self._hooks(outputs):
            out = _first(self.function(self.call, *rows))
        return (out, *outputs)

    @contextmanager
    def _hooks(self, outputs: list[Tensor]) -> Iterator[None]:
        def note(name: str) -> Callable:
            def hook(_module: nn.Module, _args: Any, out: Any) -> None:
                self.note(name)
                outputs.append(_first(out))

            return hook

        watched = [name for name in self.names if name]
        handles = [self.call.get_submodule(name).register_forward_hook(note(name)) for name in watched]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Tensors(nn.Module):
    """Tensors by name, as parameters."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
            raise TypeError(f"params is {type(tensors).__name__}, expected an nn.Module or tensors by name")
        self.names = list(tensors)
        self.tensors = nn.ParameterDict({name: nn.Parameter(t.detach()) for name, t in tensors.items()})

    def by_name(self) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in self.names}


def _calling(net: nn.Module) -> Callable[..., Any]:
    if isinstance(net, nn.MultiheadAttention):
        if not net.batch_first:
            return lambda net, x: net(*(x.transpose(0, 1),) * 3, need_weights=False)[0].transpose(0, 1)
        return lambda net, x: net(x, x, x, need_weights=False)
    if isinstance(net, nn.RNNBase) and not net.batch_first:
        return lambda net, x: net(x.transpose(0, 1))[0].transpose(0, 1)
    return lambda net, x: net(x)


def _first(out: Any) -> Tensor:
    """The first tensor of what a module gives."""
    while isinstance(out, tuple | list):
        out = out[0]
    if not isinstance(out, Tensor):
        raise ValueError(f"a module gave {type(out).__name__}, expected a tensor, or a tuple that begins with one")
    return out


def _named(graph: Graph) -> Graph:
    graph.parameters = {
        node: name.removeprefix("call.").removeprefix("tensors.") for node, name in graph.parameters.items()
    }
    return graph


def _by_name(calls: list[str], outputs: list[Node]) -> dict[str, list[Node]]:
    """The outputs of the calls of each submodule, in the last run of the network."""
    named: dict[str, list[Node]] = {}
    for name, node in zip(calls[len(calls) - len(outputs) :], outputs, strict=True):
        named.setdefault(name, []).append(node)
    return named


def _known(net: nn.Module, names: Sequence[str]) -> list[str]:
    known = [name for name, _ in net.named_modules() if name]
    if unknown := [name for name in names if name and name not in known]:
        raise ValueError(f"unknown modules {unknown}; the network has {', '.join(known)}")
    return list(names)


def _check(net: Any, x: Tensor) -> None:
    """As for a cell; integer inputs have no dtype to agree with."""
    like = x
    if not x.is_floating_point() and isinstance(net, nn.Module):
        like = x.to(next((p.dtype for p in net.parameters()), torch.float32))
    check_module(net, like)
    if not any(p.is_floating_point() for p in net.parameters()):
        raise ValueError("the network has no floating-point parameters: nothing can learn")


def _of_one_trial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the batch axis of one, which products of many tokens have lost already."""
    return shape[1:] if shape and shape[0] == 1 else shape


def _start(problem: FixedPointProblem) -> Tensor:
    trials, units = len(problem.x), getattr(problem.f, "hidden_size", None)
    z0 = problem.z0
    if z0 is None:
        if units is None:
            raise ValueError("f has no hidden_size attribute, so its state size is unknown; pass z0 [trial, unit]")
        like = next(problem.f.parameters())
        return like.new_zeros(trials, units).detach()
    if not isinstance(z0, Tensor):
        raise TypeError(f"z0 is {type(z0).__name__}, expected a tensor [trial, unit]")
    z0 = z0.expand(trials, -1) if z0.ndim == 1 else z0
    if len(z0) != trials:
        raise ValueError(f"z0 has {len(z0)} trials, x has {trials}")
    return z0.detach().clone()


def _check_network(traced: Traced, net: nn.Module, x: Tensor) -> None:
    """Compare the traced output, and its gradient, with the network's own on all trials at once."""
    learnable = [name for name, p in traced.known.items() if p.is_floating_point()]
    graph = traced.graph
    layout = Layout(("y",), (graph.output.shape,))
    constraint = Constraint(graph, learnable, TORCH, NETWORK, [graph.output], layout)
    names = [graph.parameters[node] for node in constraint.parameters]
    values = {name: traced.known[name].detach().clone().requires_grad_() for name in names}
    expected = _first(_calling(net)(_Functional(net, values), x))
    one = TORCH.vmap(lambda theta, *x: constraint.direct(theta, None, *x), (None, 0))
    theta = constraint.theta.requires_grad_()
    found = one(theta, x).reshape(expected.shape)
    eps = torch.finfo(found.dtype).eps
    error = float((found - expected).detach().abs().max() / expected.detach().abs().max().clamp_min(1e-30))
    if not error <= 1e4 * eps:
        raise ValueError(
            f"the traced network differs from the network on all trials by {error:.1e} of its size: its trials "
            "influence each other, or it is random or changes itself"
        )
    weights = torch.randn(expected.shape, generator=torch.Generator(x.device).manual_seed(1), device=x.device)
    weights = weights.to(expected.dtype)
    ours = torch.autograd.grad((found * weights).sum(), theta)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), list(values.values()), allow_unused=True)
    pairs = zip(theirs, values.values(), strict=True)
    flat = torch.cat([torch.zeros_like(v).reshape(-1) if g is None else g.reshape(-1) for g, v in pairs])
    if not float((ours - flat).abs().max()) <= 1e5 * eps * float(flat.abs().max()):
        raise RuntimeError(
            "the traced network has other gradients than the network; write it without torch.no_grad and the like"
        )


class _Functional:
    """A module with other values of its parameters."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.module, self.values = module, values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.values, args, kwargs)
