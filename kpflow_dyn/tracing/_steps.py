"""A traced step, analysed: all that its tangent needs to know of it."""

import math
from collections.abc import Collection
from dataclasses import dataclass

from kpflow_dyn._backend import Transforms
from kpflow_dyn.tracing._copies import find_copies
from kpflow_dyn.tracing._dependence import ON_DATA, Dependence, Dependences, dependences, is_copy
from kpflow_dyn.tracing._elements import Elements, number_elements
from kpflow_dyn.tracing._graph import Graph, Node, Role
from kpflow_dyn.tracing._kicks import Kicks, number_kicks
from kpflow_dyn.tracing._numbers import number_weights, parameters_behind, terms_of
from kpflow_dyn.tracing._sites import Site, sites_of_step
from kpflow_dyn.tracing._sums import follow_sums
from kpflow_dyn.tracing._uses import find_uses


@dataclass(frozen=True)
class AnalysedStep:
    """What a step is made of."""

    graph: Graph  # the step of one row
    dependence: Dependences  # what each of its values depends on
    parameters: tuple[Node, ...]  # the parameters that learn
    computed: tuple[Node, ...]  # the weights that are computed from them; their numbers follow those of the parameters
    elements: Elements  # the elements of its values
    kicks: Kicks  # where changes of the weights enter
    sites: tuple[Site, ...]  # its weight sites

    @property
    def state_size(self) -> int:
        """How many units the state has."""
        return math.prod(self.graph.output.shape)


def analyse(graph: Graph, learnable: Collection[str], transforms: Transforms) -> AnalysedStep:
    """The weight sites of a step's graph, and where their changes enter; what is not `learnable` counts as constant."""
    parameters = tuple(node for node, name in graph.parameters.items() if name in learnable)
    dependence = dependences(graph, parameters)
    if dependence[graph.output] is Dependence.WEIGHT:
        graph = _with_output_among_data(graph)
        dependence[graph.output] = Dependence.MOVING
    if dependence[graph.output] is not Dependence.MOVING:
        raise ValueError(
            "its result depends on neither its state nor a learnable parameter, as far as a trace follows: "
            "integers and detached values end it"
        )
    order = [node for node in graph.nodes if dependence[node] in ON_DATA]
    uses = find_uses(order, dependence)
    learnt = [node for node in graph.nodes if dependence[node] is not Dependence.CONSTANT]
    copies = find_copies(graph, [node for node in learnt if is_copy(node, dependence)], dependence, transforms)
    weights = number_weights(graph, parameters, uses, dependence, copies)
    elements = number_elements(graph, dependence, copies)
    terms = terms_of(uses, weights, copies)
    kicks = number_kicks(order, terms, dependence, elements, follow_sums(order, graph.output, dependence, elements))
    sites = sites_of_step(terms, weights, kicks, lambda weight: ", ".join(parameters_behind(graph, parameters, weight)))
    return AnalysedStep(graph, dependence, parameters, weights.computed, elements, kicks, sites)


def _with_output_among_data(graph: Graph) -> Graph:
    """A step that is a weight alone, such as a constant drift: a copy of the weight is its result."""
    weight = graph.output
    copied = Node(f"{weight.name}_copied", Role.MOVE, weight.shapes, weight.floating, lambda w: w, (weight,))
    return Graph([*graph.nodes, copied], copied, graph.parameters, graph.values)
