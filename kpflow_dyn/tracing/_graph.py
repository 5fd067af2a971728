"""The traced step: a functional graph of one row (one trial at one time), the same for every framework."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Value = Any


class Role(Enum):
    """What a node does with the elements of its operands; all that the analysis needs to know of an operation.

    Example as `add_rule`.
    """

    FIXED = "a parameter, a buffer or a constant: the same for every row"
    INPUT = "the input x_t"
    STATE = "the state z_{t-1}"
    MOVE = "copies elements: view, permute, cat, split"
    STOP = "copies elements and cuts the derivative: detach"
    ADD = "the plain sum of two operands"
    POINTWISE = "acts element by element, with broadcasting"
    CONVOLUTION = "correlates a batch of one with a kernel, its second argument [out, in, ...]"
    PRODUCT = "a batched matrix product [b, r, d] x [b, d, m]"
    REDUCE = "a fixed linear map of its one operand: sum, mean"
    OTHER = "every output element may depend on every operand element"


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: `apply(*args, **kwargs)`, where nodes among the arguments stand for their values.

    `shapes` has one entry for each output array, `floating` says whether the output carries derivatives.
    """

    name: str
    role: Role
    shapes: tuple[tuple[int, ...], ...]
    floating: bool
    apply: Any = None
    args: tuple = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the only output."""
        return self.shapes[0]

    @property
    def operands(self) -> list[Node]:
        """The nodes among the arguments, in order, with repetitions."""
        return list(_nodes((self.args, tuple(self.kwargs.values()))))


@dataclass(frozen=True)
class Graph:
    """Nodes in topological order; `output` is the next state, or what a network gives.

    `parameters` maps a node to its parameter's name, `values` holds copies of all parameters and constants; `further`
    are outputs beside the first; `named` those of submodules that were asked for, by name, one for each call in their
    order. `decided` says what the values of the row that was traced decide, as a branch does: the graph is that of rows
    that decide alike.
    """

    nodes: list[Node]
    output: Node
    parameters: dict[Node, str]
    values: dict[Node, Value]
    further: list[Node] = field(default_factory=list)
    named: list[tuple[str, Node]] = field(default_factory=list)
    decided: str = ""


def run(nodes: Iterable[Node], env: dict[Node, Value]) -> dict[Node, Value]:
    """Evaluate the nodes that `env` does not hold yet, and add them to it."""
    for node in nodes:
        if node not in env and node.apply is not None:
            env[node] = evaluate(node, env)
    return env


def evaluate(node: Node, env: Mapping[Node, Value]) -> Value:
    """The node's value, from those of its operands."""
    args, kwargs = substitute((node.args, dict(node.kwargs)), env)
    return node.apply(*args, **kwargs)


def substitute(tree: Any, env: Mapping[Node, Value]) -> Any:
    """The same nested arguments with values in the place of nodes."""
    if isinstance(tree, Node):
        return env[tree]
    if isinstance(tree, tuple | list):
        return type(tree)(substitute(leaf, env) for leaf in tree)
    if isinstance(tree, dict):
        return {key: substitute(leaf, env) for key, leaf in tree.items()}
    return tree


def ancestors(targets: Iterable[Node], stop: Iterable[Node] = ()) -> set[Node]:
    """The targets and everything that they are computed from, not looking behind the nodes in `stop`."""
    seen, todo, walls = set(), list(targets), set(stop)
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend([] if node in walls else node.operands)
    return seen


def descendants(graph: Graph, sources: Iterable[Node]) -> set[Node]:
    """The sources and everything that is computed from them."""
    found = set(sources)
    for node in graph.nodes:
        if any(operand in found for operand in node.operands):
            found.add(node)
    return found


def _nodes(tree: Any) -> Iterable[Node]:
    if isinstance(tree, Node):
        yield tree
    elif isinstance(tree, tuple | list):
        for leaf in tree:
            yield from _nodes(leaf)
