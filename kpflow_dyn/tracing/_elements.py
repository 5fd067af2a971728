"""The elements of a step's values, followed through views, splits and concatenations to what computed them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kpflow_dyn.tracing._copies import Copies, through_copy
from kpflow_dyn.tracing._dependence import ON_DATA, Dependence, Dependences
from kpflow_dyn.tracing._graph import Graph, Node

NOTHING = 0  # the number of an element without a derivative
WEIGHT = -1  # while numbering: an element of a weight among data


@dataclass(frozen=True)
class Elements:
    """The elements of all values that depend on data."""

    # for each result of a node, the number of the element that each of its elements is a copy of. A weight among data,
    # as in cat([h, w]), is an element of its own there.
    numbers: Mapping[Node, tuple[np.ndarray, ...]]
    copied: frozenset[Node]  # the nodes that only copy
    count: int  # one more than the largest number

    def of(self, node: Node) -> np.ndarray:
        """The numbers of a node's first result, one after another."""
        return self.numbers[node][0].ravel()


def number_elements(graph: Graph, dependence: Dependences, copies: Copies) -> Elements:
    """Number the elements of all values that depend on data."""
    count = 1
    known: dict[Node, tuple[np.ndarray, ...]] = {}
    weights: dict[Node, tuple[np.ndarray, ...]] = {}
    for node in graph.nodes:
        if dependence[node] is Dependence.WEIGHT:
            weights[node] = tuple(np.full(shape, WEIGHT) for shape in node.shapes)
        if dependence[node] not in ON_DATA:
            continue
        if not node.floating:
            known[node] = tuple(np.full(shape, NOTHING) for shape in node.shapes)
            continue
        parts, own = None, _fresh(node.shapes, count)
        if node in copies:
            parts = through_copy(node, copies, known | {o: weights[o] for o in node.operands if o in weights}, NOTHING)
        if parts is None or any((part == WEIGHT).any() for part in parts):
            count += sum(math.prod(shape) for shape in node.shapes)
        known[node] = tuple(own if parts is None else map(_with_own, parts, own))
    return Elements(known, frozenset(node for node in known if node in copies), count)


def _fresh(shapes: Sequence[tuple[int, ...]], start: int) -> list[np.ndarray]:
    starts = np.cumsum([start, *map(math.prod, shapes)]).tolist()
    return [np.arange(*ends).reshape(shape) for *ends, shape in zip(starts[:-1], starts[1:], shapes, strict=True)]


def _with_own(part: np.ndarray, own: np.ndarray) -> np.ndarray:
    return np.where(part == WEIGHT, own, part)
