"""Networks, fixed points and free-form constraints F(S, theta; x) = 0: their solutions, and the operators of these.

J = -(D_S F)^{-1} D_theta F        P = (D_S F)^{-1}        K = D_theta F D_theta F*        ntk = J J* = P K P*
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, Rows, array_namespace, is_torch_array, like_numpy
from kpflow_dyn._flows.flow import Flow, Propagator, on_spaces
from kpflow_dyn._flows.sites import CoreOperator, WeightSite
from kpflow_dyn._implicit.constraint import (
    Constraint,
    ConstraintSite,
    Form,
    TracedConstraint,
    check_alike,
    every,
    on_rows,
)
from kpflow_dyn._implicit.inverse import StateDerivative
from kpflow_dyn._problems.choice import Choice, choose
from kpflow_dyn._problems.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn._spaces.operators import GramOperator
from kpflow_dyn._spaces.space import Space
from kpflow_dyn.solvers._orthogonalise import eps_of
from kpflow_dyn.tracing._uses import Use

ITERATIONS, NEWTON_STEPS = 1000, 30
STATES = {"z", "h", "s", "y", "state", "hidden"}  # what the first parameter of f(z, x) may be called
FREE_AXES = {1: ("unit",), 2: ("trial", "unit"), 3: ("trial", "time", "unit")}


def solve_implicit(prob: StaticProblem | FixedPointProblem | ImplicitProblem) -> Solution:
    """The solution of a problem that is no recurrence."""
    if isinstance(prob, StaticProblem):
        return _solve_network(prob)
    if isinstance(prob, FixedPointProblem):
        return _solve_fixed_point(prob)
    return _solve_free(prob)


def _solve_network(prob: StaticProblem) -> Solution:
    traced = _backend(prob.x).network(prob)
    row = every(traced)
    state = _direct(traced, row)(row.theta)
    _check_finite(state, "the state of the network")
    layout = traced.layout
    assert layout is not None
    return Solution(state, None, prob, None, {}, True, None, sites=layout.names, traced=traced)


def _solve_fixed_point(prob: FixedPointProblem) -> Solution:
    traced = _backend(prob.x).fixed_point(prob, _takes_state_first(prob.f))
    state, iterations, off = _iterate(traced)
    row = every(traced)
    if traced.model is not None:
        check_alike(state - _residual(traced, row)(state), traced.model(state))
    derivative = _derivative(traced, row, state)
    radius = derivative.spectral_radius()
    if not (radius < 1 and off <= 100 * eps_of(state)):
        raise ValueError(
            f"f does not contract: the spectral radius of D_z f is {radius:.4g}, and after {iterations} iterations f "
            f"and z differ by {off:.1e}. There is no state of rest; scale the recurrent weights down, or pose an "
            "ImplicitProblem"
        )
    inverse = derivative.inverse()
    stats = {"iterations": iterations, "spectral_radius": radius, "condition": inverse.condition}
    return Solution(state, None, prob, None, stats, True, traced.start, traced=traced, inverse=inverse)


def _solve_free(prob: ImplicitProblem) -> Solution:
    traced = _backend(prob.state).free_form(prob)
    row, state = every(traced), prob.state
    residual, off = _residual(traced, row), np.inf
    for steps in range(NEWTON_STEPS):
        rest, inverse = residual(state), _derivative(traced, row, state).inverse()
        if (off := _relative(rest, state)) <= 1e3 * eps_of(state):
            stats = {"iterations": steps, "condition": inverse.condition}
            return Solution(state, None, prob, None, stats, True, traced.start, traced=traced, inverse=inverse)
        state = state - inverse.solve(rest[None, None])[0, 0]
        _check_finite(state, "Newton's iterate")
    raise ValueError(f"Newton's method left F = {off:.1e} of the state's size; start it nearer to a solution")


# Functions on all rows


def _direct(traced: TracedConstraint, row: Constraint) -> Callable[[Array], Array]:
    return on_rows(traced, lambda theta, *x: row.direct(theta, None, *x), (None,))


def states_of_network(traced: TracedConstraint, learnable: list[str]) -> Callable[[dict[str, Array]], Array]:
    """The states of a network as a function of these of its parameters, by name."""
    row = traced.constraint(learnable)
    direct, names = _direct(traced, row), [traced.graph.parameters[node] for node in row.parameters]
    no_values, concat = traced.rows[0].reshape(-1)[:0], array_namespace(traced.rows[0]).concat
    return lambda values: direct(concat([no_values, *(values[name].reshape(-1) for name in names)], axis=0))


def _residual(traced: TracedConstraint, row: Constraint) -> Callable[[Array], Array]:
    return on_rows(traced, row.at, (0,))


def _derivative(traced: TracedConstraint, row: Constraint, state: Array) -> StateDerivative:
    """D_S F at a state; that of a free form has one row."""
    push, pull = traced.transforms.linearised(_residual(traced, row), state)
    if traced.form is not Form.FREE:
        return StateDerivative(push, pull, state)

    def with_row(apply: Rows) -> Rows:
        return lambda q: apply(q[:, 0])[:, None]

    return StateDerivative(with_row(push), with_row(pull), state[None])


# Fixed points


def _takes_state_first(f: Any) -> bool:
    """Whether f is f(z, x), by the names of its parameters."""
    call = f.forward if hasattr(f, "forward") else f
    names = [p.name for p in inspect.signature(call).parameters.values() if p.name != "self"]
    return len(names) > 1 and names[0] in STATES and names[1] not in STATES


def _iterate(traced: TracedConstraint) -> tuple[Array, int, float]:
    """z <- f(x, z), then Newton's method where that is slow: z, how often, and how far off it is at last."""
    row, start = every(traced), traced.start
    residual, state, n, off = _residual(traced, row), start, 0, np.inf
    for n in range(ITERATIONS + NEWTON_STEPS):
        rest = residual(state)
        off = _relative(rest, state)
        if not off > 100 * eps_of(state):  # or no number
            break
        if n >= ITERATIONS:
            rest = _derivative(traced, row, state).inverse().solve(rest[None])[0]
        state = state - rest
    return (state, n, off) if np.isfinite(off) else (start, n, off)


# The flow


def flow_of_constraint(sol: Solution, params: Choice, measure: Array | None) -> Flow:
    """The operators of a solution of `solve_implicit`."""
    traced = sol.traced
    row = traced.constraint(choose(traced.known, params))
    return _Linearised(traced, row, sol, measure).flow()


class _Linearised:
    """The derivatives of a constraint at a solution, each made when it is first applied."""

    def __init__(self, traced: TracedConstraint, row: Constraint, sol: Solution, measure: Array | None) -> None:
        self.traced, self.row, self.sol = traced, row, sol
        state, one = sol.state, traced.form is Form.FREE
        axes = FREE_AXES[state.ndim] if one else ("trial", *(traced.layout.axes if traced.layout else ("unit",)))
        weights = None if measure is None else measure.reshape((-1, *(1 for _ in state.shape[1:])))
        self.state = Space(axes, tuple(state.shape), state, weights)
        self.theta = row.theta
        self.parameters = Space(("parameter",), (self.theta.shape[0],), state)
        lead, axes = ((), ()) if one else ((state.shape[0],), ("trial",))
        weights = None if weights is None or one else weights.reshape((-1, 1))
        self.outputs = Space((*axes, "site"), (*lead, sum(row.sizes)), state, weights)

    def flow(self) -> Flow:
        """All operators."""
        kick = self.operator(self.parameters, self.state, self.kicked(), self.theta)
        V = self.operator(self.parameters, self.outputs, self.written(), self.theta)
        B = self.operator(self.outputs, self.state, self.entered(), self.no_kicks())
        P, inverse = self.propagator()
        if self.traced.form is Form.NETWORK:
            J = self.operator(self.parameters, self.state, _direct(self.traced, self.row), self.theta)
        else:
            J = P @ kick
        names = {node: self.traced.graph.parameters[node] for node in self.row.parameters}
        return Flow(
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
        residual = _residual(self.traced, self.row)
        inverse = self.operator(self.state, self.state, residual, self.sol.state)
        if self.traced.form is not Form.NETWORK:
            return on_spaces(self.state, self.state, *self.solved()), inverse
        direct = on_rows(self.traced, lambda q, *x: self.row.direct(self.theta, q, *x), (0,))
        zeros = array_namespace(self.sol.state).zeros_like(self.sol.state)
        return self.operator(self.state, self.state, direct, zeros), inverse

    def solved(self) -> tuple[Rows, Rows]:
        """P and its transpose, by a linear solve."""
        solve, adjoint = self.sol.inverse.solve, self.sol.inverse.solve_adjoint
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


def _backend(like: Array) -> Any:
    if is_torch_array(like):
        from kpflow_dyn._torch import networks
    else:
        from kpflow_dyn._jax import networks
    return networks


def _check_finite(state: Array, what: str) -> None:
    if not bool(array_namespace(state).isfinite(state).all()):
        raise ValueError(f"{what} holds NaN or inf; look at the inputs and the weights")


def _relative(rest: Array, state: Array) -> float:
    return float(abs(rest).max()) / max(1.0, float(abs(state).max()))
