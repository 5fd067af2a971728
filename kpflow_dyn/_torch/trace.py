"""Trace a torch step `module(x, z) -> z` to a `Graph` of one row, through torch.export."""

import contextlib
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind
from torch.nn.attention import SDPBackend, sdpa_kernel

import kpflow_dyn
from kpflow_dyn._torch.complex_parts import LINEAR, form_of, values_of
from kpflow_dyn._torch.decompositions import DECOMPOSITIONS, WHOLE
from kpflow_dyn._torch.left_alone import left_alone
from kpflow_dyn.tracing._graph import Graph, Node, Role
from kpflow_dyn.tracing._pairs import Form, real_graph
from kpflow_dyn.tracing._rules import RULES, Rule, rule_of

aten = torch.ops.aten
FxNode = Any  # torch.fx.Node, whose fields are unions that a type checker cannot narrow

MOVES = {
    *(aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze),
    *(aten.expand, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.cat, aten.stack, aten.unbind),
    *(aten.clone, aten.alias, aten.flip, aten.roll, aten.index_select, aten.repeat, aten.diagonal, aten.copy),
    *(aten.lift_fresh_copy, aten.slice_scatter, aten.select_scatter, aten.index, aten.gather, aten.embedding),
}
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
    """What torch.export made of a step, without the values of its parameters and buffers; see `Graph`."""

    nodes: list[Node]
    outputs: list[Node]
    parameters: dict[Node, str]
    stored: dict[Node, str]  # the name in the step of each parameter and buffer
    constants: dict[Node, Tensor]  # the values of tensors that the trace found elsewhere
    forms: dict[Node, Form]  # what is complex

    def graph(self, step: Applied) -> Graph:
        """The graph with the values that the step has now."""
        now = dict(step.named_parameters()) | dict(step.named_buffers())
        values = self.constants | {node: now[name].detach().clone() for node, name in self.stored.items()}
        graph = Graph(self.nodes, self.outputs[0], self.parameters, values, further=self.outputs[1:])
        return real_graph(graph, self.forms)


def trace(step: Applied, *rows: tuple[Role, Tensor]) -> Graph:
    """The graph of `step` on tensors in these roles, such as one row of x [1, input] and z [1, unit], with its values.

    The step gives one tensor, or a tuple that begins with it. Parameters have their names in `step.call`.
    """
    return outline(step, *rows).graph(step)


def outline(step: Applied, *rows: tuple[Role, Tensor]) -> Outline:
    """The same without values."""
    program = _export(step, tuple(row for _, row in rows))
    signature = program.graph_signature
    _check_pure(program)
    nodes: dict[FxNode, Node] = {}
    found = Outline([], [], {}, {}, {}, {})
    inputs = (role for role, _ in rows)
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    names = _first_names(step)
    learnt = dict(step.named_parameters())
    places = {_place(parameter): name for name, parameter in learnt.items()}
    own = {*learnt, *dict(step.named_buffers())}
    by_name: dict[str, Node] = {}
    fx: FxNode
    for fx in program.graph.nodes:
        if fx.op == "placeholder" and specs[fx.name].kind is InputKind.USER_INPUT:
            nodes[fx] = Node(fx.name, next(inputs), *_signature(fx))
        elif fx.op == "placeholder":
            name = _name_of(program, str(specs[fx.name].target), names, places)
            if name not in by_name:
                by_name[name] = _fixed(fx)
                if name in own:
                    found.stored[by_name[name]] = name
                else:
                    found.constants[by_name[name]] = _constant(program, name)
            nodes[fx] = by_name[name]
            if name in learnt:
                found.parameters[nodes[fx]] = name.removeprefix("call.")
        elif fx.op == "get_attr":
            nodes[fx] = _fixed(fx)
            found.constants[nodes[fx]] = getattr(program.graph_module, fx.target).detach().clone()
        elif fx.op == "call_function" and "val" in fx.meta:  # without a value: an assertion of torch.export
            nodes[fx] = _call(fx, nodes)
        elif fx.op == "output":
            found.outputs.extend(nodes[value] for value in fx.args[0])
    assert found.outputs, "torch.export gave a graph without an output"
    found.nodes.extend(dict.fromkeys(nodes.values()))
    found.forms.update((node, form_of(fx)) for fx, node in nodes.items())
    return found


def _check_pure(program: ExportedProgram) -> None:
    """Raise where a model does more than compute, which a graph of its values does not follow."""
    signature = program.graph_signature
    written = {**signature.buffers_to_mutate, **getattr(signature, "parameters_to_mutate", {})}
    if written:
        names = ", ".join(name.removeprefix("call.") for name in written.values())
        raise ValueError(f"the model writes to its own {names}, which a trace does not follow")
    if signature.user_inputs_to_mutate:
        raise ValueError("the model writes to its arguments in place; work on copies (x = x + ..., not x += ...)")
    if any(spec.kind is InputKind.TOKEN for spec in signature.input_specs):
        raise ValueError(
            "the step has an operation with a side effect, such as the check inside torch.linalg.inv; call the variant "
            "without it (torch.linalg.inv_ex), or write the step with other operations"
        )


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
    """Without what torch.export logs and prints of its own internals; what stops it comes as an exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _unwound() -> Iterator[None]:
    """Close what an error inside of torch.func leaves open in torch.export, which would break all that comes later."""
    internals: Any = torch._C
    functorch, levels = internals._functorch, forward_ad._current_level
    inside = functorch.peek_interpreter_stack() is not None
    try:
        yield
    finally:
        while not inside and functorch.peek_interpreter_stack() is not None:
            functorch.pop_dynamic_layer_stack()
        while forward_ad._current_level > levels:
            forward_ad.exit_dual_level()
        if levels < 0:
            with contextlib.suppress(RuntimeError):  # there is none
                internals._exit_dual_level(level=0)  # torch.export records the exit of torch.func.jvp in place of it


def _export(step: nn.Module, rows: tuple[Tensor, ...]) -> ExportedProgram:
    if any(isinstance(module, torch.jit.ScriptModule) for module in step.modules()):
        raise ValueError("a module of torch.jit.script cannot be traced; pass the Python module that it was made of")
    try:
        # No fake tensor may stay in the model.
        with _quiet(), _unwound(), torch.no_grad(), differentiable_attention(), left_alone(step, values=False):
            return torch.export.export(step, rows, strict=False).run_decompositions(_decompositions())
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(
            f"torch.export could not trace the model: {reason}{_where(error)}. It must be a function of its arguments "
            "without branches or loops on their values; use torch.where instead"
        ) from error


def _where(error: BaseException) -> str:
    """The last line of the model's own code on the way to an error."""
    inside = tuple(str(Path(str(module.__file__)).parent) for module in (torch, kpflow_dyn))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(inside)]
    return f" (in {frames[-1].filename}, line {frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _decompositions() -> dict[Any, Any]:
    table: dict[Any, Any] = dict(default_decompositions())
    del table[aten.detach.default]  # it would become a plain alias, and its derivative live again
    for op in WHOLE:
        table.pop(op, None)
    table |= DECOMPOSITIONS
    return {op: parts for op, parts in table.items() if op.overloadpacket not in RULES}  # these stay whole


def _first_names(step: nn.Module) -> dict[str, str]:
    """Each name of a parameter -> its first name: a parameter shared by two modules has two."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(p), name) for name, p in step.named_parameters(remove_duplicate=False)}


def _name_of(program: ExportedProgram, target: str, names: dict[str, str], places: dict[Any, str]) -> str:
    """The first name of a tensor; that of a parameter also where the model reaches it by another way, such as a list.

    Whether gradients take that way as well, autograd through the model says afterwards.
    """
    found = program.constants.get(target)
    return names.get(target, target) if not isinstance(found, Tensor) else places.get(_place(found), target)


def _place(tensor: Tensor) -> Any:
    """Where its numbers are."""
    if tensor.layout is not torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _constant(program: ExportedProgram, name: str) -> Tensor:
    value = program.state_dict.get(name, program.constants.get(name))
    assert isinstance(value, Tensor), f"{name} is {type(value).__name__}, expected a tensor"
    return value.detach().clone()


def _fixed(fx: FxNode) -> Node:
    value = fx.meta["val"]
    return Node(fx.name, Role.FIXED, (tuple(value.shape),), value.is_floating_point())


def _call(fx: FxNode, nodes: dict[FxNode, Node]) -> Node:
    args, kwargs = _with_nodes((fx.args, dict(fx.kwargs)), nodes)
    rule = _rule(fx)
    if rule is not None:
        return Node(fx.name, rule.role, *_signature(fx), rule.function or fx.target, args, kwargs)
    cast = fx.target is aten._to_copy.default
    return Node(
        fx.name, _role(fx), *_signature(fx), _same if _role(fx) is Role.MOVE and cast else fx.target, args, kwargs
    )


def _rule(fx: FxNode) -> Rule | None:
    return None if fx.target is operator.getitem else rule_of(fx.target)


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
    if packet is aten.add and fx.kwargs.get("alpha", 1) == 1:
        return Role.ADD
    if packet in PRODUCTS:
        return Role.PRODUCT
    if packet is aten.convolution and not fx.args[6] and fx.args[8] == 1:  # neither transposed nor in groups
        return Role.CONVOLUTION
    if packet in REDUCES and (fx.meta["val"].is_floating_point() or fx.meta["val"].is_complex()):
        return Role.REDUCE
    return Role.POINTWISE if torch.Tag.pointwise in fx.target.tags else Role.OTHER


def _signature(fx: FxNode) -> tuple[tuple[tuple[int, ...], ...], bool]:
    tensors = values_of(fx)
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
