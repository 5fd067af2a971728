"""The number of every weight, and every use of a weight with the numbers of what it takes.

Parameters come first, one after another, then the weights that are computed from them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kpflow_dyn.tracing._copies import Copies, elements_of_scale, through_copy
from kpflow_dyn.tracing._dependence import Dependence, Dependences, is_copy
from kpflow_dyn.tracing._graph import Graph, Node, ancestors
from kpflow_dyn.tracing._uses import Use, as_matrices

NO_WEIGHT = -1


@dataclass(frozen=True)
class WeightNumbers:
    """The numbers of weights."""

    of: Mapping[Node, np.ndarray]  # those of a weight's elements, in its shape
    computed: tuple[Node, ...]  # the weights that are no copies of parameters, in the order of their numbers


def number_weights(
    graph: Graph, parameters: Sequence[Node], uses: Sequence[Use], dependence: Dependences, copies: Copies
) -> WeightNumbers:
    """The numbers of all weights that are used, and of those that they copy.

    What is filled up among copies, as by a padding, counts as computed.
    """
    sizes = [math.prod(parameter.shape) for parameter in parameters]
    starts = dict(zip(parameters, np.cumsum([0, *sizes]).tolist(), strict=False))
    total, computed = sum(sizes), []
    known: dict[Node, list[np.ndarray]] = {}
    for node in weights_behind(graph, uses, dependence):
        if node in starts:
            known[node] = [_range(starts[node], node.shape)]
            continue
        known[node] = parts = through_copy(node, copies, known, NO_WEIGHT) if node in copies else _nothing(node)
        if any((part == NO_WEIGHT).any() for part in parts):
            computed.append(node)
            ends = np.cumsum([total, *(part.size for part in parts)]).tolist()
            own = [_range(end, part.shape) for end, part in zip(ends, parts, strict=False)]
            known[node] = [np.where(part == NO_WEIGHT, n, part) for n, part in zip(own, parts, strict=True)]
            total = ends[-1]
    return WeightNumbers({node: parts[0] for node, parts in known.items()}, tuple(computed))


@dataclass(frozen=True, eq=False)
class Term:
    """One matrix of a use, or a use of another kind."""

    use: Use  # the use
    matrix: int  # which matrix of a batch
    # the numbers of its weights: [d, m] of a matrix, [element] of a scale, all of any other
    entries: np.ndarray
    elements: np.ndarray | None = None  # of a scale: the elements of its result that take a weight
    taken: np.ndarray | None = None  # which of the weight's elements they take


def terms_of(uses: Sequence[Use], weights: WeightNumbers, copies: Copies) -> tuple[Term, ...]:
    """All terms of these uses, in order."""
    terms = []
    for use in uses:
        numbers = weights.of[use.weight]
        if use.kind == "matrix":
            terms += [Term(use, b, W) for b, W in enumerate(as_matrices(use.node, use.weight, numbers))]
        elif use.kind == "scale":
            taken = elements_of_scale(use, copies)
            (where,) = np.nonzero(taken >= 0)
            terms.append(Term(use, 0, numbers.ravel()[taken[where]], where, taken[where]))
        else:
            terms.append(Term(use, 0, numbers.ravel()))
    return tuple(terms)


def by_weight(terms: Sequence[Term]) -> list[list[Term]]:
    """The terms of one and the same weight together; opaque ones stay alone."""
    found: list[list[Term]] = []
    alike: dict[tuple, list[list[Term]]] = defaultdict(list)  # groups that may have the same numbers
    for term in terms:
        groups = alike[term.use.kind, term.entries.shape, *term.entries.flat[:1].tolist()]
        same = (group for group in groups if np.array_equal(group[0].entries, term.entries))
        group = None if term.use.kind == "opaque" else next(same, None)
        if group is None:
            found.append(group := [])
            groups.append(group)
        group.append(term)
    return found


def weights_behind(graph: Graph, uses: Iterable[Use], dependence: Dependences) -> list[Node]:
    """The weights that are used and those that they copy, in order."""
    seen, todo = set(), [use.weight for use in uses]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += [o for o in node.operands if is_copy(node, dependence) and dependence[o] is Dependence.WEIGHT]
    return [node for node in graph.nodes if node in seen]


def parameters_behind(graph: Graph, parameters: Iterable[Node], weight: Node) -> list[str]:
    """The names of those of these parameters that a weight is computed from."""
    behind = ancestors([weight])
    return [graph.parameters[node] for node in parameters if node in behind]


def _range(start: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(start, start + math.prod(shape)).reshape(shape)


def _nothing(node: Node) -> list[np.ndarray]:
    return [np.full(shape, NO_WEIGHT) for shape in node.shapes]
