"""Solve a problem: the forward pass, with the whole state kept."""

from typing import Any

import numpy as np

from kpflow_dyn._arrays import full_precision, joined, like_numpy, to_numpy
from kpflow_dyn._implicit.solving import solve_implicit
from kpflow_dyn._problems.delayed import DDEProblem
from kpflow_dyn._problems.problems import (
    DiscreteProblem,
    FixedPointProblem,
    ImplicitProblem,
    ODEProblem,
    OverTimes,
    Problem,
    StaticProblem,
)
from kpflow_dyn._problems.solutions import DiscreteSolution, Solution
from kpflow_dyn._problems.starts import inputs_without_gradient, without_gradient
from kpflow_dyn._problems.stochastic import SDEProblem
from kpflow_dyn._shown import type_name
from kpflow_dyn._stepping.delayed import solve_dde
from kpflow_dyn._stepping.split import solve_split, split_method
from kpflow_dyn._stepping.stochastic import solve_sde
from kpflow_dyn.ode._libraries import added
from kpflow_dyn.ode._options import options_of
from kpflow_dyn.ode._solve import solve_ode


def solve(prob: Problem, alg: Any = None, **common: Any) -> Solution:
    """Find the state S with F(S, theta; x) = 0. The solution keeps all that `linearize` needs.

    Recurrences and networks are run forward. A fixed point is found by z <- f(x, z), and by Newton's method where that
    is slow. A free form is solved by Newton's method. The solution of an ODE keeps the accepted steps.

    Args:
        prob: the problem.
        alg: how an ODE is solved. It also chooses the library. In torch: the name of a method of torchdiffeq ("dopri5"
            when None), a step method of torchode, or an AutoDiffAdjoint of one. In JAX: a solver of diffrax
            (diffrax.Tsit5() when None), also your own subclass of AbstractERK. In both: an algorithm of a library that
            was added by `kpflow_dyn.ode.add_library`. For a pair (q, v), as in a `SecondOrderProblem`, both also take
            "symplectic_euler", which is diffrax.SemiImplicitEuler(), or "leapfrog", of Stoermer and Verlet, with
            `steps` alone. They are symplectic where q' depends on v alone, and v' on q alone. For an SDE: "euler"
            (Euler-Maruyama, which converges to the Ito solution), "milstein" (diagonal noise; Ito or Stratonovich),
            "heun" or "euler_heun" (Stratonovich), or diffrax's solver of that name; when None "euler" or "heun", as
            `sde_type` says. For a DDE: "euler", "heun" or "rk4"; "rk4" when None. Other problems need none.
        **common: for an ODE, `rtol` and `atol` are the tolerances (1e-6 and 1e-8 for a float64 state, 1e-4 and 1e-6 for
            float32). `max_steps` is how many steps may be tried (4096, and one more for each of `ode.stops_of(prob)`).
            `steps` sets the steps. None leaves them to the method; a method that makes no choice takes one step for
            each interval of the grid. A number gives steps of this length; the last one is shorter if need be.
            Increasing times from t0 to the end give steps between exactly these, in the order of t. Also diffrax's
            `stepsize_controller`, with `dt0` for a constant step, and torchdiffeq's `options` of step_size and
            max_num_steps. For an SDE or a DDE `steps` alone. Without `steps`, an SDE takes one step for each interval
            of its grid, so give a length unless the grid is fine. `solution.stats` has the number of steps and the
            longest one. Steps also end at all times of the grid. Steps of a DDE also end where its solution has kinks
            (and where samples bend, unless `steps` are given), and they are no longer than its shortest delay.

    Steps also end where the inputs x(t) are not smooth, `ode.stops_of(prob)`. These are the times where samples bend,
    unless `steps` are given, and always the `jumps` that a callable names.

    On a grid t the library gives the state. In JAX and with torchode each trial has its own steps; with torchdiffeq all
    trials share them. On a span all trials share the steps. With torchode the nodes come from the trial that took the
    most steps. The state is then read from the dense output at three Gauss points inside each step.

    With some methods a step depends on the steps before it, and `solution.steps` is None. These are torchdiffeq's
    adaptive_heun and fehlberg2 (unless the steps are given), its Adams and scipy methods, and diffrax's methods with
    memory. The dense output of torchdiffeq's bosh3, dopri8 and second-order methods is far less accurate than their
    steps. On a span, or with a grid inside the steps, take "dopri5".

    Raises:
        TypeError, ValueError: the model, the input or the initial state does not fit; a step is random or changes its
            arguments; or the state does not stay finite. Each message says what to do.
        SolveError: some trials of an ODE failed. The error names them, and holds the solution of the others.

    Warns:
        StartWarning: a z0 or inputs of torch carry a gradient, but do not learn.
    Source: torchdiffeq (Chen et al., arXiv:1806.07366); diffrax (Kidger, arXiv:2202.02435).

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.zeros(2, 5, 3))
    >>> kp.solve(problem).stats
    {'steps': 5}
    """
    if not isinstance(
        prob,
        DiscreteProblem | OverTimes | StaticProblem | FixedPointProblem | ImplicitProblem,
    ):
        raise TypeError(
            f"solve takes a problem such as DiscreteProblem(cell, x) or ODEProblem(f, z0, t), got {type_name(prob)}"
        )
    if not isinstance(prob, OverTimes) and (alg is not None or common):
        raise TypeError(
            f"a {type(prob).__name__} is solved in one way; alg must be None, got {alg!r}, without options, got "
            f"{sorted(common)}"
        )
    with full_precision(prob.data), prob.backend.models.left_alone(prob.model):
        now: Any = inputs_without_gradient(prob, stacklevel=3)
        if isinstance(now, OverTimes):
            now = without_gradient(now, stacklevel=3)
            now = now if now.encoder is None else now.remake()  # z0 by the encoder as it is now
            now.backend.solving.check_encoder(now)
            return _solve_over_times(now, alg, common)
        return _solve_discrete(now) if isinstance(now, DiscreteProblem) else solve_implicit(now)


def _solve_over_times(prob: OverTimes, alg: Any, common: dict[str, Any]) -> Solution:
    if isinstance(prob, SDEProblem):
        return solve_sde(prob, alg, common)
    if isinstance(prob, DDEProblem):
        return solve_dde(prob, alg, common)
    assert isinstance(prob, ODEProblem)
    if (method := split_method(alg)) is not None and not added(alg, prob.backend):
        return solve_split(prob, method, common)
    return solve_ode(prob, alg, options_of(prob, common))


def _solve_discrete(prob: DiscreteProblem) -> DiscreteSolution:
    prob = without_gradient(prob, stacklevel=4)
    prob.backend.solving.check_encoder(prob)
    state, start = prob.backend.solving.roll_out(prob)
    times = like_numpy(np.arange(1, state.shape[1] + 1), state)
    return DiscreteSolution(problem=prob, state=state, t=times, stats={"steps": state.shape[1]}, start=start)


def carry_state(prob: DiscreteProblem, mask: Any = None) -> DiscreteProblem:
    """The same trials as one session: each starts from the state at the end of the one before it.

        z_0[b] = z_T[b - 1], with T the last step of trial b - 1

    The network runs over the trials in their order, the first from the problem's own start. The starts that come out
    are given data: they do not learn, and a change of the parameters in one trial does not reach the next.

    Args:
        prob: a recurrent network, without an encoder.
        mask: [trial, time], such as that of a task: a trial ends with its last step that counts. None for all steps.

    Raises:
        TypeError, ValueError: another problem, or a mask of another shape.
    Source: neurogym's environments, which go on from trial to trial; Molano-Mazon et al., PsyArXiv (2022).

    >>> import torch, kpflow_dyn as kp
    >>> problem = kp.DiscreteProblem(torch.nn.GRUCell(3, 8), torch.randn(4, 5, 3))
    >>> session, apart = kp.solve(kp.carry_state(problem)), kp.solve(problem)
    >>> torch.allclose(session.start[1], apart.state[0, -1], atol=1e-6)
    True
    """
    if not isinstance(prob, DiscreteProblem):
        raise TypeError(f"carry_state takes a recurrent network, a kp.DiscreteProblem, got {type_name(prob)}")
    if prob.encoder is not None:
        raise ValueError("the start of this problem learns, so that it cannot be the end of another trial")
    shape = tuple(prob.x.shape[:2])
    counts = np.ones(shape, bool) if mask is None else to_numpy(mask) != 0
    if counts.shape != shape:
        raise ValueError(f"the mask is {list(counts.shape)}, expected [trial, time] = {list(shape)}")
    starts = [solve(prob).start[:1]]  # type: ignore[attr-defined]
    for trial, when in enumerate(counts[:-1]):
        end = 1 + np.flatnonzero(when)[-1] if when.any() else 0
        alone = solve(prob.remake(x=prob.x[trial : trial + 1], z0=starts[-1]))
        starts.append(alone.state[:, end - 1] if end else starts[-1])
    return prob.remake(z0=joined(starts, len(starts)))
