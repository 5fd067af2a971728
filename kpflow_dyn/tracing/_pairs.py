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


def real_graph(graph: Graph, forms: Mapping[Node, Form]) -> Graph:
    """The graph with pairs in the place of complex values.

    Parameters, inputs and outputs that are complex have their pairs on a last axis then.
    """
    if not any(any(form.complexes) for form in forms.values()):
        return graph
    found = _Pairs(graph, forms)
    for node in graph.nodes:
        found.known[node] = found.converted(node)
    parameters = {found.sources[node]: name for node, name in graph.parameters.items()}
    further = [found.whole(node) for node in graph.further]
    named = [(name, found.whole(node)) for name, node in graph.named]
    return Graph(found.nodes, found.whole(graph.output), parameters, found.values, further, named)


class _Pairs:
    """The nodes so far, and what stands for each node of the graph."""

    def __init__(self, graph: Graph, forms: Mapping[Node, Form]) -> None:
        self.graph, self.forms = graph, forms
        self.nodes: list[Node] = []
        self.data: set[Node] = set()
        self.values: dict[Node, Value] = {}
        self.known: dict[Node, Node | Pair | Several] = {}
        self.sources: dict[Node, Node] = {}  # a parameter -> the node that stands for it
        self.negated: dict[Node, Node] = {}
        self.packed: dict[Node, Node] = {}

    # Nodes

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
        like = next(iter(self.graph.values.values()))
        return self.constant("zeros", like_numpy(np.zeros(shape), like.real if is_complex(like) else like))

    def negative(self, node: Node) -> Node:
        if node not in self.negated:
            self.negated[node] = self.add(Role.POINTWISE, "negative", node.shape, operator.neg, node)
        return self.negated[node]

    def unpacked(self, node: Node) -> Pair:
        """The parts of pairs on the last axis."""
        return Pair(*(self.add(Role.MOVE, "part", node.shape[:-1], partial(_part, i), node) for i in range(2)))

    def whole(self, node: Node) -> Node:
        """What stands for a node, as one node."""
        found = self.known[node]
        assert not isinstance(found, Several), f"{node.name} has several results"
        if isinstance(found, Node):
            return found
        if found.real not in self.packed:
            parts = found.real, self.imaginary(found)
            self.packed[found.real] = self.add(Role.MOVE, "pairs", (*found.real.shape, 2), _stacked, *parts)
        return self.packed[found.real]

    def imaginary(self, pair: Pair) -> Node:
        return self.zeros(pair.real.shape) if pair.imaginary is None else pair.imaginary

    # What stands for a node

    def complexes(self, node: Node) -> Sequence[bool]:
        return self.forms[node].complexes

    def converted(self, node: Node) -> Node | Pair | Several:
        pairs, kind = self.complexes(node), self.forms[node].kind
        operands = [self.known[o] for o in node.operands]
        if node.apply is None:
            return self.given(node) if any(pairs) else self.kept(node)
        if any(isinstance(o, Several) for o in operands):
            return self.taken(node)
        if not any(pairs) and all(isinstance(o, Node) for o in operands):
            return self.kept(node)
        if kind is not None and (found := self.of_kind(kind, node)) is not None:
            return found
        every = all(isinstance(self.known[a], Pair) for a in node.args[:2] if isinstance(a, Node))
        if node.role in (Role.MOVE, Role.STOP) or (node.role is Role.ADD and every and len(node.operands) == 2):
            return self.apart(node)
        if node.role in (Role.PRODUCT, Role.CONVOLUTION):
            return self.bilinear(node)
        return self.elementwise(node) if node.role in (Role.POINTWISE, Role.ADD) else self.in_pairs(node)

    def kept(self, node: Node) -> Node:
        """A node without complex numbers."""
        if node in self.graph.values:
            self.values[node] = self.graph.values[node]
            self.sources[node] = node
        if any(self.known[o] is not o for o in node.operands):
            args, kwargs = substitute((node.args, dict(node.kwargs)), self.known)
            return self.put(replace(node, args=args, kwargs=kwargs))
        return self.put(node)

    def given(self, node: Node) -> Pair:
        """A constant, or a parameter or input in pairs."""
        if node.role is Role.FIXED and node not in self.graph.parameters:
            value = self.graph.values[node]
            real, imaginary = self.constant(node.name, value.real), value.imag
            return Pair(real, self.constant(node.name, imaginary) if bool((imaginary != 0).any()) else None)
        found = self.put(Node(node.name, node.role, ((*node.shape, 2),), True))
        self.sources[node] = found
        if node in self.graph.values:
            self.values[found] = in_pairs(self.graph.values[node])
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

    def of_kind(self, kind: Kind, node: Node) -> Node | Pair | None:
        """None where it is left to the role."""
        operands = [self.known.get(a, a) if isinstance(a, Node) else a for a in node.args]
        first = operands[0]
        if kind is Kind.WIDEN and isinstance(first, Node):
            return Pair(first, None)
        if kind is Kind.JOIN and all(isinstance(o, Node) and o.shape == node.shape for o in operands):
            return Pair(*operands)
        if kind is Kind.UNPACK and isinstance(first, Node):
            return self.unpacked(first)
        if not isinstance(first, Pair):
            return None
        if kind is Kind.PACK:
            return self.whole(node.args[0])
        if kind is Kind.REAL:
            return first.real
        if kind is Kind.IMAGINARY:
            return self.imaginary(first)
        if kind is Kind.CONJUGATE:
            return Pair(first.real, first.imaginary and self.negative(first.imaginary))
        return self.apart(node) if all(isinstance(self.known[o], Pair) for o in node.operands) else None

    def apart(self, node: Node) -> Pair:
        """The same of the real and of the imaginary parts."""
        real = self.put(self.of_parts(node, {o: self.first(o) for o in node.operands}, "real"))
        known = {o: pair.imaginary for o in node.operands if isinstance(pair := self.known[o], Pair)}
        there = [part for part in known.values() if part is not None]
        if not there:
            return Pair(real, None)
        if node.role is Role.ADD and len(there) == 1 < len(node.operands) and there[0].shape == node.shape:
            return Pair(real, there[0])
        seconds = {o: self.second(o) for o in node.operands}
        return Pair(real, self.put(self.of_parts(node, seconds, "imag")))

    def of_parts(self, node: Node, parts: Mapping[Node, Node], which: str) -> Node:
        args, kwargs = substitute((node.args, dict(node.kwargs)), parts)
        args, kwargs = _numbers_apart(args, which), _numbers_apart(kwargs, which)
        return Node(f"{node.name}_{which}", node.role, node.shapes, True, node.apply, args, kwargs)

    def first(self, node: Node) -> Node:
        found = self.known[node]
        assert not isinstance(found, Several)
        return found.real if isinstance(found, Pair) else found

    def second(self, node: Node) -> Node:
        """The imaginary part of an operand; an index is itself."""
        found = self.known[node]
        assert not isinstance(found, Several)
        if isinstance(found, Pair):
            return self.imaginary(found)
        return self.zeros(found.shape) if found.floating else found

    def bilinear(self, node: Node) -> Pair:
        """(a + i b) (c + i d) = a c + (-b) d + i (a d + b c), where data take the sign."""
        (a, b), (c, d) = (self.parts(operand) for operand in node.args[:2])

        def product(left: Node | None, right: Node | None) -> list[Node]:
            if left is None or right is None:
                return []
            return [self.add(node.role, node.name, node.shape, node.apply, left, right, *node.args[2:])]

        both = [] if b is None or d is None else self.turned(b, d)
        real = product(a, c) + (product(*both) if both else [])
        imaginary = product(a, d) + product(b, c)
        return Pair(self.summed(real), self.summed(imaginary) if imaginary else None)

    def turned(self, left: Node, right: Node) -> list[Node]:
        """Two factors, of which the one that depends on data has the other sign."""
        return [left, self.negative(right)] if left not in self.data else [self.negative(left), right]

    def parts(self, node: Node) -> tuple[Node, Node | None]:
        found = self.known[node]
        assert not isinstance(found, Several)
        return (found.real, found.imaginary) if isinstance(found, Pair) else (found, None)

    def summed(self, nodes: Sequence[Node]) -> Node:
        first, *rest = nodes
        for other in rest:
            first = self.add(Role.ADD, "sum", first.shape, operator.add, first, other)
        return first

    def elementwise(self, node: Node) -> Node | Pair:
        """One operation for each part of the result."""
        flat, of_values = self.flat(node, packed=False)
        if not any(self.complexes(node)):
            return self.add(Role.POINTWISE, node.name, node.shape, of_values, *flat)
        parts = (lambda *values: of_values(*values).real), (lambda *values: of_values(*values).imag)
        return Pair(*(self.add(Role.POINTWISE, node.name, node.shape, part, *flat) for part in parts))

    def in_pairs(self, node: Node) -> Node | Pair | Several:
        """One operation on pairs on a last axis."""
        pairs = self.complexes(node)
        flat, of_values = self.flat(node, packed=True)
        shapes = tuple((*shape, 2) if pair else shape for shape, pair in zip(node.shapes, pairs, strict=True))
        floating = node.floating or any(pairs)
        apply = lambda *values: _in_pairs(of_values(*values))  # noqa: E731
        found = self.put(Node(f"{node.name}_pairs", node.role, shapes, floating, apply, tuple(flat)))
        if len(shapes) > 1:
            return Several(found, pairs)
        return self.unpacked(found) if pairs[0] else found

    def flat(self, node: Node, packed: bool) -> tuple[list[Node], Callable[..., Value]]:
        """The operands in parts, or packed, and the node's value as a function of theirs."""
        flat, counts = [], {}
        for o in dict.fromkeys(node.operands):
            found = self.known[o]
            assert not isinstance(found, Several)
            own = [found] if isinstance(found, Node) else [self.whole(o)] if packed else [found.real, found.imaginary]
            own = [part for part in own if part is not None]
            flat += own
            counts[o] = (0 if isinstance(found, Node) else 1 if packed else -1, len(own))
        return flat, partial(_restored, node, counts)


def _restored(node: Node, counts: Mapping[Node, tuple[int, int]], *values: Value) -> Value:
    """The value of a node from the parts of its operands: real (0), packed (1) or apart (-1)."""
    rest, env = iter(values), {}
    for operand, (form, count) in counts.items():
        own = [next(rest) for _ in range(count)]
        if form == 0:
            env[operand] = own[0]
        elif form == 1:
            env[operand] = of_pairs(own[0])
        else:
            second = own[1] if count == 2 else array_namespace(own[0]).zeros_like(own[0])
            env[operand] = complex_of(own[0], second)
    return evaluate(node, env)


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
