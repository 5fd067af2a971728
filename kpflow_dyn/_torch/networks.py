"""Trace torch models that are no steps: networks, fixed points and free-form constraints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kpflow_dyn._backend import BACKENDS
from kpflow_dyn._implicit.constraint import Form, TracedConstraint, check_alike, every, network_of, on_rows
from kpflow_dyn._implicit.layout import Layout
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn._torch.cells import initial_state
from kpflow_dyn._torch.checks import check_module
from kpflow_dyn._torch.trace import Applied, trace
from kpflow_dyn.tracing._graph import Node, Role

TRANSFORMS = BACKENDS["torch"].transforms


def network(problem: StaticProblem) -> TracedConstraint:
    """A feed-forward network, traced on its first trial."""
    net, x = problem.net, problem.x
    _check(net, x)
    names = None if problem.state is None else _known(net, problem.state)
    calls: list[str] = []
    graph = trace(Applied(_watching(names or (), calls.append), net), (Role.INPUT, x[:1]))
    named = {"": [graph.output], **_by_name(calls, graph.further)}
    parts = None if names is None else [(name, node) for name in names for node in named.get(name, [])]
    traced = network_of(graph, dict(net.named_parameters()), TRANSFORMS, x, parts, _of_one_trial)
    _check_network(traced, net, x)
    return traced


def fixed_point(problem: FixedPointProblem, swapped: bool) -> TracedConstraint:
    """A map f(x, z) -> z."""
    f, x = problem.f, problem.x
    z0 = initial_state([getattr(f, "hidden_size", None)], _check(f, x), problem.z0)
    step = Applied((lambda f, x, z: f(z, x)) if swapped else (lambda f, x, z: f(x, z)), f)
    try:
        expected = _run(step, x, z0)
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(
            f"f failed on x {tuple(x.shape)} and z {tuple(z0.shape)}: {error}; it is called as f(x, z), or as f(z, x) "
            "where its parameters are called z and x"
        ) from error
    if tuple(expected.shape) != tuple(z0.shape):
        raise ValueError(f"f gave {tuple(expected.shape)} for z {tuple(z0.shape)}; it must give the next z")
    graph = trace(step, (Role.INPUT, x[:1]), (Role.STATE, z0[:1]))
    known = dict(f.named_parameters())
    return TracedConstraint(
        graph, Form.FIXED_POINT, [graph.output], None, TRANSFORMS, known, [x], z0, partial(_run, step, x)
    )


def free_form(problem: ImplicitProblem) -> TracedConstraint:
    """F(S, params, x) on the whole state."""
    state, x = problem.state, [] if problem.x is None else [problem.x]
    call, names, as_given = _parameters(problem.params)
    step = Applied(lambda call, s, *x: problem.F(s, as_given(call), *x), call)
    check_module(call, state)
    graph = trace(step, (Role.STATE, state), *((Role.INPUT, value) for value in x))
    graph = replace(graph, parameters={node: names[name] for node, name in graph.parameters.items()})
    if graph.output.shape != tuple(state.shape):
        raise ValueError(f"F gave {graph.output.shape} for the state {tuple(state.shape)}; it must have its form")
    known = {names[name]: value for name, value in call.named_parameters()}
    return TracedConstraint(graph, Form.FREE, [graph.output], None, TRANSFORMS, known, x, state)


@torch.no_grad()
def _run(step: nn.Module, *rows: Tensor) -> Tensor:
    return step(*rows)


def _parameters(params: Any) -> tuple[nn.Module, dict[str, str], Callable[[Any], Any]]:
    """A module of the parameters, what they are called by their names in it, and the form that F takes them in."""
    if isinstance(params, nn.Module):
        return params, {name: name for name, _ in params.named_parameters()}, lambda module: module
    if not isinstance(params, Mapping) or not all(isinstance(value, Tensor) for value in params.values()):
        raise TypeError(f"params is {type(params).__name__}, expected an nn.Module or tensors by name")
    floating = {name: value for name, value in params.items() if value.is_floating_point()}
    if not floating:
        raise TypeError("params holds no floating-point tensors: nothing can learn")
    listed = nn.ParameterList(nn.Parameter(value.detach()) for value in floating.values())  # names may be any

    def by_name(values: nn.ParameterList) -> dict[str, Tensor]:
        return {**params, **dict(zip(floating, values, strict=True))}

    return listed, {str(i): name for i, name in enumerate(floating)}, by_name


def _watching(names: Sequence[str], note: Callable[[str], None]) -> Callable[..., Any]:
    """(net, x) -> its output, followed by those of the named submodules, one for each call; `note` hears whose."""

    def run(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        outputs: list[Tensor] = []

        def hook(name: str) -> Callable[..., None]:
            def of(_module: nn.Module, _args: Any, out: Any) -> None:
                note(name)
                outputs.append(_first(out))

            return of

        handles = [net.get_submodule(name).register_forward_hook(hook(name)) for name in names if name]
        try:
            return _first(_calling(net)(net, x)), *outputs
        finally:
            for handle in handles:
                handle.remove()

    return run


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


def _check(net: Any, x: Tensor) -> Tensor:
    """As for a cell; x, or where it holds integers one like it in the dtype of the parameters."""
    floating = [p for p in net.parameters() if p.is_floating_point()] if isinstance(net, nn.Module) else []
    if isinstance(net, nn.Module) and not floating and not any(p.is_complex() for p in net.parameters()):
        raise ValueError("the model has no floating-point parameters: nothing can learn")
    like = x if x.is_floating_point() or not floating else x.to(floating[0].dtype)
    check_module(net, like)
    return like


def _of_one_trial(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the batch axis of one, which products of many tokens have lost already."""
    return shape[1:] if shape and shape[0] == 1 else shape


def _check_network(traced: TracedConstraint, net: nn.Module, x: Tensor) -> None:
    """Compare the traced output, and its gradient, with the network's own on all trials at once."""
    output = traced.graph.output
    whole = every(replace(traced, states=[output], layout=Layout(("output",), (output.shape,))))
    names = [traced.graph.parameters[node] for node in whole.parameters]
    values = {name: traced.known[name].detach().clone().requires_grad_() for name in names}
    expected, theta = _first(_calling(net)(_WithValues(net, values), x)), whole.theta.requires_grad_()
    found = on_rows(traced, lambda theta, *x: whole.direct(theta, None, *x), (None,))(theta).reshape(expected.shape)
    check_alike(found.detach(), expected.detach())
    generator = torch.Generator(x.device).manual_seed(1)
    weights = torch.randn(expected.shape, generator=generator, dtype=expected.dtype, device=x.device)
    ours = torch.autograd.grad((found * weights).sum(), theta)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), list(values.values()), allow_unused=True)
    pairs = zip(theirs, values.values(), strict=True)
    flat = torch.cat([torch.zeros_like(v).reshape(-1) if g is None else g.reshape(-1) for g, v in pairs])
    if not float((ours - flat).abs().max()) <= 1e5 * torch.finfo(flat.dtype).eps * float(flat.abs().max()):
        raise RuntimeError(
            "the traced network has other gradients than the network; write it without torch.no_grad and the like"
        )


class _WithValues:
    """A module with other values of its parameters."""

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self.module, self.values = module, values

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.module, self.values, args, kwargs)
