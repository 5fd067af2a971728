"""The kicks of a step: one for each element at which a change of the weights enters it.

Uses that meet only in sums share their kicks, so that W h + U x + b is one site with the variables [h, x, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kpflow_dyn.tracing._dependence import Dependence, Dependences
from kpflow_dyn.tracing._elements import NOTHING, Elements
from kpflow_dyn.tracing._graph import Node
from kpflow_dyn.tracing._numbers import Term
from kpflow_dyn.tracing._sums import Sums, fixed_factor, is_linear
from kpflow_dyn.tracing._uses import as_outputs


@dataclass(frozen=True)
class Kicks:
    """The kicks of a step; those of the linear operations that carry the state on come first."""

    size: int  # how many there are
    # for each linear operation and each use of a weight, the kick that each of its elements feeds, in its shape
    of: Mapping[Node, np.ndarray]
    # the nodes whose values the kicks stand for: which one for each element, -1 for none
    replaced: Mapping[Node, np.ndarray]
    added: Mapping[Node, np.ndarray]  # the same where the kicks add to a node's value

    def of_term(self, term: Term) -> np.ndarray:
        """The kicks that a term feeds: [row, m] of a matrix, else [element]."""
        use, kicks = term.use, self.of[term.use.node]
        if use.kind == "matrix":
            return as_outputs(use.node, use.weight, kicks)[term.matrix]
        return kicks.ravel() if term.elements is None else kicks.ravel()[term.elements]


def number_kicks(
    order: Sequence[Node], terms: Sequence[Term], dependence: Dependences, elements: Elements, sums: Sums
) -> Kicks:
    """Number the kicks of a step, whose nodes on data are `order`, and say where they enter."""
    linear = [node for node in order if is_linear(node, dependence)]
    linear.sort(key=lambda node: not _carries(node, dependence))
    others = [term for term in terms if term.use.kind != "matrix"]
    entered = {term.use.node: np.full(elements.of(term.use.node).shape, NOTHING) for term in others}
    for term in others:
        here = slice(None) if term.elements is None else term.elements
        entered[term.use.node][here] = elements.of(term.use.node)[here]
    led = {node: sums.leads_to[elements.numbers[node][0]] for node in [*linear, *entered]}
    feeding = Kicks(0, led, {}, {})
    targets = [_by_matrix(node, led[node], dependence).ravel() for node in linear]
    targets = np.concatenate([np.zeros(0, int), *targets, *map(feeding.of_term, others)])
    first = np.sort(np.unique(targets, return_index=True)[1])
    kick_of = np.full(elements.count, -1)
    kick_of[targets[first]] = np.arange(len(first))
    replaced = {n: kick_of[elements.of(n)] for n in order if n in sums.hubs or is_linear(n, dependence)}
    added = {node: kick_of[numbers] for node, numbers in entered.items() if node not in replaced}
    return Kicks(len(first), {node: kick_of[numbers] for node, numbers in led.items()}, replaced, added)


def _carries(node: Node, dependence: Dependences) -> bool:
    """Whether what a linear operation multiplies moves."""
    factor = fixed_factor(node, dependence)
    return any(dependence[o] is Dependence.MOVING for o in node.operands if o is not factor)


def _by_matrix(node: Node, numbers: np.ndarray, dependence: Dependences) -> np.ndarray:
    """The elements that a linear operation feeds, in the order of its matrices."""
    factor = fixed_factor(node, dependence)
    return numbers if factor is None else as_outputs(node, factor, numbers)
