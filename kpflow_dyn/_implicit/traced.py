"""The derivatives of a traced constraint, each that of a function of its rows, made when it is first applied."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, array_namespace, empty_row, like_numpy, placed
from kpflow_dyn._arrays.complex_numbers import split
from kpflow_dyn._arrays.memory import in_blocks
from kpflow_dyn._flows.sites import WeightSite
from kpflow_dyn._implicit.constraint import Constraint, TracedConstraint, direct, on_rows
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.linearised import Map, Pair
from kpflow_dyn._implicit.sites import ConstraintSite, sites_of, variables_of

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
        return Map(*(self._in_blocks(each, entries) for each in (push, pull, lambda q: maps()[2](q))))

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

    # What a referee asks for once: maps of any number of probes are several programs each

    def at_once(self, pair: str, q: Array) -> AtOnce:
        """The derivative of `apart` or of `whole` at one q of the states [1, ...]."""
        row, state = self.row, self.state
        if pair == "whole":
            values = on_rows(self.traced, lambda theta, kicks, *x: row.direct(theta, kicks, *x), (None, 0))
            return AtOnce(self, values, array_namespace(state).zeros_like(state), q)
        zeros = row.no_kicks()
        residual = on_rows(self.traced, lambda theta, s, *x: row.residual(theta, s, zeros, *x), (None, 0))
        return AtOnce(self, lambda theta, s: state - residual(theta, s), state, q)

    def through_sites(self, q: Array) -> tuple[list[Array], list[Array]]:
        """What q of F [1, ...] pulls back to each parameter: all of it, and what arrives by the weight sites."""
        row, vjp = self.row, self.traced.transforms.vjp
        outputs = on_rows(self.traced, row.outputs, (None, 0))
        residual = on_rows(self.traced, lambda theta, kicks, s, *x: row.residual(theta, s, kicks, *x), (None, 0, 0))

        def both(q: Array, values: list[Array], still: Array, s: Array) -> tuple[Any, Any]:
            whole, kicks = vjp(lambda theta, kicks: residual(theta, kicks, s), values, still)[1](q)
            (by_sites,) = vjp(lambda theta: outputs(theta, s), values)[1](kicks)
            return whole, by_sites

        return self.traced.transforms.once(both)(q[0], self.row.values, self._no_kicks, self.state)

    # Weight sites

    def sites(self, measure: Array | None) -> list[WeightSite]:
        """One for each weight, with the variables of all of its uses as rows; and one for each opaque use."""
        sites = sites_of(self.row)
        variables = on_rows(self.traced, lambda s, *x: variables_of(self.row, sites, s, *x), (0,))
        found = self.traced.transforms.once(variables)(self.state)
        found = [V[None] for V in found] if self.traced.form is Form.FREE else found
        return [_with_variables(site, V, measure) for site, V in zip(sites, found, strict=True)]


def _with_variables(site: ConstraintSite, variables: Array, measure: Array | None) -> WeightSite:
    """A weight with its variables on all rows [trial, ...]."""
    turned = site.kind == "matrix"
    weight, entries = (site.weight.T, site.entries.T) if turned else (site.weight, site.entries)
    return WeightSite(site.name, site.kind, weight, variables, entries, measure)


class AtOnce:
    """See `kpflow_dyn._flows.referee.Linearisation`: the derivative of a function(theta, argument) at one q."""

    def __init__(self, traced: Traced, function: Callable[..., Array], argument: Array, q: Array) -> None:
        self._function, self._point = function, (traced.row.values, argument)
        self._transforms = traced.traced.transforms

        def reverse(q: Array, *point: Any) -> tuple[Array, Any]:
            value, pull = self._transforms.vjp(function, *point)
            return value, pull(q)

        self.value, self._pulled = self._transforms.once(reverse)(q[0], *self._point)

    def pull(self, q: Array) -> tuple[Array, Array]:
        """Of that q."""
        theta, argument = self._pulled
        vector = array_namespace(argument).concat([part.reshape(-1) for part in theta], axis=0)
        return vector[None], argument[None]

    def push(self, theta: Array, argument: Array) -> Array:
        """Forward mode, for one change [1, ...]."""

        def forward(moved: Any, *point: Any) -> Array:
            return self._transforms.jvp(self._function, point, moved)[1]

        moved = split(theta[0], self._point[0]), argument[0]
        return self._transforms.once(forward)(moved, *self._point)[None]
