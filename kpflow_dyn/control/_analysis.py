"""All that is asked of a learnt control loop, as one labelled dataset: what it costs, and what it can still learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from kpflow_dyn._arrays import Array, to_numpy
from kpflow_dyn._flows.flow import Flow
from kpflow_dyn._linearize import linearize
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.inputs import inputs_at
from kpflow_dyn._problems.parameters import with_values
from kpflow_dyn._problems.solutions import ODESolution
from kpflow_dyn._solve import solve
from kpflow_dyn.control._costates import Cost, Costates, QuadraticCost, adjoint
from kpflow_dyn.control._gramians import gram
from kpflow_dyn.control._learnable import by_parameter, leading, learnable_gramian, sensitivity, share
from kpflow_dyn.control._linearisation import linearize_ltv, mesh_edges
from kpflow_dyn.control._loops import is_closed_loop
from kpflow_dyn.control._margins import worst_disk
from kpflow_dyn.control._systems import coordinates
from kpflow_dyn.control._training_cost import training_cost
from kpflow_dyn.control._yardstick import (
    Rest,
    controls,
    excess_of_modes,
    margins_of,
    regulated,
    rest_near,
    rests_of,
    yardstick,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Variables = dict[str, tuple[tuple[str, ...], Any]]
ALONG = 9  # times at which the loop's margin is taken along a trajectory
UNITS = {"phase_margin": "degree", "disk_phase_margin": "degree", "disk_gain_margin": "dB"}


@dataclass(frozen=True, eq=False)
class LoopAnalysis:
    """What `analyze` found, as `.data`; `found["disk_margin"]` is one of its variables.

    Attributes:
        data: the dataset, whose variables the documentation of `analyze` lists.

    Example as `analyze`.
    """

    data: xr.Dataset

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.data[name]

    def to_xarray(self) -> xr.Dataset:
        """The dataset."""
        return self.data

    def plot(self, dark: bool = False) -> Figure:
        """Learnable, reachable and observable directions, cost-to-go, sensitivity and margins; or these over steps."""
        from kpflow_dyn.figures import _control as figures

        return figures.loop(self.data, dark=dark)

    def __str__(self) -> str:
        steps = self.data.step.values if "step" in self.data.dims else [None]
        return "\n\n".join(_told(self.data if step is None else self.data.sel(step=step), step) for step in steps)


def analyze(
    sol: Any,
    cost: Cost,
    terminal: Cost | None = None,
    *,
    C: Any = None,
    rank: int | None = None,
    params: Choice = None,
    checkpoints: Any = None,
    seed: int = 0,
) -> LoopAnalysis:
    """What a learnt controller costs, how robust it is, and what it can still learn.

        learnable   G(t) = J_t J_t^T          J_t = dz(t) / dtheta: how gradient descent can move the state at t
        reachable   Wc(t) = int_0^t ...       of the plant along the trajectory, by any control
        observable  Wo(t) = int_t^T ...       by the outputs C z from t on
        sensitivity g(t) = (D_theta pi)^T (B^T l + grad_u L),     dJ/dtheta = int g dt, with the costate l

    About rest, L(s) = -F (s - A)^{-1} B is the loop opened at the plant's input, F the gain of the policy. The
    regulator is that of the plant about the cost's target. What the policy costs more than it, z^T Y z in linear theory
    and for all time, is split by the modes of the policy's closed loop.

    Args:
        sol: the solution of an `ODEProblem` of a `kp.models.ClosedLoop`. On a span its times are the ends of the
            solver's steps.
        cost: L(z, u), as `adjoint` takes it. What follows on the regulator needs a `QuadraticCost(Q, R)` whose target,
            with `u_target`, is a rest of the plant.
        terminal: M(z) at the end.
        C: the outputs [output, unit] for what is observable; all states when None.
        rank: how many reachable and observable directions what is learnable is compared with; as many as there are
            inputs when None.
        params: which parameters learn, as in `kp.linearize`.
        checkpoints: parameters by name for each step of training, {step: {name: array}}, or what `kp.Recorder.read`
            gives; then all variables have an axis `step`. The model of `sol` is left as it is.
        seed: of random changes of the parameters, where these are more than 2048.

    Returns:
        A `LoopAnalysis`. Its dataset has over [trial, time]: `learnable`, `reachable`, `observable` [mode], and their
        `..._direction` [unit, mode]; `learnable_reachable` and `learnable_observable`, which part of tr G lies in the
        `rank` leading directions; `cost_to_go`; `costate` [unit]; `control` and `control_gradient` [input];
        `disk_margin_along`, of the loop linearised there as if it stood still (at some times; 0 where that is not
        stable); `control_gap`, (u - u_lqr)^T R (u - u_lqr). By [trial] `cost`, `regulator_cost` on the same plant, and
        `cost_ratio`. `sensitivity` [parameter, time] is |g(t)| of the mean cost, `gradient_norm` [parameter] its
        integral's. At rest: `rest` [unit], `rest_pole` [pole], `gain_margin_low`, `gain_margin_high`, `phase_margin`
        [input], of one input with the others closed, and `disk_margin`, `disk_gain_margin`, `disk_phase_margin` of all
        at once. `policy_gain`, `regulator_gain` [input, unit] at the target, with u = -K (z - z*) for both, and
        `gain_distance`; `excess` [loop_mode], what each mode carries of `excess_cost`, `excess_pole` and
        `excess_share` [unit]. What is not known is NaN, and `note` says why.

    Raises:
        TypeError: no such solution.
        ValueError: no closed loop, or checkpoints of other parameters.
    Source: Astrom, Murray, "Feedback Systems" (2008); Anderson, Moore, "Optimal Control" (1990); for margins as in
        `disk_margins`; docs/theory.md for the NTK.

    >>> import numpy as np, torch, kpflow_dyn as kp
    >>> plant, policy = kp.models.DoubleIntegrator(), torch.nn.Linear(2, 1).double()
    >>> with torch.no_grad():
    ...     _ = policy.weight.copy_(torch.tensor([[-1.0, -2.0]])), policy.bias.zero_()
    >>> start = torch.eye(2, dtype=torch.float64)
    >>> problem = kp.ODEProblem(kp.models.ClosedLoop(plant, policy), start, np.linspace(0, 5, 51))
    >>> cost = kp.control.QuadraticCost(np.eye(2), [[1.0]])
    >>> found = kp.control.analyze(kp.solve(problem, "rk4"), cost)
    >>> found["phase_margin"].values.round(1), bool(found["cost_ratio"].min() > 0.99)
    (array([76.3]), True)
    """
    if not isinstance(sol, ODESolution):
        raise TypeError(
            f"analyze takes the solution of an ODEProblem of a ClosedLoop, got {type(sol).__name__}; of sampled loops, "
            "cells, noise and delays take its parts: training_cost, gram, adjoint, kp.contributions, margins of the "
            "opened loop (docs/limits.md)"
        )
    if not is_closed_loop(sol.problem.f):
        raise ValueError("analyze needs a plant and a policy, kp.models.ClosedLoop(plant, policy), as the problem's f")
    if checkpoints is None:
        return LoopAnalysis(_Loop(sol, cost, terminal, C, rank, params, seed).dataset())
    found = {
        step: _Loop(_at(sol, load), cost, terminal, C, rank, params, seed).dataset()
        for step, load in _loaders(checkpoints).items()
    }
    return LoopAnalysis(xr.concat(list(found.values()), xr.Variable("step", list(found)), coords="minimal"))


def _loaders(checkpoints: Any) -> dict[int, Any]:
    """By step what puts the parameters into a model."""
    if isinstance(checkpoints, Mapping):
        arrays = {step: {k: to_numpy(a) for k, a in values.items()} for step, values in sorted(checkpoints.items())}
        return {int(step): (lambda model, values=values: with_values(model, values)) for step, values in arrays.items()}
    if not hasattr(checkpoints, "load"):
        raise TypeError(
            f"checkpoints are {type(checkpoints).__name__}, expected a dict of parameters by name for each step, or "
            "kp.Recorder.read(folder)"
        )
    steps = np.asarray(checkpoints.steps).tolist()
    return {step: (lambda model, step=step: checkpoints.load(step, model)) for step in steps}


def _at(sol: ODESolution, load: Any) -> ODESolution:
    problem = sol.problem
    found: Any = solve(problem.remake(f=load(problem.backend.models.copied(problem.f))), sol.alg, **sol.options)
    return found


@dataclass(frozen=True, eq=False)
class _Loop:
    """One loop with one set of parameters; what several variables need is kept."""

    given: ODESolution
    cost: Cost
    terminal: Cost | None
    C: Any
    rank: int | None
    params: Choice
    seed: int
    notes: list[str] = field(default_factory=list)

    def dataset(self) -> xr.Dataset:
        """All variables."""
        parts: list[Variables] = [self._directions(), self._costs(), self._sensitivities(), self._along()]
        parts += [_at_rest(self), _beside_the_regulator(self)]
        found = {name: value for part in parts for name, value in part.items()}
        coords: dict[str, Any] = {"time": self.sol.problem.t, **coordinates(self.names, "unit")}
        coords["parameter"] = list(self.flow.parts)
        found["note"] = ((), "; ".join(self.notes))
        data = xr.Dataset(found, coords)
        for name, unit in UNITS.items():
            data[name].attrs["units"] = unit
        return data

    # What is computed once

    @cached_property
    def sol(self) -> ODESolution:
        """On a grid of times."""
        problem = self.given.problem
        if not problem.is_span:
            return self.given
        found: Any = solve(problem.remake(t=mesh_edges(self.given)[1]), self.given.alg, **self.given.options)
        return found

    @cached_property
    def flow(self) -> Flow:
        """Of the loop with the integral of its control."""
        problem = training_cost(self.sol.problem, self.cost, self.terminal).problem
        return linearize(solve(problem, self.sol.alg, **self.sol.options), params=self.params)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(getattr(self.sol.problem.f.plant, "state_names", ()))

    @property
    def units(self) -> int:
        return int(self.sol.problem.z0.shape[-1])

    @cached_property
    def costates(self) -> Costates:
        return adjoint(self.sol, self.cost, self.terminal, t=self.sol.problem.t)

    @cached_property
    def rows(self) -> tuple[Array, Array | None]:
        """States and inputs at the times [trial, time, ...]."""
        times = np.broadcast_to(self.sol.problem.t, (len(self.sol.state), len(self.sol.problem.t)))
        return self.sol(self.sol.problem.t), inputs_at(self.sol.problem, times)

    @cached_property
    def u(self) -> np.ndarray:
        """The control [trial, time, input]."""
        return controls(self.sol, *self.rows)[0]

    @property
    def last_input(self) -> Array | None:
        """The input of the first trial at the end, which a rest is found for."""
        x = self.rows[1]
        return None if x is None else x[0, -1]

    @cached_property
    def rest(self) -> Rest | None:
        """Near the cost's target, or from where the trials end."""
        ends = to_numpy(self.sol.state)[:, -1].astype(float)
        target = self.cost.target if isinstance(self.cost, QuadraticCost) else ends.mean(0)
        found = rest_near(self.sol, np.concatenate([np.asarray(target, float)[None], ends]), self.last_input)
        if found is None:
            self.notes.append("no rest was found, so there are no margins at one")
        return found

    # The variables

    def _directions(self) -> Variables:
        learnt = learnable_gramian(self.flow, self.units, self.seed)
        of = {"learnable": learnt}
        for name, kind in (("reachable", "c"), ("observable", "o")):
            W = gram(self.sol, kind, loop="open", C=self.C, t=self.sol.problem.t).W.values
            of[name] = W
        found: Variables = {}
        rank = self.rank or self.u.shape[-1]
        for name, W in of.items():
            values, vectors = leading(W)
            found[name] = ("trial", "time", "mode"), np.maximum(values, 0)
            found[f"{name}_direction"] = ("trial", "time", "unit", "mode"), vectors
            if name != "learnable":
                inside = np.where(values[..., 0] > 0, share(learnt, vectors[..., :rank]), np.nan)
                found[f"learnable_{name}"] = ("trial", "time"), inside
        return found

    def _costs(self) -> Variables:
        found = self.costates
        return {
            "cost": (("trial",), found.cost.values),
            "cost_to_go": (("trial", "time"), found.cost_to_go.values),
            "costate": (("trial", "time", "unit"), found.costate.values),
            "control": (("trial", "time", "input"), self.u),
            "control_gradient": (("trial", "time", "input"), found.gradient.values),
        }

    def _sensitivities(self) -> Variables:
        """The covector of [z, int u]' is [l, grad_u L]."""
        trials = len(self.sol.state)
        pushed = np.einsum("btnm,btn->btm", self._B(), self.costates.costate.values)
        direct = self.costates.gradient.values - pushed
        covector = np.concatenate([self.costates.costate.values, direct], -1)
        parts = by_parameter(self.flow, sensitivity(self.flow, covector) / trials)
        weights = np.gradient(self.sol.problem.t) if len(self.sol.problem.t) > 1 else np.ones(1)
        weights[[0, -1]] /= 2
        each = np.stack([np.linalg.norm(part, axis=-1) for part in parts.values()])
        whole = np.stack([np.linalg.norm(weights @ part) for part in parts.values()])
        return {"sensitivity": (("parameter", "time"), each), "gradient_norm": (("parameter",), whole)}

    def _B(self) -> np.ndarray:
        return linearize_ltv(self.sol, inputs="control", t=self.sol.problem.t).B.values

    def _along(self) -> Variables:
        """The disk margin of the loop linearised at some times, as if it stood still."""
        state, x = self.rows
        trials, times = state.shape[:2]
        found = np.full((trials, times), np.nan)
        chosen = np.unique(np.linspace(0, times - 1, ALONG).round().astype(int)).tolist()
        frozen = rests_of(self.sol, state[:, chosen], None if x is None else x[:, chosen])
        found[:, chosen] = [[worst_disk(at.loop) if at.is_stable else 0.0 for at in row] for row in frozen]
        return {"disk_margin_along": (("trial", "time"), found)}


def _at_rest(loop: _Loop) -> Variables:
    rest, inputs = loop.rest, loop.u.shape[-1]
    if rest is None:
        nothing, of_states = np.full(inputs, np.nan), np.full(loop.units, np.nan)
        values = (of_states, of_states + 0j, nothing, nothing, nothing, np.nan, np.nan, np.nan)
    else:
        found = margins_of(rest)
        poles: Any = np.linalg.eigvals(rest.closed).astype(complex)
        poles = poles[np.argsort(-poles.real, kind="stable")]
        values = (rest.z, poles, found.gain_low, found.gain_high, found.phase)
        values += (found.disk, found.disk_gain, found.disk_phase)
    dims = [("unit",), ("pole",), ("input",), ("input",), ("input",), (), (), ()]
    names = ["rest", "rest_pole", "gain_margin_low", "gain_margin_high", "phase_margin"]
    names += ["disk_margin", "disk_gain_margin", "disk_phase_margin"]
    return dict(zip(names, zip(dims, values, strict=True), strict=True))


def _beside_the_regulator(loop: _Loop) -> Variables:
    trials, times, inputs = loop.u.shape
    gain, of_units = np.full((inputs, loop.units), np.nan), np.full(loop.units, np.nan)
    try:
        found = yardstick(loop.sol, loop.cost, loop.last_input)
    except ValueError as error:
        loop.notes.append(f"no regulator to compare with: {error}")
        costs, F, K, distance, total = np.full(trials, np.nan), gain, gain, np.nan, np.nan
        gap = np.full((trials, times), np.nan)
        poles, parts, shares = of_units + 0j, of_units, np.full((loop.units, loop.units), np.nan)
    else:
        cost: Any = loop.cost
        K, F, distance = found.regulator.K, -found.target.F, found.gain_distance
        costs = regulated(loop.sol, cost, loop.terminal, K)
        state = to_numpy(loop.rows[0]).astype(float) - cost.target
        off = loop.u - cost.u_target + state @ K.T
        gap = np.einsum("bti,ij,btj->bt", off, cost.R, off)
        poles, parts, shares = excess_of_modes(found, cost.R, state[:, 0])
        total = float(parts.sum())
    return {
        "regulator_cost": (("trial",), costs),
        "cost_ratio": (("trial",), loop.costates.cost.values / costs),
        "policy_gain": (("input", "unit"), F),
        "regulator_gain": (("input", "unit"), K),
        "gain_distance": ((), distance),
        "control_gap": (("trial", "time"), gap),
        "excess": (("loop_mode",), parts),
        "excess_pole": (("loop_mode",), np.asarray(poles, complex)),
        "excess_share": (("loop_mode", "unit"), shares),
        "excess_cost": ((), total),
    }


def _told(data: xr.Dataset, step: Any) -> str:
    """The main numbers in words."""
    lines = [] if step is None else [f"step {step}"]
    ratio = f", {float(data.cost_ratio.mean()):.4g} times the regulator's" if data.cost_ratio.notnull().all() else ""
    lines.append(
        f"cost {float(data.cost.mean()):.4g}{ratio}; gain off the regulator's by {float(data.gain_distance):.3g}"
    )
    slowest = complex(data.rest_pole.values[0])
    lines.append(
        f"at rest: slowest pole {slowest:.3g}, phase margins {data.phase_margin.values.round(1)} degrees, "
        f"disk margin {float(data.disk_margin):.3g}"
    )
    last = data.isel(time=-1)
    inside, size = 100 * float(last.learnable_reachable.mean()), float(last.learnable.sum("mode").mean())
    lines.append(f"learnable at the end: {size:.4g}, {inside:.0f} % of it in the most reachable directions")
    most = data.gradient_norm.sortby(data.gradient_norm, ascending=False)
    lines.append("gradient of the cost: " + ", ".join(f"{float(v):.3g} in {v.parameter.item()}" for v in most[:3]))
    if data.excess.notnull().all():
        worst = data.isel(loop_mode=0)
        where = worst.excess_share.values
        names = data.unit.values if "unit" in data.coords else np.arange(len(where))
        lines.append(
            f"in linear theory it costs {float(data.excess_cost):.3g} more than the regulator; most is carried by the "
            f"mode at {complex(worst.excess_pole.item()):.3g}, of {names[int(where.argmax())]}"
        )
    if str(data.note.values):
        lines.append(str(data.note.values))
    return "\n".join(lines)
