"""All that is asked of a learnt control loop, as one labelled dataset: what it costs, and what it can still learn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from kpflow_dyn._arrays import to_numpy
from kpflow_dyn._problems.choice import Choice
from kpflow_dyn._problems.parameters import parameters_of, with_values
from kpflow_dyn._progress import one_by_one
from kpflow_dyn._shown import ShownAsText, type_name
from kpflow_dyn.control._costates import Cost, QuadraticCost, again, check_costs, control_size
from kpflow_dyn.control._gramians import gram
from kpflow_dyn.control._learnable import by_parameter, leading, learnable_gramian, sensitivity, share
from kpflow_dyn.control._margins import worst_disk
from kpflow_dyn.control._opened import Opened, opened
from kpflow_dyn.control._steered import Steered, steered
from kpflow_dyn.control._systems import coordinates
from kpflow_dyn.control._yardstick import excess_of_modes, is_stable, margins_of, regulated, rest_of, yardstick

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Variables = dict[str, tuple[tuple[str, ...], Any]]
NEARLY = 0.05  # by which eigenvalues differ that are told as nearly equal
ALONG = 9  # times at which the loop's margin is taken along a trajectory
ITS_OWN = "the regulator sees the plant's own state, at once"
UNITS = {"phase_margin": "degree", "disk_phase_margin": "degree", "disk_gain_margin": "dB"}

MEANINGS = {
    "learnable": "eigenvalues of J_t J_t^T",
    "reachable": "eigenvalues of the reachability Gramian of the plant up to t",
    "observable": "eigenvalues of the observability Gramian of the plant from t on",
    "learnable_reachable": "part of tr G in the leading reachable directions",
    "learnable_observable": "part of tr G in the leading observable directions",
    "cost_to_go": "cost from t on",
    "costate": "derivative of the cost to go in the state",
    "control_gradient": "derivative of the cost in the control",
    "sensitivity": "size of the gradient of the mean cost per time, by parameter",
    "gradient_norm": "size of the gradient of the mean cost, by parameter",
    "cost_ratio": "cost beside that of the regulator",
    "control_gap": "(u - u_lqr)^T R (u - u_lqr)",
    "rest_pole": "poles of the closed loop where it rests",
    "gain_margin_low": "factor on one input, downward",
    "gain_margin_high": "factor on one input, upward",
    "phase_margin": "phase of one input, the others closed",
    "disk_margin": "size of the disk of all inputs at once, at rest",
    "disk_margin_along": "disk margin of the loop linearised at t, as if it stood still",
    "excess": "cost beyond the regulator's, by mode of the closed loop",
}


@dataclass(frozen=True, eq=False, repr=False)
class LoopAnalysis(ShownAsText):
    """The result of `analyze`, in `.data`; `found["disk_margin"]` is one of its variables.

    Attributes:
        data: the dataset. Its variables are listed in the documentation of `analyze`.

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
    """Find the cost and the robustness of a learnt controller, and how far it can still learn.

        learnable   G(t) = J_t J_t^T          J_t = dz(t) / dtheta: how gradient descent can move the state at t
        reachable   Wc(t) = int_0^t ...       of the plant along the trajectory, by any control
        observable  Wo(t) = int_t^T ...       by the outputs C z from t on
        sensitivity g(t) = (D_theta pi)^T (B^T l + grad_u L),     dJ/dtheta = int g dt, with the costate l

    About rest, L(s) = -F (s - A)^{-1} B is the loop opened at the plant's input, where F is the gain of the policy. The
    regulator is that of the plant about the cost's target. The extra cost of the policy over the regulator is z^T Y z
    in linear theory and for all time. It is split by the modes of the policy's closed loop.

    In discrete time these are sums over steps, dJ/dtheta = sum_t g_t, and L(z) = -F (z - A)^{-1} B. The cost is sum_t
    L(z_t, u_t), with the control that made z_t, and the regulator is `dlqr` of the plant's step.

    A sampled loop is taken from sample to sample. Reachable is all that any sequence of held controls reaches. The cost
    is the integral under the held control. About rest and target the plant is held exactly, exp([[A, B], [0, 0]] dt).
    The regulator is `dlqr` of that, with the exact integral of the cost between samples, which has a cross term. In
    both cases the regulator sees the plant's state, without delays and limits.

    Args:
        sol: the solution of an `ODEProblem` or a `DiscreteProblem` of a `kp.models.ClosedLoop`: continuous, sampled
            (`every=`, solved anew at its samples), or of a plant in discrete time. In the last two cases the policy may
            have a memory. On a span its times are the ends of the solver's steps.
        cost: L(z, u) of the plant's state and its control, as `adjoint` takes it. Everything about the regulator needs
            a `QuadraticCost(Q, R)` whose target, with `u_target`, is a rest of the plant.
        terminal: M(z) at the end.
        C: the outputs [output, unit] for observability; all states when None.
        rank: how many reachable and observable directions the learnable ones are compared with; the number of inputs
            when None.
        params: which parameters learn, as in `kp.linearize`.
        checkpoints: parameters by name for each step of training, {step: {name: array}}. They are those of the loop or
            of its policy, such as {step: policy.state_dict()}, or the result of `kp.Recorder.read`. All variables then
            have an axis `step`. The model of `sol` does not change.
        seed: for random changes of the parameters, if these are more than 2048.

    Returns:
        A `LoopAnalysis`. Its dataset has over [trial, time]: `learnable`, `reachable`, `observable` [mode], and their
        `..._direction` [unit, mode], of the plant's states; `learnable_reachable` and `learnable_observable`, the part
        of tr G that lies in the `rank` leading directions; `cost_to_go`; `costate` [unit]; `control` and
        `control_gradient` [input]; `disk_margin_along`, of the loop linearised there as if it stood still (at some
        times; 0 where that is not stable); `control_gap`, (u - u_lqr)^T R (u - u_lqr), which in discrete time has R +
        B^T X B in the place of R.

        By [trial]: `cost`, `regulator_cost` on the same plant, and `cost_ratio`. `sensitivity` [parameter, time] is
        |g(t)| of the mean cost. `gradient_norm` [parameter] is the size of its gradient int g dt. Both use the solver's
        own steps.

        At rest: `rest` [unit]; `rest_pole` [pole] of the whole loop, with its memory and the controls that wait.
        `gain_margin_low`, `gain_margin_high` and `phase_margin` [input] are those of one input with the others closed.
        `disk_margin`, `disk_gain_margin` and `disk_phase_margin` are those of all inputs at once.

        At the target: `policy_gain`, `regulator_gain` [input, unit], with u = -K (z - z*) for both; `regulator_pole`
        and `gain_distance`; `excess` [loop_mode], the part of `excess_cost` that each mode carries; `excess_pole` and
        `excess_share` [unit]. Unknown values are NaN, and `note` says why. For example, a policy with a memory has no
        static gain, and so no `gain_distance` and `excess`.

    Raises:
        TypeError: the solution is not one of these, or the cost is not a function of state and control.
        ValueError: no closed loop, checkpoints of other parameters, or a start that comes from an encoder.
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
    loop = steered(sol, cost, terminal, params)
    check_costs(cost, terminal, loop.units, control_size(loop.model), True)
    if checkpoints is None:
        return LoopAnalysis(_Asked(loop, C, rank, seed).dataset())
    with one_by_one("checkpoints", list(_loaders(checkpoints).items())) as loaders:
        loops = ((step, replace(loop, given=_at(sol, load))) for step, load in loaders)
        found = {step: _Asked(loop, C, rank, seed).dataset() for step, loop in loops}
    return LoopAnalysis(xr.concat(list(found.values()), xr.Variable("step", list(found)), coords="minimal"))


def _loaders(checkpoints: Any) -> dict[int, Any]:
    """By step what puts the parameters into a model."""
    if isinstance(checkpoints, Mapping):
        arrays = {step: {k: to_numpy(a) for k, a in values.items()} for step, values in sorted(checkpoints.items())}
        return {
            int(step): (lambda model, values=values: with_values(model, _in_policy(values, model)))
            for step, values in arrays.items()
        }
    if not hasattr(checkpoints, "load"):
        raise TypeError(
            f"checkpoints are {type_name(checkpoints)}, expected a dict of parameters by name for each step, or "
            "kp.Recorder.read(folder)"
        )
    steps = np.asarray(checkpoints.steps).tolist()
    return {step: (lambda model, step=step: checkpoints.load(step, model)) for step in steps}


def _in_policy(values: dict[str, np.ndarray], model: Any) -> dict[str, np.ndarray]:
    """Parameters of the policy alone, such as its `state_dict()`, by the names that they have in the loop."""
    known = parameters_of(model)
    inside = {f"policy.{name}": value for name, value in values.items()}
    fits = set(inside) == set(known) and all(inside[name].shape == tuple(known[name].shape) for name in known)
    return inside if fits else values


def _at(sol: Any, load: Any) -> Any:
    problem = sol.problem
    return again(sol, problem.with_model(load(problem.backend.models.copied(problem.model))))


@dataclass(frozen=True, eq=False)
class _Asked:
    """One loop with one set of parameters; what several variables need is kept."""

    loop: Steered
    C: Any
    rank: int | None
    seed: int
    notes: list[str] = field(default_factory=list)

    def dataset(self) -> xr.Dataset:
        """All variables."""
        parts: list[Variables] = [self._directions(), self._costs(), self._sensitivities(), self._along()]
        parts += [self._at_rest(), self._beside_the_regulator()]
        found = {name: value for part in parts for name, value in part.items()}
        coords: dict[str, Any] = {"time": self.loop.time, "unit": [f"z[{i}]" for i in range(self.loop.units)]}
        coords |= {**coordinates(self.loop.names, "unit"), "parameter": list(self.loop.flow.parts)}
        found["note"] = ((), "; ".join(self.notes))
        data = xr.Dataset(found, coords)
        for name, unit in UNITS.items():
            data[name].attrs["units"] = unit
        for name, meaning in MEANINGS.items():
            data[name].attrs["long_name"] = meaning
        for dim in ("mode", "pole", "loop_mode", "input"):
            data.coords[dim] = np.arange(data.sizes[dim])
        for name in ("reachable", "observable"):
            data[f"learnable_{name}"].attrs["rank"] = self.rank or self.loop.u.shape[-1]
        return data

    @cached_property
    def rest(self) -> Opened | None:
        """Near the cost's target, or from where the trials end."""
        cost = self.loop.cost
        found = rest_of(self.loop, cost.target if isinstance(cost, QuadraticCost) else None)
        if found is None:
            self.notes.append("no rest was found, so there are no margins at one")
        return found

    def _directions(self) -> Variables:
        loop = self.loop
        learnt, system = learnable_gramian(loop.flow, loop.units, self.seed), loop.system(self.C)
        of = {"learnable": learnt, "reachable": gram(system, "c").W.values, "observable": gram(system, "o").W.values}
        found: Variables = {}
        rank = self.rank or loop.u.shape[-1]
        for name, W in of.items():
            values, vectors = leading(W)
            found[name] = ("trial", "time", "mode"), np.maximum(values, 0)
            found[f"{name}_direction"] = ("trial", "time", "unit", "mode"), vectors
            if name != "learnable":
                inside = np.where(values[..., 0] > 0, share(learnt, vectors[..., :rank]), np.nan)
                found[f"learnable_{name}"] = ("trial", "time"), inside
        return found

    def _costs(self) -> Variables:
        found = self.loop.costates
        return {
            "cost": (("trial",), found.cost.values),
            "cost_to_go": (("trial", "time"), found.cost_to_go.values),
            "costate": (("trial", "time", "unit"), found.costate.values[..., : self.loop.units]),
            "control": (("trial", "time", "input"), self.loop.u),
            "control_gradient": (("trial", "time", "input"), found.gradient.values),
        }

    def _sensitivities(self) -> Variables:
        loop = self.loop
        rows = sensitivity(loop.flow, loop.covector) / len(loop.u)
        both = (by_parameter(loop.flow, found) for found in (rows, loop.gradient(rows)))
        each, whole = (np.stack([np.linalg.norm(part, axis=-1) for part in found.values()]) for found in both)
        return {"sensitivity": (("parameter", "time"), each), "gradient_norm": (("parameter",), whole)}

    def _along(self) -> Variables:
        """The disk margin of the loop linearised at some times, as if it stood still."""
        rows, x = self.loop.before, self.loop.x
        trials, times = rows.shape[:2]
        found = np.full((trials, times), np.nan)
        chosen = np.unique(np.linspace(0, times - 1, ALONG).round().astype(int)).tolist()
        frozen = opened(self.loop, rows[:, chosen], None if x is None else x[:, chosen])
        found[:, chosen] = [[worst_disk(at.loop) if is_stable(at) else 0.0 for at in row] for row in frozen]
        return {"disk_margin_along": (("trial", "time"), found)}

    def _at_rest(self) -> Variables:
        rest, inputs, units = self.rest, self.loop.u.shape[-1], self.loop.units
        if rest is None:
            nothing, poles = np.full(inputs, np.nan), np.full(units, np.nan) + 0j
            values = (np.full(units, np.nan), poles, nothing, nothing, nothing, np.nan, np.nan, np.nan)
        else:
            found = margins_of(rest)
            poles: Any = np.linalg.eigvals(rest.closed).astype(complex)
            poles = poles[np.argsort(-poles.real if self.loop.dt is None else -np.abs(poles), kind="stable")]
            values = (rest.z, poles, found.gain_low, found.gain_high, found.phase)
            values += (found.disk, found.disk_gain, found.disk_phase)
        dims = [("unit",), ("pole",), ("input",), ("input",), ("input",), (), (), ()]
        names = ["rest", "rest_pole", "gain_margin_low", "gain_margin_high", "phase_margin"]
        names += ["disk_margin", "disk_gain_margin", "disk_phase_margin"]
        return dict(zip(names, zip(dims, values, strict=True), strict=True))

    def _beside_the_regulator(self) -> Variables:
        loop, cost = self.loop, self.loop.cost
        trials, times, inputs = loop.u.shape
        units = loop.units
        costs, gap, F = (np.full(shape, np.nan) for shape in ((trials,), (trials, times), (inputs, units)))
        K, distance, poles = F, np.nan, np.full(units, np.nan) + 0j
        slowest = poles
        parts, shares = np.full(units, np.nan), np.full((units, units), np.nan)
        try:
            found = yardstick(loop)
        except ValueError as error:
            self.notes.append(f"no regulator to compare with: {error}")
        else:
            assert isinstance(cost, QuadraticCost)
            K, distance, slowest = found.regulator.K, found.gain_distance, found.regulator.eigenvalues.astype(complex)
            costs = regulated(loop, K)
            z = loop.z - cost.target
            off = loop.u - cost.u_target + z @ K.T
            gap = np.einsum("bti,ij,btj->bt", off, found.weight, off)
            if found.policy is None:
                self.notes.append(
                    f"a policy with a memory has no static gain, so no gain_distance and excess; {ITS_OWN}"
                )
            else:
                F = -found.policy.gain
                if found.policy.is_static:
                    poles, parts, shares = excess_of_modes(found, found.policy, z[:, 0])
                    if np.isnan(parts).any():
                        self.notes.append("about the target the policy's loop is unstable or defective, so no excess")
                else:
                    self.notes.append(f"the control acts late, or depends on that before, so no excess; {ITS_OWN}")
        return {
            "regulator_cost": (("trial",), costs),
            "cost_ratio": (("trial",), loop.costates.cost.values / costs),
            "policy_gain": (("input", "unit"), F),
            "regulator_gain": (("input", "unit"), K),
            "regulator_pole": (("loop_mode",), slowest),
            "gain_distance": ((), distance),
            "control_gap": (("trial", "time"), gap),
            "excess": (("loop_mode",), parts),
            "excess_pole": (("loop_mode",), np.asarray(poles, complex)),
            "excess_share": (("loop_mode", "unit"), shares),
            "excess_cost": ((), float(parts.sum())),
        }


def _told(data: xr.Dataset, step: Any) -> str:
    """The main numbers in words."""
    lines = [] if step is None else [f"step {step}"]
    off = f"; gain off the regulator's by {float(data.gain_distance):.3g}" if data.gain_distance.notnull() else ""
    lines.append(f"cost {float(data.cost.mean()):.4g}{_beside(data)}{off}")
    if data.disk_margin.notnull():
        lines.append(_resting(data))
    last = data.isel(time=-1)
    lines.append(_learnable(last))
    most = data.gradient_norm.sortby(data.gradient_norm, ascending=False)
    lines.append("gradient of the cost: " + ", ".join(f"{float(v):.3g} in {v.parameter.item()}" for v in most[:3]))
    if data.excess.notnull().all():
        worst = data.isel(loop_mode=0)
        where = worst.excess_share.values
        lines.append(
            f"linearised about the cost's target it costs {float(data.excess_cost):.3g} more than the regulator; most "
            f"of that is in its mode with pole {complex(worst.excess_pole.item()):.3g}, which shows most in "
            f"{data.unit.values[int(where.argmax())]}"
        )
    if str(data.note.values):
        lines.append(str(data.note.values))
    return "\n".join(lines)


def _learnable(last: xr.Dataset) -> str:
    """What can be learnt at the end, and how much of it the plant reaches most easily."""
    inside, size = 100 * float(last.learnable_reachable.mean()), float(last.learnable.sum("mode").mean())
    rank, modes = last.learnable_reachable.attrs["rank"], last.sizes["mode"]
    told = f"learnable at the end: {size:.4g}, {inside:.0f} % of it in the {rank} of {modes} most reachable directions"
    values = last.reachable.values
    if rank < modes and (equal := values[:, rank] > (1 - NEARLY) * values[:, rank - 1]).any():
        told += (
            f". In {int(equal.sum())} of {len(equal)} trials the reachable eigenvalues {rank} and {rank + 1} are "
            "nearly equal there, so a small change moves the directions and this share; give another rank"
        )
    return told


def _beside(data: xr.Dataset) -> str:
    """The mean cost beside that of the regulator: one start that the regulator finds cheap does not decide it."""
    ratios = data.cost_ratio
    if not ratios.notnull().all():
        return ""
    whole = float(data.cost.mean() / data.regulator_cost.mean())
    if ratios.size == 1:
        return f", {whole:.4g} times the regulator's"
    middle, worst = float(ratios.median()), float(ratios.max())
    return f", {whole:.4g} times the regulator's (mean by mean; median of trials {middle:.4g}, worst {worst:.4g})"


def _resting(data: xr.Dataset) -> str:
    """The loop where it rests, which is at the cost's target only if the policy brings it there."""
    slowest = complex(data.rest_pole.values[0])
    if float(data.disk_margin) == 0:
        return f"unstable at rest: pole {slowest:.3g}; it has no margins"
    return (
        f"where it rests: slowest pole {slowest:.3g}, phase margins {data.phase_margin.values.round(1)} degrees, "
        f"disk margin {float(data.disk_margin):.3g}"
    )
