"""Torchode as a library that solves ODEs: each trial with steps of its own, all of them in one batch."""

import importlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kpflow_dyn._arrays import like_numpy, to_numpy
from kpflow_dyn._problems.events import is_hybrid
from kpflow_dyn._problems.inputs import inputs_at, jumps_within, stops_of
from kpflow_dyn._problems.problems import ODEProblem
from kpflow_dyn._problems.steps import AcceptedSteps, Tableau, call_field
from kpflow_dyn._shown import type_name
from kpflow_dyn._torch.torchdiffeq_library import between_jumps
from kpflow_dyn.ode._libraries import Failed, Options, Solved

EXPECTED = (
    "expected an instance of torchode's step methods, torchode.Tsit5(), or of its solver, "
    "torchode.AutoDiffAdjoint(torchode.Tsit5(), torchode.PIDController(atol, rtol, 0.2, 0.5, 0.0))"
)


def _torchode(part: str = "") -> Any:
    """The package, or a module of it."""
    return importlib.import_module(f"torchode.{part}".rstrip("."))


class Torchode:
    """The explicit step methods of torchode, alone or with a controller in an AutoDiffAdjoint, and subclasses."""

    name, framework = "torchode", "torch"

    def accepts(self, alg: Any) -> bool:
        """Whether it is of torchode, or a class of its."""
        kind = alg if isinstance(alg, type) else type(alg)
        return any(base.__module__.partition(".")[0] == "torchode" for base in kind.__mro__)

    def chooses_steps(self, alg: Any) -> bool:
        """Whether there is a controller that does; raises for what is no solver."""
        torchode = _torchode()

        method, controller = _parts(alg)
        has_error = not isinstance(method, torchode.Euler)
        return has_error and not isinstance(controller, torchode.FixedStepController)

    def posed(self, problem: ODEProblem) -> ODEProblem:
        """The problem of a field that takes t [trial], as torchode's do; of any other field as it is."""
        if is_hybrid(problem.f):  # whose trials are solved one by one
            return problem
        form = replace(problem.form, own_times=True)
        f = problem.backend.models.in_form(problem.backend.models.field_of(problem.f), form, problem.arguments)
        changed = problem.with_parts(f=f, form=form)
        return changed if isinstance(f, nn.Module) and _takes_times(changed) else problem

    def solve(self, problem: ODEProblem, alg: Any, times: np.ndarray, options: Options) -> Solved:
        """See `kpflow_dyn.ode.Library`."""
        method, controller = _parts(alg)
        most = min(options.max_steps, getattr(alg, "max_steps", None) or options.max_steps)
        run = _Run(problem, method, controller or _controller(options), most)
        ends = np.concatenate([problem.t[:1], stops_of(problem), problem.t[-1:]])
        ends, jumps = (ends if options.steps is None else options.steps), jumps_within(problem)
        for start, end in pairwise(ends):
            run.go(*between_jumps(np.array([start, end]), jumps, problem.z0), given=options.steps is not None)
        steps = run.steps(tableau_of(method))
        taken = (steps.dt > 0).sum(1)
        return Solved(steps, stats={"steps": int(taken.max()), "rejected": run.rejected})


TORCHODE = Torchode()


def _parts(alg: Any) -> tuple[nn.Module, nn.Module | None]:
    """The step method of a solver and its controller; none of a method alone."""
    torchode, runge_kutta = _torchode(), _torchode("single_step_methods.runge_kutta")

    if isinstance(alg, torchode.BacksolveAdjoint | torchode.JointBacksolveAdjoint):
        raise TypeError(
            f"alg is {type_name(alg)}, whose gradient is not that of its steps; {EXPECTED}, and linearize with "
            "sensealg=kp.InterpolatingAdjoint() for the derivative of the equation"
        )
    found = (alg.step_method, alg.step_size_controller) if isinstance(alg, torchode.AutoDiffAdjoint) else (alg, None)
    if not isinstance(found[0], runge_kutta.ExplicitRungeKutta | torchode.Euler):
        raise TypeError(f"alg is {alg.__name__ if isinstance(alg, type) else type_name(alg)}, {EXPECTED}")
    return found


def _controller(options: Options) -> nn.Module:
    """Torchode's own choice, with these tolerances."""
    torchode = _torchode()

    return torchode.PIDController(options.atol, options.rtol, pcoeff=0.2, icoeff=0.5, dcoeff=0.0)


@torch.no_grad()
def _takes_times(problem: ODEProblem) -> bool:
    """Whether the field takes a time for each trial, and uses for each trial its own."""
    z0, n = problem.z0.detach(), len(problem.z0)
    t = like_numpy(np.linspace(problem.t[0], problem.t[-1], n), z0)
    x = inputs_at(problem, np.full((n, 1), problem.t[0]))
    rows = [z0] if x is None else [z0, x[:, 0]]
    try:
        whole = problem.f(t, *rows)
        each = torch.cat([problem.f(t[[i]], *(row[[i]] for row in rows)) for i in range(n)])
        rounding = 1e3 * torch.finfo(z0.dtype).eps * float(each.abs().max())
        return whole.shape == z0.shape and torch.allclose(whole, each, rtol=0, atol=rounding, equal_nan=True)
    except Exception:  # of the user's field, which may be one of a single time
        return False


@dataclass
class _Run:
    """A solve from one time to the next, and the steps on the way."""

    problem: ODEProblem
    method: nn.Module
    controller: nn.Module
    max_steps: int

    def __post_init__(self) -> None:
        self.tried = self.rejected = 0
        self.state = self.problem.z0.detach()
        self.taken: list[list[tuple[float, float, float, Tensor]]] = [[] for _ in self.state]  # t, dt, end and state

    def go(self, start: float, end: float, given: bool) -> None:
        """Solve between two times, in one step where the steps are given."""
        torchode = _torchode()

        problem, z = self.problem, self.state

        def rate(t: Tensor, z: Tensor) -> Tensor:
            t = t.clamp(start, end)
            x = inputs_at(problem, to_numpy(t).astype(np.float64)[:, None])
            return call_field(problem.f, t, z, None if x is None else x[:, 0])

        begin, last = (torch.full_like(z[:, 0], time) for time in (start, end))
        controller = _Recording(torchode.FixedStepController() if given else self.controller)
        most = None if given else max(self.max_steps - self.tried, 1)
        solver = torchode.AutoDiffAdjoint(self.method, controller, max_steps=most)
        posed = torchode.InitialValueProblem(z, begin, last)
        solved = solver.solve(posed, torchode.ODETerm(rate), last - begin if given else None)
        self._keep(controller.tried, end)
        self._check(solved.status, given)

    def _keep(self, tried: list[tuple[Tensor, ...]], end: float) -> None:
        """The steps of each trial that were taken before its end."""
        state = self.state.clone()
        for t, dt, after, accept in tried:
            running = to_numpy(t) < end
            taken = running & to_numpy(accept)
            self.rejected += int((running & ~taken).any())
            for i in np.flatnonzero(taken):
                state[i] = after[i]
                self.taken[i].append((float(t[i]), float(dt[i]), end, after[i]))
        self.tried += len(tried)
        self.state = state

    def _check(self, status: Tensor, given: bool) -> None:
        finite = torch.isfinite(self.state).all(1)
        failed = ~finite if given else (status > 0) | ~finite
        if failed.any():
            times = [float(steps[-1][0]) if steps else float(self.problem.t[0]) for steps in self.taken]
            reason = f"reached max_steps = {self.max_steps}"
            why = ["left the finite numbers" if code != 3 else reason for code in (status * finite).tolist()]
            failed_trials = failed.nonzero()[:, 0].tolist()
            raise Failed({i: (why[i], times[i]) for i in failed_trials}, apart=False)

    def steps(self, tableau: Tableau) -> AcceptedSteps:
        """Those of all trials, padded at the end, after one of length zero."""
        z0, t0, end = self.problem.z0.detach(), float(self.problem.t[0]), float(self.problem.t[-1])
        most = max(map(len, self.taken))
        rows = [[(t0, 0.0, t0, z0[i]), *taken] for i, taken in enumerate(self.taken)]
        rows = [row + [(end, 0.0, end, row[-1][3])] * (most + 1 - len(row)) for row in rows]
        t, dt, ends = (np.array([[step[k] for step in row] for row in rows]) for k in range(3))
        after = torch.stack([torch.stack([step[3] for step in row]) for row in rows])
        before = torch.cat([z0[:, None], after[:, :-1]], 1)
        at = np.minimum(t[..., None] + tableau.c * dt[..., None], ends[..., None])  # as `rate` has it
        return AcceptedSteps(tableau, t, dt, before, after, at)


class _Recording(nn.Module):
    """A controller that notes the steps that it is shown."""

    def __init__(self, controller: Any) -> None:
        super().__init__()
        self.controller, self.init, self.merge_states = controller, controller.init, controller.merge_states
        self.tried: list[tuple[Tensor, ...]] = []

    def adapt_step_size(self, t: Tensor, dt: Tensor, y: Tensor, result: Any, state: Any, stats: Any) -> Any:
        """What the controller says."""
        found = self.controller.adapt_step_size(t, dt, y, result, state, stats)
        self.tried.append((t, dt, result.y, found[0]))
        return found


def tableau_of(method: Any) -> Tableau:
    """The tableau of a step method, with its own dense output."""
    torchode = _torchode()

    if isinstance(method, torchode.Euler):
        one = np.ones(1)
        return Tableau(np.zeros((1, 1)), one, np.zeros(1), lambda theta: np.asarray(theta)[..., None] - 1)
    a, b, c = (getattr(method.tableau, name).double().numpy() for name in "abc")
    return Tableau(a, b, c, _Interpolation(method, b))


@dataclass(frozen=True, eq=False)
class _Interpolation:
    """What torchode's interpolation, which is linear, makes of unit stages: y_1 = 0, so y_0 = -sum_i b_i k_i."""

    method: Any
    b: np.ndarray

    def __call__(self, theta: np.ndarray) -> np.ndarray:
        theta, count = np.asarray(theta, np.float64), len(self.b)
        zero, one, k = torch.zeros(1).double(), torch.ones(1).double(), torch.eye(count).double()[:, None]
        start, end = torch.from_numpy(-self.b)[None], torch.zeros(1, count).double()
        given = _torchode("single_step_methods.runge_kutta").ERKInterpolationData
        built = self.method.build_interpolation(given(self.method.tableau, zero, one, start, end, k))
        at = torch.from_numpy(theta.ravel())
        w = built.evaluate(at, torch.zeros(len(at), dtype=torch.long)).numpy().reshape(*theta.shape, count)
        return np.where(theta[..., None] == 1, 0.0, w)
