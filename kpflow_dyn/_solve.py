"""Solve a problem: the forward pass, with the whole state kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from kpflow_dyn._arrays import full_precision, like_numpy
from kpflow_dyn._implicit.solving import solve_implicit
from kpflow_dyn._problems.problems import DiscreteProblem, ImplicitProblem, ODEProblem, Problem
from kpflow_dyn._problems.solutions import Solution
from kpflow_dyn.ode._options import options_of
from kpflow_dyn.ode._solve import solve_ode


def solve(prob: Problem, alg: Any = None, **common: Any) -> Solution:
    """Run the model forward and keep what a linearisation needs: its whole state, and an ODE's accepted steps.

    A fixed point is found by z <- f(x, z), and by Newton's method where that is slow; a free form by Newton's method.

    Args:
        prob: the problem.
        alg: how an ODE is solved, which chooses the library. In torch the name of a method of torchdiffeq, "dopri5"
            when None; in JAX a solver of diffrax, own subclasses of AbstractERK included, diffrax.Tsit5() when None; in
            both what a library accepts that was added by `kpflow_dyn.ode.add_library`. Other problems need none.
        **common: for an ODE, `rtol` and `atol`, the tolerances (1e-6 and 1e-8 for a float64 state, 1e-4 and 1e-6 for
            float32); `max_steps`, how many steps may be tried (4096); `steps`, None for the method's own choice (one
            step for each interval of the grid where it makes none), a number for steps of this length (the last one
            shorter if need be), or increasing times from t0 to the end for steps between exactly these.

    On a grid t the state is what the library gives on it; in JAX each trial has steps of its own, in torch all share
    them. On a span all trials share the steps, and the state is read from the dense output at three Gauss points inside
    each. Steps of torchdiffeq's adaptive_heun and fehlberg2 (unless they are given) and of its Adams and scipy methods,
    and of diffrax's methods with memory, depend on those before them: these solve, but `solution.steps` is None. The
    dense output of torchdiffeq's bosh3, dopri8 and the second order methods is far less accurate than their steps: on a
    span, or with a grid inside the steps, "dopri5" is the one to take.

    Raises:
        TypeError, ValueError: for a model, input or initial state that do not fit, a step that is random or changes its
            arguments, and a state that does not stay finite; each says what to do.
        SolveError: when some trials of an ODE fail: names them, and holds the solution of the others.

    Example:
        >>> import torch
        >>> import kpflow_dyn as kp
        >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.zeros(2, 5, 3))
        >>> kp.solve(problem).stats
        {'steps': 5}
    """
    if isinstance(prob, ODEProblem):
        with full_precision(prob.z0):
            return solve_ode(prob, alg, options_of(prob, common))
    if not isinstance(prob, Problem):
        raise TypeError(
            f"solve takes a problem such as DiscreteProblem(cell, x) or ODEProblem(f, z0, t), got {type(prob).__name__}"
        )
    if alg is not None or common:
        raise TypeError(
            f"a {type(prob).__name__} is solved in one way; alg must be None, got {alg!r}, without options, got "
            f"{sorted(common)}"
        )
    with full_precision(prob.state if isinstance(prob, ImplicitProblem) else prob.x):
        if isinstance(prob, DiscreteProblem):
            return _solve_discrete(prob)
        return solve_implicit(prob)


def _solve_discrete(prob: DiscreteProblem) -> Solution:
    state, start = prob.backend.solving.roll_out(prob)
    times = like_numpy(np.arange(1, state.shape[1] + 1), state)
    return Solution(state, times, prob, alg=None, stats={"steps": state.shape[1]}, success=True, start=start)
