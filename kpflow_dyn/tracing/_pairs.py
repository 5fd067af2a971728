"""Complex values of a graph as pairs of real ones, so that nothing that comes after this knows of complex numbers.

A product of complex weights and data becomes four real ones, each with the real or imaginary part of the weight, which
is a weight of its own; copies and sums are those of the parts. An elementwise operation becomes one for each part of
its result, and any other operation one from pairs on a last axis to such pairs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy
from kpflow_dyn._arrays.complex_numbers import complex_of, in_pairs, is_complex, of_pairs
from kpflow_dyn.tracing._graph import Graph, Node, Role, Value, evaluate, substitute


class Kind(Enum):
    """What an operation does with complex numbers, where its role does not say it."""

    WIDEN = "real numbers as complex ones"
    JOIN = "complex numbers of real and imaginary parts"
    UNPACK = "complex numbers of pairs on the last axis"
    PACK = "pairs on the last axis"
    REAL = "real parts"
    IMAGINARY = "imaginary parts"
    CONJUGATE = "the complex conjugate"
    APART = "acts on the real and on the imaginary parts alike, linearly"


@dataclass(frozen=True)
class Form:
    """What of a node is complex, and its kind, where it has one."""

    complexes: Sequence[bool]  # of each of its results
    kind: Kind | None = None


@dataclass(frozen=True)
class Pair:
    """The real and imaginary parts of a node, the latter None where they are zero."""

    real: Node
    imaginary: Node | None


@dataclass(frozen=True)
class Several:
    """A node of several results, which of them are pairs on a last axis."""

    node: Node
    pairs: Sequence[bool]


Stand = Node | Pair | Several  # what stands for a node


def real_graph(graph: Graph, forms: Mapping[Node, Form]) -> Graph:
    """The graph with pairs in the place of complex values.

    Parameters, inputs and outputs that are complex have their pairs on a last axis then.
    """
    if not any(any(form.complexes) for form in forms.values()):
        return graph
    found = _Rewriting(graph, forms)
    for node in graph.nodes:
        found.known[node] = found.converted(node)
    parameters = {found.sources[node]: name for node, name in graph.parameters.items()}
    further = [found.whole(node) for node in graph.further]
    named = [(name, found.whole(node)) for name, node in graph.named]
    return Graph(found.nodes, found.whole(graph.output), parameters, found.values, further, named, graph.decided)


class _Nodes:
    """The nodes so far."""

    def __init__(self, like: Array) -> None:
        self.like = like  # a real array of the graph's dtype
        self.nodes: list[Node] = []
        self.values: dict[Node, Value] = {}
        self.data: set[Node] = set()  # those that depend on data
        self.negatives: dict[Node, Node] = {}

    def put(self, node: Node) -> Node:
        self.nodes.append(node)
        if node.role in (Role.INPUT, Role.STATE) or any(o in self.data for o in node.operands):
            self.data.add(node)
        return node

    def add(self, role: Role, name: str, shape: Sequence[int], apply: Any, *args: Any) -> Node:
        return self.put(Node(f"{name}_{len(self.nodes)}", role, (tuple(shape),), True, apply, args))

    def constant(self, name: str, value: Array) -> Node:
        node = self.put(Node(f"{name}_{len(self.nodes)}", Role.FIXED, (tuple(value.shape),), True))
        self.values[node] = value
        return node

    def zeros(self, shape: Sequence[int]) -> Node:
        return self.constant("zeros", like_numpy(np.zeros(shape), self.like))

    def negative(self, node: Node) -> Node:
        if node not in self.negatives:
            self.negatives[node] = self.add(Role.POINTWISE, "negative", node.shape, operator.neg, node)
        return self.negatives[node]

    def summed(self, nodes: Sequence[Node]) -> Node:
        first, *rest = nodes
        for other in rest:
            first = self.add(Role.ADD, "sum", first.shape, operator.add, first, other)
        return first

    def unpacked(self, node: Node) -> Pair:
        """The parts of pairs on the last axis."""
        return Pair(*(self.add(Role.MOVE, "part", node.shape[:-1], partial(_part, i), node) for i in range(2)))

    def imaginary(self, pair: Pair) -> Node:
        return self.zeros(pair.real.shape) if pair.imaginary is None else pair.imaginary


class _Rewriting(_Nodes):
    """The nodes so far, and what stands for each node of the graph."""

    def __init__(self, graph: Graph, forms: Mapping[Node, Form]) -> None:
        first = next(iter(graph.values.values()))
        super().__init__(first.real if is_complex(first) else first)
        self.graph, self.forms = graph, forms
        self.known: dict[Node, Stand] = {}
        self.sources: dict[Node, Node] = {}  # a parameter -> the node that stands for it
        self.wholes: dict[Node, Node] = {}

    def whole(self, node: Node) -> Node:
        """What stands for a node as one node, in pairs on a last axis where it is complex."""
        found = self.single(node)
        if isinstance(found, Node):
            return found
        if node not in self.wholes:
            parts = found.real, self.imaginary(found)
            self.wholes[node] = self.add(Role.MOVE, "pairs", (*found.real.shape, 2), _stacked, *parts)
        return self.wholes[node]

    def single(self, node: Node) -> Node | Pair:
        found = self.known[node]
        assert not isinstance(found, Several), f"{node.name} has several results"
        return found

    def parts(self, node: Node) -> tuple[Node, Node | None]:
        """The real part, and the imaginary one where there is one."""
        found = self.single(node)
        return (found.real, found.imaginary) if isinstance(found, Pair) else (found, None)

    def second(self, node: Node) -> Node:
        """The imaginary part of an operand; an index stays itself."""
        real, imaginary = self.parts(node)
        if imaginary is not None:
            return imaginary
        return self.zeros(real.shape) if real.floating else real

    # What stands for a node

    def converted(self, node: Node) -> Stand:
        form, operands = self.forms[node], [self.known[o] for o in node.operands]
        if node.apply is None:
            return self.given(node) if any(form.complexes) else self.kept(node)
        if any(isinstance(o, Several) for o in operands):
            return self.taken(node)
        if not any(form.complexes) and all(isinstance(o, Node) for o in operands):
            return self.kept(node)
        found = _of_kind(self, form.kind, node)
        return self.of_role(node) if found is None else found

    def kept(self, node: Node) -> Node:
        """A node without complex numbers."""
        if node in self.graph.values:
            self.values[node] = self.graph.values[node]
            self.sources[node] = node
        if any(self.known[o] is not o for o in node.operands):
            args, kwargs = substitute((node.args, dict(node.kwargs)), self.known)
            node = replace(node, args=args, kwargs=kwargs)
        return self.put(node)

    def given(self, node: Node) -> Pair:
        """A constant, or a parameter or input in pairs."""
        value = self.graph.values.get(node)
        if value is not None and node not in self.graph.parameters:
            real, zero = self.constant(node.name, value.real), not bool((value.imag != 0).any())
            return Pair(real, None if zero else self.constant(node.name, value.imag))
        found = self.put(Node(node.name, node.role, ((*node.shape, 2),), True))
        self.sources[node] = found
        if value is not None:
            self.values[found] = in_pairs(value)
        return self.unpacked(found)

    def taken(self, node: Node) -> Node | Pair:
        """One of several results."""
        source, number = node.args
        several = self.known[source]
        assert isinstance(several, Several)
        pair = several.pairs[number]
        shape = (*node.shape, 2) if pair else node.shape
        found = self.put(Node(node.name, node.role, (shape,), True, node.apply, (several.node, number)))
        return self.unpacked(found) if pair else found

    def of_role(self, node: Node) -> Stand:
        pairs = len(node.operands) == 2 and all(isinstance(self.known[o], Pair) for o in node.operands)
        if node.role in (Role.MOVE, Role.STOP) or (node.role is Role.ADD and pairs):
            return self.apart(node)
        if node.role in (Role.PRODUCT, Role.CONVOLUTION):
            return self.bilinear(node)
        return self.elementwise(node) if node.role in (Role.POINTWISE, Role.ADD) else self.other(node)

    def apart(self, node: Node) -> Pair:
        """The same of the real and of the imaginary parts."""
        operands = dict.fromkeys(node.operands)
        real = self.put(_of_parts(node, {o: self.parts(o)[0] for o in operands}, "real"))
        there = [part for o in node.operands if (part := self.parts(o)[1]) is not None]
        if not there:
            return Pair(real, None)
        if node.role is Role.ADD and len(there) == 1 and there[0].shape == node.shape:
            return Pair(real, there[0])
        return Pair(real, self.put(_of_parts(node, {o: self.second(o) for o in operands}, "imag")))

    def bilinear(self, node: Node) -> Pair:
        """(a + i b) (c + i d) = a c + (-b) d + i (a d + b c), where data take the sign."""
        (a, b), (c, d) = (self.parts(operand) for operand in node.args[:2])

        def product(left: Node | None, right: Node | None) -> list[Node]:
            if left is None or right is None:
                return []
            return [self.add(node.role, node.name, node.shape, node.apply, left, right, *node.args[2:])]

        real, imaginary = product(a, c), product(a, d) + product(b, c)
        if b is not None and d is not None:
            real += product(self.negative(b), d) if b in self.data else product(b, self.negative(d))
        return Pair(self.summed(real), self.summed(imaginary) if imaginary else None)

    def elementwise(self, node: Node) -> Node | Pair:
        """One operation for each part of the result."""
        flat, restore = [], {}
        for o in dict.fromkeys(node.operands):
            parts = [part for part in self.parts(o) if part is not None]
            flat += parts
            restore[o] = len(parts), _complex if isinstance(self.known[o], Pair) else _same
        value = partial(_value, node, restore)
        if not any(self.forms[node].complexes):
            return self.add(Role.POINTWISE, node.name, node.shape, value, *flat)
        of_parts = (lambda *values: value(*values).real), (lambda *values: value(*values).imag)
        return Pair(*(self.add(Role.POINTWISE, node.name, node.shape, part, *flat) for part in of_parts))

    def other(self, node: Node) -> Stand:
        """One operation on pairs on a last axis."""
        pairs, operands = self.forms[node].complexes, dict.fromkeys(node.operands)
        restore = {o: (1, of_pairs if isinstance(self.known[o], Pair) else _same) for o in operands}
        value = partial(_value, node, restore)
        shapes = tuple((*shape, 2) if pair else shape for shape, pair in zip(node.shapes, pairs, strict=True))
        floating, args = node.floating or any(pairs), tuple(map(self.whole, operands))
        found = Node(f"{node.name}_pairs", node.role, shapes, floating, lambda *v: _in_pairs(value(*v)), args)
        self.put(found)
        if len(shapes) > 1:
            return Several(found, pairs)
        return self.unpacked(found) if pairs[0] else found


def _of_kind(rewriting: _Rewriting, kind: Kind | None, node: Node) -> Node | Pair | None:
    """What stands for a node by its kind; None where it is left to its role."""
    stands = [rewriting.single(o) for o in node.operands]
    first = stands[0] if stands else None
    if isinstance(first, Pair):
        return _of_pair(rewriting, kind, node, first)
    alike = len(stands) == len(node.args) and all(isinstance(o, Node) and o.shape == node.shape for o in stands)
    if kind is Kind.JOIN and alike:
        return Pair(*stands)  # type: ignore[arg-type]
    if kind is Kind.UNPACK and first is not None:
        return rewriting.unpacked(first)
    return Pair(first, None) if kind is Kind.WIDEN and first is not None else None


def _of_pair(rewriting: _Rewriting, kind: Kind | None, node: Node, pair: Pair) -> Node | Pair | None:
    """The same of a complex operand."""
    if kind is Kind.PACK:
        return rewriting.whole(node.operands[0])
    if kind is Kind.REAL:
        return pair.real
    if kind is Kind.IMAGINARY:
        return rewriting.imaginary(pair)
    if kind is Kind.CONJUGATE:
        return Pair(pair.real, pair.imaginary and rewriting.negative(pair.imaginary))
    every = all(isinstance(rewriting.single(o), Pair) for o in node.operands)
    return rewriting.apart(node) if kind is Kind.APART and every else None


def _of_parts(node: Node, parts: Mapping[Node, Node], which: str) -> Node:
    """The same operation on parts of its operands, "real" or "imag"."""
    args, kwargs = _numbers_apart(substitute((node.args, dict(node.kwargs)), parts), which)
    return Node(f"{node.name}_{which}", node.role, node.shapes, True, node.apply, args, kwargs)


def _value(node: Node, restore: Mapping[Node, tuple[int, Callable[..., Value]]], *values: Value) -> Value:
    """The value of a node, where each operand is restored from so many of these values."""
    rest = iter(values)
    return evaluate(node, {o: of_values(*islice(rest, count)) for o, (count, of_values) in restore.items()})


def _same(value: Value) -> Value:
    return value


def _complex(real: Array, imaginary: Array | None = None) -> Array:
    return complex_of(real, array_namespace(real).zeros_like(real) if imaginary is None else imaginary)


def _in_pairs(value: Any) -> Any:
    """Arrays, or the only one, in pairs."""
    return [in_pairs(part) for part in value] if isinstance(value, tuple | list) else in_pairs(value)


def _part(number: int, pairs: Array) -> Array:
    return pairs[..., number]


def _stacked(*parts: Array) -> Array:
    return array_namespace(parts[0]).stack(list(parts), axis=-1)


def _numbers_apart(tree: Any, which: str) -> Any:
    """The real or imaginary parts of complex numbers among arguments."""
    if isinstance(tree, complex | np.complexfloating):
        return getattr(tree, which)
    if isinstance(tree, tuple | list):
        return type(tree)(_numbers_apart(leaf, which) for leaf in tree)
    if isinstance(tree, dict):
        return {key: _numbers_apart(leaf, which) for key, leaf in tree.items()}
    return tree
