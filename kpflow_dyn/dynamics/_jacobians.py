"""The Jacobians A_t of a solution's steps, and what dynamics they are asked of."""

from kpflow_dyn._arrays import Array, array_namespace, device, full_precision, joined
from kpflow_dyn._arrays.memory import bytes_of, require, rows_at_once
from kpflow_dyn._linearize import tangent_of_dynamics
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.problems import DiscreteProblem, ODEProblem
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution, Solution
from kpflow_dyn._solve import solve


def step_jacobians(sol: Solution | DiscreteProblem | ODEProblem) -> Array:
    """A_t = dz_t / dz_{t-1} of every step [trial, time, unit, unit]: of z_t its rows, of z_{t-1} its columns.

    Of an ODE these are the derivatives of the steps that its solver accepted, as `sol.steps` has them; the first is of
    length zero, the identity. Of a hybrid model they lead from one time of the grid to the next, over all jumps
    between; the first is that of jumps at t0. Whatever needs but products with A_t is better off with `flow.P`, which
    keeps none.

    Args:
        sol: a solution, or a problem to be solved first.

    Raises:
        TypeError: of another problem, which has no steps.
        ValueError: for steps that cannot be traced or replayed.
        MemoryError: from a result above the `memory_budget`.
    Source: docs/theory.md, "P: how kicks travel".

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> cell = torch.nn.RNNCell(1, 2).double()
    >>> problem = kp.DiscreteProblem(cell, torch.zeros(1, 3, 1, dtype=torch.float64))
    >>> A, z = kp.dynamics.step_jacobians(problem), kp.solve(problem).state
    >>> bool(torch.allclose(A[0, 2], (1 - z[0, 2] ** 2)[:, None] * cell.weight_hh))
    True
    """
    sol = solved(sol)
    trials, _, units = sol.state.shape
    with full_precision(sol.state):
        tangent = tangent_of_dynamics(sol)
        shape = (trials, tangent.next_state.shape[1], units)
        size = units * trials * shape[1] * units
        require(bytes_of(size, sol.state), f"the Jacobians of {trials} trials", "analyse fewer trials, or use flow.P")
        xp, at_once = array_namespace(sol.state), rows_at_once(8 * size // units, sol.state)
        directions = xp.eye(units, dtype=sol.state.dtype, device=device(sol.state))[:, None, None]
        cuts = (directions[i : i + at_once] for i in range(0, units, at_once))
        columns = joined((tangent.advance(xp.broadcast_to(cut, (len(cut), *shape))) for cut in cuts), units)
    return xp.permute_dims(columns, (1, 2, 3, 0))


def solved(given: Solution | DiscreteProblem | ODEProblem) -> DiscreteSolution | ODESolution | HybridSolution:
    """The solution of dynamics, whose steps are known; raise for what has no steps."""
    sol = solve(given) if isinstance(given, DiscreteProblem | ODEProblem) else given
    if not isinstance(sol, DiscreteSolution | ODESolution | HybridSolution):
        kind = type(sol.problem if isinstance(sol, Solution) else sol).__name__
        why = "has no steps in time"
        if kind in ("SDEProblem", "DDEProblem"):
            why = "has steps that hang on noise or on earlier states as well, and flow.P passes on what changes a state"
        raise TypeError(f"a {kind} {why}; expected a DiscreteProblem, an ODEProblem, or a Solution of these")
    if isinstance(sol, ODESolution) and sol.steps is None:
        raise ValueError(f"the steps of {sol.alg!r} cannot be replayed; solve with a Runge-Kutta method such as dopri5")
    return sol


def smooth(sol: DiscreteSolution | ODESolution | HybridSolution) -> DiscreteSolution | ODESolution:
    """The solution, where its state does not jump."""
    if isinstance(sol, HybridSolution):
        raise ValueError(
            "Lyapunov exponents are not computed of a hybrid model, whose state jumps at events; multiply the matrices "
            "of kp.dynamics.step_jacobians(solution), which have its jumps in them"
        )
    return sol
