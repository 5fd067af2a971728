"""How long the values of a graph are needed, as its nodes are computed one after the other."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from kpflow_dyn.tracing._graph import Node


def last_needed(order: Sequence[Node]) -> dict[Node, list[Node]]:
    """For each node the operands that no later one takes."""
    by = {operand: node for node in order for operand in node.operands}  # the last of several stays
    needed: dict[Node, list[Node]] = defaultdict(list)
    for operand, node in by.items():
        needed[node].append(operand)
    return dict(needed)


def most_entries(order: Sequence[Node], needed: Mapping[Node, Sequence[Node]]) -> int:
    """The most numbers that are held at once where each value is let go after it was last needed."""
    held = most = 0
    own = set(order)
    for node in order:
        held += _entries(node)
        most = max(most, held)
        held -= sum(_entries(operand) for operand in needed.get(node, ()) if operand in own)
    return most


def _entries(node: Node) -> int:
    return sum(math.prod(shape) for shape in node.shapes)
