"""Networks, fixed points and free-form constraints F(S, theta; x) = 0: their solutions, and the operators of these.

J = -(D_S F)^{-1} D_theta F        P = (D_S F)^{-1}        K = D_theta F D_theta F*        ntk = J J* = P K P*
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from kpflow_dyn.arrays import Array, Rows, array_namespace, is_torch_array, like_numpy, to_numpy
from kpflow_dyn.choose import Choice, choose
from kpflow_dyn.constraint import FREE, NETWORK, Constraint, Traced, as_site, parameters_behind
from kpflow_dyn.flow import Flow, Propagator, on_spaces
from kpflow_dyn.inverse import Inverse, inverse_of
from kpflow_dyn.operators import GramOperator
from kpflow_dyn.problems import FixedPointProblem, ImplicitProblem, StaticProblem
from kpflow_dyn.sites import CoreOperator, WeightSite
from kpflow_dyn.solution import Solution
from kpflow_dyn.space import Space

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
    every = _every(traced)
    state = _direct(traced, every)(every.theta)
    _check_finite(state, "the state of the network")
    layout = traced.layout
    assert layout is not None
    return Solution(state, None, prob, None, {}, True, prob.x, sites=layout.names, traced=traced)


def _solve_fixed_point(prob: FixedPointProblem) -> Solution:
    traced = _backend(prob.x).fixed_point(prob, _takes_state_first(prob.f))
    state, iterations, off = _iterate(traced)
    radius = _spectral_radius(traced, state)
    if not (radius < 1 and off <= 100 * _eps(state)):
        raise ValueError(
            f"f does not contract: the spectral radius of D_z f is {radius:.4g}, and after {iterations} iterations f "
            f"and z differ by {off:.1e}. There is no state of rest; scale the recurrent weights down, or pose an "
            "ImplicitProblem"
        )
    inverse = _inverse(traced, _every(traced), state)
    stats = {"iterations": iterations, "spectral_radius": radius, "condition": inverse.condition}
    return Solution(state, None, prob, None, stats, True, traced.start, traced=traced, inverse=inverse)


def _solve_free(prob: ImplicitProblem) -> Solution:
    traced = _backend(prob.state).free_form(prob)
    every, state = _every(traced), prob.state
    residual, off = _residual(traced, every), np.inf
    for steps in range(NEWTON_STEPS):
        rest, inverse = residual(state), _inverse(traced, every, state)
        if (off := _relative(rest, state)) <= 1e3 * _eps(state):
            stats = {"iterations": steps, "condition": inverse.condition}
            return Solution(state, None, prob, None, stats, True, prob.state, traced=traced, inverse=inverse)
        state = state - inverse.solve(rest[None])[0]
        _check_finite(state, "Newton's iterate")
    raise ValueError(f"Newton's method left F = {off:.1e} of the state's size; start it nearer to a solution")


# Functions on all rows


def _every(traced: Traced) -> Constraint:
    """The functions of a row, where all parameters learn."""
    return traced.constraint(traced.graph.parameters.values())


def _mapped(traced: Traced, function: Callable[..., Array], axes: tuple) -> Callable[..., Array]:
    """A function of a row, on all rows: those of a free form are one."""
    if traced.kind is FREE:
        return lambda *args: function(*args, *traced.rows)
    over = traced.framework.vmap(function, (*axes, *(0 for _ in traced.rows)))
    return lambda *args: over(*args, *traced.rows)


def _direct(traced: Traced, row: Constraint) -> Callable[[Array], Array]:
    apply = _mapped(traced, lambda theta, *x: row.direct(theta, None, *x), (None,))
    return traced.framework.compiled(apply)


def _residual(traced: Traced, row: Constraint) -> Callable[[Array], Array]:
    kicks = _no_kicks(row)
    apply = _mapped(traced, lambda state, *x: row.residual(row.theta, state, kicks, *x), (0,))
    return traced.framework.compiled(apply)


def _no_kicks(row: Constraint) -> Array:
    return like_numpy(np.zeros(sum(row.sizes)), row.values[0])


def _inverse(traced: Traced, row: Constraint, state: Array) -> Inverse:
    """(D_S F)^{-1} at a state."""
    push, pull = traced.framework.linearised(_residual(traced, row), state)
    if traced.kind is not FREE:
        return inverse_of(push, pull, state.shape[0], tuple(state.shape[1:]), state)
    found = inverse_of(_with_row(push), _with_row(pull), 1, tuple(state.shape), state)
    return Inverse(_without_row(found.solve), _without_row(found.solve_adjoint), found.method, found.condition)


def _with_row(apply: Rows) -> Rows:
    return lambda q: apply(q[:, 0])[:, None]


def _without_row(apply: Rows) -> Rows:
    return lambda q: apply(q[:, None])[:, 0]


# Fixed points


def _takes_state_first(f: Any) -> bool:
    """Whether f is f(z, x), by the names of its parameters."""
    call = f.forward if hasattr(f, "forward") else f
    names = [p.name for p in inspect.signature(call).parameters.values() if p.name != "self"]
    return len(names) > 1 and names[0] in STATES and names[1] not in STATES


def _iterate(traced: Traced) -> tuple[Array, int, float]:
    """z <- f(x, z), then Newton's method where that is slow: z, how often, and how far off it is at last."""
    row, start = _every(traced), traced.start
    residual, state, n, off = _residual(traced, row), start, 0, np.inf
    for n in range(ITERATIONS + NEWTON_STEPS):
        rest = residual(state)
        off = _relative(rest, state)
        if not off > 100 * _eps(state):  # or no number
            break
        if n >= ITERATIONS:
            rest = _inverse(traced, row, state).solve(rest[None])[0]
        state = state - rest
    return (state, n, off) if np.isfinite(off) else (start, n, off)


def _spectral_radius(traced: Traced, state: Array) -> float:
    """Of D_z f, over all trials."""
    from scipy.sparse import linalg

    arpack: Any = linalg  # whose types do not know its keywords
    push, _pull = traced.framework.linearised(_residual(traced, _every(traced)), state)

    def matvec(v: np.ndarray) -> np.ndarray:
        q = like_numpy(v.reshape((1, *state.shape)), state)
        return to_numpy(q - push(q)).ravel()

    n = int(np.prod(state.shape))
    if n < 10:
        return float(abs(np.linalg.eigvals(np.stack([matvec(v) for v in np.eye(n)], 1))).max())
    start = np.random.default_rng(0).standard_normal(n)
    operator = arpack.LinearOperator((n, n), matvec, dtype=np.float64)
    return float(abs(arpack.eigs(operator, 1, tol=1e-3, v0=start, return_eigenvectors=False)).max())


# The flow


def flow_of_constraint(sol: Solution, params: Choice, measure: Array | None) -> Flow:
    """The operators of a solution of `solve_implicit`."""
    traced = sol.traced
    row = traced.constraint(choose(traced.known, params))
    return _Linearised(traced, row, sol, measure).flow()


class _Linearised:
    """The derivatives of a constraint at a solution, each made when it is first applied."""

    def __init__(self, traced: Traced, row: Constraint, sol: Solution, measure: Array | None) -> None:
        self.traced, self.row, self.sol = traced, row, sol
        state, one = sol.state, traced.kind is FREE
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
        if self.traced.kind is NETWORK:
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
        if self.traced.kind is not NETWORK:
            solved = self.sol.inverse
            return on_spaces(self.state, self.state, solved.solve, solved.solve_adjoint), inverse
        direct = _mapped(self.traced, lambda q, *x: self.row.direct(self.theta, q, *x), (0,))
        zeros = array_namespace(self.sol.state).zeros_like(self.sol.state)
        return self.operator(self.state, self.state, self.traced.framework.compiled(direct), zeros), inverse

    def operator(self, domain: Space, codomain: Space, function: Callable[[Array], Array], point: Array) -> Any:
        """The derivative of a function at a point."""
        maps = cache(lambda: self.traced.framework.linearised(function, point))
        return on_spaces(domain, codomain, lambda q: maps()[0](q), lambda q: maps()[1](q))

    def kicked(self) -> Callable[[Array], Array]:
        """theta -> -F, at the state."""
        zeros, state = _no_kicks(self.row), self.sol.state
        row = _mapped(self.traced, lambda theta, s, *x: -self.row.residual(theta, s, zeros, *x), (None, 0))
        return lambda theta: row(theta, state)

    def written(self) -> Callable[[Array], Array]:
        """theta -> what all uses give."""
        row, state = _mapped(self.traced, self.row.outputs, (None, 0)), self.sol.state
        return lambda theta: row(theta, state)

    def entered(self) -> Callable[[Array], Array]:
        """Kicks at the uses -> -F."""
        theta, state = self.theta, self.sol.state
        row = _mapped(self.traced, lambda kicks, s, *x: -self.row.residual(theta, s, kicks, *x), (0, 0))
        return lambda kicks: row(kicks, state)

    def no_kicks(self) -> Array:
        """No kicks at any use."""
        return like_numpy(np.zeros(self.outputs.shape), self.sol.state)

    # Weight sites

    def sites(self) -> list[WeightSite]:
        """One for each weight, with the variables of all of its uses as rows; and one for each opaque use."""
        parts = defaultdict(list)
        weights, concat = self.row.weights(), array_namespace(self.sol.state).concat
        for use, V in zip(self.row.uses, self.variables(), strict=True):
            value, entries = (as_site(use, a) for a in weights[use.weight])
            name = ", ".join(parameters_behind(self.traced.graph, use.weight))
            if use.kind == "opaque":
                parts[use] = [(name, use.kind, value, entries, V)]
                continue
            if use.kind == "scale":
                value, entries, V = value[None], entries[None], V[:, None, None]
            for b, numbers in enumerate(entries):
                part = name if len(entries) == 1 else f"{name}[{b}]"
                parts[numbers.shape, numbers.tobytes()].append((part, use.kind, value[b], numbers, V[:, b]))
        sites = []
        for same in parts.values():
            name, kind, value, entries, _ = same[0]
            V = concat([V for *_, V in same], axis=1)
            sites.append(WeightSite(name, kind, value, V, entries, self.state.measure))
        return sites

    def variables(self) -> list[Array]:
        """Of all uses on all rows [trial, ...]."""
        compute = self.traced.framework.compiled(_mapped(self.traced, self.row.variables, (0,)))
        found = compute(self.sol.state)
        return [V[None] for V in found] if self.traced.kind is FREE else found


def _backend(like: Array) -> Any:
    if is_torch_array(like):
        from kpflow_dyn.torch_backend import networks
    else:
        from kpflow_dyn.jax_backend import networks
    return networks


def _check_finite(state: Array, what: str) -> None:
    if not bool(array_namespace(state).isfinite(state).all()):
        raise ValueError(f"{what} holds NaN or inf; look at the inputs and the weights")


def _relative(rest: Array, state: Array) -> float:
    return float(abs(rest).max()) / max(1.0, float(abs(state).max()))


def _eps(a: Array) -> float:
    return float(array_namespace(a).finfo(a.dtype).eps)
