"""The operators of a constraint's solution, as derivatives of functions of its rows.

J = -(D_S F)^{-1} D_theta F        P = (D_S F)^{-1}        K = D_theta F D_theta F*        ntk = J J* = P K P*
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Rows, array_namespace, like_numpy
from kpflow_dyn._flows.flow import ConstraintFlow, Propagator
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._implicit.constraint import Constraint, ConstraintSite, Form, direct, on_rows, residual
from kpflow_dyn._implicit.solutions import ConstraintSolution, SolvedSolution
from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn._spaces.operators import GramOperator, on_spaces
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.tracing._uses import Use

FREE_AXES = {1: ("unit",), 2: ("trial", "unit"), 3: ("trial", "time", "unit")}


def flow_of_constraint(sol: ConstraintSolution, params: Choice, measure: Array | None) -> ConstraintFlow:
    """The operators of a solution of `solve_implicit`."""
    row = Constraint(sol.traced, choose(sol.traced.known, params))
    return _Linearised(sol, row, measure).flow()


class _Linearised:
    """The derivatives of a constraint at a solution, each made when it is first applied."""

    def __init__(self, sol: ConstraintSolution, row: Constraint, measure: Array | None) -> None:
        self.sol, self.row, self.traced = sol, row, (traced := sol.traced)
        state, one = sol.state, traced.form is Form.FREE
        axes = FREE_AXES[state.ndim] if one else ("trial", *(traced.layout.axes if traced.layout else ("unit",)))
        weights = None if measure is None else measure.reshape((-1, *(1 for _ in state.shape[1:])))
        self.state = Space(axes, tuple(state.shape), state, weights)
        self.theta = row.theta
        self.parameters = Space(("parameter",), (self.theta.shape[0],), state)
        lead, axes = ((), ()) if one else ((state.shape[0],), ("trial",))
        weights = None if weights is None or one else weights.reshape((-1, 1))
        self.outputs = Space((*axes, "site"), (*lead, sum(row.sizes)), state, weights)

    def flow(self) -> ConstraintFlow:
        kick = self.operator(self.parameters, self.state, self.kicked(), self.theta)
        V = self.operator(self.parameters, self.outputs, self.written(), self.theta)
        B = self.operator(self.outputs, self.state, self.entered(), self.no_kicks())
        P, inverse = self.propagator()
        J = P @ kick
        if self.traced.form is Form.NETWORK:
            J = self.operator(self.parameters, self.state, direct(self.traced, self.row), self.theta)
        names = {node: self.traced.graph.parameters[node] for node in self.row.parameters}
        return ConstraintFlow(
            P=Propagator(P, inverse),
            K=GramOperator(kick),
            core=CoreOperator(V, sites := self.sites()),
            B=B,
            J=J,
            ntk=GramOperator(J),
            sites=sites,
            solution=self.sol,
            parameters={names[n]: v for n, v in zip(self.row.parameters, self.row.values, strict=True)},
        )

    def propagator(self) -> tuple[Any, Any]:
        """P and D_S F."""
        inverse = self.operator(self.state, self.state, residual(self.traced, self.row), self.sol.state)
        if isinstance(self.sol, SolvedSolution):
            return on_spaces(self.state, self.state, *self.solved(self.sol)), inverse
        values = on_rows(self.traced, lambda q, *x: self.row.direct(self.theta, q, *x), (0,))
        zeros = array_namespace(self.sol.state).zeros_like(self.sol.state)
        return self.operator(self.state, self.state, values, zeros), inverse

    def solved(self, sol: SolvedSolution) -> tuple[Rows, Rows]:
        """P and its transpose, by a linear solve."""
        solve, adjoint = sol.inverse.solve, sol.inverse.solve_adjoint
        if self.traced.form is not Form.FREE:
            return solve, adjoint
        return lambda q: solve(q[:, None])[:, 0], lambda q: adjoint(q[:, None])[:, 0]

    def operator(self, domain: Space, codomain: Space, function: Callable[[Array], Array], point: Array) -> Any:
        """The derivative of a function at a point."""
        maps = cache(lambda: self.traced.transforms.linearised(function, point))
        return on_spaces(domain, codomain, lambda q: maps()[0](q), lambda q: maps()[1](q))

    def kicked(self) -> Callable[[Array], Array]:
        """theta -> -F, at the state."""
        zeros, state = self.row.no_kicks(), self.sol.state
        row = on_rows(self.traced, lambda theta, s, *x: -self.row.residual(theta, s, zeros, *x), (None, 0))
        return lambda theta: row(theta, state)

    def written(self) -> Callable[[Array], Array]:
        """theta -> what all uses give."""
        row, state = on_rows(self.traced, self.row.outputs, (None, 0)), self.sol.state
        return lambda theta: row(theta, state)

    def entered(self) -> Callable[[Array], Array]:
        """Kicks at the uses -> -F."""
        theta, state = self.theta, self.sol.state
        row = on_rows(self.traced, lambda kicks, s, *x: -self.row.residual(theta, s, kicks, *x), (0, 0))
        return lambda kicks: row(kicks, state)

    def no_kicks(self) -> Array:
        """No kicks at any use."""
        return self.outputs.placed(like_numpy(np.zeros(self.outputs.shape), self.sol.state))

    # Weight sites

    def sites(self) -> list[WeightSite]:
        """One for each weight, with the variables of all of its uses as rows; and one for each opaque use."""
        variables = dict(zip(self.row.uses, self.variables(), strict=True))
        return [self.site(site, variables) for site in self.row.sites()]

    def site(self, site: ConstraintSite, variables: dict[Use, Array]) -> WeightSite:
        """A weight with its variables."""
        (first, *_), weight, entries = site.terms, site.weight, site.entries
        name, found = site.name, [variables[term.use] for term in site.terms]
        if site.kind == "opaque":
            return WeightSite(name, site.kind, weight, found[0], entries, self.state.measure)
        if site.kind == "scale":
            rows = [v[:, None, term.elements] for v, term in zip(found, site.terms, strict=True)]
        else:
            rows = [v[:, term.matrix] for v, term in zip(found, site.terms, strict=True)]
            name = name if found[0].shape[1] == 1 else f"{name}[{first.matrix}]"
            weight, entries = weight.T, entries.T
        V = array_namespace(self.sol.state).concat(rows, axis=1)
        return WeightSite(name, site.kind, weight, V, entries, self.state.measure)

    def variables(self) -> list[Array]:
        """Of all uses on all rows [trial, ...]."""
        found = on_rows(self.traced, self.row.variables, (0,))(self.sol.state)
        return [V[None] for V in found] if self.traced.form is Form.FREE else found
