"""The weight sites of a traced constraint: each weight, all that it meets, and its variables."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, like_numpy
from kpflow_dyn._implicit.constraint import Constraint
from kpflow_dyn.tracing._copies import find_copies
from kpflow_dyn.tracing._dependence import is_copy
from kpflow_dyn.tracing._graph import Node, Role
from kpflow_dyn.tracing._numbers import Term, by_weight, number_weights, parameters_behind, terms_of, weights_behind
from kpflow_dyn.tracing._uses import Use, as_matrices, coefficients_of_scale, elements_of_lookup, variables_of_matrix


@dataclass(frozen=True)
class ConstraintSite:
    """A weight, and all that it meets.

    Attributes:
        name: the parameters that it is computed from; of several matrices also which one.
        kind: as of a `Use`.
        entries, weight: the numbers and values of its elements: of a matrix [d, m], else [element].
        terms: the uses that it has.
    """

    name: str
    kind: str
    entries: np.ndarray
    weight: Array
    terms: list[Term]


def sites_of(row: Constraint) -> list[ConstraintSite]:
    """One for each weight, with all terms that use it; and one for each opaque use."""
    graph, dependence = row.graph, row.dependence
    copying = [*weights_behind(graph, row.uses, dependence), *(use.node for use in row.uses)]
    copies = find_copies(graph, [n for n in copying if is_copy(n, dependence)], dependence, row.transforms)
    numbers = number_weights(graph, row.parameters, row.uses, dependence, copies)
    groups = by_weight(terms_of(row.uses, numbers, copies))

    def taken(theta: list[Array]) -> list[Array]:
        values = row.weights(theta)
        return [_taken(row, terms[0], values) for terms in groups]

    weights = row.transforms.once(taken)(row.values)
    return [_site(row, terms, weight) for terms, weight in zip(groups, weights, strict=True)]


def _site(row: Constraint, terms: list[Term], weight: Array) -> ConstraintSite:
    first = terms[0]
    name = ", ".join(parameters_behind(row.graph, row.parameters, first.use.weight))
    name = f"{name}[{first.matrix}]" if _is_batch(first.use) else name
    return ConstraintSite(name, first.use.kind, first.entries, weight, terms)


def _is_batch(use: Use) -> bool:
    """Whether the weight is more than one matrix."""
    return use.node.role is Role.PRODUCT and math.prod(use.weight.shape[:-2]) > 1


def _taken(row: Constraint, term: Term, values: Mapping[Node, Array]) -> Array:
    """The weights of a term, by the values of all."""
    use, value = term.use, values[term.use.weight]
    if use.kind == "matrix":
        return as_matrices(use.node, use.weight, value)[term.matrix]
    flat = value.reshape((-1,))
    return flat if term.taken is None else flat[row.transforms.index(term.taken, flat)]


def variables_of(row: Constraint, sites: Sequence[ConstraintSite], state: Array, *x: Array) -> list[Array]:
    """The weight-site variables of these sites in a row.

    V [row, d] of all uses of a matrix, coefficients [use, element], which elements of a table [1, element], or data
    operands [...].
    """
    env, xp = row.data(state, x), array_namespace(state)
    found = {use: _variables(row, use, env, state) for use in row.uses}
    rows = [[_of_term(row, term, found[term.use]) for term in site.terms] for site in sites]
    axes = [-1 if site.kind == "lookup" else 0 for site in sites]
    return [xp.concat(parts, axis=axis) for parts, axis in zip(rows, axes, strict=True)]


def _of_term(row: Constraint, term: Term, variables: Array) -> Array:
    """A term's part of the variables of its use."""
    kind, chosen = term.use.kind, term.elements
    if kind == "matrix":
        return variables[term.matrix]
    if kind == "opaque":
        return variables
    if chosen is None or len(chosen) == len(variables):
        return variables[None]
    return variables[None, row.transforms.index(chosen, variables)]


def _variables(row: Constraint, use: Use, env: dict[Node, Array], state: Array) -> Array:
    if use.kind == "matrix":
        return variables_of_matrix(use, env)
    if use.kind == "lookup":
        return elements_of_lookup(use, env)
    if use.kind == "opaque":
        data = [env[o].reshape(-1) for o in use.others if o.floating] or [state.reshape(-1)[:0]]
        return array_namespace(state).concat(data, axis=0)
    if use.node.role is not Role.POINTWISE:
        return like_numpy(np.ones(math.prod(use.node.shape)), state)
    return coefficients_of_scale(use, env, row.transforms.jvp)
