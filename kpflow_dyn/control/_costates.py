"""Costates of a cost along trajectories: how a kick to the state at any time would change it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr
from scipy.linalg import expm

from kpflow_dyn._arrays import Array, array_namespace, full_precision, like_numpy, to_numpy
from kpflow_dyn._backend import Backend, Transforms
from kpflow_dyn._flows.flow import Flow, RecurrentFlow
from kpflow_dyn._linearize import linearize
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.hybrid import HybridSolution
from kpflow_dyn._problems.measure import gauss_points
from kpflow_dyn._problems.problems import DiscreteProblem
from kpflow_dyn._problems.solutions import DiscreteSolution, ODESolution, Solution
from kpflow_dyn._problems.stepped import SteppedSolution
from kpflow_dyn._problems.unit_names import names_of_state
from kpflow_dyn._shown import Shown, ShownAsRepr, type_name
from kpflow_dyn._solve import solve
from kpflow_dyn.control._beside import Arguments, beside_cost, with_control
from kpflow_dyn.control._forms import real
from kpflow_dyn.control._linearisation import along_steps_inputs, check_forward, linearize_ltv, states_at
from kpflow_dyn.control._loops import (
    Loop,
    derivatives,
    is_closed_loop,
    is_stepped_loop,
    loop_of_cell,
    loop_of_field,
    rows_of,
)
from kpflow_dyn.control._magnus import magnus, transposed
from kpflow_dyn.control._regulators import check_weight
from kpflow_dyn.control._systems import LTV, as_matrix, coordinates, leading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cost = Callable[..., Array]


@dataclass(frozen=True, eq=False, repr=False)
class QuadraticCost(Shown):
    """L(z, u) = (z - target)^T Q (z - target) + (u - u_target)^T R (u - u_target), without halves.

    Args:
        Q: [unit, unit], symmetric and positive semi-definite.
        R: [input, input], symmetric and positive definite; no cost of the input when None.
        target: [unit]; the origin when None.
        u_target: [input], such as the input that holds the state at its target; zero when None.

    Raises:
        ValueError: matrices of other shapes, not symmetric or indefinite; when called, of another width than z or u.
    Source: Astrom, Murray, "Feedback Systems" (2008), section 6.3.

    >>> import numpy as np
    >>> from kpflow_dyn import control
    >>> float(control.QuadraticCost(np.eye(2), [[2.0]])(np.array([1.0, 2.0]), np.array([3.0])))
    23.0
    """

    Q: Any
    R: Any = None
    target: Any = None
    u_target: Any = None

    def __post_init__(self) -> None:
        n = len(as_matrix(self.Q, "Q", (None, None)))
        object.__setattr__(self, "Q", check_weight(self.Q, "Q", n, definite=False))
        if self.R is not None:
            m = len(as_matrix(self.R, "R", (None, None)))
            object.__setattr__(self, "R", check_weight(self.R, "R", m, definite=True))
            object.__setattr__(self, "u_target", _target(self.u_target, "u_target", "input", m))
        elif self.u_target is not None:
            raise ValueError("u_target is for a cost of the input, and R is None")
        object.__setattr__(self, "target", _target(self.target, "target", "unit", n))

    def __call__(self, z: Array, u: Array | None = None) -> Array:
        """The cost [...] of states z [..., unit] under inputs u [..., input]."""
        cost = _form(self.Q, z, "Q", self.target)
        return cost if self.R is None or u is None else cost + _form(self.R, u, "R", self.u_target)


def check_cost(cost: Any, name: str, units: int, inputs: int | None = None, has_control: bool = False) -> None:
    """Raise unless a cost is one of states [unit], and of a control [input] where there is one."""
    call = f"{name}(z, u)" if has_control else f"{name}(z)"
    if cost is None:
        return
    if not callable(cost) or isinstance(cost, type):
        raise TypeError(
            f"{name} is {type_name(cost)}, expected a function {call} of one state, which gives one number, "
            "kp.control.QuadraticCost(Q, R), or None"
        )
    if isinstance(cost, QuadraticCost):
        _check_width(cost.Q, f"Q of the {name}", units, "states")
        if cost.R is not None and not has_control:
            raise ValueError(f"{name} has R, of a control, but is called as {call}: {_NO_CONTROL}")
        if inputs is not None and cost.R is not None:
            _check_width(cost.R, f"R of the {name}", inputs, "controls")
        return
    try:
        inspect.signature(cost).bind(*("z", "u")[: 1 + has_control])
    except TypeError as error:
        why = (
            "with the plant's state and its control" if has_control else "with the state alone: it has no control here"
        )
        raise TypeError(
            f"{name} takes {inspect.signature(cost)}, but is called as {call}, {why}"
            + ("" if has_control else ' (that of a ClosedLoop comes with inputs="control")' * (name == "cost"))
        ) from error
    except ValueError:  # it does not say what it takes
        return


_NO_CONTROL = (
    'the model does not say what its control is, or inputs= is not "control", or it is the cost at the end. Pose a '
    "ClosedLoop(plant, policy), or around contacts a sampled one, Hybrid(ClosedLoop(plant, policy, every=dt), "
    "*events); or leave R out"
)


def _check_width(weight: np.ndarray, what: str, expected: int, of: str) -> None:
    if len(weight) != expected:
        raise ValueError(f"{what} has shape {weight.shape}, expected [{expected}, {expected}], of the {expected} {of}")


def _target(values: Any, what: str, axis: str, n: int) -> np.ndarray:
    target = np.zeros(n) if values is None else real(values, what)
    if target.shape != (n,):
        raise ValueError(f"{what} has shape {target.shape}, expected [{axis}] = ({n},)")
    return target


def _form(Q: np.ndarray, z: Array, what: str, target: np.ndarray) -> Array:
    if z.shape[-1] != len(Q):
        raise ValueError(f"{what} has shape {Q.shape}, expected [{z.shape[-1]}, {z.shape[-1]}]")
    off = z - like_numpy(target, z)
    return array_namespace(z).sum((off @ like_numpy(Q, z)) * off, axis=-1)


@dataclass(frozen=True, eq=False)
class Costates(ShownAsRepr):
    """The costates of a cost along each trial.

    Attributes:
        costate: l [trial, time, unit].
        gradient: B^T l + grad_u L, the change of the cost by an input that is added at a time (in continuous time, for
            unit time) [trial, time, input].
        cost: J of each trial [trial].
        cost_to_go: what of J comes from each time on, int_t^T L dt + M [trial, time]; in discrete time from this step
            on.

    Example as `adjoint`.
    """

    costate: xr.DataArray
    gradient: xr.DataArray
    cost: xr.DataArray
    cost_to_go: xr.DataArray

    def __repr__(self) -> str:
        trials, times, units = self.costate.shape
        sizes = f"{trials} trials, {times} times, {units} states, {self.gradient.sizes['input']} inputs"
        return f"Costates({sizes}; cost {leading(self.cost.values)})"

    def to_xarray(self) -> xr.Dataset:
        """A dataset of all attributes."""
        import xarray as xr

        return xr.Dataset({name: getattr(self, name) for name in ("costate", "gradient", "cost", "cost_to_go")})

    def plot(self, dark: bool = False) -> Figure:
        """The costates of the first trial, and the size of the gradient in the input of all."""
        from kpflow_dyn.figures import _control as figures

        return figures.costates(self, dark=dark)


def adjoint(
    sol: Solution,
    cost: Cost | None,
    terminal: Cost | None = None,
    *,
    inputs: str | None = None,
    t: Any = None,
    sampled: bool = False,
) -> Costates:
    """The costates of a running and a terminal cost, and the gradient in the input.

        J = int L(z, u) dt + M(z(T))        -l' = A^T l + grad_z L,   l(T) = grad M        dJ/du = B^T l + grad_u L

    In discrete time J = sum_t L(z_t, u_t) + M(z_T), and l = P^T grad_z L, exactly; u_t is the control of the step that
    made z_t. Along a ClosedLoop the control is that of its policy, and the gradient is the one in what is added to it:
    at an optimal policy it is zero. For an ODE the sweep is of sixth order on the solver's steps, where `flow.P` is of
    second order on the nodes. Of an SDE or a DDE J is that of the trapezoidal rule on the grid, and l its exact
    derivative by a kick to the state at a time of the grid.

    Along jumps, those of hybrid models and of sampled loops, the integral is one more state of the model, so that it is
    integrated by the solver's own steps up to each event and on behind it, and changes with the time of the event; l is
    the exact derivative of these steps and jumps (with the saltation matrix at events), at the times of the grid, where
    there is a jump behind it. Of a sampled loop u is the held control, and the gradient the derivative in what is added
    to a sample's control; take the sampling times as the grid.

    Args:
        sol: of an `ODEProblem` or a `DiscreteProblem`.
        cost: L(z) of states [unit] of one trial and time, made of the framework's own functions; of a ClosedLoop with
            inputs="control", L(z, u) with z the plant's state, without a memory and the like; `QuadraticCost(Q, R)`; or
            None. It may not depend on the time. A flow of a hybrid model may be a ClosedLoop.
        terminal: M(z) likewise, at the last time.
        inputs: as in `linearize_ltv`.
        t: the times of an ODE's costates, as in `linearize_ltv`.
        sampled: along jumps, whether J is a sum over the times of the grid in the place of the integral: of the states
            there, behind jumps, and of the control that is held from there on.

    Raises:
        TypeError, ValueError: no solution, no cost at all, one of other arguments or of another width than the state
            and the control, or one that is no number for each state.
    Source: Pontryagin et al., "The Mathematical Theory of Optimal Processes" (1962); Bryson, Ho, "Applied Optimal
    Control" (1975), chapter 2.

    >>> import torch
    >>> import kpflow_dyn as kp
    >>> loop = kp.models.ClosedLoop(kp.models.DoubleIntegrator(), torch.nn.Linear(2, 1).double())
    >>> sol = kp.solve(kp.ODEProblem(loop, torch.ones(3, 2, dtype=torch.float64), [0.0, 0.5, 1.0]))
    >>> found = kp.control.adjoint(sol, lambda z, u: z[0] ** 2 + u[0] ** 2)
    >>> found.costate.sizes["unit"], found.costate.values[:, -1].tolist()
    (2, [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    """
    if cost is None and terminal is None:
        raise ValueError("adjoint needs a running cost, a terminal one, or both")
    if not isinstance(sol, Solution):
        raise TypeError(f"adjoint takes the Solution that solve returns, got {type_name(sol)}")
    if isinstance(sol, HybridSolution):
        return along_jumps(sol, cost, terminal, inputs, t, sampled).costates
    if sampled:
        raise ValueError("sampled=True is of hybrid models and sampled loops; other costs are sums or integrals anyway")
    if isinstance(sol, DiscreteSolution):
        steers = is_stepped_loop(sol.problem.cell) and inputs in (None, "control")
        return along_loop(sol, cost, terminal).costates if steers else _along_steps(sol, cost, terminal, inputs)
    ltv = linearize_ltv(sol, inputs=inputs, t=t)
    if isinstance(sol, SteppedSolution):
        return _along_own_steps(sol, ltv, cost, terminal)
    assert isinstance(sol, ODESolution)
    return _along_equation(sol, ltv, cost, terminal, inputs)


def _along_steps(sol: DiscreteSolution, cost: Cost | None, terminal: Cost | None, inputs: str | None) -> Costates:
    problem = sol.problem
    step = loop_of_cell(problem, inputs, "closed")
    check_costs(cost, terminal, int(sol.state.shape[-1]))
    values, slopes, _ = _slopes(step, cost, np.zeros(sol.state.shape[1]), sol.state, problem.x)
    last, end = terminal_of(terminal, sol.state[:, -1:], problem.backend.transforms)
    slopes[:, -1] += end
    costates = to_numpy(linearize(sol).P.T.mv(like_numpy(slopes, sol.state))).astype(float)
    gradient = np.einsum("btnm,btn->btm", along_steps_inputs(sol, inputs), costates)
    to_go = np.cumsum(values[:, ::-1], 1)[:, ::-1] + last[:, None]
    return _labelled(to_numpy(sol.t).astype(float), step.names, costates, gradient, to_go[:, 0], to_go)


def check_costs(cost: Any, terminal: Any, units: int, inputs: int | None = None, has_control: bool = False) -> None:
    """Raise unless a running and a terminal cost are such ones."""
    check_cost(cost, "cost", units, inputs, has_control)
    check_cost(terminal, "terminal", units)


def control_size(model: Any) -> int | None:
    """Of a closed loop, where its plant says it."""
    if hasattr(model, "sampling"):
        return model.sampling.control
    size = getattr(getattr(getattr(model, "flow", model), "plant", None), "control_size", None)
    return size if isinstance(size, int) else None


class Swept(NamedTuple):
    """Costates, with those of all states that a flow has: of what stands beside the model's own as well."""

    costates: Costates
    whole: np.ndarray  # [trial, time, unit of the flow]
    flow: Flow


def along_loop(sol: DiscreteSolution, cost: Cost | None, terminal: Cost | None, params: Choice = None) -> Swept:
    """Of a closed loop in discrete time, with its control beside its state."""
    problem, units = with_control(sol.problem)
    check_costs(cost, terminal, sol.problem.cell.plant.state_size, control_size(sol.problem.cell), True)
    flow = _flow_of(solve(problem), params)
    state, plant = flow.solution.state, sol.problem.cell.plant.state_size
    values, slopes = _at_rows(problem.backend, cost, state[..., :plant], state[..., units:])
    last, end = terminal_of(terminal, state[:, -1:, :plant], problem.backend.transforms)
    slopes[0][:, -1] += end
    between = np.zeros((*state.shape[:2], units - plant))
    whole = _pulled_back(flow, np.concatenate([slopes[0], between, slopes[1]], -1))
    B = along_steps_inputs(sol, "control")
    gradient = np.einsum("btnm,btn->btm", B, whole[..., :units]) + slopes[1]
    to_go = np.cumsum(values[:, ::-1], 1)[:, ::-1] + last[:, None]
    names = names_of_state(sol.problem, units)
    time = to_numpy(sol.t).astype(float)
    return Swept(_labelled(time, names, whole[..., :units], gradient, to_go[:, 0], to_go), whole, flow)


def along_jumps(
    sol: HybridSolution,
    cost: Cost | None,
    terminal: Cost | None,
    inputs: str | None,
    t: Any = None,
    sampled: bool = False,
    params: Choice = None,
) -> Swept:
    """Of a hybrid model or a sampled loop; an integral is one more state, a sum one of the states at the grid."""
    check_forward(sol)
    if sol.problem.is_span:  # on which another solve would choose times of its own
        sol = again(sol, sol.problem.remake(t=np.unique(np.append(sol.t, sol.problem.t))))
    model, problem, units = sol.problem.f, sol.problem, int(sol.state.shape[-1])
    held, steers = hasattr(model, "sampling"), is_closed_loop(getattr(model, "flow", None)) and not sampled
    chosen = inputs or ("control" if held or steers else "kicks")
    if t is not None or chosen not in (("control", "kicks") if held or steers else ("kicks",)):
        raise ValueError(
            "along jumps there are costates at the times of the grid, with inputs='kicks' to the state, or with "
            "inputs='control' of a ClosedLoop (of one that is sampled, where sampled=True); got "
            f"inputs={inputs!r}, t={t!r}"
        )
    arguments, of = Arguments(chosen == "control"), problem.backend.transforms
    width = model.sampling.state if held and arguments.has_control else units
    check_costs(cost, terminal, width, control_size(model), arguments.has_control)
    summed = sampled or cost is None
    solved = sol if summed else again(sol, beside_cost(problem, cost, arguments.has_control))
    flow = _flow_of(solved, params)
    state = flow.solution.state
    last, end = terminal_of(terminal, state[:, -1:, :width], of)
    slopes = np.zeros(state.shape)
    slopes[:, -1, :width] = end
    if summed:
        values, parts = _at_rows(problem.backend, cost, *arguments(model, sol.state, None))
        places = [slice(0, width), *([model.sampling.of_held] if held and arguments.has_control else [])]
        for place, part in zip(places, parts, strict=True):
            slopes[..., place] += part
        to_go = np.cumsum(values[:, ::-1], 1)[:, ::-1] + last[:, None]
    else:
        slopes[:, -1, units:] = 1
        done = to_numpy(state)[..., units].astype(float)
        to_go = done[:, -1:] - done + last[:, None]
    whole = _pulled_back(flow, slopes)
    costates = whole[..., :units]
    gradient = costates
    if arguments.has_control:
        gradient = costates[..., -model.sampling.control :] if held else _pushed(sol, cost, costates)
    names = names_of_state(problem, units)
    return Swept(_labelled(sol.t, names, costates, gradient, to_go[:, 0], to_go), whole, flow)


def again(sol: Any, problem: Any) -> Any:
    """Another problem, solved as this solution was."""
    return solve(problem) if isinstance(problem, DiscreteProblem) else solve(problem, sol.alg, **sol.options)


def _flow_of(sol: Any, params: Choice) -> RecurrentFlow:
    flow = linearize(sol, params=params)
    assert isinstance(flow, RecurrentFlow)
    return flow


def _pushed(sol: HybridSolution, cost: Cost | None, costates: np.ndarray) -> np.ndarray:
    """B^T l + grad_u L of a ClosedLoop that flows between jumps, at the grid."""
    problem = sol.problem
    loop = loop_of_field(problem.f.flow, problem.backend, "control", "closed", problem.x is not None)
    at = states_at(sol, sol.t)
    B = derivatives(loop, *at, of_state=False)[0]
    return np.einsum("btnm,btn->btm", B, costates) + _slopes(loop, cost, *at)[2]


def _pulled_back(flow: RecurrentFlow, q: np.ndarray) -> np.ndarray:
    """P^T q [trial, time, unit], without the measure of the flow's spaces."""
    measure = flow.P.domain.measure
    weights = 1.0 if measure is None else to_numpy(measure).astype(float)
    return to_numpy(flow.P.T.mv(like_numpy(q / weights, flow.solution.state))).astype(float) * weights


def _at_rows(backend: Backend, cost: Cost | None, *rows: Array) -> tuple[np.ndarray, list[np.ndarray]]:
    """The cost of rows [trial, time, ...], and its gradient in each of them."""
    if cost is None:
        return np.zeros(rows[0].shape[:2]), [np.zeros(row.shape) for row in rows]

    def with_gradients(*row: Array) -> list[Array]:
        value, pull = backend.transforms.vjp(lambda *row: _one_number(cost(*row), row[0]), *row)[:2]
        return [value, *pull(value * 0 + 1)]

    with full_precision(rows[0]):
        values, *slopes = backend.transforms.each_row(with_gradients, *rows)
    return to_numpy(values).astype(float), [to_numpy(slope).astype(float) for slope in slopes]


def _along_own_steps(sol: SteppedSolution, ltv: LTV, cost: Cost | None, terminal: Cost | None) -> Costates:
    """Exact derivatives of the cost by the trapezoidal rule on the grid, in kicks to the state at its times."""
    of, units, A = sol.problem.backend.transforms, sol.state.shape[-1], ltv.A.values
    check_costs(cost, terminal, units)
    values, slopes = _of_states(cost, sol.state, of)
    last, end = terminal_of(terminal, sol.state[:, -1:], of)
    assert sol.weights is not None
    kicks = np.zeros(A.shape[:3])
    kicks[..., :units] = slopes * sol.weights[:, None]
    kicks[:, -1, :units] += end
    for k in range(len(ltv.time) - 2, -1, -1):
        kicks[:, k] += np.einsum("bnm,bn->bm", A[:, k + 1], kicks[:, k + 1])
    parts = (values[:, :-1] + values[:, 1:]) / 2 * np.diff(ltv.time)
    to_go = np.cumsum(np.concatenate([parts, last[:, None]], 1)[:, ::-1], 1)[:, ::-1]
    return _labelled(ltv.time, ltv.names[:units], kicks[..., :units], kicks[..., :units], to_go[:, 0], to_go)


def _along_equation(
    sol: ODESolution, ltv: LTV, cost: Cost | None, terminal: Cost | None, inputs: str | None
) -> Costates:
    problem, mesh = sol.problem, ltv.mesh
    assert mesh is not None
    field = loop_of_field(problem.f, problem.backend, inputs, "closed", problem.x is not None)
    units, has_control = int(sol.state.shape[-1]), field.inputs == "control"
    check_costs(cost, terminal, units, control_size(problem.f), has_control)
    nodes, weights = gauss_points(mesh.edges)
    inside = len(nodes)
    values, slopes, direct = _slopes(field, cost, *states_at(sol, np.append(nodes, ltv.time)))
    last, end = terminal_of(terminal, sol(mesh.edges[-1:]), problem.backend.transforms)
    driven = slopes[:, :inside].reshape((*mesh.A.shape[:3], -1))
    costates = _backward(mesh.A, driven, end, np.diff(mesh.edges))[:, mesh.at]
    gradient = direct[:, inside:] + np.einsum("btnm,btn->btm", ltv.B.values, costates)
    parts = (values[:, :inside] * weights).reshape((len(values), -1, 3)).sum(-1)  # of each interval
    to_go = np.cumsum(np.concatenate([parts, last[:, None]], 1)[:, ::-1], 1)[:, ::-1]
    return _labelled(ltv.time, ltv.names, costates, gradient, to_go[:, 0], to_go[:, mesh.at])


def _backward(A: np.ndarray, slopes: np.ndarray, end: np.ndarray, h: np.ndarray) -> np.ndarray:
    """-l' = A^T l + slope from l = end, at the ends of all intervals [trial, step + 1, unit]."""
    with_slope = np.concatenate([-transposed(A), -slopes[..., None]], -1)
    back = expm(-magnus(np.concatenate([with_slope, 0 * with_slope[..., :1, :]], -2), h))
    costate = np.concatenate([end, np.ones((len(end), 1))], -1)[..., None]
    found = [costate]
    for k in reversed(range(len(h))):
        found.append(costate := back[:, k] @ costate)
    return np.stack(found[::-1], 1)[..., :-1, 0]


def _slopes(loop: Loop, cost: Cost | None, t: np.ndarray, z: Array, x: Array | None) -> tuple[np.ndarray, ...]:
    """L [trial, time], and its gradients in z and in the input [trial, time, ...]."""
    rows, (_, *data) = rows_of(loop, t, z, x)
    if cost is None:
        return tuple(np.zeros(shape) for shape in (z.shape[:2], z.shape, rows[2].shape))

    def of_row(t: Array, z: Array, v: Array, *x: Array) -> Array:
        u = (loop.control(z, z, x[0] if x else None) + v,) if loop.inputs == "control" else ()
        return _one_number(cost(z, *u), z) + 0 * v.sum()

    return _with_gradients(loop.backend.transforms, of_row, rows, data)


def terminal_of(terminal: Cost | None, z: Array, of: Transforms) -> tuple[np.ndarray, np.ndarray]:
    """M [trial] and its gradient [trial, unit] at the last states [trial, 1, unit]."""
    values, slopes = _of_states(terminal, z, of)
    return values[:, 0], slopes[:, 0]


def _of_states(cost: Cost | None, z: Array, of: Transforms) -> tuple[np.ndarray, np.ndarray]:
    """A cost of states alone [trial, time], and its gradient [trial, time, unit]."""
    if cost is None:
        return np.zeros(tuple(z.shape[:2])), np.zeros(tuple(z.shape))
    rows = [z[..., 0], z, z]
    values, slopes, _ = _with_gradients(of, lambda t, z, v: _one_number(cost(z), z) + 0 * v.sum(), rows, [])
    return values, slopes


def _one_number(value: Array, z: Array) -> Array:
    if getattr(value, "shape", None) != ():
        got = getattr(value, "shape", type_name(value))
        raise ValueError(
            f"the cost of one state gave {got}, expected one number; it is called on z [unit], or on z and u [input] "
            "of a ClosedLoop"
        )
    return value + 0 * z.sum()


def _with_gradients(of: Transforms, of_row: Cost, rows: list[Array], data: list[Array]) -> tuple[np.ndarray, ...]:
    """Values of of_row(t, z, v, *data), and their gradients in z and in v, at rows [trial, time, ...]."""

    def with_gradients(t: Array, z: Array, v: Array, *data: Array) -> list[Array]:
        value, pull = of.vjp(lambda z, v: of_row(t, z, v, *data), z, v)[:2]
        return [value, *pull(value * 0 + 1)]

    with full_precision(rows[1]):
        return tuple(to_numpy(a).astype(float) for a in of.each_row(with_gradients, *rows, *data))


def _labelled(
    time: np.ndarray,
    names: tuple[str, ...],
    costates: np.ndarray,
    gradient: np.ndarray,
    cost: np.ndarray,
    to_go: np.ndarray,
) -> Costates:
    coords = {"time": time}
    costates, gradient, cost, to_go = map(np.ascontiguousarray, (costates, gradient, cost, to_go))
    return Costates(
        xr.DataArray(costates, coords | coordinates(names, "unit"), ("trial", "time", "unit")),
        xr.DataArray(gradient, coords, ("trial", "time", "input")),
        xr.DataArray(cost, dims="trial"),
        xr.DataArray(to_go, coords, ("trial", "time")),
    )
