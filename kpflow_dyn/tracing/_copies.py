"""Which elements a view, a split or a concatenation copies: moving operations run on the numbers of elements."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._backend import Transforms
from kpflow_dyn.tracing._dependence import Dependence, Dependences, is_copy
from kpflow_dyn.tracing._graph import Graph, Node, ancestors, evaluate, run
from kpflow_dyn.tracing._uses import Use

Copies = Mapping[Node, tuple[np.ndarray, ...]]
COMPILED_ELEMENTS = 2**22  # the numbers of larger arrays would be constants of a program, slow to compile


def find_copies(graph: Graph, nodes: Iterable[Node], dependence: Dependences, transforms: Transforms) -> Copies:
    """For each result of these nodes that copy: which elements of their floating operands it copies.

    The elements are numbered from 1, one operand after another; 0 stands for a filled-up one.
    """
    nodes = list(nodes)
    behind = _behind_indices(nodes, dependence)
    values = run((node for node in graph.nodes if node in behind), dict(graph.values))
    like = next(iter(graph.values.values()), None)

    def moved() -> list[Any]:
        return [evaluate(node, _numbered(node, values, transforms, like)) for node in nodes]

    small = sum(math.prod(shape) for node in nodes for shape in node.shapes) <= COMPILED_ELEMENTS
    found = (transforms.once(moved) if small else moved)()
    parts = (value if isinstance(value, tuple | list) else [value] for value in found)
    return {node: tuple(map(to_numpy, value)) for node, value in zip(nodes, parts, strict=True)}


def deciding(graph: Graph, dependence: Dependences) -> list[Node]:
    """The nodes whose values say which elements are copied, as indices do: another value is another analysis."""
    behind = _behind_indices((node for node in graph.nodes if is_copy(node, dependence)), dependence)
    return [node for node in graph.values if node in behind]


def _behind_indices(nodes: Iterable[Node], dependence: Dependences) -> set[Node]:
    return ancestors(
        {o for node in nodes for o in node.operands if not o.floating and dependence[o] is Dependence.CONSTANT}
    )


def _numbered(node: Node, values: Mapping[Node, Any], transforms: Transforms, like: Any) -> dict[Node, Any]:
    """The operands of a node: numbers in the place of elements, and indices as they are."""
    env, start = {o: values[o] for o in node.operands if not o.floating}, 1
    for operand in _floating(node):
        parts = []
        for shape in operand.shapes:
            numbers = np.arange(start, start := start + math.prod(shape), dtype=np.int32)
            parts.append(transforms.index(numbers.reshape(shape), like))
        env[operand] = parts if len(parts) > 1 else parts[0]
    return env


def _floating(node: Node) -> list[Node]:
    return list(dict.fromkeys(o for o in node.operands if o.floating))


def through_copy(node: Node, copies: Copies, known: Mapping[Node, Iterable[np.ndarray]], none: int) -> list[np.ndarray]:
    """Any numbers of the operands' elements, carried to the results of a node that copies; `none` where it fills up.

    Operands that are not known count as filled up.
    """
    parts = [np.full(1, none)]
    for operand in _floating(node):
        blank = [np.full(math.prod(shape), none) for shape in operand.shapes]
        parts += [numbers.ravel() for numbers in known.get(operand, blank)]
    every = np.concatenate(parts)
    return [every[part] for part in copies[node]]


def elements_of_scale(use: Use, copies: Copies) -> np.ndarray:
    """Which element of the weight each element of the result takes; -1 for those that take none."""
    own = np.arange(math.prod(use.weight.shape)).reshape(use.weight.shape)
    if use.node in copies:
        return through_copy(use.node, copies, {use.weight: [own]}, none=-1)[0].ravel()
    return np.broadcast_to(own, use.node.shape).ravel()
