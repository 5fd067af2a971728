"""From a model at rest, or a solved trajectory, to a linear system."""

from itertools import pairwise
from typing import Any

import numpy as np

from kpflow_dyn._arrays import Array, like_numpy, to_numpy
from kpflow_dyn._backend import Backend, backend_for
from kpflow_dyn._problems.checks import check_rows
from kpflow_dyn._problems.events import refuse_hybrid
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.measure import gauss_points
from kpflow_dyn._problems.problems import ODEProblem, Problem
from kpflow_dyn._problems.signatures import INPUTS, STATES, TIMES, begins_with, check_cell, counted, positional
from kpflow_dyn._problems.solutions import ContinuousSolution, DiscreteSolution, ODESolution, Solution
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._problems.steps import AcceptedSteps
from kpflow_dyn._problems.unit_names import names_of_state
from kpflow_dyn._shown import type_name
from kpflow_dyn._spaces.operators import DENSE_BYTES
from kpflow_dyn.control._loops import (
    Loop,
    derivatives,
    is_closed_loop,
    is_stepped_loop,
    loop_of_cell,
    loop_of_field,
    loop_of_plant,
)
from kpflow_dyn.control._systems import LTI, LTV, Mesh, ltv_of, output_matrix
from kpflow_dyn.dynamics._jacobians import jacobians, step_jacobians
from kpflow_dyn.models._discrete import is_discrete

JUMPS = (
    "linearise the field that flows between the jumps; along a solution linearize_ltv gives the system from one time "
    "of its grid to the next"
)


_OF_FIELDS = (
    "A plant is plant(z, u), a field f(t, z) or f(t, z, u), and with dt= a cell cell(u, z). Of an SDE take the drift, "
    "of a DDE a field that passes z for each delayed state"
)
_OF_LOOPS = (
    "A closed loop has no control left: its policy gives it, and u is a reference that the policy sees behind z. Leave "
    "out u, or pass the plant, loop.plant, for A and B of the plant"
)


def linearize_lti(
    model: Any,
    z: Array,
    u: Array | None = None,
    *,
    C: Any = None,
    dt: float | None = None,
    loop: str = "closed",
    inputs: str | None = None,
    t: float = 0.0,
    tol: float = 1e-6,
) -> LTI:
    """The linear system about an equilibrium, with A = D_z f and B = D_u f.

    Args:
        model: one of these. A plant, plant(z, u), as `kp.models.ClosedLoop` takes it: any function of z and u, or one
            of `kp.models`. A closed loop, `kp.models.ClosedLoop(plant, policy)`. A field f(t, z) or f(t, z, u). With
            `dt` a cell, cell(u, z). A model with two arguments is a plant if u is given, or if its arguments are named
            z and u. A model with the attribute `control_size` is always a plant.
        z: the state at rest [unit], a torch tensor or a jax array.
        u: the other input of the model there [input]: a plant's control, a field's or cell's input, a loop's reference.
        C: the outputs [output, unit], or a Linear layer; all states when None.
        dt: the length of a step, if the model gives the next state. None if it gives z', or if a plant in discrete time
            has its own.
        loop, inputs: as in `linearize_ltv`, where u has the role of x.
        t: the time at which a field is called.
        tol: how far z' (or the step) may differ from 0 (or z), relative to 1 + the largest entry of z.

    Raises:
        TypeError: the model cannot be called in this way.
        ValueError: no equilibrium (the message gives the remaining z'); a plant without u; a plant and a policy that do
            not fit together; or a loop or inputs that the model does not have.
    Source: Astrom, Murray, "Feedback Systems" (2008), section 5.4.

    >>> import torch
    >>> from kpflow_dyn import control, models
    >>> upright, no_torque = torch.zeros(2, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    >>> control.linearize_lti(models.Pendulum(), upright, no_torque).A
    array([[0.  , 1.  ],
           [9.81, 0.  ]])
    """
    if isinstance(model, Solution | Problem):
        raise TypeError(
            f"linearize_lti takes a model and a state at rest, such as problem.f and z, got {type_name(model)}; "
            "along the states of a solution take linearize_ltv"
        )
    refuse_hybrid(model, "there is no linear system z' = A z + B u of", JUMPS)
    z, dt = _vector(z, "z", "[unit]"), _step_length(model, dt)
    x = None if u is None else _vector(u, "u", "[input]")
    whole = _loop_at(model, backend_for(z, "z", "[unit]"), dt, inputs, loop, x is not None)
    return _at_rest(whole, z, x, output_matrix(C, len(z)), dt, t, tol)


def plant_at_rest(plant: Any, backend: Backend, z: Array, u: Array, dt: float | None) -> LTI:
    """The same of a plant(z, u), or with `dt` of one that has a step."""
    return _at_rest(loop_of_plant(plant, backend, None, "closed", True), z, u, None, dt)


def _at_rest(
    whole: Loop, z: Array, x: Array | None, C: np.ndarray | None, dt: float | None, t: float = 0.0, tol: float = 1e-6
) -> LTI:
    _check_rest(_value(whole, z, x, t), z, dt, tol)
    row = None if x is None else x[None, None]
    A, B = derivatives(whole, np.array([t]), z[None, None], row)
    return LTI(A[0, 0], B[0, 0], C, dt=dt, names=whole.names)


def _step_length(model: Any, dt: float | None) -> float | None:
    """dt, or that of a plant in discrete time."""
    plant = getattr(model, "plant", model)
    if dt is not None or not is_discrete(plant):
        return dt
    if getattr(plant, "dt", None) is None:
        raise ValueError(f"the plant {plant} moves in steps; give their length, dt=")
    return float(plant.dt)


def _vector(values: Any, what: str, axes: str) -> Array:
    array = check_rows(values, what, axes)
    if array.ndim != 1:
        raise ValueError(f"{what} has shape {tuple(array.shape)}, expected {axes}")
    return array


def _loop_at(model: Any, backend: Backend, dt: float | None, inputs: str | None, loop: str, has_x: bool) -> Loop:
    function_of = backend.models.function_of
    takes_control = hasattr(model, "control_size") or (dt is None and _is_plant(function_of(model), has_x))
    if takes_control and not is_closed_loop(model):
        if not has_x:
            raise ValueError("a plant(z, u) is linearised at z and u; give u, its control at rest [input]")
        return loop_of_plant(model, backend, inputs, loop, has_x)
    if dt is not None and has_x:
        check_cell(model, function_of, stacklevel=3)
    is_field = is_closed_loop(model) or dt is None
    field = model if is_field else lambda t, z, *x: model(*x, z)
    return loop_of_field(field, backend, inputs, loop, has_x)


def _is_plant(function: Any, has_u: bool) -> bool:
    """Whether it is plant(z, u) and no field f(t, z): by its names, or as it is given u and takes no third argument."""
    if counted(function) != 2:
        return False
    named = begins_with(function, STATES | {"x", "y", "s"}, INPUTS | {"control", "action", "a"})
    return named is not None or (has_u and positional(function)[0].name not in TIMES)  # type: ignore[index]


def _value(loop: Loop, z: Array, x: Array | None, t: float) -> np.ndarray:
    """The velocity or next state, by the model's own call, which checks its parts."""
    try:
        value = loop.call(like_numpy(np.asarray(t, np.float64), z), z, x)
    except (TypeError, RuntimeError) as error:
        advice = _OF_LOOPS if loop.policy is not None else _OF_FIELDS
        raise TypeError(f"the model cannot be called on t, z and its inputs: {error}. {advice}") from error
    if tuple(value.shape) != tuple(z.shape):
        raise ValueError(f"the model gave {tuple(value.shape)} for z {tuple(z.shape)}, expected the shape of z")
    return to_numpy(value)


def _check_rest(value: np.ndarray, z: Array, dt: float | None, tol: float) -> None:
    rest = value - (0 if dt is None else to_numpy(z))
    left, size = float(np.abs(rest).max()), 1 + float(np.abs(to_numpy(z)).max())
    if not left <= tol * size:
        raise ValueError(
            f"z is no equilibrium: {'its velocity' if dt is None else 'its step'} is {left:.2e}, more than tol = {tol} "
            f"times {size:.3g}; find one (kp.dynamics.fixed_points, scipy.optimize.root), give u, or raise tol"
        )


# Along trajectories


def linearize_ltv(
    sol: Solution, *, loop: str = "closed", inputs: str | None = None, C: Any = None, t: Any = None
) -> LTV:
    """The linear system along each trial of a solution, A = D_z f and B = D_u f there.

    Args:
        sol: of an `ODEProblem` or a `DiscreteProblem`. Of a hybrid model or a sampled loop the system is in discrete
            time, from one time of the grid to the next, over all jumps between. So it is of an SDE, along its paths,
            and of a DDE, whose units are those of the state and then of the earlier ones that its steps look up.
        loop: of a ClosedLoop, "closed" for A of the whole field, "open" for that of its plant under the control held:
            the states are those of the plant alone, without a memory of the policy and the like.
        inputs: where inputs enter: "control", a ClosedLoop's u; "x", the problem's x_t; "kicks" to the state, B = 1.
            The control of a ClosedLoop and x of others when None, kicks of hybrid models. The control of a sampled loop
            is that which the policy gave last, changed behind the time before; with loop="open" that which acts on the
            plant, held from one time to the next. Take the sampling times as the grid. Of an SDE or a DDE kicks alone,
            to the state.
        C: the outputs [output, unit], or a Linear layer; all states when None.
        t: the times of an ODE's system [time]; its grid when None, or on a span the ends of the solver's steps. In
            between, A and B are taken at three Gauss points of each of the solver's steps.

    The units have the plant's names, where it tells them, then memory[i], and of a sampled loop held[i] and waiting[i].
    `dt` is the time between the times of the grid, NaN where these are not evenly spaced; of a discrete problem that of
    its plant, or 1.

    Raises:
        TypeError: no solution.
        ValueError: a loop or inputs that the model has not got, times outside of the solved ones, steps that cannot be
            replayed, or states so wide that the matrices would take more than 2 GiB.
    Source: Sontag, "Mathematical Control Theory" (1998), section 2.8.

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> loop = kp.models.ClosedLoop(kp.models.Pendulum(), torch.nn.Linear(2, 1).double())
    >>> start = torch.zeros(3, 2, dtype=torch.float64)
    >>> system = kp.control.linearize_ltv(kp.solve(kp.ODEProblem(loop, start, [0.0, 0.5, 1.0])))
    >>> dict(system.B.sizes), system.A.sel(unit="angle", from_unit="angular_velocity").values[0]
    ({'trial': 3, 'time': 3, 'unit': 2, 'input': 1}, array([1., 1., 1.]))
    """
    if not isinstance(sol, Solution):
        raise TypeError(f"linearize_ltv takes the Solution that solve returns, got {type_name(sol)}")
    C = output_matrix(C, _seen_units(sol, loop))
    if isinstance(sol, HybridSolution):
        return _along_jumps(sol, inputs, loop, C, t)
    if isinstance(sol, DiscreteSolution):
        if t is not None:
            raise ValueError("a discrete problem has the times of its steps; leave t=None")
        return _along_steps(sol, inputs, loop, C)
    if isinstance(sol, SteppedSolution):
        return _along_own_steps(sol, inputs, loop, C, t)
    if not isinstance(sol, ODESolution):
        kind = type(sol.problem).__name__
        raise ValueError(f"a {kind} has no trajectory; linearize_lti takes a model at rest")
    return _along_equation(sol, inputs, loop, C, t)


def _seen_units(sol: Solution, loop: str) -> int:
    """How many states the system has: of an open loop those of its plant."""
    model: Any = getattr(sol.problem, "cell", getattr(sol.problem, "f", None))
    units = int(sol.state.shape[-1])
    if loop != "open":
        return units
    if is_stepped_loop(model):
        return int(model.plant.state_size)
    return int(model.sampling.state) if hasattr(model, "sampling") else units


def _along_steps(sol: DiscreteSolution, inputs: str | None, loop: str, C: np.ndarray) -> LTV:
    _check_size(sol, 1)
    step = loop_of_cell(sol.problem, inputs, loop)
    A, B = derivatives(step, np.zeros(sol.state.shape[1]), sol.before, sol.problem.x)
    dt = float(getattr(getattr(sol.problem.cell, "plant", None), "dt", None) or 1.0)
    return ltv_of(to_numpy(sol.t).astype(float), A, B, C, np.zeros((len(C), B.shape[-1])), step.names, dt=dt)


def _along_jumps(sol: HybridSolution, inputs: str | None, loop: str, C: np.ndarray, t: Any) -> LTV:
    """From one time of the grid to the next, over all jumps between."""
    check_forward(sol)
    _check_size(sol, 1)
    sampling = getattr(sol.problem.f, "sampling", None)
    chosen = inputs or ("control" if sampling is not None else "kicks")
    if t is not None or chosen not in ("control", "kicks") or (sampling is None and loop != "closed"):
        raise ValueError(
            f"of a hybrid model there is the closed loop, at the times of its grid, with inputs='kicks' to the state, "
            f"or of a sampled loop inputs='control' and loop='open' as well; got loop={loop!r}, inputs={inputs!r}, "
            f"t={t!r}"
        )
    if chosen == "control" and sampling is None:
        raise ValueError("inputs='control' needs kp.models.ClosedLoop(plant, policy, every=dt); take 'kicks'")
    A = to_numpy(step_jacobians(sol)).astype(float)
    B, names = np.eye(A.shape[-1])[None, None], names_of_state(sol.problem, A.shape[-1])
    if sampling is not None and chosen == "control":  # of the newest, until the next time; none before the first
        B = np.concatenate([0 * A[:, :1], A[:, 1:]], 1)[..., -sampling.control :]
    if sampling is not None and loop == "open":
        A, B, names = _of_plant(sol, A, chosen)
    return ltv_of(sol.t, A, B, C, np.zeros((len(C), B.shape[-1])), names, dt=_step_of(sol.t))


def _step_of(t: np.ndarray) -> float:
    """The time between the times of a grid; NaN where these are not the same."""
    steps = np.diff(t)
    return float(steps[0]) if np.allclose(steps, steps[0], rtol=1e-6, atol=0) else np.nan


def _of_plant(sol: HybridSolution, A: np.ndarray, inputs: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The plant of a sampled loop from one time of the grid to the next, under a control that is held in between."""
    plant, sampling = sol.problem.f.plant, sol.problem.f.sampling
    moved, units, first = A[..., : sampling.state, :], sampling.state, sampling.state + sampling.memory
    B = np.eye(units)[None, None]
    if inputs == "control":
        parts = 1 + (sampling.delayed[1] > 0)  # where a control acts between two samples, that before it as well
        held = [moved[..., first + i * sampling.control :][..., : sampling.control] for i in range(parts)]
        B = sum(held[1:], held[0])
        B = np.concatenate([0 * B[:, :1], B[:, 1:]], 1)
    return moved[..., :units], B, tuple(getattr(plant, "state_names", ()))


def _along_own_steps(sol: SteppedSolution, inputs: str | None, loop: str, C: np.ndarray, t: Any) -> LTV:
    """From one time of the grid of an SDE or a DDE to the next, of all that a step begins with."""
    width, units = sol.start.shape[-1], sol.state.shape[-1]
    _check_size(sol, (width / units) ** 2)
    if t is not None or loop != "closed" or inputs not in (None, "kicks"):
        raise ValueError(
            f"of this {type_name(sol.problem)} there is the system at the times of its grid, with inputs='kicks' "
            f"to the state; got loop={loop!r}, inputs={inputs!r}, t={t!r}"
        )
    A, B = to_numpy(jacobians(sol, between_times=True)).astype(float), np.eye(width)[None, None, :, :units]
    C = np.concatenate([C, np.zeros((len(C), width - units))], 1)
    names = names_of_state(sol.problem, width)
    return ltv_of(np.asarray(sol.t), A, B, C, np.zeros((len(C), units)), names, dt=_step_of(np.asarray(sol.t)))


def along_steps_inputs(sol: DiscreteSolution, inputs: str | None) -> np.ndarray:
    """B alone of each step of a discrete problem [trial, time, unit, input]."""
    step = loop_of_cell(sol.problem, inputs, "closed")
    return derivatives(step, np.zeros(sol.state.shape[1]), sol.before, sol.problem.x, of_state=False)[0]


def _along_equation(sol: ODESolution, inputs: str | None, loop: str, C: np.ndarray, t: Any) -> LTV:
    check_forward(sol)
    edges, times = mesh_edges(sol, t)
    _check_size(sol, 4 * len(edges) / sol.state.shape[1])
    whole = loop_of_field(sol.problem.f, sol.problem.backend, inputs, loop, sol.problem.x is not None)
    nodes = gauss_points(edges)[0]
    A, B = derivatives(whole, *states_at(sol, np.append(nodes, times)))
    inside = [M[:, : len(nodes)].reshape((len(M), -1, 3, *M.shape[2:])) for M in (A, B)]
    mesh = Mesh(edges, np.searchsorted(edges, times), *inside)
    D = np.zeros((len(C), B.shape[-1]))
    return ltv_of(times, A[:, len(nodes) :], B[:, len(nodes) :], C, D, whole.names, mesh)


def check_forward(sol: ContinuousSolution) -> None:
    """Raise where time runs backward."""
    if sol.problem.form.backward:
        raise ValueError(
            "time runs backward along this solution, and control asks what inputs do later on; solve forward from the "
            "state at the earliest time, problem.remake(z0=problem.unflatten(solution.state[:, -1]), t=t[::-1])"
        )


def states_at(sol: Any, times: np.ndarray) -> tuple[np.ndarray, Array, Array | None]:
    """Times [n] with the states and inputs there, by the solver's dense output."""
    every = np.broadcast_to(times, (len(sol.state), len(times)))
    return times, sol(times), inputs_at(sol.problem, every)


def mesh_edges(sol: ODESolution, t: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the intervals to integrate over, and those of them that are wanted as times."""
    problem, steps = sol.problem, sol.steps
    if steps is None:
        raise ValueError(
            f"the steps of {sol.alg!r} are not known, so neither is how finely A(t) must be taken; solve with a "
            "Runge-Kutta method"
        )
    ends = np.unique(np.append(problem.t, _wanted(problem, t)))
    edges = _with_steps(ends, steps)
    return edges, _wanted(problem, edges if problem.is_span and t is None else t)


def _wanted(problem: ODEProblem, t: Any) -> np.ndarray:
    times = problem.t if t is None else np.unique(np.asarray(t, np.float64))
    low, high = problem.t[0], problem.t[-1]
    outside = ~((times >= low) & (times <= high))
    if outside.any():
        raise ValueError(f"t = {times[outside][0]} lies outside of the solved span [{low}, {high}]")
    return times


def _with_steps(ends: np.ndarray, steps: AcceptedSteps) -> np.ndarray:
    """Times, with those of the solver's steps in between.

    Where trials have steps of their own, an interval is divided evenly, into as many parts as any of them has steps.
    """
    times = steps.t + steps.dt
    if (times == times[0]).all():
        inside = times[0][(times[0] > ends[0]) & (times[0] < ends[-1])]
        near = np.abs(inside[:, None] - ends).min(1) <= 1e-12 * np.abs(ends).max()
        return np.union1d(ends, inside[~near])
    most = [int(((times > a) & (times < b)).sum(1).max()) for a, b in pairwise(ends)]
    parts = [np.linspace(a, b, n + 1, endpoint=False) for (a, b), n in zip(pairwise(ends), most, strict=True)]
    return np.append(np.concatenate(parts), ends[-1])


def _check_size(sol: Solution, times: float) -> None:
    trials, steps, units = sol.state.shape
    needed = int(8 * trials * steps * times * units**2)
    if needed > DENSE_BYTES:
        raise ValueError(
            f"the matrices A would take {needed / 2**30:.1f} GiB, more than {DENSE_BYTES / 2**30:.0f} GiB; take fewer "
            "trials or times; of a recurrent model gram_operator needs no matrices"
        )
