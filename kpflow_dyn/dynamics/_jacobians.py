"""The Jacobians A_t of a solution's steps, and what dynamics they are asked of."""

from kpflow_dyn._arrays import Array, array_namespace, device, full_precision, joined
from kpflow_dyn._arrays.memory import bytes_of, require, rows_at_once
from kpflow_dyn._linearize import tangent_of_dynamics
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.problems import DiscreteProblem, OverTimes
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution, Solution
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._solve import solve

Stepwise = DiscreteSolution | ODESolution | HybridSolution | SteppedSolution


def step_jacobians(sol: Solution | DiscreteProblem | OverTimes) -> Array:
    """A_t = dz_t / dz_{t-1} of every step [trial, time, unit, unit]: of z_t its rows, of z_{t-1} its columns.

    Of an ODE these are the derivatives of the steps that its solver accepted, as `sol.steps` has them; the first is of
    length zero, the identity. A step as long as stability allows, as solvers take them near rest, contracts by less
    than the flow over the same time; shorter steps (steps=) are closer to it. So it is of an SDE, on its paths; and of
    a DDE, where z_t stands for the state and for those before it that later steps look up, the newest first. Of a
    hybrid model they lead from one time of the grid to the next, over all jumps between; the first is that of jumps at
    t0. Whatever needs but products with A_t is better off with `flow.P`, which keeps none.

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
    return jacobians(solved(sol))


def jacobians(sol: Stepwise, between_times: bool = False) -> Array:
    """The same, or of an SDE or a DDE from one time of the grid to the next."""
    with full_precision(sol.state):
        tangent = tangent_of_dynamics(sol, between_times)
        shape = trials, _, units = tuple(tangent.next_state.shape)
        size = units * trials * shape[1] * units
        require(bytes_of(size, sol.state), f"the Jacobians of {trials} trials", "analyse fewer trials, or use flow.P")
        xp, at_once = array_namespace(sol.state), rows_at_once(8 * size // units, sol.state)
        directions = xp.eye(units, dtype=sol.state.dtype, device=device(sol.state))[:, None, None]
        cuts = (directions[i : i + at_once] for i in range(0, units, at_once))
        columns = joined((tangent.advance(xp.broadcast_to(cut, (len(cut), *shape))) for cut in cuts), units)
    return xp.permute_dims(columns, (1, 2, 3, 0))


def solved(given: Solution | DiscreteProblem | OverTimes) -> Stepwise:
    """The solution of dynamics, whose steps are known; raise for what has no steps."""
    sol = solve(given) if isinstance(given, DiscreteProblem | OverTimes) else given
    if not isinstance(sol, Stepwise):
        kind = type(sol.problem if isinstance(sol, Solution) else sol).__name__
        raise TypeError(
            f"a {kind} has no steps in time; expected a DiscreteProblem, an ODEProblem, an SDEProblem or a DDEProblem, "
            "or a Solution of these"
        )
    if isinstance(sol, ODESolution) and sol.steps is None:
        raise ValueError(f"the steps of {sol.alg!r} cannot be replayed; solve with a Runge-Kutta method such as dopri5")
    return sol


def width(sol: Stepwise) -> int:
    """Of what a step begins with: the units, and of a DDE those of earlier states too."""
    return sol.start.shape[-1]


def smooth(sol: Stepwise) -> DiscreteSolution | ODESolution | SteppedSolution:
    """The solution, where its state does not jump."""
    if isinstance(sol, HybridSolution):
        raise ValueError(
            "Lyapunov exponents are not computed of a hybrid model, whose state jumps at events; multiply the matrices "
            "of kp.dynamics.step_jacobians(solution), which have its jumps in them"
        )
    return sol
