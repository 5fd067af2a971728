"""Where a traced model uses its weights, operation by operation: for models too large to follow element by element."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, to_numpy
from kpflow_dyn.tracing._framework import Framework
from kpflow_dyn.tracing._graph import Node, Role, evaluate
from kpflow_dyn.tracing._structure import NOTHING, Kind


@dataclass(frozen=True, eq=False)
class Use:
    """An operation on data with a weight among its operands: a "matrix" product, a "scale" or an "opaque" one."""

    node: Node
    weight: Node
    kind: str

    @property
    def operand(self) -> Node:
        """What a matrix multiplies."""
        return next(o for o in self.node.args[:2] if o is not self.weight)

    @property
    def transposed(self) -> bool:
        """Whether the matrix stands on the left of a product."""
        return self.node.role is Role.PRODUCT and self.node.args[0] is self.weight


def find_uses(order: list[Node], kinds: dict[Node, Kind]) -> list[Use]:
    """All uses of weights among the nodes that depend on data."""
    return [
        Use(node, weight, _kind(node, weight))
        for node in order
        for weight in dict.fromkeys(node.operands)
        if kinds[weight] is Kind.WEIGHT
    ]


def _kind(node: Node, weight: Node) -> str:
    if len(node.shapes) > 1:
        raise ValueError(
            f"the operation {node.name} takes a parameter and has several results; write it with simpler operations"
        )
    convolved = node.role is Role.CONVOLUTION and node.args[1] is weight and node.args[0] is not weight
    if convolved or (node.role is Role.PRODUCT and node.args[0] is not node.args[1]):
        return "matrix"
    return "scale" if node.role in (Role.ADD, Role.POINTWISE) else "opaque"


def outputs_of(uses: list[Use], order: list[Node], kinds: dict[Node, Kind]) -> dict[Node, list[Use]]:
    """The outputs of all uses: those that meet nothing but each other, and biases, are followed to their sum.

    Each comes with the uses that it is the output of.
    """
    readers = Counter(operand for node in order for operand in node.operands)
    leads = {use.node: use.node for use in uses}  # a node that is such a sum so far, or a copy of one -> the sum
    members = {node: [use for use in uses if use.node is node] for node in leads}
    for node in order:
        data = [o for o in node.operands if o.floating and kinds[o] is not Kind.WEIGHT]
        if not data or any(o not in leads or readers[o] > 1 for o in data):
            continue
        if node.role is Role.MOVE and len(node.operands) == 1 and _size(node) == _size(data[0]):
            leads[node] = leads[data[0]]
        elif node.role is Role.ADD and all(_size(o) == _size(node) for o in data):
            members[node] = [*(use for o in data for use in members.pop(leads[o])), *members.get(node, [])]
            leads[node] = node
    return members


def _size(node: Node) -> int:
    return sum(int(np.prod(shape)) for shape in node.shapes)


class Numbers:
    """The number of every weight's element: parameters first, one after another, then the weights computed of them."""

    def __init__(self, parameters: list[Node], framework: Framework, like: Array) -> None:
        self.framework, self.like, self.next = framework, like, 1
        self.known: dict[Node, list[np.ndarray]] = {}  # one for each result, from 1 on: moves fill up with 0
        for parameter in parameters:
            self._results(parameter)

    def of(self, weight: Node) -> np.ndarray:
        """The numbers of a weight, in its shape."""
        return self._results(weight)[0] - 1

    def _results(self, node: Node) -> list[np.ndarray]:
        if node not in self.known:
            moved = node.role is Role.MOVE and len(node.operands) == 1
            self.known[node] = self._moved(node) if moved else [self._fresh(shape) for shape in node.shapes]
        return self.known[node]

    def _fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        start = self.next
        self.next += int(np.prod(shape))
        return np.arange(start, self.next).reshape(shape)

    def _moved(self, node: Node) -> list[np.ndarray]:
        (operand,) = node.operands
        numbers = [self.framework.index(part, self.like) for part in self._results(operand)]
        found = evaluate(node, {operand: numbers if len(operand.shapes) > 1 else numbers[0]})
        parts = [to_numpy(part).astype(np.int64) for part in (found if isinstance(found, tuple | list) else [found])]
        return [np.where(part == NOTHING, self._fresh(part.shape), part) for part in parts]
