"""Trace a torch step `module(x, z) -> z` to a `Graph` of one row."""

import contextlib
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import default_decompositions
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from kpflow_dyn._torch.cell_equations import CellEquations
from kpflow_dyn._torch.checks import is_inexact
from kpflow_dyn._torch.complex_parts import LINEAR, form_of
from kpflow_dyn._torch.decompositions import DECOMPOSITIONS, WHOLE
from kpflow_dyn._torch.functional import functional
from kpflow_dyn._torch.left_alone import ONE_AT_A_TIME, left_alone
from kpflow_dyn._torch.origins import own_line
from kpflow_dyn._torch.recording import Recording, record, tensors_in
from kpflow_dyn._torch.results import Results, in_both_modes, several_results
from kpflow_dyn._torch.surrogates import with_functions
from kpflow_dyn._torch.whole import called
from kpflow_dyn.tracing._graph import Graph, Node, Role
from kpflow_dyn.tracing._pairs import Form, real_graph
from kpflow_dyn.tracing._rules import RULES, rule_of

aten = torch.ops.aten
FxNode = Any  # torch.fx.Node, whose fields are unions that a type checker cannot narrow

MOVES = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze),
    *(aten.expand, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.cat, aten.stack, aten.unbind),
    *(aten.clone, aten.alias, aten.flip, aten.roll, aten.index_select, aten.repeat, aten.diagonal, aten.copy),
    *(aten.lift_fresh_copy, aten.index, aten.gather, aten.embedding),
}
PUTS = {aten.index_put.default, aten.scatter.src, aten.diagonal_scatter.default}
PRODUCTS = {aten.mm, aten.bmm}
REDUCES = {aten.sum, aten.mean, *LINEAR}


class Applied(nn.Module):
    """function(call, *rows) as a module; the parameters of `call` lie behind "call."."""

    def __init__(self, function: Callable[..., Any], call: nn.Module) -> None:
        super().__init__()
        self.function, self.call = function, call
        self.training = call.training

    def forward(self, *rows: Tensor) -> Any:
        return self.function(self.call, *rows)


@dataclass(frozen=True)
class Outline:
    """What was made of a step, without the values of its parameters and buffers; see `Graph`."""

    nodes: list[Node]
    outputs: list[Node]
    parameters: dict[Node, str]
    stored: dict[Node, str]  # the name in the step of each parameter and buffer
    constants: dict[Node, Tensor]  # the values of tensors that the trace found elsewhere
    forms: dict[Node, Form]  # what is complex
    fixing: dict[str, Tensor]  # buffers that the nodes themselves hang on, such as the edges of a graph
    decided: str  # see `Graph`

    def fits(self, step: Applied) -> bool:
        """Whether the step has these buffers still."""
        now = dict(step.named_buffers())
        return all(torch.equal(now[name], value) for name, value in self.fixing.items())

    def graph(self, step: Applied) -> Graph:
        """The graph with the values that the step has now."""
        now = dict(step.named_parameters()) | dict(step.named_buffers())
        values = self.constants | {node: now[name].detach().clone() for node, name in self.stored.items()}
        first, *further = self.outputs
        graph = Graph(self.nodes, first, self.parameters, values, further=further, decided=self.decided)
        return real_graph(graph, self.forms)


def trace(step: Applied, *rows: tuple[Role, Tensor]) -> Graph:
    """The graph of `step` on tensors in these roles, such as one row of x [1, input] and z [1, unit], with its values.

    The step gives one tensor, or a tuple that begins with it. Parameters have their names in `step.call`.
    """
    return outline(step, *rows).graph(step)


def outline(step: Applied, *rows: tuple[Role, Tensor]) -> Outline:
    """The same without values."""
    held, learnt = _held(step), dict(step.named_parameters())
    with ONE_AT_A_TIME:
        module, recording = _recorded(step, [row for _, row in rows], held, list(learnt))
    fixing = {name: held[name].detach().clone() for name in recording.fixing}
    found = Outline([], [], {}, {}, {}, {}, fixing, recording.decided)
    nodes: dict[FxNode, Any] = {}
    here = iter(recording.given)
    fx: FxNode
    for fx in module.graph.nodes:
        if fx.op == "placeholder":
            what = next(here)
            nodes[fx] = Node(fx.name, rows[what][0], *_signature(fx)) if isinstance(what, int) else _fixed(fx)
            if isinstance(what, str):
                found.stored[nodes[fx]] = what
            elif isinstance(what, Tensor):
                found.constants[nodes[fx]] = what
            if isinstance(what, str) and what in learnt:
                found.parameters[nodes[fx]] = what.removeprefix("call.")
        elif fx.op == "get_attr":
            nodes[fx] = _fixed(fx)
            found.constants[nodes[fx]] = getattr(module, fx.target).detach().clone()
        elif fx.op == "output":
            found.outputs.extend(nodes[value] for value in fx.args[0])
            break
        elif _has_several_results(fx):
            nodes[fx] = several_results(fx, *_with_nodes((fx.args, dict(fx.kwargs)), nodes))
            found.nodes.extend(nodes[fx].nodes)
            found.forms.update(nodes[fx].forms)
            continue
        elif fx.target is operator.getitem and isinstance(nodes[fx.args[0]], Results):
            nodes[fx] = nodes[fx.args[0]].by_number[fx.args[1]]
            continue
        else:
            nodes[fx] = _call(fx, nodes)
        found.nodes.append(nodes[fx])
        found.forms[nodes[fx]] = form_of(fx)
    return found


def _held(step: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a step by name; those of a script module may be new objects with each look."""
    return dict(step.named_parameters()) | dict(step.named_buffers())


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by products and softmax: the fused kernels and the fast path of eval mode have no forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs and prints of its own internals; what stops it comes as an exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _recorded(
    step: Applied, rows: list[Tensor], held: dict[str, Tensor], learnt: list[str]
) -> tuple[GraphModule, Recording]:
    """The step as a graph of functions, and what was recorded of it."""
    try:
        eager = torch.compiler.set_stance("force_eager")  # what torch.compile made is not heard
        beside = partial(with_functions, [held[name] for name in learnt])
        with _quiet(), differentiable_attention(), left_alone(step, values=False), eager, CellEquations():
            recording = record(step, rows, held, learnt, beside=beside)
        with _quiet():
            module = functional(recording, rows, held, _decompositions())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        where = own_line(traceback.extract_tb(error.__traceback__))
        raise ValueError(f"the model could not be traced{where}: {reason}") from error
    return module, recording


def _decompositions() -> dict[Any, Any]:
    table: dict[Any, Any] = dict(default_decompositions())
    del table[aten.detach.default]  # it would become a plain alias, and its derivative live again
    for op in WHOLE:
        table.pop(op, None)
    table |= DECOMPOSITIONS
    return {op: parts for op, parts in table.items() if op.overloadpacket not in RULES}  # these stay whole


def _fixed(fx: FxNode) -> Node:
    value = fx.meta["val"]
    return Node(fx.name, Role.FIXED, (tuple(value.shape),), value.is_floating_point())


def _call(fx: FxNode, nodes: dict[FxNode, Node]) -> Node:
    op, (args, kwargs) = fx.target, _with_nodes((fx.args, dict(fx.kwargs)), nodes)
    if op is torch.ops.kpflow_dyn.whole.default:
        op, args, kwargs = called(*args)
    rule = None if op is operator.getitem else rule_of(op)
    if rule is not None:
        return Node(fx.name, rule.role, *_signature(fx), rule.function or op, args, kwargs)
    role, apply = _role(fx), op
    if role is Role.MOVE and apply is aten._to_copy.default:
        apply = _same
    return Node(fx.name, role, *_signature(fx), in_both_modes(apply) if role is Role.OTHER else apply, args, kwargs)


def _same(value: Tensor, **_: Any) -> Tensor:
    """A copy to the dtype that it has already; must not cast the element numbers that the analysis sends through."""
    return value


def _role(fx: FxNode) -> Role:
    if fx.target is operator.getitem:
        return Role.MOVE
    packet = fx.target.overloadpacket
    if packet is aten.detach:
        return Role.STOP
    if packet in MOVES or (packet is aten._to_copy and fx.meta["val"].dtype == fx.args[0].meta["val"].dtype):
        return Role.MOVE
    if fx.target in PUTS and True not in fx.args[3:]:  # which is to add
        return Role.MOVE
    if packet is aten.add and fx.kwargs.get("alpha", 1) == 1:
        return Role.ADD
    if packet in PRODUCTS:
        return Role.PRODUCT
    if packet is aten.convolution and not fx.args[6] and fx.args[8] == 1:  # neither transposed nor in groups
        return Role.CONVOLUTION
    if packet in REDUCES and is_inexact(fx.meta["val"]):
        return Role.REDUCE
    return Role.POINTWISE if torch.Tag.pointwise in fx.target.tags else Role.OTHER


def _has_several_results(fx: FxNode) -> bool:
    """Whether it is an operation with several results that does more than copy."""
    return isinstance(fx.meta["val"], tuple | list) and _role(fx) is not Role.MOVE


def _signature(fx: FxNode) -> tuple[tuple[tuple[int, ...], ...], bool]:
    tensors = tensors_in(fx.meta["val"])
    return tuple(tuple(v.shape) for v in tensors), any(v.is_floating_point() for v in tensors)


def _with_nodes(tree: Any, nodes: dict[FxNode, Node]) -> Any:
    """Nested arguments as plain tuples, lists and dicts, with our nodes in the place of torch.fx's."""
    if isinstance(tree, torch.fx.Node):
        return nodes[tree]
    if isinstance(tree, dict):
        return {key: _with_nodes(leaf, nodes) for key, leaf in tree.items()}
    if isinstance(tree, tuple | list):
        return (tuple if isinstance(tree, tuple) else list)(_with_nodes(leaf, nodes) for leaf in tree)
    return tree
