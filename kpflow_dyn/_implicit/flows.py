"""The operators of a constraint's solution.

J = -(D_S F)^{-1} D_theta F        P = (D_S F)^{-1}        K = D_theta F D_theta F*        ntk = J J* = P K P*
"""

from kpflow_dyn._arrays import Array, Rows, array_namespace
from kpflow_dyn._arrays.complex_numbers import count, is_complex
from kpflow_dyn._flows.flow import ConstraintFlow
from kpflow_dyn._flows.propagator import Propagator
from kpflow_dyn._flows.sites import CoreOperator
from kpflow_dyn._implicit.form import Form
from kpflow_dyn._implicit.linearised import Linearised, Map
from kpflow_dyn._implicit.roads import linearised
from kpflow_dyn._implicit.solutions import ConstraintSolution, SolvedSolution
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.measure import Weights
from kpflow_dyn._spaces.operators import GramOperator, Operator
from kpflow_dyn._spaces.space import Space


def flow_of_constraint(sol: ConstraintSolution, params: Choice, weights: Weights) -> ConstraintFlow:
    """The operators of a solution of `solve_implicit`."""
    trial, measure = weights.trial, weights.on(sol.axes)
    (found, sites), one = linearised(sol, params, trial), sol.equations.form is Form.FREE
    state = Space(sol.axes, tuple(sol.state.shape), sol.state, measure)
    parameters = Space(("parameter",), (sum(map(count, found.parameters.values())),), _like_parameters(sol, found))
    rows, trials = ((), ()) if one else (("trial",), state.shape[:1])
    of_rows = None if trial is None or one else trial.reshape((-1, 1))
    outputs = Space((*rows, "site"), (*trials, found.outputs), sol.state, of_rows)

    kick = found.apart.parameters.between(parameters, state)
    K = found.apart.parameters.gram(kick)
    P, J, ntk = _propagator_jacobian_and_kernel(sol, found, kick, K)
    V = found.write.between(parameters, outputs)
    return ConstraintFlow(
        P=Propagator(P, -found.apart.argument.between(state, state)),
        K=K,
        core=CoreOperator(V, sites, found.untraced),
        B=found.enter.between(outputs, state),
        J=J,
        ntk=ntk,
        sites=sites,
        solution=sol,
        parameters=found.parameters,
        untraced=found.untraced,
    )


def _like_parameters(sol: ConstraintSolution, found: Linearised) -> Array:
    """In the dtype of the parameters, which may not be that of the state."""
    xp = array_namespace(sol.state)
    dtype = xp.result_type(*(value.real if is_complex(value) else value for value in found.parameters.values()))
    return xp.astype(sol.state, dtype, copy=False)


def _propagator_jacobian_and_kernel(
    sol: ConstraintSolution, found: Linearised, kick: Operator, K: GramOperator
) -> tuple[Operator, Operator, GramOperator]:
    """P, J and J J*: of a network the derivatives of its values, else by a linear solve."""
    state = kick.codomain
    if found.whole is not None:
        J = found.whole.parameters.between(kick.domain, state)
        return found.whole.argument.between(state, state), J, found.whole.parameters.gram(J)
    assert isinstance(sol, SolvedSolution)
    P = _solved(sol).between(state, state)
    return P, P @ kick, GramOperator(P @ kick, lambda q: P.mv(K.mv(P.T.mv(q))))


def _solved(sol: SolvedSolution) -> Map:
    """The inverse of D_S F; that of a free form has one row."""

    def with_row(apply: Rows) -> Rows:
        return lambda q: apply(q[:, None])[:, 0]

    solve, adjoint = sol.inverse.solve, sol.inverse.solve_adjoint
    return Map(with_row(solve), with_row(adjoint)) if sol.equations.form is Form.FREE else Map(solve, adjoint)
