"""Record what a torch function does to real tensors, operation by operation.

Operations are heard below autograd and function transforms, so that a derivative that a model takes inside is made of
operations like all others. What hangs on buffers and constants alone, such as edges that a mask selects, is computed on
the way.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS  # what torch.library.custom_op made, with its function of Python
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode, enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kpflow_dyn._torch.checks import is_inexact
from kpflow_dyn._torch.masks import BY_MASKS
from kpflow_dyn._torch.origins import Origin, Origins
from kpflow_dyn._torch.storages import FxNode, Storages, place_of
from kpflow_dyn._torch.whole import numbered
from kpflow_dyn.tracing._rules import rule_of

aten = torch.ops.aten

# these take no more than the shape of an operand
LIKE = {aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_empty, aten.new_empty_strided}
LIKE |= {aten.new_zeros, aten.new_ones, aten.new_full, aten.lift_fresh}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}
WRITES_AT = {aten.index_put, aten.index_put_, aten._unsafe_index_put}
INDEXED = WRITES_AT | {aten.index, aten._unsafe_index}
NOT_OF_VALUES = {aten.linalg_lstsq, aten._pack_padded_sequence, aten.masked_select}  # or of those of one operand alone
OF_VALUES = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
ARGUMENTS = "its arguments in place; work on copies (x = x + ..., not x += ...)"
SPARSE = "the model holds a sparse tensor, which a trace does not follow; index_add does the same"
DETACHES = {Tensor.detach, torch.detach, Tensor.data.__get__}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Recording:
    """What a function did.

    module: the same operations as a function of the tensors that were `given`.
    given: for each the row or the name it has, or its value where it was found on the way.
    fixing: the names of tensors whose values made something of what was recorded.
    decided: where values of the rows, or of parameters that learn, did so first; empty where none did.
    """

    module: GraphModule
    given: list[int | str | Tensor]
    fixing: frozenset[str]
    decided: str


def record(
    function: Callable[..., Any],
    rows: Sequence[Tensor],
    held: Mapping[str, Tensor],
    learnt: Sequence[str] = (),
    beside: Callable[["Recorder"], AbstractContextManager[None]] = nullcontext,
    stops: bool = True,
) -> Recording:
    """Record function(*rows) -> a tensor or a sequence of them.

    Args:
        function: a function of real tensors.
        rows: what it is recorded at.
        held: the tensors of its model by name.
        learnt: the names of parameters among them.
        beside: what else shall be watched meanwhile.
        stops: whether what is computed without gradients is without a derivative.
    """
    recorder = Recorder(len(rows), held, frozenset(learnt), stops)
    with torch.inference_mode(False), torch.enable_grad():
        given = [row.detach().clone().requires_grad_(is_inexact(row)).view_as(row) for row in rows]
        for name in learnt:
            recorder.node_of(held[name].requires_grad_(is_inexact(held[name])))  # also of what is frozen now
        with beside(recorder), recorder.listening(given):
            found = function(*given)
            outputs = [recorder.node_of(value) for value in ([found] if isinstance(found, Tensor) else found)]
        return recorder.finish(outputs)


class Recorder(TorchDispatchMode):
    """Hears all operations and writes them down as nodes of a graph."""

    def __init__(self, rows: int, held: Mapping[str, Tensor], learnt: frozenset[str], stops: bool) -> None:
        super().__init__()
        self.graph, self.paused, self.detaching = Graph(), False, False
        self.origins, self._stops = Origins(learnt), stops
        self._given: dict[FxNode, int | str | Tensor] = {self.graph.placeholder(f"row_{n}"): n for n in range(rows)}
        self._storages = Storages(self.graph, self.node_of)
        self._places = {place_of(value): name for name, value in held.items()}
        self._expected: dict[int, tuple[Sequence[Tensor], Callable[[list[Tensor]], None]]] = {}

    @contextmanager
    def listening(self, rows: Sequence[Tensor]) -> Iterator[None]:
        """Record, from these rows on."""
        nodes = [node for node, what in self._given.items() if isinstance(what, int)]
        for n, (node, row) in enumerate(zip(nodes, rows, strict=True)):
            self._know(row, node, frozenset([n]))
            self.origins.protect(row, ARGUMENTS)
        with _Asked(self), _without_checks(), self:
            yield

    def finish(self, outputs: Sequence[FxNode]) -> Recording:
        """What was recorded up to these."""
        self.graph.output(tuple(outputs))
        given = [self._given[node] for node in self.graph.nodes if node.op == "placeholder"]
        module = GraphModule(torch.nn.Module(), self.graph)
        return Recording(module, given, self.origins.fixing, self.origins.decided)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and write it down."""
        kwargs, packet = kwargs or {}, func.overloadpacket
        if self.paused:
            return func(*args, **kwargs)
        if packet in INDEXED:
            args = _with_numbers_for_masks(self, packet, args)
        elif OF_VALUES & set(func.tags) and packet not in NOT_OF_VALUES:
            self.origins.fix(self.met(tensors_in((args, kwargs))))
            return self.found(func(*args, **kwargs))
        for tensor in (written := self.met(list(_written(func, args, kwargs)))):
            self.origins.check_ours(tensor)
        if (own := _in_python(func)) is not None:
            with enable_reentrant_dispatch(), self:
                return own(*args, **kwargs)
        out = func(*args, **kwargs)
        if packet in LIKE or not tensors_in((args, kwargs)):
            return self.found(out)
        if results := tensors_in(out):
            self._write_down(func, args, kwargs, results, isinstance(out, Tensor), written)
        return out

    @contextmanager
    def unheard(self) -> Iterator[None]:
        """Record nothing meanwhile."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def whole(self, op: Any, args: Any, kwargs: Any) -> Any:
        """An operation that has a rule, as one node."""
        with self.unheard():
            out = op(*args, **kwargs)
        number, values = numbered(op, args, kwargs)
        node = self.graph.call_function(torch.ops.kpflow_dyn.whole.default, (number, [*map(self.node_of, values)]))
        self._know(out, node, self.origins.of(self.met(values)))
        return out

    def node_of(self, tensor: Tensor) -> FxNode:
        """The node of a tensor; one that was not met before is of the model, or a constant."""
        if id(tensor) in self._expected and tensor.requires_grad:
            tensors, follow = self._expected[id(tensor)]
            for result in tensors:
                del self._expected[id(result)]
            follow([result for result in tensors if result.requires_grad])
        if tensor not in self._storages:
            if tensor.layout is not torch.strided:
                raise ValueError(SPARSE)
            name = self._places.get(place_of(tensor))
            if name is None and self._storages.holds(tensor):
                self.stand_for(tensor, self._storages.view(tensor, tensor))
                return self._storages.node(tensor)
            whose = (name or "tensors").removeprefix("call.")
            self.origins.protect(tensor, f"its own {whose}, which a trace does not follow")
            with self.graph.inserting_before(next(iter(self._given))):
                node = self.graph.placeholder(f"held_{len(self._given)}")
            with self.unheard():
                self._given[node] = tensor.detach().clone() if name is None else name
            self._know(tensor, node, frozenset(() if name is None else (name,)))
        return self._storages.node(tensor)

    def expect(self, tensors: Sequence[Tensor], follow: Callable[[list[Tensor]], None]) -> None:
        """Call `follow` on those of these that turn out to require gradients, when one of them is first used."""
        for tensor in tensors:
            self._expected[id(tensor)] = tensors, follow

    def stand_for(self, tensor: Tensor, node: FxNode) -> None:
        """Let another node stand for a tensor from now on."""
        self._storages.know(tensor, node)

    def _know(self, tensor: Tensor, node: FxNode, origin: Origin) -> None:
        self._storages.know(tensor, node)
        self.origins.add(tensor, origin)

    def met(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same, all of which have nodes."""
        for tensor in tensors:
            self.node_of(tensor)
        return tensors

    def _write_down(self, func: Any, args: Any, kwargs: Any, results: list[Tensor], single: bool, written: Any) -> None:
        origin = self.origins.of(self.met(tensors_in((args, kwargs))))
        if func is aten.detach.default and not self.detaching:
            func = aten.alias.default  # autograd's own, of what it keeps
        copies = {id(tensor): self._called(aten.clone.default, self.node_of(tensor)) for tensor in written}
        leaves = tree_map_only(Tensor, lambda leaf: copies.get(id(leaf)) or self.node_of(leaf), (args, kwargs))
        node = self._by_shape(func, args, leaves, results)
        for tensor in written:
            self._storages.write(tensor, copies[id(tensor)], self._has_derivative(args, kwargs))
            self.origins.add(tensor, origin)
        for n, tensor in enumerate(results):
            if id(tensor) not in copies:
                one = node if single else self._called(operator.getitem, node, n)
                stopped = self._stops and not torch.is_grad_enabled() and is_inexact(tensor)
                self._know(tensor, self._called(aten.detach.default, one) if stopped else one, origin)

    def _by_shape(self, func: Any, given: Any, leaves: Any, results: list[Tensor]) -> FxNode:
        """A call as a node, in which it does not matter how numbers lie in memory."""
        if func is aten.as_strided.default:
            return self._storages.view(given[0], *results)
        if func in VIEWS:
            return self._called(aten.reshape.default, leaves[0][0], list(results[0].shape))
        return self.graph.call_function(func, *leaves)

    def _has_derivative(self, *operands: Any) -> bool:
        """Whether a result has one; what cannot stop always has."""
        return not self._stops or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors_in(operands)))

    def _called(self, func: Any, *args: Any) -> FxNode:
        return self.graph.call_function(func, args)

    def found(self, out: Any) -> Any:
        """Results that hang on nothing are constants, which the model may change."""
        for tensor in tensors_in(out):
            if tensor not in self._storages:
                node = self.node_of(tensor)
                self.origins.release(tensor)
                self.stand_for(tensor, self._called(aten.clone.default, node))
        return out


def _with_numbers_for_masks(recorder: Recorder, packet: Any, args: Any) -> Any:
    """Masks among indices as the numbers of what they take."""
    masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
    one_value = packet in WRITES_AT and args[2].numel() == 1  # where data say so
    if not masks or (one_value and recorder.origins.hang_on_rows(recorder.met(masks))):
        return args
    recorder.origins.fix(recorder.met(masks))
    numbers = [[i] if i is None or i.dtype != torch.bool else recorder.found(list(_numbers(i))) for i in args[1]]
    return args[0], [part for parts in numbers for part in parts], *args[2:]


class _Asked(TorchFunctionMode):
    """What only the call itself tells: where the model detaches, as autograd does to what it keeps, and looks up."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        has_rule = isinstance(func, OpOverload | OpOverloadPacket) and rule_of(func)
        if has_rule and not any(map(is_wrapped, tensors_in(args))):
            return self.recorder.whole(func, args, kwargs or {})
        if func is one_hot:
            return _one_hot(*args, **(kwargs or {}))
        if func in BY_MASKS and len(args) > 1 and not kwargs and self._is_mask_of_rows(args[1]):
            return BY_MASKS[func](*args)
        if func is Tensor.__getitem__:
            return _looked_up(*args)
        if func not in DETACHES:
            return func(*args, **(kwargs or {}))
        self.recorder.detaching = True
        try:
            return args[0].detach()
        finally:
            self.recorder.detaching = False

    def _is_mask_of_rows(self, mask: Any) -> bool:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or self.recorder.paused or is_wrapped(mask):
            return False
        origins, masks = self.recorder.origins, self.recorder.met([mask])
        if found := origins.hang_on_rows(masks):
            origins.fix(masks)  # for those that look at more than a row
        return found


@contextmanager
def _without_checks() -> Iterator[None]:
    """Checks of values are no part of a graph."""
    check = torch._assert
    torch._assert = lambda *_: None
    try:
        yield
    finally:
        torch._assert = check


def _looked_up(values: Tensor, key: Any) -> Tensor:
    """values[key], where a number in a tensor stays one: torch would take it for a number of Python."""
    keys = key if isinstance(key, tuple) else (key,)
    place = next((n for n, k in enumerate(keys) if not isinstance(k, slice)), len(keys))
    number = keys[place] if place < len(keys) else None
    if not isinstance(number, Tensor) or number.ndim or number.dtype not in (torch.int32, torch.int64):
        return values[key]
    before = keys[:place]
    found = values[(*before, number.reshape(1))].select(place, 0)
    rest = keys[place + 1 :]
    return _looked_up(found, (*((slice(None),) * place), *rest)) if rest else found


def _numbers(mask: Tensor) -> tuple[Tensor, ...]:
    return mask.nonzero(as_tuple=True)


def _in_python(func: Any) -> Callable[..., Any] | None:
    """An operation as a function of others, where it is written in Python, or some of its operands are indices."""
    if func in BY_INDICES:
        return BY_INDICES[func]
    own = OPDEFS.get(func._schema.name)
    return None if own is None else own._init_fn


def _packed(values: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """Sequences of these lengths, the longest first, by times: what there is at each, and how many."""
    values = values.transpose(0, 1) if batch_first else values  # [time, trial, ...]
    numbers = [int((lengths > t).sum()) for t in range(int(lengths.max()))]  # which fixes the lengths
    return torch.cat([values[t, :n] for t, n in enumerate(numbers)]), torch.tensor(numbers)


def _chosen(values: Tensor, mask: Tensor) -> Tensor:
    """masked_select."""
    values, mask = torch.broadcast_tensors(values, mask)
    return values[mask]


BY_INDICES: dict[Any, Callable[..., Any]] = {
    aten._pack_padded_sequence.default: _packed,
    aten.masked_select.default: _chosen,
}


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _one_hot(tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Without torch's look at the values."""
    if num_classes < 1:
        return one_hot(tensor, num_classes)
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


def is_wrapped(tensor: Tensor) -> bool:
    """Whether it is inside of a transform of torch.func."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """What an operation writes to."""
    for n, argument in enumerate(func._schema.arguments if func._schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from tensors_in(args[n] if n < len(args) else kwargs.get(argument.name))
