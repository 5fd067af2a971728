"""The derivatives of a traced constraint, each that of a function of its rows, made when it is first applied."""

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, empty_row, like_numpy, placed
from kpflow_dyn._arrays.memory import in_blocks
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._implicit.constraint import Constraint, ConstraintSite, TracedConstraint, direct, on_rows
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.linearised import Map, Pair
from kpflow_dyn.tracing._rows import split
from kpflow_dyn.tracing._uses import Use

TABLE_COPIES = 3  # of each table for each probe, where lookups are mapped over probes
Function = Callable[[Any], Any]


class Traced:
    """See `Linearised`."""

    untraced = ""

    def __init__(self, traced: TracedConstraint, parameters: dict[str, Array], state: Array) -> None:
        self.traced, self.row = traced, Constraint(traced, parameters)
        self.parameters, self.state, self.outputs = parameters, state, sum(self.row.sizes)
        self.size = sum(math.prod(value.shape) for value in self.row.values)
        self.apart, self.whole = self._apart(), None
        if traced.form is Form.NETWORK:
            self.whole = self._whole()

    def _apart(self) -> Pair:
        """S_0 - F, where kicks at the uses are zero."""
        theta, state, row, zeros = self.row.values, self.state, self.row, self.row.no_kicks()
        of_theta = on_rows(self.traced, lambda theta, s, *x: s - row.residual(theta, s, zeros, *x), (None, 0))
        residual = on_rows(self.traced, lambda s, *x: -row.residual(theta, s, zeros, *x), (0,))
        parameters = self._of_parameters(lambda theta: of_theta(theta, state), state)
        return Pair(lambda: of_theta(theta, state), parameters, self._map(residual, state, state))

    def _whole(self) -> Pair:
        """The state of a network."""
        theta, row, zeros = self.row.values, self.row, array_namespace(self.state).zeros_like(self.state)
        of_theta = direct(self.traced, row)
        of_kicks = on_rows(self.traced, lambda kicks, *x: row.direct(theta, kicks, *x), (0,))
        parameters = self._of_parameters(of_theta, self.state)
        return Pair(lambda: of_theta(theta), parameters, self._map(of_kicks, zeros, self.state))

    @property
    def write(self) -> Map:
        """What all uses give."""
        outputs, state = on_rows(self.traced, self.row.outputs, (None, 0)), self.state
        return self._of_parameters(lambda theta: outputs(theta, state), self._no_kicks)

    @property
    def enter(self) -> Map:
        """Kicks at the uses."""
        theta, state, row = self.row.values, self.state, self.row
        minus = on_rows(self.traced, lambda kicks, s, *x: -row.residual(theta, s, kicks, *x), (0, 0))
        return self._map(lambda kicks: minus(kicks, state), self._no_kicks, state)

    @property
    def _no_kicks(self) -> Array:
        """Zeros at all outputs of uses [trial, site]."""
        rows = () if self.traced.form is Form.FREE else (len(self.state),)
        zeros = like_numpy(np.zeros((*rows, self.outputs)), self.state)
        return placed(zeros, empty_row(self.state, bool(rows)), -zeros.ndim)

    def _map(self, function: Function, point: Array, value: Array) -> Map:
        """The derivative of a function at a point where it has a value like this one."""
        maps = cache(lambda: self.traced.transforms.linearised(function, point))
        entries = math.prod(point.shape) + math.prod(value.shape)
        return Map(self._in_blocks(lambda q: maps()[0](q), entries), self._in_blocks(lambda q: maps()[1](q), entries))

    def _of_parameters(self, function: Function, value: Array) -> Map:
        """The derivative of a function of the parameters, which it takes as a list."""
        maps = cache(lambda: self.traced.transforms.linearised(function, self.row.values))
        entries = self.size + TABLE_COPIES * self._tables + math.prod(value.shape)
        push, pull = lambda theta: maps()[0](self._listed(theta)), lambda q: self._joined(maps()[1](q))
        return Map(*(self._in_blocks(each, entries) for each in (push, pull, lambda q: maps()[0](maps()[1](q)))))

    @cached_property
    def _tables(self) -> int:
        """The entries of all tables that are looked up."""
        return sum(math.prod(weight.shape) for weight in {u.weight for u in self.row.uses if u.kind == "lookup"})

    @cached_property
    def _listed(self) -> Function:
        """A block [probe, p] as one of each parameter."""
        return self.traced.transforms.compiled(lambda theta: split(theta, self.row.values))

    @cached_property
    def _joined(self) -> Function:
        """The inverse."""

        def joined(parts: list[Array]) -> Array:
            return array_namespace(parts[0]).concat([part.reshape((len(part), -1)) for part in parts], axis=1)

        return self.traced.transforms.compiled(joined)

    def _in_blocks(self, function: Function, entries: int) -> Function:
        """On as many probes at once as fit, each with these entries and the values of all trials on the way."""
        trials = 1 if self.traced.form is Form.FREE else len(self.state)
        return in_blocks(function, entries + self.row.work * trials, self.state)

    # Weight sites

    def sites(self, measure: Array | None) -> list[WeightSite]:
        """One for each weight, with the variables of all of its uses as rows; and one for each opaque use."""
        found = on_rows(self.traced, self.row.variables, (0,))(self.state)
        found = [V[None] for V in found] if self.traced.form is Form.FREE else found
        variables = dict(zip(self.row.uses, found, strict=True))
        return [_with_variables(site, variables, measure) for site in self.row.sites()]


def _with_variables(site: ConstraintSite, variables: dict[Use, Array], measure: Array | None) -> WeightSite:
    """A weight with its variables on all rows [trial, ...]."""
    (first, *_), weight, entries = site.terms, site.weight, site.entries
    name, found = site.name, [variables[term.use] for term in site.terms]
    if site.kind == "opaque":
        return WeightSite(name, site.kind, weight, found[0], entries, measure)
    xp = array_namespace(weight)
    if site.kind == "lookup":
        return WeightSite(name, site.kind, weight, xp.concat(found, axis=1)[:, None], entries, measure)
    if site.kind == "scale":
        rows = [v[:, None, term.elements] for v, term in zip(found, site.terms, strict=True)]
    else:
        rows = [v[:, term.matrix] for v, term in zip(found, site.terms, strict=True)]
        name = name if found[0].shape[1] == 1 else f"{name}[{first.matrix}]"
        weight, entries = weight.T, entries.T
    V = xp.concat(rows, axis=1)
    return WeightSite(name, site.kind, weight, V, entries, measure)
