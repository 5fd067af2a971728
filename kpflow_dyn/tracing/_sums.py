"""Which uses of weights meet in nothing but sums: element by element in a step, by whole values in a network."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kpflow_dyn.tracing._dependence import FIXED, Dependence, Dependences
from kpflow_dyn.tracing._elements import Elements
from kpflow_dyn.tracing._graph import Node, Role
from kpflow_dyn.tracing._uses import Use, is_convolution_with


def fixed_factor(node: Node, dependence: Dependences) -> Node | None:
    """The matrix of a product, or the kernel of a convolution, that is the same for every row."""
    for factor in node.args[:2] if node.role in (Role.PRODUCT, Role.CONVOLUTION) else ():
        if dependence[factor] in FIXED and (node.role is Role.PRODUCT or is_convolution_with(node, factor)):
            return factor
    return None


def is_linear(node: Node, dependence: Dependences) -> bool:
    """Whether it is linear in what moves, by a matrix that is the same for every row, learnable or fixed."""
    if dependence[node] is not Dependence.MOVING:
        return False
    if node.role is Role.REDUCE:
        return dependence[node.operands[0]] is Dependence.MOVING
    return fixed_factor(node, dependence) is not None


@dataclass(frozen=True)
class Sums:
    """Sums of what linear operations give."""

    # for each element the last element up to which it meets nothing but other such terms, or itself
    leads_to: np.ndarray
    hubs: frozenset[Node]  # the nodes of these sums


def follow_sums(order: Sequence[Node], output: Node, dependence: Dependences, elements: Elements) -> Sums:
    """The sums of a step, element by element: the gates of a cell are parts of one product."""
    readers = _readers(order, output, elements)
    alone, leads_to, hubs = np.zeros(elements.count, bool), np.arange(elements.count), set()
    for node in order:
        if is_linear(node, dependence):
            alone[elements.of(node)] = True
        elif node.role is Role.ADD and dependence[node] is Dependence.MOVING:
            moving = [o for o in node.operands if dependence[o] is Dependence.MOVING]
            terms = [np.broadcast_to(elements.numbers[o][0], node.shape).ravel() for o in moving]
            if terms and all((alone[term] & (readers[term] == 1)).all() for term in terms):
                hubs.add(node)
                alone[elements.of(node)] = True
                for term in terms:
                    leads_to[term] = elements.of(node)
    while (leads_to != leads_to[leads_to]).any():
        leads_to = leads_to[leads_to]
    return Sums(leads_to, frozenset(hubs))


def _readers(order: Sequence[Node], output: Node, elements: Elements) -> np.ndarray:
    """How many sums read each element; anything else counts twice."""
    readers = np.zeros(elements.count, int)
    for node in order:
        if node in elements.copied:
            continue
        for operand in node.operands:
            for numbers in elements.numbers.get(operand, ()):
                if node.role is Role.ADD:
                    np.add.at(readers, np.broadcast_to(numbers, node.shape).ravel(), 1)
                else:
                    np.add.at(readers, numbers.ravel(), 2)
    np.add.at(readers, elements.of(output), 2)
    return readers


def sums_of_uses(uses: Sequence[Use], order: Sequence[Node], dependence: Dependences) -> dict[Node, list[Use]]:
    """The sums of a network as whole values: where each use of a weight ends up, and with which others.

    A use that is read twice, or meets anything but other uses and biases, is a sum of its own.
    """
    readers = Counter(operand for node in order for operand in node.operands)
    leads_to = {use.node: use.node for use in uses}  # a node that is such a sum so far, or a copy of one -> the sum
    members = {node: [use for use in uses if use.node is node] for node in leads_to}
    for node in order:
        data = [o for o in node.operands if o.floating and dependence[o] is not Dependence.WEIGHT]
        if not data or any(o not in leads_to or readers[o] > 1 for o in data):
            continue
        if node.role is Role.MOVE and len(node.operands) == 1 and _size(node) == _size(data[0]):
            leads_to[node] = leads_to[data[0]]
        elif node.role is Role.ADD and all(_size(o) == _size(node) for o in data):
            members[node] = [*(use for o in data for use in members.pop(leads_to[o])), *members.get(node, [])]
            leads_to[node] = node
    return members


def _size(node: Node) -> int:
    return sum(map(math.prod, node.shapes))
