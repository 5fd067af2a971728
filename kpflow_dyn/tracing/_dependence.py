"""What each value of a graph depends on."""

from collections.abc import Container
from enum import Enum

from kpflow_dyn.tracing._graph import Graph, Node, Role


class Dependence(Enum):
    """What a value depends on."""

    CONSTANT = 0
    WEIGHT = 1
    DATA = 2
    MOVING = 3


FIXED = (Dependence.CONSTANT, Dependence.WEIGHT)  # the same for every row
ON_DATA = (Dependence.DATA, Dependence.MOVING)
Dependences = dict[Node, Dependence]


def dependences(graph: Graph, learnable: Container[Node]) -> Dependences:
    """What each value depends on, where these parameters learn."""
    found: Dependences = {}
    for node in graph.nodes:
        below = {found[o] for o in node.operands}
        if node.role is Role.FIXED:
            found[node] = Dependence.WEIGHT if node in learnable else Dependence.CONSTANT
        elif node.role in (Role.INPUT, Role.STATE):
            found[node] = Dependence.DATA if node.role is Role.INPUT else Dependence.MOVING
        elif node.role is Role.STOP or not node.floating:
            found[node] = Dependence.DATA if below & set(ON_DATA) else Dependence.CONSTANT
        elif Dependence.MOVING in below or {Dependence.DATA, Dependence.WEIGHT} <= below:
            found[node] = Dependence.MOVING
        else:
            found[node] = max(below, key=lambda dependence: dependence.value, default=Dependence.CONSTANT)
    return found


def is_copy(node: Node, dependence: Dependences) -> bool:
    """Whether the node only copies elements, to places that do not depend on data."""
    fixed = all(o.floating or dependence[o] is Dependence.CONSTANT for o in node.operands)
    return node.role is Role.MOVE and node.floating and fixed
